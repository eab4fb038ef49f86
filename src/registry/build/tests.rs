//! Hives built by hyper2kvm, read by other programs and crates.

use std::path::Path;
use std::process::Command;

use super::super::differences::deep_eq;
use super::super::edit::{RegEdits, RegOp};
use super::super::walk::walk;
use super::*;

/// A tree with every special case of the format.
fn sample() -> KeyTree {
    let mut tree = KeyTree::new("SAMPLE");
    tree.sz("", "", "default of the root");
    for size in [
        0, 1, 3, 4, 5, 8, 16343, 16344, 16345, 32688, 32689, 50_000, 300_000,
    ] {
        let data = (0..size).map(|i| (i % 251) as u8).collect();
        tree.set("Data", &format!("b{size}"), RegData::Binary(data));
    }
    tree.set_value(
        "Data",
        "odd type",
        Value {
            ty: 0xffff_0012,
            data: vec![1, 2, 3, 4, 5],
        },
    );
    for i in 0..1203 {
        tree.dword(&format!("Many\\sub{i:05}"), "", i);
    }
    // Upper case sorts `_` after `Z`; lower case would put it before `a`.
    for name in [
        "a_b",
        "aZb",
        "AAB",
        "a^b",
        "a",
        "a~",
        "Gr\u{fc}n",
        "\u{65e5}\u{672c}",
    ] {
        tree.sz(&format!("Order\\{name}"), name, name);
    }
    tree.set("Deep", "m", RegData::MultiSz(vec!["x".into(), "y".into()]));
    tree.key_mut(&vec!["d"; 100].join("\\"));
    tree.key_mut(&"n".repeat(255));
    tree.key_mut("Empty");
    tree
}

#[test]
fn the_own_reader_and_nt_hive_read_it_back() {
    for format in [Format::V1_3, Format::V1_5] {
        let mut tree = sample();
        if format == Format::V1_3 {
            // Before 1.4 there is no big data; nt-hive looks for it in every format.
            tree.remove("Data");
        }
        let bytes = tree.to_bytes_as("SAMPLE", format);
        walk(&bytes).unwrap();
        let view = HiveView::new(&bytes).unwrap();
        assert!(KeyTree::from_view(&view).unwrap() == tree);
        let reader = nt_hive::Hive::new(bytes.as_slice()).unwrap();
        assert_same(&reader.root_key_node().unwrap(), &tree);
        // nt-hive uses binary search, so a wrong order would lose keys.
        let order = reader.root_key_node().unwrap().subkey("ORDER").unwrap();
        for key in tree.get("Order").unwrap().keys.values() {
            let found = order.as_ref().unwrap().subkey(&key.name);
            assert!(found.is_some(), "{}", key.name);
        }
        assert!(bytes == tree.to_bytes_as("SAMPLE", format), "deterministic");
    }
}

fn assert_same(node: &nt_hive::KeyNode<'_, &[u8]>, tree: &KeyTree) {
    assert_eq!(node.name().unwrap().to_string_lossy(), tree.name);
    let mut values = Vec::new();
    for value in node.values().into_iter().flat_map(Result::unwrap) {
        let value = value.unwrap();
        let data = value.data().unwrap().into_vec().unwrap();
        values.push((value.name().unwrap().to_string_lossy(), data));
    }
    let expected = tree.values.iter().map(|(n, v)| (n.clone(), v.data.clone()));
    assert!(values == expected.collect::<Vec<_>>(), "{}", tree.name);
    let mut count = 0;
    for child in node.subkeys().into_iter().flat_map(Result::unwrap) {
        let child = child.unwrap();
        let name = child.name().unwrap().to_string_lossy();
        assert_same(&child, tree.get(&name).unwrap());
        count += 1;
    }
    assert_eq!(count, tree.keys.len());
}

proptest::proptest! {
    /// Any tree can be read back, and its hive is sound.
    #[test]
    fn any_tree_comes_back(
        keys in proptest::collection::vec("[ -\\[\\]-~\u{a1}-\u{17f}]{1,40}", 0..40),
        values in proptest::collection::vec(
            (
                0usize..40,
                "[ -~\u{a1}-\u{3ff}]{0,20}",
                proptest::num::u32::ANY,
                proptest::collection::vec(proptest::num::u8::ANY, 0..40),
            ),
            0..60
        ),
    ) {
        let mut tree = KeyTree::new("R");
        for (i, key) in keys.iter().enumerate() {
            // Some of them below an earlier one.
            let parent = if i % 3 == 0 { "" } else { keys[i / 2].as_str() };
            tree.key_mut(&format!("{parent}\\{key}"));
        }
        for (key, name, ty, data) in values {
            let key = keys.get(key).map_or("", String::as_str);
            tree.set_value(key, &name, Value { ty, data });
        }
        let bytes = tree.to_bytes("R");
        walk(&bytes).unwrap();
        let view = HiveView::new(&bytes).unwrap();
        assert!(KeyTree::from_view(&view).unwrap() == tree);
        for key in keys.iter().step_by(3) {
            assert!(view.key(key).unwrap().is_some(), "{key}");
        }
    }
}

