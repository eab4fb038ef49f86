//! VMs on a source of another host that is made of several files or of a format QEMU does not read there: copy
//! later, changes of any of its files, and a line that is down for a while.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::later::{Serve, contents, convert_later, kill_children, plain, read_json};
use crate::links::{cowd, se_sparse};
use crate::servers::{Https, Ssh};
use crate::support::later::{Untouched, same_guest};
use crate::support::wire::{Nginx, Sshd};
use crate::support::{Lab, Paused, binary, h2k, text, tool};
use crate::{as_vmware, ready};

/// All that a chain of qcow2 writes, behind the last partition.
fn delta(lab: &Lab, base: &Path, delta: &Path, format: &str, base_format: &str) {
    let name = base.file_name().unwrap().to_str().unwrap();
    let args = ["create", "-q", "-f", format, "-b", name, "-F", base_format];
    tool("qemu-img", &[&args[..], &[text(delta)]].concat());
    let at = (lab.spec.disk_size - (512 << 10)).to_string();
    let write = format!("write -q -P 7 {at} 64k");
    tool("qemu-io", &["-f", format, "-c", &write, text(delta)]);
}

/// Each verb that opens the directory refuses with the reason, exit code 3.
#[track_caller]
fn refused(out: &Path, url: &str, what: &str) {
    for verb in ["boot", "serve", "pull"] {
        let run = h2k([verb, text(out), "--json"]).expect(3).json();
        let blocker = &run["error"]["blockers"][0];
        assert_eq!(blocker["code"], "source-changed", "{verb}: {run}");
        let said = blocker["reason"].as_str().unwrap();
        assert!(said.contains(url) && said.contains(what), "{verb}: {said}");
        let remedy = blocker["remedy"].as_str().unwrap();
        assert!(remedy.contains("hyper2kvm release"), "{remedy}");
    }
    assert_eq!(
        read_json(&out.join("report.json"))["outputs"]["complete"],
        false
    );
}

fn disks(report: &Value) -> Vec<PathBuf> {
    let disks = report["outputs"]["disks"].as_array().unwrap();
    let path = |disk: &Value| PathBuf::from(disk.as_str().unwrap());
    disks.iter().map(path).collect()
}

#[track_caller]
fn stand_alone(disks: &[PathBuf]) {
    for disk in disks {
        let args = ["info", "--backing-chain", "--output=json", text(disk)];
        let chain: Value = serde_json::from_slice(&tool("qemu-img", &args)).unwrap();
        assert_eq!(chain.as_array().unwrap().len(), 1);
        tool("qemu-img", &["check", "-q", text(disk)]);
    }
}

