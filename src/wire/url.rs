//! Addresses of sources: the URLs of INTERFACE.md, parsed once.
//!
//! Paths are percent-encoded (RFC 3986) and UTF-8. A password in a URL is refused, because it would
//! be in the list of processes. Host and user become arguments of `ssh` and are used in the user's
//! ssh configuration. So characters with a meaning in a shell, and a leading `-`, are refused like
//! in OpenSSH.

use std::fmt;
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::error::{Result, WireError};

/// The port of NBD (IANA).
const NBD_PORT: u16 = 10809;
const HTTPS_PORT: u16 = 443;
/// The directory of ESXi's datastores.
const VOLUMES: &str = "/vmfs/volumes/";

/// The protocol of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Transport {
    File,
    Ssh,
    Https,
    Nbd,
    Command,
}

impl Transport {
    /// The name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Ssh => "ssh",
            Self::Https => "https",
            Self::Nbd => "nbd",
            Self::Command => "command",
        }
    }

    /// Whether NBD provides the disk: it is no file, and has no links.
    pub(crate) fn is_export(self) -> bool {
        match self {
            Self::Nbd | Self::Command => true,
            Self::File | Self::Ssh | Self::Https => false,
        }
    }
}

/// A file or an export on another host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub(crate) struct Location {
    pub(super) server: Server,
    /// The decoded path; for NBD the export's name, for a command its given name.
    path: String,
    /// The query of https as given, without the `?`.
    query: Option<String>,
}

/// The properties common to all files of one server.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub(super) enum Server {
    Ssh {
        user: Option<String>,
        host: String,
        port: Option<u16>,
    },
    Https {
        user: Option<String>,
        host: String,
        port: u16,
    },
    Nbd {
        host: String,
        port: u16,
        tls: bool,
    },
    NbdUnix {
        socket: PathBuf,
    },
    Command,
}

