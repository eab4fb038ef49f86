//! What a process may reach, by the kernel's own means: landlock for files, seccomp for system calls.
//! Needs no privileges.
//!
//! Measures, each for its kind of process:
//! - [`parser`]: nothing at all but its open descriptors and memory, for code that parses hostile
//!   bytes; [`editor`]: and one file, for a library that opens what it is given by name;
//! - [`Confinement`]: the files named and no sockets, or less, for tools started by the launcher;
//! - [`writes_only`]: this process and all it starts write only below some directories.
//!
//! Each is as strong as the kernel allows: one without landlock (before 5.13) leaves files open, an
//! architecture that `seccompiler` does not know leaves system calls open. seccomp filters survive
//! `execve`, landlock domains are inherited, and neither can be taken back.

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

/// Reading, writing, renaming and truncating are known from this version on.
const FILES: ABI = ABI::V3;
/// TCP, from this version on.
const NETWORK: ABI = ABI::V4;
/// Abstract Unix sockets and signals, from this version on.
const SCOPES: ABI = ABI::V6;
/// The address space of a parser: libntfs-3g needs some MiB and the largest file of a request.
const PARSER_MEMORY: u64 = 1 << 30;
/// How much an editor's file may grow, and how long it may compute.
const EDITOR_GROWTH: u64 = 64 << 20;
const EDITOR_SECONDS: u64 = 120;

/// The memory of a tool that reads images: QEMU reads some tables whole, whatever size an image says they have.
/// Real ones take some MiB, and its threads and buffers some dozens.
pub const IMAGE_MEMORY: u64 = 448 << 20;
/// The stack of each of its threads, which counts as memory.
const IMAGE_STACK: u64 = 2 << 20;

/// What tools load themselves from.
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
/// The same of a program from elsewhere, beside its own directory. Not all that is there: the program may be in
/// somebody's home.
const LIBRARIES: [&str; 4] = ["lib", "lib64", "libexec", "share"];
/// What C libraries and QEMU look up of the kernel: processors, memory, the limits of a block device.
/// Not the rest of /proc: it tells of other processes.
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
/// This process: the same one when it has become the program.
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
        // Less than that may be set already, and cannot be raised.
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

/// Leaves this process its open descriptors, memory to work with and the way out: no files, network,
/// programs, threads, processes or signals to others, no executable memory. Whatever else it tries
/// fails with EPERM, so that a C library of another release that asks for something harmless works on.
pub fn parser() -> io::Result<()> {
    alone(&[])?;
    install_only(parser_calls()?)
}

/// The same, and one file of at most so many bytes that is opened by its name. The name must be a constant:
/// system calls are told from each other by where the name lies, which is in memory that cannot be
/// written, replaced or moved.
pub fn editor(file: &'static CStr, size: u64) -> io::Result<()> {
    alone(&[
        (Resource::Fsize, size.saturating_add(EDITOR_GROWTH)),
        (Resource::Cpu, EDITOR_SECONDS),
    ])?;
    install_only(editor_calls(file)?)
}

/// No files, privileges and core dumps; memory, and what else there is a limit for.
fn alone(limits: &[(Resource, u64)]) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    // What it parses is no business of core dumps.
    limit(&[(Resource::Core, 0), (Resource::As, PARSER_MEMORY)])?;
    limit(limits)?;
    privileges::drop_all()?;
    Reach::default().enforce().map(drop)
}

/// What landlock lets a process reach.
#[derive(Debug, Default)]
struct Reach<'p> {
    read: Vec<&'p Path>,
    /// To read, and to start as a program.
    run: Vec<&'p Path>,
    write: Vec<&'p Path>,
    /// TCP.
    network: bool,
    /// Of TCP, connections to these ports.
    ports: Vec<u16>,
    /// Unix sockets by their path, where the kernel can tell (landlock 9).
    sockets: bool,
}

/// Whether landlock can have a rule for it. A file in memory is in no file system that could be named:
/// there is no rule for it, and none against it.
fn has_place(path: &Path) -> bool {
    !path.starts_with("/proc/self/fd")
        || std::fs::read_link(path)
            .is_ok_and(|file| !file.as_os_str().as_bytes().starts_with(b"/memfd:"))
}

impl<'p> Reach<'p> {
    /// Puts everything else out of reach of this process and what it starts; paths that do not exist
    /// are passed over. Signals and abstract sockets stay among these processes. Whether the kernel does
    /// that.
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

/// From now on this process, and all it starts, writes only below these paths and to a few harmless
/// devices, besides what is open already; it reads what it likes. Nothing is written in `/proc`,
/// `/sys`, `/run` and `/dev` unless a path lies there. Call it before there are other threads and
/// children. Whether the kernel does that.
pub(super) fn writes_only(below: &[PathBuf], network: bool) -> io::Result<bool> {
    rustix::thread::set_no_new_privs(true)?;
    let mut write: Vec<&Path> = below.iter().map(PathBuf::as_path).collect();
    write.extend(DEVICES.map(Path::new));
    write.push(Path::new(KVM));
    Reach {
        run: vec![Path::new("/")],
        write,
        network,
        sockets: true,
        ..Reach::default()
    }
    .enforce()
}

/// What a process that dials out keeps.
#[derive(Debug)]
pub(crate) enum Dials {
    /// Connections to that port, of whatever host: the kernel knows no names.
    Tcp(u16),
    /// That socket.
    Unix(PathBuf),
    /// Other programs, which connect by themselves. They write nothing.
    Programs,
}

/// What resolves the names of hosts.
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
    fn reach(&self) -> Reach<'_> {
        let reach = Reach {
            write: DEVICES.iter().map(Path::new).collect(),
            // Looking up names may take one.
            sockets: true,
            ..Reach::default()
        };
        let read = SYSTEM.iter().chain(&NAMES).map(Path::new);
        match self {
            Self::Programs => Reach {
                run: vec![Path::new("/")],
                network: true,
                ..reach
            },
            Self::Tcp(port) => Reach {
                read: read.collect(),
                ports: vec![*port, DOMAIN],
                ..reach
            },
            Self::Unix(socket) => Reach {
                read: read.chain([socket.as_path()]).collect(),
                ..reach
            },
        }
    }
}

