//! BitLocker: volumes of every cipher and protector, read and written by us and by others, and whole conversions.
//!
//! The volumes are made by `hyper2kvm::demo::bitlocker`. Judges are dissect.fve and libbde (Python, in
//! `target/bitlocker-judges`, which `.ci/run` makes), dislocker, and cryptsetup for the metadata.

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
use hyper2kvm::domain::StorageBus;
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
/// A key of that form which opens nothing.
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
fn judges() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bitlocker-judges/bin/python");
    if python.exists() {
        return Some(python);
    }
    skip(
        "bitlocker-judges",
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

/// Numbers that look like chance and are the same at every run.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Writes to sectors all over the volume; gives their numbers and the digest of what they are to hold.
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

/// Each cipher and version, each protector at least twice.
#[test]
fn others_read_what_we_write_in_every_cipher() {
    if !have(&["mkntfs", "dislocker-file", "cryptsetup"]) {
        return;
    }
    let Some(python) = judges() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (plain, places) = plain_volume(dir.path());
    let bek = dir.path().join("startup.bek");
    let file = startup_key_file([0x42; 16], &[0x17; 32]);
    fs::write(&bek, &file).unwrap();
    let startup = StartupKey::parse(&file).unwrap();
    let text = Credential::Text;
    let keys = [
        ("recovery", RECOVERY, text(RECOVERY)),
        ("password", PASSWORD, text(PASSWORD)),
        (
            "file",
            bek.to_str().unwrap(),
            Credential::StartupKey(&startup),
        ),
    ];
    let mut shapes: Vec<(Method, bool, &[Lock])> = Method::ALL
        .into_iter()
        .map(|method| (method, false, &ALL[..]))
        .collect();
    shapes.push((Method::CbcAes128Diffuser, true, &ALL));
    shapes.push((Method::CbcAes256Diffuser, true, &ALL));
    shapes.push((Method::XtsAes128, false, &[Lock::ClearKey]));
    for (i, (method, vista, locks)) in shapes.into_iter().enumerate() {
        eprintln!("{} vista {vista} {locks:?}", method.name());
        let mut spec = Spec::new(method, locks, places);
        spec.vista = vista;
        let image = dir.path().join("locked");
        let _ = fs::remove_file(&image);
        encrypted(&plain, &image, &spec);
        let (kind, key, credential) = match locks {
            [Lock::ClearKey] => ("clear", "", text("")),
            _ => keys[i % keys.len()],
        };
        let list = dir.path().join("sectors");
        let expected = {
            let disk = open(&image, &[credential]);
            // What the maker encrypted is what it was, in whole.
            let mut bytes = vec![0; 4 << 20];
            disk.read_at(0, &mut bytes[..512]).unwrap();
            let mut wanted = vec![0; 512];
            FileDisk::open(&plain)
                .unwrap()
                .read_at(0, &mut wanted)
                .unwrap();
            assert!(bytes[..512] == wanted);
            write_sectors(&disk, &places, &list)
        };
        for program in ["dissect", "libbde"] {
            let said = judged(&python, program, &image, [kind, key], &list);
            assert_eq!(said, expected, "{program}");
        }
        // Debian's dislocker (0.7.3) opens no volume of Vista, cryptsetup none at all.
        if !vista {
            let digest = by_dislocker(&image, kind, key, &list);
            assert_eq!(digest, expected, "dislocker");
            let dump = tool("cryptsetup", &["bitlkDump", image.to_str().unwrap()]);
            let dump = String::from_utf8_lossy(&dump).into_owned();
            let mode = [
                "cbc-elephant",
                "cbc-elephant",
                "cbc-eboiv",
                "cbc-eboiv",
                "xts-plain64",
                "xts-plain64",
            ];
            let number = usize::from(method.number() - 0x8000);
            assert!(dump.contains(mode[number]), "{dump}");
        }
    }
}

/// Volumes that Windows made, from the tests of dissect.fve: their file, and what opens them.
const OF_WINDOWS: [(&str, &str, &str); 11] = [
    ("aes_128", "password", "password12!@"),
    ("aes_256", "password", "password12!@"),
    ("aes_128_diffuser", "password", "password12!@"),
    ("aes_256_diffuser", "password", "password12!@"),
    ("aes-xts_128", "password", "password12!@"),
    ("aes-xts_256", "password", "password12!@"),
    (
        "recovery_password",
        "recovery",
        "284867-596541-514998-422114-660297-261613-215424-199408",
    ),
    ("recovery_key", "file", "recovery_key.bek"),
    ("startup_key", "file", "startup_key.bek"),
    ("suspended", "clear", ""),
    (
        "vista",
        "recovery",
        "517506-503998-044583-576191-587004-635965-501270-087802",
    ),
];

#[test]
fn volumes_that_windows_made() {
    let Some(python) = judges() else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/bitlocker-judges/dissect_fve-4.6/tests/_data/bde");
    if !folder.exists() {
        return support::skip(
            "bitlocker-images",
            format!("no {}: .ci/run unpacks it", folder.display()),
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("volume");
    let list = dir.path().join("sectors");
    for (name, kind, key) in OF_WINDOWS {
        let packed = folder.join(format!("{name}.bin.gz"));
        fs::write(&image, tool("gzip", &["-dc", packed.to_str().unwrap()])).unwrap();
        let key_file = folder.join(key);
        let startup = (kind == "file").then(|| {
            let bytes = fs::read(&key_file).unwrap();
            StartupKey::parse(&bytes).unwrap()
        });
        let credentials: Vec<Credential> = match (&startup, kind) {
            (Some(key), _) => vec![Credential::StartupKey(key)],
            (None, "clear") => Vec::new(),
            _ => vec![Credential::Text(key)],
        };
        // The images end where their data does, and the volumes do not.
        let there = fs::metadata(&image).unwrap().len() / 512;
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(1 << 37)
            .unwrap();
        let disk = Arc::new(FileDisk::open(&image).unwrap());
        let found = look(
            disk.as_ref(),
            0,
            disk.size(),
            &credentials,
            &Stretched::default(),
        );
        let volume = found.volume.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let clear = Unlocked::new(vec![volume]).over(disk);
        let (mut text, mut hash) = (String::new(), Sha256::new());
        let mut state = 0x9e37_79b9_7f4a_7c15;
        // The beginning, which is moved and made up, and any others.
        let sectors = (0..40).chain((0..SECTORS).map(|_| random(&mut state) % there));
        for sector in sectors.collect::<BTreeSet<_>>() {
            let mut bytes = [0; 512];
            clear.read_at(sector * 512, &mut bytes).unwrap();
            hash.update(bytes);
            text.push_str(&format!("{sector}\n"));
        }
        fs::write(&list, text).unwrap();
        let ours: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let key = if kind == "file" {
            key_file.to_str().unwrap()
        } else {
            key
        };
        // libbde wants every copy of the metadata, and this image ends before two of them.
        let programs = ["dissect", "libbde"]
            .into_iter()
            .take(if name == "vista" { 1 } else { 2 });
        for program in programs {
            assert_eq!(
                judged(&python, program, &image, [kind, key], &list),
                ours,
                "{name} by {program}"
            );
        }
    }
}

/// What another program says of the sectors.
fn judged(python: &Path, program: &str, image: &Path, key: [&str; 2], list: &Path) -> String {
    let mut judge = Command::new(python);
    judge
        .arg("tests/support/fve_judge.py")
        .arg(program)
        .arg(image)
        .args(key)
        .arg(list)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    let run = judge.output().unwrap();
    let said = String::from_utf8_lossy(&run.stdout).trim().to_string();
    assert!(!said.is_empty(), "{}", String::from_utf8_lossy(&run.stderr));
    said
}

/// A Windows with BitLocker's places in it, plain; and the same encrypted.
struct Locked {
    lab: Lab,
    places: Reserved,
    disk: PathBuf,
}

fn locked(locks: &[Lock]) -> Locked {
    let lab = Lab::new(GuestSpec {
        disk_size: 512 << 20,
        recovery: false,
        ..GuestSpec::new(WinVersion::Win10)
    });
    let (disk, places) = lock(&lab, &lab.raw, locks);
    Locked { lab, places, disk }
}

/// A copy of the disk whose Windows volume is encrypted.
fn lock(lab: &Lab, plain: &Path, locks: &[Lock]) -> (PathBuf, Reserved) {
    let part = lab.spec.partition(Role::Windows).unwrap();
    let raw: Arc<dyn BlockWrite> = Arc::new(FileDisk::open_rw(plain).unwrap());
    let layout = partition::read_layout(raw.as_ref()).unwrap();
    let places = bitlocker::reserve(raw, &layout, VolumeId::new(part.index)).unwrap();
    let disk = lab.path("locked.raw");
    // Everything but the Windows volume.
    let (from, to) = (plain.to_str().unwrap(), disk.to_str().unwrap());
    tool("cp", &["--sparse=always", from, to]);
    let hole = format!("--offset={}", part.start);
    tool(
        "fallocate",
        &[
            "--punch-hole",
            &hole,
            &format!("--length={}", part.size),
            to,
        ],
    );
    encrypt_at(
        plain,
        &disk,
        part.start,
        part.size,
        &Spec::new(Method::XtsAes128, locks, places),
    );
    (disk, places)
}

impl Locked {
    /// The disk with the Windows volume as dislocker decrypts it.
    fn decrypted(&self, disk: &Path, kind: &str, key: &str) -> PathBuf {
        let part = self.lab.spec.partition(Role::Windows).unwrap();
        let (volume, out) = (
            self.lab.path("volume.dislocked"),
            self.lab.path("decrypted.raw"),
        );
        let _ = fs::remove_file(&volume);
        dislocker(disk, part.start, kind, key, &volume);
        tool(
            "cp",
            &[
                "--sparse=always",
                disk.to_str().unwrap(),
                out.to_str().unwrap(),
            ],
        );
        let (from, to) = (
            format!("if={}", volume.display()),
            format!("of={}", out.display()),
        );
        let seek = format!("seek={}", part.start);
        let how = ["bs=1M", "oflag=seek_bytes", "conv=notrunc", "status=none"];
        tool("dd", &[&[from.as_str(), &to, &seek][..], &how].concat());
        out
    }

    fn convert(&self, source: &Path, out: &str, more: &[&str]) -> Run {
        let out = self.lab.path(out);
        let mut args = vec![
            "convert",
            source.to_str().unwrap(),
            "--json",
            "--format",
            "raw",
        ];
        args.extend([
            "-o",
            out.to_str().unwrap(),
            "--virtio-iso",
            virtio_win().to_str().unwrap(),
        ]);
        args.extend(more);
        h2k(args)
    }
}

fn findings(report: &Value) -> BTreeMap<String, String> {
    let list = report["findings"].as_array().unwrap().iter();
    let text = |f: &Value, key: &str| f[key].as_str().unwrap().to_string();
    list.map(|f| (text(f, "id"), text(f, "message"))).collect()
}

/// The files that differ are those that two conversions of one plain guest differ in.
fn same_guest(locked: &Locked, expected: &Path, found: &Path) {
    let (want, have) = (tree(expected), tree(found));
    let names = |tree: &BTreeMap<(u32, String), _>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&want), names(&have));
    for (path, contents) in &want {
        // Hives follow; a page file is emptied where the disk itself holds it.
        let apart =
            path.1.contains("/config/") || path.1.ends_with(".sys") && !path.1.contains('/');
        assert!(apart || have[path] == *contents, "{path:?}");
    }
    assert!(security(&locked.lab, expected) == security(&locked.lab, found));
    for (hive, prefix) in &HIVES[..2] {
        let text = |disk| hive_text(&locked.lab, disk, hive, prefix);
        equal_lines(hive, &text(expected), &text(found));
    }
    let volume = locked.lab.volume(found);
    tool("ntfsfix", &["--no-action", volume.to_str().unwrap()]);
}

#[test]
fn a_conversion_equals_that_of_the_same_guest_without_bitlocker() {
    if !have(&TOOLS) || !have(&["dislocker-file", "ntfssecaudit", "fallocate"]) {
        return;
    }
    let locked = locked(&ALL);
    let report = locked
        .convert(&locked.lab.raw, "plain", &[])
        .expect(0)
        .json();
    let expected = PathBuf::from(report["outputs"]["disks"][0].as_str().unwrap());

    // Two keys, the wrong one first, in a file each.
    let mut keys = Vec::new();
    for (name, key) in [("other-key", OTHER_KEY), ("key", RECOVERY)] {
        fs::write(locked.lab.path(name), format!("{key}\r\n")).unwrap();
        keys.push(format!("all:file:{}", locked.lab.path(name).display()));
    }
    let args = ["--key", &keys[0], "--key", &keys[1]];
    let run = locked.convert(&locked.disk, "out", &args).expect(0);
    assert!(!run.stderr.contains("appliance"), "{}", run.stderr);
    let by_key = run.json();
    assert_eq!(by_key["engine"], "embedded");
    assert_eq!(
        by_key["engine_why"],
        "BitLocker is opened in this process, no appliance is needed"
    );
    assert_eq!(by_key["ready"], true);
    assert_eq!(by_key["actions"], report["actions"]);
    let state = &by_key["inspection"]["disks"][0]["partitions"];
    let windows = state
        .as_array()
        .unwrap()
        .iter()
        .find(|p| p["state"]["container"] == "bitlocker");
    assert_eq!(windows.unwrap()["filesystem"], "ntfs");
    assert!(findings(&by_key["inspection"]).contains_key("bitlocker-opened"));
    // Free clusters were not copied although they are encrypted.
    let trim = &by_key["trim"][0]["volumes"].as_array().unwrap();
    assert!(
        trim.iter()
            .any(|v| v["filesystem"] == "ntfs" && v["kept"].is_null()),
        "{trim:?}"
    );
    // No key in anything that is kept.
    for file in walk(&locked.lab.path("out")) {
        let bytes = fs::read(&file).unwrap();
        let at = bytes
            .windows(RECOVERY.len())
            .position(|w| w == RECOVERY.as_bytes());
        assert_eq!(at, None, "{}", file.display());
    }

    let converted = PathBuf::from(by_key["outputs"]["disks"][0].as_str().unwrap());
    // It is as encrypted as it was.
    h2k(["verify", converted.to_str().unwrap(), "--json"]).expect(4);
    h2k([
        "verify",
        converted.to_str().unwrap(),
        "--json",
        "--key",
        &keys[1],
    ])
    .expect(0);
    // What `boot` reads between the boots.
    let proof = |keys: &[String]| {
        let (keys, _) = Keys::parse(keys).unwrap();
        let disk = proof::GuestDisk {
            path: converted.clone(),
            format: "raw".to_owned(),
            keys: &keys,
            source: &[],
        };
        proof::read(&disk, StorageBus::VirtioBlk)
    };
    assert!(proof(&keys[..1]).is_err(), "the wrong key");
    let proof = proof(&keys).unwrap();
    assert!(!proof.bound && proof.clean_shutdown, "{proof:?}");
    let decrypted = locked.decrypted(&converted, "password", PASSWORD);
    same_guest(&locked, &expected, &decrypted);
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(walk(&path)),
            false => files.push(path),
        }
    }
    files
}

