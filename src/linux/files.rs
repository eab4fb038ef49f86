//! Small files of `/etc` that identify a Linux and the devices it expects: `os-release`, `fstab`,
//! kernel arguments, network configuration. Pure functions from text to facts.

use std::collections::BTreeMap;

/// Parses os-release(5): `KEY=value` in shell quoting, never executed.
pub fn os_release(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().map(str::trim).filter(|l| !l.starts_with('#'));
    lines
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_string(), unquote(value)))
        .collect()
}

fn unquote(value: &str) -> String {
    let value = value.trim();
    let inner = ['"', '\'']
        .iter()
        .find_map(|q| value.strip_prefix(*q)?.strip_suffix(*q));
    let mut out = String::new();
    let mut chars = inner.unwrap_or(value).chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => out.extend(chars.next()),
            c => out.push(c),
        }
    }
    out
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `UUID=...`, `/dev/sda1`, ...
    pub device: String,
    pub place: String,
    pub kind: String,
}

/// Parses fstab(5).
pub fn fstab(text: &str) -> Vec<Mount> {
    let lines = text.lines().map(str::trim).filter(|l| !l.starts_with('#'));
    lines
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let device = fields.next()?.trim_matches('"').to_string();
            let place = fields.next()?.to_string();
            let kind = fields.next().unwrap_or("auto").to_string();
            Some(Mount {
                device,
                place,
                kind,
            })
        })
        .collect()
}

/// Whether the name of a device depends on the hardware to which it is attached, which changes.
pub fn is_hardware_name(device: &str) -> bool {
    let Some(name) = device.strip_prefix("/dev/") else {
        return false;
    };
    if let Some(link) = name.strip_prefix("disk/") {
        // These depend on the contents, and stay.
        let stays = ["by-uuid/", "by-label/", "by-partuuid/", "by-partlabel/"];
        let content = ["by-id/dm-", "by-id/lvm-", "by-id/md-"];
        return !stays.iter().chain(&content).any(|s| link.starts_with(s));
    }
    let numbered = |prefix: &str| {
        let Some(rest) = name.strip_prefix(prefix) else {
            return false;
        };
        let letters = rest.bytes().take_while(u8::is_ascii_lowercase).count();
        (1..=3).contains(&letters) && rest.bytes().skip(letters).all(|b| b.is_ascii_digit())
    };
    ["xvd", "sd", "hd", "vd"]
        .iter()
        .any(|prefix| numbered(prefix))
        || name.starts_with("nvme")
        || name.starts_with("mmcblk")
}

/// The devices of `fstab` with such names. The root is mounted from the kernel's argument, and a
/// drive for CDs is optional.
pub fn hardware_names(mounts: &[Mount]) -> Vec<String> {
    let named = mounts.iter().filter(|mount| {
        is_hardware_name(&mount.device) && mount.place != "/" && !mount.kind.contains("iso9660")
    });
    named.map(|mount| mount.device.clone()).collect()
}

/// Interface names to which a configuration file assigns addresses. Empty for any other file.
pub fn interfaces(path: &str, text: &str) -> Vec<String> {
    let file = path.rsplit('/').next().unwrap_or(path);
    let mut names: Vec<String> = Vec::new();
    let mut add = |name: &str| {
        let name = name.trim().trim_matches(['"', '\'', ':']);
        if changes(name) && !names.iter().any(|n| n == name) {
            names.push(name.to_string());
        }
    };
    if let Some(name) = file.strip_prefix("ifcfg-") {
        // A MAC address ties it to the NIC, whatever its name.
        if !text.lines().any(|l| l.trim_start().starts_with("HWADDR=")) {
            add(name);
        }
    } else if file.ends_with(".nmconnection") || path.contains("system-connections/") {
        let values = text
            .lines()
            .filter_map(|l| l.trim().strip_prefix("interface-name="));
        values.for_each(&mut add);
    } else if file.ends_with(".yaml") {
        // netplan: the keys below `ethernets:` that match by name, and not by a `match:` of their
        // own.
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let indent = indent(line);
            let below = lines
                .iter()
                .skip(i + 1)
                .take_while(|l| self::indent(l) > indent);
            let matched = below.into_iter().any(|l| l.trim() == "match:");
            if let Some(key) = line.trim().strip_suffix(':')
                && !matched
            {
                add(key);
            }
        }
    } else if file.ends_with(".network") {
        let values = text.lines().filter_map(|l| l.trim().strip_prefix("Name="));
        values.for_each(|v| v.split_whitespace().for_each(&mut add));
    } else {
        // ifupdown: `auto ens192`, `iface ens192 inet static`.
        for line in text.lines() {
            let mut words = line.split_whitespace();
            if matches!(words.next(), Some("iface" | "auto" | "allow-hotplug")) {
                words.take(1).for_each(&mut add);
            }
        }
    }
    names
}

