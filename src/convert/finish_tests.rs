//! The documents of a VM, and the errors when one of them cannot be written.

use super::super::testing::job;
use super::*;
use crate::domain::model::Bridge;
use crate::domain::tests::machine;
use crate::domain::{DiskFormat, Firmware};
use crate::types::{Arch, DiskBus};

fn portable(folder: &Path) -> Job {
    let mut job = job(&["/source.raw".into()], folder);
    // Whatever firmware this host has.
    job.vm.machine.portable = true;
    job
}

/// The final form of a VM that needs its first boot would stop with 0x7B.
#[test]
fn each_stage_has_its_documents_and_the_first_boot_comes_first() {
    let folder = Path::new("/out");
    let mut job = portable(folder);
    job.vm.emit = vec![Emit::Kubevirt, Emit::Qemu, Emit::Proxmox];
    for (first_boot, wanted) in [
        (
            true,
            &[
                "win10-bootstrap.xml",
                "win10-final.xml",
                "win10-kubevirt-bootstrap.yaml",
                "win10-kubevirt-final.yaml",
                "win10-qemu-bootstrap.sh",
                "win10-qemu-final.sh",
                "win10-proxmox.sh",
            ][..],
        ),
        (
            false,
            &[
                "win10-final.xml",
                "win10-kubevirt-final.yaml",
                "win10-qemu-final.sh",
                "win10-proxmox.sh",
            ],
        ),
    ] {
        let mut machine = machine();
        machine.bootstrap = first_boot.then_some(DiskBus::Sata);
        let domains = written(&job, folder, &machine).unwrap();
        let files: Vec<_> = domains.documents.iter().map(|d| d.file.as_str()).collect();
        assert_eq!(files, wanted);
        let emitted: Vec<_> = wanted.iter().filter(|f| !f.ends_with(".xml")).collect();
        assert_eq!(domains.emitted.iter().collect::<Vec<_>>(), emitted);
        for document in &domains.documents {
            assert_eq!(document.script, document.file.ends_with(".sh"));
            let sata = document.text.contains("bus=\"sata\"");
            let xml = document.file.ends_with(".xml");
            assert!(
                !xml || sata == document.file.contains("bootstrap"),
                "{}",
                document.file
            );
        }
        let outputs = domains.outputs(folder, &machine.disks);
        let bootstrap = first_boot.then(|| folder.join("win10-bootstrap.xml"));
        assert_eq!(outputs.bootstrap_xml, bootstrap);
        assert_eq!(outputs.final_xml, Some(folder.join("win10-final.xml")));
        assert_eq!(outputs.emitted.len(), emitted.len());
        assert_eq!(outputs.disks, ["/vm/win10.qcow2"].map(PathBuf::from));
        assert_eq!(outputs.report, Some(folder.join("report.json")));
    }
}

#[test]
fn what_others_cannot_take_over_is_a_warning() {
    let folder = Path::new("/out");
    let mut job = portable(folder);
    let mut machine = machine();
    let warnings = |job: &Job, machine: &Machine| written(job, folder, machine).unwrap().warnings;
    assert_eq!(warnings(&job, &machine), [""; 0]);
    let mut bridge = Bridge::named("br0");
    bridge.vlan = Some(7);
    machine.nics[0].source = NicSource::Bridge(bridge);
    assert_eq!(warnings(&job, &machine).len(), 1);
    assert!(warnings(&job, &machine)[0].contains("VLAN"));
    // One of several is enough.
    machine.nics.push(machine.nics[0].clone());
    machine.nics[0].source = NicSource::Bridge(Bridge::named("br0"));
    assert_eq!(warnings(&job, &machine).len(), 1);
    machine.nics.pop();
    assert_eq!(warnings(&job, &machine), [""; 0]);
    // An overlay is of no use to who copies one file.
    machine.disks[0].backing = vec![domain::Backing {
        path: "/source.raw".into(),
        format: "raw".into(),
        socket: false,
    }];
    assert!(
        !written(&job, folder, &machine)
            .unwrap()
            .outputs(folder, &machine.disks)
            .complete
    );
    let mut two = machine.disks.clone();
    two.push(domain::Disk {
        backing: Vec::new(),
        ..two[0].clone()
    });
    let outputs = written(&job, folder, &machine)
        .unwrap()
        .outputs(folder, &two);
    assert!(!outputs.complete, "one of two is still on its source");
    job.vm.emit = vec![Emit::Proxmox];
    let said = warnings(&job, &machine);
    assert!(
        said.iter().any(|w| w.contains("hyper2kvm pull")),
        "{said:?}"
    );
}

