//! The files behind a VMDK, before QEMU opens them.
//!
//! A VMDK descriptor names further files: its extents and, for a snapshot or linked clone, its
//! parent. QEMU follows these names. So they are checked first: each must exist (the error names
//! the one that does not) and lie in the directory of the descriptor, because a made-up extent or
//! parent could name any file of the host. Contents are not looked at.
//!
//! Format: VMware "Virtual Disk Format 5.0". The descriptor is a text file, or is embedded in a
//! sparse image (`KDMV`) at a sector its header gives. `encoding` names the character set of its names;
//! a file may be called by that text or by those bytes.

use std::io;
use std::path::{Path, PathBuf};

use super::charset::{Charset, Name};
use super::{Result, SourceError, folder_of};
use crate::disk::detect::read_up_to;
use crate::disk::remote::{self, ReadAt};

/// QEMU's own limit for a descriptor file.
const MAX_DESCRIPTOR: usize = 2 << 20;
/// Most descriptors end in it.
const FIRST: usize = 64 << 10;
/// VMware allows 32 snapshots.
const MAX_CHAIN: usize = 64;
const MAX_EXTENTS: usize = 4096;

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    pub extents: Vec<Name>,
    pub parent: Option<Name>,
    pub content_id: Option<u32>,
    /// What the parent's content id was when the delta was made.
    pub parent_content_id: Option<u32>,
    /// What QEMU cannot read in it: a pointer to a device, encrypted data.
    pub unreadable: Option<Unreadable>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreadable {
    RawDevice,
    Encrypted,
    /// On vSAN or a vVol.
    Object,
}

/// Whether an extent is an object of a store of objects.
fn is_object(extent: &str) -> bool {
    let schemes = ["vsan://", "vvol://"];
    let starts = |scheme: &&str| {
        extent
            .get(..scheme.len())
            .is_some_and(|s| s.eq_ignore_ascii_case(scheme))
    };
    schemes.iter().any(starts)
}

impl Unreadable {
    /// What it is, and what to do.
    fn told(self) -> (&'static str, &'static str) {
        match self {
            Self::RawDevice => (
                "a pointer to a raw device (RDM), which holds no data itself,",
                "copy the LUN: vmkfstools -i DISK.vmdk COPY.vmdk on ESXi makes an ordinary disk of it, or name \
                 the block device where this host sees the LUN",
            ),
            Self::Encrypted => (
                "a disk encrypted by VMware",
                "remove the encryption in VMware, then copy the disk again",
            ),
            Self::Object => (
                "a pointer to an object of vSAN or vVols, which are no files,",
                "make a file of it on ESXi: vmkfstools -i DISK.vmdk -d thin /vmfs/volumes/VMFS-OR-NFS/COPY.vmdk, or \
                 export the VM as OVF",
            ),
        }
    }
}

/// `key=value` of a descriptor, without regard to case; values may be quoted.
fn setting<'t>(line: &'t str, key: &str) -> Option<&'t str> {
    let (name, value) = line.split_once('=')?;
    let value = value.trim().trim_matches('"');
    name.trim().eq_ignore_ascii_case(key).then_some(value)
}

/// The encoding a descriptor declares. Names in one nobody knows are bytes.
pub fn charset(descriptor: &[u8]) -> Charset {
    let lines = || descriptor.split(|b| *b == b'\n');
    let find = |key: &str| {
        let mut texts = lines().filter_map(|line| std::str::from_utf8(line).ok());
        texts.find_map(|line| setting(line, key))
    };
    let label = find("encoding").or_else(|| find("ddb.encoding"));
    let declared = label.and_then(|label| Charset::declared(label, lines()));
    declared.unwrap_or_default()
}

