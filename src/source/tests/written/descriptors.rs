//! VMDK descriptors: in a file of their own or inside an image, in every encoding. The readers of
//! the chain and of the extents parse them.

use super::*;
use crate::disk::{charset, detect, vmdk};

#[test]
fn vmdk_descriptors_are_read_as_they_were_written() {
    each(|dice| {
        let folder = Folder::new();
        let (label, alphabet) = dice.pick(&ENCODINGS);
        let (text, want) = descriptor(dice, label, alphabet);
        let utf8 = encoding_rs::Encoding::for_label(label.as_bytes()) == Some(UTF_8);
        if !utf8 && !text.is_ascii() && std::str::from_utf8(&text).is_ok() {
            return;
        }
        let (bytes, alone) = match dice.coin() {
            true => (text.clone(), true),
            false => (sparse_with(&text), false),
        };
        let path = folder.file("d.vmdk", &bytes);
        let seed = dice.seed;
        let shown = String::from_utf8_lossy(&text);
        let got = vmdk::read(&path).unwrap().unwrap();
        let names =
            |list: &[charset::Name]| list.iter().map(|n| n.text.clone()).collect::<Vec<_>>();
        let named: Vec<String> = want.extents.iter().map(|e| e.2.clone()).collect();
        let at = || format!("HYPER2KVM_CASE={seed}\n{shown}");
        assert_eq!(names(&got.extents), named, "{}", at());
        assert_eq!(got.parent.map(|n| n.text), want.parent, "{}", at());
        assert_eq!(got.content_id, Some(want.id), "{}", at());
        assert_eq!(got.parent_content_id, want.parent_id, "{}", at());
        assert_eq!(got.unreadable, want.unreadable, "{}", at());
        let file = File::open(&path).unwrap();
        let seen = detect::detect(&file, bytes.len() as u64).unwrap();
        assert_eq!(
            seen,
            detect::Detected::Image(detect::Format::VMDK),
            "{alone} {}",
            at()
        );
        let found = detect::vmdk_descriptor(&file, bytes.len() as u64)
            .unwrap()
            .unwrap();
        let found: Vec<_> = detect::parse_extents(&found)
            .into_iter()
            .map(|e| {
                (
                    e.kind,
                    e.sectors,
                    vmdk::charset(&text).decode(&e.name).0,
                    e.offset.unwrap_or(0),
                )
            })
            .collect();
        assert_eq!(found, want.extents, "{}", at());
    });
}

struct Wanted {
    /// Kind, sectors, name, offset.
    extents: Vec<(String, u64, String, u64)>,
    parent: Option<String>,
    id: u32,
    parent_id: Option<u32>,
    unreadable: Option<vmdk::Unreadable>,
}

fn descriptor(dice: &mut Dice, label: &str, alphabet: &str) -> (Vec<u8>, Wanted) {
    let (kind, raw) = dice.pick(&[
        ("monolithicSparse", false),
        ("twoGbMaxExtentFlat", false),
        ("vmfs", false),
        ("vmfsSparse", false),
        ("custom", false),
        ("vmfsRawDeviceMap", true),
        ("fullDevice", true),
    ]);
    let mut want = Wanted {
        extents: Vec::new(),
        parent: dice.maybe(|d| d.file(alphabet, 9, "vmdk")),
        id: dice.number() as u32 & 0x7fff_ffff,
        parent_id: None,
        unreadable: raw.then_some(vmdk::Unreadable::RawDevice),
    };
    want.parent_id = want
        .parent
        .as_ref()
        .map(|_| dice.number() as u32 & 0x7fff_ffff);
    let parent_id = want.parent_id.unwrap_or(u32::MAX);
    let number = |dice: &mut Dice, n: u32| match dice.coin() {
        true => format!("{n:08x}"),
        false => format!("{n:X}"),
    };
    let mut settings = vec![
        ("CID", number(dice, want.id)),
        ("parentCID", number(dice, parent_id)),
        ("createType", kind.to_owned()),
        (dice.pick(&["encoding", "ddb.encoding"]), label.to_owned()),
        ("ddb.adapterType", "lsilogic".to_owned()),
        ("ddb.longContentID", "0123".to_owned()),
    ];
    if dice.below(8) == 0 && want.unreadable.is_none() {
        settings.push(("encryptionKeys", "vmware:key/list".to_owned()));
        want.unreadable = Some(vmdk::Unreadable::Encrypted);
    }
    dice.shuffle(&mut settings);
    let mut lines = Vec::new();
    for (key, value) in settings {
        let key = match key.starts_with("ddb.") {
            true => key.to_owned(),
            false => dice.any_case(key),
        };
        let quoted = dice.coin();
        let value = if quoted {
            format!("\"{value}\"")
        } else {
            value
        };
        lines.push(format!(
            "{key}{}={}{value}{}",
            dice.gap(),
            dice.gap(),
            dice.gap()
        ));
    }
    // QEMU recognises this one by its letters.
    let hint = want
        .parent
        .as_ref()
        .map(|parent| format!("parentFileNameHint=\"{parent}\""));
    lines.extend(hint);
    for n in 0..1 + dice.below(4) as usize {
        let access = dice.pick(&["RW", "RDONLY", "NOACCESS"]);
        let gap = dice.pick(&[" ", "  ", "\t"]);
        let sectors = 1 + dice.below(1 << 40);
        if dice.below(5) == 0 {
            lines.push(format!("RW{gap}{sectors}{gap}ZERO"));
            continue;
        }
        let (kind, offset) = match dice.below(4) {
            0 => ("FLAT", Some(dice.below(1 << 20))),
            1 => ("VMFS", None),
            2 => ("SPARSE", None),
            _ => ("VMFSSPARSE", None),
        };
        let name = dice.file(alphabet, n, "vmdk");
        let end = offset.map_or(String::new(), |o| format!("{gap}{o}"));
        lines.push(format!(
            "{access}{gap}{sectors}{gap}{kind}{gap}\"{name}\"{end}"
        ));
        want.extents
            .push((kind.to_owned(), sectors, name, offset.unwrap_or(0)));
    }
    let end = dice.pick(&["\n", "\r\n"]);
    let mut text = format!("# Disk DescriptorFile{end}");
    for line in std::iter::once(format!("version={}", dice.pick(&[1, 2, 3]))).chain(lines) {
        for extra in ["# comment", ""] {
            if dice.below(4) == 0 {
                text += &format!("{extra}{end}");
            }
        }
        text += &format!("{line}{end}");
    }
    (encode(label, &text), want)
}

/// A sparse header without a capacity of its own, and the descriptor.
fn sparse_with(text: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 512];
    image[..4].copy_from_slice(b"KDMV");
    image[4] = 1;
    image[28] = 1;
    image.extend(text);
    image.resize(64 << 10, 0);
    image
}
