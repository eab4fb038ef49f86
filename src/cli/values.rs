//! Values of options, as spelled on the command line.

use clap::ValueEnum;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use crate::domain::network;
use crate::ids::Accepted;
use crate::session::engine;
use crate::types::DiskBus;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BootstrapArg {
    Sata,
    Ide,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum EngineArg {
    /// Embedded if it supports the disk; guestfish for what it cannot open, or without libntfs-3g
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

/// The buses of the production VM.
pub(super) fn storage() -> impl TypedValueParser<Value = DiskBus> {
    PossibleValuesParser::new([
        PossibleValue::new("virtio-blk"),
        PossibleValue::new("virtio-scsi"),
        PossibleValue::new("sata").help("For a Linux guest without VirtIO drivers"),
    ])
    .try_map(|name| DiskBus::by_name(&name).ok_or("not a disk bus"))
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

/// Checks an identifier of `--accept` during parsing: in a batch list before anything starts.
pub(super) fn acceptable(id: &str) -> Result<String, String> {
    Accepted::parse(&[id])
        .map(|_| id.to_string())
        .map_err(|e| format!("{} ({})", e.message, e.hints.join("; ")))
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

impl BootstrapArg {
    pub fn controller(self) -> Option<DiskBus> {
        match self {
            BootstrapArg::Sata => Some(DiskBus::Sata),
            BootstrapArg::Ide => Some(DiskBus::Ide),
            BootstrapArg::None => None,
        }
    }
}
