//! Linux guests, with a real one: busybox on ext4, this host's Debian kernel, an initramfs made
//! here, started by GRUB. The converted guest is booted under QEMU to its login line.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // skips and measured times must be seen

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::{Run, binary, blocks, finish, have, sha256, skip, tool};

const TOOLS: [&str; 9] = [
    "qemu-img",
    "qemu-storage-daemon",
    "mke2fs",
    "sfdisk",
    "busybox",
    "cpio",
    "gzip",
    "xz",
    "grub-mkimage",
];
const GRUB: &str = "/usr/lib/grub/i386-pc";
const UUID: &str = "6a1d51b0-0d0f-4f1e-8a0e-2f5b6f1c7a11";
/// The limit under emulation on a busy host.
const BOOT_LIMIT: Duration = Duration::from_secs(400);

/// The properties of a guest.
struct Spec {
    root: String,
    distribution: &'static str,
    fstab: String,
    esp: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            root: format!("UUID={UUID}"),
            // Unknown to virt-v2v, so that its presence changes nothing.
            distribution: "h2klab",
            fstab: format!("UUID={UUID} / ext4 defaults 0 1\n"),
            esp: false,
        }
    }
}

/// The newest kernel of this host with its modules, if it has one.
fn kernel() -> Option<String> {
    let names = fs::read_dir("/lib/modules").ok()?.flatten();
    let mut versions: Vec<String> = names
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|v| Path::new(&format!("/boot/vmlinuz-{v}")).exists())
        .collect();
    versions.sort();
    versions.pop()
}

fn ready() -> bool {
    if !have(&TOOLS) {
        return false;
    }
    let there = kernel().is_some() && Path::new(GRUB).join("boot.img").exists();
    if !there {
        skip(
            "linux-guest",
            "no kernel in /boot, or grub-pc-bin is not installed",
        );
    }
    there
}

/// Modules in the order they can be loaded, as paths below `/lib/modules/VERSION`.
fn with_needs(version: &str, wanted: &[&str]) -> Vec<String> {
    let text = fs::read_to_string(format!("/lib/modules/{version}/modules.dep")).unwrap();
    let dep: BTreeMap<&str, Vec<&str>> = text
        .lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(m, n)| (m, n.split_whitespace().collect()))
        .collect();
    let name = |path: &str| {
        let file = path.rsplit('/').next().unwrap();
        file.split(".ko").next().unwrap().replace('-', "_")
    };
    let mut order: Vec<String> = Vec::new();
    // ext4 asks the crypto API for crc32c by name, which modules.dep does not say.
    for module in ["crc32c_generic"].iter().chain(wanted) {
        let Some((path, needs)) = dep.iter().find(|(path, _)| name(path) == *module) else {
            continue; // in the kernel itself
        };
        // depmod lists what is needed first last.
        for path in needs.iter().rev().chain([path]) {
            if !order.iter().any(|p| p == path) {
                order.push(path.to_string());
            }
        }
    }
    order
}

