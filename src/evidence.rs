//! Collects a guest's registry, boot configuration and logs for a support case, in one `.tar.gz`.
//!
//! Only reads the guest. `SAM` and `SECURITY` are never included, nor any file of a user. The
//! archive still contains secrets, which [`warning`] lists on the screen and in the archive. Sizes
//! are limited: hives as a whole, logs by their end.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, Header};

use crate::firstboot;
use crate::guest::{DiskId, FileKind, FsKind, GuestError, GuestPath, GuestRead, VolumeId};
use crate::inspect::Survey;
use crate::registry::HiveView;
use crate::stop;

const MIB: u64 = 1 << 20;
/// The limit of all files together, before compression.
const MAX_TOTAL: u64 = 1024 * MIB;
const MAX_HIVE: u64 = 512 * MIB;
/// The limit of an event log. They grow to 20 MiB unless somebody changed that, and half of one is
/// unreadable.
const MAX_EVENT_LOG: u64 = 128 * MIB;
/// The limit of a text log: its end has the latest events.
const MAX_LOG: u64 = 16 * MIB;
const CHUNK: u64 = MIB;
/// The most files of one directory that match a pattern.
const MAX_MATCHES: usize = 64;

/// The suffixes of a hive's transaction logs.
const LOGS: [&str; 4] = ["", ".LOG", ".LOG1", ".LOG2"];
const HIVES: [&str; 3] = ["SYSTEM", "SOFTWARE", "DRIVERS"];
const EVENT_LOGS: [&str; 7] = [
    r"System32\config\SysEvent.Evt",
    r"System32\winevt\Logs\System.evtx",
    r"System32\winevt\Logs\Setup.evtx",
    r"System32\winevt\Logs\Microsoft-Windows-Kernel-PnP%4Configuration.evtx",
    r"System32\winevt\Logs\Microsoft-Windows-Kernel-Boot%4Operational.evtx",
    r"System32\winevt\Logs\Microsoft-Windows-Storage-Storport%4Operational.evtx",
    r"System32\winevt\Logs\Microsoft-Windows-Ntfs%4Operational.evtx",
];
const TEXT_LOGS: [&str; 6] = [
    "setupapi.log",
    "ntbtlog.txt",
    r"Panther\setupact.log",
    r"Panther\setuperr.log",
    r"Logs\CBS\CBS.log",
    r"System32\LogFiles\Srt\SrtTrail.txt",
];
/// Directories, and the start and end of the names of files in them.
const PATTERNS: [(&str, &str, &str); 2] =
    [("INF", "setupapi", ".log"), (firstboot::FOLDER, "", ".log")];

#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    #[error("creating {path}")]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("writing {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// One file of the archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    pub name: String,
    #[serde(skip_serializing_if = "DiskId::is_only")]
    pub disk: DiskId,
    /// Its partition in the guest.
    pub partition: u32,
    pub path: GuestPath,
    /// The size in the guest, and the size in the archive.
    pub size_bytes: u64,
    pub taken_bytes: u64,
    pub sha256: String,
    /// The reason why it is missing or incomplete.
    pub note: Option<String>,
}

/// A finished archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Archive {
    pub path: PathBuf,
    pub size_bytes: u64,
    pub files: Vec<Item>,
    pub warning: String,
}

/// The part of a file to include.
#[derive(Debug, Clone, Copy)]
enum Take {
    /// The whole file, or none of it if it is larger.
    Whole(u64),
    End(u64),
}

