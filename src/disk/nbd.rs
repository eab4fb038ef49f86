//! A client for the Network Block Device protocol, limited to the needs of one trusted local
//! server.
//!
//! Fixed newstyle handshake, `NBD_OPT_GO`, simple replies; no TLS, no structured replies. The
//! server is hyper2kvm's own storage daemon on a private socket, but its answers are checked
//! nevertheless. Large requests are split into pieces that are all sent before the first reply is
//! awaited. So the server reads ahead while this process receives.
//!
//! Specification: NetworkBlockDevice/nbd `doc/proto.md`. No block size is negotiated, so any offset
//! and length may be requested; QEMU handles alignment.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::block::{BlockRead, BlockWrite, check_range};
use crate::stop;
use crate::wire::nbd_protocol::{
    CMD_DISC, CMD_FLUSH, CMD_READ, FIXED_NEWSTYLE, INFO_EXPORT, INIT_MAGIC, NO_ZEROES, OPT_GO,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, REP_ACK, REP_ERROR, REP_INFO, REPLY_MAGIC, REQUEST_MAGIC,
};

const FLAG_READ_ONLY: u16 = 1 << 1;
const FLAG_SEND_FLUSH: u16 = 1 << 2;
const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

const CMD_WRITE: u16 = 1;
const CMD_WRITE_ZEROES: u16 = 6;

/// The size of the pieces of large reads and writes. The protocol allows 32 MiB.
const PIECE: usize = 512 << 10;
/// Pieces in flight: their requests and replies fit any socket buffer, so neither side can block
/// the other.
const WINDOW: usize = 16;
/// The largest range zeroed by one request; a multiple of every cluster size.
const ZERO_PIECE: u64 = 1 << 30;
/// The longest option reply that is accepted.
const MAX_OPTION_REPLY: u32 = 64 << 10;

/// A connection to an export.
#[derive(Debug)]
pub struct Nbd {
    size: u64,
    flags: u16,
    conn: Mutex<Conn>,
}

/// The time limits for a silent server.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    pub silence: Duration,
    /// The limit after the run was asked to stop.
    pub stopping: Duration,
}

/// The interval at which the stop flag is checked while the server is silent.
const TICK: Duration = Duration::from_millis(100);

/// A stream that neither blocks for ever nor misses a signal.
#[derive(Debug)]
struct Patient {
    stream: UnixStream,
    patience: Patience,
}

impl Patient {
    fn new(stream: UnixStream, patience: Patience) -> io::Result<Self> {
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(TICK))?;
        Ok(Self { stream, patience })
    }

    fn wait<T>(&mut self, mut once: impl FnMut(&mut UnixStream) -> io::Result<T>) -> io::Result<T> {
        let start = Instant::now();
        loop {
            let result = once(&mut self.stream);
            let quiet = |e: &io::Error| {
                matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                )
            };
            if !result.as_ref().is_err_and(quiet) {
                return result;
            }
            if stop::requested() && start.elapsed() >= self.patience.stopping {
                return Err(stop::Interrupted.into());
            }
            if start.elapsed() >= self.patience.silence {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!(
                        "the storage daemon did not answer within {} s",
                        self.patience.silence.as_secs()
                    ),
                ));
            }
        }
    }
}

impl Read for Patient {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.wait(|stream| stream.read(buf))
    }
}

