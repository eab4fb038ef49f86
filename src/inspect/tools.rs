//! Guest software that matters when the hypervisor changes: the tools of other hypervisors, and
//! virus scanners. It is identified by services and by the list of installed programs.

use crate::registry::HiveView;
use crate::registry::error::Result;
use crate::registry::hive::Key;
use crate::text::guest_text;
use crate::types::{ControlSet, KeyPath};

use super::model::Tool;

struct Known {
    id: &'static str,
    name: &'static str,
    /// Services of which a single installed one is proof enough.
    markers: &'static [&'static str],
    /// Further services that belong to it.
    others: &'static [&'static str],
    /// The start of its name in the list of installed programs.
    program: &'static str,
}

const TOOLS: [Known; 8] = [
    Known {
        id: "vmware-tools",
        name: "VMware Tools",
        markers: &["VMTools", "VMMemCtl"],
        others: &[
            "VGAuthService",
            "vmvss",
            "VMUpgradeHelper",
            "vmci",
            "vmhgfs",
            "vmmouse",
            "VMUsbMouse",
            "vm3dmp",
            "vm3dmp_loader",
            "vm3dservice",
            "VMRawDsk",
            "vmxnet3ndis6",
            "pvscsi",
            "vsepflt",
            "vnetWFP",
            "giappdef",
        ],
        program: "VMware Tools",
    },
    Known {
        id: "virtualbox-additions",
        name: "VirtualBox Guest Additions",
        markers: &["VBoxGuest", "VBoxService"],
        others: &[
            "VBoxMouse",
            "VBoxSF",
            "VBoxVideo",
            "VBoxVideoW8",
            "VBoxWddm",
        ],
        program: "Oracle VM VirtualBox Guest Additions",
    },
    Known {
        id: "xen-pv",
        name: "Xen PV drivers",
        markers: &["xenbus", "xenevtchn"],
        others: &[
            "xenvbd", "xenvif", "xennet", "xeniface", "xenfilt", "xensvc", "XenSvc", "xenagent",
            "xendisk", "xenhid", "xenvkbd",
        ],
        program: "Citrix Hypervisor PV",
    },
    Known {
        id: "parallels-tools",
        name: "Parallels Tools",
        markers: &["prl_tg", "prl_strg", "prl_tools"],
        others: &[
            "prl_fs",
            "prl_eth5",
            "prl_memdev",
            "prl_mouf",
            "prl_tools_service",
        ],
        program: "Parallels Tools",
    },
    Known {
        id: "nutanix-tools",
        name: "Nutanix Guest Tools",
        markers: &["Nutanix Guest Agent", "NutanixGuestAgent"],
        others: &["Nutanix Self Service Restore Gateway"],
        program: "Nutanix Guest Tools",
    },
    Known {
        id: "azure-agent",
        name: "Azure guest agent",
        markers: &["WindowsAzureGuestAgent"],
        others: &["RdAgent", "WindowsAzureTelemetryService"],
        program: "Windows Azure VM Agent",
    },
    Known {
        id: "qemu-agent",
        name: "QEMU guest agent",
        markers: &["QEMU-GA"],
        others: &["QEMU Guest Agent VSS Provider"],
        program: "QEMU guest agent",
    },
    Known {
        id: "spice-agent",
        name: "SPICE agent",
        markers: &["vdservice", "spice-agent"],
        others: &[],
        program: "SPICE Guest Tools",
    },
];

/// (service, product); the inbox scanner last.
const ANTIVIRUS: [(&str, &str); 27] = [
    ("mfehidk", "McAfee / Trellix"),
    ("McShield", "McAfee / Trellix"),
    ("SepMasterService", "Symantec Endpoint Protection"),
    ("SymEFASI", "Symantec / Norton"),
    ("Symantec AntiVirus", "Symantec AntiVirus"),
    ("klif", "Kaspersky"),
    ("SAVService", "Sophos"),
    ("Sophos Endpoint Defense", "Sophos"),
    ("SophosED", "Sophos"),
    ("tmcomm", "Trend Micro"),
    ("ntrtscan", "Trend Micro"),
    ("ekrn", "ESET"),
    ("eamonm", "ESET"),
    ("bdredline", "Bitdefender"),
    ("EPSecurityService", "Bitdefender"),
    ("CSAgent", "CrowdStrike Falcon"),
    ("SentinelMonitor", "SentinelOne"),
    ("CbDefense", "Carbon Black"),
    ("carbonblackk", "Carbon Black"),
    ("CylanceSvc", "Cylance"),
    ("cyserver", "Cortex XDR"),
    ("aswSP", "Avast"),
    ("avgSP", "AVG"),
    ("fsbts", "F-Secure / WithSecure"),
    ("PSINKNC", "Panda"),
    ("WRSVC", "Webroot"),
    ("WinDefend", MICROSOFT_DEFENDER),
];

