//! Edits a hive through libhivex, loaded at run time.
//!
//! One of the two modules with `unsafe` (the other binds libntfs-3g). Its interface is plain: a
//! file name, paths and values in, `Result` out. Declarations follow `hivex.h` of 1.3.24. They are
//! the same since 1.3.8 (2013), and only functions are called. A guest's hive is edited in a
//! confined process: [`super::confined`].
//!
//! Properties of the library:
//! - It opens and commits by file name only, but does not resolve the name, so `/proc/self/fd/N` of
//!   a file in memory works.
//! - It never frees space, so a hive only grows. It marks the hive clean without reading its logs.
//! - The values of a key can only be set all at once.
//! - Data over 16,344 bytes is written in one cell, which Windows reads in hives before format 1.4
//!   only ([`RegEdits::too_large`](super::RegEdits::too_large)).
//! - Names are compared by `strcasecmp`, so letters other than ASCII compare exactly: such keys and
//!   values are found here by [`fold`].
//! - `iconv` reads files when a conversion is first used ([`load`]).
#![allow(unsafe_code)]

mod ffi;

use std::ffi::{CStr, CString, c_char, c_void};
use std::io;
use std::ptr::NonNull;

use ffi::{Api, Hive, SetValue};

use super::edit::{RegEdits, RegOp};
use super::hive::Value;
use super::name::fold;

#[derive(Debug, thiserror::Error)]
pub(crate) enum HivexError {
    #[error("libhivex is not installed")]
    Missing,
    #[error("{doing}")]
    Failed {
        doing: String,
        #[source]
        source: io::Error,
    },
    #[error("a name with a NUL character cannot be written: {0:?}")]
    Name(String),
}

type Result<T, E = HivexError> = std::result::Result<T, E>;

/// Whether the library is installed.
pub(crate) fn is_available() -> bool {
    ffi::api().is_ok()
}

/// Loads the library and everything that it would load later, for a process that is about to lose
/// access to files.
pub(super) fn load() -> Result<()> {
    ffi::api()?;
    ffi::load_conversions();
    Ok(())
}

/// Applies the edits to the hive file of that name. It is opened once to read and once to write.
pub(super) fn edit(file: &CStr, edits: &RegEdits) -> Result<()> {
    let hive = OpenHive::open(file)?;
    for section in sections(&edits.ops) {
        hive.carry_out(section)?;
    }
    hive.commit(file)
}

/// Groups neighbouring operations on one key; a deletion of a key is a group of its own.
fn sections(ops: &[RegOp]) -> impl Iterator<Item = &[RegOp]> {
    let deletes = |op: &RegOp| matches!(op, RegOp::DeleteKey { .. });
    ops.chunk_by(move |a, b| !deletes(a) && !deletes(b) && a.key() == b.key())
}

/// A hive in memory. Without [`OpenHive::commit`] nothing is written.
struct OpenHive {
    api: &'static Api,
    hive: NonNull<Hive>,
}

/// A key of an open hive, by its offset.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Node(usize);

/// Memory that the library has allocated and its caller frees.
struct Allocated<T>(NonNull<T>);

impl<T> Allocated<T> {
    fn new(ptr: *mut T, doing: impl FnOnce() -> String) -> Result<Self> {
        NonNull::new(ptr).map(Self).ok_or_else(|| failed(doing()))
    }
}

impl<T> Drop for Allocated<T> {
    fn drop(&mut self) {
        // SAFETY: the library allocates with malloc what it returns, and nothing else refers to it.
        unsafe { libc::free(self.0.as_ptr().cast::<c_void>()) };
    }
}

impl Allocated<usize> {
    /// The offsets of a list terminated by 0.
    fn offsets(&self) -> Vec<usize> {
        let mut offsets = Vec::new();
        loop {
            // SAFETY: the library terminates every list with a 0, and no entry before it is 0.
            match unsafe { *self.0.as_ptr().add(offsets.len()) } {
                0 => return offsets,
                offset => offsets.push(offset),
            }
        }
    }
}