impl Write for Patient {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.wait(|stream| stream.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[derive(Debug)]
struct Conn {
    stream: Patient,
    /// Identifies requests; every piece gets its own.
    cookie: u64,
    /// Whether an error has left the stream at an unknown position: it is not used any more.
    broken: bool,
}

impl Nbd {
    /// Negotiates the export of that name.
    pub fn handshake(stream: UnixStream, export: &str, patience: Patience) -> io::Result<Self> {
        let mut stream = Patient::new(stream, patience)?;
        let (size, flags) = negotiate(&mut stream, export)?;
        Ok(Self {
            size,
            flags,
            conn: Mutex::new(Conn {
                stream,
                cookie: 0,
                broken: false,
            }),
        })
    }

    pub fn is_read_only(&self) -> bool {
        self.flags & FLAG_READ_ONLY != 0
    }

    /// Whether a flush on one connection covers what was written through others.
    pub(super) fn can_be_several(&self) -> bool {
        self.flags & FLAG_CAN_MULTI_CONN != 0
    }

    /// Announces the end of requests. Data that was not flushed may be lost.
    pub fn disconnect(&self) {
        let mut conn = self.lock();
        if !conn.broken {
            let _ = conn.request(CMD_DISC, 0, 0);
            conn.broken = true;
        }
        let _ = conn.stream.stream.shutdown(std::net::Shutdown::Both);
    }

    fn lock(&self) -> MutexGuard<'_, Conn> {
        self.conn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn command(&self, command: u16, offset: u64, len: u32) -> io::Result<()> {
        self.lock().run(|conn| {
            let cookie = conn.request(command, offset, len)?;
            let (got, error) = conn.reply()?;
            if got != cookie {
                return Err(protocol("a reply to no request of this client"));
            }
            Ok(error)
        })
    }
}

fn protocol(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("NBD server sent {what}"),
    )
}

fn negotiate(stream: &mut Patient, export: &str) -> io::Result<(u64, u16)> {
    if &read_array::<8>(stream)? != INIT_MAGIC || &read_array::<8>(stream)? != OPTION_MAGIC {
        return Err(protocol("no newstyle greeting"));
    }
    let server = u16::from_be_bytes(read_array(stream)?);
    if server & FIXED_NEWSTYLE == 0 {
        return Err(protocol("an old handshake"));
    }
    let client = u32::from(server & (FIXED_NEWSTYLE | NO_ZEROES));
    let name = export.as_bytes();
    let mut message = Vec::new();
    message.extend(client.to_be_bytes());
    message.extend(OPTION_MAGIC);
    message.extend(OPT_GO.to_be_bytes());
    message.extend((name.len() as u32 + 6).to_be_bytes());
    message.extend((name.len() as u32).to_be_bytes());
    message.extend(name);
    message.extend(0u16.to_be_bytes());
    stream.write_all(&message)?;

    let mut export = None;
    // A server sends only a few of these.
    for _ in 0..64 {
        if u64::from_be_bytes(read_array(stream)?) != OPTION_REPLY_MAGIC
            || u32::from_be_bytes(read_array(stream)?) != OPT_GO
        {
            return Err(protocol("a wrong option reply"));
        }
        let kind = u32::from_be_bytes(read_array(stream)?);
        let len = u32::from_be_bytes(read_array(stream)?);
        if len > MAX_OPTION_REPLY {
            return Err(protocol("an option reply that is too long"));
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        match kind {
            REP_ACK => return export.ok_or_else(|| protocol("no export information")),
            REP_INFO => {
                let (kind, rest) = split::<2>(&data)?;
                if u16::from_be_bytes(kind) == INFO_EXPORT {
                    let (size, rest) = split::<8>(rest)?;
                    let (flags, _) = split::<2>(rest)?;
                    export = Some((u64::from_be_bytes(size), u16::from_be_bytes(flags)));
                }
            }
            error if error & REP_ERROR != 0 => {
                return Err(io::Error::other(format!(
                    "NBD server refused the export: {}",
                    crate::tool::clean(&data)
                )));
            }
            _ => {}
        }
    }
    Err(protocol("too many option replies"))
}

fn split<const N: usize>(data: &[u8]) -> io::Result<([u8; N], &[u8])> {
    let (head, rest) = data
        .split_first_chunk::<N>()
        .ok_or_else(|| protocol("a short option reply"))?;
    Ok((*head, rest))
}

fn read_array<const N: usize>(stream: &mut Patient) -> io::Result<[u8; N]> {
    let mut buf = [0; N];
    stream.read_exact(&mut buf)?;
    Ok(buf)
}

impl Conn {
    /// Runs one exchange. `Err` of the closure is a failed connection; `Ok` has the server's result
    /// of the request.
    fn run(&mut self, exchange: impl FnOnce(&mut Self) -> io::Result<u32>) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::new(
                io::ErrorKind::NotConnected,
                "the connection to the storage daemon is closed",
            ));
        }
        self.broken = true;
        let error = exchange(self)?;
        self.broken = false;
        match error {
            0 => Ok(()),
            // The protocol uses the numbers of Linux.
            errno => Err(io::Error::from_raw_os_error(
                i32::try_from(errno).unwrap_or(5),
            )),
        }
    }

    fn request(&mut self, command: u16, offset: u64, len: u32) -> io::Result<u64> {
        self.cookie = self.cookie.wrapping_add(1);
        let mut message = [0; 28];
        message[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        message[6..8].copy_from_slice(&command.to_be_bytes());
        message[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        message[16..24].copy_from_slice(&offset.to_be_bytes());
        message[24..].copy_from_slice(&len.to_be_bytes());
        self.stream.write_all(&message)?;
        Ok(self.cookie)
    }

    /// Cookie and error number of the next reply.
    fn reply(&mut self) -> io::Result<(u64, u32)> {
        let head: [u8; 16] = read_array(&mut self.stream)?;
        let (magic, rest) = split::<4>(&head)?;
        let (error, rest) = split::<4>(rest)?;
        let (cookie, _) = split::<8>(rest)?;
        if u32::from_be_bytes(magic) != REPLY_MAGIC {
            return Err(protocol("no simple reply"));
        }
        Ok((u64::from_be_bytes(cookie), u32::from_be_bytes(error)))
    }

    /// Awaits a reply to one of the pieces in flight and returns its index.
    fn piece(&mut self, under_way: &mut [Option<u64>]) -> io::Result<(usize, u32)> {
        let (cookie, error) = self.reply()?;
        let at = under_way
            .iter()
            .position(|c| *c == Some(cookie))
            .ok_or_else(|| protocol("a reply to no request of this client"))?;
        under_way[at] = None;
        Ok((at, error))
    }
}

/// The first error counts.
fn first(a: u32, b: u32) -> u32 {
    if a == 0 { b } else { a }
}

impl BlockRead for Nbd {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        let mut conn = self.lock();
        let mut at = offset;
        for group in buf.chunks_mut(PIECE * WINDOW) {
            conn.run(|conn| {
                let mut under_way = Vec::with_capacity(WINDOW);
                for piece in group.chunks(PIECE) {
                    under_way.push(Some(conn.request(CMD_READ, at, piece.len() as u32)?));
                    at += piece.len() as u64;
                }
                let mut pieces: Vec<&mut [u8]> = group.chunks_mut(PIECE).collect();
                let mut verdict = 0;
                for _ in 0..pieces.len() {
                    let (i, error) = conn.piece(&mut under_way)?;
                    if error == 0 {
                        conn.stream.read_exact(pieces[i])?;
                    }
                    verdict = first(verdict, error);
                }
                Ok(verdict)
            })?;
        }
        Ok(())
    }
}

