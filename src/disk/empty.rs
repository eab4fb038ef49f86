//! Creates an empty qcow2 like `qemu-img create`, without starting it.
//!
//! Specification: `docs/interop/qcow2.rst` of QEMU. Version 3, clusters of 64 KiB (an overlay of a
//! large disk: 2 MiB), reference counts of 16 bits. It has four parts: the header, the table of
//! reference counts, one block of counts, and the first-level table. This table is all zeroes. One
//! block counts 2 GiB, and the largest first-level table (64 TiB of disk) has 1 MiB.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::detect::Format;
use super::qcow2::{COMPRESSION_TYPE, EXTENDED_L2, Header, MAGIC, ZSTD};
use crate::bytes::Be;

pub(super) const CLUSTER_BITS: u32 = 16;
pub(super) const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// The range that one entry of the first-level table covers: a second-level table of 8-byte
/// entries.
pub(super) const PER_ENTRY: u64 = CLUSTER / 8 * CLUSTER;
/// The bits of a reference count, as a power of two.
const REFCOUNT_ORDER: u32 = 4;
pub(super) const COUNT_BLOCK: u64 = 2 * CLUSTER;
/// The cluster in which the first-level table begins.
pub(super) const FIRST_OF_LEVEL_1: u64 = 3;
pub(super) const LEVEL_1: u64 = FIRST_OF_LEVEL_1 * CLUSTER;
/// The size of a disk from which its overlay has large clusters. With clusters of 64 KiB, the
/// tables that mark the free space of 2 TiB as zero take 256 MiB. With large ones they take 16.
const LARGE: u64 = 256 << 30;
/// The header extension with the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// The longest name of a backing file.
const LONGEST_NAME: usize = 1023;
/// The largest disk that can be created.
const LARGEST: u64 = 64 << 40;

/// Creates the file, which must not exist.
pub fn create_qcow2(path: &Path, virtual_size: u64) -> io::Result<()> {
    if !can_create(virtual_size) {
        return Err(too_large(virtual_size));
    }
    write_qcow2(&create(path)?, virtual_size, false)
}

/// Whether a disk of that size can be created here.
pub(super) fn can_create(virtual_size: u64) -> bool {
    virtual_size <= LARGEST
}

fn too_large(size: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("a disk of {size} bytes; the largest has {LARGEST}"),
    )
}

/// Creates an empty image that takes writes over a qcow2, `below`, of that name.
pub(crate) fn create_over(path: &Path, below: &File, name: &Path) -> io::Result<()> {
    let mut head = [0; Header::LEN];
    below.read_exact_at(&mut head, 0)?;
    let not_one = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} is no qcow2", name.display()),
        )
    };
    let size = Header::of(&head).ok_or_else(not_one)?.size.0;
    if !can_create(size) {
        return Err(too_large(size));
    }
    let naming = naming(name)?;
    Shape::of_overlay(size).write(&create(path)?, size, &naming)
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600).open(path)
}

