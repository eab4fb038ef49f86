//! Guests around real hives, mutated hives, and guests of the demo.

use super::*;

/// Real hives on a BIOS disk; every driver file that the hive names exists.
fn real_windows_7() -> Option<FakeGuest> {
    let mut guest = FakeGuest::default();
    guest.volume(partition(1, "0x07", true), FsKind::Ntfs);
    let config = "Windows/System32/config";
    let system = corpus("win7-x86-vmware/SYSTEM")?;
    let software = corpus("win7-x86-vmware/SOFTWARE")?;
    guest.file(1, &format!("{config}/SYSTEM"), system);
    guest.file(1, &format!("{config}/SOFTWARE"), software);
    guest.file(1, "Windows/System32/ntoskrnl.exe", pe::head(0x014c));
    for driver in [
        "pci", "acpi", "partmgr", "volmgr", "volmgrx", "mountmgr", "disk", "volsnap", "intelide",
        "atapi", "msahci", "ntfs",
    ] {
        let path = format!("Windows/System32/drivers/{driver}.sys");
        guest.file(1, &path, pe::head(0x014c));
    }
    guest.file(1, "bootmgr", vec![]);
    guest.file(
        1,
        "Boot/BCD",
        boot_store("\\Windows\\System32\\winload.exe"),
    );
    Some(guest)
}

#[test]
fn real_windows_7_x86_on_vmware() {
    let Some(guest) = real_windows_7() else {
        return;
    };
    let inspection = run(&guest, Scheme::Mbr).unwrap().inspection;
    let json = serde_json::to_value(&inspection).unwrap();
    let os = &json["os"];
    assert_eq!(os["product_name"], "Windows 7 Ultimate");
    assert_eq!(os["display_version"], "SP1");
    assert_eq!(os["build"], 7601);
    assert_eq!(os["arch"], "x86");
    assert_eq!(os["hostname"], "WKS-WIN732BITA");
    assert_eq!(json["firmware"], "bios");
    let ready: Vec<_> = inspection.controllers.values().map(|c| c.ready).collect();
    assert_eq!(ready, [false, true, false, false]);
    assert_eq!(
        json["antivirus"],
        json!(["McAfee / Trellix", "Microsoft Defender"])
    );
    assert_eq!(json["hypervisor_tools"], json!(["VMware Tools"]));
    let facts = inspection.windows.unwrap();
    assert_eq!(facts.drive_letter, Some('C'));
    assert!(facts.tools[0].services.contains(&"VMTools".to_string()));
}

#[test]
fn real_windows_10_on_vmware() {
    let Some(system) = corpus("win10-vmware/SYSTEM") else {
        return;
    };
    let mut shape = Shape::windows_11();
    shape.software = software("6.3", 18_363, "Windows 10 Pro", "Client");
    let mut guest = shape.place();
    guest.file(2, "Win/System32/config/SYSTEM", system);
    for driver in ["intelide", "atapi"] {
        let path = format!("Win/System32/drivers/{driver}.sys");
        guest.file(2, &path, pe::head(0x8664));
    }
    let inspection = run(&guest, Scheme::Gpt).unwrap().inspection;
    let ready: Vec<_> = inspection.controllers.values().map(|c| c.ready).collect();
    assert_eq!(
        ready,
        [true, true, false, false],
        "{:#?}",
        inspection.controllers
    );
    assert_eq!(inspection.hypervisor_tools, ["VMware Tools"]);
    // Its logs are not in the corpus.
    assert_eq!(ids(&inspection), ["hive-stale", "pending-renames"]);
}

/// Hives are untrusted: whatever they contain, inspection ends and reports a result.
#[test]
fn mutated_hives_do_not_panic() {
    let shape = Shape::windows_11();
    let system = shape.system.to_bytes("SYSTEM");
    let software = shape.software.to_bytes("SOFTWARE");
    let mut guest = shape.place();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    let mut finished = 0;
    for _ in 0..200 {
        for (name, clean) in [("SYSTEM", &system), ("SOFTWARE", &software)] {
            let mut bytes = clean.clone();
            for _ in 0..1 + random(8) {
                let at = 4096 + random(bytes.len() - 4096);
                bytes[at] = [0, 0xff, 0x80, random(256) as u8][random(4)];
            }
            guest.file(2, &format!("Win/System32/config/{name}"), bytes);
        }
        let survey = run(&guest, Scheme::Gpt).unwrap();
        finished += usize::from(survey.hives.is_some());
    }
    assert!(finished > 0 && finished < 200, "{finished}");
}

