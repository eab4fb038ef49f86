//! Restricts what a process may reach, with means of the kernel: landlock for files, seccomp for
//! system calls. Needs no privileges.
//!
//! Measures, each for its kind of process:
//! - [`parser`]: only its open descriptors and memory, for code that parses hostile bytes;
//!   [`editor`]: and one file, for a library that opens its input by name;
//! - [`Confinement`]: the named files and no sockets, or less, for tools started by the launcher;
//! - [`writes_only`]: this process and all its children write only below some directories.
//!
//! Each is as strong as the kernel permits. Without landlock (before 5.13) files stay accessible.
//! On an architecture that `seccompiler` does not support, system calls stay available. Filters of
//! seccomp survive `execve`, and landlock domains are inherited. Neither can be undone.

use std::ffi::{CStr, OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, NetPort, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetStatus, Scope, path_beneath_rules,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::calls;
use super::privileges::{self, Named};
pub use super::seccomp::offline;
use super::seccomp::{bad, editor_calls, install_only, no_sockets, parser_calls};

/// The version with rules for reading, writing, renaming and truncating.
const FILES: ABI = ABI::V3;
/// The version with rules for TCP.
const NETWORK: ABI = ABI::V4;
/// The version with rules for abstract Unix sockets and signals.
const SCOPES: ABI = ABI::V6;
/// The address space of a parser: libntfs-3g needs some MiB and the largest file of a request.
const PARSER_MEMORY: u64 = 1 << 30;
/// The growth limit of an editor's file, and the limit of its computing time.
const EDITOR_GROWTH: u64 = 64 << 20;
const EDITOR_SECONDS: u64 = 120;

/// The memory of a tool that reads images. QEMU reads some tables as a whole, whatever size an
/// image declares for them. Real ones take some MiB, and its threads and buffers some dozens.
pub const IMAGE_MEMORY: u64 = 448 << 20;
/// The stack of each of its threads, which counts as memory.
const IMAGE_STACK: u64 = 2 << 20;

/// The directories from which tools are loaded.
const SYSTEM: [&str; 10] = [
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/sbin",
    "/nix",
    "/gnu",
    "/etc/ld.so.cache",
    "/etc/alternatives",
];
/// The same for a program from elsewhere, beside its own directory. Not everything there: the
/// program may be in somebody's home.
const LIBRARIES: [&str; 4] = ["lib", "lib64", "libexec", "share"];
/// Kernel files that C libraries and QEMU read: processors, memory, the limits of a block device.
/// Not the rest of /proc, which reveals other processes.
const KERNEL: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/filesystems",
    "/proc/sys/vm/max_map_count",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/crypto/fips_enabled",
    "/sys/devices",
    "/sys/dev/block",
    "/sys/block",
    "/sys/class/block",
];
/// This process, also after it has become the program.
const ITSELF: &str = "/proc/self";
const DEVICES: [&str; 5] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/urandom",
    "/dev/random",
];
/// For the appliance of libguestfs.
const KVM: &str = "/dev/kvm";

fn limit(limits: &[(Resource, u64)]) -> io::Result<()> {
    for (resource, limit) in limits {
        // A lower limit may be set already, and cannot be raised.
        let set = getrlimit(*resource);
        let limit = [Some(*limit), set.current, set.maximum];
        let limit = limit.into_iter().flatten().min();
        setrlimit(
            *resource,
            Rlimit {
                current: limit,
                maximum: limit,
            },
        )?;
    }
    Ok(())
}

/// Restricts this process to its open descriptors, memory to work with, and exiting. It gets no
/// files, network, programs, threads, processes or signals to others, and no executable memory. Any
/// other attempt fails with EPERM, so that a C library of another release continues after a
/// harmless call.
pub fn parser() -> io::Result<()> {
    alone(&[])?;
    install_only(parser_calls()?)
}

/// The same as [`parser`], plus one file of at most so many bytes that is opened by name. The name
/// must be a constant. System calls are distinguished by the address of the name, whose memory must
/// not be writable, replaceable or movable.
pub fn editor(file: &'static CStr, size: u64) -> io::Result<()> {
    alone(&[
        (Resource::Fsize, size.saturating_add(EDITOR_GROWTH)),
        (Resource::Cpu, EDITOR_SECONDS),
    ])?;
    install_only(editor_calls(file)?)
}