const STAGED: &str =
    "<domain xmlns:p='urn:hyper2kvm:patch:1'><vcpu p:stage='STAGE'>5</vcpu></domain>";

#[test]
fn a_patch_of_the_user_is_in_both_stages_and_a_wrong_one_is_the_users() {
    let folder = Path::new("/out");
    let mut job = portable(folder);
    let patch = |text: &str| Some(Patch::parse(text.as_bytes()).unwrap());
    job.vm.xml_patch = patch("<domain><vcpu>3</vcpu></domain>");
    let domains = written(&job, folder, &machine()).unwrap();
    let xml = domains
        .documents
        .iter()
        .filter(|d| d.file.ends_with(".xml"));
    let said: Vec<_> = xml.map(|d| d.text.contains(">3</vcpu>")).collect();
    assert_eq!(said, [true, true]);
    // One for the first boot leaves the other domain as it is.
    job.vm.xml_patch = patch(&STAGED.replace("STAGE", "bootstrap"));
    let domains = written(&job, folder, &machine()).unwrap();
    let changed: Vec<_> = (domains.documents.iter())
        .map(|d| d.text.contains(">5</vcpu>"))
        .collect();
    assert_eq!(changed, [true, false]);
    job.vm.xml_patch = patch("<domain><name>another</name></domain>");
    let error = written(&job, folder, &machine()).map(|_| ()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Usage, "{error}");
    assert!(
        error.hints.iter().any(|hint| hint.contains("--xml-patch")),
        "{error:?}"
    );
}

/// A fault of the guest is refused with a remedy; a fault of an option is a mistake of the
/// user.
#[test]
fn a_domain_that_cannot_be_written_is_told_with_what_helps() {
    let path = || PathBuf::from("/vm/a.qcow2");
    let sector_size = || DomainError::SectorSize {
        path: path(),
        sector_size: 4096,
        bus: "SATA",
    };
    let bios = DomainError::BiosSectorSize {
        path: path(),
        sector_size: 4096,
    };
    let odd = DomainError::BadSectorSize {
        path: path(),
        sector_size: 520,
    };
    let many = DomainError::TooManyDisks {
        bus: "SATA",
        disks: 9,
        max: 6,
    };
    let slots = DomainError::TooManyDevices {
        chipset: "q35",
        needed: 40,
        max: 30,
    };
    let arm = DomainError::Arch { arch: Arch::Arm64 };
    let (first, last) = (Stage::Bootstrap, Stage::Final);
    for (error, stage, code, remedy) in [
        (sector_size(), first, "sector-size", "--bootstrap none"),
        (sector_size(), last, "sector-size", "--storage"),
        (bios, last, "sector-size", "512-byte"),
        (odd, last, "sector-size", "512-byte"),
        (many, first, "too-many-disks", "virtio-scsi"),
        (slots, last, "too-many-disks", "virtio-scsi"),
        (arm, last, "guest-arch", "its own architecture"),
    ] {
        let reason = error.to_string();
        let told = no_domain(error, stage);
        assert_eq!(told.kind, ErrorKind::Refused, "{reason}");
        let blocker = &told.blockers[0];
        assert_eq!((blocker.code.as_str(), &blocker.reason), (code, &reason));
        assert!(blocker.remedy.contains(remedy), "{}", blocker.remedy);
    }
    let ide = DomainError::NoIde {
        machine: "q35".into(),
    };
    let kind = DomainError::MachineType {
        machine: "z".into(),
    };
    let unwritable = DomainError::UnwritablePath { path: path() };
    for (error, remedy) in [
        (ide, "--machine"),
        (kind, "--machine"),
        (unwritable, "--output-dir"),
    ] {
        let told = no_domain(error, last);
        assert_eq!(told.kind, ErrorKind::Usage, "{told}");
        assert!(told.hints[0].contains(remedy), "{told:?}");
    }
    let told = no_domain(DomainError::NoBootstrap, first);
    assert_eq!(told.kind, ErrorKind::Failed);
    assert!(told.message.contains("bootstrap"), "{told}");
}

