//! hyper2kvm's own NBD server: read-only, on a Unix socket, with an export for every open file.
//!
//! Fixed newstyle handshake; `GO`, `INFO`, `LIST`, `EXPORT_NAME` and `ABORT`; simple replies. Any
//! number of connections, and any number of requests in flight on each; replies are sent as they
//! become ready. Its clients are QEMU and this program, but they are not trusted: lengths are
//! limited before anything is allocated.
//!
//! Specification: NetworkBlockDevice/nbd `doc/proto.md`.

use std::collections::VecDeque;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::service::{Opened, Service};
use crate::wire::nbd_protocol::{
    CMD_DISC, CMD_FLUSH, CMD_READ, FIXED_NEWSTYLE, INFO_EXPORT, INIT_MAGIC, NO_ZEROES, OPT_GO,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, REP_ACK, REP_INFO, REPLY_MAGIC, REQUEST_MAGIC,
};

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const REP_ERROR_UNSUPPORTED: u32 = (1 << 31) + 1;
const REP_ERROR_POLICY: u32 = (1 << 31) + 2;
const REP_ERROR_INVALID: u32 = (1 << 31) + 3;
const REP_ERROR_UNKNOWN: u32 = (1 << 31) + 6;
const INFO_BLOCK_SIZE: u16 = 3;

/// Flags are present; read-only; several connections see the same data.
const EXPORT_FLAGS: u16 = 1 | 1 << 1 | 1 << 8;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// The largest request that the protocol allows without an agreement.
const MAX_READ: u32 = 32 << 20;
/// The announced block sizes.
const BLOCK_SIZES: [u32; 3] = [1, 64 << 10, 8 << 20];
const MAX_OPTION: u32 = 16 << 10;
/// Files are padded with zeroes to a multiple of this: QEMU reads whole sectors, and would wait for
/// the rest of a shorter last one.
const UNIT: u64 = 512;
/// Requests of one connection that are processed at a time.
const HANDLERS: usize = 16;
/// The limit of all replies that are not sent yet; a larger one is sent alone.
const MEMORY: usize = 32 << 20;
/// Clients at a time.
const MAX_CLIENTS: usize = 64;

/// Accepts connections until the socket is closed.
pub(super) fn serve(listener: &UnixListener, service: &Arc<Service>) {
    let memory = Arc::new(Budget::new(MEMORY));
    let clients = Arc::new(());
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // Out of descriptors, temporarily.
            std::thread::sleep(std::time::Duration::from_millis(50));
            continue;
        };
        if Arc::strong_count(&clients) > MAX_CLIENTS {
            continue;
        }
        let (service, memory, guard) = (service.clone(), memory.clone(), clients.clone());
        let client = move || {
            let _guard = guard;
            let _ = Client::new(stream, service, memory).and_then(Client::run);
        };
        let _ = std::thread::Builder::new()
            .name("nbd-client".into())
            .spawn(client);
    }
}

/// A budget of memory, returned after use.
struct Budget {
    left: Mutex<usize>,
    whole: usize,
    back: Condvar,
}

impl Budget {
    fn new(whole: usize) -> Self {
        Self {
            left: Mutex::new(whole),
            whole,
            back: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, bytes: usize) -> Loan<'_> {
        let bytes = bytes.min(self.whole);
        let mut left = self.lock();
        while *left < bytes {
            let woken = self.back.wait(left);
            left = woken.unwrap_or_else(PoisonError::into_inner);
        }
        *left -= bytes;
        Loan {
            budget: self,
            bytes,
        }
    }
}

struct Loan<'b> {
    budget: &'b Budget,
    bytes: usize,
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        *self.budget.lock() += self.bytes;
        self.budget.back.notify_all();
    }
}

struct Client {
    input: BufReader<UnixStream>,
    output: UnixStream,
    service: Arc<Service>,
    memory: Arc<Budget>,
    no_zeroes: bool,
}

fn exported(file: &Opened) -> u64 {
    (file.target.identity.size.div_ceil(UNIT)).saturating_mul(UNIT)
}

/// The result of an option.
enum Haggled {
    More,
    Export(Arc<Opened>),
    End,
}

impl Client {
    fn new(stream: UnixStream, service: Arc<Service>, memory: Arc<Budget>) -> io::Result<Self> {
        Ok(Self {
            output: stream.try_clone()?,
            input: BufReader::new(stream),
            service,
            memory,
            no_zeroes: false,
        })
    }

