//! The device for libntfs-3g: callbacks over a byte range of a [`BlockWrite`].

use std::ffi::{c_int, c_ulong, c_void};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, Mutex};

use super::ffi::{
    Device, DeviceOps, EINVAL, EIO, ENOSPC, EOPNOTSUPP, EROFS, ND_DIRTY, ND_OPEN, O_ACCMODE,
    O_RDWR, set_errno,
};
use crate::block::BlockWrite;
use crate::error::Errno;

/// The operations, the same for every device.
pub static OPS: DeviceOps = DeviceOps {
    open: op_open,
    close: op_close,
    seek: op_seek,
    read: op_read,
    write: op_write,
    pread: op_pread,
    pwrite: op_pwrite,
    sync: op_sync,
    stat: op_stat,
    ioctl: op_ioctl,
};

/// The data of the callbacks; the library keeps a pointer to it.
pub struct Backing {
    disk: Arc<dyn BlockWrite>,
    start: u64,
    len: u64,
    state: Mutex<BackingState>,
}

#[derive(Default)]
struct BackingState {
    pos: u64,
    /// The first error of the disk: the library returns only an errno.
    fault: Option<DeviceFault>,
}

/// The reason why the disk could not be read or written.
#[derive(Clone)]
pub struct DeviceFault {
    pub reason: String,
    pub errno: Option<Errno>,
}

impl Backing {
    pub fn new(disk: Arc<dyn BlockWrite>, start: u64, len: u64) -> Self {
        Self {
            len: len.min(disk.size().saturating_sub(start)),
            disk,
            start,
            state: Mutex::default(),
        }
    }

    /// The first error of the disk, if there was one.
    pub fn fault(&self) -> Option<DeviceFault> {
        self.state().fault.clone()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, BackingState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The part of `count` bytes at `offset` inside the range, and its offset on the disk.
    fn range(&self, offset: i64, count: i64) -> Result<(u64, usize), c_int> {
        let (Ok(offset), Ok(count)) = (u64::try_from(offset), usize::try_from(count)) else {
            return Err(EINVAL);
        };
        let n = count.min(usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX));
        Ok((self.start.saturating_add(offset), n))
    }

    fn noted(&self, what: &str, result: io::Result<()>) -> Result<(), c_int> {
        result.map_err(|error| {
            self.state().fault.get_or_insert_with(|| DeviceFault {
                reason: format!("{what} the disk: {error}"),
                errno: error.raw_os_error().map(Errno),
            });
            match error.raw_os_error() {
                Some(ENOSPC) => ENOSPC,
                _ => EIO,
            }
        })
    }
}

/// Runs a callback: no panic may enter C, and errors become `failed` with errno set.
///
/// # Safety
/// `dev` must be a device made by [`super::Ntfs3g::mount`].
unsafe fn callback<T>(
    dev: *mut Device,
    failed: T,
    work: impl FnOnce(&mut Device, &Backing) -> Result<T, c_int>,
) -> T {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the library passes its device and does not use it while the callback runs. Its
        // private pointer is the Backing, which outlives the device.
        let (dev, backing) = unsafe { (&mut *dev, &*(*dev).private.cast::<Backing>()) };
        work(dev, backing)
    }));
    match outcome.unwrap_or(Err(EIO)) {
        Ok(value) => value,
        Err(errno) => {
            set_errno(errno);
            failed
        }
    }
}

unsafe extern "C" fn op_open(dev: *mut Device, flags: c_int) -> c_int {
    // SAFETY: called by the library with a device made by `mount`.
    unsafe {
        callback(dev, -1, |dev, _| {
            if flags & O_ACCMODE != O_RDWR {
                return Err(EROFS);
            }
            dev.state |= ND_OPEN;
            Ok(0)
        })
    }
}

unsafe extern "C" fn op_close(dev: *mut Device) -> c_int {
    // SAFETY: called by the library with a device made by `mount`.
    unsafe {
        callback(dev, -1, |dev, _| {
            dev.state &= !ND_OPEN;
            Ok(0)
        })
    }
}