impl Descriptor {
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let charset = charset(bytes);
        let mut descriptor = Self::default();
        let id = |text: &str| u32::from_str_radix(text, 16).ok();
        for line in bytes.split(|b| *b == b'\n') {
            let name = line.split(|b| *b == b'"').nth(1);
            let line = String::from_utf8_lossy(line);
            if let Some(value) = setting(&line, "CID") {
                descriptor.content_id = id(value);
            } else if let Some(value) = setting(&line, "parentCID") {
                descriptor.parent_content_id = id(value).filter(|id| *id != u32::MAX);
            } else if let Some(kind) = setting(&line, "createType") {
                const DEVICES: [&str; 5] = [
                    "vmfsRawDeviceMap",
                    "vmfsPassthroughRawDeviceMap",
                    "vmfsRaw",
                    "fullDevice",
                    "partitionedDevice",
                ];
                if DEVICES.iter().any(|d| d.eq_ignore_ascii_case(kind)) {
                    descriptor.unreadable = Some(Unreadable::RawDevice);
                }
            } else if setting(&line, "encryptionKeys").is_some() {
                descriptor.unreadable = Some(Unreadable::Encrypted);
            }
            let access = line.split_whitespace().next().unwrap_or_default();
            if matches!(access, "RW" | "RDONLY" | "NOACCESS") {
                // `RW 4192256 SPARSE "disk-s001.vmdk" 0`; a ZERO extent has no file.
                let name = name.map(|name| Name::new(charset, name));
                let device = line.contains("VMFSRDM") || line.contains("VMFSRAW");
                if device && descriptor.unreadable.is_none() {
                    descriptor.unreadable = Some(Unreadable::RawDevice);
                } else if name.as_ref().is_some_and(|name| is_object(&name.text)) {
                    descriptor.unreadable = Some(Unreadable::Object);
                }
                descriptor.extents.extend(name);
                if descriptor.extents.len() > MAX_EXTENTS {
                    return Err(format!("more than {MAX_EXTENTS} extents"));
                }
            }
        }
        // As QEMU looks for it: anywhere, be it a comment, and whatever parentCID says.
        let hint = b"parentFileNameHint";
        let at = bytes.windows(hint.len()).position(|w| w == hint);
        let name = at.and_then(|at| bytes[at..].split(|b| *b == b'"').nth(1));
        descriptor.parent = name.map(|name| Name::new(charset, name));
        Ok(descriptor)
    }
}

/// Checks the image and all it builds on.
pub fn check_files(path: &Path) -> Result<()> {
    let mut at = path.to_owned();
    let mut made_over = None;
    for _ in 0..MAX_CHAIN {
        let Some(descriptor) = read(&at)? else {
            return Ok(());
        };
        if let Some(unreadable) = descriptor.unreadable {
            let (what, remedy) = unreadable.told();
            return Err(SourceError::Unsupported {
                path: at,
                what: what.into(),
                remedy,
            });
        }
        if let (Some((child, wanted)), Some(found)) = (made_over, descriptor.content_id)
            && wanted != found
        {
            return Err(SourceError::OtherParent {
                path: child,
                parent: at,
                wanted,
                found,
            });
        }
        for name in &descriptor.extents {
            existing(&at, name)?;
        }
        match &descriptor.parent {
            Some(parent) => {
                let parent = moved(&at, &descriptor).unwrap_or_else(|| parent.clone());
                let next = existing(&at, &parent)?;
                made_over = descriptor.parent_content_id.map(|id| (at, id));
                at = next;
            }
            None => return Ok(()),
        }
    }
    Err(SourceError::Unsupported {
        path: path.into(),
        what: format!("a chain of more than {MAX_CHAIN} snapshots"),
        remedy: "consolidate the snapshots of the machine first",
    })
}

fn existing(at: &Path, name: &Name) -> Result<PathBuf> {
    let file = name
        .below(folder_of(at))
        .ok_or_else(|| SourceError::Outside {
            path: at.into(),
            reference: name.text.clone(),
        })?;
    if file.exists() {
        Ok(file)
    } else {
        Err(SourceError::MissingDisk {
            path: at.into(),
            disk: super::clean(&name.text),
            missing: file,
        })
    }
}

