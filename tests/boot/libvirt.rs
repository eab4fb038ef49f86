//! A private libvirt for the tests.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::{Run, TOOLS, binary, finish, have, tool};

const NOBODY: &str = "65534";

/// The session daemon of an ordinary user, started by the first connection.
pub struct Libvirt {
    pub dir: tempfile::TempDir,
}

impl Libvirt {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("run")).unwrap();
        let libvirt = Self { dir };
        libvirt.give(libvirt.dir.path());
        libvirt
    }

    pub fn give(&self, path: &Path) {
        let owner = format!("{NOBODY}:{NOBODY}");
        tool("chown", &["-R", &owner, path.to_str().unwrap()]);
    }

    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={NOBODY}"))
            .arg(format!("--regid={NOBODY}"))
            .args(["--clear-groups"])
            .arg(program)
            .current_dir("/")
            .env("LC_ALL", "C")
            .env("HOME", self.dir.path())
            .env("LIBVIRT_DEFAULT_URI", "qemu:///session");
        for (name, folder) in [
            ("XDG_RUNTIME_DIR", "run"),
            ("XDG_CONFIG_HOME", "config"),
            ("XDG_CACHE_HOME", "cache"),
            ("XDG_DATA_HOME", "data"),
        ] {
            command.env(name, self.dir.path().join(folder));
        }
        command
    }

    pub fn virsh(&self, args: &[&str]) -> Run {
        let mut command = self.command(Path::new("virsh"));
        command.arg("-q").args(args);
        finish(command)
    }

    pub fn boot(&self, out: &Path, more: &[&str]) -> Run {
        let mut command = self.command(Path::new(binary()));
        command.arg("boot").arg(out).args(["--json"]).args(more);
        finish(command)
    }

    pub fn state(&self, name: &str) -> String {
        self.virsh(&["domstate", name])
            .expect(0)
            .stdout
            .trim()
            .into()
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        let running = self.virsh(&["list", "--uuid"]).stdout;
        for uuid in running.lines().filter(|l| !l.trim().is_empty()) {
            self.virsh(&["destroy", uuid.trim()]);
        }
        for daemon in ["libvirtd", "virtlogd"] {
            let file = self.dir.path().join(format!("run/libvirt/{daemon}.pid"));
            if let Ok(pid) = fs::read_to_string(file) {
                let _ = Command::new("kill").arg(pid.trim()).status();
            }
        }
    }
}

pub fn able() -> bool {
    have(&TOOLS)
        && have(&[
            "virsh",
            "libvirtd",
            "virtlogd",
            "virt-xml-validate",
            "qemu-system-x86_64",
        ])
        && have(&["setpriv", "mcopy", "qemu-io", "tar"])
        && rustix::process::geteuid().is_root()
}
