//! Sources on the wire, by the program itself: OpenSSH's server, nginx with TLS and a password, `qemu-nbd`
//! and nbdkit on loopback.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves

#[path = "../support/mod.rs"]
mod support;

mod chains;
mod edges;
mod fleet;
mod hostile;
#[path = "../support/hostile.rs"]
mod hostile_server;
mod later;
#[path = "../support/links.rs"]
mod links;
mod proofs;
mod servers;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use servers::{Https, PASSWORD, Ssh, qemu_nbd};
use support::{Lab, Run, TOOLS, h2k, have, names, sha256, text, tool, virtio_win};

fn ready(more: &[&str]) -> bool {
    have(&TOOLS) && have(more)
}

/// A verb on a source with options, as JSON.
fn run(verb: &str, source: &str, options: &[String], more: &[&str]) -> Run {
    let mut args = vec![verb.to_owned(), source.to_owned(), "--json".to_owned()];
    args.extend_from_slice(options);
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    if matches!(verb, "convert" | "plan") {
        args.extend([
            "--virtio-iso".to_owned(),
            virtio_win().display().to_string(),
        ]);
    }
    h2k(args)
}

/// The document without the location of the source and the time of the inspection.
fn facts(mut document: Value) -> Value {
    let Some(fields) = document.as_object_mut() else {
        return document;
    };
    for key in ["bytes", "transport", "source", "machine"] {
        fields.remove(key);
    }
    let disks = fields.get_mut("disks").and_then(Value::as_array_mut);
    for disk in disks.into_iter().flatten() {
        disk.as_object_mut().map(|disk| disk.remove("path"));
    }
    document
}

fn live_bytes(report: &Value) -> u64 {
    report["bytes"]["read"].as_u64().unwrap()
}

/// What inspection reads and the copy does not is most of it for so small a guest.
fn assert_few(fetched: u64, live: u64) {
    let most = live / 10 * 11 + (4 << 20);
    assert!(fetched <= most, "{fetched} bytes of {live} live ones");
}

/// Compares two converted disks by everything that inspection and the checks read: NTFS dates every
/// write.
#[track_caller]
fn alike(a: &Path, b: &Path) {
    for verb in ["inspect", "verify"] {
        let [a, b] = [a, b].map(|disk| facts(run(verb, text(disk), &[], &[]).expect(0).json()));
        assert_eq!(a, b, "{verb}");
    }
}

/// A VM of VMware with the lab's disk as its flat extent.
fn as_vmware(lab: &Lab, folder: &Path) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let flat = folder.join("vm-flat.vmdk");
    tool("cp", &["--sparse=always", text(&lab.raw), text(&flat)]);
    let sectors = fs::metadata(&flat).unwrap().len() / 512;
    let descriptor = format!(
        "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\ncreateType=\"vmfs\"\n\
         RW {sectors} VMFS \"vm-flat.vmdk\"\nddb.adapterType = \"lsilogic\"\n"
    );
    fs::write(folder.join("vm.vmdk"), descriptor).unwrap();
    let vmx = "displayName = \"wired\"\nmemsize = \"2048\"\nscsi0.present = \"TRUE\"\n\
               scsi0.virtualDev = \"lsisas1068\"\nscsi0:0.present = \"TRUE\"\n\
               scsi0:0.fileName = \"vm.vmdk\"\n";
    let path = folder.join("vm.vmx");
    fs::write(&path, vmx).unwrap();
    path
}