unsafe extern "C" fn op_seek(dev: *mut Device, offset: i64, whence: c_int) -> i64 {
    // SAFETY: called by the library with a device made by `mount`.
    unsafe {
        callback(dev, -1, |_, backing| {
            let mut state = backing.state();
            let base = match whence {
                0 => 0,
                1 => state.pos,
                2 => backing.len,
                _ => return Err(EINVAL),
            };
            let pos = base.checked_add_signed(offset).ok_or(EINVAL)?;
            state.pos = pos;
            i64::try_from(pos).map_err(|_| EINVAL)
        })
    }
}

/// # Safety
/// `buf` must be valid for writes of `count` bytes.
unsafe fn read_into(
    backing: &Backing,
    buf: *mut c_void,
    count: i64,
    offset: i64,
) -> Result<i64, c_int> {
    let (at, n) = backing.range(offset, count)?;
    if n == 0 {
        return Ok(0);
    }
    // SAFETY: the caller vouches for `count >= n` bytes; zeroing makes them initialised.
    let buf = unsafe {
        ptr::write_bytes(buf.cast::<u8>(), 0, n);
        std::slice::from_raw_parts_mut(buf.cast::<u8>(), n)
    };
    backing.noted("reading", backing.disk.read_at(at, buf))?;
    Ok(n as i64)
}

/// # Safety
/// `buf` must be valid for reads of `count` bytes.
unsafe fn write_from(
    backing: &Backing,
    buf: *const c_void,
    count: i64,
    offset: i64,
) -> Result<i64, c_int> {
    let (at, n) = backing.range(offset, count)?;
    if i64::try_from(n) != Ok(count) {
        backing.state().fault.get_or_insert_with(|| DeviceFault {
            reason: "writing past the end of the partition".into(),
            errno: None,
        });
        return Err(EIO);
    }
    if n == 0 {
        return Ok(0);
    }
    // SAFETY: the caller vouches for `count` bytes.
    let data = unsafe { std::slice::from_raw_parts(buf.cast::<u8>(), n) };
    backing.noted("writing", backing.disk.write_at(at, data))?;
    Ok(count)
}

unsafe extern "C" fn op_pread(dev: *mut Device, buf: *mut c_void, count: i64, at: i64) -> i64 {
    // SAFETY: called by the library with a device made by `mount` and a buffer of `count` bytes.
    unsafe { callback(dev, -1, |_, backing| read_into(backing, buf, count, at)) }
}

unsafe extern "C" fn op_pwrite(dev: *mut Device, buf: *const c_void, count: i64, at: i64) -> i64 {
    // SAFETY: called by the library with a device made by `mount` and a buffer of `count` bytes.
    unsafe {
        callback(dev, -1, |dev, backing| {
            dev.state |= ND_DIRTY;
            write_from(backing, buf, count, at)
        })
    }
}

unsafe extern "C" fn op_read(dev: *mut Device, buf: *mut c_void, count: i64) -> i64 {
    // SAFETY: called by the library with a device made by `mount` and a buffer of `count` bytes.
    unsafe {
        callback(dev, -1, |_, backing| {
            let at = i64::try_from(backing.state().pos).map_err(|_| EINVAL)?;
            let n = read_into(backing, buf, count, at)?;
            backing.state().pos += n.unsigned_abs();
            Ok(n)
        })
    }
}

unsafe extern "C" fn op_write(dev: *mut Device, buf: *const c_void, count: i64) -> i64 {
    // SAFETY: called by the library with a device made by `mount` and a buffer of `count` bytes.
    unsafe {
        callback(dev, -1, |dev, backing| {
            dev.state |= ND_DIRTY;
            let at = i64::try_from(backing.state().pos).map_err(|_| EINVAL)?;
            let n = write_from(backing, buf, count, at)?;
            backing.state().pos += n.unsigned_abs();
            Ok(n)
        })
    }
}

unsafe extern "C" fn op_sync(dev: *mut Device) -> c_int {
    // SAFETY: called by the library with a device made by `mount`.
    unsafe {
        callback(dev, -1, |dev, backing| {
            backing.noted("flushing", backing.disk.flush())?;
            dev.state &= !ND_DIRTY;
            Ok(0)
        })
    }
}

/// Answers nothing: sizes come from the boot sector and the range.
unsafe extern "C" fn op_stat(_: *mut Device, _: *mut c_void) -> c_int {
    set_errno(EOPNOTSUPP);
    -1
}

unsafe extern "C" fn op_ioctl(_: *mut Device, _: c_ulong, _: *mut c_void) -> c_int {
    set_errno(EOPNOTSUPP);
    -1
}