#[test]
fn scripts_are_programs_of_their_owner_and_the_rest_is_not() {
    let dir = tempfile::tempdir().unwrap();
    for (file, script, mode) in [("a.sh", true, 0o100), ("a.xml", false, 0)] {
        let document = TextFile {
            file: file.into(),
            text: "text".into(),
            script,
        };
        write(dir.path(), &document).unwrap();
        let path = dir.path().join(file);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "text");
        let found = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(found & 0o111, mode, "{file} {found:o}");
    }
    let nowhere = dir.path().join("nowhere");
    let document = TextFile {
        file: "a.xml".into(),
        text: String::new(),
        script: false,
    };
    assert!(write(&nowhere, &document).is_err());
}

#[test]
fn what_is_to_be_copied_is_foreseen_from_what_the_source_holds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 1 << 20], 8 << 20).unwrap();
    file.sync_all().unwrap();
    let image = Image::open_info(&path, Some("raw"), &[]).unwrap();
    let mut job = job(std::slice::from_ref(&path), dir.path());
    job.copy.format = DiskFormat::Raw;
    let at = |job: &Job, more| disk_outlook(job, "/out/a".into(), &image, more).unwrap();
    let now = at(&job, 0);
    assert_eq!(
        (now.virtual_size, now.format, now.later),
        (64 << 20, DiskFormat::Raw, false)
    );
    assert!((1 << 20..3 << 20).contains(&now.copied_at_most), "{now:?}");
    assert_eq!(
        at(&job, 5 << 20).copied_at_most,
        now.copied_at_most + (5 << 20)
    );
    assert_eq!(at(&job, u64::MAX).copied_at_most, 64 << 20);
    job.copy.method = Copying::InPlace;
    assert_eq!((at(&job, 9).copied_at_most, at(&job, 9).later), (0, false));
    job.copy.method = Copying::Later;
    assert_eq!((at(&job, 9).copied_at_most, at(&job, 9).later), (0, true));
}

/// The clusters of a qcow2 may be compressed, or be its tables.
#[test]
fn of_another_format_than_raw_its_data_is_counted_and_not_what_it_takes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    create_qcow2(&path, 64 << 20).unwrap();
    let image = Image::open_info(&path, Some("qcow2"), &[]).unwrap();
    let job = job(std::slice::from_ref(&path), dir.path());
    let at = |more| disk_outlook(&job, "/out/a".into(), &image, more).unwrap();
    assert!(image.allocated() > 0);
    assert_eq!([at(0).copied_at_most, at(9).copied_at_most], [0, 9]);
}

/// The first boot has what its firmware, its drivers and its probe need.
#[test]
fn a_domain_names_the_files_beside_its_disks_and_the_drivers_if_they_are_a_file() {
    use crate::demo::WinVersion;
    use crate::testing::{MemoryGuest, bootstrap, driver_source};
    let dir = tempfile::tempdir().unwrap();
    let iso = dir.path().join("virtio-win.iso");
    std::fs::write(&iso, "").unwrap();
    let version = WinVersion::Win10;
    let guest = MemoryGuest::new(version);
    let inspection = guest.look(&[], |_, survey| survey.inspection.clone());
    let basis = guest
        .prepare(&driver_source(), Some(bootstrap(version)))
        .basis;
    let mut job = portable(Path::new("/out"));
    job.drivers.source = Some(iso.clone());
    let targets = &machine().disks;
    let domains = domains(&job, Path::new("/out"), &basis, &inspection, targets).unwrap();
    let first = &domains.documents[0].text;
    for file in [
        iso.as_path(),
        "/out/vm-probe.qcow2".as_ref(),
        "/out/vm-nvram.fd".as_ref(),
    ] {
        assert!(first.contains(file.to_str().unwrap()), "{file:?}: {first}");
    }
    for device in [
        "org.qemu.guest_agent",
        "<memballoon model=\"virtio",
        "<rng model",
    ] {
        assert!(first.contains(device), "{device}: {first}");
    }
}