/// The header's extensions, and the name of the backing file after them.
fn naming(below: &Path) -> io::Result<Naming> {
    let name = below.as_os_str().as_bytes().to_vec();
    if name.len() > LONGEST_NAME {
        let what = format!(
            "{}: QEMU takes names of {LONGEST_NAME} bytes",
            below.display()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    Ok(Naming(name))
}

/// Creates an empty overlay that names no backing file. That of a large disk has clusters of 2 MiB
/// with subclusters of 64 KiB (`extended_l2`, QEMU 5.2), whose tables are small.
pub fn create_overlay(path: &Path, virtual_size: u64) -> io::Result<()> {
    if !can_create(virtual_size) {
        return Err(too_large(virtual_size));
    }
    Shape::of_overlay(virtual_size).write(&create(path)?, virtual_size, &Naming::NONE)
}

/// Bytes of a cluster of such an overlay, and of an entry of its second level.
pub(super) fn overlay_shape(virtual_size: u64) -> (u64, u64) {
    let shape = Shape::of_overlay(virtual_size);
    (1 << shape.cluster_bits, shape.entry)
}

/// Writes an empty image to an existing empty file. One that will be compressed says so: QEMU reads
/// zstd from 5.1 on.
pub(super) fn write_qcow2(file: &File, virtual_size: u64, compressed: bool) -> io::Result<()> {
    if !can_create(virtual_size) {
        return Err(too_large(virtual_size));
    }
    Shape::of_copy(compressed).write(file, virtual_size, &Naming::NONE)
}

/// The parameters of an image.
struct Shape {
    cluster_bits: u32,
    /// The incompatible features in the header.
    features: u64,
    /// Bytes of an entry of the second level.
    entry: u64,
}

const PLAIN: Shape = Shape {
    cluster_bits: CLUSTER_BITS,
    features: 0,
    entry: 8,
};
const PACKED: Shape = Shape {
    features: COMPRESSION_TYPE,
    ..PLAIN
};
const OVERLAY: Shape = Shape {
    cluster_bits: 21,
    features: EXTENDED_L2,
    entry: 16,
};

/// The name of the qcow2 below an image, or nothing.
struct Naming(Vec<u8>);

impl Naming {
    const NONE: Self = Self(Vec::new());

    /// The bytes after the header: the extensions, the last of which is empty, and the name.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if !self.0.is_empty() {
            let format = Format::QCOW2.driver().as_bytes();
            bytes.extend(BACKING_FORMAT.to_be_bytes());
            bytes.extend((format.len() as u32).to_be_bytes());
            bytes.extend(format);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; 8]);
        bytes.extend(&self.0);
        bytes
    }
}

impl Shape {
    /// The parameters for an overlay of a disk of that size.
    fn of_overlay(virtual_size: u64) -> Self {
        match virtual_size >= LARGE {
            true => OVERLAY,
            false => PLAIN,
        }
    }

    fn of_copy(compressed: bool) -> Self {
        if compressed { PACKED } else { PLAIN }
    }

    fn write(&self, file: &File, virtual_size: u64, naming: &Naming) -> io::Result<()> {
        let cluster = 1 << self.cluster_bits;
        let size = virtual_size.next_multiple_of(512);
        let entries = size.div_ceil(cluster / self.entry * cluster);
        let clusters = FIRST_OF_LEVEL_1 + (entries * 8).div_ceil(cluster);
        // Each part begins a cluster: the header, the table of counts with its one block, the first level.
        file.write_all_at(&self.header(size, entries, naming), 0)?;
        file.write_all_at(&(2 * cluster).to_be_bytes(), cluster)?;
        file.write_all_at(&[0, 1].repeat(clusters as usize), 2 * cluster)?;
        file.set_len(clusters * cluster)
    }

    fn header(&self, size: u64, entries: u64, naming: &Naming) -> Vec<u8> {
        let cluster: u64 = 1 << self.cluster_bits;
        let mut own = Vec::new();
        if self.features & COMPRESSION_TYPE != 0 {
            own.extend([ZSTD, 0, 0, 0, 0, 0, 0, 0]);
        }
        let len = Header::LEN + own.len();
        let behind = naming.bytes();
        let name = naming.0.len();
        let header = Header {
            magic: MAGIC,
            version: Be(3),
            backing: Be(match name {
                0 => 0,
                _ => (len + behind.len() - name) as u64,
            }),
            backing_len: Be(name as u32),
            cluster_bits: Be(self.cluster_bits),
            size: Be(size),
            encryption: Be(0),
            l1_entries: Be(entries as u32),
            l1: Be(FIRST_OF_LEVEL_1 * cluster),
            counts: Be(cluster),
            counts_clusters: Be(1),
            snapshots: Be(0),
            snapshot_list: Be(0),
            incompatible: Be(self.features),
            compatible: Be(0),
            clearing: Be(0),
            count_order: Be(REFCOUNT_ORDER),
            len: Be(len as u32),
        };
        let mut bytes = vec![0; Header::LEN];
        let whole = header.write(&mut bytes);
        debug_assert!(whole.is_some());
        bytes.extend(own);
        bytes.extend(behind);
        bytes
    }
}

