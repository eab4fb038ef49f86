//! Shares blocks between a raw source and its raw copy on one file system, if it supports that
//! (btrfs, XFS). Then only the data of an overlay over the source is written.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{FallocateFlags, fallocate, ioctl_ficlone};
use rustix::io::Errno;

use super::chain::Image;
use super::export::{self, Differences};
use crate::transfer::Extents;

/// Makes a new, empty target share the blocks of a raw source. Returns the ranges still to be
/// copied; `None` if source and target cannot share anything.
pub(super) fn share(source: &Image, target: &File) -> io::Result<Option<Extents>> {
    let Some(Differences { file, data, zeroes }) = export::differences(source)? else {
        return Ok(None);
    };
    match ioctl_ficlone(target, &file) {
        Ok(()) => {}
        // Another file system, one without sharing, a device, or a policy against it.
        Err(error) => {
            tracing::info!("nothing is shared with the source: {error}");
            return Ok(None);
        }
    }
    target.set_len(source.virtual_size())?;
    for range in zeroes.iter() {
        punch(target, &range)?;
    }
    Ok(Some(data))
}

fn punch(target: &File, range: &Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match fallocate(target, flags, range.start, range.end - range.start) {
            Err(Errno::INTR) => {}
            done => return Ok(done?),
        }
    }
}
