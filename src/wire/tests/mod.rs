//! The parts together, in memory: connections answered by a test, behind hyper2kvm's NBD server,
//! before its NBD clients. Hostile servers are in the other files.

#[path = "../../../tests/support/hostile.rs"]
mod hostile;
mod http;
mod nbd;
mod real;
mod sftp;
#[path = "../../../tests/support/wire.rs"]
mod support;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::error::{Result, WireError};
use super::pool::Pool;
use super::service::{Service, cache_file};
use super::upstream::{Connection, Dial, Meter, Wanted};
use super::url::Location;
use super::{Access, Identity, Ranges, Wire, child, dial, server};
use crate::block::BlockRead;
use crate::disk::nbd::{Nbd, Patience};

const SIZE: u64 = 40 << 20;
const SOON: Patience = Patience {
    silence: Duration::from_secs(20),
    stopping: Duration::from_secs(20),
};

/// The contents of every file: each 512 bytes have a number of their own.
fn pattern(offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut at = 0;
    while at < length {
        let sector = (offset + at as u64) / 512;
        let next = (((sector + 1) * 512 - offset) as usize).min(length);
        bytes[at..next].fill((sector * 7 + sector / 256) as u8);
        at = next;
    }
    bytes
}

fn right(offset: u64, bytes: &[u8]) -> bool {
    bytes == pattern(offset, bytes.len())
}

/// The behaviour of a test's connections.
#[derive(Default)]
struct Script {
    /// Each requested piece, in order.
    asked: Mutex<Vec<(u64, usize)>>,
    dialled: AtomicU32,
    /// The number of connections that can be open at a time; 0 is any number.
    most: u32,
    open: AtomicU32,
    /// The duration of each login after the first, the number of pending logins, and its maximum.
    login: Duration,
    logging_in: AtomicU32,
    logged_in_at_once: AtomicU32,
    /// Whether they may be opened before they are needed.
    prepares: bool,
    /// The number of pieces after which every connection breaks; 0 is never.
    breaks_after: u32,
    /// The time before which nothing is answered.
    down: Mutex<Option<Instant>>,
    latency: Duration,
    size: AtomicU64,
}

struct Memory {
    script: Arc<Script>,
    meter: Arc<Meter>,
}

struct Scripted {
    script: Arc<Script>,
    meter: Arc<Meter>,
    under_way: Vec<(u64, Wanted, Instant)>,
    carried: u32,
}

impl Script {
    fn is_down(&self) -> bool {
        let down = self.down.lock().unwrap();
        down.is_some_and(|until| Instant::now() < until)
    }
}

fn passing(what: &str) -> WireError {
    WireError::failed("memory", what, "")
}

impl Dial for Memory {
    fn dial(&self) -> Result<Box<dyn Connection>> {
        if self.script.dialled.fetch_add(1, Ordering::SeqCst) > 0 {
            let now = 1 + self.script.logging_in.fetch_add(1, Ordering::SeqCst);
            let most = &self.script.logged_in_at_once;
            most.fetch_max(now, Ordering::SeqCst);
            std::thread::sleep(self.script.login);
            self.script.logging_in.fetch_sub(1, Ordering::SeqCst);
        }
        if self.script.is_down() {
            return Err(passing("the line is down"));
        }
        let open = self.script.open.fetch_add(1, Ordering::SeqCst);
        if self.script.most > 0 && open >= self.script.most {
            self.script.open.fetch_sub(1, Ordering::SeqCst);
            return Err(passing("too many connections"));
        }
        Ok(Box::new(Scripted {
            script: self.script.clone(),
            meter: self.meter.clone(),
            under_way: Vec::new(),
            carried: 0,
        }))
    }

    fn may_prepare(&self) -> bool {
        self.script.prepares
    }

