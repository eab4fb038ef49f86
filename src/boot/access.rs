//! Can the user QEMU runs as get to a file? libvirt gives the file itself to that user when the machine
//! starts, but not the folders above it.
//!
//! Read from the permission bits. A folder with an access control list is taken for open: libvirt's
//! users are let in that way, and the machine's start tells in any case.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

const CONFIG: &str = "/etc/libvirt/qemu.conf";
/// What distributions call the user, when the configuration does not name one.
const USUAL: [&str; 2] = ["libvirt-qemu", "qemu"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
}

/// The user QEMU has on a connection; `None` where it is root, or this very user.
pub fn qemu_user(uri: &str) -> Option<User> {
    if !uri.split('?').next().unwrap_or(uri).ends_with("/system") {
        return None;
    }
    // Only root can read it as a rule; others get what distributions do.
    let config = fs::read_to_string(CONFIG).unwrap_or_default();
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    pick_user(&config, &passwd)
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

/// The first folder above `path`, from the root, that the user may not enter.
pub fn closed_folder(path: &Path, user: &User) -> Option<PathBuf> {
    let mut folders: Vec<&Path> = path.ancestors().skip(1).collect();
    folders.reverse();
    folders
        .into_iter()
        .find(|folder| {
            // What cannot be looked at is for libvirt to say.
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

/// An error that says who cannot get where, and what helps.
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
                super::quote(&folder)
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
}
