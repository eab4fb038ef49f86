//! `qemu-img`: facts of an image, overlays, copies, checks.
//!
//! Images are always named by a `json:` specification with an explicit driver. So QEMU neither
//! probes the format nor parses a colon in a file name as a protocol.

use std::ffi::OsString;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Deserialize;
use serde_json::{Value, json};

use super::confine::Confinement;
use super::spec::Spec;
use super::{Cmd, Result, ToolError};

pub const TOOL: &str = "qemu-img";

/// The output of `qemu-img info` for one level of a chain. Unknown fields are left out.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    pub format: String,
    pub virtual_size: u64,
    pub actual_size: Option<u64>,
    pub backing_filename: Option<String>,
    pub full_backing_filename: Option<String>,
    pub backing_filename_format: Option<String>,
    #[serde(default)]
    pub encrypted: bool,
    pub format_specific: Option<FormatSpecific>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct FormatSpecific {
    #[serde(default)]
    pub data: FormatData,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FormatData {
    /// vmdk: `monolithicSparse`, `twoGbMaxExtentSparse`, ...
    pub create_type: Option<String>,
    #[serde(default)]
    pub extents: Vec<ExtentInfo>,
    /// qcow2: the external data file.
    pub data_file: Option<String>,
    /// qcow2: the image was not closed and its reference counts cannot be trusted.
    pub corrupt: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ExtentInfo {
    pub filename: String,
}

/// Creates a command with access only to the files that its arguments name, whatever an image
/// contains.
fn cmd() -> Cmd {
    Cmd::new(TOOL).confined(Confinement::to_arguments())
}

/// Creates a command with access to the files of these too: the extents of a vmdk are named in its
/// descriptor.
fn cmd_on(specs: &[&Spec]) -> Cmd {
    let files = specs.iter().flat_map(|spec| spec.files());
    let reach = Confinement::to_arguments().and_files(files);
    let cmd = Cmd::new(TOOL).confined(reach);
    specs.iter().fold(cmd, |cmd, spec| cmd.pass(&spec.given()))
}

fn name(spec: &Spec) -> OsString {
    json_name(&spec.node)
}

pub fn parse_info(json: &[u8]) -> Result<Info> {
    serde_json::from_slice(json).map_err(|e| ToolError::output(TOOL, e))
}

/// The `json:` file name for a block device description.
pub fn json_name(spec: &Value) -> OsString {
    format!("json:{spec}").into()
}

/// Facts of the image alone: its backing file is not opened.
pub fn info(spec: &Spec) -> Result<Info> {
    let out = cmd_on(&[spec])
        .confined(spec.confinement())
        .args(["info", "--output=json", "--"])
        .arg(name(spec))
        .run()?;
    parse_info(&out.stdout)
}

/// The number of images of a qcow2's chain, according to its header and those below it. A running
/// VM may have it open. Only the file itself is accessible, so for one that names another the count
/// is not 1, or an error.
pub fn chain_length(file: &Path) -> Result<usize> {
    let node = json!({
        "driver": "qcow2", "read-only": true,
        "file": {"driver": "file", "filename": file.to_string_lossy(), "read-only": true},
    });
    let spec = Spec::named(node, [(file.to_owned(), false)]);
    let out = cmd_on(&[&spec])
        .confined(spec.confinement())
        .args(["info", "--output=json", "--backing-chain", "-U", "--"])
        .arg(name(&spec))
        .run()?;
    let chain: Vec<Value> =
        serde_json::from_slice(&out.stdout).map_err(|e| ToolError::output(TOOL, e))?;
    Ok(chain.len())
}

/// The ranges (offset, length) that the top image of the chain itself contains, including zeroes.
pub fn allocated_ranges(spec: &Spec) -> Result<Vec<(u64, u64)>> {
    let out = cmd_on(&[spec])
        .confined(spec.confinement())
        .args(["map", "--output=json", "--"])
        .arg(name(spec))
        .run()?;
    parse_map(&out.stdout)
}

/// A range that an image itself contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Present {
    pub start: u64,
    pub length: u64,
    /// Whether it is known to be zeroes.
    pub zero: bool,
}

/// The ranges that an image without a backing file contains, including written zeroes.
pub fn present_ranges(spec: &Spec) -> Result<Vec<Present>> {
    let out = cmd_on(&[spec])
        .confined(spec.confinement())
        .args(["map", "--output=json", "--"])
        .arg(name(spec))
        .run()?;
    parse_present(&out.stdout)
}

fn parse_present(json: &[u8]) -> Result<Vec<Present>> {
    let entries: Vec<MapEntry> =
        serde_json::from_slice(json).map_err(|e| ToolError::output(TOOL, e))?;
    let held = |entry: &&MapEntry| entry.data || entry.present == Some(true);
    let present = |entry: &MapEntry| Present {
        start: entry.start,
        length: entry.length,
        zero: entry.zero,
    };
    Ok(entries.iter().filter(held).map(present).collect())
}

#[derive(Debug, Deserialize)]
struct MapEntry {
    start: u64,
    length: u64,
    depth: u64,
    /// Missing before QEMU 6.1.
    present: Option<bool>,
    #[serde(default)]
    data: bool,
    #[serde(default)]
    zero: bool,
}

impl MapEntry {
    fn range(&self) -> Range<u64> {
        self.start..self.start.saturating_add(self.length)
    }
}

/// Passes every range of the image with data to `found`, in order. Known zeroes do not count.
pub fn data_ranges(spec: &Spec, found: &mut dyn FnMut(Range<u64>)) -> Result<()> {
    mapped(spec, false, &mut |range, _| found(range))
}

/// The contents of a range of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Data(Depth),
    /// Zeroes in the image itself, not in its backing file.
    Zeroes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// In the top image itself.
    Top,
    /// In one below it.
    Below,
}