    fn run(mut self) -> io::Result<()> {
        let mut greeting = INIT_MAGIC.to_vec();
        greeting.extend(OPTION_MAGIC);
        greeting.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        self.output.write_all(&greeting)?;
        let flags = u32::from_be_bytes(self.array()?);
        self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Ok(());
        }
        loop {
            match self.option()? {
                Haggled::More => {}
                Haggled::Export(file) => return self.transmit(&file),
                Haggled::End => return Ok(()),
            }
        }
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn option(&mut self) -> io::Result<Haggled> {
        let magic: [u8; 8] = self.array()?;
        let option = u32::from_be_bytes(self.array()?);
        let length = u32::from_be_bytes(self.array()?);
        if &magic != OPTION_MAGIC || length > MAX_OPTION {
            return Ok(Haggled::End);
        }
        let mut data = vec![0; length as usize];
        self.input.read_exact(&mut data)?;
        match option {
            OPT_EXPORT_NAME => self.export_name(&data),
            OPT_ABORT => {
                self.reply(option, REP_ACK, &[])?;
                Ok(Haggled::End)
            }
            OPT_GO | OPT_INFO => self.go(option, &data),
            // Names depend on the files that were opened.
            OPT_LIST => self.reply(option, REP_ERROR_POLICY, b"not listed"),
            _ => self.reply(option, REP_ERROR_UNSUPPORTED, &[]),
        }
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<Haggled> {
        let mut message = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend(kind.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.output.write_all(&message)?;
        Ok(Haggled::More)
    }

    fn named(&self, name: &[u8]) -> Option<Arc<Opened>> {
        self.service.file(str::from_utf8(name).ok()?)
    }

    fn export_name(&mut self, name: &[u8]) -> io::Result<Haggled> {
        // There is no answer for an unknown name.
        let Some(file) = self.named(name) else {
            return Ok(Haggled::End);
        };
        let mut message = exported(&file).to_be_bytes().to_vec();
        message.extend(EXPORT_FLAGS.to_be_bytes());
        if !self.no_zeroes {
            message.extend([0; 124]);
        }
        self.output.write_all(&message)?;
        Ok(Haggled::Export(file))
    }

    fn go(&mut self, option: u32, data: &[u8]) -> io::Result<Haggled> {
        let parsed = data.split_first_chunk::<4>().and_then(|(length, rest)| {
            let length = u32::from_be_bytes(*length) as usize;
            let (name, rest) = rest.split_at_checked(length)?;
            let (count, asked) = rest.split_first_chunk::<2>()?;
            (asked.len() == 2 * usize::from(u16::from_be_bytes(*count))).then_some((name, asked))
        });
        let Some((name, asked)) = parsed else {
            return self.reply(option, REP_ERROR_INVALID, b"not a request for an export");
        };
        let Some(file) = self.named(name) else {
            return self.reply(option, REP_ERROR_UNKNOWN, b"no such export");
        };
        let mut info = INFO_EXPORT.to_be_bytes().to_vec();
        info.extend(exported(&file).to_be_bytes());
        info.extend(EXPORT_FLAGS.to_be_bytes());
        self.reply(option, REP_INFO, &info)?;
        if asked
            .chunks(2)
            .any(|kind| kind == INFO_BLOCK_SIZE.to_be_bytes())
        {
            let mut info = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
            info.extend(BLOCK_SIZES.iter().flat_map(|size| size.to_be_bytes()));
            self.reply(option, REP_INFO, &info)?;
        }
        self.reply(option, REP_ACK, &[])?;
        Ok(match option {
            OPT_GO => Haggled::Export(file),
            _ => Haggled::More,
        })
    }

    fn transmit(mut self, file: &Arc<Opened>) -> io::Result<()> {
        let queue = Arc::new(Requests::default());
        let _end = EndOfQueue(&queue);
        let output = Arc::new(Mutex::new(self.output.try_clone()?));
        let mut handlers = 0;
        loop {
            let magic = u32::from_be_bytes(self.array()?);
            let _flags: [u8; 2] = self.array()?;
            let kind = u16::from_be_bytes(self.array()?);
            let cookie: [u8; 8] = self.array()?;
            let offset = u64::from_be_bytes(self.array()?);
            let length = u32::from_be_bytes(self.array()?);
            if magic != REQUEST_MAGIC {
                return Ok(());
            }
            let inside = offset
                .checked_add(u64::from(length))
                .is_some_and(|end| end <= exported(file));
            let error = match kind {
                CMD_READ if inside && length <= MAX_READ => {
                    self.service.note(file, offset, u64::from(length));
                    let waiting = queue.push((cookie, offset, length));
                    if handlers < HANDLERS && (handlers == 0 || waiting > 0) {
                        self.handler(file, &queue, &output)?;
                        handlers += 1;
                    }
                    continue;
                }
                CMD_READ => EINVAL,
                CMD_DISC => return Ok(()),
                CMD_FLUSH => 0,
                // The data after a write cannot be distinguished from a request.
                1 => {
                    let mut payload = self.input.by_ref().take(u64::from(length));
                    io::copy(&mut payload, &mut io::sink())?;
                    EPERM
                }
                4..=6 => EPERM,
                _ => EINVAL,
            };
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            output.write_all(&head(cookie, error))?;
        }
    }

    /// Starts another thread for the requests of this client.
    fn handler(
        &self,
        file: &Arc<Opened>,
        queue: &Arc<Requests>,
        output: &Arc<Mutex<UnixStream>>,
    ) -> io::Result<()> {
        let (file, queue, output) = (file.clone(), queue.clone(), output.clone());
        let (service, memory) = (self.service.clone(), self.memory.clone());
        std::thread::Builder::new()
            .name("nbd-reads".into())
            .spawn(move || {
                while let Some((cookie, offset, length)) = queue.pop() {
                    let loan = memory.take(length as usize);
                    let answered = answer(&service, &file, (cookie, offset, length), &output);
                    drop(loan);
                    if answered.is_err() {
                        // The client has disconnected; its reader notices that too.
                        let stream = output.lock().unwrap_or_else(PoisonError::into_inner);
                        let _ = stream.shutdown(std::net::Shutdown::Both);
                        return;
                    }
                }
            })
            .map(drop)
    }
}

fn answer(
    service: &Service,
    file: &Opened,
    (cookie, offset, length): Request,
    output: &Mutex<UnixStream>,
) -> io::Result<()> {
    let there = file.target.identity.size.saturating_sub(offset);
    let there = there.min(length.into()) as usize;
    let read = match there {
        0 => Ok(Vec::new().into()),
        there => service.read(file, offset, there),
    };
    let lock = || output.lock().unwrap_or_else(PoisonError::into_inner);
    match read {
        Ok(answer) => {
            let mut output = lock();
            output.write_all(&head(cookie, 0))?;
            output.write_all(answer.bytes())?;
            output.write_all(&vec![0; length as usize - there])
        }
        Err(error) => {
            tracing::debug!("reading {offset}+{length}: {error}");
            lock().write_all(&head(cookie, EIO))
        }
    }
}

fn head(cookie: [u8; 8], error: u32) -> [u8; 16] {
    let mut head = [0; 16];
    head[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
    head[4..8].copy_from_slice(&error.to_be_bytes());
    head[8..].copy_from_slice(&cookie);
    head
}

/// Cookie, offset, length.
type Request = ([u8; 8], u64, u32);

#[derive(Default)]
struct Requests {
    queue: Mutex<(VecDeque<Request>, bool)>,
    more: Condvar,
}

impl Requests {
    fn lock(&self) -> MutexGuard<'_, (VecDeque<Request>, bool)> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a request; returns how many were waiting before.
    fn push(&self, request: Request) -> usize {
        let mut queue = self.lock();
        let waiting = queue.0.len();
        queue.0.push_back(request);
        drop(queue);
        self.more.notify_one();
        waiting
    }

    fn pop(&self) -> Option<Request> {
        let mut queue = self.lock();
        loop {
            if queue.1 {
                return None;
            }
            if let Some(request) = queue.0.pop_front() {
                return Some(request);
            }
            let woken = self.more.wait(queue);
            queue = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Ends the handlers when their client has disconnected.
struct EndOfQueue<'q>(&'q Requests);

impl Drop for EndOfQueue<'_> {
    fn drop(&mut self) {
        self.0.lock().1 = true;
        self.0.more.notify_all();
    }
}