    fn dirty(&self, _at: &Location) -> Result<Option<Ranges>> {
        match self.script.is_down() {
            true => Err(passing("the line is down")),
            false => Ok(Some(vec![(0, 512)])),
        }
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.script.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Connection for Scripted {
    fn identify(&mut self, _at: &Location) -> Result<Identity> {
        Ok(Identity {
            size: self.script.size.load(Ordering::SeqCst),
            modified: Some(1),
            etag: None,
        })
    }

    fn depth(&self) -> usize {
        2
    }

    fn send(&mut self, token: u64, wanted: &Wanted) -> Result<()> {
        let mut asked = self.script.asked.lock().unwrap();
        asked.push((wanted.offset, wanted.length));
        let due = Instant::now() + self.script.latency;
        self.under_way.push((token, wanted.clone(), due));
        Ok(())
    }

    fn receive(&mut self) -> Result<(u64, Result<Vec<u8>>)> {
        self.carried += 1;
        let breaks = self.script.breaks_after;
        if self.script.is_down() || (breaks > 0 && self.carried > breaks) {
            return Err(passing("the line broke"));
        }
        let (token, wanted, due) = self.under_way.remove(0);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        self.meter.count(wanted.length);
        Ok((token, Ok(pattern(wanted.offset, wanted.length))))
    }
}

/// A service with such connections, and a client of its NBD server.
struct Bench {
    service: Arc<Service>,
    script: Arc<Script>,
    socket: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(script: Script, connections: u32, retries: u32, patience: Duration) -> Self {
        script.size.store(SIZE, Ordering::SeqCst);
        let (script, meter) = (Arc::new(script), Arc::new(Meter::default()));
        let dial = Box::new(Memory {
            script: script.clone(),
            meter: meter.clone(),
        });
        let pool = Pool::new(dial, meter.clone(), connections, retries, patience).unwrap();
        let service = Arc::new(Service::new(pool, meter, cache_file().unwrap()));
        service.open(&Location::command("disk")).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let served = service.clone();
        std::thread::spawn(move || server::serve(&listener, &served));
        Self {
            service,
            script,
            socket,
            _dir: dir,
        }
    }

    fn easy(script: Script) -> Self {
        Self::new(script, 4, 10, Duration::from_secs(10))
    }

    fn client(&self) -> Nbd {
        let stream = UnixStream::connect(&self.socket).unwrap();
        Nbd::handshake(stream, "disk", SOON).unwrap()
    }

    fn fetched(&self) -> u64 {
        self.service.meter().fetched()
    }

    fn read(&self, client: &Nbd, offset: u64, length: usize) {
        let mut bytes = vec![0; length];
        client.read_at(offset, &mut bytes).unwrap();
        assert!(right(offset, &bytes), "{offset}+{length}");
    }
}

#[test]
fn hands_out_every_byte_once_and_widens_small_reads_to_sectors_only() {
    let bench = Bench::easy(Script::default());
    let client = bench.client();
    assert!(client.is_read_only());
    assert_eq!(client.size(), SIZE);
    for (offset, length, whole) in [
        (0, 512, 4096),
        // There already.
        (100, 1000, 4096),
        (4000, 200, 8192),
        (SIZE - 10, 10, 12288),
        (1 << 20, 3 << 20, 12288 + (3 << 20)),
        ((1 << 20) + 5, 70_000, 12288 + (3 << 20)),
    ] {
        bench.read(&client, offset, length);
        assert_eq!(bench.fetched(), whole, "{offset}+{length}");
    }
    for (offset, length) in [(SIZE, 1), (SIZE - 1, 2)] {
        assert!(client.read_at(offset, &mut vec![0; length]).is_err());
    }
    // One connection is enough for a quiet run, two if this host is busy; five are not needed.
    let dialled = || {
        let quiet = Bench::easy(Script::default());
        let client = quiet.client();
        for sector in 0..50 {
            quiet.read(&client, sector * 70_000, 512);
        }
        quiet.script.dialled.load(Ordering::SeqCst)
    };
    assert!((0..5).any(|_| dialled() <= 2));
}

#[test]
fn two_that_want_the_same_fetch_it_once() {
    let bench = Bench::easy(Script {
        latency: Duration::from_millis(100),
        ..Script::default()
    });
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| bench.read(&bench.client(), 8192, 100_000));
        }
    });
    assert_eq!(bench.fetched(), 102_400);
}

#[test]
fn a_large_read_goes_over_several_connections_at_once() {
    let bench = Bench::easy(Script {
        latency: Duration::from_millis(200),
        ..Script::default()
    });
    let client = bench.client();
    bench.read(&client, 0, 4096);
    let start = Instant::now();
    bench.read(&client, 1 << 20, 16 << 20);
    // In sequence: more than three seconds.
    assert!(
        start.elapsed() < Duration::from_millis(2000),
        "{:?}",
        start.elapsed()
    );
    assert!(bench.script.dialled.load(Ordering::SeqCst) > 1);
}

#[test]
fn what_is_wanted_does_not_wait_for_a_login() {
    let bench = Bench::easy(Script {
        latency: Duration::from_millis(10),
        login: Duration::from_secs(3),
        ..Script::default()
    });
    let start = Instant::now();
    bench.read(&bench.client(), 0, 24 << 20);
    let taken = start.elapsed();
    assert!(taken < Duration::from_secs(2), "{taken:?}");
    assert!(bench.script.dialled.load(Ordering::SeqCst) > 1);
}

