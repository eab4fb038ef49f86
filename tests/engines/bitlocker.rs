//! A whole conversion of a Windows on BitLocker.
//!
//! The volume is made here: its metadata as the libbde documentation describes them, with one recovery
//! password, and cryptsetup in libguestfs' appliance as the judge of them. What is in it is
//! encrypted by the appliance.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use hyper2kvm::demo::{GuestSpec, Role, WinVersion};
use sha2::{Digest, Sha256};

use crate::support::{self, Lab, tool, virtio_win};
use crate::{
    HIVES, audit, convert, counted, equal_lines, hive_text, of_volume, ready, security, starts,
};

const KEY: &str = "110000-220000-330000-440000-550000-660000-110011-220022";
/// A key of that form which opens nothing.
const OTHER_KEY: &str = "111111-222222-333333-444444-555555-666666-111111-222222";
/// The copies of the metadata, in hundredths of the volume; no cluster in use is there.
const PLACES: [u64; 3] = [70, 80, 90];
const AREA: u64 = 64 << 10;
/// The start of NTFS, which has to make room for BitLocker's own boot sector.
const HEAD: u64 = 8 << 10;

/// Size, type, value, version, data.
fn entry(kind: u16, value: u16, data: &[u8]) -> Vec<u8> {
    let size = 8 + data.len() as u16;
    let head = [size, kind, value, 1].map(u16::to_le_bytes).concat();
    [&head, data].concat()
}

/// A key, as it is before its encryption.
fn key_entry(method: u32, key: &[u8]) -> Vec<u8> {
    let head = [12 + key.len() as u32, 1, method].map(u32::to_le_bytes);
    [&head.concat(), key].concat()
}

/// AES-256-CCM: nonce, tag and text, as BitLocker stores them.
fn sealed(lab: &Lab, key: &[u8], count: u8, text: &[u8]) -> Vec<u8> {
    let aes = |mode: &str, iv: &[u8], input: &[u8]| {
        let file = lab.path("aes");
        fs::write(&file, input).unwrap();
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let (mode, file) = (format!("-aes-256-{mode}"), file.to_str().unwrap());
        let (key, iv) = (hex(key), hex(iv));
        let args = ["enc", &mode, "-nopad", "-in", file, "-K", &key, "-iv", &iv];
        tool("openssl", &args)
    };
    let nonce = [0, 1, 2, 3, 4, 5, 6, 7, count, 0, 0, 0];
    let len = [0, 0, text.len() as u8];
    // RFC 3610 with a tag of 16 bytes, a length of 3 and nothing but text.
    let mut blocks = [&[0x3a], &nonce[..], &len, text].concat();
    blocks.resize(blocks.len().next_multiple_of(16), 0);
    let mac = aes("cbc", &[0; 16], &blocks).split_off(blocks.len() - 16);
    let counter = [&[2], &nonce[..], &[0; 3]].concat();
    let tail = aes("ctr", &counter, &[&mac, text].concat());
    [&nonce[..], &tail].concat()
}

/// A million rounds: what makes guessing recovery passwords slow, and unlocking under emulation.
fn stretched(password: &str, salt: [u8; 16]) -> [u8; 32] {
    let parts = password.split('-').map(|part| part.parse::<u32>().unwrap());
    let binary: Vec<u8> = parts
        .flat_map(|n| ((n / 11) as u16).to_le_bytes())
        .collect();
    let mut state = [0; 88];
    state[32..64].copy_from_slice(&Sha256::digest(binary));
    state[64..80].copy_from_slice(&salt);
    for round in 0..1u64 << 20 {
        state[80..].copy_from_slice(&round.to_le_bytes());
        let hash = Sha256::digest(state);
        state[..32].copy_from_slice(&hash);
    }
    *state.first_chunk().unwrap()
}

