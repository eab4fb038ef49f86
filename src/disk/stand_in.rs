//! A stand-in for QEMU in tests on a host without it: it reads images that this program wrote, and writes raw files.
//! On a host with QEMU the same tests run QEMU.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::chain::Image;
use super::copy::Nothing;
use super::detect;
use super::empty::create_overlay;
use super::export::{self, DaemonAccess};
use super::overlay::{Content, Overlay};
use super::qcow2::Header;
use super::writer::Qcow2Writer;
use crate::block::{BlockRead, BlockWrite, FileDisk, file_data};
use crate::files::Scratch;
use crate::tool::{self, qemu_img, qsd, virt_v2v};

thread_local! {
    static ASKED: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
}

fn note(asked: String) {
    ASKED.with_borrow_mut(|all| all.insert(asked));
}

/// The holes of overlays and the conversions by virt-v2v that this thread has asked for since the last time.
pub(crate) fn asked() -> Vec<String> {
    ASKED.take().into_iter().collect()
}

/// The output of `qemu-img` with these arguments; `None` where the program is installed, or another one is asked. Of a
/// conversion by `virt-v2v-in-place` there is never more than its start and its success.
pub(crate) fn answer(program: &OsStr, args: &[OsString]) -> Option<Vec<u8>> {
    if program == virt_v2v::IN_PLACE {
        let xml = args.last().map(std::fs::read_to_string);
        assert!(xml.unwrap().unwrap().starts_with("<domain"));
        note(virt_v2v::IN_PLACE.to_owned());
        return Some(b"converted\n".to_vec());
    }
    if program != qemu_img::TOOL || tool::find(program).is_some() {
        return None;
    }
    let words: Vec<_> = args.iter().filter_map(|arg| arg.to_str()).collect();
    let node = words.iter().find_map(|word| word.strip_prefix("json:"));
    let node: Value = node.map_or(Value::Null, |json| serde_json::from_str(json).unwrap());
    let said = match words[0] {
        "info" => info(&node)?.to_string(),
        "map" => map(&node)?,
        "check" => json!({}).to_string(),
        // An overlay over an export.
        "create" if words.contains(&"-u") => {
            let file = words.iter().find_map(|word| word.strip_prefix("file:"));
            create_overlay(Path::new(file?), words.last()?.parse().ok()?).ok()?;
            String::new()
        }
        "rebase" => {
            let below = words.iter().skip_while(|word| **word != "-b").nth(1)?;
            name_below(words.last()?.strip_prefix("file:")?, below).ok()?;
            String::new()
        }
        // Nothing differs.
        "compare" => String::new(),
        _ => return None,
    };
    Some(said.into_bytes())
}

/// Writes the name of the backing file to the end of the first cluster.
fn name_below(overlay: &str, below: &str) -> io::Result<()> {
    const AT: u64 = 32 << 10;
    let file = File::options().write(true).open(overlay)?;
    file.write_all_at(below.as_bytes(), AT)?;
    file.write_all_at(&AT.to_be_bytes(), 8)?;
    file.write_all_at(&(below.len() as u32).to_be_bytes(), 16)
}

/// The file of a node, past the filters above it.
fn file(node: &Value) -> &str {
    match node["filename"].as_str() {
        Some(name) => name,
        None => file(&node["file"]),
    }
}

fn size(file: &File) -> Option<u64> {
    let mut head = [0; Header::LEN];
    file.read_exact_at(&mut head, 0).ok()?;
    Some(Header::of(&head)?.size.0)
}

/// `None` for what is no qcow2.
fn info(node: &Value) -> Option<Value> {
    let file = File::open(file(node)).ok()?;
    let len = file.metadata().unwrap().len();
    let name = detect::backing_name(&file, len);
    let name = name.unwrap().map(|name| String::from_utf8(name).unwrap());
    let mut info = json!({"format": "qcow2", "virtual-size": size(&file)?, "actual-size": len});
    if let Some(name) = name {
        info["backing-filename"] = json!(name);
        info["backing-filename-format"] = json!("raw");
    }
    Some(info)
}

/// The map of a raw file, or of qcow2 over one or over nothing.
fn map(node: &Value) -> Option<String> {
    let mut lines = Vec::new();
    parts(node, None, 0, &mut |range, depth, zero| {
        let (start, len, data) = (range.start, range.end - range.start, !zero);
        lines.push(format!(
            r#"{{"start":{start},"length":{len},"depth":{depth},"present":true,"data":{data},"zero":{zero}}}"#
        ));
    })?;
    Some(format!("[{}]\n", lines.join(",\n")))
}