fn indent(line: &str) -> usize {
    if line.trim().is_empty() {
        return usize::MAX;
    }
    line.len() - line.trim_start().len()
}

/// Whether the name depends on the slot of the NIC: `ens192`, `enp0s3`, `eno1`.
fn changes(name: &str) -> bool {
    let tail = ["ens", "enp", "eno", "enP"]
        .iter()
        .find_map(|p| name.strip_prefix(p));
    tail.is_some_and(|t| t.starts_with(|c: char| c.is_ascii_digit()))
        && name.bytes().all(|b| b.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_files() {
        let release = os_release(
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n# ID=x\nID=debian\nID_LIKE='a b'\nX=\"a\\\"b\"\nnonsense\n",
        );
        assert_eq!(release["PRETTY_NAME"], "Debian GNU/Linux 12 (bookworm)");
        assert_eq!((&*release["ID"], &*release["ID_LIKE"]), ("debian", "a b"));
        assert_eq!(release["X"], "a\"b");
        assert_eq!(release.len(), 4);
    }

    #[test]
    fn device_names() {
        for (device, want) in [
            ("/dev/sda1", true),
            ("/dev/sdaa", true),
            ("/dev/hda", true),
            ("/dev/vda2", true),
            ("/dev/xvda1", true),
            ("/dev/nvme0n1p2", true),
            ("/dev/disk/by-path/pci-0000:00:1f.2-ata-1", true),
            ("/dev/disk/by-id/scsi-36000c29", true),
            ("/dev/disk/by-uuid/12ab", false),
            ("/dev/disk/by-id/dm-uuid-LVM-x", false),
            ("/dev/mapper/rhel-root", false),
            ("/dev/sda1/x", false),
            ("/dev/vg/lv", false),
            ("UUID=12ab", false),
            ("tmpfs", false),
        ] {
            assert_eq!(is_hardware_name(device), want, "{device}");
        }
    }

    #[test]
    fn mounts() {
        let mounts = fstab(
            "# comment\nUUID=1 / ext4 errors=remount-ro 0 1\n/dev/sda2 /boot xfs defaults 0 0\n\
             /dev/sdb1 /data ext4 nofail 0 0\n/dev/sda5 none swap sw 0 0\n/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0\n\n/dev/sda1\n",
        );
        assert_eq!(mounts.len(), 5);
        assert_eq!(
            hardware_names(&mounts),
            ["/dev/sda2", "/dev/sdb1", "/dev/sda5"]
        );
    }

    #[test]
    fn network_files() {
        for (path, text, want) in [
            (
                "/etc/network/interfaces",
                "auto lo\niface lo inet loopback\nauto ens192\niface ens192 inet dhcp\n",
                &["ens192"][..],
            ),
            ("/etc/network/interfaces", "iface eth0 inet dhcp\n", &[]),
            (
                "/etc/sysconfig/network-scripts/ifcfg-ens160",
                "DEVICE=ens160\n",
                &["ens160"],
            ),
            (
                "/etc/sysconfig/network-scripts/ifcfg-ens160",
                "HWADDR=00:11:22:33:44:55\n",
                &[],
            ),
            (
                "/etc/NetworkManager/system-connections/a.nmconnection",
                "[connection]\ninterface-name=enp0s3\n",
                &["enp0s3"],
            ),
            (
                "/etc/netplan/00.yaml",
                "network:\n  ethernets:\n    ens33:\n      dhcp4: true\n    eno1:\n      match:\n        macaddress: 00:11\n",
                &["ens33"],
            ),
            (
                "/etc/systemd/network/10.network",
                "[Match]\nName=eno1 enp*\n",
                &["eno1"],
            ),
            (
                "/etc/systemd/network/10.network",
                "[Match]\nName=en*\n",
                &[],
            ),
        ] {
            assert_eq!(interfaces(path, text), want, "{path}");
        }
    }
}
