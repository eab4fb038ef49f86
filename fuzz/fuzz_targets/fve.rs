#![no_main]
//! A small BitLocker volume with damage anywhere in its boot sector and metadata, or a `.BEK` file.
//!
//! The first byte of an input: 0 a `.BEK` file; else patches, after which bit 1 makes the CRC-32 of the copies fit
//! again, so that damage comes through to what reads the metadata.

use std::sync::OnceLock;

use flate2::Crc;
use hyper2kvm::block::{BlockRead, BlockWrite};
use hyper2kvm::guest::fve::keys::{StartupKey, Stretched};
use hyper2kvm::guest::fve::layout::{BlockHeader, Validation};
use hyper2kvm::guest::fve::{Unlocked, look};
use hyper2kvm_fuzz::disk::{Base, Patched, base};
use hyper2kvm_fuzz::{FVE_PLACES, bounded};
use libfuzzer_sys::fuzz_target;

static BASE: OnceLock<Base> = OnceLock::new();

fn repair(disk: &Patched) -> Option<()> {
    for place in FVE_PLACES.copies {
        let mut block = vec![0; 64 << 10];
        disk.read_at(place, &mut block).ok()?;
        let header = BlockHeader::read(&block)?;
        let size = usize::from(header.size) * if header.version == 1 { 1 } else { 16 };
        let mut crc = Crc::new();
        crc.update(block.get(..size)?);
        let mut validation = Validation::read(&block[size..])?;
        validation.crc32 = crc.sum();
        validation.write(block.get_mut(size..)?)?;
        let end = size + Validation::LEN;
        disk.write_at(place, &block[..end]).ok()?;
    }
    Some(())
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, input)) = input.split_first() else {
        return;
    };
    bounded(|| {
        if *kind == 0 {
            let key = StartupKey::parse(input);
            assert!(key.is_none() || StartupKey::is_one(input));
            return;
        }
        let disk = Patched::new(base(&BASE, "fve.gz"), input);
        if kind & 1 != 0 {
            let _ = repair(&disk);
        }
        let size = disk.size();
        // The key lies open: nothing is stretched.
        let Ok(volume) = look(disk.as_ref(), 0, size, &[], &Stretched::default()).volume else {
            return;
        };
        let own: Vec<_> = volume.reserved().collect();
        let clear = Unlocked::new(vec![volume]).over(disk.clone());
        let mut bytes = vec![0; 70_000];
        for at in [0, 500, 8000, 200_000, size / 2, size - 70_000] {
            let _ = clear.read_at(at, &mut bytes);
        }
        for range in own {
            assert!(clear.write_at(range.start, &[1]).is_err());
        }
        let _ = clear.write_at(100_000, &[1; 3000]);
    });
});