#[test]
fn connections_are_made_ahead_and_not_all_at_once() {
    let prepared = |prepares: bool| {
        let script = Script {
            login: Duration::from_millis(50),
            prepares,
            ..Script::default()
        };
        let bench = Bench::new(script, 20, 0, Duration::from_secs(10));
        let at = Location::command("disk");
        bench.service.prepare(&at).unwrap();
        assert!(bench.service.prepare(&Location::command("other")).is_err());
        bench
    };
    let bench = prepared(true);
    let dialled = || bench.script.dialled.load(Ordering::SeqCst);
    let start = Instant::now();
    while dialled() < 20 || bench.script.logging_in.load(Ordering::SeqCst) > 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "{}", dialled());
        std::thread::sleep(Duration::from_millis(5));
    }
    let at_once = bench.script.logged_in_at_once.load(Ordering::SeqCst);
    assert!((2..10).contains(&at_once), "{at_once}");
    assert_eq!(bench.fetched(), 0);
    bench.service.prepare(&Location::command("disk")).unwrap();
    bench.read(&bench.client(), 0, 24 << 20);
    assert_eq!(dialled(), 20);
    // If a server closes idle ones, they are opened on demand.
    let other = prepared(false);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(other.script.dialled.load(Ordering::SeqCst), 1);
}

#[test]
fn a_last_sector_that_is_cut_short_is_followed_by_zeroes() {
    let bench = Bench::easy(Script::default());
    const LENGTH: u64 = SIZE - 412;
    bench.script.size.store(LENGTH, Ordering::SeqCst);
    bench.service.open(&Location::command("other")).unwrap();
    let stream = UnixStream::connect(&bench.socket).unwrap();
    let client = Nbd::handshake(stream, "other", SOON).unwrap();
    assert_eq!(client.size(), SIZE);
    for (offset, length) in [(LENGTH - 1000, 1412), (LENGTH - 100, 512), (LENGTH, 412)] {
        let mut bytes = vec![9; length];
        client.read_at(offset, &mut bytes).unwrap();
        let (there, after) = bytes.split_at((LENGTH - offset) as usize);
        assert!(right(offset, there) && after.iter().all(|b| *b == 0));
    }
}

#[test]
fn only_a_long_stream_is_read_ahead_of_and_by_little() {
    let bench = Bench::easy(Script::default());
    let client = bench.client();
    // A hive and its neighbours.
    for offset in [0, 3 << 20, 6 << 20] {
        bench.read(&client, offset, 2 << 20);
    }
    assert_eq!(bench.fetched(), 6 << 20);
    for piece in 0..32 {
        bench.read(&client, (8 + piece) << 20, 1 << 20);
    }
    let fetched = bench.fetched();
    assert!(fetched <= SIZE + (2 << 20), "{fetched}");
}

#[test]
fn what_is_announced_is_fetched_ahead_and_nothing_between() {
    let bench = Bench::easy(Script {
        latency: Duration::from_millis(20),
        ..Script::default()
    });
    let client = bench.client();
    let ranges: Vec<(u64, u64)> = (0..10).map(|n| (n * (4 << 20), 1 << 20)).collect();
    let at = Location::command("disk");
    bench.service.expect(&at, ranges.clone()).unwrap();
    for &(offset, length) in &ranges {
        bench.read(&client, offset, length as usize);
    }
    assert_eq!(bench.fetched(), 10 << 20);
    let asked = bench.script.asked.lock().unwrap().clone();
    let first = asked.iter().position(|(offset, _)| *offset == 12 << 20);
    assert!(first < Some(6), "{asked:?}");
    for outside in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (0, 0)] {
        assert!(bench.service.expect(&at, vec![outside]).is_err());
    }
}

#[test]
fn goes_on_when_every_connection_breaks_again_and_again() {
    let bench = Bench::easy(Script {
        breaks_after: 3,
        ..Script::default()
    });
    let client = bench.client();
    bench.read(&client, 0, SIZE as usize);
    assert!(bench.script.dialled.load(Ordering::SeqCst) > 4);
    // Nothing that had arrived was requested again, and a resolved failure is not blamed for later
    // ones.
    assert_eq!(bench.fetched(), SIZE);
    assert_eq!(bench.service.meter().status().trouble, None);
}

