use super::*;
use crate::demo::virtio_win;
use crate::drivers::target::Arch;

fn target(major: u32, minor: u32, build: u32, arch: Arch) -> WindowsTarget {
    WindowsTarget {
        major,
        minor,
        build,
        arch,
        server: false,
    }
}

#[test]
fn a_storage_driver() {
    let w11 = target(10, 0, 22631, Arch::Amd64);
    let bytes = virtio_win::inf("viostor", "w11", Arch::Amd64).unwrap();
    let inf = DriverInf::parse(&bytes, &w11).unwrap();
    assert_eq!(inf.provider.value, "hyper2kvm demo, not signed");
    assert_eq!(inf.class, "SCSIAdapter");
    assert_eq!(inf.catalog.as_deref(), Some("viostor.cat"));
    assert_eq!(inf.driver_ver.version, [100, 101, 104, 27100]);
    assert_eq!(inf.source_files, ["viostor.sys"]);
    assert!(inf.pnp_lockdown);
    let ids: Vec<&str> = inf
        .models
        .iter()
        .flat_map(|m| m.hardware_ids.iter().map(String::as_str))
        .collect();
    assert_eq!(
        ids,
        [
            r"PCI\VEN_1AF4&DEV_1001&SUBSYS_00021AF4&REV_00",
            r"PCI\VEN_1AF4&DEV_1001",
            r"PCI\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01",
            r"PCI\VEN_1AF4&DEV_1042",
        ]
    );
    let install = inf.install("scsi_inst").unwrap();
    let service = inf.device_service().unwrap();
    assert_eq!(install.device_service(), Some(service));
    assert_eq!(
        (
            service.service_type,
            service.start_type,
            service.error_control
        ),
        (1, 0, 1)
    );
    assert_eq!(
        service.binary,
        InfPath {
            dirid: 13,
            path: "viostor.sys".into()
        }
    );
    assert_eq!(service.load_order_group.as_deref(), Some("SCSI miniport"));
    assert_eq!(service.display_name, None);
    let params: Vec<_> = service
        .add_reg
        .iter()
        .map(|l| (l.subkey.as_str(), l.name.as_str(), l.data.clone()))
        .collect();
    assert_eq!(
        params,
        [
            (r"Parameters\PnpInterface", "5", Some(RegData::Dword(1))),
            ("Parameters", "BusType", Some(RegData::Dword(1))),
            (
                "Parameters",
                "DmaRemappingCompatible",
                Some(RegData::Dword(0))
            ),
        ]
    );
    assert_eq!(
        service.event_log,
        Some(EventLog {
            event_message_file: Some(r"%SystemRoot%\System32\IoLogMsg.dll".into()),
            types_supported: Some(7),
        })
    );
    assert_eq!(install.hw_add_reg.len(), 6);
    assert_eq!(install.hw_add_reg[0].data, None);
    assert_eq!(install.copy_files[0].to.dirid, 13);
    assert_eq!(
        inf.strings(),
        [
            (
                "device.desc".to_string(),
                "Demo VirtIO SCSI controller".to_string()
            ),
            (
                "vendor".to_string(),
                "hyper2kvm demo, not signed".to_string()
            ),
        ]
    );

    // The same file has nothing for a Windows that is too old, or of another architecture.
    for other in [
        target(10, 0, 14393, Arch::Amd64),
        target(6, 3, 9600, Arch::Amd64),
        target(10, 0, 22631, Arch::Arm64),
    ] {
        assert!(matches!(
            DriverInf::parse(&bytes, &other),
            Err(InfError::NoModels { .. })
        ));
    }
}

#[test]
fn decorated_install_sections_keep_their_name() {
    let bytes = virtio_win::inf("Balloon", "w10", Arch::X86).unwrap();
    let inf = DriverInf::parse(&bytes, &target(10, 0, 19045, Arch::X86)).unwrap();
    assert_eq!(inf.models[0].install_section, "BALLOON_Device.NT");
    assert_eq!(inf.device_service().unwrap().start_type, 3);
    assert_eq!(
        inf.install("balloon_device.nt").unwrap().hw_add_reg.len(),
        4
    );
}

