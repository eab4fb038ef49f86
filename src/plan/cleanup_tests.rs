//! What the old hypervisor leaves, as a whole plan takes it away.

use super::*;
use crate::convert::prepare;
use crate::demo::{GuestSpec, Leftovers, WinVersion, hives};
use crate::drivers::Catalogue;
use crate::plan::firstboot::Preferences;
use crate::plan::{Action, Options};
use crate::registry::KeyTree;
use crate::testing::{self, MemoryGuest, driver_source};
use crate::types::DiskBus;

const SETS: [&str; 2] = ["ControlSet001", "ControlSet002"];
const ID: &str = "{00000001-0000-0000-0000-000000000000}";
const PROGRAM: &str = r"C:\Program Files\VMware\VMware Tools\up.exe";

/// The edits of a hive.
fn edits(guest: &MemoryGuest, keep_tools: bool, of: HiveName) -> Vec<RegOp> {
    let (catalogue, wishes) = (Catalogue::builtin(), Preferences::default());
    let options = Options {
        keep_tools,
        ..testing::options(Some(DiskBus::Sata))
    };
    let draft = guest.look(&[], |fake, survey| {
        prepare::draft(
            survey,
            fake,
            &driver_source(),
            &catalogue,
            (options, &wishes),
        )
    });
    let actions = draft.unwrap().0.actions.into_iter();
    let found = actions.filter_map(|action| match action {
        Action::EditHive(edit) if edit.hive == of => Some(edit.edits.ops),
        _ => None,
    });
    found.flatten().collect()
}

fn guest() -> MemoryGuest {
    MemoryGuest::of(GuestSpec {
        leftovers: Leftovers::None,
        ..GuestSpec::new(WinVersion::Win10)
    })
}

/// A key with one private value is left alone: it would become a service that is half there.
#[test]
fn services_of_every_tool_are_disabled_in_both_control_sets_where_they_are_installed() {
    let all = [
        "VMTools",
        "VGAuthService",
        "vm3dservice",
        "VBoxService",
        "xenagent",
        "prl_tools",
        "xenfilt",
        "prl_strg",
    ];
    let mut guest = guest();
    for set in SETS {
        for name in all {
            let key = format!("{set}\\Services\\{name}");
            guest.system.dword(&key, "Type", 16).dword(&key, "Start", 2);
        }
        for (name, value) in [
            ("VBoxSF", "Type"),
            ("xensvc", "Start"),
            ("GISvc", "Private"),
        ] {
            guest
                .system
                .dword(&format!("{set}\\Services\\{name}"), value, 2);
        }
    }
    guest.system.dword("Select", "Current", 2);
    for keep_tools in [false, true] {
        let edits = edits(&guest, keep_tools, HiveName::System);
        let mut disabled: Vec<&str> = edits
            .iter()
            .filter_map(|op| match op {
                RegOp::Set {
                    key,
                    name,
                    data: RegData::Dword(DISABLED),
                } if name == "Start" => Some(key.as_str()),
                _ => None,
            })
            .collect();
        disabled.sort_unstable();
        let mut expected = Vec::new();
        if !keep_tools {
            for set in SETS {
                expected.extend(all.map(|name| format!("{set}\\Services\\{name}")));
            }
        }
        expected.sort_unstable();
        assert_eq!(disabled, expected);
    }
}

fn software(change: impl Fn(&mut KeyTree)) -> Vec<RegOp> {
    let mut guest = guest();
    let mut tree = hives::software_tree(&guest.spec);
    change(&mut tree);
    *guest.file("SOFTWARE") = tree.to_bytes("SOFTWARE");
    let gone = |op: &RegOp| matches!(op, RegOp::DeleteValue { .. } | RegOp::DeleteKey { .. });
    let edits = edits(&guest, false, HiveName::Software);
    edits.into_iter().filter(gone).collect()
}

/// By its name or by the directory its program lies in, below both `Run` keys. A name outside ASCII is not
/// found by every registry editor and stays.
#[test]
fn entries_that_start_a_tool_go() {
    for run in RUN {
        for (name, program, gone) in [
            ("vmware user process", "x", true),
            ("VBoxTray", "x", true),
            ("Updater", PROGRAM, true),
            (
                "Updater",
                r"c:\program files\vmware\vmware tools\UP.EXE",
                true,
            ),
            (
                "Updater",
                r"C:\Program Files\VMware\VMware Toolsx\up.exe",
                false,
            ),
            ("VMware", "x", false),
            ("Überwacher", PROGRAM, false),
        ] {
            let found = software(|tree| {
                tree.sz(run, name, program);
            });
            let op = RegOp::DeleteValue {
                key: run.into(),
                name: name.into(),
            };
            assert_eq!(
                found,
                Vec::from_iter(gone.then_some(op)),
                "{name} {program}"
            );
        }
    }
}

