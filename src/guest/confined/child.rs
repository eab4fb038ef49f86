//! The child's side: mounts the volume whose blocks its parent provides, and executes requests.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use super::wire::{self, Fields, Frame, Tag};
use super::{FAILPOINT, VERB};
use crate::block::{BlockRead, BlockWrite, check_range};
use crate::disk::cache::Cached;
use crate::disk::gather::Gathered;
use crate::failpoint;
use crate::guest::ntfs3g::{self, MountOptions, Ntfs3g};
use crate::guest::{Extent, GuestError, GuestPath};
use crate::tool::{confine, launcher};

/// The longest request: a file and its name.
const MAX_REQUEST: usize = usize::MAX;

/// Runs the child if this process was started as one. Called in `main` with all arguments.
pub fn run_if_asked(args: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut args = args.into_iter().skip(1);
    if args.next()? != VERB {
        return None;
    }
    Some(match run(args.next()) {
        Ok(()) => ExitCode::SUCCESS,
        // The parent sees the end of this process; the error of a request was sent over the socket.
        Err(_) => ExitCode::FAILURE,
    })
}

fn run(parent: Option<OsString>) -> io::Result<()> {
    launcher::tie_to(parent)?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    // Loading opens files, so it happens before they are out of reach.
    let _ = ntfs3g::is_available();
    // The same applies to files that the formatting of an error or a panic may read.
    let _ = std::env::current_dir();
    confine::parser()?;
    let socket = Arc::new(Mutex::new(UnixStream::from(socket)));
    let mut volume = None;
    loop {
        let frame = {
            let mut stream = socket.lock().unwrap_or_else(PoisonError::into_inner);
            wire::receive(&mut *stream, MAX_REQUEST)
        };
        let frame = match frame {
            Ok(frame) => frame,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        };
        let done = carry_out(frame, &socket, &mut volume);
        let mut stream = socket.lock().unwrap_or_else(PoisonError::into_inner);
        match done {
            Ok(()) => wire::send(&mut *stream, Tag::Done, Fields::default())?,
            Err(error) => wire::send(&mut *stream, Tag::Failed, wire::error_fields(&error))?,
        }
    }
}

fn carry_out(
    mut frame: Frame,
    socket: &Arc<Mutex<UnixStream>>,
    volume: &mut Option<Ntfs3g>,
) -> Result<(), GuestError> {
    failpoint::hit(FAILPOINT).map_err(|error| GuestError::Unsafe {
        reason: error.to_string(),
    })?;
    let missing = || GuestError::Unsafe {
        reason: "it is not mounted".into(),
    };
    match frame.tag {
        Tag::Mount => {
            let (size, force) = (frame.number()?, frame.number()?);
            // The library reads and writes the same records again and again, and nothing else
            // writes.
            let disk = Arc::new(Cached::new(Gathered::new(Blocks {
                socket: socket.clone(),
                size,
            })));
            let options = MountOptions {
                force_dirty: force != 0,
            };
            *volume = Some(Ntfs3g::mount(disk, 0, size, options)?);
            return Ok(());
        }
        Tag::Unmount => return volume.take().map_or(Ok(()), Ntfs3g::unmount),
        _ => {}
    }
    let volume = volume.as_mut().ok_or_else(missing)?;
    let path: GuestPath = frame.path()?;
    match frame.tag {
        Tag::CreateDir => volume.create_dir(&path),
        Tag::WriteFile => volume.write_file(&path, frame.bytes()?),
        Tag::PatchFile => {
            let (size, count) = (frame.number()?, frame.number()?);
            let mut extents = Vec::new();
            for _ in 0..count {
                extents.push(Extent {
                    offset: frame.number()?,
                    data: frame.bytes()?.to_vec(),
                });
            }
            volume.patch_file(&path, size, &extents)
        }
        Tag::RemoveFile => volume.remove_file(&path),
        Tag::RemoveDir => volume.remove_dir(&path),
        _ => Err(wire::invalid("a request").into()),
    }
}

/// The volume, whose blocks the parent provides.
struct Blocks {
    socket: Arc<Mutex<UnixStream>>,
    size: u64,
}

impl Blocks {
    fn ask(&self, tag: Tag, fields: Fields) -> io::Result<Frame> {
        let mut stream = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        wire::send(&mut *stream, tag, fields)?;
        let mut answer = wire::receive(&mut *stream, wire::MAX_BLOCKS + 64)?;
        match answer.tag {
            Tag::Blocks => Ok(answer),
            Tag::Fault => {
                let errno = i32::try_from(answer.number()?).unwrap_or(0);
                Err(io::Error::from_raw_os_error(errno))
            }
            _ => Err(wire::invalid("an answer")),
        }
    }
}