const SHAPES: &str = r#"
[version]
ClassGuid={4d36e97b-e325-11ce-bfc1-08002be10318}
Class=SCSIAdapter
Provider=Someone
DriverVer = 6-1-2006
CatalogFile=plain.cat
CatalogFile.NTamd64=x64.cat
[SourceDisksFiles]
a.sys=1
[SourceDisksFiles.amd64]
b.dll=1
..\evil.sys=1
[DestinationDirs]
DefaultDestDir=12
tools=10,Sub\Dir
[Manufacturer]
%M%=Mod,NTamd64.6.0,NTamd64.6.2
Other=Gone,NTx86
[Mod.NTamd64.6.0]
"old"=Old,PCI\VEN_1
[Mod.NTamd64.6.2]
"new, quoted"=New,,PCI\VEN_1&CC_0100,PCI\VEN_1
[Old]
[New]
CopyFiles=@c.sys
[New.NTamd64.6.2]
CopyFiles=tools,@c.sys
FeatureScore=FE
Include=pci.inf
AddReg=sw
[New.NTamd64.6.2.Services]
AddService=,2
AddService=filter,,flt
AddService=main,0x2,svc
[New.NTamd64.10.0]
[flt]
ServiceType=1
StartType=3
ErrorControl=1
ServiceBinary=%12%\sub\f.sys
[svc]
ServiceType=0x1
StartType=0x0
ErrorControl=3
Tag=0x21
ServiceBinary=%12%\m.sys
[tools]
to.exe,from.ex_
keep.exe
..\x.exe
[sw]
HKR,,Multi,0x00010000,a,b
HKR,,Bin,1,01,ff
HKR,,Four,0x00010001,0a,00,00,01
HKR,,Neg,0x00010001,-1
HKLM,Some\Key\,Text,,"x=y, z"
HKR,Only\Key
HKR,,Gone,0x4
HKR,,Qword,0x000b0001,1
[Strings]
M=Maker
"#;

#[test]
fn unusual_shapes() {
    let inf = DriverInf::parse(SHAPES.as_bytes(), &target(6, 3, 9600, Arch::Amd64)).unwrap();
    assert_eq!(inf.catalog.as_deref(), Some("x64.cat"));
    assert_eq!(inf.source_files, ["a.sys", "b.dll"]);
    assert_eq!(inf.driver_ver.version, [0; 4]);
    assert_eq!(inf.models.len(), 1);
    let model = &inf.models[0];
    assert_eq!(model.description.value, "new, quoted");
    assert_eq!(model.description.token(), None);
    assert_eq!(model.manufacturer.token(), Some("M"));
    assert_eq!(model.install_section, "New.NTamd64.6.2");
    assert_eq!(model.hardware_ids, [r"PCI\VEN_1&CC_0100", r"PCI\VEN_1"]);
    let install = &inf.installs[0];
    assert_eq!(install.feature_score, 0xfe);
    assert_eq!(install.includes, ["pci.inf"]);
    assert_eq!(install.services.len(), 2);
    let main = install.device_service().unwrap();
    assert_eq!((main.name.as_str(), main.tag), ("main", Some(0x21)));
    let copies: Vec<_> = install
        .copy_files
        .iter()
        .map(|c| (c.to.dirid, c.to.path.as_str(), c.source.as_str()))
        .collect();
    assert_eq!(
        copies,
        [
            (10, r"Sub\Dir\to.exe", "from.ex_"),
            (10, r"Sub\Dir\keep.exe", "keep.exe"),
            (12, "c.sys", "c.sys"),
        ]
    );
    let regs: Vec<_> = install
        .add_reg
        .iter()
        .map(|l| {
            (
                l.root.as_str(),
                l.subkey.as_str(),
                l.name.as_str(),
                l.data.clone(),
            )
        })
        .collect();
    assert_eq!(
        regs,
        [
            (
                "HKR",
                "",
                "Multi",
                Some(RegData::MultiSz(vec!["a".into(), "b".into()]))
            ),
            ("HKR", "", "Bin", Some(RegData::Binary(vec![1, 0xff]))),
            ("HKR", "", "Four", Some(RegData::Dword(0x0100_000a))),
            ("HKR", "", "Neg", Some(RegData::Dword(u32::MAX))),
            (
                "HKLM",
                r"Some\Key",
                "Text",
                Some(RegData::Sz("x=y, z".into()))
            ),
            ("HKR", r"Only\Key", "", None),
        ]
    );
}

