//! The source: a disk image, or a VM with its disks and its description.
//!
//! [`open`] takes the SOURCE of the command line and distinguishes VMs from disks. VMs are `.vmx`,
//! `.ovf`, `.ova`, libvirt domain XML, and the directory of one of these or of a Hyper-V export.
//! Anything else is a plain disk image. It is quick, because it reads descriptions and never disk
//! contents. Disks that are not usable in place and the checksums of a manifest are left to
//! [`SourceVm::prepare`]. Such disks are members of an OVA and gzip'd ones. It works in a directory
//! of the caller.
//!
//! These files are untrusted. The parsers ([`vmx`], [`ovf`], [`libvirt`], [`tar`], [`vmdk`]) are
//! pure functions with limits. A reference that leads out of the directory of the description is
//! refused. It could otherwise bring any file of the host into a converted guest. The exception is
//! libvirt XML, whose paths are this host's by definition.
//!
//! The description of a source is a hint. Facts found inside the guest take precedence.

pub mod find;
pub mod libvirt;
pub mod manifest;
pub(crate) mod mirror;
pub(crate) mod ova;
pub mod ovf;
pub mod tar;
pub(crate) mod vm;
mod vmdk;
pub mod vmx;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use crate::domain::element::XmlError;
use crate::error::Blocker;
use crate::files::{folder_of, open_file};
pub use crate::types::Firmware;
use crate::types::MacAddr;

pub use manifest::Manifest;

/// The size limit of a description; a larger file is not one.
const MAX_DESCRIPTION: u64 = 16 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    Disk,
    Vmx,
    Ovf,
    Ova,
    Libvirt,
    HyperV,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SourceVm {
    pub kind: SourceKind,
    /// The name without control characters; not yet a libvirt name.
    pub name: String,
    /// The disks in the order in which the source's firmware would try them.
    pub disks: Vec<SourceDisk>,
    pub memory_mib: Option<u64>,
    pub vcpus: Option<u32>,
    pub cores_per_socket: Option<u32>,
    pub threads_per_core: Option<u32>,
    pub firmware: Option<Firmware>,
    pub secure_boot: bool,
    pub tpm: bool,
    pub nics: Vec<SourceNic>,
    pub uuid: Option<Uuid>,
    pub serial: Option<String>,
    pub genid: Option<Uuid>,
    /// Notes for the user: omitted devices, unsupported values.
    pub notes: Vec<String>,
    #[serde(skip)]
    pub manifest: Manifest,
    /// The unpacked files, which exist as long as this does.
    #[serde(skip)]
    pub unpacked: Unpacked,
}

/// Unpacked disks: files without a name. They are gone with the last clone of this, even if the
/// process is killed.
#[derive(Debug, Clone, Default)]
pub struct Unpacked(Vec<Arc<File>>);

