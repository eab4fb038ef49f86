//! Turns the domain XML of a conversion into that of a rehearsal. It gets a name and a UUID of its
//! own. It gets no network, and no writable files or devices of the host or the user.

use std::path::Path;

use uuid::Uuid;

use crate::domain::element::Element;

use super::record::{MARK, Record};

/// Devices of the host that an `--xml-patch` may have added: other VMs or the user work with them.
const OF_THE_HOST: [&str; 4] = ["hostdev", "filesystem", "lease", "shmem"];
/// The elements of a NIC that are kept; the others define its network.
const OF_A_NIC: [&str; 7] = ["mac", "model", "address", "boot", "rom", "alias", "acpi"];

/// Changes a domain into one of the rehearsal. Returns what was left out.
pub(crate) fn rehearsed(root: &mut Element, record: &Record, network: Option<&str>) -> Vec<String> {
    let uuid = record.uuid.to_string();
    let mut left_out = Vec::new();
    root.children.retain(|child| {
        let arguments = child.is("commandline");
        if arguments {
            left_out.push("arguments of QEMU".to_owned());
        }
        !arguments
    });
    for child in &mut root.children {
        match () {
            () if child.is("name") => child.text.clone_from(&record.name),
            () if child.is("uuid") => child.text.clone_from(&uuid),
            () if child.is("sysinfo") => smbios(child, &uuid),
            () if child.is("metadata") => mark(child, record.token),
            () if child.is("os") => variables(child, &record.work),
            () if child.is("devices") => devices(child, &record.work, network, &mut left_out),
            () => {}
        }
    }
    left_out
}

/// Sets the UUID in the SMBIOS tables: libvirt requires that of the domain.
fn smbios(sysinfo: &mut Element, uuid: &str) {
    let tables = sysinfo.children.iter_mut().filter(|e| e.is("system"));
    let entries = tables.flat_map(|system| &mut system.children);
    for entry in entries.filter(|e| e.attr("name") == Some("uuid")) {
        entry.text = uuid.to_owned();
    }
}

fn mark(metadata: &mut Element, token: Uuid) {
    let marks = metadata.children.iter_mut();
    for element in marks.filter(|e| e.is("conversion")) {
        element.attrs.retain(|(key, _)| key != MARK);
        element.attrs.push((MARK.to_owned(), token.to_string()));
    }
}

/// Sets the UEFI variables to those of the rehearsal, wherever a patch has put them.
fn variables(os: &mut Element, work: &Path) {
    for nvram in os.children.iter_mut().filter(|e| e.is("nvram")) {
        if !nvram.text.is_empty() && !is_below(&nvram.text, work) {
            nvram.text = work.join("nvram.fd").display().to_string();
        }
    }
}

fn devices(devices: &mut Element, work: &Path, network: Option<&str>, left_out: &mut Vec<String>) {
    devices.children.retain(|device| {
        let host = OF_THE_HOST.iter().find(|name| device.is(name));
        if let Some(name) = host {
            left_out.push(format!("a <{name}> of the host"));
        }
        let written = written_elsewhere(device, work);
        left_out.extend(written.iter().map(|file| format!("the disk {file}")));
        host.is_none() && written.is_none()
    });
    for nic in devices.children.iter_mut().filter(|e| e.is("interface")) {
        *nic = rehearsed_nic(nic, network);
    }
}

/// The file of a disk that the guest could write to and that is not part of the rehearsal.
fn written_elsewhere(device: &Element, work: &Path) -> Option<String> {
    if !device.is("disk")
        || device.attr("device") == Some("cdrom")
        || device.first("readonly").is_some()
    {
        return None;
    }
    let source = device.first("source")?;
    let file = source.attr("file").or(source.attr("dev"));
    match file {
        Some(file) if is_below(file, work) => None,
        Some(file) => Some(file.to_owned()),
        None => Some("that is no file".to_owned()),
    }
}

/// Changes a NIC. Without a network its link is down, and it uses QEMU's own network stack: no
/// bridge and no network of this host.
fn rehearsed_nic(nic: &Element, network: Option<&str>) -> Element {
    let mut new = Element::new(&nic.name);
    let kept = |child: &&Element| OF_A_NIC.iter().any(|name| child.is(name));
    let link = nic.first("link").cloned();
    let (kind, link) = match network {
        None => ("user", Some(Element::new("link").with("state", "down"))),
        Some(_) => ("network", link),
    };
    new.attrs.push(("type".to_owned(), kind.to_owned()));
    for child in nic.children.iter().filter(kept) {
        new.push(child.clone());
    }
    if let Some(name) = network {
        new.push(Element::new("source").with("network", name));
    }
    new.children.extend(link);
    new
}

fn is_below(file: &str, folder: &Path) -> bool {
    let file = Path::new(file);
    let climbs = file
        .components()
        .any(|part| part == std::path::Component::ParentDir);
    file.starts_with(folder) && !climbs
}

#[cfg(test)]
mod tests {
    use super::super::record::is_marked;
    use super::*;
    use crate::boot::files::identify;
    use crate::domain::xml::to_element;
    use crate::domain::{FirmwareChoice, Stage};

    fn record(place: &str) -> Record {
        let place = Path::new(place);
        Record::new("qemu:///system", Uuid::from_u128(9), "vm", place, place)
    }