impl Location {
    /// Parses a URL; `None` for text without one of these schemes, which is a path.
    pub(crate) fn parse(text: &str) -> Result<Option<Self>> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(None);
        };
        let scheme = scheme.to_ascii_lowercase();
        match scheme.as_str() {
            "ssh" | "sftp" | "https" | "nbd" | "nbds" | "nbd+unix" => {}
            "http" => {
                return Err(WireError::usage(
                    format!("{}: http is neither encrypted nor verified", shown(text)),
                    "use https://; a certificate of your own is named by --tls-ca or --tls-fingerprint",
                ));
            }
            _ => return Ok(None),
        }
        let refuse =
            |reason: &str, hint: &str| WireError::usage(format!("{}: {reason}", shown(text)), hint);
        if text.chars().any(|c| c.is_control() || c == ' ') {
            return Err(refuse(
                "a URL has no spaces and control characters",
                "write a space as %20",
            ));
        }
        if rest.contains('#') {
            return Err(refuse("a URL of a source has no #", "write it as %23"));
        }
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (path, query) = match path.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (path, None),
        };
        let path = decode(path)
            .ok_or_else(|| refuse("its path is not percent-encoded UTF-8", "encode it"))?;
        let authority = Authority::parse(authority, &refuse)?;
        Parts {
            authority,
            path,
            query,
        }
        .of_scheme(&scheme, &refuse)
        .map(Some)
    }

    /// The source of `--source-command`, with the user's name for it.
    pub(crate) fn command(name: &str) -> Self {
        Self {
            server: Server::Command,
            path: name.to_owned(),
            query: None,
        }
    }

    /// The only export behind a Unix socket of this host.
    pub(crate) fn of_socket(socket: &Path) -> Self {
        Self {
            server: Server::NbdUnix {
                socket: socket.to_owned(),
            },
            path: String::new(),
            query: None,
        }
    }

    pub(crate) fn transport(&self) -> Transport {
        match self.server {
            Server::Ssh { .. } => Transport::Ssh,
            Server::Https { .. } => Transport::Https,
            Server::Nbd { .. } | Server::NbdUnix { .. } => Transport::Nbd,
            Server::Command => Transport::Command,
        }
    }

    /// The decoded path on the other host; for NBD the export's name.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// The last component of the path.
    pub(crate) fn file_name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// The host, for names and messages; empty for a socket or a command.
    pub(crate) fn host(&self) -> &str {
        match &self.server {
            Server::Ssh { host, .. } | Server::Https { host, .. } | Server::Nbd { host, .. } => {
                host
            }
            Server::NbdUnix { .. } | Server::Command => "",
        }
    }

    /// The datastore of a request to `/folder`.
    pub(crate) fn datastore(&self) -> Option<String> {
        self.parameter("dsName")
    }

    fn parameter(&self, name: &str) -> Option<String> {
        let query = self.query.as_deref()?;
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let (_, value) = pairs.find(|(known, _)| *known == name)?;
        decode(&value.replace('+', " "))
    }

    /// The same server and query, another path.
    pub(crate) fn with_path(&self, path: &str) -> Self {
        Self {
            path: path.to_owned(),
            ..self.clone()
        }
    }

    /// The directory of the file.
    pub(crate) fn directory(&self) -> Self {
        let parent = match self.path.rfind('/') {
            Some(0) | None => "/",
            Some(at) => &self.path[..at],
        };
        self.with_path(parent)
    }

    /// The location that a `.vmx`, an `.ovf` or a descriptor at this location names: a name beside
    /// it, or an absolute path.
    pub(crate) fn join(&self, name: &str) -> Result<Self> {
        let refuse = |reason: &str, hint: &str| {
            WireError::usage(format!("{self} names {:?}: {reason}", shown(name)), hint)
        };
        match self.server {
            Server::Ssh { .. } => {}
            Server::Https { .. } if name.starts_with('/') => return self.join_absolute(name),
            Server::Https { .. } => {}
            _ => {
                return Err(refuse(
                    "nothing lies beside an NBD export",
                    "name each disk by a URL of its own",
                ));
            }
        }
        if name.is_empty() || name.contains('\0') {
            return Err(refuse("that is no name of a file", "correct it"));
        }
        let whole = match name.starts_with('/') {
            true => name.to_owned(),
            false => format!("{}/{name}", self.directory().path),
        };
        let path = normal(&whole).ok_or_else(|| refuse("it leads above /", "correct it"))?;
        Ok(self.with_path(&path))
    }

    /// The location of `/vmfs/volumes/NAME/...` in a file from `/folder`.
    fn join_absolute(&self, name: &str) -> Result<Self> {
        let refuse = |reason: String, hint: &str| {
            WireError::usage(format!("{self} names {}: {reason}", shown(name)), hint)
        };
        let volume = name.strip_prefix(VOLUMES).and_then(|r| r.split_once('/'));
        let (Some((volume, rest)), Some(_)) = (volume, self.datastore()) else {
            return Err(refuse(
                "an absolute path has no meaning on a web server".into(),
                "use ssh://, or put the disk beside the file that names it",
            ));
        };
        if is_volume_id(volume) {
            return Err(refuse(
                "it names its datastore by its UUID, and /folder accepts only names".into(),
                "use ssh:// for this VM, or name its disks by URLs with dsName=NAME",
            ));
        }
        let rest = normal(&format!("/{rest}"))
            .ok_or_else(|| refuse("it leads above its datastore".into(), "correct it"))?;
        let query = self.query.as_deref().unwrap_or_default();
        let pairs = query.split('&').map(|pair| match pair.split_once('=') {
            Some(("dsName", _)) => format!("dsName={}", encode(volume, false)),
            _ => pair.to_owned(),
        });
        Ok(Self {
            server: self.server.clone(),
            path: format!("/folder{rest}"),
            query: Some(pairs.collect::<Vec<_>>().join("&")),
        })
    }

    /// The path with its query in the form of HTTP.
    pub(super) fn target(&self) -> String {
        let path = encode(&self.path, true);
        match &self.query {
            Some(query) => format!("{path}?{query}"),
            None => path,
        }
    }

    /// The name of its export on hyper2kvm's NBD server.
    pub(super) fn export(&self) -> String {
        match self.server {
            Server::Https { .. } => self.target(),
            _ => self.path.clone(),
        }
    }
}