/// Collects into `folder/<name>-evidence.tar.gz`, which must not exist, readable only by its owner.
pub fn collect(
    guest: &dyn GuestRead,
    survey: &Survey,
    inspection: Value,
    folder: &Path,
    name: &str,
) -> Result<Archive, EvidenceError> {
    let path = folder.join(format!("{name}-evidence.tar.gz"));
    let create = |source| EvidenceError::Create {
        path: path.clone(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(create)?;
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(create)?;
    let warning = warning(survey);
    let written = write(guest, file, &inspection, &warning).and_then(|files| {
        let size_bytes = fs::metadata(&path)?.len();
        Ok((files, size_bytes))
    });
    match written {
        Ok((files, size_bytes)) => Ok(Archive {
            path,
            size_bytes,
            files,
            warning,
        }),
        Err(source) => {
            // Half an archive is useless.
            let _ = fs::remove_file(&path);
            Err(EvidenceError::Write { path, source })
        }
    }
}

fn write(
    guest: &dyn GuestRead,
    file: File,
    inspection: &Value,
    warning: &str,
) -> io::Result<Vec<Item>> {
    let gzip = GzEncoder::new(BufWriter::new(file), Compression::fast());
    let mut tar = Members::new(gzip);
    tar.text("WARNING.txt", warning)?;
    tar.text("inspect.json", &format!("{inspection:#}\n"))?;
    let mut items = Vec::new();
    let mut left = MAX_TOTAL;
    for (volume, path, take) in wanted(guest) {
        if crate::stop::requested() {
            return Err(stop::Interrupted.into());
        }
        items.extend(add(guest, &mut tar, (volume, &path), take, &mut left)?);
    }
    let manifest = json!({"schema": "hyper2kvm/evidence/1", "version": env!("CARGO_PKG_VERSION"), "files": items});
    tar.text("manifest.json", &format!("{manifest:#}\n"))?;
    let gzip = tar.builder.into_inner()?;
    let mut file = gzip
        .finish()?
        .into_inner()
        .map_err(io::IntoInnerError::into_error)?;
    file.flush()?;
    file.sync_all()?;
    Ok(items)
}

/// The files to collect on every volume. A Windows with a damaged registry is evidence too, so this
/// is independent of the inspection's result.
fn wanted(guest: &dyn GuestRead) -> Vec<(VolumeId, GuestPath, Take)> {
    let mut list = Vec::new();
    for volume in guest.volumes() {
        if !matches!(volume.kind, FsKind::Ntfs | FsKind::Fat) || volume.state.unreadable.is_some() {
            continue;
        }
        let mut add = |base: &GuestPath, path: &str, take: Take| {
            if let Ok(path) = base.join(path) {
                list.push((volume.id, path, take));
            }
        };
        let top = GuestPath::root();
        for log in LOGS {
            add(
                &top,
                &format!(r"EFI\Microsoft\Boot\BCD{log}"),
                Take::Whole(MAX_HIVE),
            );
            add(&top, &format!(r"Boot\BCD{log}"), Take::Whole(MAX_HIVE));
        }
        for root in windows_folders(guest, volume.id) {
            for hive in HIVES {
                for log in LOGS {
                    let path = format!(r"System32\config\{hive}{log}");
                    add(&root, &path, Take::Whole(MAX_HIVE));
                }
            }
            for (folder, start, end) in PATTERNS {
                for name in matching(guest, volume.id, &root, folder, (start, end)) {
                    add(&root, &format!(r"{folder}\{name}"), Take::End(MAX_LOG));
                }
            }
            for path in TEXT_LOGS {
                add(&root, path, Take::End(MAX_LOG));
            }
            for path in EVENT_LOGS {
                add(&root, path, Take::Whole(MAX_EVENT_LOG));
            }
        }
    }
    list
}

fn windows_folders(guest: &dyn GuestRead, volume: VolumeId) -> Vec<GuestPath> {
    let top = guest.list(volume, &GuestPath::root()).unwrap_or_default();
    top.iter()
        .take(4096)
        .filter(|e| e.kind == FileKind::Dir && e.reparse_tag.is_none())
        .filter_map(|e| GuestPath::root().join(&e.name).ok())
        .filter(|root| {
            let hive = root.join(r"System32\config\SYSTEM");
            hive.is_ok_and(|hive| matches!(guest.stat(volume, &hive), Ok(Some(_))))
        })
        .take(8)
        .collect()
}

fn matching(
    guest: &dyn GuestRead,
    volume: VolumeId,
    root: &GuestPath,
    folder: &str,
    (start, end): (&str, &str),
) -> Vec<String> {
    let Ok(folder) = root.join(folder) else {
        return Vec::new();
    };
    let mut names: Vec<String> = guest
        .list(volume, &folder)
        .unwrap_or_default()
        .into_iter()
        .filter(|e| e.kind == FileKind::File)
        .map(|e| e.name)
        .filter(|name| {
            let name = name.to_lowercase();
            name.starts_with(start) && name.ends_with(end)
        })
        .collect();
    names.sort();
    names.truncate(MAX_MATCHES);
    names
}

/// The offset and length of the part to include, with a note if that is not the whole file.
fn part_to_take(item: &mut Item, take: Take, left: u64) -> Option<(u64, u64)> {
    let (start, size) = match take {
        Take::Whole(limit) if item.size_bytes > limit => {
            item.note = Some(format!("not taken: more than {} MiB", limit / MIB));
            return None;
        }
        Take::End(limit) if item.size_bytes > limit => {
            item.note = Some(format!("the last {} MiB of it", limit / MIB));
            (item.size_bytes - limit, limit)
        }
        _ => (0, item.size_bytes),
    };
    if size > left {
        item.note = Some(format!(
            "not included: the archive would exceed {} MiB",
            MAX_TOTAL / MIB
        ));
        return None;
    }
    Some((start, size))
}

/// Adds one file; `None` if it does not exist.
fn add<W: Write>(
    guest: &dyn GuestRead,
    tar: &mut Members<W>,
    (volume, path): (VolumeId, &GuestPath),
    take: Take,
    left: &mut u64,
) -> io::Result<Option<Item>> {
    let mut item = Item {
        name: name(volume, path),
        disk: volume.disk,
        partition: volume.partition,
        path: path.clone(),
        size_bytes: 0,
        taken_bytes: 0,
        sha256: String::new(),
        note: None,
    };
    match guest.stat(volume, path) {
        Ok(Some(info)) if info.kind == FileKind::File => item.size_bytes = info.size,
        Ok(_) => return Ok(None),
        Err(error) => {
            item.note = Some(format!("not taken: {error}"));
            return Ok(Some(item));
        }
    }
    let Some((start, size)) = part_to_take(&mut item, take, *left) else {
        return Ok(Some(item));
    };
    let mut contents = Contents {
        guest,
        file: (volume, path),
        range: start..start + size,
        part: VecDeque::new(),
        taken: 0,
        digest: Sha256::new(),
        note: None,
    };
    // The first part is read before the header is written: an unreadable file is left out.
    if let Err(error) = contents.fill() {
        item.note = Some(format!("not taken: {error}"));
        return Ok(Some(item));
    }
    tar.append(&item.name, size, &mut contents)?;
    *left -= size;
    item.note = contents.note.or(item.note);
    item.taken_bytes = contents.taken;
    item.sha256 = crate::text::hex(&contents.digest.finalize());
    Ok(Some(item))
}

/// The writer of the archive's members.
struct Members<W: Write> {
    builder: Builder<W>,
    /// Seconds since 1970, for every member.
    modified: u64,
}

impl<W: Write> Members<W> {
    fn new(out: W) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            builder: Builder::new(out),
            modified: now.map_or(0, |t| t.as_secs()),
        }
    }

    fn text(&mut self, name: &str, text: &str) -> io::Result<()> {
        self.append(name, text.len() as u64, text.as_bytes())
    }

    fn append(&mut self, name: &str, size: u64, contents: impl Read) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_mode(0o600);
        header.set_mtime(self.modified);
        header.set_size(size);
        self.builder.append_data(&mut header, name, contents)
    }
}

