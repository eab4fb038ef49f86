//! `convert` end to end, on every format, firmware and Windows generation, with results verified by
//! other programs.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use hyper2kvm::block::FileDisk;
use hyper2kvm::demo::pe::{self, Subsystem};
use hyper2kvm::demo::{Arch, DemoVolume, ExtraFile, Firmware, GuestSpec, Role, WinVersion, pack};
use hyper2kvm::guest::ntfs3g::{MountOptions, Ntfs3g};
use hyper2kvm::guest::{GuestPath, wof};
use serde_json::Value;
use support::{Lab, TOOLS, corpus, create_overlay, export, h2k, have, sha256, tool, virtio_win};

/// Verifies everything that must hold after a conversion of `source`, without hyper2kvm's readers.
fn convert_and_verify(lab: &Lab, source: &Path, bootstrap: &str, more: &[&str]) -> Value {
    let digest = sha256(source);
    let before = h2k(["inspect", source.to_str().unwrap(), "--json"])
        .expect(0)
        .json();
    for bus in ["virtio-blk", "virtio-scsi"] {
        assert_eq!(before["controllers"][bus]["ready"], false, "{bus} before");
    }

    let report = lab.convert(source, more).expect(0).json();
    assert_eq!(report["schema"], "hyper2kvm/convert/1");
    assert_eq!(sha256(source), digest, "the source was changed");
    for bus in [bootstrap, "virtio-blk", "virtio-scsi"] {
        assert_eq!(
            report["controllers"][bus]["ready"], true,
            "{bus}: {}",
            report["controllers"][bus]["reason"]
        );
    }
    let disk = report["outputs"]["disks"][0].as_str().unwrap();
    let verify = h2k(["verify", disk, "--controller", bootstrap, "--json"])
        .expect(0)
        .json();
    assert_eq!(verify["ready"], true);
    if disk.ends_with(".qcow2") {
        tool("qemu-img", &["check", "-q", disk]);
    }
    no_leftovers(lab.dir.path());

    let out = lab.path("out");
    let plan: Value =
        serde_json::from_str(&fs::read_to_string(out.join("plan.json")).unwrap()).unwrap();
    assert_eq!(plan["outputs"], report["outputs"]);
    assert_eq!(plan["disks"][0]["virtual"], report["bytes"]["virtual"]);
    let at_most = plan["disks"][0]["copied_at_most"].as_u64().unwrap();
    assert!(at_most >= report["bytes"]["read"].as_u64().unwrap());
    let raw = lab.raw_result(Path::new(disk));
    let volume = lab.volume(&raw);
    tool("ntfsfix", &["--no-action", volume.to_str().unwrap()]);
    files_are_those_of_the_driver_source(lab, &volume, &plan);
    hives_are_the_old_ones_plus_the_reg_files(lab, &volume, &out, &plan);

    // A converted disk needs no changes.
    let again = h2k([
        "plan",
        disk,
        "--virtio-iso",
        virtio_win().to_str().unwrap(),
        "--json",
    ])
    .expect(0)
    .json();
    assert_eq!(
        again["actions"],
        serde_json::json!([]),
        "a second run plans something"
    );
    report
}

fn no_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.ends_with(".partial"), "left behind: {name}");
    }
}

fn actions<'p>(plan: &'p Value, kind: &str) -> Vec<&'p Value> {
    let list = plan["actions"].as_array().unwrap();
    list.iter().filter(|a| a["kind"] == kind).collect()
}

fn files_are_those_of_the_driver_source(lab: &Lab, volume: &Path, plan: &Value) {
    let mut count = 0;
    for action in actions(plan, "copy-files") {
        for file in action["files"].as_array().unwrap() {
            let to = file["to"].as_str().unwrap().replace('\\', "/");
            let from = file["from"].as_str().unwrap();
            let from = if from.starts_with("generated/") {
                lab.path("out").join(from)
            } else {
                virtio_win().join(from)
            };
            assert_eq!(lab.ntfscat(volume, &to), fs::read(from).unwrap(), "{to}");
            count += 1;
        }
    }
    assert!(count >= 10, "only {count} files were copied");
}

