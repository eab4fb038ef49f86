//! Files that are not disks, truncated disks, and disks without Windows or with a damaged one.

use super::*;

#[test]
fn files_that_are_no_disks() {
    if !have(&TOOLS) {
        return;
    }
    let lab = empty_lab();
    fs::write(lab.path("empty.vmdk"), "").unwrap();
    fs::write(lab.path("notes.txt"), "milk, eggs\n".repeat(400)).unwrap();
    fs::write(lab.path("tiny.raw"), "x").unwrap();
    fs::write(lab.path("text.vmdk"), "milk, eggs\n".repeat(400)).unwrap();
    fs::write(lab.path("disk.gz"), b"\x1f\x8b\x08\0aaaaaaaaaaaaaaaaaaaa").unwrap();
    fs::create_dir(lab.path("folder")).unwrap();
    tool("mkfifo", &[&path(&lab, "pipe")]);
    unreadable(&lab, "missing.vmdk", 1, &["missing.vmdk does not exist"]);
    unreadable(&lab, "empty.vmdk", 1, &["is empty (0 bytes)"]);
    unreadable(&lab, "folder", 1, &["folder"]);
    unreadable(&lab, "text.vmdk", 1, &["text.vmdk"]);
    unreadable(&lab, "disk.gz", 1, &["gzip"]);
    unreadable(&lab, "pipe", 1, &["neither a file nor a block device"]);
    unreadable(&lab, "folder/none.vmdk", 1, &["does not exist"]);
    not_convertible(&lab, "notes.txt", &["notes.txt"], &["notes.txt"]);
    not_convertible(&lab, "tiny.raw", &["tiny.raw"], &["tiny.raw"]);
    let driver_source = virtio_win().to_str().unwrap();
    fails_with(
        &lab,
        &[
            "convert",
            "notes.txt",
            "--source-format",
            "vmdk9",
            "--virtio-iso",
            driver_source,
        ],
        &[],
        2,
        &["unknown image format", "qcow2"],
    );
    fails_with(
        &lab,
        &["inspect", "notes.txt", "--source-format", "qcow2"],
        &[],
        1,
        &["notes.txt"],
    );
}

#[test]
fn truncated_images() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    for (format, options, name) in [
        ("vmdk", "", "cut.vmdk"),
        ("vmdk", "subformat=streamOptimized", "stream.vmdk"),
        ("qcow2", "", "cut.qcow2"),
        ("vpc", "", "cut.vhd"),
        ("vhdx", "", "cut.vhdx"),
        ("vdi", "", "cut.vdi"),
    ] {
        let image = lab.in_format(format, options, name);
        let file = fs::File::options().write(true).open(&image).unwrap();
        for share in [3, 50] {
            let len = file.metadata().unwrap().len();
            file.set_len(len - len / share).unwrap();
            let has = format!("only {} bytes", len - len / share);
            unreadable(&lab, name, 1, &["cut short", "ends at byte", &has]);
        }
        fs::remove_file(&image).unwrap();
    }
    // As a data disk of a VM: an extent that is shorter than its descriptor says, and images that are
    // whole, of a disk that is not.
    partitioned(&lab, "data.raw", 7, Some(&["mkntfs", "-Q", "-q", "-F"]));
    let data = fs::File::options()
        .write(true)
        .open(lab.path("data.raw"))
        .unwrap();
    data.set_len(40 << 20).unwrap();
    fs::rename(lab.path("data.raw"), lab.path("data-flat.vmdk")).unwrap();
    fs::write(
        lab.path("data.vmdk"),
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
         createType=\"monolithicFlat\"\nRW 131072 FLAT \"data-flat.vmdk\" 0\n",
    )
    .unwrap();
    for format in ["qcow2", "vhdx"] {
        let target = path(&lab, &format!("data.{format}"));
        tool(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                format,
                &path(&lab, "data-flat.vmdk"),
                &target,
            ],
        );
    }
    for (format, whole) in [
        ("vmdk", 67_108_864),
        ("qcow2", 67_108_864),
        ("vhdx", 67_108_864),
    ] {
        let disk = |dev: &str, file: &str, format: &str| {
            format!(
                "<disk><driver type='{format}'/><source file='{file}'/><target dev='{dev}' bus='sata'/></disk>"
            )
        };
        let xml = format!(
            "<domain><name>two</name><devices>{}{}</devices></domain>",
            disk("sda", "guest.raw", "raw"),
            disk("sdb", &format!("data.{format}"), format)
        );
        fs::write(lab.path("two.xml"), xml).unwrap();
        unreadable(
            &lab,
            "two.xml",
            1,
            &["cut short", &format!("byte {whole}"), "41943040"],
        );
    }
    for name in [
        "data-flat.vmdk",
        "data.vmdk",
        "data.qcow2",
        "data.vhdx",
        "two.xml",
    ] {
        fs::remove_file(lab.path(name)).unwrap();
    }
    // A raw file does not know its length, but its partition table does: in the middle of a partition, in
    // the GPT's backup, and by a sector.
    let raw = fs::File::options().write(true).open(&lab.raw).unwrap();
    let whole = raw.metadata().unwrap().len();
    for cut in [whole - 512, whole - 33 * 512, 400 << 20] {
        raw.set_len(cut).unwrap();
        let has = format!("only {cut} bytes");
        unreadable(&lab, "guest.raw", 1, &["cut short", "ends at byte", &has]);
        fails_with(&lab, &["verify", "guest.raw"], &[], 1, &[&has]);
    }
    assert_eq!(listing(lab.dir.path()), ["guest.raw"]);
}

