//! The kernels of a guest: which there are, which starts by itself, and from which controllers each
//! finds its root file system.
//!
//! A kernel finds it when every driver on the way is in the kernel itself or in its initramfs, with all
//! the modules those need: the PCI and disk driver of the controller, the file system, and what lies
//! between (LVM, RAID). The hardware the guest had does not matter, and neither do modules on the root
//! file system, which is not there yet.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::bootloader::{self, Entry, Loader, Menu};
use super::initramfs::{self, Contents};
use super::model::{Kernel, RootFacts};
use super::modules::{self, Early};
use super::tree::{Result, Tree, TreeError};
use crate::boot_path::Controller;
use crate::text::guest_text;

/// Distributions keep three; each one costs reading its initramfs.
const MAX_KERNELS: usize = 12;
const MAX_INITRAMFS: u64 = 1 << 30;
const KERNEL_HEAD: u64 = 64 << 10;

/// What a controller needs, the driver of the disk last.
fn needs(controller: Controller) -> &'static [&'static str] {
    match controller {
        Controller::Sata => &["ahci", "sd_mod"],
        Controller::Ide => &["ata_piix", "sd_mod"],
        Controller::VirtioBlk => &["virtio_pci", "virtio_blk"],
        Controller::VirtioScsi => &["virtio_pci", "virtio_scsi", "sd_mod"],
    }
}

/// The driver that is named as the service of a boot path.
pub fn driver(controller: Controller) -> &'static str {
    match controller {
        Controller::Sata => "ahci",
        Controller::Ide => "ata_piix",
        Controller::VirtioBlk => "virtio_blk",
        Controller::VirtioScsi => "virtio_scsi",
    }
}

/// The boot menu, wherever it is.
pub fn menu(tree: &dyn Tree) -> Result<Menu> {
    let mut env = BTreeMap::new();
    for file in ["/boot/grub2/grubenv", "/boot/grub/grubenv"] {
        if let Some(text) = tree.text(file)? {
            env.extend(bootloader::grub_env(&text));
        }
    }
    let mut configs = vec![
        "/boot/grub2/grub.cfg".to_string(),
        "/boot/grub/grub.cfg".to_string(),
    ];
    for esp in ["/boot/efi", "/efi"] {
        for vendor in tree.list(&format!("{esp}/EFI"))? {
            configs.push(format!("{esp}/EFI/{vendor}/grub.cfg"));
            let saved = tree.text(&format!("{esp}/EFI/{vendor}/grubenv"))?;
            env.extend(saved.map(|t| bootloader::grub_env(&t)).unwrap_or_default());
        }
    }
    let mut uses_bls = false;
    for config in &configs {
        let Some(text) = tree.text(config)? else {
            continue;
        };
        uses_bls |= text.lines().any(|l| l.trim_start().starts_with("blscfg"));
        let menu = bootloader::grub_cfg(&text, &env);
        if !uses_bls && !menu.entries.is_empty() {
            return Ok(menu);
        }
    }
    for (folder, loader) in [
        ("/boot", Loader::GrubBls),
        ("/boot/efi", Loader::SystemdBoot),
        ("/efi", Loader::SystemdBoot),
    ] {
        let loader = if uses_bls { Loader::GrubBls } else { loader };
        let entries = bls_entries(tree, &format!("{folder}/loader/entries"), &env)?;
        if entries.is_empty() {
            continue;
        }
        let conf = tree.text(&format!("{folder}/loader/loader.conf"))?;
        let conf = conf.unwrap_or_default();
        let wanted = if loader == Loader::GrubBls {
            env.get("saved_entry").map_or("", String::as_str)
        } else {
            conf.lines()
                .find_map(|l| l.trim().strip_prefix("default"))
                .map_or("", str::trim)
        };
        return Ok(bootloader::bls_menu(entries, loader, wanted));
    }
    type Parse = fn(&str) -> Menu;
    let others: [(&str, Parse); 5] = [
        ("/boot/grub/grub.conf", bootloader::grub_legacy),
        ("/boot/grub/menu.lst", bootloader::grub_legacy),
        ("/boot/extlinux/extlinux.conf", bootloader::extlinux),
        ("/boot/extlinux.conf", bootloader::extlinux),
        ("/boot/syslinux/syslinux.cfg", bootloader::extlinux),
    ];
    for (file, parse) in others {
        if let Some(text) = tree.text(file)? {
            let menu = parse(&text);
            if !menu.entries.is_empty() {
                return Ok(menu);
            }
        }
    }
    Ok(Menu::default())
}