#[test]
fn a_suspended_windows_is_converted_in_place_and_back() {
    if !have(&TOOLS) || !have(&["dislocker-file", "ntfssecaudit", "fallocate"]) {
        return;
    }
    let locked = locked(&[Lock::ClearKey, Lock::RecoveryPassword(RECOVERY), Lock::Tpm]);
    let report = locked
        .convert(&locked.lab.raw, "plain", &["--no-trim"])
        .expect(0);
    let expected = PathBuf::from(report.json()["outputs"]["disks"][0].as_str().unwrap());
    let source = locked.disk.to_str().unwrap();
    let inspected = h2k(["inspect", source, "--json"]).expect(0).json();
    assert_eq!(inspected["bitlocker"], true);
    let said = &findings(&inspected)["bitlocker-suspended"];
    assert!(said.contains("stays so"), "{said}");
    let media = virtio_win().to_str().unwrap();
    h2k(["plan", source, "--json", "--virtio-iso", media]).expect(0);

    let before = sha256(&locked.disk);
    let out = locked.lab.path("in-place");
    let args = [
        "--in-place",
        "-o",
        out.to_str().unwrap(),
        "--virtio-iso",
        media,
        "--json",
    ];
    let run = h2k([&["convert", source][..], &args].concat())
        .expect(0)
        .json();
    assert_eq!(run["engine"], "embedded");
    assert_ne!(sha256(&locked.disk), before);
    h2k(["verify", source, "--json"]).expect(0);
    // Still suspended, still encrypted, and its own places are what they were.
    let again = h2k(["inspect", source, "--json"]).expect(0).json();
    assert!(findings(&again).contains_key("bitlocker-suspended"));
    let decrypted = locked.decrypted(&locked.disk, "recovery", RECOVERY);
    same_guest(&locked, &expected, &decrypted);
    h2k(["rollback", out.to_str().unwrap()]).expect(0);
    assert_eq!(sha256(&locked.disk), before);
}

