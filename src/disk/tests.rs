//! Images of every format, made by `qemu-img`, read and written through [`Export`], and copied.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::copy::{CopyError, CopyOptions, TargetFormat, copy};
use super::error::ImageError;
use super::export::ExportError;
use super::testing::{have, pattern, run, sha256, text, write};
use super::{BlockRead, BlockWrite, Export, Image};
use crate::error::{Error, ErrorKind};

const SIZE: usize = 6 << 20;
const QEMU: [&str; 2] = ["qemu-img", "qemu-storage-daemon"];

struct Folder {
    folder: TempDir,
    data: Vec<u8>,
    raw: PathBuf,
}

impl Folder {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let data = pattern(SIZE);
        let raw = write(folder.path(), "raw.img", &data);
        Self { folder, data, raw }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Converts the pattern to another format.
    fn convert(&self, name: &str, format: &str, options: &[&str]) -> PathBuf {
        let path = self.path(name);
        let target = format!("file:{}", text(&path));
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        args.extend_from_slice(options);
        args.extend([text(&self.raw), &target]);
        run("qemu-img", &args);
        path
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut files: Vec<_> = entries.map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    }

    fn digests(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let files = self.files().into_iter().filter(|f| f.is_file());
        files.map(|f| (f.clone(), sha256(&f))).collect()
    }
}

fn open(path: &Path) -> Image {
    Image::open_info(path, None, &[]).unwrap()
}

fn contents(disk: &dyn BlockRead) -> Vec<u8> {
    let mut data = vec![0; disk.size() as usize];
    disk.read_at(0, &mut data).unwrap();
    data
}

/// Compares large reads and small, odd ones.
fn assert_reads(disk: &dyn BlockRead, want: &[u8], what: &str) {
    let got = contents(disk);
    assert!(got[..want.len()] == *want, "{what}: contents differ");
    assert!(got[want.len()..].iter().all(|&b| b == 0), "{what}: tail");
    for (offset, len) in [(0, 1), (511, 2), (65_530, 4096), (want.len() - 7, 7)] {
        let mut buf = vec![0; len];
        disk.read_at(offset as u64, &mut buf).unwrap();
        assert!(buf == want[offset..offset + len], "{what} at {offset}");
    }
}

#[test]
fn every_format_reads_and_converts() {
    if !have(&QEMU) {
        return;
    }
    let f = Folder::new();
    let cases: [(&str, &str, &[&str], Option<&str>); 12] = [
        ("mono.vmdk", "vmdk", &[], Some("monolithicSparse")),
        (
            "split.vmdk",
            "vmdk",
            &["-o", "subformat=twoGbMaxExtentSparse"],
            Some("twoGbMaxExtentSparse"),
        ),
        (
            "flat.vmdk",
            "vmdk",
            &["-o", "subformat=monolithicFlat"],
            Some("monolithicFlat"),
        ),
        (
            "stream.vmdk",
            "vmdk",
            &["-o", "subformat=streamOptimized"],
            Some("streamOptimized"),
        ),
        ("dynamic.vhd", "vpc", &["-o", "force_size=on"], None),
        (
            "fixed.vhd",
            "vpc",
            &["-o", "force_size=on,subformat=fixed"],
            None,
        ),
        ("d.vhdx", "vhdx", &[], None),
        ("fixed.vhdx", "vhdx", &["-o", "subformat=fixed"], None),
        ("d.vdi", "vdi", &[], None),
        ("c.qcow2", "qcow2", &["-c"], None),
        ("data.qcow2", "qcow2", &["-o", "data_file=data.raw"], None),
        ("ü: a,b %41 \"q\" 'x'=.qcow2", "qcow2", &[], None),
    ];
    for (name, format, options, subformat) in cases {
        let path = if name == "data.qcow2" {
            // qemu-img takes the data file's name relative to where it runs.
            let data = f.path("data.raw");
            f.convert(name, format, &["-o", &format!("data_file={}", text(&data))])
        } else {
            f.convert(name, format, options)
        };
        let image = open(&path);
        assert_eq!(image.format().driver(), format, "{name}");
        assert_eq!(image.top().subformat.as_deref(), subformat, "{name}");
        assert_eq!(image.levels().len(), 1);
        image.check().unwrap();
        let export = Export::open_readonly(&image).unwrap();
        let disk = export.disk();
        assert_eq!(disk.size(), image.virtual_size(), "{name}");
        assert_reads(&*disk, &f.data, name);
        export.close().unwrap();
        assert!(disk.read_at(1 << 20, &mut [0; 1 << 19]).is_err(), "closed");

        let target = f.path("target.raw");
        copy(&image, &target, &how(TargetFormat::Raw, false), &mut |_| {}).unwrap();
        assert!(
            std::fs::read(&target).unwrap()[..SIZE] == f.data[..],
            "{name}: copy"
        );
        std::fs::remove_file(&target).unwrap();
    }
    assert_eq!(open(&f.path("split.vmdk")).files().count(), 2);
    assert_eq!(open(&f.path("data.qcow2")).files().count(), 2);
    let raw = open(&f.raw);
    let export = Export::open_readonly(&raw).unwrap();
    assert_reads(&*export.disk(), &f.data, "raw");
    export.close().unwrap();
}

