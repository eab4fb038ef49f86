//! Switches off what the old hypervisor left behind, as `drivers/tools.yaml` lists it.
//!
//! A service that is there gets Start=4. One that is a class filter leaves the filter lists first: a
//! disabled filter of the disk classes stops the boot with 0x7B.

use serde::Deserialize;

use crate::registry::hive::HiveError;
use crate::registry::{HiveView, RegData, RegOp};

use super::{HiveName, Inputs, Layout};

const TOOLS: &str = include_str!("../../drivers/tools.yaml");
const RUN: [&str; 2] = [
    r"Microsoft\Windows\CurrentVersion\Run",
    r"Wow6432Node\Microsoft\Windows\CurrentVersion\Run",
];
const DISABLED: u32 = 4;
/// More is a damaged or hostile hive.
const MAX_CLASSES: usize = 1024;

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
}

/// The table is part of the program and checked by a test.
fn tools() -> Vec<Tool> {
    serde_yaml::from_str(TOOLS).unwrap_or_default()
}

/// Adds the edits to `layout`, on top of those it has already.
pub fn old_hypervisor(
    inputs: &Inputs<'_>,
    sets: &[String],
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
            let key = format!("{set}\\Services\\{service}");
            let installed = match system.key(&key)? {
                Some(key) => key.dword("Type")?.is_some() && key.dword("Start")?.is_some(),
                None => false,
            };
            if installed {
                ops.push(RegOp::set(key, "Start", RegData::Dword(DISABLED)));
            }
        }
    }
    let run = layout.edits.entry(HiveName::Software).or_default();
    for key in RUN {
        run.extend(
            tools
                .iter()
                .flat_map(|t| &t.run)
                .map(|name| RegOp::DeleteValue {
                    key: key.to_string(),
                    name: name.clone(),
                }),
        );
    }
    Ok(())
}

fn without_filters(
    system: &HiveView<'_>,
    set: &str,
    filters: &[&String],
    ops: &mut Vec<RegOp>,
) -> Result<(), HiveError> {
    let Some(classes) = system.key(&format!("{set}\\Control\\Class"))? else {
        return Ok(());
    };
    for class in classes.keys()?.into_iter().take(MAX_CLASSES) {
        let path = format!("{set}\\Control\\Class\\{}", class.name()?);
        for list in ["UpperFilters", "LowerFilters"] {
            // An edit planned before this one is what the list will be.
            let planned = ops.iter().rev().find_map(|op| match op {
                RegOp::Set {
                    key,
                    name,
                    data: RegData::MultiSz(names),
                } if key.eq_ignore_ascii_case(&path) && name == list => Some(names.clone()),
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
                    key: path.clone(),
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
        let tools: Vec<Tool> = serde_yaml::from_str(TOOLS).unwrap();
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
    fn filters_leave_their_lists() {
        let multi = |n: &[&str]| RegData::MultiSz(n.iter().map(ToString::to_string).collect());
        let mut tree = KeyTree::new("ROOT");
        let hdc = r"CS\Control\Class\{4d36e96a-e325-11ce-bfc1-08002be10318}";
        let disk = r"CS\Control\Class\{4d36e967-e325-11ce-bfc1-08002be10318}";
        tree.set(hdc, "UpperFilters", multi(&["XENFILT"]))
            .set(disk, "UpperFilters", multi(&["partmgr", "xenfilt", "dead"]))
            .set(disk, "LowerFilters", multi(&["other"]));
        let bytes = tree.to_bytes("SYSTEM");
        let view = HiveView::new(&bytes).unwrap();
        let repaired = RegOp::set(disk, "UpperFilters", multi(&["partmgr", "xenfilt"]));
        let mut ops = vec![repaired];
        without_filters(&view, "CS", &[&"xenfilt".to_string()], &mut ops).unwrap();
        ops.remove(0);
        ops.sort_by_key(|op| op.key().to_string());
        assert_eq!(
            ops,
            [
                RegOp::set(disk, "UpperFilters", multi(&["partmgr"])),
                RegOp::DeleteValue {
                    key: hdc.into(),
                    name: "UpperFilters".into()
                },
            ]
        );
    }
}