fn script(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn busybox(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let program = hyper2kvm::tool::find("busybox").unwrap();
    fs::copy(program, folder.join("busybox")).unwrap();
}

/// A gzipped cpio with busybox, the modules and a script that mounts the root file system.
fn initramfs(dir: &Path, version: &str) -> PathBuf {
    let root = dir.join("initramfs");
    let modules = root.join(format!("usr/lib/modules/{version}"));
    busybox(&root.join("bin"));
    fs::create_dir_all(&modules).unwrap();
    let mut load = String::new();
    for path in with_needs(version, &["virtio_pci", "virtio_blk", "ext4"]) {
        let from = format!("/lib/modules/{version}/{path}");
        let plain = path.trim_end_matches(".xz").trim_end_matches(".zst");
        let to = modules.join(plain);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        let bytes = match path.rsplit('.').next() {
            Some("xz") => tool("xz", &["-dc", &from]),
            Some("zst") => tool("zstd", &["-dc", &from]),
            _ => fs::read(&from).unwrap(),
        };
        fs::write(&to, bytes).unwrap();
        load.push_str(&format!("insmod /usr/lib/modules/{version}/{plain}\n"));
    }
    let dep = fs::read_to_string(format!("/lib/modules/{version}/modules.dep")).unwrap();
    fs::write(modules.join("modules.dep"), dep.replace(".ko.xz", ".ko")).unwrap();
    script(
        &root.join("init"),
        &format!(
            "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nmkdir -p /proc /sys /dev /root\n\
             mount -t proc proc /proc\nmount -t devtmpfs dev /dev\n{load}\
             for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do\n\
             disk=$(findfs UUID={UUID}) && break\nsleep 1\ndone\n\
             echo \"root is $disk\" > /dev/ttyS0\n\
             mount -t ext4 -o ro $disk /root && mount --move /dev /root/dev\n\
             exec switch_root /root /sbin/init\n"
        ),
    );
    let packed = dir.join("initrd.img");
    let pack = format!(
        "cd {} && find . | cpio -o -H newc --quiet | gzip -1 > {}",
        root.display(),
        packed.display()
    );
    tool("sh", &["-c", &pack]);
    packed
}

/// A disk with GRUB, a kernel and a root file system that ends in a login prompt on COM1.
fn guest(dir: &Path, spec: &Spec) -> PathBuf {
    let version = kernel().unwrap();
    let root = dir.join("root");
    for folder in ["boot/grub", "etc", "sbin", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    busybox(&root.join("bin"));
    for program in ["init", "getty", "login"] {
        symlink("../bin/busybox", root.join("sbin").join(program)).unwrap();
    }
    symlink("busybox", root.join("bin/sh")).unwrap();
    let write = |name: &str, text: &str| fs::write(root.join(name), text).unwrap();
    write(
        "etc/os-release",
        &format!(
            "PRETTY_NAME=\"Lab Linux 1\"\nID={}\nVERSION_ID=1\n",
            spec.distribution
        ),
    );
    write("etc/hostname", "lab-linux\n");
    write("etc/passwd", "root:x:0:0:root:/:/bin/sh\n");
    write("etc/fstab", &spec.fstab);
    write(
        "etc/inittab",
        "::sysinit:/bin/busybox hostname lab-linux\nttyS0::respawn:/sbin/getty -L 115200 ttyS0 vt100\n",
    );
    fs::copy(
        format!("/boot/vmlinuz-{version}"),
        root.join(format!("boot/vmlinuz-{version}")),
    )
    .unwrap();
    fs::copy(
        initramfs(dir, &version),
        root.join(format!("boot/initrd.img-{version}")),
    )
    .unwrap();
    let modules = root.join(format!("lib/modules/{version}"));
    fs::create_dir_all(&modules).unwrap();
    fs::copy(
        format!("/lib/modules/{version}/modules.builtin"),
        modules.join("modules.builtin"),
    )
    .unwrap();
    write(
        "boot/grub/grub.cfg",
        &format!(
            "set default=\"0\"\nset timeout=0\nmenuentry 'Lab Linux' --id lab {{\n\
             search --no-floppy --fs-uuid --set=root {UUID}\n\
             linux /boot/vmlinuz-{version} root={} ro console=ttyS0 panic=5\n\
             initrd /boot/initrd.img-{version}\n}}\n",
            spec.root
        ),
    );
    disk(dir, &root, spec)
}

fn disk(dir: &Path, root: &Path, spec: &Spec) -> PathBuf {
    let (fs_image, raw) = (dir.join("fs.img"), dir.join("guest.raw"));
    let text = |p: &Path| p.to_str().unwrap().to_string();
    tool(
        "mke2fs",
        &[
            "-q",
            "-F",
            "-t",
            "ext4",
            "-U",
            UUID,
            "-d",
            &text(root),
            &text(&fs_image),
            "96m",
        ],
    );
    let file = fs::File::create(&raw).unwrap();
    file.set_len(160 << 20).unwrap();
    let put = |from: &Path, at: u64| {
        let mut args = vec![
            "bs=1M".to_string(),
            "conv=notrunc,sparse".into(),
            "status=none".into(),
        ];
        args.push(format!("if={}", from.display()));
        args.push(format!("of={}", raw.display()));
        args.push(format!("seek={}", at >> 20));
        tool("dd", &args.iter().map(String::as_str).collect::<Vec<_>>());
    };
    if spec.esp {
        let esp = dir.join("esp.img");
        fs::File::create(&esp).unwrap().set_len(33 << 20).unwrap();
        tool("mkfs.fat", &["-F", "32", &text(&esp)]);
        for folder in ["::/EFI", "::/EFI/h2klab"] {
            tool("mmd", &["-i", &text(&esp), folder]);
        }
        for name in ["shimx64.efi", "grubx64.efi", "fbx64.efi"] {
            let loader = dir.join(name);
            fs::write(&loader, format!("this is {name}")).unwrap();
            let to = format!("::/EFI/h2klab/{name}");
            tool("mcopy", &["-i", &text(&esp), &text(&loader), &to]);
        }
        tool(
            "sgdisk",
            &[
                "-n",
                "1:2048:+33M",
                "-t",
                "1:ef00",
                "-n",
                "2:0:+96M",
                "-t",
                "2:8300",
                &text(&raw),
            ],
        );
        put(&esp, 1 << 20);
        put(&fs_image, 34 << 20);
    } else {
        let pipe = format!("echo '2048,,83,*' | sfdisk -q {}", raw.display());
        tool("sh", &["-c", &pipe]);
        put(&fs_image, 1 << 20);
        grub(dir, &file);
    }
    raw
}

/// GRUB in the first sector and the gap behind it, in the layout of `grub-install`.
fn grub(dir: &Path, disk: &fs::File) {
    let early = dir.join("early.cfg");
    fs::write(
        &early,
        format!(
            "search --no-floppy --fs-uuid --set=root {UUID}\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n"
        ),
    )
    .unwrap();
    let core = dir.join("core.img");
    let mut args = vec![
        "-O",
        "i386-pc",
        "-p",
        "/boot/grub",
        "-c",
        early.to_str().unwrap(),
    ];
    args.extend(["-o", core.to_str().unwrap()]);
    args.extend([
        "biosdisk",
        "part_msdos",
        "ext2",
        "linux",
        "normal",
        "configfile",
    ]);
    args.extend(["search", "search_fs_uuid", "echo"]);
    tool("grub-mkimage", &args);
    let boot = fs::read(Path::new(GRUB).join("boot.img")).unwrap();
    let core = fs::read(core).unwrap();
    assert!(core.len() < (1 << 20) - 512);
    disk.write_all_at(&boot[..440], 0).unwrap();
    disk.write_all_at(&core, 512).unwrap();
}

fn convert(path: Option<&Path>, raw: &Path, more: &[&str]) -> Run {
    let out = raw.with_file_name("out");
    let mut command = Command::new(binary());
    command
        .args([
            "convert",
            raw.to_str().unwrap(),
            "--json",
            "--domain-type",
            "qemu",
        ])
        .args(["-o", out.to_str().unwrap()])
        .args(more);
    if let Some(path) = path {
        command.env("PATH", path);
    }
    finish(command)
}

/// A `PATH` with everything on this host except virt-v2v.
fn without_virt_v2v(dir: &Path) -> PathBuf {
    let farm = dir.join("path");
    fs::create_dir(&farm).unwrap();
    for folder in ["/usr/bin", "/bin", "/usr/local/bin"] {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let shown = name.to_string_lossy();
            // Written below by the tests, which must not reach the real ones.
            if !shown.starts_with("virt-v2v") && shown != "nbdkit" {
                // Some are in two of the directories.
                let _ = symlink(entry.path(), farm.join(name));
            }
        }
    }
    farm
}

/// Starts the disk and reads COM1 until the login line.
fn boot(disk: &Path) -> String {
    let log = disk.with_file_name("com1.log");
    let drive = format!("file={},format=qcow2,if=none,id=d", disk.display());
    let mut command = Command::new(hyper2kvm::tool::find("qemu-system-x86_64").unwrap());
    command
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg",
            "-m",
            "512",
            "-display",
            "none",
            "-snapshot",
        ])
        .args(["-nodefaults", "-no-reboot", "-drive", &drive])
        .args(["-serial", &format!("file:{}", log.display())])
        // Behind a root port, so modern only: like libvirt's q35.
        .args(["-device", "pcie-root-port,id=p"])
        .args(["-device", "virtio-blk-pci,drive=d,bus=p"])
        .stdin(Stdio::null());
    let mut qemu = command.spawn().unwrap();
    let start = Instant::now();
    let mut text = String::new();
    while start.elapsed() < BOOT_LIMIT && qemu.try_wait().unwrap().is_none() {
        text = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
        if text.contains("login:") {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    let _ = qemu.kill();
    qemu.wait().unwrap();
    eprintln!("{:.1} s to the login line", start.elapsed().as_secs_f32());
    text
}

fn blockers(run: &Run) -> Vec<(String, String)> {
    let json = run.json();
    let list = json["error"]["blockers"].as_array().unwrap().iter();
    list.map(|b| {
        let text = |key: &str| b[key].as_str().unwrap().to_string();
        (text("code"), text("remedy"))
    })
    .collect()
}

#[test]
fn on_the_users_word_it_is_converted_and_boots() {
    if !ready() || !have(&["qemu-system-x86_64", "virt-xml-validate"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = guest(dir.path(), &Spec::default());
    let before = sha256(&raw);

    let seen = support::h2k(["inspect", raw.to_str().unwrap(), "--json"])
        .expect(0)
        .json();
    assert_eq!(seen["os"]["family"], "linux");
    assert_eq!(seen["os"]["product_name"], "Lab Linux 1");
    assert_eq!(seen["os"]["arch"], "x86_64");
    assert_eq!(seen["os"]["hostname"], "lab-linux");
    assert_eq!(seen["firmware"], "bios");
    assert_eq!(seen["linux"]["distribution"], "h2klab");
    assert_eq!(seen["linux"]["root"]["filesystem"], "ext4");
    let text = support::h2k(["inspect", raw.to_str().unwrap()])
        .expect(0)
        .stdout;
    assert!(text.contains("Lab Linux 1"), "{text}");
    // Whether it starts is not checked, so it is not reported as ready.
    let verified = support::h2k(["verify", raw.to_str().unwrap()]).expect(4);
    assert!(
        verified.stdout.contains("is not checked here"),
        "{}",
        verified.stdout
    );

    let plan = support::h2k(["plan", raw.to_str().unwrap(), "--linux", "as-is", "--json"])
        .expect(0)
        .json();
    assert_eq!(plan["way"], "as-is");
    assert_eq!(plan["actions"].as_array().unwrap().len(), 0);

    let report = convert(None, &raw, &["--linux", "as-is"]).expect(0).json();
    assert_eq!(report["ready"], true);
    let path = &report["controllers"]["virtio-blk"];
    assert!(path["reason"].as_str().unwrap().contains("on your word"));
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("is not checked"), "{warnings}");
    assert!(report["outputs"]["bootstrap_xml"].is_null());
    assert_eq!(sha256(&raw), before);
    let out = raw.with_file_name("out");
    let mut files: Vec<_> = fs::read_dir(&out)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    assert_eq!(
        files,
        [
            "guest-final.xml",
            "guest.qcow2",
            "plan.json",
            "report.html",
            "report.json"
        ]
    );
    let xml = out.join("guest-final.xml");
    tool("virt-xml-validate", &[xml.to_str().unwrap(), "domain"]);
    let xml = fs::read_to_string(xml).unwrap();
    assert!(
        xml.contains("bus=\"virtio\"") || xml.contains("bus='virtio'"),
        "{xml}"
    );
    let told = boot(&out.join("guest.qcow2"));
    assert!(told.contains("root is /dev/vda1"), "{told}");
    assert!(told.contains("lab-linux login:"), "{told}");
    // It is started with virsh, as `boot` reports.
    let refused = support::h2k(["boot", out.to_str().unwrap()]).expect(2);
    assert!(refused.stderr.contains("virsh"), "{}", refused.stderr);
}

#[test]
fn without_virt_v2v_or_a_word_it_is_refused() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec {
        distribution: "debian",
        ..Spec::default()
    };
    let raw = guest(dir.path(), &spec);
    let path = without_virt_v2v(dir.path());
    for options in [&[][..], &["--linux", "virt-v2v"]] {
        let refused = convert(Some(&path), &raw, options).expect(3);
        let list = blockers(&refused);
        let [(code, remedy)] = &list[..] else {
            panic!("{list:?}");
        };
        assert_eq!(code, "virt-v2v-missing");
        assert!(
            remedy.contains("--linux as-is") && remedy.contains("virt-v2v"),
            "{remedy}"
        );
        assert!(!raw.with_file_name("out").exists());
    }
    let refused = convert(Some(&path), &raw, &["--linux", "as-is", "--in-place"]).expect(3);
    assert_eq!(blockers(&refused)[0].0, "linux-in-place");

    // virt-v2v gets an overlay of the disk, and XML with nothing else. A failed one leaves nothing,
    // and its reason is shown.
    script(&path.join("nbdkit"), "#!/bin/sh\n");
    script(
        &path.join("virt-v2v-in-place"),
        "#!/bin/sh\ngrep -q \"<driver name='qemu' type='qcow2'/>\\|<driver name=\\\"qemu\\\" type=\\\"qcow2\\\"/>\" \"$3\" || exit 9\n\
         echo 'virt-v2v-in-place: error: no kernels' >&2\nexit 1\n",
    );
    let failed = convert(Some(&path), &raw, &[]).expect(1);
    assert!(failed.stdout.contains("no kernels"), "{}", failed.stdout);
    assert!(failed.stdout.contains("--linux as-is"), "{}", failed.stdout);
    assert!(!raw.with_file_name("out").exists());
}

/// A distribution that virt-v2v does not support is handed to it only on request.
#[test]
fn an_unknown_distribution_is_refused() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = guest(dir.path(), &Spec::default());
    let path = without_virt_v2v(dir.path());
    script(&path.join("nbdkit"), "#!/bin/sh\n");
    script(&path.join("virt-v2v-in-place"), "#!/bin/sh\nexit 0\n");
    let refused = convert(Some(&path), &raw, &[]).expect(3);
    let list = blockers(&refused);
    assert_eq!(list[0].0, "linux-distribution");
    assert!(list[0].1.contains("--linux virt-v2v"), "{list:?}");
    let report = convert(Some(&path), &raw, &["--linux", "virt-v2v"])
        .expect(0)
        .json();
    let path = &report["controllers"]["virtio-blk"];
    assert!(path["reason"].as_str().unwrap().contains("virt-v2v"));
}

