//! Threads with one connection each, and the queue of their requests.
//!
//! A connection is opened when there is more to fetch than the present connections can begin, so a
//! quiet run has one. One more must also be useful ([`Limit`]). Requests in flight on a broken
//! connection are repeated on another, after growing pauses, up to `--retries` times. While others
//! work, a connection that cannot be opened costs nothing: servers limit how many they accept.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Ranges;
use super::error::{Result, WireError};
use super::limit::Limit;
use super::upstream::{Connection, Dial, Meter, RemoteFile, Wanted};
use super::url::Location;
use super::{Identity, Listed};

/// The first pause; each one is twice the previous one.
const PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// The attempts for the first connection: with the pauses about two seconds.
const FIRST_TRIES: u32 = 3;
/// The number of connections opened at a time: OpenSSH's server refuses some when ten are logging
/// in (`MaxStartups`).
const AT_ONCE: usize = 8;
/// The longest wait of a thread whose connection the server refuses.
const PARKED: Duration = Duration::from_secs(16);
/// The size from which a read may last as long as bytes arrive.
const LARGE: usize = 256 << 10;

/// A request to a thread with a connection.
#[derive(Debug, Clone)]
pub(super) enum Task {
    /// Nothing: checks whether there is a connection.
    Connect,
    Identify(Location),
    List(Location),
    Read(Wanted),
}

#[derive(Debug)]
pub(super) enum Output {
    Connected,
    Identity(Identity),
    Listed(Vec<Listed>),
    Bytes(Vec<u8>),
}

struct Job {
    task: Task,
    tries: u32,
    most: u32,
    answer: Sender<Result<Output>>,
    given_up: Arc<AtomicBool>,
}

impl Job {
    fn end(self, result: Result<Output>) {
        let _ = self.answer.send(result);
    }
}

struct Queue {
    urgent: VecDeque<Job>,
    /// Requests without a waiting reader.
    ahead: VecDeque<Job>,
    /// Connections being opened, and those of them that are not opened for one job.
    connecting: usize,
    free: usize,
    /// The number of connections to open before anything of this file is fetched.
    to_prepare: usize,
    prepared: Option<Arc<RemoteFile>>,
    limit: Limit,
    connected: usize,
    /// The number of idle ones among these.
    idle: usize,
    /// The number of broken connections.
    breaks: u64,
    ended: bool,
}

impl Queue {
    fn new(connections: usize) -> Self {
        Self {
            urgent: VecDeque::new(),
            ahead: VecDeque::new(),
            connecting: 0,
            free: 0,
            to_prepare: 0,
            prepared: None,
            limit: Limit::new(connections),
            connected: 0,
            idle: 0,
            breaks: 0,
            ended: false,
        }
    }

    /// Whether another connection is useful; existing and pending ones have precedence.
    fn wants_more(&mut self) -> bool {
        let is_wanted = self.to_prepare > 0 || self.length() > self.idle + self.free;
        self.connecting < AT_ONCE
            && is_wanted
            && self.limit.has_room(self.connected + self.connecting)
    }

    fn next(&mut self) -> Option<Job> {
        self.urgent.pop_front().or_else(|| self.ahead.pop_front())
    }

    fn first(&self) -> Option<&Job> {
        self.urgent.front().or_else(|| self.ahead.front())
    }

    fn length(&self) -> usize {
        self.urgent.len() + self.ahead.len()
    }
}

struct Shared {
    dial: Box<dyn Dial>,
    meter: Arc<Meter>,
    queue: Mutex<Queue>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads, which end when this is dropped.
pub(super) struct Pool {
    shared: Arc<Shared>,
    retries: u32,
    patience: Duration,
}

/// A pending request.
pub(super) struct Pending {
    answer: Receiver<Result<Output>>,
    given_up: Arc<AtomicBool>,
    meter: Arc<Meter>,
    patience: Duration,
    /// Whether it may last as long as bytes arrive.
    large: bool,
    /// Whether the reason of a failure is kept: the reader gets only an input error.
    blamed: bool,
}

impl Pool {
    pub(super) fn new(
        dial: Box<dyn Dial>,
        meter: Arc<Meter>,
        connections: u32,
        retries: u32,
        patience: Duration,
    ) -> std::io::Result<Self> {
        let connections = connections.clamp(1, 64);
        let shared = Arc::new(Shared {
            dial,
            meter,
            queue: Mutex::new(Queue::new(connections as usize)),
            wake: Condvar::new(),
        });
        for _ in 0..connections {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("connection".into())
                .spawn(move || Worker::new(shared).work())?;
        }
        Ok(Self {
            shared,
            retries,
            patience,
        })
    }

