//! What a process may reach, by the kernel's own means: landlock for files, seccomp for system calls.
//! Needs no privileges.
//!
//! Three measures, each for its kind of process:
//! - [`parser`]: nothing at all but its open descriptors and memory, for code that parses hostile
//!   bytes;
//! - [`Confinement`]: the files named and no network, for tools started by the launcher;
//! - [`writes_only`]: this process and all it starts write only below some folders.
//!
//! Each is as strong as the kernel allows: one without landlock (before 5.13) leaves files open, an
//! architecture that `seccompiler` does not know leaves system calls open. seccomp filters survive
//! `execve`, landlock domains are inherited, and neither can be taken back.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus,
    path_beneath_rules,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Reading, writing, renaming and truncating are known from this version on.
const FILES: ABI = ABI::V3;
/// The address space of a parser: libntfs-3g needs some MiB and the largest file of a request.
const PARSER_MEMORY: u64 = 1 << 30;

/// What tools load themselves from.
const SYSTEM: [&str; 12] = [
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
    "/proc",
    "/sys",
];
const DEVICES: [&str; 4] = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn bad(e: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(e)
}

/// A filter for this architecture; `None` for one that is not known.
fn filter(
    rules: Rules,
    other: SeccompAction,
    listed: SeccompAction,
) -> io::Result<Option<BpfProgram>> {
    let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else {
        return Ok(None);
    };
    let filter = SeccompFilter::new(rules, other, listed, arch).map_err(bad)?;
    BpfProgram::try_from(filter).map(Some).map_err(bad)
}

fn install(filter: Option<BpfProgram>) -> io::Result<()> {
    // All threads; a parser has one.
    filter.map_or(Ok(()), |f| {
        seccompiler::apply_filter_all_threads(&f).map_err(bad)
    })
}

/// The condition that argument `index` has none of `bits`.
fn without(index: u8, bits: i32) -> io::Result<Vec<SeccompRule>> {
    let mask = bits as u64;
    let none = SeccompCondition::new(
        index,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(mask),
        0,
    );
    let rule = SeccompRule::new(vec![none.map_err(bad)?]).map_err(bad)?;
    Ok(vec![rule])
}

/// Leaves this process its open descriptors, memory to work with and the way out: no files, network,
/// programs, threads, processes or signals to others, no executable memory. Whatever else it tries
/// fails with EPERM, so that a C library of another release that asks for something harmless works on.
pub fn parser() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    for (resource, limit) in [
        // What it parses is no business of core dumps.
        (Resource::Core, 0),
        (Resource::As, PARSER_MEMORY),
    ] {
        // Less than that may be set already, and cannot be raised.
        let set = getrlimit(resource);
        let limit = [Some(limit), set.current, set.maximum];
        let limit = limit.into_iter().flatten().min();
        setrlimit(
            resource,
            Rlimit {
                current: limit,
                maximum: limit,
            },
        )?;
    }
    files(&[], &[])?;
    let mut rules: Rules = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_recvfrom,
        libc::SYS_sendto,
        libc::SYS_close,
        libc::SYS_brk,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_futex,
        libc::SYS_sched_yield,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_gettimeofday,
        libc::SYS_getrandom,
        libc::SYS_getpid,
        libc::SYS_getppid,
        libc::SYS_gettid,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_restart_syscall,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ]
    .into_iter()
    .map(|call| (call, Vec::new()))
    .collect();
    rules.insert(libc::SYS_mmap, without(2, libc::PROT_EXEC)?);
    rules.insert(libc::SYS_mprotect, without(2, libc::PROT_EXEC)?);
    // `abort` sends a signal to its own thread.
    let own = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        u64::from(std::process::id()),
    );
    let own = SeccompRule::new(vec![own.map_err(bad)?]).map_err(bad)?;
    rules.insert(libc::SYS_tgkill, vec![own]);
    install(filter(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
    )?)
}

/// No sockets but those of this host, and no ring that could open one past the filter. For this process
/// and all it starts; needs no-new-privileges.
pub fn offline() -> io::Result<()> {
    let unix = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Ne,
        libc::AF_UNIX as u64,
    );
    let not_unix = SeccompRule::new(vec![unix.map_err(bad)?]).map_err(bad)?;
    let rules = [
        (libc::SYS_socket, vec![not_unix]),
        (libc::SYS_io_uring_setup, Vec::new()),
    ];
    install(filter(
        rules.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EACCES as u32),
    )?)
}

fn ruleset() -> io::Result<RulesetCreated> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(FILES))
        .and_then(Ruleset::create)
        .map_err(bad)
}

/// Files and folders out of reach but for these; those that do not exist are passed over. Whether the
/// kernel does that.
fn files(read: &[&Path], write: &[&Path]) -> io::Result<bool> {
    let status = ruleset()?
        .add_rules(path_beneath_rules(read, AccessFs::from_read(FILES)))
        .and_then(|r| r.add_rules(path_beneath_rules(write, AccessFs::from_all(FILES))))
        .and_then(RulesetCreated::restrict_self)
        .map_err(bad)?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// From now on this process, and all it starts, writes only below these paths, to devices and to what
/// is open already; it reads what it likes. Call it before there are other threads. Whether the kernel
/// does that.
pub fn writes_only(below: &[PathBuf]) -> io::Result<bool> {
    rustix::thread::set_no_new_privs(true)?;
    let mut write: Vec<&Path> = below.iter().map(PathBuf::as_path).collect();
    write.extend(["/dev", "/proc"].map(Path::new));
    files(&[Path::new("/")], &write)
}

/// What a tool started through the launcher may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confinement {
    offline: bool,
    /// `None`: any file.
    files: Option<Vec<(PathBuf, bool)>>,
}

impl Confinement {
    /// Everything but the network.
    pub fn offline() -> Self {
        Self {
            offline: true,
            files: None,
        }
    }

    /// No network, and no files but these and what programs are made of. The flag is whether it may
    /// be written.
    pub fn to_files(files: impl IntoIterator<Item = (PathBuf, bool)>) -> Self {
        Self {
            offline: true,
            files: Some(files.into_iter().collect()),
        }
    }

    /// As arguments of the launcher.
    pub(super) fn args(&self) -> Vec<OsString> {
        let mut args = Vec::new();
        if self.offline {
            args.push("offline".into());
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
        let file = match (bytes.strip_prefix(b"read="), bytes.strip_prefix(b"write=")) {
            (Some(file), _) => (path(file), false),
            (_, Some(file)) => (path(file), true),
            _ => {
                self.offline |= arg == "offline";
                return arg == "offline";
            }
        };
        self.files.get_or_insert_default().push(file);
        true
    }

    /// Confines this process, which is about to become `program`.
    pub(super) fn apply(&self, program: &Path) -> io::Result<()> {
        if let Some(named) = &self.files {
            let mut read: Vec<&Path> = SYSTEM.iter().map(Path::new).collect();
            // A program from elsewhere has its libraries beside it: /opt/qemu for /opt/qemu/bin/x.
            let home = program.parent().and_then(Path::parent);
            read.extend(home.filter(|home| home.parent().is_some()));
            read.extend(named.iter().filter(|f| !f.1).map(|f| f.0.as_path()));
            let mut write: Vec<&Path> = DEVICES.iter().map(Path::new).collect();
            write.extend(named.iter().filter(|f| f.1).map(|f| f.0.as_path()));
            files(&read, &write)?;
        }
        if self.offline {
            offline()?;
        }
        Ok(())
    }
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
        assert!(Confinement::default().args().is_empty());
        assert!(!back.add_arg(OsStr::new("--")) && !back.add_arg(OsStr::new("")));
    }
}
