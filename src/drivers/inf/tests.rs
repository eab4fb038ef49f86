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
y.exe,..\y.exe
..\z.exe,z.exe
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
M=Maker,Other
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
    assert_eq!(model.manufacturer.value, "Maker");
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

/// Everything an INF may say, for two architectures and several versions.
const WHOLE: &str = r#"
[Version]
ClassGuid = {4D36E97B-E325-11CE-BFC1-08002BE10318}
Class     = "SCSI" ; the class
Provider  = %P%
DriverVer = 02/03/2024 , 1.2.3.4
CatalogFile = plain.cat
CatalogFile.nt = nt.cat
CatalogFile.ntx86 = x86.cat
PnpLockdown = 0
[SourceDisksFiles]
z.sys = 1
A.sys = 1
sub:x = 1
. = 1
[SourceDisksFiles.x86]
only86.dll = 1
[SourceDisksFiles.amd64]
only64.dll = 1
[DestinationDirs]
DefaultDestDir = 0xc
own = 11, "\Sub\"
noid = twelve
[Manufacturer]
%P% = First, NTamd64.6.1, NTx86.6.1
Second, NTamd64.....7602
Nobody = Third, NTarm64
[First.NTamd64.6.1]
%One% = Inst, PCI\VEN_1&DEV_1&SUBSYS_1, PCI\VEN_1&DEV_1
"%One% of two" = Inst, PCI\VEN_1&DEV_2
%NoId% = Inst
%Gone% = Missing, PCI\VEN_1&DEV_3
[First.NTx86.6.1]
%One% = Inst, PCI\VEN_86
[Second.NTamd64.....7602]
Late = Other, PCI\VEN_2, , PCI\VEN_2&CC_1
[Inst]
CopyFiles = never
[Inst.NT]
CopyFiles = own, @sys.dll, @a\b.dll
CopyFiles = noid, nodir
Include = machine.inf, pci.inf
Needs = x
AddReg = one, absent, two
FeatureScore = 0x7F
[Inst.NT.10.0]
CopyFiles = own
AddReg = two
[Inst.NTamd64]
Include = amd64.inf
[Inst.NT.HW]
AddReg = hw
[Inst.HW]
AddReg = two
[Inst.Services]
AddService = svc, 2, svc_section, log_section
AddService = helper, , helper_section
DelService = gone
[Other]
[Other.NT.10.0]
[svc_section]
DisplayName = %Show%
ServiceType = 0x10
StartType = %BOOT%
ErrorControl = 3
ServiceBinary = %13%\a\z.sys
LoadOrderGroup = "Base"
Tag = 7
AddReg = hw
[helper_section]
ServiceType = 2
StartType = 4
ErrorControl = 0
ServiceBinary = %11%\helper.exe
LoadOrderGroup =
[log_section]
AddReg = log
[log]
HKR,,EventMessageFile,0,"plain.dll"
HKR,,eventmessagefile,0x00020000,"other.dll"
HKR,,TYPESSUPPORTED,0x00010001,3
[own]
to.sys, z.sys,, 2
[nodir]
same.dll
[noid]
lost.dll
[one]
HKR, Key\Sub\, Expand, 0x00020000, "%%SystemRoot%%\x"
hkcr,,Multi,%MULTI%,a,,b
HKR,,None,0x00020001,0x0a,0B
HKR,,Binary,1,
HKR,,Number,0x00010001,0xff
HKR,,Number4,0x00010001,1,2,3,4
HKR,,Sz
HKR,,First,0,a,b
HKR,,Quoted,,"a ""b"" ; c"
[two]
HKR,New
HKR,New,,0x10
HKR,New,Named,0x2000
HKR,,,0,default
HKR,New,"",,text
HKR,,Delete,4
HKR,,Qword,0x000b0001,1
key = HKR,,NotARegistryLine,0,x
[hw]
HKR,Interrupt,Limit,0x00010001,-1
[Strings]
P = "Maker"
One = "The one"
Show = "Shown"
BOOT = 0
MULTI = 0x10000
"#;

