//! The VM as described by its source: the part of a `.vmx`, OVF or domain XML that `inspect` and
//! `plan` show.

use serde::Serialize;

use crate::source::{Firmware, SourceKind, SourceVm};
use crate::types::MacAddr;
use crate::ui::{Styled, Tone};

/// `machine` in the JSON documents; absent for a disk image, which describes no VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VmFacts {
    pub name: String,
    pub memory_mib: Option<u64>,
    pub vcpus: Option<u32>,
    pub firmware: Option<Firmware>,
    pub secure_boot: bool,
    pub tpm: bool,
    pub nics: Vec<Nic>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Nic {
    pub mac: Option<MacAddr>,
    pub model: Option<String>,
    /// The name of its network on the source host.
    pub network: Option<String>,
    pub connected: bool,
}

impl VmFacts {
    pub fn of(vm: &SourceVm) -> Option<Self> {
        if matches!(vm.kind, SourceKind::Disk | SourceKind::HyperV) {
            return None;
        }
        let nics = vm.nics.iter().map(|nic| Nic {
            mac: nic.mac,
            model: nic.model.clone(),
            network: nic.network.clone(),
            connected: nic.connected,
        });
        Some(Self {
            name: vm.name.clone(),
            memory_mib: vm.memory_mib,
            vcpus: vm.vcpus,
            firmware: vm.firmware,
            secure_boot: vm.secure_boot,
            tpm: vm.tpm,
            nics: nics.collect(),
        })
    }

    /// One line per fact.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = vec![("name", self.name.clone())];
        let memory = self.memory_mib.map(|mib| format!("{mib} MiB"));
        let vcpus = self.vcpus.map(|n| n.to_string());
        for (label, value) in [("memory", memory), ("processors", vcpus)] {
            rows.push((label, value.unwrap_or_else(|| "not stated".to_string())));
        }
        let firmware = match self.firmware {
            Some(Firmware::Bios) => "BIOS",
            Some(Firmware::Uefi) if self.secure_boot => "UEFI, Secure Boot on",
            Some(Firmware::Uefi) => "UEFI",
            None => "not stated",
        };
        rows.push(("firmware", firmware.to_string()));
        let tpm = if self.tpm { "yes" } else { "no" };
        rows.push(("TPM", tpm.to_string()));
        for nic in &self.nics {
            let mac = nic.mac.map(|mac| mac.to_string());
            let network = nic
                .network
                .as_ref()
                .map(|network| format!("on {network:?}"));
            let down = (!nic.connected).then(|| "not connected".to_string());
            let parts = [mac, nic.model.clone(), network, down];
            let parts: Vec<String> = parts.into_iter().flatten().collect();
            rows.push(("NIC", parts.join(", ")));
        }
        rows
    }

    pub fn append_to(&self, text: &mut Styled) {
        text.push(Tone::Strong, "\nVM as the source describes it\n");
        for (label, value) in self.rows() {
            text.row(label, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmx_says_what_it_is() {
        let text = "displayName = \"web\"\nmemsize = \"8192\"\nnumvcpus = \"4\"\nfirmware = \"efi\"\n\
                    uefi.secureBoot.enabled = \"TRUE\"\nsata0.present = \"TRUE\"\n\
                    sata0:0.present = \"TRUE\"\nsata0:0.fileName = \"web.vmdk\"\n\
                    ethernet0.present = \"TRUE\"\nethernet0.virtualDev = \"vmxnet3\"\n\
                    ethernet0.networkName = \"prod\"\nethernet0.address = \"00:50:56:00:00:01\"\n\
                    ethernet0.addressType = \"static\"\n";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.vmx");
        std::fs::write(&path, text).unwrap();
        std::fs::write(dir.path().join("web.vmdk"), "").unwrap();
        let machine = VmFacts::of(&crate::source::open(&path).unwrap()).unwrap();
        let rows = machine.rows();
        let row = |label: &str| rows.iter().find(|(l, _)| *l == label).unwrap().1.as_str();
        for (label, value) in [
            ("name", "web"),
            ("memory", "8192 MiB"),
            ("processors", "4"),
            ("firmware", "UEFI, Secure Boot on"),
            ("TPM", "no"),
            ("NIC", "00:50:56:00:00:01, vmxnet3, on \"prod\""),
        ] {
            assert_eq!(row(label), value, "{label}");
        }
        let json = serde_json::json!(machine);
        assert_eq!(json["memory_mib"], 8192);
        assert_eq!(json["nics"][0]["network"], "prod");
    }
}