/// Another implementation, `hivexregedit`, applies our `.reg` files to the original hives by hand, and what it then
/// exports must be what it exports from the converted guest, line by line.
fn hives_are_the_old_ones_plus_the_reg_files(lab: &Lab, volume: &Path, out: &Path, plan: &Value) {
    for action in actions(plan, "edit-hive") {
        let hive = action["hive"].as_str().unwrap();
        let prefix = action["edits"]["prefix"].as_str().unwrap();
        let guest_path = action["path"].as_str().unwrap().replace('\\', "/");
        let expected = lab.path("expected.hive");
        let found = lab.path("found.hive");
        fs::copy(out.join("backup").join(hive), &expected).unwrap();
        let reg = out.join("registry").join(format!("{hive}.reg"));
        tool(
            "hivexregedit",
            &[
                "--merge",
                "--prefix",
                prefix,
                expected.to_str().unwrap(),
                reg.to_str().unwrap(),
            ],
        );
        fs::write(&found, lab.ntfscat(volume, &guest_path)).unwrap();
        let (expected, found) = (
            export(&expected, prefix, "\\"),
            export(&found, prefix, "\\"),
        );
        for (line, (a, b)) in expected.lines().zip(found.lines()).enumerate() {
            assert_eq!(a, b, "{hive} line {line}");
        }
        assert_eq!(expected.lines().count(), found.lines().count(), "{hive}");
    }
}

fn spec(version: WinVersion, change: impl FnOnce(&mut GuestSpec)) -> GuestSpec {
    let mut spec = GuestSpec::new(version);
    spec.disk_size = 1 << 30;
    change(&mut spec);
    spec
}

#[test]
fn every_format() {
    if !have(&TOOLS) {
        return;
    }
    let formats = [
        ("vmdk", "subformat=monolithicSparse", "guest.vmdk"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "split.vmdk"),
        ("vmdk", "subformat=streamOptimized", "stream.vmdk"),
        ("vpc", "force_size=on", "guest.vhd"),
        ("vhdx", "", "guest.vhdx"),
        ("vdi", "", "guest.vdi"),
        ("qcow2", "", "guest.qcow2"),
    ];
    let lab = Lab::new(spec(WinVersion::Win10, |_| {}));
    for (format, options, name) in formats {
        let source = lab.in_format(format, options, name);
        eprintln!("{name}");
        convert_and_verify(&lab, &source, "sata", &["--force"]);
    }
    eprintln!("backing file");
    let top = lab.path("top.qcow2");
    let base = lab.path("guest.qcow2");
    create_overlay(base.to_str().unwrap(), "qcow2", &top);
    let digest = sha256(&base);
    convert_and_verify(&lab, &top, "sata", &["--force"]);
    assert_eq!(sha256(&base), digest);
    eprintln!("raw");
    convert_and_verify(&lab, &lab.raw, "sata", &["--force", "--format", "raw"]);
}

#[test]
fn every_windows() {
    if !have(&TOOLS) {
        return;
    }
    type Case = (WinVersion, Arch, Firmware);
    let cases: [Case; 11] = [
        (WinVersion::Win7, Arch::X86, Firmware::Bios),
        (WinVersion::Win7, Arch::Amd64, Firmware::Bios),
        (WinVersion::Server2008R2, Arch::Amd64, Firmware::Bios),
        (WinVersion::Win81, Arch::Amd64, Firmware::Bios),
        (WinVersion::Server2012R2, Arch::Amd64, Firmware::Uefi),
        (WinVersion::Win10, Arch::X86, Firmware::Bios),
        (WinVersion::Server2016, Arch::Amd64, Firmware::Bios),
        (WinVersion::Server2019, Arch::Amd64, Firmware::Uefi),
        (WinVersion::Win11, Arch::Amd64, Firmware::Uefi),
        (WinVersion::Server2022, Arch::Amd64, Firmware::Uefi),
        (WinVersion::Server2025, Arch::Amd64, Firmware::Uefi),
    ];
    for (version, arch, firmware) in cases {
        eprintln!("{version:?} {arch:?} {firmware:?}");
        let lab = Lab::new(spec(version, |s| {
            s.arch = arch;
            s.firmware = firmware;
        }));
        let report = convert_and_verify(&lab, &lab.raw, "sata", &[]);
        for xml in ["bootstrap_xml", "final_xml"] {
            let path = report["outputs"][xml].as_str().unwrap();
            if have(&["virt-xml-validate"]) {
                tool("virt-xml-validate", &[path, "domain"]);
            }
        }
    }
}

