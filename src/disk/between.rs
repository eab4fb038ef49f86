//! An empty image between an overlay and its backing disk.
//!
//! QEMU uses the name of the backing file in an image's header as a file, whatever node it is given
//! for it. The exception is a node that is itself a file with a name (`bdrv_open_backing_file`
//! looks for `file.filename`). An overlay on another host's disk names the socket at which QEMU of
//! the VM finds it. Programs that are given a connection instead get it below a qcow2 without
//! contents, which is a file.
//!
//! Specification: QEMU `docs/interop/qcow2.txt`, version 2.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use crate::tool::pass;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// The range that an entry of the first table covers.
const COVERED: u64 = CLUSTER / 8 * CLUSTER;

/// Creates a qcow2 of that size in memory, in which nothing is allocated.
pub(super) fn empty(size: u64) -> io::Result<File> {
    let entries = size.div_ceil(COVERED).max(1);
    let wide = |n: u64| n.to_be_bytes();
    let short = |n: u32| n.to_be_bytes();
    let count = u32::try_from(entries).map_err(io::Error::other)?;
    let mut header = b"QFI\xfb".to_vec();
    header.extend(short(2));
    // No backing file: its offset and length.
    header.extend(wide(0));
    header.extend(short(0));
    header.extend(short(CLUSTER_BITS));
    header.extend(wide(size));
    // Not encrypted.
    header.extend(short(0));
    // The first table, and the table of reference counts, which only a writer would need.
    header.extend(short(count));
    header.extend(wide(2 * CLUSTER));
    header.extend(wide(CLUSTER));
    header.extend(short(1));
    // No snapshots.
    header.extend(short(0));
    header.extend(wide(0));
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("between", flags)?);
    file.write_all_at(&header, 0)?;
    file.set_len((2 + (entries * 8).div_ceil(CLUSTER)) * CLUSTER)?;
    Ok(file)
}

/// The node of the image below, under such an image.
pub(super) fn under(between: &File, below: Value) -> Value {
    json!({
        "driver": "qcow2",
        "file": {
            "driver": "file",
            "filename": pass::name(between),
            "read-only": true,
            "locking": "off",
        },
        "backing": below,
        "read-only": true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tool::pass::Passed;
    use crate::tool::qemu_img;
    use crate::tool::spec::Spec;
    use std::path::Path;
    use std::sync::Arc;

    #[test]
    fn qemu_sees_what_is_below_in_its_size() {
        if crate::tool::find(qemu_img::TOOL).is_none() {
            return;
        }
        for size in [512, COVERED + 512, 64 << 40] {
            let file = Arc::new(empty(size).unwrap());
            let spec = Spec {
                node: under(&file, Value::Null),
                passed: vec![Passed::new(file.clone(), Path::new("between"), false)],
                sockets: Vec::new(),
                named: Vec::new(),
            };
            assert_eq!(qemu_img::info(&spec).unwrap().virtual_size, size);
            assert_eq!(qemu_img::present_ranges(&spec).unwrap(), []);
        }
    }
}
