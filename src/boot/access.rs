//! Checks whether the user of QEMU can reach a file. When the VM starts, libvirt gives that user
//! the file itself, but not the directories above it.
//!
//! Reads the permission bits. A directory with an access control list counts as accessible. Such
//! lists admit libvirt's users, and the VM's start shows it in any case.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

const CONFIG: &str = "/etc/libvirt/qemu.conf";
/// The usual names of the user in distributions, if the configuration has none.
const USUAL: [&str; 2] = ["libvirt-qemu", "qemu"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
}

/// The user of QEMU on a connection; `None` if it is root, or the user of this process.
pub fn qemu_user(uri: &str) -> Option<User> {
    if !uri.split('?').next().unwrap_or(uri).ends_with("/system") {
        return None;
    }
    // Usually only root can read it; for other users, the distribution's names are used.
    let config = fs::read_to_string(CONFIG).unwrap_or_default();
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    pick_user(&config, &passwd)
}

/// The required owner of sockets to which QEMU of that libvirt connects. Set if it is another user
/// and this process may change owners.
pub(crate) fn owner(uri: &str) -> Option<(u32, u32)> {
    let user = qemu_user(uri).filter(|_| rustix::process::geteuid().is_root());
    user.map(|user| (user.uid, user.gid))
}

fn pick_user(config: &str, passwd: &str) -> Option<User> {
    let asked = config.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        (key.trim() == "user").then(|| value.trim().trim_matches('"').to_owned())
    });
    let known = |wanted: &str| {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let uid: u32 = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            let id = wanted.strip_prefix('+').unwrap_or(wanted);
            (name == wanted || id.parse() == Ok(uid)).then(|| User {
                name: name.to_owned(),
                uid,
                gid,
            })
        })
    };
    let user = match asked {
        Some(name) => known(&name),
        None => USUAL.iter().find_map(|name| known(name)),
    };
    user.filter(|u| u.uid != 0)
}

/// The first directory above `path`, from the root, that the user may not enter.
pub fn closed_folder(path: &Path, user: &User) -> Option<PathBuf> {
    let mut folders: Vec<&Path> = path.ancestors().skip(1).collect();
    folders.reverse();
    folders
        .into_iter()
        .find(|folder| {
            // libvirt reports what is inaccessible here.
            let Ok(meta) = fs::metadata(folder) else {
                return false;
            };
            let bit = if meta.uid() == user.uid {
                0o100
            } else if meta.gid() == user.gid {
                0o010
            } else {
                0o001
            };
            meta.mode() & bit == 0 && !has_acl(folder)
        })
        .map(Path::to_path_buf)
}

fn has_acl(folder: &Path) -> bool {
    let mut buffer = [0u8; 1024];
    matches!(
        rustix::fs::getxattr(folder, "system.posix_acl_access", &mut buffer),
        Ok(1..) | Err(rustix::io::Errno::RANGE)
    )
}

/// Whether the user cannot read a file whose owner libvirt does not change. A source below an
/// overlay keeps its owner and mode.
pub fn closed(path: &Path, user: &User) -> bool {
    let real = path.canonicalize();
    let ways = [Some(path), real.as_deref().ok()];
    let mut ways = ways.into_iter().flatten();
    ways.any(|path| closed_folder(path, user).is_some()) || unreadable(path, user)
}

fn unreadable(path: &Path, user: &User) -> bool {
    let Ok(meta) = fs::metadata(path) else {
        return false;
    };
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let bit = if meta.uid() == user.uid {
        0o400
    } else if meta.gid() == user.gid || is_member(&groups, meta.gid(), &user.name) {
        0o040
    } else {
        0o004
    };
    meta.mode() & bit == 0 && !has_acl(path)
}

fn is_member(groups: &str, gid: u32, name: &str) -> bool {
    groups.lines().any(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [_, _, id, members] = fields[..] else {
            return false;
        };
        id.parse() == Ok(gid) && members.split(',').any(|member| member == name)
    })
}

/// Checks the files of a source like [`check`]; they keep their paths.
pub fn check_source(paths: &[PathBuf], user: Option<&User>) -> Result<()> {
    let Some(user) = user else {
        return Ok(());
    };
    for path in paths {
        let real = path.canonicalize().unwrap_or_else(|_| path.clone());
        let ways = [path, &real].into_iter();
        let folder = ways.into_iter().find_map(|path| closed_folder(path, user));
        let (why, command) = match folder {
            Some(folder) => (
                format!("it may not enter {}", folder.display()),
                format!(
                    "setfacl -m u:{}:x {}",
                    user.name,
                    crate::text::quote(&folder)
                ),
            ),
            None if unreadable(path, user) => (
                "it may not read the file".to_owned(),
                format!("setfacl -m u:{}:r {}", user.name, crate::text::quote(path)),
            ),
            None => continue,
        };
        return Err(Error::missing_tool(format!(
            "QEMU runs as {} and cannot read {}, which the disks are overlays on: {why}",
            user.name,
            path.display(),
        ))
        .hint(format!("let it in: {command}"))
        .hint("or copy what is left before the VM is started: hyper2kvm pull OUTDIR"));
    }
    Ok(())
}