/// Denies files, privileges and core dumps, and limits memory and the other given resources.
fn alone(limits: &[(Resource, u64)]) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    // Its input must not appear in core dumps.
    limit(&[(Resource::Core, 0), (Resource::As, PARSER_MEMORY)])?;
    limit(limits)?;
    privileges::drop_all()?;
    Allowed::default().enforce().map(drop)
}

/// The rules of landlock for a process.
#[derive(Debug, Default)]
struct Allowed<'p> {
    read: Vec<&'p Path>,
    /// Paths to read, and to start as a program.
    run: Vec<&'p Path>,
    write: Vec<&'p Path>,
    /// Whether TCP is allowed.
    network: bool,
    /// Ports to which TCP connections are allowed.
    ports: Vec<u16>,
    /// Whether Unix sockets are allowed by path, if the kernel can restrict them (landlock 9).
    sockets: bool,
}

/// Whether landlock can have a rule for the path. A file in memory is in no named file system: no
/// rule can allow it, and none denies it.
fn has_place(path: &Path) -> bool {
    !path.starts_with("/proc/self/fd")
        || std::fs::read_link(path)
            .is_ok_and(|file| !file.as_os_str().as_bytes().starts_with(b"/memfd:"))
}

impl<'p> Allowed<'p> {
    /// Denies everything else to this process and its children; paths that do not exist are
    /// skipped. Signals and abstract sockets stay among these processes. Returns whether the kernel
    /// supports that.
    fn enforce(&self) -> io::Result<bool> {
        let everything = AccessFs::from_all(FILES);
        let mut ruleset = Ruleset::default()
            .handle_access(everything)
            .and_then(|r| r.scope(Scope::from_all(SCOPES)))
            .map_err(bad)?;
        if !self.network {
            ruleset = ruleset
                .handle_access(AccessNet::from_all(NETWORK))
                .map_err(bad)?;
        }
        if !self.sockets {
            ruleset = ruleset.handle_access(AccessFs::ResolveUnix).map_err(bad)?;
        }
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let placed = |paths: &[&'p Path]| paths.iter().copied().filter(|p| has_place(p)).collect();
        let (may_read, may_write): (Vec<&Path>, Vec<&Path>) =
            (placed(&self.read), placed(&self.write));
        let connect = |port: &u16| Ok(NetPort::new(*port, AccessNet::ConnectTcp));
        let ports = self.ports.iter().filter(|_| !self.network).map(connect);
        let status = ruleset
            .create()
            .and_then(|r| r.add_rules(ports))
            .and_then(|r| r.add_rules(path_beneath_rules(may_read, read)))
            .and_then(|r| r.add_rules(path_beneath_rules(&self.run, AccessFs::from_read(FILES))))
            .and_then(|r| r.add_rules(path_beneath_rules(may_write, everything)))
            .and_then(RulesetCreated::restrict_self)
            .map_err(bad)?;
        Ok(status.ruleset != RulesetStatus::NotEnforced)
    }
}

/// Restricts the writes of this process, and of all its children, to these paths, a few harmless
/// devices, and open files. Reads are unrestricted. Nothing is written in `/proc`, `/sys`, `/run`
/// and `/dev` unless a path lies there. Must be called before there are other threads and children.
/// Returns whether the kernel supports that.
pub(super) fn writes_only(below: &[PathBuf], network: bool) -> io::Result<bool> {
    rustix::thread::set_no_new_privs(true)?;
    let mut write: Vec<&Path> = below.iter().map(PathBuf::as_path).collect();
    write.extend(DEVICES.map(Path::new));
    write.push(Path::new(KVM));
    Allowed {
        run: vec![Path::new("/")],
        write,
        network,
        sockets: true,
        ..Allowed::default()
    }
    .enforce()
}

/// The remaining access of a process that connects to a remote host.
#[derive(Debug)]
pub(crate) enum Dials {
    /// Connections to that port of any host: the kernel cannot restrict host names.
    Tcp(u16),
    /// That socket.
    Unix(PathBuf),
    /// Other programs, which connect by their own means. They write nothing.
    Programs,
}

/// Files for resolving host names.
const NAMES: [&str; 10] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/protocols",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/nscd",
];
const DOMAIN: u16 = 53;