/// The descriptor of the image; `None` for an image without one, such as a flat extent.
pub fn read(path: &Path) -> Result<Option<Descriptor>> {
    let error = |what| {
        move |source| SourceError::Io {
            what,
            path: path.into(),
            source,
        }
    };
    let mut file = super::open_file(path).map_err(error("opening"))?;
    let remote = remote::of(path, &file.metadata().map_err(error("reading"))?);
    let found = match &remote {
        Some(remote) => embedded(&**remote, remote.file().size()),
        None => {
            io::Seek::seek(&mut file, io::SeekFrom::End(0)).and_then(|size| embedded(&file, size))
        }
    };
    let bytes = match found.map_err(error("reading"))? {
        None => return Ok(None),
        Some(bytes) => bytes,
    };
    let mut descriptor = Descriptor::parse(&bytes.text).map_err(|reason| SourceError::Invalid {
        path: path.into(),
        reason,
    })?;
    if bytes.holds_data {
        descriptor.extents.clear();
    }
    Ok(Some(descriptor))
}

/// The parent as the descriptor of an open image has it.
pub fn parent(path: &Path, file: &dyn ReadAt, size: u64) -> io::Result<Option<Name>> {
    let text = embedded(file, size)?;
    let descriptor = text.map(|t| Descriptor::parse(&t.text).unwrap_or_default());
    Ok(descriptor.and_then(|d| moved(path, &d).or(d.parent)))
}

/// The descriptor inside a sparse image that holds its data itself.
pub fn own_descriptor(file: &dyn ReadAt, size: u64) -> io::Result<Option<Vec<u8>>> {
    let text = embedded(file, size)?.filter(|found| found.holds_data);
    Ok(text.map(|found| found.text))
}

/// The file beside the image that its parent's absolute path of another host means. Not without a content
/// id to tell whether it is the one.
fn moved(at: &Path, descriptor: &Descriptor) -> Option<Name> {
    descriptor.parent_content_id?;
    let name = descriptor.parent.as_ref()?.moved()?;
    let file = name.below(folder_of(at))?;
    file.exists().then_some(name)
}

struct Embedded {
    text: Vec<u8>,
    /// With a capacity of its own a sparse image holds the data, and its descriptor's one extent is
    /// itself, often by a name it has lost since.
    holds_data: bool,
}

/// Whether a file that begins like this is worth a look for a descriptor.
pub fn may_be(head: &[u8]) -> bool {
    let named = |wanted: &[u8]| head.windows(wanted.len()).any(|w| w == wanted);
    head.starts_with(b"KDMV") || head.starts_with(b"#") || named(b"createType")
}

fn embedded(file: &dyn ReadAt, size: u64) -> io::Result<Option<Embedded>> {
    let head = read_up_to(file, 0, 512, size)?;
    let sparse = head.starts_with(b"KDMV");
    let field = |at: usize| {
        let bytes = head.get(at..at + 8)?.try_into().ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    let offset = match field(28).and_then(|sector| sector.checked_mul(512)) {
        Some(offset) if sparse => offset,
        _ => 0,
    };
    if sparse && offset == 0 {
        return Ok(None);
    }
    // Of a disk without a descriptor no more is read than it takes to see that.
    let mut text = read_up_to(file, offset, FIRST, size)?;
    if !text.contains(&0) {
        text = read_up_to(file, offset, MAX_DESCRIPTOR, size)?;
    }
    // QEMU takes the text up to the first zero byte, whatever size the header gives.
    text.truncate(text.iter().position(|b| *b == 0).unwrap_or(text.len()));
    // And when it is told that a file is VMDK, the signature line is not needed either.
    let named = |wanted: &[u8]| text.windows(wanted.len()).any(|w| w == wanted);
    if !sparse && !named(b"# Disk DescriptorFile") && !named(b"createType") {
        return Ok(None);
    }
    Ok(Some(Embedded {
        text,
        holds_data: sparse && field(12) != Some(0),
    }))
}
