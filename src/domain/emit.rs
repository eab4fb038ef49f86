//! Writers for targets other than libvirt, and the files of each.

use std::path::Path;

use serde::Serialize;

pub use super::document::{Document, EmitError};
use super::element::Element;
use super::model::{Machine, Stage};
use super::{kubevirt, proxmox, qemu};
use crate::text::{in_single_quotes, quoted};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Emit {
    /// VirtualMachine and DataVolumes, as YAML
    Kubevirt,
    /// A script of qm commands for Proxmox VE
    Proxmox,
    /// A script with the QEMU command line
    Qemu,
}

impl Emit {
    /// The name as in `--emit`.
    pub fn name(self) -> &'static str {
        match self {
            Emit::Kubevirt => "kubevirt",
            Emit::Proxmox => "proxmox",
            Emit::Qemu => "qemu",
        }
    }
}

/// The inputs of the writers besides the VM.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// The output directory: its files are named relative to it, so that it can be moved.
    pub folder: &'a Path,
    pub kubevirt: &'a kubevirt::Options,
}

/// The files of one writer for a VM. `domains` is the domain XML of each stage.
pub fn documents(
    emit: Emit,
    machine: &Machine,
    domains: &[(Stage, Element)],
    context: Context<'_>,
) -> Result<Vec<Document>, EmitError> {
    let stages = domains.iter().map(|(stage, domain)| (*stage, domain));
    match emit {
        Emit::Proxmox => Ok(vec![Document {
            suffix: "-proxmox.sh".to_owned(),
            text: proxmox::script(machine, context.folder)?,
            script: true,
        }]),
        Emit::Kubevirt => stages
            .map(|(stage, _)| {
                Ok(Document {
                    suffix: format!("-kubevirt-{}.yaml", stage.as_str()),
                    text: kubevirt::yaml(machine, stage, context.folder, context.kubevirt)?,
                    script: false,
                })
            })
            .collect(),
        Emit::Qemu => Ok(stages
            .map(|(stage, domain)| Document {
                suffix: format!("-qemu-{}.sh", stage.as_str()),
                text: qemu::script(domain, context.folder),
                script: true,
            })
            .collect()),
    }
}

/// Warnings about one format, preceded by the name of its target.
pub fn warnings(emit: Emit, machine: &Machine) -> Vec<String> {
    let list = match emit {
        Emit::Proxmox => proxmox::warnings(machine),
        Emit::Kubevirt => kubevirt::warnings(machine),
        Emit::Qemu => qemu::warnings(machine),
    };
    let target = emit.target();
    let overlays = machine.disks.iter().any(|disk| !disk.backing.is_empty());
    // QEMU on this host opens the chain itself; for the others one file is copied elsewhere.
    let alone = (overlays && emit != Emit::Qemu)
        .then(|| "the disks must stand alone: run `hyper2kvm pull` first".to_owned());
    list.into_iter()
        .chain(alone)
        .map(|text| format!("{target}: {text}"))
        .collect()
}

impl Emit {
    /// The format of a file in the output directory, and its stage if it has one.
    pub fn of_file(file: &Path) -> Option<(Self, Option<&'static str>)> {
        let name = file.file_name()?.to_str()?;
        let forms = [
            ("-proxmox.sh", Self::Proxmox, None),
            (
                "-kubevirt-bootstrap.yaml",
                Self::Kubevirt,
                Some("bootstrap"),
            ),
            ("-kubevirt-final.yaml", Self::Kubevirt, Some("final")),
            ("-qemu-bootstrap.sh", Self::Qemu, Some("bootstrap")),
            ("-qemu-final.sh", Self::Qemu, Some("final")),
        ];
        let form = forms.into_iter().find(|(end, ..)| name.ends_with(end));
        form.map(|(_, emit, stage)| (emit, stage))
    }

    /// The name for people.
    pub fn target(self) -> &'static str {
        match self {
            Self::Kubevirt => "KubeVirt",
            Self::Proxmox => "Proxmox VE",
            Self::Qemu => "QEMU",
        }
    }
}

/// Updates the text of an emitted file after another file of the output directory has been moved.
pub fn relocated(text: &str, name: &str, to: &Path) -> String {
    let to = to.to_string_lossy();
    let quoted_to = quoted(&to);
    let json = |text: &str| serde_json::json!(text).to_string();
    let in_script = |text: &str| in_single_quotes(&json(text));
    text.replace(&format!("\"$here\"/{}", quoted(name)), &quoted_to)
        .replace(&format!("={}", quoted(name)), &format!("={quoted_to}"))
        .replace(
            &format!("\"filename\":{}", in_script(name)),
            &format!("\"filename\":{}", in_script(&to)),
        )
}
