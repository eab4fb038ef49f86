//! Writes NTFS through libntfs-3g, loaded at run time, over a byte range of any [`BlockWrite`].
//!
//! One of two modules with `unsafe` (the other binds libhivex). Its interface is plain: paths and
//! bytes in, `Result` out, so that it can run in a confined child process. Declarations follow
//! ntfs-3g's `device.h`, `dir.h`, `attrib.h`, `inode.h` and `volume.h` (2022.10.3; the same since
//! 2010). Only functions are called, and only `struct ntfs_device` is accessed, because other code
//! is meant to fill it in.
//!
//! Properties of the library:
//! - It must never have one inode open twice. So a file is opened after its directory is closed, or
//!   closed "in" the directory that is still open.
//! - `ntfs_delete` and `ntfs_set_ntfs_dos_name` close both inodes they are given, on error too.
//! - A null attribute name means "any name"; "no name" is the address of the symbol `AT_UNNAMED`.
//! - New names get the POSIX namespace. Windows accepts them. But a name that fits 8.3 is converted
//!   to `WIN32_AND_DOS`, as Windows itself would have made it. There is no call for Win32 alone.
//! - Growing a file makes a sparse one, unless `ntfs_attr_truncate_solid` is used.
//! - The `$Volume` dirty flag does not prevent a mount, so the caller has to check it.
#![allow(unsafe_code)]

mod device;
mod ffi;
mod handle;

use std::ffi::{CString, c_int, c_uint, c_void};
use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use device::{Backing, DeviceFault, OPS};
pub use ffi::is_available;
use ffi::*;
use handle::OpenInode;

use super::{Extent, FileKind, GuestError, GuestPath, IO_REPARSE_TAG_WOF, Result, security, wof};
use crate::block::BlockWrite;

/// Options of a mount.
#[derive(Debug, Clone, Copy, Default)]
pub struct MountOptions {
    /// Discard an unclean log. This loses Windows' unfinished changes: only on explicit request.
    pub force_dirty: bool,
}

/// A mounted volume. [`Ntfs3g::unmount`] reports errors, dropping it logs them.
pub struct Ntfs3g {
    api: &'static Api,
    volume: NonNull<Volume>,
    backing: NonNull<Backing>,
}

/// The security that a new file inherits from an existing one.
enum Security {
    /// An entry of `$Secure`.
    Id(u32),
    /// A separate attribute, as in NTFS 1.2 and by mkntfs.
    Descriptor(Vec<u8>),
}

struct Siblings {
    kind: c_uint,
    dir: u64,
    found: Vec<u64>,
}

unsafe extern "C" fn collect_sibling(
    siblings: *mut c_void,
    name: *const u16,
    name_len: c_int,
    _namespace: c_int,
    _pos: i64,
    reference: u64,
    kind: c_uint,
) -> c_int {
    // SAFETY: the pointer is the Siblings given to ntfs_readdir, which is not used during the call.
    // The name is valid for its length.
    let (siblings, name) = unsafe {
        let len = usize::try_from(name_len).unwrap_or(0);
        let name = if name.is_null() {
            &[]
        } else {
            std::slice::from_raw_parts(name, len)
        };
        (&mut *siblings.cast::<Siblings>(), name)
    };
    let dots = matches!(name, [0x2e] | [0x2e, 0x2e]);
    let record = reference & RECORD_MASK;
    if !dots && kind == siblings.kind && record >= FIRST_USER_RECORD && record != siblings.dir {
        siblings.found.push(reference);
    }
    c_int::from(siblings.found.len() >= MAX_SIBLINGS)
}

