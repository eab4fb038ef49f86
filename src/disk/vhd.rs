//! Handles VHDs whose size QEMU would compute from their geometry.
//!
//! The geometry counts in cylinders and is often smaller than the disk. QEMU uses it depending on
//! the creator (Virtual PC; older QEMUs for all unknown creators). Hyper-V and VirtualBox use the
//! size in the footer. The option for that (`force_size_calc`) is missing in the storage daemon. So
//! a fixed VHD is read as a raw disk. For a dynamic one, QEMU gets a copy of the first sector with
//! a creator that it knows.

use std::io;

use super::detect::{read_up_to, vhd_type};
use super::remote::ReadAt;

const SECTOR: u64 = 512;
/// Creators for which QEMU has long used the size.
const KNOWN: [&[u8]; 5] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS"];
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
    const FIXED: u32 = 2;
    let head = read_up_to(file, 0, SECTOR as usize, size)?;
    let tail = read_up_to(file, size.saturating_sub(SECTOR), SECTOR as usize, size)?;
    Ok(if vhd_type(&head).is_some() {
        by_geometry(&head).map(|_| Shown::Head(with_known_creator(head)))
    } else if vhd_type(&tail) == Some(FIXED) {
        by_geometry(&tail).map(Shown::Raw)
    } else {
        None
    })
}

/// The size in a footer, if QEMU would use the geometry and that differs.
fn by_geometry(footer: &[u8]) -> Option<u64> {
    let creator = footer.get(28..32)?;
    let size = u64::from_be_bytes(footer.get(48..56)?.try_into().ok()?);
    let &[c1, c0, heads, sectors] = footer.get(56..60)? else {
        return None;
    };
    let cylinders = u64::from(u16::from_be_bytes([c1, c0]));
    let geometry = cylinders * u64::from(heads) * u64::from(sectors);
    let sectors = size / SECTOR;
    let other = geometry != sectors && geometry != LARGEST && !KNOWN.contains(&creator);
    other.then_some(sectors * SECTOR)
}

fn with_known_creator(mut footer: Vec<u8>) -> Vec<u8> {
    footer[28..32].copy_from_slice(KNOWN[0]);
    footer[64..68].fill(0);
    let sum: u32 = footer.iter().map(|b| u32::from(*b)).sum();
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    footer
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
            let footer = read_up_to(&file, at, 512, size).unwrap();
            if vhd_type(&footer).is_some() {
                let mut footer = with_known_creator(footer);
                footer[28..32].copy_from_slice(creator);
                footer[56..60].copy_from_slice(&BELOW);
                footer[64..68].fill(0);
                let sum: u32 = footer.iter().map(|b| u32::from(*b)).sum();
                footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
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
