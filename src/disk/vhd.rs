//! Handles VHDs whose size QEMU would compute from their geometry.
//!
//! The geometry counts in cylinders and is often smaller than the disk. QEMU uses it depending on
//! the creator (Virtual PC; older QEMUs for all unknown creators). Hyper-V and VirtualBox use the
//! size in the footer. The option for that (`force_size_calc`) is missing in the storage daemon. So
//! a fixed VHD is read as a raw disk. For a dynamic one, QEMU gets a copy of the first sector with
//! a creator that it knows.

use std::io;

use super::detect::{VHD_FIXED, read_up_to, vhd_checksum, vhd_footer};
use super::headers::VhdFooter;
use super::remote::ReadAt;
use crate::bytes::Be;

const SECTOR: u64 = 512;
/// Creators for which QEMU has long used the size.
const KNOWN: [&[u8; 4]; 5] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS"];
/// The size of the largest geometry, which is never the real size.
const LARGEST: u64 = 65_535 * 16 * 255;

/// The form in which QEMU gets a VHD.
#[derive(Debug, PartialEq, Eq)]
pub enum Shown {
    /// That many bytes of the file, as a raw disk.
    Raw(u64),
    /// The file with another first sector.
    Head(Vec<u8>),
}

/// The form for QEMU; `None` is the unchanged file.
pub fn shown(file: &dyn ReadAt, size: u64) -> io::Result<Option<Shown>> {
    let head = read_up_to(file, 0, SECTOR as usize, size)?;
    let tail = read_up_to(file, size.saturating_sub(SECTOR), SECTOR as usize, size)?;
    if let Some(footer) = vhd_footer(&head) {
        let other = by_geometry(&footer);
        return Ok(other.map(|_| Shown::Head(with_known_creator(footer, head))));
    }
    let fixed = vhd_footer(&tail).filter(|footer| footer.kind.0 == VHD_FIXED);
    Ok(fixed
        .and_then(|footer| by_geometry(&footer))
        .map(Shown::Raw))
}

/// The size in a footer, if QEMU would use the geometry and that differs.
fn by_geometry(footer: &VhdFooter) -> Option<u64> {
    let tracks = u64::from(footer.cylinders.0) * u64::from(footer.heads);
    let geometry = tracks * u64::from(footer.sectors_per_track);
    let sectors = footer.size.0 / SECTOR;
    let other = geometry != sectors && geometry != LARGEST && !KNOWN.contains(&&footer.creator);
    other.then_some(sectors * SECTOR)
}

fn with_known_creator(mut footer: VhdFooter, mut bytes: Vec<u8>) -> Vec<u8> {
    footer.creator = *KNOWN[0];
    footer.write(&mut bytes);
    footer.checksum = Be(vhd_checksum(&bytes));
    footer.write(&mut bytes);
    bytes
}

/// The descriptor of a VMDK that is the file with another first sector.
pub fn descriptor(head: &str, file: &str, size: u64) -> String {
    let rest = (size / SECTOR).saturating_sub(1);
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
         createType=\"twoGbMaxExtentFlat\"\nRW 1 FLAT \"{head}\" 0\nRW {rest} FLAT \"{file}\" 1\n"
    )
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::disk::testing::{have, pattern, run, text, write};
    use crate::disk::{Export, Image};

    /// Sets another creator in both footers, and the geometry next below the size. `force_size`
    /// writes the largest geometry, which QEMU ignores.
    fn created_by(path: &std::path::Path, creator: &[u8; 4]) {
        const BELOW: [u8; 4] = [0, 60, 12, 17];
        let file = File::options().read(true).write(true).open(path).unwrap();
        let size = file.metadata().unwrap().len();
        for at in [0, size - SECTOR] {
            let mut footer = read_up_to(&file, at, 512, size).unwrap();
            if vhd_footer(&footer).is_some() {
                footer[28..32].copy_from_slice(creator);
                footer[56..60].copy_from_slice(&BELOW);
                let sum = vhd_checksum(&footer);
                footer[64..68].copy_from_slice(&sum.to_be_bytes());
                file.write_all_at(&footer, at).unwrap();
            }
        }
    }

    #[test]
    fn the_size_of_a_vhd_is_that_in_its_footer() {
        if !have(&["qemu-img", "qemu-storage-daemon"]) {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        // No geometry has so many sectors.
        let bytes = pattern((6 << 20) + 3 * 512);
        let raw = write(folder.path(), "raw.img", &bytes);
        for (name, subformat) in [("d.vhd", "dynamic"), ("f.vhd", "fixed")] {
            let path = folder.path().join(name);
            let options = format!("subformat={subformat},force_size=on");
            let args = ["convert", "-f", "raw", "-O", "vpc", "-o", &options];
            run(
                "qemu-img",
                &[&args[..], &[text(&raw), text(&path)]].concat(),
            );
            // QEMU uses the geometry for the first two; older versions for all but the last.
            for creator in [b"vpc ", b"qemu", b"vbox", b"win "] {
                created_by(&path, creator);
                let image = Image::open_info(&path, None, &[]).unwrap();
                let what = format!("{name} of {:?}", String::from_utf8_lossy(creator));
                assert_eq!(image.virtual_size(), bytes.len() as u64, "{what}");
                let export = Export::open_readonly(&image).unwrap();
                let mut read = vec![0; bytes.len()];
                export.disk().read_at(0, &mut read).unwrap();
                assert!(read == bytes, "{what}");
            }
        }
    }
}