/// The boot files on a disk of their own, as they came, and Windows on an encrypted one.
#[test]
fn boot_files_on_another_disk_than_the_encrypted_windows() {
    if !have(&TOOLS) || !have(&["fallocate"]) {
        return;
    }
    let lab = Lab::new(GuestSpec {
        disk_size: 512 << 20,
        recovery: false,
        ..GuestSpec::new(WinVersion::Win10)
    });
    let split = lab.split();
    let (disk, _) = lock(&lab, &split.windows, &ALL);
    let source = lab.libvirt_xml("apart", &[&split.boot, &disk]);
    let out = lab.path("out");
    let index = lab.spec.partition(Role::Windows).unwrap().index;
    fs::write(lab.path("key"), RECOVERY).unwrap();
    let key = |disk: u32| format!("{disk}/{index}:file:{}", lab.path("key").display());
    let (source, to) = (source.to_str().unwrap(), out.to_str().unwrap());
    let iso = virtio_win();
    let convert = |key: &str| {
        h2k([
            "convert",
            source,
            "-o",
            to,
            "--virtio-iso",
            iso.to_str().unwrap(),
            "--json",
            "--key",
            key,
        ])
    };
    // The key is that of another disk's partition.
    let run = convert(&key(1)).expect(3);
    assert!(run.stdout.contains("\"bitlocker\""), "{}", run.stdout);
    let report = convert(&key(2)).expect(0).json();
    assert_eq!(
        (&report["engine"], &report["ready"]),
        (&"embedded".into(), &true.into())
    );
    let xml = report["outputs"]["final_xml"].as_str().unwrap();
    assert_eq!(report["outputs"]["disks"].as_array().unwrap().len(), 2);
    h2k(["verify", xml, "--json"]).expect(4);
    h2k(["verify", xml, "--json", "--key", &key(2)]).expect(0);
}