#[test]
fn every_verb_over_ssh_says_what_it_says_here() {
    if !ready(&["sshd", "ssh", "ssh-keygen"]) {
        return;
    }
    let lab = Lab::small();
    let vmx = as_vmware(&lab, &lab.path("vmfs/volumes/ds 1/vm"));
    let etc = lab.path("etc");
    fs::create_dir(&etc).unwrap();
    let ssh = Ssh::start(&etc);
    let (url, options) = (ssh.url(&vmx).replace(' ', "%20"), ssh.options());
    let before = sha256(&vmx.with_file_name("vm-flat.vmdk"));

    let there = run("inspect", &url, &options, &[]).expect(0).json();
    let here = run("inspect", text(&vmx), &[], &[]).expect(0).json();
    assert_eq!(here["transport"], "file");
    assert_eq!(here["bytes"]["fetched"], 0);
    assert_eq!(there["transport"], "ssh");
    let fetched = there["bytes"]["fetched"].as_u64().unwrap();
    let hives: u64 = 8 << 20;
    assert!(fetched > 0 && fetched < hives + (4 << 20), "{fetched}");
    let path = there["source"]["path"].as_str().unwrap();
    assert!(
        path.starts_with("ssh://") && path.ends_with("/vm.vmdk"),
        "{path}"
    );
    assert_eq!(there["machine"]["name"], here["machine"]["name"]);
    assert_eq!(facts(there), facts(here));

    let plan = |source: &str, options: &[String]| {
        let out = lab.path("planned");
        let document = run("plan", source, options, &["-o", text(&out)])
            .expect(0)
            .json();
        document["actions"].clone()
    };
    assert_eq!(plan(&url, &options), plan(text(&vmx), &[]));

    let convert = |source: &str, options: &[String], name: &str| {
        let out = lab.path(name);
        let report = run(
            "convert",
            source,
            options,
            &["-o", text(&out), "--name", "wired"],
        );
        (report.expect(0).json(), out)
    };
    let (there, wired) = convert(&url, &options, "wired");
    let (here, local) = convert(text(&vmx), &[], "local");
    let (a, b) = (wired.join("wired.qcow2"), local.join("wired.qcow2"));
    alike(&a, &b);
    assert_eq!(there["transport"], "ssh");
    let (fetched, live) = (
        there["bytes"]["fetched"].as_u64().unwrap(),
        live_bytes(&there),
    );
    assert_few(fetched, live);
    assert_eq!(there["controllers"], here["controllers"]);
    // Nothing in the directory tells of the paths of this run.
    for file in names(&wired)
        .iter()
        .filter(|f| f.ends_with(".json") || f.ends_with(".html"))
    {
        let text = fs::read_to_string(wired.join(file)).unwrap();
        assert!(!text.contains("hyper2kvm-source-"), "{file}");
    }
    run("verify", text(&a), &[], &[]).expect(0);
    // The source as it is does not boot from VirtIO.
    let verified = run("verify", &url, &options, &[]).expect(4).json();
    assert_eq!(
        (&verified["transport"], &verified["ready"]),
        (&"ssh".into(), &false.into())
    );
    assert_eq!(
        sha256(&vmx.with_file_name("vm-flat.vmdk")),
        before,
        "the source"
    );

    // A directory: the table of the VMs below it.
    let listed = run("inspect", &ssh.url(&lab.path("vmfs")), &options, &[])
        .expect(0)
        .json();
    assert_eq!(listed["machines"][0]["name"], "wired");
    // A lock beside it.
    fs::write(vmx.with_file_name(".lck-3409000000000000"), "").unwrap();
    let refused = run("inspect", &url, &options, &[]).expect(1).json();
    assert!(
        refused["error"]["message"]
            .as_str()
            .unwrap()
            .contains("locked by VMware")
    );
}

