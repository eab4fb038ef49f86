//! Runs libntfs-3g in a separate process that has access only to its end of a socket.
//!
//! The library is C and parses data from a foreign disk. The child is this program again
//! (`hyper2kvm __ntfs PARENT`). It loads the library, gives up files, network, programs and threads
//! ([`crate::tool::confine::parser`]), and only then gets access to the volume. It reaches the
//! volume through this process, block by block, and no byte outside. A crash, a hang or an invalid
//! answer is an error of the request. The child dies with this process.
//!
//! If the launcher is not enabled (unit tests, examples), [`super::EmbeddedWriter`] uses the
//! library in its own process instead.

mod child;
mod wire;

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use child::run_if_asked;
use wire::{Fields, Frame, Tag};

use super::ntfs3g::MountOptions;
use super::{Extent, GuestError, GuestPath, Result};
use crate::block::BlockWrite;
use crate::stop;
use crate::tool::{Child, Cmd, ToolError};

const VERB: &str = "__ntfs";
/// The failpoint in the child at every request.
const FAILPOINT: &str = "ntfs-child";
/// The time for which the child may compute without requesting a block.
const SILENCE: Duration = Duration::from_secs(15);
/// The same after the run was asked to stop.
const SILENCE_STOPPING: Duration = Duration::from_secs(2);
/// The time limit for a request, whatever the child does; plus a second per MiB.
const REQUEST: Duration = Duration::from_secs(120);
const TICK: Duration = Duration::from_millis(100);
const END: Duration = Duration::from_secs(5);

/// A volume mounted in the child. Dropping it kills the child: writes stay incomplete.
pub struct ConfinedNtfs {
    child: Child,
    stream: UnixStream,
    volume: Range,
    /// Whether the child has ended or violated the protocol.
    broken: bool,
}

impl ConfinedNtfs {
    pub fn mount(
        disk: Arc<dyn BlockWrite>,
        start: u64,
        len: u64,
        options: MountOptions,
    ) -> Result<Self> {
        let (stream, theirs) = UnixStream::pair()?;
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(SILENCE))?;
        let child = Cmd::own(VERB)
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .map_err(|error| failed("starting the confined writer", &error))?;
        let mut writer = Self {
            child,
            stream,
            volume: Range::new(disk, start, len),
            broken: false,
        };
        let fields = Fields::default()
            .number(writer.volume.len)
            .number(u64::from(options.force_dirty));
        writer.call(Tag::Mount, fields, &GuestPath::root())?;
        Ok(writer)
    }

    pub fn create_dir(&mut self, path: &GuestPath) -> Result<()> {
        self.call(Tag::CreateDir, Fields::default().path(path), path)
    }

    pub fn write_file(&mut self, path: &GuestPath, contents: &[u8]) -> Result<()> {
        let fields = Fields::default().path(path).bytes(contents);
        self.call(Tag::WriteFile, fields, path)
    }

    pub fn patch_file(&mut self, path: &GuestPath, size: u64, extents: &[Extent]) -> Result<()> {
        let mut fields = Fields::default()
            .path(path)
            .number(size)
            .number(extents.len() as u64);
        for extent in extents {
            fields = fields.number(extent.offset).bytes(&extent.data);
        }
        self.call(Tag::PatchFile, fields, path)
    }

    pub fn remove_file(&mut self, path: &GuestPath) -> Result<()> {
        self.call(Tag::RemoveFile, Fields::default().path(path), path)
    }

    pub fn remove_dir(&mut self, path: &GuestPath) -> Result<()> {
        self.call(Tag::RemoveDir, Fields::default().path(path), path)
    }

    /// Writes everything back and ends the child.
    pub fn unmount(mut self) -> Result<()> {
        let root = GuestPath::root();
        self.call(Tag::Unmount, Fields::default(), &root)?;
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        self.child
            .wait(END)
            .map_err(|error| failed("ending the confined writer", &error))
    }

    fn call(&mut self, tag: Tag, fields: Fields, path: &GuestPath) -> Result<()> {
        if self.broken {
            return Err(op(path, "the confined writer has ended".into()));
        }
        let mut patient = Patient {
            stream: &self.stream,
            since: Instant::now(),
        };
        match self.volume.converse(&mut patient, tag, fields) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error),
            Err(error) => {
                self.broken = true;
                Err(op(path, self.why_it_ended(&error)))
            }
        }
    }

    fn why_it_ended(&mut self, error: &io::Error) -> String {
        if error.kind() == io::ErrorKind::TimedOut {
            self.child.kill();
            return "the confined NTFS writer hung and was killed".into();
        }
        if error.kind() == io::ErrorKind::InvalidData {
            self.child.kill();
            return format!("the confined NTFS writer talks nonsense ({error}) and was killed");
        }
        let ended = self.child.wait(END);
        self.child.kill();
        match ended {
            Err(ToolError::Failed { status, stderr, .. }) => {
                let how = match status.signal() {
                    Some(signal) => format!("crashed (signal {signal})"),
                    None => format!("ended ({status})"),
                };
                let first = stderr.lines().next().map(|line| format!(": {line}"));
                format!(
                    "the confined NTFS writer {how}{}",
                    first.unwrap_or_default()
                )
            }
            _ => format!("the confined NTFS writer is gone: {error}"),
        }
    }
}

