//! Builds a tar archive with one new file or directory, its security descriptor and its attributes,
//! for guestfish's `tar-in`.
//!
//! Otherwise guestfish cannot transfer an extended attribute with NUL bytes in it. Without the
//! attribute `system.ntfs_acl`, ntfs-3g gives everyone full control of a new file. The format is
//! POSIX pax: name and attributes are records of an extended header.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use tar::{Builder, EntryType, Header};

use super::FileKind;

/// Builds the archive; `security` is a self-relative security descriptor.
pub fn archive(
    name: &str,
    kind: FileKind,
    security: Option<&[u8]>,
    contents: &[u8],
) -> io::Result<Vec<u8>> {
    let mut records = vec![("path", name.as_bytes())];
    if let Some(security) = security {
        records.push(("SCHILY.xattr.system.ntfs_acl", security));
        if kind == FileKind::Dir {
            // Otherwise it gets the archive flag, which Windows never sets on a directory.
            records.push(("SCHILY.xattr.system.ntfs_attrib_be", &[0; 4]));
        }
    }
    let (entry_type, mode) = match kind {
        FileKind::File => (EntryType::Regular, 0o644),
        FileKind::Dir => (EntryType::Directory, 0o755),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut header = Header::new_ustar();
    header.set_entry_type(entry_type);
    header.set_mode(mode);
    header.set_mtime(now.map_or(0, |d| d.as_secs()));
    header.set_size(contents.len() as u64);
    // The real name is in the extended header.
    header.set_path("member")?;
    header.set_cksum();
    let mut archive = Builder::new(Vec::new());
    archive.append_pax_extensions(records)?;
    archive.append(&header, contents)?;
    archive.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::disallowed_methods)] // tar reads it back
    fn tar_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.tar");
        let name = "ein Gerät.sys";
        for (kind, contents) in [(FileKind::File, &b"hello"[..]), (FileKind::Dir, b"")] {
            let bytes = archive(name, kind, Some(b"\x01\0\xff\n=\0"), contents).unwrap();
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