/// Two VMs are equal even if different runs unpacked them.
impl PartialEq for Unpacked {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for Unpacked {}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SourceDisk {
    /// The name in the description, for messages.
    pub name: String,
    /// The image, or the archive that contains it.
    #[serde(serialize_with = "crate::text::json_path::serialize")]
    pub path: PathBuf,
    /// The format in the description, under QEMU's name (`vmdk`, `raw`, ...), if there is one.
    pub format: Option<String>,
    pub controller: Controller,
    /// Controller number and position on the controller.
    pub order: (u32, u32),
    /// Set for a disk that is unreadable in place until [`SourceVm::prepare`] has run.
    pub packed: Option<Packed>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Packed {
    /// The name in the archive or directory, and in the manifest.
    pub name: String,
    /// The range of an uncompressed tar member.
    pub member: Option<(u64, u64)>,
    pub gzip: bool,
    /// The size of the disk in its description: the limit for unpacking.
    pub capacity: Option<u64>,
}

/// The kind of a controller, in the order in which disks are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Controller {
    Scsi,
    Virtio,
    Sata,
    Ide,
    Nvme,
    Usb,
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SourceNic {
    pub mac: Option<MacAddr>,
    pub model: Option<String>,
    pub network: Option<String>,
    /// Whether it is connected at power-on.
    pub connected: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{path} does not exist")]
    NotFound { path: PathBuf },
    #[error("{what} {path}")]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is {size} bytes, more than the {limit} bytes allowed for a description")]
    TooLarge {
        path: PathBuf,
        size: u64,
        limit: u64,
    },
    #[error(
        "a disk in {path} unpacks to more than {limit} MiB: it is declared as {declared}, and {free} MiB are free in {}",
        folder.display()
    )]
    Bomb {
        path: PathBuf,
        /// All limits are in MiB.
        limit: u64,
        declared: String,
        free: u64,
        folder: PathBuf,
    },
    #[error("{path} is not understood: {reason}")]
    Invalid { path: PathBuf, reason: String },
    #[error("{path} is not understood")]
    Xml {
        path: PathBuf,
        #[source]
        source: XmlError,
    },
    #[error("disk {disk} of {path} is missing: {missing} does not exist")]
    MissingDisk {
        path: PathBuf,
        disk: String,
        missing: PathBuf,
    },
    #[error("{path} refers to {reference:?}, outside its directory: not followed")]
    Outside { path: PathBuf, reference: String },
    #[error(
        "disk {second} of {path} is not here: {file} is disk {first}, and one file cannot be both"
    )]
    SameFile {
        path: PathBuf,
        first: String,
        second: String,
        file: PathBuf,
    },
    #[error("the VM of {path} is suspended (its memory is in {state})")]
    Suspended { path: PathBuf, state: String },
    #[error("{path} has no configuration {wanted:?}: {known}")]
    NoConfiguration {
        path: PathBuf,
        wanted: String,
        known: String,
    },
    #[error(
        "{path} was made over a {parent} of content id {wanted:08x}, and the file of that name has \
         {found:08x}: it was written to since, or is another disk"
    )]
    OtherParent {
        path: PathBuf,
        parent: PathBuf,
        wanted: u32,
        found: u32,
    },
    #[error("{path} describes no disk{}", .notes.iter().map(|n| format!("; {n}")).collect::<String>())]
    NoDisk { path: PathBuf, notes: Vec<String> },
    #[error("{path} describes {count} VMs, and one is converted at a time")]
    SeveralMachines { path: PathBuf, count: usize },
    #[error("{path}: {what} is not supported: {remedy}")]
    Unsupported {
        path: PathBuf,
        what: String,
        remedy: &'static str,
    },
    #[error(
        "{file} of {path} is damaged: its {algorithm} is {actual}, and {expected} in the manifest"
    )]
    Checksum {
        path: PathBuf,
        file: String,
        algorithm: &'static str,
        expected: String,
        actual: String,
    },
}

pub type Result<T, E = SourceError> = std::result::Result<T, E>;

const SUSPENDED: &str = "resume it and shut it down from inside, then copy it again: what it had in memory is not on its disks";

impl SourceError {
    /// The blocker for an error that is a refusal, not a failure.
    pub fn blocker(&self) -> Option<Blocker> {
        match self {
            Self::Suspended { .. } => Some(Blocker::new("suspended", self.to_string(), SUSPENDED)),
            _ => None,
        }
    }

    /// A remedy; `None` if the message has it or only the host knows one.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NotFound { .. } => "check the path",
            Self::TooLarge { .. } => "name the disk image itself",
            Self::Bomb { .. } => {
                "if the archive is right, raise the limit with --max-unpacked MIB, or unpack elsewhere with TMPDIR=DIR"
            }
            Self::Invalid { .. } | Self::Xml { .. } => {
                "export the VM again, or name its disk image itself"
            }
            Self::MissingDisk { .. } => "copy all files of the VM into one directory",
            Self::Outside { .. } => "put the disk beside the description, or name the disk itself",
            Self::NoDisk { .. } => "name a disk image",
            Self::SameFile { .. } => {
                "copy each disk's own file; of two of one name one goes into a directory named like the end of its \
                 path, DATASTORE/FOLDER beside the .vmx, or gets another name here and in the description"
            }
            Self::Suspended { .. } => SUSPENDED,
            Self::OtherParent { .. } => {
                "copy the whole chain again while the VM is off, or consolidate the snapshots on the old host"
            }
            Self::NoConfiguration { .. } => "name one of these with --ovf-configuration",
            Self::SeveralMachines { .. } => "name the disk image of one of them",
            Self::Checksum { .. } => "copy or export the VM again",
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::Other => {
                "name a disk image or the description of a VM"
            }
            Self::Unsupported { .. } | Self::Io { .. } => return None,
        })
    }
}

