#![no_main]
//! A small ext file system of a Linux guest with damage anywhere: its journal, extents and block maps,
//! hashed folders, symbolic links, and what is looked for on it.

use std::io::Read;
use std::sync::OnceLock;

use hyper2kvm::block::BlockRead;
use hyper2kvm::guest::VolumeId;
use hyper2kvm::linux::tree::{ExtTree, ExtVolume, Tree};
use hyper2kvm_fuzz::bounded;
use hyper2kvm_fuzz::disk::{Base, Patched, base};
use libfuzzer_sys::fuzz_target;

static EXT2: OnceLock<Base> = OnceLock::new();
static EXT4: OnceLock<Base> = OnceLock::new();
static JOURNAL: OnceLock<Base> = OnceLock::new();
const LIMIT: u64 = 1 << 20;

fn look(tree: &ExtTree, path: &str, depth: usize, budget: &mut usize) {
    for name in tree.list(path).unwrap_or_default() {
        if *budget == 0 {
            return;
        }
        *budget -= 1;
        assert!(
            !matches!(&*name, "" | "." | "..") && !name.contains('/'),
            "{name:?}"
        );
        let child = format!("{}/{name}", path.trim_end_matches('/'));
        if let Ok(Some(file)) = tree.open(&child, LIMIT) {
            let mut bytes = Vec::new();
            let _ = file.take(2 * LIMIT).read_to_end(&mut bytes);
            assert!(bytes.len() as u64 <= LIMIT);
        } else if depth < 5 {
            look(tree, &child, depth + 1, budget);
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, input)) = input.split_first() else {
        return;
    };
    bounded(|| {
        let base = match kind % 3 {
            0 => base(&EXT2, "ext2.gz"),
            1 => base(&EXT4, "ext4.gz"),
            _ => base(&JOURNAL, "ext4-journal.gz"),
        };
        let disk = Patched::new(base, input);
        let size = disk.size();
        let Ok(volume) = ExtVolume::open(0, VolumeId::new(0), disk, (0, size), None) else {
            return;
        };
        let _ = (volume.uuid(), volume.label(), volume.has("/etc/fstab"));
        let tree = ExtTree::new(volume);
        look(&tree, "/", 0, &mut 100);
        for link in ["/etc/os-release", "/etc/loop", "/etc/up", "/etc/host"] {
            let _ = tree.text(link);
        }
    });
});