/// A program that opens files by name gets the source through a socket: another file with the name
/// of the source is not read.
#[test]
fn virt_v2v_reads_what_is_held() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec {
        distribution: "debian",
        ..Spec::default()
    };
    let raw = guest(dir.path(), &spec);
    let path = without_virt_v2v(dir.path());
    script(&path.join("nbdkit"), "#!/bin/sh\n");
    let [seen, secret, kept] = ["seen.raw", "secret", "kept.raw"].map(|name| dir.path().join(name));
    fs::write(&secret, "for root's eyes only").unwrap();
    let before = support::sha256(&raw);
    script(
        &path.join("virt-v2v-in-place"),
        &format!(
            "#!/bin/sh\nset -e\nmv {raw} {kept}\nln -s {secret} {raw}\n\
             overlay=$(sed -n \"s/.*file=['\\\"]\\([^'\\\"]*qcow2\\)['\\\"].*/\\1/p\" \"$3\")\n\
             qemu-img convert -f qcow2 -O raw \"$overlay\" {seen}\nrm {raw}\nmv {kept} {raw}\n",
            raw = raw.display(),
            kept = kept.display(),
            secret = secret.display(),
            seen = seen.display(),
        ),
    );
    convert(Some(&path), &raw, &["--linux", "virt-v2v"]).expect(0);
    assert_eq!(support::sha256(&seen), before);
    assert_eq!(support::sha256(&raw), before);
}