/// Options for reading a description.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The deployment option of an OVF.
    pub ovf_configuration: Option<String>,
}

impl SourceVm {
    fn new(kind: SourceKind, name: &str) -> Self {
        Self {
            kind,
            name: clean(name),
            disks: Vec::new(),
            memory_mib: None,
            vcpus: None,
            cores_per_socket: None,
            threads_per_core: None,
            firmware: None,
            secure_boot: false,
            tpm: false,
            nics: Vec::new(),
            uuid: None,
            serial: None,
            genid: None,
            notes: Vec::new(),
            manifest: Manifest::default(),
            unpacked: Unpacked::default(),
        }
    }

    /// Parses the manifest of a package; an unreadable part becomes a note.
    fn take_manifest(&mut self, text: &[u8]) -> Result<(), String> {
        let (manifest, unreadable) = Manifest::parse(text)?;
        self.manifest = manifest;
        for line in unreadable {
            self.note(format!(
                "line {line} of the manifest is no digest: the file it is about is not verified"
            ));
        }
        Ok(())
    }

    fn note(&mut self, note: impl AsRef<str>) {
        // A hostile description must not flood the report.
        if self.notes.len() < 100 {
            self.notes.push(clean(note.as_ref()));
        }
    }

    /// Unpacks disks that are unreadable in place below `work`, and verifies the manifest. Each
    /// disk is read once. Afterwards every disk is a separate file; an unpacked one is named only
    /// by a link. `most` overrides the limit for unpacking, which is the declared size and the free
    /// space.
    pub fn prepare(&mut self, work: &Path, most: Option<u64>) -> Result<()> {
        ova::prepare(self, work, most)
    }
}

/// Opens a SOURCE.
pub fn open(path: &Path) -> Result<SourceVm> {
    open_with(path, &Options::default())
}

pub fn open_with(path: &Path, options: &Options) -> Result<SourceVm> {
    let meta = std::fs::metadata(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => SourceError::NotFound { path: path.into() },
        _ => SourceError::Io {
            what: "looking at",
            path: path.into(),
            source,
        },
    })?;
    if meta.is_dir() {
        return open_folder(path, options);
    }
    let mut vm = match extension(path).as_str() {
        "vmx" | "vmtx" => vmx::open(path)?,
        "ovf" => ovf::open(path, options)?,
        "ova" => ova::open(path, options)?,
        "xml" => libvirt::open(path)?,
        other => match not_read(other) {
            Some((what, remedy)) => {
                return Err(SourceError::Unsupported {
                    path: path.into(),
                    what: what.into(),
                    remedy,
                });
            }
            None => open_disk(path),
        },
    };
    if vm.name.is_empty() {
        vm.name = stem(path);
    }
    if vm.disks.is_empty() {
        return Err(SourceError::NoDisk {
            path: path.into(),
            notes: vm.notes,
        });
    }
    if vm.kind != SourceKind::Disk && vm.memory_mib.is_none() {
        vm.note("it has no memory size that is understood: 4096 MiB, or --memory");
    }
    refuse_same_files(path, &vm.disks)?;
    for disk in &vm.disks {
        if disk.packed.is_none() {
            vmdk::check_files(&disk.path)?;
        }
    }
    Ok(vm)
}