    fn domain(record: &Record, more: &[(&str, &str)]) -> Element {
        let mut machine = crate::domain::tests::machine();
        for disk in &mut machine.disks {
            disk.path = record.work.join("vm.qcow2");
        }
        machine.serial = Some("VMware-1".to_owned());
        machine.probe = Some(record.work.join("probe.qcow2"));
        let portable = FirmwareChoice::Portable { secure_boot: false };
        let mut root = to_element(&machine, Stage::Final, &portable).unwrap();
        for (parent, xml) in more {
            let element = Element::parse(xml.as_bytes()).unwrap();
            match root.children.iter_mut().find(|e| e.is(parent)) {
                Some(parent) => parent.push(element),
                None => root.push(element),
            }
        }
        root
    }

    #[test]
    fn a_rehearsal_has_a_name_a_uuid_and_a_mark_of_its_own() {
        let record = record("/e");
        let tables = "<system><entry name='uuid'>theirs</entry></system>";
        let mut root = domain(&record, &[("sysinfo", tables)]);
        assert!(!is_marked(&root.to_document(), record.token));
        assert_eq!(rehearsed(&mut root, &record, None), [""; 0]);
        let xml = root.to_document();
        assert_eq!(root.text_of("name"), Some(record.name.as_str()));
        assert_eq!(root.text_of("uuid"), Some(record.uuid.to_string().as_str()));
        let tables = root.descendants("entry");
        let named = tables.iter().filter(|e| e.attr("name") == Some("uuid"));
        assert!(named.clone().all(|e| e.text == record.uuid.to_string()));
        assert!(named.count() > 0, "{xml}");
        assert!(is_marked(&xml, record.token));
        assert!(!is_marked(&xml, Uuid::new_v4()));
        assert_eq!(identify(&xml).unwrap().0, Some(Stage::Final));
    }

    #[test]
    fn every_link_is_down_and_no_network_is_named() {
        let record = record("/e");
        let patched = "<interface type='bridge'><mac address='52:54:00:00:00:09'/><source bridge='br0'/><target dev='x'/>\
                       <vlan><tag id='5'/></vlan><link state='up'/></interface>";
        let mut root = domain(&record, &[("devices", patched)]);
        rehearsed(&mut root, &record, None);
        let nics = root.descendants("interface");
        assert!(nics.len() > 1);
        for nic in &nics {
            assert_eq!(nic.attr("type"), Some("user"));
            let links: Vec<_> = nic.all("link").map(|l| l.attr("state")).collect();
            assert_eq!(links, [Some("down")]);
            assert!(nic.first("source").is_none() && nic.first("vlan").is_none());
            assert!(nic.first("mac").is_some());
        }
        let mut root = domain(&record, &[("devices", patched)]);
        rehearsed(&mut root, &record, Some("lab"));
        for nic in root.descendants("interface") {
            let source = nic.first("source").and_then(|s| s.attr("network"));
            assert_eq!((nic.attr("type"), source), (Some("network"), Some("lab")));
            assert!(nic.first("vlan").is_none());
        }
    }

    #[test]
    fn nothing_of_the_user_can_be_written() {
        let record = record("/e");
        let cases = [
            (
                "devices",
                "<hostdev mode='subsystem' type='pci'/>",
                "hostdev",
            ),
            ("devices", "<filesystem type='mount'/>", "filesystem"),
            (
                "devices",
                "<disk type='file' device='disk'><source file='/data/x.img'/></disk>",
                "/data/x.img",
            ),
            (
                "devices",
                "<disk type='file' device='floppy'><source file='/data/f.img'/></disk>",
                "/data/f.img",
            ),
            (
                "devices",
                "<disk type='block' device='disk'><source dev='/dev/sdb'/></disk>",
                "/dev/sdb",
            ),
            (
                "devices",
                "<disk type='network' device='disk'><source protocol='nbd'/></disk>",
                "no file",
            ),
            (
                "devices",
                "<disk type='file' device='disk'><source file='/e/.rehearsal-x/../../a'/></disk>",
                "/a",
            ),
            (
                "qemu:commandline",
                "<qemu:commandline xmlns:qemu='q'><qemu:arg value='-x'/></qemu:commandline>",
                "arguments",
            ),
        ];
        for (parent, xml, named) in cases {
            let mut root = domain(&record, &[(parent, xml)]);
            let before = root.to_document();
            let left_out = rehearsed(&mut root, &record, None).join("; ");
            assert!(left_out.contains(named), "{xml}: {left_out}");
            assert!(before.contains(named) || named == "no file" || named == "arguments");
            let after = root.to_document();
            assert!(!after.contains("/data/") && !after.contains("sdb") && !after.contains("nbd"));
        }
        let cdrom =
            "<disk type='file' device='cdrom'><source file='/iso/x.iso'/><readonly/></disk>";
        let mut root = domain(&record, &[("devices", cdrom)]);
        assert!(rehearsed(&mut root, &record, None).is_empty());
        assert!(root.to_document().contains("/iso/x.iso"));
    }

    #[test]
    fn variables_of_elsewhere_are_not_used() {
        let record = record("/e");
        for (path, kept) in [
            (record.work.join("vm-nvram.fd"), true),
            ("/vars/production.fd".into(), false),
        ] {
            let path = path.display().to_string();
            let mut root = domain(&record, &[]);
            let os = root.children.iter_mut().find(|e| e.is("os")).unwrap();
            os.children.retain(|e| !e.is("nvram"));
            os.push(Element::new("nvram").text(&path));
            rehearsed(&mut root, &record, None);
            let found = root.path("os/nvram").unwrap().text.clone();
            assert_eq!(found == path, kept, "{found}");
            assert!(Path::new(&found).starts_with(&record.work));
        }
    }
}
