//! The tools that hyper2kvm uses on this host: their purposes, whether they are installed, and
//! their packages. Only data and queries; nothing is installed here.

use std::path::{Path, PathBuf};

use serde::Serialize;

/// A program or library used by hyper2kvm.
#[derive(Debug)]
pub struct Tool {
    pub name: &'static str,
    pub purpose: &'static str,
    /// Whether nothing can be converted without it.
    pub required: bool,
    /// The oldest version with which the tests are run: that of Debian 12.
    pub oldest_tried: Option<&'static str>,
    pub(super) kind: Kind,
    apt: &'static str,
    dnf: &'static str,
    zypper: &'static str,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// A program, with the arguments that make it print its version.
    Program(&'static [&'static str]),
    /// A shared library, by the start of its file name.
    Library,
}

const VERSION: Kind = Kind::Program(&["--version"]);

/// The library with which the embedded engine writes NTFS.
pub const LIBNTFS: &str = "libntfs-3g.so";

/// The library that edits hives.
pub const LIBHIVEX: &str = "libhivex.so";

pub const TOOLS: [Tool; 13] = [
    Tool {
        name: "qemu-img",
        purpose: "reading image formats, copying disks",
        required: true,
        oldest_tried: Some("7.2"),
        kind: VERSION,
        apt: "qemu-utils",
        dnf: "qemu-img",
        zypper: "qemu-img",
    },
    Tool {
        name: "qemu-storage-daemon",
        purpose: "access to the blocks of an image",
        required: true,
        oldest_tried: Some("7.2"),
        kind: VERSION,
        // In Debian 13 it is in qemu-utils, which is installed with it.
        apt: "qemu-system-common",
        dnf: "qemu-img",
        zypper: "qemu-tools",
    },
    Tool {
        name: LIBHIVEX,
        purpose: "registry edits",
        required: true,
        oldest_tried: Some("1.3.23"),
        kind: Kind::Library,
        apt: "libhivex0",
        // The package has the library, or depends on the one that has it.
        dnf: "hivex",
        zypper: "libhivex0",
    },
    Tool {
        name: LIBNTFS,
        purpose: "writing NTFS",
        required: true,
        oldest_tried: Some("2022.10"),
        kind: Kind::Library,
        // The library's own package has its version in its name; this one depends on it.
        apt: "ntfs-3g",
        dnf: "ntfs-3g-libs",
        zypper: "ntfs-3g",
    },
    Tool {
        name: "virsh",
        purpose: "booting the converted VM (`boot`)",
        required: false,
        oldest_tried: Some("9.0"),
        kind: VERSION,
        apt: "libvirt-clients",
        dnf: "libvirt-client",
        zypper: "libvirt-client",
    },
    Tool {
        name: "virt-xml-validate",
        purpose: "checking the domain XML",
        required: false,
        oldest_tried: Some("9.0"),
        kind: VERSION,
        apt: "libvirt-clients",
        dnf: "libvirt-client",
        zypper: "libvirt-client",
    },
    Tool {
        name: "xmllint",
        purpose: "checking the domain XML (virt-xml-validate calls it)",
        required: false,
        oldest_tried: Some("2.9.14"),
        kind: VERSION,
        apt: "libxml2-utils",
        dnf: "libxml2",
        zypper: "libxml2-tools",
    },
    Tool {
        name: "qemu-system-x86_64",
        purpose: "booting the converted VM (`boot`)",
        required: false,
        oldest_tried: Some("7.2"),
        kind: VERSION,
        apt: "qemu-system-x86",
        dnf: "qemu-kvm",
        zypper: "qemu-x86",
    },
    Tool {
        name: "guestfish",
        purpose: "the guestfish engine (`--engine guestfish`)",
        required: false,
        oldest_tried: Some("1.48"),
        kind: VERSION,
        apt: "libguestfs-tools",
        dnf: "guestfs-tools",
        zypper: "guestfs-tools",
    },
    Tool {
        name: "virt-win-reg",
        purpose: "reading and merging a guest's registry by hand",
        required: false,
        oldest_tried: Some("1.48"),
        kind: VERSION,
        apt: "libguestfs-tools",
        dnf: "virt-win-reg",
        zypper: "guestfs-tools",
    },
    Tool {
        name: "mkntfs",
        purpose: "the demonstration guest (`demo`)",
        required: false,
        oldest_tried: Some("2022.10"),
        kind: VERSION,
        apt: "ntfs-3g",
        dnf: "ntfsprogs",
        zypper: "ntfsprogs",
    },
    Tool {
        name: "ssh",
        purpose: "sources on the wire by ssh://",
        required: false,
        oldest_tried: Some("9.2"),
        kind: Kind::Program(&["-V"]),
        apt: "openssh-client",
        dnf: "openssh-clients",
        zypper: "openssh-clients",
    },
    Tool {
        name: "virt-v2v",
        purpose: "converting Linux guests",
        required: false,
        oldest_tried: Some("2.2"),
        kind: VERSION,
        apt: "virt-v2v",
        dnf: "virt-v2v",
        zypper: "virt-v2v",
    },
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PackageManager {
    Apt,
    Dnf,
    Zypper,
}

impl PackageManager {
    /// The command that installs packages, without the `sudo` that an ordinary user needs.
    pub fn install_command(self, packages: &[&str]) -> Vec<String> {
        let head: &[&str] = match self {
            Self::Apt => &["apt-get", "install", "-y", "--no-install-recommends"],
            Self::Dnf => &["dnf", "install", "-y"],
            Self::Zypper => &["zypper", "--non-interactive", "install"],
        };
        head.iter()
            .chain(packages)
            .map(|s| (*s).to_owned())
            .collect()
    }
}

impl Tool {
    pub fn package(&self, manager: PackageManager) -> &'static str {
        match manager {
            PackageManager::Apt => self.apt,
            PackageManager::Dnf => self.dnf,
            PackageManager::Zypper => self.zypper,
        }
    }

    pub fn find(&self) -> Option<PathBuf> {
        match self.kind {
            Kind::Program(_) => super::find(self.name),
            Kind::Library => find_library(self.name),
        }
    }
}