/// What a `.reg` file says about one key.
/// A file of 1.2 TB with small clusters: `qemu-img check` would need more memory than it may have.
#[test]
fn a_long_qcow2_with_small_clusters() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let source = lab.in_format("qcow2", "cluster_size=4k", "long.qcow2");
    let file = fs::File::options().write(true).open(&source).unwrap();
    file.set_len(1200 << 30).unwrap();
    lab.convert(&source, &[]).expect(0);
}

fn section<'t>(reg: &'t str, key: &str) -> Option<&'t str> {
    let (_, rest) = reg.split_once(&format!("\\{key}]"))?;
    rest.split("\n[").next()
}

/// The placement of drivers that are not needed to boot, and the inputs of the first boot.
#[test]
fn besides_storage() {
    if !have(&TOOLS) {
        return;
    }
    let read = |lab: &Lab, file: &str| fs::read_to_string(lab.path("out").join(file)).unwrap();
    for (version, hive, placement) in [
        (WinVersion::Win7, None, "staged"),
        (WinVersion::Win81, Some("SYSTEM"), "installed"),
        (WinVersion::Server2022, Some("DRIVERS"), "installed"),
    ] {
        eprintln!("{version:?}");
        let lab = Lab::new(spec(version, |_| {}));
        convert_and_verify(&lab, &lab.raw, "sata", &[]);
        let plan: Value = serde_json::from_str(&read(&lab, "plan.json")).unwrap();
        for driver in plan["drivers"].as_array().unwrap() {
            let boot = driver["role"] == "storage";
            let wanted = if boot { "boot" } else { placement };
            assert_eq!(driver["placement"], wanted, "{driver}");
        }
        assert_eq!(
            lab.path("out/registry/DRIVERS.reg").exists(),
            hive == Some("DRIVERS")
        );
        if let Some(hive) = hive {
            let edits = read(&lab, &format!("registry/{hive}.reg"));
            assert!(edits.contains(r"\DriverPackages\netkvm.inf_amd64_"));
            assert!(edits.contains("OemInfMap"));
        }
        let folder = r"Windows/System32/CatRoot/{F750E6C3-38EE-11D1-85E5-00C04FC295EE}";
        let files = plan["actions"].to_string().replace(r"\\", "/");
        assert!(files.contains(folder), "catalogues");
        // The service as in the INF, only if the package is there.
        let system = read(&lab, "registry/SYSTEM.reg");
        let netkvm = section(&system, r"ControlSet001\Services\netkvm");
        assert_eq!(netkvm.is_some(), hive.is_some());
        assert!(netkvm.is_none_or(|s| s.contains("\"Start\"=dword:00000003")));
        // The old hypervisor's tools are disabled; its boot driver is not changed.
        let tools = section(&system, r"ControlSet001\Services\VMTools").unwrap();
        assert!(tools.contains("\"Start\"=dword:00000004"), "{tools}");
        assert!(!system.to_lowercase().contains(r"services\pvscsi"));
        let software = read(&lab, "registry/SOFTWARE.reg");
        assert!(software.contains(r"TaskCache\Tree\VMware Tools update]"));
        let run = section(&software, r"Microsoft\Windows\CurrentVersion\Run").unwrap();
        assert!(run.contains("\"VMware User Process\"=-"), "{run}");
        let system = read(&lab, "registry/SYSTEM.reg");
        assert!(
            system.contains("Services\\hyper2kvm-firstboot\\Parameters]"),
            "{system}"
        );
        let script = read(&lab, "generated/firstboot.cmd");
        let removal = match version {
            WinVersion::Server2022 => "call :ghost pnputil",
            _ => "call :ghost registry",
        };
        for text in [
            "WANT=",
            "address=192.0.2.10",
            "203.0.113.53 index=3",
            removal,
            r"SUBSYS_07D015AD&REV_00\000C29FFFFF3FFDE00",
            r"call :driver drivers\netkvm.inf netkvm ",
        ] {
            assert!(script.contains(text), "{text}");
        }
    }
    let lab = Lab::new(spec(WinVersion::Win10, |_| {}));
    let report = lab
        .convert(&lab.raw, &["--network", "dhcp"])
        .expect(0)
        .json();
    assert!(!report["warnings"].to_string().contains("static"));
    let script = read(&lab, "generated/firstboot.cmd");
    assert!(!script.contains("netsh interface ip") && script.contains("call :ghost"));
    let uninstall = ["--uninstall-tools", "--network", "leave", "--force"];
    lab.convert(&lab.raw, &uninstall).expect(0);
    let script = read(&lab, "generated/firstboot.cmd");
    let product = "call :watched uninstall {fe2f6a2c-196e-4210-9c04-2b1bc21f07ef}";
    assert!(script.contains(product) && !script.contains("call :ghost"));
    let off = ["--no-firstboot", "--keep-tools", "--force"];
    let report = lab.convert(&lab.raw, &off).expect(0).json();
    assert!(report["warnings"].to_string().contains("static addresses"));
    let system = read(&lab, "registry/SYSTEM.reg");
    assert!(
        !system.contains("firstboot")
            && !system.contains("VMTools")
            && !system.contains("CrashControl")
    );
    let software = read(&lab, "registry/SOFTWARE.reg");
    assert!(!software.contains("TaskCache") && !software.contains("VMware"));
    assert!(!lab.path("out/generated").exists());
}