/// The guest with a BitLocker volume in the place of Windows, which nothing is in yet. Suspended: its
/// key also lies open.
fn locked(lab: &Lab, suspended: bool) -> PathBuf {
    let part = lab.spec.partition(Role::Windows).unwrap();
    let places = PLACES.map(|p| part.size / 100 * p / AREA * AREA);
    let (salt, volume_key, data_key) = ([7; 16], [0x5a; 32], [0xa5; 32]);
    let recovery = stretched(KEY, salt);

    let volume_key_entry = key_entry(0x2003, &volume_key);
    let protector = |id: u8, kind: u16, value: u16, opened_by: &[u8], key: &[u8]| {
        let head = [&[id; 16][..], &[0; 10], &kind.to_le_bytes()];
        let sealed = sealed(lab, key, id, &volume_key_entry);
        entry(
            2,
            8,
            &[
                &head.concat(),
                &entry(0, value, opened_by)[..],
                &entry(0, 5, &sealed),
            ]
            .concat(),
        )
    };
    let salt_entry = [&0x1000u32.to_le_bytes()[..], &salt].concat();
    let mut protectors = protector(1, 0x800, 3, &salt_entry, &recovery);
    if suspended {
        let open_key = [0xc3; 32];
        let key = [&0x2003u32.to_le_bytes()[..], &open_key].concat();
        protectors.extend(protector(3, 0, 1, &key, &open_key));
    }
    // AES-XTS with 128 bits, which takes two keys.
    let data_key_entry = key_entry(0x8004, &data_key);
    let entries = [
        protectors,
        entry(3, 5, &sealed(lab, &volume_key, 2, &data_key_entry)),
        entry(
            15,
            15,
            &[places[0] + AREA, HEAD].map(u64::to_le_bytes).concat(),
        ),
    ]
    .concat();
    let size = 48 + entries.len() as u32;
    let block = [
        b"-FVE-FS-",
        &[55u16, 2, 4, 4].map(u16::to_le_bytes).concat()[..],
        &part.size.to_le_bytes(),
        &[0, (HEAD / 512) as u32].map(u32::to_le_bytes).concat(),
        &places.map(u64::to_le_bytes).concat(),
        &(places[0] + AREA).to_le_bytes(),
        &[size, 1, 48, size].map(u32::to_le_bytes).concat(),
        &[2; 16], // the GUID of the volume
        &[3u32, 0x8004_8004].map(u32::to_le_bytes).concat(),
        &[0; 8],
        &entries,
    ]
    .concat();

    let mut boot = [0; 512];
    boot[..11].copy_from_slice(b"\xeb\x58\x90-FVE-FS-");
    boot[11..16].copy_from_slice(&[0, 2, 8, 0, 0]);
    boot[160..176]
        .copy_from_slice(b"\x3b\xd6\x67\x49\x29\x2e\xd8\x4a\x83\x99\xf6\xa3\x39\xe3\xd0\x01");
    boot[176..200].copy_from_slice(&places.map(u64::to_le_bytes).concat());
    boot[510..].copy_from_slice(&[0x55, 0xaa]);

    let plain = File::open(lab.volume(&lab.raw)).unwrap();
    let path = lab.path("locked.raw");
    let mut head = vec![0; part.start as usize];
    File::open(&lab.raw)
        .unwrap()
        .read_exact_at(&mut head, 0)
        .unwrap();
    fs::write(&path, head).unwrap();
    let disk = File::options().write(true).open(&path).unwrap();
    disk.set_len(fs::metadata(&lab.raw).unwrap().len()).unwrap();
    disk.write_all_at(&boot, part.start).unwrap();
    for place in places {
        let mut used = vec![1; (AREA + HEAD) as usize];
        plain.read_exact_at(&mut used, place).unwrap();
        assert!(used.iter().all(|b| *b == 0), "{place:#x} is in use");
        disk.write_all_at(&block, part.start + place).unwrap();
    }
    path
}

/// Commands for the opened volume, `/dev/mapper/open`.
fn in_appliance(lab: &Lab, disk: &Path, read_only: bool, command: &str) {
    let script = format!(
        "add {} format:raw readonly:{read_only}\nrun\ncryptsetup-open /dev/sda2 open readonly:{read_only}\n\
         {KEY}\n{command}\n",
        disk.display()
    );
    fs::write(lab.path("script"), script).unwrap();
    let start = Instant::now();
    let out = Command::new("guestfish")
        .arg("--keys-from-stdin")
        .envs(hyper2kvm::tool::appliance::environment())
        .stdin(Stdio::from(File::open(lab.path("script")).unwrap()))
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    eprintln!("{command}: {} s", start.elapsed().as_secs());
}

fn guest() -> Lab {
    Lab::new(GuestSpec {
        disk_size: 512 << 20,
        ..GuestSpec::new(WinVersion::Win7)
    })
}

