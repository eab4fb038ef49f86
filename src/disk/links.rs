//! Finds files that are built on a disk: snapshots' deltas, checkpoints, overlays.
//!
//! A VM writes to the last link of a chain. Converting an earlier link would silently use an old
//! state, because an image names its parent and never its children. So the headers of all files in
//! the disk's directory are read, whatever their names. So are those in `Snapshots` below it, which
//! VirtualBox uses. A child in another directory is not found.
//!
//! A parent is named by a path, often one of another host; then its last component counts. VHDX,
//! VHD and VDI name it by an id too.
//!
//! Specifications: as in [`super::detect`]; of the parent locators [MS-VHDX] 2.6.2.6 and the VHD
//! specification, "Dynamic Disk Header Format".

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::charset::Name;
use uuid::{Uuid, uuid};

use super::detect::{self, VHD_DIFFERENCING, read_up_to, vhd_footer};
use super::headers::{
    VHDX_MAGIC, VdiHeader, VhdDynamic, VhdFooter, VhdxHeader, VhdxLocator, VhdxLocatorEntry,
};
use super::length;
use super::remote::{self, ReadAt};
use super::vmdk;

/// The most files examined in a directory.
const MAX_FILES: usize = 4096;
/// The most links; VMware allows 32 snapshots.
const MAX_LINKS: usize = 256;

/// A file and its references to a parent.
#[derive(Debug, Default)]
struct Candidate {
    path: PathBuf,
    place: (u64, u64),
    /// Paths or names of the parent, in every spelling.
    parents: Vec<OsString>,
    parent_ids: Vec<[u8; 16]>,
    /// The id by which children name this file.
    id: Option<[u8; 16]>,
    /// Files with its data, if it is only a descriptor.
    extents: Vec<OsString>,
    modified: Option<std::time::SystemTime>,
}

/// The links that are built on `disk`, directly or not, the newest last.
pub fn newer(disk: &Path) -> Vec<PathBuf> {
    let Ok(disk) = std::path::absolute(disk) else {
        return Vec::new();
    };
    let is_file = |meta: &Metadata| meta.is_file();
    let Some(meta) = disk.metadata().ok().filter(is_file) else {
        return Vec::new();
    };
    let Some(own) = candidate(&disk, &meta) else {
        return Vec::new();
    };
    let mut others: Vec<Candidate> = Vec::new();
    for file in files_beside(&disk) {
        if let Ok(meta) = file.metadata()
            && meta.is_file()
            && (meta.dev(), meta.ino()) != own.place
        {
            others.extend(candidate(&file, &meta));
        }
    }
    // A descriptor with the disk as an extent represents the disk.
    let (mut frontier, mut others): (Vec<_>, Vec<_>) = others
        .into_iter()
        .partition(|c| c.extents.iter().any(|name| c.names(name, &own)));
    frontier.push(own);
    let mut found = Vec::new();
    while !frontier.is_empty() && found.len() < MAX_LINKS {
        let (children, rest): (Vec<_>, Vec<_>) = others
            .into_iter()
            .partition(|c| frontier.iter().any(|parent| c.is_built_on(parent)));
        others = rest;
        let mut level: Vec<_> = children
            .iter()
            .map(|c| (c.modified, c.path.clone()))
            .collect();
        level.sort();
        found.extend(level.into_iter().map(|(_, path)| path));
        frontier = children;
    }
    found
}

fn files_beside(disk: &Path) -> Vec<PathBuf> {
    let list = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        let paths = entries.flatten().map(|entry| entry.path());
        paths.take(MAX_FILES).collect()
    };
    let Some(folder) = disk.parent() else {
        return Vec::new();
    };
    let mut files = list(folder);
    let snapshots = files.iter().find(|f| {
        let name = f.file_name().unwrap_or_default();
        name.eq_ignore_ascii_case("snapshots") && f.is_dir()
    });
    files.extend(snapshots.map(|folder| list(folder)).unwrap_or_default());
    files.sort();
    files
}

impl Candidate {
    fn is_built_on(&self, parent: &Candidate) -> bool {
        let by_id = parent.id.is_some_and(|id| self.parent_ids.contains(&id));
        by_id || self.parents.iter().any(|name| self.names(name, parent))
    }

