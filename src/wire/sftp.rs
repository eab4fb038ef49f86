//! A reader of SFTP version 3 (draft-ietf-secsh-filexfer-02, as in OpenSSH and ESXi) over any
//! stream.
//!
//! Requests are pipelined, and several pieces are in flight. A piece is requested in parts of the
//! server's limit (`limits@openssh.com`, otherwise 32 KiB). Every length, identifier and offset of
//! an answer is checked before it is used.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::{Result, WireError};
use super::upstream::{Assembly, Connection, Meter, Part, RemoteFile, Wanted};
use super::url::Location;
use super::{Identity, Listed};

const VERSION: u32 = 3;

const INIT: u8 = 1;
const OPEN: u8 = 3;
const CLOSE: u8 = 4;
const READ: u8 = 5;
const FSTAT: u8 = 8;
const OPENDIR: u8 = 11;
const READDIR: u8 = 12;
const STAT: u8 = 17;
const EXTENDED: u8 = 200;
const VERSION_REPLY: u8 = 2;
const STATUS: u8 = 101;
const HANDLE: u8 = 102;
const DATA: u8 = 103;
const NAME: u8 = 104;
const ATTRS: u8 = 105;
const EXTENDED_REPLY: u8 = 201;

const FOR_READING: u32 = 1;
const STATUS_EOF: u32 = 1;
const STATUS_NO_SUCH_FILE: u32 = 2;
const STATUS_PERMISSION_DENIED: u32 = 3;

const HAS_SIZE: u32 = 1;
const HAS_OWNER: u32 = 2;
const HAS_MODE: u32 = 4;
const HAS_TIMES: u32 = 8;
const HAS_MORE: u32 = 1 << 31;

/// The longest accepted packet; OpenSSH's has 256 KiB.
const MAX_PACKET: usize = 1 << 20;
/// The request size that every server accepts.
const PART: usize = 32 << 10;
/// The largest request.
const LARGEST_PART: u64 = 256 << 10;
/// Pieces in flight on one connection: more than the 2 MiB that a client of OpenSSH receives before
/// it confirms any.
const DEPTH: usize = 3;
const MAX_HANDLE: usize = 256;
const MAX_ENTRIES: usize = 100_000;

/// A connection over the stream of `ssh HOST -s sftp`.
pub(super) struct Sftp<S> {
    stream: BufReader<S>,
    /// The name for messages.
    server: String,
    meter: Arc<Meter>,
    next: u32,
    part: usize,
    handles: BTreeMap<u64, Vec<u8>>,
    assembly: Assembly,
    answered_in: Option<Duration>,
    /// The reason why the program below the stream ended; it ends with this.
    why: Box<dyn Fn() -> Option<WireError> + Send>,
}

/// Attributes of a file, as far as the server sent them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Attributes {
    size: Option<u64>,
    mode: Option<u32>,
    modified: Option<u64>,
}

impl Attributes {
    fn is_directory(&self) -> bool {
        self.mode
            .is_some_and(|mode| mode & libc::S_IFMT == libc::S_IFDIR)
    }
}

/// An answer, parsed from the front.
struct Packet {
    kind: u8,
    bytes: Vec<u8>,
    at: usize,
}

impl Packet {
    fn take(&mut self, length: usize) -> Option<&[u8]> {
        let end = self.at.checked_add(length)?;
        let bytes = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(bytes)
    }

    fn number(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn long(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }

    fn text(&mut self) -> Option<&[u8]> {
        let length = self.number()? as usize;
        self.take(length)
    }

    fn attributes(&mut self) -> Option<Attributes> {
        let flags = self.number()?;
        let mut read = Attributes::default();
        if flags & HAS_SIZE != 0 {
            read.size = Some(self.long()?);
        }
        if flags & HAS_OWNER != 0 {
            self.take(8)?;
        }
        if flags & HAS_MODE != 0 {
            read.mode = Some(self.number()?);
        }
        if flags & HAS_TIMES != 0 {
            self.number()?;
            read.modified = Some(u64::from(self.number()?));
        }
        if flags & HAS_MORE != 0 {
            for _ in 0..self.number()? {
                self.text()?;
                self.text()?;
            }
        }
        Some(read)
    }
}

fn put_text(message: &mut Vec<u8>, text: &[u8]) {
    message.extend((text.len() as u32).to_be_bytes());
    message.extend(text);
}

impl<S: Read + Write + Send> Sftp<S> {
    /// Starts the session, and queries how much may be read at a time.
    pub(super) fn start(
        stream: S,
        server: String,
        meter: Arc<Meter>,
        why: Box<dyn Fn() -> Option<WireError> + Send>,
    ) -> Result<Self> {
        let mut sftp = Self {
            stream: BufReader::with_capacity(16 << 10, stream),
            server,
            meter,
            next: 0,
            part: PART,
            handles: BTreeMap::new(),
            assembly: Assembly::default(),
            answered_in: None,
            why,
        };
        sftp.write(&packet(INIT, &VERSION.to_be_bytes()))?;
        let (kind, length) = sftp.head()?;
        let mut hello = sftp.rest(kind, length)?;
        let version = hello.number();
        if kind != VERSION_REPLY || version != Some(VERSION) {
            return Err(sftp.nonsense("no greeting of version 3"));
        }
        let mut limits = false;
        while let (Some(name), Some(_)) = (
            hello.text().map(<[u8]>::to_vec),
            hello.text().map(<[u8]>::len),
        ) {
            limits |= name == b"limits@openssh.com";
        }
        if limits {
            sftp.ask_limits()?;
        }
        Ok(sftp)
    }