/// A task leaves every list of the scheduler, and only one that is surely the tool's.
#[test]
fn tasks_of_a_tool_leave_the_index() {
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (id, path, program, child, gone) in [
        (ID, r"\VMware\Update", PROGRAM, false, true),
        (ID, r"\Update", PROGRAM, false, true),
        (ID, r"\Update", r"C:\Backup\up.exe", false, false),
        // Windows' own, a directory, a path that is none, and an id that is none.
        (ID, r"\microsoft\Update", PROGRAM, false, false),
        (ID, r"\Update", PROGRAM, true, false),
        (ID, "Update", PROGRAM, false, false),
        (ID, r"\Übung", PROGRAM, false, false),
        ("task", r"\Update", PROGRAM, false, false),
    ] {
        let found = software(|tree| {
            let key = format!("{TASK_CACHE}\\Tasks\\{id}");
            tree.sz(&key, "Path", path);
            tree.set(&key, "Actions", RegData::Binary(utf16(program)));
            let node = format!("{TASK_CACHE}\\Tree{path}");
            tree.sz(&node, "Id", id);
            if child {
                tree.key_mut(&format!("{node}\\child"));
            }
            for list in TASK_LISTS {
                tree.key_mut(&format!("{TASK_CACHE}\\{list}\\{id}"));
            }
        });
        let mut keys: Vec<&str> = found.iter().map(RegOp::key).collect();
        keys.sort_unstable();
        let mut expected = Vec::new();
        if gone {
            let lists = ["Plain", "Logon", "Boot", "Maintenance", "Tasks"];
            expected.extend(lists.map(|list| format!("{TASK_CACHE}\\{list}\\{id}")));
            expected.push(format!("{TASK_CACHE}\\Tree{path}"));
        }
        expected.sort_unstable();
        assert_eq!(keys, expected, "{id} {path} {program}");
    }
    // Without a place in the tree, or without what it starts, it stays.
    assert_eq!(
        software(|tree| {
            let key = format!("{TASK_CACHE}\\Tasks\\{ID}");
            tree.sz(&key, "Path", r"\Update");
            tree.set(&key, "Actions", RegData::Binary(utf16(PROGRAM)));
        }),
        []
    );
    assert_eq!(
        software(|tree| {
            let key = format!("{TASK_CACHE}\\Tasks\\{ID}");
            tree.sz(&key, "Path", r"\Update");
            tree.sz(&format!("{TASK_CACHE}\\Tree\\Update"), "Id", ID);
        }),
        []
    );
}

/// A name too few leaves a service of the old hypervisor on, one too many switches off one of Windows.
#[test]
fn the_whole_table_of_tools() {
    let mut text = String::new();
    for tool in tools() {
        text.push_str(&format!(
            "services {:?}\nfilters {:?}\nrun {:?}\nfolders {:?}\n\n",
            tool.services, tool.filters, tool.run, tool.folders
        ));
    }
    insta::assert_snapshot!("tools", text);
}

/// UTF-16 in any case, at an even or an odd place.
#[test]
fn the_name_of_a_directory_is_found_wherever_it_stands() {
    let utf16 = |text: &str| {
        text.encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect::<Vec<_>>()
    };
    let folder = "\\VMware\\Tools\\".to_string();
    for (before, text, found) in [
        (&[][..], "C:\\vmware\\TOOLS\\x", true),
        (&[7], "\\VMware\\Tools\\", true),
        (&[], "\\VMware\\Tools", false),
        (&[], "", false),
    ] {
        let data = [before, &utf16(text)].concat();
        assert_eq!(holds(&data, &[&folder]), found, "{before:?} {text}");
        assert!(!holds(&data, &[]));
    }
    assert!(!holds(folder.as_bytes(), &[&folder]), "not UTF-16");
}

/// The places of Windows, as it names them.
#[test]
fn entries_and_tasks_are_looked_for_where_windows_has_them() {
    assert_eq!(
        RUN,
        [
            r"Microsoft\Windows\CurrentVersion\Run",
            r"Wow6432Node\Microsoft\Windows\CurrentVersion\Run",
        ]
    );
    assert_eq!(
        TASK_CACHE,
        r"Microsoft\Windows NT\CurrentVersion\Schedule\TaskCache"
    );
    assert_eq!(TASK_LISTS, ["Plain", "Logon", "Boot", "Maintenance"]);
}

/// A filter leaves the list of each control set, which keeps the rest of its own.
#[test]
fn the_filters_of_each_control_set_are_its_own() {
    let multi = |n: &[&str]| RegData::MultiSz(n.iter().map(ToString::to_string).collect());
    let class = "Control\\Class\\{4d36e967-e325-11ce-bfc1-08002be10318}";
    let mut guest = guest();
    for (set, names) in [
        (SETS[0], &["xenfilt", "partmgr"][..]),
        (SETS[1], &["disk", "xenfilt", "partmgr"]),
    ] {
        guest
            .system
            .dword(&format!("{set}\\Services\\xenfilt"), "Type", 1);
        guest
            .system
            .dword(&format!("{set}\\Services\\xenfilt"), "Start", 0);
        let key = format!("{set}\\{class}");
        guest.system.set(&key, "UpperFilters", multi(names));
    }
    guest.system.dword("Select", "Current", 2);
    let edits = edits(&guest, false, HiveName::System);
    for (set, left) in [(SETS[0], &["partmgr"][..]), (SETS[1], &["disk", "partmgr"])] {
        let op = RegOp::set(format!("{set}\\{class}"), "UpperFilters", multi(left));
        assert!(edits.contains(&op), "{op:?}");
    }
}
