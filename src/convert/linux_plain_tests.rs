//! Whole conversions of a Linux guest that need no program: it is copied, and its fall-back loader is made.

use std::fs;
use std::io::Write;
use std::sync::Arc;

use serde_json::{Value, json};

use super::super::report_tests::shown;
use super::super::testing::{LOADERS, Lab, Linux, SIZE, data, names, spec, ui};
use super::super::{convert_job, plan_job};
use super::*;
use crate::block::FileDisk;
use crate::demo::Role;
use crate::disk::stand_in;
use crate::domain::model::Bridge;
use crate::domain::{DiskFormat, NicSource};
use crate::guest::{EmbeddedReader, GuestPath, VolumeId};
use crate::inspect::OsFamily;
use crate::plan::outlook::DiskOutlook;

const FALLBACK: &str = r"\EFI\BOOT\BOOTX64.EFI";

fn none(_: &str) -> bool {
    false
}

/// The file of that name on the EFI system partition of a disk.
fn file(disk: &Path, path: &str) -> Option<Vec<u8>> {
    let disk = Arc::new(FileDisk::open(disk).unwrap());
    let layout = partition::read_layout(disk.as_ref()).unwrap();
    let guest: EmbeddedReader = embedded::open(disk, &layout).unwrap();
    let volume = VolumeId::new(spec().partition(Role::Esp).unwrap().index);
    let path = GuestPath::parse(path).unwrap();
    guest.stat(volume, &path).unwrap()?;
    Some(guest.read(volume, &path, 1 << 20).unwrap())
}

fn loader(name: &str) -> Option<Vec<u8>> {
    Some(format!(r"contents of \EFI\debian\{name}").into_bytes())
}

#[test]
fn a_linux_is_copied_on_the_word_of_the_user_and_gets_its_fall_back_loader() {
    let lab = Linux::new();
    let there = names(&lab.path(""));
    let mut job = lab.job();
    job.source.vm.notes = vec!["of the source".into()];
    job.vm.machine.macs = vec!["52:54:00:00:00:01".parse().unwrap()];
    job.vm.machine.network = NicSource::Bridge(Bridge {
        name: "br0".into(),
        vlan: Some(7),
    });
    let planned = plan_job(&job, &ui(), &none).unwrap();
    assert_eq!(names(&lab.path("")), there, "a plan writes nothing");
    assert_eq!(planned.inspection.os.hostname.as_deref(), Some("box"));
    let handover = planned.plan.linux.as_ref().unwrap();
    assert_eq!(handover.method, Method::AsIs);
    let steps: Vec<_> = handover.steps.iter().map(|step| step.id).collect();
    assert_eq!(steps, [plan::linux::UEFI_FALLBACK]);
    let outlook = planned.outlook.as_ref().unwrap();
    let out = lab.path("out");
    let len = data().len() as u64;
    let told = |disk: &DiskOutlook| {
        (
            disk.path.clone(),
            disk.virtual_size,
            disk.format,
            disk.later,
        )
    };
    let disks: Vec<_> = outlook.disks.iter().map(told).collect();
    let wanted = [
        (out.join("vm.raw"), SIZE, DiskFormat::Raw, false),
        (out.join("vm-1.raw"), len, DiskFormat::Raw, false),
    ];
    assert_eq!(disks, wanted);
    assert_eq!(outlook.disks[1].copied_at_most, len);

    let before = [lab.linux(), lab.data()].map(|disk| fs::metadata(disk).unwrap().modified());
    let report = convert_job(&job, &ui(), &none).unwrap();
    assert_eq!(report.outputs, outlook.outputs);
    let wanted = [
        "plan.json",
        "report.html",
        "report.json",
        "vm-1.raw",
        "vm-final.xml",
        "vm.raw",
    ];
    assert_eq!(names(&out), wanted);
    assert!(fs::read(out.join("vm-1.raw")).unwrap() == data());
    for (from, to) in
        LOADERS
            .iter()
            .zip([FALLBACK, r"\EFI\BOOT\grubx64.efi", r"\EFI\BOOT\mmx64.efi"])
    {
        assert_eq!(file(&lab.linux(), to), None);
        assert_eq!(file(&out.join("vm.raw"), to), loader(from), "{to}");
    }
    for name in LOADERS {
        let own = format!(r"\EFI\debian\{name}");
        assert_eq!(file(&out.join("vm.raw"), &own), loader(name));
    }
    let after = [lab.linux(), lab.data()].map(|disk| fs::metadata(disk).unwrap().modified());
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.as_ref().unwrap(), after.as_ref().unwrap());
    }
    let commands = [
        format!("virsh define {}", out.join("vm-final.xml").display()),
        "virsh start --console vm".to_owned(),
    ];
    assert_eq!(report.next_commands, commands);
    let whole = SIZE + len;
    let bytes = &report.bytes;
    assert_eq!(
        (bytes.virtual_size, bytes.skipped),
        (whole, whole - bytes.read)
    );
    assert!(
        (len..64 << 20).contains(&bytes.read) && bytes.written > len,
        "{bytes:?}"
    );
    let timings = &report.timings;
    let shortest = timings.inspect_s.min(timings.fix_s).min(timings.copy_s);
    assert!(shortest > 0.0, "{timings:?}");
    let xml = fs::read_to_string(out.join("vm-final.xml")).unwrap();
    let folder = lab.path("");
    let folder = folder.to_str().unwrap().trim_end_matches('/');
    insta::assert_snapshot!("final.xml", xml.replace(folder, "/lab"));
    // What was repaired is no warning any more, and nothing is said twice.
    let about = [
        "/etc/fstab names",
        "the network is",
        "--linux as-is",
        "of the source",
        "libvirt: a VLAN",
    ];
    assert_eq!(report.warnings.len(), about.len(), "{:?}", report.warnings);
    for (warning, about) in report.warnings.iter().zip(about) {
        assert!(warning.starts_with(about), "{about}: {warning}");
    }
    // The plan is that of before.
    let plan: Value = serde_json::from_slice(&fs::read(out.join("plan.json")).unwrap()).unwrap();
    assert_eq!(plan["way"], "as-is");
    assert_eq!(plan["actions"][0]["id"], "uefi-fallback");
    assert_eq!(
        plan["outputs"]["disks"][0],
        out.join("vm.raw").display().to_string()
    );
    insta::assert_snapshot!("report", shown(&lab, json!(report)));
}