impl Dials {
    fn allowed(&self) -> Allowed<'_> {
        let allowed = Allowed {
            write: DEVICES.iter().map(Path::new).collect(),
            // Resolving names may use one.
            sockets: true,
            ..Allowed::default()
        };
        let read = SYSTEM.iter().chain(&NAMES).map(Path::new);
        match self {
            Self::Programs => Allowed {
                run: vec![Path::new("/")],
                network: true,
                ..allowed
            },
            Self::Tcp(port) => Allowed {
                read: read.collect(),
                ports: vec![*port, DOMAIN],
                ..allowed
            },
            Self::Unix(socket) => Allowed {
                read: read.chain([socket.as_path()]).collect(),
                ..allowed
            },
        }
    }
}

/// Restricts this process to reading a source on the wire. Open files stay accessible.
pub(crate) fn dials(dials: &Dials) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    limit(&[(Resource::Core, 0)])?;
    match dials {
        Dials::Unix(socket) => privileges::drop_for_socket(socket)?,
        Dials::Programs | Dials::Tcp(_) => privileges::drop_all()?,
    }
    dials.allowed().enforce()?;
    match dials {
        Dials::Programs => Ok(()),
        Dials::Tcp(_) | Dials::Unix(_) => calls::dials(),
    }
}

/// The access of a tool started through the launcher.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confinement {
    offline: bool,
    /// Whether it serves an inherited socket, with the system calls of a server.
    serves: bool,
    /// Whether it may use the files that its arguments name, and create some there.
    named: bool,
    /// Whether it may read everything that its user may, and write what its arguments name.
    keeps: bool,
    /// The accessible files; `None`: any file.
    files: Option<Vec<(PathBuf, bool)>>,
    /// Bytes in addition to [`IMAGE_MEMORY`].
    memory: u64,
}

impl Confinement {
    /// Everything except writing: only to the files that the arguments name, or in the directory of
    /// one that will be created.
    pub fn writes_arguments() -> Self {
        Self {
            keeps: true,
            ..Self::default()
        }
    }

    /// Everything except the network.
    pub fn offline() -> Self {
        Self {
            offline: true,
            ..Self::default()
        }
    }

    /// No sockets, no other program, and only these files and those that programs consist of. The
    /// flag permits writing.
    pub fn to_files(files: impl IntoIterator<Item = (PathBuf, bool)>) -> Self {
        Self {
            offline: true,
            files: Some(files.into_iter().collect()),
            ..Self::default()
        }
    }

    /// No sockets, no other program, and only the files that the arguments name and those that
    /// programs consist of. A file that will be created gives access to its directory.
    pub fn to_arguments() -> Self {
        Self {
            offline: true,
            named: true,
            ..Self::default()
        }
    }

    /// For a program that serves an inherited listening socket. It accepts connections there and
    /// opens none, has no processes, and only the system calls of [`super::calls`].
    #[must_use]
    pub fn serving(mut self) -> Self {
        self.serves = true;
        self
    }

    /// Adds these files.
    #[must_use]
    pub fn and_files(mut self, files: impl IntoIterator<Item = (PathBuf, bool)>) -> Self {
        self.files.get_or_insert_default().extend(files);
        self
    }

    /// Adds memory to that of a program that reads images.
    #[must_use]
    pub fn and_memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// The files that the program may open although its arguments do not name them.
    pub(super) fn opened(&self) -> impl Iterator<Item = OsString> {
        self.files.iter().flatten().map(|(path, _)| path.into())
    }

    /// The arguments for the launcher.
    pub(super) fn args(&self) -> Vec<OsString> {
        let mut args = Vec::new();
        if self.offline {
            args.push(OFFLINE.into());
        }
        if self.serves {
            args.push(SERVES.into());
        }
        if self.named {
            args.push(NAMED.into());
        }
        if self.keeps {
            args.push(KEEPS.into());
        }
        if self.files.is_some() {
            args.push(NO_FILES.into());
        }
        if self.memory > 0 {
            args.push(format!("memory={}", self.memory).into());
        }
        for (path, writable) in self.files.iter().flatten() {
            let mut arg = OsString::from(if *writable { "write=" } else { "read=" });
            arg.push(path);
            args.push(arg);
        }
        args
    }

