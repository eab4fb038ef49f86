//! libhivex applies the edits exactly, and its result equals that of `hivexregedit` with their
//! text.

use std::process::Command;

use super::{HiveEditError, edited, is_available};
use crate::registry::differences::deep_eq;
use crate::registry::hive::{HiveView, Value};
use crate::registry::second_reader::{self, Kept};
use crate::registry::walk::walk;
use crate::registry::{KeyTree, RegData, RegEdits, RegOp};
use crate::skip::{corpus, have, skip};

const PREFIX: &str = "HKEY_LOCAL_MACHINE\\SYSTEM";
/// The most data of one cell.
const SEGMENT: usize = 16344;

fn ready() -> bool {
    if !have(&["hivexregedit"]) {
        return false;
    }
    if !is_available() {
        skip("libhivex", "no libhivex");
    }
    is_available()
}

fn delete_value(key: &str, name: &str) -> RegOp {
    RegOp::DeleteValue {
        key: key.into(),
        name: name.into(),
    }
}

fn delete_key(key: &str) -> RegOp {
    RegOp::DeleteKey { key: key.into() }
}

fn edits(ops: Vec<RegOp>) -> RegEdits {
    RegEdits {
        ops,
        ..RegEdits::new(PREFIX)
    }
}

/// A hive with a key of every kind that the edits touch.
fn model() -> KeyTree {
    let mut tree = KeyTree::new("ROOT");
    for n in 0..600 {
        tree.dword(&format!("Set001\\Services\\svc{n:03}"), "Start", n);
    }
    let data = (0..SEGMENT).map(|i| i as u8).collect();
    tree.sz("Set001\\Services\\viostor", "", "default")
        .dword("Set001\\Services\\viostor", "Start", 3)
        .dword("Set001\\Services\\viostor", "Type", 1)
        .set("Set001\\Services\\viostor", "Long", RegData::Binary(data))
        .sz("Set001\\Services\\viostor\\Enum", "0", "PCI\\VEN_1AF4")
        .dword("Set001\\Services\\old\\StartOverride", "0", 3)
        .dword("Set001\\Services\\old\\Deep\\Deeper", "x", 3)
        .dword("Last\\Only", "x", 1);
    tree.set_value(
        "Odd",
        "type",
        Value {
            ty: 0xffff_0012,
            data: vec![1, 2, 3, 4, 5],
        },
    );
    tree.set("Odd", "empty", RegData::Binary(Vec::new()));
    tree
}

/// Every kind of operation and of data; names in another case than in the hive.
fn all_kinds() -> RegEdits {
    let svc = "Set001\\services\\VIOSTOR";
    let multi = RegData::MultiSz(vec!["x".into(), "y z".into()]);
    edits(vec![
        RegOp::set(svc, "START", RegData::Dword(0)),
        RegOp::set(svc, "", RegData::Sz("C:\\a \"b\"".into())),
        RegOp::set(
            svc,
            "ImagePath",
            RegData::ExpandSz("%SystemRoot%\\x".into()),
        ),
        RegOp::set(svc, "Text", RegData::Sz("\u{fc}\u{20ac}".into())),
        delete_value(svc, "type"),
        delete_value(svc, "not there"),
        delete_key("Set001\\Services\\OLD\\startoverride"),
        delete_key("Set001\\Services\\not there"),
        delete_key("Last\\Only"),
        RegOp::set(
            "Set001\\Services\\old",
            "b",
            RegData::Binary(vec![0, 1, 0xff]),
        ),
        RegOp::set("Set001\\Services\\old\\Deep", "n", RegData::None(vec![9])),
        RegOp::set("Set001\\Services\\svc299x\\New\\Deep", "m", multi),
        RegOp::set("Odd", "e", RegData::MultiSz(Vec::new())),
        RegOp::CreateKey {
            key: "Set001\\Services\\svc300".into(),
        },
        RegOp::CreateKey {
            key: "Quite\\New".into(),
        },
        // Deleted and created again.
        delete_key("Set001\\Services\\svc100"),
        RegOp::set("Set001\\Services\\svc100", "again", RegData::Dword(1)),
        // The same value twice, and one that is deleted again.
        RegOp::set("Twice", "v", RegData::Dword(1)),
        RegOp::set("Twice", "V", RegData::Dword(2)),
        RegOp::set("Twice", "w", RegData::Dword(3)),
        delete_value("Twice", "w"),
    ])
}

fn same(a: &[u8], b: &[u8]) {
    let differences = deep_eq(&HiveView::new(a).unwrap(), &HiveView::new(b).unwrap());
    assert_eq!(differences.unwrap(), []);
}

/// The hive after `hivexregedit --merge` of the edits' text.
fn by_hivexregedit(hive: &[u8], edits: &RegEdits) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (file, text) = (dir.path().join("SYSTEM"), dir.path().join("x.reg"));
    std::fs::write(&file, hive).unwrap();
    std::fs::write(&text, edits.to_reg_text()).unwrap();
    #[expect(
        clippy::disallowed_methods,
        reason = "a second reader, run by tests only"
    )]
    let mut command = Command::new("hivexregedit");
    let args = ["--merge", "--prefix", &edits.prefix];
    let output = command.args(args).args([&file, &text]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    std::fs::read(&file).unwrap()
}

