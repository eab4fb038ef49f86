//! A system's libvirt, whose QEMU runs as another user: it can reach disks that nobody else may
//! read.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use hyper2kvm::demo::{Firmware, GuestSpec, WinVersion};

use crate::convert;
use crate::libvirt::able;
use crate::payload::{End, boot_code, guest, link_over};
use crate::support::later::{Untouched, same_guest};
use crate::support::wire::Sshd;
use crate::support::{Lab, binary, finish, have, skip, virtio_win};

/// In separate namespaces, so that the host's libvirt, if there is one, is not affected.
const SCRIPT: &str = r#"
mkdir -p /run/libvirt /var/lib/libvirt /etc/libvirt
for directory in /run/libvirt /var/lib/libvirt /etc/libvirt; do mount -t tmpfs none "$directory" || exit 98; done
mkdir /var/lib/libvirt/qemu
chown libvirt-qemu /var/lib/libvirt/qemu
cat >/etc/libvirt/qemu.conf <<'END'
user = "libvirt-qemu"
group = "kvm"
cgroup_controllers = []
security_driver = "none"
namespaces = []
stdio_handler = "file"
END
libvirtd -d -p /run/libvirt/test.pid || exit 99
virsh="virsh -q -c qemu:///system"
ready() { for _ in $(seq 100); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done; return 1; }
ready $virsh list
"$1" boot "$2" --connect qemu:///system --timeout "$4"
echo "boot ended with $?"
if [ -n "$5" ]; then
  qemu-io -f qcow2 -c "write -q -s $6 0 440" "$5"
  $virsh start "$3"
fi
echo "domain is $($virsh domstate "$3")"
echo "user is $(ps -o user:32= -C qemu-system-x86_64,qemu-system-x86 | grep -m 1 libvirt-qemu)"
if [ -n "$5" ]; then
  "$1" pull "$2" --json
  echo "pull ended with $?"
fi
$virsh destroy "$3"
kill "$(cat /run/libvirt/test.pid)"
"#;

#[test]
fn qemus_user_reads_the_disks_of_a_closed_folder() {
    if !able() || !have(&["unshare", "ps"]) {
        return;
    }
    if !fs::read_to_string("/etc/passwd").is_ok_and(|users| users.contains("libvirt-qemu:")) {
        return skip("libvirt-qemu", "no user libvirt-qemu");
    }
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 512 << 20;
    spec.recovery = false;
    spec.firmware = Firmware::Bios;
    let lab = Lab::new(spec);
    fs::set_permissions(lab.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let name = format!("closed-{}", std::process::id());
    let more = ["--domain-type", "qemu", "--user-network", "--name", &name];
    assert!(virtio_win().is_dir());
    lab.convert(&lab.raw, &more).expect(0);
    let out = lab.path("out");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&out), 0o711);
    assert_eq!(mode(&out.join(format!("{name}.qcow2"))), 0o600);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", SCRIPT, "sh", binary()]);
    command.arg(&out).args([&name, "2", "", ""]);
    let run = finish(command);
    // Without Windows in it, it runs and does not come up.
    for says in [
        "boot ended with 4",
        "domain is running",
        "user is libvirt-qemu",
    ] {
        assert!(run.stdout.contains(says), "{} {}", run.stdout, run.stderr);
    }
}

/// libvirt changes the owner of the overlay; the server of the source gives the sockets to QEMU's
/// user.
#[test]
fn qemus_user_reads_what_root_serves() {
    if !able() || !have(&["unshare", "ps"]) || !have(&Sshd::TOOLS) {
        return;
    }
    if !fs::read_to_string("/etc/passwd").is_ok_and(|users| users.contains("libvirt-qemu:")) {
        return skip("libvirt-qemu", "no user libvirt-qemu");
    }
    let (lab, ssh) = (guest(Firmware::Bios), Sshd::start());
    fs::set_permissions(lab.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let delta = link_over(&lab);
    let untouched = Untouched::of(&[&lab.raw, &delta]);
    let (_, plain) = convert(&lab, &delta, "plain", &[]);
    let options = ssh.options();
    let hangs = lab.path("hangs.bin");
    fs::write(&hangs, boot_code("here", false, End::Hang)).unwrap();
    // A chain, which a storage daemon joins, and one file.
    for (source, kind) in [(&delta, "whole"), (&lab.raw, "file")] {
        let name = format!("{kind}-{}", std::process::id());
        let mut more = vec!["--copy", "later", "--older-link"];
        more.extend(options.iter().map(String::as_str));
        let (out, report) = convert(&lab, ssh.url(source).as_ref(), &name, &more);
        let disk = report["outputs"]["disks"][0].as_str().unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", SCRIPT, "sh", binary()]);
        command.arg(&out).args([&name, "60", disk]).arg(&hangs);
        let run = finish(command);
        for says in [
            "boot ended with 0",
            "domain is running",
            "user is libvirt-qemu",
            "\"by\": \"libvirt\"",
            "pull ended with 0",
        ] {
            assert!(run.stdout.contains(says), "{} {}", run.stdout, run.stderr);
        }
        let plain = plain["outputs"]["disks"][0].as_str().unwrap();
        same_guest(plain.as_ref(), disk.as_ref());
        untouched.check();
    }
}
