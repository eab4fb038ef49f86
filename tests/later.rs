//! `convert --copy later`, `pull` and `release`: the disks are overlays on an unchanged source,
//! until they stand alone or are released.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use support::later::{Untouched, same_guest};
use support::{
    Lab, Mounted, Run, TOOLS, as_raw, binary, create_overlay, finish, h2k, have, names, skip, text,
    tool,
};

fn convert_later(lab: &Lab, source: &Path, more: &[&str]) -> Value {
    let args = [&["--copy", "later", "--name", "vm"], more].concat();
    lab.convert(source, &args).expect(0).json()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The guest's view, whatever the image consists of.
fn contents(lab: &Lab, disk: &Path, name: &str) -> PathBuf {
    let raw = lab.path(name);
    as_raw(disk, &raw);
    raw
}

/// Each image of a chain with its format, read by qemu-img from the headers alone.
fn chain(disk: &Path) -> Vec<(String, String)> {
    let args = ["info", "--backing-chain", "--output=json", "-f", "qcow2"];
    let out = tool("qemu-img", &[&args[..], &[text(disk)]].concat());
    let chain: Value = serde_json::from_slice(&out).unwrap();
    let level = |level: &Value| {
        let text = |key: &str| level[key].as_str().unwrap().to_owned();
        (text("filename"), text("format"))
    };
    chain.as_array().unwrap().iter().map(level).collect()
}

#[track_caller]
fn stands_alone(lab: &Lab, out: &Path) {
    let report = read_json(&out.join("report.json"));
    assert_eq!(report["outputs"]["complete"], true);
    assert_eq!(report["bytes"]["left"], 0);
    for disk in report["outputs"]["disks"].as_array().unwrap() {
        let disk = Path::new(disk.as_str().unwrap());
        assert_eq!(chain(disk).len(), 1);
        tool("qemu-img", &["check", "-q", text(disk)]);
        let header = fs::read(disk).unwrap();
        let source = text(&lab.raw).as_bytes();
        assert!(!header.windows(source.len()).any(|bytes| bytes == source));
    }
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("everything was pulled") && !page.contains("overlays on the source"));
    for stage in ["bootstrap", "final"] {
        let xml = fs::read_to_string(out.join(format!("vm-{stage}.xml"))).unwrap();
        assert!(
            !xml.contains("backingStore") && !xml.contains("error_policy"),
            "{xml}"
        );
    }
    h2k(["verify", text(out)]).expect(0);
}

/// A command on the output directory, with a failpoint.
fn on(verb: &str, out: &Path, more: &[&str], point: &str) -> Run {
    let mut command = Command::new(binary());
    command.arg(verb).arg(out).args(more);
    command.env("HYPER2KVM_FAILPOINT", point);
    finish(command)
}

/// A chain in the form of a VMware or libvirt host: a snapshot's delta over a base.
fn with_snapshot(lab: &Lab) -> PathBuf {
    let delta = lab.path("delta.qcow2");
    create_overlay(text(&lab.raw), "raw", &delta);
    // Behind the last partition.
    let at = (lab.spec.disk_size - (512 << 10)).to_string();
    let write = format!("write -q -P 7 {at} 64k");
    tool("qemu-io", &["-f", "qcow2", "-c", &write, text(&delta)]);
    delta
}