impl Ntfs3g {
    /// Mounts the volume at `start..start + len` of the disk for writing.
    pub fn mount(
        disk: Arc<dyn BlockWrite>,
        start: u64,
        len: u64,
        options: MountOptions,
    ) -> Result<Self> {
        let api = api()?;
        let backing = Box::new(Backing::new(disk, start, len));
        let backing = NonNull::from(Box::leak(backing));
        // SAFETY: the name is a C string, the library never writes to the operations, and the
        // backing lives until `release`.
        let device = unsafe {
            (api.ntfs_device_alloc)(
                c"guest".as_ptr(),
                0,
                ptr::from_ref(&OPS).cast_mut(),
                backing.as_ptr().cast(),
            )
        };
        let flags = if options.force_dirty {
            NTFS_MNT_RECOVER
        } else {
            0
        };
        let volume = if device.is_null() {
            ptr::null_mut()
        } else {
            // SAFETY: the device is valid and not mounted.
            unsafe { (api.ntfs_device_mount)(device, flags) }
        };
        let Some(volume) = NonNull::new(volume) else {
            let errno = errno();
            if !device.is_null() {
                // SAFETY: the mount failed, so the device is still owned here and closed.
                unsafe { (api.ntfs_device_free)(device) };
            }
            // SAFETY: no device refers to the backing any more.
            let backing = unsafe { Box::from_raw(backing.as_ptr()) };
            return Err(mount_error(errno, &backing));
        };
        let mounted = Self {
            api,
            volume,
            backing,
        };
        // SAFETY: the volume is mounted.
        check(unsafe { (api.ntfs_set_ignore_case)(volume.as_ptr()) })
            .map_err(|errno| mounted.error("mounting", &GuestPath::root(), errno))?;
        Ok(mounted)
    }

    /// Writes everything back and unmounts the volume.
    pub fn unmount(self) -> Result<()> {
        let result = self.release();
        std::mem::forget(self);
        result
    }

    fn release(&self) -> Result<()> {
        // SAFETY: the volume is mounted, nothing of it is open (all inodes borrow `self`), and it
        // is not used again: `unmount` forgets `self`, the other caller is `drop`.
        let unmounted = check(unsafe { (self.api.ntfs_umount)(self.volume.as_ptr(), 0) });
        // SAFETY: ntfs_umount has freed the device, even if it returned an error.
        let backing = unsafe { Box::from_raw(self.backing.as_ptr()) };
        let fault = backing.fault();
        match (unmounted, fault) {
            (Ok(()), None) => Ok(()),
            (_, Some(fault)) => Err(of_disk("unmounting", &GuestPath::root(), fault)),
            (Err(errno), None) => Err(failed("unmounting", &GuestPath::root(), text(errno))),
        }
    }

    fn error(&self, op: &'static str, path: &GuestPath, errno: c_int) -> GuestError {
        // SAFETY: the backing lives as long as the volume.
        let fault = unsafe { self.backing.as_ref() }.fault();
        match (errno, fault) {
            (_, Some(fault)) => of_disk(op, path, fault),
            (ENOSPC, None) => GuestError::NoSpace {
                path: path.to_string(),
            },
            (ENOENT, None) => GuestError::NotFound {
                path: path.to_string(),
            },
            (ELOOP, None) => failed(op, path, "a directory on the way is a link".into()),
            (errno, None) => failed(op, path, text(errno)),
        }
    }