/// A range of a file of the guest. Its length is that in its header: unreadable parts are zeroes.
struct Contents<'a> {
    guest: &'a dyn GuestRead,
    file: (VolumeId, &'a GuestPath),
    range: Range<u64>,
    /// Bytes read and not returned yet.
    part: VecDeque<u8>,
    /// The number of returned bytes of the guest, and their digest.
    taken: u64,
    digest: Sha256,
    note: Option<String>,
}

impl Contents<'_> {
    fn fill(&mut self) -> Result<(), GuestError> {
        let left = self.range.end - self.range.start;
        let len = usize::try_from(left.min(CHUNK)).unwrap_or(0);
        let (volume, path) = self.file;
        let mut part = self.guest.read_at(volume, path, self.range.start, len)?;
        part.truncate(len);
        self.digest.update(&part);
        self.taken += part.len() as u64;
        self.range.start += part.len() as u64;
        self.part = part.into();
        Ok(())
    }
}

impl Read for Contents<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.part.is_empty() && !self.range.is_empty() && self.note.is_none() {
            let at = self.taken;
            match self.fill() {
                Err(error) => self.note = Some(format!("zeroes from byte {at} on: {error}")),
                Ok(()) if self.part.is_empty() => {
                    self.note = Some(format!("zeroes from byte {at} on: the file ends there"));
                }
                Ok(()) => {}
            }
        }
        if !self.part.is_empty() {
            return self.part.read(buf);
        }
        let left = self.range.end - self.range.start;
        let zeroes = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        buf[..zeroes].fill(0);
        self.range.start += zeroes as u64;
        Ok(zeroes)
    }
}