#[test]
fn a_vm_starts_on_its_source_and_ends_without_it() {
    if !have(&TOOLS) || !have(&["qemu-io", "virt-xml-validate"]) {
        return;
    }
    let lab = Lab::small();
    let delta = with_snapshot(&lab);
    let untouched = Untouched::of(&[&lab.raw, &delta]);
    let plain = lab.convert(&delta, &["--name", "vm"]).expect(0).json();
    let plain_out = lab.path("plain");
    fs::rename(lab.path("out"), &plain_out).unwrap();

    let plan = {
        let args = ["--copy", "later", "--name", "vm", "-o"];
        let out = lab.path("out");
        let all = [&args[..], &[text(&out), "--json"]].concat();
        finish(support::command("plan", &delta, &all))
            .expect(0)
            .json()
    };
    assert_eq!(plan["disks"][0]["copied_at_most"], 0);
    assert_eq!(plan["disks"][0]["later"], true);
    assert_eq!(plan["outputs"]["complete"], false);
    let report = convert_later(&lab, &delta, &[]);
    let out = lab.path("out");
    let disk = out.join("vm.qcow2");
    assert_eq!(report["outputs"]["disks"][0], text(&disk));
    assert_eq!(plan["outputs"]["disks"], report["outputs"]["disks"]);
    assert_eq!(report["outputs"]["complete"], false);
    assert_eq!(plain["outputs"]["complete"], true);
    assert_eq!(plain["bytes"]["left"], 0);
    // The rest is the data that fix and trim have not changed.
    let left = report["bytes"]["left"].as_u64().unwrap();
    let data = plain["bytes"]["read"].as_u64().unwrap();
    assert!(left > data / 2 && left <= data, "{left} of {data}");
    let owned = |path: &Path, format: &str| (text(path).to_owned(), format.to_owned());
    let levels = [
        owned(&disk, "qcow2"),
        owned(&delta, "qcow2"),
        owned(&lab.raw, "raw"),
    ];
    assert_eq!(chain(&disk), levels);
    for stage in ["bootstrap", "final"] {
        let path = out.join(format!("vm-{stage}.xml"));
        tool("virt-xml-validate", &[text(&path), "domain"]);
        let xml = fs::read_to_string(&path).unwrap();
        let places: Vec<usize> = [
            format!("<source file=\"{}\"", levels[0].0),
            "<backingStore type=\"file\">".to_owned(),
            "<format type=\"qcow2\"/>".to_owned(),
            format!("<source file=\"{}\">", levels[1].0),
            "<format type=\"raw\"/>".to_owned(),
            format!("<source file=\"{}\">", levels[2].0),
            "<backingStore/>".to_owned(),
        ]
        .iter()
        .map(|part| {
            xml.find(part.as_str())
                .unwrap_or_else(|| panic!("no {part} in {xml}"))
        })
        .collect();
        assert!(places.is_sorted(), "{places:?}: {xml}");
        assert_eq!(
            xml.matches("<seclabel model=\"dac\" relabel=\"no\"/>")
                .count(),
            2
        );
        assert_eq!(
            xml.matches("<backingStore/>").count(),
            1,
            "the disk's chain alone"
        );
        assert!(xml.contains("error_policy=\"stop\" rerror_policy=\"stop\""));
        assert!(xml.contains("<acpi/>"));
    }
    h2k(["verify", text(&out)]).expect(0);
    let served = h2k(["serve", text(&out), "--json"]).expect(0).json();
    assert_eq!(served["schema"], "hyper2kvm/serve/1");
    assert_eq!(served["source"].as_array().unwrap().len(), 2);
    untouched.check();
    let run = h2k(["rollback", text(&out)]).expect(1);
    assert!(run.stderr.contains("hyper2kvm release"), "{}", run.stderr);
    // The files in the report may be replaced like any other result.
    let replaced = convert_later(&lab, &delta, &["--force"]);
    assert_eq!(replaced["bytes"]["left"], left);

    let before = contents(&lab, &disk, "before.raw");
    let pulled = h2k(["pull", text(&out), "--json", "--bandwidth", "1000"])
        .expect(0)
        .json();
    assert_eq!(pulled["schema"], "hyper2kvm/pull/1");
    assert_eq!(pulled["by"], "offline");
    assert_eq!(
        pulled["bytes"],
        serde_json::json!({"copied": left, "left": 0})
    );
    untouched.check();
    stands_alone(&lab, &out);
    let after = contents(&lab, &disk, "after.raw");
    tool(
        "qemu-img",
        &[
            "compare",
            "-q",
            "-f",
            "raw",
            "-F",
            "raw",
            text(&before),
            text(&after),
        ],
    );
    same_guest(&plain_out.join("vm.qcow2"), &disk);
    // A second run has nothing to do, and then the source may be removed.
    let again = h2k(["pull", text(&out), "--json"]).expect(0).json();
    assert_eq!(again["bytes"]["copied"], 0);
    let gone = lab.path("gone.raw");
    fs::rename(&lab.raw, &gone).unwrap();
    fs::rename(&delta, lab.path("gone.qcow2")).unwrap();
    h2k(["verify", text(&out)]).expect(0);
    let run = h2k(["release", text(&out)]).expect(2);
    assert!(run.stderr.contains("rm -r"), "{}", run.stderr);
    // It has changed since its report was written, and the report has its present state.
    fs::rename(&gone, &lab.raw).unwrap();
    lab.convert(&lab.raw, &["--force", "--older-link"])
        .expect(0);
}

