//! Determines how many connections to a server are useful.
//!
//! A distant server needs more of them, because they wait in parallel. Each moves at most the
//! amount that one CPU encrypts, and more connections cost time if CPUs are busy. So another one is
//! opened only while CPUs are idle: then the line or the server is the bottleneck.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// For each unit of this response time, one more connection is opened immediately. A client of
/// OpenSSH handles 2 MiB per round trip, so that is 500 MiB/s.
const FAR: Duration = Duration::from_millis(4);
/// The shortest and the longest observation of CPUs before another connection.
const WATCHED: Duration = Duration::from_millis(250);
const STALE: Duration = Duration::from_secs(2);
/// CPUs count as idle if they are for one part in this many of the time.
const IDLE_PART: u64 = 4;

/// The limit of connections.
#[derive(Debug)]
pub(super) struct Limit {
    allowed: usize,
    now: usize,
    processors: Option<Processors>,
}

impl Limit {
    pub(super) fn new(allowed: usize) -> Self {
        Self {
            allowed,
            now: allowed,
            processors: None,
        }
    }

    /// Records the response time of the server.
    pub(super) fn answered(&mut self, after: Duration) {
        let here = std::thread::available_parallelism().map_or(1, |n| n.get());
        let far = usize::try_from(after.as_millis() / FAR.as_millis()).unwrap_or(self.allowed);
        // If CPUs cannot be observed, the user's number counts.
        if self.processors.is_none()
            && let Ok(processors) = Processors::new()
        {
            self.processors = Some(processors);
            let far = far.saturating_add(1);
            self.now = self.allowed.min(far.max(here).max(2));
        }
    }

    /// The present limit.
    pub(super) fn now(&self) -> usize {
        self.now
    }

    /// Whether one more is useful besides `connections`, while there is more to fetch.
    pub(super) fn has_room(&mut self, connections: usize) -> bool {
        if connections >= self.now
            && self.now < self.allowed
            && self.processors.as_mut().is_some_and(Processors::are_idle)
        {
            self.now += 1;
        }
        connections < self.now
    }
}

/// The CPU times of this host.
#[derive(Debug)]
struct Processors {
    stat: File,
    since: Instant,
    then: Times,
}

/// The times of all CPUs since the start of the host, in ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Times {
    idle: u64,
    all: u64,
}

impl Processors {
    fn new() -> io::Result<Self> {
        let stat = File::open("/proc/stat")?;
        Ok(Self {
            then: Times::read(&stat)?,
            since: Instant::now(),
            stat,
        })
    }

    /// Whether they were idle since the last call. `false` if that is too short or too long ago.
    fn are_idle(&mut self) -> bool {
        let watched = self.since.elapsed();
        if watched < WATCHED {
            return false;
        }
        let Ok(now) = Times::read(&self.stat) else {
            return true;
        };
        let then = std::mem::replace(&mut self.then, now);
        self.since = Instant::now();
        watched < STALE && now.idle_since(then)
    }
}

impl Times {
    fn read(stat: &File) -> io::Result<Self> {
        let mut bytes = [0; 256];
        let read = stat.read_at(&mut bytes, 0)?;
        Self::parse(&String::from_utf8_lossy(&bytes[..read]))
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Parses the first line: `cpu`, then user, nice, system, idle and further values.
    fn parse(stat: &str) -> Option<Self> {
        let times = stat.lines().next()?.strip_prefix("cpu ")?;
        let times: Vec<u64> = times
            .split_whitespace()
            .map(|ticks| ticks.parse().ok())
            .collect::<Option<_>>()?;
        Some(Self {
            idle: *times.get(3)?,
            all: times
                .iter()
                .fold(0, |sum, ticks| sum.saturating_add(*ticks)),
        })
    }

    fn idle_since(self, then: Self) -> bool {
        let all = self.all.saturating_sub(then.all);
        let idle = self.idle.saturating_sub(then.idle);
        all > 0 && idle.saturating_mul(IDLE_PART) >= all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distant_server_is_read_over_all_connections() {
        let mut limit = Limit::new(8);
        assert!(
            limit.has_room(7) && !limit.has_room(8),
            "before it answered"
        );
        limit.answered(Duration::from_millis(60));
        assert!(limit.has_room(7) && !limit.has_room(8));
        let mut none = Limit::new(8);
        none.answered(Duration::MAX);
        assert!(none.has_room(7) && !none.has_room(8));
    }

    #[test]
    fn a_near_one_over_as_many_as_processors_until_these_are_idle() {
        let here = std::thread::available_parallelism().unwrap().get().max(2);
        let mut limit = Limit::new(here + 2);
        limit.answered(Duration::from_micros(300));
        assert!(limit.has_room(here - 1));
        // Just observed: the load of the CPUs is still unknown.
        assert!(!limit.has_room(here));
        let idle = |limit: &mut Limit| {
            let processors = limit.processors.as_mut().unwrap();
            processors.since = Instant::now() - 2 * WATCHED;
            processors.then = Times { idle: 0, all: 0 };
            // As if the CPUs had been idle so far.
            let now = Times::read(&processors.stat).unwrap();
            processors.then.all = now.all - now.idle;
            limit.has_room(here)
        };
        assert!(idle(&mut limit));
        assert!(!limit.has_room(here + 1), "one at a time");
        let mut few = Limit::new(1);
        few.answered(Duration::from_micros(300));
        assert!(few.has_room(0) && !few.has_room(1));
    }

    #[test]
    fn the_time_of_processors() {
        let stat = "cpu  10 0 20 60 5 0 1 4 0 0\ncpu0 1 2 3 4\n";
        let then = Times::parse(stat).unwrap();
        assert_eq!(then, Times { idle: 60, all: 100 });
        let after = |idle: u64, all: u64| Times {
            idle: 60 + idle,
            all: 100 + all,
        };
        assert!(after(10, 40).idle_since(then) && !after(9, 40).idle_since(then));
        assert!(!then.idle_since(then));
        for bad in ["", "cpu0 1 2 3 4", "cpu  1 2 x 4", "cpu  1 2"] {
            assert_eq!(Times::parse(bad), None, "{bad}");
        }
        assert!(Processors::new().is_ok_and(|now| now.then.all >= now.then.idle));
    }
}