/// The form that users read and write. It contains no password.
impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = encode(&self.path, true);
        match &self.server {
            Server::Ssh { .. } | Server::Https { .. } => {
                write!(f, "{}{}", self.server, self.target())
            }
            Server::Nbd { .. } => write!(f, "{}/{path}", self.server),
            Server::NbdUnix { socket } => {
                let socket = encode(&socket.to_string_lossy(), true);
                write!(f, "nbd+unix:///{path}?socket={socket}")
            }
            Server::Command => f.write_str(&shown(&self.path)),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |user: &Option<String>| match user {
            Some(user) => format!("{}@", encode(user, false)),
            None => String::new(),
        };
        match self {
            Self::Ssh { user, host, port } => {
                write!(f, "ssh://{}{}", at(user), bracketed(host))?;
                port.map_or(Ok(()), |port| write!(f, ":{port}"))
            }
            Self::Https { user, host, port } => {
                write!(f, "https://{}{}", at(user), bracketed(host))?;
                match *port {
                    HTTPS_PORT => Ok(()),
                    port => write!(f, ":{port}"),
                }
            }
            Self::Nbd { host, port, tls } => {
                let scheme = if *tls { "nbds" } else { "nbd" };
                write!(f, "{scheme}://{}", bracketed(host))?;
                match *port {
                    NBD_PORT => Ok(()),
                    port => write!(f, ":{port}"),
                }
            }
            Self::NbdUnix { socket } => write!(f, "the socket {}", socket.display()),
            Self::Command => f.write_str("the source command"),
        }
    }
}

fn bracketed(host: &str) -> String {
    match host.contains(':') {
        true => format!("[{host}]"),
        false => host.to_owned(),
    }
}

/// User, host and port of a URL.
struct Authority {
    user: Option<String>,
    host: String,
    port: Option<u16>,
}

type Refuse<'r> = &'r dyn Fn(&str, &str) -> WireError;

impl Authority {
    fn parse(text: &str, refuse: Refuse) -> Result<Self> {
        let (user, place) = match text.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, text),
        };
        if user.is_some_and(|user| user.contains(':')) {
            return Err(refuse(
                "a password in a URL is refused: others read it in the list of processes",
                "take it out, and use --password-file FILE",
            ));
        }
        let user = user.map(|user| {
            decode(user)
                .filter(|user| is_user(user))
                .ok_or_else(|| refuse("its user is not a name", "correct it, or use --user NAME"))
        });
        let unclear = || {
            refuse(
                "its host or port is not clear",
                "HOST, HOST:PORT or [IPv6]:PORT",
            )
        };
        let (host, port) = match place.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(unclear)?;
                let port = match port {
                    "" => None,
                    port => Some(port.strip_prefix(':').ok_or_else(unclear)?),
                };
                (host, port)
            }
            None => match place.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (place, None),
            },
        };
        let known = |port: &str| port.parse::<u16>().ok().filter(|port| *port > 0);
        let port = match port {
            None => None,
            Some(port) => Some(known(port).ok_or_else(unclear)?),
        };
        if !place.is_empty() && !is_host(host, place.starts_with('[')) {
            return Err(unclear());
        }
        Ok(Self {
            user: user.transpose()?,
            host: host.to_owned(),
            port,
        })
    }
}

/// The parts of a URL.
struct Parts<'t> {
    authority: Authority,
    path: String,
    query: Option<&'t str>,
}

impl Parts<'_> {
    fn of_scheme(self, scheme: &str, refuse: Refuse) -> Result<Location> {
        let Authority { user, host, port } = self.authority;
        if host.is_empty() != (scheme == "nbd+unix") {
            return Err(match host.is_empty() {
                true => refuse("it names no host", "SCHEME://HOST/PATH"),
                false => refuse(
                    "a Unix socket is on no other host",
                    "nbd+unix:///EXPORT?socket=PATH, with three slashes",
                ),
            });
        }
        let server = match scheme {
            "ssh" | "sftp" => Server::Ssh { user, host, port },
            "https" => Server::Https {
                user,
                host,
                port: port.unwrap_or(HTTPS_PORT),
            },
            _ if user.is_some() => return Err(refuse("NBD has no users", "take NAME@ out")),
            "nbd+unix" => Server::NbdUnix {
                socket: socket_of(self.query).ok_or_else(|| {
                    refuse(
                        "it names no socket by its full path",
                        "nbd+unix:///EXPORT?socket=PATH",
                    )
                })?,
            },
            _ => Server::Nbd {
                host,
                port: port.unwrap_or(NBD_PORT),
                tls: scheme == "nbds",
            },
        };
        let path = match &server {
            Server::Ssh { .. } | Server::Https { .. } => match normal(&self.path) {
                Some(path) if self.path.starts_with('/') && path != "/" => path,
                Some(_) if self.path == "/" => self.path,
                _ => return Err(refuse("it names no file", "SCHEME://HOST/ABSOLUTE/PATH")),
            },
            _ => self.path.strip_prefix('/').unwrap_or_default().to_owned(),
        };
        let is_https = matches!(server, Server::Https { .. });
        if self.query.is_some() && !is_https && !matches!(server, Server::NbdUnix { .. }) {
            return Err(refuse("it has a query", "write a ? of a name as %3F"));
        }
        Ok(Location {
            server,
            path,
            query: self.query.filter(|_| is_https).map(str::to_owned),
        })
    }
}

