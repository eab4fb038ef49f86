//! Input that cannot be converted: a clear error with a remedy, the documented exit code, and nothing
//! left behind.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hyper2kvm::demo::{ExtraFile, GuestSpec, Place, Role, WinVersion, hives};
use serde_json::Value;
use support::{
    Lab, Run, TOOLS, binary, finish, h2k, have, processes_naming, sha256, skip, tool, virtio_win,
};

/// Runs the program with its temporary files in a directory that must be empty afterwards.
fn run_in(lab: &Lab, args: &[&str], env: &[(&str, &OsStr)]) -> Run {
    let tmp = lab.path("tmp");
    fs::create_dir_all(&tmp).unwrap();
    let mut command = Command::new(support::binary());
    command
        .args(args)
        .current_dir(lab.dir.path())
        .env("TMPDIR", &tmp);
    command.envs(env.iter().copied());
    let run = support::finish(command);
    let left: Vec<_> = fs::read_dir(&tmp).unwrap().collect();
    assert!(
        left.is_empty(),
        "temporary files left by {args:?}: {left:?}"
    );
    run
}

fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n != "tmp")
        .collect();
    names.sort();
    names
}

/// The command must fail with `code` and say each of `says`, to people and as JSON alike.
#[track_caller]
fn fails_with(lab: &Lab, args: &[&str], env: &[(&str, &OsStr)], code: i32, says: &[&str]) {
    let before = listing(lab.dir.path());
    let human = run_in(lab, args, env).expect(code);
    assert_eq!(human.stdout, "", "{args:?}: an error is no result");
    let mut json_args = args.to_vec();
    json_args.push("--json");
    let json = run_in(lab, &json_args, env).expect(code).json();
    assert_eq!(json["schema"], "hyper2kvm/error/1", "{json}");
    assert_eq!(json["error"]["code"], code, "{json}");
    let text = human.stderr.trim_end();
    eprintln!("{text}\n");
    for word in says {
        assert!(text.contains(word), "{args:?}: no {word:?} in:\n{text}");
    }
    // The last line is the remedy.
    let last = text.lines().last().unwrap_or_default().trim_start();
    assert!(
        last.starts_with("hint:") || last.starts_with("remedy:"),
        "{args:?} ends without a remedy:\n{text}"
    );
    assert_plain(text);
    assert_eq!(listing(lab.dir.path()), before, "{args:?} left something");
    // The kernel ends children right after us, not before.
    let mut running = processes_naming(lab.dir.path());
    for _ in 0..20 {
        if running.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        running = processes_naming(lab.dir.path());
    }
    assert!(running.is_empty(), "{args:?} left {running:?}");
}

/// No `{:?}` of our types, no panic, no backtrace.
#[track_caller]
fn assert_plain(text: &str) {
    for debug in [
        "Some(",
        "None",
        "Err(",
        "Ok(",
        "Os {",
        "kind:",
        "panicked",
        "RUST_BACKTRACE",
        "Error {",
        "\\\\?\\",
        "\\u{",
    ] {
        assert!(!text.contains(debug), "{debug:?} in:\n{text}");
    }
}

/// `convert` and `inspect` of a disk that is not one.
#[track_caller]
fn unreadable(lab: &Lab, name: &str, code: i32, says: &[&str]) {
    eprintln!("== {name}");
    fails_with(lab, &["inspect", name], &[], code, says);
    let media = virtio_win().to_str().unwrap();
    for verb in ["convert", "plan"] {
        fails_with(lab, &[verb, name, "--virtio-iso", media], &[], code, says);
    }
}

/// `inspect` shows what there is; `convert` refuses.
#[track_caller]
fn not_convertible(lab: &Lab, name: &str, says: &[&str], shows: &[&str]) {
    eprintln!("== {name}");
    let shown = run_in(lab, &["inspect", name], &[]).expect(0).stdout;
    for word in shows {
        assert!(shown.contains(word), "no {word:?} in:\n{shown}");
    }
    assert_plain(&shown);
    let digest = sha256(&lab.path(name));
    let json = run_in(lab, &["inspect", name, "--json"], &[])
        .expect(0)
        .json();
    assert_eq!(json["schema"], "hyper2kvm/inspect/1");
    let media = virtio_win().to_str().unwrap();
    for verb in ["convert", "plan"] {
        let args = [verb, name, "--virtio-iso", media];
        fails_with(lab, &args, &[], 3, says);
    }
    assert_eq!(sha256(&lab.path(name)), digest);
}