/// Passes the ranges with their contents and level. `shared` allows an image that a running VM has
/// open; data that it has not flushed is missing.
pub fn mapped(spec: &Spec, shared: bool, found: &mut dyn FnMut(Range<u64>, Depth)) -> Result<()> {
    map_entries(spec, shared, &mut |entry| {
        if entry.data && !entry.zero {
            let depth = match entry.depth {
                0 => Depth::Top,
                _ => Depth::Below,
            };
            found(entry.range(), depth);
        }
    })
}

/// Passes every range with data, and those with zeroes of the top image itself, in order.
pub(crate) fn held(spec: &Spec, found: &mut dyn FnMut(Range<u64>, Part)) -> Result<()> {
    map_entries(spec, false, &mut |entry| match entry.depth {
        0 if entry.zero => found(entry.range(), Part::Zeroes),
        0 if entry.data => found(entry.range(), Part::Data(Depth::Top)),
        _ if entry.data && !entry.zero => found(entry.range(), Part::Data(Depth::Below)),
        _ => {}
    })
}

/// Passes every range that an image of the chain contains, including zeroes, in order, and the
/// number of images above that one.
pub fn layers(spec: &Spec, found: &mut dyn FnMut(Range<u64>, u64)) -> Result<()> {
    map_entries(spec, false, &mut |entry| {
        if entry.present != Some(false) {
            found(entry.range(), entry.depth);
        }
    })
}

fn map_entries(spec: &Spec, shared: bool, found: &mut dyn FnMut(MapEntry)) -> Result<()> {
    let mut map = MapLines::default();
    let mut damaged = None;
    cmd_on(&[spec])
        .confined(spec.confinement())
        .args(["map", "--output=json"])
        .args(shared.then_some("-U"))
        .arg("--")
        .arg(name(spec))
        .run_with(&mut |chunk| {
            if let Err(e) = map.push(chunk, found) {
                damaged.get_or_insert(e);
            }
        })?;
    match damaged.or_else(|| map.push(b"\n", found).err()) {
        Some(e) => Err(ToolError::output(TOOL, e)),
        None => Ok(()),
    }
}

/// Parses the output of `qemu-img map` as it arrives, one object a line. For a fragmented image it
/// is too large to keep in memory.
#[derive(Debug, Default)]
struct MapLines {
    rest: Vec<u8>,
}

impl MapLines {
    fn push(&mut self, chunk: &[u8], found: &mut dyn FnMut(MapEntry)) -> serde_json::Result<()> {
        self.rest.extend_from_slice(chunk);
        let Some(end) = self.rest.iter().rposition(|&b| b == b'\n') else {
            return Ok(());
        };
        let done: Vec<u8> = self.rest.drain(..=end).collect();
        for line in done.split(|&b| b == b'\n') {
            let line = line.trim_ascii();
            let line = line.strip_prefix(b"[").unwrap_or(line);
            let line = line.strip_suffix(b"]").unwrap_or(line);
            let line = line.strip_suffix(b",").unwrap_or(line);
            if line.is_empty() {
                continue;
            }
            found(serde_json::from_slice(line)?);
        }
        Ok(())
    }
}

fn parse_map(json: &[u8]) -> Result<Vec<(u64, u64)>> {
    let entries: Vec<MapEntry> =
        serde_json::from_slice(json).map_err(|e| ToolError::output(TOOL, e))?;
    Ok(entries
        .iter()
        .filter(|e| e.depth == 0)
        .map(|e| (e.start, e.length))
        .collect())
}

