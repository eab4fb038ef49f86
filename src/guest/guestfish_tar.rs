//! A tar archive with one new file or directory, its security descriptor and its attributes, for guestfish's
//! `tar-in`.
//!
//! guestfish has no other way to hand over an extended attribute with NUL bytes in it, and without the
//! attribute `system.ntfs_acl` ntfs-3g gives full control of a new file to everyone. The format is
//! POSIX pax: name and attributes are records of an extended header.

use std::time::{SystemTime, UNIX_EPOCH};

use super::FileKind;

const BLOCK: usize = 512;

/// `security`: a self-relative security descriptor.
pub fn archive(name: &str, kind: FileKind, security: Option<&[u8]>, contents: &[u8]) -> Vec<u8> {
    let mut records = record("path", name.as_bytes());
    if let Some(security) = security {
        records.extend(record("SCHILY.xattr.system.ntfs_acl", security));
        if kind == FileKind::Dir {
            // Else it has the archive flag, which no directory has that Windows made.
            let none = 0u32.to_be_bytes();
            records.extend(record("SCHILY.xattr.system.ntfs_attrib_be", &none));
        }
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let (type_flag, mode) = match kind {
        FileKind::File => (b'0', 0o644),
        FileKind::Dir => (b'5', 0o755),
    };
    let mut archive = Vec::new();
    member(&mut archive, b'x', 0o644, now, &records);
    member(&mut archive, type_flag, mode, now, contents);
    // The end: two empty blocks.
    archive.resize(archive.len() + 2 * BLOCK, 0);
    archive
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    let mut record = format!("{len} {key}=").into_bytes();
    record.extend_from_slice(value);
    record.push(b'\n');
    record
}

fn member(archive: &mut Vec<u8>, type_flag: u8, mode: u32, time: u64, data: &[u8]) {
    let mut header = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    // The real name is in the extended header.
    put(0, b"member");
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    put(124, format!("{:011o}", data.len()).as_bytes());
    put(136, format!("{time:011o}").as_bytes());
    // The checksum is taken with blanks in its own place.
    put(148, b"        ");
    put(156, &[type_flag]);
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    archive.extend_from_slice(&header);
    archive.extend_from_slice(data);
    archive.resize(archive.len().next_multiple_of(BLOCK), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_count_themselves() {
        for size in 0..1200 {
            let record = record("k", &vec![b'v'; size]);
            let text = String::from_utf8(record.clone()).unwrap();
            let (len, _) = text.split_once(' ').unwrap();
            assert_eq!(len.parse(), Ok(record.len()), "{size}");
        }
    }

    #[test]
    #[allow(clippy::disallowed_methods)] // tar is the judge
    fn tar_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.tar");
        let name = "ein Gerät.sys";
        for (kind, contents) in [(FileKind::File, &b"hello"[..]), (FileKind::Dir, b"")] {
            let bytes = archive(name, kind, Some(b"\x01\0\xff\n=\0"), contents);
            std::fs::write(&file, bytes).unwrap();
            let out = std::process::Command::new("tar")
                .arg("-xf")
                .arg(&file)
                .arg("-C")
                .arg(dir.path())
                .output()
                .unwrap();
            assert!(out.status.success(), "{out:?}");
            assert!(out.stderr.is_empty(), "{out:?}");
            let made = dir.path().join(name);
            if kind == FileKind::File {
                assert_eq!(std::fs::read(&made).unwrap(), contents);
                std::fs::remove_file(made).unwrap();
            } else {
                assert!(made.is_dir());
            }
        }
    }
}
