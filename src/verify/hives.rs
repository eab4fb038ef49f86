//! The hives as files: sound, closed, no log that could be replayed over them; and the control set.

use std::collections::BTreeMap;
use std::thread;

use super::{Context, Outcome, loaded};
use crate::inspect::Hives;
use crate::plan::model::HiveName;
use crate::registry::base::BaseBlock;
use crate::registry::walk;
use crate::ui::count;

/// Every cell that can be reached is what it should be. DRIVERS and BCD need not be there.
pub fn sound(c: &Context<'_>, hive: HiveName) -> Outcome {
    let Some(hives) = c.hives else {
        return Outcome::CouldNotRun("the hives were not read".into());
    };
    let Some(loaded) = loaded(hives, hive) else {
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

pub type Walks = BTreeMap<HiveName, Result<walk::Stats, walk::Fault>>;

/// Side by side: the walk of a large SOFTWARE hive takes longer than all the other checks.
pub fn walk_all(hives: &Hives) -> Walks {
    thread::scope(|scope| {
        let threads: Vec<_> = HIVES
            .iter()
            .filter_map(|name| Some((*name, loaded(hives, *name)?)))
            .map(|(name, loaded)| (name, scope.spawn(|| walk::walk(&loaded.bytes))))
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
    for loaded in HIVES.iter().filter_map(|name| loaded(hives, *name)) {
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

/// An edit made over a dirty hive is lost when Windows replays its logs, and logs that are ahead of
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
