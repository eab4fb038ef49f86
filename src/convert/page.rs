//! The VM's details in `report.html` besides the report, read from the written domain XML.

use std::path::Path;

use crate::domain::element::Element;
use crate::report::Report;
use crate::report::html::Extras;
use crate::types::DiskBus;

use super::job::Job;

/// Files and directories of the output directory without a row of their own in the report.
const BESIDE: [&str; 5] = [
    "plan.json",
    "journal.json",
    "registry",
    "backup",
    "generated",
];

/// Collects the details. `folder` is the current path of the files; the report names their final
/// path.
pub(super) fn extras(job: &Job, folder: &Path, report: &Report) -> Extras {
    let name = report
        .outputs
        .final_xml
        .as_deref()
        .and_then(Path::file_name);
    let xml = name.and_then(|name| std::fs::read(folder.join(name)).ok());
    let domain = xml.and_then(|xml| Element::parse(&xml).ok());
    let there = BESIDE.iter().filter(|name| folder.join(name).exists());
    let beside = std::iter::once(&"report.json").chain(there);
    Extras {
        machine: domain.as_ref().map(rows).unwrap_or_default(),
        in_use: in_use(job.vm.machine.storage, &report.boots_from),
        beside: beside.map(ToString::to_string).collect(),
    }
}

fn in_use(last: DiskBus, boots_from: &[DiskBus]) -> Vec<(DiskBus, &'static str)> {
    let mut list = vec![(last, "in use")];
    let first = [DiskBus::Sata, DiskBus::Ide];
    let first = first.into_iter().filter(|c| *c != last);
    list.extend(
        first
            .filter(|c| boots_from.contains(c))
            .map(|c| (c, "first boot only")),
    );
    list
}

fn rows(domain: &Element) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    let text = |name: &str| domain.text_of(name).map(|t| t.trim().to_string());
    rows.extend(text("name").map(|name| ("name", name)));
    let kib = text("memory").and_then(|t| t.parse::<u64>().ok());
    rows.extend(kib.map(|kib| ("memory", crate::ui::bytes(kib.saturating_mul(1024)))));
    rows.extend(text("vcpu").map(|n| ("processors", n)));
    let loader = domain.path("os/loader").is_some();
    let efi = domain.first("os").and_then(|os| os.attr("firmware")) == Some("efi");
    let firmware = if loader || efi { "UEFI" } else { "BIOS" };
    let machine = domain.path("os/type").and_then(|t| t.attr("machine"));
    let machine = machine.map(|m| format!(", {m}")).unwrap_or_default();
    rows.push(("firmware", format!("{firmware}{machine}")));
    if domain.path("devices/tpm").is_some() {
        rows.push(("TPM", "yes".to_string()));
    }
    let devices = domain.first("devices");
    for nic in devices.into_iter().flat_map(|d| d.all("interface")) {
        rows.push(("NIC", nic_row(nic)));
    }
    rows
}

fn nic_row(nic: &Element) -> String {
    let attr = |child: &str, name: &str| Some(nic.first(child)?.attr(name)?.to_string());
    let place = ["network", "bridge", "dev"]
        .iter()
        .find_map(|kind| Some(format!("{kind} {}", attr("source", kind)?)));
    let down = attr("link", "state").filter(|state| state == "down");
    let parts = [
        attr("mac", "address"),
        attr("model", "type"),
        place.or_else(|| nic.attr("type").map(str::to_string)),
        down.map(|_| "link down".to_string()),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_a_domain() {
        let xml = "<domain><name>vm</name><memory unit='KiB'>4194304</memory><vcpu>2</vcpu>\
            <os><type machine='q35'>hvm</type><loader>/x</loader></os><devices><tpm/>\
            <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/>\
            <model type='virtio'/></interface>\
            <interface type='user'><link state='down'/></interface></devices></domain>";
        let rows = rows(&Element::parse(xml.as_bytes()).unwrap());
        let want = [
            ("name", "vm"),
            ("memory", "4.0 GiB"),
            ("processors", "2"),
            ("firmware", "UEFI, q35"),
            ("TPM", "yes"),
            ("NIC", "52:54:00:00:00:01, virtio, network default"),
            ("NIC", "user, link down"),
        ];
        let rows: Vec<(&str, &str)> = rows.iter().map(|(l, v)| (*l, v.as_str())).collect();
        assert_eq!(rows, want);
    }

    #[test]
    fn firmware_is_named_by_its_loader_or_its_kind() {
        let firmware = |os: &str| {
            let xml = format!("<domain><os{os}</os></domain>");
            let rows = rows(&Element::parse(xml.as_bytes()).unwrap());
            let row = rows.into_iter().find(|(label, _)| *label == "firmware");
            row.unwrap().1
        };
        assert_eq!(firmware("><type machine='pc'>hvm</type>"), "BIOS, pc");
        assert_eq!(firmware("><type>hvm</type>"), "BIOS");
        assert_eq!(firmware(" firmware='efi'><type>hvm</type>"), "UEFI");
        assert_eq!(firmware(" firmware='bios'><type>hvm</type>"), "BIOS");
        assert_eq!(firmware("><type>hvm</type><loader>/x</loader>"), "UEFI");
        let nic = |link: &str| {
            let xml = format!("<interface type='user'>{link}</interface>");
            nic_row(&Element::parse(xml.as_bytes()).unwrap())
        };
        assert_eq!(nic("<link state='up'/>"), "user");
        assert_eq!(
            nic("<link state='down'/><source bridge='br0'/>"),
            "bridge br0, link down"
        );
    }

    #[test]
    fn the_controller_in_use() {
        use DiskBus::{Ide, Sata, VirtioBlk, VirtioScsi};
        let all = [Sata, VirtioBlk, VirtioScsi];
        for (storage, boots_from, want) in [
            (
                DiskBus::VirtioScsi,
                &all[..],
                vec![(VirtioScsi, "in use"), (Sata, "first boot only")],
            ),
            (
                DiskBus::VirtioBlk,
                &[Ide, VirtioBlk][..],
                vec![(VirtioBlk, "in use"), (Ide, "first boot only")],
            ),
            (DiskBus::Sata, &[Sata][..], vec![(Sata, "in use")]),
        ] {
            assert_eq!(in_use(storage, boots_from), want);
        }
    }
}