/// A copy of the partition with the loader is that of the source.
#[test]
fn a_linux_with_its_fall_back_loader_is_copied_unchanged_unless_it_is_suspended() {
    let lab = Linux::with(&[FALLBACK]);
    let report = convert_job(&lab.job(), &ui(), &none).unwrap();
    assert!(report.ready && report.accepted.is_empty());
    assert!(report.actions.is_empty(), "{:?}", report.actions);
    let esp = spec().partition(Role::Esp).unwrap();
    let [copied, source] = [lab.path("out/vm.raw"), lab.linux()].map(|path| {
        let mut bytes = vec![0; esp.size as usize];
        let disk = FileDisk::open(&path).unwrap();
        disk.read_at(esp.start, &mut bytes).unwrap();
        bytes
    });
    assert!(copied == source);
    // At the end of the first page of a volume for swap.
    let at = spec().partition(Role::Msr).unwrap().start + 4086;
    let disk = FileDisk::open_rw(&lab.linux()).unwrap();
    disk.write_at(at, b"S1SUSPEND\0").unwrap();
    drop(disk);
    let mut job = lab.job();
    job.output.folder = Some(lab.path("again"));
    let error = convert_job(&job, &ui(), &none).map(drop).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Refused);
    assert_eq!(error.blockers[0].code, "linux-hibernated");
    assert!(!lab.path("again").exists());
}