    pub(super) fn ask(&self, task: Task, urgent: bool) -> Pending {
        let (sender, answer) = mpsc::channel();
        let given_up = Arc::new(AtomicBool::new(false));
        let large = matches!(&task, Task::Read(wanted) if wanted.length > LARGE);
        let blamed = urgent && matches!(task, Task::Read(_));
        let most = match task {
            Task::Connect => FIRST_TRIES.min(self.retries),
            _ => self.retries,
        };
        let job = Job {
            task,
            tries: 0,
            most,
            answer: sender,
            given_up: given_up.clone(),
        };
        let mut queue = self.shared.lock();
        match urgent {
            true => queue.urgent.push_back(job),
            false => queue.ahead.push_back(job),
        }
        drop(queue);
        self.shared.wake.notify_all();
        Pending {
            answer,
            given_up,
            meter: self.shared.meter.clone(),
            patience: self.patience,
            large,
            blamed,
        }
    }

    /// Reads the dirty bitmaps of an export over a separate connection, with the usual retries.
    pub(super) fn dirty(&self, at: &Location) -> Result<Option<Ranges>> {
        let mut tries = 0;
        loop {
            match self.shared.dial.dirty(at) {
                Err(error) if error.is_passing() && tries < self.retries => {
                    self.shared.meter.note(&error);
                    tries += 1;
                    std::thread::sleep(pause(tries));
                }
                done => {
                    if tries > 0 && done.is_ok() {
                        self.shared.meter.settled();
                    }
                    return done;
                }
            }
        }
    }

    /// Opens as many connections as are useful for reading much of the file.
    pub(super) fn prepare(&self, target: &Arc<RemoteFile>) {
        if !self.shared.dial.may_prepare() {
            return;
        }
        let mut queue = self.shared.lock();
        let there = queue.connected + queue.connecting;
        queue.to_prepare = queue.limit.now().saturating_sub(there);
        queue.prepared = Some(target.clone());
        drop(queue);
        self.shared.wake.notify_all();
    }

    /// The size of one request when fetching ahead.
    pub(super) fn piece(&self) -> u64 {
        self.shared.dial.piece()
    }

    /// The number of bytes that may be fetched ahead.
    pub(super) fn ahead(&self) -> u64 {
        self.shared.dial.ahead()
    }

    /// Sends a request, and waits for the answer.
    pub(super) fn call(&self, task: Task) -> Result<Output> {
        self.ask(task, true).wait()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.wake.notify_all();
    }
}

impl Pending {
    /// Waits at most as long as the connection may be broken.
    pub(super) fn wait(&self) -> Result<Output> {
        let mut since = Instant::now();
        let mut fetched = self.meter.fetched();
        loop {
            let left = self.patience.saturating_sub(since.elapsed());
            match self.answer.recv_timeout(left) {
                Ok(Err(error)) => return Err(self.blaming(error)),
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Timeout) if self.large && self.meter.fetched() > fetched => {
                    fetched = self.meter.fetched();
                    since = Instant::now();
                }
                Err(_) => {
                    self.given_up.store(true, Ordering::Relaxed);
                    let waited = self.patience.as_secs();
                    let trouble = self.meter.status().trouble;
                    let error = trouble.unwrap_or_else(|| {
                        WireError::failed(
                            "the source",
                            format!("no answer within {waited} s"),
                            "see that the line and the server are up, and start again",
                        )
                    });
                    return Err(self.blaming(error));
                }
            }
        }
    }

