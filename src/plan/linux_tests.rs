use super::*;
use crate::demo::{GuestSpec, WinVersion};
use crate::guest::{GuestPath, VolumeId};
use crate::inspect::Finding;
use crate::inspect::linux::LoaderCopy;
use crate::testing::MemoryGuest;

fn facts(distribution: &str) -> LinuxFacts {
    LinuxFacts {
        distribution: distribution.into(),
        ..LinuxFacts::default()
    }
}

#[test]
fn only_virt_v2v_or_the_users_word_makes_a_linux_ready() {
    use LinuxChoice::{AsIs, Auto, VirtV2v};
    let v2v = Some(Method::VirtV2v);
    let in_place = Some(Method::VirtV2vInPlace);
    let cases = [
        (Auto, v2v, "debian", Ok(Method::VirtV2v)),
        (Auto, in_place, "debian", Ok(Method::VirtV2vInPlace)),
        (Auto, v2v, "opensuse-leap", Ok(Method::VirtV2v)),
        (Auto, v2v, "opensusex", Err("linux-distribution")),
        (Auto, v2v, "", Err("linux-distribution")),
        (Auto, v2v, "arch", Err("linux-distribution")),
        (Auto, None, "debian", Err("virt-v2v-missing")),
        (VirtV2v, v2v, "arch", Ok(Method::VirtV2v)),
        (VirtV2v, in_place, "arch", Ok(Method::VirtV2vInPlace)),
        (VirtV2v, None, "debian", Err("virt-v2v-missing")),
        (AsIs, v2v, "debian", Ok(Method::AsIs)),
        (AsIs, None, "", Ok(Method::AsIs)),
    ];
    for (preference, installed, distribution, expected) in cases {
        let found = method(preference, installed, &facts(distribution));
        let found = found.map(|(method, _)| method).map_err(|b| b.code);
        let expected = expected.map_err(str::to_string);
        assert_eq!(
            found, expected,
            "{preference:?} {installed:?} {distribution}"
        );
    }
}

/// `convert/convert_linux.ml` of virt-v2v 2 has these families: Red Hat, SUSE, Debian, ALT.
#[test]
fn the_distributions_that_virt_v2v_converts_are_known() {
    for name in [
        "fedora",
        "rhel",
        "centos",
        "rocky",
        "almalinux",
        "ol",
        "scientific",
        "circle",
        "sles",
        "sled",
        "opensuse",
        "opensuse-tumbleweed",
        "altlinux",
        "debian",
        "ubuntu",
        "linuxmint",
        "kali",
    ] {
        assert!(known_to_v2v(&facts(name)), "{name}");
    }
    for name in ["", "alpine", "gentoo", "nixos", "slackware"] {
        assert!(!known_to_v2v(&facts(name)), "{name}");
    }
}

fn copies() -> LoaderCopies {
    let copy = |to: &str| LoaderCopy {
        from: GuestPath::parse("\\EFI\\debian\\shimx64.efi").unwrap(),
        to: GuestPath::parse(to).unwrap(),
        size: 1,
    };
    LoaderCopies {
        disk: 0,
        volume: VolumeId::new(1),
        folders: Vec::new(),
        copies: vec![
            copy("\\EFI\\BOOT\\BOOTX64.EFI"),
            copy("\\EFI\\BOOT\\fbx64.efi"),
        ],
    }
}

/// A Linux with a warning and a note, as inspection tells it.
fn inspection(linux: Option<LinuxFacts>, firmware: Firmware) -> Inspection {
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    let mut inspection = guest.look(&[], |_, survey| survey.inspection.clone());
    inspection.firmware = Some(firmware);
    inspection.linux = linux;
    let finding = |id, severity| Finding {
        id,
        severity,
        message: format!("{id} is so"),
        remedy: "help it".into(),
        evidence: String::new(),
    };
    inspection.findings = vec![
        finding("linux-device-name", Severity::Warning),
        finding("linux-free-space", Severity::Info),
    ];
    inspection
}

struct Case {
    preference: LinuxChoice,
    installed: Option<Method>,
    in_place: bool,
    copy_later: bool,
    readable: bool,
    accept: &'static [&'static str],
    blockers: &'static [&'static str],
    method: Method,
    ready: bool,
}

