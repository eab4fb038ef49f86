//! Guests that are not clean: each state of `docs/guests.md` is built, inspected, and converted or
//! refused. The exact texts are in `rows`, and the document is checked against that table.
//!
//! Every guest is a copy of one of a few built ones, changed with hyper2kvm's writer or byte by
//! byte.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod agree;
mod boot;
mod hives;
mod ntfs;
mod old;
mod rows;
mod several;
#[path = "../support/mod.rs"]
mod support;
mod verify;
mod volumes;
mod windows;

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use hyper2kvm::block::FileDisk;
use hyper2kvm::demo::guest::layout;
use hyper2kvm::demo::{DemoVolume, GuestSpec, Leftovers, Role, WinVersion};
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{EmbeddedWriter, GuestPath, GuestRead, GuestWrite, VolumeId, embedded};
use hyper2kvm::registry::build::Format;
use hyper2kvm::registry::{HiveView, KeyTree};
use serde_json::Value;
use support::{Lab, Run, h2k, tool, virtio_win};

/// A guest of that version, built once.
fn base(version: WinVersion) -> &'static Lab {
    static LABS: [OnceLock<Lab>; 2] = [OnceLock::new(), OnceLock::new()];
    let slot = match version {
        WinVersion::Win10 => &LABS[0],
        WinVersion::Win7 => &LABS[1],
        _ => panic!("no such base"),
    };
    slot.get_or_init(|| Lab::new(spec(version)))
}

fn spec(version: WinVersion) -> GuestSpec {
    GuestSpec {
        disk_size: 1 << 30,
        // Ready for SATA or IDE as it is, so that a fault is the one put in.
        leftovers: Leftovers::None,
        ..GuestSpec::new(version)
    }
}

/// A copy of a base to damage.
struct Guest {
    dir: tempfile::TempDir,
    disk: PathBuf,
    spec: GuestSpec,
}

impl Guest {
    fn new(version: WinVersion) -> Self {
        Self::of(base(version))
    }

    fn of(base: &Lab) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("guest.raw");
        let (from, to) = (base.raw.to_str().unwrap(), disk.to_str().unwrap());
        tool("cp", &["--sparse=always", from, to]);
        let spec = base.spec.clone();
        Self { dir, disk, spec }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn volume(&self, place: DemoVolume) -> VolumeId {
        let role = match place {
            DemoVolume::Windows => Role::Windows,
            DemoVolume::Boot => self.spec.boot_role(),
        };
        VolumeId::new(self.spec.partition(role).unwrap().index)
    }

    fn start(&self, role: Role) -> u64 {
        self.spec.partition(role).unwrap().start
    }

    fn change(&self, place: DemoVolume, change: impl FnOnce(&mut dyn GuestWrite, VolumeId)) {
        self.change_volume(self.volume(place), change);
    }

    fn change_volume(&self, volume: VolumeId, change: impl FnOnce(&mut dyn GuestWrite, VolumeId)) {
        let disk = Arc::new(FileDisk::open_rw(&self.disk).unwrap());
        let options = MountOptions::default();
        let mut writer = Box::new(EmbeddedWriter::new(disk, &layout(&self.spec), options));
        change(writer.as_mut(), volume);
        writer.close().unwrap();
    }

    fn write(&self, place: DemoVolume, path: &str, contents: &[u8]) {
        let path = GuestPath::parse(path).unwrap();
        let folder = path.parent().filter(|p| !p.is_root());
        let missing = folder.filter(|f| !self.exists(place, f));
        self.change(place, |writer, volume| {
            if let Some(folder) = missing {
                writer.create_dir(volume, &folder).unwrap();
            }
            writer.write_file(volume, &path, contents).unwrap();
        });
    }

    fn remove(&self, place: DemoVolume, path: &str) {
        let path = GuestPath::parse(path).unwrap();
        self.change(place, |writer, volume| {
            writer.remove_file(volume, &path).unwrap();
        });
    }

    fn reader(&self) -> embedded::EmbeddedReader {
        let disk = Arc::new(FileDisk::open(&self.disk).unwrap());
        embedded::open(disk, &layout(&self.spec)).unwrap()
    }

    fn exists(&self, place: DemoVolume, path: &GuestPath) -> bool {
        let info = self.reader().stat(self.volume(place), path);
        info.unwrap().is_some()
    }

    fn read(&self, place: DemoVolume, path: &str) -> Vec<u8> {
        let path = GuestPath::parse(path).unwrap();
        self.reader()
            .read(self.volume(place), &path, 64 << 20)
            .unwrap()
    }

    fn patch(&self, offset: u64, bytes: &[u8]) {
        let mut file = fs::File::options().write(true).open(&self.disk).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        file.write_all(bytes).unwrap();
    }

    fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut file = fs::File::open(&self.disk).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        let mut bytes = vec![0; len];
        file.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn hive(&self, name: &str) -> Vec<u8> {
        self.read(DemoVolume::Windows, &config(name))
    }

    fn edit_hive(&self, name: &str, edit: impl FnOnce(&mut KeyTree)) {
        let mut tree = tree(&self.hive(name));
        edit(&mut tree);
        self.write(DemoVolume::Windows, &config(name), &tree.to_bytes(name));
    }

    fn bcd_path(&self) -> &'static str {
        match self.spec.boot_role() {
            Role::Esp => "EFI\\Microsoft\\Boot\\BCD",
            _ => "Boot\\BCD",
        }
    }

    fn edit_bcd(&self, edit: impl FnOnce(&mut KeyTree)) {
        let mut tree = tree(&self.read(DemoVolume::Boot, self.bcd_path()));
        edit(&mut tree);
        let bytes = tree.to_bytes_as("BCD", Format::V1_3);
        self.write(DemoVolume::Boot, self.bcd_path(), &bytes);
    }

    fn inspect(&self) -> Value {
        h2k(["inspect", self.disk.to_str().unwrap(), "--json"])
            .expect(0)
            .json()
    }

    fn run(&self, verb: &str, more: &[&str]) -> Run {
        let iso = virtio_win().to_str().unwrap();
        let disk = self.disk.to_str().unwrap();
        let out = self.path("out");
        let mut args = vec![verb, disk, "--virtio-iso", iso, "--json"];
        args.extend(["-o", out.to_str().unwrap()]);
        args.extend(more);
        h2k(args)
    }

    /// The finding of `inspect`, after its severity, message and remedy were compared with the table.
    #[track_caller]
    fn finding(&self, id: &str) -> Value {
        let seen = self.inspect();
        let found = find(&seen["findings"], "id", id);
        let found = found.unwrap_or_else(|| panic!("no {id} in {:#}", seen["findings"]));
        rows::assert_row(id, found);
        assert_ne!(found["evidence"], "", "{id}");
        found.clone()
    }

    /// `inspect` reports it, `plan` and `convert` end with exit code 3 and the same text, and
    /// nothing is written.
    #[track_caller]
    fn refused(&self, id: &str) {
        let found = self.finding(id);
        assert_eq!(found["severity"], "blocker", "{id}");
        for verb in ["plan", "convert"] {
            rows::assert_refusal(id, &self.run(verb, &[]));
        }
        assert!(!self.path("out").exists(), "{id}");
    }

    /// `inspect` reports it, `plan` and `convert` continue, and `verify` reports the result as
    /// ready.
    #[track_caller]
    fn accepted(&self, id: &str) {
        let found = self.finding(id);
        assert_ne!(found["severity"], "blocker", "{id}");
        let (_, out) = self.converted(&[]);
        out.verify(0);
    }

    /// Plans and converts with the same verdict, and gives the report and the result as a guest to look
    /// at.
    #[track_caller]
    fn converted(&self, more: &[&str]) -> (Value, Guest) {
        let raw = ["--format", "raw", "--force"];
        let plan = self
            .run("plan", &[&raw[..], more].concat())
            .expect(0)
            .json();
        assert_eq!(plan["ready"], true, "{:#}", plan["checks"]);
        let report = self
            .run("convert", &[&raw[..], more].concat())
            .expect(0)
            .json();
        let disk = report["outputs"]["disks"][0].as_str().unwrap();
        let out = Guest {
            dir: tempfile::tempdir().unwrap(),
            disk: PathBuf::from(disk),
            spec: self.spec.clone(),
        };
        (report, out)
    }

    fn verify(&self, code: i32) -> Value {
        let disk = self.disk.to_str().unwrap();
        let controller = ["--controller", "ide", "--controller", "sata"];
        let which = match self.spec.version {
            WinVersion::Win7 | WinVersion::Xp | WinVersion::Server2003 => &controller[..2],
            _ => &controller[2..],
        };
        let mut args = vec!["verify", disk, "--json"];
        args.extend(which);
        h2k(args).expect(code).json()
    }

    #[track_caller]
    fn check(&self, id: &str, state: &str, code: i32) {
        let verdict = self.verify(code);
        let check = find(&verdict["checks"], "id", id).unwrap();
        assert_eq!(check["state"], state, "{check:#}");
    }
}

fn config(name: &str) -> String {
    format!("Windows\\System32\\config\\{name}")
}

fn tree(hive: &[u8]) -> KeyTree {
    KeyTree::from_view(&HiveView::new(hive).unwrap()).unwrap()
}

fn find<'v>(list: &'v Value, key: &str, wanted: &str) -> Option<&'v Value> {
    list.as_array()?.iter().find(|item| item[key] == wanted)
}

const SET: &str = "ControlSet001";