impl Allocated<c_char> {
    fn text(&self) -> String {
        // SAFETY: the library terminates every text with a NUL.
        let text = unsafe { CStr::from_ptr(self.0.as_ptr()) };
        text.to_string_lossy().into_owned()
    }
}

impl OpenHive {
    fn open(file: &CStr) -> Result<Self> {
        let api = ffi::api()?;
        // SAFETY: the name is a C string.
        let hive = unsafe { (api.hivex_open)(file.as_ptr(), ffi::OPEN_WRITE) };
        let hive = NonNull::new(hive).ok_or_else(|| failed("opening the hive".into()))?;
        Ok(Self { api, hive })
    }

    /// Writes the hive. The library opens `file` itself.
    fn commit(self, file: &CStr) -> Result<()> {
        // SAFETY: the hive is open, and the name is a C string.
        let done = unsafe { (self.api.hivex_commit)(self.ptr(), file.as_ptr(), 0) };
        match done {
            0 => Ok(()),
            _ => Err(failed("writing the hive".into())),
        }
    }

    fn ptr(&self) -> *mut Hive {
        self.hive.as_ptr()
    }

    /// Applies operations to one key.
    fn carry_out(&self, ops: &[RegOp]) -> Result<()> {
        let Some(first) = ops.first() else {
            return Ok(());
        };
        let path = first.key();
        if matches!(first, RegOp::DeleteKey { .. }) {
            return match self.find(path)? {
                Some(node) => self.delete(node, path),
                None => Ok(()),
            };
        }
        let makes = |op: &RegOp| !matches!(op, RegOp::DeleteValue { .. });
        let node = match ops.iter().any(makes) {
            true => self.make(path)?,
            false => match self.find(path)? {
                Some(node) => node,
                None => return Ok(()),
            },
        };
        if ops.iter().all(|op| matches!(op, RegOp::CreateKey { .. })) {
            return Ok(());
        }
        let mut values = self.values(node, path)?;
        for op in ops {
            if let RegOp::Set { name, .. } | RegOp::DeleteValue { name, .. } = op {
                let name = fold(name);
                values.retain(|(other, _)| fold(other) != name);
            }
            if let RegOp::Set { name, data, .. } = op {
                values.push((name.clone(), data.to_value()));
            }
        }
        self.set_values(node, path, &values)
    }

    fn root(&self) -> Result<Node> {
        // SAFETY: the hive is open.
        let root = unsafe { (self.api.hivex_root)(self.ptr()) };
        node(root).ok_or_else(|| failed("finding the root key".into()))
    }

    fn find(&self, path: &str) -> Result<Option<Node>> {
        let mut node = self.root()?;
        for name in parts(path) {
            match self.child(node, name)? {
                Some(child) => node = child,
                None => return Ok(None),
            }
        }
        Ok(Some(node))
    }

    /// The key at that path, created with its parents if it does not exist.
    fn make(&self, path: &str) -> Result<Node> {
        let mut node = self.root()?;
        for name in parts(path) {
            node = match self.child(node, name)? {
                Some(child) => child,
                None => self.add_child(node, name)?,
            };
        }
        Ok(node)
    }

    fn child(&self, of: Node, name: &str) -> Result<Option<Node>> {
        let text = c_string(name)?;
        ffi::clear_errno();
        // SAFETY: the hive is open, and the name is a C string.
        let child = unsafe { (self.api.hivex_node_get_child)(self.ptr(), of.0, text.as_ptr()) };
        let error = ffi::last_error();
        match node(child) {
            Some(child) => Ok(Some(child)),
            None if error.raw_os_error() != Some(0) => Err(HivexError::Failed {
                doing: format!("looking for the key {name}"),
                source: error,
            }),
            None if name.is_ascii() => Ok(None),
            None => self.child_folded(of, name),
        }
    }