    /// Whether a name in this file refers to `other`.
    fn names(&self, name: &OsStr, other: &Candidate) -> bool {
        let bytes = name.as_bytes();
        let bytes = bytes.strip_prefix(b"file:").unwrap_or(bytes);
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let mut names = vec![OsStr::from_bytes(bytes).to_owned()];
        // In other encodings a backslash may be half of a character.
        let text = std::str::from_utf8(bytes).ok();
        names.extend(text.map(|text| OsString::from(text.replace('\\', "/"))));
        for name in &names {
            if let Ok(meta) = folder.join(name).metadata() {
                return (meta.dev(), meta.ino()) == other.place;
            }
        }
        // A path of another host.
        let separator = |b: &u8| *b == b'/' || (*b == b'\\' && text.is_some());
        let last = bytes.rsplit(separator).next().unwrap_or_default();
        let own = other.path.file_name().unwrap_or_default();
        !last.is_empty() && own.eq_ignore_ascii_case(OsStr::from_bytes(last))
    }
}

/// Reads a candidate; `None` for a file that is not an image.
fn candidate(path: &Path, meta: &Metadata) -> Option<Candidate> {
    let mut found = Candidate {
        path: path.into(),
        place: (meta.dev(), meta.ino()),
        modified: meta.modified().ok(),
        ..Candidate::default()
    };
    // An unreadable file is no link that could be named.
    let _ = match remote::of(path, meta) {
        Some(remote) => read_links(&*remote, remote.file().size(), path, &mut found),
        None => read_links(&File::open(path).ok()?, meta.len(), path, &mut found),
    };
    Some(found)
}

fn read_links(file: &dyn ReadAt, size: u64, path: &Path, found: &mut Candidate) -> io::Result<()> {
    let head = read_up_to(file, 0, 4096, size)?;
    let some = |id: [u8; 16]| Some(id).filter(|id| *id != [0; 16]);
    if let Some(bytes) = detect::backing_name(file, size)? {
        found.parents = backing_names(&bytes);
    } else if head.starts_with(&VHDX_MAGIC) {
        vhdx_links(file, size, found)?;
    } else if let Some(header) = VdiHeader::of(&head) {
        found.id = some(header.id);
        found.parent_ids.extend(some(header.parent_id));
    } else if let Some(footer) = vhd_footer(&head) {
        found.id = some(footer.id);
        let header = read_up_to(file, footer.dynamic.0, VhdDynamic::LEN, size)?;
        if let Some(header) = VhdDynamic::of(&header)
            && footer.kind.0 == VHD_DIFFERENCING
        {
            found.parent_ids.push(header.parent_id);
            let units = header.parent_name.chunks_exact(2);
            found.parents = vec![utf16(units.map(|c| u16::from_be_bytes([c[0], c[1]]))).into()];
        }
    } else if let Some(footer) = fixed_vhd(file, size)? {
        found.id = Some(footer.id);
    } else if vmdk::may_be(&head)
        && let Ok(Some(descriptor)) = vmdk::read(path)
    {
        found.parents = descriptor.parent.iter().flat_map(Name::spellings).collect();
        found.extents = descriptor
            .extents
            .iter()
            .flat_map(Name::spellings)
            .collect();
    }
    found.parents.retain(|name| !name.is_empty());
    Ok(())
}

fn fixed_vhd(file: &dyn ReadAt, size: u64) -> io::Result<Option<VhdFooter>> {
    const LEN: usize = VhdFooter::LEN;
    let tail = read_up_to(file, size.saturating_sub(LEN as u64), LEN, size)?;
    Ok(vhd_footer(&tail))
}

/// The files to which a backing file name of QEMU refers: a path, or a `json:` description of
/// nodes.
fn backing_names(bytes: &[u8]) -> Vec<OsString> {
    let Some(json) = bytes.strip_prefix(b"json:") else {
        return vec![OsStr::from_bytes(bytes).to_owned()];
    };
    let mut names = Vec::new();
    let mut nodes = vec![serde_json::from_slice(json).unwrap_or_default()];
    while let Some(node) = nodes.pop() {
        let serde_json::Value::Object(fields) = node else {
            continue;
        };
        for (key, value) in fields {
            match value {
                serde_json::Value::String(text) if key.ends_with("filename") => {
                    names.push(text.into())
                }
                other => nodes.push(other),
            }
        }
    }
    names
}