/// The name in the archive: `partition-2/Windows/INF/setupapi.dev.log`, below `disk-1` if there are
/// several disks; names chosen by the guest are made harmless.
fn name(volume: VolumeId, path: &GuestPath) -> String {
    let mut name = format!("partition-{}", volume.partition);
    if !volume.disk.is_only() {
        name = format!("disk-{}/{name}", volume.disk.number());
    }
    for part in path.parts() {
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() || "._-%".contains(c) {
                c
            } else {
                '_'
            }
        };
        name.push('/');
        name.extend(part.chars().take(90).map(plain));
    }
    name
}

/// Describes the archive's contents in words that make people think before they send it.
pub fn warning(survey: &Survey) -> String {
    let host = survey
        .inspection
        .os
        .hostname
        .as_deref()
        .unwrap_or("a guest");
    let password = survey.hives.as_ref().is_some_and(|hives| {
        let view = HiveView::new(&hives.software.bytes);
        let key = view.and_then(|v| v.key(r"Microsoft\Windows NT\CurrentVersion\Winlogon"));
        matches!(key, Ok(Some(key)) if matches!(key.value("DefaultPassword"), Ok(Some(_))))
    });
    let logon = if password {
        "THE PASSWORD OF AN AUTOMATIC LOGON, WHICH IS SET HERE"
    } else {
        "the password of an automatic logon if one was ever set (none is now)"
    };
    format!(
        "Evidence from {host}: registry hives, boot configuration and logs.\n\
         It holds secrets. Send it only to people who may know all of this, encrypted, and delete it after.\n\
         - SYSTEM: the boot key that unlocks the password hashes in SAM and SECURITY, service \
         configuration with whatever passwords programs keep there, SNMP communities, addresses, names\n\
         - SOFTWARE: {logon}, product keys, installed software, user accounts and their folders\n\
         - event logs and setup logs: users, computers, addresses, devices\n\
         Not in it: SAM and SECURITY (password hashes, LSA secrets, cached logons), files of users, memory dumps.\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_harmless() {
        let path = |text: &str| GuestPath::parse(text).unwrap();
        for (guest, archive) in [
            (
                r"\Windows\INF\setupapi.dev.log",
                "partition-2/Windows/INF/setupapi.dev.log",
            ),
            (
                r"\W\winevt\A B%4C;$(x).evtx",
                "partition-2/W/winevt/A_B%4C___x_.evtx",
            ),
            (r"\ä'\x", "partition-2/__/x"),
        ] {
            assert_eq!(name(VolumeId::new(2), &path(guest)), archive);
        }
        // Directory and file are short enough for the two fields of a header.
        for log in EVENT_LOGS {
            let name = name(VolumeId::new(4_000_000_000), &path(log));
            let (folder, file) = name.rsplit_once('/').unwrap();
            assert!(folder.len() <= 155 && file.len() <= 100, "{name}");
        }
    }

    #[test]
    fn never_what_holds_hashes() {
        for path in HIVES.iter().chain(&EVENT_LOGS).chain(&TEXT_LOGS) {
            let path = path.to_uppercase();
            assert!(
                !path.ends_with("SAM") && !path.ends_with("SECURITY"),
                "{path}"
            );
        }
    }
}