#[test]
fn a_linux_that_nothing_makes_ready_is_refused_and_nothing_stays() {
    let lab = Linux::new();
    let there = names(&lab.path(""));
    type Case = (fn(&mut Job), fn(&str) -> bool, &'static [&'static str]);
    let all = |_: &str| true;
    let cases: [Case; 4] = [
        (
            |job| job.guest.linux = LinuxChoice::Auto,
            none,
            &["virt-v2v-missing"],
        ),
        // Its appliance is not wanted.
        (
            |job| job.guest.linux = LinuxChoice::Auto,
            all,
            &["virt-v2v-missing"],
        ),
        (
            |job| job.guest.linux = LinuxChoice::VirtV2v,
            none,
            &["virt-v2v-missing"],
        ),
        (
            |job| job.copy.method = Copying::InPlace,
            all,
            &["linux-in-place"],
        ),
    ];
    for (change, has, codes) in cases {
        let mut job = lab.job();
        change(&mut job);
        let planned = plan_job(&job, &ui(), &has).unwrap().plan;
        let found: Vec<_> = planned.blockers.iter().map(|b| b.code.as_str()).collect();
        assert_eq!(found, codes);
        assert!(!planned.ready);
        let error = convert_job(&job, &ui(), &has).map(drop).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Refused);
        assert_eq!(error.blockers, planned.blockers);
        assert_eq!(names(&lab.path("")), there);
    }
    // The better program is taken where its appliance is wanted by name.
    let mut job = lab.job();
    job.guest.linux = LinuxChoice::VirtV2v;
    let planned = plan_job(&job, &ui(), &all).unwrap().plan;
    let method = planned.linux.unwrap().method;
    assert_eq!(
        (method, planned.blockers.len()),
        (Method::VirtV2vInPlace, 0)
    );
    // Only virt-v2v itself copies.
    job.copy.method = Copying::Later;
    let has = |name: &str| name != virt_v2v::IN_PLACE;
    let planned = plan_job(&job, &ui(), &has).unwrap().plan;
    let found: Vec<_> = planned.blockers.iter().map(|b| b.code.as_str()).collect();
    assert_eq!(found, ["copy-later"]);
}

/// Nothing of what it says is taken over but its success: the result is read back.
#[test]
fn a_linux_that_virt_v2v_converts_is_read_back_and_told_so() {
    let lab = Linux::new();
    let mut job = lab.job();
    job.guest.linux = LinuxChoice::VirtV2v;
    job.copy.verify = true;
    stand_in::asked();
    let report = convert_job(&job, &ui(), &|_| true).unwrap();
    assert!(stand_in::asked().contains(&virt_v2v::IN_PLACE.to_owned()));
    assert_eq!(report.engine_why, "a Linux guest, converted by virt-v2v");
    let done: Vec<_> = (report.actions.iter())
        .map(|action| (action.id.as_str(), action.state))
        .collect();
    let wanted = ["virt-v2v", "uefi-fallback"].map(|id| (id, ActionState::Done));
    assert_eq!(done, wanted);
    let compared = report
        .checks
        .iter()
        .find(|check| check.id == "copy-identical");
    assert!(compared.unwrap().ok);
    let path = report.checks.iter().find(|check| check.id == "boot-path");
    assert_eq!(
        path.unwrap().message,
        "made ready by virt-v2v, not checked again"
    );
    let reason = &report.controllers[&job.vm.machine.storage].reason;
    assert_eq!(reason, "made ready by virt-v2v, not checked again");
    let said = |warning: &String| warning.contains("as-is");
    assert!(!report.warnings.iter().any(said), "{:?}", report.warnings);
    let plan: Value =
        serde_json::from_slice(&fs::read(lab.path("out/plan.json")).unwrap()).unwrap();
    assert_eq!(plan["way"], "virt-v2v-in-place");
    assert!(file(&lab.path("out/vm.raw"), FALLBACK).is_some());
    assert!(fs::read(lab.path("out/vm-1.raw")).unwrap() == data());
    // With a loader there is nothing else to do, and nothing is found twice.
    let ready = Linux::with(&[FALLBACK]);
    let mut job = ready.job();
    job.guest.linux = LinuxChoice::VirtV2v;
    let report = convert_job(&job, &ui(), &|_| true).unwrap();
    assert_eq!(
        (report.actions.len(), report.warnings.len()),
        (1, 2),
        "{:?}",
        report.warnings
    );
    // An error names the other possibility.
    let mut job = lab.job();
    job.guest.linux = LinuxChoice::VirtV2v;
    job.output.folder = Some(lab.path("again"));
    let in_the_way = |name: &str| {
        let work = lab.path(".again.partial").join(WORK);
        if name == virt_v2v::IN_PLACE && !work.exists() {
            fs::create_dir(&work).unwrap();
            fs::write(work.join("virt-v2v"), "").unwrap();
        }
        true
    };
    let error = convert_job(&job, &ui(), &in_the_way).map(drop).unwrap_err();
    assert!(error.message.contains("virt-v2v"), "{error}");
    assert!(error.hints[0].starts_with("--linux as-is"), "{error:?}");
    assert!(!lab.path("again").exists() && !lab.path(".again.partial").exists());
}