/// Verifies an edited hive in three ways: by the tree with the same edits or `hivexregedit`, by
/// `nt-hive`, and by the walk.
fn verified(hive: &[u8], edits: &RegEdits) -> Vec<u8> {
    let result = edited(hive, edits).unwrap();
    walk(&result).unwrap();
    second_reader::verify(&result, edits).unwrap();
    Kept::of(hive, edits).unwrap().check(&result).unwrap();
    same(&by_hivexregedit(hive, edits), &result);
    result
}

#[test]
fn every_kind_of_edit_is_what_the_reg_text_says() {
    if !ready() {
        return;
    }
    let mut tree = model();
    let hive = tree.to_bytes("SYSTEM");
    let edits = all_kinds();
    let result = edited(&hive, &edits).unwrap();
    walk(&result).unwrap();
    same(&by_hivexregedit(&hive, &edits), &result);
    edits.apply(&mut tree);
    same(&tree.to_bytes("SYSTEM"), &result);
    Kept::of(&hive, &edits).unwrap().check(&result).unwrap();
    // For Windows the hive was closed cleanly.
    assert_eq!(result[4..8], result[8..12]);
}

#[test]
fn real_hives_are_edited_as_hivexregedit_does() {
    for (file, set, other) in [
        (
            "win10-vmware/SYSTEM",
            "ControlSet001\\Services",
            "DriverDatabase",
        ),
        (
            "win7-x86-vmware/SOFTWARE",
            "Microsoft\\Windows\\CurrentVersion",
            "Classes",
        ),
    ] {
        if !ready() {
            return;
        }
        let Some(hive) = corpus(file) else {
            return;
        };
        let ops = vec![
            RegOp::set(format!("{set}\\viostor"), "Start", RegData::Dword(0)),
            RegOp::set(
                format!("{set}\\viostor\\Parameters\\P"),
                "5",
                RegData::Dword(1),
            ),
            RegOp::set(set.to_uppercase(), "x", RegData::Sz("y".into())),
            delete_key(&format!("{set}\\msahci\\StartOverride")),
            delete_key(&format!("{set}\\Run")),
            RegOp::set(other, "x", RegData::Binary(vec![1; SEGMENT])),
        ];
        verified(&hive, &edits(ops));
    }
}

/// Windows sorts by upper case, where `_` is behind the letters, and would not find a key
/// elsewhere.
#[test]
fn new_keys_are_in_the_order_windows_needs() {
    if !ready() {
        return;
    }
    let names = ["aZb", "a_b", "aab", "A^c", "a&b", "aZ_", "azz", "a", "b_"];
    for added in names {
        let mut tree = KeyTree::new("R");
        for name in names.iter().filter(|name| **name != added) {
            tree.dword(&format!("S\\{name}"), "x", 1);
        }
        let key = format!("S\\{added}");
        let edits = edits(vec![RegOp::set(&key, "x", RegData::Dword(1))]);
        verified(&tree.to_bytes("SYSTEM"), &edits);
    }
}

/// hivexregedit finds no such name, and would make a second one.
#[test]
fn names_outside_ascii_are_found_in_any_case() {
    if !ready() {
        return;
    }
    let mut tree = KeyTree::new("R");
    tree.dword("Gr\u{fc}n\\\u{20ac}", "\u{c4}x", 1)
        .dword("Gr\u{fc}n\\\u{20ac}", "other", 1);
    let hive = tree.to_bytes("SYSTEM");
    let edits = edits(vec![
        RegOp::set("GR\u{dc}N\\\u{20ac}", "\u{e4}X", RegData::Dword(2)),
        delete_value("Gr\u{fc}n\\\u{20ac}", "OTHER"),
    ]);
    let result = edited(&hive, &edits).unwrap();
    edits.apply(&mut tree);
    same(&tree.to_bytes("SYSTEM"), &result);
}

#[test]
fn a_deletion_makes_nothing() {
    if !ready() {
        return;
    }
    let hive = model().to_bytes("SYSTEM");
    let edits = edits(vec![
        delete_value("Not there\\Below", "x"),
        delete_key("Not there either"),
    ]);
    same(&hive, &edited(&hive, &edits).unwrap());
}

#[test]
fn what_is_no_hive_is_an_error() {
    if !ready() {
        return;
    }
    let hive = model().to_bytes("SYSTEM");
    let one = edits(vec![RegOp::set("A", "x", RegData::Dword(1))]);
    let mut no_bin = hive.clone();
    no_bin[4096] = b'x';
    let mut checksum = hive.clone();
    checksum[508] ^= 1;
    for bad in [&[][..], &hive[..4096], &no_bin, &checksum] {
        let error = edited(bad, &one).unwrap_err();
        assert!(matches!(error, HiveEditError::Library(_)), "{error}");
        assert!(error.to_string().contains("opening the hive"), "{error}");
    }
    let nul = edits(vec![RegOp::set("A\0B", "x", RegData::Dword(1))]);
    assert!(edited(&hive, &nul).is_err());
    let root = edits(vec![delete_key("")]);
    assert!(edited(&hive, &root).is_err());
}
