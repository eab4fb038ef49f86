//! What the first boot needs on the disk: the script and what it works with, the service that starts it,
//! and the settings that hold only until it is done.
//!
//! The old values of those settings are kept below the service's key, where the script finds them, and a
//! second run over the same disk as well: it must not take our own values for the guest's.

use crate::domain::MacAddr;
use crate::firstboot::network::{self, Policy};
use crate::firstboot::{self, ABSENT, FileName, Restore, SERVICE, Script};
use crate::guest::GuestPath;
use crate::registry::hive::HiveError;
use crate::registry::{HiveView, RegData, RegOp};

use super::{HiveName, Inputs, Layout, Part, Result};

/// What the user decided about the first boot.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    /// `--no-firstboot`
    pub none: bool,
    pub network: Policy,
    /// Of the new machine's cards, where they are given.
    pub macs: Vec<MacAddr>,
    /// The contents of `--firstboot` files.
    pub user_scripts: Vec<Vec<u8>>,
}

/// Media paths of what is made here.
pub const GENERATED: &str = "generated";

/// A file that comes from no medium: name below [`GENERATED`], contents.
pub type Generated = (String, Vec<u8>);

/// Adds files and edits to `layout`; `staging` are the staged drivers.
pub fn add(
    inputs: &Inputs<'_>,
    sets: &[String],
    staged: &[GuestPath],
    layout: &mut Layout,
) -> Result<()> {
    let wishes = inputs.wishes;
    let windows = inputs.windows;
    let has_netkvm = layout
        .drivers
        .iter()
        .any(|d| d.driver.eq_ignore_ascii_case("netkvm"));
    let adapters = &inputs.inspection.network.adapters;
    let mut decision = network::decide(wishes.network, adapters, &wishes.macs, has_netkvm);
    let reason = match (wishes.none, windows.target.major < 6) {
        (true, _) => Some("--no-firstboot was given"),
        (_, true) => Some("this Windows lacks the programs that the first-boot script uses"),
        _ => None,
    };
    if let Some(reason) = reason {
        if !decision.settings.is_empty() {
            layout.warnings.push(format!(
                "static addresses are not carried over to the VirtIO card, set them again after the first boot: {reason}"
            ));
        }
        if !wishes.none && !wishes.user_scripts.is_empty() {
            layout
                .warnings
                .push(format!("the --firstboot scripts are left out: {reason}"));
        }
        layout.warnings.append(&mut decision.notes);
        return Ok(());
    }
    layout.warnings.append(&mut decision.notes);
    let system = HiveView::new(&inputs.hives.system.bytes)?;
    let mut restore = vec![Restore::AutoReboot];
    // 1 is what lets disks come online that Windows has not seen on this bus.
    if has_data_letters(&system)? && windows.target.server {
        restore.push(Restore::SanPolicy);
    }
    for set in sets {
        service(&system, set, &restore, layout)?;
    }
    let folder = windows.root.join(firstboot::FOLDER)?;
    let mut script = Script {
        modern_pnputil: windows.target.major >= 10,
        infs: Vec::new(),
        network: decision.settings,
        agent: false,
        user_scripts: wishes.user_scripts.len(),
        restore,
        two_boots: inputs.options.bootstrap.is_some(),
    };
    for path in staged {
        let Some(below) = path.parts().get(folder.parts().len()..) else {
            continue;
        };
        let name = below.join("\\");
        if !name.to_lowercase().ends_with(".inf") {
            continue;
        }
        match FileName::new(&name) {
            Some(name) => script.infs.push(name),
            None => layout.warnings.push(format!(
                "the driver {name:?} has a name the first-boot script cannot use safely: Windows may still find it by itself"
            )),
        }
    }
    let mut files = Vec::new();
    if let Some(agent) = &inputs.drivers.guest_agent_msi {
        script.agent = true;
        files.push((
            folder.join(firstboot::AGENT)?,
            agent.clone(),
            inputs.agent_size,
        ));
    }
    let mut generated: Vec<Generated> =
        vec![(firstboot::SCRIPT.into(), script.to_cmd().into_bytes())];
    for (i, text) in wishes.user_scripts.iter().enumerate() {
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

/// Whether a drive letter belongs to another disk than that of `C:`, as far as Windows remembers.
fn has_data_letters(system: &HiveView<'_>) -> Result<bool, HiveError> {
    let Some(mounted) = system.key("MountedDevices")? else {
        return Ok(false);
    };
    let mut disks = std::collections::BTreeSet::new();
    for (name, value) in mounted.values()?.into_iter().take(1024) {
        if !name.to_ascii_lowercase().starts_with(r"\dosdevices\") {
            continue;
        }
        match value.data.as_slice() {
            // MBR: the disk's signature and the offset.
            data if data.len() == 12 => disks.insert(data[..4].to_vec()),
            // GPT: only the partition is named.
            data if data.starts_with(b"DMIO:ID:") => disks.insert(data.to_vec()),
            _ => false,
        };
    }
    Ok(disks.len() > 1)
}

fn service(
    system: &HiveView<'_>,
    set: &str,
    restore: &[Restore],
    layout: &mut Layout,
) -> Result<(), HiveError> {
    let key = format!("{set}\\Services\\{SERVICE}");
    let parameters = format!("{key}\\Parameters");
    let ops = layout.edits.entry(HiveName::System).or_default();
    for value in restore {
        let (name, at) = (value.name(), format!("{set}\\{}", value.key()));
        let saved = dword(system, &parameters, name)?;
        let old = match saved {
            Some(old) => old,
            None => dword(system, &at, name)?.unwrap_or(ABSENT),
        };
        let during = match value {
            Restore::AutoReboot => 0,
            Restore::SanPolicy => 1,
        };
        ops.push(RegOp::set(parameters.as_str(), name, RegData::Dword(old)));
        ops.push(RegOp::set(at, name, RegData::Dword(during)));
    }
    let command = format!(
        r#"%SystemRoot%\System32\cmd.exe /d /c start "" /b %SystemRoot%\System32\cmd.exe /d /c %SystemRoot%\{}\{}"#,
        firstboot::FOLDER,
        firstboot::SCRIPT
    );
    let mut set = |name: &str, data| ops.push(RegOp::set(key.as_str(), name, data));
    set("Type", RegData::Dword(0x10));
    set("Start", RegData::Dword(2));
    // Nothing is said and nothing is done when it does not start.
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
mod tests {
    use super::*;
    use crate::registry::KeyTree;

    #[test]
    fn letters_of_other_disks() {
        let gpt = |n: u8| [b"DMIO:ID:".as_slice(), &[n; 16]].concat();
        let mbr = |disk: u8, offset: u8| [[disk; 4], [offset; 4], [0; 4]].concat();
        for (values, expected) in [
            (vec![("\\DosDevices\\C:", mbr(1, 1))], false),
            (
                vec![
                    ("\\DosDevices\\C:", mbr(1, 1)),
                    ("\\DosDevices\\D:", mbr(1, 9)),
                ],
                false,
            ),
            (
                vec![
                    ("\\DosDevices\\C:", mbr(1, 1)),
                    ("\\DosDevices\\E:", mbr(2, 1)),
                ],
                true,
            ),
            (
                vec![("\\DosDevices\\C:", gpt(1)), ("\\??\\Volume{1}", gpt(2))],
                false,
            ),
            (
                vec![("\\DosDevices\\C:", gpt(1)), ("\\DosDevices\\D:", gpt(2))],
                true,
            ),
            (
                vec![
                    ("\\DosDevices\\C:", gpt(1)),
                    ("\\DosDevices\\D:", b"\\??\\IDE#CdRom".to_vec()),
                ],
                false,
            ),
        ] {
            let mut tree = KeyTree::new("ROOT");
            for (name, data) in &values {
                tree.set("MountedDevices", name, RegData::Binary(data.clone()));
            }
            let bytes = tree.to_bytes("SYSTEM");
            assert_eq!(
                has_data_letters(&HiveView::new(&bytes).unwrap()).unwrap(),
                expected,
                "{values:?}"
            );
        }
    }
}
