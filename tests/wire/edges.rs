//! Edges of sources on the wire: passwords, processes, names, formats, and VMs that run.

use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{as_vmware, facts, ready, run};
use crate::support::wire::{Nginx, Sshd};
use crate::support::{self, Lab, Paused, text, tool};

const SECRET: &str = "correct horse 9";

/// A stand-in for `ssh` that asks for the password like it, reports its inputs to a socket of the
/// test, and becomes OpenSSH's SFTP server.
fn stand_in(folder: &Path, port: u16) {
    let script = format!(
        "#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/{port}\n\
         {{ env; echo \"argv: $*\"; echo \"said: $(\"$SSH_ASKPASS\" \"u@h's password: \")\"\n\
         echo \"phrase: $(\"$SSH_ASKPASS\" \"Enter passphrase for key '/k': \")\"; }} >&3\nexec 3>&-\n\
         exec /usr/lib/openssh/sftp-server\n"
    );
    let path = folder.join("ssh");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_password_is_asked_for_and_stands_nowhere() {
    if !ready(&["bash"]) || !Path::new("/usr/lib/openssh/sftp-server").exists() {
        return;
    }
    let lab = Lab::small();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let bin = lab.path("bin");
    fs::create_dir(&bin).unwrap();
    stand_in(&bin, listener.local_addr().unwrap().port());
    let told = std::thread::spawn(move || {
        let mut told = String::new();
        listener
            .accept()
            .unwrap()
            .0
            .read_to_string(&mut told)
            .unwrap();
        told
    });
    let password = lab.path("password");
    fs::write(&password, format!("{SECRET}\n")).unwrap();
    fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).unwrap();
    let url = format!("ssh://admin@nas.example{}", lab.raw.display());
    let out = lab.path("out");
    let mut command = support::command("convert", Path::new(&url), &["-vv", "--json"]);
    command
        .args(["--password-file", text(&password), "--connections", "1"])
        .args(["-o", text(&out), "--name", "vm"])
        .env(
            "PATH",
            format!("{}:{}", text(&bin), std::env::var("PATH").unwrap()),
        );
    // While it is connected: no process has it in its arguments or its environment.
    let paused = Paused::at("copied", command);
    let mut seen = 0;
    for (id, line) in descendants(paused.id()) {
        let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        let environment = String::from_utf8_lossy(&environment).into_owned();
        assert!(
            !line.contains(SECRET) && !environment.contains(SECRET),
            "{line}"
        );
        seen += usize::from(line.contains("__wire") || line.contains("sftp-server"));
    }
    assert!(seen >= 2, "whoever dials, and what stands for ssh");
    let done = paused.go_on().expect(0);
    let told = told.join().unwrap();
    let (given, said) = told.split_once("said: ").unwrap();
    assert!(said.starts_with(&format!("{SECRET}\n")), "{said}");
    // That of a key is another secret.
    assert!(said.contains("phrase: \n"), "{said}");
    assert!(given.contains("-l admin") && given.contains("argv: ") && !given.contains(SECRET));
    assert!(!done.stderr.contains(SECRET) && !done.stdout.contains(SECRET));
    let mut left = vec![out];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(
                fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if path.extension().is_none_or(|e| e != "qcow2") {
            let bytes = fs::read(&path).unwrap();
            let found = bytes.windows(SECRET.len()).any(|w| w == SECRET.as_bytes());
            assert!(!found, "{}", path.display());
        }
    }
}

/// The processes below one, with their command lines.
fn descendants(process: u32) -> Vec<(u32, String)> {
    let (mut all, mut left) = (Vec::new(), vec![process]);
    while let Some(id) = left.pop() {
        let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        all.push((id, String::from_utf8_lossy(&line).replace('\0', " ")));
        let threads = fs::read_dir(format!("/proc/{id}/task"))
            .into_iter()
            .flatten();
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children"));
            let children = children.unwrap_or_default();
            left.extend(children.split(' ').filter_map(|id| id.parse::<u32>().ok()));
        }
    }
    all
}

#[test]
fn whoever_dials_dies_with_us() {
    if !ready(&Sshd::TOOLS) {
        return;
    }
    let lab = Lab::small();
    let sshd = Sshd::start();
    let mut command = support::command("convert", Path::new(&sshd.url(&lab.raw)), &[]);
    command
        .args(sshd.options())
        .args(["-o", text(&lab.path("out"))]);
    let paused = Paused::at("copied", command);
    let mut below = descendants(paused.id());
    below.retain(|(_, line)| line.contains("__wire") || line.contains(" sftp"));
    assert!(below.len() >= 2, "{below:?}");
    tool("kill", &["-KILL", &paused.id().to_string()]);
    let start = Instant::now();
    let is_left = |(id, line): &(u32, String)| {
        let now = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        !now.is_empty() && String::from_utf8_lossy(&now).replace('\0', " ") == *line
    };
    while below.iter().any(is_left) {
        assert!(start.elapsed() < Duration::from_secs(10), "{below:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(paused.go_on());
}

/// A port of IPv6 that leads to one of IPv4.
fn over_ipv6(port: u16) -> Option<u16> {
    let listener = TcpListener::bind("[::1]:0").ok()?;
    let own = listener.local_addr().ok()?.port();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else {
                return;
            };
            for (mut from, mut to) in [
                (client.try_clone().unwrap(), server.try_clone().unwrap()),
                (server, client),
            ] {
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Both);
                });
            }
        }
    });
    Some(own)
}