fn bls_entries(
    tree: &dyn Tree,
    folder: &str,
    env: &BTreeMap<String, String>,
) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for name in tree.list(folder)?.into_iter().take(MAX_KERNELS * 4) {
        let Some(id) = name.strip_suffix(".conf") else {
            continue;
        };
        if let Some(text) = tree.text(&format!("{folder}/{name}"))? {
            entries.extend(bootloader::bls_entry(id, &text, env));
        }
    }
    Ok(entries)
}

/// Every kernel of the menu, once for each initramfs it is started with, and those in `/boot` that no
/// entry names.
pub fn kernels(tree: &dyn Tree, menu: &Menu, root: &RootFacts) -> Result<Vec<Kernel>> {
    let mut reader = Reader {
        tree,
        root,
        scanned: BTreeMap::new(),
        budget: initramfs::MAX_UNPACKED,
    };
    let default = menu.default.and_then(|i| menu.entries.get(i));
    let same = |a: &Entry, b: &Entry| a.kernel == b.kernel && a.initrds == b.initrds;
    let mut wanted: Vec<Entry> = Vec::new();
    for entry in default.into_iter().chain(&menu.entries) {
        let known = wanted.iter().any(|e| same(e, entry));
        // memtest is in the menu and is no Linux.
        if !known && !entry.kernel.contains("memtest") {
            wanted.push(entry.clone());
        }
    }
    let in_menu = wanted.len();
    let files = tree.list("/boot")?;
    for name in &files {
        let image = format!("/boot/{name}");
        let Some(version) = version_of_name(&image) else {
            continue;
        };
        let named = |e: &Entry| e.kernel.rsplit('/').next() == Some(name);
        if !wanted.iter().any(named) {
            let initrds = initramfs_names(version)
                .into_iter()
                .filter(|n| files.contains(n))
                .map(|n| format!("/boot/{n}"));
            wanted.push(Entry {
                kernel: image,
                initrds: initrds.take(1).collect(),
                args: default.map_or(String::new(), |d| d.args.clone()),
                ..Entry::default()
            });
        }
    }
    let mut kernels = Vec::new();
    for (i, entry) in wanted.iter().take(MAX_KERNELS).enumerate() {
        let mut kernel = reader.kernel(entry)?;
        kernel.in_menu = i < in_menu;
        kernel.default = default.is_some_and(|d| same(d, entry));
        kernels.push(kernel);
    }
    Ok(kernels)
}

/// As the distributions name the initramfs of a kernel.
fn initramfs_names(version: &str) -> [String; 4] {
    [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}"),
        format!("initramfs-{version}"),
    ]
}

fn version_of_name(image: &str) -> Option<&str> {
    let file = image.rsplit('/').next()?;
    ["vmlinuz-", "vmlinux-", "bzImage-", "kernel-", "linux-"]
        .iter()
        .find_map(|prefix| file.strip_prefix(prefix))
        .filter(|version| version.starts_with(|c: char| c.is_ascii_digit()))
        .filter(|version| !version.ends_with(".old"))
}

/// From the header of a bzImage (Documentation/arch/x86/boot.rst): `kernel_version`.
fn version_of_image(head: &[u8]) -> Option<String> {
    if head.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let at = u16::from_le_bytes(*head.get(0x20e..)?.first_chunk()?);
    let text = head.get(0x200 + usize::from(at)..)?;
    let end = text.iter().take(256).position(|b| *b == 0)?;
    let text = std::str::from_utf8(text.get(..end)?).ok()?;
    text.split_whitespace().next().and_then(guest_text)
}

struct Reader<'t> {
    tree: &'t dyn Tree,
    root: &'t RootFacts,
    scanned: BTreeMap<String, Rc<std::result::Result<Contents, String>>>,
    /// What initramfs may still unpack to.
    budget: u64,
}

