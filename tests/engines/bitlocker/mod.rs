//! BitLocker: volumes of every cipher and protector, read and written by hyper2kvm and by other
//! programs, and whole conversions.
//!
//! The volumes are made by `hyper2kvm::demo::bitlocker`. They are verified by dissect.fve and
//! libbde (Python, in `target/bitlocker-readers`, which `.ci/run` makes), dislocker, and cryptsetup
//! for the metadata.

mod conversions;
mod volumes;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use hyper2kvm::block::{BlockRead, BlockWrite, FileDisk};
use hyper2kvm::boot::proof;
use hyper2kvm::demo::bitlocker::{self, Lock, Reserved, Spec, startup_key_file};
use hyper2kvm::demo::{GuestSpec, Role, WinVersion};
use hyper2kvm::disk::partition;
use hyper2kvm::domain::DiskBus;
use hyper2kvm::guest::fve::cipher::Method;
use hyper2kvm::guest::fve::keys::{Credential, StartupKey, Stretched};
use hyper2kvm::guest::fve::{InClear, Unlocked, look};
use hyper2kvm::guest::keys::Keys;
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{EmbeddedWriter, GuestPath, GuestWrite, VolumeId};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::support::{self, Lab, Run, TOOLS, h2k, have, sha256, skip, tool, virtio_win};
use crate::{HIVES, equal_lines, hive_text, ready, security, tree};

const RECOVERY: &str = "110000-220000-330000-440000-550000-660000-110011-220022";
/// A key of that form that opens nothing.
const OTHER_KEY: &str = "111111-222222-333333-444444-555555-666666-111111-222222";
const PASSWORD: &str = "correct horse 42";
const STARTUP: Lock = Lock::StartupKey {
    guid: [0x42; 16],
    key: [0x17; 32],
};
const ALL: [Lock; 3] = [
    Lock::RecoveryPassword(RECOVERY),
    Lock::Password(PASSWORD),
    STARTUP,
];
const VOLUME: u64 = 24 << 20;
const SECTORS: usize = 1000;

/// The Python with dissect.fve and libbde; `None` is a visible skip.
fn readers() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bitlocker-readers/bin/python");
    if python.exists() {
        return Some(python);
    }
    skip(
        "bitlocker-readers",
        format!("{} is missing (.ci/run makes it)", python.display()),
    );
    None
}

/// A plain NTFS volume with a file and the places that BitLocker is to have, as a file.
fn plain_volume(folder: &Path) -> (PathBuf, Reserved) {
    let path = folder.join("plain.ntfs");
    File::create(&path).unwrap().set_len(VOLUME).unwrap();
    let shown = path.to_str().unwrap();
    tool(
        "mkntfs",
        &["-F", "-q", "-Q", "-s", "512", "-c", "4096", shown],
    );
    let disk: Arc<dyn BlockWrite> = Arc::new(FileDisk::open_rw(&path).unwrap());
    let layout = partition::read_layout(disk.as_ref()).unwrap();
    let places = bitlocker::reserve(disk.clone(), &layout, VolumeId::new(0)).unwrap();
    let mut writer = Box::new(EmbeddedWriter::new(disk, &layout, MountOptions::default()));
    let contents: Vec<u8> = (0..1_500_000u32).flat_map(u32::to_le_bytes).collect();
    let name = GuestPath::parse("numbers").unwrap();
    writer
        .write_file(VolumeId::new(0), &name, &contents[..3 << 20])
        .unwrap();
    writer.close().unwrap();
    (path, places)
}

fn encrypted(plain: &Path, to: &Path, spec: &Spec) {
    let (start, len) = (0, fs::metadata(plain).unwrap().len());
    encrypt_at(plain, to, start, len, spec);
}

fn encrypt_at(plain: &Path, to: &Path, start: u64, len: u64, spec: &Spec) {
    let source: Arc<dyn BlockRead> = Arc::new(FileDisk::open(plain).unwrap());
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(to)
        .unwrap();
    file.set_len(source.size()).unwrap();
    let disk = FileDisk::from_file(file).unwrap();
    bitlocker::encrypt(&source, &disk, start, len, spec).unwrap();
}

fn open(path: &Path, credentials: &[Credential]) -> InClear<FileDisk> {
    let disk = Arc::new(FileDisk::open_rw(path).unwrap());
    let look = look(
        disk.as_ref(),
        0,
        disk.size(),
        credentials,
        &Stretched::default(),
    );
    Unlocked::new(vec![look.volume.unwrap()]).over(disk)
}

/// Pseudo-random numbers, the same in every run.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Writes to sectors all over the volume; returns their numbers and the digest of the expected
/// contents.
fn write_sectors(disk: &dyn BlockWrite, places: &Reserved, list: &Path) -> String {
    let own: Vec<u64> = places.copies.into_iter().chain([places.moved]).collect();
    let is_own = |at: u64| own.iter().any(|p| (*p..*p + (64 << 10)).contains(&at));
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let mut sectors = BTreeSet::new();
    while sectors.len() < SECTORS {
        // Sector 0 is the boot sector, the last one its copy.
        let sector = 1 + random(&mut state) % (VOLUME / 512 - 2);
        if !is_own(sector * 512) {
            sectors.insert(sector);
        }
    }
    let (mut text, mut hash) = (String::new(), Sha256::new());
    for sector in sectors {
        let mut bytes: Vec<u8> = (0..64)
            .flat_map(|_| random(&mut state).to_le_bytes())
            .collect();
        disk.write_at(sector * 512, &bytes).unwrap();
        // And a part of it.
        disk.write_at(sector * 512 + 100, b"a part of a sector")
            .unwrap();
        bytes[100..118].copy_from_slice(b"a part of a sector");
        hash.update(&bytes);
        text.push_str(&format!("{sector}\n"));
    }
    fs::write(list, text).unwrap();
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// The digest of the sectors as dislocker decrypts them.
fn by_dislocker(image: &Path, kind: &str, key: &str, list: &Path) -> String {
    let out = image.with_extension("dislocked");
    let _ = fs::remove_file(&out);
    dislocker(image, 0, kind, key, &out);
    let disk = FileDisk::open(&out).unwrap();
    let mut hash = Sha256::new();
    for sector in fs::read_to_string(list).unwrap().lines() {
        let mut bytes = [0; 512];
        disk.read_at(sector.parse::<u64>().unwrap() * 512, &mut bytes)
            .unwrap();
        hash.update(bytes);
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

fn dislocker(image: &Path, offset: u64, kind: &str, key: &str, out: &Path) {
    let offset = offset.to_string();
    let key = match kind {
        "recovery" => vec![format!("-p{key}")],
        "password" => vec![format!("-u{key}")],
        "file" => vec!["-f".to_string(), key.to_string()],
        _ => vec!["-c".to_string()],
    };
    let mut args = vec!["-q", "-O", &offset, "-V", image.to_str().unwrap()];
    args.extend(key.iter().map(String::as_str));
    args.extend(["--", out.to_str().unwrap()]);
    tool("dislocker-file", &args);
}
