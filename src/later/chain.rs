//! Determines whether a disk can stay in its place, under an overlay that QEMU and libvirt open
//! themselves.

use crate::disk::hold::Held;
use crate::disk::{Image, Level as Opened};
use crate::error::{Blocker, Result};
use crate::text;

use super::record::Level;
use super::whole;
use super::wire::OnWire;

/// The formats that libvirt can name below an overlay.
const KNOWN_TO_LIBVIRT: [&str; 7] = ["raw", "qcow2", "qcow", "qed", "vmdk", "vpc", "vdi"];

/// The levels of a source, or the reason why it has to be copied. Overlays of this run are left
/// out.
pub(crate) fn levels(image: &Image) -> Result<Vec<Level>, Box<Blocker>> {
    let below = image.without_overlays();
    if below.held().any(Held::is_on_wire) {
        return on_wire(&below).map(|level| vec![level]);
    }
    below.levels().iter().map(level).collect()
}

/// The level of a disk on another host: one file that QEMU reads unchanged, or all its files as one
/// raw disk. In both cases it is behind one socket.
fn on_wire(image: &Image) -> Result<Level, Box<Blocker>> {
    let file = match image.levels() {
        [only] => one_file(only),
        _ => None,
    };
    let (wire, format) = match file {
        Some((file, format)) => (OnWire::of(file), format),
        None => (whole::of(image), "raw"),
    };
    let wire = wire.map_err(|e| {
        let shown = text::called_path(image.path());
        let remedy = "leave --copy later out: what is in use is then copied, and no more";
        Box::new(Blocker::new(
            "copy-later",
            format!("{} {e}", shown.display()),
            remedy,
        ))
    })?;
    Ok(Level {
        format: format.to_owned(),
        files: Vec::new(),
        wire: Some(wire),
    })
}

fn one_file(level: &Opened) -> Option<(&Held, &'static str)> {
    let (file, format) = match (level.held(), level.format_by_name()) {
        ([file], Some(format)) => (file, format.driver()),
        // For a flat VMDK, the extent that is the whole disk.
        ([_, extent], None) if extent.size() == level.virtual_size => (extent, "raw"),
        _ => return None,
    };
    (file.remote().is_some() && KNOWN_TO_LIBVIRT.contains(&format)).then_some((file, format))
}

fn level(level: &Opened) -> Result<Level, Box<Blocker>> {
    let shown = level.path.display();
    let refuse = |why: String, remedy: &str| Box::new(Blocker::new("copy-later", why, remedy));
    if level.held().is_empty() {
        return Err(refuse(
            format!("{shown} is not a file of this host"),
            "leave --copy later out",
        ));
    }
    for held in level.held() {
        // An unpacked disk has no name of its own.
        if !held.has_a_name() {
            return Err(refuse(
                format!("{shown} is packed, so nothing can start from it where it is"),
                "unpack it first (tar -xf, gunzip) and name what was in it, or leave --copy later out",
            ));
        }
    }
    let Some(format) = level.format_by_name() else {
        return Err(refuse(
            format!(
                "QEMU would take the size of {shown} from its geometry, which is smaller than the disk"
            ),
            "leave --copy later out",
        ));
    };
    let format = format.driver();
    if !KNOWN_TO_LIBVIRT.contains(&format) {
        return Err(refuse(
            format!(
                "{shown} is of the format {format}, which libvirt cannot have below an overlay"
            ),
            "leave --copy later out, or make a qcow2 of it first: qemu-img convert -O qcow2",
        ));
    }
    Ok(Level {
        format: format.to_owned(),
        files: level.held().iter().map(|held| held.fingerprint()).collect(),
        wire: None,
    })
}
