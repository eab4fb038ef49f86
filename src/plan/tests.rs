//! What is planned for each Windows, as text: a change of a decision shows as a change of these files.

use crate::demo::{GuestSpec, WinVersion};
use crate::report::text;
use crate::testing::{MemoryGuest, bootstrap, media};

use super::Action;

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
