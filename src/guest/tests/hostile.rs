//! Volumes with random damage: any answer is acceptable, but there must be one.

use std::time::{Duration, Instant};

use super::*;
use crate::guest::{GuestRead, GuestWrite};

/// Reads everything that is readable.
fn walk(bytes: Vec<u8>) {
    let layout = layout(0, bytes.len() as u64);
    let reader = embedded::open(Arc::new(bytes), &layout).unwrap();
    let _ = reader.free_bytes(VOLUME, u64::MAX);
    for dir in ["", "Windows", "Windows/System32"] {
        for entry in reader.list(VOLUME, &path(dir)).unwrap_or_default() {
            let Ok(file) = path(dir).join(&entry.name) else {
                continue;
            };
            let _ = reader.stat(VOLUME, &file);
            let _ = reader.read(VOLUME, &file, 4 << 20);
        }
    }
    for name in ["Windows/System32/config 7", "WINDOWS/none", "hiberfil.sys"] {
        let _ = reader.stat(VOLUME, &path(name));
        let _ = reader.read_at(VOLUME, &path(name), 1000, 100_000);
    }
}

fn survive(image: &Image, rounds: u64, metadata: &[(u64, usize)]) {
    let mut writer = image.writer();
    writer.create_dir(VOLUME, &path("Windows")).unwrap();
    writer
        .create_dir(VOLUME, &path("Windows/System32"))
        .unwrap();
    for i in 0..60 {
        let file = path("Windows/System32")
            .join(&format!("config {i}"))
            .unwrap();
        let contents = noise(i * 700, i as u64);
        writer.write_file(VOLUME, &file, &contents).unwrap();
    }
    writer.close().unwrap();
    let sound = std::fs::read(&image.file).unwrap();
    walk(sound.clone());
    let start = Instant::now();
    for seed in 0..rounds {
        let mut bytes = sound.clone();
        let dice = noise(400, seed + 1);
        for roll in dice.chunks_exact(8).take(1 + seed as usize % 40) {
            let (from, len) = metadata[usize::from(roll[0]) % metadata.len()];
            let at = u32::from_le_bytes([roll[1], roll[2], roll[3], 0]) as usize % len;
            // Small numbers and all ones are the likeliest to reveal mistakes.
            let value = [roll[4], 0, 0xff, 1, roll[4] & 7][usize::from(roll[5]) % 5];
            bytes[from as usize + at] = value;
        }
        walk(bytes);
        assert!(start.elapsed() < Duration::from_secs(120), "seed {seed}");
    }
}

#[test]
fn damaged_ntfs() {
    if !have(&["mkntfs"]) || !crate::guest::ntfs3g::is_available() {
        return;
    }
    let image = Image::ntfs(8, 512, 1024);
    let boot = crate::guest::fs::ntfs(&image.bytes(0, 512)).unwrap();
    let mft = boot.mft_lcn * u64::from(boot.cluster_size);
    survive(&image, 120, &[(11, 70), (mft, 100 << 10), (mft, 12 << 10)]);
}

#[test]
fn damaged_fat() {
    if !have(&["mkfs.fat"]) {
        return;
    }
    let image = Image::empty(8 << 20);
    run("mkfs.fat", &["-F", "16", "-s", "2", image.name()]);
    survive(&image, 25, &[(11, 50), (512, 4096), (34 << 10, 40 << 10)]);
}