fn small(version: WinVersion) -> GuestSpec {
    let mut spec = GuestSpec::new(version);
    spec.disk_size = 512 << 20;
    spec.recovery = false;
    spec
}

/// A directory for cases that need no guest.
fn empty_lab() -> Lab {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("guest.raw");
    Lab {
        dir,
        spec: small(WinVersion::Win10),
        raw,
    }
}

fn path(lab: &Lab, name: &str) -> String {
    lab.path(name).to_str().unwrap().to_string()
}

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
    let media = virtio_win().to_str().unwrap();
    fails_with(
        &lab,
        &[
            "convert",
            "notes.txt",
            "--source-format",
            "vmdk9",
            "--virtio-iso",
            media,
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
    let media = virtio_win().to_str().unwrap();
    let args = ["convert", "guest.raw", "--virtio-iso", media];
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
            place: Place::Windows,
            path: path.to_string(),
            contents,
        });
    }
    let lab = Lab::new(spec);
    let media = virtio_win().to_str().unwrap();
    for verb in ["convert", "plan"] {
        fails_with(
            &lab,
            &[verb, "guest.raw", "--virtio-iso", media],
            &[],
            3,
            &["more than one Windows", "Win2", "--root"],
        );
    }
    let plan = [
        "plan",
        "guest.raw",
        "--virtio-iso",
        media,
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

#[test]
fn driver_media() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let digest = sha256(&lab.raw);
    fs::create_dir(lab.path("empty")).unwrap();
    fs::write(lab.path("not.iso"), "milk, eggs\n".repeat(40000)).unwrap();
    fs::write(lab.path("empty.iso"), "").unwrap();
    // Drivers for other Windows versions only.
    let only = lab.path("only-xp");
    tool(
        "cp",
        &["-r", virtio_win().to_str().unwrap(), only.to_str().unwrap()],
    );
    for driver in fs::read_dir(&only).unwrap() {
        let driver = driver.unwrap().path();
        for folder in [
            "w10", "w11", "2k16", "2k19", "2k22", "2k25", "w8.1", "w8", "2k12R2", "2k12",
        ] {
            let _ = fs::remove_dir_all(driver.join(folder));
        }
    }
    // Storage drivers whose file is not there.
    let holes = lab.path("holes");
    tool(
        "cp",
        &[
            "-r",
            virtio_win().to_str().unwrap(),
            holes.to_str().unwrap(),
        ],
    );
    fs::remove_file(holes.join("viostor/w10/amd64/viostor.sys")).unwrap();
    for (media, code, says) in [
        ("nowhere.iso", 1, "nowhere.iso"),
        ("not.iso", 1, "not.iso"),
        ("empty.iso", 1, "empty.iso"),
        ("empty", 1, "empty"),
        ("/etc", 1, "/etc is no virtio-win driver source"),
        ("only-xp", 3, "viostor"),
        ("holes", 3, "viostor"),
    ] {
        eprintln!("== media {media}");
        for verb in ["convert", "plan"] {
            let args = [verb, "guest.raw", "--virtio-iso", media];
            fails_with(&lab, &args, &[], code, &[says]);
        }
    }
    fails_with(&lab, &["drivers", "not.iso"], &[], 1, &["not.iso"]);
    let says = ["no virtio-win driver source", "drivers --where"];
    fails_with(&lab, &["drivers", "/etc"], &[], 1, &says);
    if !Path::new("/usr/share/virtio-win/virtio-win.iso").exists() {
        let says = [
            "--virtio-iso",
            "https://fedorapeople.org/",
            "drivers --where",
        ];
        fails_with(&lab, &["convert", "guest.raw"], &[], 2, &says);
    }
    let closed = lab.path("closed");
    tool(
        "cp",
        &[
            "-r",
            virtio_win().to_str().unwrap(),
            closed.to_str().unwrap(),
        ],
    );
    if as_nobody(&lab).is_some() {
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
        let run = as_nobody(&lab).unwrap()(&["convert", "guest.raw", "--virtio-iso", "closed"]);
        let run = run.expect(5);
        assert!(run.stderr.contains("closed"), "{}", run.stderr);
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let media = virtio_win().to_str().unwrap();
    for (text, says) in [
        ("windows:\n  - id: x\n    folders: [", "bad.yaml, line"),
        ("drivers: 7\n", "bad.yaml, line"),
        ("\u{0}\u{1}", "bad.yaml"),
        ("- just\n- a list\n", "bad.yaml, line"),
        ("nonsense: true\n", "bad.yaml, line"),
    ] {
        fs::write(lab.path("bad.yaml"), text).unwrap();
        let args = [
            "convert",
            "guest.raw",
            "--virtio-iso",
            media,
            "--driver-config",
            "bad.yaml",
        ];
        fails_with(&lab, &args, &[], 2, &[says]);
    }
    fails_with(
        &lab,
        &[
            "convert",
            "guest.raw",
            "--virtio-iso",
            media,
            "--driver-config",
            "none.yaml",
        ],
        &[],
        2,
        &["none.yaml"],
    );
    assert_eq!(sha256(&lab.raw), digest);
}

type AsNobody<'l> = Box<dyn Fn(&[&str]) -> Run + 'l>;

/// Runs as an ordinary user, when we are one who can.
fn as_nobody(lab: &Lab) -> Option<AsNobody<'_>> {
    if !have(&["setpriv"]) {
        return None;
    }
    if !rustix::process::geteuid().is_root() {
        skip("root", "permissions are only tested as root");
        return None;
    }
    Some(Box::new(|args| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(support::binary())
            .args(args)
            .current_dir(lab.dir.path());
        support::finish(command)
    }))
}

