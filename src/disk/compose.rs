//! [`Composed`]: pieces of remote files, and zeroes, in sequence as one raw disk.
//!
//! QEMU's vmdk driver opens the extents of a descriptor only as files, and QEMU has no driver that
//! joins disks. So this process serves a flat VMDK in pieces. A small read-only NBD server has one
//! end of a pair of sockets, and QEMU's program gets the other.
//!
//! Specification: NetworkBlockDevice/nbd `doc/proto.md`; fixed newstyle handshake, simple replies.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use super::remote::{Doubt, Remote, RemoteFile};
use crate::block::{BlockRead, check_range};

const INIT_MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const REPLY_MAGIC: u32 = 0x6744_6698;
/// Fixed newstyle, no zeroes.
const HANDSHAKE: u16 = 3;
const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_UNSUPPORTED: u32 = 1 << 31 | 1;
/// Flags are present, the export is read-only, and every connection sees the same data.
const FLAGS: u16 = 1 | 1 << 1 | 1 << 8;
const CMD_READ: u16 = 0;
const CMD_DISCONNECT: u16 = 2;
const CMD_FLUSH: u16 = 3;
const MAX_OPTION: u32 = 64 << 10;
/// The largest request that the protocol allows.
const MAX_READ: u32 = 32 << 20;
/// Requests read at a time, each through its own connection.
const WORKERS: usize = 8;

/// A part of the disk.
#[derive(Debug, Clone)]
pub struct Piece {
    pub length: u64,
    pub content: Content,
}

#[derive(Debug, Clone)]
pub enum Content {
    Zero,
    /// As many bytes as the piece is long.
    Bytes(Vec<u8>),
    /// A file, and the offset of the piece in it.
    File(Arc<dyn RemoteFile>, u64),
}

impl Piece {
    pub fn zero(length: u64) -> Self {
        Self {
            length,
            content: Content::Zero,
        }
    }

    pub fn bytes(bytes: Vec<u8>) -> Self {
        Self {
            length: bytes.len() as u64,
            content: Content::Bytes(bytes),
        }
    }

    pub fn of(file: &Arc<dyn RemoteFile>, at: u64, length: u64) -> Self {
        Self {
            length,
            content: Content::File(file.clone(), at),
        }
    }