fn how(format: TargetFormat, compress: bool) -> CopyOptions {
    CopyOptions {
        format,
        compress,
        compare: true,
        ..CopyOptions::default()
    }
}

#[test]
fn chains_overlays_and_copies() {
    if !have(&QEMU) {
        return;
    }
    let f = Folder::new();
    f.convert("base.vmdk", "vmdk", &[]);
    let create = |name: &str, backing: &str, format: &str| {
        let name = f.path(name);
        let args = ["create", "-q", "-f", "qcow2", "-b", backing, "-F", format];
        run("qemu-img", &[&args[..], &[text(&name)]].concat());
        name
    };
    create("mid dle.qcow2", "base.vmdk", "vmdk");
    let top = create("top.qcow2", "mid dle.qcow2", "qcow2");
    let delta = f.path("delta.vmdk");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "vmdk",
            "-b",
            text(&f.path("base.vmdk")),
            "-F",
            "vmdk",
            text(&delta),
        ],
    );
    let export = Export::open_readonly(&open(&delta)).unwrap();
    assert_reads(&*export.disk(), &f.data, "delta");
    export.close().unwrap();

    let image = open(&top);
    assert_eq!(image.levels().len(), 3);
    let before = f.digests();
    let overlay = f.path("overlay ,:.qcow2");
    let export = Export::open_overlay(&image, &overlay).unwrap();
    let disk: Arc<dyn BlockWrite> = export.disk();
    assert_reads(&*disk, &f.data, "overlay");
    let mut want = f.data.clone();
    for (offset, len, byte) in [(100, 1, 1), (65_000, 70_000, 2), (3 << 20, 1_300_000, 3)] {
        disk.write_at(offset, &vec![byte; len]).unwrap();
        want[offset as usize..offset as usize + len].fill(byte);
    }
    disk.zero_at(4 << 20, 1 << 20).unwrap();
    want[4 << 20..5 << 20].fill(0);
    assert!(disk.write_at(SIZE as u64 - 1, b"xx").is_err());
    assert_reads(&*disk, &want, "written");
    disk.flush().unwrap();
    let fixed = export.image().clone();
    export.close().unwrap();
    assert!(
        matches!(
            Export::open_overlay(&image, &overlay),
            Err(ExportError::Exists { .. })
        ),
        "an overlay is never taken over"
    );
    assert_eq!(
        f.digests()
            .into_iter()
            .filter(|(p, _)| *p != overlay)
            .collect::<Vec<_>>(),
        before
    );

    for (name, format, compress) in [
        ("out.qcow2", TargetFormat::Qcow2, false),
        ("small.qcow2", TargetFormat::Qcow2, true),
        ("out.raw", TargetFormat::Raw, false),
    ] {
        let target = f.path(name);
        let mut seen = Vec::new();
        let copied = copy(&fixed, &target, &how(format, compress), &mut |x| {
            seen.push(x)
        })
        .unwrap();
        assert_eq!(copied.virtual_size, SIZE as u64);
        assert!(
            copied.written > 0 && copied.written < SIZE as u64,
            "{copied:?}"
        );
        assert!(seen.is_sorted() && seen.last() == Some(&1.0), "{seen:?}");
        let image = open(&target);
        assert_eq!(
            (image.levels().len(), image.format().driver()),
            (1, format.name())
        );
        let export = Export::open_readonly(&image).unwrap();
        assert_reads(&*export.disk(), &want, name);
        export.close().unwrap();
        assert!(matches!(
            copy(&fixed, &target, &how(format, compress), &mut |_| {}),
            Err(CopyError::Exists { .. })
        ));
    }
    assert!(matches!(
        copy(
            &fixed,
            &f.path("c.raw"),
            &how(TargetFormat::Raw, true),
            &mut |_| {}
        ),
        Err(CopyError::RawCompressed)
    ));
}

