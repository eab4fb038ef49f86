//! Determines the service that Windows gives a PCI device at boot. Up to NT 6.1 the
//! CriticalDeviceDatabase names it, from NT 6.2 on the DriverDatabase of the SYSTEM hive.

use crate::bytes::le64;
use crate::registry::HiveView;
use crate::registry::error::Result;
use crate::registry::hive::Key;
use crate::types::{ControlSet, PciId};

/// The result of a lookup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    pub service: String,
    /// The hardware id that decided.
    pub id: String,
    /// The origin of the binding, for people: the INF, or the name of the database.
    pub origin: String,
    /// The device class that the binding assigns, as a key name.
    pub class: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    Bound(Binding),
    /// No service is bound to the device; `staged` are the INFs that name it without a binding.
    Unbound {
        staged: Vec<String>,
        /// Entries of the CriticalDeviceDatabase with a driver but no class, which Windows skips.
        without_class: Vec<String>,
    },
}

/// Looks in `<ControlSet>\Control\CriticalDeviceDatabase`.
pub fn critical_device(
    system: &HiveView<'_>,
    control_set: &ControlSet,
    device: &PciId,
) -> Result<Lookup> {
    let names = device.ids().into_iter().map(|id| (format!("PCI#{id}"), id));
    critical_service(system, control_set, names)
}

/// The same lookup in any list of (key name, id).
pub fn critical_service(
    system: &HiveView<'_>,
    control_set: &ControlSet,
    names: impl IntoIterator<Item = (String, String)>,
) -> Result<Lookup> {
    let mut without_class = Vec::new();
    if let Some(database) = system.key(&control_set.key("Control\\CriticalDeviceDatabase"))? {
        for (name, id) in names {
            let Some(entry) = database.key(&name)? else {
                continue;
            };
            let Some(service) = entry.string("Service")?.filter(|s| !s.is_empty()) else {
                continue;
            };
            let class = entry.string("ClassGUID")?.filter(|s| !s.is_empty());
            if class.is_none() {
                without_class.push(name);
                continue;
            }
            return Ok(Lookup::Bound(Binding {
                service,
                id,
                origin: "CriticalDeviceDatabase".into(),
                class,
            }));
        }
    }
    Ok(Lookup::Unbound {
        staged: Vec::new(),
        without_class,
    })
}

/// Looks in `DriverDatabase`. The first id that any bound package contains decides; of several
/// packages for one id, the newest does.
pub fn driver_database(system: &HiveView<'_>, device: &PciId) -> Result<Lookup> {
    let (bound, staged) = candidates(system, device)?;
    let mut best: Option<(Rank, Binding)> = None;
    for (rank, binding) in bound {
        if best.as_ref().is_none_or(|(other, _)| rank > *other) {
            best = Some((rank, binding));
        }
    }
    Ok(match best {
        Some((_, binding)) => Lookup::Bound(binding),
        None => Lookup::Unbound {
            staged,
            without_class: Vec::new(),
        },
    })
}

/// Every driver that is bound to the deciding id, in stored order.
pub fn rivals(system: &HiveView<'_>, device: &PciId) -> Result<Vec<Binding>> {
    let (bound, _) = candidates(system, device)?;
    Ok(bound.into_iter().map(|(_, binding)| binding).collect())
}

type Ranked = Vec<(Rank, Binding)>;

/// The packages bound to the first id that any of them contains, and the INFs that are only staged.
fn candidates(system: &HiveView<'_>, device: &PciId) -> Result<(Ranked, Vec<String>)> {
    let (mut bound, mut staged) = (Vec::new(), Vec::new());
    let Some(database) = system.key("DriverDatabase")? else {
        return Ok((bound, staged));
    };
    let ids = device.ids();
    let Some(device_ids) = database.key("DeviceIds\\PCI")? else {
        return Ok((bound, staged));
    };
    for id in &ids {
        let Some(entry) = device_ids.key(id)? else {
            continue;
        };
        for (inf, _) in entry.values()?.into_iter().take(MAX_INFS) {
            if inf.is_empty() {
                continue;
            }
            let Some((rank, service, class)) = bound_service(&database, &inf, id, &ids)? else {
                if !staged.contains(&inf) {
                    staged.push(inf);
                }
                continue;
            };
            let binding = Binding {
                service,
                id: id.clone(),
                origin: inf,
                class,
            };
            bound.push((rank, binding));
        }
        if !bound.is_empty() {
            break;
        }
    }
    Ok((bound, staged))
}

/// The most INFs read for one id; real ids are in a handful of INFs.
const MAX_INFS: usize = 256;

/// DriverVer date (FILETIME), then version.
type Rank = (u64, u64);