fn encoded(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/.-_".contains(&b);
    let one = |b: u8| match plain(b) {
        true => char::from(b).to_string(),
        false => format!("%{b:02X}"),
    };
    name.bytes().map(one).collect()
}

/// The lab's disk as VMware splits one.
fn split(lab: &Lab) {
    let half = lab.spec.disk_size / 2;
    for (name, skip) in [("split-f001.vmdk", 0), ("split-f002.vmdk", half)] {
        let options = [
            format!("if={}", lab.raw.display()),
            format!("of={}", lab.path(name).display()),
            format!("skip={skip}"),
            format!("count={half}"),
        ];
        let more = ["iflag=skip_bytes,count_bytes", "bs=1M", "conv=sparse"];
        let options = options.iter().map(String::as_str).chain(more);
        tool("dd", &options.collect::<Vec<_>>());
        fs::File::options()
            .write(true)
            .open(lab.path(name))
            .and_then(|piece| piece.set_len(half))
            .unwrap();
    }
    let sectors = half / 512;
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n\
         createType=\"twoGbMaxExtentFlat\"\nRW {sectors} FLAT \"split-f001.vmdk\" 0\n\
         RW {sectors} FLAT \"split-f002.vmdk\" 0\nddb.adapterType = \"lsilogic\"\n"
    );
    fs::write(lab.path("split.vmdk"), text).unwrap();
}

#[test]
fn names_addresses_and_formats_are_read_as_they_are_here() {
    if !ready(&[&Sshd::TOOLS[..], &Nginx::TOOLS].concat()) {
        return;
    }
    let lab = Lab::small();
    let here = facts(run("inspect", text(&lab.raw), &[], &[]).expect(0).json());
    let odd = "Größe 100% #1? +&.raw";
    fs::hard_link(&lab.raw, lab.path(odd)).unwrap();
    lab.in_format("vmdk", "subformat=streamOptimized", "stream.vmdk");
    lab.in_format("vhdx", "", "disk.vhdx");
    lab.in_format("qcow2", "", "base.qcow2");
    let top = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
    ];
    tool(
        "qemu-img",
        &[&top[..], &[text(&lab.path("top.qcow2"))]].concat(),
    );
    split(&lab);
    let (sshd, nginx) = (Sshd::start(), Nginx::start(lab.dir.path()));
    let tls = nginx.options();
    // What is of the format and not of the disk.
    let common = |mut document: serde_json::Value| {
        document
            .as_object_mut()
            .map(|fields| fields.remove("findings"));
        document
    };
    let here = common(here);
    let at_ssh = |name: &str| {
        let path = encoded(text(&lab.path(name)));
        format!("ssh://127.0.0.1:{}{path}", sshd.port)
    };
    let shapes = ["stream.vmdk", "disk.vhdx", "top.qcow2", "split.vmdk"];
    for (url, options) in [odd].iter().chain(&shapes).flat_map(|name| {
        let https = (nginx.url(&encoded(name)), tls.clone());
        [https, (at_ssh(name), sshd.options())]
    }) {
        let there = run("inspect", &url, &options, &[]).expect(0).json();
        let path = there["source"]["path"].as_str().unwrap();
        assert_eq!(
            path.replace("root@", ""),
            url,
            "it is shown as it was given"
        );
        assert_eq!(common(facts(there)), here, "{url}");
    }
    // The user in the URL, and the password from a file.
    let locked = nginx
        .url("locked/disk.vhdx")
        .replace("https://", "https://user@");
    let password = nginx.options_with_password();
    let password: Vec<String> = password
        .iter()
        .filter(|o| !["--user", "user"].contains(&o.as_str()))
        .cloned()
        .collect();
    run("inspect", &locked, &password, &[]).expect(0);
    let Some(port) = over_ipv6(nginx.port) else {
        return;
    };
    let url = format!("https://[::1]:{port}/guest.raw");
    let shown = run("inspect", &url, &tls, &[]).expect(1).stderr;
    // The certificate is for other names, which is said with its fingerprint; that reaches it.
    let pin = shown
        .split_whitespace()
        .find(|word| word.starts_with("sha256:"))
        .unwrap();
    let pin = [
        "--tls-fingerprint".to_owned(),
        pin.trim_matches(|c: char| !c.is_alphanumeric()).to_owned(),
    ];
    let there = run("inspect", &url, &pin, &[]).expect(0).json();
    assert_eq!(there["source"]["path"], url);
    assert_eq!(common(facts(there)), here);
}