/// The blockers already name what to do first.
#[test]
fn a_domain_that_cannot_be_written_stops_a_linux_before_its_copy() {
    let lab = Linux::new();
    let mut job = lab.job();
    let there = names(&lab.path(""));
    job.vm.machine.machine_type = Some("isapc".into());
    let error = plan_job(&job, &ui(), &none).map(drop).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Usage, "{error}");
    let error = convert_job(&job, &ui(), &none).map(drop).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Usage, "{error}");
    job.guest.linux = LinuxChoice::Auto;
    let planned = plan_job(&job, &ui(), &none).unwrap();
    assert_eq!(planned.plan.blockers[0].code, "virt-v2v-missing");
    assert!(planned.outlook.is_none());
    assert_eq!(names(&lab.path("")), there);
}

#[test]
fn a_linux_can_stay_on_its_source() {
    let lab = Linux::with(&[FALLBACK]);
    let mut job = lab.job();
    job.copy.method = Copying::Later;
    job.copy.format = DiskFormat::Qcow2;
    let report = convert_job(&job, &ui(), &none).unwrap();
    let out = lab.path("out");
    assert_eq!(
        report.outputs.disks,
        ["vm.qcow2", "vm-1.qcow2"].map(|name| out.join(name))
    );
    assert!(!report.outputs.complete && report.bytes.read == 0);
    let later = |warning: &String| warning == crate::later::WARNING;
    assert!(report.warnings.iter().any(later), "{:?}", report.warnings);
    let record = crate::later::Record::load(&out).unwrap().unwrap();
    let sources: Vec<_> = (record.disks.iter())
        .map(|disk| disk.levels[0].files[0].path.clone())
        .collect();
    assert_eq!(sources, [lab.linux(), lab.data()]);
}

/// Of two NICs with one address the user has to know which is which.
#[test]
fn a_plan_and_a_report_of_a_linux_say_what_its_vm_has_otherwise() {
    let lab = Linux::with(&[FALLBACK]);
    let mut job = lab.job();
    job.vm.machine.macs = vec!["52:54:00:00:00:01".parse().unwrap(); 2];
    let said = |warnings: &[String]| {
        let both = "NICs 1 and 2 both have the MAC address";
        warnings.iter().filter(|w| w.starts_with(both)).count()
    };
    let planned = plan_job(&job, &ui(), &none).unwrap().plan;
    assert_eq!(said(&planned.warnings), 1, "{:?}", planned.warnings);
    let report = convert_job(&job, &ui(), &none).unwrap();
    assert_eq!(said(&report.warnings), 1, "{:?}", report.warnings);
}