#[test]
fn names_of_devices_and_the_uefi_loader() {
    if !ready() || !have(&["mcopy", "mkfs.fat", "sgdisk"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec {
        root: "/dev/sda2".to_string(),
        fstab: "/dev/sda2 / ext4 defaults 0 1\n/dev/sda1 /boot/efi vfat defaults 0 1\n".to_string(),
        esp: true,
        ..Spec::default()
    };
    let raw = guest(dir.path(), &spec);
    let report = convert(None, &raw, &["--linux", "as-is"]).expect(0).json();
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("/dev/sda1"), "{warnings}");
    assert_eq!(report["inspection"]["firmware"], "uefi");
    assert_eq!(report["actions"][0]["id"], "uefi-fallback");
    let made = raw.with_file_name("result.raw");
    let disk = report["outputs"]["disks"][0].as_str().unwrap();
    tool(
        "qemu-img",
        &["convert", "-O", "raw", disk, made.to_str().unwrap()],
    );
    let esp = format!("{}@@1M", made.display());
    for (name, holds) in [
        ("BOOTX64.EFI", "shimx64.efi"),
        ("grubx64.efi", "grubx64.efi"),
    ] {
        let bytes = tool("mtype", &["-i", &esp, &format!("::/EFI/BOOT/{name}")]);
        assert_eq!(String::from_utf8_lossy(&bytes), format!("this is {holds}"));
    }
    let listing = tool("mdir", &["-b", "-i", &esp, "::/EFI/BOOT"]);
    assert_eq!(String::from_utf8_lossy(&listing).lines().count(), 2);
    // The second run finds it there.
    let again = support::h2k(["plan", disk, "--linux", "as-is", "--json"])
        .expect(0)
        .json();
    assert_eq!(again["actions"].as_array().unwrap().len(), 0);
}

/// Every command of `docs/linux.md`; commands that need a libvirtd have stand-ins.
#[test]
fn the_commands_of_the_page_run() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = guest(dir.path(), &Spec::default());
    let server = dir.path().join("server.vmdk");
    let (from, to) = (raw.to_str().unwrap(), server.to_str().unwrap());
    tool(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "vmdk", from, to],
    );
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    symlink(binary(), bin.join("hyper2kvm")).unwrap();
    // The last argument of `define` is a file.
    script(
        &bin.join("virsh"),
        "#!/bin/sh\nfor last; do :; done\n[ \"$1\" != define ] || test -s \"$last\"\n",
    );
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/linux.md");
    let scripts = blocks(&fs::read_to_string(page).unwrap(), "sh");
    assert!(!scripts.is_empty());
    for (at, body) in scripts {
        let mut command = Command::new("sh");
        let path = std::env::var("PATH").unwrap();
        command
            .args(["-e", "-c", &body])
            .current_dir(dir.path())
            .env("PATH", format!("{}:{path}", bin.display()));
        let run = finish(command);
        assert_eq!(run.code, 0, "line {at}\n{}{}", run.stdout, run.stderr);
    }
}
