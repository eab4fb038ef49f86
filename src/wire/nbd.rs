//! A client for foreign NBD servers, over TCP, TLS, a Unix socket or the two ends of a command.
//!
//! Fixed newstyle handshake, `GO` (`EXPORT_NAME` if the server does not support it), `STARTTLS` for
//! `nbds`; simple replies. Block sizes that the server requires are respected.
//!
//! Specification: NetworkBlockDevice/nbd `doc/proto.md`.

use std::io::{BufReader, Read, Write};
use std::sync::Arc;

use super::Identity;
use super::error::{Result, WireError};
use super::upstream::{Assembly, Connection, Meter, Wanted};
use super::url::Location;
use crate::wire::nbd_protocol::{
    CMD_READ, FIXED_NEWSTYLE, INFO_EXPORT, INIT_MAGIC, NO_ZEROES, OPT_GO, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, REP_ACK, REP_ERROR, REP_INFO, REPLY_MAGIC, REQUEST_MAGIC,
};

const OPT_EXPORT_NAME: u32 = 1;
const OPT_STARTTLS: u32 = 5;
const REP_ERROR_UNSUPPORTED: u32 = REP_ERROR + 1;
const REP_ERROR_TLS_REQUIRED: u32 = REP_ERROR + 5;
const REP_ERROR_UNKNOWN: u32 = REP_ERROR + 6;
const INFO_BLOCK_SIZE: u16 = 3;
const MAX_OPTION_REPLY: usize = 64 << 10;
/// Pieces in flight on one connection.
const DEPTH: usize = 4;
/// The request size that every server accepts.
const MOST: u32 = 1 << 20;

pub(super) trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// The names for a connection.
#[derive(Clone)]
pub(super) struct Names {
    /// The name for messages.
    pub(super) server: String,
    pub(super) export: String,
}

pub(super) struct Nbd {
    stream: BufReader<Box<dyn Stream>>,
    names: Names,
    size: u64,
    most: usize,
    cookie: u64,
    meter: Arc<Meter>,
    assembly: Assembly,
    /// The reason why the program at the other end of the stream ended; it ends with this.
    why: Box<dyn Fn() -> Option<WireError> + Send>,
}

impl Names {
    pub(super) fn failed(&self, reason: impl ToString) -> WireError {
        WireError::failed(
            &self.server,
            reason,
            "see that the line and the server are up, and start again",
        )
    }

    pub(super) fn nonsense(&self, what: &str) -> WireError {
        self.failed(format!("the NBD server sent {what}"))
    }