impl Reader<'_> {
    fn kernel(&mut self, entry: &Entry) -> Result<Kernel> {
        let mut kernel = Kernel {
            image: guest_text(&entry.kernel).unwrap_or_default(),
            initramfs: entry.initrds.iter().filter_map(|i| guest_text(i)).collect(),
            root: entry.argument("root").and_then(guest_text),
            ..Kernel::default()
        };
        let Some(path) = self.resolve(&entry.kernel)? else {
            kernel.problem = Some(format!("{} does not exist", kernel.image));
            return Ok(kernel);
        };
        let head = self.tree.head(&path, KERNEL_HEAD)?.unwrap_or_default();
        // A file may be named anything; what it says itself comes first.
        let version =
            version_of_image(&head).or_else(|| version_of_name(&path).and_then(guest_text));
        kernel.version.clone_from(&version);
        let mut contents = Vec::new();
        for name in &entry.initrds {
            let Some(path) = self.resolve(name)? else {
                kernel.problem = Some(format!(
                    "its initramfs {} does not exist",
                    guest_text(name).unwrap_or_default()
                ));
                return Ok(kernel);
            };
            contents.push((name, self.scan(&path)?));
        }
        for (name, scanned) in &contents {
            if let Err(reason) = scanned.as_ref() {
                kernel.problem = Some(format!(
                    "its initramfs {} cannot be read: {reason}",
                    guest_text(name).unwrap_or_default()
                ));
                return Ok(kernel);
            }
        }
        let contents: Vec<&Contents> = contents
            .iter()
            .filter_map(|(_, scanned)| scanned.as_ref().as_ref().ok())
            .collect();
        let Some(version) = version else {
            kernel.problem = Some("its version is not known".to_string());
            return Ok(kernel);
        };
        let early = self.early(&version, &contents)?;
        self.judge(&mut kernel, &early, &contents);
        Ok(kernel)
    }

    /// What this kernel has before its root file system is there.
    fn early(&self, version: &str, contents: &[&Contents]) -> Result<Early> {
        let list = |name: &str| -> Result<Option<String>> {
            for folder in ["/lib/modules", "/usr/lib/modules"] {
                let path = format!("{folder}/{version}/{name}");
                if let Some(text) = self.tree.text(&path)? {
                    return Ok(Some(text));
                }
            }
            Ok(None)
        };
        let of = |map: fn(&Contents) -> &BTreeMap<String, String>| {
            contents.iter().find_map(|c| map(c).get(version).cloned())
        };
        let builtin = match of(|c| &c.builtin) {
            Some(text) => Some(text),
            None => list("modules.builtin")?,
        };
        let mut early = Early::default();
        if let Some(text) = builtin {
            early.builtin = modules::parse_builtin(&text);
        } else if let Some(text) = self.tree.text(&format!("/boot/config-{version}"))? {
            early.builtin = modules::builtin_of_config(&text);
        }
        let dep = match of(|c| &c.dep) {
            Some(text) => Some(text),
            None => list("modules.dep")?,
        };
        early.deps = dep.map(|t| modules::parse_dep(&t)).unwrap_or_default();
        for contents in contents {
            let carried = contents.modules.get(version).into_iter().flatten();
            early.carried.extend(carried.cloned());
        }
        Ok(early)
    }

    fn judge(&self, kernel: &mut Kernel, early: &Early, contents: &[&Contents]) {
        let mut root: Vec<&str> = modules::of_file_system(&self.root.filesystem)
            .into_iter()
            .collect();
        let mut programs = Vec::new();
        for layer in &self.root.layers {
            match *layer {
                "lvm" => {
                    root.push("dm_mod");
                    programs.push("lvm");
                }
                "raid" => {
                    root.push("md_mod");
                    programs.push("mdadm");
                }
                _ => {}
            }
        }
        let mut common = None;
        let mut find = |module: &str| {
            let found = early.find(module);
            let place = found.as_ref().map_or("missing", |place| *place);
            kernel.drivers.insert(module.to_string(), place);
            found
        };
        for module in root {
            if let Err(missing) = find(module) {
                common.get_or_insert(missing);
            }
        }
        for program in programs {
            if !contents.iter().any(|c| c.programs.contains(program)) {
                common.get_or_insert(format!("the program {program}"));
            }
        }
        if modules::of_file_system(&self.root.filesystem).is_none() {
            common = Some(format!(
                "a driver for {} (not one we know)",
                self.root.filesystem
            ));
        }
        // Without an initramfs nobody looks for a UUID.
        if contents.is_empty()
            && let Some(name) = &kernel.root
            && !name.starts_with("/dev/")
            && !name.starts_with("PARTUUID=")
        {
            common = Some(format!("an initramfs, to find {name}"));
        }
        for controller in Controller::ALL {
            let missing: Vec<String> = needs(controller)
                .iter()
                .filter_map(|module| find(module).err())
                .chain(common.clone())
                .collect();
            if missing.is_empty() {
                kernel.ready.push(controller);
            } else {
                kernel.missing.insert(controller, missing.join(", "));
            }
        }
        let _ = find("virtio_net");
    }

    /// Boot loaders name files from the start of the file system they are on.
    fn resolve(&self, name: &str) -> Result<Option<String>> {
        let name = format!("/{}", name.trim_start_matches('/'));
        let inside = name.strip_prefix("/@").filter(|n| n.starts_with('/'));
        for prefix in ["", "/boot", "/boot/efi", "/efi", "/boot/extlinux"] {
            for name in [Some(name.as_str()), inside].into_iter().flatten() {
                let path = format!("{prefix}{name}");
                if self.tree.head(&path, 1)?.is_some() {
                    return Ok(Some(path));
                }
            }
        }
        Ok(None)
    }

    fn scan(&mut self, path: &str) -> Result<Rc<std::result::Result<Contents, String>>> {
        if let Some(known) = self.scanned.get(path) {
            return Ok(known.clone());
        }
        let scanned = match self.tree.open(path, MAX_INITRAMFS) {
            Ok(Some(file)) => initramfs::scan(file, &mut self.budget).map_err(|e| because(&e)),
            Ok(None) => Err("it does not exist".to_string()),
            Err(error @ TreeError::TooLarge { .. }) => Err(error.to_string()),
            Err(error) => return Err(error),
        };
        let scanned = Rc::new(scanned);
        self.scanned.insert(path.to_string(), scanned.clone());
        Ok(scanned)
    }
}

