//! The system calls of a server that inherits its listening socket: `qemu-storage-daemon`.
//!
//! The filter is installed before the program is started, so it includes the calls of starting:
//! execution, loading of libraries, threads. It excludes sockets of its own, connections and
//! signals to others, processes, tracing, other users and namespaces, and mounts. It also excludes
//! kernel interfaces (`bpf`, `keyctl`, `io_uring`, `perf_event_open`, `userfaultfd`).
//!
//! Calls that are not listed fail with EPERM and the program continues. Libraries of another
//! release try various calls and work without them. `clone3` alone fails with ENOSYS: its flags
//! cannot be examined, and after that error C libraries use `clone`.

use std::io;

use seccompiler::{SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::seccomp::{Rules, bad, filter, install};

const COMMON: &[i64] = &[
    // Becoming the program and loading it.
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
    // Files, as far as landlock permits.
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
    // Its socket and the clients on it.
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
    // Its own process.
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

/// Calls that newer architectures have only in the forms above.
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

/// Additional calls of a script, which in the end starts the program: other processes and their
/// exits.
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

/// Flags that create namespaces.
const NEW: i32 = libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWUTS;

/// The condition that argument `index`, restricted to the mask, is `value`.
fn masked(index: u8, mask: u64, value: u64) -> io::Result<Vec<SeccompRule>> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value);
    let rule = SeccompRule::new(vec![condition.map_err(bad)?]).map_err(bad)?;
    Ok(vec![rule])
}

/// Calls in addition to the common ones for connecting to a host and resolving its name.
const DIAL: &[i64] = &[
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
];

/// Restricts this process to the calls above except starting programs. Its sockets are those of the
/// internet, of this host and of the kernel's routing table.
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

/// Allows these calls and no others. `clone3`, whose arguments a filter cannot examine, is reported
/// as missing, so that the C library uses `clone`.
fn install_only(mut rules: Rules) -> io::Result<()> {
    rules.insert(libc::SYS_clone3, Vec::new());
    install(filter(
        [(libc::SYS_clone3, Vec::new())].into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?)?;
    // Last, because it allows no other filter.
    install(filter(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
    )?)
}

/// Restricts this process, which is about to become a server, to the calls above, threads, and
/// signals to itself. A script may also start processes.
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
    // `abort`, and the end of a thread.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, masked(0, u64::from(u32::MAX), own)?);
    rules.insert(libc::SYS_kill, masked(0, u64::from(u32::MAX), own)?);
    install_only(rules)
}
