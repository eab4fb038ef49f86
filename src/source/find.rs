//! Finds everything below a folder that can be converted: VMs by their descriptions, and disks
//! without one.
//!
//! A disk counts once. It does not count again as the base of a snapshot or as the extent of a
//! split image. Nor does it under a second description (an output directory of hyper2kvm has two).
//! Symbolic links to directories are not followed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{Result, SourceError, extension, open};
use crate::disk::chain::Image;

const MAX_DEPTH: u32 = 4;
const MAX_FILES: usize = 20_000;

/// Extensions of descriptions, the most detailed first.
const MACHINES: [&str; 4] = ["vmx", "ovf", "ova", "xml"];
const DISKS: [&str; 9] = [
    "vmdk", "vhdx", "avhdx", "vhd", "qcow2", "qcow", "vdi", "raw", "img",
];

/// The sources, sorted. [`open`] accepts each or returns the reason for refusing it.
pub fn below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    walk(folder, MAX_DEPTH, &mut files)?;
    let mut found = Vec::new();
    let mut claimed = BTreeSet::new();
    for kind in MACHINES {
        for file in files.iter().filter(|f| extension(f) == kind) {
            match open(file) {
                Ok(vm) => {
                    let mut fresh = false;
                    for disk in &vm.disks {
                        fresh |= claimed.insert(real(&disk.path));
                        claimed.extend(others(&disk.path));
                    }
                    if fresh {
                        found.push(file.clone());
                    }
                }
                // Any program may write an XML file.
                Err(_) if kind == "xml" => {}
                Err(_) => found.push(file.clone()),
            }
        }
    }
    let disks: Vec<&PathBuf> = files
        .iter()
        .filter(|f| DISKS.contains(&extension(f).as_str()) && !is_change_map(f))
        .filter(|f| !claimed.contains(&real(f)) && !has_descriptor(f, &files))
        .collect();
    let parts: BTreeSet<PathBuf> = disks.iter().flat_map(|d| others(d)).collect();
    found.extend(
        disks
            .into_iter()
            .filter(|d| !parts.contains(&real(d)))
            .cloned(),
    );
    found.sort();
    Ok(found)
}

/// The files of an image besides the named one.
fn others(disk: &Path) -> Vec<PathBuf> {
    let Ok(image) = Image::open_info(disk, None, &[]) else {
        return Vec::new();
    };
    image.files().skip(1).map(real).collect()
}

/// VMware's list of changed blocks.
fn is_change_map(file: &Path) -> bool {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    stem.ends_with("-ctk")
}

/// Whether this is the data of a VMware disk whose descriptor lies beside it, even an unreadable
/// one.
fn has_descriptor(file: &Path, files: &[PathBuf]) -> bool {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let disk = ["-flat", "-delta", "-sesparse"]
        .iter()
        .find_map(|end| stem.strip_suffix(end));
    extension(file) == "vmdk"
        && disk.is_some_and(|disk| files.contains(&file.with_file_name(format!("{disk}.vmdk"))))
}

fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_path_buf())
}

fn walk(folder: &Path, depth: u32, files: &mut Vec<PathBuf>) -> Result<()> {
    let error = |source| SourceError::Io {
        what: "listing",
        path: folder.into(),
        source,
    };
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(error)? {
        let entry = entry.map_err(error)?;
        if entries.len() + files.len() >= MAX_FILES {
            break;
        }
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            entries.push((entry.path(), entry.file_type().map_err(error)?));
        }
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    for (path, kind) in entries {
        if !kind.is_dir() {
            files.push(path);
        } else if depth > 1 {
            // An inaccessible directory only hides its own contents.
            let _ = walk(&path, depth - 1, files);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn each_disk_once() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for folder in ["web", "deep/er/and/deeper", ".hidden"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        let vmx = "displayName = \"web\"\nscsi0.present = \"TRUE\"\nscsi0:0.present = \"TRUE\"\n\
                   scsi0:0.fileName = \"web.vmdk\"\n";
        let descriptor = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
                          createType=\"monolithicFlat\"\nRW 8 FLAT \"NAME-flat.vmdk\" 0\n";
        fs::write(at("web/web.vmx"), vmx).unwrap();
        for name in ["web/web", "alone"] {
            let base = Path::new(name).file_name().unwrap().to_str().unwrap();
            let text = descriptor.replace("NAME", base);
            fs::write(at(&format!("{name}.vmdk")), text).unwrap();
            fs::write(at(&format!("{name}-flat.vmdk")), vec![0; 4096]).unwrap();
        }
        for name in [
            "alone-ctk.vmdk",
            "b.IMG",
            "deep/c.vhdx",
            "deep/er/and/d.raw",
            "deep/er/and/deeper/e.raw",
            ".hidden/f.raw",
            "notes.txt",
            "other.xml",
            "broken.ova",
            "torn.vmdk",
            "torn-flat.vmdk",
            "orphan-flat.vmdk",
        ] {
            fs::write(at(name), "x").unwrap();
        }
        std::os::unix::fs::symlink(dir.path(), at("loop")).unwrap();
        let found = below(dir.path()).unwrap();
        let names: Vec<_> = found
            .iter()
            .map(|f| f.strip_prefix(dir.path()).unwrap().to_str().unwrap())
            .collect();
        let wanted = [
            "alone.vmdk",
            "b.IMG",
            "broken.ova",
            "deep/c.vhdx",
            "deep/er/and/d.raw",
            "orphan-flat.vmdk",
            "torn.vmdk",
            "web/web.vmx",
        ];
        assert_eq!(names, wanted);
        assert!(below(&at("none")).is_err());
    }
}
