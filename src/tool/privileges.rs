//! Gives up the privileges of root, so that a tool can do no more than its user.
//!
//! Root without capabilities still owns its files. It can no longer read and write files of others,
//! load modules, mount, trace, change owners, or reach devices and the kernel.
//!
//! A tool that opens a file by name may need a capability for exactly that. The image of a VM
//! belongs to the user of QEMU, or lies in somebody's home. So [`drop_all`] tries each file that
//! the arguments name. It keeps `CAP_DAC_OVERRIDE` only if one of them is out of reach without it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde_json::Value;

/// The privileges that a child keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Privileges {
    /// No capabilities, and no means to gain any.
    #[default]
    None,
    /// Only opening files of others, and no means to gain more. For a program that opens images
    /// which its arguments do not name.
    Files,
    /// Only files of others, their owners and labels, and no means to gain more: for `cp -p` and
    /// `chcon`.
    Owners,
    /// Those of this process, and no means to gain more: for this program again.
    Ours,
    /// Those of this process, and those that set-user-ID programs give: `sudo`, QEMU's bridge
    /// helper.
    Gain,
}

impl Privileges {
    const ALL: [Self; 5] = [
        Self::None,
        Self::Files,
        Self::Owners,
        Self::Ours,
        Self::Gain,
    ];

    /// The argument for the launcher.
    pub(super) fn arg(self) -> &'static str {
        match self {
            Self::None => "no-privileges",
            Self::Files => "files-of-others",
            Self::Owners => "owners-of-files",
            Self::Ours => "same-privileges",
            Self::Gain => "privileges",
        }
    }

    pub(super) fn of_arg(arg: &OsStr) -> Option<Self> {
        Self::ALL.into_iter().find(|p| arg == p.arg())
    }

    /// Applies this to this process, which is about to become a program with these arguments.
    pub(super) fn apply(self, args: &[OsString]) -> io::Result<()> {
        if self == Self::Gain {
            return Ok(());
        }
        rustix::thread::set_no_new_privs(true)?;
        match self {
            Self::Gain | Self::Ours => Ok(()),
            Self::Files => keep_only(CapabilitySet::DAC_OVERRIDE),
            Self::Owners => keep_only(
                CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER | CapabilitySet::CHOWN,
            ),
            Self::None => drop_for(args),
        }
    }
}

/// Gives up every capability in every set.
pub fn drop_all() -> io::Result<()> {
    keep_only(CapabilitySet::empty())
}

fn drop_for(args: &[OsString]) -> io::Result<()> {
    drop_unless(&|| named(args).iter().any(|file| !file.in_reach()))
}

/// Gives up every capability except the one that connecting to the socket requires. The socket of a
/// backup belongs to QEMU's user: libvirt gives it to that.
pub(super) fn drop_for_socket(socket: &Path) -> io::Result<()> {
    let flags = AtFlags::EACCESS;
    let able = || rustix::fs::accessat(CWD, socket, Access::WRITE_OK, flags);
    drop_unless(&|| matches!(able(), Err(Errno::ACCESS | Errno::PERM)))
}

/// Keeps `CAP_DAC_OVERRIDE` if something is out of reach without it, and nothing else.
fn drop_unless(out_of_reach: &dyn Fn() -> bool) -> io::Result<()> {
    let sets = rustix::thread::capabilities(None)?;
    if sets.permitted.contains(CapabilitySet::DAC_OVERRIDE) {
        // Not in effect but not yet given up: this shows what is out of reach.
        rustix::thread::set_capabilities(
            None,
            CapabilitySets {
                effective: CapabilitySet::empty(),
                ..sets
            },
        )?;
        let out_of_reach = out_of_reach();
        rustix::thread::set_capabilities(None, sets)?;
        if out_of_reach {
            return keep_only(CapabilitySet::DAC_OVERRIDE);
        }
    }
    drop_all()
}

fn keep_only(wanted: CapabilitySet) -> io::Result<()> {
    let sets = rustix::thread::capabilities(None)?;
    let kept = sets.permitted & wanted;
    for bit in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        if wanted.contains(one) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(one) {
            // Beyond those of this kernel.
            Err(Errno::INVAL) => break,
            // It may not be changed; without new privileges the permitted set is the limit.
            Ok(()) | Err(Errno::PERM) => {}
            Err(e) => return Err(e.into()),
        }
    }
    match rustix::thread::clear_ambient_capability_set() {
        // A kernel before 4.3 has no ambient set.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(e) => return Err(e.into()),
    }
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}

