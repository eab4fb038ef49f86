//! Open inodes and attributes as guards.

use std::ffi::c_int;
use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;

use super::ffi::{
    Api, Attr, EINVAL, EIO, FILE_ATTR_DIRECTORY, Inode, NTFS_UPDATE_MCTIME, check, errno, set_errno,
};

/// An open inode. Closing writes it back, so errors matter: use [`OpenInode::close`].
pub struct OpenInode<'v> {
    api: &'static Api,
    inode: NonNull<Inode>,
    volume: PhantomData<&'v super::Ntfs3g>,
}

impl OpenInode<'_> {
    /// Takes ownership of an inode that the library has opened; for null, errno has the error.
    ///
    /// # Safety
    /// `inode` must be null or open, and not in use elsewhere.
    pub unsafe fn from_raw(api: &'static Api, inode: *mut Inode) -> Result<Self, c_int> {
        Ok(Self {
            api,
            inode: NonNull::new(inode).ok_or_else(errno)?,
            volume: PhantomData,
        })
    }

    pub fn ptr(&self) -> *mut Inode {
        self.inode.as_ptr()
    }

    /// Releases the inode to a function that closes it itself.
    pub fn into_ptr(self) -> *mut Inode {
        let inode = self.ptr();
        std::mem::forget(self);
        inode
    }

    pub fn close(self) -> Result<(), c_int> {
        let (api, inode) = (self.api, self.into_ptr());
        // SAFETY: the inode is open and not used again.
        check(unsafe { (api.ntfs_inode_close)(inode) })
    }

    /// Closes a new inode while its directory is open.
    pub fn close_in(self, dir: &OpenInode<'_>) -> Result<(), c_int> {
        let (api, inode) = (self.api, self.into_ptr());
        // SAFETY: both inodes are open, and the first is not used again.
        check(unsafe { (api.ntfs_inode_close_in_dir)(inode, dir.ptr()) })
    }

    pub fn attributes(&self) -> u32 {
        let mut value = [0u8; 4];
        // SAFETY: the inode is open and the buffer has the given length.
        unsafe { (self.api.ntfs_get_ntfs_attrib)(self.ptr(), value.as_mut_ptr().cast(), 4) };
        u32::from_le_bytes(value)
    }

    pub fn is_dir(&self) -> bool {
        self.attributes() & FILE_ATTR_DIRECTORY != 0
    }

    pub fn attr(&self, kind: u32, name: *mut u16, name_len: u32) -> Result<OpenAttr<'_>, c_int> {
        // SAFETY: the inode is open; the name is AT_UNNAMED or valid for `name_len` units.
        let attr = unsafe { (self.api.ntfs_attr_open)(self.ptr(), kind, name, name_len) };
        Ok(OpenAttr {
            api: self.api,
            attr: NonNull::new(attr).ok_or_else(errno)?,
            inode: PhantomData,
        })
    }

    pub fn unnamed(&self, kind: u32) -> Result<OpenAttr<'_>, c_int> {
        self.attr(kind, self.api.unnamed as *mut u16, 0)
    }

    pub fn remove_attr(&self, kind: u32, name: &[u16]) -> Result<(), c_int> {
        let mut name = name.to_vec();
        let (name, len) = match name.len() {
            0 => (self.api.unnamed as *mut u16, 0),
            len => (name.as_mut_ptr(), len as u32),
        };
        // SAFETY: the inode is open; the name is AT_UNNAMED or a live buffer of `len` units.
        check(unsafe { (self.api.ntfs_attr_remove)(self.ptr(), kind, name, len) })
    }

    pub fn add_attr(&self, kind: u32, value: &[u8]) -> Result<(), c_int> {
        let unnamed = self.api.unnamed as *mut u16;
        let len = value.len() as i64;
        // SAFETY: the inode is open and the value is a live buffer of `len` bytes.
        check(unsafe {
            (self.api.ntfs_attr_add)(self.ptr(), kind, unnamed, 0, value.as_ptr(), len)
        })
    }

    pub fn has_attr(&self, kind: u32, name: &[u16]) -> bool {
        // SAFETY: the inode is open and the name is valid for its length.
        unsafe {
            (self.api.ntfs_attr_exist)(self.ptr(), kind, name.as_ptr(), name.len() as u32) != 0
        }
    }

    pub fn touch(&self) {
        // SAFETY: the inode is open.
        unsafe { (self.api.ntfs_inode_update_times)(self.ptr(), NTFS_UPDATE_MCTIME) };
    }
}

impl Drop for OpenInode<'_> {
    fn drop(&mut self) {
        // SAFETY: the inode is open and not used again.
        if unsafe { (self.api.ntfs_inode_close)(self.ptr()) } != 0 {
            tracing::warn!("closing an NTFS file: {}", io::Error::last_os_error());
        }
    }
}

pub struct OpenAttr<'i> {
    api: &'static Api,
    attr: NonNull<Attr>,
    inode: PhantomData<&'i ()>,
}

impl OpenAttr<'_> {
    pub fn raw(&self) -> *mut Attr {
        self.attr.as_ptr()
    }

    pub fn read(&self, max: usize) -> Result<Vec<u8>, c_int> {
        let mut buf = vec![0u8; max];
        // SAFETY: the attribute is open and the buffer is `max` bytes long.
        let n = unsafe {
            (self.api.ntfs_attr_pread)(self.attr.as_ptr(), 0, max as i64, buf.as_mut_ptr().cast())
        };
        buf.truncate(usize::try_from(n).map_err(|_| errno())?);
        Ok(buf)
    }

    pub fn set_size(&self, size: u64) -> Result<(), c_int> {
        let size = i64::try_from(size).map_err(|_| EINVAL)?;
        // SAFETY: the attribute is open.
        check(unsafe { (self.api.ntfs_attr_truncate_solid)(self.attr.as_ptr(), size) })
    }

    pub fn write(&self, mut offset: u64, mut data: &[u8]) -> Result<(), c_int> {
        while !data.is_empty() {
            let at = i64::try_from(offset).map_err(|_| EINVAL)?;
            set_errno(EIO);
            // SAFETY: the attribute is open and `data` is valid for its length.
            let n = unsafe {
                (self.api.ntfs_attr_pwrite)(
                    self.attr.as_ptr(),
                    at,
                    data.len() as i64,
                    data.as_ptr().cast(),
                )
            };
            match usize::try_from(n) {
                Ok(n @ 1..) if n <= data.len() => {
                    data = &data[n..];
                    offset += n as u64;
                }
                _ => return Err(errno()),
            }
        }
        Ok(())
    }
}

impl Drop for OpenAttr<'_> {
    fn drop(&mut self) {
        // SAFETY: the attribute is open and not used again.
        unsafe { (self.api.ntfs_attr_close)(self.attr.as_ptr()) };
    }
}