#[test]
fn refusals_name_section_and_key() {
    let cases = [
        (
            "ServiceBinary=%12%\\m.sys",
            "ServiceBinary=m.sys",
            "ServiceBinary",
        ),
        (
            "ServiceBinary=%12%\\m.sys",
            "ServiceBinary=%12%\\..\\m.sys",
            "ServiceBinary",
        ),
        ("StartType=0x0", "StartType=boot", "StartType"),
        ("DriverVer = 6-1-2006", "DriverVer = 2006", "DriverVer"),
        (
            "DriverVer = 6-1-2006",
            "DriverVer = 6/1/2006,1.2.3.70000",
            "DriverVer",
        ),
        ("{4d36e97b-", "{x-", "ClassGuid"),
        ("0x2,svc", "0x2,nowhere", "AddService"),
        ("Multi,0x00010000", "Multi,what", "line"),
    ];
    for (from, to, key) in cases {
        let text = SHAPES.replacen(from, to, 1);
        assert_ne!(text, SHAPES);
        let error =
            DriverInf::parse(text.as_bytes(), &target(6, 3, 9600, Arch::Amd64)).unwrap_err();
        assert!(error.to_string().contains(key), "{error}");
    }
}

/// Dates that real hives store as FILETIME.
#[test]
fn dates() {
    let cases = [
        ("06/21/2006", 0x01c6_94c5_a38c_8000u64),
        ("7/11/2019", 0x01d5_377b_9524_8000),
        ("1/1/1601", 0),
    ];
    for (date, filetime) in cases {
        assert_eq!(
            DriverVer::parse(date, "").unwrap().filetime(),
            filetime,
            "{date}"
        );
    }
    let leap = DriverVer::parse("2/29/2000", "").unwrap().filetime();
    let next = DriverVer::parse("3/1/2000", "").unwrap().filetime();
    assert_eq!(next - leap, 864_000_000_000);
    for bad in [
        "",
        "13/1/2000",
        "1/1/2000/1",
        "x/1/2000",
        "1/0/2000",
        "1/1/1600",
    ] {
        assert_eq!(DriverVer::parse(bad, ""), None, "{bad}");
    }
}

/// Without decorations a models section is for x86, and an architecture in one counts (Microsoft, "INF
/// Manufacturer Section").
#[test]
fn a_models_section_without_a_decoration_is_for_x86() {
    let inf = |manufacturer: &str, sections: &str| {
        format!(
            "[Version]\r\nClassGuid={{4d36e97b-e325-11ce-bfc1-08002be10318}}\r\n\
             DriverVer=01/02/2020,1.0\r\n[Manufacturer]\r\nMaker={manufacturer}\r\n{sections}\
             [inst]\r\n"
        )
    };
    let plain = "[m]\r\nDisk=inst,PCI\\VEN_1AF4&DEV_1042\r\n";
    let amd64 = "[m.NTamd64]\r\nDisk=inst,PCI\\VEN_1AF4&DEV_1042\r\n";
    for (manufacturer, sections, x86, x64) in [
        ("m", plain.to_string(), true, false),
        ("m,NTamd64", amd64.to_string(), false, true),
        ("m,NTamd64", format!("{plain}{amd64}"), true, true),
        ("m,NTx86", plain.to_string(), false, false),
    ] {
        let text = inf(manufacturer, &sections);
        for (arch, expected) in [(Arch::X86, x86), (Arch::Amd64, x64)] {
            let found = DriverInf::parse(text.as_bytes(), &target(6, 1, 7601, arch));
            assert_eq!(
                found.is_ok(),
                expected,
                "{manufacturer} {arch:?} {sections}"
            );
        }
    }
}
