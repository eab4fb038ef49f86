//! The whole report of a conversion and the whole document of a plan: each field, with its value.

use std::fs;

use serde_json::{Value, json};

use super::job::{Copying, Job};
use super::plain_tests::fixed;
use super::testing::{Lab, Plain, ui};
use super::*;
use crate::domain::model::Bridge;
use crate::domain::{Emit, NicSource};
use crate::inspect::Firmware;
use crate::report::{Input, Request, plan_document};
use crate::types::DiskBus;

/// What differs between two runs, or between two hosts: times, what a file system makes of a sparse file.
const MASKED: [&str; 15] = [
    "inspect_s",
    "fix_s",
    "copy_s",
    "total_s",
    "modified_ms",
    "modified_ns",
    "inode",
    "size_bytes",
    "read",
    "written",
    "skipped",
    "shared",
    "freed_bytes",
    "copied_at_most",
    "next_commands",
];

/// Masks all of that, and the directory of the test.
fn mask(value: &mut Value, folder: &str) {
    match value {
        Value::String(text) => *text = text.replace(folder, "/lab"),
        Value::Array(list) => list.iter_mut().for_each(|value| mask(value, folder)),
        Value::Object(keys) => {
            for (key, value) in keys {
                match MASKED.contains(&key.as_str()) {
                    true => *value = json!("..."),
                    false => mask(value, folder),
                }
            }
        }
        _ => {}
    }
}

pub(super) fn shown(lab: &Lab, mut value: Value) -> String {
    mask(
        &mut value,
        lab.path("").to_str().unwrap().trim_end_matches('/'),
    );
    serde_json::to_string_pretty(&value).unwrap()
}

/// A conversion of which every part of the report has something to tell.
fn rich(lab: &Plain) -> Job {
    let mut job = lab.job();
    job.vm.machine.network = NicSource::Bridge(Bridge {
        name: "br0".into(),
        vlan: Some(7),
    });
    job.vm.emit = vec![Emit::Kubevirt, Emit::Proxmox, Emit::Qemu];
    let input = |name: &str| Input {
        path: lab.path(name),
        size_bytes: 5,
        modified_ms: 6,
        inode: 7,
    };
    job.request = Request {
        options: [(
            "emit".to_owned(),
            vec!["kubevirt".to_owned(), "qemu".to_owned()],
        )]
        .into(),
        inputs: vec![input("data.raw"), input("windows.raw")],
    };
    job
}

fn lab() -> Plain {
    Plain::with(|guest| guest.without("bootx64.efi"))
}

fn all(_: &str) -> bool {
    true
}

#[test]
fn every_field_of_a_report_and_of_a_plan_is_as_written() {
    let lab = lab();
    let job = rich(&lab);
    let planned = plan_job(&job, &ui(), &all).unwrap();
    let outlook = planned.outlook.as_ref();
    let plan = plan_document(&planned.plan, outlook, &planned.inspection);
    insta::assert_snapshot!("plan", shown(&lab, plan.clone()));
    let report = convert_job(&job, &ui(), &all).unwrap();
    insta::assert_snapshot!("report", shown(&lab, json!(report)));
    let out = lab.path("out");
    let file = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(out.join(name)).unwrap()).unwrap()
    };
    // The files have both, with what names the document.
    for (name, document, keys) in [("plan.json", plan, 2), ("report.json", json!(report), 2)] {
        let file = file(name);
        // A number that is read back is the nearest one, and not always the same.
        let document: Value = serde_json::from_str(&document.to_string()).unwrap();
        let all = document.as_object().unwrap();
        for (key, value) in all {
            assert_eq!(&file[key], value, "{name} {key}");
        }
        let more = file.as_object().unwrap().len() - all.len();
        assert_eq!(more, keys, "{name}");
    }
    for name in ["vm-bootstrap.xml", "vm-final.xml"] {
        let text = fs::read_to_string(out.join(name)).unwrap();
        let folder = lab.path("");
        let folder = folder.to_str().unwrap().trim_end_matches('/');
        insta::assert_snapshot!(name, text.replace(folder, "/lab"));
    }
    let extras = page::extras(&job, &out, &report);
    let told = format!(
        "{:#?}\n{:#?}\n{:#?}",
        extras.machine, extras.in_use, extras.beside
    );
    insta::assert_snapshot!("page", told);
    // Of both the page tells.
    let html = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(extras.machine.len() > 4 && extras.beside.len() > 2);
    for (label, value) in &extras.machine {
        let row = format!("<tr><td>{label}</td><td><code>{value}</code></td></tr>");
        assert!(html.contains(&row), "{row}");
    }
    for name in &extras.beside {
        assert!(html.contains(&format!(">{name}</a></li>")), "{name}");
    }
    assert!(html.contains("first boot only"));
    let commands = next::commands("vm", &out, &report.outputs);
    assert_eq!(report.next_commands, commands);
    let sizes: Vec<_> = report
        .files
        .iter()
        .map(|file| fs::metadata(out.join(&file.path)).unwrap().len() == file.size_bytes)
        .collect();
    assert!(
        sizes.len() > 10 && sizes.iter().all(|same| *same),
        "{:?}",
        report.files
    );
}