    /// Parses an argument; false if it is not one.
    pub(super) fn add_arg(&mut self, arg: &OsStr) -> bool {
        let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
        let bytes = arg.as_bytes();
        if let Some(memory) = bytes.strip_prefix(b"memory=") {
            let memory = str::from_utf8(memory)
                .ok()
                .and_then(|text| text.parse().ok());
            self.memory = memory.unwrap_or(0);
            return memory.is_some();
        }
        let file = match (bytes.strip_prefix(b"read="), bytes.strip_prefix(b"write=")) {
            (Some(file), _) => (path(file), false),
            (_, Some(file)) => (path(file), true),
            _ => {
                self.offline |= arg == OFFLINE;
                self.serves |= arg == SERVES;
                self.named |= arg == NAMED;
                self.keeps |= arg == KEEPS;
                if arg == NO_FILES {
                    self.files.get_or_insert_default();
                }
                return [OFFLINE, SERVES, NAMED, KEEPS, NO_FILES]
                    .iter()
                    .any(|known| arg == *known);
            }
        };
        self.files.get_or_insert_default().push(file);
        true
    }

    /// Restricts this process, which is about to become `program` with these arguments.
    pub(super) fn apply(&self, program: &Path, args: &[OsString]) -> io::Result<()> {
        let mut files = self.files.clone();
        if self.named {
            files
                .get_or_insert_default()
                .extend(privileges::named(args).into_iter().map(Named::in_or_below));
        }
        if self.keeps {
            keep_all_but(args)?;
        }
        match &files {
            Some(files) => {
                limit(&[
                    (Resource::Core, 0),
                    (Resource::Data, IMAGE_MEMORY.saturating_add(self.memory)),
                    (Resource::Stack, IMAGE_STACK),
                ])?;
                self.to_named(files, program)?;
                no_sockets()?;
            }
            None if self.offline => offline()?,
            None => {}
        }
        if self.serves {
            calls::server(loader(program).is_none())?;
        }
        Ok(())
    }

    fn to_named(&self, named: &[(PathBuf, bool)], program: &Path) -> io::Result<()> {
        // `self` is a link that depends on the process: the rule is for its present target.
        let itself = std::fs::canonicalize(ITSELF).ok();
        let mut read: Vec<&Path> = SYSTEM.iter().chain(&KERNEL).map(Path::new).collect();
        read.extend(itself.as_deref());
        // A program from elsewhere has its libraries beside it: /opt/qemu for /opt/qemu/bin/x.
        let home = program.parent().and_then(Path::parent);
        let beside = |home: &Path| LIBRARIES.map(|folder| home.join(folder));
        let beside: Vec<PathBuf> = home.into_iter().flat_map(beside).collect();
        read.extend(beside.iter().map(PathBuf::as_path));
        read.extend(named.iter().filter(|f| !f.1).map(|f| f.0.as_path()));
        let loader = loader(program);
        let run = match &loader {
            Some(loader) => vec![program, loader.as_path()],
            // A script, which starts others.
            None => SYSTEM.iter().map(Path::new).chain([program]).collect(),
        };
        let mut write: Vec<&Path> = DEVICES.iter().map(Path::new).collect();
        write.extend(named.iter().filter(|f| f.1).map(|f| f.0.as_path()));
        Allowed {
            read,
            run,
            write,
            ..Allowed::default()
        }
        .enforce()
        .map(drop)
    }
}

/// Restricts this process, which is about to become a program with these arguments, to reading, and
/// to writing only what they name.
fn keep_all_but(args: &[OsString]) -> io::Result<()> {
    let named = privileges::named(args);
    let written: Vec<PathBuf> = named.into_iter().map(|file| file.in_or_below().0).collect();
    let mut write: Vec<&Path> = DEVICES.iter().map(Path::new).collect();
    write.extend(written.iter().map(PathBuf::as_path));
    let allowed = Allowed {
        run: vec![Path::new("/")],
        write,
        network: true,
        sockets: true,
        ..Allowed::default()
    };
    allowed.enforce().map(drop)
}

const OFFLINE: &str = "offline";
const SERVES: &str = "serves";
const NAMED: &str = "named";
const KEEPS: &str = "writes-named";
const NO_FILES: &str = "no-files";