    fn ask_limits(&mut self) -> Result<()> {
        let mut body = Vec::new();
        put_text(&mut body, b"limits@openssh.com");
        let mut answer = self.call(EXTENDED, &body)?;
        if answer.kind == EXTENDED_REPLY
            && let (Some(_), Some(most)) = (answer.long(), answer.long())
        {
            let most = if most == 0 { PART as u64 } else { most };
            self.part = most.clamp(4096, LARGEST_PART) as usize;
        }
        Ok(())
    }

    fn failed(&self, reason: impl ToString) -> WireError {
        (self.why)().unwrap_or_else(|| {
            WireError::failed(
                &self.server,
                reason,
                "see that the line and the server are up, and start again",
            )
        })
    }

    fn nonsense(&self, what: &str) -> WireError {
        WireError::failed(
            &self.server,
            format!("the SFTP server sent {what}"),
            "see that nothing prints text at login there (.profile, .bashrc)",
        )
    }

    fn write(&mut self, message: &[u8]) -> Result<()> {
        let written = self.stream.get_mut().write_all(message);
        written.map_err(|e| self.failed(e))
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        let read = self.stream.read_exact(bytes);
        read.map_err(|e| match e.kind() {
            std::io::ErrorKind::WouldBlock => self.failed("the SFTP server does not answer"),
            _ => self.failed(e),
        })
    }

    /// The kind of the next packet, and the length of the rest.
    fn head(&mut self) -> Result<(u8, usize)> {
        let mut head = [0; 5];
        self.fill(&mut head)?;
        let [l0, l1, l2, l3, kind] = head;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        match length.checked_sub(1) {
            Some(rest) if length <= MAX_PACKET => Ok((kind, rest)),
            _ => Err(self.nonsense(&format!("a packet of {length} bytes"))),
        }
    }

    fn rest(&mut self, kind: u8, length: usize) -> Result<Packet> {
        let mut bytes = vec![0; length];
        self.fill(&mut bytes)?;
        Ok(Packet { kind, bytes, at: 0 })
    }

    fn request(&mut self, kind: u8, body: &[u8]) -> Result<u32> {
        self.next = self.next.wrapping_add(1);
        let mut whole = self.next.to_be_bytes().to_vec();
        whole.extend(body);
        self.write(&packet(kind, &whole))?;
        Ok(self.next)
    }

    /// Sends a request and reads its answer, if nothing else is in flight.
    fn call(&mut self, kind: u8, body: &[u8]) -> Result<Packet> {
        if !self.assembly.is_empty() {
            return Err(self.nonsense("answers to pieces that are still under way"));
        }
        let asked = Instant::now();
        let id = self.request(kind, body)?;
        let (kind, length) = self.head()?;
        let taken = asked.elapsed();
        self.answered_in = Some(self.answered_in.map_or(taken, |least| least.min(taken)));
        let mut answer = self.rest(kind, length)?;
        match answer.number() {
            Some(got) if got == id => Ok(answer),
            _ => Err(self.nonsense("an answer to no request")),
        }
    }