fn utf16(units: impl Iterator<Item = u16>) -> String {
    let units: Vec<u16> = units.take_while(|c| *c != 0).collect();
    String::from_utf16_lossy(&units)
}

const PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");

fn vhdx_links(file: &dyn ReadAt, size: u64, found: &mut Candidate) -> io::Result<()> {
    // Of the two headers, the one with the higher sequence number counts.
    let mut current = 0;
    for offset in [64 << 10, 128 << 10] {
        let header = VhdxHeader::read(&read_up_to(file, offset, VhdxHeader::LEN, size)?);
        let header = header.filter(|header| header.signature == *b"head");
        if let Some(header) = header.filter(|header| header.sequence >= current) {
            current = header.sequence;
            found.id = Some(header.data_write_id);
        }
    }
    for (key, value) in vhdx_parent(file, size)? {
        if key.starts_with("parent_linkage") {
            let id = uuid::Uuid::parse_str(value.trim());
            found.parent_ids.extend(id.map(|id| id.to_bytes_le()));
        } else {
            found.parents.push(value.into());
        }
    }
    Ok(())
}

/// The parent locator of a differencing VHDX, by key; empty for any other.
pub(super) fn vhdx_parent(file: &dyn ReadAt, size: u64) -> io::Result<Vec<(String, String)>> {
    let items = length::vhdx_metadata(file, size)?;
    let Some((_, start, length)) = items.iter().find(|(id, ..)| *id == PARENT_LOCATOR) else {
        return Ok(Vec::new());
    };
    let mut item = vec![0; (*length).min(1 << 20).min(size.saturating_sub(*start)) as usize];
    file.read_exact_at(&mut item, *start)?;
    let Some(header) = VhdxLocator::read(&item) else {
        return Ok(Vec::new());
    };
    let text = |at: u32, len: u16| {
        let at = at as usize;
        let bytes = item.get(at..at.saturating_add(len.into()));
        let bytes = bytes.unwrap_or_default();
        utf16(
            bytes
                .chunks_exact(2)
                .map(|c| u16::from_le_bytes([c[0], c[1]])),
        )
    };
    let entries = item[VhdxLocator::LEN..].chunks_exact(VhdxLocatorEntry::LEN);
    let entries = entries.take(usize::from(header.entries).min(64));
    let pair = |e: VhdxLocatorEntry| (text(e.key, e.key_len), text(e.value, e.value_len));
    let entries = entries.filter_map(VhdxLocatorEntry::read);
    Ok(entries.map(pair).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::{have, run, text, write};

    fn names(found: &[PathBuf]) -> Vec<String> {
        let name = |p: &PathBuf| p.file_name().unwrap().to_str().unwrap().to_owned();
        found.iter().map(name).collect()
    }

    fn descriptor(cid: &str, parent: Option<&str>, extent: &str) -> String {
        let hint = parent.map_or(String::new(), |p| format!("parentFileNameHint=\"{p}\"\n"));
        format!(
            "# Disk DescriptorFile\nversion=1\nCID={cid}\nparentCID=ffffffff\ncreateType=\"vmfs\"\n{hint}\
             RW 8 VMFS \"{extent}\"\n"
        )
    }

    #[test]
    fn deltas_of_vmware_whatever_they_are_called() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, contents: &str| write(folder.path(), name, contents.as_bytes());
        let base = file("win.vmdk", &descriptor("1", None, "win-flat.vmdk"));
        let flat = file("win-flat.vmdk", &"x".repeat(4096));
        assert!(newer(&base).is_empty() && newer(&flat).is_empty());
        // A delta of another disk with the same name in another directory.
        file("data-000001.vmdk", &descriptor("2", Some("data.vmdk"), "d"));
        std::fs::create_dir(folder.path().join("sub")).unwrap();
        write(
            &folder.path().join("sub"),
            "win.vmdk",
            descriptor("7", None, "x").as_bytes(),
        );
        file("other.vmdk", &descriptor("2", Some("sub/win.vmdk"), "d"));
        assert!(newer(&base).is_empty());
        for hint in [
            "win.vmdk",
            "/vmfs/volumes/5b2/win/win.vmdk",
            "C:\\VMs\\win\\WIN.VMDK",
        ] {
            let first = file("odd name", &descriptor("2", Some(hint), "odd-delta.vmdk"));
            assert_eq!(names(&newer(&base)), ["odd name"], "{hint}");
            let second = file("win-000002.vmdk", &descriptor("3", Some("odd name"), "e"));
            assert_eq!(names(&newer(&base)), ["odd name", "win-000002.vmdk"]);
            assert_eq!(names(&newer(&flat)), ["odd name", "win-000002.vmdk"]);
            assert_eq!(names(&newer(&first)), ["win-000002.vmdk"]);
            assert!(newer(&second).is_empty(), "the newest itself");
            std::fs::remove_file(second).unwrap();
        }
    }

    /// Only the beginning of other files is read, because there may be thousands of them.
    #[test]
    fn what_does_not_begin_like_a_descriptor_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let base = write(
            folder.path(),
            "win.vmdk",
            descriptor("1", None, "f").as_bytes(),
        );
        let child = descriptor("2", Some("win.vmdk"), "d");
        let late = [&b"x\n".repeat(4096)[..], child.as_bytes()].concat();
        write(folder.path(), "notes.txt", &late);
        assert!(newer(&base).is_empty());
        let comments = [&b"# x\n".repeat(4096)[..], child.as_bytes()].concat();
        write(folder.path(), "delta", &comments);
        write(
            folder.path(),
            "plain",
            child.replacen("# Disk DescriptorFile\n", "", 1).as_bytes(),
        );
        let mut found = names(&newer(&base));
        found.sort_unstable();
        assert_eq!(found, ["delta", "plain"]);
    }

    #[test]
    fn overlays_of_qemu() {
        if !have(&["qemu-img"]) {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let base = write(folder.path(), "base.img", &[0; 1 << 20]);
        let path = |name: &str| folder.path().join(name);
        let create = |name: &str, format: &str, backing: &str, of: &str| {
            let target = path(name);
            run(
                "qemu-img",
                &[
                    "create",
                    "-q",
                    "-f",
                    format,
                    "-b",
                    backing,
                    "-F",
                    of,
                    text(&target),
                    "1M",
                ],
            );
        };
        create("vm.snap1", "qcow2", "base.img", "raw");
        assert_eq!(names(&newer(&base)), ["vm.snap1"]);
        create("vm.snap2", "qcow2", text(&path("vm.snap1")), "qcow2");
        assert_eq!(names(&newer(&base)), ["vm.snap1", "vm.snap2"]);
        assert_eq!(names(&newer(&path("vm.snap1"))), ["vm.snap2"]);
        assert!(newer(&path("vm.snap2")).is_empty());
        let json = format!(
            "json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}",
            text(&base)
        );
        std::fs::remove_file(path("vm.snap1")).unwrap();
        std::fs::remove_file(path("vm.snap2")).unwrap();
        create("j", "qcow2", &json, "raw");
        create("q.qed", "qed", "base.img", "raw");
        create("o.qcow", "qcow", "base.img", "raw");
        let mut found = names(&newer(&base));
        found.sort_unstable();
        assert_eq!(found, ["j", "o.qcow", "q.qed"]);
    }

    fn vhd(kind: u8, id: u8, parent: u8, name: &str) -> Vec<u8> {
        let mut footer = vec![0; 512];
        footer[..8].copy_from_slice(b"conectix");
        footer[16..24].copy_from_slice(&512u64.to_be_bytes());
        footer[63] = kind;
        footer[68..84].fill(id);
        let sum: u32 = footer.iter().map(|&b| u32::from(b)).sum();
        footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
        let mut header = vec![0; 1024];
        header[..8].copy_from_slice(b"cxsparse");
        header[40..56].fill(parent);
        for (n, unit) in name.encode_utf16().enumerate() {
            header[64 + 2 * n..66 + 2 * n].copy_from_slice(&unit.to_be_bytes());
        }
        match kind {
            2 => [vec![0; 4096], footer].concat(),
            _ => [footer.clone(), header, footer].concat(),
        }
    }

    fn vhdx(id: u8, locator: &[(&str, &str)]) -> Vec<u8> {
        let mut file = vec![0; 2 << 20];
        file[..8].copy_from_slice(b"vhdxfile");
        for (at, sequence) in [(64 << 10, 2u64), (128 << 10, 1)] {
            file[at..at + 4].copy_from_slice(b"head");
            file[at + 8..at + 16].copy_from_slice(&sequence.to_le_bytes());
            file[at + 32..at + 48].fill(if sequence == 2 { id } else { 0xee });
        }
        let guid = |text: &str| uuid::Uuid::parse_str(text).unwrap().to_bytes_le();
        let regions = 192 << 10;
        file[regions..regions + 4].copy_from_slice(b"regi");
        file[regions + 8] = 1;
        file[regions + 16..regions + 32]
            .copy_from_slice(&guid("8b7ca206-4790-4b9a-b8fe-575f050f886e"));
        file[regions + 32..regions + 40].copy_from_slice(&(1u64 << 20).to_le_bytes());
        file[regions + 40..regions + 44].copy_from_slice(&(1u32 << 20).to_le_bytes());
        let table = 1 << 20;
        file[table..table + 8].copy_from_slice(b"metadata");
        file[table + 10] = 1;
        file[table + 32..table + 48].copy_from_slice(&PARENT_LOCATOR.to_bytes_le());
        file[table + 48..table + 52].copy_from_slice(&(64u32 << 10).to_le_bytes());
        file[table + 52..table + 56].copy_from_slice(&4096u32.to_le_bytes());
        let item = table + (64 << 10);
        file[item + 18] = locator.len() as u8;
        let mut free = 1024;
        for (n, (key, value)) in locator.iter().enumerate() {
            let entry = item + 20 + 12 * n;
            for (field, length, text) in [(0, 8, key), (4, 10, value)] {
                let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
                file[entry + field..entry + field + 4]
                    .copy_from_slice(&(free as u32).to_le_bytes());
                file[entry + length..entry + length + 2]
                    .copy_from_slice(&(bytes.len() as u16).to_le_bytes());
                file[item + free..item + free + bytes.len()].copy_from_slice(&bytes);
                free += bytes.len();
            }
        }
        file
    }

    #[test]
    fn checkpoints_of_hyper_v_and_virtualbox() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, contents: &[u8]| write(folder.path(), name, contents);
        // By name, and by id under any name.
        let base = file("a.vhd", &vhd(3, 7, 0, ""));
        file("a_0001.avhd", &vhd(4, 8, 0x55, "A.vhd"));
        file("renamed", &vhd(4, 9, 8, "gone.avhd"));
        file("stranger.avhd", &vhd(4, 9, 0x66, "b.vhd"));
        assert_eq!(names(&newer(&base)), ["a_0001.avhd", "renamed"]);
        let fixed = file("f.vhd", &vhd(2, 0x21, 0, ""));
        file("f1.avhd", &vhd(4, 0x22, 0x21, "x.vhd"));
        assert_eq!(names(&newer(&fixed)), ["f1.avhd"]);

        let base = file("w.vhdx", &vhdx(0x31, &[]));
        assert!(newer(&base).is_empty());
        let linkage = "{31313131-3131-3131-3131-313131313131}";
        file("by-id.avhdx", &vhdx(0x32, &[("parent_linkage", linkage)]));
        assert_eq!(names(&newer(&base)), ["by-id.avhdx"]);
        let path = [
            ("parent_linkage", "{99999999-3131-3131-3131-313131313131}"),
            ("absolute_win32_path", "D:\\VM\\by-id.AVHDX"),
        ];
        file("last.avhdx", &vhdx(0x33, &path));
        assert_eq!(names(&newer(&base)), ["by-id.avhdx", "last.avhdx"]);

        let vdi = |id: u8, parent: u8| {
            let mut file = vec![0; 1024];
            file[64..68].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
            file[392..408].fill(id);
            file[424..440].fill(parent);
            file
        };
        let base = file("v.vdi", &vdi(0x41, 0));
        file("unrelated.vdi", &vdi(0x42, 0));
        assert!(newer(&base).is_empty());
        std::fs::create_dir(folder.path().join("Snapshots")).unwrap();
        write(
            &folder.path().join("Snapshots"),
            "{x}.vdi",
            &vdi(0x43, 0x41),
        );
        assert_eq!(names(&newer(&base)), ["{x}.vdi"]);
    }
}
