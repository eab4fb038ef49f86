//! The declarations of libhivex, and the search for the library.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io;
use std::sync::OnceLock;

use super::{HivexError, Result};

pub(super) const OPEN_WRITE: c_int = 4;

/// The only soname since the first release, and the name of the development package.
const SONAMES: [&str; 2] = ["libhivex.so.0", "libhivex.so"];

/// The character sets between which the library converts, by its names.
const CONVERSIONS: [(&CStr, &CStr); 4] = [
    (c"LATIN1", c"UTF-8"),
    (c"UTF-8", c"LATIN1"),
    (c"UTF-16LE", c"UTF-8"),
    (c"UTF-8", c"UTF-16LE"),
];

/// `hive_h`.
#[repr(C)]
pub(super) struct Hive {
    opaque: [u8; 0],
}

/// `hive_set_value`.
#[repr(C)]
pub(super) struct SetValue {
    pub(super) key: *const c_char,
    pub(super) ty: u32,
    pub(super) len: usize,
    pub(super) data: *const c_char,
}

/// Declares the functions of the library once: generates the table and the code that fills it.
macro_rules! api {
    ($($name:ident: fn($($arg:ty),*) -> $ret:ty;)*) => {
        pub(super) struct Api {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> $ret,)*
            _library: libloading::Library,
        }

        impl Api {
            fn load(library: libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: each symbol has this signature in every release of libhivex with one of
                // the names in SONAMES (see the module documentation). The library stays loaded as
                // long as the pointers exist: it is kept in the same struct.
                unsafe {
                    Ok(Self {
                        $($name: *library.get(concat!(stringify!($name), "\0").as_bytes())?,)*
                        _library: library,
                    })
                }
            }
        }
    };
}

api! {
    hivex_open: fn(*const c_char, c_int) -> *mut Hive;
    hivex_close: fn(*mut Hive) -> c_int;
    hivex_commit: fn(*mut Hive, *const c_char, c_int) -> c_int;
    hivex_root: fn(*mut Hive) -> usize;
    hivex_node_name: fn(*mut Hive, usize) -> *mut c_char;
    hivex_node_children: fn(*mut Hive, usize) -> *mut usize;
    hivex_node_get_child: fn(*mut Hive, usize, *const c_char) -> usize;
    hivex_node_add_child: fn(*mut Hive, usize, *const c_char) -> usize;
    hivex_node_delete_child: fn(*mut Hive, usize) -> c_int;
    hivex_node_values: fn(*mut Hive, usize) -> *mut usize;
    hivex_node_set_values: fn(*mut Hive, usize, usize, *const SetValue, c_int) -> c_int;
    hivex_value_key: fn(*mut Hive, usize) -> *mut c_char;
    hivex_value_value: fn(*mut Hive, usize, *mut u32, *mut usize) -> *mut c_char;
}

unsafe extern "C" {
    fn __errno_location() -> *mut c_int;
    fn iconv_open(to: *const c_char, from: *const c_char) -> *mut c_void;
}

/// Some functions report that nothing was found by a 0 with an errno of 0.
pub(super) fn clear_errno() {
    // SAFETY: the C library returns a valid pointer to this thread's errno.
    unsafe { *__errno_location() = 0 };
}

pub(super) fn last_error() -> io::Error {
    io::Error::last_os_error()
}

/// The library, loaded once and never unloaded.
pub(super) fn api() -> Result<&'static Api> {
    static API: OnceLock<Option<Api>> = OnceLock::new();
    API.get_or_init(load).as_ref().ok_or(HivexError::Missing)
}

fn load() -> Option<Api> {
    for name in SONAMES {
        // SAFETY: loading runs the library's initialisers; libhivex has none.
        let Ok(library) = (unsafe { libloading::Library::new(name) }) else {
            continue;
        };
        match Api::load(library) {
            Ok(api) => return Some(api),
            Err(error) => tracing::debug!("{name} is not usable: {error}"),
        }
    }
    None
}

/// Opens each conversion once and keeps it: the C library reads a conversion from a file when it is
/// first opened.
pub(super) fn load_conversions() {
    for (to, from) in CONVERSIONS {
        // SAFETY: both names are C strings. A failure is reported again by the library's own call.
        unsafe { iconv_open(to.as_ptr(), from.as_ptr()) };
    }
}
