//! The protocol of the socket between this process and the confined child: frames of a length, a
//! tag and fields.
//!
//! One conversation at a time. The parent sends a request. While the child processes it, it
//! requests blocks of the volume and gets them. Then it sends its answer. The author of the disk
//! may control the child, so every length is limited and every text cleaned.

use std::io::{self, Read, Write};

use crate::error::Errno;
use crate::guest::{GuestError, GuestPath};
use crate::tool;

/// The largest frame: a file with its name, or blocks.
const MAX_FRAME: usize = 1 << 30;
/// The most bytes that a child may request or write at a time. libntfs-3g transfers a run of
/// clusters at a time.
pub const MAX_BLOCKS: usize = 64 << 20;
/// The longest frame from a child: blocks to write with their offsets.
pub const MAX_FROM_CHILD: usize = MAX_BLOCKS + 64;
const MAX_TEXT: usize = 4096;
/// The number of bytes read at a time.
const AT_ONCE: usize = 256 << 10;

/// The kind of a frame. Requests and blocks are sent to the child, the rest by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Tag {
    Mount = 1,
    CreateDir,
    WriteFile,
    PatchFile,
    RemoveFile,
    RemoveDir,
    Unmount,
    /// Blocks that were read, or the end of a write or flush.
    Blocks,
    /// An errno of the disk.
    Fault,
    Read,
    Write,
    Flush,
    /// The request is complete.
    Done,
    /// The request failed.
    Failed,
}

impl Tag {
    fn from_byte(byte: u8) -> Option<Self> {
        const ALL: [Tag; 14] = [
            Tag::Mount,
            Tag::CreateDir,
            Tag::WriteFile,
            Tag::PatchFile,
            Tag::RemoveFile,
            Tag::RemoveDir,
            Tag::Unmount,
            Tag::Blocks,
            Tag::Fault,
            Tag::Read,
            Tag::Write,
            Tag::Flush,
            Tag::Done,
            Tag::Failed,
        ];
        ALL.into_iter().find(|tag| *tag as u8 == byte)
    }
}

pub fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a frame: {what}"))
}

/// Fields of a frame, in order.
#[derive(Default)]
pub struct Fields(Vec<u8>);

impl Fields {
    pub fn number(mut self, number: u64) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    pub fn bytes(self, bytes: &[u8]) -> Self {
        let mut fields = self.number(bytes.len() as u64);
        fields.0.extend(bytes);
        fields
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn path(self, path: &GuestPath) -> Self {
        self.bytes(path.to_slashes().as_bytes())
    }
}

pub fn send(stream: &mut impl Write, tag: Tag, fields: Fields) -> io::Result<()> {
    let len = u32::try_from(fields.0.len())
        .ok()
        .filter(|len| *len as usize <= MAX_FRAME)
        .ok_or_else(|| invalid("too long to send"))?;
    let mut frame = Vec::with_capacity(fields.0.len() + 5);
    frame.extend(len.to_le_bytes());
    frame.push(tag as u8);
    frame.extend(fields.0);
    stream.write_all(&frame)
}

/// A received frame, parsed from the front.
pub struct Frame {
    pub tag: Tag,
    bytes: Vec<u8>,
    at: usize,
}

/// Receives a frame of at most `limit` bytes.
pub fn receive(stream: &mut impl Read, limit: usize) -> io::Result<Frame> {
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    let [l0, l1, l2, l3, tag] = head;
    let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let tag = Tag::from_byte(tag).ok_or_else(|| invalid("unknown kind"))?;
    if len > limit.min(MAX_FRAME) {
        return Err(invalid("too long"));
    }
    // For a long frame, no more is allocated than arrives.
    let mut bytes = vec![0; len.min(AT_ONCE)];
    stream.read_exact(&mut bytes)?;
    stream
        .take((len - bytes.len()) as u64)
        .read_to_end(&mut bytes)?;
    if bytes.len() != len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Frame { tag, bytes, at: 0 })
}

impl Frame {
    /// Whether every field was taken.
    pub fn is_at_end(&self) -> bool {
        self.at >= self.bytes.len()
    }

    pub fn number(&mut self) -> io::Result<u64> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let number = rest.first_chunk().ok_or_else(|| invalid("cut short"))?;
        self.at += 8;
        Ok(u64::from_le_bytes(*number))
    }

    pub fn bytes(&mut self) -> io::Result<&[u8]> {
        let len = usize::try_from(self.number()?).map_err(|_| invalid("a length"))?;
        let end = self
            .at
            .checked_add(len)
            .ok_or_else(|| invalid("a length"))?;
        let bytes = self.bytes.get(self.at..end);
        self.at = end;
        bytes.ok_or_else(|| invalid("cut short"))
    }

    pub fn path(&mut self) -> io::Result<GuestPath> {
        let text = std::str::from_utf8(self.bytes()?).map_err(|_| invalid("a path"))?;
        GuestPath::parse(text).map_err(|_| invalid("a path"))
    }

    fn text(&mut self) -> io::Result<String> {
        Ok(tool::clean(self.bytes()?).chars().take(MAX_TEXT).collect())
    }
}

