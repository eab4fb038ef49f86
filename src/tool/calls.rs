//! The system calls of a server that was given its listening socket: `qemu-storage-daemon`.
//!
//! The filter is installed before the program is started, so it has what starting takes too: being
//! executed, loading libraries, threads. What it does not have: sockets of its own, connections to
//! others, processes, tracing, other users and namespaces, mounts, kernel interfaces (`bpf`, `keyctl`,
//! `io_uring`, `perf_event_open`, `userfaultfd`), signals to others.
//!
//! What is not listed fails with EPERM and the program continues: libraries of another release ask for
//! this and that, and do without. `clone3` alone fails with ENOSYS: its flags cannot be looked at, and for
//! that answer C libraries use `clone`.

use std::io;

use seccompiler::{SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::seccomp::{Rules, bad, filter, install};

const COMMON: &[i64] = &[
    // To become the program and load it.
    libc::SYS_execve,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_mlock,
    libc::SYS_munlock,
    libc::SYS_membarrier,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_getrandom,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrusage,
    // Files that landlock lets it reach.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_copy_file_range,
    libc::SYS_fadvise64,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_statfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_umask,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_io_setup,
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
    libc::SYS_io_cancel,
    libc::SYS_io_destroy,
    // Its socket and who connects to it.
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_restart_syscall,
    // Itself.
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigsuspend,
    libc::SYS_sigaltstack,
    libc::SYS_signalfd4,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What newer architectures have only in the forms above.
#[cfg(target_arch = "x86_64")]
const OLD: &[i64] = &[
    libc::SYS_arch_prctl,
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_create,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd,
    libc::SYS_pipe,
    libc::SYS_dup2,
    libc::SYS_getrlimit,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[i64] = &[];

/// What a script takes besides, which starts the program in the end: other processes and their ends.
const SCRIPT: &[i64] = &[
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_chdir,
    libc::SYS_getpgid,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_getpgrp,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
];

/// Namespaces of its own.
const NEW: i32 = libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWUTS;

/// The one condition that argument `index`, as far as the mask has bits, is `value`.
fn masked(index: u8, mask: u64, value: u64) -> io::Result<Vec<SeccompRule>> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value);
    let rule = SeccompRule::new(vec![condition.map_err(bad)?]).map_err(bad)?;
    Ok(vec![rule])
}

/// Besides the common ones, what connecting to a host and looking up its name takes.
const DIAL: &[i64] = &[
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
];

/// Leaves this process the calls above but for starting programs, and sockets of the internet, of this host
/// and of the kernel's table of routes.
pub(super) fn dials() -> io::Result<()> {
    let calls = COMMON.iter().chain(OLD).chain(DIAL);
    let calls = calls.filter(|call| **call != libc::SYS_execve);
    let mut rules: Rules = calls.map(|&call| (call, Vec::new())).collect();
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, masked(0, thread, thread)?);
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, masked(0, u64::from(u32::MAX), own)?);
    let mut families = Vec::new();
    for family in [
        libc::AF_UNIX,
        libc::AF_INET,
        libc::AF_INET6,
        libc::AF_NETLINK,
    ] {
        families.extend(masked(0, u64::from(u32::MAX), family as u64)?);
    }
    rules.insert(libc::SYS_socket, families);
    install_only(rules)
}

/// Allows these calls and no others. `clone3`, whose arguments no filter sees, is said to be missing, so
/// that the C library takes `clone`.
fn install_only(mut rules: Rules) -> io::Result<()> {
    rules.insert(libc::SYS_clone3, Vec::new());
    install(filter(
        [(libc::SYS_clone3, Vec::new())].into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?)?;
    // Last: it allows no other filter.
    install(filter(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
    )?)
}

/// Leaves this process, which is about to become a server, the calls above, threads, and signals to
/// itself; a script also other processes.
pub(super) fn server(script: bool) -> io::Result<()> {
    let more = if script { SCRIPT } else { &[] };
    let calls = COMMON.iter().chain(OLD).chain(more);
    let mut rules: Rules = calls.map(|&call| (call, Vec::new())).collect();
    let clone = match script {
        true => masked(0, NEW as u64, 0)?,
        false => {
            let thread = libc::CLONE_THREAD as u64;
            masked(0, thread, thread)?
        }
    };
    rules.insert(libc::SYS_clone, clone);
    // `abort`, and what ends a thread.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, masked(0, u64::from(u32::MAX), own)?);
    rules.insert(libc::SYS_kill, masked(0, u64::from(u32::MAX), own)?);
    install_only(rules)
}