    /// Finds a child by its folded name, for names beyond the library's comparison.
    fn child_folded(&self, of: Node, name: &str) -> Result<Option<Node>> {
        let doing = || format!("looking for the key {name}");
        // SAFETY: the hive is open.
        let children = unsafe { (self.api.hivex_node_children)(self.ptr(), of.0) };
        let wanted = fold(name);
        for child in Allocated::new(children, doing)?.offsets() {
            // SAFETY: the hive is open.
            let found = unsafe { (self.api.hivex_node_name)(self.ptr(), child) };
            if fold(&Allocated::new(found, doing)?.text()) == wanted {
                return Ok(node(child));
            }
        }
        Ok(None)
    }

    fn add_child(&self, to: Node, name: &str) -> Result<Node> {
        let text = c_string(name)?;
        // SAFETY: the hive is open, and the name is a C string.
        let child = unsafe { (self.api.hivex_node_add_child)(self.ptr(), to.0, text.as_ptr()) };
        node(child).ok_or_else(|| failed(format!("creating the key {name}")))
    }

    fn delete(&self, node: Node, path: &str) -> Result<()> {
        // SAFETY: the hive is open; the node is not used again.
        match unsafe { (self.api.hivex_node_delete_child)(self.ptr(), node.0) } {
            0 => Ok(()),
            _ => Err(failed(format!("deleting the key {path}"))),
        }
    }

    fn values(&self, node: Node, path: &str) -> Result<Vec<(String, Value)>> {
        let doing = || format!("reading the values of {path}");
        // SAFETY: the hive is open.
        let values = unsafe { (self.api.hivex_node_values)(self.ptr(), node.0) };
        let values = Allocated::new(values, doing)?.offsets();
        let value = |value: usize| {
            // SAFETY: the hive is open.
            let name = unsafe { (self.api.hivex_value_key)(self.ptr(), value) };
            let name = Allocated::new(name, doing)?.text();
            let (mut ty, mut len) = (0, 0);
            // SAFETY: the hive is open, and both places are valid for writes.
            let data =
                unsafe { (self.api.hivex_value_value)(self.ptr(), value, &mut ty, &mut len) };
            let data = Allocated::new(data, doing)?;
            // SAFETY: the library has allocated `len` bytes and filled them.
            let data = unsafe { std::slice::from_raw_parts(data.0.as_ptr().cast::<u8>(), len) };
            let data = data.to_vec();
            Ok((name, Value { ty, data }))
        };
        values.into_iter().map(value).collect()
    }

    /// Replaces all values of a key.
    fn set_values(&self, node: Node, path: &str, values: &[(String, Value)]) -> Result<()> {
        let names = values.iter().map(|(name, _)| c_string(name));
        let names = names.collect::<Result<Vec<_>>>()?;
        let list: Vec<SetValue> = (names.iter().zip(values))
            .map(|(name, (_, value))| SetValue {
                key: name.as_ptr(),
                ty: value.ty,
                len: value.data.len(),
                data: value.data.as_ptr().cast(),
            })
            .collect();
        // SAFETY: the hive is open; the list has the given length, and its names and data outlive
        // the call, which copies them.
        let set = unsafe {
            (self.api.hivex_node_set_values)(self.ptr(), node.0, list.len(), list.as_ptr(), 0)
        };
        match set {
            0 => Ok(()),
            _ => Err(failed(format!("setting the values of {path}"))),
        }
    }
}

impl Drop for OpenHive {
    fn drop(&mut self) {
        // SAFETY: the hive is open and not used again.
        unsafe { (self.api.hivex_close)(self.ptr()) };
    }
}

fn node(offset: usize) -> Option<Node> {
    (offset != 0).then_some(Node(offset))
}

fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('\\').filter(|part| !part.is_empty())
}

fn c_string(name: &str) -> Result<CString> {
    CString::new(name).map_err(|_| HivexError::Name(name.to_string()))
}

fn failed(doing: String) -> HivexError {
    HivexError::Failed {
        doing,
        source: ffi::last_error(),
    }
}