/// Leaves this process what it takes to read a source on the wire. Files that are open stay open.
pub(crate) fn dials(dials: &Dials) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    limit(&[(Resource::Core, 0)])?;
    match dials {
        Dials::Unix(socket) => privileges::drop_for_socket(socket)?,
        Dials::Programs | Dials::Tcp(_) => privileges::drop_all()?,
    }
    dials.reach().enforce()?;
    match dials {
        Dials::Programs => Ok(()),
        Dials::Tcp(_) | Dials::Unix(_) => calls::dials(),
    }
}

/// What a tool started through the launcher may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confinement {
    offline: bool,
    /// It serves a socket it was given, by the system calls that takes.
    serves: bool,
    /// The files its arguments name, and where it is to make some.
    named: bool,
    /// It reads what its user may read, and writes what its arguments name.
    keeps: bool,
    /// `None`: any file.
    files: Option<Vec<(PathBuf, bool)>>,
    /// Bytes, besides [`IMAGE_MEMORY`].
    memory: u64,
}

impl Confinement {
    /// Everything but writing: only to the files that the arguments name, or in the directory of one that is to be
    /// made.
    pub fn writes_arguments() -> Self {
        Self {
            keeps: true,
            ..Self::default()
        }
    }

    /// Everything but the network.
    pub fn offline() -> Self {
        Self {
            offline: true,
            ..Self::default()
        }
    }

    /// No sockets, no other program, and no files but these and what programs are made of. The flag is
    /// whether it may be written.
    pub fn to_files(files: impl IntoIterator<Item = (PathBuf, bool)>) -> Self {
        Self {
            offline: true,
            files: Some(files.into_iter().collect()),
            ..Self::default()
        }
    }

    /// No sockets, no other program, and no files but those that the arguments name and what programs are
    /// made of; a file that is to be made, in its directory.
    pub fn to_arguments() -> Self {
        Self {
            offline: true,
            named: true,
            ..Self::default()
        }
    }

    /// For a program that serves a listening socket it is started with: it takes connections there and
    /// makes none, has no processes, and no system calls but those of [`super::calls`].
    #[must_use]
    pub fn serving(mut self) -> Self {
        self.serves = true;
        self
    }

    /// These files, too.
    #[must_use]
    pub fn and_files(mut self, files: impl IntoIterator<Item = (PathBuf, bool)>) -> Self {
        self.files.get_or_insert_default().extend(files);
        self
    }

    /// So many bytes of memory more than a program that reads images has.
    #[must_use]
    pub fn and_memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// The files that the program may open though its arguments do not name them.
    pub(super) fn opened(&self) -> impl Iterator<Item = OsString> {
        self.files.iter().flatten().map(|(path, _)| path.into())
    }

    /// As arguments of the launcher.
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

    /// Takes an argument back; false when it is none.
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

    /// Confines this process, which is about to become `program` with these arguments.
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
        // `self` is a link to whoever opens it: the rule is for where it leads now.
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
        Reach {
            read,
            run,
            write,
            ..Reach::default()
        }
        .enforce()
        .map(drop)
    }
}

/// Leaves this process, which is about to become a program with these arguments, everything to read and only
/// what they name to write.
fn keep_all_but(args: &[OsString]) -> io::Result<()> {
    let named = privileges::named(args);
    let written: Vec<PathBuf> = named.into_iter().map(|file| file.in_or_below().0).collect();
    let mut write: Vec<&Path> = DEVICES.iter().map(Path::new).collect();
    write.extend(written.iter().map(PathBuf::as_path));
    let reach = Reach {
        run: vec![Path::new("/")],
        write,
        network: true,
        sockets: true,
        ..Reach::default()
    };
    reach.enforce().map(drop)
}

const OFFLINE: &str = "offline";
const SERVES: &str = "serves";
const NAMED: &str = "named";
const KEEPS: &str = "writes-named";
const NO_FILES: &str = "no-files";

/// The program that loads another one, as its file says; `None` for a script.
fn loader(program: &Path) -> Option<PathBuf> {
    /// Where the loader's name is, usually right behind the program headers.
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
    // Linked statically: it is its own loader.
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

    /// Landlock knows TCP from Linux 6.7 on.
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
            let reach = Dials::Tcp(own_port);
            if !reach.reach().enforce().unwrap() || !tcp {
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
            // Whatever it says, it is not out of bounds.
            let _ = loader(&script);
            head[at] = old;
        }
    }
}