/// A file that a program will open by name.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Named {
    path: PathBuf,
    /// `None`: the argument does not show it.
    written: Option<bool>,
}

impl Named {
    /// The file and whether it may be written, or the directory in which it will be created.
    pub(super) fn in_or_below(self) -> (PathBuf, bool) {
        let written = self.written.unwrap_or(true);
        match self.path.parent() {
            Some(folder) if written && !self.path.exists() => (folder.into(), true),
            _ => (self.path, written),
        }
    }

    /// Whether it can be opened without capabilities, or created if it does not exist.
    fn in_reach(&self) -> bool {
        let access = if self.written == Some(true) {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        // NONBLOCK: opening must never wait, whatever the file is.
        let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        match rustix::fs::open(&self.path, flags, Mode::empty()) {
            Err(Errno::ACCESS | Errno::PERM) => false,
            Err(Errno::NOENT) => {
                let folder = self.path.parent().unwrap_or(Path::new("/"));
                let able = Access::WRITE_OK | Access::EXEC_OK;
                let able = rustix::fs::accessat(CWD, folder, able, AtFlags::EACCESS);
                // Without the directory, a capability does not help either.
                !matches!(able, Err(Errno::ACCESS | Errno::PERM))
            }
            _ => true,
        }
    }
}

/// The files in arguments: absolute paths, QEMU's `file:` and its JSON.
pub(super) fn named(args: &[OsString]) -> Vec<Named> {
    let mut files = Vec::new();
    for arg in args {
        let bytes = arg.as_bytes();
        let json = bytes.strip_prefix(b"json:").unwrap_or(bytes);
        let path = bytes.strip_prefix(b"file:").unwrap_or(bytes);
        if json.starts_with(b"{") {
            if let Ok(value) = serde_json::from_slice::<Value>(json) {
                of_json(&value, &mut files);
            }
        } else if path.starts_with(b"/") {
            files.push(Named {
                path: OsStr::from_bytes(path).into(),
                written: None,
            });
        }
    }
    files
}

fn of_json(value: &Value, files: &mut Vec<Named>) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(name)) = map.get("filename")
                && name.starts_with('/')
            {
                files.push(Named {
                    path: name.into(),
                    written: map
                        .get("read-only")
                        .and_then(Value::as_bool)
                        .map(|only| !only),
                });
            }
            map.values().for_each(|value| of_json(value, files));
        }
        Value::Array(list) => list.iter().for_each(|value| of_json(value, files)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, written: Option<bool>) -> Named {
        Named {
            path: path.into(),
            written,
        }
    }

    #[test]
    fn arguments_name_files() {
        let args = [
            "convert",
            "-O",
            "raw",
            "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"/a,b\",\"read-only\":true},\
             \"backing\":{\"file\":{\"filename\":\"/c\",\"read-only\":false}}}",
            "file:/out/d.raw",
            "/plain",
            "relative",
            "{not json",
        ];
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        assert_eq!(
            named(&args),
            [
                file("/a,b", Some(false)),
                file("/c", Some(true)),
                file("/out/d.raw", None),
                file("/plain", None),
            ]
        );
    }

    #[test]
    fn what_is_in_reach() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let named = |written| Named {
            path: path.clone(),
            written: Some(written),
        };
        assert!(named(true).in_reach());
        std::fs::write(&path, b"x").unwrap();
        assert!(named(true).in_reach() && named(false).in_reach());
        assert!(file("/no/such/folder/x", None).in_reach());
        if !rustix::process::geteuid().is_root() {
            assert!(!file("/etc/shadow", None).in_reach());
            assert!(!file("/etc/passwd", Some(true)).in_reach());
            assert!(!file("/etc/new", None).in_reach());
        }
    }

    #[test]
    fn arguments_of_the_launcher() {
        for privileges in Privileges::ALL {
            let arg = OsString::from(privileges.arg());
            assert_eq!(Privileges::of_arg(&arg), Some(privileges));
        }
        assert_eq!(Privileges::of_arg(OsStr::new("")), None);
    }
}