#[test]
fn what_stands_in_the_way_of_a_copy_blocks_the_plan_of_a_linux() {
    let lab = Linux::with(&[FALLBACK]);
    let packed = lab.path("data.gz");
    let file = fs::File::create(&packed).unwrap();
    let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    encoder.write_all(&[7; 1 << 20]).unwrap();
    encoder.finish().unwrap();
    let blocked = |method: Copying, target: &str, is_packed: bool| {
        let mut job = lab.job();
        job.copy.method = method;
        let disk = &mut job.source.vm.disks[1];
        disk.packed = is_packed.then(|| crate::source::Packed {
            name: "data".into(),
            member: None,
            gzip: true,
            capacity: None,
        });
        if is_packed {
            disk.path.clone_from(&packed);
        }
        let ui = ui();
        let run = Run::open(&job, &ui).unwrap();
        let (session, survey) = run.inspect().unwrap();
        session.close().unwrap();
        let mut inspection = survey.inspection;
        let target = lab.path("").join(target);
        let decided = decide((&job, &ui), &run.disks, &mut inspection, &target, &none);
        let blockers = decided.map_or_else(|error| error.blockers, |(plan, _)| plan.blockers);
        let blockers = blockers.iter().map(|b| b.code.to_string());
        blockers.collect::<Vec<_>>()
    };
    assert_eq!(blocked(Copying::Now, "out", false), [""; 0]);
    assert_eq!(blocked(Copying::Now, "out", true), [""; 0]);
    // Nothing has room there.
    assert_eq!(blocked(Copying::Now, "/proc/out", false), ["output-space"]);
    // What was unpacked is gone after the run.
    assert_eq!(blocked(Copying::Later, "out", true), ["copy-later"]);
}

/// The disk with the system need not be the one that firmware starts from.
#[test]
fn the_fall_back_loader_is_made_on_the_disk_with_the_efi_system_partition() {
    let lab = Linux::new();
    let esp = spec().partition(Role::Esp).unwrap();
    let apart = lab.path("esp.raw");
    crate::demo::guest::create_table(&spec(), &apart).unwrap();
    let [from, to] = [lab.linux(), apart.clone()].map(|disk| FileDisk::open_rw(&disk).unwrap());
    let mut chunk = vec![0; 1 << 20];
    for at in (esp.start..esp.start + esp.size).step_by(1 << 20) {
        from.read_at(at, &mut chunk).unwrap();
        if chunk.iter().any(|byte| *byte != 0) {
            to.write_at(at, &chunk).unwrap();
            from.write_at(at, &vec![0; 1 << 20]).unwrap();
        }
    }
    drop((from, to));
    let source = super::super::testing::job(&[lab.linux(), apart], &lab.path("out")).source;
    let job = Job {
        source,
        ..lab.job()
    };
    let report = convert_job(&job, &ui(), &none).unwrap();
    assert_eq!(report.actions.len(), 1);
    assert_eq!(
        file(&lab.path("out/vm-1.raw"), FALLBACK),
        loader("shimx64.efi")
    );
}

/// The sectors are those of the table of each disk.
#[test]
fn a_data_disk_of_a_linux_has_its_sectors_in_the_plan_and_in_the_vm() {
    let lab = Linux::with(&[FALLBACK]);
    let large = crate::demo::GuestSpec {
        sector_size: 4096,
        cluster_size: 4096,
        ..spec()
    };
    fs::remove_file(lab.data()).unwrap();
    crate::demo::guest::create_table(&large, &lab.data()).unwrap();
    let mut job = lab.job();
    job.vm.machine.storage = crate::types::DiskBus::Sata;
    let planned = plan_job(&job, &ui(), &none).unwrap().plan;
    let codes: Vec<_> = planned.blockers.iter().map(|b| b.code.as_str()).collect();
    assert_eq!(codes, ["sector-size"]);
    job = lab.job();
    convert_job(&job, &ui(), &none).unwrap();
    let xml = fs::read_to_string(lab.path("out/vm-final.xml")).unwrap();
    let second = xml.split("<disk ").nth(2).unwrap();
    assert!(second.contains("logical_block_size=\"4096\""), "{xml}");
    assert_eq!(
        xml.matches("logical_block_size=\"4096\"").count(),
        1,
        "{xml}"
    );
}

/// Nothing else tells how it starts.
#[test]
fn a_linux_without_a_boot_loader_is_planned_for_the_firmware_of_its_source() {
    let lab = Linux::new();
    let esp = spec().partition(Role::Esp).unwrap();
    let disk = FileDisk::open_rw(&lab.linux()).unwrap();
    disk.write_at(esp.start, &vec![0; 1 << 20]).unwrap();
    drop(disk);
    for (source, planned) in [
        (None, Firmware::Bios),
        (Some(Firmware::Bios), Firmware::Bios),
        (Some(Firmware::Uefi), Firmware::Uefi),
    ] {
        let mut job = lab.job();
        job.source.vm.firmware = source;
        let inspection = plan_job(&job, &ui(), &none).unwrap().inspection;
        assert_eq!(inspection.firmware, Some(planned), "{source:?}");
    }
}