    fn open(&self, reference: u64) -> Result<OpenInode<'_>, c_int> {
        // SAFETY: the volume is mounted, and the inode is new.
        unsafe {
            let inode = (self.api.ntfs_inode_open)(self.volume.as_ptr(), reference);
            OpenInode::from_raw(self.api, inode)
        }
    }

    fn child(&self, dir: &OpenInode<'_>, name: &str) -> Result<u64, c_int> {
        // Windows follows a junction, so no entry in it is what Windows sees at this path.
        if dir.attributes() & FILE_ATTR_REPARSE_POINT != 0
            && self.reparse_tag(dir)? & NAME_SURROGATE != 0
        {
            return Err(ELOOP);
        }
        let name: Vec<u16> = name.encode_utf16().collect();
        set_errno(ENOENT);
        // SAFETY: the inode is open and the name is valid for its length (255 at most).
        let reference = unsafe {
            (self.api.ntfs_inode_lookup_by_name)(dir.ptr(), name.as_ptr(), name.len() as c_int)
        };
        match reference {
            u64::MAX => Err(errno()),
            reference => Ok(reference),
        }
    }

    fn lookup(&self, path: &GuestPath) -> Result<u64, c_int> {
        let mut reference = FILE_ROOT;
        for part in path.parts() {
            let dir = self.open(reference)?;
            if !dir.is_dir() {
                return Err(ENOENT);
            }
            reference = self.child(&dir, part)?;
            dir.close()?;
        }
        Ok(reference)
    }

    /// Opens the parent directory; also returns its number and the name in it.
    fn parent<'p>(
        &self,
        op: &'static str,
        path: &'p GuestPath,
    ) -> Result<(OpenInode<'_>, u64, &'p str)> {
        let (Some(parent), Some(name)) = (path.parent(), path.name()) else {
            return Err(failed(op, path, "it is the root directory".into()));
        };
        let (number, dir) = self
            .lookup(&parent)
            .and_then(|reference| Ok((reference & RECORD_MASK, self.open(reference)?)))
            .map_err(|errno| self.error(op, &parent, errno))?;
        if !dir.is_dir() {
            return Err(wrong_kind(&parent, FileKind::Dir));
        }
        Ok((dir, number, name))
    }

    fn security(&self, inode: &OpenInode<'_>) -> Result<Option<Security>, c_int> {
        let info = inode
            .unnamed(AT_STANDARD_INFORMATION)?
            .read(STANDARD_INFORMATION_V3)?;
        if info.len() == STANDARD_INFORMATION_V3 {
            match super::fs::le32(&info, 0x34) {
                0 => {}
                id => return Ok(Some(Security::Id(id))),
            }
        }
        match inode.unnamed(AT_SECURITY_DESCRIPTOR) {
            Ok(descriptor) => Ok(Some(Security::Descriptor(descriptor.read(MAX_DESCRIPTOR)?))),
            Err(ENOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// The security of the first ordinary entry of this kind in the directory, otherwise the
    /// directory's own.
    fn model(&self, dir: &OpenInode<'_>, number: u64, kind: FileKind) -> Result<Security, c_int> {
        let mut siblings = Siblings {
            kind: match kind {
                FileKind::Dir => NTFS_DT_DIR,
                FileKind::File => NTFS_DT_REG,
            },
            dir: number,
            found: Vec::new(),
        };
        let mut pos = 0;
        // SAFETY: the directory is open, and the callback gets the Siblings it expects.
        let listed = unsafe {
            (self.api.ntfs_readdir)(
                dir.ptr(),
                &mut pos,
                ptr::from_mut(&mut siblings).cast(),
                collect_sibling,
            )
        };
        // Ending the walk early is reported as an error too.
        if listed != 0 && siblings.found.is_empty() {
            return Err(errno());
        }
        let unusual = FILE_ATTR_HIDDEN_OR_SYSTEM | FILE_ATTR_REPARSE_POINT;
        for reference in siblings.found {
            let sibling = self.open(reference)?;
            if sibling.attributes() & unusual == 0
                && let Some(security) = self.security(&sibling)?
            {
                return Ok(security);
            }
        }
        self.security(dir)?.ok_or(EOPNOTSUPP)
    }

    /// Creates a file; `security` is that of the file it replaces.
    fn create(
        &self,
        op: &'static str,
        path: &GuestPath,
        kind: FileKind,
        security: Option<Security>,
    ) -> Result<()> {
        let (dir, number, name) = self.parent(op, path)?;
        match self.child(&dir, name) {
            Ok(_) => return Err(self.error(op, path, EEXIST)),
            Err(ENOENT) => {}
            Err(errno) => return Err(self.error(op, path, errno)),
        }
        let security = match security {
            Some(security) => Ok(security),
            None => match security::of_new_folder(path).filter(|_| kind == FileKind::Dir) {
                Some(own) => Ok(Security::Descriptor(own.to_vec())),
                None => self.model(&dir, number, kind),
            },
        };
        // The library would mark the new file as compressed and then not write it.
        let compressed = dir.attributes() & FILE_ATTR_COMPRESSED != 0;
        let prepared = if compressed {
            self.mark_compressed(&dir, false)
        } else {
            Ok(())
        };
        let created = prepared
            .and(security)
            .and_then(|security| self.create_in(dir, name, kind, security));
        let restored = if compressed {
            self.open(number).and_then(|dir| {
                self.mark_compressed(&dir, true)?;
                dir.close()
            })
        } else {
            Ok(())
        };
        created
            .and(restored)
            .map_err(|errno| self.error(op, path, errno))
    }

    /// Sets whether new files in the directory will be compressed.
    fn mark_compressed(&self, dir: &OpenInode<'_>, compressed: bool) -> Result<(), c_int> {
        let mut attributes = dir.attributes() & !FILE_ATTR_COMPRESSED;
        if compressed {
            attributes |= FILE_ATTR_COMPRESSED;
        }
        let bytes = attributes.to_le_bytes();
        // SAFETY: the inode is open and the buffer has the given length.
        check(unsafe {
            (self.api.ntfs_set_ntfs_attrib)(dir.ptr(), bytes.as_ptr().cast(), bytes.len(), 0)
        })
    }

    fn create_in(
        &self,
        dir: OpenInode<'_>,
        name: &str,
        kind: FileKind,
        security: Security,
    ) -> Result<(), c_int> {
        let id = match &security {
            Security::Id(id) => *id,
            Security::Descriptor(_) => 0,
        };
        let mode = match kind {
            FileKind::Dir => S_IFDIR,
            FileKind::File => S_IFREG,
        };
        let units: Vec<u16> = name.encode_utf16().collect();
        let len = u8::try_from(units.len()).map_err(|_| EINVAL)?;
        // SAFETY: the directory is open and the name is valid for its length; the inode is new. The
        // id is little endian, as are all numbers of the library.
        let inode = unsafe {
            let inode = (self.api.ntfs_create)(dir.ptr(), id.to_le(), units.as_ptr(), len, mode);
            OpenInode::from_raw(self.api, inode)?
        };
        dir.touch();
        if let Err(errno) = self.finish(&inode, kind, security) {
            // Best effort: the first error is the one to report.
            if let Err(undo) = self.delete(inode, dir, &units) {
                tracing::warn!("removing the half-made {name:?}: {}", text(undo));
            }
            return Err(errno);
        }
        let Some(short) = short_name(name) else {
            inode.close_in(&dir)?;
            return dir.close();
        };
        let (inode, dir) = (inode.into_ptr(), dir.into_ptr());
        // SAFETY: both inodes are open; the call closes them. The short name is a live C string.
        let named = unsafe {
            let len = short.as_bytes().len();
            (self.api.ntfs_set_ntfs_dos_name)(inode, dir, short.as_ptr(), len, 0)
        };
        check(named)
    }

    fn finish(
        &self,
        inode: &OpenInode<'_>,
        kind: FileKind,
        security: Security,
    ) -> Result<(), c_int> {
        if let Security::Descriptor(descriptor) = security {
            inode.remove_attr(AT_SECURITY_DESCRIPTOR, &[])?;
            inode.add_attr(AT_SECURITY_DESCRIPTOR, &descriptor)?;
        }
        if kind == FileKind::Dir {
            // The library marks directories as "to archive"; Windows does not.
            let none = 0u32.to_le_bytes();
            // SAFETY: the inode is open and the buffer has the given length.
            check(unsafe {
                (self.api.ntfs_set_ntfs_attrib)(inode.ptr(), none.as_ptr().cast(), none.len(), 0)
            })?;
        }
        Ok(())
    }

    fn delete(&self, inode: OpenInode<'_>, dir: OpenInode<'_>, name: &[u16]) -> Result<(), c_int> {
        let len = u8::try_from(name.len()).map_err(|_| EINVAL)?;
        let (inode, dir) = (inode.into_ptr(), dir.into_ptr());
        // SAFETY: both inodes are open; the call closes them. The name is valid for its length.
        check(unsafe {
            (self.api.ntfs_delete)(
                self.volume.as_ptr(),
                ptr::null(),
                inode,
                dir,
                name.as_ptr(),
                len,
            )
        })
    }

    pub fn create_dir(&mut self, path: &GuestPath) -> Result<()> {
        self.create("creating the directory", path, FileKind::Dir, None)
    }

    /// Opens an existing file whose data may be changed.
    fn open_file(&self, op: &'static str, path: &GuestPath) -> Result<OpenInode<'_>> {
        let inode = self
            .lookup(path)
            .and_then(|reference| self.open(reference))
            .map_err(|errno| self.error(op, path, errno))?;
        let attributes = inode.attributes();
        if attributes & FILE_ATTR_DIRECTORY != 0 {
            return Err(wrong_kind(path, FileKind::File));
        }
        for (bit, what) in [
            (FILE_ATTR_COMPRESSED, "it is compressed by NTFS (LZNT1)"),
            (FILE_ATTR_ENCRYPTED, "it is encrypted (EFS)"),
        ] {
            if attributes & bit != 0 {
                return Err(failed(op, path, what.into()));
            }
        }
        Ok(inode)
    }

    fn reparse_tag(&self, inode: &OpenInode<'_>) -> Result<u32, c_int> {
        // The largest reparse point there can be.
        let mut value = vec![0u8; 16 << 10];
        // SAFETY: the inode is open and the buffer has the given length.
        let n = unsafe {
            (self.api.ntfs_get_ntfs_reparse_data)(
                inode.ptr(),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        if n < 4 {
            return Err(EIO);
        }
        Ok(super::fs::le32(&value, 0))
    }

    /// Turns a CompactOS-compressed file into an empty plain one.
    fn strip_wof(&self, op: &'static str, path: &GuestPath, inode: &OpenInode<'_>) -> Result<()> {
        let tag = self
            .reparse_tag(inode)
            .map_err(|errno| self.error(op, path, errno))?;
        if tag != IO_REPARSE_TAG_WOF {
            let reason = format!("it is a reparse point (tag {tag:#010x})");
            return Err(failed(op, path, reason));
        }
        let stream: Vec<u16> = wof::STREAM.encode_utf16().collect();
        let strip = || {
            // The unnamed stream is a hole of the full size; a new one is not sparse. This comes
            // first, so that no error leaves a plain file of zeroes: without the reparse point it
            // is empty.
            inode.remove_attr(AT_DATA, &[])?;
            inode.add_attr(AT_DATA, &[])?;
            // SAFETY: the inode is open.
            check(unsafe { (self.api.ntfs_remove_ntfs_reparse_data)(inode.ptr()) })?;
            if inode.has_attr(AT_DATA, &stream) {
                inode.remove_attr(AT_DATA, &stream)?;
            }
            Ok(())
        };
        strip().map_err(|errno| self.error(op, path, errno))
    }

    /// Creates a file or replaces the contents of the existing one.
    pub fn write_file(&mut self, path: &GuestPath, contents: &[u8]) -> Result<()> {
        const OP: &str = "writing";
        match self.lookup(path) {
            Ok(reference) => match self.remove_lznt1(path, reference)? {
                Some(security) => self.write_new(path, Some(security), contents),
                None => self.replace(OP, path, contents),
            },
            Err(ENOENT) => self.write_new(path, None, contents),
            Err(errno) => Err(self.error(OP, path, errno)),
        }
    }

    fn write_new(
        &self,
        path: &GuestPath,
        security: Option<Security>,
        contents: &[u8],
    ) -> Result<()> {
        const OP: &str = "writing";
        self.create(OP, path, FileKind::File, security)?;
        self.replace(OP, path, contents).inspect_err(|_| {
            if let Err(undo) = self.remove(OP, path, FileKind::File) {
                tracing::warn!("removing a half-written {path}: {undo}");
            }
        })
    }

    /// Removes a compressed file for a plain one with the same security. The library writes no
    /// LZNT1 here, and cannot clear the flag of a file. `None` if the file is not compressed.
    fn remove_lznt1(&self, path: &GuestPath, reference: u64) -> Result<Option<Security>> {
        const OP: &str = "replacing the compressed";
        let inode = self
            .open(reference)
            .map_err(|errno| self.error(OP, path, errno))?;
        let is_file = inode.attributes() & (FILE_ATTR_DIRECTORY | FILE_ATTR_ENCRYPTED) == 0;
        if !is_file || inode.attributes() & FILE_ATTR_COMPRESSED == 0 {
            return Ok(None);
        }
        let security = self.security(&inode);
        let security = security
            .and_then(|security| inode.close().map(|()| security))
            .map_err(|errno| self.error(OP, path, errno))?;
        let Some(security) = security else {
            return Err(failed(OP, path, "it has no security descriptor".into()));
        };
        self.remove(OP, path, FileKind::File)?;
        Ok(Some(security))
    }

    /// Moves the contents of a file behind a reparse point, like CompactOS: for guests made by
    /// hyper2kvm.
    pub fn make_wof(
        &mut self,
        path: &GuestPath,
        packed: &[u8],
        size: u64,
        reparse: &[u8],
    ) -> Result<()> {
        const OP: &str = "compressing";
        let inode = self.open_file(OP, path)?;
        let mut name: Vec<u16> = wof::STREAM.encode_utf16().collect();
        let mut change = || {
            inode.remove_attr(AT_DATA, &[])?;
            self.change(&inode, size, [])?;
            // SAFETY: the inode is open and the buffers are live and have the given lengths.
            unsafe {
                check((self.api.ntfs_attr_add)(
                    inode.ptr(),
                    AT_DATA,
                    name.as_mut_ptr(),
                    name.len() as u8,
                    packed.as_ptr(),
                    packed.len() as i64,
                ))?;
                check((self.api.ntfs_set_ntfs_reparse_data)(
                    inode.ptr(),
                    reparse.as_ptr().cast(),
                    reparse.len(),
                    0,
                ))
            }
        };
        let changed = change();
        changed
            .and_then(|()| inode.close())
            .map_err(|errno| self.error(OP, path, errno))
    }

    /// Makes a file or an empty directory a reparse point, such as a symbolic link or a junction.
    /// For guests made by hyper2kvm.
    pub fn make_reparse(&mut self, path: &GuestPath, reparse: &[u8]) -> Result<()> {
        const OP: &str = "linking";
        let set = || {
            let inode = self.open(self.lookup(path)?)?;
            // SAFETY: the inode is open and the buffer is live and has the given length.
            check(unsafe {
                (self.api.ntfs_set_ntfs_reparse_data)(
                    inode.ptr(),
                    reparse.as_ptr().cast(),
                    reparse.len(),
                    0,
                )
            })?;
            inode.close()
        };
        set().map_err(|errno| self.error(OP, path, errno))
    }

    /// Creates a file that the library compresses with LZNT1: for guests made by hyper2kvm.
    pub fn make_lznt1(&mut self, path: &GuestPath, contents: &[u8]) -> Result<()> {
        const OP: &str = "compressing";
        let (folder, _, _) = self.parent(OP, path)?;
        let attributes = FILE_ATTR_COMPRESSED.to_le_bytes();
        // SAFETY: the inode is open and the buffer has the given length. The mount option
        // "compression" is bit 6 of `state`, the third word of `struct _ntfs_volume`.
        let marked = check(unsafe {
            *self.volume.as_ptr().cast::<std::ffi::c_ulong>().add(2) |= 1 << 6;
            let set = self.api.ntfs_set_ntfs_attrib;
            set(
                folder.ptr(),
                attributes.as_ptr().cast(),
                attributes.len(),
                0,
            )
        });
        marked
            .and_then(|()| folder.close())
            .map_err(|errno| self.error(OP, path, errno))?;
        let (folder, number, name) = self.parent(OP, path)?;
        // Not `create`, which prevents the compression of new files.
        let write = || {
            let security = self.model(&folder, number, FileKind::File)?;
            self.create_in(folder, name, FileKind::File, security)?;
            let inode = self.open(self.lookup(path)?)?;
            let data = inode.unnamed(AT_DATA)?;
            data.write(0, contents)?;
            // SAFETY: the attribute is open.
            check(unsafe { (self.api.ntfs_attr_pclose)(data.raw()) })?;
            drop(data);
            inode.close()
        };
        write().map_err(|errno| self.error(OP, path, errno))
    }

    fn replace(&self, op: &'static str, path: &GuestPath, contents: &[u8]) -> Result<()> {
        let inode = self.open_file(op, path)?;
        if inode.attributes() & FILE_ATTR_REPARSE_POINT != 0 {
            self.strip_wof(op, path, &inode)?;
        }
        // The size first: a full volume shows before any byte of the old contents is lost.
        self.change(&inode, contents.len() as u64, [(0, contents)])
            .and_then(|()| inode.close())
            .map_err(|errno| self.error(op, path, errno))
    }

    fn change<'d>(
        &self,
        inode: &OpenInode<'_>,
        size: u64,
        extents: impl IntoIterator<Item = (u64, &'d [u8])>,
    ) -> Result<(), c_int> {
        let data = match inode.unnamed(AT_DATA) {
            Err(ENOENT) => {
                inode.add_attr(AT_DATA, &[])?;
                inode.unnamed(AT_DATA)?
            }
            data => data?,
        };
        data.set_size(size)?;
        for (offset, bytes) in extents {
            data.write(offset, bytes)?;
        }
        inode.touch();
        Ok(())
    }

    /// Changes parts of an existing file and sets its size.
    pub fn patch_file(&mut self, path: &GuestPath, size: u64, extents: &[Extent]) -> Result<()> {
        const OP: &str = "changing";
        let inode = self.open_file(OP, path)?;
        if inode.attributes() & FILE_ATTR_REPARSE_POINT != 0 {
            return Err(failed(OP, path, "it is a reparse point".into()));
        }
        super::check_extents(OP, path, size, extents)?;
        let extents = extents.iter().map(|e| (e.offset, e.data.as_slice()));
        self.change(&inode, size, extents)
            .and_then(|()| inode.close())
            .map_err(|errno| self.error(OP, path, errno))
    }

    fn remove(&self, op: &'static str, path: &GuestPath, kind: FileKind) -> Result<()> {
        let (dir, _, name) = self.parent(op, path)?;
        let inode = self
            .child(&dir, name)
            .and_then(|reference| self.open(reference))
            .map_err(|errno| self.error(op, path, errno))?;
        if inode.is_dir() != (kind == FileKind::Dir) {
            // The directory must not be open when the library closes the file.
            let closed = inode.close_in(&dir);
            closed.map_err(|errno| self.error(op, path, errno))?;
            return Err(wrong_kind(path, kind));
        }
        let name: Vec<u16> = name.encode_utf16().collect();
        self.delete(inode, dir, &name)
            .map_err(|errno| self.error(op, path, errno))
    }

    pub fn remove_file(&mut self, path: &GuestPath) -> Result<()> {
        self.remove("removing", path, FileKind::File)
    }

    pub fn remove_dir(&mut self, path: &GuestPath) -> Result<()> {
        self.remove("removing the directory", path, FileKind::Dir)
    }
}

impl Drop for Ntfs3g {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::error!("{error}");
        }
    }
}

/// The upper-case 8.3 form of a name; `None` for a longer or unusual one.
fn short_name(name: &str) -> Option<CString> {
    let (base, ext) = name.split_once('.').unwrap_or((name, ""));
    let plain = |part: &str| {
        part.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_-$~!#%&{}()@^'`".contains(&b))
    };
    let fits = matches!(base.len(), 1..=8)
        && ext.len() <= 3
        && (ext.is_empty() != name.contains('.'))
        && plain(base)
        && plain(ext);
    fits.then(|| CString::new(name.to_ascii_uppercase()).ok())?
}

fn text(errno: c_int) -> String {
    io::Error::from_raw_os_error(errno).to_string()
}

fn failed(op: &'static str, path: &GuestPath, reason: String) -> GuestError {
    GuestError::Op {
        op,
        path: path.to_string(),
        reason,
    }
}

fn of_disk(op: &'static str, path: &GuestPath, fault: DeviceFault) -> GuestError {
    let Some(errno) = fault.errno else {
        return failed(op, path, fault.reason);
    };
    GuestError::Host {
        op,
        path: path.to_string(),
        reason: fault.reason,
        errno,
    }
}

fn wrong_kind(path: &GuestPath, expected: FileKind) -> GuestError {
    GuestError::WrongKind {
        path: path.to_string(),
        expected: match expected {
            FileKind::File => "file",
            FileKind::Dir => "directory",
        },
    }
}

fn mount_error(errno: c_int, backing: &Backing) -> GuestError {
    let fault = backing.fault();
    match (errno, fault) {
        (_, Some(fault)) => of_disk("mounting", &GuestPath::root(), fault),
        (EOPNOTSUPP, None) => GuestError::Unsafe {
            reason: "its log file is not clean: Windows was not shut down properly".into(),
        },
        (EPERM, None) => GuestError::Unsafe {
            reason: "Windows is hibernated, or Fast Startup keeps parts of the volume in memory"
                .into(),
        },
        (errno, None) => failed("mounting", &GuestPath::root(), text(errno)),
    }
}
