#![no_main]
//! A small NTFS volume with damage anywhere: lookups, directories, attribute lists, compressed files,
//! allocation map.

use std::sync::OnceLock;

use hyper2kvm::guest::embedded;
use hyper2kvm::guest::{FileKind, GuestPath, GuestRead, VolumeId};
use hyper2kvm_fuzz::bounded;
use hyper2kvm_fuzz::disk::{Base, Patched, bare, base};
use libfuzzer_sys::fuzz_target;

static BASE: OnceLock<Base> = OnceLock::new();
const VOLUME: VolumeId = VolumeId::new(0);
const LIMIT: u64 = 1 << 20;

fn look(reader: &dyn GuestRead, path: &GuestPath, depth: usize, budget: &mut usize) {
    for entry in reader.list(VOLUME, path).unwrap_or_default() {
        if *budget == 0 {
            return;
        }
        *budget -= 1;
        let Ok(child) = path.join(&entry.name) else {
            continue;
        };
        let _ = reader.stat(VOLUME, &child);
        if let Ok(bytes) = reader.read(VOLUME, &child, LIMIT) {
            assert!(bytes.len() as u64 <= LIMIT);
        }
        let _ = reader.read_at(VOLUME, &child, entry.size / 2, 70_000);
        if entry.kind == FileKind::Dir && depth < 4 {
            look(reader, &child, depth + 1, budget);
        }
    }
}

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        let disk = Patched::new(base(&BASE, "ntfs.gz"), input);
        let Ok(reader) = embedded::open(disk, &bare()) else {
            return;
        };
        look(&reader, &GuestPath::root(), 0, &mut 100);
        for name in [
            "hiberfil.sys",
            "Windows/System32/config 7",
            "WINDOWS/none/x",
        ] {
            let path = GuestPath::parse(name).expect("a path");
            let _ = reader.stat(VOLUME, &path);
        }
        let _ = reader.free_bytes(VOLUME, u64::MAX);
        let _ = reader.free_ranges(VOLUME, &|_| true, &mut |_| Ok(()));
    });
});