fn bound_service(
    database: &Key<'_>,
    inf: &str,
    id: &str,
    ids: &[String],
) -> Result<Option<(Rank, String, Option<String>)>> {
    let Some(file) = child(database, "DriverInfFiles", inf)? else {
        return Ok(None);
    };
    let Some(active) = file.string("Active")? else {
        return Ok(None);
    };
    let Some(package) = child(database, "DriverPackages", &active)? else {
        return Ok(None);
    };
    let Some(descriptor) = package.key(&format!("Descriptors\\PCI\\{id}"))? else {
        return Ok(None);
    };
    let Some(name) = descriptor.string("Configuration")? else {
        return Ok(None);
    };
    let Some(configuration) = child(&package, "Configurations", &name)? else {
        return Ok(None);
    };
    let excluded = configuration.multi("ExcludeIds")?.unwrap_or_default();
    let is_excluded = excluded.iter().any(|e| {
        ids.iter()
            .any(|id| e.eq_ignore_ascii_case(&format!("PCI\\{id}")))
    });
    if is_excluded {
        return Ok(None);
    }
    let service = configuration.string("Service")?.filter(|s| !s.is_empty());
    let (rank, class) = match package.value("Version")? {
        Some(version) => {
            let number = |at| le64(&version.data, at).unwrap_or_default();
            ((number(24), number(32)), class_of(&version.data))
        }
        None => ((0, 0), None),
    };
    Ok(service.map(|service| (rank, service, class)))
}

/// The class GUID in a package's `Version`, after the first eight bytes.
fn class_of(version: &[u8]) -> Option<String> {
    let guid = uuid::Uuid::from_slice_le(version.get(8..24)?).ok()?;
    (!guid.is_nil()).then(|| guid.braced().to_string())
}