#[test]
fn the_whole_of_an_inf_as_each_windows_takes_it() {
    let shown = |target: &WindowsTarget| {
        let inf = DriverInf::parse(WHOLE.as_bytes(), target).unwrap();
        format!(
            "{target}\n{}\n",
            serde_json::to_string_pretty(&inf).unwrap()
        )
    };
    insta::assert_snapshot!("whole-x86", shown(&target(6, 1, 7601, Arch::X86)));
    insta::assert_snapshot!("whole-amd64", shown(&target(6, 1, 7601, Arch::Amd64)));
    // Of the second manufacturer the models count from this build on. An install section that names
    // the architecture precedes one that names a version.
    let of = |build| DriverInf::parse(WHOLE.as_bytes(), &target(10, 0, build, Arch::Amd64));
    let models = |inf: &DriverInf| {
        let models = inf.models.iter();
        models
            .map(|m| m.install_section.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        models(&of(7602).unwrap()),
        ["Inst.NTamd64", "Inst.NTamd64", "Other.NT.10.0"]
    );
    assert_eq!(of(7602).unwrap().installs.len(), 2);
    let x86 = DriverInf::parse(WHOLE.as_bytes(), &target(10, 0, 1, Arch::X86)).unwrap();
    assert_eq!(models(&x86), ["Inst.NT.10.0"]);
    let arm = DriverInf::parse(WHOLE.as_bytes(), &target(10, 0, 1, Arch::Arm64)).unwrap_err();
    assert_eq!(
        arm.to_string(),
        "INF names nothing for Windows NT 10.0.1 client arm64"
    );
}

#[test]
fn what_an_inf_lacks_is_named() {
    let parse = |from: &str, to: &str| {
        let text = WHOLE.replacen(from, to, 1);
        assert_ne!(text, WHOLE, "{from}");
        DriverInf::parse(text.as_bytes(), &target(6, 1, 7601, Arch::Amd64))
    };
    for (from, to, message) in [
        ("[Version]", "[Other]", "INF has no [Version] section"),
        (
            "[Manufacturer]",
            "[Other]",
            "INF has no [Manufacturer] section",
        ),
        (
            "DriverVer =",
            "Driver =",
            "INF [Version] has no usable DriverVer: it is missing",
        ),
        (
            "02/03/2024",
            "2024",
            "INF [Version] has no usable DriverVer: 2024",
        ),
        (
            "{4D36E97B",
            "{4D36",
            "INF [Version] has no usable ClassGuid: {4D36-E325-11CE-BFC1-08002BE10318}",
        ),
        (
            "svc, 2",
            "a\\b, 2",
            "INF [svc_section] has no usable AddService: \"a\\\\b\" is not a service name",
        ),
        (
            "svc, 2",
            "a/b, 2",
            "INF [svc_section] has no usable AddService: \"a/b\" is not a service name",
        ),
        (
            "[svc_section]",
            "[other]",
            "INF [svc_section] has no usable AddService: the service section is missing",
        ),
        (
            "StartType = %BOOT%",
            "",
            "INF [svc_section] has no usable StartType: \"\" is not a number",
        ),
        (
            "ServiceType = 0x10",
            "ServiceType = 0xg",
            "INF [svc_section] has no usable ServiceType: \"0xg\" is not a number",
        ),
        (
            "ErrorControl = 3",
            "ErrorControl = x",
            "INF [svc_section] has no usable ErrorControl: \"x\" is not a number",
        ),
        (
            "%13%\\a\\z.sys",
            "%13%",
            "INF [svc_section] has no usable ServiceBinary: \"%13%\" is not a path",
        ),
        (
            "Interrupt,Limit,0x00010001,-1",
            "Interrupt,Limit,0x00010001,x",
            "INF [hw] has no usable line LINE: \"x\" is not a number",
        ),
        (
            "Interrupt,Limit,0x00010001,-1",
            "Interrupt,Limit,1,123",
            "INF [hw] has no usable line LINE: \"123\" is not a byte",
        ),
        (
            "Interrupt,Limit,0x00010001,-1",
            "Interrupt,Limit,0x00010001,1,2,,4",
            "INF [hw] has no usable line LINE: four bytes are needed",
        ),
        (
            "Interrupt,Limit,0x00010001,-1",
            "Interrupt,Limit,no,1",
            "INF [hw] has no usable line LINE: \"no\" are no flags",
        ),
    ] {
        let line = WHOLE.lines().position(|l| l.contains(from)).unwrap() + 1;
        let expected = message.replace("LINE", &line.to_string());
        assert_eq!(parse(from, to).unwrap_err().to_string(), expected);
    }
}

#[test]
fn the_catalogue_of_the_architecture_precedes_the_common_ones() {
    let catalog = |gone: &[&str], arch| {
        let mut text = WHOLE.to_string();
        for line in gone {
            text = text.replace(line, "");
        }
        let inf = DriverInf::parse(text.as_bytes(), &target(6, 1, 7601, arch)).unwrap();
        inf.catalog
    };
    let (own, nt, plain) = (
        "CatalogFile.ntx86 = x86.cat",
        "CatalogFile.nt = nt.cat",
        "CatalogFile = plain.cat",
    );
    let is = |name: &str| Some(name.to_string());
    assert_eq!(catalog(&[], Arch::X86), is("x86.cat"));
    assert_eq!(catalog(&[], Arch::Amd64), is("nt.cat"));
    assert_eq!(catalog(&[own], Arch::X86), is("nt.cat"));
    assert_eq!(catalog(&[own, nt], Arch::X86), is("plain.cat"));
    assert_eq!(catalog(&[own, nt, plain], Arch::X86), None);
    let empty = WHOLE.replace(own, "CatalogFile.ntx86 =");
    let inf = DriverInf::parse(empty.as_bytes(), &target(6, 1, 7601, Arch::X86)).unwrap();
    assert_eq!(inf.catalog, None);
}

#[test]
fn dates_and_versions_at_their_limits() {
    for (date, version, expected) in [
        ("12/31/9999", "65535.0.0.1", Some([65535, 0, 0, 1])),
        ("1-1-1601", "", Some([0; 4])),
        (" 1 / 2 / 2000 ", " 1 . 2 ", Some([1, 2, 0, 0])),
        ("1/1/2000", "1.2.3.4.5", None),
        ("1/1/2000", "65536", None),
        ("1/1/2000", "1..2", None),
        ("0/1/2000", "", None),
        ("12/32/2000", "", None),
        ("1/31/10000", "", None),
        ("1/31", "", None),
    ] {
        let found = DriverVer::parse(date, version).map(|v| v.version);
        assert_eq!(found, expected, "{date:?} {version:?}");
    }
    // 400 years are 146097 days.
    let day = |date: &str| DriverVer::parse(date, "").unwrap().filetime() / 864_000_000_000;
    assert_eq!(day("1/1/2001"), 146_097);
    assert_eq!(day("12/31/1601"), 364);
    assert_eq!(day("3/1/1900") - day("2/28/1900"), 1);
    let ver = DriverVer::parse("2/3/2024", "1.2.3.4").unwrap();
    let (year, month, day) = (2024, 2, 3);
    assert_eq!(ver.date, DriverDate { year, month, day });
    assert_eq!(ver.version_text(), "1.2.3.4");
}

#[test]
fn a_path_begins_with_a_directory_id_and_stays_below_it() {
    for (text, expected) in [
        ("%12%\\x.sys", Some((12, "x.sys"))),
        ("%13%x.sys", Some((13, "x.sys"))),
        ("%10%\\\\a\\b.sys", Some((10, "a\\b.sys"))),
        ("%12%\\", None),
        ("%12%\\a\\\\b", None),
        ("%12%\\..\\b", None),
        ("%12%\\a/b", None),
        ("%12%\\c:x", None),
        ("%x%\\b", None),
        ("12%\\b", None),
        ("", None),
    ] {
        let found = parse_path(text).map(|p| (p.dirid, p.path));
        let expected = expected.map(|(dirid, path)| (dirid, path.to_string()));
        assert_eq!(found, expected, "{text}");
    }
    for (raw, token) in [
        ("%A%", Some("A")),
        ("%%", None),
        ("%A", None),
        ("A%", None),
        ("%A%%B%", None),
        ("%", None),
    ] {
        let value = String::new();
        let text = Text {
            raw: raw.into(),
            value,
        };
        assert_eq!(text.token(), token, "{raw}");
    }
}

/// Between the dots of a decoration may be nothing; a suffix makes it another kind of section.
#[test]
fn an_install_section_may_name_a_build_only() {
    let text = |build: &str| {
        format!(
            "[Version]\nClassGuid={{4d36e97b-e325-11ce-bfc1-08002be10318}}\nDriverVer=1/1/2020,1\n\
             [Manufacturer]\nM=m,NTamd64\n[m.NTamd64]\nD=i,PCI\\X\n[i]\n[i.NTamd64.10.0]\n\
             [i.NTamd64.10.0...{build}]\n[i.NTamd64.10.0.Services]\n[i.NTamd64.10.0.Services.x]\n\
             [i.NTamd64.10.0...{build}.Services]\n[i.NTamd64.10.0...{build}.HW]\n"
        )
    };
    for (build, section) in [
        ("5", "i.NTamd64.10.0...5"),
        ("6", "i.NTamd64.10.0"),
        ("Wdf", "i.NTamd64.10.0"),
    ] {
        let inf = DriverInf::parse(text(build).as_bytes(), &target(10, 0, 5, Arch::Amd64));
        assert_eq!(inf.unwrap().models[0].install_section, section, "{build}");
    }
}

/// A line for another Windows, or one that names no section, is passed over.
#[test]
fn lines_for_others_come_before_and_between_those_that_count() {
    let text = "[Version]\nClassGuid={4d36e97b-e325-11ce-bfc1-08002be10318}\nDriverVer=1/1/2020,1\n\
        [Manufacturer]\nA=other,NTarm64\nB=gone,NTamd64\nC=m,NTamd64\n\
        [other.NTarm64]\nX=i,PCI\\X\n\
        [m.NTamd64]\nLost=missing,PCI\\L\nPlain=none,PCI\\N\nDisk=i,PCI\\D\n\
        [none]\n[none.Services]\nAddService=,2\n\
        [i]\n[i.Services]\nAddService=svc,2,s\n\
        [s]\nServiceType=1\nStartType=0\nErrorControl=1\nServiceBinary=%12%\\x.sys\n";
    let inf = DriverInf::parse(text.as_bytes(), &target(10, 0, 19045, Arch::Amd64)).unwrap();
    let models: Vec<_> = inf.models.iter().map(|m| &*m.hardware_ids[0]).collect();
    assert_eq!(models, ["PCI\\N", "PCI\\D"]);
    // The first device needs no driver.
    assert_eq!(inf.device_service().unwrap().name, "svc");
}