/// The plan would be one of two states.
#[test]
fn a_linux_whose_disk_changes_while_it_is_planned_has_no_plan() {
    let lab = Linux::new();
    let changing = |_: &str| {
        let file = fs::File::options().write(true).open(lab.data()).unwrap();
        file.set_len(5 << 20).unwrap();
        false
    };
    let error = plan_job(&lab.job(), &ui(), &changing)
        .map(drop)
        .unwrap_err();
    assert!(error.to_string().contains("data.raw"), "{error}");
}

/// A conversion whose disks were copied and that ended there.
fn interrupted(job: &Job) {
    let ui = ui();
    let mut run = Run::open(job, &ui).unwrap();
    let (session, survey) = run.inspect().unwrap();
    session.close().unwrap();
    let unexamined = survey.inspection;
    let mut inspection = unexamined.clone();
    let target = run.folder.target().to_path_buf();
    let decided = decide((job, &ui), &run.disks, &mut inspection, &target, &none).unwrap();
    let decided = report::plan_document(&decided.0, decided.1.as_ref(), &inspection);
    begin(&mut run, &decided).unwrap();
    let converted = make(&run, (&unexamined, &inspection), Method::AsIs).unwrap();
    copy_disks(&run, &converted, &decided).unwrap();
    run.folder.keep(true);
}

/// An overlay of the interrupted run is not used again.
#[test]
fn a_copy_of_an_unchanged_linux_is_resumed_and_one_of_a_changed_one_starts_over() {
    for (more, resumed) in [(&[FALLBACK][..], true), (&[], false)] {
        let lab = Linux::with(more);
        let mut job = lab.job();
        interrupted(&job);
        job.output.resume = true;
        job.vm.machine.name = "another".into();
        let other = convert_job(&job, &ui(), &none).map(drop);
        let error = other.unwrap_err();
        assert!(error.message.contains("decided otherwise"), "{error}");
        job.vm.machine.name = "vm".into();
        let report = convert_job(&job, &ui(), &none).unwrap();
        assert_eq!(report.bytes.resumed > 0, resumed, "{:?}", report.bytes);
        assert!(fs::read(lab.path("out/vm-1.raw")).unwrap() == data());
        assert!(file(&lab.path("out/vm.raw"), FALLBACK).is_some());
        assert!(!lab.path(".out.partial").exists());
    }
}

/// `inspect` and `boot` need what only the disks tell.
#[test]
fn an_inspection_of_a_linux_is_completed_from_its_disks_and_another_left_alone() {
    let lab: &Lab = &Linux::new();
    let job = super::super::testing::job(&[lab.path("linux.raw"), lab.data()], &lab.path("out"));
    let guest = crate::testing::MemoryGuest::of(spec());
    let windows = guest.look(&[], |_, survey| survey.inspection.clone());
    let mut inspection = windows.clone();
    complete(&job.source, &mut inspection, &ui()).unwrap();
    assert_eq!(json!(inspection), json!(windows));
    inspection.os.family = OsFamily::Linux;
    complete(&job.source, &mut inspection, &ui()).unwrap();
    let facts = inspection.linux.as_ref().unwrap();
    assert_eq!(
        (facts.distribution.as_str(), facts.reader),
        ("debian", "embedded")
    );
    assert_eq!(facts.fallback_loader, Some(false));
    assert_eq!(
        facts.root.place,
        format!(
            "disk 1, partition {}",
            spec().partition(Role::Windows).unwrap().index
        )
    );
    assert_eq!(inspection.firmware, Some(Firmware::Uefi));
    // What it is completed by may be of another state.
    let file = fs::File::options().write(true).open(lab.data()).unwrap();
    file.set_len(5 << 20).unwrap();
    assert!(complete(&job.source, &mut inspection, &ui()).is_err());
}
