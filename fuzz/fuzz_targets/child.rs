#![no_main]
//! What the confined writer of NTFS sends: it may be in the hands of whoever made the disk, and must
//! not reach anything outside its volume.

use std::io::{self, Cursor, Read, Write};
use std::sync::Arc;

use hyper2kvm::block::{BlockRead, BlockWrite};
use hyper2kvm::guest::confined::answered_by;
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

const START: u64 = 1 << 20;
const LEN: u64 = 128 << 20;

/// Everything outside the volume is a trap.
struct Disk;

fn inside(offset: u64, len: usize) {
    let end = offset.checked_add(len as u64);
    assert!(offset >= START && end.is_some_and(|end| end <= START + LEN));
}

impl BlockRead for Disk {
    fn size(&self) -> u64 {
        2 * START + LEN
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        inside(offset, buf.len());
        Ok(())
    }
}

impl BlockWrite for Disk {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        inside(offset, data.len());
        Ok(())
    }

    fn zero_at(&self, _: u64, _: u64) -> io::Result<()> {
        unreachable!("a child cannot ask for it")
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

struct Child<'i>(Cursor<&'i [u8]>);

impl Read for Child<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Child<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        let mut child = Child(Cursor::new(input));
        if let Ok(Err(error)) = answered_by(&mut child, Arc::new(Disk), START, LEN) {
            let text = error.to_string();
            assert!(!text.chars().any(char::is_control), "{text:?}");
        }
    });
});
