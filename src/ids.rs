//! One space of identifiers for findings, blockers and checks.
//!
//! `inspect`, `plan`, `convert`, `verify` and `--accept` use the same names for the same facts. The
//! table has the risk of each if a conversion continues despite it. Every identifier in the code is
//! in the table once; a test reads the source.

use crate::error::{Blocker, Error, Result};

/// The use of an identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `findings[].id` of `inspect`; with severity "blocker" also a blocker of `plan`.
    Finding,
    /// `blockers[].code` of `plan` and `convert`.
    Blocker,
    /// `checks[].id` of `verify`.
    Check,
    /// A finding and the check that fails because of it.
    FindingAndCheck,
}

/// The risk of a conversion that continues nevertheless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stake {
    /// Windows may not start: `--accept` permits it.
    Start,
    /// Data is lost or stale.
    Data(&'static str),
    /// The conversion cannot continue.
    NoWay(&'static str),
    /// Nothing: it never stops a conversion.
    Nothing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id {
    pub id: &'static str,
    pub kind: Kind,
    pub stake: Stake,
    /// The remedy for a failed check; the remedies of findings are in `inspect::findings`, and a
    /// blocker has its own.
    pub remedy: &'static str,
}

const fn finding(id: &'static str, stake: Stake) -> Id {
    Id {
        id,
        kind: Kind::Finding,
        stake,
        remedy: "",
    }
}

const fn blocker(id: &'static str, stake: Stake) -> Id {
    Id {
        kind: Kind::Blocker,
        ..finding(id, stake)
    }
}

const fn check(id: &'static str, stake: Stake, remedy: &'static str) -> Id {
    Id {
        kind: Kind::Check,
        remedy,
        ..finding(id, stake)
    }
}

const START: Stake = Stake::Start;
const NOTHING: Stake = Stake::Nothing;
const UNWRITTEN: Stake =
    Stake::Data("Windows or the journal of its volume has changes that are not on the disk yet");
const HALF: Stake = Stake::Data("a part of a larger whole would be changed without the rest");
const DAMAGED: Stake = Stake::Data("an edit of a damaged hive loses what cannot be read");
const UNREAD: Stake = Stake::NoWay("Windows cannot be read, so it cannot be prepared");
const NO_WINDOWS: Stake = Stake::NoWay("there is no Windows to convert");
const WHICH: Stake = Stake::NoWay("it must be known which installation is meant");
const NO_DRIVER: Stake = Stake::NoWay("there is no driver to install");
const NO_VM: Stake = Stake::NoWay("the VM cannot be described this way");
const BY_CHKDSK: &str =
    "start the guest on its old host, run chkdsk C: /f, and shut it down completely";
const BY_CONVERT: &str = "hyper2kvm convert makes the drivers start at boot";
const BY_REPAIR: &str = "repair Windows on its old host (sfc /scannow, or a repair installation)";

/// Sorted by kind, then by subject.
pub const IDS: &[Id] = &[
    // The volume.
    finding("volume-hibernated", UNWRITTEN),
    finding("volume-cached", UNWRITTEN),
    finding("volume-dirty", UNWRITTEN),
    finding("volume-dirty-forced", NOTHING),
    finding("volume-unreadable", NOTHING),
    finding("data-volume-hibernated", NOTHING),
    finding("data-volume-dirty", NOTHING),
    finding("bitlocker", UNREAD),
    finding("bitlocker-converting", UNREAD),
    finding("bitlocker-opened", NOTHING),
    finding("bitlocker-suspended", NOTHING),
    finding("bitlocker-data", NOTHING),
    finding("luks", UNREAD),
    finding("dynamic-disk", HALF),
    finding("storage-spaces", HALF),
    finding("refs", UNREAD),
    finding("refs-data", NOTHING),
    finding("efs", UNREAD),
    finding("compact-os", NOTHING),
    finding("compressed-volume", NOTHING),
    finding("vss-snapshots", NOTHING),
    // The hives.
    finding("hive-replayed", NOTHING),
    finding("hive-stale", NOTHING),
    finding("hive-log-lost", NOTHING),
    finding("hive-damaged", DAMAGED),
    finding("hive-missing", UNREAD),
    // Booting.
    finding("no-boot-manager", START),
    finding("boot-manager-damaged", START),
    Id {
        kind: Kind::FindingAndCheck,
        remedy: "hyper2kvm convert copies Windows' boot manager there",
        ..finding("uefi-fallback", START)
    },
    finding("boot-files-elsewhere", NOTHING),
    finding("firmware-both", NOTHING),
    finding("active-partition", NOTHING),
    finding("gpt-blank-entry", NOTHING),
    finding("boot-sector-hidden", NOTHING),
    finding("boot-sector-heads", NOTHING),
    finding("boot-sector-geometry", NOTHING),
    finding("no-bcd", START),
    finding("no-boot-ini", NOTHING),
    finding("boot-ini-device", START),
    finding("bcd-damaged", NOTHING),
    finding("bcd-no-default", NOTHING),
    finding("bcd-transient", NOTHING),
    finding("bcd-device", START),
    finding("bcd-loader", START),
    finding("bcd-loader-firmware", NOTHING),
    finding("bcd-other-windows", NOTHING),
    finding("bcd-text-mode", NOTHING),
    finding("ems-com1", NOTHING),
    finding("debug-com1", NOTHING),
    finding("default-control-set", START),
    // Windows.
    finding("pending-updates", NOTHING),
    finding("pending-reboot", NOTHING),
    finding("pending-renames", NOTHING),
    finding("setup-in-progress", NOTHING),
    finding("device-install-policy", NOTHING),
    finding("antivirus", NOTHING),
    finding("cluster-node", NOTHING),
    finding("domain-controller", NOTHING),
    finding("vbs-mandatory", NOTHING),
    // No Windows to convert.
    finding("linux", NO_WINDOWS),
    finding("no-windows", NO_WINDOWS),
    finding("no-partition-table", NO_WINDOWS),
    finding("empty-disk", NO_WINDOWS),
    finding("no-file-system", NO_WINDOWS),
    finding("unknown-windows", UNREAD),
    finding("unknown-architecture", UNREAD),
    finding("no-control-set", UNREAD),
    // Linux.
    finding(
        "linux-arch",
        Stake::NoWay("VMs with another processor than x86 are not described"),
    ),
    finding("linux-encrypted", UNREAD),
    finding("linux-hibernated", UNWRITTEN),
    finding("linux-not-clean", NOTHING),
    finding("linux-root-unread", UNREAD),
    finding("linux-no-boot-loader", NOTHING),
    finding("linux-device-name", NOTHING),
    finding("linux-interface-name", NOTHING),
    finding("linux-free-space", NOTHING),
    finding("no-linux", Stake::NoWay("there is no Linux to convert")),
    finding("several-linux", WHICH),
    // Blockers of a conversion.
    blocker("several-windows", WHICH),
    blocker(
        "newer-link",
        Stake::Data("what was written since would be lost"),
    ),
    blocker(
        "suspended",
        Stake::Data("what the VM had in memory would be lost"),
    ),
    blocker("boot-driver-missing", START),
    blocker("boot-driver-damaged", START),
    blocker("boot-driver-file", START),
    blocker("boot-driver-start", START),
    blocker("bootstrap-unbound", START),
    blocker("virtio-unbound", START),
    blocker("windows-not-in-catalogue", NO_DRIVER),
    blocker("driver-missing", NO_DRIVER),
    blocker("driver-not-signed", NO_DRIVER),
    blocker("driver-signature", START),
    blocker("driver-inf-unusable", NO_DRIVER),
    blocker("driver-package-incomplete", NO_DRIVER),
    blocker("driver-wrong-image", NO_DRIVER),
    blocker("driver-media-unreadable", NO_DRIVER),
    blocker("storage-driver", NO_DRIVER),
    blocker("storage-sata", NO_DRIVER),
    blocker(
        "path-taken",
        Stake::Data("a directory of the guest is where a driver file belongs"),
    ),
    blocker("volume-unsafe", UNWRITTEN),
    blocker("hive-value-large", UNWRITTEN),
    blocker("guest-arch", NO_VM),
    blocker("sector-size", NO_VM),
    blocker("too-many-disks", NO_VM),
    blocker("emit-limit", NO_VM),
    blocker(
        "guest-space",
        Stake::NoWay("a volume of the guest has no room for what is written to it"),
    ),
    blocker(
        "output-space",
        Stake::NoWay("the output directory has no room for the disks"),
    ),
    blocker("linux-in-place", Stake::Data("it could not be undone")),
    blocker(
        "linux-distribution",
        Stake::NoWay("no program here makes this distribution ready"),
    ),
    blocker(
        "virt-v2v-missing",
        Stake::NoWay("the program that converts the guest is missing"),
    ),
    blocker(
        "sync-nothing-frozen",
        Stake::NoWay("a running VM writes to all of the disk"),
    ),
    blocker(
        "sync-disks-changed",
        Stake::Data("the copies are of other disks"),
    ),
    blocker(
        "sync-base-changed",
        Stake::Data("nothing shows what changed since the last pass"),
    ),
    blocker(
        "sync-no-bitmap",
        Stake::Data("nothing shows what changed since the last pass"),
    ),
    blocker(
        "sync-bitmap-late",
        Stake::Data("the dirty bitmap does not show all that changed"),
    ),
    blocker(
        "sync-over-budget",
        Stake::NoWay("the last pass would take longer than it may"),
    ),
    blocker(
        "copy-later",
        Stake::NoWay("the disk cannot stay where it is"),
    ),
    blocker(
        "source-changed",
        Stake::Data("an overlay over something else is no disk"),
    ),
    blocker(
        "foreign-domain",
        Stake::Data("a domain of the same name belongs to someone else"),
    ),
    blocker(
        "vm-runs",
        Stake::Data("two of one VM would run at the same time"),
    ),
    blocker(
        "linux-rehearsal",
        Stake::NoWay("nothing in a Linux guest reports that it is up"),
    ),
    // Checks: before Windows.
    check(
        "firmware",
        START,
        "name the disk that starts the VM, or all of its disks",
    ),
    check(
        "boot-manager",
        START,
        "rebuild the boot files with bcdboot from a Windows recovery disk",
    ),
    check(
        "partition-table",
        NOTHING,
        "mark exactly the system partition active (diskpart)",
    ),
    check(
        "boot-sector",
        NOTHING,
        "convert with --repair-bcd, or run bootsect /nt60 ALL (NT 6) or fixboot (XP)",
    ),
    check(
        "bcd",
        START,
        "convert with --repair-bcd, or run bcdboot from a Windows recovery disk",
    ),
    check(
        "windows-found",
        NO_WINDOWS,
        "name the disk Windows is installed on",
    ),
    check("volume-clean", NOTHING, BY_CHKDSK),
    check("no-blockers", START, "the findings have their remedies"),
    // Checks: the hives.
    check("system-hive-sound", DAMAGED, BY_CHKDSK),
    check("software-hive-sound", DAMAGED, BY_CHKDSK),
    check("drivers-hive-sound", NOTHING, BY_CHKDSK),
    check(
        "bcd-hive-sound",
        NOTHING,
        "rebuild the boot files with bcdboot from a Windows recovery disk",
    ),
    check("hives-clean", NOTHING, "hyper2kvm convert replays the logs"),
    check(
        "logs-harmless",
        NOTHING,
        "if the guest still runs elsewhere, shut it down from inside and convert again",
    ),
    check(
        "control-sets",
        START,
        "start the guest on its old host with the last known good configuration, and shut it down",
    ),
    // Checks: the contents of the hives.
    check("boot-path", START, BY_CONVERT),
    check("controller-bound", START, BY_CONVERT),
    check("controller-service", START, BY_CONVERT),
    check("controller-image", START, BY_REPAIR),
    check("transitional-ids", NOTHING, BY_CONVERT),
    check("bus-drivers", START, BY_CONVERT),
    check("volume-drivers", START, BY_CONVERT),
    check("kernel-files", START, BY_REPAIR),
    check("class-filters", START, BY_CONVERT),
    check("idle-settings", NOTHING, BY_REPAIR),
    check("device-instances", NOTHING, BY_REPAIR),
    check("device-filters", NOTHING, BY_REPAIR),
    check("critical-boot-services", NOTHING, BY_REPAIR),
    check("boot-services", NOTHING, BY_REPAIR),
    check("storage-rivals", NOTHING, BY_REPAIR),
    // Checks: of a fix and of a copy.
    check(
        "files-as-planned",
        Stake::Data("what was written is not what was planned"),
        "convert again; when it fails again, check the storage of this host",
    ),
    check(
        "registry-as-planned",
        Stake::Data("what was written is not what was planned"),
        "convert again; when it fails again, check the storage of this host",
    ),
    check(
        "copy-identical",
        Stake::Data("the copy differs from the source"),
        "convert again; when it fails again, check the storage of this host",
    ),
    // Checks: Linux.
    check("linux-readable", UNREAD, "see the findings of inspect"),
];

/// The entry of an identifier.
pub fn find(id: &str) -> Option<&'static Id> {
    IDS.iter().find(|entry| entry.id == id)
}

/// The remedy for a failed check.
pub fn remedy(check: &str) -> &'static str {
    find(check).map_or("", |entry| entry.remedy)
}