/// QEMU reads whole sectors, whatever the length of a file.
#[test]
fn files_of_odd_lengths_and_empty_ones_are_read_as_they_are_here() {
    if !ready(&[&Sshd::TOOLS[..], &Nginx::TOOLS].concat()) {
        return;
    }
    let lab = Lab::small();
    fs::copy(&lab.raw, lab.path("odd.raw")).unwrap();
    let odd = fs::File::options().write(true).open(lab.path("odd.raw"));
    odd.and_then(|odd| odd.set_len(lab.spec.disk_size + 4096 + 100))
        .unwrap();
    fs::write(lab.path("empty.raw"), "").unwrap();
    let here = run("inspect", text(&lab.path("odd.raw")), &[], &[]).expect(0);
    let here = facts(here.json());
    let (sshd, nginx) = (Sshd::start(), Nginx::start(lab.dir.path()));
    for reach in [
        &|name: &str| (nginx.url(name), nginx.options()) as (String, Vec<String>),
        &|name: &str| (sshd.url(&lab.path(name)), sshd.options()),
    ] as [&dyn Fn(&str) -> (String, Vec<String>); 2]
    {
        let (url, options) = reach("odd.raw");
        let there = run("inspect", &url, &options, &[]).expect(0).json();
        assert_eq!(facts(there), here, "{url}");
        let (url, options) = reach("empty.raw");
        let said = run("inspect", &url, &options, &[]).expect(1).stderr;
        assert!(said.contains("is empty (0 bytes)"), "{said}");
    }
}

#[test]
fn a_vm_that_runs_or_has_a_newer_snapshot_is_noticed_there() {
    if !ready(&[&Sshd::TOOLS[..], &Nginx::TOOLS].concat()) {
        return;
    }
    let lab = Lab::small();
    let vmx = as_vmware(&lab, &lab.path("ds/vm"));
    let (sshd, disk) = (Sshd::start(), vmx.with_file_name("vm.vmdk"));
    let options = sshd.options();
    // It shows what lies in a directory too.
    let nginx = Nginx::start(lab.dir.path());
    let tls = nginx.options();
    // A snapshot on the disk that is named.
    let link = "# Disk DescriptorFile\nversion=1\nCID=00000002\nparentCID=00000001\ncreateType=\"vmfsSparse\"\n\
                parentFileNameHint=\"vm.vmdk\"\nRW 1048576 VMFSSPARSE \"vm-000001-delta.vmdk\"\n";
    fs::write(vmx.with_file_name("vm-000001.vmdk"), link).unwrap();
    let (ssh, https) = (sshd.url(&disk), nginx.url("ds/vm/vm.vmdk"));
    for (verb, url, options) in [
        ("plan", &ssh, &options),
        ("convert", &ssh, &options),
        ("plan", &https, &tls),
    ] {
        let out = lab.path("out");
        let refused = run(verb, url, options, &["-o", text(&out)]).expect(3);
        let said = refused.json()["error"]["blockers"].to_string();
        assert!(
            said.contains("newer-link") && said.contains("vm-000001.vmdk"),
            "{verb}: {said}"
        );
        assert!(!out.exists());
    }
    fs::remove_file(vmx.with_file_name("vm-000001.vmdk")).unwrap();
    // Locks of Workstation and of ESXi: the disk is refused, and the table of a directory says so.
    for lock in ["vm.vmdk.lck", ".lck-0a00000000000000"] {
        let lock = vmx.with_file_name(lock);
        match lock.extension() {
            Some(_) => fs::create_dir(&lock).unwrap(),
            None => fs::write(&lock, "").unwrap(),
        }
        if lock.is_dir() {
            fs::write(lock.join("M00001.lck"), "x").unwrap();
        }
        let refused = run("inspect", &sshd.url(&vmx), &options, &[])
            .expect(1)
            .stderr;
        assert!(
            refused.contains("locked by VMware") && refused.contains("hint: "),
            "{refused}"
        );
        // nginx does not show what begins with a dot.
        if lock.is_dir() {
            let refused = run("inspect", &nginx.url("ds/vm/vm.vmx"), &tls, &[]);
            assert!(refused.expect(1).stderr.contains("locked by VMware"));
        }
        let directory = vmx.parent().unwrap().parent().unwrap();
        let listed = run("inspect", &sshd.url(directory), &options, &[]);
        assert!(listed.code > 100, "{}", listed.stderr);
        let listed = listed.json();
        let machines = listed["machines"].as_array().unwrap();
        let vm = machines.iter().find(|vm| vm["name"] == "vm.vmx").unwrap();
        let said = vm["error"].as_str().unwrap();
        assert!(said.contains("locked by VMware"), "{said}");
        // Its disk is no other row.
        assert_eq!(machines.len(), 1, "{machines:#?}");
        if lock.is_dir() {
            fs::remove_dir_all(&lock).unwrap();
        } else {
            fs::remove_file(&lock).unwrap();
        }
    }
}