#[test]
fn in_place() {
    if !have(&QEMU) {
        return;
    }
    let f = Folder::new();
    for path in [
        f.raw.clone(),
        f.convert("x.qcow2", "qcow2", &[]),
        f.convert("x.vhdx", "vhdx", &[]),
    ] {
        let export = Export::open_writable(&open(&path)).unwrap();
        export.disk().write_at(12_345, b"hello").unwrap();
        export.close().unwrap();
        let export = Export::open_readonly(&open(&path)).unwrap();
        let mut want = f.data.clone();
        want[12_345..12_350].copy_from_slice(b"hello");
        assert_reads(&*export.disk(), &want, "in place");
        export.close().unwrap();
    }
}

#[test]
fn in_use() {
    if !have(&QEMU) {
        return;
    }
    let f = Folder::new();
    let qcow2 = f.convert("x.qcow2", "qcow2", &[]);
    for path in [&f.raw, &qcow2] {
        let image = open(path);
        let writer = Export::open_writable(&image).unwrap();
        let e = Image::open_info(path, None, &[]).unwrap_err();
        assert!(matches!(e, ImageError::InUse { .. }), "{e}");
        assert!(Error::from(e).hints[0].contains("shut"));
        writer.close().unwrap();
        // Locked as long as the image exists, whatever its daemon does.
        assert!(Image::open_info(path, None, &[]).is_err());
        drop(image);
        // Readers do not exclude each other, but they exclude writers.
        let (one, two) = (open(path), open(path));
        assert!(matches!(
            Export::open_writable(&one),
            Err(ExportError::Image(ImageError::InUse { .. }))
        ));
        drop(two);
        Export::open_writable(&one).unwrap().close().unwrap();
    }
}

#[test]
fn what_was_opened_is_what_is_read() {
    if !have(&QEMU) {
        return;
    }
    let f = Folder::new();
    let split = f.convert("s.vmdk", "vmdk", &["-o", "subformat=twoGbMaxExtentSparse"]);
    let overlay = f.path("o.qcow2");
    let over = ["create", "-q", "-f", "qcow2", "-F", "vmdk", "-b", "s.vmdk"];
    run("qemu-img", &[&over[..], &[text(&overlay)]].concat());
    let image = open(&overlay);
    // Every name now leads elsewhere.
    let secret = f.path("secret");
    std::fs::write(&secret, vec![0x55; f.data.len()]).unwrap();
    for held in image.held() {
        std::fs::remove_file(held.path()).unwrap();
        std::os::unix::fs::symlink(&secret, held.path()).unwrap();
        assert!(held.check_name().is_err());
    }
    assert_eq!(image.held().count(), 3, "{split:?}");
    image.check().unwrap();
    let export = Export::open_readonly(&image).unwrap();
    assert_reads(&*export.disk(), &f.data, "after the swap");
    export.close().unwrap();
    let target = f.path("t.raw");
    copy(&image, &target, &how(TargetFormat::Raw, false), &mut |_| {}).unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), f.data);
    let e = image.check_unchanged().unwrap_err();
    assert!(e.to_string().contains("took its name"), "{e}");
    assert!(image.check_names().is_err());
}

