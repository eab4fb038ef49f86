//! A system's libvirt, whose QEMU is another user: it gets through to disks that nobody else may read.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::libvirt::able;
use crate::support::{Lab, binary, finish, have, skip, virtio_win};
use hyper2kvm::demo::{Firmware, GuestSpec, WinVersion};

/// In namespaces of its own, so that the host's libvirt, if there is one, is left alone.
const SCRIPT: &str = r#"
mkdir -p /run/libvirt /var/lib/libvirt /etc/libvirt
for directory in /run/libvirt /var/lib/libvirt /etc/libvirt; do mount -t tmpfs none $folder; done
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
"$1" boot "$2" --connect qemu:///system --timeout 2
echo "boot ended with $?"
echo "domain is $($virsh domstate "$3")"
echo "user is $(ps -o user:32= -C qemu-system-x86_64,qemu-system-x86 | grep -m 1 libvirt-qemu)"
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
    command.arg(&out).arg(&name);
    let run = finish(command);
    // There is no Windows in it: it runs, and does not come up.
    for says in [
        "boot ended with 4",
        "domain is running",
        "user is libvirt-qemu",
    ] {
        assert!(run.stdout.contains(says), "{} {}", run.stdout, run.stderr);
    }
}