#[test]
fn clusters_and_sectors() {
    if !have(&TOOLS) {
        return;
    }
    for (sector, cluster) in [(512, 512), (512, 65536), (4096, 4096)] {
        eprintln!("sectors of {sector}, clusters of {cluster}");
        let lab = Lab::new(spec(WinVersion::Win10, |s| {
            s.sector_size = sector;
            s.cluster_size = cluster;
        }));
        // QEMU has no SATA disk with 4096-byte sectors: such a guest boots from virtio directly.
        let bootstrap = if sector == 4096 { "virtio-blk" } else { "sata" };
        let report = convert_and_verify(&lab, &lab.raw, bootstrap, &[]);
        assert_eq!(report["outputs"]["bootstrap_xml"].is_null(), sector == 4096);
    }
}

#[test]
fn traps_of_real_hives() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec(WinVersion::Server2022, |s| {
        s.control_set = 2;
        s.pci_overridden = true;
        s.windows_dir = "WINNT".into();
    }));
    convert_and_verify(&lab, &lab.raw, "sata", &["--storage", "virtio-scsi"]);
}

#[test]
fn real_hives() {
    if !have(&TOOLS) {
        return;
    }
    let (Some(system), Some(software)) = (
        corpus("win7-x86-vmware/SYSTEM"),
        corpus("win7-x86-vmware/SOFTWARE"),
    ) else {
        return;
    };
    let lab = Lab::new(spec(WinVersion::Win7, |s| {
        s.arch = Arch::X86;
        s.system_hive = Some(system);
        s.software_hive = Some(software);
    }));
    convert_and_verify(&lab, &lab.raw, "sata", &[]);

    let system = corpus("win10-vmware/SYSTEM").unwrap();
    let lab = Lab::new(spec(WinVersion::Win10, |s| s.system_hive = Some(system)));
    let report = convert_and_verify(&lab, &lab.raw, "sata", &[]);
    // Its logs are lost: it is converted nevertheless, with a warning.
    let findings = report["inspection"]["findings"].to_string();
    assert!(findings.contains("hive-stale"), "{findings}");
}

