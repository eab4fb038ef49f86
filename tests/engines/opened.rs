//! Windows in an encrypted volume, and data in a logical one: only guestfish opens them.
//!
//! BitLocker, which uses the same path as LUKS (libguestfs' `cryptsetup-open`), is in
//! `bitlocker.rs`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use hyper2kvm::demo::{GuestSpec, Role, WinVersion};
use serde_json::Value;

use crate::support::{self, Lab, export, h2k, text, tool, virtio_win};
use crate::{counted, ready, starts};

const KEY: &str = "a passphrase of some words";
/// Where the data of a LUKS volume begins.
const PAYLOAD: u64 = 2 << 20;
/// Room for it in the partition.
const HEADER: u64 = 4 << 20;
const MIB: u64 = 1 << 20;
const LV_NAME: &str = "vg0/data";

/// Where the partitions of the disk made from a guest are.
struct Disk {
    path: PathBuf,
    windows: (u64, u64),
}

/// The guest with Windows in a LUKS volume and, behind it, a volume group with one NTFS volume. Windows
/// is partition 2, the physical volume partition 3.
fn encrypted(lab: &Lab) -> Disk {
    let part = lab.spec.partition(Role::Windows).unwrap();
    assert_eq!(part.index, 2);
    let plain = lab.volume(&lab.raw);
    let luks = lab.path("luks");
    fs::write(lab.path("key"), KEY).unwrap();
    let [from, to, key] = [&plain, &luks, &lab.path("key")].map(|p| text(p).to_owned());
    File::create(&luks)
        .and_then(|file| file.set_len(part.size + PAYLOAD))
        .unwrap();
    // Not with qemu-img: on a busy host QEMU 7.2 fails to measure the CPU time for a key.
    let format = "luksFormat --type luks1 --pbkdf-force-iterations 1000 --batch-mode --key-file";
    let format: Vec<_> = format.split(' ').chain([&key[..], &to]).collect();
    tool("cryptsetup", &format);
    let secret = format!("secret,id=key,file={key}");
    let target = format!("driver=luks,key-secret=key,file.filename={to}");
    let fill = "convert -n -f raw --target-image-opts --object";
    let fill: Vec<_> = fill
        .split(' ')
        .chain([&secret[..], &from, &target])
        .collect();
    tool("qemu-img", &fill);

    let path = lab.path("encrypted.raw");
    let group = volume_group(lab);
    let size = part.size + HEADER;
    tool(
        "cp",
        &[
            "--sparse=always",
            lab.raw.to_str().unwrap(),
            path.to_str().unwrap(),
        ],
    );
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(part.start + size + group.len() as u64 + MIB)
        .unwrap();
    let entry = |slot: u64, kind: u8, start: u64, size: u64| {
        let mut bytes = [0; 16];
        bytes[4] = kind;
        bytes[8..12].copy_from_slice(&((start / 512) as u32).to_le_bytes());
        bytes[12..].copy_from_slice(&((size / 512) as u32).to_le_bytes());
        file.write_all_at(&bytes, 446 + 16 * slot).unwrap();
    };
    entry(1, 0x07, part.start, size);
    entry(2, 0x8e, part.start + size, group.len() as u64);
    file.write_all_at(&group, part.start + size).unwrap();
    let at = format!("of={}", path.display());
    let (from, seek) = (format!("if={to}"), format!("seek={}", part.start));
    let copy = ["bs=1M", "oflag=seek_bytes", "conv=notrunc", "status=none"];
    tool("dd", &[&[from.as_str(), &at, &seek][..], &copy].concat());
    Disk {
        path,
        windows: (part.start, size),
    }
}

