//! Commands to run after a conversion, for the formats that were written and for this host.

use std::path::Path;

use crate::domain::Emit;
use crate::report::Outputs;
use crate::text::quote;
use crate::tool;

/// Commands to copy, with comments between them.
pub(super) fn commands(name: &str, folder: &Path, outputs: &Outputs) -> Vec<String> {
    on(name, folder, outputs, tool::find("virsh").is_some())
}

/// The commands on a host with libvirt, or on one without it.
fn on(name: &str, folder: &Path, outputs: &Outputs, libvirt: bool) -> Vec<String> {
    let mut commands = Vec::new();
    if !outputs.complete {
        return later(name, folder, outputs, libvirt);
    }
    for file in &outputs.emitted {
        commands.extend(emitted(file, outputs));
    }
    if libvirt {
        commands.extend(with_libvirt(name, folder, outputs));
    } else {
        commands.push(
            "# this host has no libvirt; on one that has it, with this directory at the same path:"
                .to_string(),
        );
        commands.push(format!("hyper2kvm boot {}", quote(folder)));
    }
    commands
}

/// The disks still need the source: commands that need a complete copy come after `pull`.
fn later(name: &str, folder: &Path, outputs: &Outputs, libvirt: bool) -> Vec<String> {
    let shown = quote(folder);
    let mut commands = vec![format!("hyper2kvm boot {shown}")];
    if libvirt {
        commands.extend(with_libvirt(name, folder, outputs).into_iter().skip(1));
    }
    commands.extend([
        "# when the VM runs as it should, or before it is started: copy what is left".to_string(),
        format!("hyper2kvm pull {shown}"),
        "# or give the VM up; the source is as it was".to_string(),
        format!("hyper2kvm release {shown}"),
    ]);
    for file in &outputs.emitted {
        commands.extend(emitted(file, outputs));
    }
    commands
}

fn with_libvirt(name: &str, folder: &Path, outputs: &Outputs) -> Vec<String> {
    let mut commands = vec![
        format!("hyper2kvm boot {}", quote(folder)),
        "# or step by step:".to_string(),
    ];
    if let Some(xml) = &outputs.bootstrap_xml {
        commands.push(format!("virsh define {}", quote(xml)));
        commands.push(format!("virsh start {name}"));
        commands.push("# let Windows start once, shut it down, then switch to VirtIO:".to_string());
    }
    if let Some(xml) = &outputs.final_xml {
        commands.push(format!("virsh define {}", quote(xml)));
        commands.push(format!("virsh start {name}"));
    }
    commands
}

