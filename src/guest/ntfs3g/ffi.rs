//! The declarations of libntfs-3g, and the search for the library.

use std::ffi::{c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::guest::{GuestError, Result};

pub const EPERM: c_int = 1;
pub const ENOENT: c_int = 2;
pub const EIO: c_int = 5;
pub const EEXIST: c_int = 17;
pub const ELOOP: c_int = 40;
pub const EINVAL: c_int = 22;
pub const ENOSPC: c_int = 28;
pub const EROFS: c_int = 30;
pub const EOPNOTSUPP: c_int = 95;

pub const O_ACCMODE: c_int = 3;
pub const O_RDWR: c_int = 2;
pub const S_IFDIR: c_uint = 0o040_000;
pub const S_IFREG: c_uint = 0o100_000;

/// `ND_Open` and `ND_Dirty` of `ntfs_device_state_bits`.
pub const ND_OPEN: c_ulong = 1 << 0;
pub const ND_DIRTY: c_ulong = 1 << 2;
pub const NTFS_MNT_RECOVER: c_ulong = 0x1000_0000;
pub const NTFS_UPDATE_MCTIME: c_uint = 0b110;
pub const NTFS_DT_DIR: c_uint = 4;
pub const NTFS_DT_REG: c_uint = 8;

pub const FILE_ROOT: u64 = 5;
pub const FIRST_USER_RECORD: u64 = 16;
pub const RECORD_MASK: u64 = 0xffff_ffff_ffff;
pub const AT_STANDARD_INFORMATION: u32 = 0x10;
pub const AT_SECURITY_DESCRIPTOR: u32 = 0x50;
pub const AT_DATA: u32 = 0x80;
pub const FILE_ATTR_HIDDEN_OR_SYSTEM: u32 = 0x6;
pub const FILE_ATTR_DIRECTORY: u32 = 0x10;
pub const FILE_ATTR_REPARSE_POINT: u32 = 0x400;
/// In a reparse tag: the file stands for another one, like links and junctions.
pub const NAME_SURROGATE: u32 = 0x2000_0000;
pub const FILE_ATTR_COMPRESSED: u32 = 0x800;
pub const FILE_ATTR_ENCRYPTED: u32 = 0x4000;

/// `$STANDARD_INFORMATION` of NTFS 3: 72 bytes with the security id at 0x34.
pub const STANDARD_INFORMATION_V3: usize = 72;
pub const MAX_DESCRIPTOR: usize = 64 << 10;
/// The most entries of a directory that are considered as the model of a new one.
pub const MAX_SIBLINGS: usize = 64;

/// Sonames in distributions, the present one first.
const SONAMES: &[&str] = &[
    "libntfs-3g.so.89",
    "libntfs-3g.so.90",
    "libntfs-3g.so.91",
    "libntfs-3g.so.88",
    "libntfs-3g.so.883",
    "libntfs-3g.so.872",
    "libntfs-3g.so.871",
    "libntfs-3g.so.87",
    "libntfs-3g.so",
];
const HINT: &str = "install libntfs-3g (Debian, Ubuntu: ntfs-3g; Fedora, RHEL with EPEL: ntfs-3g-libs; \
                    SUSE: libntfs-3g89)";

#[repr(C)]
pub struct Volume {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct Inode {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct Attr {
    opaque: [u8; 0],
}

#[repr(C)]
pub struct Device {
    pub ops: *mut DeviceOps,
    pub state: c_ulong,
    pub name: *mut c_char,
    pub private: *mut c_void,
    pub heads: c_int,
    pub sectors_per_track: c_int,
}

#[repr(C)]
pub struct DeviceOps {
    pub open: unsafe extern "C" fn(*mut Device, c_int) -> c_int,
    pub close: unsafe extern "C" fn(*mut Device) -> c_int,
    pub seek: unsafe extern "C" fn(*mut Device, i64, c_int) -> i64,
    pub read: unsafe extern "C" fn(*mut Device, *mut c_void, i64) -> i64,
    pub write: unsafe extern "C" fn(*mut Device, *const c_void, i64) -> i64,
    pub pread: unsafe extern "C" fn(*mut Device, *mut c_void, i64, i64) -> i64,
    pub pwrite: unsafe extern "C" fn(*mut Device, *const c_void, i64, i64) -> i64,
    pub sync: unsafe extern "C" fn(*mut Device) -> c_int,
    pub stat: unsafe extern "C" fn(*mut Device, *mut c_void) -> c_int,
    pub ioctl: unsafe extern "C" fn(*mut Device, c_ulong, *mut c_void) -> c_int,
}

pub type FillDir =
    unsafe extern "C" fn(*mut c_void, *const u16, c_int, c_int, i64, u64, c_uint) -> c_int;

/// Declares the functions of the library once: generates the table and the code that fills it.
macro_rules! api {
    ($($name:ident: fn($($arg:ty),*) $(-> $ret:ty)?;)*) => {
        pub struct Api {
            $(pub $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
            /// The address of `AT_UNNAMED`, the name of nameless attributes.
            pub unnamed: usize,
            pub _library: libloading::Library,
        }

        impl Api {
            fn load(library: libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: each symbol has this signature in every release of libntfs-3g with one of
                // the names in SONAMES (see the module documentation). The library stays loaded as
                // long as the pointers exist: it is kept in the same struct.
                unsafe {
                    Ok(Self {
                        $($name: *library.get(concat!(stringify!($name), "\0").as_bytes())?,)*
                        unnamed: *library.get::<*mut u16>(b"AT_UNNAMED\0")? as usize,
                        _library: library,
                    })
                }
            }
        }
    };
}

api! {
    ntfs_device_alloc: fn(*const c_char, c_long, *mut DeviceOps, *mut c_void) -> *mut Device;
    ntfs_device_free: fn(*mut Device) -> c_int;
    ntfs_device_mount: fn(*mut Device, c_ulong) -> *mut Volume;
    ntfs_umount: fn(*mut Volume, c_int) -> c_int;
    ntfs_set_ignore_case: fn(*mut Volume) -> c_int;
    ntfs_inode_open: fn(*mut Volume, u64) -> *mut Inode;
    ntfs_inode_close: fn(*mut Inode) -> c_int;
    ntfs_inode_close_in_dir: fn(*mut Inode, *mut Inode) -> c_int;
    ntfs_inode_lookup_by_name: fn(*mut Inode, *const u16, c_int) -> u64;
    ntfs_inode_update_times: fn(*mut Inode, c_uint);
    ntfs_readdir: fn(*mut Inode, *mut i64, *mut c_void, FillDir) -> c_int;
    ntfs_create: fn(*mut Inode, u32, *const u16, u8, c_uint) -> *mut Inode;
    ntfs_delete: fn(*mut Volume, *const c_char, *mut Inode, *mut Inode, *const u16, u8) -> c_int;
    ntfs_set_ntfs_dos_name: fn(*mut Inode, *mut Inode, *const c_char, usize, c_int) -> c_int;
    ntfs_get_ntfs_attrib: fn(*mut Inode, *mut c_char, usize) -> c_int;
    ntfs_set_ntfs_attrib: fn(*mut Inode, *const c_char, usize, c_int) -> c_int;
    ntfs_get_ntfs_reparse_data: fn(*mut Inode, *mut c_char, usize) -> c_int;
    ntfs_set_ntfs_reparse_data: fn(*mut Inode, *const c_char, usize, c_int) -> c_int;
    ntfs_remove_ntfs_reparse_data: fn(*mut Inode) -> c_int;
    ntfs_attr_open: fn(*mut Inode, u32, *mut u16, u32) -> *mut Attr;
    ntfs_attr_close: fn(*mut Attr);
    ntfs_attr_pread: fn(*mut Attr, i64, i64, *mut c_void) -> i64;
    ntfs_attr_pwrite: fn(*mut Attr, i64, i64, *const c_void) -> i64;
    ntfs_attr_pclose: fn(*mut Attr) -> c_int;
    ntfs_attr_truncate_solid: fn(*mut Attr, i64) -> c_int;
    ntfs_attr_exist: fn(*mut Inode, u32, *const u16, u32) -> c_int;
    ntfs_attr_add: fn(*mut Inode, u32, *mut u16, u8, *const u8, i64) -> c_int;
    ntfs_attr_remove: fn(*mut Inode, u32, *mut u16, u32) -> c_int;
}

unsafe extern "C" {
    fn __errno_location() -> *mut c_int;
}

pub fn set_errno(errno: c_int) {
    // SAFETY: the C library returns a valid pointer to this thread's errno.
    unsafe { *__errno_location() = errno };
}

pub fn errno() -> c_int {
    io::Error::last_os_error().raw_os_error().unwrap_or(EIO)
}

/// The library, loaded once and never unloaded.
pub fn api() -> Result<&'static Api> {
    static API: OnceLock<Option<Api>> = OnceLock::new();
    API.get_or_init(load).as_ref().ok_or_else(missing)
}

/// Whether the library is installed, for `doctor`.
pub fn is_available() -> bool {
    api().is_ok()
}

fn missing() -> GuestError {
    GuestError::MissingTool {
        what: "libntfs-3g (writes NTFS)".into(),
        hint: HINT.into(),
    }
}

fn load() -> Option<Api> {
    let names = SONAMES.iter().map(PathBuf::from).chain(installed());
    for name in names {
        // SAFETY: loading runs the library's initialisers; libntfs-3g has none that matter.
        let library = match unsafe { libloading::Library::new(&name) } {
            Ok(library) => library,
            Err(_) => continue,
        };
        match Api::load(library) {
            Ok(api) => return Some(api),
            Err(error) => tracing::debug!("{} is not usable: {error}", name.display()),
        }
    }
    None
}

/// Copies of the library under other version numbers, in the usual directories.
fn installed() -> Vec<PathBuf> {
    let entries = |dir: &Path| {
        std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect::<Vec<_>>()
    };
    let mut dirs: Vec<PathBuf> = ["/usr/lib64", "/lib64", "/usr/lib", "/lib", "/usr/local/lib"]
        .map(PathBuf::from)
        .to_vec();
    dirs.extend(
        entries(Path::new("/usr/lib"))
            .into_iter()
            .filter(|p| p.is_dir()),
    );
    dirs.iter()
        .flat_map(|dir| entries(dir))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("libntfs-3g.so.")
        })
        .collect()
}

/// The result of a function that returns 0 or sets errno.
pub fn check(result: c_int) -> Result<(), c_int> {
    match result {
        0 => Ok(()),
        _ => Err(errno()),
    }
}