/// A user reads the report, and not the domains.
#[test]
fn the_warnings_of_the_domains_are_in_the_report_after_those_of_the_plan() {
    let lab = lab();
    let mut job = lab.job();
    let plan = plan_job(&job, &ui(), &all).unwrap().plan.warnings;
    let said = |job: &Job| {
        let report = convert_job(job, &ui(), &all).unwrap();
        let page =
            fs::read_to_string(report.outputs.folder().unwrap().join("report.html")).unwrap();
        let (first, more) = report.warnings.split_at(plan.len());
        assert_eq!(first, plan);
        assert!(more.iter().all(|_| page.contains("VLAN on a bridge")));
        more.to_vec()
    };
    assert_eq!(said(&job), [""; 0]);
    job.output.folder = Some(lab.path("again"));
    job.vm.machine.network = NicSource::Bridge(Bridge {
        name: "br0".into(),
        vlan: Some(7),
    });
    let more = said(&job);
    assert_eq!(more.len(), 1, "{more:?}");
    assert!(
        more[0].starts_with("libvirt: a VLAN on a bridge"),
        "{more:?}"
    );
}

#[test]
fn every_field_of_a_report_of_a_fix_in_place_is_as_written() {
    let lab = Plain::new();
    let mut job = lab.job();
    job.copy.method = Copying::InPlace;
    let planned = plan_job(&job, &ui(), &all).unwrap();
    let outlook = shown(&lab, json!(planned.outlook));
    insta::assert_snapshot!("outlook-in-place", outlook);
    let mut report = json!(convert_job(&job, &ui(), &all).unwrap());
    // Those of a copy are in another snapshot.
    let fields = report.as_object_mut().unwrap();
    for key in ["controllers", "controllers_before", "inspection"] {
        fields.remove(key).unwrap();
    }
    insta::assert_snapshot!("report-in-place", shown(&lab, report));
}

/// The VM is that of the guest as it is now; the report has the guest as it was.
#[test]
fn what_was_before_the_fix_is_told_apart_from_what_is_after_it() {
    let lab = lab();
    for (ready, accepted) in [(true, false), (false, false), (true, true)] {
        let mut job = lab.job();
        job.output.folder = Some(lab.path(&format!("{ready}-{accepted}")));
        let accept = |prepared: &mut prepare::Prepared| {
            if accepted {
                prepared.plan.accepted = vec!["bcd".into()];
            }
            prepared.plan.warnings = vec!["of the plan".into()];
        };
        let report = fixed(&job, accept, |run, prepared, fixed| {
            let mut fixed = fixed.unwrap();
            fixed.after.controllers.remove(&DiskBus::Ide).unwrap();
            fixed.after.firmware = Some(Firmware::Bios);
            fixed.checks.retain(|check| check.id == "boot-path");
            if !ready {
                fixed.checks[0].ok = false;
                fixed.checks[0].state = crate::check::CheckState::Fault;
            }
            let disks = copy::copy_disks(&run, fixed, &decided(&prepared.plan)).unwrap();
            finish::finish(run, &prepared, disks).unwrap()
        });
        let at = format!("{ready} {accepted}");
        assert!(!report.controllers.contains_key(&DiskBus::Ide), "{at}");
        assert!(
            report.controllers_before.contains_key(&DiskBus::Ide),
            "{at}"
        );
        assert_eq!(report.inspection.firmware, Some(Firmware::Uefi), "{at}");
        assert_eq!(report.ready, ready && !accepted, "{at}");
        assert_eq!(report.accepted.len(), usize::from(accepted), "{at}");
        assert_eq!(report.warnings, ["of the plan"], "{at}");
        assert_eq!(
            (report.checks.len(), report.checks[0].ok),
            (1, ready),
            "{at}"
        );
        for xml in [&report.outputs.bootstrap_xml, &report.outputs.final_xml] {
            let text = fs::read_to_string(xml.as_ref().unwrap()).unwrap();
            assert!(
                !text.contains("firmware=\"efi\"") && !text.contains("nvram"),
                "{text}"
            );
        }
    }
}

/// The user finds there what is not of the new result.
#[test]
fn what_is_kept_of_a_replaced_result_is_a_warning_of_the_new_one() {
    let lab = lab();
    let mut job = lab.job();
    let first = convert_job(&job, &ui(), &all).unwrap();
    let out = lab.path("out");
    fs::write(out.join("notes.txt"), "mine").unwrap();
    job.output.force = true;
    let second = convert_job(&job, &ui(), &all).unwrap();
    let (same, more) = second.warnings.split_at(first.warnings.len());
    assert_eq!(same, first.warnings);
    assert_eq!(more.len(), 1, "{more:?}");
    assert!(more[0].ends_with("did not write it: notes.txt"), "{more:?}");
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("notes.txt"));
    assert_eq!(fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
    assert!(
        second
            .files
            .iter()
            .all(|file| !file.path.ends_with("notes.txt"))
    );
}
