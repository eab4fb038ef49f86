use super::*;
use crate::demo::WinVersion;
use crate::inspect::fake::FakeGuest;
use crate::testing::{MemoryGuest, bootstrap, media};

/// The needs of a Windows 10 plan on the Windows volume, and the guest to check.
fn planned(then: impl FnOnce(&mut FakeGuest, VolumeId, Needs)) {
    let guest = MemoryGuest::new(WinVersion::Win10);
    let prepared = guest.prepare(&media(), Some(bootstrap(WinVersion::Win10)));
    let volume = prepared.basis.windows.system_volume;
    guest.look(&[], |fake, survey| {
        let hives = survey.hives.as_ref().unwrap();
        let needs = Needs::of(&prepared.plan.actions, hives, volume, fake).unwrap();
        then(&mut fake.clone(), volume, needs);
    });
}

#[test]
fn a_volume_without_room_for_what_the_plan_adds_is_a_blocker() {
    planned(|guest, volume, needs| {
        let needed = needs.volumes[&volume];
        assert!(needed > 100 << 10, "{needed}");
        for (free, blockers) in [(0, 1), (needed - 1, 1), (needed, 0), (u64::MAX, 0)] {
            guest.free = Some((volume, free));
            let found = in_guest(&needs, guest, &[]).unwrap();
            assert_eq!(found.len(), blockers, "{free}: {found:?}");
            for blocker in found {
                assert_eq!(blocker.code, "guest-space");
                assert!(blocker.reason.contains(&bytes(free)), "{blocker:?}");
                assert!(blocker.reason.contains(&bytes(needed)), "{blocker:?}");
                assert!(blocker.remedy.contains("enlarge the volume"));
            }
        }
        // An unreadable map blocks nothing.
        guest.free = None;
        assert_eq!(in_guest(&needs, guest, &[]).unwrap(), []);
    });
}

/// A replaced file frees its clusters; a compressed one may have none.
#[test]
fn a_file_takes_the_clusters_that_it_does_not_have_yet() {
    planned(|guest, volume, _| {
        let id = volume.partition;
        guest.file(id, r"\there\short.sys", vec![0; 5000]);
        guest.file(id, r"\there\long.sys", vec![0; 100_000]);
        let small = guest.file(id, r"\there\packed.sys", vec![0; 100_000]);
        small.compressed = true;
        let needed = |name: &str, size: u64| {
            let path = GuestPath::parse(&format!(r"\there\{name}")).unwrap();
            let mut needs = Needs::default();
            needs.file(guest, volume, &path, size).unwrap();
            needs.volumes[&volume]
        };
        assert_eq!(needed("new.sys", 1), CLUSTER + RECORD);
        assert_eq!(needed("short.sys", 8192), 0);
        assert_eq!(needed("short.sys", 8193), CLUSTER);
        assert_eq!(needed("long.sys", 1), 0);
        assert_eq!(needed("packed.sys", 4097), 2 * CLUSTER);
    });
}
