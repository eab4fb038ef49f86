//! Kernel modules: their names, what they depend on, and whether a kernel has them when it looks for
//! its root file system.
//!
//! Formats: `modules.dep` and `modules.builtin` of depmod(8), and the kernel's own `config-VERSION`
//! where a kernel without modules leaves no lists.

use std::collections::{BTreeMap, BTreeSet};

/// The name as the kernel shows it: `virtio-blk.ko.zst` is `virtio_blk`.
pub fn name_of_file(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let (name, rest) = file.split_once(".ko")?;
    if name.is_empty() || !matches!(rest, "" | ".gz" | ".xz" | ".zst" | ".bz2") {
        return None;
    }
    Some(name.replace('-', "_"))
}

/// Lines of `modules.dep`: a module and all it needs, directly or not.
pub fn parse_dep(text: &str) -> BTreeMap<String, Vec<String>> {
    let lines = text.lines().filter_map(|line| {
        let (module, needs) = line.split_once(':')?;
        let needs = needs.split_whitespace().filter_map(name_of_file).collect();
        Some((name_of_file(module)?, needs))
    });
    lines.collect()
}

pub fn parse_builtin(text: &str) -> BTreeSet<String> {
    text.lines().filter_map(name_of_file).collect()
}

/// What `config-VERSION` says of the drivers a boot may need; a module is none of them.
pub fn builtin_of_config(text: &str) -> BTreeSet<String> {
    const SYMBOLS: [(&str, &str); 15] = [
        ("CONFIG_VIRTIO_PCI", "virtio_pci"),
        ("CONFIG_VIRTIO_BLK", "virtio_blk"),
        ("CONFIG_SCSI_VIRTIO", "virtio_scsi"),
        ("CONFIG_VIRTIO_NET", "virtio_net"),
        ("CONFIG_BLK_DEV_SD", "sd_mod"),
        ("CONFIG_SATA_AHCI", "ahci"),
        ("CONFIG_ATA_PIIX", "ata_piix"),
        ("CONFIG_EXT4_FS", "ext4"),
        ("CONFIG_XFS_FS", "xfs"),
        ("CONFIG_BTRFS_FS", "btrfs"),
        ("CONFIG_F2FS_FS", "f2fs"),
        ("CONFIG_BLK_DEV_DM", "dm_mod"),
        ("CONFIG_DM_CRYPT", "dm_crypt"),
        ("CONFIG_BLK_DEV_MD", "md_mod"),
        ("CONFIG_E1000E", "e1000e"),
    ];
    let on: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.trim().strip_suffix("=y"))
        .collect();
    let found = SYMBOLS.iter().filter(|(symbol, _)| on.contains(symbol));
    found.map(|(_, module)| (*module).to_string()).collect()
}

/// The modules one kernel has before the root file system is mounted.
#[derive(Debug, Default)]
pub struct Early {
    /// In the kernel itself.
    pub builtin: BTreeSet<String>,
    /// In its initramfs.
    pub carried: BTreeSet<String>,
    pub deps: BTreeMap<String, Vec<String>>,
}

impl Early {
    /// `builtin`, `initramfs`, or the name of what is missing: the module itself, or one it needs.
    pub fn find(&self, module: &str) -> Result<&'static str, String> {
        if self.builtin.contains(module) {
            return Ok("builtin");
        }
        if !self.carried.contains(module) {
            return Err(module.to_string());
        }
        let missing = self.deps.get(module).into_iter().flatten();
        let mut missing =
            missing.filter(|need| !self.builtin.contains(*need) && !self.carried.contains(*need));
        match missing.next() {
            None => Ok("initramfs"),
            Some(need) => Err(format!("{need} (which {module} needs)")),
        }
    }
}

/// The module of a file system; ext2 and ext3 are mounted by ext4.
pub fn of_file_system(name: &str) -> Option<&'static str> {
    match name {
        "ext2" | "ext3" | "ext4" => Some("ext4"),
        "xfs" => Some("xfs"),
        "btrfs" => Some("btrfs"),
        "f2fs" => Some("f2fs"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (path, want) in [
            ("kernel/drivers/block/virtio-blk.ko", Some("virtio_blk")),
            ("virtio_blk.ko.xz", Some("virtio_blk")),
            ("a/b.ko.zst", Some("b")),
            ("a/b.ko.sig", None),
            ("a/.ko", None),
            ("modules.dep", None),
            ("", None),
        ] {
            assert_eq!(name_of_file(path).as_deref(), want, "{path}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let text = |list: &[&str]| list.iter().map(ToString::to_string).collect();
        let early = Early {
            builtin: parse_builtin("kernel/drivers/virtio/virtio_pci.ko\nkernel/lib/crc16.ko\n"),
            carried: text(&["virtio_blk", "ext4", "jbd2", "ahci"]),
            deps: parse_dep(
                "kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/lib/crc16.ko\n\
                 kernel/drivers/ata/ahci.ko.xz: kernel/drivers/ata/libahci.ko.xz\n\
                 kernel/drivers/block/virtio_blk.ko:\nnonsense\n",
            ),
        };
        for (module, want) in [
            ("virtio_pci", Ok("builtin")),
            ("virtio_blk", Ok("initramfs")),
            ("ext4", Ok("initramfs")),
            ("virtio_scsi", Err("virtio_scsi")),
            ("ahci", Err("libahci (which ahci needs)")),
        ] {
            assert_eq!(early.find(module), want.map_err(str::to_string), "{module}");
        }
    }

    #[test]
    fn kernel_config() {
        let found = builtin_of_config(
            "CONFIG_VIRTIO_BLK=y\nCONFIG_VIRTIO_PCI=m\n# CONFIG_XFS_FS is not set\nCONFIG_EXT4_FS=y\n",
        );
        assert_eq!(
            found,
            BTreeSet::from(["virtio_blk".to_string(), "ext4".to_string()])
        );
    }
}