/// The disk of a plain conversion of the same source.
fn plain(lab: &Lab, source: &Path) -> PathBuf {
    lab.convert(source, &["--name", "vm"]).expect(0);
    fs::rename(lab.path("out"), lab.path("plain")).unwrap();
    lab.path("plain/vm.qcow2")
}

#[test]
fn every_disk_of_the_vm_and_what_cannot_stay() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let data = lab.path("data.vmdk");
    let options = "subformat=twoGbMaxExtentSparse";
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "vmdk",
            "-o",
            options,
            text(&data),
            "64M",
        ],
    );
    tool(
        "qemu-io",
        &["-f", "vmdk", "-c", "write -q -P 3 8M 1M", text(&data)],
    );
    let xml = lab.libvirt_xml("two", &[&lab.raw, &data]);
    let vm = fs::read_to_string(&xml).unwrap();
    let name = format!("type='raw'/><source file='{}'", text(&data));
    fs::write(&xml, vm.replace(&name, &name.replace("raw", "vmdk"))).unwrap();
    let untouched = Untouched::of(&[&lab.raw, &data, &lab.path("data-s001.vmdk")]);
    let copied = plain(&lab, &xml);
    let report = convert_later(&lab, &xml, &["--emit", "proxmox,kubevirt,qemu"]);
    let warnings = report["warnings"].to_string();
    for target in ["Proxmox VE", "KubeVirt"] {
        let wanted = format!("{target}: the disks must stand alone");
        assert!(warnings.contains(&wanted), "{warnings}");
    }
    let out = lab.path("out");
    let second = out.join("vm-1.qcow2");
    assert_eq!(chain(&second)[1].1, "vmdk");
    let later = read_json(&out.join("later.json"));
    // The extents are checked, too.
    let files = later["disks"][1]["levels"][0]["files"].as_array().unwrap();
    assert_eq!(files.len(), 2, "{later}");
    h2k(["verify", text(&out)]).expect(0);
    h2k(["pull", text(&out)]).expect(0);
    let said = tool(
        "qemu-io",
        &["-r", "-f", "qcow2", "-c", "read -P 3 8M 1M", text(&second)],
    );
    assert!(!String::from_utf8_lossy(&said).contains("fail"));
    stands_alone(&lab, &out);
    same_guest(&copied, &out.join("vm.qcow2"));
    let copied = copied.with_file_name("vm-1.qcow2");
    tool("qemu-img", &["compare", "-q", text(&copied), text(&second)]);
    untouched.check();

    for (more, named) in [
        (&["--in-place"][..], "--in-place"),
        (&["--output-device", "/dev/null"], "--output-device"),
        (&["--format", "raw"], "--format raw"),
        (&["--compress"], "--compress"),
        (&["--verify-copy"], "--verify-copy"),
    ] {
        let args = [&["--copy", "later"], more].concat();
        for verb in ["convert", "plan"] {
            let run = finish(support::command(verb, &lab.raw, &args)).expect(2);
            assert!(run.stderr.contains(named), "{}", run.stderr);
        }
    }
    // A format that libvirt cannot name, and a file without a name of its own.
    let vhdx = lab.in_format("vhdx", "", "guest.vhdx");
    let packed = ova(&lab);
    for (source, why) in [(&vhdx, "vhdx"), (&packed, "packed")] {
        let out = lab.path("refused");
        for verb in ["plan", "convert"] {
            let args = ["--copy", "later", "--json", "-o", text(&out)];
            let run = finish(support::command(verb, source, &args))
                .expect(3)
                .json();
            let blockers = &run["error"]["blockers"];
            assert_eq!(blockers[0]["code"], "copy-later", "{run}");
            let reason = blockers[0]["reason"].as_str().unwrap();
            assert!(reason.contains(why), "{reason}");
            assert!(!out.exists());
        }
    }
}

