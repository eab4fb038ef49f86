//! Images for the tests of this directory.

use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use super::compose::{REPLY_MAGIC, array, negotiate};
use super::remote::RemoteFile;

pub use crate::skip::have;

/// Runs a program that must succeed.
pub fn run(program: &str, args: &[&str]) {
    run_input(program, args, b"");
}

#[expect(
    clippy::disallowed_methods,
    reason = "a judge independent of the wrapper"
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

/// A file of this host as one on another: by NBD, one request after the other, its bytes counted.
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

    fn check_unchanged(&self) -> Result<(), String> {
        let now = self.path.metadata().map_err(|e| e.to_string())?;
        match (now.len(), now.mtime() as u64 * 1000) == (self.size, self.modified_ms) {
            true => Ok(()),
            false => Err("it was written to".into()),
        }
    }
}

/// A COWD link over a disk of so many sectors: one sector for each grain.
pub fn cowd(path: &Path, sectors: u32, grains: &[(u32, [u8; 512])]) {
    let mut file = vec![0; 40 * 512];
    let put = |file: &mut Vec<u8>, at: usize, value: u32| {
        file[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    file[..4].copy_from_slice(b"COWD");
    // Version 1, one sector a grain, the directory in sector 4 with an entry for each 4096 sectors.
    let tables = sectors.div_ceil(4096);
    for (at, value) in [
        (4, 1),
        (8, 3),
        (12, sectors),
        (16, 1),
        (20, 4),
        (24, tables),
    ] {
        put(&mut file, at, value);
    }
    for (sector, data) in grains {
        let entry = 4 * 512 + 4 * (sector / 4096) as usize;
        if file[entry..entry + 4] == [0; 4] {
            let table = (file.len() / 512) as u32;
            file.resize(file.len() + 4096 * 4, 0);
            put(&mut file, entry, table);
        }
        let table = u32::from_le_bytes(file[entry..entry + 4].try_into().unwrap());
        let place = (file.len() / 512) as u32;
        put(
            &mut file,
            table as usize * 512 + 4 * (sector % 4096) as usize,
            place,
        );
        file.extend_from_slice(data);
    }
    std::fs::write(path, file).unwrap();
}

/// A seSparse link over a disk of so many sectors: grains of 4 KiB, `None` for one of zeroes.
pub fn se_sparse(path: &Path, sectors: u64, grains: &[(u64, Option<[u8; 4096]>)]) {
    const DIRECTORY: u64 = 16;
    const TABLES: u64 = 32;
    const GRAINS: u64 = 1024;
    const PER_TABLE: u64 = 64 * 512 / 8;
    let mut file = vec![0; GRAINS as usize * 512];
    let put = |file: &mut Vec<u8>, at: usize, value: u64| {
        file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    let fields = [
        (0, 0xcafe_babe),
        (1, 0x2_0000_0001),
        (2, sectors),
        (3, 8),
        (4, 64),
        // The volatile header, and the journal.
        (10, 1),
        (11, 1),
        (12, 2),
        (13, 2),
        (14, 4),
        (15, 4),
        (16, DIRECTORY),
        (17, 8),
        (18, TABLES),
        (19, GRAINS - TABLES),
        (24, GRAINS),
        (25, 1 << 20),
    ];
    for (n, value) in fields {
        put(&mut file, 8 * n, value);
    }
    put(&mut file, 512, 0xcafe_cafe);
    let mut used = 0;
    for (grain, data) in grains {
        let (table, entry) = (grain / PER_TABLE, grain % PER_TABLE);
        assert!(table < (GRAINS - TABLES) / 64, "the tables are full");
        let at = (DIRECTORY * 512 + 8 * table) as usize;
        put(&mut file, at, 0x1000_0000_0000_0000 | table);
        let value = match data {
            None => 2 << 60,
            Some(data) => {
                file.extend_from_slice(data);
                used += 1;
                let number = used - 1u64;
                3 << 60 | (number & 0xfff) << 48 | number >> 12
            }
        };
        put(
            &mut file,
            ((TABLES + 64 * table) * 512 + 8 * entry) as usize,
            value,
        );
    }
    std::fs::write(path, file).unwrap();
}