#[test]
fn output_folders() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let media = virtio_win().to_str().unwrap();
    let convert = |out: &'static str, more: &[&'static str]| {
        let mut args = vec!["convert", "guest.raw", "--virtio-iso", media, "-o", out];
        args.extend(more);
        args
    };
    fs::create_dir(lab.path("theirs")).unwrap();
    fs::write(lab.path("theirs/thesis.odt"), "years of work").unwrap();
    fs::write(lab.path("file"), "x").unwrap();
    fails_with(
        &lab,
        &convert("theirs", &[]),
        &[],
        1,
        &["theirs exists and is not"],
    );
    fails_with(
        &lab,
        &convert("theirs", &["--force"]),
        &[],
        1,
        &["theirs exists and is not"],
    );
    fails_with(&lab, &convert("file", &["--force"]), &[], 1, &["file"]);
    fails_with(&lab, &convert("file/below", &[]), &[], 1, &["file"]);
    assert!(lab.path("theirs/thesis.odt").exists());
    fails_with(
        &lab,
        &convert("out", &["--compress", "--format", "raw"]),
        &[],
        2,
        &["compress"],
    );

    run_in(&lab, &convert("out", &[]), &[]).expect(0);
    fails_with(
        &lab,
        &convert("out", &[]),
        &[],
        1,
        &["out exists", "--force"],
    );
    fs::write(lab.path("out/extra"), "").unwrap();
    run_in(&lab, &convert("out", &["--force"]), &[]).expect(0);
    assert!(lab.path("out/extra").exists(), "it is the user's");
    let run = run_in(&lab, &["rollback", "out"], &[]).expect(1);
    assert!(run.stderr.contains("nothing to undo"), "{}", run.stderr);
    fails_with(&lab, &["rollback", "theirs"], &[], 1, &["theirs"]);
    fails_with(&lab, &["rollback", "nowhere"], &[], 1, &["nowhere"]);

    if let Some(run) = as_nobody(&lab) {
        fs::set_permissions(lab.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(
            virtio_win().parent().unwrap(),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
        let denied = run(&convert("denied", &[])).expect(5);
        assert!(
            denied.stderr.contains("no permission to write"),
            "{}",
            denied.stderr
        );
        assert!(!lab.path("denied").exists());
        fs::set_permissions(&lab.raw, fs::Permissions::from_mode(0o600)).unwrap();
        let denied = run(&["inspect", "guest.raw"]).expect(5);
        assert!(
            denied.stderr.contains("Permission denied"),
            "{}",
            denied.stderr
        );
    }
}

/// Unmounts when it goes.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk() {
    if !have(&TOOLS) || !have(&["mount", "umount"]) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let small_disk = lab.path("small");
    fs::create_dir(&small_disk).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=24m", "none"])
        .arg(&small_disk)
        .status();
    if !mounted.is_ok_and(|s| s.success()) {
        return skip("mount", "cannot mount a small tmpfs here");
    }
    let _mounted = Mounted(small_disk.clone());
    let digest = sha256(&lab.raw);
    let media = virtio_win().to_str().unwrap();
    let args = [
        "convert",
        "guest.raw",
        "--virtio-iso",
        media,
        "-o",
        "small/out",
    ];
    // From nearly full, where not even the overlay fits, on to where the copy does.
    let mut refused = 0;
    for filler in (0..=23_900u64).rev().step_by(1500) {
        eprintln!("== {filler} KiB taken");
        fs::write(small_disk.join("filler"), vec![1; (filler << 10) as usize]).unwrap();
        let run = run_in(&lab, &args, &[]);
        if run.code == 0 {
            break;
        }
        let run = run.expect(1);
        assert!(run.stderr.contains("space"), "{}", run.stderr);
        assert!(run.stderr.contains("hint: "), "{}", run.stderr);
        assert_plain(&run.stderr);
        assert_eq!(listing(&small_disk), ["filler"]);
        refused += 1;
    }
    assert!(refused > 2, "refused {refused} times");
    assert_eq!(sha256(&lab.raw), digest);
}

struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn images_others_write_to() {
    if !have(&TOOLS) || !have(&["qemu-io"]) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let qcow2 = lab.in_format("qcow2", "", "guest.qcow2");
    for (image, format) in [(&lab.raw, "raw"), (&qcow2, "qcow2")] {
        let mut child = Command::new("qemu-io")
            .args(["-f", format])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Its prompt comes after it has opened and locked the image.
        let mut prompt = [0];
        child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"length\n")
            .unwrap();
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut prompt)
            .unwrap();
        let holder = Holder(child);
        let name = image.file_name().unwrap().to_str().unwrap();
        let media = virtio_win().to_str().unwrap();
        for args in [
            vec!["inspect", name],
            vec!["convert", name, "--virtio-iso", media],
            vec!["convert", name, "--virtio-iso", media, "--in-place"],
        ] {
            let run = run_in(&lab, &args, &[]).expect(1);
            assert!(
                run.stderr.contains("in use by another process"),
                "{}",
                run.stderr
            );
            assert!(
                run.stderr.contains("shut the virtual machine down"),
                "{}",
                run.stderr
            );
        }
        assert_eq!(listing(lab.dir.path()), ["guest.qcow2", "guest.raw"]);
        drop(holder);
    }
    h2k(["inspect", qcow2.to_str().unwrap()]).expect(0);
}

#[test]
fn images_that_point_elsewhere() {
    if !have(&TOOLS) {
        return;
    }
    let lab = empty_lab();
    let elsewhere = tempfile::tempdir().unwrap();
    let secret = elsewhere.path().join("secret");
    fs::write(&secret, vec![7; 1 << 20]).unwrap();
    let secret = secret.to_str().unwrap();
    let create = |name: &str, backing: &str| {
        let image = path(&lab, name);
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, &image, "64M",
        ];
        tool("qemu-img", &args);
    };
    create("shadow.qcow2", "/etc/shadow");
    create("secret.qcow2", secret);
    create("up.qcow2", "../../../../../../../../../../etc/passwd");
    create("url.qcow2", "nbd://127.0.0.1:1/x");
    create(
        "json.qcow2",
        "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}",
    );
    create("self.qcow2", "self.qcow2");
    create("gone.qcow2", "gone-too.raw");
    for (name, says) in [
        ("shadow.qcow2", "outside its directory"),
        ("secret.qcow2", "outside its directory"),
        ("up.qcow2", "outside its directory"),
        ("url.qcow2", "not a file name"),
        ("json.qcow2", "not a file name"),
        ("self.qcow2", "loop"),
        ("gone.qcow2", "does not exist"),
    ] {
        unreadable(&lab, name, 1, &[says]);
    }
    let descriptor = |extent: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\n\nRW 2048 FLAT \"{extent}\" 0\n\nddb.adapterType = \"ide\"\n"
        )
    };
    for (extent, says) in [
        (secret, "outside its directory"),
        ("/etc/shadow", "outside its directory"),
        ("nbd://127.0.0.1:1/x", "does not exist"),
        ("gone-flat.vmdk", "does not exist"),
    ] {
        fs::write(lab.path("flat.vmdk"), descriptor(extent)).unwrap();
        unreadable(&lab, "flat.vmdk", 1, &[says]);
    }
}