impl Blocks {
    /// Sends as many runs at a time as a frame takes: each frame waits for an answer.
    fn send<'d>(&self, runs: impl IntoIterator<Item = (u64, &'d [u8])>) -> io::Result<()> {
        let mut fields = Fields::default();
        for (mut offset, data) in runs {
            check_range(offset, data.len() as u64, self.size)?;
            for part in data.chunks(wire::MAX_BLOCKS) {
                if fields.len() + part.len() > wire::MAX_BLOCKS {
                    self.ask(Tag::Write, std::mem::take(&mut fields))?;
                }
                fields = fields.number(offset).bytes(part);
                offset += part.len() as u64;
            }
        }
        match fields.len() {
            0 => Ok(()),
            _ => self.ask(Tag::Write, fields).map(drop),
        }
    }
}

impl BlockRead for Blocks {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        let (mut offset, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let len = rest.len().min(wire::MAX_BLOCKS);
            let fields = Fields::default().number(offset).number(len as u64);
            let mut answer = self.ask(Tag::Read, fields)?;
            let (part, more) = rest.split_at_mut(len);
            let bytes = answer.bytes()?;
            if bytes.len() != len {
                return Err(wire::invalid("blocks"));
            }
            part.copy_from_slice(bytes);
            (offset, rest) = (offset + len as u64, more);
        }
        Ok(())
    }
}

impl BlockWrite for Blocks {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.send([(offset, data)])
    }

    fn write_runs(&self, runs: &BTreeMap<u64, Vec<u8>>) -> io::Result<()> {
        self.send(runs.iter().map(|(offset, data)| (*offset, data.as_slice())))
    }

    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut at = offset;
        let end = offset.saturating_add(len);
        while at < end {
            let n = (end - at).min(1 << 20);
            self.write_at(at, &vec![0; n as usize])?;
            at += n;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.ask(Tag::Flush, Fields::default()).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::super::Range;
    use super::*;
    use crate::block::FileDisk;

    /// A volume of 1 MiB from 64 KiB on, in a file that starts as `7`s.
    fn volume() -> (tempfile::NamedTempFile, Range) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; 2 << 20]).unwrap();
        let disk = Arc::new(FileDisk::open_rw(file.path()).unwrap());
        (file, Range::new(disk, 64 << 10, 1 << 20))
    }

    #[test]
    fn gathered_writes_go_to_the_parent_in_one_frame() {
        let (file, volume) = volume();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let frames = thread::spawn(move || {
            let mut frames = 0;
            while let Ok(mut frame) = wire::receive(&mut theirs, wire::MAX_FROM_CHILD) {
                assert_eq!(frame.tag, Tag::Write);
                let blocks = volume.serve(&mut frame).unwrap().unwrap();
                let fields = Fields::default().bytes(&blocks);
                wire::send(&mut theirs, Tag::Blocks, fields).unwrap();
                frames += 1;
            }
            frames
        });
        let blocks = Blocks {
            socket: Arc::new(Mutex::new(ours)),
            size: 1 << 20,
        };
        let end = (1 << 20) - 3;
        let runs = [(0, vec![1; 4096]), (8192, vec![2; 100]), (end, vec![3; 3])];
        blocks.write_runs(&BTreeMap::from(runs)).unwrap();
        blocks.write_runs(&BTreeMap::new()).unwrap();
        assert!(blocks.write_at(end + 1, &[4; 3]).is_err());
        drop(blocks);
        assert_eq!(frames.join().unwrap(), 1);
        let mut wanted = vec![7; 2 << 20];
        let start = 64 << 10;
        wanted[start..start + 4096].fill(1);
        wanted[start + 8192..start + 8292].fill(2);
        let end = start + end as usize;
        wanted[end..end + 3].fill(3);
        assert!(std::fs::read(file.path()).unwrap() == wanted);
    }

    /// A child that a guest controls cannot reach past its volume with a later run of a frame.
    #[test]
    fn no_run_of_a_frame_reaches_outside_the_volume() {
        for outside in [1 << 20, u64::MAX - 2, (1 << 20) - 2] {
            let (file, volume) = volume();
            let fields = Fields::default().number(0).bytes(&[1; 3]);
            let fields = fields.number(outside).bytes(&[2; 3]);
            let mut sent = Vec::new();
            wire::send(&mut sent, Tag::Write, fields).unwrap();
            let mut frame = wire::receive(&mut sent.as_slice(), wire::MAX_FROM_CHILD).unwrap();
            assert!(volume.serve(&mut frame).is_err(), "{outside}");
            let bytes = std::fs::read(file.path()).unwrap();
            assert!(!bytes.contains(&2), "{outside}");
        }
    }
}
