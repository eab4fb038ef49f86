//! Checks of everything before Windows itself runs: firmware, partition table, boot manager, BCD.

use super::{Context, Outcome};
use crate::inspect::{Firmware, Severity};

pub fn firmware(c: &Context<'_>) -> Outcome {
    match c.inspection.firmware {
        Some(firmware) => Outcome::Ok(format!("{firmware:?}").to_lowercase()),
        None => Outcome::Fault(
            "neither UEFI nor BIOS can start this disk".into(),
            "no partition table".into(),
        ),
    }
}

pub fn boot_manager(c: &Context<'_>) -> Outcome {
    c.findings(
        &["no-boot-manager", "boot-manager-damaged"],
        "the boot manager is there",
    )
}

/// A new VM has no boot entries, so its firmware starts the fall-back loader or nothing.
pub fn uefi_fallback(c: &Context<'_>) -> Outcome {
    let fine = match c.inspection.firmware {
        Some(Firmware::Uefi) => "the fall-back loader is Windows' own",
        _ => "not needed: BIOS",
    };
    c.findings(&["uefi-fallback"], fine)
}

pub fn partition_table(c: &Context<'_>) -> Outcome {
    c.findings(
        &["active-partition", "gpt-blank-entry"],
        "the boot partition can be found",
    )
}

pub fn boot_sector(c: &Context<'_>) -> Outcome {
    c.findings(
        &[
            "boot-sector-hidden",
            "boot-sector-heads",
            "boot-sector-geometry",
        ],
        "nothing wrong is known of the boot sector",
    )
}

pub fn bcd(c: &Context<'_>) -> Outcome {
    c.findings(
        &[
            "no-bcd",
            "no-boot-ini",
            "boot-ini-device",
            "bcd-damaged",
            "bcd-no-default",
            "bcd-transient",
            "bcd-device",
            "bcd-loader",
            "bcd-loader-firmware",
            "bcd-text-mode",
        ],
        "the default entry leads to a loader that exists",
    )
}

pub fn windows_found(c: &Context<'_>) -> Outcome {
    match (&c.inspection.windows, &c.inspection.os.windows_root) {
        (Some(w), Some(root)) => Outcome::Ok(format!("{root}, {}", w.control_set)),
        _ => Outcome::Fault(
            "no Windows installation could be examined".into(),
            String::new(),
        ),
    }
}

/// Windows also starts from a dirty volume, after checking it.
pub fn volume_clean(c: &Context<'_>) -> Outcome {
    c.findings(
        &["volume-dirty", "volume-dirty-forced"],
        "the volume of Windows was unmounted cleanly",
    )
}

pub fn no_blockers(c: &Context<'_>) -> Outcome {
    let findings = c.inspection.findings.iter();
    let blockers: Vec<_> = findings
        .filter(|f| f.severity == Severity::Blocker && f.id != "volume-dirty")
        .map(|f| f.id)
        .collect();
    c.findings(
        &blockers,
        "nothing that stops Windows from booting was found",
    )
}
