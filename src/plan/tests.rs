//! What is planned for each Windows, as text: a change of a decision shows as a change of these files.

use crate::demo::{GuestSpec, WinVersion};
use crate::domain::StorageBus;
use crate::error::Blocker;
use crate::guest::{FsKind, GuestRead, Volume};
use crate::ids::Accepted;
use crate::report::text;
use crate::testing::{self, MemoryGuest, bootstrap, media};

use super::{Action, Options, decide};

/// All but Vista, for which the medium has no drivers.
fn versions() -> impl Iterator<Item = WinVersion> {
    let all = WinVersion::ALL.into_iter();
    all.filter(|version| *version != WinVersion::Vista)
}

#[test]
fn plans_of_every_windows() {
    let media = media();
    for version in versions() {
        let guest = MemoryGuest::of(GuestSpec::new(version));
        let prepared = guest.prepare(&media, Some(bootstrap(version)));
        assert_eq!(prepared.plan.blockers, [], "{version:?}");
        insta::assert_snapshot!(
            format!("{version:?}"),
            text::plan(&prepared.plan, None).plain()
        );
    }
}

/// One Windows with an IDE bootstrap, one with the CriticalDeviceDatabase, one with the DriverDatabase.
#[test]
fn registry_edits_of_three_generations() {
    let media = media();
    for version in [WinVersion::Xp, WinVersion::Win7, WinVersion::Win10] {
        let guest = MemoryGuest::of(GuestSpec::new(version));
        let prepared = guest.prepare(&media, Some(bootstrap(version)));
        for action in &prepared.plan.actions {
            let Action::EditHive { hive, edits, .. } = action else {
                continue;
            };
            let name = format!("{version:?}-{}", hive.file_name().to_lowercase());
            insta::assert_snapshot!(name, edits.to_reg_text().replace("\r\n", "\n"));
        }
    }
}

#[test]
fn a_second_plan_has_nothing_to_do() {
    let media = media();
    for version in versions() {
        let mut guest = MemoryGuest::of(GuestSpec::new(version));
        let first = guest.prepare(&media, Some(bootstrap(version)));
        guest.apply(&first, &media);
        let second = guest.prepare(&media, Some(bootstrap(version)));
        assert_eq!(second.plan.actions, [], "{version:?}");
    }
}

#[test]
fn the_finished_plan_has_the_blockers_of_every_source() {
    let media = media();
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Xp));
    let prepared = guest.prepare_with(&media, Some(bootstrap(WinVersion::Xp)), |seen| {
        seen.options.require_signed = true;
        seen.options.storage = StorageBus::VirtioScsi;
        seen.limits
            .push(Blocker::new("guest-space", "no room", "make some"));
        Accepted::default()
    });
    let plan = prepared.plan;
    let codes: Vec<_> = plan.blockers.iter().map(|b| b.code.as_str()).collect();
    assert_eq!(codes, ["storage-driver", "driver-signature", "guest-space"]);
    assert!(!plan.ready);
}

#[test]
fn a_fault_that_was_accepted_is_a_warning_and_not_ready() {
    let media = media();
    let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    guest.without("storahci.sys");
    let sata = Some(bootstrap(WinVersion::Win10));
    let refused = guest.prepare(&media, sata).plan;
    assert_eq!(refused.blockers[0].code, "boot-driver-file");
    let accept = |codes: &[&str]| {
        let codes: Vec<String> = codes.iter().map(|code| (*code).to_string()).collect();
        let plan = guest.prepare_with(&media, sata, |_| Accepted::parse(&codes).unwrap());
        plan.plan
    };
    // By its own code, or by that of the check that fails because of it.
    for code in ["boot-driver-file", "boot-path"] {
        let plan = accept(&[code]);
        assert_eq!(plan.blockers, [], "{code}");
        assert_eq!(plan.accepted, ["boot-driver-file"], "{code}");
        assert!(plan.checks.iter().any(|c| !c.ok && c.accepted), "{code}");
        assert!(!plan.ready, "{code}");
    }
    let unused = accept(&["boot-driver-file", "transitional-ids"]);
    let last = unused.warnings.last().unwrap();
    assert!(last.contains("--accept transitional-ids"), "{last}");
}

#[test]
fn a_volume_with_a_hibernated_session_is_not_written() {
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    let codes = |force_dirty, state: fn(&mut Volume)| {
        let mut volumes = guest.look(&[], |guest, _| guest.volumes().to_vec());
        let esp = volumes.iter_mut().find(|v| v.kind == FsKind::Fat).unwrap();
        // As the boot volume of a BIOS guest.
        esp.kind = FsKind::Ntfs;
        let volume = esp.id;
        state(esp);
        let options = Options {
            force_dirty,
            ..testing::options(None)
        };
        let action = Action::PatchBootSector {
            id: "boot-sector".into(),
            title: "patch".into(),
            volume,
            fields: Vec::new(),
        };
        guest.look(&[], |_, survey| {
            let found = decide::unsafe_volumes(&[action], &options, &survey.inspection, &volumes);
            found.into_iter().map(|b| b.code).collect::<Vec<_>>()
        })
    };
    assert_eq!(codes(false, |_| {}), [""; 0]);
    assert_eq!(
        codes(true, |v| v.state.hibernated = true),
        ["volume-unsafe"]
    );
    assert_eq!(codes(true, |v| v.state.cached = true), ["volume-unsafe"]);
    assert_eq!(codes(false, |v| v.state.dirty = true), ["volume-unsafe"]);
    assert_eq!(codes(true, |v| v.state.dirty = true), [""; 0]);
}