#[test]
fn a_chain_and_a_vhdx_of_another_host() {
    if !ready(&["sshd", "ssh", "ssh-keygen", "virt-xml-validate"]) {
        return;
    }
    let lab = Lab::small();
    let (top, data) = (lab.path("delta.qcow2"), lab.path("data.vhdx"));
    delta(&lab, &lab.raw, &top, "qcow2", "raw");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "vhdx", text(&data), "64M"],
    );
    tool(
        "qemu-io",
        &["-f", "vhdx", "-c", "write -q -P 3 8M 1M", text(&data)],
    );
    let xml = lab.libvirt_xml("two", &[&top, &data]);
    let mut vm = fs::read_to_string(&xml).unwrap();
    for (disk, format) in [(&top, "qcow2"), (&data, "vhdx")] {
        let raw = format!("type='raw'/><source file='{}'", text(disk));
        vm = vm.replace(&raw, &raw.replace("raw", format));
    }
    fs::write(&xml, vm).unwrap();
    let untouched = Untouched::of(&[&lab.raw, &top, &data]);
    let plain = lab.convert(&xml, &["--name", "vm"]).expect(0).json();
    let plain_out = lab.path("plain");
    fs::rename(lab.path("out"), &plain_out).unwrap();

    let etc = lab.path("etc");
    fs::create_dir(&etc).unwrap();
    let ssh = Ssh::start(&etc);
    let (report, out) = convert_later(&lab, &ssh.url(&xml), &ssh.options(), "later");
    let disks = disks(&report);
    assert_eq!(disks.len(), 2);
    let (left, read) = (&report["bytes"]["left"], &plain["bytes"]["read"]);
    assert!(left.as_u64().unwrap() > read.as_u64().unwrap() / 2);
    // Every file of it is recorded, and libvirt sees raw disks.
    let later = read_json(&out.join("later.json"));
    let level = &later["disks"][0]["levels"][0];
    assert_eq!(level["format"], "raw");
    assert_eq!(level["wire"]["url"], ssh.url(&top));
    assert_eq!(level["wire"]["whole"]["more"][0]["url"], ssh.url(&lab.raw));
    assert_eq!(
        later["disks"][1]["levels"][0]["wire"]["whole"]["format"],
        "vhdx"
    );
    let stage = out.join("vm-final.xml");
    tool("virt-xml-validate", &[text(&stage), "domain"]);
    let shown = fs::read_to_string(&stage).unwrap();
    for socket in ["vm.sock", "vm-1.sock"] {
        assert!(shown.contains(text(&out.join(socket))), "{shown}");
    }
    h2k(["verify", text(&out)]).expect(0);

    let serve = Serve::start(&lab, &out);
    let seen = ["seen.raw", "seen-1.raw"];
    let seen = [0, 1].map(|i| contents(&lab, &disks[i], seen[i]));
    // One of the files below changes: told by the file's own name.
    let found = fs::metadata(&lab.raw).unwrap().modified().unwrap();
    let file = fs::File::options().write(true).open(&lab.raw).unwrap();
    file.set_modified(found + Duration::from_secs(60)).unwrap();
    drop(serve);
    refused(&out, &ssh.url(&lab.raw), "60 s");
    file.set_modified(found).unwrap();
    fs::rename(&lab.raw, lab.path("elsewhere")).unwrap();
    refused(&out, "delta.qcow2", "does not exist");
    fs::rename(lab.path("elsewhere"), &lab.raw).unwrap();

    // Without the daemon that puts the chain together nothing can be served.
    let serve = Serve::start(&lab, &out);
    assert_eq!(kill_children(serve.id(), "qemu-storage"), 2);
    let ended = serve.end().expect(1);
    for says in ["qemu-storage-daemon ended", "start hyper2kvm serve again"] {
        assert!(ended.stderr.contains(says), "{}", ended.stderr);
    }

    let serve = Serve::start(&lab, &out);
    let pulled = h2k(["pull", text(&out), "--json"]).expect(0).json();
    assert_eq!(pulled["bytes"], json!({"copied": left, "left": 0}));
    let served = serve.end().expect(0).json();
    assert!(served["bytes"]["fetched"].as_u64().unwrap() > 0);
    drop(ssh);
    stand_alone(&disks);
    for (i, seen) in seen.iter().enumerate() {
        let stands = contents(&lab, &disks[i], "stands.raw");
        tool("cmp", &[text(seen), text(&stands)]);
    }
    same_guest(&plain_out.join("vm.qcow2"), &disks[0]);
    let second = plain_out.join("vm-1.qcow2");
    tool(
        "qemu-img",
        &["compare", "-q", text(&second), text(&disks[1])],
    );
    h2k(["verify", text(&out)]).expect(0);
    untouched.check();
}

/// A descriptor of a link on `parent` with one extent.
fn link(at: &Path, parent: &str, kind: [&str; 2], sectors: u64, extent: &str) {
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=00000001\ncreateType=\"{}\"\n\
         parentFileNameHint=\"{parent}\"\nRW {sectors} {} \"{extent}\"\n",
        kind[0], kind[1]
    );
    fs::write(at, text).unwrap();
}