    fn file(&self) -> Option<&Arc<dyn RemoteFile>> {
        match &self.content {
            Content::File(file, _) => Some(file),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub struct Composed {
    pieces: Arc<Vec<Piece>>,
    size: u64,
}

impl Composed {
    /// Joins the pieces to one file; a single piece that is a whole file is that file.
    pub fn of(pieces: Vec<Piece>) -> Arc<dyn RemoteFile> {
        if let [
            Piece {
                length,
                content: Content::File(file, 0),
            },
        ] = &pieces[..]
            && file.size() == *length
        {
            return file.clone();
        }
        let size = pieces
            .iter()
            .fold(0, |sum: u64, piece| sum.saturating_add(piece.length));
        Arc::new(Self {
            pieces: Arc::new(pieces),
            size,
        })
    }

    fn files(&self) -> impl Iterator<Item = &Arc<dyn RemoteFile>> {
        self.pieces.iter().filter_map(Piece::file)
    }
}

impl RemoteFile for Composed {
    fn shown(&self) -> String {
        self.files()
            .next()
            .map_or_else(String::new, |file| file.shown())
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn modified_ms(&self) -> u64 {
        self.files()
            .map(|file| file.modified_ms())
            .max()
            .unwrap_or(0)
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let (pieces, size) = (self.pieces.clone(), self.size);
        // The thread ends with the connection.
        std::thread::Builder::new()
            .name("compose".into())
            .spawn(move || serve(ours, &pieces, size))?;
        Ok(theirs)
    }

    fn export(&self) -> &'static str {
        ""
    }

    fn prepare(&self) {
        self.files().for_each(|file| file.prepare());
    }

    fn expect(&self, ranges: &[(u64, u64)]) {
        let mut start = 0u64;
        for piece in self.pieces.iter() {
            let end = start.saturating_add(piece.length);
            if let Content::File(file, at) = &piece.content {
                let ends = |(offset, length): &(u64, u64)| offset.saturating_add(*length);
                let first = ranges.partition_point(|range| ends(range) <= start);
                let rest = ranges[first..]
                    .iter()
                    .take_while(|(offset, _)| *offset < end);
                let inside = rest.filter_map(|(offset, length)| {
                    let from = (*offset).max(start);
                    let to = offset.saturating_add(*length).min(end);
                    (from < to).then(|| (at + (from - start), to - from))
                });
                file.expect(&inside.collect::<Vec<_>>());
            }
            start = end;
        }
    }

    fn check_unchanged(&self) -> Result<(), Doubt> {
        self.files().try_for_each(|file| file.check_unchanged())
    }
}

/// Serves one client until it disconnects.
fn serve(mut stream: UnixStream, pieces: &[Piece], size: u64) {
    let served = negotiate(&mut stream, size).and_then(|agreed| match agreed {
        true => transmit(stream, pieces, size),
        false => Ok(()),
    });
    if let Err(e) = served {
        tracing::debug!("the connection to a composed disk ended: {e}");
    }
}

pub(super) fn array<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn u32_of(stream: &mut impl Read) -> io::Result<u32> {
    array(stream).map(u32::from_be_bytes)
}

/// Negotiates. Returns whether the client chose the export.
pub(super) fn negotiate(stream: &mut UnixStream, size: u64) -> io::Result<bool> {
    let mut greeting = [*INIT_MAGIC, *OPTION_MAGIC].concat();
    greeting.extend(HANDSHAKE.to_be_bytes());
    stream.write_all(&greeting)?;
    let without_zeroes = u32_of(stream)? & 2 != 0;
    let mut export = size.to_be_bytes().to_vec();
    export.extend(FLAGS.to_be_bytes());
    loop {
        if &array::<8>(stream)? != OPTION_MAGIC {
            return Err(io::Error::other("no option"));
        }
        let (option, length) = (u32_of(stream)?, u32_of(stream)?);
        if length > MAX_OPTION {
            return Err(io::Error::other("an option that is too long"));
        }
        stream.read_exact(&mut vec![0; length as usize])?;
        let reply = |kind: u32, data: &[u8]| {
            let mut reply = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            for number in [option, kind, data.len() as u32] {
                reply.extend(number.to_be_bytes());
            }
            reply.extend(data);
            reply
        };
        match option {
            OPT_EXPORT_NAME => {
                if !without_zeroes {
                    export.extend([0; 124]);
                }
                stream.write_all(&export)?;
                return Ok(true);
            }
            OPT_ABORT => {
                stream.write_all(&reply(REP_ACK, &[]))?;
                return Ok(false);
            }
            OPT_INFO | OPT_GO => {
                // Information 0: the export.
                let information = [&[0, 0], &export[..]].concat();
                stream.write_all(&reply(REP_INFO, &information))?;
                stream.write_all(&reply(REP_ACK, &[]))?;
                if option == OPT_GO {
                    return Ok(true);
                }
            }
            _ => stream.write_all(&reply(REP_UNSUPPORTED, &[]))?,
        }
    }
}

struct Request {
    cookie: [u8; 8],
    offset: u64,
    length: u32,
}

fn transmit(mut stream: UnixStream, pieces: &[Piece], size: u64) -> io::Result<()> {
    let out = Mutex::new(stream.try_clone()?);
    let (sender, receiver) = mpsc::sync_channel::<Request>(WORKERS);
    let receiver = Mutex::new(receiver);
    std::thread::scope(|scope| {
        // Each has its own connections, because one answers one request at a time.
        for _ in 0..WORKERS {
            scope.spawn(|| work(&receiver, &out, pieces));
        }
        let taken = take(&mut stream, &sender, &out, size);
        drop(sender);
        taken
    })
}

/// Passes on the requests for data, and answers the others.
fn take(
    stream: &mut UnixStream,
    sender: &mpsc::SyncSender<Request>,
    out: &Mutex<UnixStream>,
    size: u64,
) -> io::Result<()> {
    loop {
        let head: [u8; 28] = match array(stream) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            head => head?,
        };
        let mut rest = &head[..];
        let (magic, _flags) = (u32_of(&mut rest)?, array::<2>(&mut rest)?);
        let command = u16::from_be_bytes(array(&mut rest)?);
        let request = Request {
            cookie: array(&mut rest)?,
            offset: u64::from_be_bytes(array(&mut rest)?),
            length: u32_of(&mut rest)?,
        };
        if magic != REQUEST_MAGIC {
            return Err(io::Error::other("no request"));
        }
        match command {
            CMD_DISCONNECT => return Ok(()),
            CMD_FLUSH => answer(out, request.cookie, Ok(&[]))?,
            CMD_READ
                if request.length <= MAX_READ
                    && check_range(request.offset, u64::from(request.length), size).is_ok() =>
            {
                if sender.send(request).is_err() {
                    return Ok(());
                }
            }
            _ => answer(out, request.cookie, Err(libc::EINVAL as u32))?,
        }
    }
}

fn work(receiver: &Mutex<mpsc::Receiver<Request>>, out: &Mutex<UnixStream>, pieces: &[Piece]) {
    let reader = |piece: &Piece| piece.file().map(|file| Remote::new(file.clone()));
    let readers: Vec<Option<Arc<Remote>>> = pieces.iter().map(reader).collect();
    loop {
        let next = receiver
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        let Ok(request) = next else { return };
        let mut data = vec![0; request.length as usize];
        let read = read(pieces, &readers, request.offset, &mut data);
        let answered = match read {
            Ok(()) => answer(out, request.cookie, Ok(&data)),
            Err(_) => answer(out, request.cookie, Err(libc::EIO as u32)),
        };
        if answered.is_err() {
            return;
        }
    }
}

fn answer(out: &Mutex<UnixStream>, cookie: [u8; 8], result: Result<&[u8], u32>) -> io::Result<()> {
    let mut head = REPLY_MAGIC.to_be_bytes().to_vec();
    head.extend(result.err().unwrap_or(0).to_be_bytes());
    head.extend(cookie);
    let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
    out.write_all(&head)?;
    out.write_all(result.unwrap_or_default())
}

/// Fills `buf`, which initially is all zeroes.
fn read(
    pieces: &[Piece],
    readers: &[Option<Arc<Remote>>],
    offset: u64,
    buf: &mut [u8],
) -> io::Result<()> {
    let end = offset + buf.len() as u64;
    let mut start = 0u64;
    for (piece, reader) in pieces.iter().zip(readers) {
        let (from, to) = (start.max(offset), (start + piece.length).min(end));
        if from < to {
            let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
            let inside = from - start;
            match (&piece.content, reader) {
                (Content::File(_, at), Some(reader)) => reader.read_at(at + inside, part)?,
                (Content::Bytes(bytes), _) => {
                    part.copy_from_slice(&bytes[inside as usize..(to - start) as usize]);
                }
                _ => {}
            }
        }
        start += piece.length;
        if start >= end {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::nbd::{Nbd, Patience};
    use super::super::testing::Served;
    use super::*;

    #[test]
    fn pieces_read_as_one_disk() {
        let folder = tempfile::tempdir().unwrap();
        let file = |seed: u8, len: usize| -> Arc<dyn RemoteFile> {
            let bytes: Vec<u8> = (0..len).map(|i| (i / 7) as u8 ^ seed).collect();
            let path = folder.path().join(seed.to_string());
            std::fs::write(&path, bytes).unwrap();
            Served::new(&path)
        };
        let (a, b) = (file(1, 300_000), file(2, 200_000));
        let head: Vec<u8> = (0..512).map(|i| i as u8).collect();
        let pieces = vec![
            Piece::bytes(head.clone()),
            Piece::of(&a, 512, 250_368),
            Piece::zero(10_240),
            Piece::of(&b, 0, 200_000),
        ];
        let mut want = head;
        want.extend((512..250_880).map(|i| (i / 7) as u8 ^ 1));
        want.extend([0; 10_240]);
        want.extend((0..200_000).map(|i| (i / 7) as u8 ^ 2));
        let disk = Composed::of(pieces);
        assert_eq!(disk.size(), want.len() as u64);
        let patience = Patience {
            silence: Duration::from_secs(10),
            stopping: Duration::from_secs(10),
        };
        let nbd = Nbd::handshake(disk.connect().unwrap(), disk.export(), patience).unwrap();
        assert!(nbd.is_read_only());
        for (offset, len) in [
            (0, want.len()),
            (250_000, 20_000),
            (260_607, 2),
            (460_607, 1),
        ] {
            let mut buf = vec![9; len];
            nbd.read_at(offset as u64, &mut buf).unwrap();
            assert!(buf == want[offset..offset + len], "{offset}+{len}");
        }
        assert!(nbd.read_at(want.len() as u64, &mut [0]).is_err());
    }

    #[test]
    fn a_whole_file_is_itself() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, [1; 1024]).unwrap();
        let file: Arc<dyn RemoteFile> = Served::new(&path);
        let piece = |length, at| Piece::of(&file, at, length);
        assert!(Arc::ptr_eq(&Composed::of(vec![piece(1024, 0)]), &file));
        assert!(!Arc::ptr_eq(&Composed::of(vec![piece(512, 512)]), &file));
    }
}