/// The identifiers of `--accept`, each of which exists and can be accepted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accepted(Vec<&'static str>);

impl Accepted {
    pub fn parse<S: AsRef<str>>(names: &[S]) -> Result<Self> {
        let mut accepted = Vec::new();
        for name in names {
            let name = name.as_ref();
            let Some(entry) = find(name) else {
                return Err(unknown(name));
            };
            let why = match entry.stake {
                Stake::Data(why) | Stake::NoWay(why) => why,
                Stake::Start | Stake::Nothing => {
                    if !accepted.contains(&entry.id) {
                        accepted.push(entry.id);
                    }
                    continue;
                }
            };
            return Err(Error::usage(format!("{name} cannot be accepted: {why}"))
                .hint("--accept is for what may only keep Windows from starting; hyper2kvm docs guests has the list")
                .hint("hyper2kvm plan shows the remedy"));
        }
        Ok(Self(accepted))
    }

    pub fn has(&self, id: &str) -> bool {
        self.0.contains(&id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.0.iter().copied()
    }

    /// Moves accepted blockers out of `blockers`.
    pub fn take(&self, blockers: &mut Vec<Blocker>) -> Vec<Blocker> {
        let (taken, left) = std::mem::take(blockers)
            .into_iter()
            .partition(|b| self.has(&b.code));
        *blockers = left;
        taken
    }
}

fn unknown(name: &str) -> Error {
    let near = near(name);
    let error = Error::usage(format!("there is no finding, blocker or check {name}"));
    if near.is_empty() {
        return error.hint("hyper2kvm docs guests lists what can be accepted");
    }
    error.hint(format!("near it: {}", near.join(", ")))
}

const MAX_NEAR: usize = 5;

/// Acceptable identifiers similar to this one, the nearest first.
fn near(name: &str) -> Vec<&'static str> {
    let wanted: String = name
        .to_lowercase()
        .replace('_', "-")
        .chars()
        .take(64)
        .collect();
    let mut ranked: Vec<(usize, &'static str)> = IDS
        .iter()
        .map(|entry| (distance(&wanted, entry.id), entry.id))
        .filter(|(far, id)| {
            let shares = wanted
                .split('-')
                .any(|part| part.len() > 2 && id.split('-').any(|known| known == part));
            shares || *far <= 3
        })
        .collect();
    ranked.sort_unstable();
    ranked
        .into_iter()
        .take(MAX_NEAR)
        .map(|(_, id)| id)
        .collect()
}

/// The Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = i;
        let mut left = i + 1;
        for (j, y) in b.iter().enumerate() {
            let above = row.get(j + 1).copied().unwrap_or(usize::MAX);
            let best = (corner + usize::from(x != *y))
                .min(left + 1)
                .min(above.saturating_add(1));
            corner = above;
            if let Some(slot) = row.get_mut(j) {
                *slot = left;
            }
            left = best;
        }
        if let Some(last) = row.last_mut() {
            *last = left;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn each_identifier_is_in_the_table_once() {
        let mut seen = BTreeSet::new();
        for entry in IDS {
            assert!(seen.insert(entry.id), "{} is there twice", entry.id);
            let checked = matches!(entry.kind, Kind::Check | Kind::FindingAndCheck);
            assert_eq!(checked, !entry.remedy.is_empty(), "{}", entry.id);
        }
    }

    /// Calls whose string argument is an identifier of that kind.
    const MAKERS: [(&str, &[Kind]); 2] = [
        (
            "Blocker::new(",
            &[Kind::Blocker, Kind::Finding, Kind::Check],
        ),
        (" check(", &[Kind::Check, Kind::FindingAndCheck]),
    ];

    fn sources(folder: &Path, found: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path.display().to_string(), text));
            }
        }
    }

    #[test]
    fn the_code_uses_no_other_identifiers() {
        let mut files = Vec::new();
        sources(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
            &mut files,
        );
        let mut used = BTreeSet::new();
        for (path, text) in &files {
            let text = text.split("#[cfg(test)]").next().unwrap();
            for (maker, kinds) in MAKERS {
                if maker == " check(" && path.contains("/cli/") {
                    continue;
                }
                for made in text.split(maker).skip(1) {
                    let Some(id) = made.trim_start().strip_prefix('"') else {
                        continue;
                    };
                    let id = id.split('"').next().unwrap();
                    let entry = find(id).unwrap_or_else(|| panic!("{path}: {id} is not in IDS"));
                    assert!(kinds.contains(&entry.kind), "{path}: {id}");
                    used.insert(entry.id);
                }
            }
        }
        // Identifiers created in other ways are in the code as strings too.
        let everything: String = files
            .iter()
            .filter(|(path, _)| !path.ends_with("/ids.rs"))
            .map(|(_, text)| text.as_str())
            .collect();
        for entry in IDS.iter().filter(|e| !used.contains(e.id)) {
            let quoted = format!("\"{}\"", entry.id);
            assert!(everything.contains(&quoted), "nothing makes {}", entry.id);
        }
    }

    /// Messages change: the page of symptoms refers to ids, which must be in the table.
    #[test]
    fn the_symptoms_are_named_by_ids_that_exist() {
        let page = include_str!("../docs/troubleshooting.md");
        let (_, own) = page.split_once("## hyper2kvm itself").unwrap();
        let (own, _) = own.split_once("\n## ").unwrap();
        let mut named = 0;
        for row in own.lines().filter(|l| l.starts_with("| `")) {
            let symptom = row.split('|').nth(1).unwrap();
            for span in symptom.split('`').skip(1).step_by(2) {
                let id = span.trim_matches(['[', ']']);
                if id.chars().all(|c| c.is_ascii_lowercase() || c == '-') {
                    assert!(find(id).is_some(), "{row}");
                    named += 1;
                }
            }
        }
        assert!(named >= 8, "{named}");
    }

    /// `docs/guests.md` lists what can be accepted; `HYPER2KVM_UPDATE=1` writes the list.
    #[test]
    fn the_document_lists_what_can_be_accepted() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/guests.md");
        let text = std::fs::read_to_string(&path).unwrap();
        let of = |kinds: &[Kind]| {
            let entries = IDS.iter().filter(|e| kinds.contains(&e.kind));
            let start = entries.filter(|e| e.stake == Stake::Start);
            start
                .map(|e| format!("`{}`", e.id))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let list = format!(
            "| kind | identifiers |\n|---|---|\n| findings | {} |\n| blockers of `plan` | {} |\n| checks | {} |\n",
            of(&[Kind::Finding, Kind::FindingAndCheck]),
            of(&[Kind::Blocker]),
            of(&[Kind::Check]),
        );
        let (head, rest) = text.split_once("<!-- acceptable -->\n").unwrap();
        let (found, tail) = rest.split_once("<!-- /acceptable -->").unwrap();
        if std::env::var_os("HYPER2KVM_UPDATE").is_some() {
            let new = format!("{head}<!-- acceptable -->\n{list}<!-- /acceptable -->{tail}");
            std::fs::write(&path, new).unwrap();
            return;
        }
        assert_eq!(found, list, "HYPER2KVM_UPDATE=1 writes it");
    }

    #[test]
    fn what_can_be_accepted() {
        let parse = |names: &[&str]| Accepted::parse(names);
        let accepted = parse(&["boot-path", "no-boot-manager", "boot-path"]).unwrap();
        assert_eq!(
            accepted.iter().collect::<Vec<_>>(),
            ["boot-path", "no-boot-manager"]
        );
        for id in [
            "volume-dirty",
            "volume-hibernated",
            "volume-cached",
            "hive-damaged",
            "dynamic-disk",
            "files-as-planned",
            "copy-identical",
            "system-hive-sound",
            "driver-missing",
            "bitlocker",
        ] {
            let error = parse(&[id]).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Usage, "{id}");
            assert!(error.message.contains("cannot be accepted: "), "{id}");
        }
    }

    #[test]
    fn what_is_near_an_unknown_one() {
        for (name, first) in [
            ("no-bootmanager", "no-boot-manager"),
            ("bootpath", "boot-path"),
            ("bcd_device", "bcd-device"),
            ("volume-driver", "volume-drivers"),
        ] {
            let error = Accepted::parse(&[name]).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Usage);
            let hint = error.hints.join(" ");
            let near = hint.strip_prefix("near it: ").unwrap();
            assert_eq!(near.split(", ").next(), Some(first), "{name}: {hint}");
        }
        let far = Accepted::parse(&["xyzzy-quux-999"]).unwrap_err();
        assert!(far.hints[0].contains("hyper2kvm docs guests"));
    }

    #[test]
    fn distances() {
        for (a, b, n) in [
            ("", "", 0),
            ("a", "", 1),
            ("kitten", "sitting", 3),
            ("ab", "ba", 2),
        ] {
            assert_eq!(distance(a, b), n, "{a} {b}");
            assert_eq!(distance(b, a), n, "{b} {a}");
        }
    }
}