#[test]
fn snapshots_of_esxi_are_converted_over_ssh_and_https() {
    if !ready(&[&Sshd::TOOLS[..], &Nginx::TOOLS].concat()) {
        return;
    }
    let lab = Lab::small();
    let vmx = as_vmware(&lab, &lab.path("ds/vm"));
    let beside = |name: &str| vmx.with_file_name(name);
    let flat = fs::File::options()
        .read(true)
        .write(true)
        .open(beside("vm-flat.vmdk"))
        .unwrap();
    let sectors = lab.spec.disk_size / 512;
    // What the guest needs moves from the base to the links; nonsense is left behind.
    let moved = |at: u64| {
        let mut bytes = [0; 4096];
        flat.read_exact_at(&mut bytes, at).unwrap();
        flat.write_all_at(&[0xee; 4096], at).unwrap();
        bytes
    };
    let boot = moved(1 << 20);
    let grain = |i: usize| <[u8; 512]>::try_from(&boot[i * 512..(i + 1) * 512]).unwrap();
    let mut grains: Vec<_> = (0..8).map(|i| (2048 + i as u32, grain(i))).collect();
    // Over that the newer link has its own.
    grains.push((8, [0x77; 512]));
    grains.push((sectors as u32 - 1024, [7; 512]));
    cowd(&beside("vm-000001-delta.vmdk"), sectors as u32, &grains);
    let newest = [(0, Some(moved(0))), (1, Some(moved(4096)))];
    se_sparse(&beside("vm-000002-sesparse.vmdk"), sectors, &newest);
    let (first, second) = (beside("vm-000001.vmdk"), beside("vm-000002.vmdk"));
    let kind = ["vmfsSparse", "VMFSSPARSE"];
    link(&first, "vm.vmdk", kind, sectors, "vm-000001-delta.vmdk");
    let kind = ["seSparse", "SESPARSE"];
    link(
        &second,
        "vm-000001.vmdk",
        kind,
        sectors,
        "vm-000002-sesparse.vmdk",
    );
    let vm = fs::read_to_string(&vmx).unwrap();
    fs::write(&vmx, vm.replace("\"vm.vmdk\"", "\"vm-000002.vmdk\"")).unwrap();

    let (sshd, nginx) = (Sshd::start(), Nginx::start(lab.dir.path()));
    let here = lab.path("here");
    let options = ["-o", text(&here), "--name", "vm"];
    crate::run("convert", text(&lab.raw), &[], &options).expect(0);
    for (transport, url, reached) in [
        ("ssh", sshd.url(&vmx), sshd.options()),
        ("https", nginx.url("ds/vm/vm.vmx"), nginx.options()),
    ] {
        let there = lab.path(transport);
        let options = ["-o", text(&there), "--name", "vm"];
        let report = crate::run("convert", &url, &reached, &options);
        let report = report.expect(0).json();
        assert_eq!(report["transport"], transport);
        crate::assert_few(
            report["bytes"]["fetched"].as_u64().unwrap(),
            crate::live_bytes(&report),
        );
        let disk = there.join("vm.qcow2");
        same_guest(&here.join("vm.qcow2"), &disk);
        let last = format!("read -q -P 7 {} 512", (sectors - 1024) * 512);
        let read = tool("qemu-io", &["-f", "qcow2", "-c", &last, text(&disk)]);
        assert!(read.is_empty(), "{}", String::from_utf8_lossy(&read));
    }
}