const USUAL: Case = Case {
    preference: LinuxChoice::Auto,
    installed: Some(Method::VirtV2v),
    in_place: false,
    copy_later: false,
    readable: true,
    accept: &[],
    blockers: &[],
    method: Method::VirtV2v,
    ready: true,
};

#[test]
fn what_speaks_against_a_linux_guest_is_a_blocker() {
    for (n, case) in [
        USUAL,
        Case {
            in_place: true,
            blockers: &["linux-in-place"],
            ready: false,
            ..USUAL
        },
        // virt-v2v copies whole disks; the other two leave that to later.
        Case {
            copy_later: true,
            blockers: &["copy-later"],
            ready: false,
            ..USUAL
        },
        Case {
            installed: Some(Method::VirtV2vInPlace),
            copy_later: true,
            method: Method::VirtV2vInPlace,
            ..USUAL
        },
        Case {
            preference: LinuxChoice::AsIs,
            copy_later: true,
            method: Method::AsIs,
            ..USUAL
        },
        Case {
            installed: None,
            blockers: &["virt-v2v-missing"],
            ready: false,
            ..USUAL
        },
        Case {
            readable: false,
            copy_later: true,
            method: Method::AsIs,
            ..USUAL
        },
    ]
    .into_iter()
    .enumerate()
    {
        let inspection = inspection(case.readable.then(|| facts("debian")), Firmware::Bios);
        let seen = Foreseen {
            inspection: &inspection,
            preference: case.preference,
            installed: case.installed,
            in_place: case.in_place,
            copy_later: case.copy_later,
            notes: vec!["of the VM".into()],
            limits: Vec::new(),
        };
        let plan = plan(seen, &Accepted::parse(case.accept).unwrap());
        let codes: Vec<_> = plan.blockers.iter().map(|b| b.code.as_str()).collect();
        assert_eq!(codes, case.blockers, "case {n}");
        assert_eq!(plan.ready, case.ready, "case {n}");
        assert_eq!(plan.linux.unwrap().method, case.method, "case {n}");
        let mut expected = Vec::new();
        if case.readable {
            expected.push("linux-device-name is so (remedy: help it)");
            if case.method == Method::AsIs {
                expected.push(ON_MY_WORD);
            }
        }
        expected.push("of the VM");
        assert_eq!(plan.warnings, expected, "case {n}");
    }
}

/// Blockers of the host or the disks can be accepted as far as they may only keep the guest
/// from starting.
#[test]
fn what_was_accepted_is_a_warning_and_not_ready() {
    let inspection = inspection(Some(facts("debian")), Firmware::Bios);
    let starts = crate::ids::IDS
        .iter()
        .find(|id| id.kind == crate::ids::Kind::Blocker && id.stake == crate::ids::Stake::Start);
    let code = starts.unwrap().id;
    for (accepted, left) in [(&[][..], 2), (&[code], 1)] {
        let seen = Foreseen {
            inspection: &inspection,
            preference: LinuxChoice::Auto,
            installed: Some(Method::VirtV2v),
            in_place: true,
            copy_later: false,
            notes: Vec::new(),
            limits: vec![Blocker::new(code, "why", "what helps")],
        };
        let plan = plan(seen, &Accepted::parse(accepted).unwrap());
        assert_eq!(plan.accepted, accepted);
        assert_eq!(plan.blockers.len(), left);
        assert!(!plan.ready);
        let told = plan
            .warnings
            .iter()
            .any(|w| w.contains("the guest may not start"));
        assert_eq!(told, !accepted.is_empty(), "{:?}", plan.warnings);
    }
    let only = Foreseen {
        inspection: &inspection,
        preference: LinuxChoice::Auto,
        installed: Some(Method::VirtV2v),
        in_place: false,
        copy_later: false,
        notes: Vec::new(),
        limits: vec![Blocker::new(code, "why", "what helps")],
    };
    let plan = plan(only, &Accepted::parse(&[code]).unwrap());
    assert_eq!((plan.blockers.len(), plan.ready), (0, false));
}