#[test]
fn an_ordinary_user_can() {
    if !have(&TOOLS) || !have(&["setpriv"]) || !rustix::process::geteuid().is_root() {
        return;
    }
    let lab = Lab::new(spec(WinVersion::Win10, |_| {}));
    let open = |path: &Path| {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    };
    open(lab.dir.path());
    open(virtio_win().parent().unwrap());
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(support::binary())
        .args(["convert", "guest.raw", "-o", "out", "--virtio-iso"])
        .arg(virtio_win())
        .env("HOME", "/nonexistent")
        .current_dir(lab.dir.path());
    support::finish(command).expect(0);
}

/// Programs compressed by CompactOS are read: the processor of a driver counts, and a replaced file
/// is kept.
#[test]
fn compact_os() {
    if !have(&TOOLS) {
        return;
    }
    let old = pe::image(Arch::Amd64, Subsystem::Gui);
    let lab = Lab::new(spec(WinVersion::Win10, |s| {
        s.compact_os = true;
        s.extra_files.push(ExtraFile {
            place: DemoVolume::Windows,
            path: r"Windows\System32\drivers\viostor.sys".into(),
            contents: old.clone(),
        });
    }));
    let report = convert_and_verify(&lab, &lab.raw, "sata", &["--force"]);
    assert_eq!(report["inspection"]["compact_os"], true);
    let backup = lab.path("out/backup/files/Windows/System32/drivers/viostor.sys");
    assert_eq!(fs::read(backup).unwrap(), old);

    let wrong = pe::image(Arch::X86, Subsystem::Native);
    let part = lab.spec.partition(Role::Windows).unwrap();
    let disk = Arc::new(FileDisk::open_rw(&lab.raw).unwrap());
    let mut volume = Ntfs3g::mount(disk, part.start, part.size, MountOptions::default()).unwrap();
    let driver = GuestPath::parse(r"Windows\System32\drivers\storahci.sys").unwrap();
    let point = wof::reparse_point(pack::ALGORITHM);
    volume.write_file(&driver, &wrong).unwrap();
    volume
        .make_wof(&driver, &pack::stream(&wrong), wrong.len() as u64, &point)
        .unwrap();
    volume.unmount().unwrap();
    let inspected = h2k(["inspect", lab.raw.to_str().unwrap(), "--json"])
        .expect(0)
        .json();
    let sata = &inspected["controllers"]["sata"];
    assert_eq!(sata["ready"], false, "{sata}");
    assert!(
        sata["steps"]
            .to_string()
            .contains("storahci.sys is for x86, Windows"),
        "{sata}"
    );
}

/// The demo's catalogues list their files and are not signed.
#[test]
fn signatures() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec(WinVersion::Win10, |_| {}));
    let raw = lab.raw.to_str().unwrap();
    let iso = lab.path("virtio-win");
    tool(
        "cp",
        &["-r", virtio_win().to_str().unwrap(), iso.to_str().unwrap()],
    );
    let plan = |more: &[&str]| {
        let mut args = vec!["plan", raw, "--json", "--virtio-iso", iso.to_str().unwrap()];
        args.extend(more);
        h2k(args)
    };
    let about = |run: support::Run| {
        let warnings = run.expect(0).json()["warnings"].clone();
        let list: Vec<String> = serde_json::from_value(warnings).unwrap();
        list.into_iter()
            .filter(|w| w.contains("(.cat)"))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        about(plan(&[])),
        [
            "viostor, vioscsi, netkvm, balloon, vioserial, viorng: the catalogue (.cat) is not signed; \
          Windows loads such drivers only in test mode (stop 0x7B otherwise)"
        ]
    );
    let refused = plan(&["--require-signed"]).expect(3).json();
    assert!(
        refused.to_string().contains("driver-signature"),
        "{refused}"
    );

    let driver = iso.join("viostor/w10/amd64/viostor.sys");
    let mut bytes = fs::read(&driver).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&driver, bytes).unwrap();
    fs::write(iso.join("vioscsi/w10/amd64/vioscsi.cat"), "no catalogue").unwrap();
    let lines = about(plan(&[]));
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(
        lines
            .iter()
            .any(|l| l.starts_with("viostor: viostor.sys is not what"))
    );
    assert!(
        lines
            .iter()
            .any(|l| l.starts_with("vioscsi: the catalogue (.cat) cannot be read"))
    );
}

