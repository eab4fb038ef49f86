//! The engines on real volumes, verified by the tools of ntfs-3g, dosfstools and mtools.

mod compressed;
mod fat;
mod hostile;
mod ntfs;
mod ntfs_states;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::ntfs3g::MountOptions;
use super::{EmbeddedReader, EmbeddedWriter, GuestPath, VolumeId, embedded};
use crate::block::FileDisk;
use crate::disk::layout::{DiskLayout, Partition, Scheme};
use crate::testing::noise;

const VOLUME: VolumeId = VolumeId::new(1);

fn path(text: &str) -> GuestPath {
    GuestPath::parse(text).unwrap()
}

use crate::skip::{have, skip};

/// Runs a tool and returns its output; panics if it fails.
#[allow(clippy::disallowed_methods)]
fn run(tool: &str, args: &[&str]) -> Vec<u8> {
    let path = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    let output = Command::new(tool)
        .args(args)
        .env("PATH", path)
        .env("LC_ALL", "C.UTF-8")
        .env("MTOOLS_SKIP_CHECK", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// A volume in a raw file of its own, so that the tools can read it.
struct Image {
    dir: tempfile::TempDir,
    file: PathBuf,
    size: u64,
}

impl Image {
    fn empty(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("volume.img");
        File::create(&file).unwrap().set_len(size).unwrap();
        Self { dir, file, size }
    }

    /// An NTFS volume of `mib` MiB.
    fn ntfs(mib: u64, sector: u32, cluster: u32) -> Self {
        let image = Self::empty(mib << 20);
        run(
            "mkntfs",
            &[
                "-F",
                "-Q",
                "-q",
                "-L",
                "Windows",
                "-s",
                &sector.to_string(),
                "-c",
                &cluster.to_string(),
                "-p",
                "2048",
                "-H",
                "255",
                "-S",
                "63",
                image.name(),
            ],
        );
        image
    }

    fn name(&self) -> &str {
        self.file.to_str().unwrap()
    }

    fn layout(&self) -> DiskLayout {
        layout(0, self.size)
    }

    fn reader(&self) -> EmbeddedReader {
        let disk = Arc::new(FileDisk::open(&self.file).unwrap());
        embedded::open(disk, &self.layout()).unwrap()
    }

    fn writer(&self) -> Box<EmbeddedWriter> {
        let disk = Arc::new(FileDisk::open_rw(&self.file).unwrap());
        Box::new(EmbeddedWriter::new(
            disk,
            &self.layout(),
            MountOptions::default(),
        ))
    }

    fn digest(&self) -> Vec<u8> {
        Sha256::digest(std::fs::read(&self.file).unwrap()).to_vec()
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let file = File::open(&self.file).unwrap();
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(&self.file).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }

    /// Writes `contents` to a file beside the image, for tools that copy into it.
    fn host_file(&self, name: &str, contents: &[u8]) -> String {
        let path: &Path = self.dir.path();
        let path = path.join(name);
        std::fs::write(&path, contents).unwrap();
        path.to_str().unwrap().to_string()
    }
}

fn layout(start_bytes: u64, size_bytes: u64) -> DiskLayout {
    DiskLayout {
        scheme: Scheme::Mbr,
        sector_size: 512,
        disk_id: None,
        partitions: vec![Partition {
            index: VOLUME.partition,
            type_id: "0x07".into(),
            start_bytes,
            size_bytes,
            guid: None,
            name: None,
            active: false,
        }],
    }
}
