//! [`Pace`]: a limit of bytes per second that threads and processes share.
//!
//! They share one number: the time at which the line is free again, in nanoseconds of the monotonic
//! clock. A thread that wants to move bytes adds their time to it and waits for its turn. A process
//! that dies while it waits costs no more than its turn. Between processes the number is in an
//! unnamed file that they inherit, protected by a record lock.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::time::{ClockId, clock_gettime};

/// The interval at which a wait checks the flags that end it.
const TICK: Duration = Duration::from_millis(50);
/// The most that is moved at once after a pause.
const BURST: Duration = Duration::from_millis(100);

/// A limit in bytes per second. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    rate: u64,
    free_at: Arc<Mutex<u64>>,
    /// The number shared with other processes.
    shared: Option<Arc<File>>,
}

impl Pace {
    /// The environment variable that names the file of a shared pace.
    pub(crate) const VARIABLE: &str = "HYPER2KVM_PACE";

    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self {
            rate: bytes_per_second.max(1),
            free_at: Arc::default(),
            shared: None,
        }
    }

    /// Bytes per second.
    pub(crate) fn rate(&self) -> u64 {
        self.rate
    }

    /// The same limit, shared with every process that has this file open; it is made by
    /// [`Pace::shareable`].
    pub(crate) fn with(mut self, shared: File) -> Self {
        self.shared = Some(Arc::new(shared));
        self
    }

    /// The limit of this process, shared with all that have inherited [`Pace::VARIABLE`].
    pub(crate) fn of_this_process(bytes_per_second: u64) -> io::Result<Self> {
        let pace = Self::new(bytes_per_second);
        let Some(name) = std::env::var_os(Self::VARIABLE) else {
            return Ok(pace);
        };
        Ok(pace.with(File::options().read(true).write(true).open(name)?))
    }

    /// A file without a name through which processes share a pace.
    pub(crate) fn shareable() -> io::Result<File> {
        let file = rustix::fs::memfd_create("pace", rustix::fs::MemfdFlags::CLOEXEC)?;
        let file = File::from(file);
        file.write_all_at(&0u64.to_le_bytes(), 0)?;
        Ok(file)
    }

    /// Waits until `bytes` more may be moved. `false` if `ended` returned true before.
    pub(crate) fn take(&self, bytes: u64, ended: &dyn Fn() -> bool) -> io::Result<bool> {
        let turn = self.turn(bytes)?;
        loop {
            if ended() {
                return Ok(false);
            }
            let left = Duration::from_nanos(turn.saturating_sub(now()));
            if left.is_zero() {
                return Ok(true);
            }
            std::thread::sleep(left.min(TICK));
        }
    }

    /// The time at which so many bytes may be moved.
    fn turn(&self, bytes: u64) -> io::Result<u64> {
        let cost = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate);
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = &self.shared else {
            let turn = turn_after(*free_at);
            *free_at = turn.saturating_add(cost);
            return Ok(turn);
        };
        // A lock of this process: the mutex separates its threads.
        fcntl_lock(file, FlockOperation::LockExclusive)?;
        let mut bytes = [0; 8];
        let turn = file.read_exact_at(&mut bytes, 0).and_then(|()| {
            let turn = turn_after(u64::from_le_bytes(bytes));
            file.write_all_at(&turn.saturating_add(cost).to_le_bytes(), 0)?;
            Ok(turn)
        });
        fcntl_lock(file, FlockOperation::Unlock)?;
        turn
    }
}

fn turn_after(free_at: u64) -> u64 {
    let earliest = now().saturating_sub(u64::try_from(BURST.as_nanos()).unwrap_or(0));
    free_at.max(earliest)
}

fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let (seconds, nanos) = (time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned());
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// Takes 40 MiB in pieces on several threads, and returns the seconds.
    fn take(paces: &[Pace]) -> f64 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for pace in paces {
                scope.spawn(|| {
                    for _ in 0..(40 / paces.len()) {
                        assert!(pace.take(1 << 20, &|| false).unwrap());
                    }
                });
            }
        });
        start.elapsed().as_secs_f64()
    }

    #[test]
    fn the_sum_of_all_keeps_to_the_limit() {
        let one = Pace::new(100 << 20);
        let file = Pace::shareable().unwrap();
        let other = || {
            let path = crate::tool::pass::name(&file);
            let again = File::options().read(true).write(true).open(path).unwrap();
            Pace::new(100 << 20).with(again)
        };
        for paces in [
            vec![one.clone(), one.clone(), one.clone(), one],
            vec![Pace::new(100 << 20)],
            // As in one process, whose threads share the mutex.
            {
                let shared = other();
                vec![shared.clone(), shared]
            },
        ] {
            let seconds = take(&paces);
            assert!((0.28..0.6).contains(&seconds), "{seconds}");
        }
    }

    #[test]
    fn a_wait_ends_when_it_is_asked_to() {
        let pace = Pace::new(1);
        assert!(pace.take(1 << 30, &|| false).unwrap(), "the first is free");
        let start = Instant::now();
        let asked = || start.elapsed() > Duration::from_millis(120);
        assert!(!pace.take(1, &asked).unwrap());
        assert!(start.elapsed() < Duration::from_secs(2));
    }
}