#[test]
fn a_snapshot_of_vmware_by_https() {
    if !ready(&["nginx", "openssl"]) {
        return;
    }
    let lab = Lab::small();
    let root = lab.path("store");
    let vmx = as_vmware(&lab, &root.join("vm"));
    let (base, flat) = (root.join("vm/vm.vmdk"), root.join("vm/vm-flat.vmdk"));
    let top = root.join("vm/vm-000001.vmdk");
    delta(&lab, &base, &top, "vmdk", "vmdk");
    let vm = fs::read_to_string(&vmx).unwrap();
    fs::write(&vmx, vm.replace("\"vm.vmdk\"", "\"vm-000001.vmdk\"")).unwrap();
    let untouched = Untouched::of(&[&flat, &base, &top]);
    let plain_out = lab.path("plain");
    let plain = ["--name", "vm", "-o", text(&plain_out)];
    crate::run("convert", text(&vmx), &[], &plain).expect(0);

    let etc = lab.path("etc");
    fs::create_dir(&etc).unwrap();
    let https = Https::start(&etc, &root);
    let url = https.url("/folder/vm/vm.vmx?dcPath=ha-datacenter&dsName=ds1");
    let (report, out) = convert_later(&lab, &url, &https.options(), "later");
    let disks = disks(&report);
    let later = fs::read_to_string(out.join("later.json")).unwrap();
    for name in ["vm-000001.vmdk", "vm.vmdk", "vm-flat.vmdk"] {
        assert!(
            later.contains(&format!("/folder/vm/{name}?dcPath")),
            "{later}"
        );
    }
    assert!(!later.contains(crate::PASSWORD) && later.contains("etag"));
    let serve = Serve::start(&lab, &out);
    let seen = contents(&lab, &disks[0], "seen.raw");
    serve.signal("-TERM");
    serve.end().expect(0);

    // Size, time with the ETag that nginx makes of both, and the header alone.
    let found = fs::metadata(&flat).unwrap();
    let (size, modified) = (found.len(), found.modified().unwrap());
    let file = fs::File::options().write(true).open(&flat).unwrap();
    let restore = |byte: &[u8]| {
        file.set_len(size).unwrap();
        file.write_all_at(byte, 3).unwrap();
        file.set_modified(modified).unwrap();
    };
    let byte = [fs::read(&flat).unwrap()[3]];
    file.set_len(size + 512).unwrap();
    refused(&out, "vm-flat.vmdk", "bytes long");
    restore(&byte);
    file.set_modified(modified + Duration::from_secs(9))
        .unwrap();
    refused(&out, "vm-flat.vmdk", "9 s after");
    restore(&[byte[0] ^ 1]);
    refused(&out, "vm-flat.vmdk", "header");
    restore(&byte);

    let pulled = h2k(["pull", text(&out), "--json"]).expect(0).json();
    assert_eq!(pulled["bytes"]["left"], 0);
    drop(https);
    stand_alone(&disks);
    let stands = contents(&lab, &disks[0], "stands.raw");
    tool("cmp", &[text(&seen), text(&stands)]);
    same_guest(&plain_out.join("vm.qcow2"), &disks[0]);
    untouched.check();
}

/// One file by https: the server provides the facts that are compared.
#[test]
fn a_raw_disk_by_https_that_changes() {
    if !ready(&["nginx", "openssl"]) {
        return;
    }
    let lab = Lab::small();
    let untouched = Untouched::of(&[&lab.raw]);
    let etc = lab.path("etc");
    fs::create_dir(&etc).unwrap();
    let https = Https::start(&etc, lab.dir.path());
    let url = https.url("/guest.raw");
    let (report, out) = convert_later(&lab, &url, &https.options(), "later");
    let wire = &read_json(&out.join("later.json"))["disks"][0]["levels"][0]["wire"];
    assert!(wire["etag"].is_string() && wire.get("whole").is_none());
    let found = fs::metadata(&lab.raw).unwrap();
    let (size, modified) = (found.len(), found.modified().unwrap());
    let file = fs::File::options().write(true).open(&lab.raw).unwrap();
    file.set_len(size + 512).unwrap();
    refused(&out, &url, "bytes long");
    file.set_len(size).unwrap();
    refused(&out, &url, "written to");
    file.set_modified(modified).unwrap();
    fs::rename(&lab.raw, lab.path("elsewhere")).unwrap();
    refused(&out, &url, "gone");
    fs::rename(lab.path("elsewhere"), &lab.raw).unwrap();
    h2k(["pull", text(&out)]).expect(0);
    stand_alone(&disks(&report));
    same_guest(&plain(&lab, &lab.raw), &disks(&report)[0]);
    untouched.check();
}

/// The other host is away for so long in the middle of a pull.
#[test]
fn an_outage_of_30_s_in_mid_pull() {
    let outage = Duration::from_secs(30);
    if !ready(&Sshd::TOOLS) {
        return;
    }
    let lab = Lab::small();
    let untouched = Untouched::of(&[&lab.raw]);
    let mut ssh = Sshd::start();
    let (report, out) = convert_later(&lab, &ssh.url(&lab.raw), &ssh.options(), "later");
    let mut command = Command::new(binary());
    command.args(["pull", text(&out), "--json"]);
    let paused = Paused::at("pull-copying", command);
    ssh.stop();
    let begin = Instant::now();
    let (pulled, took) = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(outage);
            ssh.again();
        });
        (paused.go_on(), begin.elapsed())
    });
    assert_eq!(pulled.expect(0).json()["bytes"]["left"], 0);
    assert!(took >= outage, "{took:?}: it did not need the line");
    stand_alone(&disks(&report));
    same_guest(&plain(&lab, &lab.raw), &disks(&report)[0]);
    untouched.check();
}