    /// The error for a status of a file.
    fn refused(&self, at: &Location, answer: &mut Packet) -> WireError {
        let code = answer.number().filter(|_| answer.kind == STATUS);
        let Some(code) = code else {
            return self.nonsense("an answer of another kind");
        };
        let said = crate::tool::clean(answer.text().unwrap_or_default());
        let at = at.to_string();
        match code {
            STATUS_NO_SUCH_FILE => WireError::NotFound { at },
            STATUS_PERMISSION_DENIED => WireError::Denied {
                at,
                reason: "permission denied".into(),
                hint: "name a user who may read it: ssh://USER@HOST/..., or --user".into(),
            },
            // ESXi locks the disks of a running VM.
            _ => WireError::Denied {
                at,
                reason: format!("the server refuses it ({said}, status {code})"),
                hint: "the disk of a running VM is locked: power it off first".into(),
            },
        }
    }

    fn stat(&mut self, at: &Location) -> Result<Attributes> {
        let mut body = Vec::new();
        put_text(&mut body, at.path().as_bytes());
        let mut answer = self.call(STAT, &body)?;
        match answer.kind {
            ATTRS => answer
                .attributes()
                .ok_or_else(|| self.nonsense("attributes that are cut short")),
            _ => Err(self.refused(at, &mut answer)),
        }
    }

    fn handle(&mut self, at: &Location, kind: u8, body: &[u8]) -> Result<Vec<u8>> {
        let mut answer = self.call(kind, body)?;
        if answer.kind != HANDLE {
            return Err(self.refused(at, &mut answer));
        }
        match answer.text() {
            Some(handle) if handle.len() <= MAX_HANDLE => Ok(handle.to_vec()),
            _ => Err(self.nonsense("a handle of more than 256 bytes")),
        }
    }

    /// Opens the file and checks that it is the intended one.
    fn open(&mut self, target: &RemoteFile) -> Result<Vec<u8>> {
        if let Some(handle) = self.handles.get(&target.id) {
            return Ok(handle.clone());
        }
        let mut body = Vec::new();
        put_text(&mut body, target.at.path().as_bytes());
        body.extend(FOR_READING.to_be_bytes());
        body.extend(0u32.to_be_bytes());
        let handle = self.handle(&target.at, OPEN, &body)?;
        let mut body = Vec::new();
        put_text(&mut body, &handle);
        let mut answer = self.call(FSTAT, &body)?;
        let now = match answer.kind {
            ATTRS => answer.attributes(),
            _ => return Err(self.refused(&target.at, &mut answer)),
        };
        let now = identity(now.ok_or_else(|| self.nonsense("attributes that are cut short"))?);
        match now {
            Some(now) if now != target.identity => Err(WireError::Changed {
                at: target.at.to_string(),
                was: target.identity.to_string(),
                now: now.to_string(),
            }),
            _ => {
                self.handles.insert(target.id, handle.clone());
                Ok(handle)
            }
        }
    }

    fn ask(&mut self, handle: &[u8], part: Part) -> Result<()> {
        let mut body = Vec::with_capacity(handle.len() + 16);
        put_text(&mut body, handle);
        body.extend(part.offset.to_be_bytes());
        body.extend((part.length as u32).to_be_bytes());
        let id = self.request(READ, &body)?;
        self.assembly.asked(u64::from(id), part);
        Ok(())
    }

    /// Stores bytes for a part; the rest of it is requested again.
    fn data(&mut self, part: &Part, length: usize) -> Result<Option<(u64, Result<Vec<u8>>)>> {
        let mut count = [0; 4];
        self.fill(&mut count)?;
        let count = u32::from_be_bytes(count) as usize;
        // Some servers declare a longer packet than its text; none may send more than was
        // requested.
        if count + 8 != length || count > part.length || count == 0 {
            return Err(self.nonsense(&format!(
                "{count} bytes where {} were asked for",
                part.length
            )));
        }
        let Some(bytes) = self.assembly.bytes(part) else {
            return Err(self.nonsense("bytes of no piece"));
        };
        let read = self.stream.read_exact(&mut bytes[..count]);
        read.map_err(|e| self.failed(e))?;
        self.meter.count(count);
        if count < part.length {
            let mut rest = part.clone();
            rest.start += count;
            rest.offset += count as u64;
            rest.length -= count;
            let handle = self.handles.get(&part.target.id).cloned();
            let handle = handle.ok_or_else(|| self.nonsense("bytes of no open file"))?;
            // One more is open, and then one less.
            self.ask(&handle, rest)?;
        }
        Ok(self.assembly.finish(part, None))
    }
}

fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(body.len() + 5);
    message.extend((body.len() as u32 + 1).to_be_bytes());
    message.push(kind);
    message.extend(body);
    message
}

fn identity(attributes: Attributes) -> Option<Identity> {
    Some(Identity {
        size: attributes.size?,
        modified: attributes.modified,
        etag: None,
    })
}

