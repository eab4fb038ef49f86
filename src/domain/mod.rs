//! The VM on KVM: a model of it, and the libvirt domain XML written from it.
//!
//! - [`model`]: the parts of a converted VM, independent of libvirt.
//! - [`network`]: the target network for each network of the source.
//! - [`firmware`]: the UEFI images of this host, from QEMU's firmware descriptors.
//! - [`slots`]: fixed PCI addresses, so that Windows sees the same hardware in both stages.
//! - [`check`]: conditions that must hold before anything is written.
//! - [`xml`]: model + stage + firmware choice -> domain XML.
//! - [`patch`]: a user's changes to that XML.
//! - [`emit`]: the same VM for other targets: [`kubevirt`], [`proxmox`], [`qemu`].
//! - [`element`]: a small XML tree, parsed with limits and written with escaping.
//!
//! No code here calls libvirt or decides about the guest: the caller provides the facts
//! (`inspect`), the plan (`plan`) and the paths.

pub(crate) mod check;
mod document;
pub mod element;
pub(crate) mod emit;
pub(crate) mod firmware;
pub(crate) mod kubevirt;
pub(crate) mod model;
pub mod network;
pub(crate) mod patch;
pub(crate) mod proxmox;
pub(crate) mod qemu;
pub(crate) mod slots;
pub(crate) mod xml;

pub use crate::types::{DiskBus, MacAddr};
pub use check::DomainError;
pub use emit::Emit;
pub use firmware::{Descriptors, FirmwareChoice, FirmwareError};
pub use model::{
    Backing, Chipset, CpuMode, Disk, DiskFormat, DomainType, Drivers, Firmware, Graphics, Machine,
    Nic, NicSource, SYSTEM_DISK, Stage, System, Topology, Video, WindowsFacts, disk_serial,
};
pub use network::NetworkMap;
pub use patch::Patch;
pub use xml::{HYPER2KVM_NS, to_xml};

#[cfg(test)]
mod emit_schemas;
#[cfg(test)]
mod emit_tests;
#[cfg(test)]
mod examples;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod whole_tests;