/// A source without data on this host may be one that does not tell.
#[test]
fn of_a_disk_that_takes_nothing_here_all_may_be_copied() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(64 << 20).unwrap();
    let image = Image::open_info(&path, Some("raw"), &[]).unwrap();
    let job = job(std::slice::from_ref(&path), dir.path());
    let outlook = disk_outlook(&job, "/out/a".into(), &image, 0).unwrap();
    assert_eq!(outlook.copied_at_most, 64 << 20);
}

#[test]
fn each_device_is_given_where_the_guest_has_its_own_driver() {
    use crate::demo::WinVersion;
    use crate::testing::{MemoryGuest, bootstrap, driver_source};
    let version = WinVersion::Win10;
    let guest = MemoryGuest::new(version);
    let prepared = guest.prepare(&driver_source(), Some(bootstrap(version)));
    let all = &prepared.basis.drivers;
    let found = |without: Option<&str>| {
        let mut drivers = all.clone();
        (drivers.packages).retain(|package| Some(package.driver.as_str()) != without);
        let Drivers {
            agent,
            balloon,
            rng,
            netkvm,
        } = optional_drivers(&drivers);
        [agent, balloon, rng, netkvm]
    };
    assert_eq!(found(None), [true; 4]);
    for (i, driver) in ["vioserial", "balloon", "viorng", "netkvm"]
        .iter()
        .enumerate()
    {
        let mut wanted = [true; 4];
        wanted[i] = false;
        assert_eq!(found(Some(driver)), wanted, "{driver}");
    }
}

#[test]
fn only_a_file_can_be_shown_as_a_cd() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("virtio-win.iso");
    std::fs::write(&file, "").unwrap();
    assert_eq!(iso(&file), Some(file));
    assert_eq!(iso(dir.path()), None);
    assert_eq!(iso(&dir.path().join("none")), None);
}

#[test]
fn a_form_that_has_no_room_is_refused_by_its_name() {
    let many = EmitError::TooManyDisks {
        bus: "SATA",
        disks: 9,
        max: 6,
    };
    let told = not_emitted(many, Emit::Proxmox);
    assert_eq!(
        (told.kind, told.blockers[0].code.as_str()),
        (ErrorKind::Refused, "emit-limit")
    );
    let remedy = &told.blockers[0].remedy;
    assert!(
        remedy.contains("--emit proxmox") && remedy.contains("virtio-scsi"),
        "{remedy}"
    );
}

#[test]
fn firmware_is_of_the_host_unless_the_host_is_another() {
    let mut vm = machine();
    vm.firmware = Firmware::Bios;
    for portable in [false, true] {
        let (choice, warning) = machine::firmware(&vm, portable);
        assert_eq!((choice, warning), (domain::FirmwareChoice::Bios, None));
    }
}

/// No firmware for that chipset has the keys of Secure Boot.
#[test]
fn firmware_that_the_host_lacks_is_a_warning_of_the_domains() {
    let mut job = portable(Path::new("/out"));
    let mut vm = machine();
    vm.machine_type = Some("pc".into());
    vm.firmware = Firmware::Uefi { secure_boot: true };
    for portable in [true, false] {
        job.vm.machine.portable = portable;
        let said = written(&job, Path::new("/out"), &vm).unwrap().warnings;
        assert_eq!(said.len(), usize::from(!portable), "{said:?}");
    }
}

#[test]
fn what_was_accepted_is_not_called_ready() {
    use crate::check::CheckState::{CouldNotRun, Fault, Ok};
    use crate::inspect::Severity;
    let check = |state| [Check::new("boot-path", Severity::Blocker, state, "")];
    let accepted = ["bcd-device".to_owned()];
    for (state, ready) in [(Ok, true), (Fault, false), (CouldNotRun, false)] {
        assert_eq!(is_ready(&check(state), &[]), ready);
        assert!(!is_ready(&check(state), &accepted));
    }
}