pub const MICROSOFT_DEFENDER: &str = "Microsoft Defender";
const DISABLED: u32 = 4;

pub fn tools(
    system: &HiveView<'_>,
    software: &HiveView<'_>,
    control_set: &ControlSet,
) -> Result<Vec<Tool>> {
    let Some(set) = system.key(control_set)? else {
        return Ok(Vec::new());
    };
    let programs = programs(software)?;
    let mut found = Vec::new();
    for known in &TOOLS {
        let mut services = Vec::new();
        let mut marked = false;
        for name in known.markers.iter().chain(known.others) {
            if is_installed(&set, name)? {
                marked |= known.markers.contains(name);
                services.push((*name).to_string());
            }
        }
        let program = programs
            .iter()
            .find(|p| starts_with(&p.name, known.program));
        if marked || program.is_some() {
            found.push(Tool {
                id: known.id,
                name: known.name,
                version: program.and_then(|p| p.version.clone()),
                services,
                product_code: program.and_then(|p| p.product_code.clone()),
            });
        }
    }
    // The integration services are part of Windows; a VMBus proves that the guest ran on Hyper-V.
    let on_hyper_v = match set.key("Enum\\VMBUS")? {
        Some(bus) => !bus.keys()?.is_empty(),
        None => false,
    };
    if on_hyper_v {
        found.push(Tool {
            id: "hyper-v",
            name: "Hyper-V integration services",
            version: None,
            services: Vec::new(),
            product_code: None,
        });
    }
    Ok(found)
}

pub fn antivirus(system: &HiveView<'_>, control_set: &ControlSet) -> Result<Vec<String>> {
    let mut found: Vec<String> = Vec::new();
    let Some(set) = system.key(control_set)? else {
        return Ok(found);
    };
    for (service, product) in ANTIVIRUS {
        if is_installed(&set, service)? && !found.iter().any(|p| p == product) {
            found.push(product.to_string());
        }
    }
    Ok(found)
}

/// Whether the service exists and may start; a left-over key does neither.
fn is_installed(set: &Key<'_>, service: &str) -> Result<bool> {
    let Some(key) = set.key(&KeyPath::new("Services").join(service))? else {
        return Ok(false);
    };
    Ok(key.dword("Type")?.is_some() && key.dword("Start")?.is_some_and(|s| s < DISABLED))
}

struct Program {
    name: String,
    version: Option<String>,
    product_code: Option<String>,
}

const MAX_PROGRAMS: usize = 8192;

/// The list of "Programs and Features", including 32-bit programs.
fn programs(software: &HiveView<'_>) -> Result<Vec<Program>> {
    let mut found = Vec::new();
    for view in ["", "Wow6432Node\\"] {
        let path = format!("{view}Microsoft\\Windows\\CurrentVersion\\Uninstall");
        let Some(list) = software.key(&path)? else {
            continue;
        };
        for key in list.keys()?.into_iter().take(MAX_PROGRAMS) {
            let Some(name) = key.string("DisplayName")?.as_deref().and_then(guest_text) else {
                continue;
            };
            let code = key.name()?;
            let is_code = code.len() == 38
                && code.starts_with('{')
                && uuid::Uuid::try_parse(code.trim_matches(['{', '}'])).is_ok();
            found.push(Program {
                name,
                version: key
                    .string("DisplayVersion")?
                    .as_deref()
                    .and_then(guest_text),
                product_code: is_code.then_some(code),
            });
        }
    }
    Ok(found)
}

fn starts_with(text: &str, prefix: &str) -> bool {
    text.get(..prefix.len())
        .is_some_and(|head| head.eq_ignore_ascii_case(prefix))
}