    fn blaming(&self, error: WireError) -> WireError {
        if self.blamed {
            self.meter.lost(&error);
        }
        error
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
}

enum Taken {
    Job(Job),
    /// A connection has to be opened, while others work.
    Connect,
    /// The connection was idle while another broke: it has most likely broken too, and would cost
    /// an attempt.
    Doubt,
    /// Nothing to do besides the requests in flight.
    Nothing,
    End,
}

/// A thread and its connection.
struct Worker {
    shared: Arc<Shared>,
    connection: Option<Box<dyn Connection>>,
    under_way: BTreeMap<u64, Job>,
    token: u64,
    /// The value of [`Queue::breaks`] when the connection was last known to work.
    breaks: u64,
    /// Failures in a row.
    failures: u32,
    /// The reason why there is no connection, and the number of failed attempts in a row.
    refused: Option<WireError>,
    refusals: u32,
}

impl Worker {
    fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            connection: None,
            under_way: BTreeMap::new(),
            token: 0,
            breaks: 0,
            failures: 0,
            refused: None,
            refusals: 0,
        }
    }

    fn work(mut self) {
        loop {
            let depth = self.connection.as_ref().map_or(1, |c| c.depth());
            let taken = match self.under_way.len() < depth {
                true => self.take(),
                false => Taken::Nothing,
            };
            match taken {
                Taken::Job(job) if job.given_up.load(Ordering::Relaxed) => {
                    if self.connection.is_none() {
                        self.shared.lock().connecting -= 1;
                    }
                }
                Taken::Job(job) => self.begin(job),
                Taken::Connect => self.join_in(),
                Taken::Doubt => self.hang_up(),
                Taken::Nothing => self.receive(),
                Taken::End => return self.hang_up(),
            }
        }
    }

    /// The next job; waits for one if there is nothing in flight.
    fn take(&mut self) -> Taken {
        let connected = self.connection.is_some();
        let mut queue = self.shared.lock();
        loop {
            if queue.ended {
                return Taken::End;
            }
            let may = match queue.first() {
                Some(job) if !self.under_way.is_empty() => self.may_join(job),
                Some(_) if connected => true,
                _ => !connected && queue.wants_more(),
            };
            if may && !connected {
                queue.connecting += 1;
                queue.to_prepare = queue.to_prepare.saturating_sub(1);
                // The next job does not wait for the login.
                if queue.connected > 0 || queue.first().is_none() {
                    queue.free += 1;
                    return Taken::Connect;
                }
            }
            if may && connected && self.under_way.is_empty() && self.breaks != queue.breaks {
                return Taken::Doubt;
            }
            if may && let Some(job) = queue.next() {
                return Taken::Job(job);
            }
            if !self.under_way.is_empty() {
                return Taken::Nothing;
            }
            queue.idle += usize::from(connected);
            queue = self
                .shared
                .wake
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
            queue.idle -= usize::from(connected);
        }
    }

    /// Whether the job can be started while others are in flight.
    fn may_join(&self, job: &Job) -> bool {
        match (&job.task, &self.connection) {
            (Task::Read(wanted), Some(connection)) => connection.is_ready(wanted),
            _ => false,
        }
    }

    fn begin(&mut self, job: Job) {
        self.token += 1;
        let token = self.token;
        let Some(connection) = self.connect() else {
            return self.again(job);
        };
        let done = match &job.task {
            Task::Connect => Ok(Output::Connected),
            Task::Identify(at) => connection.identify(at).map(Output::Identity),
            Task::List(at) => connection.list(at).map(Output::Listed),
            Task::Read(wanted) => match connection.send(token, wanted) {
                Ok(()) => {
                    self.under_way.insert(token, job);
                    return;
                }
                Err(error) => Err(error),
            },
        };
        // Some servers answer nothing before a request for a file.
        if let Some(after) = connection.answered_in() {
            self.shared.lock().limit.answered(after);
        }
        match done {
            Err(error) if error.is_passing() => {
                self.hang_up_after(&error);
                self.retry(job, error);
            }
            done => self.end(job, done),
        }
    }

    fn end(&self, job: Job, result: Result<Output>) {
        if result.is_ok() && job.tries > 0 {
            self.shared.meter.settled();
        }
        job.end(result);
    }

    /// Opens a connection besides the working ones; if the server refuses it, it is tried again
    /// later.
    fn join_in(&mut self) {
        let target = self.shared.lock().prepared.clone();
        let made = self.connect().is_some_and(|connection| {
            let opened = target.map_or(Ok(()), |target| connection.prepare(&target));
            opened.is_ok()
        });
        self.shared.lock().free -= 1;
        // The next job may have been left to this one, or the next thread may log in now.
        self.shared.wake.notify_all();
        if !made {
            self.hang_up();
            self.park();
        }
    }

    fn park(&self) {
        let parked = Duration::from_secs(1) * (1 << self.refusals.saturating_sub(1).min(4));
        self.pause(parked.min(PARKED));
    }

    /// The connection, opened if there is none.
    fn connect(&mut self) -> Option<&mut Box<dyn Connection>> {
        if self.connection.is_none() {
            let dialled = self.shared.dial.dial();
            let mut queue = self.shared.lock();
            queue.connecting -= 1;
            match dialled {
                Ok(connection) => {
                    if let Some(after) = connection.answered_in() {
                        queue.limit.answered(after);
                    }
                    self.connection = Some(connection);
                    self.breaks = queue.breaks;
                    self.refusals = 0;
                    queue.connected += 1;
                }
                Err(error) => {
                    tracing::debug!("connecting: {error}");
                    self.refused = Some(error);
                    self.refusals += 1;
                }
            }
        }
        self.connection.as_mut()
    }
}

