//! Disables the remains of the old hypervisor, as listed in `drivers/tools.yaml`.
//!
//! An existing service gets Start=4. A class filter is first removed from the filter lists: a
//! disabled filter of the disk classes stops the boot with 0x7B. `Run` entries and scheduled tasks
//! are identified by the program they start. A task is removed from the index of the task
//! scheduler. Its file below `System32\Tasks` stays, so that `schtasks /create /xml` can restore
//! it.

use serde::Deserialize;

use crate::inspect::HiveName;
use crate::inspect::model::Tool as Installed;
use crate::registry::HiveError;
use crate::registry::{HiveView, RegData, RegOp};
use crate::types::{ControlSet, KeyPath};
use crate::yaml;

use super::{Inputs, Layout};

const TOOLS: &str = include_str!("../../drivers/tools.yaml");
const RUN: [&str; 2] = [
    r"Microsoft\Windows\CurrentVersion\Run",
    r"Wow6432Node\Microsoft\Windows\CurrentVersion\Run",
];
const DISABLED: u32 = 4;
/// A hive with more is damaged or hostile.
const MAX_CLASSES: usize = 1024;
const MAX_TASKS: usize = 8192;
const TASK_CACHE: &str = r"Microsoft\Windows NT\CurrentVersion\Schedule\TaskCache";
/// The lists of tasks, one for each kind of trigger.
const TASK_LISTS: [&str; 4] = ["Plain", "Logon", "Boot", "Maintenance"];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tool {
    #[expect(dead_code, reason = "for the reader of the data")]
    name: String,
    #[serde(default)]
    services: Vec<String>,
    #[serde(default)]
    filters: Vec<String>,
    #[serde(default)]
    run: Vec<String>,
    #[serde(default)]
    folders: Vec<String>,
}

/// Parses the table. It is part of the program and checked by a test.
fn tools() -> Vec<Tool> {
    yaml::parse(TOOLS).unwrap_or_default()
}

/// Adds the edits to `layout`, on top of those already there.
pub fn old_hypervisor(
    inputs: &Inputs<'_>,
    sets: &[ControlSet],
    layout: &mut Layout,
) -> Result<(), HiveError> {
    let system = HiveView::new(&inputs.hives.system.bytes)?;
    let tools = tools();
    for set in sets {
        let services = tools
            .iter()
            .flat_map(|t| t.services.iter().chain(&t.filters));
        let filters: Vec<&String> = tools.iter().flat_map(|t| &t.filters).collect();
        let ops = layout.edits.entry(HiveName::System).or_default();
        without_filters(&system, set, &filters, ops)?;
        for service in services {
            let key = set.service(service);
            let installed = match system.key(&key)? {
                Some(key) => key.dword("Type")?.is_some() && key.dword("Start")?.is_some(),
                None => false,
            };
            if installed {
                ops.push(RegOp::set(key, "Start", RegData::Dword(DISABLED)));
            }
        }
    }
    let software = HiveView::new(&inputs.hives.software.bytes)?;
    let ops = layout.edits.entry(HiveName::Software).or_default();
    let folders: Vec<&String> = tools.iter().flat_map(|t| &t.folders).collect();
    let names: Vec<&String> = tools.iter().flat_map(|t| &t.run).collect();
    without_run_entries(&software, &names, &folders, ops)?;
    without_tasks(&software, &folders, ops)
}

/// The products for `--uninstall-tools`. Hyper-V's services are part of Windows.
pub fn product_codes(installed: &[Installed]) -> Vec<uuid::fmt::Braced> {
    const OURS: [&str; 4] = [
        "vmware-tools",
        "virtualbox-additions",
        "xen-pv",
        "parallels-tools",
    ];
    let codes = installed.iter().filter(|t| OURS.contains(&t.id));
    codes
        .filter_map(|t| {
            let code = t.product_code.as_deref()?;
            uuid::Uuid::try_parse(code.trim_matches(['{', '}'])).ok()
        })
        .map(uuid::Uuid::braced)
        .collect()
}

fn without_run_entries(
    software: &HiveView<'_>,
    names: &[&String],
    folders: &[&String],
    ops: &mut Vec<RegOp>,
) -> Result<(), HiveError> {
    for run in RUN {
        let Some(key) = software.key(run)? else {
            continue;
        };
        for (name, value) in key.values()?.into_iter().take(MAX_TASKS) {
            let listed = names.iter().any(|n| n.eq_ignore_ascii_case(&name));
            // hivexregedit finds no name outside ASCII: the entry stays, and starts nothing that
            // exists.
            if name.is_ascii() && (listed || holds(&value.data, folders)) {
                ops.push(RegOp::DeleteValue {
                    key: run.to_string(),
                    name,
                });
            }
        }
    }
    Ok(())
}