fn socket_of(query: Option<&str>) -> Option<PathBuf> {
    let (name, value) = query?.split_once('=')?;
    let value = decode(value)?;
    (name == "socket" && value.starts_with('/')).then(|| value.into())
}

/// Whether OpenSSH accepts a user name on its command line.
pub(super) fn is_user(user: &str) -> bool {
    !user.is_empty()
        && !user.starts_with('-')
        && !user.ends_with('\\')
        && !user
            .chars()
            .any(|c| c.is_control() || c.is_whitespace() || "'`\";&<>|(){}$".contains(c))
}

fn is_host(host: &str, brackets: bool) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    let address = |c: char| known(c) || (brackets && ":%".contains(c));
    !host.is_empty() && !host.starts_with('-') && host.chars().all(address)
}

/// Whether the name is the id of a volume: VMFS uses `5f1a2b3c-4d5e6f70-8190-a1b2c3d4e5f6`, NFS 16
/// digits.
fn is_volume_id(name: &str) -> bool {
    let hex = |text: &str| text.chars().all(|c| c.is_ascii_hexdigit());
    let lengths: Vec<usize> = name.split('-').map(str::len).collect();
    name.split('-').all(hex)
        && matches!(
            lengths.as_slice(),
            [8, 8, 4, 12] | [16] | [8, 8] | [8, 4, 4, 4, 12]
        )
}

/// Removes `.`, `..` and doubled slashes; `None` if the path leads above the root.
fn normal(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(format!("/{}", parts.join("/")))
}

/// Decodes percent-encoded UTF-8; `None` if it is invalid, or has a NUL or a line end.
pub(super) fn decode(text: &str) -> Option<String> {
    let encoded = text.split('%').skip(1).all(|after| {
        let digits = after.as_bytes().first_chunk::<2>();
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    });
    let text = percent_decode_str(text).decode_utf8().ok()?;
    (encoded && !text.chars().any(char::is_control)).then(|| text.into_owned())
}

/// Characters that RFC 3986 calls unreserved are kept.
const QUERY: AsciiSet = NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');
const PATH: AsciiSet = QUERY.remove(b'/');

fn encode(text: &str, slashes: bool) -> String {
    let set = if slashes { &PATH } else { &QUERY };
    utf8_percent_encode(text, set).to_string()
}