impl BlockWrite for Nbd {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len() as u64, self.size)?;
        let mut conn = self.lock();
        let mut at = offset;
        for group in data.chunks(PIECE * WINDOW) {
            conn.run(|conn| {
                let mut under_way = Vec::with_capacity(WINDOW);
                for piece in group.chunks(PIECE) {
                    under_way.push(Some(conn.request(CMD_WRITE, at, piece.len() as u32)?));
                    conn.stream.write_all(piece)?;
                    at += piece.len() as u64;
                }
                let mut verdict = 0;
                for _ in 0..under_way.len() {
                    verdict = first(verdict, conn.piece(&mut under_way)?.1);
                }
                Ok(verdict)
            })?;
        }
        Ok(())
    }

    fn zero_at(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        while len > 0 {
            if self.flags & FLAG_SEND_WRITE_ZEROES != 0 {
                let n = len.min(ZERO_PIECE);
                // Without the "no hole" flag the server may deallocate.
                self.command(CMD_WRITE_ZEROES, offset, n as u32)?;
                (offset, len) = (offset + n, len - n);
            } else {
                let n = len.min(PIECE as u64);
                self.write_at(offset, &vec![0; n as usize])?;
                (offset, len) = (offset + n, len - n);
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if self.flags & FLAG_SEND_FLUSH == 0 {
            return Ok(());
        }
        self.command(CMD_FLUSH, 0, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Patience = Patience {
        silence: Duration::from_secs(5),
        stopping: Duration::from_secs(5),
    };

    #[test]
    fn a_silent_server_is_given_up() {
        let (silent, ours) = UnixStream::pair().unwrap();
        let patience = Patience {
            silence: Duration::from_millis(250),
            ..SOON
        };
        let start = Instant::now();
        let error = Nbd::handshake(ours, "x", patience).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        assert!(start.elapsed() < Duration::from_secs(3));
        drop(silent);
    }

    use std::thread;

    fn greeting(flags: u16) -> Vec<u8> {
        let mut g = Vec::new();
        g.extend(INIT_MAGIC);
        g.extend(OPTION_MAGIC);
        g.extend(flags.to_be_bytes());
        g
    }

    fn option_reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut r = Vec::new();
        r.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        r.extend(OPT_GO.to_be_bytes());
        r.extend(kind.to_be_bytes());
        r.extend((data.len() as u32).to_be_bytes());
        r.extend(data);
        r
    }

    fn export_info(size: u64, flags: u16) -> Vec<u8> {
        let mut i = INFO_EXPORT.to_be_bytes().to_vec();
        i.extend(size.to_be_bytes());
        i.extend(flags.to_be_bytes());
        i
    }

    fn good_start(size: u64) -> Vec<u8> {
        let mut script = greeting(3);
        script.extend(option_reply(REP_INFO, &export_info(size, 1 | 4 | 64)));
        script.extend(option_reply(REP_INFO, &[0, 9, 1, 2]));
        script.extend(option_reply(REP_ACK, &[]));
        script
    }

    fn reply(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
        let mut r = REPLY_MAGIC.to_be_bytes().to_vec();
        r.extend(error.to_be_bytes());
        r.extend(cookie.to_be_bytes());
        r.extend(data);
        r
    }

    /// A server with fixed output, whatever it receives.
    fn scripted(script: Vec<u8>) -> UnixStream {
        let (client, mut server) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let _ = server.write_all(&script);
            let _ = server.shutdown(std::net::Shutdown::Write);
            let _ = io::copy(&mut server, &mut io::sink());
        });
        client
    }

    #[test]
    fn bad_handshakes() {
        let mut no_info = greeting(3);
        no_info.extend(option_reply(REP_ACK, &[]));
        let mut refused = greeting(3);
        refused.extend(option_reply(REP_ERROR | 6, b"no\x1bsuch export"));
        let mut long = greeting(3);
        long.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        long.extend(OPT_GO.to_be_bytes());
        long.extend(REP_INFO.to_be_bytes());
        long.extend(u32::MAX.to_be_bytes());
        let mut short = greeting(3);
        short.extend(option_reply(REP_INFO, &[0, 0, 1]));
        let mut endless = greeting(3);
        for _ in 0..100 {
            endless.extend(option_reply(77, b""));
        }
        for (script, want) in [
            (vec![], "fill whole buffer"),
            (vec![b'x'; 40], "no newstyle"),
            (greeting(0), "old handshake"),
            (no_info, "no export information"),
            (refused, "nosuch export"),
            (long, "too long"),
            (short, "short option"),
            (endless, "too many"),
        ] {
            let e = Nbd::handshake(scripted(script), "x", SOON).unwrap_err();
            assert!(e.to_string().contains(want), "{e} / {want}");
        }
    }

    #[test]
    fn replies_in_any_order_and_errors() {
        let half = PIECE;
        let mut script = good_start(8 << 20);
        script.extend(reply(2, 0, &vec![2; half]));
        script.extend(reply(1, 0, &vec![1; half]));
        script.extend(reply(3, 28, &[]));
        script.extend(reply(4, 0, &[]));
        script.extend(reply(99, 0, &[]));
        let nbd = Nbd::handshake(scripted(script), "x", SOON).unwrap();
        assert_eq!((nbd.size(), nbd.is_read_only()), (8 << 20, false));
        let mut buf = vec![0; 2 * half];
        nbd.read_at(0, &mut buf).unwrap();
        assert!(buf[..half].iter().all(|&b| b == 1) && buf[half..].iter().all(|&b| b == 2));
        let e = nbd.write_at(0, b"x").unwrap_err();
        assert_eq!(
            e.raw_os_error(),
            Some(28),
            "the server's error is passed on"
        );
        nbd.flush().unwrap();
        assert!(nbd.read_at(8 << 20, &mut [0]).is_err(), "outside");
        // After a wrong cookie, nothing is trusted.
        assert!(nbd.flush().is_err());
        assert_eq!(nbd.flush().unwrap_err().kind(), io::ErrorKind::NotConnected);
    }

    #[test]
    fn server_that_goes_away() {
        let nbd = Nbd::handshake(scripted(good_start(4096)), "x", SOON).unwrap();
        assert!(nbd.read_at(0, &mut [0; 512]).is_err());
        nbd.disconnect();
        assert!(nbd.read_at(0, &mut [0; 512]).is_err());
    }
}