/// The subkey with a name read from the hive: one key, never a path.
fn child<'h>(parent: &Key<'h>, folder: &str, name: &str) -> Result<Option<Key<'h>>> {
    if name.is_empty() || name.contains('\\') {
        return Ok(None);
    }
    parent.key(&format!("{folder}\\{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{KeyTree, RegData};

    #[test]
    fn ids_most_specific_first() {
        let virtio = PciId {
            vendor: 0x1af4,
            device: 0x1042,
            subsystem: 0x1100_1af4,
            revision: 1,
            class: 0x01_0000,
        };
        assert_eq!(
            virtio.ids(),
            [
                "VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01",
                "VEN_1AF4&DEV_1042&SUBSYS_11001AF4",
                "VEN_1AF4&DEV_1042&CC_010000",
                "VEN_1AF4&DEV_1042&CC_0100",
                "VEN_1AF4&DEV_1042&REV_01",
                "VEN_1AF4&DEV_1042",
                "VEN_1AF4&CC_010000",
                "VEN_1AF4&CC_0100",
                "VEN_1AF4",
                "CC_010000",
                "CC_0100",
            ]
        );
    }

    /// Windows ranks drivers of one id by the date of `DriverVer`, then by its version.
    #[test]
    fn of_two_packages_the_later_date_decides_and_then_the_version() {
        let winner = |packages: &[(&str, u64, u64)]| {
            let mut tree = KeyTree::new("ROOT");
            let id = "VEN_1AF4&DEV_1042";
            for (name, date, version) in packages {
                let key = format!("DriverDatabase\\DriverPackages\\{name}");
                let mut data = vec![0; 48];
                data[24..32].copy_from_slice(&date.to_le_bytes());
                data[32..40].copy_from_slice(&version.to_le_bytes());
                let ids = format!("DriverDatabase\\DeviceIds\\PCI\\{id}");
                let inf = format!("{name}.inf");
                let file = format!("DriverDatabase\\DriverInfFiles\\{inf}");
                let descriptor = format!("{key}\\Descriptors\\PCI\\{id}");
                tree.set(&key, "Version", RegData::Binary(data))
                    .sz(&ids, &inf, "")
                    .sz(&file, "Active", name)
                    .sz(&descriptor, "Configuration", "i")
                    .sz(&format!("{key}\\Configurations\\i"), "Service", name);
            }
            let bytes = tree.to_bytes("SYSTEM");
            let view = HiveView::new(&bytes).unwrap();
            let [modern, ..] = crate::types::DiskBus::VirtioBlk.devices()[..] else {
                panic!("no device");
            };
            match driver_database(&view, &modern).unwrap() {
                Lookup::Bound(binding) => binding.service,
                Lookup::Unbound { .. } => String::new(),
            }
        };
        assert_eq!(winner(&[("a", 2, 1), ("b", 1, 9)]), "a");
        assert_eq!(winner(&[("b", 1, 9), ("a", 2, 1)]), "a");
        assert_eq!(winner(&[("a", 2, 1), ("b", 2, 9)]), "b");
        assert_eq!(winner(&[("b", 2, 9), ("a", 2, 1)]), "b");
    }

    /// A DriverDatabase with these packages: INF and service, id, and the version's date.
    fn database(packages: &[(&str, &str, u64)]) -> KeyTree {
        let mut tree = KeyTree::new("ROOT");
        for (service, id, date) in packages {
            let key = format!("DriverDatabase\\DriverPackages\\{service}");
            let mut data = vec![0; 48];
            data[24..32].copy_from_slice(&date.to_le_bytes());
            tree.set(&key, "Version", RegData::Binary(data))
                .sz(
                    &format!("DriverDatabase\\DeviceIds\\PCI\\{id}"),
                    service,
                    "",
                )
                .sz(
                    &format!("DriverDatabase\\DriverInfFiles\\{service}"),
                    "Active",
                    service,
                )
                .sz(
                    &format!("{key}\\Descriptors\\PCI\\{id}"),
                    "Configuration",
                    "i",
                )
                .sz(&format!("{key}\\Configurations\\i"), "Service", service);
        }
        tree
    }

    fn found(tree: &KeyTree, lookup: fn(&HiveView<'_>, &PciId) -> Result<Lookup>) -> Lookup {
        let bytes = tree.to_bytes("SYSTEM");
        let modern = crate::types::DiskBus::VirtioBlk.devices()[0];
        lookup(&HiveView::new(&bytes).unwrap(), &modern).unwrap()
    }

    fn service(found: &Lookup) -> Option<&str> {
        match found {
            Lookup::Bound(binding) => Some(&binding.service),
            Lookup::Unbound { .. } => None,
        }
    }

    const FULL: &str = "VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01";
    const SHORT: &str = "VEN_1AF4&DEV_1042";

    #[test]
    fn a_more_specific_id_decides_before_any_date() {
        for packages in [
            [("new", SHORT, 9), ("old", FULL, 1)],
            [("old", FULL, 1), ("new", SHORT, 9)],
        ] {
            let found = found(&database(&packages), driver_database);
            assert_eq!(service(&found), Some("old"));
        }
        // Of a package that is only staged the next id may still know one that is bound.
        let mut tree = database(&[("staged", FULL, 9), ("bound", SHORT, 1)]);
        tree.remove("DriverDatabase\\DriverInfFiles\\staged");
        assert_eq!(service(&found(&tree, driver_database)), Some("bound"));
    }

    /// Those bound to the deciding id, in stored order, with the class of the package.
    #[test]
    fn rivals_are_the_drivers_of_the_id_that_decides() {
        let mut tree = database(&[("b", SHORT, 1), ("a", SHORT, 9), ("c", "CC_0100", 5)]);
        let mut version = vec![0; 48];
        version[8..24].copy_from_slice(&uuid::Uuid::from_u128(7).to_bytes_le());
        let key = "DriverDatabase\\DriverPackages\\b";
        tree.set(key, "Version", RegData::Binary(version));
        tree.sz(&format!("DriverDatabase\\DeviceIds\\PCI\\{SHORT}"), "", "");
        let bytes = tree.to_bytes("SYSTEM");
        let modern = crate::types::DiskBus::VirtioBlk.devices()[0];
        let bound = |service: &str, class: Option<&str>| Binding {
            service: service.into(),
            id: SHORT.into(),
            origin: service.into(),
            class: class.map(str::to_string),
        };
        let mut found = rivals(&HiveView::new(&bytes).unwrap(), &modern).unwrap();
        found.sort_by(|x, y| x.service.cmp(&y.service));
        let class = "{00000000-0000-0000-0000-000000000007}";
        assert_eq!(found, [bound("a", None), bound("b", Some(class))]);
        tree.remove("DriverDatabase\\DeviceIds");
        let bytes = tree.to_bytes("SYSTEM");
        let found = rivals(&HiveView::new(&bytes).unwrap(), &modern).unwrap();
        assert_eq!(found, []);
    }

    /// Of two that are alike the first that is stored, and one without a version is the oldest.
    #[test]
    fn a_later_package_must_be_newer_to_win() {
        let alike = database(&[("a", SHORT, 5), ("b", SHORT, 5)]);
        assert_eq!(service(&found(&alike, driver_database)), Some("a"));
        let mut tree = database(&[("a", SHORT, 5), ("b", SHORT, 0)]);
        let mut version = vec![0; 48];
        version[32] = 1;
        let package = |name: &str| format!("DriverDatabase\\DriverPackages\\{name}");
        tree.set(&package("b"), "Version", RegData::Binary(version));
        assert_eq!(service(&found(&tree, driver_database)), Some("a"));
        tree.key_mut(&package("a")).values.clear();
        assert_eq!(service(&found(&tree, driver_database)), Some("b"));
    }

    /// An id that a package excludes is that of the device in any of its forms, in any case.
    #[test]
    fn an_excluded_id_is_only_staged() {
        let configuration = "DriverDatabase\\DriverPackages\\one\\Configurations\\i";
        for (excluded, bound) in [
            ("PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4", false),
            ("pci\\ven_1af4", false),
            ("PCI\\VEN_1AF4&DEV_1041", true),
            ("VEN_1AF4&DEV_1042", true),
        ] {
            let mut tree = database(&[("one", SHORT, 1)]);
            let list = vec!["PCI\\X".to_string(), excluded.to_string()];
            tree.set(configuration, "ExcludeIds", RegData::MultiSz(list));
            let found = service(&found(&tree, driver_database)).is_some();
            assert_eq!(found, bound, "{excluded}");
        }
    }

    /// Each link of the chain from the id to the service.
    #[test]
    fn a_package_without_a_part_is_only_staged() {
        let package = "DriverDatabase\\DriverPackages\\one";
        let configuration = format!("{package}\\Configurations\\i");
        let descriptor = format!("{package}\\Descriptors\\PCI\\{SHORT}");
        let file = "DriverDatabase\\DriverInfFiles\\one";
        let whole = database(&[("one", SHORT, 1)]);
        assert_eq!(service(&found(&whole, driver_database)), Some("one"));
        let changes: [&dyn Fn(&mut KeyTree); 9] = [
            &|tree| drop(tree.remove(file)),
            &|tree| tree.key_mut(file).values.clear(),
            &|tree| drop(tree.remove(package)),
            &|tree| drop(tree.remove(&descriptor)),
            &|tree| tree.key_mut(&descriptor).values.clear(),
            &|tree| drop(tree.remove(&configuration)),
            &|tree| tree.key_mut(&configuration).values.clear(),
            &|tree| {
                tree.sz(&configuration, "Service", "");
            },
            // A name is one key, never a path to one.
            &|tree| {
                tree.sz(file, "Active", "deep\\one");
                let moved = tree.get(package).unwrap().clone();
                let deep = "DriverDatabase\\DriverPackages\\deep\\one";
                *tree.key_mut(deep) = moved;
            },
        ];
        for (n, change) in changes.iter().enumerate() {
            let mut tree = whole.clone();
            change(&mut tree);
            let expected = Lookup::Unbound {
                staged: vec!["one".into()],
                without_class: Vec::new(),
            };
            assert_eq!(found(&tree, driver_database), expected, "change {n}");
        }
    }

    #[test]
    fn an_inf_that_names_the_device_twice_is_staged_once() {
        let mut tree = database(&[("one", SHORT, 1), ("two", SHORT, 1), ("one", FULL, 1)]);
        tree.remove("DriverDatabase\\DriverInfFiles");
        let Lookup::Unbound { staged, .. } = found(&tree, driver_database) else {
            panic!();
        };
        assert_eq!(staged, ["one", "two"]);
    }

    /// The class the entry puts the device in is whose filters count; an entry without a service is none.
    #[test]
    fn an_entry_of_the_critical_device_database_names_service_and_class() {
        let look: fn(&HiveView<'_>, &PciId) -> Result<Lookup> =
            |system, device| critical_device(system, &ControlSet::new(1), device);
        let cdd = "ControlSet001\\Control\\CriticalDeviceDatabase\\PCI#";
        let (full, short) = (format!("{cdd}{FULL}"), format!("{cdd}{SHORT}"));
        let mut tree = KeyTree::new("ROOT");
        tree.sz(&short, "Service", "short")
            .sz(&short, "ClassGUID", "{b}");
        let class = |tree: &KeyTree| match found(tree, look) {
            Lookup::Bound(binding) => (binding.service, binding.class.unwrap()),
            other => panic!("{other:?}"),
        };
        assert_eq!(class(&tree), ("short".into(), "{b}".into()));
        for (service, class_guid) in [("", "{a}"), ("full", "")] {
            tree.sz(&full, "Service", service)
                .sz(&full, "ClassGUID", class_guid);
            assert_eq!(class(&tree).0, "short", "{service} {class_guid}");
        }
        tree.sz(&full, "ClassGUID", "{a}");
        assert_eq!(class(&tree), ("full".into(), "{a}".into()));
    }
}
