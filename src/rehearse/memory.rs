//! Computes how many VMs fit in the memory of this host at a time.

use std::fs;

/// The memory of QEMU in addition to that of the VM.
const OVERHEAD_MIB: u64 = 256;
/// The memory reserved for the host: at least so much, and this fraction.
const RESERVE_MIB: u64 = 512;
const RESERVE_PART: u64 = 20;

/// The memory of one rehearsal.
pub(crate) fn need_mib(memory_mib: u64) -> u64 {
    memory_mib.saturating_add(OVERHEAD_MIB)
}

/// The memory available for VMs at present; `None` if the host does not report it.
pub(crate) fn free_mib() -> Option<u64> {
    free(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn free(meminfo: &str) -> Option<u64> {
    let mib = |name: &str| {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(name))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(kib / 1024)
    };
    let reserve = (mib("MemTotal:")? / RESERVE_PART).max(RESERVE_MIB);
    Some(mib("MemAvailable:")?.saturating_sub(reserve))
}

/// Whether one more VM may start. `running` is the memory of all running VMs, `at_start` what was
/// free before the first, `now` what is free. A single VM may always start.
pub(crate) fn fits(need: u64, running: u64, at_start: u64, now: u64) -> bool {
    running == 0 || (running.saturating_add(need) <= at_start && need <= now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_keeps_its_share() {
        let text = |total: u64, available: u64| {
            format!("MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n")
        };
        assert_eq!(free(&text(64 << 20, 32 << 20)), Some(32768 - 65536 / 20));
        assert_eq!(free(&text(4 << 20, 2 << 20)), Some(2048 - 512));
        assert_eq!(free(&text(1 << 20, 100 << 10)), Some(0));
        assert_eq!(free("MemTotal: 5 kB\n"), None);
        assert!(free_mib().is_some());
    }

    #[test]
    fn as_many_as_fit_and_always_one() {
        // 10 GiB free: two VMs of 4 GiB, no third.
        let need = need_mib(4096);
        assert!(fits(need, 0, 10240, 10240));
        assert!(fits(need, need, 10240, 8000));
        assert!(!fits(need, 2 * need, 10240, 4000));
        // The first has not touched its memory yet, but it counts.
        assert!(!fits(need, 2 * need, 10240, 10240));
        // Others took the memory in the meantime.
        assert!(!fits(need, need, 10240, 1000));
        assert!(fits(need_mib(1 << 20), 0, 10240, 10240), "alone");
    }
}
