//! The cost depends on the data: counted in reads, not in seconds.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hyper2kvm::block::{BlockRead, BlockWrite, FileDisk};
use hyper2kvm::demo::{GuestSpec, Role, WinVersion, guest};
use hyper2kvm::disk::Image;
use hyper2kvm::disk::layout::DiskLayout;
use hyper2kvm::fix::trim::{self, DataMap};
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{DiskId, EmbeddedWriter, GuestWrite, VolumeId, embedded};
use hyper2kvm::inspect::{self, InspectOptions, OsFamily, SourceFacts};

use super::support::{Lab, TOOLS, have, skip};
use super::{path, writer};

/// The requests to a disk.
#[derive(Debug, Default)]
struct Cost {
    reads: AtomicU64,
    read: AtomicU64,
    writes: AtomicU64,
    zeroed: AtomicU64,
}

impl Cost {
    fn of(&self) -> [u64; 4] {
        [&self.reads, &self.read, &self.writes, &self.zeroed].map(|n| n.load(Ordering::Relaxed))
    }
}

struct Counting {
    disk: FileDisk,
    cost: Arc<Cost>,
}

impl BlockRead for Counting {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.cost.reads.fetch_add(1, Ordering::Relaxed);
        let len = buf.len() as u64;
        self.cost.read.fetch_add(len, Ordering::Relaxed);
        self.disk.read_at(offset, buf)
    }
}

impl BlockWrite for Counting {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.cost.writes.fetch_add(1, Ordering::Relaxed);
        self.disk.write_at(offset, data)
    }
    /// Only counted: a test that trims to a file of 2 TiB would fill it.
    fn zero_at(&self, _: u64, _: u64) -> io::Result<()> {
        self.cost.zeroed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

fn counted(disk: &Path) -> (Arc<Counting>, Arc<Cost>) {
    let cost = Arc::new(Cost::default());
    let disk = Counting {
        disk: FileDisk::open_rw(disk).unwrap(),
        cost: cost.clone(),
    };
    (Arc::new(disk), cost)
}

fn inspect_cost(disk: &Path, layout: &DiskLayout) -> [u64; 4] {
    let (disk, cost) = counted(disk);
    let guest = embedded::open(disk, layout).unwrap();
    let facts = SourceFacts {
        path: "counted".into(),
        format: "raw".into(),
        virtual_size_bytes: 0,
    };
    let disk = inspect::Disk {
        id: DiskId::ONLY,
        layout: layout.clone(),
        source: facts,
    };
    let survey = inspect::inspect(&guest, &[disk], &InspectOptions::default()).unwrap();
    assert_eq!(survey.inspection.os.family, OsFamily::Windows);
    cost.of()
}

/// A write like those of the fix, with mount and unmount.
fn write_cost(disk: &Path, layout: &DiskLayout, volume: VolumeId) -> [u64; 4] {
    let (disk, cost) = counted(disk);
    let mut writer = Box::new(EmbeddedWriter::new(disk, layout, MountOptions::default()));
    let file = path("Windows\\System32\\drivers\\counted.sys");
    writer.write_file(volume, &file, &[7; 100_000]).unwrap();
    writer.close().unwrap();
    cost.of()
}

fn trim_cost(file: &Path, layout: &DiskLayout) -> [u64; 4] {
    let data = DataMap::of(&Image::open_info(file, None, &[]).unwrap()).unwrap();
    let (disk, cost) = counted(file);
    let guest = embedded::open(disk.clone(), layout).unwrap();
    let trimmed = trim::trim(disk.as_ref(), &guest, &data).unwrap();
    assert!(trimmed.iter().any(|v| v.kept.is_none()), "{trimmed:?}");
    cost.of()
}

fn lab(size: u64) -> Option<(Lab, DiskLayout, VolumeId)> {
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = size;
    spec.pagefile_size = 0;
    let dir = tempfile::tempdir().unwrap();
    let probe = std::fs::File::create(dir.path().join("probe")).unwrap();
    if probe.set_len(size).is_err() {
        skip("large-file", format!("no file of {size} bytes here"));
        return None;
    }
    let lab = Lab::new(spec);
    let layout = guest::layout(&lab.spec);
    let volume = VolumeId::new(lab.spec.partition(Role::Windows).unwrap().index);
    Some((lab, layout, volume))
}

/// Both in number and in bytes, up to what a deeper index or a longer run list costs.
#[track_caller]
fn assert_alike(what: &str, small: [u64; 4], large: [u64; 4]) {
    eprintln!("{what}: [reads, bytes, writes, zeroed] {small:?} and {large:?}");
    for (i, slack) in [40, 2 << 20, 40, 40].into_iter().enumerate() {
        let limit = small[i] + small[i] / 10 + slack;
        assert!(large[i] <= limit, "{what}: {small:?} and {large:?}");
    }
}

#[test]
fn a_disk_costs_what_its_data_costs() {
    if !have(&TOOLS) {
        return;
    }
    let (Some((small, small_layout, v)), Some((large, large_layout, _))) =
        (lab(20 << 30), lab(2 << 40))
    else {
        return;
    };
    let (a, b) = (&small.raw, &large.raw);
    let inspected = [
        inspect_cost(a, &small_layout),
        inspect_cost(b, &large_layout),
    ];
    assert_alike("inspect", inspected[0], inspected[1]);
    let written = [
        write_cost(a, &small_layout, v),
        write_cost(b, &large_layout, v),
    ];
    assert_alike("write", written[0], written[1]);
    let trimmed = [trim_cost(a, &small_layout), trim_cost(b, &large_layout)];
    assert_alike("trim", trimmed[0], trimmed[1]);
}

#[test]
fn files_that_nobody_asks_for_cost_nothing() {
    if !have(&TOOLS) {
        return;
    }
    // A tree of indexes is one level deeper when it is 30 times as large: what is true of 15,000 is
    // true of 500,000. `HYPER2KVM_MANY_FILES` tries it.
    let many: u64 = std::env::var("HYPER2KVM_MANY_FILES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(15_000);
    let (lab, layout, volume) = lab((4 + many / 25_000) << 30).unwrap();
    let add = |from: u64, to: u64| {
        let mut writer = writer(&lab.raw, &layout);
        for i in from..to {
            // Where Windows has the most, and where inspect looks.
            let folder = ["WinSxS", "System32", "System32\\drivers"][(i % 3) as usize];
            let folder = path(&format!("Windows\\{folder}"));
            if from == 0 && i < 3 {
                // Some exist already.
                let _ = writer.create_dir(volume, &folder);
            }
            let file = folder.join(&format!("file {i:07}.dat")).unwrap();
            writer.write_file(volume, &file, b"x").unwrap();
        }
        writer.close().unwrap();
    };
    add(0, 500);
    let few = inspect_cost(&lab.raw, &layout);
    add(500, many);
    let cost = inspect_cost(&lab.raw, &layout);
    assert_alike("inspect", few, cost);
}