/// Cleans text of the user or a file for a message: no control characters, no password.
fn shown(text: &str) -> String {
    let clean: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    let Some((scheme, rest)) = clean.split_once("://") else {
        return clean;
    };
    let end = rest.find('/').unwrap_or(rest.len());
    match (rest[..end].rfind('@'), rest[..end].find(':')) {
        (Some(at), Some(colon)) if colon < at => {
            format!("{scheme}://{}:...{}", &rest[..colon], &rest[at..])
        }
        _ => clean,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Location {
        Location::parse(text).unwrap().unwrap()
    }

    /// Such a disk is asked for its dirty bitmap, and never taken for a file that does not change.
    #[test]
    fn exports_are_those_of_nbd_servers_here_and_there() {
        use Transport::{Command, File, Https, Nbd, Ssh};
        let exports = [File, Ssh, Https, Nbd, Command].map(Transport::is_export);
        assert_eq!(exports, [false, false, false, true, true]);
        assert!(parse("nbds://h").transport().is_export());
    }

    #[test]
    fn reads_every_form_of_the_contract() {
        for (text, transport, path) in [
            (
                "ssh://root@esxi/vmfs/volumes/ds1/vm/vm.vmx",
                "ssh",
                "/vmfs/volumes/ds1/vm/vm.vmx",
            ),
            ("ssh://h:2222/a%20b/c%3Fd", "ssh", "/a b/c?d"),
            ("ssh://[fe80::1%25eth0]:22/x", "ssh", "/x"),
            (
                "https://h/folder/vm/vm.vmx?dcPath=ha%2ddatacenter&dsName=ds%201",
                "https",
                "/folder/vm/vm.vmx",
            ),
            ("HTTPS://h:8443/x", "https", "/x"),
            ("nbd://h/", "nbd", ""),
            ("nbd://h:10810/disk1", "nbd", "disk1"),
            ("nbds://h", "nbd", ""),
            ("nbd+unix:///a%2Fb?socket=/run/x%20y.sock", "nbd", "a/b"),
        ] {
            let at = parse(text);
            assert_eq!(
                (at.transport().name(), at.path()),
                (transport, path),
                "{text}"
            );
            assert_eq!(parse(&at.to_string()), at, "{text} and {at}");
        }
        assert_eq!(
            parse("https://h/x?dcPath=a%20b&dsName=d+1")
                .datastore()
                .unwrap(),
            "d 1"
        );
        for path in ["/a/b", "disk.vmdk", "C:\\x", "s3://bucket/x", "vpx://h/x"] {
            assert_eq!(Location::parse(path).unwrap(), None, "{path}");
        }
    }

    #[test]
    fn refuses_what_cannot_be_meant_and_never_repeats_a_password() {
        for text in [
            "ssh://root:hunter2@h/x",
            "https://u:hunter2@h/x",
            "ssh://:hunter2@h/x",
            "nbd://u:hunter2@h/x",
            "ssh://a:hunter2@b@h/x",
            "http://u:hunter2@h/x",
        ] {
            let error = Location::parse(text).unwrap_err();
            assert_eq!(error.kind().code(), 2, "{text}");
            let all = format!("{error} {:?}", error.hint());
            assert!(!all.contains("hunter2"), "{all}");
        }
        for text in [
            "ssh://h",
            "ssh://h/",
            "ssh:///x",
            "ssh://-oProxyCommand=x/y",
            "ssh://h:0/x",
            "ssh://h:x/x",
            "ssh://h:22:22/x",
            "ssh://h/../x",
            "ssh://h/a%00b",
            "ssh://h/a%0Ab",
            "ssh://h/%ff",
            "ssh://h/%4",
            "ssh://h/x?y",
            "ssh://h/x#y",
            "ssh://a;b@h/x",
            "ssh://%24(id)@h/x",
            "ssh://-l@h/x",
            "ssh://$(id)/x",
            "ssh://[h/x",
            "ssh://h/a b",
            "https://h",
            "http://h/x",
            "nbd://u@h/x",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=y",
            "nbd+unix://h/x?socket=/y",
            "nbd:///x",
            "ssh://h\n/x",
        ] {
            // The root of a server may be a directory to list.
            if matches!(text, "ssh://h/") {
                continue;
            }
            assert!(Location::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn finds_what_lies_beside_it() {
        let vmx = parse("ssh://h/vmfs/volumes/ds1/vm/vm.vmx");
        for (name, want) in [
            ("vm.vmdk", "ssh://h/vmfs/volumes/ds1/vm/vm.vmdk"),
            ("a b/c%.vmdk", "ssh://h/vmfs/volumes/ds1/vm/a%20b/c%25.vmdk"),
            ("../other/x.vmdk", "ssh://h/vmfs/volumes/ds1/other/x.vmdk"),
            (
                "/vmfs/volumes/ds2/x.vmdk",
                "ssh://h/vmfs/volumes/ds2/x.vmdk",
            ),
        ] {
            assert_eq!(vmx.join(name).unwrap().to_string(), want);
        }
        assert!(vmx.join("../../../../../x").is_err());
        let folder = parse("https://h/folder/vm/vm.vmx?dcPath=dc&dsName=ds1");
        for (name, want) in [
            (
                "x y.vmdk",
                "https://h/folder/vm/x%20y.vmdk?dcPath=dc&dsName=ds1",
            ),
            (
                "/vmfs/volumes/ds 2/b/x.vmdk",
                "https://h/folder/b/x.vmdk?dcPath=dc&dsName=ds%202",
            ),
        ] {
            assert_eq!(folder.join(name).unwrap().to_string(), want);
        }
        for name in [
            "/vmfs/volumes/5f1a2b3c-4d5e6f70-8190-a1b2c3d4e5f6/b/x.vmdk",
            "/etc/shadow",
            "../../../x",
        ] {
            assert!(folder.join(name).is_err(), "{name}");
        }
        assert!(
            parse("https://h/vm/vm.vmx")
                .join("/vmfs/volumes/d/x")
                .is_err()
        );
        assert!(parse("nbd://h/x").join("y").is_err());
        assert!(Location::command("vm").join("y").is_err());
    }
}