/// A copy of a qcow2 without the name of its backing file, which the node has.
fn unnamed(image: &File) -> io::Result<tempfile::NamedTempFile> {
    let mut copy = tempfile::NamedTempFile::new()?;
    io::copy(&mut &*image, &mut copy)?;
    copy.as_file().write_all_at(&[0; 12], 8)?;
    Ok(copy)
}

/// Passes each part that an image or one below it contains to `put`, with its depth and whether it is zeroes.
fn parts(
    node: &Value,
    within: Option<Range<u64>>,
    depth: u64,
    put: &mut dyn FnMut(Range<u64>, u64, bool),
) -> Option<()> {
    let disk = File::open(file(node)).ok()?;
    if node["driver"] == "raw" {
        let all = within.unwrap_or(0..disk.metadata().unwrap().len());
        return file_data(&disk, all, &mut |range| put(range, depth, false)).ok();
    }
    let size = size(&disk)?;
    let within = within.unwrap_or(0..size);
    let named = !node["backing"].is_null();
    let unnamed = named.then(|| unnamed(&disk).unwrap());
    let path = (unnamed.as_ref()).map_or(Path::new(file(node)), tempfile::NamedTempFile::path);
    let overlay = Overlay::open(path, Arc::new(Nothing(size)));
    let Some(overlay) = overlay.ok()? else {
        // A copy, with clusters of one byte.
        put(within, depth, false);
        return Some(());
    };
    for (range, content) in overlay.parts(within) {
        match content {
            Some(content) => put(range, depth, content == Content::Zeroes),
            None if node["backing"].is_null() => {}
            None => parts(&node["backing"], Some(range), depth + 1, put)?,
        }
    }
    Some(())
}

/// Whether the storage daemon is missing.
pub(crate) fn is_needed() -> bool {
    tool::find(qsd::TOOL).is_none()
}

/// A disk to read, in place of a daemon's export. For other programs it has a socket, which nobody serves.
pub(super) fn readable(
    image: &Image,
    access: DaemonAccess,
) -> Option<(Arc<dyn BlockRead>, Option<Scratch>)> {
    let folder = (access == DaemonAccess::User).then(|| Scratch::new().unwrap());
    Some((below(image)?, folder))
}

/// A plain file, or overlays of this run, over it or over nothing.
fn disk(image: &Image) -> Option<Arc<dyn BlockRead>> {
    if let Some(disk) = export::direct(image).ok()? {
        return Some(disk);
    }
    let below = match image.scratch_over() {
        Some((_, below)) => disk(&below)?,
        None => Arc::new(Nothing(image.virtual_size())),
    };
    if let Some(overlay) = Overlay::open(image.path(), below).ok()? {
        return Some(Arc::new(overlay));
    }
    let file = File::options().read(true).write(true).open(image.path());
    let copy = Qcow2Writer::open(file.ok()?, image.virtual_size()).ok()??;
    Some(Arc::new(copy))
}

/// The disk below a new overlay; `None` where the storage daemon is installed.
pub(super) fn below(image: &Image) -> Option<Arc<dyn BlockRead>> {
    is_needed().then(|| disk(image))?
}

/// A raw file of this host, to write to it, or an overlay of this run, to mark holes. `None` where the storage daemon
/// is installed.
pub(super) fn writable(image: &Image) -> Option<Arc<dyn BlockWrite>> {
    if !is_needed() {
        return None;
    }
    if image.scratch_over().is_some() {
        let path = image.path().to_owned();
        return Some(Arc::new(Holes(image.virtual_size(), path)));
    }
    let held = image.plain_file().filter(|held| held.remote().is_none())?;
    image.hold_for_writing().unwrap();
    let file = File::options().read(true).write(true).open(held.path());
    Some(Arc::new(FileDisk::from_file(file.unwrap()).unwrap()))
}

/// A disk whose holes are marked: they read as zeroes before and after.
struct Holes(u64, PathBuf);

impl BlockRead for Holes {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl BlockWrite for Holes {
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn zero_at(&self, _: u64, _: u64) -> io::Result<()> {
        let name = self.1.file_name().unwrap_or_default();
        note(format!("holes of {}", name.display()));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