#[test]
#[ignore = "four appliances and six keys to stretch: cargo test --test engines -- --ignored"]
fn windows_on_bitlocker() {
    if !ready() || !support::have(&["ntfsclone", "openssl"]) {
        return;
    }
    let lab = guest();
    let (by_embedded, expected) = convert(&lab, virtio_win(), "embedded");
    let disk = locked(&lab, false);
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let [clone, converted_clone] = ["clone", "converted-clone"].map(|name| text(&lab.path(name)));
    let plain = text(&lab.volume(&lab.raw));
    tool("ntfsclone", &["--save-image", "--output", &clone, &plain]);
    in_appliance(
        &lab,
        &disk,
        false,
        &format!("ntfsclone-in {clone} /dev/mapper/open"),
    );

    // Two keys, the wrong one first, in a file each.
    let mut command = Command::new(support::binary());
    command.args(["convert", &text(&disk), "--json", "--format", "raw"]);
    for (name, key) in [("other-key", OTHER_KEY), ("key", KEY)] {
        let mut file = File::create(lab.path(name)).unwrap();
        writeln!(file, "{key}").unwrap();
        command.args(["--key", &format!("2:file:{}", lab.path(name).display())]);
    }
    command
        .arg("-o")
        .arg(lab.path("out"))
        .arg("--virtio-iso")
        .arg(virtio_win())
        .env("PATH", counted(&lab));
    let start = Instant::now();
    let report = support::finish(command).expect(0).json();
    eprintln!("convert: {} s", start.elapsed().as_secs());
    assert_eq!(
        starts(&lab),
        2,
        "one to read and write, one to read it back"
    );
    assert_eq!(report["engine"], "guestfish");
    let partition = &report["inspection"]["disks"][0]["partitions"][1];
    assert_eq!(partition["filesystem"], "ntfs");
    assert_eq!(partition["state"]["container"], "bitlocker");
    assert_eq!(report["actions"], expected["actions"]);

    let converted = Path::new(report["outputs"]["disks"][0].as_str().unwrap());
    let out = format!("ntfsclone-out /dev/mapper/open {converted_clone}");
    in_appliance(&lab, converted, true, &out);
    let opened = lab.path("opened.ntfs");
    let restore = ["--restore-image", "--overwrite"];
    File::create(&opened).unwrap();
    tool(
        "ntfsclone",
        &[&restore[..], &[&text(&opened), &converted_clone]].concat(),
    );
    let part = lab.spec.partition(Role::Windows).unwrap();
    let file = File::options().write(true).open(&opened).unwrap();
    file.set_len(part.size).unwrap();
    tool("ntfsfix", &["--no-action", &text(&opened)]);

    // The same volume as that of a machine without BitLocker.
    let (expected, found) = (of_volume(&by_embedded, part.index), of_volume(&opened, 0));
    assert_eq!(
        expected.keys().collect::<Vec<_>>(),
        found.keys().collect::<Vec<_>>()
    );
    for (path, contents) in &expected {
        // Hives follow; a page file is only emptied where the disk itself holds it.
        let apart = path.contains("/config/") || path == "pagefile.sys";
        assert!(apart || found[path] == *contents, "{path}");
    }
    assert!(security(&lab, &by_embedded) == audit(&opened));
    for (hive, prefix) in &HIVES[..2] {
        let expected = hive_text(&lab, &by_embedded, hive, prefix);
        let copy = lab.path("hive");
        let file = format!("/Windows/System32/config/{hive}");
        fs::write(&copy, lab.ntfscat(&opened, &file)).unwrap();
        equal_lines(hive, &expected, &support::export(&copy, prefix, "\\"));
    }
}

/// cryptsetup opens no suspended volume, whatever the key; it is said what to do.
#[test]
#[ignore = "an appliance and a key to stretch: cargo test --test engines -- --ignored"]
fn a_suspended_volume_stays_closed() {
    if !ready() || !support::have(&["openssl"]) {
        return;
    }
    let lab = guest();
    let disk = locked(&lab, true);
    fs::write(lab.path("key"), KEY).unwrap();
    let key = format!("2:file:{}", lab.path("key").display());
    let refused = lab.convert(&disk, &["--key", &key]).expect(3).json();
    let said = refused["error"]["blockers"].to_string();
    assert!(said.contains("-protectors -enable"), "{said}");
}