/// Changes the name of a qcow2's backing file, or removes it. The data stays unchanged, and no
/// other file is opened.
pub fn set_backing(file: &Path, backing: Option<(&Path, &str)>) -> Result<()> {
    let cmd = Cmd::new(TOOL)
        .confined(Confinement::to_files([(file.to_owned(), true)]))
        .args(["rebase", "-u", "-f", "qcow2"]);
    let cmd = match backing {
        Some((path, format)) => cmd.args(["-F", format, "-b"]).arg(path),
        None => cmd.args(["-b", ""]),
    };
    cmd.arg("--").arg(protocol(file)).run()?;
    Ok(())
}

/// Frees the clusters of a qcow2 that interrupted writes have allocated without using them. The
/// image has no backing file. `memory` is the size of its reference counts.
pub fn drop_leaks(file: &Path, memory: u64) -> Result<()> {
    Cmd::new(TOOL)
        .confined(Confinement::to_files([(file.to_owned(), true)]).and_memory(memory))
        .args(["check", "-q", "-r", "leaks", "-f", "qcow2", "--"])
        .arg(protocol(file))
        .run()?;
    Ok(())
}

/// Commits the top image of a chain to the one below it, which must be writable in the
/// specification.
pub fn commit(spec: &Spec, progress: &mut dyn FnMut(f64)) -> Result<()> {
    let mut parser = Progress::default();
    cmd_on(&[spec])
        .confined(spec.confinement())
        .patient(6)
        .args(["commit", "-d", "-p", "--"])
        .arg(name(spec))
        .run_with(&mut |chunk| {
            if let Some(fraction) = parser.push(chunk) {
                progress(fraction);
            }
        })?;
    Ok(())
}

/// Creates an empty image, with an `-o` option, e.g. `compression_type=zstd`.
pub fn create_with(file: &Path, format: &str, size: u64, options: Option<&str>) -> Result<()> {
    let options = options.map(|options| ["-o", options]);
    cmd()
        .args(["create", "-q", "-f", format])
        .args(options.into_iter().flatten())
        .arg("--")
        .arg(protocol(file))
        .arg(size.to_string())
        .run()?;
    Ok(())
}

/// Creates a qcow2 overlay over an export on a Unix socket, for programs that open it themselves.
pub fn create_over(file: &Path, socket: &Path, export: &str, size: u64) -> Result<()> {
    let below = json!({
        "driver": "raw",
        "read-only": true,
        "file": {
            "driver": "nbd",
            "server": {"type": "unix", "path": socket.to_string_lossy()},
            "export": export,
            "read-only": true,
        },
    });
    cmd()
        // The size is known: no file has to be opened for it.
        .args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(json_name(&below))
        .arg("--")
        .arg(protocol(file))
        .arg(size.to_string())
        .run()?;
    Ok(())
}

/// A file name that cannot be parsed as a protocol; `create` and `convert` do not accept JSON for a
/// file that does not exist yet.
fn protocol(file: &Path) -> OsString {
    let mut name = OsString::from("file:");
    name.push(file);
    name
}

/// Compares the contents of two images; returns the difference, if there is one.
pub fn compare(a: &Spec, b: &Spec, cancel: Option<Arc<AtomicBool>>) -> Result<Option<String>> {
    let out = cmd_on(&[a, b])
        .args(["compare", "--"])
        // It prints nothing while it works.
        .patient(60)
        .args([name(a), name(b)])
        .cancel_with(cancel)
        .accept(&[1])
        .run()?;
    let text = super::clean(&out.stdout);
    Ok((out.code == 1).then(|| text.trim().to_string()))
}

/// Whether this QEMU was built with zstd. Only creating an image shows it: the help lists the
/// option, and `measure` accepts any value.
pub fn has_zstd() -> bool {
    tempfile::NamedTempFile::new().is_ok_and(|file| {
        cmd()
            .args(["create", "-q", "-f", "qcow2", "-o", "compression_type=zstd"])
            .args(["--".as_ref(), &*protocol(file.path()), "1M".as_ref()])
            .run()
            .is_ok()
    })
}

/// Parses `    (12.34/100%)\r` in a stream of arbitrary chunks.
#[derive(Debug, Default)]
pub struct Progress {
    rest: Vec<u8>,
}

impl Progress {
    /// Adds a chunk; returns the last complete fraction.
    pub fn push(&mut self, chunk: &[u8]) -> Option<f64> {
        self.rest.extend_from_slice(chunk);
        let end = self.rest.iter().rposition(|&b| b == b'\r' || b == b'\n');
        let fraction = end.and_then(|end| {
            let done: Vec<u8> = self.rest.drain(..=end).collect();
            let text = String::from_utf8_lossy(&done);
            text.split(['\r', '\n']).rev().find_map(fraction)
        });
        // Any other text is not a progress line.
        if self.rest.len() > 4096 {
            self.rest.clear();
        }
        fraction
    }
}

