//! Writes a tar archive: plain files, POSIX ustar headers, nothing else.
//!
//! Specification: POSIX.1-2017, `pax`, "ustar Interchange Format".

use std::io::{self, Write};

const BLOCK: usize = 512;
/// What the octal field of a header can say.
const MAX_SIZE: u64 = (1 << 33) - 1;

pub struct Writer<W: Write> {
    out: W,
    /// Seconds since 1970, for every member.
    modified: u64,
}

impl<W: Write> Writer<W> {
    pub fn new(out: W, modified: u64) -> Self {
        Self { out, modified }
    }

    /// A file whose contents are at hand.
    pub fn file(&mut self, name: &str, contents: &[u8]) -> io::Result<()> {
        self.start(name, contents.len() as u64)?;
        self.out.write_all(contents)?;
        self.pad(contents.len() as u64)
    }

    /// The header of a file; exactly `size` bytes must follow by [`Writer::write`], then [`Writer::pad`].
    pub fn start(&mut self, name: &str, size: u64) -> io::Result<()> {
        self.out.write_all(&header(name, size, self.modified)?)
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    pub fn pad(&mut self, size: u64) -> io::Result<()> {
        let over = (size % BLOCK as u64) as usize;
        self.out.write_all(&[0; BLOCK][..(BLOCK - over) % BLOCK])
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        Ok(self.out)
    }
}

fn header(name: &str, size: u64, modified: u64) -> io::Result<[u8; BLOCK]> {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
    // The name field holds 100 bytes; directories may go into a prefix of 155.
    let (prefix, name) = if name.len() <= 100 {
        ("", name)
    } else {
        name.rsplit_once('/')
            .filter(|(prefix, name)| prefix.len() <= 155 && name.len() <= 100)
            .ok_or_else(|| invalid("a name too long for tar"))?
    };
    if size > MAX_SIZE {
        return Err(invalid("a file too large for tar"));
    }
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &str| {
        if let Some(field) = header.get_mut(at..at + text.len()) {
            field.copy_from_slice(text.as_bytes());
        }
    };
    put(0, name);
    put(100, "0000600\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{size:011o}\0"));
    put(136, &format!("{:011o}\0", modified.min(MAX_SIZE)));
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    put(345, prefix);
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::tar::members;

    #[test]
    fn our_reader_and_gnu_tar_read_it() {
        let long = format!("{}/{}", "d".repeat(120), "f".repeat(90));
        let mut writer = Writer::new(Vec::new(), 1_700_000_000);
        writer.file("a.txt", b"hello").unwrap();
        writer.file(&long, &[7; 1024]).unwrap();
        assert!(writer.file(&"x".repeat(101), b"").is_err());
        assert!(writer.start("big", 1 << 40).is_err());
        let bytes = writer.finish().unwrap();
        let list = members(std::io::Cursor::new(&bytes)).unwrap();
        let names: Vec<_> = list.iter().map(|m| (m.name.as_str(), m.size)).collect();
        assert_eq!(names, [("a.txt", 5), (long.as_str(), 1024)]);
        if crate::tool::find("tar").is_some() {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &bytes).unwrap();
            let out = crate::tool::Cmd::new("tar")
                .arg("-tvf")
                .arg(file.path())
                .run()
                .unwrap();
            let text = String::from_utf8(out.stdout).unwrap();
            assert!(
                text.contains("-rw------- 0/0") && text.contains(&long),
                "{text}"
            );
            assert_eq!(out.stderr, "");
        }
    }
}
