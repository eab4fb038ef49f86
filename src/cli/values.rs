//! Values of options, as the command line spells them.

use clap::ValueEnum;

use crate::boot_path::Controller;
use crate::domain::network;
use crate::domain::{CpuMode, DiskFormat, DomainType, Graphics, StorageBus, Video};
use crate::firstboot::network::Policy;
use crate::ids::Accepted;
use crate::session::engine;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StorageArg {
    VirtioBlk,
    VirtioScsi,
    /// For a Linux guest without VirtIO drivers
    Sata,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LinuxArg {
    /// virt-v2v, where it is installed and knows the distribution; else refused
    #[default]
    Auto,
    /// virt-v2v-in-place or virt-v2v makes the guest ready
    VirtV2v,
    /// The guest is copied unchanged, on your word that it has the VirtIO drivers
    AsIs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BootstrapArg {
    Sata,
    Ide,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum EngineArg {
    /// Embedded where that can do it; guestfish for what it cannot open, or without libntfs-3g
    #[default]
    Auto,
    /// In this process: no appliance, no root, no mount
    Embedded,
    /// Through libguestfs: in an appliance VM
    Guestfish,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum CopyArg {
    #[default]
    Now,
    /// `hyper2kvm pull` copies; the source must not change until then
    Later,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    Qcow2,
    Raw,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum NetworkArg {
    /// Keep the addresses on the new NIC
    #[default]
    Preserve,
    /// Take addresses from DHCP
    Dhcp,
    /// Change nothing
    Leave,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DomainTypeArg {
    Kvm,
    Qemu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CpuArg {
    HostPassthrough,
    HostModel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GraphicsArg {
    Vnc,
    Spice,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VideoArg {
    Vga,
    Qxl,
    Virtio,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AccessModeArg {
    /// ReadWriteOnce
    Rwo,
    /// ReadWriteMany
    Rwx,
}

pub(super) fn kubernetes_label(text: &str) -> Result<String, String> {
    kubernetes(text, false)
}

pub(super) fn kubernetes_name(text: &str) -> Result<String, String> {
    kubernetes(text, true)
}

fn kubernetes(text: &str, dots: bool) -> Result<String, String> {
    match network::kubernetes_name(text, dots) {
        true => Ok(text.to_owned()),
        false => Err("not a name in Kubernetes: lower case letters, digits and `-`".to_owned()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EmitArg {
    /// VirtualMachine and DataVolumes, as YAML
    Kubevirt,
    /// A script of qm commands for Proxmox VE
    Proxmox,
    /// A script with the QEMU command line
    Qemu,
}

/// An identifier of `--accept`, checked where it is read: in a batch list before anything starts.
pub(super) fn acceptable(id: &str) -> Result<String, String> {
    Accepted::parse(&[id])
        .map(|_| id.to_string())
        .map_err(|e| format!("{} ({})", e.message, e.hints.join("; ")))
}

impl From<NetworkArg> for Policy {
    fn from(arg: NetworkArg) -> Self {
        match arg {
            NetworkArg::Preserve => Policy::Preserve,
            NetworkArg::Dhcp => Policy::Dhcp,
            NetworkArg::Leave => Policy::Leave,
        }
    }
}

impl From<EngineArg> for Option<engine::Kind> {
    fn from(arg: EngineArg) -> Self {
        match arg {
            EngineArg::Auto => None,
            EngineArg::Embedded => Some(engine::Kind::Embedded),
            EngineArg::Guestfish => Some(engine::Kind::Guestfish),
        }
    }
}

impl From<StorageArg> for StorageBus {
    fn from(arg: StorageArg) -> Self {
        match arg {
            StorageArg::VirtioBlk => StorageBus::VirtioBlk,
            StorageArg::VirtioScsi => StorageBus::VirtioScsi,
            StorageArg::Sata => StorageBus::Sata,
        }
    }
}

impl From<FormatArg> for DiskFormat {
    fn from(arg: FormatArg) -> Self {
        match arg {
            FormatArg::Qcow2 => DiskFormat::Qcow2,
            FormatArg::Raw => DiskFormat::Raw,
        }
    }
}

impl From<DomainTypeArg> for DomainType {
    fn from(arg: DomainTypeArg) -> Self {
        match arg {
            DomainTypeArg::Kvm => DomainType::Kvm,
            DomainTypeArg::Qemu => DomainType::Qemu,
        }
    }
}

impl From<CpuArg> for CpuMode {
    fn from(arg: CpuArg) -> Self {
        match arg {
            CpuArg::HostPassthrough => CpuMode::HostPassthrough,
            CpuArg::HostModel => CpuMode::HostModel,
        }
    }
}

impl From<GraphicsArg> for Graphics {
    fn from(arg: GraphicsArg) -> Self {
        match arg {
            GraphicsArg::Vnc => Graphics::Vnc,
            GraphicsArg::Spice => Graphics::Spice,
            GraphicsArg::None => Graphics::None,
        }
    }
}

impl From<VideoArg> for Video {
    fn from(arg: VideoArg) -> Self {
        match arg {
            VideoArg::Vga => Video::Vga,
            VideoArg::Qxl => Video::Qxl,
            VideoArg::Virtio => Video::Virtio,
        }
    }
}

impl BootstrapArg {
    pub fn controller(self) -> Option<Controller> {
        match self {
            BootstrapArg::Sata => Some(Controller::Sata),
            BootstrapArg::Ide => Some(Controller::Ide),
            BootstrapArg::None => None,
        }
    }
}
