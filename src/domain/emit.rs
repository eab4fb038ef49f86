//! The machine for others than libvirt: which writers there are, and the files each of them gives.

use serde::Serialize;

use super::element::Element;
use super::model::{Machine, Stage};
use super::{kubevirt, proxmox, qemu};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Emit {
    Kubevirt,
    Proxmox,
    Qemu,
}

impl Emit {
    /// As `--emit` has it.
    pub fn name(self) -> &'static str {
        match self {
            Emit::Kubevirt => "kubevirt",
            Emit::Proxmox => "proxmox",
            Emit::Qemu => "qemu",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EmitError {
    #[error("{target} has no {what}")]
    Missing {
        what: &'static str,
        target: &'static str,
    },
    #[error(
        "{disks} disks do not fit: Proxmox VE has {max} places on {bus}, one for the driver ISO"
    )]
    TooManyDisks {
        bus: &'static str,
        disks: usize,
        max: usize,
    },
    #[error("writing YAML: {0}")]
    Yaml(String),
}

/// One file; its name is the machine's with `suffix` behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    pub suffix: String,
    pub text: String,
    /// A shell script.
    pub script: bool,
}

/// What one writer makes of a machine. `domains` is the domain XML of each stage it has.
pub fn documents(
    emit: Emit,
    machine: &Machine,
    domains: &[(Stage, Element)],
) -> Result<Vec<Document>, EmitError> {
    let stages = domains.iter().map(|(stage, domain)| (*stage, domain));
    match emit {
        Emit::Proxmox => Ok(vec![Document {
            suffix: "-proxmox.sh".to_owned(),
            text: proxmox::script(machine)?,
            script: true,
        }]),
        Emit::Kubevirt => stages
            .map(|(stage, _)| {
                Ok(Document {
                    suffix: format!("-kubevirt-{}.yaml", stage.as_str()),
                    text: kubevirt::yaml(machine, stage)?,
                    script: false,
                })
            })
            .collect(),
        Emit::Qemu => Ok(stages
            .map(|(stage, domain)| Document {
                suffix: format!("-qemu-{}.sh", stage.as_str()),
                text: qemu::script(domain),
                script: true,
            })
            .collect()),
    }
}