/// The names of operations in errors, which are constants on both sides.
const OPS: [&str; 9] = [
    "changing",
    "creating the directory",
    "writing",
    "removing",
    "removing the directory",
    "mounting",
    "unmounting",
    "creating",
    "reading",
];
const KINDS: [&str; 2] = ["file", "directory"];

fn index(of: &str, list: &[&str]) -> u64 {
    list.iter().position(|known| *known == of).unwrap_or(0) as u64
}

fn entry(number: u64, list: &[&'static str]) -> &'static str {
    let known = usize::try_from(number).ok().and_then(|i| list.get(i));
    known.copied().unwrap_or(list[0])
}

pub fn error_fields(error: &GuestError) -> Fields {
    let fields = |kind, number, path: &str, reason: &str| {
        Fields::default()
            .number(kind)
            .number(number)
            .bytes(path.as_bytes())
            .bytes(reason.as_bytes())
    };
    match error {
        GuestError::NotFound { path } => fields(1, 0, path, ""),
        GuestError::WrongKind { path, expected } => fields(2, index(expected, &KINDS), path, ""),
        GuestError::Unsafe { reason } => fields(3, 0, "", reason),
        GuestError::NoSpace { path } => fields(4, 0, path, ""),
        GuestError::MissingTool { what, hint } => fields(5, 0, what, hint),
        GuestError::Op { op, path, reason } => fields(6, index(op, &OPS), path, reason),
        GuestError::Host {
            op,
            path,
            reason,
            errno,
        } => fields(7, index(op, &OPS), path, reason).number(u64::from(errno.0.unsigned_abs())),
        other => fields(6, 0, "", &other.to_string()),
    }
}

pub fn error(frame: &mut Frame) -> io::Result<GuestError> {
    let (kind, number) = (frame.number()?, frame.number()?);
    let (path, reason) = (frame.text()?, frame.text()?);
    Ok(match kind {
        1 => GuestError::NotFound { path },
        2 => GuestError::WrongKind {
            path,
            expected: entry(number, &KINDS),
        },
        3 => GuestError::Unsafe { reason },
        4 => GuestError::NoSpace { path },
        5 => GuestError::MissingTool {
            what: path,
            hint: reason,
        },
        7 => GuestError::Host {
            op: entry(number, &OPS),
            path,
            reason,
            errno: Errno(i32::try_from(frame.number()?).unwrap_or(libc::EIO)),
        },
        _ => GuestError::Op {
            op: entry(number, &OPS),
            path,
            reason,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_come_back() {
        let path = || "\\Windows".to_string();
        for sent in [
            GuestError::NotFound { path: path() },
            GuestError::WrongKind {
                path: path(),
                expected: "directory",
            },
            GuestError::NoSpace { path: path() },
            GuestError::Unsafe {
                reason: "dirty".into(),
            },
            GuestError::Op {
                op: "removing",
                path: path(),
                reason: "Input/output error".into(),
            },
            GuestError::Host {
                op: "removing",
                path: path(),
                reason: "writing the disk: full".into(),
                errno: Errno(28),
            },
        ] {
            let mut bytes = Vec::new();
            send(&mut bytes, Tag::Failed, error_fields(&sent)).unwrap();
            let mut frame = receive(&mut &bytes[..], MAX_FROM_CHILD).unwrap();
            assert_eq!(frame.tag, Tag::Failed);
            let came = error(&mut frame).unwrap();
            assert_eq!(format!("{came:?}"), format!("{sent:?}"));
        }
    }

    #[test]
    fn hostile_frames() {
        let huge = [0xff, 0xff, 0xff, 0xff, Tag::Read as u8];
        assert!(receive(&mut &huge[..], MAX_FROM_CHILD).is_err());
        let unknown = [0, 0, 0, 0, 99];
        assert!(receive(&mut &unknown[..], 10).is_err());
        let short = [9, 0, 0, 0, Tag::Read as u8, 1];
        assert!(receive(&mut &short[..], 10).is_err());
        let mut bytes = Vec::new();
        let text = "\u{1b}[31mred".repeat(2000);
        let sent = GuestError::Unsafe { reason: text };
        send(&mut bytes, Tag::Failed, error_fields(&sent)).unwrap();
        let mut frame = receive(&mut &bytes[..], MAX_FROM_CHILD).unwrap();
        let shown = error(&mut frame).unwrap().to_string();
        assert!(!shown.contains('\u{1b}') && shown.len() < MAX_TEXT + 100);
        // An inner length that exceeds the frame.
        let mut bytes = Vec::new();
        send(&mut bytes, Tag::Failed, Fields::default().number(u64::MAX)).unwrap();
        let mut frame = receive(&mut &bytes[..], 100).unwrap();
        assert!(frame.bytes().is_err() && frame.number().is_err());
    }
}
