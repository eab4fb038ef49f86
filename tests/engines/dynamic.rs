//! Dynamic disks (LDM): libguestfs' appliance reads what is on one; beside Windows it is copied unchanged.

use std::fs::{self, File};

use hyper2kvm::demo::{GuestSpec, WinVersion};

use crate::support::{Lab, h2k, tool};
use crate::{ready, without};

const SECTOR: usize = 512;
const VOLUME: usize = 4 << 20;
/// Where volumes start, and the database of a megabyte behind them.
const DATA: usize = 63;
const CONFIG: usize = DATA + VOLUME / SECTOR;
const CONFIG_SIZE: usize = 2048;
const TABLE: usize = 17;
const DISK_GUID: &str = "11111111-2222-3333-4444-555555555555";
const GROUP_GUID: &str = "66666666-7777-8888-9999-aaaaaaaaaaaa";

fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
    disk[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Numbers of 8 bytes; all of LDM is big endian.
fn longs(numbers: &[usize]) -> Vec<u8> {
    let all = numbers.iter().map(|n| (*n as u64).to_be_bytes());
    all.flatten().collect()
}

/// What has a length before it: a string, or a number.
fn sized(bytes: &[u8]) -> Vec<u8> {
    [&[bytes.len() as u8], bytes].concat()
}

/// A disk group of one disk with one simple volume: private header, table of contents, and a database of
/// records, as the Linux-NTFS project's "LDM documentation" has them.
fn dynamic_disk(volume: &[u8]) -> Vec<u8> {
    let sectors = CONFIG + CONFIG_SIZE;
    let mut disk = vec![0; sectors * SECTOR];
    put(&mut disk, 446 + 4, &[0x42]);
    let extent = [DATA as u32, (sectors - DATA) as u32].map(u32::to_le_bytes);
    put(&mut disk, 446 + 8, &extent.concat());
    put(&mut disk, 510, &[0x55, 0xaa]);

    let header = 6 * SECTOR;
    put(&mut disk, header, b"PRIVHEAD");
    put(&mut disk, header + 12, &[0, 2, 0, 11]);
    put(&mut disk, header + 48, DISK_GUID.as_bytes());
    put(&mut disk, header + 176, GROUP_GUID.as_bytes());
    let places = longs(&[DATA, CONFIG - DATA, CONFIG, CONFIG_SIZE]);
    put(&mut disk, header + 283, &places);

    let contents = (CONFIG + 2) * SECTOR;
    put(&mut disk, contents, b"TOCBLOCK");
    put(&mut disk, contents + 36, b"config");
    put(&mut disk, contents + 46, &longs(&[TABLE, 1024]));

    let id = |n: u8| sized(&[n]);
    let size = sized(&longs(&[VOLUME / SECTOR]));
    let records: [(u8, Vec<u8>); 5] = [
        (0x35, [id(1), sized(b"Group")].concat()),
        (
            0x34,
            [id(2), sized(b"Disk1"), sized(DISK_GUID.as_bytes())].concat(),
        ),
        (
            0x51,
            [
                [id(3), sized(b"Volume1"), sized(b"gen"), sized(b"")].concat(),
                b"ACTIVE\0\0\0\0\0\0\0\0\x03".to_vec(),
                [vec![0; 6], id(1), vec![0; 16], size.clone(), vec![0; 4]].concat(),
                [vec![7], vec![0x33; 16]].concat(),
            ]
            .concat(),
        ),
        (
            0x32,
            [
                [
                    id(4),
                    sized(b"Volume1-01"),
                    sized(b"ACTIVE"),
                    vec![2, 0, 0, 0, 0],
                ]
                .concat(),
                [id(1), vec![0; 16], id(3), vec![0]].concat(),
            ]
            .concat(),
        ),
        (
            0x33,
            [
                [id(5), sized(b"Disk1-01"), vec![0; 12], longs(&[0, 0])].concat(),
                [size, id(4), id(2)].concat(),
            ]
            .concat(),
        ),
    ];
    let table = (CONFIG + TABLE) * SECTOR;
    put(&mut disk, table, b"VMDB");
    // The last record, the size of one, the first one; then the version.
    let head = [records.len() as u32 + 4, 128, 512].map(u32::to_be_bytes);
    put(&mut disk, table + 4, &head.concat());
    put(&mut disk, table + 18, &[0, 4, 0, 10]);
    put(&mut disk, table + 22, b"Group");
    put(&mut disk, table + 53, GROUP_GUID.as_bytes());
    put(&mut disk, table + 117, &longs(&[1, 1]));
    // Volumes, components, partitions, disks.
    put(
        &mut disk,
        table + 133,
        &[1u32; 4].map(u32::to_be_bytes).concat(),
    );
    for (n, (kind, record)) in (0u8..).zip(&records) {
        let at = table + 512 + usize::from(n) * 128;
        put(&mut disk, at, b"VBLK");
        put(
            &mut disk,
            at + 4,
            &[0, 0, 0, n + 4, 0, 0, 0, n + 1, 0, 0, 0, 1],
        );
        put(&mut disk, at + 19, &[*kind, 0, 0, 0, record.len() as u8]);
        put(&mut disk, at + 24, record);
    }
    put(&mut disk, DATA * SECTOR, volume);
    disk
}

#[test]
fn a_dynamic_data_disk() {
    if !ready() {
        return;
    }
    let lab = Lab::new(GuestSpec {
        disk_size: 512 << 20,
        ..GuestSpec::new(WinVersion::Win7)
    });
    let volume = lab.path("data.ntfs");
    File::create(&volume)
        .unwrap()
        .set_len(VOLUME as u64)
        .unwrap();
    let path = volume.to_str().unwrap();
    let options = [
        "--force",
        "--fast",
        "--quiet",
        "--label",
        "on a dynamic disk",
    ];
    tool("mkntfs", &[&options[..], &[path]].concat());
    let data = dynamic_disk(&fs::read(&volume).unwrap());
    let dynamic = lab.path("dynamic.raw");
    fs::write(&dynamic, &data).unwrap();

    let inspect = ["inspect", dynamic.to_str().unwrap(), "--json", "--engine"];
    let seen = |engine: &str| h2k(inspect.iter().chain([&engine])).expect(0).json();
    let disk = seen("guestfish")["disks"][0].clone();
    let volume = &disk["volumes"][0];
    assert_eq!(volume["label"], "on a dynamic disk", "{disk}");
    assert_eq!(volume["state"]["container"], "ldm", "{disk}");
    assert_eq!(
        without(disk.clone(), &["volumes"]),
        seen("embedded")["disks"][0]
    );

    for name in ["dynamic", "guest"] {
        let [from, to] = ["raw", "vmdk"].map(|format| lab.path(&format!("{name}.{format}")));
        let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
        tool(
            "qemu-img",
            &["convert", "-f", "raw", "-O", "vmdk", from, to],
        );
    }
    let vmx = lab.path("vm.vmx");
    // The data disk comes first: where Windows is decides.
    let text = "displayName = \"vm\"\nmemsize = \"2048\"\nscsi0.present = \"TRUE\"\n\
                scsi0:0.present = \"TRUE\"\nscsi0:0.fileName = \"dynamic.vmdk\"\n\
                scsi0:1.present = \"TRUE\"\nscsi0:1.fileName = \"guest.vmdk\"\n";
    fs::write(&vmx, text).unwrap();
    let engine = ["--engine", "embedded", "--format", "raw"];
    let report = lab.convert(&vmx, &engine).expect(0).json();
    let disks = report["outputs"]["disks"].as_array().unwrap();
    assert_eq!(disks.len(), 2, "{disks:?}");
    assert!(fs::read(disks[1].as_str().unwrap()).unwrap()[..data.len()] == data);
}