/// The guest's disk in an archive: it has no name of its own.
fn ova(lab: &Lab) -> PathBuf {
    let size = lab.spec.disk_size;
    let disk = lab.in_format("vmdk", "subformat=streamOptimized", "packed.vmdk");
    let item = |id: u32, kind: u32, more: &str| {
        format!(
            "<Item><r:InstanceID>{id}</r:InstanceID><r:ResourceType>{kind}</r:ResourceType>{more}</Item>"
        )
    };
    let sata = "<r:ResourceSubType>AHCI</r:ResourceSubType><r:Address>0</r:Address>";
    let on_it = "<r:Parent>1</r:Parent><r:AddressOnParent>0</r:AddressOnParent><r:HostResource>ovf:/disk/d</r:HostResource>";
    let ovf = format!(
        r#"<?xml version="1.0"?><Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:o="http://schemas.dmtf.org/ovf/envelope/1" xmlns:r="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"><References><File o:id="f" o:href="packed.vmdk"/></References><DiskSection><Info/><Disk o:diskId="d" o:fileRef="f" o:capacity="{size}"/></DiskSection><VirtualSystem o:id="vm"><Info/><Name>vm</Name><VirtualHardwareSection><Info/>{}{}</VirtualHardwareSection></VirtualSystem></Envelope>"#,
        item(1, 20, sata),
        item(2, 17, on_it),
    );
    fs::write(lab.path("vm.ovf"), ovf).unwrap();
    let (folder, archive) = (text(lab.dir.path()), lab.path("vm.ova"));
    tool(
        "tar",
        &["-C", folder, "-cf", text(&archive), "vm.ovf", "packed.vmdk"],
    );
    fs::remove_file(disk).unwrap();
    archive
}

#[test]
fn a_source_that_changed_is_refused() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let (untouched, copied) = (Untouched::of(&[&lab.raw]), plain(&lab, &lab.raw));
    let out = lab.path("out");
    convert_later(&lab, &lab.raw, &[]);
    let found = fs::metadata(&lab.raw).unwrap();
    let (modified, size) = (found.modified().unwrap(), found.len());
    let open = || fs::File::options().write(true).open(&lab.raw).unwrap();
    let refused = |what: &str| {
        for verb in ["boot", "pull", "serve"] {
            let run = on(verb, &out, &["--json"], "").expect(3).json();
            let blocker = &run["error"]["blockers"][0];
            assert_eq!(blocker["code"], "source-changed", "{verb}: {run}");
            assert!(blocker["reason"].as_str().unwrap().contains(what), "{run}");
            assert!(
                blocker["remedy"].as_str().unwrap().contains("release"),
                "{run}"
            );
        }
    };
    open().set_len(size + 512).unwrap();
    refused("bytes long");
    open().set_len(size).unwrap();
    refused("written to");
    open().set_modified(modified).unwrap();
    let byte = fs::read(&lab.raw).unwrap()[3];
    open().write_all_at(&[byte ^ 1], 3).unwrap();
    open().set_modified(modified).unwrap();
    refused("header");
    open().write_all_at(&[byte], 3).unwrap();
    open().set_modified(modified).unwrap();
    // While the pull is at work.
    let mut command = Command::new(binary());
    command.arg("pull").arg(&out);
    let paused = support::Paused::at("pull-flushed", command);
    open()
        .set_modified(modified + Duration::from_secs(1))
        .unwrap();
    let run = paused.go_on();
    assert!(
        run.code != 0 && run.stderr.contains("written to"),
        "{}",
        run.stderr
    );
    assert_eq!(
        read_json(&out.join("report.json"))["outputs"]["complete"],
        false
    );
    open().set_modified(modified).unwrap();
    h2k(["pull", text(&out)]).expect(0);
    stands_alone(&lab, &out);
    same_guest(&copied, &out.join("vm.qcow2"));
    untouched.check();
}

#[test]
fn a_pull_that_is_killed_anywhere_goes_on() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let (untouched, copied) = (Untouched::of(&[&lab.raw]), plain(&lab, &lab.raw));
    let out = lab.path("out");
    convert_later(&lab, &lab.raw, &[]);
    let disk = out.join("vm.qcow2");
    let before = contents(&lab, &disk, "before.raw");
    let fresh = lab.path("fresh");
    tool("cp", &["-a", "--sparse=always", text(&out), text(&fresh)]);
    let killed_once = [
        "pull-begin",
        "pull-copying",
        "pull-flushed",
        "pull-copied",
        "pull-alone",
        "pull-described",
        "pull-defined",
        "pull-reported",
    ];
    for action in ["kill", "fail"] {
        // One directory through all of them, and each point separately. An error leaves the same
        // state as a kill.
        let points = match action {
            "kill" => &killed_once[..],
            _ => &["pull-flushed", "pull-described"],
        };
        for point in points {
            eprintln!("{point}={action}");
            let run = on("pull", &out, &[], &format!("{point}={action}"));
            assert_eq!(
                run.code,
                if action == "kill" { -1 } else { 1 },
                "{point}: {}",
                run.stderr
            );
            h2k(["verify", text(&out)]).expect(0);
        }
        h2k(["pull", text(&out)]).expect(0);
        stands_alone(&lab, &out);
        let after = contents(&lab, &disk, "after.raw");
        tool(
            "qemu-img",
            &[
                "compare",
                "-q",
                "-f",
                "raw",
                "-F",
                "raw",
                text(&before),
                text(&after),
            ],
        );
        same_guest(&copied, &disk);
        fs::remove_dir_all(&out).unwrap();
        tool("cp", &["-a", "--sparse=always", text(&fresh), text(&out)]);
    }
    untouched.check();
}