/// The part of the disk that a child may reach.
struct Range {
    disk: Arc<dyn BlockWrite>,
    start: u64,
    len: u64,
}

impl Range {
    fn new(disk: Arc<dyn BlockWrite>, start: u64, len: u64) -> Self {
        Self {
            len: len.min(disk.size().saturating_sub(start)),
            disk,
            start,
        }
    }

    /// Sends a request and serves blocks until the answer. The outer error is a failure of the
    /// child itself.
    fn converse(
        &self,
        stream: &mut (impl Read + Write),
        tag: Tag,
        fields: Fields,
    ) -> io::Result<Result<()>> {
        let start = Instant::now();
        let mut moved = fields.len() as u64;
        wire::send(stream, tag, fields)?;
        loop {
            let mut frame = wire::receive(stream, wire::MAX_FROM_CHILD)?;
            match frame.tag {
                Tag::Done => return Ok(Ok(())),
                Tag::Failed => return wire::error(&mut frame).map(Err),
                Tag::Read | Tag::Write | Tag::Flush => {}
                _ => return Err(wire::invalid("unexpected")),
            }
            let (tag, fields) = match self.serve(&mut frame)? {
                Ok(blocks) => (Tag::Blocks, Fields::default().bytes(&blocks)),
                // The child reports it; the library provides only a number.
                Err(error) => {
                    tracing::warn!("the guest's disk: {error}");
                    let errno = error.raw_os_error().unwrap_or(libc::EIO);
                    (Tag::Fault, Fields::default().number(errno as u64))
                }
            };
            moved = moved.saturating_add(fields.len() as u64);
            wire::send(stream, tag, fields)?;
            if start.elapsed() > REQUEST + Duration::from_secs(moved >> 20) {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    /// Serves one access to the volume. The outer error means that the frame is not such an access.
    fn serve(&self, frame: &mut Frame) -> io::Result<io::Result<Vec<u8>>> {
        if frame.tag == Tag::Flush {
            return Ok(self.disk.flush().map(|()| Vec::new()));
        }
        let inside = |offset: u64, len: usize| {
            let end = offset.checked_add(len as u64);
            let inside = end.is_some_and(|end| end <= self.len) && len <= wire::MAX_BLOCKS;
            match inside {
                true => Ok(self.start + offset),
                false => Err(wire::invalid("outside the volume")),
            }
        };
        if frame.tag == Tag::Read {
            let offset = frame.number()?;
            let len = usize::try_from(frame.number()?).unwrap_or(usize::MAX);
            let at = inside(offset, len)?;
            let mut blocks = vec![0; len];
            return Ok(self.disk.read_at(at, &mut blocks).map(|()| blocks));
        }
        while !frame.is_at_end() {
            let offset = frame.number()?;
            let blocks = frame.bytes()?;
            let at = inside(offset, blocks.len())?;
            if let Err(error) = self.disk.write_at(at, blocks) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(Vec::new()))
    }
}

/// Processes one request with the answers of a compromised child, from `stream`. For the fuzz
/// target.
#[doc(hidden)]
pub fn answered_by(
    stream: &mut (impl Read + Write),
    disk: Arc<dyn BlockWrite>,
    start: u64,
    len: u64,
) -> io::Result<Result<()>> {
    Range::new(disk, start, len).converse(stream, Tag::Unmount, Fields::default())
}

/// Reads with the time limit for a working child; it starts again with every frame sent.
struct Patient<'s> {
    stream: &'s UnixStream,
    since: Instant,
}

impl Write for Patient<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.stream.write(buf);
        self.since = Instant::now();
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Read for Patient<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
            let limit = match stop::requested() {
                true => SILENCE_STOPPING,
                false => SILENCE,
            };
            if self.since.elapsed() > limit {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}

fn op(path: &GuestPath, reason: String) -> GuestError {
    GuestError::Op {
        op: "changing",
        path: path.to_string(),
        reason,
    }
}

fn failed(doing: &str, error: &ToolError) -> GuestError {
    op(&GuestPath::root(), format!("{doing}: {error}"))
}