/// Refuses two disks on one file. They would be two copies of one disk, and the other disk would be
/// lost. Two files of one name on two datastores cause this, and two descriptors that name one
/// extent.
fn refuse_same_files(path: &Path, disks: &[SourceDisk]) -> Result<()> {
    type FileId = (u64, u64, Option<u64>);
    let place = |file: &Path, member| -> Option<FileId> {
        let meta = std::fs::metadata(file).ok()?;
        Some(match meta.file_type().is_block_device() {
            true => (meta.rdev(), 0, member),
            false => (meta.dev(), meta.ino(), member),
        })
    };
    let mut seen: Vec<(FileId, &SourceDisk)> = Vec::new();
    for disk in disks {
        let member = disk.packed.as_ref().and_then(|p| p.member);
        let mut files = vec![(disk.path.clone(), member.map(|(at, _)| at))];
        if disk.packed.is_none()
            && let Ok(Some(descriptor)) = crate::disk::vmdk::read(&disk.path)
        {
            let folder = folder_of(&disk.path);
            let extents = descriptor.extents.iter().filter_map(|e| e.below(folder));
            files.extend(extents.map(|file| (file, None)));
        }
        let mut own = Vec::new();
        for (file, member) in files {
            let Some(place) = place(&file, member) else {
                continue;
            };
            if let Some((_, first)) = seen.iter().find(|(other, _)| *other == place) {
                return Err(SourceError::SameFile {
                    path: path.into(),
                    first: first.name.clone(),
                    second: disk.name.clone(),
                    file,
                });
            }
            own.push((place, disk));
        }
        seen.extend(own);
    }
    Ok(())
}

/// Descriptions of other products by extension: their name, and what to name instead.
fn not_read(extension: &str) -> Option<(&'static str, &'static str)> {
    Some(match extension {
        "vbox" | "vbox-prev" => (
            "a VM of VirtualBox",
            "export it: VBoxManage export NAME -o NAME.ova, or name its disk image",
        ),
        "vmcx" | "vmrs" => (
            "a binary configuration of Hyper-V",
            "name the directory of the export, or its .vhdx",
        ),
        "xva" => (
            "an archive of XenServer, which contains disks in pieces",
            "export the VM as OVF, or its disk: xe vdi-export uuid=UUID format=vhd filename=DISK.vhd",
        ),
        "pvs" | "pvm" => ("a VM of Parallels", "name its disk image (.hds)"),
        _ => return None,
    })
}

/// An export of a server: one raw disk, whatever the end of its name.
pub(crate) fn export(path: &Path) -> SourceVm {
    let mut vm = open_disk(path);
    for disk in &mut vm.disks {
        disk.format = Some("raw".into());
    }
    vm
}

fn open_disk(path: &Path) -> SourceVm {
    let mut vm = SourceVm::new(SourceKind::Disk, &stem(path));
    vm.disks.push(SourceDisk {
        name: stem(path),
        path: path.into(),
        format: None,
        controller: Controller::Unknown,
        order: (0, 0),
        packed: None,
    });
    vm
}