#[test]
fn a_second_pull_and_a_full_disk() {
    if !have(&TOOLS) || !have(&["mount", "umount"]) {
        return;
    }
    let lab = Lab::small();
    let (untouched, copied) = (Untouched::of(&[&lab.raw]), plain(&lab, &lab.raw));
    let small = lab.path("small");
    fs::create_dir(&small).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=64m,mode=755", "none"]);
    let Some(_mounted) = Mounted::at(&small, mount) else {
        return;
    };
    let out = small.join("out");
    let args = [
        "--copy",
        "later",
        "--name",
        "vm",
        "-o",
        text(&out),
        "--json",
    ];
    let report = finish(support::command("convert", &lab.raw, &args)).expect(0);
    let left = report.json()["bytes"]["left"].as_u64().unwrap();
    let filler = fs::File::create(small.join("filler")).unwrap();
    let free = || {
        let stat = rustix::fs::statvfs(&small).unwrap();
        stat.f_bavail * stat.f_frsize
    };
    let all = free() - left / 2;
    filler.write_all_at(&vec![1; all as usize], 0).unwrap();
    let run = h2k(["pull", text(&out)]).expect(1);
    for says in [
        "are free in",
        "free some space",
        "run the same command again",
    ] {
        assert!(run.stderr.contains(says), "{}", run.stderr);
    }
    let later = || read_json(&out.join("later.json"))["state"].clone();
    assert_eq!(
        (chain(&out.join("vm.qcow2")).len(), later()),
        (2, "left".into())
    );
    h2k(["verify", text(&out)]).expect(0);
    fs::remove_file(small.join("filler")).unwrap();
    drop(filler);

    let mut command = Command::new(binary());
    command.arg("pull").arg(&out);
    let first = support::Paused::at("pull-copying", command);
    let second = h2k(["pull", text(&out)]).expect(1);
    assert!(
        second.stderr.contains("another hyper2kvm is at work"),
        "{}",
        second.stderr
    );
    first.go_on().expect(0);
    stands_alone(&lab, &out);
    same_guest(&copied, &out.join("vm.qcow2"));
    untouched.check();
}

#[test]
fn a_vm_is_given_up() {
    if !have(&TOOLS) || !have(&["qemu-io"]) {
        return;
    }
    let lab = Lab::small();
    let untouched = Untouched::of(&[&lab.raw]);
    let out = lab.path("out");
    convert_later(&lab, &lab.raw, &["--emit", "qemu"]);
    // It has not run: nothing is lost.
    for point in ["releasing", "released-domain"] {
        let run = on("release", &out, &[], &format!("{point}=kill"));
        assert_eq!(run.code, -1, "{}", run.stderr);
    }
    let released = on("release", &out, &["--json"], "").expect(0).json();
    assert_eq!(released["schema"], "hyper2kvm/release/1");
    assert_eq!(released["domain"], false);
    assert!(!out.exists());
    assert_eq!(names(lab.dir.path()), ["guest.raw"]);
    untouched.check();

    // It was written to, and the user has put a file beside it.
    convert_later(&lab, &lab.raw, &[]);
    let disk = out.join("vm.qcow2");
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -q -P 1 1M 4k", text(&disk)],
    );
    fs::write(out.join("notes.txt"), "the user's").unwrap();
    let run = h2k(["release", text(&out)]).expect(1);
    assert!(
        run.stderr.contains("--force") && run.stderr.contains("pull"),
        "{}",
        run.stderr
    );
    assert!(disk.exists());
    // A program has the disk open.
    let mut holder = Command::new("qemu-io");
    holder
        .args(["-f", "qcow2"])
        .arg(&disk)
        .stdin(std::process::Stdio::piped());
    let mut holder = holder.stdout(std::process::Stdio::null()).spawn().unwrap();
    let held = || !support::processes_naming(&disk).is_empty();
    while !held() {
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(300));
    let run = h2k(["release", text(&out), "--force"]).expect(1);
    assert!(run.stderr.contains("in use"), "{}", run.stderr);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    let released = h2k(["release", text(&out), "--force", "--json"])
        .expect(0)
        .json();
    assert!(
        released["lost"].as_str().unwrap().contains("written to"),
        "{released}"
    );
    assert_eq!(released["kept"][0], text(&out.join("notes.txt")));
    assert_eq!(names(&out), ["notes.txt"]);
    untouched.check();
    // Not defined by hyper2kvm.
    h2k(["release", text(&out)]).expect(2);
}