/// The newest file of the library (`libntfs-3g.so.89`) in the first directory that has one, in the
/// order of the loader.
pub fn find_library(name: &str) -> Option<PathBuf> {
    let arch = std::env::consts::ARCH;
    let folders = ["/usr/lib", "/lib", "/usr/local/lib"];
    folders
        .iter()
        .flat_map(|f| {
            [
                format!("{f}/{arch}-linux-gnu"),
                format!("{f}64"),
                (*f).to_owned(),
            ]
        })
        .find_map(|folder| newest_library(Path::new(&folder), name))
}

fn newest_library(folder: &Path, name: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let versions = entries.filter_map(|entry| {
        let file = entry.file_name();
        // Exactly `.so.N`: the full version is the same file.
        let major = file.to_str()?.strip_prefix(name)?.strip_prefix('.')?;
        Some((major.parse::<u32>().ok()?, entry.path()))
    });
    versions.max().map(|(_, path)| path)
}

/// The distribution's package manager, according to `/etc/os-release`.
pub fn package_manager() -> Option<PackageManager> {
    let text = ["/etc/os-release", "/usr/lib/os-release"]
        .iter()
        .find_map(|file| std::fs::read_to_string(file).ok())?;
    manager_for(&text)
}

fn manager_for(os_release: &str) -> Option<PackageManager> {
    let field = |name: &str| {
        os_release
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim().trim_matches(['"', '\'']).to_lowercase())
            .unwrap_or_default()
    };
    // `ID` has precedence over `ID_LIKE`.
    let ids = format!("{} {}", field("ID"), field("ID_LIKE"));
    ids.split_whitespace().find_map(|id| match id {
        "debian" | "ubuntu" => Some(PackageManager::Apt),
        "fedora" | "rhel" | "centos" | "rocky" | "almalinux" => Some(PackageManager::Dnf),
        "suse" | "opensuse" | "sles" => Some(PackageManager::Zypper),
        id if id.starts_with("opensuse") || id.starts_with("sle") => Some(PackageManager::Zypper),
        _ => None,
    })
}

/// The command that installs what is missing. `None` if no command is known for this distribution
/// or nothing is missing.
pub fn install_command<'a>(missing: impl IntoIterator<Item = &'a Tool>) -> Option<Vec<String>> {
    let manager = package_manager()?;
    let mut packages: Vec<&str> = missing.into_iter().map(|t| t.package(manager)).collect();
    packages.sort_unstable();
    packages.dedup();
    (!packages.is_empty()).then(|| manager.install_command(&packages))
}

/// The remedy for a missing tool, in one line.
pub fn hint(name: &str) -> String {
    let Some(tool) = TOOLS.iter().find(|t| t.name == name) else {
        return format!("install {name}");
    };
    match install_command([tool]) {
        Some(command) => format!("install it: {}", command.join(" ")),
        None => format!(
            "install {name} (packages: {} on Debian, {} on Fedora, {} on openSUSE)",
            tool.apt, tool.dnf, tool.zypper
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::probe::{Found, qemu_version};
    use super::*;

    #[test]
    fn distributions() {
        for (text, want) in [
            ("NAME=x\nID=debian\n", Some(PackageManager::Apt)),
            (
                "ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n",
                Some(PackageManager::Apt),
            ),
            ("ID=fedora\n", Some(PackageManager::Dnf)),
            (
                "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n",
                Some(PackageManager::Dnf),
            ),
            (
                "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n",
                Some(PackageManager::Zypper),
            ),
            ("ID=\"sles\"\n", Some(PackageManager::Zypper)),
            ("ID=arch\nVERSION_ID=debian\n", None),
            ("", None),
        ] {
            assert_eq!(manager_for(text), want, "{text}");
        }
    }

    #[test]
    fn commands_and_hints() {
        assert_eq!(
            PackageManager::Dnf
                .install_command(&["hivex", "qemu-img"])
                .join(" "),
            "dnf install -y hivex qemu-img"
        );
        assert!(hint("qemu-img").contains("qemu"));
        assert_eq!(hint("other"), "install other");
        assert_eq!(install_command([]), None);
    }

    #[test]
    fn versions() {
        for (line, want) in [
            ("qemu-img version 7.2.9 (Debian 1:7.2+dfsg-7)", Some((7, 2))),
            ("qemu-storage-daemon version 10.0.2", Some((10, 0))),
            (
                "qemu-img version 4.2.1 (qemu-kvm-4.2.0-60.el8)",
                Some((4, 2)),
            ),
            ("qemu-img version ", None),
            ("qemu-img", None),
        ] {
            assert_eq!(qemu_version(line), want, "{line}");
        }
        let found = |version: &str| Found {
            tool: &TOOLS[0],
            path: None,
            version: Some(version.into()),
        };
        assert!(found("qemu-img version 5.2.0").too_old().is_none());
        let said = found("qemu-img version 5.1.0").too_old().unwrap();
        assert!(
            said.contains("5.1.0") && said.contains("5.2 or newer"),
            "{said}"
        );
    }

    #[test]
    fn probes() {
        for tool in &TOOLS {
            let found = tool.probe();
            if found.path.is_some() {
                assert!(
                    found
                        .version
                        .is_some_and(|v| v.contains(|c: char| c.is_ascii_digit()))
                );
            }
        }
    }
}
