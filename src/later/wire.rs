//! A level of a disk on another host: its facts, its access options, and the socket that `serve`
//! provides for QEMU.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::disk::ImageError;
use crate::disk::hold::Held;
use crate::disk::remote::Doubt;
use crate::error::{Error, Result};
use crate::source::mirror;
use crate::wire::{Access, Location, WireError};

/// The extension of a source's sockets.
pub(crate) const SOCKET: &str = "sock";
/// The longest path of a Unix socket (`sun_path` of Linux, with its terminator).
const MAX_SOCKET: usize = 107;
/// The time for which a read waits for a broken connection if no VM waits for it. Less than this
/// program's limit for the child that connects (`disk::remote`).
pub(super) const LONG: Duration = Duration::from_secs(75);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OnWire {
    /// The URL, or the user's name for the source of a command. It contains no password.
    pub(crate) url: String,
    pub(crate) size_bytes: u64,
    /// Milliseconds since 1970; 0 if the protocol does not provide the time.
    pub(crate) modified_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) etag: Option<String>,
    pub(crate) headers_sha256: String,
    /// The options of the conversion. A password is named by its file.
    pub(crate) access: Access,
    /// All files of the disk, unless it is this file alone and QEMU reads it unchanged. Without
    /// that, the fields above are those of the named file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) whole: Option<Whole>,
    /// The socket for QEMU, beside the overlay.
    #[serde(skip)]
    pub(crate) socket: PathBuf,
    /// The format of its level.
    #[serde(skip)]
    pub(crate) format: String,
}

impl OnWire {
    /// Describes a file that this run reads over the wire.
    pub(crate) fn of(held: &Held) -> Result<Self, String> {
        let remote = held.origin().ok_or("is not on another host")?;
        let mut access = mirror::access(held.path()).ok_or("is not on another host")?;
        absolute(&mut access).map_err(|e| format!("cannot be noted: {e}"))?;
        let file = remote.file();
        Ok(Self {
            url: file.shown(),
            size_bytes: file.size(),
            modified_ms: file.modified_ms(),
            etag: file.etag(),
            headers_sha256: held
                .headers_sha256()
                .map_err(|e| format!("cannot be read: {e}"))?,
            access,
            whole: None,
            socket: PathBuf::new(),
            format: String::new(),
        })
    }

