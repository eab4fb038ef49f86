//! Decides how a Linux guest is made ready, and what prevents it.

use crate::error::Blocker;
use crate::ids::Accepted;
use crate::inspect::linux::{LinuxFacts, LoaderCopies};
use crate::inspect::{Firmware, Inspection, Severity};
use crate::tool::{host, virt_v2v};

use super::model::{Handover, Method, Plan, Step};

/// `--linux`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LinuxChoice {
    /// virt-v2v if it is installed and supports the distribution; otherwise the guest is refused
    #[default]
    Auto,
    /// virt-v2v-in-place or virt-v2v makes the guest ready
    VirtV2v,
    /// The guest is copied unchanged, on your word that it has the VirtIO drivers
    AsIs,
}

/// The decisions of the user, and the facts about guest and host.
pub struct Foreseen<'a> {
    pub inspection: &'a Inspection,
    pub preference: LinuxChoice,
    /// The better one of virt-v2v's two programs on this host.
    pub installed: Option<Method>,
    pub in_place: bool,
    /// `--copy later`: nothing is copied.
    pub copy_later: bool,
    /// Warnings about the VM.
    pub notes: Vec<String>,
    /// Blockers from the disks, the host and the documents of the VM.
    pub limits: Vec<Blocker>,
}

/// The warning of plan and report for `--linux as-is`.
pub const ON_MY_WORD: &str = "--linux as-is: the guest is copied unchanged, and whether it finds its disk on the new controller is not checked";

pub fn plan(seen: Foreseen<'_>, accepted: &Accepted) -> Plan {
    let inspection = seen.inspection;
    let mut blockers = inspection.blockers();
    let mut plan_warnings = Vec::new();
    if seen.in_place {
        blockers.push(Blocker::new(
            "linux-in-place",
            "--in-place is for Windows: what virt-v2v does to a Linux disk cannot be undone from a journal",
            "leave --in-place out, or run virt-v2v-in-place yourself on a copy",
        ));
    }
    let handover = match &inspection.linux {
        None => Handover {
            method: Method::AsIs,
            why: "it could not be read".to_string(),
            steps: Vec::new(),
        },
        Some(facts) => {
            let (method, why) = match method(seen.preference, seen.installed, facts) {
                Ok(chosen) => chosen,
                Err(blocker) => {
                    blockers.push(blocker);
                    let why = "virt-v2v is what makes a Linux guest ready";
                    (Method::VirtV2v, why.to_string())
                }
            };
            plan_warnings.extend(warnings(inspection));
            if method == Method::AsIs {
                plan_warnings.push(ON_MY_WORD.to_string());
            }
            let steps = steps(method, inspection, facts);
            Handover { method, why, steps }
        }
    };
    if seen.copy_later && handover.method == Method::VirtV2v {
        blockers.push(Blocker::new(
            "copy-later",
            "virt-v2v copies the disks it converts",
            "leave --copy later out, install virt-v2v-in-place, or take --linux as-is where the guest is ready",
        ));
    }
    plan_warnings.extend(seen.notes);
    blockers.extend(seen.limits);
    let mut taken = Vec::new();
    for blocker in accepted.take(&mut blockers) {
        plan_warnings.push(format!(
            "accepted [{}]: {}; the guest may not start",
            blocker.code, blocker.reason
        ));
        taken.push(blocker.code);
    }
    Plan {
        actions: Vec::new(),
        skipped: Vec::new(),
        drivers: Vec::new(),
        ready: blockers.is_empty() && taken.is_empty(),
        blockers,
        accepted: taken,
        warnings: plan_warnings,
        checks: Vec::new(),
        linux: Some(handover),
    }
}

fn steps(method: Method, inspection: &Inspection, facts: &LinuxFacts) -> Vec<Step> {
    let converted = (method != Method::AsIs).then(|| Step {
        id: VIRT_V2V,
        description:
            "virt-v2v converts an overlay: initramfs, boot loader, device names, guest agent"
                .to_string(),
    });
    let copied = wanted_copies(inspection, facts).map(|copies| Step {
        id: UEFI_FALLBACK,
        description: describe(copies),
    });
    converted.into_iter().chain(copied).collect()
}

/// The steps, by their names in plan and report.
pub const VIRT_V2V: &str = "virt-v2v";
pub const UEFI_FALLBACK: &str = "uefi-fallback";

/// Whether virt-v2v converts the distribution, by the `ID` of os-release
/// (`convert/convert_linux.ml` of version 2).
fn known_to_v2v(facts: &LinuxFacts) -> bool {
    const KNOWN: [&str; 16] = [
        "debian",
        "ubuntu",
        "linuxmint",
        "kali",
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
        "altlinux",
        "opensuse",
    ];
    KNOWN.contains(&facts.distribution.as_str()) || facts.distribution.starts_with("opensuse-")
}

/// The method and its reason, or the blocker for what is missing.
fn method(
    preference: LinuxChoice,
    installed: Option<Method>,
    facts: &LinuxFacts,
) -> Result<(Method, String), Blocker> {
    const YOUR_WORD: &str = "or --linux as-is, when you know that its initramfs has virtio_pci, virtio_blk and virtio_scsi and that it names its disks by UUID";
    let distribution = match facts.distribution.as_str() {
        "" => "an unnamed distribution",
        name => name,
    };
    match (preference, installed) {
        (LinuxChoice::AsIs, _) => Ok((Method::AsIs, "--linux as-is".to_string())),
        (LinuxChoice::VirtV2v, Some(way)) => Ok((way, "--linux virt-v2v".to_string())),
        (LinuxChoice::Auto, Some(way)) if known_to_v2v(facts) => {
            Ok((way, format!("it is installed and supports {distribution}")))
        }
        (LinuxChoice::Auto, Some(_)) => Err(Blocker::new(
            "linux-distribution",
            format!("virt-v2v does not know {distribution}"),
            format!("convert with --linux virt-v2v to let it try; {YOUR_WORD}"),
        )),
        (_, None) => Err(Blocker::new(
            "virt-v2v-missing",
            "virt-v2v, or nbdkit which it needs, is not installed or not wanted (--engine embedded)",
            format!("{}; {YOUR_WORD}", host::hint(virt_v2v::V2V)),
        )),
    }
}

/// The findings that do not stop a conversion.
pub fn warnings(inspection: &Inspection) -> Vec<String> {
    let findings = inspection.findings.iter();
    findings
        .filter(|f| f.severity == Severity::Warning)
        .map(|f| format!("{} (remedy: {})", f.message, f.remedy))
        .collect()
}

/// The loader copies with which the guest starts on firmware without boot entries.
pub fn wanted_copies<'i>(
    inspection: &Inspection,
    facts: &'i LinuxFacts,
) -> Option<&'i LoaderCopies> {
    let uefi = inspection.firmware == Some(Firmware::Uefi);
    facts.fallback.as_ref().filter(|_| uefi)
}

pub fn describe(copies: &LoaderCopies) -> String {
    let list = copies.copies.iter();
    let list: Vec<String> = list.map(|c| format!("{} to {}", c.from, c.to)).collect();
    format!(
        "make the guest's boot loader the UEFI fall-back: {}",
        list.join(", ")
    )
}

#[cfg(test)]
#[path = "linux_tests.rs"]
mod tests;