/// Opens a directory with one description, or a Hyper-V export.
fn open_folder(dir: &Path, options: &Options) -> Result<SourceVm> {
    let mut files = files_below(dir, 3)?;
    files.retain(|file| !is_apple_double(file));
    for kind in ["vmx", "ovf"] {
        let found: Vec<&PathBuf> = files
            .iter()
            .filter(|f| f.parent() == Some(dir) && extension(f) == kind)
            .collect();
        match found.as_slice() {
            [] => {}
            [one] => return open_with(one, options),
            several => {
                return Err(SourceError::SeveralMachines {
                    path: dir.into(),
                    count: several.len(),
                });
            }
        }
    }
    let with = |ext: &'static str| files.iter().filter(move |f| extension(f) == ext);
    if let Some(file) = with("avhdx").chain(with("avhd")).next() {
        return Err(SourceError::Unsupported {
            path: file.clone(),
            what: "a Hyper-V checkpoint disk".into(),
            remedy: "delete the checkpoints in Hyper-V, wait for the merge and export again",
        });
    }
    // The memory of a VM that was saved and not shut down, up to Windows Server 2012 R2.
    if let Some(state) = with("vsv").next() {
        return Err(SourceError::Suspended {
            path: dir.into(),
            state: stem(state) + ".vsv",
        });
    }
    let machines = with("vmcx").count();
    if machines > 1 {
        return Err(SourceError::SeveralMachines {
            path: dir.into(),
            count: machines,
        });
    }
    let mut vm = SourceVm::new(SourceKind::HyperV, &stem(dir));
    for (n, file) in with("vhdx").chain(with("vhd")).enumerate() {
        vm.disks.push(SourceDisk {
            name: stem(file),
            path: file.clone(),
            format: Some(
                if extension(file) == "vhd" {
                    "vpc"
                } else {
                    "vhdx"
                }
                .into(),
            ),
            controller: Controller::Unknown,
            order: (0, u32::try_from(n).unwrap_or(u32::MAX)),
            packed: None,
        });
    }
    if vm.disks.is_empty() {
        return Err(SourceError::NoDisk {
            path: dir.into(),
            notes: vm.notes,
        });
    }
    vm.note(
        "a Hyper-V export keeps its settings in a binary file of undocumented format: memory, \
         processors, NICs and the order of disks are not taken from it",
    );
    Ok(vm)
}

/// Whether the file is a `._name`, which macOS writes beside every file on a foreign file system,
/// and into every archive.
fn is_apple_double(name: &Path) -> bool {
    let name = name.file_name().unwrap_or_default();
    name.as_encoded_bytes().starts_with(b"._")
}

fn files_below(dir: &Path, depth: u32) -> Result<Vec<PathBuf>> {
    let error = |source| SourceError::Io {
        what: "listing",
        path: dir.into(),
        source,
    };
    let (mut files, mut dirs) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(dir).map_err(error)?.take(10_000) {
        let entry = entry.map_err(error)?;
        match entry.file_type().map_err(error)? {
            kind if kind.is_dir() => dirs.push(entry.path()),
            _ => files.push(entry.path()),
        }
    }
    files.sort();
    dirs.sort();
    if depth > 1 {
        for dir in dirs {
            files.extend(files_below(&dir, depth - 1)?);
        }
    }
    Ok(files)
}

/// The names of the files in `dir` with this extension.
fn siblings(dir: &Path, wanted: &str) -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().take(10_000);
    let names = entries.flatten().map(|entry| entry.file_name());
    let mut names: Vec<_> = names
        .filter(|name| extension(Path::new(name)) == wanted)
        .collect();
    names.sort();
    names
}

fn extension(path: &Path) -> String {
    let extension = path.extension().unwrap_or_default();
    extension.to_string_lossy().to_ascii_lowercase()
}

/// The name without its extension. Bytes that are not UTF-8 become `%B4`, so that two names remain
/// distinct.
fn stem(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default();
    let mut text = String::new();
    for part in stem.as_bytes().utf8_chunks() {
        text += part.valid();
        for byte in part.invalid() {
            text += &format!("%{byte:02X}");
        }
    }
    clean(&text)
}

/// Cleans text of a description for people: no control characters, limited length.
fn clean(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control()).take(400).collect();
    text.trim().to_owned()
}

/// Reads the whole description file, within the limit.
fn read_description(path: &Path) -> Result<Vec<u8>> {
    let error = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => SourceError::NotFound { path: path.into() },
        _ => SourceError::Io {
            what: "reading",
            path: path.into(),
            source,
        },
    };
    let mut bytes = Vec::new();
    let file = open_file(path).map_err(error)?;
    file.take(MAX_DESCRIPTION + 1)
        .read_to_end(&mut bytes)
        .map_err(error)?;
    if bytes.len() as u64 > MAX_DESCRIPTION {
        let size = std::fs::metadata(path).map_or(bytes.len() as u64, |m| m.len());
        return Err(SourceError::TooLarge {
            path: path.into(),
            size,
            limit: MAX_DESCRIPTION,
        });
    }
    Ok(bytes)
}
