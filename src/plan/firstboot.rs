//! Plans the first boot. That is the script and its files, the service that starts it, and settings
//! that apply only until it is done.
//!
//! The old values of those settings are kept below the service's key. The script finds them there.
//! So does a second run over the same disk, which must not take hyper2kvm's values for the guest's.

use crate::drivers::catalogue::VirtioDevice;
use crate::firstboot::network::{self, Policy};
use crate::firstboot::{self, ABSENT, FileName, Inf, Restore, SERVICE, Script};
use crate::guest::GuestPath;
use crate::inspect::HiveName;
use crate::registry::HiveError;
use crate::registry::{HiveView, RegData, RegOp};
use crate::types::{ControlSet, MacAddr};

use super::{Inputs, Layout, Part, Result, cleanup, disks};

/// The user's decisions about the first boot.
#[derive(Debug, Clone, Default)]
pub struct Preferences {
    /// `--no-firstboot`
    pub none: bool,
    pub network: Policy,
    /// The MACs of the new VM's NICs, or if there are none, of the guest's adapters.
    pub macs: Vec<MacAddr>,
    /// The contents of `--firstboot` files.
    pub user_scripts: Vec<Vec<u8>>,
    /// `--uninstall-tools`
    pub uninstall_tools: bool,
}

/// Media path of generated files.
pub const GENERATED: &str = "generated";

/// A file that is not from a driver source: name below [`GENERATED`], contents.
pub type Generated = (String, Vec<u8>);

/// Adds files and edits to `layout`; `staging` are the staged drivers.
pub fn add(
    inputs: &Inputs<'_>,
    sets: &[ControlSet],
    staged: &[GuestPath],
    layout: &mut Layout,
) -> Result<()> {
    let preferences = inputs.preferences;
    let windows = inputs.windows;
    let has_netkvm = inputs.drivers.drives(VirtioDevice::Net);
    let facts = &inputs.inspection.network;
    let mut decision = network::decide(preferences.network, facts, &preferences.macs, has_netkvm);
    if let Some(reason) = left_out(inputs) {
        if !decision.settings.is_empty() {
            layout.warnings.push(format!(
                "static addresses are not carried over to the VirtIO NIC, set them again after the first boot: {reason}"
            ));
        }
        if !preferences.none && !preferences.user_scripts.is_empty() {
            layout
                .warnings
                .push(format!("the --firstboot scripts are left out: {reason}"));
        }
        layout.warnings.append(&mut decision.notes);
        return Ok(());
    }
    layout.warnings.append(&mut decision.notes);
    let system = HiveView::new(&inputs.hives.system.bytes)?;
    let restore = vec![Restore::AutoReboot];
    for set in sets {
        service(&system, set, &restore, layout)?;
    }
    let script = Script {
        modern_pnputil: windows.target.major >= 10,
        removes_devices: windows.target.build >= PNPUTIL_REMOVES_DEVICES,
        network: decision.settings,
        ghosts: decision.ghosts,
        disks: disks::with_letters(
            &system,
            &windows.control_set,
            windows.drive_letter,
            &mut layout.warnings,
        )?,
        infs: infs(inputs, staged, &mut layout.warnings)?,
        agent: inputs.drivers.guest_agent_msi.is_some(),
        uninstall: if preferences.uninstall_tools {
            cleanup::product_codes(&windows.tools)
        } else {
            Vec::new()
        },
        user_scripts: preferences.user_scripts.len(),
        restore,
        two_boots: inputs.options.bootstrap.is_some(),
        com2: windows.boot.ems_on_com1,
    };
    add_files(inputs, &script, layout)
}

