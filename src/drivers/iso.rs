//! A small ISO 9660 reader: the files of an image and their bytes, over any `Read + Seek`.
//!
//! Follows ECMA-119 with the Joliet supplementary descriptor and the Rock Ridge `NM` names (IEEE
//! P1282 over SUSP). Of several trees in an image, Joliet is preferred, then Rock Ridge, then the
//! plain names. Symbolic links, relocated deep directories, interleaved files and UDF are not
//! supported. The available crates depend on libfuse, are unfinished, or lack Joliet, and the
//! required subset is small.
//!
//! Everything in an image is hostile. Names are checked; sizes, depth and number of entries are
//! limited; no directory is read twice.

use std::collections::HashSet;
use std::io::{self, Read, Seek, SeekFrom};

use crate::bytes::{le16, le32};
const SECTOR: u64 = 2048;
const FIRST_DESCRIPTOR: u64 = 16;
const MAX_DESCRIPTORS: u64 = 64;
const MAX_DEPTH: usize = 16;
const MAX_ENTRIES: usize = 100_000;
const MAX_DIRECTORY: u64 = 16 * 1024 * 1024;
const MAX_CONTINUATIONS: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum IsoError {
    #[error("not an ISO 9660 image: no volume descriptor in sector 16")]
    NotIso,
    #[error("damaged ISO image: {what} at byte {offset}")]
    Damaged { what: &'static str, offset: u64 },
    #[error("ISO image has a file name that is not allowed: {0:?}")]
    Name(String),
    #[error("ISO image has more than {0}")]
    Limit(&'static str),
    #[error("reading the ISO image")]
    Io(#[from] io::Error),
}

/// The kind of names with which the image was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    Joliet,
    RockRidge,
    Plain,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IsoFile {
    /// The path with `/`, without a leading one.
    pub path: String,
    pub size: u64,
    /// Byte offset and length of each piece.
    extents: Vec<(u64, u64)>,
}

pub struct Iso<R> {
    image: R,
    block: u64,
    names: Names,
    /// The bytes to skip in every system use area, from the `SP` entry.
    skip: usize,
    pub label: String,
    pub files: Vec<IsoFile>,
}

struct Record {
    name: Vec<u8>,
    system_use: Vec<u8>,
    offset: u64,
    size: u64,
    flags: u8,
}

const FLAG_DIRECTORY: u8 = 0x02;
const FLAG_ASSOCIATED: u8 = 0x04;
const FLAG_MULTI_EXTENT: u8 = 0x80;

impl<R: Read + Seek> Iso<R> {
    /// Reads the descriptors and the whole directory tree.
    pub fn open(image: R) -> Result<Self, IsoError> {
        let mut iso = Iso {
            image,
            block: SECTOR,
            names: Names::Plain,
            skip: 0,
            label: String::new(),
            files: Vec::new(),
        };
        let root = iso.descriptors()?;
        iso.walk(root)?;
        iso.files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(iso)
    }

    pub fn names(&self) -> Names {
        self.names
    }

    pub fn read(&mut self, file: &IsoFile) -> Result<Vec<u8>, IsoError> {
        let mut bytes = Vec::new();
        for &(offset, len) in &file.extents {
            self.image.seek(SeekFrom::Start(offset))?;
            let got = (&mut self.image).take(len).read_to_end(&mut bytes)?;
            if got as u64 != len {
                return Err(IsoError::Damaged {
                    what: "file data ends early",
                    offset,
                });
            }
        }
        Ok(bytes)
    }

    fn bytes(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, IsoError> {
        let mut bytes = Vec::new();
        self.image.seek(SeekFrom::Start(offset))?;
        (&mut self.image).take(len).read_to_end(&mut bytes)?;
        if bytes.len() as u64 == len {
            Ok(bytes)
        } else {
            Err(IsoError::Damaged {
                what: "image ends early",
                offset,
            })
        }
    }

    /// Selects the root directory of the best tree.
    fn descriptors(&mut self) -> Result<Record, IsoError> {
        let mut primary = None;
        let mut joliet = None;
        for i in 0..MAX_DESCRIPTORS {
            let offset = (FIRST_DESCRIPTOR + i) * SECTOR;
            let sector = match self.bytes(offset, SECTOR) {
                Ok(sector) => sector,
                Err(IsoError::Damaged { .. }) if i == 0 => return Err(IsoError::NotIso),
                Err(error) => return Err(error),
            };
            if sector.get(1..6) != Some(b"CD001") {
                // Some writers omit the terminator.
                break;
            }
            match sector[0] {
                1 if primary.is_none() => primary = Some(sector),
                2 if is_joliet(&sector) => joliet = Some(sector),
                255 => break,
                _ => {}
            }
        }
        let primary = primary.ok_or(IsoError::NotIso)?;
        let label = joliet.as_deref().map_or_else(
            || String::from_utf8_lossy(&primary[40..72]).into_owned(),
            |j| utf16_be(&j[40..72]),
        );
        self.label = label
            .chars()
            .filter(|c| !c.is_control())
            .collect::<String>()
            .trim()
            .to_string();
        let best = joliet.as_deref().unwrap_or(&primary);
        self.block = u64::from(u16_le(best, 128));
        if ![512, 1024, 2048].contains(&self.block) {
            return Err(IsoError::Damaged {
                what: "logical block size",
                offset: FIRST_DESCRIPTOR * SECTOR + 128,
            });
        }
        let root = self.record(&best[156..190]).ok_or(IsoError::Damaged {
            what: "root directory record",
            offset: FIRST_DESCRIPTOR * SECTOR + 156,
        })?;
        if joliet.is_some() {
            self.names = Names::Joliet;
        } else {
            self.find_rock_ridge(&root)?;
        }
        Ok(root)
    }

    /// An `SP` entry in the root's own `.` record announces Rock Ridge.
    fn find_rock_ridge(&mut self, root: &Record) -> Result<(), IsoError> {
        let sector = self.bytes(root.offset, SECTOR.min(root.size))?;
        let len = usize::from(sector.first().copied().unwrap_or(0));
        let Some(dot) = sector.get(..len).and_then(|r| self.record(r)) else {
            return Ok(());
        };
        if let [b'S', b'P', 7, _, 0xbe, 0xef, skip, ..] = dot.system_use[..] {
            self.names = Names::RockRidge;
            self.skip = usize::from(skip);
        }
        Ok(())
    }

    fn walk(&mut self, root: Record) -> Result<(), IsoError> {
        let mut seen = HashSet::from([root.offset]);
        let mut open = vec![(String::new(), 0usize, root)];
        let mut entries = 0usize;
        while let Some((path, depth, directory)) = open.pop() {
            let mut continues = false;
            for record in self.directory(&directory)? {
                entries += 1;
                if entries > MAX_ENTRIES {
                    return Err(IsoError::Limit("100000 entries"));
                }
                if record.flags & FLAG_ASSOCIATED != 0 {
                    continue;
                }
                let Some(name) = self.name(&record)? else {
                    continue;
                };
                let path = if path.is_empty() {
                    name
                } else {
                    format!("{path}/{name}")
                };
                if record.flags & FLAG_DIRECTORY != 0 {
                    if depth + 1 > MAX_DEPTH {
                        return Err(IsoError::Limit("16 levels of directories"));
                    }
                    if seen.insert(record.offset) {
                        open.push((path, depth + 1, record));
                    }
                    continue;
                }
                let extent = (record.offset, record.size);
                match self
                    .files
                    .last_mut()
                    .filter(|f| continues && f.path == path)
                {
                    Some(file) => {
                        file.size = file.size.saturating_add(record.size);
                        file.extents.push(extent);
                    }
                    None => self.files.push(IsoFile {
                        path,
                        size: record.size,
                        extents: vec![extent],
                    }),
                }
                continues = record.flags & FLAG_MULTI_EXTENT != 0;
            }
        }
        Ok(())
    }

    /// The records of a directory without `.` and `..`.
    fn directory(&mut self, directory: &Record) -> Result<Vec<Record>, IsoError> {
        if directory.size > MAX_DIRECTORY {
            return Err(IsoError::Limit("16 MiB in one directory"));
        }
        let data = self.bytes(directory.offset, directory.size)?;
        let mut records = Vec::new();
        // Records do not cross sectors; a zero length means that the next one is in the next
        // sector.
        for (i, sector) in data.chunks(SECTOR as usize).enumerate() {
            let mut rest = sector;
            while let Some(&len) = rest.first().filter(|&&len| len != 0) {
                let record = rest
                    .get(..usize::from(len))
                    .and_then(|bytes| self.record(bytes))
                    .ok_or(IsoError::Damaged {
                        what: "directory record",
                        offset: directory.offset + i as u64 * SECTOR,
                    })?;
                if !matches!(record.name[..], [0 | 1]) {
                    records.push(record);
                }
                rest = &rest[usize::from(len)..];
            }
        }
        Ok(records)
    }

    fn record(&self, bytes: &[u8]) -> Option<Record> {
        let name_len = usize::from(*bytes.get(32)?);
        let name = bytes.get(33..33 + name_len)?.to_vec();
        // Padded to an even offset.
        let after = 33 + name_len + usize::from(name_len.is_multiple_of(2));
        let interleaved = bytes[26] != 0 || bytes[27] != 0;
        if interleaved {
            return None;
        }
        let block = u64::from(u32_le(bytes, 2)) + u64::from(bytes[1]);
        Some(Record {
            name,
            system_use: bytes.get(after..).unwrap_or_default().to_vec(),
            offset: block * self.block,
            size: u64::from(u32_le(bytes, 10)),
            flags: bytes[25],
        })
    }

    /// The checked name of a record; `None` for a symbolic link.
    fn name(&mut self, record: &Record) -> Result<Option<String>, IsoError> {
        let name = match self.names {
            Names::Joliet => strip_version(utf16_be(&record.name)),
            Names::Plain => strip_version(String::from_utf8_lossy(&record.name).into_owned()),
            Names::RockRidge => match self.rock_ridge(record)? {
                RockRidge::Symlink => return Ok(None),
                RockRidge::Name(bytes) if !bytes.is_empty() => {
                    String::from_utf8_lossy(&bytes).into_owned()
                }
                RockRidge::Name(_) => {
                    strip_version(String::from_utf8_lossy(&record.name).into_owned())
                }
            },
        };
        if is_clean_name(&name) {
            Ok(Some(name))
        } else {
            Err(IsoError::Name(name))
        }
    }

    fn rock_ridge(&mut self, record: &Record) -> Result<RockRidge, IsoError> {
        let mut area = record
            .system_use
            .get(self.skip..)
            .unwrap_or_default()
            .to_vec();
        let mut name = Vec::new();
        for _ in 0..MAX_CONTINUATIONS {
            let mut next = None;
            let mut rest = &area[..];
            while let [a, b, len, _version, ..] = *rest {
                let Some(entry) = rest.get(..usize::from(len)).filter(|e| e.len() >= 4) else {
                    break;
                };
                match (&[a, b], entry) {
                    (b"SL", _) => return Ok(RockRidge::Symlink),
                    (b"NM", [_, _, _, _, flags, text @ ..]) if flags & 0x06 == 0 => {
                        name.extend_from_slice(text);
                    }
                    (b"CE", entry) if entry.len() >= 28 => {
                        next = Some((
                            u64::from(u32_le(entry, 4)) * self.block + u64::from(u32_le(entry, 12)),
                            u64::from(u32_le(entry, 20)),
                        ));
                    }
                    (b"ST", _) => break,
                    _ => {}
                }
                rest = &rest[entry.len()..];
            }
            match next {
                Some((offset, len)) if len <= SECTOR => area = self.bytes(offset, len)?,
                _ => break,
            }
        }
        Ok(RockRidge::Name(name))
    }
}

enum RockRidge {
    Name(Vec<u8>),
    Symlink,
}

/// UCS-2 level 1, 2 or 3.
fn is_joliet(sector: &[u8]) -> bool {
    matches!(&sector[88..91], b"%/@" | b"%/C" | b"%/E")
}

/// Converts `VIOSTOR.INF;1` to `VIOSTOR.INF`, and `README.;1` to `README`.
fn strip_version(name: String) -> String {
    match name.rsplit_once(';') {
        Some((stem, version)) if version.bytes().all(|b| b.is_ascii_digit()) => {
            stem.strip_suffix('.').unwrap_or(stem).to_string()
        }
        _ => name,
    }
}

fn utf16_be(bytes: &[u8]) -> String {
    let units: Vec<u16> = bytes
        .chunks_exact(2)
        .map(|b| u16::from_be_bytes([b[0], b[1]]))
        .collect();
    String::from_utf16_lossy(&units)
}

fn u16_le(bytes: &[u8], at: usize) -> u16 {
    le16(bytes, at).unwrap_or_default()
}

fn u32_le(bytes: &[u8], at: usize) -> u32 {
    le32(bytes, at).unwrap_or_default()
}

/// Whether a name is a single path component without any special meaning, on any system.
pub fn is_clean_name(name: &str) -> bool {
    !name.is_empty()
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c.is_control() || matches!(c, '/' | '\\'))
}

#[cfg(test)]
#[path = "iso_tests.rs"]
mod written_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;
    use std::path::Path;

    /// Builds an image with a real tool; without the tool `None`, or a panic if tools are required.
    #[expect(
        clippy::disallowed_methods,
        reason = "a test compares with the real tool"
    )]
    fn build(tool: &str, args: &[&str], tree: &Path) -> Option<Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image.iso");
        let output = std::process::Command::new(tool)
            .args(args)
            .arg("-o")
            .arg(&image)
            .arg(tree)
            .output();
        match output {
            Ok(output) => {
                let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success(), "{tool} {args:?}: {stderr}");
                Some(std::fs::read(image).unwrap())
            }
            Err(error) => {
                crate::skip::skip(tool, format!("{tool}: {error}"));
                None
            }
        }
    }

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let long = format!("{}.inf", "long-name-".repeat(9));
        for (path, size) in [
            ("viostor/w8.1/amd64/viostor.inf", 10),
            ("viostor/w8.1/amd64/viostor.sys", 5000),
            ("NetKVM/2k12R2/amd64/Gerät.txt", 3),
            ("empty", 0),
            (long.as_str(), 1),
        ] {
            let file = dir.path().join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, vec![size as u8; size]).unwrap();
        }
        // Enough entries for a directory of several sectors.
        for i in 0..200 {
            std::fs::write(dir.path().join(format!("file-{i:03}.bin")), [i as u8]).unwrap();
        }
        std::os::unix::fs::symlink("empty", dir.path().join("link")).unwrap();
        dir
    }

    #[test]
    fn images_of_real_tools() {
        let tree = tree();
        let cases: [(&str, &[&str], Names); 5] = [
            (
                "genisoimage",
                &["-quiet", "-J", "-joliet-long", "-r"],
                Names::Joliet,
            ),
            ("genisoimage", &["-quiet", "-r"], Names::RockRidge),
            ("genisoimage", &["-quiet", "-U"], Names::Plain),
            (
                "xorriso",
                &["-as", "mkisofs", "-quiet", "-J", "-joliet-long", "-r"],
                Names::Joliet,
            ),
            (
                "xorriso",
                &["-as", "mkisofs", "-quiet", "-r"],
                Names::RockRidge,
            ),
        ];
        for (tool, args, names) in cases {
            let Some(image) = build(tool, args, tree.path()) else {
                continue;
            };
            let mut iso = Iso::open(Cursor::new(&image)).unwrap();
            assert_eq!(iso.names(), names, "{tool} {args:?}");
            let files = iso.files.clone();
            for path in [
                "viostor/w8.1/amd64/viostor.inf",
                "viostor/w8.1/amd64/viostor.sys",
                "empty",
            ] {
                let file = files
                    .iter()
                    .find(|f| f.path == path)
                    .unwrap_or_else(|| panic!("{tool} {args:?}: no {path}"));
                let bytes = iso.read(file).unwrap();
                assert_eq!(bytes, std::fs::read(tree.path().join(path)).unwrap());
                assert_eq!(file.size, bytes.len() as u64);
            }
            let bins = files.iter().filter(|f| f.path.ends_with(".bin")).count();
            assert_eq!(bins, 200, "{tool} {args:?}");
            if names != Names::Plain {
                assert!(
                    files
                        .iter()
                        .any(|f| f.path == "NetKVM/2k12R2/amd64/Gerät.txt"),
                    "{tool}"
                );
                assert!(
                    files
                        .iter()
                        .any(|f| f.path.starts_with("long-name-long-name-"))
                );
            }
            if names == Names::RockRidge {
                assert!(!files.iter().any(|f| f.path == "link"));
                assert!(files.iter().any(|f| f.path.len() == 94), "whole long name");
            }
            damage(&image);
        }
    }

    /// A truncated image, or one with changed directory bytes, causes an error or fewer files, but
    /// no panic.
    fn damage(image: &[u8]) {
        for len in [0, 100, 16 * 2048, 17 * 2048 + 5, 20 * 2048, image.len() / 2] {
            let _ = Iso::open(Cursor::new(&image[..len]));
        }
        let mut seed = 1u32;
        let mut changed = image.to_vec();
        for _ in 0..300 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let at = 16 * 2048 + (seed >> 8) as usize % (30 * 2048);
            let old = std::mem::replace(&mut changed[at], (seed >> 3) as u8);
            if let Ok(mut iso) = Iso::open(Cursor::new(&changed)) {
                let first = iso.files.first().cloned();
                let _ = first.map(|f| iso.read(&f));
            }
            changed[at] = old;
        }
    }

    #[test]
    fn not_an_iso() {
        for bytes in [vec![], vec![0; 100], vec![0; 40 * 2048]] {
            assert!(matches!(
                Iso::open(Cursor::new(bytes)),
                Err(IsoError::NotIso)
            ));
        }
    }

    #[test]
    fn short_names_are_told() {
        use crate::drivers::driver_source;
        let tree = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(tree.path().join("viostor/w11/amd64")).unwrap();
        std::fs::write(tree.path().join("viostor/w11/amd64/long-name.inf"), b"x").unwrap();
        for (args, short) in [
            (&["-quiet"][..], true),
            (&["-quiet", "-U"], false),
            (&["-quiet", "-r"], false),
            (&["-quiet", "-J"], false),
        ] {
            let Some(image) = build("genisoimage", args, tree.path()) else {
                return;
            };
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), image).unwrap();
            let driver_source = driver_source::open(file.path()).unwrap();
            let warning = driver_source::short_names_warning(driver_source.as_ref());
            assert_eq!(warning.is_some(), short, "{args:?}");
            assert!(warning.is_none_or(|w| w.contains("8.3 characters")));
        }
    }

    #[test]
    fn hostile_names_and_loops() {
        let tree = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(tree.path().join("aa/bb")).unwrap();
        std::fs::write(tree.path().join("aa/xx"), b"x").unwrap();
        let Some(image) = build("genisoimage", &["-quiet", "-r"], tree.path()) else {
            return;
        };
        let replace = |from: &[u8], to: &[u8]| {
            let mut image = image.clone();
            let at = image
                .windows(from.len())
                .position(|w| w == from)
                .expect("the name is in the image");
            image[at..at + to.len()].copy_from_slice(to);
            image
        };
        for name in [b"..", b"a/", b"a\\", b"a\x1b"] {
            let image = replace(b"NM\x07\x01\0xx", &[b"NM\x07\x01\0", &name[..]].concat());
            assert!(
                matches!(Iso::open(Cursor::new(image)), Err(IsoError::Name(_))),
                "{name:?}"
            );
        }
    }
}