/// A disk of 64 MiB with an MBR and one partition at 1 MiB, filled by `mkfs`.
fn partitioned(lab: &Lab, name: &str, kind: u8, mkfs: Option<&[&str]>) {
    let volume = lab.path("volume");
    let file = fs::File::create(&volume).unwrap();
    file.set_len(63 << 20).unwrap();
    if let Some([program, args @ ..]) = mkfs {
        let mut args = args.to_vec();
        let shown = volume.to_str().unwrap();
        args.push(shown);
        tool(program, &args);
    }
    let disk = fs::File::create(lab.path(name)).unwrap();
    disk.set_len(64 << 20).unwrap();
    let mut contents = Vec::new();
    fs::File::open(&volume)
        .unwrap()
        .read_to_end(&mut contents)
        .unwrap();
    disk.write_all_at(&contents, 1 << 20).unwrap();
    let mut mbr = [0u8; 512];
    mbr[446] = 0x80;
    mbr[450] = kind;
    mbr[454..458].copy_from_slice(&2048u32.to_le_bytes());
    mbr[458..462].copy_from_slice(&(63u32 * 2048).to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    disk.write_all_at(&mbr, 0).unwrap();
    fs::remove_file(volume).unwrap();
}

#[test]
fn disks_without_windows() {
    if !have(&TOOLS) || !have(&["mkfs.ext4"]) {
        return;
    }
    let lab = empty_lab();
    partitioned(&lab, "linux.raw", 0x83, Some(&["mkfs.ext4", "-q", "-F"]));
    partitioned(&lab, "data.raw", 7, Some(&["mkntfs", "-Q", "-q", "-F"]));
    partitioned(&lab, "unformatted.raw", 7, None);
    fs::File::create(lab.path("blank.raw"))
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    not_convertible(&lab, "linux.raw", &["Linux"], &["Linux"]);
    not_convertible(&lab, "data.raw", &["no Windows"], &[]);
    not_convertible(&lab, "unformatted.raw", &["not formatted"], &[]);
    not_convertible(&lab, "blank.raw", &["blank.raw"], &["blank.raw"]);
}

/// Changes files of the guest's Windows volume through ntfs-3g, the way something else would.
fn ntfs(lab: &Lab, change: impl FnOnce(&Path)) {
    let volume = lab.volume(&lab.raw);
    change(&volume);
    let part = lab.spec.partition(Role::Windows).unwrap();
    let bytes = fs::read(&volume).unwrap();
    let disk = fs::File::options().write(true).open(&lab.raw).unwrap();
    disk.write_all_at(&bytes, part.start).unwrap();
    fs::remove_file(volume).unwrap();
}

#[test]
fn damaged_windows() {
    if !have(&TOOLS) || !have(&["ntfscp"]) {
        return;
    }
    // Not a hive at all.
    let mut spec = small(WinVersion::Win10);
    spec.system_hive = Some(b"milk and eggs".repeat(1000));
    let lab = Lab::new(spec);
    broken_hive(&lab, "not a hive");

    let good = hives::system(&small(WinVersion::Win10));
    // Bytes flipped in the middle bins, and a chain of bins that is cut.
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    for byte in &mut flipped[middle..middle + 8192] {
        *byte ^= 0xa5;
    }
    let mut cut = good.clone();
    cut.truncate((good.len() / 2) & !4095);
    let mut header = good.clone();
    header[40..44].copy_from_slice(&u32::MAX.to_le_bytes());
    for (name, hive) in [("flipped", flipped), ("cut", cut), ("length", header)] {
        eprintln!("== {name}");
        ntfs(&lab, |volume| {
            let file = lab.path("hive");
            fs::write(&file, hive).unwrap();
            tool(
                "ntfscp",
                &[
                    "-q",
                    "-f",
                    volume.to_str().unwrap(),
                    file.to_str().unwrap(),
                    "/Windows/System32/config/SYSTEM",
                ],
            );
            fs::remove_file(file).unwrap();
        });
        broken_hive(&lab, name);
    }
    // No hive.
    ntfs(&lab, |volume| {
        let empty = lab.path("empty");
        fs::write(&empty, "").unwrap();
        tool(
            "ntfscp",
            &[
                "-q",
                "-f",
                volume.to_str().unwrap(),
                empty.to_str().unwrap(),
                "/Windows/System32/config/SYSTEM",
            ],
        );
        fs::remove_file(empty).unwrap();
    });
    broken_hive(&lab, "empty hive");
}

#[track_caller]
fn broken_hive(lab: &Lab, name: &str) {
    eprintln!("== hive: {name}");
    let digest = sha256(&lab.raw);
    let driver_source = virtio_win().to_str().unwrap();
    let args = ["convert", "guest.raw", "--virtio-iso", driver_source];
    fails_with(lab, &args, &[], 3, &["SYSTEM"]);
    run_in(lab, &["inspect", "guest.raw"], &[]).expect(0);
    assert_eq!(sha256(&lab.raw), digest);
}

#[test]
fn several_windows_and_none_complete() {
    if !have(&TOOLS) {
        return;
    }
    // A second Windows beside the first, and a directory that only looks like one.
    let second = small(WinVersion::Win10);
    let mut spec = small(WinVersion::Win10);
    for (path, contents) in [
        ("/Win2/System32/config/SYSTEM", hives::system(&second)),
        ("/Win2/System32/config/SOFTWARE", hives::software(&second)),
        ("/Win2/System32/ntoskrnl.exe", b"MZ".to_vec()),
        ("/Windows.old/System32/drivers/x.sys", b"MZ".to_vec()),
    ] {
        spec.extra_files.push(ExtraFile {
            place: DemoVolume::Windows,
            path: path.to_string(),
            contents,
        });
    }
    let lab = Lab::new(spec);
    let driver_source = virtio_win().to_str().unwrap();
    for verb in ["convert", "plan"] {
        fails_with(
            &lab,
            &[verb, "guest.raw", "--virtio-iso", driver_source],
            &[],
            3,
            &["more than one Windows", "Win2", "--root"],
        );
    }
    let plan = [
        "plan",
        "guest.raw",
        "--virtio-iso",
        driver_source,
        "--root",
        "\\Windows",
    ];
    run_in(&lab, &plan, &[]).expect(0);
    fails_with(
        &lab,
        &["inspect", "guest.raw", "--root", "\\Nowhere"],
        &[],
        2,
        &["Nowhere"],
    );
    fails_with(
        &lab,
        &["inspect", "guest.raw", "--root", "::"],
        &[],
        2,
        &["root"],
    );
}
