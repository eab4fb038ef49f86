//! Filters of system calls: for a process that parses hostile bytes, and for one that opens no
//! sockets.
//!
//! On an architecture that `seccompiler` does not support, system calls stay available. Filters
//! survive `execve`, and none can be undone. Those of a server are in [`super::calls`].

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

pub(super) type Rules = BTreeMap<i64, Vec<SeccompRule>>;

pub(super) fn bad(e: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(e)
}

/// A filter for this architecture; `None` for an unsupported one.
pub(super) fn filter(
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

pub(super) fn install(filter: Option<BpfProgram>) -> io::Result<()> {
    // All threads; a parser has one.
    filter.map_or(Ok(()), |f| {
        seccompiler::apply_filter_all_threads(&f).map_err(bad)
    })
}

/// The condition that argument `index` has none of `bits`.
pub(super) fn without(index: u8, bits: i32) -> io::Result<Vec<SeccompRule>> {
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

pub(super) fn install_only(calls: Rules) -> io::Result<()> {
    install(filter(
        calls,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
    )?)
}

pub(super) fn condition(
    index: u8,
    len: SeccompCmpArgLen,
    op: SeccompCmpOp,
    value: u64,
) -> io::Result<SeccompCondition> {
    SeccompCondition::new(index, len, op, value).map_err(bad)
}

pub(super) fn all_of(conditions: Vec<SeccompCondition>) -> io::Result<Vec<SeccompRule>> {
    Ok(vec![SeccompRule::new(conditions).map_err(bad)?])
}

pub(super) fn parser_calls() -> io::Result<Rules> {
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
    let own = u64::from(std::process::id());
    let own = condition(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own)?;
    rules.insert(libc::SYS_tgkill, all_of(vec![own])?);
    Ok(rules)
}

/// Denies sockets except those of this host, and the ring that could open one past the filter.
/// Applies to this process and all its children; needs no-new-privileges.
pub fn offline() -> io::Result<()> {
    let unix = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Ne,
        libc::AF_UNIX as u64,
    );
    let not_unix = SeccompRule::new(vec![unix.map_err(bad)?]).map_err(bad)?;
    refuse_sockets(vec![not_unix])
}

/// Denies all sockets to this process and all its children.
pub(super) fn no_sockets() -> io::Result<()> {
    refuse_sockets(Vec::new())
}

/// Denies the sockets that match a rule (without rules: all of them), and io_uring.
fn refuse_sockets(which: Vec<SeccompRule>) -> io::Result<()> {
    let rules = [
        (libc::SYS_socket, which),
        (libc::SYS_io_uring_setup, Vec::new()),
    ];
    install(filter(
        rules.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EACCES as u32),
    )?)
}

/// The calls of a parser, and of opening one file by name: calls are distinguished by the address
/// of the name.
pub(super) fn editor_calls(file: &'static CStr) -> io::Result<Rules> {
    let name = file.as_ptr() as u64;
    let page = name | 0xfff;
    let is = |index, value| condition(index, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, value);
    let behind = || condition(0, SeccompCmpArgLen::Qword, SeccompCmpOp::Gt, page);
    let none_of = |index, bits: i32| {
        let op = SeccompCmpOp::MaskedEq(bits as u64);
        condition(index, SeccompCmpArgLen::Dword, op, 0)
    };
    let moves = libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let mut rules = parser_calls()?;
    rules.extend([
        (libc::SYS_openat, all_of(vec![is(1, name)?])?),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_open, all_of(vec![is(0, name)?])?),
        (
            libc::SYS_mmap,
            all_of(vec![is(0, 0)?, none_of(2, libc::PROT_EXEC)?])?,
        ),
        (
            libc::SYS_mprotect,
            all_of(vec![behind()?, none_of(2, libc::PROT_EXEC)?])?,
        ),
        (libc::SYS_munmap, all_of(vec![behind()?])?),
        (
            libc::SYS_mremap,
            all_of(vec![behind()?, none_of(3, moves)?])?,
        ),
        (libc::SYS_fcntl, all_of(vec![is(1, libc::F_SETFD as u64)?])?),
        (libc::SYS_fstat, Vec::new()),
        #[cfg(any(
            target_arch = "x86_64",
            target_arch = "aarch64",
            target_arch = "riscv64"
        ))]
        (libc::SYS_newfstatat, Vec::new()),
    ]);
    Ok(rules)
}