#[test]
fn volumes_that_stay_closed_say_why_and_what_helps() {
    if !have(&TOOLS) || !have(&["fallocate"]) {
        return;
    }
    let locked = locked(&ALL);
    let part = locked.lab.spec.partition(Role::Windows).unwrap();
    let source = locked.disk.to_str().unwrap();
    let refused = |more: &[&str], id: &str, says: &str, remedy: &str| {
        let started = std::time::Instant::now();
        let run = locked.convert(&locked.disk, "refused", more).expect(3);
        let took = started.elapsed();
        let blockers = run.json()["error"]["blockers"].clone();
        let blocker = blockers
            .as_array()
            .unwrap()
            .iter()
            .find(|b| b["code"] == id);
        let blocker = blocker.unwrap_or_else(|| panic!("{id}: {blockers}"));
        let text = |key: &str| blocker[key].as_str().unwrap().to_string();
        assert!(text("reason").contains(says), "{blocker}");
        assert!(text("remedy").contains(remedy), "{blocker}");
        assert!(!run.stdout.contains(OTHER_KEY) && !run.stderr.contains(OTHER_KEY));
        took
    };
    refused(&[], "bitlocker", "no key was given for it", "--key");
    fs::write(locked.lab.path("wrong"), OTHER_KEY).unwrap();
    let wrong = format!("all:file:{}", locked.lab.path("wrong").display());
    let took = refused(
        &["--key", &wrong],
        "bitlocker",
        "none of the 1 keys",
        "--key",
    );
    eprintln!("a wrong recovery password: {took:?}");
    fs::write(locked.lab.path("typo"), RECOVERY.replacen("22", "23", 1)).unwrap();
    let typo = format!("all:file:{}", locked.lab.path("typo").display());
    refused(&["--key", &typo], "bitlocker", "group 2 of 8", "--key");
    // A startup key of another volume, and the right one.
    fs::write(
        locked.lab.path("other.bek"),
        startup_key_file([1; 16], &[1; 32]),
    )
    .unwrap();
    let other = format!("all:file:{}", locked.lab.path("other.bek").display());
    refused(
        &["--key", &other],
        "bitlocker",
        "none of the 1 keys",
        "--key",
    );
    fs::write(
        locked.lab.path("right.BEK"),
        startup_key_file([0x42; 16], &[0x17; 32]),
    )
    .unwrap();
    let right = format!("all:file:{}", locked.lab.path("right.BEK").display());
    for engine in ["auto", "embedded"] {
        let args = [
            "inspect", source, "--json", "--engine", engine, "--key", &right,
        ];
        let seen = h2k(args).expect(0).json();
        assert_eq!(seen["os"]["family"], "windows", "{engine}");
    }

    // Only the metadata decides what follows.
    let plain = FileDisk::open(&locked.lab.raw).unwrap();
    let disk = FileDisk::open_rw(&locked.disk).unwrap();
    let rewrite = |change: fn(&mut Spec)| {
        let mut spec = Spec::new(Method::XtsAes128, &[Lock::Tpm], locked.places);
        change(&mut spec);
        bitlocker::write_metadata(&plain, &disk, part.start, part.size, &spec).unwrap();
    };
    rewrite(|_| {});
    let remedy = "manage-bde -protectors -disable C: -rc 0";
    refused(
        &["--key", &wrong],
        "bitlocker",
        "unlocked by TPM only",
        remedy,
    );
    for (states, says) in [
        ((2, 4), "encrypting the volume"),
        ((5, 1), "decrypting the volume"),
        ((3, 1), "paused"),
    ] {
        match states {
            (2, 4) => rewrite(|s| s.states = (2, 4)),
            (5, 1) => rewrite(|s| s.states = (5, 1)),
            _ => rewrite(|s| s.states = (3, 1)),
        }
        refused(&[], "bitlocker-converting", says, "manage-bde -status");
    }
    rewrite(|s| s.encrypts_on_write = true);
    refused(
        &[],
        "bitlocker-converting",
        "encrypt-on-write",
        "manage-bde -status",
    );
    // All copies damaged.
    for place in locked.places.copies {
        disk.write_at(part.start + place + 70, &[0xff; 8]).unwrap();
    }
    refused(&["--key", &wrong], "bitlocker", "the CRC-32 is", "--key");
}

/// cryptsetup in the appliance opens what `--engine guestfish` is asked to open.
#[test]
#[ignore = "an appliance and a key to stretch: cargo test --test engines -- --ignored"]
fn the_appliance_opens_it_when_asked() {
    if !ready() || !have(&["fallocate"]) {
        return;
    }
    let locked = locked(&ALL);
    fs::write(locked.lab.path("key"), RECOVERY).unwrap();
    let windows = locked.lab.spec.partition(Role::Windows).unwrap().index;
    let key = format!("{windows}:file:{}", locked.lab.path("key").display());
    let mut command = Command::new(support::binary());
    command.args([
        "inspect",
        locked.disk.to_str().unwrap(),
        "--json",
        "--engine",
        "guestfish",
    ]);
    command
        .args(["--key", &key])
        .env("LIBGUESTFS_BACKEND", "direct");
    let report = support::finish(command).expect(0).json();
    let found = findings(&report);
    assert!(found.contains_key("bitlocker-opened"), "{found:#?}");
}