    pub(super) fn fill(&self, stream: &mut (impl Read + ?Sized), bytes: &mut [u8]) -> Result<()> {
        stream.read_exact(bytes).map_err(|e| match e.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
                self.failed("the NBD server does not answer")
            }
            _ => self.failed(e),
        })
    }

    pub(super) fn array<const N: usize>(&self, stream: &mut dyn Stream) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(stream, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn option(&self, stream: &mut dyn Stream, option: u32, data: &[u8]) -> Result<()> {
        let mut message = OPTION_MAGIC.to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        stream.write_all(&message).map_err(|e| self.failed(e))
    }

    pub(super) fn answer(&self, stream: &mut dyn Stream, option: u32) -> Result<(u32, Vec<u8>)> {
        let magic = u64::from_be_bytes(self.array(stream)?);
        let to = u32::from_be_bytes(self.array(stream)?);
        let kind = u32::from_be_bytes(self.array(stream)?);
        let length = u32::from_be_bytes(self.array(stream)?) as usize;
        if magic != OPTION_REPLY_MAGIC || to != option || length > MAX_OPTION_REPLY {
            return Err(self.nonsense("a wrong option reply"));
        }
        let mut data = vec![0; length];
        self.fill(stream, &mut data)?;
        Ok((kind, data))
    }

    /// Reads the greeting, up to the start of options.
    pub(super) fn greet(&self, stream: &mut dyn Stream) -> Result<u16> {
        if &self.array::<8>(stream)? != INIT_MAGIC || &self.array::<8>(stream)? != OPTION_MAGIC {
            return Err(self.nonsense("no newstyle greeting"));
        }
        let flags = u16::from_be_bytes(self.array(stream)?);
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(self.nonsense("an old handshake"));
        }
        let flags = flags & (FIXED_NEWSTYLE | NO_ZEROES);
        let answer = u32::from(flags).to_be_bytes();
        stream.write_all(&answer).map_err(|e| self.failed(e))?;
        Ok(flags)
    }

    /// Requests TLS; the next byte belongs to its handshake.
    pub(super) fn start_tls(&self, stream: &mut dyn Stream) -> Result<()> {
        self.option(stream, OPT_STARTTLS, &[])?;
        match self.answer(stream, OPT_STARTTLS)? {
            (REP_ACK, _) => Ok(()),
            _ => Err(WireError::Denied {
                at: self.server.clone(),
                reason: "the NBD server has no TLS".into(),
                hint: "nbd:// reads it without; give it a certificate for nbds://".into(),
            }),
        }
    }

    fn refused(&self, kind: u32, data: &[u8]) -> WireError {
        let at = format!("{} export {:?}", self.server, self.export);
        match kind {
            REP_ERROR_UNKNOWN => WireError::NotFound { at },
            REP_ERROR_TLS_REQUIRED => WireError::Denied {
                at,
                reason: "the NBD server requires TLS".into(),
                hint: "use nbds://, with --tls-ca when its certificate is your own".into(),
            },
            _ => WireError::Denied {
                at,
                reason: format!(
                    "the NBD server refuses it ({}, {kind:#x})",
                    crate::tool::clean(data)
                ),
                hint: "see the messages of the server".into(),
            },
        }
    }

    /// Selects the export. Returns its size, and the largest and smallest request.
    pub(super) fn go(&self, stream: &mut dyn Stream, flags: u16) -> Result<(u64, u32, u32)> {
        let name = self.export.as_bytes();
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name);
        data.extend(1u16.to_be_bytes());
        data.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.option(stream, OPT_GO, &data)?;
        let (mut size, mut least, mut most) = (None, 1, MOST);
        let number = |data: &[u8], at: usize| -> Option<u32> {
            Some(u32::from_be_bytes(data.get(at..at + 4)?.try_into().ok()?))
        };
        // A server sends only a few of these.
        for _ in 0..64 {
            let (kind, data) = self.answer(stream, OPT_GO)?;
            let info = data.first_chunk().map(|info| u16::from_be_bytes(*info));
            match (kind, info) {
                (REP_ACK, _) => {
                    let size = size.ok_or_else(|| self.nonsense("no size of the export"))?;
                    return Ok((size, least, most));
                }
                (REP_INFO, Some(INFO_EXPORT)) => {
                    let bytes = data.get(2..10).and_then(|bytes| bytes.try_into().ok());
                    size = bytes.map(u64::from_be_bytes);
                }
                (REP_INFO, Some(INFO_BLOCK_SIZE)) => {
                    least = number(&data, 2).unwrap_or(1);
                    most = number(&data, 10).unwrap_or(MOST).min(MOST);
                }
                (REP_ERROR_UNSUPPORTED, _) => {
                    return Ok((self.export_name(stream, flags)?, least, most));
                }
                (kind, _) if kind & REP_ERROR != 0 => return Err(self.refused(kind, &data)),
                _ => {}
            }
        }
        Err(self.nonsense("too many option replies"))
    }

    fn export_name(&self, stream: &mut dyn Stream, flags: u16) -> Result<u64> {
        self.option(stream, OPT_EXPORT_NAME, self.export.as_bytes())?;
        let size = u64::from_be_bytes(self.array(stream)?);
        self.array::<2>(stream)?;
        if flags & NO_ZEROES == 0 {
            self.array::<124>(stream)?;
        }
        Ok(size)
    }
}