/// A NIC of the source without an address, or with another one, is still the adapter in Windows.
#[test]
fn static_addresses_find_the_nic_of_the_source() {
    if !have(&TOOLS) {
        return;
    }
    const KNOWN: &str = "00:0c:29:f3:ff:de";
    const OTHER: &str = "00:50:56:00:00:01";
    let lab = Lab::new(spec(WinVersion::Server2022, |_| {}));
    let source = lab.path("vm.ovf");
    let disk = lab.raw.file_name().unwrap().to_str().unwrap();
    for (address, mac, by_address) in [(None, KNOWN, true), (Some(OTHER), OTHER, false)] {
        let address = address.map_or(String::new(), |a| format!("<Address>{a}</Address>"));
        let ovf = format!(
            "<Envelope><References><File id='f' href='{disk}'/></References>\
             <DiskSection><Disk diskId='d' fileRef='f'/></DiskSection>\
             <VirtualSystem id='vm'><VirtualHardwareSection>\
             <Item><InstanceID>1</InstanceID><ResourceType>17</ResourceType>\
             <HostResource>ovf:/disk/d</HostResource></Item>\
             <Item><InstanceID>2</InstanceID><ResourceType>10</ResourceType>{address}</Item>\
             </VirtualHardwareSection></VirtualSystem></Envelope>"
        );
        fs::write(&source, ovf).unwrap();
        let report = lab.convert(&source, &["--force"]).expect(0).json();
        let xml = fs::read_to_string(report["outputs"]["final_xml"].as_str().unwrap()).unwrap();
        assert!(xml.contains(&format!("<mac address=\"{mac}\"/>")), "{xml}");
        let script = fs::read_to_string(lab.path("out/generated/firstboot.cmd")).unwrap();
        assert!(script.contains("address=192.0.2.10"), "{mac}");
        assert_eq!(script.contains("WANT=000C29F3FFDE"), by_address, "{mac}");
        let warnings = report["warnings"].to_string();
        assert!(!warnings.contains("MAC address"), "{warnings}");
    }
}

/// Files staged in the guest run as SYSTEM: nobody else may write there, or read their log.
#[test]
fn what_is_staged_is_for_administrators_only() {
    if !have(&TOOLS) || !have(&["ntfssecaudit"]) {
        return;
    }
    let lab = Lab::new(GuestSpec::new(WinVersion::Win10));
    let run = lab.convert(&lab.raw, &["--format", "raw"]).expect(0);
    let disk = run.json()["outputs"]["disks"][0].clone();
    let volume = lab.volume(Path::new(disk.as_str().unwrap()));
    let folder = "/Windows/hyper2kvm";
    for name in ["", "/firstboot.cmd", "/drivers", "/drivers/viostor.inf"] {
        let path = format!("{folder}{name}");
        let said = tool("ntfssecaudit", &["-v", volume.to_str().unwrap(), &path]);
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(
            said.contains("Windows owner S-1-5-32-544"),
            "{path}: {said}"
        );
        assert!(said.contains("Windows group S-1-5-18"), "{path}: {said}");
        // Neither everybody nor users.
        assert!(said.contains("mode 0700"), "{path}: {said}");
    }
    // Its sibling has another descriptor.
    let said = tool(
        "ntfssecaudit",
        &["-v", volume.to_str().unwrap(), "/Windows/INF"],
    );
    assert!(!String::from_utf8_lossy(&said).contains("mode 0700"));
}
