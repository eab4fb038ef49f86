//! The descriptor of a VMDK, which names further files: its extents and, for a snapshot or linked
//! clone, its parent.
//!
//! Format: VMware "Virtual Disk Format 5.0". The descriptor is a text file, or is embedded in a
//! sparse image (`KDMV`) at a sector named in its header. `encoding` names the character set of its
//! names; the name of a file may be that text or those bytes.

use std::io;
use std::path::Path;

use super::charset::{Charset, Name};
use super::detect::read_up_to;
use super::headers::{VMDK_MAGIC, VmdkHeader};
use super::remote::{self, ReadAt};
use crate::files::{folder_of, open_file};

/// QEMU's own limit for a descriptor file.
const MAX_DESCRIPTOR: usize = 2 << 20;
/// The size of a first read, which contains most descriptors.
const FIRST: usize = 64 << 10;
const MAX_EXTENTS: usize = 4096;

/// The reason why a file lacks a required descriptor.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{0}")]
    Invalid(String),
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    pub extents: Vec<Name>,
    pub parent: Option<Name>,
    pub content_id: Option<u32>,
    /// The parent's content id when the delta was made.
    pub parent_content_id: Option<u32>,
    /// A kind that QEMU cannot read: a pointer to a device, encrypted data.
    pub unreadable: Option<Unreadable>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreadable {
    RawDevice,
    Encrypted,
    /// On vSAN or a vVol.
    Object,
}

/// Whether an extent is an object of an object store.
fn is_object(extent: &str) -> bool {
    let schemes = ["vsan://", "vvol://"];
    let starts = |scheme: &&str| {
        extent
            .get(..scheme.len())
            .is_some_and(|s| s.eq_ignore_ascii_case(scheme))
    };
    schemes.iter().any(starts)
}

/// Parses `key=value` of a descriptor, without regard to case; values may be quoted.
fn setting<'t>(line: &'t str, key: &str) -> Option<&'t str> {
    let (name, value) = line.split_once('=')?;
    let value = value.trim().trim_matches('"');
    name.trim().eq_ignore_ascii_case(key).then_some(value)
}

/// The encoding declared by a descriptor. Names in an unknown one are bytes.
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
        // QEMU finds it anywhere, even in a comment, and whatever parentCID is.
        let hint = b"parentFileNameHint";
        let at = bytes.windows(hint.len()).position(|w| w == hint);
        let name = at.and_then(|at| bytes[at..].split(|b| *b == b'"').nth(1));
        descriptor.parent = name.map(|name| Name::new(charset, name));
        Ok(descriptor)
    }
}

/// Reads the descriptor of the image; `None` for an image without one, such as a flat extent.
pub fn read(path: &Path) -> Result<Option<Descriptor>, DescriptorError> {
    let error = |what| move |source| DescriptorError::Io { what, source };
    let mut file = open_file(path).map_err(error("opening"))?;
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
    let mut descriptor = Descriptor::parse(&bytes.text).map_err(DescriptorError::Invalid)?;
    if bytes.holds_data {
        descriptor.extents.clear();
    }
    Ok(Some(descriptor))
}

/// The parent in the descriptor of an open image.
pub fn parent(path: &Path, file: &dyn ReadAt, size: u64) -> io::Result<Option<Name>> {
    let text = embedded(file, size)?;
    let descriptor = text.map(|t| Descriptor::parse(&t.text).unwrap_or_default());
    Ok(descriptor.and_then(|d| moved(path, &d).or(d.parent)))
}

/// The descriptor inside a sparse image that contains its data.
pub fn own_descriptor(file: &dyn ReadAt, size: u64) -> io::Result<Option<Vec<u8>>> {
    let text = embedded(file, size)?.filter(|found| found.holds_data);
    Ok(text.map(|found| found.text))
}

/// The local file beside the image that replaces a parent with an absolute path of another host. It
/// requires a content id to confirm that it is the right one.
pub(crate) fn moved(at: &Path, descriptor: &Descriptor) -> Option<Name> {
    descriptor.parent_content_id?;
    let name = descriptor.parent.as_ref()?.moved()?;
    let file = name.below(folder_of(at))?;
    file.exists().then_some(name)
}

struct Embedded {
    text: Vec<u8>,
    /// Whether the image contains the data, as a sparse image with its own capacity does. Its
    /// descriptor's one extent is then the image itself, often under an outdated name.
    holds_data: bool,
}

/// Whether a file with this beginning may have a descriptor.
pub fn may_be(head: &[u8]) -> bool {
    let named = |wanted: &[u8]| head.windows(wanted.len()).any(|w| w == wanted);
    head.starts_with(&VMDK_MAGIC) || head.starts_with(b"#") || named(b"createType")
}

fn embedded(file: &dyn ReadAt, size: u64) -> io::Result<Option<Embedded>> {
    let head = read_up_to(file, 0, 512, size)?;
    let sparse = VmdkHeader::of(&head);
    let offset = match &sparse {
        Some(header) => header.descriptor.checked_mul(512).unwrap_or(0),
        None => 0,
    };
    if sparse.is_some() && offset == 0 {
        return Ok(None);
    }
    // Only as much of a disk without a descriptor is read as is needed to see that.
    let mut text = read_up_to(file, offset, FIRST, size)?;
    if !text.contains(&0) {
        text = read_up_to(file, offset, MAX_DESCRIPTOR, size)?;
    }
    // QEMU reads the text up to the first zero byte, whatever size the header has.
    text.truncate(text.iter().position(|b| *b == 0).unwrap_or(text.len()));
    // If QEMU is given the VMDK driver, the signature line is not needed either.
    let named = |wanted: &[u8]| text.windows(wanted.len()).any(|w| w == wanted);
    if sparse.is_none() && !named(b"# Disk DescriptorFile") && !named(b"createType") {
        return Ok(None);
    }
    Ok(Some(Embedded {
        text,
        holds_data: sparse.is_some_and(|header| header.capacity != 0),
    }))
}