/// The bytes in use of an empty disk whose first level has so many entries.
pub(super) fn first_free(entries: u64) -> u64 {
    LEVEL_1 + (entries * 8).next_multiple_of(CLUSTER)
}

/// The header of a disk with clusters of 64 KiB.
pub(super) fn header(size: u64, entries: u64, compressed: bool) -> Vec<u8> {
    Shape::of_copy(compressed).header(size, entries, &Naming::NONE)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::tool::qemu_img;
    use crate::tool::spec::Spec;

    /// The output of `qemu-img info` for a file in which `qemu-img check` finds no fault.
    fn sound(path: &Path) -> serde_json::Value {
        let show = |args: &[&str]| {
            let cmd = crate::tool::Cmd::new("qemu-img").args(args);
            let said = cmd.args(["-f", "qcow2", "--"]).arg(path).run().unwrap();
            String::from_utf8(said.stdout).unwrap()
        };
        let said = show(&["check"]);
        assert!(said.contains("No errors were found"), "{said}");
        serde_json::from_str(&show(&["info", "--output=json"])).unwrap()
    }

    /// `qemu-img` verifies the result.
    #[test]
    fn qemu_takes_it_for_an_empty_disk() {
        if !crate::skip::have(&[qemu_img::TOOL]) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for (n, size) in [0, 512, 1000, 64 << 20, PER_ENTRY + 1, 2 << 40, LARGEST]
            .into_iter()
            .enumerate()
        {
            let path = dir.path().join(n.to_string());
            create_qcow2(&path, size).unwrap();
            let node = serde_json::json!({"driver": "qcow2",
                "file": {"driver": "file", "filename": path.to_str().unwrap()}});
            let spec = Spec::named(node, [(path.clone(), false)]);
            let info = qemu_img::info(&spec).unwrap();
            assert_eq!(info.virtual_size, size.next_multiple_of(512));
            assert_eq!(info.backing_filename, None);
            sound(&path);
            // An existing file is not overwritten.
            assert!(create_qcow2(&path, size).is_err());
            assert!(create_overlay(&path, size).is_err());
        }
        for size in [512, 256 << 30, 2 << 40, LARGEST] {
            let path = dir.path().join("large");
            match size {
                512 => OVERLAY.write(&create(&path).unwrap(), size, &Naming::NONE),
                size => create_overlay(&path, size),
            }
            .unwrap();
            let info = sound(&path);
            assert_eq!(info["virtual-size"], size);
            assert_eq!(info["cluster-size"], 2 << 20);
            assert_eq!(info["format-specific"]["data"]["extended-l2"], true);
            std::fs::remove_file(&path).unwrap();
        }
        assert!(create_qcow2(&dir.path().join("x"), LARGEST + 512).is_err());
    }

    #[test]
    fn an_overlay_names_what_it_is_on() {
        if !crate::skip::have(&[qemu_img::TOOL]) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for (size, cluster) in [(1 << 20, CLUSTER), (2 << 40, 2 << 20)] {
            let below = dir.path().join(format!("{size}, ü.qcow2"));
            create_qcow2(&below, size).unwrap();
            let path = dir.path().join(format!("{size}-over.qcow2"));
            let file = File::open(&below).unwrap();
            create_over(&path, &file, &below).unwrap();
            let info = sound(&path);
            assert_eq!(info["virtual-size"], size);
            assert_eq!(info["cluster-size"], cluster);
            assert_eq!(info["backing-filename"], below.to_str().unwrap());
            assert_eq!(info["backing-filename-format"], "qcow2");
            assert!(create_over(&path, &file, &below).is_err(), "it is there");
            std::fs::remove_file(&path).unwrap();
            let name = |len: usize| PathBuf::from("/".repeat(len));
            assert!(create_over(&path, &file, &name(1024)).is_err());
            create_over(&path, &file, &name(1023)).unwrap();
        }
        let other = dir.path().join("other");
        std::fs::write(&other, [1; 512]).unwrap();
        let file = File::open(&other).unwrap();
        let error = create_over(&dir.path().join("over"), &file, &other).unwrap_err();
        assert!(error.to_string().contains("no qcow2"), "{error}");
    }
}