/// Removes tasks whose program lies in one of the directories from the scheduler's index.
fn without_tasks(
    software: &HiveView<'_>,
    folders: &[&String],
    ops: &mut Vec<RegOp>,
) -> Result<(), HiveError> {
    let cache = KeyPath::new(TASK_CACHE);
    let Some(tasks) = software.key(&cache.join("Tasks"))? else {
        return Ok(());
    };
    for task in tasks.keys()?.into_iter().take(MAX_TASKS) {
        let id = task.name()?;
        let (Some(actions), Some(path)) = (task.value("Actions")?, task.string("Path")?) else {
            continue;
        };
        let is_id = uuid::Uuid::try_parse(id.trim_matches(['{', '}'])).is_ok();
        let windows_own = path
            .get(..11)
            .is_some_and(|head| head.eq_ignore_ascii_case("\\Microsoft\\"));
        if !is_id || windows_own || !holds(&actions.data, folders) {
            continue;
        }
        let node = format!("{TASK_CACHE}\\Tree{path}");
        // A directory of tasks is never removed.
        let leaf = match software.key(&node)? {
            Some(key) => key.keys()?.is_empty(),
            None => false,
        };
        if !path.starts_with('\\') || !path.is_ascii() || !leaf {
            continue;
        }
        ops.push(RegOp::DeleteKey { key: node });
        let lists = TASK_LISTS.into_iter().chain(["Tasks"]);
        ops.extend(lists.map(|list| RegOp::DeleteKey {
            key: cache.join(list).join(&id).into(),
        }));
    }
    Ok(())
}

/// Whether UTF-16 text in `data` names one of the directories, at an even or an odd offset.
fn holds(data: &[u8], folders: &[&String]) -> bool {
    let lower = |bytes: &[u8]| -> Vec<u8> { bytes.to_ascii_lowercase() };
    let data = lower(data);
    folders.iter().any(|folder| {
        let wanted: Vec<u8> = folder.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let wanted = lower(&wanted);
        data.windows(wanted.len().max(1)).any(|w| w == wanted)
    })
}

