//! `virt-v2v` and `virt-v2v-in-place`: convert a Linux guest with its own initramfs and boot loader
//! tools.
//!
//! Both run the guest's own programs inside libguestfs' appliance, never on this host. They get a
//! libvirt XML whose disks are overlays of this run.

use std::path::Path;
use std::time::Duration;

use super::privileges::Privileges;
use super::{Cmd, Result, appliance};

pub const IN_PLACE: &str = "virt-v2v-in-place";
pub const V2V: &str = "virt-v2v";
/// The program with which both open disks.
pub const NBDKIT: &str = "nbdkit";
/// The time limit: without KVM, rebuilding an initramfs takes many minutes.
const LIMIT: Duration = Duration::from_secs(3 * 3600);

/// Converts the disks of `xml` in place.
pub fn in_place(xml: &Path, on_line: &mut dyn FnMut(&str)) -> Result<()> {
    let cmd = Cmd::new(IN_PLACE).args(["-i", "libvirtxml"]).arg(xml);
    run(cmd, on_line)
}

/// Writes converted copies of the disks of `xml` to `folder`: `NAME-sda`, `NAME-sdb`, ...
pub fn copy(xml: &Path, folder: &Path, on_line: &mut dyn FnMut(&str)) -> Result<()> {
    let cmd = Cmd::new(V2V)
        .args(["-i", "libvirtxml", "-o", "local", "-of", "qcow2", "-os"])
        .arg(folder)
        .arg(xml);
    run(cmd, on_line)
}

fn run(cmd: Cmd, on_line: &mut dyn FnMut(&str)) -> Result<()> {
    let (name, value) = super::guestfish::APPLIANCE;
    let mut rest = Vec::new();
    // The output directory may belong to others. Rebuilding an initramfs prints nothing, and is
    // slow under emulation.
    appliance::prepare(cmd.env(name, value))
        .privileges(Privileges::Files)
        .patient(6)
        .timeout(LIMIT)
        .run_with(&mut |chunk| {
            rest.extend_from_slice(chunk);
            while let Some(end) = rest.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                on_line(&super::clean(&line));
            }
        })?;
    Ok(())
}