/// The reason why there is no first-boot script.
fn left_out(inputs: &Inputs<'_>) -> Option<&'static str> {
    match (inputs.preferences.none, inputs.windows.target.major < 6) {
        (true, _) => Some("--no-firstboot was given"),
        (_, true) => Some("this Windows lacks the programs that the first-boot script uses"),
        _ => None,
    }
}

/// The INFs among the staged files.
fn infs(inputs: &Inputs<'_>, staged: &[GuestPath], warnings: &mut Vec<String>) -> Result<Vec<Inf>> {
    let folder = inputs.windows.root.join(firstboot::FOLDER)?;
    let mut infs = Vec::new();
    for path in staged {
        let Some(below) = path.parts().get(folder.parts().len()..) else {
            continue;
        };
        let name = below.join("\\");
        if !name.to_lowercase().ends_with(".inf") {
            continue;
        }
        match FileName::new(&name) {
            Some(path) => {
                let file = below.last().map(String::as_str).unwrap_or_default();
                infs.push(Inf {
                    path,
                    service: in_use(inputs, file),
                });
            }
            None => warnings.push(format!(
                "the driver {name:?} has a name the first-boot script cannot use safely: Windows may still find it on its own"
            )),
        }
    }
    Ok(infs)
}

/// Adds the script and its files.
fn add_files(inputs: &Inputs<'_>, script: &Script, layout: &mut Layout) -> Result<()> {
    let folder = inputs.windows.root.join(firstboot::FOLDER)?;
    let mut files = Vec::new();
    if let Some(agent) = &inputs.drivers.guest_agent_msi {
        files.push((
            folder.join(firstboot::AGENT)?,
            agent.clone(),
            inputs.agent_size,
        ));
    }
    let mut generated: Vec<Generated> =
        vec![(firstboot::SCRIPT.into(), script.to_cmd().into_bytes())];
    for (i, text) in inputs.preferences.user_scripts.iter().enumerate() {
        generated.push((firstboot::user_script(i + 1), text.clone()));
    }
    for (name, bytes) in generated {
        let from = format!("{GENERATED}/{name}");
        files.push((folder.join(&name)?, from, bytes.len() as u64));
        layout.generated.push((name, bytes));
    }
    layout.parts.push(Part {
        id: "files-firstboot".into(),
        title: "add the first-boot script".into(),
        files,
    });
    Ok(())
}

/// The first build with `pnputil /remove-device`: Windows 10 2004.
const PNPUTIL_REMOVES_DEVICES: u32 = 19041;

/// The service of an INF's device and the INF's version.
fn in_use(inputs: &Inputs<'_>, inf_name: &str) -> Option<(FileName, FileName)> {
    let package = inputs
        .drivers
        .packages
        .iter()
        .find(|p| p.inf_name.eq_ignore_ascii_case(inf_name))?;
    let service = FileName::new(&package.inf.device_service()?.name)?;
    let version = FileName::new(&package.inf.driver_ver.version_text())?;
    Some((service, version))
}

fn service(
    system: &HiveView<'_>,
    set: &ControlSet,
    restore: &[Restore],
    layout: &mut Layout,
) -> Result<(), HiveError> {
    let key = set.service(SERVICE);
    let parameters = key.join("Parameters");
    let ops = layout.edits.entry(HiveName::System).or_default();
    for value in restore {
        let (name, at) = (value.name(), set.key(value.key()));
        let saved = dword(system, &parameters, name)?;
        let old = match saved {
            Some(old) => old,
            None => dword(system, &at, name)?.unwrap_or(ABSENT),
        };
        let during = match value {
            Restore::AutoReboot => 0,
        };
        ops.push(RegOp::set(parameters.clone(), name, RegData::Dword(old)));
        ops.push(RegOp::set(at, name, RegData::Dword(during)));
    }
    let command = format!(
        r#"%SystemRoot%\System32\cmd.exe /d /c start "" /b %SystemRoot%\System32\cmd.exe /d /c %SystemRoot%\{}\{}"#,
        firstboot::FOLDER,
        firstboot::SCRIPT
    );
    let mut set = |name: &str, data| ops.push(RegOp::set(key.clone(), name, data));
    set("Type", RegData::Dword(0x10));
    set("Start", RegData::Dword(2));
    // A script that does not start changes nothing and prints nothing.
    set("ErrorControl", RegData::Dword(0));
    set("ImagePath", RegData::ExpandSz(command));
    set("DisplayName", RegData::Sz("hyper2kvm first boot".into()));
    set("DependOnService", RegData::MultiSz(vec!["RpcSs".into()]));
    set("ObjectName", RegData::Sz("LocalSystem".into()));
    Ok(())
}

fn dword(system: &HiveView<'_>, key: &str, name: &str) -> Result<Option<u32>, HiveError> {
    match system.key(key)? {
        Some(key) => key.dword(name),
        None => Ok(None),
    }
}

#[cfg(test)]
#[path = "firstboot_tests.rs"]
mod tests;