impl Nbd {
    /// Takes a stream after [`Names::greet`].
    pub(super) fn start(
        mut stream: Box<dyn Stream>,
        flags: u16,
        names: Names,
        meter: Arc<Meter>,
        why: Box<dyn Fn() -> Option<WireError> + Send>,
    ) -> Result<Self> {
        let told = names.go(&mut *stream, flags);
        let (size, least, most) = told.map_err(|error| match why() {
            Some(why) if error.is_passing() => why,
            _ => error,
        })?;
        if u64::from(least) > super::cache::SECTOR || most < least.max(512) {
            return Err(WireError::Denied {
                at: names.server.clone(),
                reason: format!("the NBD server takes requests of {least} to {most} bytes only"),
                hint: "put nbdkit's blocksize filter in front of it".into(),
            });
        }
        Ok(Self {
            stream: BufReader::with_capacity(16 << 10, stream),
            names,
            size,
            most: (most / least.max(1) * least.max(1)) as usize,
            cookie: 0,
            meter,
            assembly: Assembly::default(),
            why,
        })
    }

    fn failed(&self, error: WireError) -> WireError {
        (self.why)().unwrap_or(error)
    }

    fn changed(&self, wanted: &Wanted) -> Result<()> {
        let was = &wanted.target.identity;
        match was.size == self.size {
            true => Ok(()),
            false => Err(WireError::Changed {
                at: wanted.target.at.to_string(),
                was: was.to_string(),
                now: format!("{} bytes", self.size),
            }),
        }
    }
}

impl Connection for Nbd {
    fn identify(&mut self, _at: &Location) -> Result<Identity> {
        Ok(Identity {
            size: self.size,
            modified: None,
            etag: None,
        })
    }

    fn depth(&self) -> usize {
        DEPTH
    }

    fn send(&mut self, token: u64, wanted: &Wanted) -> Result<()> {
        self.changed(wanted)?;
        // Parts are whole sectors, which every block size divides.
        let sector = super::cache::SECTOR as usize;
        let most = (self.most / sector * sector).max(self.most.min(sector));
        let mut message = Vec::new();
        let mut parts = Vec::new();
        for part in self.assembly.divide(token, wanted, most) {
            self.cookie += 1;
            message.extend(REQUEST_MAGIC.to_be_bytes());
            message.extend(0u16.to_be_bytes());
            message.extend(CMD_READ.to_be_bytes());
            message.extend(self.cookie.to_be_bytes());
            message.extend(part.offset.to_be_bytes());
            message.extend((part.length as u32).to_be_bytes());
            parts.push((self.cookie, part));
        }
        for (cookie, part) in parts {
            self.assembly.asked(cookie, part);
        }
        let sent = self.stream.get_mut().write_all(&message);
        sent.map_err(|e| self.failed(self.names.failed(e)))
    }

    fn receive(&mut self) -> Result<(u64, Result<Vec<u8>>)> {
        loop {
            let mut head = [0; 16];
            let read = self.names.fill(&mut self.stream, &mut head);
            read.map_err(|e| self.failed(e))?;
            let number = |at: usize| {
                u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
            };
            let cookie = u64::from(number(8)) << 32 | u64::from(number(12));
            let Some(part) = self
                .assembly
                .answered(cookie)
                .filter(|_| number(0) == REPLY_MAGIC)
            else {
                return Err(self.names.nonsense("a reply to no request"));
            };
            let error = match number(4) {
                0 => {
                    let Some(bytes) = self.assembly.bytes(&part) else {
                        return Err(self.names.nonsense("bytes of no piece"));
                    };
                    let read = self.names.fill(&mut self.stream, bytes);
                    read.map_err(|e| (self.why)().unwrap_or(e))?;
                    self.meter.count(part.length);
                    None
                }
                errno => {
                    let said = std::io::Error::from_raw_os_error(errno as i32);
                    Some(self.names.failed(format!("the NBD server answers: {said}")))
                }
            };
            if let Some(done) = self.assembly.finish(&part, error) {
                return Ok(done);
            }
        }
    }
}