/// Marking the free space of a large disk costs as much as its tables, which have large clusters.
#[test]
fn a_large_disk_takes_no_longer() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let large = lab.path("large.raw");
    tool("cp", &["--sparse=always", text(&lab.raw), text(&large)]);
    let file = fs::File::options().write(true).open(&large).unwrap();
    if file.set_len(2 << 40).is_err() {
        return skip("large-file", "no file of 2 TiB here");
    }
    drop(file);
    let modified = fs::metadata(&large).unwrap().modified().unwrap();
    let copied = plain(&lab, &lab.raw);
    let begin = std::time::Instant::now();
    let report = convert_later(&lab, &large, &[]);
    let out = lab.path("out");
    let disk = out.join("vm.qcow2");
    let took = begin.elapsed();
    let found = fs::metadata(&disk).unwrap();
    let allocated = found.blocks() * 512;
    assert!(allocated < 64 << 20, "{allocated} bytes");
    let left = report["bytes"]["left"].as_u64().unwrap();
    assert!(left < 1 << 30, "{left}");
    eprintln!("2 TiB: {took:?}, overlay of {allocated} bytes, {left} left");
    // The overlay contains every hole: QEMU has nothing to read there.
    let map = tool(
        "qemu-img",
        &["map", "--output=json", "-f", "qcow2", text(&disk)],
    );
    let map: Vec<Value> = serde_json::from_slice(&map).unwrap();
    let read: u64 = (map.iter())
        .filter(|entry| entry["depth"] != 0)
        .map(|entry| entry["length"].as_u64().unwrap())
        .sum();
    assert!(
        read < left + (256 << 20),
        "{read} bytes would be read, {left} are left"
    );
    h2k(["pull", text(&out)]).expect(0);
    assert_eq!(chain(&disk).len(), 1);
    same_guest(&copied, &disk);
    // A digest of 2 TiB takes too long: only its data is compared.
    assert_eq!(fs::metadata(&large).unwrap().modified().unwrap(), modified);
    let raw = [
        "compare",
        "-q",
        "-f",
        "raw",
        "-F",
        "raw",
        text(&large),
        text(&lab.raw),
    ];
    tool("qemu-img", &raw);
}

/// The example of docs/later.md, read by systemd itself where it is there.
#[test]
fn the_unit_of_the_page_is_one_for_systemd() {
    let page = fs::read_to_string("docs/later.md").unwrap();
    let (_, rest) = page.split_once("```ini\n").unwrap();
    let (unit, _) = rest.split_once("```").unwrap();
    assert!(unit.contains("ExecStart=/usr/bin/hyper2kvm serve %f\n"));
    let verify = |unit: &str| {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hyper2kvm-serve@.service");
        fs::write(&file, unit.replace("/usr/bin/hyper2kvm", binary())).unwrap();
        let run = Command::new("systemd-analyze")
            .arg("verify")
            .arg(&file)
            .output()
            .ok()?;
        let said = String::from_utf8_lossy(&run.stderr).into_owned();
        // It names the units of this host too, and warns with exit code 0.
        let ours = |line: &&str| line.contains("hyper2kvm-serve@");
        let lines: Vec<String> = said.lines().filter(ours).map(str::to_owned).collect();
        Some((run.status.success(), lines))
    };
    let Some(good) = verify(unit) else {
        return skip("systemd-analyze", "no systemd here");
    };
    assert_eq!(good, (true, Vec::new()));
    let bad = verify(&unit.replace("on-failure", "on-trouble")).unwrap();
    assert_eq!(bad.1.len(), 1, "a fault is seen: {bad:?}");
}