#[test]
fn https_with_a_password_reads_a_datastore() {
    if !ready(&["nginx", "openssl"]) {
        return;
    }
    let lab = Lab::small();
    let root = lab.path("store");
    as_vmware(&lab, &root.join("vm"));
    let etc = lab.path("etc");
    fs::create_dir(&etc).unwrap();
    let https = Https::start(&etc, &root);
    let url = https.url("/folder/vm/vm.vmx?dcPath=ha-datacenter&dsName=ds1");
    let options = https.options();
    let there = run("inspect", &url, &options, &[]).expect(0).json();
    let here = run("inspect", text(&root.join("vm/vm.vmx")), &[], &[])
        .expect(0)
        .json();
    assert_eq!(there["transport"], "https");
    assert_eq!(facts(there), facts(here));

    // The other verbs; a directory where the server lists it.
    let planned = ["-o", text(&lab.path("planned"))].map(str::to_owned);
    let planned = planned.each_ref().map(String::as_str);
    run("plan", &url, &options, &planned).expect(0);
    let verified = run("verify", &url, &options, &[]).expect(4).json();
    assert_eq!(verified["transport"], "https");
    let directory = https.url("/listed/");
    let listed = run("inspect", &directory, &options, &[]).expect(0).json();
    assert_eq!(listed["machines"][0]["name"], "wired");
    let refused = run("inspect", &https.url("/folder/"), &options, &[]);
    assert!(refused.code == 1 && refused.stderr.contains("hint: "));

    let out = lab.path("wired");
    let done = run("convert", &url, &options, &["-o", text(&out)])
        .expect(0)
        .json();
    let (fetched, live) = (
        done["bytes"]["fetched"].as_u64().unwrap(),
        live_bytes(&done),
    );
    assert_few(fetched, live);
    run("verify", text(&out.join("wired.qcow2")), &[], &[]).expect(0);
    // The password is nowhere.
    let report = fs::read_to_string(out.join("report.json")).unwrap();
    assert!(!report.contains(PASSWORD) && report.contains("\"password-file\""));

    // A datastore by its UUID: refused, with the remedy.
    let vmx = root.join("vm/vm.vmx");
    let by_id = fs::read_to_string(&vmx).unwrap().replace(
        "\"vm.vmdk\"",
        "\"/vmfs/volumes/5f1a2b3c-4d5e6f70-8190-a1b2c3d4e5f6/vm/vm.vmdk\"",
    );
    fs::write(root.join("vm/by-id.vmx"), by_id).unwrap();
    let by_id = url.replace("vm.vmx", "by-id.vmx");
    let refused = run("inspect", &by_id, &options, &[]);
    assert!(
        refused.code != 0 && refused.stderr.contains("UUID"),
        "{}",
        refused.stderr
    );
    // Without the password, and with a certificate nobody vouches for.
    let without = &options[..2];
    assert_eq!(run("inspect", &url, without, &[]).code, 1);
    let denied: Vec<String> = [&options[4..], &["--user".to_owned(), "x".to_owned()]].concat();
    assert_eq!(run("inspect", &url, &denied, &[]).code, 1);
}