/// Firmware of UEFI without boot entries looks for one name only; a BIOS has no use for it.
#[test]
fn the_loader_is_copied_where_uefi_would_not_find_it() {
    for (preference, firmware, fallback, steps) in [
        (
            LinuxChoice::Auto,
            Firmware::Uefi,
            true,
            &[VIRT_V2V, UEFI_FALLBACK][..],
        ),
        (LinuxChoice::Auto, Firmware::Uefi, false, &[VIRT_V2V]),
        (LinuxChoice::Auto, Firmware::Bios, true, &[VIRT_V2V]),
        (LinuxChoice::AsIs, Firmware::Uefi, true, &[UEFI_FALLBACK]),
        (LinuxChoice::AsIs, Firmware::Bios, true, &[]),
    ] {
        let linux = LinuxFacts {
            fallback: fallback.then(copies),
            ..facts("debian")
        };
        let inspection = inspection(Some(linux), firmware);
        let seen = Foreseen {
            inspection: &inspection,
            preference,
            installed: Some(Method::VirtV2v),
            in_place: false,
            copy_later: false,
            notes: Vec::new(),
            limits: Vec::new(),
        };
        let handover = plan(seen, &Accepted::default()).linux.unwrap();
        let found: Vec<_> = handover.steps.iter().map(|step| step.id).collect();
        assert_eq!(found, steps, "{preference:?} {firmware:?} {fallback}");
        if let Some(step) = handover.steps.iter().find(|step| step.id == UEFI_FALLBACK) {
            assert_eq!(
                step.description,
                "make the guest's boot loader the UEFI fall-back: \
                 \\EFI\\debian\\shimx64.efi to \\EFI\\BOOT\\BOOTX64.EFI, \
                 \\EFI\\debian\\shimx64.efi to \\EFI\\BOOT\\fbx64.efi"
            );
        }
    }
}

/// Everything a plan for Linux says: the method with its reason, each blocker, each warning.
#[test]
fn the_whole_plan_of_a_linux() {
    use LinuxChoice::{AsIs, Auto, VirtV2v};
    let mut text = String::new();
    for (preference, installed, distribution, in_place, copy_later) in [
        (Auto, Some(Method::VirtV2v), Some("debian"), false, false),
        (
            Auto,
            Some(Method::VirtV2vInPlace),
            Some("fedora"),
            true,
            true,
        ),
        (Auto, Some(Method::VirtV2v), Some("arch"), false, true),
        (Auto, Some(Method::VirtV2v), Some(""), false, false),
        (Auto, None, Some("debian"), false, false),
        (
            VirtV2v,
            Some(Method::VirtV2vInPlace),
            Some("arch"),
            false,
            true,
        ),
        (VirtV2v, None, Some("arch"), false, false),
        (AsIs, None, Some("arch"), false, true),
        (Auto, Some(Method::VirtV2v), None, true, true),
    ] {
        let facts = distribution.map(|name| LinuxFacts {
            fallback: Some(copies()),
            ..facts(name)
        });
        let mut inspection = inspection(facts, Firmware::Uefi);
        inspection.findings.push(Finding {
            id: "linux-unreadable",
            severity: Severity::Blocker,
            message: "it is so".into(),
            remedy: "help".into(),
            evidence: String::new(),
        });
        let seen = Foreseen {
            inspection: &inspection,
            preference,
            installed,
            in_place,
            copy_later,
            notes: vec!["of the VM".into()],
            limits: vec![Blocker::new("guest-space", "no room", "make some")],
        };
        let plan = plan(seen, &Accepted::default());
        text.push_str(&format!(
            "{preference:?} {installed:?} {distribution:?} in place {in_place} later {copy_later}\n"
        ));
        for blocker in &plan.blockers {
            let Blocker {
                code,
                reason,
                remedy,
            } = blocker;
            text.push_str(&format!("  {code}: {reason} -> {remedy}\n"));
        }
        for warning in &plan.warnings {
            text.push_str(&format!("  ! {warning}\n"));
        }
        let handover = plan.linux.unwrap();
        text.push_str(&format!("  {:?}: {}\n", handover.method, handover.why));
        for step in handover.steps {
            text.push_str(&format!("  {}: {}\n", step.id, step.description));
        }
        assert!(!plan.ready && plan.actions.is_empty() && plan.checks.is_empty());
    }
    insta::assert_snapshot!("whole-linux", text);
}