/// The interpreter that the file of a program names; `None` for a script.
fn loader(program: &Path) -> Option<PathBuf> {
    /// The range with the interpreter's name, usually right after the program headers.
    const HEAD: u64 = 64 << 10;
    let mut head = Vec::new();
    let file = std::fs::File::open(program).ok()?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, HEAD), &mut head).ok()?;
    let number = |at: usize, size: usize| -> Option<u64> {
        let bytes = head.get(at..at.checked_add(size)?)?;
        let mut number = [0; 8];
        if head.get(5)? == &1 {
            number[..size].copy_from_slice(bytes);
            Some(u64::from_le_bytes(number))
        } else {
            number[8 - size..].copy_from_slice(bytes);
            Some(u64::from_be_bytes(number))
        }
    };
    let wide = match head.get(..5)? {
        b"\x7fELF\x02" => true,
        b"\x7fELF\x01" => false,
        _ => return None,
    };
    // e_phoff, e_phentsize, e_phnum; p_offset and p_filesz of the entry of type PT_INTERP.
    let (table, sizes, at, width) = match wide {
        true => (number(32, 8)?, 54, (8, 32), 8),
        false => (number(28, 4)?, 42, (4, 16), 4),
    };
    let (size, count) = (number(sizes, 2)?, number(sizes + 2, 2)?);
    for index in 0..count {
        let entry = usize::try_from(table.checked_add(index.checked_mul(size)?)?).ok()?;
        if number(entry, 4)? == u64::from(libc::PT_INTERP) {
            let start = usize::try_from(number(entry.checked_add(at.0)?, width)?).ok()?;
            let length = usize::try_from(number(entry.checked_add(at.1)?, width)?).ok()?;
            let name = head.get(start..start.checked_add(length)?)?;
            let name = name.split(|&byte| byte == 0).next()?;
            return Some(OsStr::from_bytes(name).into());
        }
    }
    // Linked statically: it needs no interpreter.
    Some(program.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let wanted = Confinement::to_files([
            (PathBuf::from("/a b"), false),
            (OsString::from_vec(b"/\xff".to_vec()).into(), true),
        ]);
        let mut back = Confinement::default();
        assert!(wanted.args().iter().all(|arg| back.add_arg(arg)));
        assert_eq!(back, wanted);
        for wanted in [
            Confinement::to_files([]).serving(),
            Confinement::to_files([]).and_memory(600 << 20),
            Confinement::to_arguments(),
            Confinement::writes_arguments(),
        ] {
            let mut back = Confinement::default();
            assert!(wanted.args().iter().all(|arg| back.add_arg(arg)));
            assert_eq!(back, wanted);
        }
        assert!(Confinement::default().args().is_empty());
        for arg in ["--", "", "memory=", "memory=-1", "memory=1M"] {
            assert!(!back.add_arg(OsStr::new(arg)), "{arg}");
        }
    }

    /// Whether landlock supports TCP, from Linux 6.7 on.
    fn knows_tcp() -> bool {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split('.').map_while(|n| n.parse::<u32>().ok());
        (numbers.next(), numbers.next()) >= (Some(6), Some(7))
    }

    #[test]
    fn whoever_dials_reaches_its_port_and_no_other() {
        use std::net::{TcpListener, TcpStream};
        let listener = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (own, other) = (listener(), listener());
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let (own_port, other_port) = (port(&own), port(&other));
        let tcp = knows_tcp();
        // Of this thread only.
        let confined = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            let dials = Dials::Tcp(own_port);
            if !dials.allowed().enforce().unwrap() || !tcp {
                return;
            }
            TcpStream::connect(("127.0.0.1", own_port)).unwrap();
            let denied = |error: io::Error| error.kind() == io::ErrorKind::PermissionDenied;
            let refused = TcpStream::connect(("127.0.0.1", other_port));
            assert!(refused.is_err_and(denied));
            assert!(TcpListener::bind("127.0.0.1:0").is_err_and(denied));
            assert!(std::fs::read("/etc/passwd").is_err_and(denied));
            assert!(std::fs::read("/etc/hosts").is_ok());
        });
        confined.join().unwrap();
    }

    #[test]
    fn loaders() {
        let own = std::env::current_exe().unwrap();
        assert!(loader(&own).is_some_and(|l| l.is_absolute() && l.exists()));
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("x");
        std::fs::write(&script, "#!/bin/sh\n").unwrap();
        assert_eq!(loader(&script), None);
        let mut head = std::fs::read(&own).unwrap()[..1000].to_vec();
        for at in 6..head.len() {
            let old = std::mem::replace(&mut head[at], 0xff);
            std::fs::write(&script, &head).unwrap();
            // Any other error shows that it is within bounds.
            let _ = loader(&script);
            head[at] = old;
        }
    }
}