#[test]
fn nbd_exports_and_commands_are_raw_disks() {
    if !ready(&["qemu-nbd", "nbdkit"]) {
        return;
    }
    let lab = Lab::small();
    let socket = lab.path("s");
    let _server = qemu_nbd(&lab.raw, &socket);
    let here = facts(run("inspect", text(&lab.raw), &[], &[]).expect(0).json());
    let url = format!("nbd+unix:///disk?socket={}", socket.display());
    let there = run("inspect", &url, &[], &[]).expect(0).json();
    assert_eq!(
        (&there["transport"], &there["source"]["path"]),
        (&"nbd".into(), &url.clone().into())
    );
    assert_eq!(facts(there), here);

    let command = [
        "--source-command".to_owned(),
        format!("nbdkit -s -r file '{}'", lab.raw.display()),
    ];
    let there = run("inspect", "from-a-vendor", &command, &[])
        .expect(0)
        .json();
    assert_eq!(there["transport"], "command");
    assert_eq!(facts(there), here);

    // A list: one over NBD, one of this host.
    let list = lab.path("list.yaml");
    let machines = format!(
        "defaults: {{virtio-iso: '{}'}}\nmachines:\n- {{source: '{url}', name: wired}}\n\
         - {{source: guest.raw, name: local}}\n",
        virtio_win().display()
    );
    fs::write(&list, machines).unwrap();
    let out = lab.path("fleet");
    let done = h2k([
        "convert",
        "--batch",
        text(&list),
        "-o",
        text(&out),
        "--json",
    ])
    .expect(0);
    assert_eq!(done.json()["machines"].as_array().unwrap().len(), 2);
    let disk = |name: &str| out.join(format!("{name}-kvm/{name}.qcow2"));
    alike(&disk("wired"), &disk("local"));
    // Finished VMs are not converted again: the source is identified by its size and time.
    let again = h2k([
        "convert",
        "--batch",
        text(&list),
        "-o",
        text(&out),
        "--json",
    ])
    .expect(0);
    let states: Vec<_> = again.json()["machines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["state"].clone())
        .collect();
    assert_eq!(states, ["skipped", "skipped"], "{states:?}");
}

#[test]
fn combinations_that_mean_nothing_are_usage_errors() {
    let lab = tempfile::tempdir().unwrap();
    let local = lab.path().join("d.raw");
    fs::write(&local, [0; 512]).unwrap();
    let (local, nowhere) = (text(&local), "ssh://127.0.0.1:9/x.vmdk");
    for (source, more, says) in [
        ("ssh://u:hunter2@h/x", &[][..], "password"),
        ("https://u:hunter2@h/x", &[], "password"),
        ("http://h/x", &[], "https"),
        ("ssh://h", &[], "names no file"),
        (local, &["--user", "root"], "--user"),
        (local, &["--connections", "4"], "--connections"),
        (
            "nbd://127.0.0.1:9/x",
            &["--password-file", "p"],
            "--password-file",
        ),
        (
            nowhere,
            &["--tls-fingerprint", "sha256:00"],
            "64 hex digits",
        ),
        (nowhere, &["--tls-ca", "ca.pem"], "--tls-ca"),
        (
            nowhere,
            &["--source-command", "nbdkit -s null"],
            "two sources",
        ),
        (nowhere, &["--connections", "0"], "1..=64"),
    ] {
        for verb in ["inspect", "plan", "convert", "verify"] {
            let run = run(verb, source, &[], more);
            assert_eq!(run.code, 2, "{verb} {source} {more:?}: {}", run.stderr);
            assert!(run.stderr.contains(says), "{verb} {source}: {}", run.stderr);
            assert!(!run.stderr.contains("hunter2") && !run.stdout.contains("hunter2"));
        }
    }
    let run = run("convert", nowhere, &[], &["--in-place"]);
    assert_eq!(run.code, 2, "{}", run.stderr);
    // In a list they are found before anything is started.
    for machine in [
        "{source: 'ssh://u:hunter2@h/x'}",
        "{source: 'ssh://h/x', in-place: true}",
        "{source: x.raw, user: root}",
        "{source: 'https://h/x', password-file: '-'}",
    ] {
        let list = lab.path().join("list.yaml");
        fs::write(&list, format!("machines:\n- {machine}\n")).unwrap();
        let run = h2k(["convert", "--batch", text(&list)]);
        assert_eq!(run.code, 2, "{machine}: {}", run.stderr);
        assert!(!run.stderr.contains("hunter2"), "{}", run.stderr);
    }
}

#[test]
fn a_source_that_changes_ends_the_run() {
    if !ready(&["sshd", "ssh", "ssh-keygen"]) {
        return;
    }
    let lab = Lab::small();
    let etc = lab.path("etc");
    fs::create_dir(&etc).unwrap();
    let ssh = Ssh::start(&etc);
    let mut command = support::command("convert", Path::new(&ssh.url(&lab.raw)), &[]);
    command
        .args(ssh.options())
        .args(["-o", text(&lab.path("out"))]);
    let paused = support::Paused::at("copied", command);
    let file = fs::File::options().write(true).open(&lab.raw).unwrap();
    file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(60))
        .unwrap();
    let run = paused.go_on();
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(
        run.stderr.contains("changed") && run.stderr.contains("ssh://"),
        "{}",
        run.stderr
    );
    assert!(!lab.path("out").exists());
    assert!(
        names(lab.dir.path())
            .iter()
            .all(|name| !name.contains("out")),
        "no partial directory"
    );
}