fn without_filters(
    system: &HiveView<'_>,
    set: &ControlSet,
    filters: &[&String],
    ops: &mut Vec<RegOp>,
) -> Result<(), HiveError> {
    let Some(classes) = system.key(&set.key("Control\\Class"))? else {
        return Ok(());
    };
    for class in classes.keys()?.into_iter().take(MAX_CLASSES) {
        let path = set.key("Control\\Class").join(&class.name()?);
        for list in ["UpperFilters", "LowerFilters"] {
            // A planned edit contains the list as it will be.
            let planned = ops.iter().rev().find_map(|op| match op {
                RegOp::Set {
                    key,
                    name,
                    data: RegData::MultiSz(names),
                } if key.eq_ignore_ascii_case(&path) && name == list => Some(names.clone()),
                RegOp::DeleteValue { key, name }
                    if key.eq_ignore_ascii_case(&path) && name == list =>
                {
                    Some(Vec::new())
                }
                _ => None,
            });
            let names = match planned {
                Some(names) => names,
                None => class.multi(list)?.unwrap_or_default(),
            };
            let kept: Vec<String> = names
                .iter()
                .filter(|n| !filters.iter().any(|f| f.eq_ignore_ascii_case(n)))
                .cloned()
                .collect();
            if kept.len() == names.len() {
                continue;
            }
            ops.push(if kept.is_empty() {
                RegOp::DeleteValue {
                    key: path.clone().into(),
                    name: list.to_string(),
                }
            } else {
                RegOp::set(path.clone(), list, RegData::MultiSz(kept))
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::KeyTree;

    #[test]
    fn table() {
        let tools: Vec<Tool> = yaml::parse(TOOLS).unwrap();
        assert!(tools.len() >= 4);
        for name in tools
            .iter()
            .flat_map(|t| t.services.iter().chain(&t.filters))
        {
            let name = name.to_lowercase();
            for never in [
                "pvscsi", "vmic", "vmgid", "vmstorfl", "storvsc", "vmbus", "xenvbd", "vmxnet",
            ] {
                assert!(!name.starts_with(never), "{name}");
            }
        }
    }

    #[test]
    fn run_entries_and_tasks() {
        let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let id = |n: u8| {
            uuid::Uuid::from_bytes([n; 16])
                .braced()
                .to_string()
                .to_uppercase()
        };
        let mut tree = KeyTree::new("ROOT");
        let run = RUN[0];
        tree.sz(run, "vmware user process", "x")
            .sz(
                run,
                "Updater",
                r#""C:\PROGRAM FILES\VMware\VMWARE TOOLS\up.exe" -n"#,
            )
            .sz(
                run,
                "Workstation",
                r"C:\Program Files\VMware\VMware Workstation\vmplayer.exe",
            );
        for (n, path, program) in [
            (
                1,
                r"\VMware\Tools update",
                r"C:\Program Files\VMware\VMware Tools\up.exe",
            ),
            (
                2,
                r"\Microsoft\Windows\Copy",
                r"C:\Program Files\VMware\VMware Tools\up.exe",
            ),
            (3, r"\Backup", r"C:\Backup\VMware Tools.cmd"),
            (
                4,
                r"\Parallels",
                r"%ProgramFiles%\Parallels\Parallels Tools\prl_up.exe",
            ),
            (
                5,
                r"\Folder",
                r"C:\Program Files\Oracle\VirtualBox Guest Additions\x.exe",
            ),
        ] {
            // The scheduler's records begin with a version and lengths: text is at odd offsets too.
            let actions: Vec<u8> = [vec![3, 0, 9], utf16(program)].concat();
            let key = format!("{TASK_CACHE}\\Tasks\\{}", id(n));
            tree.sz(&key, "Path", path)
                .set(&key, "Actions", RegData::Binary(actions));
            tree.sz(&format!("{TASK_CACHE}\\Tree{path}"), "Id", &id(n));
            tree.key_mut(&format!("{TASK_CACHE}\\Plain\\{}", id(n)));
        }
        tree.key_mut(&format!(r"{TASK_CACHE}\Tree\Folder\task of another"));
        let bytes = tree.to_bytes("SOFTWARE");
        let view = HiveView::new(&bytes).unwrap();
        let tools = tools();
        let folders: Vec<&String> = tools.iter().flat_map(|t| &t.folders).collect();
        let names: Vec<&String> = tools.iter().flat_map(|t| &t.run).collect();
        let mut ops = Vec::new();
        without_run_entries(&view, &names, &folders, &mut ops).unwrap();
        let gone: Vec<String> = ops.iter().map(|op| format!("{op:?}")).collect();
        assert_eq!(ops.len(), 2, "{gone:?}");
        assert!(
            gone.iter().all(|op| !op.contains("Workstation")),
            "{gone:?}"
        );
        ops.clear();
        without_tasks(&view, &folders, &mut ops).unwrap();
        let mut gone: Vec<&str> = ops
            .iter()
            .map(|op| op.key())
            .filter(|k| k.contains("Tree") || k.contains("Tasks"))
            .map(|k| k.strip_prefix(TASK_CACHE).unwrap())
            .collect();
        gone.sort_unstable();
        let (first, fourth) = (format!(r"\Tasks\{}", id(1)), format!(r"\Tasks\{}", id(4)));
        assert_eq!(
            gone,
            [
                &first,
                &fourth,
                r"\Tree\Parallels",
                r"\Tree\VMware\Tools update"
            ]
        );
    }

    #[test]
    fn filters_leave_their_lists() {
        let multi = |n: &[&str]| RegData::MultiSz(n.iter().map(ToString::to_string).collect());
        let mut tree = KeyTree::new("ROOT");
        let hdc = r"ControlSet001\Control\Class\{4d36e96a-e325-11ce-bfc1-08002be10318}";
        let disk = r"ControlSet001\Control\Class\{4d36e967-e325-11ce-bfc1-08002be10318}";
        tree.set(hdc, "UpperFilters", multi(&["XENFILT"]))
            .set(disk, "UpperFilters", multi(&["partmgr", "xenfilt", "dead"]))
            .set(disk, "LowerFilters", multi(&["other", "xenfilt"]))
            .set(hdc, "LowerFilters", multi(&["dead", "xenfilt"]));
        let bytes = tree.to_bytes("SYSTEM");
        let view = HiveView::new(&bytes).unwrap();
        let repaired = RegOp::set(disk, "UpperFilters", multi(&["partmgr", "xenfilt"]));
        // Every entry of that list was dead: the list is deleted, and not created again.
        let emptied = RegOp::DeleteValue {
            key: hdc.into(),
            name: "LowerFilters".into(),
        };
        // Of two planned edits the later one is what the list will be.
        let first = RegOp::set(disk, "UpperFilters", multi(&["other", "xenfilt"]));
        let mut ops = vec![first, repaired, emptied];
        without_filters(
            &view,
            &ControlSet::new(1),
            &[&"xenfilt".to_string()],
            &mut ops,
        )
        .unwrap();
        ops.drain(..3);
        ops.sort_by_key(|op| op.key().to_string());
        assert_eq!(
            ops,
            [
                RegOp::set(disk, "UpperFilters", multi(&["partmgr"])),
                RegOp::set(disk, "LowerFilters", multi(&["other"])),
                RegOp::DeleteValue {
                    key: hdc.into(),
                    name: "UpperFilters".into()
                },
            ]
        );
    }
}

#[cfg(test)]
#[path = "cleanup_tests.rs"]
mod plan_tests;