fn because(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Read};

    use super::*;

    /// A guest in memory.
    struct Fake(BTreeMap<&'static str, Vec<u8>>);

    impl Tree for Fake {
        fn reader(&self) -> &'static str {
            "fake"
        }

        fn open(&self, path: &str, _limit: u64) -> Result<Option<Box<dyn Read + '_>>> {
            let found = self.0.get(path);
            Ok(found.map(|bytes| Box::new(Cursor::new(bytes.clone())) as Box<dyn Read>))
        }

        fn list(&self, folder: &str) -> Result<Vec<String>> {
            let below = self.0.keys().filter_map(|path| {
                let rest = path.strip_prefix(folder)?.strip_prefix('/')?;
                Some(rest.split('/').next().unwrap_or(rest).to_string())
            });
            let mut names: Vec<_> = below.collect();
            names.dedup();
            Ok(names)
        }
    }

    const DEP: &str = "kernel/ext4.ko: kernel/jbd2.ko\nkernel/virtio_blk.ko: kernel/virtio.ko\n\
                       kernel/ahci.ko: kernel/libahci.ko\nkernel/sd_mod.ko:\n";

    fn initrd(modules: &[&str]) -> Vec<u8> {
        let files: Vec<(String, &[u8])> = modules
            .iter()
            .map(|m| (format!("usr/lib/modules/6.1/kernel/{m}.ko"), &b""[..]))
            .collect();
        let mut files: Vec<(&str, &[u8])> = files.iter().map(|(n, d)| (n.as_str(), *d)).collect();
        files.push(("usr/lib/modules/6.1/modules.dep", DEP.as_bytes()));
        super::initramfs::tests::cpio(&files)
    }

    fn guest(extra: &[(&'static str, &[u8])]) -> Fake {
        let mut files: BTreeMap<&'static str, Vec<u8>> = BTreeMap::from([
            ("/boot/vmlinuz-6.1", b"kernel".to_vec()),
            (
                "/boot/initrd.img-6.1",
                initrd(&[
                    "ext4",
                    "jbd2",
                    "virtio_blk",
                    "virtio",
                    "ahci",
                    "libahci",
                    "sd_mod",
                ]),
            ),
            (
                "/lib/modules/6.1/modules.builtin",
                b"kernel/virtio_pci.ko\n".to_vec(),
            ),
        ]);
        files.extend(extra.iter().map(|(n, d)| (*n, d.to_vec())));
        Fake(files)
    }

    fn root() -> RootFacts {
        RootFacts {
            filesystem: "ext4".into(),
            ..RootFacts::default()
        }
    }

    fn look(guest: &Fake) -> Vec<Kernel> {
        kernels(guest, &menu(guest).unwrap(), &root()).unwrap()
    }

    #[test]
    fn proof() {
        let kernels = look(&guest(&[]));
        assert_eq!(kernels.len(), 1);
        assert_eq!(
            kernels[0].ready,
            [Controller::Sata, Controller::VirtioBlk],
            "{:?}",
            kernels[0]
        );
        assert_eq!(kernels[0].missing[&Controller::VirtioScsi], "virtio_scsi");
        assert_eq!(kernels[0].drivers["virtio_pci"], "builtin");
        // A module that is there does not help when one it needs is not.
        let without = initrd(&["ext4", "virtio_blk", "virtio"]);
        let kernels = look(&guest(&[("/boot/initrd.img-6.1", &without)]));
        assert!(kernels[0].ready.is_empty());
        assert_eq!(
            kernels[0].missing[&Controller::VirtioBlk],
            "jbd2 (which ext4 needs)"
        );
        // Nor do modules of another kernel.
        let kernels = look(&guest(&[
            ("/boot/vmlinuz-6.2", b"kernel"),
            (
                "/boot/initrd.img-6.2",
                &initrd(&["ext4", "jbd2", "virtio_blk", "virtio"]),
            ),
        ]));
        assert!(
            kernels
                .iter()
                .any(|k| k.version.as_deref() == Some("6.2") && k.ready.is_empty())
        );
    }

    #[test]
    fn all_in_the_kernel() {
        let config = b"CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_BLK=y\nCONFIG_EXT4_FS=y\n";
        for (root, ready) in [("/dev/vda1", 1), ("PARTUUID=12", 1), ("UUID=12", 0)] {
            let cfg = format!("menuentry x {{\nlinux /vmlinuz-7 root={root}\n}}\n");
            let guest = Fake(BTreeMap::from([
                ("/boot/vmlinuz-7", b"kernel".to_vec()),
                ("/boot/config-7", config.to_vec()),
                ("/boot/grub/grub.cfg", cfg.into_bytes()),
            ]));
            let kernels = look(&guest);
            assert_eq!(kernels[0].ready.len(), ready, "{root}: {kernels:?}");
            assert!(kernels[0].default && kernels[0].in_menu);
        }
    }

    #[test]
    fn what_cannot_be_told() {
        let grub = |text: &'static str| ("/boot/grub/grub.cfg", text.as_bytes());
        for (extra, says) in [
            (
                vec![grub("menuentry a {\nlinux /boot/gone root=UUID=1\n}\n")],
                "/boot/gone does not exist",
            ),
            (
                vec![grub(
                    "menuentry a {\nlinux /boot/vmlinuz-6.1\ninitrd /boot/gone\n}\n",
                )],
                "initramfs /boot/gone does not exist",
            ),
            (
                vec![("/boot/initrd.img-6.1", &b"BZh9..."[..])],
                "cannot be read",
            ),
        ] {
            let kernels = look(&guest(&extra));
            let problem = kernels[0].problem.clone().unwrap_or_default();
            assert!(problem.contains(says), "{kernels:?}");
            assert!(kernels[0].ready.is_empty());
        }
    }

    #[test]
    fn versions() {
        let mut head = vec![0; 0x400];
        head[0x202..0x206].copy_from_slice(b"HdrS");
        head[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        head[0x300..0x30e].copy_from_slice(b"6.1.0-9 (a@b)\0");
        assert_eq!(version_of_image(&head).as_deref(), Some("6.1.0-9"));
        head[0x20e..0x210].copy_from_slice(&u16::MAX.to_le_bytes());
        assert_eq!(version_of_image(&head), None);
        assert_eq!(version_of_image(b"x"), None);
        assert_eq!(
            version_of_name("/boot/vmlinuz-6.1.0-9-amd64"),
            Some("6.1.0-9-amd64")
        );
        assert_eq!(version_of_name("/boot/vmlinuz.old"), None);
    }
}
