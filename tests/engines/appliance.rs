//! Appliances that do not start, by a guestfish with the known output of the real one; and
//! leftovers of a real one after a kill.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hyper2kvm::demo::{GuestSpec, WinVersion};

use crate::support::{self, Lab, Run, TOOLS, have, processes_naming, virtio_win};

const NO_APPLIANCE: &str = "libguestfs: error: /usr/bin/supermin exited with error status 1.
To see full error messages you may need to enable debugging.";
const NO_QEMU: &str = "libguestfs: error: guestfs_launch failed.
This usually means the libguestfs appliance failed to start or crashed.";

struct Case {
    what: &'static str,
    /// Printed by a verbose start only.
    log: &'static str,
    /// Printed by every start.
    error: &'static str,
    reason: &'static str,
    hint: &'static str,
}

const CASES: [Case; 7] = [
    Case {
        what: "Ubuntu keeps its kernels from users",
        log: "supermin: kernel: looking for kernels in /boot/vmlinuz-* ...
cp: cannot open '/boot/vmlinuz-6.8.0-45-generic' for reading: Permission denied
supermin: cp -p '/boot/vmlinuz-6.8.0-45-generic' '/var/tmp/.guestfs-1000/appliance.d.x/kernel': command failed, see earlier errors",
        error: NO_APPLIANCE,
        reason: "kernel of this host cannot be read",
        hint: "sudo chmod 0644 /boot/vmlinuz-*",
    },
    Case {
        what: "no kernel",
        log: "supermin: failed to find a suitable kernel (host_cpu=x86_64).

I looked for kernels in /boot and modules in /lib/modules.",
        error: NO_APPLIANCE,
        reason: "no kernel in /boot",
        hint: "SUPERMIN_KERNEL",
    },
    Case {
        what: "supermin fails; files it may not read and need not are no reason",
        log: "supermin: kernel: picked vmlinuz /lib/modules/6.8.4/vmlinuz
supermin: warning: /usr/bin/augenrules: Permission denied (ignored)
supermin: ext2fs_write_inode_full: Ext2 inode is not a directory",
        error: NO_APPLIANCE,
        reason: "supermin could not build the appliance",
        hint: "libguestfs-test-tool",
    },
    Case {
        what: "no KVM",
        log: "Could not access KVM kernel module: No such file or directory
qemu-system-x86_64: failed to initialize kvm: No such file or directory",
        error: NO_QEMU,
        reason: "/dev/kvm cannot be used",
        hint: "LIBGUESTFS_BACKEND_SETTINGS=force_tcg",
    },
    Case {
        what: "modules that supermin cannot unpack",
        log: "supermin: internal insmod virtio_snd.ko.zst
insmod: init_module: virtio_snd.ko.zst: Invalid module format
supermin: waiting another 1024000000 ns for root UUID to appear
This usually means your kernel doesn't support virtio, or supermin was unable
to load some kernel modules (see module loading messages above).",
        error: NO_QEMU,
        reason: "kernel of this host does not work in the appliance",
        hint: "SUPERMIN_KERNEL",
    },
    Case {
        what: "no space",
        log: "supermin: ext2: populating from base image
supermin: error writing /var/tmp/.guestfs-0/appliance.d.x/root: No space left on device",
        error: NO_APPLIANCE,
        reason: "no space left",
        hint: "LIBGUESTFS_CACHEDIR",
    },
    Case {
        what: "something new",
        log: "qemu-system-x86_64: something new",
        error: NO_QEMU,
        reason: "guestfs_launch failed",
        hint: "the log is in",
    },
];

/// A directory with a `guestfish` that answers `run` with `body`, a piece of shell.
fn fake(lab: &Lab, body: &str) -> PathBuf {
    let folder = lab.path("bin");
    fs::create_dir_all(&folder).unwrap();
    let script = format!(
        "#!/bin/sh
verbose=
while read -r line; do
  case $line in
    '-echo '*) echo \"${{line#-echo }}\" ;;
    '-set-verbose \"true\"') verbose=1 ;;
    -list-devices) [ -e '{folder}/up' ] && echo /dev/sda ;;
    '-feature-available '*) echo false ;;
    -run) {body} ;;
  esac