    /// Every file that must not change.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Self> {
        let more = self.whole.iter().flat_map(|whole| &whole.more);
        std::iter::once(self).chain(more)
    }

    pub(crate) fn location(&self) -> Result<Location, WireError> {
        if self.access.source_command.is_some() {
            return Ok(Location::command(&self.url));
        }
        let hint = "convert again into another directory; the source is untouched";
        Location::parse(&self.url)?
            .ok_or_else(|| WireError::usage(format!("{} is no URL of a source", self.url), hint))
    }

    /// Its name in the overlay. QEMU decodes the query of a URL before it parses it, so a path that
    /// needs encoding is written as JSON.
    pub(crate) fn backing_name(&self) -> String {
        let path = self.socket.to_string_lossy();
        let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
        if path.chars().all(plain) {
            return Location::of_socket(&self.socket).to_string();
        }
        let server = json!({"type": "unix", "path": path});
        let file = json!({"driver": "nbd", "server": server, "export": ""});
        format!("json:{}", json!({"driver": self.format, "file": file}))
    }

    /// The placeholder of the file, over a connection of this run. A read waits for `patience` if
    /// the connection is broken.
    pub(super) fn open(&self, patience: Duration) -> Result<PathBuf, WireError> {
        let access = Access {
            patience,
            ..self.access.clone()
        };
        mirror::open(&self.location()?, &access)
    }

    /// The first difference in this one file now, if there is one.
    pub(super) fn changed(&self) -> Result<Option<String>> {
        let path = match self.open(LONG) {
            Ok(path) => path,
            Err(error) if error.is_not_found() => return Ok(Some("it is gone".to_owned())),
            Err(error) => return Err(error.into()),
        };
        let opened = Held::open(&path).and_then(|held| {
            held.refuse_if_vmware_has_it()?;
            Ok(held)
        });
        let held = match opened {
            Ok(held) => held,
            Err(error @ ImageError::VmwareLock { .. }) => return Ok(Some(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        if held.remote().is_none() {
            return Ok(Some("it is no disk any more".to_owned()));
        }
        self.differs(&held)
    }

    /// The first difference in a newly opened file.
    pub(super) fn differs(&self, held: &Held) -> Result<Option<String>> {
        let Some(remote) = held.origin() else {
            return Ok(Some("it is no file of that host any more".to_owned()));
        };
        let file = remote.file();
        // Since this run first examined it.
        match file.check_unchanged() {
            Ok(()) => {}
            Err(Doubt::Changed(what)) => return Ok(Some(what)),
            Err(doubt @ Doubt::Unreachable(_)) => {
                let error = Error::failed(format!("{}: {doubt}", self.url));
                return Err(error.hint("see that the line and the server are up, and start again"));
            }
        }
        let now = Looks {
            size: file.size(),
            modified_ms: file.modified_ms(),
            etag: file.etag(),
        };
        if let Some(what) = self.difference(&now) {
            return Ok(Some(what));
        }
        let headers = held
            .headers_sha256()
            .map_err(|e| Error::failed(format!("reading {}", self.url)).because(e))?;
        Ok((headers != self.headers_sha256).then(|| "its header was overwritten".to_owned()))
    }

    pub(crate) fn difference(&self, now: &Looks) -> Option<String> {
        if self.size_bytes != now.size {
            return Some(format!(
                "it was {} bytes long and is {} bytes now",
                self.size_bytes, now.size
            ));
        }
        if self.modified_ms != now.modified_ms {
            let later = i128::from(now.modified_ms) - i128::from(self.modified_ms);
            return Some(format!(
                "it was written to, {} s after the time it had",
                later / 1000
            ));
        }
        (self.etag != now.etag).then(|| {
            let shown = |etag: &Option<String>| etag.clone().unwrap_or_else(|| "none".to_owned());
            format!(
                "its ETag was {} and is {} now",
                shown(&self.etag),
                shown(&now.etag)
            )
        })
    }
}

/// The further files of a disk besides the named one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Whole {
    /// The format of the named file.
    pub(crate) format: String,
    pub(crate) size_bytes: u64,
    /// Every other file: links, extents, data files.
    pub(crate) more: Vec<OnWire>,
}

/// The facts about a file that the other side provides without reading it.
pub(crate) struct Looks {
    pub(crate) size: u64,
    pub(crate) modified_ms: u64,
    pub(crate) etag: Option<String>,
}

/// Makes paths absolute, because a later run has another working directory.
fn absolute(access: &mut Access) -> io::Result<()> {
    for file in [
        &mut access.password_file,
        &mut access.ssh_identity,
        &mut access.ssh_known_hosts,
        &mut access.tls_ca,
    ] {
        match file {
            // It was read, and is not kept.
            Some(path) if path.as_os_str() == "-" => *file = None,
            Some(path) => *path = std::path::absolute(&*path)?,
            None => {}
        }
    }
    Ok(())
}

/// The reason why the socket path beside that overlay is too long.
pub(crate) fn too_long(overlay: &Path) -> Option<String> {
    let length = overlay.with_extension(SOCKET).as_os_str().len();
    (length > MAX_SOCKET).then(|| {
        format!(
            "the socket beside {} would have a name of {length} bytes, and at most {MAX_SOCKET} can be used",
            overlay.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire() -> OnWire {
        OnWire {
            url: "ssh://h/a%20b.raw".into(),
            size_bytes: 4096,
            modified_ms: 5_000,
            etag: Some("\"x\"".into()),
            headers_sha256: "00".into(),
            access: Access::default(),
            whole: None,
            socket: "/vm/a_b-1.sock".into(),
            format: "raw".into(),
        }
    }

    #[test]
    fn the_overlay_names_its_socket_so_that_qemu_finds_it() {
        let wire = wire();
        let name = wire.backing_name();
        assert_eq!(name, "nbd+unix:///?socket=/vm/a_b-1.sock");
        assert_eq!(wire.location().unwrap().to_string(), wire.url);
        let mut named = wire.clone();
        named.socket = "/vm dir/a&b%20.sock".into();
        let name = named.backing_name();
        let node: serde_json::Value =
            serde_json::from_str(name.strip_prefix("json:").unwrap()).unwrap();
        assert_eq!(node["file"]["server"]["path"], "/vm dir/a&b%20.sock");
        named.url = "a disk".into();
        named.access.source_command = Some("nbdkit -s null".into());
        assert_eq!(named.location().unwrap(), Location::command("a disk"));
    }

    #[test]
    fn a_change_is_told_with_both_sides() {
        let looks = |size, modified_ms, etag: Option<&str>| Looks {
            size,
            modified_ms,
            etag: etag.map(str::to_owned),
        };
        for (now, want) in [
            (looks(4096, 5_000, Some("\"x\"")), None),
            (
                looks(512, 5_000, Some("\"x\"")),
                Some("4096 bytes long and is 512"),
            ),
            (looks(4096, 9_000, Some("\"x\"")), Some("4 s after")),
            (looks(4096, 1_000, Some("\"x\"")), Some("-4 s after")),
            (
                looks(4096, 5_000, Some("\"y\"")),
                Some("was \"x\" and is \"y\""),
            ),
            (looks(4096, 5_000, None), Some("is none now")),
        ] {
            let found = wire().difference(&now);
            match (&found, want) {
                (None, None) => {}
                (Some(found), Some(want)) => assert!(found.contains(want), "{found}"),
                _ => panic!("{found:?}, and not {want:?}"),
            }
        }
    }

    #[test]
    fn no_password_is_kept_and_no_relative_name() {
        let mut access = Access {
            password_file: Some("-".into()),
            ssh_identity: Some("id".into()),
            ..Access::default()
        };
        absolute(&mut access).unwrap();
        assert_eq!(access.password_file, None);
        assert!(access.ssh_identity.unwrap().is_absolute());
    }

    #[test]
    fn a_socket_with_too_long_a_name_is_known_beforehand() {
        let name = |length: usize| PathBuf::from(format!("/{}.qcow2", "x".repeat(length)));
        assert!(too_long(&name(MAX_SOCKET - 6)).is_none());
        let said = too_long(&name(MAX_SOCKET - 5)).unwrap();
        assert!(said.contains("108 bytes") && said.contains("107"), "{said}");
    }
}