#[test]
fn a_dead_daemon_is_noticed() {
    if !have(&QEMU) {
        return;
    }
    let f = Folder::new();
    let export = Export::open_writable(&open(&f.raw)).unwrap();
    let id = i32::try_from(export.daemon_id().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(id).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let disk = export.disk();
    assert!(disk.read_at(0, &mut [0; 512]).is_err());
    assert!(disk.flush().is_err());
    assert!(matches!(export.close(), Err(ExportError::Close { .. })));
}

#[test]
fn bad_input() {
    if !have(&QEMU) {
        return;
    }
    let f = Folder::new();
    let kind = |name: &str| Image::open_info(&f.path(name), None, &[]).unwrap_err();
    assert!(matches!(kind("missing"), ImageError::NotFound { .. }));
    assert!(matches!(kind(""), ImageError::Directory { .. }));
    write(f.folder.path(), "empty.qcow2", b"");
    assert!(matches!(kind("empty.qcow2"), ImageError::Empty { .. }));
    write(f.folder.path(), "x.vmdk.gz", b"\x1f\x8b\x08\0\0\0\0\0");
    assert!(matches!(kind("x.vmdk.gz"), ImageError::Packed { .. }));
    assert!(matches!(
        Image::open_info(&f.raw, Some("docx"), &[]),
        Err(ImageError::UnknownFormat { .. })
    ));
    assert!(matches!(
        Image::open_info(&f.raw, Some("qcow2"), &[]),
        Err(ImageError::Damaged { .. })
    ));
    assert!(matches!(
        Image::open_info(Path::new("/dev/null"), None, &[]),
        Err(ImageError::NotAFile { .. })
    ));
    let e = Error::from(kind("missing"));
    assert_eq!(e.kind, ErrorKind::Failed);

    let secret = write(f.folder.path(), "secret.img", &f.data);
    let nobody = std::os::unix::fs::PermissionsExt::from_mode(0o000);
    std::fs::set_permissions(&secret, nobody).unwrap();
    // Root reads every file; tests/refusals/ uses another user.
    if std::fs::File::open(&secret).is_err() {
        let e = kind("secret.img");
        assert!(matches!(e, ImageError::Permission { .. }), "{e}");
        assert_eq!(Error::from(e).kind, ErrorKind::MissingTool);
    }

    // Truncated at several places: detected on opening, or by the check.
    for (name, format, options) in [
        ("m.vmdk", "vmdk", &[][..]),
        ("s.vmdk", "vmdk", &["-o", "subformat=streamOptimized"]),
        ("q.qcow2", "qcow2", &[]),
        ("d.vhdx", "vhdx", &[]),
        ("d.vdi", "vdi", &[]),
        ("d.vhd", "vpc", &[]),
        ("f.vhd", "vpc", &["-o", "subformat=fixed"]),
    ] {
        let whole = std::fs::read(f.convert(name, format, options)).unwrap();
        for part in [1000, whole.len() / 3, whole.len() * 9 / 10] {
            let path = write(f.folder.path(), name, &whole[..part]);
            let result = Image::open_info(&path, None, &[]).and_then(|image| image.check());
            match result {
                Err(ImageError::Damaged { reason, .. }) => assert!(!reason.contains("json:")),
                Err(ImageError::Short { short, .. }) => assert_eq!(short.has, part as u64),
                // Only the unused end of the last block is missing.
                Ok(()) if format == "vhdx" || name == "s.vmdk" => {
                    let export = Export::open_readonly(&self::open(&path)).unwrap();
                    assert_reads(&*export.disk(), &f.data, name);
                }
                other => panic!("{name} cut to {part}: {other:?}"),
            }
        }
    }
    write(f.folder.path(), "notes.vmdk", b"not a disk\n");
    assert!(matches!(kind("notes.vmdk"), ImageError::Damaged { .. }));
    // A split image with a part missing.
    let split = f.convert("p.vmdk", "vmdk", &["-o", "subformat=twoGbMaxExtentSparse"]);
    std::fs::remove_file(f.path("p-s001.vmdk")).unwrap();
    let e = Image::open_info(&split, None, &[]).unwrap_err();
    assert!(matches!(e, ImageError::PartMissing { .. }), "{e}");
}

#[test]
fn references_stay_in_the_folder() {
    if !have(&QEMU) {
        return;
    }
    let f = Folder::new();
    let outside = TempDir::new().unwrap();
    let secret = write(outside.path(), "secret.img", &f.data);
    let open = |path: &Path, allow: &[PathBuf]| Image::open_info(path, None, allow);

    // A qcow2 over any file, by absolute and relative name, and through a link.
    std::os::unix::fs::symlink(&secret, f.path("link.img")).unwrap();
    let up = format!(
        "../{}/secret.img",
        outside.path().file_name().unwrap().display()
    );
    // Each file is a new one: a program that another test starts may still hold the lock of the last.
    let evil = |n: usize| f.path(&format!("evil-{n}.qcow2"));
    let backings = [text(&secret), "link.img", &up, "/etc/no-such-file"];
    for (n, backing) in backings.into_iter().enumerate() {
        let path = evil(n);
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-u",
                "-f",
                "qcow2",
                "-b",
                backing,
                "-F",
                "raw",
                text(&path),
                "6M",
            ],
        );
        let e = open(&path, &[]).unwrap_err();
        assert!(matches!(e, ImageError::Outside { .. }), "{backing}: {e}");
    }
    let backings = [
        "nbd://127.0.0.1:1/x",
        "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
    ];
    for (n, backing) in backings.into_iter().enumerate() {
        let path = evil(10 + n);
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw",
        ];
        run("qemu-img", &[&args[..], &[text(&path), "6M"]].concat());
        let e = open(&path, &[]).unwrap_err();
        assert!(
            matches!(e, ImageError::NotAFileName { .. }),
            "{backing}: {e}"
        );
    }
    // Allowed: the directory, or the file.
    let path = evil(20);
    let args = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        text(&secret),
        "-F",
        "raw",
        text(&path),
    ];
    run("qemu-img", &args);
    for allow in [outside.path().to_owned(), secret.clone()] {
        assert_eq!(open(&path, &[allow]).unwrap().levels().len(), 2);
    }
    // Backing files in a circle.
    for (name, backing) in [("a.qcow2", "b.qcow2"), ("b.qcow2", "a.qcow2")] {
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2",
        ];
        run(
            "qemu-img",
            &[&args[..], &[text(&f.path(name)), "1M"]].concat(),
        );
    }
    let e = open(&f.path("a.qcow2"), &[]).unwrap_err();
    assert!(matches!(e, ImageError::TooDeep { .. }), "{e}");

    // vmdk descriptors, as text and inside a sparse header that has capacity 0.
    let descriptor = |extent: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\n\n{extent}\n"
        )
    };
    let shadow = format!("RW 12288 FLAT \"{}\" 0", text(&secret));
    let path = write(f.folder.path(), "evil.vmdk", descriptor(&shadow).as_bytes());
    assert!(matches!(open(&path, &[]), Err(ImageError::Outside { .. })));
    assert!(open(&path, std::slice::from_ref(&secret)).is_ok());
    let url = descriptor("RW 12288 FLAT \"nbd://127.0.0.1:1/x\" 0");
    let path = write(f.folder.path(), "url.vmdk", url.as_bytes());
    assert!(matches!(
        open(&path, &[]),
        Err(ImageError::NotAFileName { .. })
    ));
    let mut sparse = vec![0; 2048];
    sparse[..4].copy_from_slice(b"KDMV");
    sparse[4] = 1;
    sparse[28] = 1;
    sparse[36] = 2;
    sparse[512..512 + descriptor(&shadow).len()].copy_from_slice(descriptor(&shadow).as_bytes());
    let path = write(f.folder.path(), "inner.vmdk", &sparse);
    assert!(matches!(open(&path, &[]), Err(ImageError::Outside { .. })));
    let nested = descriptor("RW 12288 SPARSE \"inner.vmdk\"");
    let path = write(f.folder.path(), "nested.vmdk", nested.as_bytes());
    assert!(matches!(open(&path, &[]), Err(ImageError::Damaged { .. })));
}