done
",
        folder = folder.display()
    );
    let path = folder.join("guestfish");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

fn command(lab: &Lab, bin: Option<&Path>) -> Command {
    let temporary = lab.path("tmp");
    fs::create_dir_all(&temporary).unwrap();
    let mut command = Command::new(support::binary());
    command
        .args(["convert", lab.raw.to_str().unwrap(), "--json", "-o"])
        .arg(lab.path("out"))
        .arg("--virtio-iso")
        .arg(virtio_win())
        .args(["--engine", "guestfish"])
        .env("TMPDIR", &temporary)
        // Otherwise the appliance is built again.
        .env("LIBGUESTFS_CACHEDIR", "/var/tmp");
    if let Some(bin) = bin {
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{path}", bin.display()));
    }
    command
}

fn small() -> Lab {
    Lab::new(GuestSpec {
        disk_size: 512 << 20,
        ..GuestSpec::new(WinVersion::Win7)
    })
}

fn error_of(run: Run, code: i32) -> (String, String) {
    let error = run.expect(code).json()["error"].clone();
    (
        error["message"].as_str().unwrap().to_string(),
        error["hints"].to_string(),
    )
}

#[test]
fn reasons_why_it_does_not_start() {
    if !have(&TOOLS) {
        return;
    }
    let lab = small();
    for case in CASES {
        eprintln!("{}", case.what);
        fs::write(lab.path("log"), case.log).unwrap();
        fs::write(lab.path("error"), case.error).unwrap();
        let (log, error) = (lab.path("log"), lab.path("error"));
        let body = format!(
            "[ -n \"$verbose\" ] && cat '{}' && echo; cat '{}' >&2; echo >&2",
            log.display(),
            error.display()
        );
        let bin = fake(&lab, &body);
        let (message, hints) = error_of(support::finish(command(&lab, Some(&bin))), 5);
        assert!(message.contains(case.reason), "{message}");
        assert!(hints.contains(case.hint), "{hints}");
        assert!(hints.contains("--engine embedded"), "{hints}");
        // The whole log is kept where the hint says.
        let kept: Vec<_> = fs::read_dir(lab.path("tmp")).unwrap().flatten().collect();
        assert_eq!(kept.len(), 1, "{kept:?}");
        let text = fs::read_to_string(kept[0].path()).unwrap();
        assert!(hints.contains(kept[0].path().to_str().unwrap()), "{hints}");
        assert!(
            text.contains(case.log) && text.contains(case.error),
            "{text}"
        );
        fs::remove_file(kept[0].path()).unwrap();
        assert!(!lab.path("out").exists());
    }
}

/// A host whose KVM does not work, by a QEMU that reports that: the appliance is emulated, with a
/// message.
#[test]
fn without_kvm_the_appliance_is_emulated() {
    if !have(&TOOLS) {
        return;
    }
    let lab = small();
    let seen = lab.path("environment");
    let bin = fake(&lab, &format!("env > '{}'", seen.display()));
    let qemu = bin.join("no-kvm");
    fs::write(
        &qemu,
        "#!/bin/sh\necho 'failed to initialize kvm' >&2\nexit 1\n",
    )
    .unwrap();
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
    for (backend, settings, expected, said) in [
        (None, None, ["direct", "force_tcg"], true),
        // Settings of the user take precedence.
        (None, Some("gdb"), ["direct", "gdb"], false),
        (Some("libvirt"), None, ["libvirt", ""], false),
    ] {
        let mut command = command(&lab, Some(&bin));
        command.env("LIBGUESTFS_HV", &qemu);
        for (name, value) in [
            ("LIBGUESTFS_BACKEND", backend),
            ("LIBGUESTFS_BACKEND_SETTINGS", settings),
        ] {
            command.env_remove(name);
            command.envs(value.map(|value| (name, value)));
        }
        let run = support::finish(command);
        let text = fs::read_to_string(&seen).unwrap();
        let value = |name: &str| {
            let line = text
                .lines()
                .find_map(|l| l.strip_prefix(&format!("{name}=")));
            line.unwrap_or_default().to_string()
        };
        assert_eq!(
            [
                value("LIBGUESTFS_BACKEND"),
                value("LIBGUESTFS_BACKEND_SETTINGS")
            ],
            expected
        );
        let told = run.stderr.contains("emulated, which takes longer");
        assert_eq!(told, said, "{}", run.stderr);
        fs::remove_file(&seen).unwrap();
    }
}

