//! The environment of libguestfs' appliance on this host, for every libguestfs program.
//!
//! The backend is `direct`. The libvirt one starts QEMU as another user, who may neither use
//! hyper2kvm's socket nor read its directory. If KVM does not work, the appliance is emulated. On
//! its own, libguestfs falls back only if `/dev/kvm` does not exist. It fails if that exists
//! without working (a container, a nested VM). Variables set in the environment take precedence.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use super::{Cmd, find};

const BACKEND: &str = "LIBGUESTFS_BACKEND";
const SETTINGS: &str = "LIBGUESTFS_BACKEND_SETTINGS";
/// The variable with the QEMU for libguestfs.
const QEMU: &str = "LIBGUESTFS_HV";
const LIMIT: Duration = Duration::from_secs(20);

/// The environment of a libguestfs program.
pub fn environment() -> Vec<(&'static str, OsString)> {
    let backend_set = std::env::var_os(BACKEND).is_some();
    chosen(backend_set, without_kvm())
}

/// The chosen settings; `kvm_fault` is the reason for emulating the appliance.
fn chosen(backend_set: bool, kvm_fault: Option<&str>) -> Vec<(&'static str, OsString)> {
    let backend = (!backend_set).then(|| (BACKEND, "direct".into()));
    let emulated = kvm_fault.map(|_| (SETTINGS, "force_tcg".into()));
    backend.into_iter().chain(emulated).collect()
}

/// Applies the environment to a command.
pub fn prepare(cmd: Cmd) -> Cmd {
    environment()
        .into_iter()
        .fold(cmd, |cmd, (name, value)| cmd.env(name, value))
}

/// The reason for emulating the appliance; `None` if it has KVM, or if the user has decided.
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
    let qemu = std::env::var_os(QEMU).map(PathBuf::from).or_else(|| {
        let qemu = ["qemu-system-x86_64", "/usr/libexec/qemu-kvm"];
        qemu.into_iter().find_map(find)
    });
    fault_of(Path::new("/dev/kvm"), qemu)
}

fn fault_of(device: &Path, qemu: Option<PathBuf>) -> Option<String> {
    let opened = std::fs::File::options().read(true).write(true).open(device);
    if let Err(error) = opened {
        return Some(format!("{}: {error}", device.display()));
    }
    let qemu = qemu?;
    // With the processor of the appliance: some hosts have a KVM that refuses only that.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A QEMU with this output and exit code.
    fn qemu(folder: &Path, says: &str, code: i32) -> Option<PathBuf> {
        let path = folder.join(format!("qemu-{code}"));
        let script = format!("#!/bin/sh\necho '{says}' >&2\nexit {code}\n");
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Some(path)
    }

    #[test]
    fn kvm_that_is_missing_or_does_not_work() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("kvm");
        let fault = fault_of(&device, None).unwrap();
        assert!(fault.contains("kvm: No such file"), "{fault}");
        std::fs::write(&device, "").unwrap();
        let works = qemu(dir.path(), "", 0);
        assert_eq!(fault_of(&device, works), None);
        let refuses = qemu(dir.path(), "failed to initialize kvm: Permission denied", 1);
        let fault = fault_of(&device, refuses).unwrap();
        assert!(fault.contains("KVM does not work here"), "{fault}");
        // Without a QEMU nothing is known: libguestfs reports what is missing.
        assert_eq!(fault_of(&device, None), None);
    }

    #[test]
    fn the_backend_is_direct_and_emulates_without_kvm() {
        let set = |backend_set, fault| {
            let set = chosen(backend_set, fault).into_iter();
            set.map(|(name, value)| format!("{name}={}", value.display()))
                .collect::<Vec<_>>()
        };
        let (direct, emulated) = (
            "LIBGUESTFS_BACKEND=direct",
            "LIBGUESTFS_BACKEND_SETTINGS=force_tcg",
        );
        assert_eq!(set(false, None), [direct]);
        assert_eq!(set(false, Some("no /dev/kvm")), [direct, emulated]);
        assert_eq!(set(true, Some("no /dev/kvm")), [emulated]);
        assert_eq!(set(true, None), [""; 0]);
    }
}