/// A `PATH` with everything but one tool. Where that tool is in a directory that is always searched the
/// case cannot be made.
#[test]
fn missing_tools() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let media = virtio_win().to_str().unwrap();
    let bin = lab.path("bin");
    for missing in ["qemu-img", "qemu-storage-daemon"] {
        eprintln!("== without {missing}");
        let _ = fs::remove_dir_all(&bin);
        fs::create_dir(&bin).unwrap();
        for name in ["qemu-img", "qemu-storage-daemon"] {
            if name != missing {
                let real = hyper2kvm::tool::find(name).unwrap();
                std::os::unix::fs::symlink(real, bin.join(name)).unwrap();
            }
        }
        let env = [("PATH", bin.as_os_str())];
        let args = ["convert", "guest.raw", "--virtio-iso", media];
        fails_with(&lab, &args, &env, 5, &[missing, "is not installed"]);
        let doctor = run_in(&lab, &["doctor", "--json"], &env).expect(5);
        assert!(doctor.stdout.contains(missing), "{}", doctor.stdout);
    }
}

/// The library's file is hidden in a mount namespace of the run.
#[test]
fn without_libhivex_nothing_is_written() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let library = hyper2kvm::tool::host::find_library("libhivex.so").unwrap();
    let hide = format!(
        "mount --bind /dev/null {} && exec \"$@\"",
        fs::canonicalize(library).unwrap().display()
    );
    let hidden = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &hide, "sh"]).args(args);
        command.current_dir(lab.dir.path());
        finish(command)
    };
    if hidden(&["true"]).code != 0 {
        return skip("mount", "no mount namespace of one's own");
    }
    let media = virtio_win().to_str().unwrap();
    for verb in ["plan", "convert"] {
        let program = binary();
        let run = hidden(&[program, verb, "guest.raw", "--virtio-iso", media]).expect(5);
        let says = "libhivex (edits hives) is not installed";
        assert!(run.stderr.contains(says), "{}", run.stderr);
        assert!(run.stderr.contains("libhivex0"), "{}", run.stderr);
    }
    assert!(!lab.path("guest-kvm").exists() && !lab.path(".guest-kvm.partial").exists());
}

