//! Checks of the hives as files (sound, closed, no log that could be replayed over them) and of the
//! control set.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

use super::{Context, Outcome};
use crate::actions::Walked;
use crate::inspect::{HiveName, Hives};
use crate::memory::FileBytes;
use crate::registry::base::BaseBlock;
use crate::registry::walk;
use crate::timeline;
use crate::ui::count;

/// Every reachable cell is valid. DRIVERS and BCD may be absent.
pub fn sound(c: &Context<'_>, hive: HiveName) -> Outcome {
    let Some(hives) = c.hives else {
        return Outcome::CouldNotRun("the hives were not read".into());
    };
    let Some(loaded) = hives.get(hive) else {
        return Outcome::Ok("there is none".into());
    };
    match &c.walks.get(&hive) {
        None => Outcome::CouldNotRun("the hive was not walked".into()),
        Some(Ok(s)) => Outcome::Ok(format!(
            "{}: {}, {}",
            loaded.path,
            count(s.keys, "key"),
            count(s.values, "value")
        )),
        Some(Err(fault)) => Outcome::Fault("the hive is not sound".into(), {
            format!("{}: {fault}", loaded.path)
        }),
    }
}

pub type Walks = BTreeMap<HiveName, Result<walk::Stats, walk::CellFault>>;

/// Walks every hive.
pub fn walk_all(hives: &Hives) -> Walks {
    walk_read_back(hives, &[])
}

/// Walks every hive that is not byte for byte equal to one that was walked before. The walks run
/// side by side, because that of a large SOFTWARE hive takes longer than all other checks.
pub fn walk_read_back(hives: &Hives, written: &[Walked]) -> Walks {
    let walked = |name: HiveName, bytes: &Arc<FileBytes>| {
        let known = written.iter().find(|w| w.hive == name);
        // A hive read back with the same bytes was walked in memory.
        let same = |w: &&Walked| Arc::ptr_eq(&w.bytes, bytes) || w.bytes == *bytes;
        match known.filter(same) {
            Some(known) => known.walk.clone(),
            None => {
                let _span = timeline::span(format!("walk {}", name.file_name()));
                walk::walk(bytes)
            }
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = HIVES
            .iter()
            .filter_map(|name| Some((*name, hives.get(*name)?)))
            .map(|(name, loaded)| (name, scope.spawn(move || walked(name, &loaded.bytes))))
            .collect();
        threads
            .into_iter()
            .map(|(name, thread)| match thread.join() {
                Ok(result) => (name, result),
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    })
}

const HIVES: [HiveName; 4] = [
    HiveName::System,
    HiveName::Software,
    HiveName::Drivers,
    HiveName::Bcd,
];

pub fn clean(c: &Context<'_>) -> Outcome {
    let Some(hives) = c.hives else {
        return Outcome::CouldNotRun("the hives were not read".into());
    };
    let mut dirty = Vec::new();
    for loaded in HIVES.iter().filter_map(|name| hives.get(*name)) {
        match BaseBlock::parse(&loaded.bytes) {
            Ok(base) if !base.is_dirty() && !loaded.replayed => {}
            _ => dirty.push(loaded.path.to_string()),
        }
    }
    if dirty.is_empty() {
        return Outcome::Ok("every hive was closed cleanly".into());
    }
    Outcome::Fault(
        "not closed cleanly: Windows replays the logs at the next start".into(),
        dirty.join(", "),
    )
}

/// An edit made over a dirty hive is lost when Windows replays its logs. Logs that are ahead of
/// their hive belong to an edit that ignored them.
pub fn logs_harmless(c: &Context<'_>) -> Outcome {
    c.findings(
        &["hive-log-lost", "hive-stale"],
        "no log is ahead of its hive",
    )
}

/// `Select\Current` does not count: the boot loader sets it.
pub fn control_sets(c: &Context<'_>) -> Outcome {
    let fine = |windows: &crate::inspect::WindowsFacts| {
        let sets = windows.control_sets.join(", ");
        format!("{} boots, of {sets}", windows.control_set)
    };
    match (&c.inspection.windows, c.hives) {
        (Some(windows), Some(_)) => c.findings(&["default-control-set"], &fine(windows)),
        _ => Outcome::CouldNotRun("the SYSTEM hive was not read".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::GuestPath;
    use crate::inspect::LoadedBytes;
    use crate::registry::KeyTree;

    /// A walk counts only for the same bytes: another hive of that name is walked.
    #[test]
    fn only_what_is_byte_for_byte_what_was_walked_is_not_walked_again() {
        let hive = |value| {
            let mut tree = KeyTree::new("ROOT");
            tree.dword("Key", "value", value);
            tree.to_bytes("SYSTEM")
        };
        let loaded = |bytes: Vec<u8>| LoadedBytes {
            path: GuestPath::root(),
            bytes: Arc::new(bytes.into()),
            replayed: false,
            logs: Vec::new(),
        };
        let hives = Hives {
            system: loaded(hive(1)),
            software: loaded(hive(1)),
            drivers: None,
            bcd: None,
        };
        let fault = walk::CellFault {
            offset: 9,
            structure: "cell",
            expected: "told before".into(),
            actual: String::new(),
        };
        let walked = |name, bytes: &[u8]| Walked {
            hive: name,
            bytes: Arc::new(bytes.to_vec().into()),
            walk: Err(fault.clone()),
        };
        let written = [
            walked(HiveName::System, &hive(1)),
            walked(HiveName::Software, &hive(2)),
        ];
        let walks = walk_read_back(&hives, &written);
        assert_eq!(walks[&HiveName::System], Err(fault.clone()));
        assert!(walks[&HiveName::Software].is_ok());
    }
}
