//! The numbers of `oemN.inf`, under which Windows records the packages of its driver store.

use std::collections::BTreeSet;

use crate::drivers::package;
use crate::registry::HiveView;

use super::Result;

/// Numbers above are of a damaged or hostile record: `OemInfMap` has a bit for each up to the greatest.
const MAX_NUMBER: u32 = 65_535;

/// Assigns free `oemN.inf` numbers; a package that exists already keeps its number. A number is
/// used if any record of the guest names it, and no two packages get the same one.
pub struct OemNumbers<'a> {
    used: BTreeSet<u32>,
    given: BTreeSet<u32>,
    /// The hives with a driver database.
    hives: Vec<&'a HiveView<'a>>,
}

impl<'a> OemNumbers<'a> {
    pub fn new(
        on_disk: &BTreeSet<u32>,
        system: &'a HiveView<'a>,
        drivers: Option<&'a HiveView<'a>>,
    ) -> Result<Self> {
        let mut used = on_disk.clone();
        let hives: Vec<_> = std::iter::once(system).chain(drivers).collect();
        for hive in &hives {
            if let Some(infs) = hive.key("DriverDatabase\\DriverInfFiles")? {
                for key in infs.keys()? {
                    used.extend(oem_number(&key.name()?));
                }
            }
            if let Some(packages) = hive.key("DriverDatabase\\DriverPackages")? {
                for package in packages.keys()? {
                    let inf = package.string("")?;
                    used.extend(inf.as_deref().and_then(oem_number));
                }
            }
            if let Some(database) = hive.key("DriverDatabase")?
                && let Some(map) = database.value("OemInfMap")?
            {
                used.extend(package::oem_numbers(&map.data));
            }
        }
        Ok(Self {
            used,
            given: BTreeSet::new(),
            hives,
        })
    }

    /// The numbers of this plan's packages.
    pub fn given(&self) -> &BTreeSet<u32> {
        &self.given
    }

    /// The number of a package, by its name in the driver store.
    pub fn number_for(&mut self, store_name: &str) -> Result<u32> {
        let path = format!("DriverDatabase\\DriverPackages\\{store_name}");
        for hive in &self.hives {
            if let Some(key) = hive.key(&path)?
                && let Some(inf) = key.string("")?
                && let Some(number) = oem_number(&inf).filter(|n| *n <= MAX_NUMBER)
                && self.given.insert(number)
            {
                return Ok(number);
            }
        }
        let free = (0..).find(|n| !self.used.contains(n)).unwrap_or(0);
        self.used.insert(free);
        self.given.insert(free);
        Ok(free)
    }
}

/// The N of `oemN.inf`.
pub fn oem_number(name: &str) -> Option<u32> {
    let name = name.to_ascii_lowercase();
    name.strip_prefix("oem")?.strip_suffix(".inf")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{KeyTree, RegData};

    const DATABASE: &str = "DriverDatabase";

    /// The numbers of `stores` in a guest with these records in SYSTEM and DRIVERS.
    fn numbers(
        on_disk: &[u32],
        system: impl Fn(&mut KeyTree),
        drivers: impl Fn(&mut KeyTree),
        stores: &[&str],
    ) -> Vec<u32> {
        let hive = |name: &str, change: &dyn Fn(&mut KeyTree)| {
            let mut tree = KeyTree::new("ROOT");
            change(&mut tree);
            tree.to_bytes(name)
        };
        let (system, drivers) = (hive("SYSTEM", &system), hive("DRIVERS", &drivers));
        let (system, drivers) = (
            HiveView::new(&system).unwrap(),
            HiveView::new(&drivers).unwrap(),
        );
        let on_disk = on_disk.iter().copied().collect();
        let mut numbers = OemNumbers::new(&on_disk, &system, Some(&drivers)).unwrap();
        let found = stores.iter().map(|name| numbers.number_for(name).unwrap());
        let found: Vec<u32> = found.collect();
        let given: Vec<u32> = numbers.given().iter().copied().collect();
        let mut sorted = found.clone();
        sorted.sort_unstable();
        assert_eq!(given, sorted, "every number is given once");
        found
    }

    fn package(tree: &mut KeyTree, store: &str, inf: &str) {
        tree.sz(&format!("{DATABASE}\\DriverPackages\\{store}"), "", inf);
    }

    /// The number of a known package stands in its own key, even if no other record has it.
    #[test]
    fn the_number_of_a_known_package_is_given_to_no_other() {
        let known = |tree: &mut KeyTree| {
            package(tree, "a", "oem0.inf");
            package(tree, "b", "OEM1.INF");
            // Not in this plan.
            package(tree, "other", "oem3.inf");
            package(tree, "inbox", "disk.inf");
        };
        let nothing = |_: &mut KeyTree| {};
        for (stores, expected) in [
            (&["new", "a", "b", "last"][..], &[2, 0, 1, 4][..]),
            (&["a", "new", "last", "b"], &[0, 2, 4, 1]),
        ] {
            assert_eq!(numbers(&[], known, nothing, stores), expected);
            assert_eq!(numbers(&[], nothing, known, stores), expected);
        }
        // A damaged record of two packages with one number: the second gets its own.
        let twice = |tree: &mut KeyTree| {
            package(tree, "a", "oem0.inf");
            package(tree, "b", "oem0.inf");
        };
        assert_eq!(numbers(&[], twice, nothing, &["a", "b"]), [0, 1]);
        assert_eq!(numbers(&[], nothing, twice, &["b", "a"]), [0, 1]);
    }

    /// Each of these alone is enough.
    #[test]
    fn a_number_that_any_record_names_is_not_free() {
        let nothing = |_: &mut KeyTree| {};
        let inf = |tree: &mut KeyTree| {
            tree.key_mut(&format!("{DATABASE}\\DriverInfFiles\\oem0.inf"));
        };
        let map = |tree: &mut KeyTree| {
            tree.set(DATABASE, "OemInfMap", RegData::Binary(vec![0x80]));
        };
        assert_eq!(numbers(&[], nothing, nothing, &["a", "b"]), [0, 1]);
        assert_eq!(numbers(&[0, 2], nothing, nothing, &["a", "b"]), [1, 3]);
        for record in [inf as fn(&mut KeyTree), map] {
            assert_eq!(numbers(&[], record, nothing, &["a"]), [1]);
            assert_eq!(numbers(&[], nothing, record, &["a"]), [1]);
        }
        // A map with a bit for such a number would fill the memory.
        for (inf, number) in [
            ("oem65535.inf", 65535),
            ("oem65536.inf", 0),
            ("oem4294967295.inf", 0),
        ] {
            let known = |tree: &mut KeyTree| package(tree, "a", inf);
            assert_eq!(numbers(&[], known, nothing, &["a"]), [number], "{inf}");
        }
        // SYSTEM is asked first.
        let of = |inf: &'static str| move |tree: &mut KeyTree| package(tree, "a", inf);
        assert_eq!(numbers(&[7], of("oem7.inf"), of("oem8.inf"), &["a"]), [7]);
        assert_eq!(numbers(&[], of("disk.inf"), of("oem8.inf"), &["a"]), [8]);
    }

    #[test]
    fn the_name_of_an_inf_has_its_number() {
        for (name, number) in [
            ("oem0.inf", Some(0)),
            ("OEM12.Inf", Some(12)),
            ("oem.inf", None),
            ("oem1.pnf", None),
            ("oem1x.inf", None),
            ("1.inf", None),
            ("oem4294967296.inf", None),
        ] {
            assert_eq!(oem_number(name), number, "{name}");
        }
    }
}