impl Worker {
    /// Requeues a job that could not start for lack of a connection.
    fn again(&mut self, mut job: Job) {
        let alone = self.shared.lock().connected == 0;
        let error = self.refused.take();
        let error =
            error.unwrap_or_else(|| WireError::failed("the source", "cannot be connected to", ""));
        if !alone {
            self.put_back(job);
            return self.park();
        }
        self.shared.meter.note(&error);
        if !error.is_passing() || job.tries >= job.most {
            return job.end(Err(error));
        }
        job.tries += 1;
        self.pause(pause(job.tries));
        self.put_back(job);
    }

    /// Repeats a failed request, unless it has failed too often.
    fn retry(&mut self, mut job: Job, error: WireError) {
        self.shared.meter.note(&error);
        if job.tries >= job.most {
            return job.end(Err(error));
        }
        tracing::debug!("again: {error}");
        job.tries += 1;
        self.put_back(job);
    }

    fn put_back(&self, job: Job) {
        if !job.given_up.load(Ordering::Relaxed) {
            self.shared.lock().urgent.push_front(job);
            self.shared.wake.notify_all();
        }
    }

    fn receive(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        match connection.receive() {
            Ok((token, result)) => {
                let Some(job) = self.under_way.remove(&token) else {
                    return;
                };
                match result {
                    Err(error) if error.is_passing() => {
                        self.failures += 1;
                        self.retry(job, error);
                        self.pause(pause(self.failures));
                    }
                    result => {
                        self.failures = 0;
                        self.breaks = self.shared.lock().breaks;
                        self.end(job, result.map(Output::Bytes));
                    }
                }
            }
            Err(error) => self.hang_up_after(&error),
        }
    }

    /// Closes a failed connection; its requests in flight are repeated elsewhere.
    fn hang_up_after(&mut self, error: &WireError) {
        self.hang_up();
        self.shared.lock().breaks += 1;
        self.failures += 1;
        for (_, job) in std::mem::take(&mut self.under_way) {
            match error.is_passing() {
                true => self.retry(job, error.clone()),
                false => job.end(Err(error.clone())),
            }
        }
        if self.failures > 1 {
            self.pause(pause(self.failures - 1));
        }
    }

    fn hang_up(&mut self) {
        if self.connection.take().is_some() {
            self.shared.lock().connected -= 1;
        }
    }

    /// Sleeps, but not beyond the end of the pool.
    fn pause(&self, time: Duration) {
        let start = Instant::now();
        let mut queue = self.shared.lock();
        while !queue.ended && start.elapsed() < time {
            let left = time.saturating_sub(start.elapsed());
            let woken = self.shared.wake.wait_timeout(queue, left);
            queue = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn pause(failures: u32) -> Duration {
    let factor = 1u32 << failures.saturating_sub(1).min(8);
    (PAUSE * factor).min(LONGEST_PAUSE)
}