impl<S: Read + Write + Send> Connection for Sftp<S> {
    fn identify(&mut self, at: &Location) -> Result<Identity> {
        let attributes = self.stat(at)?;
        if attributes.is_directory() {
            return Err(WireError::usage(
                format!("{at} is a directory"),
                "name the .vmx or the disk in it",
            ));
        }
        identity(attributes).ok_or_else(|| self.nonsense("no size of the file"))
    }

    fn list(&mut self, directory: &Location) -> Result<Vec<Listed>> {
        if !self.stat(directory)?.is_directory() {
            return Err(WireError::CannotList {
                at: directory.to_string(),
                reason: "it is a file, no directory".into(),
            });
        }
        let mut body = Vec::new();
        put_text(&mut body, directory.path().as_bytes());
        let handle = self.handle(directory, OPENDIR, &body)?;
        let mut body = Vec::new();
        put_text(&mut body, &handle);
        let mut listed = Vec::new();
        loop {
            let mut answer = self.call(READDIR, &body)?;
            if answer.kind == NAME {
                let entries = names(&mut answer)
                    .ok_or_else(|| self.nonsense("a listing that is cut short"))?;
                if entries.is_empty() || listed.len() + entries.len() > MAX_ENTRIES {
                    return Err(self.nonsense("a listing without an end"));
                }
                listed.extend(entries);
                continue;
            }
            let mut code = Packet {
                kind: answer.kind,
                bytes: answer.bytes.clone(),
                at: answer.at,
            };
            if answer.kind == STATUS && code.number() == Some(STATUS_EOF) {
                break;
            }
            return Err(self.refused(directory, &mut answer));
        }
        self.call(CLOSE, &body)?;
        listed.retain(|entry| !matches!(entry.name.as_str(), "." | ".."));
        Ok(listed)
    }

    fn depth(&self) -> usize {
        DEPTH
    }

    fn answered_in(&self) -> Option<Duration> {
        self.answered_in
    }

    fn is_ready(&self, wanted: &Wanted) -> bool {
        self.handles.contains_key(&wanted.target.id)
    }

    fn prepare(&mut self, target: &Arc<RemoteFile>) -> Result<()> {
        self.open(target).map(drop)
    }

    fn send(&mut self, token: u64, wanted: &Wanted) -> Result<()> {
        let handle = self.open(&wanted.target)?;
        for part in self.assembly.divide(token, wanted, self.part) {
            self.ask(&handle, part)?;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(u64, Result<Vec<u8>>)> {
        loop {
            let (kind, length) = self.head()?;
            if length < 4 {
                return Err(self.nonsense("a packet without an identifier"));
            }
            let mut id = [0; 4];
            self.fill(&mut id)?;
            let id = u64::from(u32::from_be_bytes(id));
            let Some(part) = self.assembly.answered(id) else {
                return Err(self.nonsense("an answer to no request"));
            };
            let done = if kind == DATA && length >= 8 {
                self.data(&part, length)?
            } else {
                let mut answer = self.rest(kind, length - 4)?;
                let error = self.not_read(&part, &mut answer);
                self.assembly.finish(&part, Some(error))
            };
            if let Some(done) = done {
                return Ok(done);
            }
        }
    }
}

impl<S: Read + Write + Send> Sftp<S> {
    /// The error for a part of a file without data.
    fn not_read(&self, part: &Part, answer: &mut Packet) -> WireError {
        let start = answer.at;
        if answer.kind == STATUS && answer.number() == Some(STATUS_EOF) {
            return WireError::Changed {
                at: part.target.at.to_string(),
                was: part.target.identity.to_string(),
                now: format!("at most {} bytes", part.offset),
            };
        }
        answer.at = start;
        match self.refused(&part.target.at, answer) {
            // An open file that cannot be read now: the fault may be temporary.
            WireError::Denied { at, reason, hint } => WireError::Failed { at, reason, hint },
            error => error,
        }
    }
}

fn names(answer: &mut Packet) -> Option<Vec<Listed>> {
    let count = answer.number()? as usize;
    let mut listed = Vec::new();
    for _ in 0..count.min(MAX_ENTRIES) {
        let name = String::from_utf8(answer.text()?.to_vec());
        answer.text()?;
        let attributes = answer.attributes()?;
        // A name with a slash, or one that is not UTF-8, cannot be requested.
        if let Ok(name) = name
            && !name.contains(['/', '\0'])
        {
            listed.push(Listed {
                is_directory: attributes.is_directory(),
                size: attributes.size,
                modified: attributes.modified,
                name,
            });
        }
    }
    Some(listed)
}