/// Guests of every version, made by the demo, whose code is independent of the readers.
#[test]
fn demo_guests_of_every_version() {
    use WinVersion::*;
    // version, name shown, first driver directory, what boots before the conversion
    let cases = [
        (Xp, "Microsoft Windows XP", "xp", "ide"),
        (Server2003, "Microsoft Windows Server 2003", "2k3", "ide"),
        (Vista, "Windows Vista (TM) Business", "2k8", "ide"),
        (Win7, "Windows 7 Professional", "w7", "ide"),
        (
            Server2008R2,
            "Windows Server 2008 R2 Standard",
            "2k8R2",
            "ide",
        ),
        (Win81, "Windows 8.1 Pro", "w8.1", "ide"),
        (
            Server2012R2,
            "Windows Server 2012 R2 Standard",
            "2k12R2",
            "ide",
        ),
        (Win10, "Windows 10 Pro", "w10", ""),
        (Server2016, "Windows Server 2016 Standard", "2k16", ""),
        (Server2019, "Windows Server 2019 Standard", "2k19", ""),
        (Win11, "Windows 11 Pro", "w11", ""),
        (Server2022, "Windows Server 2022 Standard", "2k22", ""),
        (Server2025, "Windows Server 2025 Standard", "2k25", ""),
    ];
    for (version, name, folder, boots) in cases {
        let spec = GuestSpec::new(version);
        let i = survey_demo(&spec).inspection;
        assert_eq!(i.os.product_name.as_deref(), Some(name));
        assert_eq!(ids(&i), [""; 0], "{name}");
        assert_eq!(i.os.driver_folders[0], folder, "{name}");
        let ready = i.controllers.iter().filter(|(_, path)| path.ready);
        let ready: Vec<_> = ready.map(|(c, _)| c.name()).collect();
        assert_eq!(ready.join(" "), boots, "{name}");
        let facts = i.windows.unwrap();
        let (wanted, target) = (version.facts(), facts.target);
        assert_eq!((target.major, target.minor), wanted.nt, "{name}");
        assert_eq!(target.build, wanted.build, "{name}");
        assert_eq!(target.server, version.is_server(), "{name}");
        assert_eq!(target.arch, spec.arch, "{name}");
        assert_eq!(i.firmware, Some(spec.firmware), "{name}");
        assert_eq!(facts.drive_letter, Some('C'), "{name}");
        assert_eq!(i.hypervisor_tools, ["VMware Tools"], "{name}");
        let adapter = &i.network.adapters[0];
        assert_eq!(adapter.mac.as_deref(), Some("00:0c:29:f3:ff:de"), "{name}");
        assert_eq!(adapter.dns.len(), 3, "{name}");
    }
}

#[test]
fn demo_guest_from_hyper_v() {
    let spec = GuestSpec {
        leftovers: Leftovers::HyperV,
        control_set: 2,
        pci_overridden: true,
        windows_dir: "WINNT".into(),
        sector_size: 4096,
        ..GuestSpec::new(WinVersion::Server2022)
    };
    let i = survey_demo(&spec).inspection;
    assert_eq!(i.hypervisor_tools, ["Hyper-V integration services"]);
    assert_eq!(i.os.control_set.as_deref(), Some("ControlSet002"));
    assert_eq!(
        i.os.windows_root,
        Some(GuestPath::parse("\\WINNT").unwrap())
    );
    let sata = &i.controllers[&DiskBus::Sata];
    assert!(sata.faults.iter().any(
        |f| matches!(f, boot_path::BootFault::NotBootStart { service, .. } if service == "pci")
    ));
    assert_eq!(i.windows.unwrap().sector_size, 4096);
}