#[test]
fn an_appliance_without_ntfs() {
    if !have(&TOOLS) {
        return;
    }
    let lab = small();
    let bin = fake(&lab, ":");
    fs::write(bin.join("up"), "").unwrap();
    let (message, hints) = error_of(support::finish(command(&lab, Some(&bin))), 5);
    assert!(
        message.contains("NTFS in the libguestfs appliance"),
        "{message}"
    );
    assert!(hints.contains("libguestfs-winsupport"), "{hints}");
}

#[test]
fn a_start_has_a_time_limit() {
    if !have(&TOOLS) {
        return;
    }
    let lab = small();
    let bin = fake(&lab, "echo starting; sleep 600");
    let mut command = command(&lab, Some(&bin));
    command.args(["--progress", "json"]);
    command.env("HYPER2KVM_APPLIANCE_LIMIT", "3");
    let start = Instant::now();
    let run = support::finish(command);
    assert!(start.elapsed() < Duration::from_secs(60));
    // While it lasts, it is seen to last.
    assert!(
        run.stderr.contains("\"step\":\"Starting\",\"seconds\":1"),
        "{}",
        run.stderr
    );
    let (message, hints) = error_of(run, 5);
    assert!(message.contains("not finish within 3"), "{message}");
    assert!(hints.contains("HYPER2KVM_APPLIANCE_LIMIT"), "{hints}");
    assert_eq!(processes_naming(lab.dir.path()), Vec::<String>::new());
}

/// Stopped and continued (^Z, fg) with its guestfish: only time in which both could work counts.
#[test]
fn time_stopped_does_not_count() {
    if !have(&TOOLS) {
        return;
    }
    let lab = small();
    let bin = fake(&lab, "for i in 1 2 3; do sleep 0.4; done");
    let child = command(&lab, Some(&bin))
        .env("HYPER2KVM_APPLIANCE_LIMIT", "3")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let started = || !processes_naming(&bin).is_empty();
    assert!(within(60, started), "no guestfish was started");
    let group = format!("-{}", child.id());
    for (signal, seconds) in [("-STOP", 4), ("-CONT", 0)] {
        support::tool("kill", &[signal, "--", &group]);
        std::thread::sleep(Duration::from_secs(seconds));
    }
    let out = child.wait_with_output().unwrap();
    // It came to the end of its start, and then there was no disk.
    let error = String::from_utf8(out.stdout).unwrap();
    assert!(error.contains("does not see the disk"), "{error}");
}

/// The real one: its QEMU names the test's socket, and ends when the run is killed during its
/// start.
#[test]
fn a_kill_ends_the_appliance() {
    if !have(&TOOLS) || !have(&["guestfish"]) {
        return;
    }
    let lab = small();
    let mut child = command(&lab, None)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let temporary = lab.path("tmp");
    let socket = temporary.to_str().unwrap();
    let qemu = || {
        let mut all = processes_naming(Path::new(socket)).into_iter();
        all.any(|line| line.contains("qemu-system") || line.contains("qemu-kvm"))
    };
    assert!(within(300, qemu), "no appliance was started");
    child.kill().unwrap();
    child.wait().unwrap();
    let gone = || processes_naming(lab.dir.path()).is_empty();
    assert!(within(60, gone), "{:?}", processes_naming(lab.dir.path()));
}

fn within(seconds: u64, done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(seconds) {
        if done() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    false
}