/// The first command for an emitted file. If there is a first boot, its file names the final one.
fn emitted(file: &Path, outputs: &Outputs) -> Vec<String> {
    let Some((emit, stage)) = Emit::of_file(file) else {
        return Vec::new();
    };
    if stage == Some("final") && outputs.bootstrap_xml.is_some() {
        return Vec::new();
    }
    let verb = match outputs.bootstrap_xml {
        Some(_) => "bootstrap",
        None => "final",
    };
    let file = quote(file);
    match emit {
        Emit::Kubevirt => vec![
            "# KubeVirt (the next steps are at the head of the file):".to_string(),
            format!("kubectl apply -f {file}"),
        ],
        Emit::Proxmox => vec![
            "# Proxmox VE, as root on a node that has this directory:".to_string(),
            format!("sh {file} {verb} next STORAGE"),
        ],
        Emit::Qemu => vec!["# QEMU without libvirt:".to_string(), format!("sh {file}")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The final VM would stop with 0x7B if its first boot was skipped.
    #[test]
    fn the_first_boot_is_started_first_where_there_is_one() {
        let files = [
            "vm-kubevirt-bootstrap.yaml",
            "vm-kubevirt-final.yaml",
            "vm-proxmox.sh",
            "vm-qemu-bootstrap.sh",
            "vm-qemu-final.sh",
        ];
        let commands = |first_boot: bool, files: &[&str]| {
            let outputs = Outputs {
                bootstrap_xml: first_boot.then(|| "/vm/vm-bootstrap.xml".into()),
                ..Outputs::default()
            };
            let all = files.iter().flat_map(|f| emitted(Path::new(f), &outputs));
            all.filter(|line| !line.starts_with('#'))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            commands(true, &files),
            [
                "kubectl apply -f vm-kubevirt-bootstrap.yaml",
                "sh vm-proxmox.sh bootstrap next STORAGE",
                "sh vm-qemu-bootstrap.sh",
            ]
        );
        let alone = [files[1], files[2], files[4]];
        assert_eq!(
            commands(false, &alone),
            [
                "kubectl apply -f vm-kubevirt-final.yaml",
                "sh vm-proxmox.sh final next STORAGE",
                "sh vm-qemu-final.sh",
            ]
        );
        assert_eq!(commands(true, &["report.json"]), [""; 0]);
    }

    #[test]
    fn a_finished_vm_is_booted_and_one_on_its_source_is_pulled_too() {
        let folder = Path::new("/vm");
        let outputs = |complete: bool, first_boot: bool| Outputs {
            bootstrap_xml: first_boot.then(|| "/vm/vm-bootstrap.xml".into()),
            final_xml: Some("/vm/vm-final.xml".into()),
            emitted: vec!["/vm/vm-proxmox.sh".into()],
            complete,
            ..Outputs::default()
        };
        let lines = |list: Vec<String>| -> Vec<String> {
            let plain = |line: &String| !line.starts_with('#');
            list.into_iter().filter(plain).collect()
        };
        let (first, last) = (
            "virsh define /vm/vm-bootstrap.xml",
            "virsh define /vm/vm-final.xml",
        );
        let boot = "hyper2kvm boot /vm";
        for (first_boot, defines) in [(true, &[first, last][..]), (false, &[last])] {
            let wanted: Vec<_> = defines
                .iter()
                .flat_map(|line| [*line, "virsh start vm"])
                .collect();
            let steps = lines(with_libvirt("vm", folder, &outputs(true, first_boot)));
            assert_eq!(steps[0], boot);
            assert_eq!(steps[1..], wanted);
            let proxmox = if first_boot { "bootstrap" } else { "final" };
            let proxmox = format!("sh /vm/vm-proxmox.sh {proxmox} next STORAGE");
            // What takes the disks elsewhere comes after the last byte is here.
            let left = lines(later("vm", folder, &outputs(false, first_boot), true));
            let mut all = vec![boot.to_owned()];
            all.extend(wanted.iter().map(ToString::to_string));
            all.extend([
                "hyper2kvm pull /vm".into(),
                "hyper2kvm release /vm".into(),
                proxmox,
            ]);
            assert_eq!(left, all);
            let without = lines(later("vm", folder, &outputs(false, first_boot), false));
            assert_eq!(without[..2], [boot, "hyper2kvm pull /vm"]);
        }
        let complete = lines(commands("vm", folder, &outputs(true, true)));
        assert_eq!(complete[0], "sh /vm/vm-proxmox.sh bootstrap next STORAGE");
        assert!(complete.contains(&boot.to_owned()));
        assert!(
            !complete.iter().any(|line| line.contains("pull")),
            "{complete:?}"
        );
        let left = lines(commands("vm", folder, &outputs(false, true)));
        assert!(
            left.iter().any(|line| line == "hyper2kvm pull /vm"),
            "{left:?}"
        );
    }
    /// They are copied as they are, with what stands between them.
    #[test]
    fn every_command_after_a_conversion_is_as_written() {
        let folder = Path::new("/my vm");
        let outputs = |complete: bool, first_boot: bool| Outputs {
            bootstrap_xml: first_boot.then(|| "/my vm/vm-bootstrap.xml".into()),
            final_xml: Some("/my vm/vm-final.xml".into()),
            emitted: vec!["/my vm/vm-qemu-final.sh".into()],
            complete,
            ..Outputs::default()
        };
        let boot = "hyper2kvm boot '/my vm'";
        let qemu = ["# QEMU without libvirt:", "sh '/my vm/vm-qemu-final.sh'"];
        let steps = "# or step by step:";
        let last = ["virsh define '/my vm/vm-final.xml'", "virsh start vm"];
        let first = [
            "virsh define '/my vm/vm-bootstrap.xml'",
            "virsh start vm",
            "# let Windows start once, shut it down, then switch to VirtIO:",
        ];
        let elsewhere =
            "# this host has no libvirt; on one that has it, with this directory at the same path:";
        let pull = [
            "# when the VM runs as it should, or before it is started: copy what is left",
            "hyper2kvm pull '/my vm'",
            "# or give the VM up; the source is as it was",
            "hyper2kvm release '/my vm'",
        ];
        let cases: [(bool, bool, bool, Vec<&str>); 6] = [
            (
                true,
                false,
                true,
                [&qemu[..], &[boot, steps], &last].concat(),
            ),
            (
                true,
                true,
                true,
                [&[boot, steps][..], &first, &last].concat(),
            ),
            (true, false, false, [&qemu[..], &[elsewhere, boot]].concat()),
            (true, true, false, vec![elsewhere, boot]),
            (
                false,
                true,
                true,
                [&[boot, steps][..], &first, &last, &pull].concat(),
            ),
            (false, false, false, [&[boot][..], &pull, &qemu].concat()),
        ];
        for (complete, first_boot, libvirt, wanted) in cases {
            let said = on("vm", folder, &outputs(complete, first_boot), libvirt);
            assert_eq!(said, wanted, "{complete} {first_boot} {libvirt}");
        }
        let here = tool::find("virsh").is_some();
        let outputs = outputs(true, true);
        assert_eq!(
            commands("vm", folder, &outputs),
            on("vm", folder, &outputs, here)
        );
    }
}