/// A physical volume of LVM with one linear logical volume, formatted with NTFS: label, metadata header
/// and metadata as `lvm2` writes them (format_text).
fn volume_group(lab: &Lab) -> Vec<u8> {
    const AREA: u64 = 4096;
    const DATA: u64 = MIB;
    const EXTENT: u64 = 4 * MIB;
    const EXTENTS: u64 = 4;
    let size = DATA + EXTENTS * EXTENT;
    let pv = "p1aaaa-bbbb-cccc-dddd-eeee-ffff-gggggg";
    let text = format!(
        "vg0 {{\nid = \"v1aaaa-bbbb-cccc-dddd-eeee-ffff-gggggg\"\nseqno = 1\nformat = \"lvm2\"\n\
         status = [\"RESIZEABLE\", \"READ\", \"WRITE\"]\nflags = []\nextent_size = {extent}\n\
         max_lv = 0\nmax_pv = 0\nmetadata_copies = 0\n\
         physical_volumes {{\npv0 {{\nid = \"{pv}\"\ndevice = \"/dev/sda3\"\n\
         status = [\"ALLOCATABLE\"]\nflags = []\ndev_size = {sectors}\npe_start = {start}\n\
         pe_count = {EXTENTS}\n}}\n}}\n\
         logical_volumes {{\ndata {{\nid = \"l1aaaa-bbbb-cccc-dddd-eeee-ffff-gggggg\"\n\
         status = [\"READ\", \"WRITE\", \"VISIBLE\"]\nflags = []\nsegment_count = 1\n\
         segment1 {{\nstart_extent = 0\nextent_count = {EXTENTS}\ntype = \"striped\"\n\
         stripe_count = 1\nstripes = [\n\"pv0\", 0\n]\n}}\n}}\n}}\n}}\n\
         contents = \"Text Format Volume Group\"\nversion = 1\ndescription = \"\"\n\
         creation_host = \"host\"\ncreation_time = 1\n\0",
        extent = EXTENT / 512,
        sectors = size / 512,
        start = DATA / 512,
    );
    let mut disk = vec![0; size as usize];
    let mut put = |at: u64, bytes: &[u8]| {
        disk[at as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    let words = |words: &[u64]| {
        words
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect::<Vec<_>>()
    };

    let mut label = vec![0; 512];
    label[..8].copy_from_slice(b"LABELONE");
    label[8..16].copy_from_slice(&1u64.to_le_bytes());
    label[20..24].copy_from_slice(&32u32.to_le_bytes());
    label[24..32].copy_from_slice(b"LVM2 001");
    label[32..64].copy_from_slice(pv.replace('-', "").as_bytes());
    // Size, data areas, metadata areas; each list ends in zeroes.
    let lists = words(&[size, DATA, 0, 0, 0, AREA, DATA - AREA, 0, 0]);
    label[64..64 + lists.len()].copy_from_slice(&lists);
    let sum = crc(&label[20..]);
    label[16..20].copy_from_slice(&sum.to_le_bytes());
    put(512, &label);

    let mut header = vec![0; 512];
    header[4..20].copy_from_slice(b" LVM2 x[5A%r0N*>");
    header[20..24].copy_from_slice(&1u32.to_le_bytes());
    let place = words(&[AREA, DATA - AREA, 512, text.len() as u64]);
    header[24..24 + place.len()].copy_from_slice(&place);
    header[56..60].copy_from_slice(&crc(text.as_bytes()).to_le_bytes());
    let sum = crc(&header[4..]);
    header[..4].copy_from_slice(&sum.to_le_bytes());
    put(AREA, &header);
    put(AREA + 512, text.as_bytes());

    let volume = lab.path("data.ntfs");
    File::create(&volume)
        .unwrap()
        .set_len(EXTENTS * EXTENT)
        .unwrap();
    let volume = volume.to_str().unwrap();
    tool(
        "mkntfs",
        &[
            "--force",
            "--fast",
            "--quiet",
            "--label",
            "in a group",
            volume,
        ],
    );
    put(DATA, &fs::read(volume).unwrap());
    disk
}

/// LVM's own checksum: the usual polynomial, another start, no inversion.
fn crc(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0xf597_a6cf, |mut crc, byte| {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
        crc
    })
}

fn codes(error: &Value) -> Vec<&str> {
    let blockers = error["error"]["blockers"].as_array().unwrap();
    blockers
        .iter()
        .map(|b| b["code"].as_str().unwrap())
        .collect()
}

#[test]
fn windows_in_luks_and_data_in_lvm() {
    if !ready() || !support::have(&["cryptsetup"]) {
        return;
    }
    let lab = Lab::new(GuestSpec {
        disk_size: 512 << 20,
        ..GuestSpec::new(WinVersion::Win7)
    });
    let disk = encrypted(&lab);
    let source = disk.path.to_str().unwrap();

    // Without a key, no appliance needs to start.
    let error = lab.convert(&disk.path, &["--engine", "embedded"]);
    let error = error.expect(3).json();
    assert!(codes(&error).contains(&"luks"), "{error}");
    assert!(error.to_string().contains("--key"), "{error}");
    let closed = h2k([
        "inspect",
        source,
        "--engine",
        "embedded",
        "--key",
        "all:env:HOME",
    ]);
    let closed = closed.expect(0).stdout;
    assert!(closed.contains("the guestfish engine opens it"), "{closed}");

    let temporary = lab.path("tmp");
    fs::create_dir(&temporary).unwrap();
    let key_file = lab.path("key-file");
    fs::write(&key_file, format!("{KEY}\n")).unwrap();
    let mut command = Command::new(support::binary());
    command
        .args(["convert", source, "--json", "-vv", "--format", "raw", "-o"])
        .arg(lab.path("out"))
        .arg("--virtio-iso")
        .arg(virtio_win())
        // A wrong one comes first.
        .args(["--key", "all:env:ANOTHER_KEY", "--key"])
        .arg(format!("2:file:{}", key_file.display()))
        .env("ANOTHER_KEY", "not this one")
        .env("TMPDIR", &temporary)
        .env("PATH", counted(&lab))
        // Otherwise the appliance is built again.
        .env("LIBGUESTFS_CACHEDIR", "/var/tmp");
    let run = support::finish(command).expect(0);
    let report = run.json();
    assert_eq!(
        starts(&lab),
        2,
        "one to read and write, one to read it back"
    );
    assert_eq!(report["engine"], "guestfish");
    assert!(report["engine_why"].as_str().unwrap().contains("LUKS"));
    let seen = &report["inspection"]["disks"][0];
    assert_eq!(seen["partitions"][1]["filesystem"], "ntfs");
    assert_eq!(seen["partitions"][1]["state"]["container"], "luks");
    let logical = &seen["volumes"][0];
    assert_eq!(logical["name"], LV_NAME, "{seen}");
    assert_eq!(logical["label"], "in a group");
    assert_eq!(logical["state"]["container"], "lvm");

    // The written data is in the encrypted volume: QEMU's own LUKS opens it.
    let converted = Path::new(report["outputs"]["disks"][0].as_str().unwrap());
    let secret = format!("secret,id=key,file={}", lab.path("key").display());
    let (start, size) = disk.windows;
    let opened = lab.path("opened.ntfs");
    let image = format!(
        "driver=luks,key-secret=key,file.driver=raw,file.offset={start},file.size={size},\
         file.file.driver=file,file.file.filename={}",
        converted.display()
    );
    let args = [
        "convert",
        "--object",
        &secret,
        "--image-opts",
        &image,
        "-O",
        "raw",
    ];
    tool(
        "qemu-img",
        &[&args[..], &[opened.to_str().unwrap()]].concat(),
    );
    let hive = lab.path("SYSTEM");
    fs::write(
        &hive,
        lab.ntfscat(&opened, "/Windows/System32/config/SYSTEM"),
    )
    .unwrap();
    let service = export(&hive, "HKLM", "\\ControlSet001\\Services\\viostor");
    assert!(service.contains("\"Start\"=dword:00000000"), "{service}");
    // ntfsfix looks for the other boot sector at the end; the room for the header was more than enough.
    let file = File::options().write(true).open(&opened).unwrap();
    let size = lab.spec.partition(Role::Windows).unwrap().size;
    file.set_len(size).unwrap();
    tool("ntfsfix", &["--no-action", opened.to_str().unwrap()]);

    // No leftover contains the keys.
    for key in [KEY, "not this one"] {
        assert!(!run.stdout.contains(key) && !run.stderr.contains(key));
        let left = |folder: &Path| {
            let folder = folder.to_str().unwrap();
            let found = Command::new("grep").args(["-rlF", key, folder]).output();
            String::from_utf8(found.unwrap().stdout).unwrap()
        };
        assert_eq!(left(&temporary), "");
        assert_eq!(left(converted.parent().unwrap()), "");
    }
}
