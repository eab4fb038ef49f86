//! How libguestfs starts its appliance on this host, for every program of its that is run.
//!
//! The backend is `direct`, because the libvirt one starts QEMU as another user, who may not use our
//! socket nor read our folder. Where KVM does not work the appliance is emulated: libguestfs itself only
//! falls back when `/dev/kvm` is not there, and gives up where it is there and fails (a container, a nested
//! machine). What is set in the environment stays.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use super::{Cmd, find};

const BACKEND: &str = "LIBGUESTFS_BACKEND";
const SETTINGS: &str = "LIBGUESTFS_BACKEND_SETTINGS";
/// The QEMU that libguestfs is told to take.
const QEMU: &str = "LIBGUESTFS_HV";
const LIMIT: Duration = Duration::from_secs(20);

/// The environment of a libguestfs program.
pub fn environment() -> Vec<(&'static str, OsString)> {
    let mut set = Vec::new();
    if std::env::var_os(BACKEND).is_none() {
        set.push((BACKEND, "direct".into()));
    }
    if without_kvm().is_some() {
        set.push((SETTINGS, "force_tcg".into()));
    }
    set
}

/// The same on a command.
pub fn prepare(cmd: Cmd) -> Cmd {
    environment()
        .into_iter()
        .fold(cmd, |cmd, (name, value)| cmd.env(name, value))
}

/// Why the appliance is emulated; `None` where it has KVM, or where the user has decided.
pub fn without_kvm() -> Option<&'static str> {
    static REASON: OnceLock<Option<String>> = OnceLock::new();
    let decided = std::env::var_os(SETTINGS).is_some()
        || std::env::var_os(BACKEND).is_some_and(|backend| backend != "direct");
    if decided {
        return None;
    }
    REASON.get_or_init(kvm_fault).as_deref()
}

fn kvm_fault() -> Option<String> {
    let opened = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(error) = opened {
        return Some(format!("/dev/kvm: {error}"));
    }
    let qemu = std::env::var_os(QEMU).map(PathBuf::from).or_else(|| {
        let qemu = ["qemu-system-x86_64", "/usr/libexec/qemu-kvm"];
        qemu.into_iter().find_map(find)
    })?;
    // With the processor of the appliance: some hosts have a KVM that only refuses that.
    let quit = || -> io::Result<io::PipeReader> {
        let (reader, mut writer) = io::pipe()?;
        writer.write_all(b"quit\n")?;
        Ok(reader)
    };
    let tried = Cmd::new(qemu)
        .args(["-machine", "pc", "-accel", "kvm", "-cpu", "max", "-m", "64"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-S"])
        .args(["-monitor", "stdio"])
        .stdin(quit().ok()?)
        .timeout(LIMIT)
        .run();
    match tried {
        Ok(_) => None,
        Err(error) => {
            let text = error.to_string();
            Some(format!(
                "KVM does not work here ({})",
                text.lines().next().unwrap_or_default()
            ))
        }
    }
}