/// Every exit code is documented in the help, the README and the man page, and no other.
#[test]
fn exit_codes_are_documented() {
    use hyper2kvm::error::ErrorKind::*;
    let kinds = [
        Failed,
        Usage,
        Refused,
        NotReady,
        MissingTool,
        RolledBack,
        NotRolledBack,
        Internal,
        Interrupted,
    ];
    let mut codes: Vec<u8> = kinds.iter().map(|k| k.code()).collect();
    codes.insert(0, 0);
    let readme =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let readme: Vec<u8> = readme
        .lines()
        .filter_map(|l| l.strip_prefix("| ")?.split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(readme, codes, "README");
    for args in [["--help"], ["man"]] {
        let text = h2k(args).expect(0).stdout;
        let (_, list) = text
            .split_once("Exit codes:")
            .expect("a list of exit codes");
        let found: Vec<u8> = list
            .lines()
            .filter_map(|l| l.split_whitespace().next()?.parse().ok())
            .collect();
        assert_eq!(found, codes, "{args:?}");
    }
    // `match` makes this fail to compile when a kind is added.
    for kind in kinds {
        match kind {
            Failed | Usage | Refused | NotReady | MissingTool | RolledBack | NotRolledBack
            | Internal | Interrupted | SomeFailed(_) => {}
        }
    }
    // A range: one code per number of machines that failed.
    let help = h2k(["--help"]).expect(0).stdout;
    for text in [
        &help,
        &fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap(),
    ] {
        assert!(text.contains("101-120"), "{text}");
    }
    let codes = [1, 19, 20, 21, 500].map(|n| SomeFailed(n).code());
    assert_eq!(codes, [101, 119, 120, 120, 120]);
}

#[test]
fn usage_errors() {
    for args in [
        vec!["convert"],
        vec!["convert", "x", "--memory", "lots"],
        vec!["convert", "x", "--storage", "floppy"],
        vec!["convert", "x", "--mac", "nonsense"],
        vec!["convert", "x", "--in-place", "--compress"],
        vec!["frobnicate"],
        vec!["rollback"],
    ] {
        let run = h2k(args.clone()).expect(2);
        assert!(run.stderr.starts_with("error:"), "{args:?}: {}", run.stderr);
        let mut args = args;
        args.push("--json");
        let json = h2k(args).expect(2).json();
        assert_eq!(json["schema"], "hyper2kvm/error/1");
        assert_eq!(json["error"]["code"], 2);
    }
}

#[test]
fn verbs_that_need_no_disk() {
    let drivers = h2k(["drivers"]).expect(0).stdout;
    assert!(
        drivers.contains("Windows 11") && drivers.contains("w11"),
        "{drivers}"
    );
    let json = h2k(["drivers", virtio_win().to_str().unwrap(), "--json"])
        .expect(0)
        .json();
    let rows = json["windows"].as_array().unwrap();
    let usable = |row: &&Value| row["usable"] == true;
    assert!(rows.iter().filter(usable).count() > 10, "{json}");

    let script = h2k(["completions", "bash"]).expect(0).stdout;
    assert!(script.contains("rollback"), "{script}");
    let mut bash = Command::new("bash")
        .arg("-n")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    bash.stdin
        .take()
        .unwrap()
        .write_all(script.as_bytes())
        .unwrap();
    assert!(bash.wait().unwrap().success());

    let dir = tempfile::tempdir().unwrap();
    h2k(["man", dir.path().to_str().unwrap()]).expect(0);
    for page in ["hyper2kvm.1", "hyper2kvm-convert.1", "hyper2kvm-rollback.1"] {
        let text = fs::read_to_string(dir.path().join(page)).unwrap();
        assert!(text.contains(".SH NAME"), "{page}");
    }
    if have(&TOOLS) {
        let text = h2k(["doctor"]).expect(0).stdout;
        for purpose in ["convert:  yes", "boot: ", "rehearse: "] {
            let line = format!("ready to {purpose}");
            assert!(text.lines().any(|l| l.starts_with(&line)), "{text}");
        }
        for what in [
            "libvirt daemon",
            "OVMF",
            "swtpm",
            "/dev/kvm",
            "groups",
            "nbdkit",
            "free in",
        ] {
            assert!(text.contains(what), "{what}: {text}");
        }
        let doctor = h2k(["doctor", "--json"]).expect(0).json();
        assert_eq!(doctor["ready"]["convert"]["ready"], true);
        assert_eq!(doctor["checks"].as_array().unwrap().len(), 7);
        assert_eq!(doctor["schema"], "hyper2kvm/doctor/1");
        let tools = doctor["tools"].as_array().unwrap();
        assert!(
            tools
                .iter()
                .any(|t| t["name"] == "qemu-img" && t["path"].is_string())
        );
    }
}

#[test]
fn the_demo() {
    if !have(&TOOLS) {
        return;
    }
    let lab = empty_lab();
    for (folder, more) in [("uefi", None), ("bios", Some("--bios"))] {
        let mut args = vec!["demo", folder];
        args.extend(more);
        let run = run_in(&lab, &args, &[]).expect(0);
        assert!(run.stdout.contains("READY"), "{}", run.stdout);
        assert!(lab.path(folder).join("demo-kvm/report.json").exists());
        fails_with(&lab, &args, &[], 1, &["creating"]);
        let disk = format!("{folder}/demo-kvm/demo.qcow2");
        run_in(&lab, &["verify", &disk], &[]).expect(0);
        let disk = format!("{folder}/demo.raw");
        let json = run_in(&lab, &["verify", &disk, "--json"], &[])
            .expect(4)
            .json();
        assert_eq!(json["ready"], false);
    }
}
