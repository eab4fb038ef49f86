//! VMs on a source of another host: `convert --copy later`, `serve`, `pull`, over OpenSSH on loopback.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::servers::{Ssh, qemu_nbd};
use crate::support::later::{Untouched, same_guest};
use crate::support::{self, Lab, Paused, Run, binary, finish, h2k, names, text, tool};
use crate::{ready, run};

const SERVERS: [&str; 3] = ["sshd", "ssh", "ssh-keygen"];

fn ssh(lab: &Lab) -> Ssh {
    let etc = lab.path("etc");
    fs::create_dir(&etc).unwrap();
    Ssh::start(&etc)
}

pub fn convert_later(lab: &Lab, source: &str, options: &[String], name: &str) -> (Value, PathBuf) {
    let out = lab.path(name);
    let more = ["--copy", "later", "--name", "vm", "-o", text(&out)];
    (run("convert", source, options, &more).expect(0).json(), out)
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// QEMU's view of a disk, whatever is below it.
pub fn contents(lab: &Lab, disk: &Path, name: &str) -> PathBuf {
    let raw = lab.path(name);
    let args = ["convert", "-f", "qcow2", "-O", "raw"];
    tool("qemu-img", &[&args[..], &[text(disk), text(&raw)]].concat());
    raw
}

/// `hyper2kvm serve` as started by systemd: it notifies when it is ready.
pub struct Serve(Option<Child>);

impl Serve {
    pub fn start(lab: &Lab, out: &Path) -> Self {
        Self::at("", lab, out)
    }

    /// With a fail point.
    pub fn at(point: &str, lab: &Lab, out: &Path) -> Self {
        let name = lab.path("notify");
        let _ = fs::remove_file(&name);
        let socket = UnixDatagram::bind(&name).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut command = Command::new(binary());
        command
            .args(["serve", "--json"])
            .arg(out)
            .env("NOTIFY_SOCKET", &name)
            .env("HYPER2KVM_FAILPOINT", point)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        let mut message = [0; 64];
        let length = socket.recv(&mut message).unwrap();
        assert_eq!(&message[..length], b"READY=1\n");
        Self(Some(child))
    }

    pub fn signal(&self, name: &str) {
        tool("kill", &[name, &self.id().to_string()]);
    }

    pub fn id(&self) -> u32 {
        self.0.as_ref().unwrap().id()
    }

    /// How it ended.
    pub fn end(mut self) -> Run {
        let out = self.0.take().unwrap().wait_with_output().unwrap();
        Run {
            code: out.status.code().unwrap_or(-1),
            stdout: String::from_utf8(out.stdout).unwrap(),
            stderr: String::from_utf8(out.stderr).unwrap(),
        }
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Kills the children of a process with such a name. Returns their number.
pub fn kill_children(parent: u32, name: &str) -> usize {
    let mut found = 0;
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((own, rest)) = stat.rsplit_once(") ") else {
            continue;
        };
        let its = rest.split(' ').nth(1).and_then(|id| id.parse().ok());
        if its == Some(parent) && own.contains(name) {
            let id = entry.file_name().into_string().unwrap();
            let killed = Command::new("kill").args(["-KILL", &id]).status().unwrap();
            found += usize::from(killed.success());
        }
    }
    found
}

/// Ends every connection of the server, and not the server. Returns their number.
fn cut(ssh: &Ssh) -> usize {
    kill_children(ssh.server.id(), "")
}

/// The disk of a conversion that copies.
pub fn plain(lab: &Lab, source: &Path) -> PathBuf {
    let out = lab.path("plain");
    let args = ["--name", "vm", "-o", text(&out)];
    run("convert", text(source), &[], &args).expect(0);
    out.join("vm.qcow2")
}

#[test]
fn a_vm_starts_on_another_host_and_ends_without_it() {
    if !ready(&SERVERS) || !support::have(&["virt-xml-validate"]) {
        return;
    }
    let lab = Lab::small();
    let ssh = ssh(&lab);
    let (url, options) = (ssh.url(&lab.raw), ssh.options());
    let untouched = Untouched::of(&[&lab.raw]);
    let plain = lab.convert(&lab.raw, &["--name", "vm"]).expect(0).json();
    let plain_out = lab.path("plain");
    fs::rename(lab.path("out"), &plain_out).unwrap();

    let out = lab.path("o u&t");
    let more = ["--copy", "later", "--name", "vm", "-o", text(&out)];
    let plan = run("plan", &url, &options, &more).expect(0).json();
    assert_eq!(plan["outputs"]["complete"], false);
    let (report, out) = convert_later(&lab, &url, &options, "o u&t");
    assert_eq!(plan["outputs"]["disks"], report["outputs"]["disks"]);
    assert_eq!(report["outputs"]["complete"], false);
    let (left, data) = (&report["bytes"]["left"], &plain["bytes"]["read"]);
    let (left, data) = (left.as_u64().unwrap(), data.as_u64().unwrap());
    assert!(left > data / 2 && left <= data, "{left} of {data}");
    let fetched = report["bytes"]["fetched"].as_u64().unwrap();
    assert!(fetched > 0 && fetched < 16 << 20, "{fetched}");

    // Its location, its facts, and no secret.
    let later = read_json(&out.join("later.json"));
    let wire = &later["disks"][0]["levels"][0]["wire"];
    assert_eq!(wire["url"], url);
    assert_eq!(wire["size_bytes"], fs::metadata(&lab.raw).unwrap().len());
    assert!(wire["modified_ms"].as_u64().unwrap() > 0);
    let mode = fs::metadata(out.join("later.json")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let socket = out.join("vm.sock");
    let disk = out.join("vm.qcow2");
    let info = tool("qemu-img", &["info", "-U", "--output=json", text(&disk)]);
    let info: Value = serde_json::from_slice(&info).unwrap();
    let named = info["backing-filename"].as_str().unwrap();
    assert!(named.contains(&format!("\"{}\"", text(&socket))), "{named}");
    assert_eq!(info["backing-filename-format"], "raw");
    for stage in ["bootstrap", "final"] {
        let path = out.join(format!("vm-{stage}.xml"));
        tool("virt-xml-validate", &[text(&path), "domain"]);
        let xml = fs::read_to_string(&path).unwrap();
        let places: Vec<usize> = [
            "<backingStore type=\"network\">".to_owned(),
            "<format type=\"raw\"/>".to_owned(),
            "<source protocol=\"nbd\">".to_owned(),
            format!(
                "<host transport=\"unix\" socket=\"{}\"/>",
                text(&socket).replace('&', "&amp;")
            ),
            "<backingStore/>".to_owned(),
        ]
        .iter()
        .map(|part| {
            xml.find(part.as_str())
                .unwrap_or_else(|| panic!("no {part} in {xml}"))
        })
        .collect();
        assert!(places.is_sorted(), "{places:?}: {xml}");
        assert!(xml.contains("error_policy=\"stop\" rerror_policy=\"stop\""));
    }
    h2k(["verify", text(&out)]).expect(0);

    // Nobody but the owner gets in, and one is enough.
    let serve = Serve::start(&lab, &out);
    let found = fs::metadata(&socket).unwrap();
    assert!(found.file_type().is_socket() && found.permissions().mode() & 0o777 == 0o600);
    let second = h2k(["serve", text(&out)]).expect(1);
    assert!(second.stderr.contains("another hyper2kvm serves"));
    let seen = contents(&lab, &disk, "seen.raw");
    // Killed, it leaves sockets behind, and the next one takes their place.
    serve.signal("-KILL");
    assert_eq!(serve.end().code, -1);
    assert!(socket.exists());
    let serve = Serve::start(&lab, &out);
    // The line breaks, and it connects again.
    assert!(cut(&ssh) > 0);
    let again = contents(&lab, &disk, "again.raw");
    tool("cmp", &[text(&seen), text(&again)]);

    let pulled = h2k(["pull", text(&out), "--json"]).expect(0).json();
    assert_eq!(pulled["by"], "offline");
    assert_eq!(pulled["bytes"], json!({"copied": left, "left": 0}));
    // Nothing needs it any more.
    let served = serve.end().expect(0).json();
    assert_eq!(served["schema"], "hyper2kvm/serve/1");
    assert_eq!(
        (&served["serving"], &served["source"]),
        (&true.into(), &json!([url]))
    );
    assert!(served["bytes"]["fetched"].as_u64().unwrap() > 0);
    let left_over: Vec<String> = names(&out)
        .into_iter()
        .filter(|name| name.ends_with(".sock") || name == ".serve.lock")
        .collect();
    assert!(left_over.is_empty(), "{left_over:?}");

    let stands = contents(&lab, &disk, "stands.raw");
    tool("cmp", &[text(&seen), text(&stands)]);
    same_guest(&plain_out.join("vm.qcow2"), &disk);
    let report = read_json(&out.join("report.json"));
    assert_eq!(report["outputs"]["complete"], true);
    let (page, warnings) = (
        fs::read_to_string(out.join("report.html")).unwrap(),
        report["warnings"].to_string(),
    );
    assert!(!warnings.contains("hyper2kvm serve") && !page.contains("hyper2kvm serve"));
    for stage in ["bootstrap", "final"] {
        let xml = fs::read_to_string(out.join(format!("vm-{stage}.xml"))).unwrap();
        assert!(!xml.contains("backingStore"), "{xml}");
    }
    let nothing = h2k(["serve", text(&out), "--json"]).expect(0).json();
    assert_eq!(nothing["serving"], false);
    drop(ssh);
    h2k(["verify", text(&out)]).expect(0);
    untouched.check();
}

#[test]
fn a_pull_over_a_line_that_breaks_and_a_source_that_changes() {
    if !ready(&SERVERS) {
        return;
    }
    let lab = Lab::small();
    let ssh = ssh(&lab);
    let (url, options) = (ssh.url(&lab.raw), ssh.options());
    let (untouched, copied) = (Untouched::of(&[&lab.raw]), plain(&lab, &lab.raw));
    let (_, out) = convert_later(&lab, &url, &options, "out");
    let disk = out.join("vm.qcow2");
    let info = tool("qemu-img", &["info", "-U", "--output=json", text(&disk)]);
    let info: Value = serde_json::from_slice(&info).unwrap();
    let named = format!("nbd+unix:///?socket={}", text(&out.join("vm.sock")));
    assert_eq!(info["backing-filename"], named);
    let serve = Serve::start(&lab, &out);
    let seen = contents(&lab, &disk, "seen.raw");
    serve.signal("-TERM");
    let served = serve.end().expect(0).json();
    assert_eq!(served["serving"], true);
    assert!(!out.join("vm.sock").exists());

    // A source that changes: by its time, and by its header with the time as it was.
    let found = fs::metadata(&lab.raw).unwrap().modified().unwrap();
    let file = fs::File::options().write(true).open(&lab.raw).unwrap();
    file.set_modified(found + Duration::from_secs(60)).unwrap();
    for verb in ["serve", "pull", "boot"] {
        let refused = h2k([verb, text(&out), "--json"]).expect(3).json();
        let blocker = &refused["error"]["blockers"][0];
        assert_eq!(blocker["code"], "source-changed", "{verb}: {refused}");
        let said = blocker["reason"].to_string();
        assert!(said.contains(&url) && said.contains("60 s"), "{said}");
    }
    file.set_modified(found).unwrap();

    // Killed in the middle, and the line cut in the middle.
    let mut command = Command::new(binary());
    command.args(["pull", text(&out)]);
    command.env("HYPER2KVM_FAILPOINT", "pull-copying=kill");
    assert_eq!(finish(command).code, -1);
    let mut command = Command::new(binary());
    command.args(["pull", text(&out), "--json"]);
    let paused = Paused::at("pull-copying", command);
    assert!(cut(&ssh) > 0);
    let pulled = paused.go_on().expect(0).json();
    assert_eq!(pulled["bytes"]["left"], 0);
    let stands = contents(&lab, &disk, "stands.raw");
    tool("cmp", &[text(&seen), text(&stands)]);
    same_guest(&copied, &disk);
    untouched.check();
}

/// A reader of it meets the end of its connection, and the next one gets everything again.
#[test]
fn a_serve_that_is_killed_anywhere_is_started_again() {
    if !ready(&SERVERS) {
        return;
    }
    let lab = Lab::small();
    let ssh = ssh(&lab);
    let (untouched, copied) = (Untouched::of(&[&lab.raw]), plain(&lab, &lab.raw));
    let (_, out) = convert_later(&lab, &ssh.url(&lab.raw), &ssh.options(), "out");
    let disk = out.join("vm.qcow2");
    let read = |what: &str| {
        let serve = Serve::start(&lab, &out);
        let command = ["-r", "-f", "qcow2", "-c", "read 1M 64k", text(&disk)];
        let said = String::from_utf8(tool("qemu-io", &command)).unwrap();
        assert!(said.contains("read 65536"), "{what}: {said}");
        serve.signal("-TERM");
        serve.end().expect(0);
        assert!(!out.join("vm.sock").exists(), "{what}");
    };
    read("none");
    for point in ["serve-locked", "serve-listening", "serve-ready"] {
        let mut command = Command::new(binary());
        command.arg("serve").arg(&out);
        command.env("HYPER2KVM_FAILPOINT", format!("{point}=kill"));
        assert_eq!(finish(command).code, -1, "{point}");
        read(point);
    }
    for point in ["serve-ending", "serve-removed"] {
        let serve = Serve::at(&format!("{point}=kill"), &lab, &out);
        serve.signal("-TERM");
        assert_eq!(serve.end().code, -1, "{point}");
        read(point);
    }
    h2k(["pull", text(&out)]).expect(0);
    same_guest(&copied, &disk);
    untouched.check();
}

/// Pulls and servers killed at moments spread over their runs; `HYPER2KVM_PAIRS` is their number.
#[ignore = "minutes: cargo test --test wire -- --ignored over_ssh_killed; .ci/campaign lines has it"]
#[test]
fn pulls_over_ssh_killed_at_any_moment() {
    if !ready(&SERVERS) {
        return;
    }
    let lab = Lab::small();
    let ssh = ssh(&lab);
    let (untouched, copied) = (Untouched::of(&[&lab.raw]), plain(&lab, &lab.raw));
    let (url, options) = (ssh.url(&lab.raw), ssh.options());
    let (_, out) = convert_later(&lab, &url, &options, "fresh");
    let disk = out.join("vm.qcow2");
    // No two fixes write the same bytes: there are times and identifiers in them.
    let look = || {
        let serve = Serve::start(&lab, &out);
        let seen = contents(&lab, &disk, "seen.raw");
        serve.signal("-TERM");
        serve.end().expect(0);
        seen
    };
    let seen = look();
    let pull = || {
        let mut command = Command::new(binary());
        command.arg("pull").arg(&out).arg("--bandwidth").arg("8");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let again = || {
        fs::remove_dir_all(&out).unwrap();
        convert_later(&lab, &url, &options, "fresh");
        look();
    };
    let begin = Instant::now();
    assert!(pull().status().unwrap().success());
    let whole = begin.elapsed();
    same_guest(&copied, &disk);
    again();
    let kills = std::env::var("HYPER2KVM_PAIRS").ok();
    let kills: u32 = kills.and_then(|n| n.parse().ok()).unwrap_or(3);
    let (mut late, mut pulls) = (0, 1);
    for n in 0..kills {
        if read_json(&out.join("later.json"))["state"] != "left" {
            again();
            pulls += 1;
        }
        let mut child = pull().spawn().unwrap();
        // Some come together with the end of every connection.
        std::thread::sleep(whole.mul_f64(f64::from(n % 23) / 23.0));
        if n % 3 == 0 {
            cut(&ssh);
        }
        let _ = child.kill();
        late += u32::from(child.wait().unwrap().success());
        if read_json(&out.join("later.json"))["state"] == "left" {
            let serve = Serve::start(&lab, &out);
            let name = format!("{}", disk.display());
            tool(
                "qemu-img",
                &[
                    "compare",
                    "-q",
                    "-U",
                    "-f",
                    "raw",
                    "-F",
                    "qcow2",
                    text(&seen),
                    &name,
                ],
            );
            serve.signal("-KILL");
            serve.end();
        } else {
            tool(
                "qemu-img",
                &[
                    "compare",
                    "-q",
                    "-f",
                    "raw",
                    "-F",
                    "qcow2",
                    text(&seen),
                    text(&disk),
                ],
            );
        }
    }
    assert!(pull().status().unwrap().success());
    same_guest(&copied, &disk);
    untouched.check();
    println!("{kills} kills: {late} came too late, in {pulls} pulls");
}

#[test]
fn what_cannot_stay_on_another_host_is_refused() {
    if !ready(&["qemu-nbd"]) {
        return;
    }
    let lab = Lab::small();
    let untouched = Untouched::of(&[&lab.raw]);
    let server = lab.path("s");
    let serving = qemu_nbd(&lab.raw, &server);
    let url = format!("nbd+unix:///disk?socket={}", server.display());
    // A name that no socket can have.
    let deep = lab.path(&"d".repeat(100));
    let more = ["--copy", "later", "--name", "vm", "-o", text(&deep)];
    for verb in ["plan", "convert"] {
        let refused = run(verb, &url, &[], &more).expect(3).json();
        let blocker = &refused["error"]["blockers"][0];
        assert_eq!(blocker["code"], "copy-later", "{refused}");
        assert!(blocker["reason"].to_string().contains("107"), "{refused}");
    }
    assert!(!deep.exists());
    let stdin = ["--copy", "later", "--user", "x", "--password-file", "-"];
    let refused = run("convert", "ssh://127.0.0.1:9/x.raw", &[], &stdin).expect(2);
    assert!(
        refused.stderr.contains("standard input"),
        "{}",
        refused.stderr
    );

    // Given up, with the lock and the socket of a server that was killed.
    let (_, out) = convert_later(&lab, &url, &[], "out");
    let serve = Serve::start(&lab, &out);
    serve.signal("-KILL");
    serve.end();
    assert!(out.join("vm.sock").exists());
    let released = h2k(["release", text(&out), "--json"]).expect(0).json();
    assert_eq!(released["source"], json!([url]));
    assert_eq!(released["kept"], json!([]));
    assert!(!out.exists());

    // One that serves ends with the directory, and one whose directory has moved names the new sockets.
    let (_, out) = convert_later(&lab, &url, &[], "out");
    let moved = lab.path("moved");
    fs::rename(&out, &moved).unwrap();
    let serve = Serve::start(&lab, &moved);
    let seen = contents(&lab, &moved.join("vm.qcow2"), "seen.raw");
    assert_eq!(fs::metadata(&seen).unwrap().len(), lab.spec.disk_size);
    let xml = fs::read_to_string(moved.join("vm-final.xml")).unwrap();
    let socket = moved.join("vm.sock");
    assert!(xml.contains(text(&socket)), "{xml}");
    let begin = Instant::now();
    h2k(["release", text(&moved)]).expect(0);
    let ended = serve.end().expect(0);
    assert!(
        ended.stderr.is_empty() || !ended.stderr.contains("error"),
        "{}",
        ended.stderr
    );
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert!(!moved.exists());
    drop(serving);
    untouched.check();
}