#[test]
fn a_server_that_takes_two_connections_is_read_over_two() {
    let bench = Bench::new(
        Script {
            most: 2,
            latency: Duration::from_millis(5),
            prepares: true,
            ..Script::default()
        },
        8,
        0,
        Duration::from_secs(10),
    );
    bench.service.prepare(&Location::command("disk")).unwrap();
    bench.read(&bench.client(), 0, 24 << 20);
}

#[test]
fn answers_eio_in_time_and_goes_on_when_the_line_is_back() {
    let bench = Bench::new(Script::default(), 2, 100, Duration::from_secs(1));
    let client = bench.client();
    bench.read(&client, 0, 4096);
    *bench.script.down.lock().unwrap() = Some(Instant::now() + Duration::from_secs(2));
    let start = Instant::now();
    let error = client.read_at(1 << 20, &mut [0; 4096]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    let waited = start.elapsed();
    let patience = Duration::from_millis(900)..Duration::from_secs(2);
    assert!(patience.contains(&waited), "{waited:?}");
    assert!(bench.service.meter().status().trouble.is_some());
    // The same client, with the same connection to hyper2kvm's server.
    std::thread::sleep(Duration::from_millis(1200));
    let start = Instant::now();
    while client.read_at(1 << 20, &mut [0; 4096]).is_err() {
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    bench.read(&client, 1 << 20, 4096);
}

#[test]
fn idle_connections_that_broke_with_another_cost_no_tries() {
    let script = Script {
        prepares: true,
        ..Script::default()
    };
    let bench = Bench::new(script, 8, 4, Duration::from_secs(10));
    let client = bench.client();
    bench.service.prepare(&Location::command("disk")).unwrap();
    let start = Instant::now();
    while bench.script.open.load(Ordering::SeqCst) < 8 {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(5));
    }
    let until = Instant::now() + Duration::from_secs(1);
    *bench.script.down.lock().unwrap() = Some(until);
    bench.read(&client, 0, 4096);
    assert!(Instant::now() >= until);
}

#[test]
fn retries_have_a_limit() {
    let script = Script {
        breaks_after: 1,
        ..Script::default()
    };
    let bench = Bench::new(script, 1, 2, Duration::from_secs(10));
    let client = bench.client();
    bench.read(&client, 0, 4096);
    *bench.script.down.lock().unwrap() = Some(Instant::now() + Duration::from_secs(30));
    let before = bench.script.dialled.load(Ordering::SeqCst);
    let start = Instant::now();
    assert!(client.read_at(1 << 20, &mut [0; 4096]).is_err());
    assert!(start.elapsed() < Duration::from_secs(5));
    let tries = bench.script.dialled.load(Ordering::SeqCst) - before;
    assert!((1..=4).contains(&tries), "{tries}");
}

#[test]
fn dirty_bitmaps_are_asked_for_until_the_line_is_back() {
    let down = |retries| {
        let bench = Bench::new(Script::default(), 1, retries, Duration::from_secs(5));
        let until = Instant::now() + Duration::from_millis(300);
        *bench.script.down.lock().unwrap() = Some(until);
        bench.service.dirty(&Location::command("disk"))
    };
    assert_eq!(down(3).unwrap(), Some(vec![(0, 512)]));
    assert!(down(0).unwrap_err().to_string().contains("down"));
}

#[test]
fn a_file_that_changed_is_not_opened_again() {
    let bench = Bench::easy(Script::default());
    let at = Location::command("disk");
    bench.service.open(&at).unwrap();
    bench.script.size.store(SIZE + 512, Ordering::SeqCst);
    let error = bench.service.open(&at).err().unwrap();
    assert!(matches!(error, WireError::Changed { .. }), "{error}");
    assert!(
        error.to_string().contains(&(SIZE + 512).to_string()),
        "{error}"
    );
}

/// hyper2kvm's server, read by its client for foreign servers, through the handle that others use.
#[test]
fn our_client_reads_our_server() {
    let bench = Bench::easy(Script::default());
    let url = format!("nbd+unix:///disk?socket={}", bench.socket.display());
    let at = Location::parse(&url).unwrap().unwrap();
    let wire = Wire::connect(&at, &Access::default()).unwrap();
    let remote = wire.open(&at).unwrap();
    assert_eq!((remote.size, remote.export.as_str()), (SIZE, "disk"));
    let stream = UnixStream::connect(&remote.socket).unwrap();
    let client = Nbd::handshake(stream, &remote.export, SOON).unwrap();
    for (offset, length) in [(0, 5000), (SIZE - 3, 3), (12345, 9 << 20)] {
        bench.read(&client, offset, length);
    }
    assert!(remote.check_unchanged().is_ok());
    assert!(wire.fetched() >= 9 << 20);
    let socket = remote.socket.clone();
    let directory = socket.parent().unwrap().to_owned();
    assert!(matches!(wire.list(&at), Err(WireError::CannotList { .. })));
    let none = at.with_path("other");
    assert!(wire.open(&none).unwrap_err().is_not_found());
    let small = wire.read_whole(&at, 1 << 20).unwrap_err();
    assert!(
        matches!(small, WireError::TooLarge { size: SIZE, .. }),
        "{small}"
    );
    bench.script.size.store(SIZE * 2, Ordering::SeqCst);
    drop((remote, wire));
    assert!(
        !directory.exists(),
        "the private directory is gone with the handle"
    );
}

#[test]
fn hostile_clients_get_no_memory_and_no_answer() {
    let bench = Bench::easy(Script::default());
    let talk = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(&bench.socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer.len()
    };
    let option = |kind: u32, length: u32, data: &[u8]| {
        let mut bytes = 3u32.to_be_bytes().to_vec();
        bytes.extend(b"IHAVEOPT");
        bytes.extend(kind.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(data);
        bytes
    };
    for (bytes, answered) in [
        (vec![], 18),
        (vec![0xff; 100], 18),
        // An option of 4 GiB.
        (option(7, u32::MAX, b"x"), 18),
        // A name that is longer than its option.
        (option(7, 6, &[0xff, 0xff, 0xff, 0xff, 0, 0]), 18 + 20 + 27),
        (option(99, 0, b""), 18 + 20),
        (option(1, 4, b"nope"), 18),
        (option(3, 0, b""), 18 + 20 + 10),
        (option(2, 0, b""), 18 + 20),
    ] {
        assert_eq!(talk(&bytes), answered, "{bytes:?}");
    }
    // Reads of 4 GiB, writes, and invalid data after a valid greeting.
    let mut good = option(1, 4, b"disk");
    let request = |kind: u16, offset: u64, length: u32| {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(kind.to_be_bytes());
        bytes.extend([7; 8]);
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    };
    good.extend(request(0, 0, u32::MAX));
    good.extend(request(0, u64::MAX, 1));
    good.extend(request(4, 0, 512));
    good.extend(request(1, 0, 3));
    good.extend(b"abc");
    good.extend(request(99, 0, 0));
    good.extend([0; 28]);
    assert_eq!(talk(&good), 18 + 10 + 5 * 16);
    bench.read(&bench.client(), 0, 512);
}

#[test]
fn commands_are_split_and_never_expanded() {
    for (command, want) in [
        (
            "nbdkit -s file a.img",
            vec!["nbdkit", "-s", "file", "a.img"],
        ),
        ("a 'b c' \"d e\" f\\ g", vec!["a", "b c", "d e", "f g"]),
        (
            "a $HOME `id` * ~ ;b >c",
            vec!["a", "$HOME", "`id`", "*", "~", ";b", ">c"],
        ),
    ] {
        assert_eq!(dial::words(command).unwrap(), want);
    }
    for bad in ["", "  ", "a 'b"] {
        assert_eq!(dial::words(bad).unwrap_err().kind().code(), 2, "{bad:?}");
    }
}

#[test]
fn a_command_is_a_source() {
    let Some(nbdkit) = crate::tool::find("nbdkit") else {
        return;
    };
    let access = Access {
        source_command: Some(format!("{} -s pattern 5M", nbdkit.display())),
        ..Access::default()
    };
    let at = Location::command("vm");
    let wire = Wire::connect(&at, &access).unwrap();
    assert_eq!(wire.open(&at).unwrap().size, 5 << 20);
    let bytes = wire.read_whole(&at, 5 << 20).unwrap();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    assert!((0..5 << 20).step_by(8).all(|at| word(at) == at as u64));
    let access = Access {
        source_command: Some("sh -c 'echo no licence >&2; exit 3'".into()),
        retries: 1,
        ..Access::default()
    };
    let error = Wire::connect(&at, &access).unwrap_err();
    assert!(error.to_string().contains("no licence"), "{error}");
    assert!(error.hint().is_some());
    let access = Access {
        source_command: Some("/no/such/reader x".into()),
        ..Access::default()
    };
    assert_eq!(Wire::connect(&at, &access).unwrap_err().kind().code(), 5);
}

#[test]
fn a_child_that_hangs_up_is_an_error_with_its_server() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(ours);
    // The parent is gone: the child's side ends too.
    assert!(child::converse(theirs, child::Confined::No).is_ok());
}