fn fraction(line: &str) -> Option<f64> {
    let percent: f64 = line
        .trim()
        .strip_prefix('(')?
        .split('/')
        .next()?
        .parse()
        .ok()?;
    (0.0..=100.0).contains(&percent).then_some(percent / 100.0)
}

/// The result of `qemu-img check`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckResult {
    #[serde(default)]
    pub corruptions: u64,
    #[serde(default)]
    pub leaks: u64,
    #[serde(default)]
    pub check_errors: u64,
}

impl CheckResult {
    /// Whether the image is usable; leaks only waste space.
    pub fn is_sound(&self) -> bool {
        self.errors() == 0
    }

    pub fn errors(&self) -> u64 {
        self.corruptions.saturating_add(self.check_errors)
    }
}

pub fn parse_check(json: &[u8]) -> Result<CheckResult> {
    serde_json::from_slice(json).map_err(|e| ToolError::output(TOOL, e))
}

/// Checks the metadata of an image; `None` for a format without such a check. `memory` is what it
/// needs in addition to QEMU's memory for any image.
pub fn check(spec: &Spec, memory: u64) -> Result<Option<CheckResult>> {
    // 2: corruptions, 3: leaks, 63: the format has no check.
    let out = cmd_on(&[spec])
        .confined(spec.confinement().and_memory(memory))
        .args(["check", "--output=json", "--"])
        .arg(name(spec))
        .accept(&[2, 3, 63])
        .run()?;
    if out.code == 63 {
        return Ok(None);
    }
    parse_check(&out.stdout).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_in_pieces() {
        let mut p = Progress::default();
        assert_eq!(p.push(b"    (0.00/100%)\r"), Some(0.0));
        assert_eq!(p.push(b"    (12."), None);
        assert_eq!(p.push(b"50/100%)\r    (13.00/100%)\r   "), Some(0.13));
        assert_eq!(p.push(b" (100.00/100%)\r\n"), Some(1.0));
        assert_eq!(p.push(b"nonsense\n(nan/100%)\r(999/100%)\r"), None);
        assert_eq!(p.push(&[b'x'; 9000]), None);
        assert!(p.rest.is_empty());
    }

    #[test]
    fn maps_in_pieces() {
        let text = br#"[{ "start": 0, "length": 10, "depth": 0, "present": true, "zero": false, "data": true, "offset": 0},
{ "start": 10, "length": 5, "depth": 0, "present": true, "zero": true, "data": false},
{ "start": 15, "length": 5, "depth": 0, "zero": true, "data": true},
{ "start": 20, "length": 7, "depth": 1, "zero": false, "data": true}]
"#;
        for size in [1, 7, 100, 10_000] {
            let mut map = MapLines::default();
            let mut ranges = Vec::new();
            for chunk in text.chunks(size) {
                let entry = &mut |e: MapEntry| ranges.push((e.range(), e.depth, e.present));
                map.push(chunk, entry).unwrap();
            }
            let want = [
                (0..10, 0, Some(true)),
                (10..15, 0, Some(true)),
                (15..20, 0, None),
                (20..27, 1, None),
            ];
            assert_eq!(ranges, want, "{size}");
        }
        let bad = MapLines::default().push(b"[{]\n", &mut |_| {});
        assert!(bad.is_err());
    }

    #[test]
    fn info_fields() {
        let info = parse_info(
            br#"{"children": [], "virtual-size": 10485760, "filename": "d.vmdk", "format": "vmdk",
                "actual-size": 12288, "dirty-flag": false, "backing-filename": "m.vmdk",
                "full-backing-filename": "/x/m.vmdk", "backing-filename-format": "vmdk",
                "format-specific": {"type": "vmdk", "data": {"cid": 1, "parent-cid": 2,
                "create-type": "monolithicSparse", "extents": [{"virtual-size": 10485760,
                "filename": "d.vmdk", "cluster-size": 65536, "format": ""}]}}}"#,
        )
        .unwrap();
        assert_eq!((info.virtual_size, &*info.format), (10_485_760, "vmdk"));
        assert_eq!(info.full_backing_filename.as_deref(), Some("/x/m.vmdk"));
        assert_eq!(info.format_specific.unwrap().data.extents.len(), 1);
        for bad in [&b""[..], b"[]", b"{}", b"{\"format\": 1}"] {
            assert!(matches!(parse_info(bad), Err(ToolError::Output { .. })));
        }
    }

    #[test]
    fn check_results() {
        let sound = parse_check(br#"{"check-errors": 0, "format": "qcow2", "leaks": 3}"#).unwrap();
        assert!(sound.is_sound() && sound.leaks == 3);
        assert!(
            !parse_check(br#"{"check-errors": 0, "corruptions": 1}"#)
                .unwrap()
                .is_sound()
        );
    }
}