/// Fails with an error that names the user, the path, and a remedy.
pub fn check(paths: &[PathBuf], user: Option<&User>) -> Result<()> {
    let Some(user) = user else {
        return Ok(());
    };
    for path in paths {
        if let Some(folder) = closed_folder(path, user) {
            return Err(Error::missing_tool(format!(
                "QEMU runs as {} and cannot get to {}: it may not enter {}",
                user.name,
                path.display(),
                folder.display()
            ))
            .hint(
                "boot --install-to /var/lib/libvirt/images (or --pool NAME) moves the disks there",
            )
            .hint(format!(
                "or let it in: setfacl -m u:{}:x {}",
                user.name,
                crate::text::quote(&folder)
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn users() {
        let passwd = "root:x:0:0::/root:/bin/sh\nqemu:x:107:107::/:/sbin/nologin\nme:x:1000:1001::/home/me:/bin/sh\n";
        for (config, want) in [
            ("", Some(("qemu", 107, 107))),
            ("#user = \"me\"\n", Some(("qemu", 107, 107))),
            ("user = \"me\"\ngroup = \"x\"\n", Some(("me", 1000, 1001))),
            ("user = \"+1000\"\n", Some(("me", 1000, 1001))),
            ("user=\"root\"\n", None),
            ("user = \"nobody-here\"\n", None),
        ] {
            let user = pick_user(config, passwd);
            let user = user.as_ref().map(|u| (u.name.as_str(), u.uid, u.gid));
            assert_eq!(user, want, "{config}");
        }
        assert_eq!(pick_user("", "root:x:0:0::/:/bin/sh\nbroken\n"), None);
        assert_eq!(qemu_user("qemu:///session"), None);
    }

    #[test]
    fn the_closed_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let (home, images) = (dir.path().join("home"), dir.path().join("home/images"));
        fs::create_dir_all(&images).unwrap();
        let disk = images.join("vm.qcow2");
        let user = User {
            name: "qemu".into(),
            uid: 54321,
            gid: 54321,
        };
        mode(dir.path(), 0o711);
        mode(&images, 0o755);
        for (bits, closed) in [(0o700, true), (0o710, true), (0o711, false), (0o755, false)] {
            mode(&home, bits);
            let want = closed.then(|| home.clone());
            assert_eq!(closed_folder(&disk, &user), want, "{bits:o}");
        }
        mode(&home, 0o700);
        let error = check(std::slice::from_ref(&disk), Some(&user)).unwrap_err();
        assert!(error.message.contains("may not enter"), "{error}");
        assert!(error.hints[0].contains("--install-to"));
        assert!(check(&[disk], None).is_ok());
    }

    #[test]
    fn a_source_must_be_readable_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let disk = dir.path().join("vm.vmdk");
        fs::write(&disk, "x").unwrap();
        let user = User {
            name: "qemu".into(),
            uid: 54321,
            gid: 54321,
        };
        let check = || check_source(std::slice::from_ref(&disk), Some(&user));
        for (bits, readable) in [(0o600, false), (0o640, false), (0o644, true), (0o604, true)] {
            fs::set_permissions(&disk, fs::Permissions::from_mode(bits)).unwrap();
            assert_eq!(closed(&disk, &user), !readable, "{bits:o}");
            assert_eq!(check().is_ok(), readable, "{bits:o}");
        }
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o640)).unwrap();
        let error = check().unwrap_err();
        assert!(error.message.contains("may not read"), "{error}");
        assert!(error.hints[0].contains("setfacl -m u:qemu:r "), "{error:?}");
        // Through a link into a closed directory.
        let home = dir.path().join("home");
        fs::create_dir(&home).unwrap();
        fs::rename(&disk, home.join("vm.vmdk")).unwrap();
        std::os::unix::fs::symlink(home.join("vm.vmdk"), &disk).unwrap();
        fs::set_permissions(home.join("vm.vmdk"), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(check().is_ok());
        fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
        assert!(closed(&disk, &user));
        assert!(check().unwrap_err().message.contains("may not enter"));
        assert!(is_member("a:x:1:b\nkvm:x:9:me,qemu\n", 9, "qemu"));
        assert!(!is_member("kvm:x:9:me,qemu2\nbroken\n", 9, "qemu"));
    }
}