#[test]
fn names() {
    assert_eq!(fold("stra\u{df}e\u{fc}"), "STRA\u{df}E\u{dc}");
    // The hash stored for this key in a Windows 10 SYSTEM hive.
    assert_eq!(name_hash("Select"), 0x5f00_24a0);
    let mut tree = sample();
    assert!(tree.get("mAnY\\SUB00007").is_some());
    assert!(tree.value("data", "B5").is_some());
    assert!(tree.remove("many\\sub00007").is_some());
    assert!(tree.get("Many\\sub00007").is_none());
    assert!(tree.remove("no\\such").is_none() && tree.get("no").is_none());
}

#[test]
fn hivexregedit_reads_it_and_merges_into_it() {
    if !have_hivexregedit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let hive = dir.path().join("SYSTEM");
    let mut tree = sample();
    std::fs::write(&hive, tree.to_bytes("SYSTEM")).unwrap();
    assert_exported(&hive, &tree);

    let mut edits = RegEdits::new("HKEY_LOCAL_MACHINE\\SYSTEM");
    for i in 0..300 {
        let key = format!("Many\\sub{i:05}x");
        tree.dword(&key, "v", i);
        edits.ops.push(RegOp::set(key, "v", RegData::Dword(i)));
    }
    let text = RegData::ExpandSz("%SystemRoot%\\x".into());
    tree.set("Order\\a_b", "e", text.clone());
    edits.ops.push(RegOp::set("Order\\a_b", "e", text));
    tree.remove("Data");
    edits.ops.push(RegOp::DeleteKey { key: "Data".into() });
    let reg = dir.path().join("edits.reg");
    std::fs::write(&reg, edits.to_reg_text()).unwrap();
    run(hivexregedit()
        .args(["--merge", "--prefix", &edits.prefix])
        .args([&hive, &reg]));

    let merged = std::fs::read(&hive).unwrap();
    walk(&merged).unwrap();
    let expected = tree.to_bytes("SYSTEM");
    let differences = deep_eq(
        &HiveView::new(&expected).unwrap(),
        &HiveView::new(&merged).unwrap(),
    );
    assert_eq!(differences.unwrap(), []);
}

/// Windows sorts by upper case, where `_` is behind the letters. It would not find a key that an
/// editor put elsewhere, and the walk detects that.
#[test]
fn hivexregedit_keeps_the_order_windows_needs() {
    if !have_hivexregedit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let hive = dir.path().join("SYSTEM");
    let reg = dir.path().join("edits.reg");
    let names = ["aZb", "a_b", "aab", "A^c", "a&b", "aZ_", "azz", "a", "b_"];
    // Every name is the one added once.
    for added in names {
        let mut tree = KeyTree::new("R");
        for name in names.iter().filter(|name| **name != added) {
            tree.dword(&format!("S\\{name}"), "x", 1);
        }
        std::fs::write(&hive, tree.to_bytes("SYSTEM")).unwrap();
        let mut edits = RegEdits::new("HKEY_LOCAL_MACHINE\\SYSTEM");
        let key = format!("S\\{added}");
        edits.ops.push(RegOp::set(&key, "x", RegData::Dword(1)));
        std::fs::write(&reg, edits.to_reg_text()).unwrap();
        run(hivexregedit()
            .args(["--merge", "--prefix", &edits.prefix])
            .args([&hive, &reg]));
        let merged = std::fs::read(&hive).unwrap();
        walk(&merged).unwrap_or_else(|e| panic!("{added}: {e}"));
        let view = HiveView::new(&merged).unwrap();
        assert!(view.key(&key).unwrap().is_some());
    }
}

#[allow(clippy::disallowed_methods)] // A second reader, run by tests only.
fn hivexregedit() -> Command {
    Command::new("hivexregedit")
}

fn have_hivexregedit() -> bool {
    crate::skip::have(&["hivexregedit"])
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    // Names in Latin-1 are returned as stored, other names as UTF-8.
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The export must have exactly the keys and values of the tree.
fn assert_exported(hive: &Path, tree: &KeyTree) {
    let text = run(hivexregedit()
        .args(["--export", "--prefix", "P"])
        .arg(hive)
        .arg("\\"));
    let mut exported: Vec<&str> = text.lines().skip(1).filter(|l| !l.is_empty()).collect();
    exported.sort_unstable();
    let mut expected = Vec::new();
    expect_lines(tree, "P", &mut expected);
    // The root key has a trailing backslash in this tool's output.
    expected.retain(|line| line != "[P]");
    expected.push("[P\\]".into());
    expected.sort();
    assert_eq!(exported.len(), expected.len());
    for (exported, expected) in exported.iter().zip(&expected) {
        assert_eq!(exported, expected);
    }
}

fn expect_lines(tree: &KeyTree, path: &str, lines: &mut Vec<String>) {
    lines.push(format!("[{path}]"));
    for (name, value) in &tree.values {
        let name = match name.as_str() {
            "" => "@".to_string(),
            name => format!("\"{}\"", name.replace('\u{fc}', "\u{fffd}")),
        };
        let data: Vec<String> = value.data.iter().map(|b| format!("{b:02x}")).collect();
        lines.push(match value.as_dword() {
            Some(n) => format!("{name}=dword:{n:08x}"),
            None => format!("{name}=hex({:x}):{}", value.ty, data.join(",")),
        });
    }
    for key in tree.keys.values() {
        let name = key.name.replace('\u{fc}', "\u{fffd}");
        expect_lines(key, &format!("{path}\\{name}"), lines);
    }
}
