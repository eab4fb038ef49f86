#![no_main]
//! A small FAT volume with damage anywhere, read and then written to.

use std::panic;
use std::sync::{Once, OnceLock};

use hyper2kvm::guest::embedded;
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{EmbeddedWriter, FileKind, GuestPath, GuestRead, GuestWrite, VolumeId};
use hyper2kvm::linux::efi;
use hyper2kvm_fuzz::bounded;
use hyper2kvm_fuzz::disk::{Base, Patched, bare, base};
use libfuzzer_sys::fuzz_target;

static FAT16: OnceLock<Base> = OnceLock::new();
static FAT32: OnceLock<Base> = OnceLock::new();
/// `fatfs` panics on some damage, and our engine catches that; the hook of the fuzzer would abort.
/// A panic that nothing catches still ends the run.
static HOOK: Once = Once::new();
const VOLUME: VolumeId = VolumeId::new(0);

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
        let _ = reader.read(VOLUME, &child, 1 << 20);
        if entry.kind == FileKind::Dir && depth < 4 {
            look(reader, &child, depth + 1, budget);
        }
    }
}

fn path(text: &str) -> GuestPath {
    GuestPath::parse(text).expect("a path")
}

fuzz_target!(|input: &[u8]| {
    HOOK.call_once(|| panic::set_hook(Box::new(|_| {})));
    let Some((kind, input)) = input.split_first() else {
        return;
    };
    bounded(|| {
        let base = match kind & 1 {
            0 => base(&FAT16, "fat16.gz"),
            _ => base(&FAT32, "fat32.gz"),
        };
        let disk = Patched::new(base, input);
        if let Ok(reader) = embedded::open(disk.clone(), &bare()) {
            look(&reader, &GuestPath::root(), 0, &mut 60);
            let _ = efi::find(&[&reader], "debian");
        }
        if kind & 2 == 0 {
            return;
        }
        let mut writer = Box::new(EmbeddedWriter::new(disk, &bare(), MountOptions::default()));
        let _ = writer.create_dir(VOLUME, &path("EFI/BOOT"));
        let _ = writer.write_file(VOLUME, &path("EFI/BOOT/BOOTX64.EFI"), &[7; 9000]);
        let _ = writer.write_file(VOLUME, &path("EFI/Microsoft/Boot/bootmgfw.efi"), &[8; 3000]);
        let _ = writer.patch_file(VOLUME, &path("EFI/BOOT/BOOTX64.EFI"), 10, &[]);
        let _ = writer.remove_file(VOLUME, &path("EFI/BOOT/BOOTX64.EFI"));
        let _ = writer.close();
    });
});
