//! Images for the tests of this directory.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use super::compose::{REPLY_MAGIC, array, negotiate};
use super::empty::write_qcow2;
use super::remote::{Doubt, RemoteFile};

use crate::block::{BlockWrite, FileDisk};
pub use crate::skip::have;
use crate::tool::qemu_img;
pub use links::{cowd, se_sparse};

#[path = "../../tests/support/links.rs"]
mod links;

/// Runs a program, which must succeed.
pub fn run(program: &str, args: &[&str]) {
    run_input(program, args, b"");
}

#[expect(
    clippy::disallowed_methods,
    reason = "an implementation independent of the wrapper"
)]
pub fn run_input(program: &str, args: &[&str], input: &[u8]) {
    let path = crate::tool::find(program).unwrap();
    let mut child = Command::new(path)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input).unwrap();
    assert!(child.wait().unwrap().success(), "{program} {args:?}");
}

/// Bytes with a pattern: different in every sector, with holes.
pub fn pattern(size: usize) -> Vec<u8> {
    let mut data = vec![0; size];
    for (i, sector) in data.chunks_mut(512).enumerate() {
        if i / 64 % 3 != 1 {
            let seed = (i as u32).wrapping_mul(2_654_435_761);
            for (j, word) in sector.chunks_mut(4).enumerate() {
                let bytes = (seed ^ (j as u32)).to_le_bytes();
                word.copy_from_slice(&bytes[..word.len()]);
            }
        }
    }
    data
}

pub fn write(folder: &Path, name: &str, data: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, data).unwrap();
    path
}

pub fn sha256(path: &Path) -> Vec<u8> {
    Sha256::digest(std::fs::read(path).unwrap()).to_vec()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A new qcow2, and a raw file of that size that receives the same writes.
pub(super) struct Pair {
    folder: tempfile::TempDir,
    pub(super) raw: FileDisk,
    pub(super) size: u64,
}

impl Pair {
    pub(super) fn new(size: u64, compressed: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let create = |name: &str| File::create_new(folder.path().join(name)).unwrap();
        write_qcow2(&create("x.qcow2"), size, compressed).unwrap();
        create("x.raw").set_len(size).unwrap();
        let raw = FileDisk::open_rw(&folder.path().join("x.raw")).unwrap();
        Self { folder, raw, size }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn file(&self) -> File {
        let mut options = File::options();
        let options = options.read(true).write(true);
        options.open(self.path("x.qcow2")).unwrap()
    }

    pub(super) fn write(&self, to: &dyn BlockWrite, at: u64, bytes: &[u8]) {
        to.write_at(at, bytes).unwrap();
        self.raw.write_at(at, bytes).unwrap();
    }

    /// Fails unless QEMU finds neither errors nor leaks, and the same bytes.
    pub(super) fn verify(&self) {
        let [image, raw] = ["x.qcow2", "x.raw"].map(|name| self.path(name));
        run(qemu_img::TOOL, &["check", "-q", text(&image)]);
        let compare = ["compare", "-q", "-f", "qcow2", "-F", "raw"];
        run(
            qemu_img::TOOL,
            &[&compare[..], &[text(&image), text(&raw)]].concat(),
        );
    }
}

/// A local file that plays a remote one: by NBD, one request after the other, with a count of its
/// bytes.
#[derive(Debug)]
pub struct Served {
    path: PathBuf,
    size: u64,
    modified_ms: u64,
    pub fetched: Arc<AtomicU64>,
}

impl Served {
    pub fn new(path: &Path) -> Arc<Self> {
        let meta = path.metadata().unwrap();
        Arc::new(Self {
            path: path.to_owned(),
            size: meta.len(),
            modified_ms: meta.mtime() as u64 * 1000,
            fetched: Arc::default(),
        })
    }
}

impl RemoteFile for Served {
    fn shown(&self) -> String {
        format!("test://{}", self.path.display())
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn modified_ms(&self) -> u64 {
        self.modified_ms
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let (mut ours, theirs) = UnixStream::pair()?;
        let (file, size) = (std::fs::File::open(&self.path)?, self.size);
        let fetched = self.fetched.clone();
        std::thread::spawn(move || {
            if !negotiate(&mut ours, size).is_ok_and(|agreed| agreed) {
                return;
            }
            while let Ok(head) = array::<28>(&mut ours) {
                let offset = u64::from_be_bytes(head[16..24].try_into().unwrap());
                let length = u32::from_be_bytes(head[24..].try_into().unwrap());
                if head[7] != 0 {
                    return;
                }
                let mut data = vec![0; length as usize];
                file.read_exact_at(&mut data, offset).unwrap();
                fetched.fetch_add(u64::from(length), Ordering::Relaxed);
                let reply = [&REPLY_MAGIC.to_be_bytes()[..], &[0; 4], &head[8..16], &data].concat();
                if ours.write_all(&reply).is_err() {
                    return;
                }
            }
        });
        Ok(theirs)
    }

    fn export(&self) -> &'static str {
        ""
    }

    fn check_unchanged(&self) -> Result<(), Doubt> {
        let now = self.path.metadata();
        let now = now.map_err(|e| Doubt::Unreachable(e.to_string()))?;
        match (now.len(), now.mtime() as u64 * 1000) == (self.size, self.modified_ms) {
            true => Ok(()),
            false => Err(Doubt::Changed("it was written to".into())),
        }
    }
}
