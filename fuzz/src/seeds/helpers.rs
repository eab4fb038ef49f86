//! What the helpers of ours may send, heads of volumes, and hives of a guest.

use hyper2kvm_fuzz::disk::Base;
use hyper2kvm_fuzz::guest::{Demo, KINDS, VERSIONS};

use crate::{Result, Seeds};

/// Frames of the confined writer: length, kind, fields.
fn child(seeds: &Seeds) -> Result<()> {
    let frame = |kind: u8, fields: &[u64], bytes: &[u8]| {
        let mut body: Vec<u8> = fields.iter().flat_map(|f| f.to_le_bytes()).collect();
        body.extend(bytes);
        let mut frame = (body.len() as u32).to_le_bytes().to_vec();
        frame.push(kind);
        frame.extend(body);
        frame
    };
    let (read, write, flush) = (
        frame(10, &[4096, 512], &[]),
        frame(11, &[0, 4], b"data"),
        frame(12, &[], &[]),
    );
    let done = frame(13, &[], &[]);
    let text = [
        &5u64.to_le_bytes()[..],
        b"/a\x1b[b",
        &3u64.to_le_bytes(),
        b"why",
    ]
    .concat();
    seeds.write(
        "child",
        "work",
        &[&read[..], &write, &flush, &done].concat(),
    )?;
    seeds.write(
        "child",
        "failed",
        &[read, frame(14, &[3, 2], &text)].concat(),
    )?;
    seeds.write("child", "outside", &frame(10, &[u64::MAX - 100, 512], &[]))
}

/// The daemon's side of a conversation: greeting, export, replies in the order of the requests.
fn nbd(seeds: &Seeds) -> Result<()> {
    let mut bytes = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let option = |kind: u32, data: &[u8]| {
        let mut reply = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
        reply.extend(7u32.to_be_bytes());
        reply.extend(kind.to_be_bytes());
        reply.extend((data.len() as u32).to_be_bytes());
        reply.extend(data);
        reply
    };
    let greeting = bytes.clone();
    let info = [&[0, 0][..], &(4u64 << 20).to_be_bytes(), &[0, 0x4d]].concat();
    bytes.extend(option(3, &info));
    bytes.extend(option(1, &[]));
    let opened = bytes.clone();
    for (cookie, len) in [(1, 512), (2, 0), (3, 0), (4, 0), (6, 512 << 10)] {
        bytes.extend(0x6744_6698u32.to_be_bytes());
        bytes.extend(0u32.to_be_bytes());
        bytes.extend((cookie as u64).to_be_bytes());
        bytes.extend(vec![0; usize::min(len, 512)]);
    }
    seeds.write("nbd", "served", &bytes)?;
    seeds.write("nbd", "opened", &opened)?;
    let refused = option(0x8000_0006, b"no \x1b[31mexport");
    seeds.write("nbd", "refused", &[greeting, refused].concat())
}

/// Hives as they are, and the keys that matter to mutate.
fn hives(seeds: &Seeds) -> Result<()> {
    const NAMES: [&str; 14] = [
        "Select",
        "Interfaces",
        "NetLuidIndex",
        "StartOverride",
        "MountedDevices",
        "CurrentVersion",
        "UpperFilters",
        "CriticalDeviceDatabase",
        "DriverDatabase",
        "DeviceIds",
        "ComputerName",
        "ImagePath",
        "Objects",
        "BootOrder",
    ];
    for (v, version) in VERSIONS.iter().enumerate() {
        let demo: &'static Demo = Box::leak(Box::new(Demo::new(*version)));
        for (k, kind) in KINDS.iter().enumerate() {
            let Some(base) = demo.hive(kind) else {
                continue;
            };
            let number = (k * VERSIONS.len() + v) as u8;
            let name = format!("{version:?}-{kind}").to_lowercase();
            seeds.write("hives", &name, &[number])?;
            // Newest and oldest are enough.
            if v != 0 && v + 1 != VERSIONS.len() {
                continue;
            }
            for text in NAMES {
                let found = base
                    .bytes()
                    .windows(text.len())
                    .position(|w| w == text.as_bytes());
                let patch = found.and_then(|at| base.try_patch(at.saturating_sub(80), 120));
                if let Some(patch) = patch {
                    let input = [&[number][..], &patch].concat();
                    seeds.write("hives", &format!("{name}-{text}"), &input)?;
                }
            }
        }
    }
    Ok(())
}

fn heads(seeds: &Seeds) -> Result<()> {
    for image in ["ntfs.gz", "fat16.gz", "fat32.gz"] {
        let base = Base::load(image);
        let input = [&[0][..], &base.bytes()[..512]].concat();
        seeds.write("volume_head", image.trim_end_matches(".gz"), &input)?;
        let page = (0..base.bytes().len())
            .step_by(4096)
            .find(|at| base.bytes()[*at..].starts_with(b"RSTR"));
        if let Some(at) = page {
            let input = [&[0][..], &base.bytes()[at..at + 4096]].concat();
            seeds.write("volume_head", "log", &input)?;
        }
    }
    Ok(())
}

pub fn write(seeds: &Seeds) -> Result<()> {
    child(seeds)?;
    nbd(seeds)?;
    hives(seeds)?;
    heads(seeds)?;
    let info = r#"{"virtual-size": 1048576, "filename": "a.qcow2", "format": "qcow2", "actual-size": 200704,
        "backing-filename": "b\u001b.raw", "format-specific": {"type": "qcow2", "data": {"corrupt": false}}}"#;
    seeds.write("image_head", "info", info.as_bytes())
}
