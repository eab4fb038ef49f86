//! What is read of a Linux guest: small files, ext file systems.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use hyper2kvm::tool::Cmd;
use hyper2kvm_fuzz::disk::Base;

use crate::{Result, Seeds};

fn texts(seeds: &Seeds) -> Result<()> {
    let put = |target: &str, kind: u8, name: &str, text: &str| {
        seeds.write(target, name, &[&[kind], text.as_bytes()].concat())
    };
    for (kind, name, text) in [
        (
            0,
            "os-release",
            "PRETTY_NAME=\"Debian \\\"12\\\"\"\n# ID=x\nID=debian\nID_LIKE='a b'\n",
        ),
        (
            1,
            "fstab",
            "# c\nUUID=1 / ext4 errors=remount-ro 0 1\n/dev/sda2 /boot xfs defaults 0 0\n/dev/disk/by-id/ata-x none swap sw\n",
        ),
        (2, "ifcfg", "DEVICE=ens160\nHWADDR=00:11:22:33:44:55\n"),
        (3, "keyfile", "[connection]\nid=a\ninterface-name=enp0s3\n"),
        (
            4,
            "netplan",
            "network:\n  ethernets:\n    ens33:\n      dhcp4: true\n    eno1:\n      match:\n        macaddress: 00:11\n",
        ),
        (
            5,
            "networkd",
            "[Match]\nName=eno1 enp*\n[Network]\nDHCP=yes\n",
        ),
        (
            6,
            "ifupdown",
            "auto ens192\niface ens192 inet static\n  address 192.0.2.1\n",
        ),
    ] {
        put("linux_text", kind, name, text)?;
    }
    Ok(())
}

fn folder(root: &Path) -> Result<()> {
    for dir in ["etc", "usr/lib", "many"] {
        fs::create_dir_all(root.join(dir))?;
    }
    for (name, bytes) in [
        ("usr/lib/os-release", &b"ID=debian\n"[..]),
        ("etc/fstab", b"/dev/sda1 / ext4 defaults 0 1\n"),
        // Larger than what an inode names directly.
        ("large", &[7; 300 << 10]),
    ] {
        fs::write(root.join(name), bytes)?;
    }
    // Enough names that a folder is hashed.
    for i in 0..150 {
        fs::write(
            root.join(format!("many/a rather long name of a file {i}")),
            b"",
        )?;
    }
    symlink("../usr/lib/os-release", root.join("etc/os-release"))?;
    symlink("/etc/loop", root.join("etc/loop"))?;
    symlink("../../../../../../etc/passwd", root.join("etc/up"))?;
    // Too long for the inode.
    symlink(
        format!("/{}/x", "etc/../".repeat(20)),
        root.join("etc/host"),
    )?;
    Ok(())
}

fn le32(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) as usize
}

/// The superblock, the first group, every inode in use, and the blocks those name.
fn ext_seeds(seeds: &Seeds, kind: u8, name: &str, base: &Base) -> Result<()> {
    let put = |what: &str, at: usize, len: usize| -> Result<()> {
        let Some(patch) = base.try_patch(at, len) else {
            return Ok(());
        };
        let input = [&[kind][..], &patch].concat();
        seeds.write("ext", &format!("{name}-{what}"), &input)
    };
    let bytes = base.bytes();
    seeds.write("ext", &format!("{name}-sound"), &[kind])?;
    put("super", 1024, 264)?;
    put("group", 2048, 64)?;
    let block = 1024usize << le32(bytes, 1024 + 0x18);
    let size = usize::from(bytes[1024 + 0x58]) | usize::from(bytes[1024 + 0x59]) << 8;
    let table = le32(bytes, 2048 + 8) * block;
    // Root and journal, and one of each kind of the rest.
    for inode in [2, 8].into_iter().chain(11..40) {
        let at = table + (inode - 1) * size;
        if bytes[at] != 0 || bytes[at + 1] != 0 {
            put(&format!("inode-{inode}"), at, 160.min(size))?;
        }
    }
    for text in [
        "os-release",
        "a rather long name of a file 77",
        "\x0a\u{33}",
    ] {
        let place = bytes.windows(text.len()).position(|w| w == text.as_bytes());
        if let Some(at) = place {
            put(&format!("folder-{}", at / block), at / block * block, 96)?;
        }
    }
    // Blocks of the journal.
    let journal = [0xc0, 0x3b, 0x39, 0x98];
    let starts = (0..bytes.len()).step_by(block);
    let journals = starts.filter(|at| bytes[*at..].starts_with(&journal));
    for at in journals.take(6) {
        put(&format!("journal-{}", at / block), at, 128)?;
    }
    Ok(())
}

fn ext(seeds: &Seeds, work: &Path) -> Result<()> {
    let root = work.join("root");
    folder(&root)?;
    let plain = [
        "-b",
        "1024",
        "-N",
        "256",
        "-O",
        "^metadata_csum,^resize_inode",
    ];
    for (kind, name, options) in [
        (0, "ext2", &["-t", "ext2"][..]),
        (1, "ext4", &["-t", "ext4", "-J", "size=1"]),
        (2, "ext4-journal", &["-t", "ext4", "-J", "size=1"]),
    ] {
        let image = work.join(name);
        Cmd::new("mke2fs")
            .args(["-q", "-F"])
            .args(options)
            .args(plain)
            .args(["-E", "no_copy_xattrs", "-d"])
            .args([&root, &image])
            .arg("4m")
            .run()?;
        // As an installed system is, with hashed folders. It says 1: something was changed.
        let _ = Cmd::new("e2fsck").args(["-fyD"]).arg(&image).run();
        if name == "ext4-journal" {
            // A transaction that was not put in its place: what the file says.
            let block = work.join("block");
            fs::write(
                &block,
                [b"ID=journal\n".to_vec(), vec![0; 1024 - 11]].concat(),
            )?;
            let script = work.join("script");
            let place = Cmd::new("debugfs")
                .args(["-R", "blocks /usr/lib/os-release"])
                .arg(&image)
                .run()?;
            let place = String::from_utf8_lossy(&place.stdout).trim().to_string();
            let text = format!("jo\njw -b {place} {}\njc\n", block.display());
            fs::write(&script, text)?;
            Cmd::new("debugfs")
                .args(["-w", "-f"])
                .args([&script, &image])
                .run()?;
        }
        let base = Base::new(fs::read(&image)?);
        seeds.image(&format!("{name}.gz"), base.bytes())?;
        ext_seeds(seeds, kind, name, &base)?;
    }
    Ok(())
}

pub fn write(seeds: &Seeds) -> Result<()> {
    let dir = tempfile::tempdir()?;
    texts(seeds)?;
    ext(seeds, dir.path())
}
