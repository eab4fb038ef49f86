//! Mirrors of a local directory that plays the other host.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::disk::export::Export;
use crate::disk::links;
use crate::disk::testing::{Served, cowd, have, pattern, run, se_sparse, text, write};
use crate::disk::{Image, ImageError};
use crate::source::{self, SourceError};

struct Folder(PathBuf);

impl Folder {
    fn local(&self, at: &Location) -> PathBuf {
        self.0.join(at.path().trim_start_matches('/'))
    }
}

impl Host for Folder {
    fn open(&self, at: &Location) -> Result<Arc<dyn RemoteFile>> {
        let path = self.local(at);
        match path.metadata() {
            Ok(meta) if meta.is_file() => Ok(Served::new(&path)),
            Ok(_) => Err(WireError::failed(at, "no file", "")),
            Err(_) => Err(WireError::NotFound { at: at.to_string() }),
        }
    }

    fn read(&self, at: &Location, most: u64) -> Result<Vec<u8>> {
        let bytes = fs::read(self.local(at)).map_err(|e| WireError::failed(at, e, ""))?;
        let size = bytes.len() as u64;
        match size > most {
            true => Err(WireError::TooLarge {
                at: at.to_string(),
                size,
                most,
            }),
            false => Ok(bytes),
        }
    }

    fn list(&self, at: &Location) -> Result<Vec<Listed>> {
        let cannot = |e: io::Error| WireError::failed(at, e, "");
        let mut listed = Vec::new();
        for entry in fs::read_dir(self.local(at)).map_err(cannot)? {
            let entry = entry.unwrap();
            let meta = entry.path().metadata().unwrap();
            listed.push(Listed {
                name: entry.file_name().into_string().unwrap(),
                is_directory: meta.is_dir(),
                size: Some(meta.len()),
                modified: Some(meta.mtime() as u64),
            });
        }
        Ok(listed)
    }
}

/// Another host and its mirror.
struct Lab {
    host: tempfile::TempDir,
    here: RefCell<Vec<tempfile::TempDir>>,
}

impl Lab {
    fn new() -> Self {
        Self {
            host: tempfile::tempdir().unwrap(),
            here: RefCell::default(),
        }
    }

    fn folder(&self, name: &str) -> PathBuf {
        let folder = self.host.path().join(name);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn mirror(&self, path: &str) -> Result<PathBuf> {
        let at = Location::parse(&format!("ssh://host{path}"))
            .unwrap()
            .unwrap();
        let here = tempfile::tempdir().unwrap();
        let root = here.path().canonicalize().unwrap();
        self.here.borrow_mut().push(here);
        remote::register_root(&root, "ssh://host");
        let host = Arc::new(Folder(self.host.path().to_owned()));
        Mirror::new(host, &root).source(&at)
    }
}

fn contents(image: &Image) -> Vec<u8> {
    let export = Export::open_readonly(image).unwrap();
    let disk = export.disk();
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(0, &mut bytes).unwrap();
    export.close().unwrap();
    bytes
}

/// Reads through QEMU, even if this process could read the image.
fn by_qemu(image: &Image) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let overlay = folder.path().join("overlay.qcow2");
    let export = Export::open_overlay(image, &overlay).unwrap();
    let disk = export.disk();
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(0, &mut bytes).unwrap();
    export.close().unwrap();
    bytes
}

/// Reads like a copy, with several threads and without a storage daemon.
fn by_a_copy(image: &Image) -> Vec<u8> {
    const PART: usize = 300_000;
    let export = Export::open_for_copy(image).unwrap();
    assert_eq!(export.daemon_id(), None);
    let disk = export.disk();
    let mut bytes = vec![0; disk.size() as usize];
    std::thread::scope(|scope| {
        for (i, part) in bytes.chunks_mut(PART).enumerate() {
            let disk = &disk;
            scope.spawn(move || disk.read_at((i * PART) as u64, part).unwrap());
        }
    });
    export.close().unwrap();
    bytes
}

fn image(path: &Path) -> Image {
    Image::open_info(path, None, &[]).unwrap()
}

fn descriptor(parent: Option<(&str, &str)>, kind: &str, extents: &str) -> String {
    let (id, hint) = parent.map_or(("ffffffff", String::new()), |(id, name)| {
        (id, format!("parentFileNameHint=\"{name}\"\n"))
    });
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID={id}\ncreateType=\"{kind}\"\n\
         {hint}{extents}\n"
    )
}

const SIZE: usize = 4 << 20;

#[test]
fn a_machine_with_flat_disks_reads_as_it_does_there() {
    if !have(&["qemu-img", "qemu-storage-daemon"]) {
        return;
    }
    let lab = Lab::new();
    let (vm, other) = (
        lab.folder("vmfs/volumes/ds1/vm"),
        lab.folder("vmfs/volumes/ds2/vm"),
    );
    let flat = pattern(SIZE);
    let line = |name: &str| format!("RW {} VMFS \"{name}\"", SIZE / 512);
    write(
        &vm,
        "vm.vmdk",
        descriptor(None, "vmfs", &line("vm-flat.vmdk")).as_bytes(),
    );
    write(&vm, "vm-flat.vmdk", &flat);
    // In pieces, with a hole, on another datastore.
    let pieces = "RW 2048 FLAT \"b-f001.vmdk\" 128\nRW 1024 ZERO\nRW 4096 FLAT \"b-f002.vmdk\" 0";
    write(
        &other,
        "b.vmdk",
        descriptor(None, "twoGbMaxExtentFlat", pieces).as_bytes(),
    );
    write(&other, "b-f001.vmdk", &flat[..(2048 + 128) * 512]);
    write(
        &other,
        "b-f002.vmdk",
        &flat[1 << 20..(1 << 20) + 4096 * 512],
    );
    write(
        &vm,
        "vm.vmx",
        b"displayName = \"web\"\nmemsize = \"2048\"\nscsi0.present = \"TRUE\"\n\
          scsi0:0.present = \"TRUE\"\nscsi0:0.fileName = \"vm.vmdk\"\n\
          scsi0:1.present = \"TRUE\"\nscsi0:1.fileName = \"/vmfs/volumes/ds2/vm/b.vmdk\"\n",
    );
    let path = lab.mirror("/vmfs/volumes/ds1/vm/vm.vmx").unwrap();
    let vm = source::open(&path).unwrap();
    assert_eq!((vm.name.as_str(), vm.memory_mib), ("web", Some(2048)));
    let disks: Vec<Image> = vm.disks.iter().map(|disk| image(&disk.path)).collect();
    assert!(contents(&disks[0]) == flat && by_qemu(&disks[0]) == flat);
    let mut want = flat[128 * 512..(2048 + 128) * 512].to_vec();
    want.resize(want.len() + 1024 * 512, 0);
    want.extend(&flat[1 << 20..(1 << 20) + 4096 * 512]);
    assert!(contents(&disks[1]) == want && by_qemu(&disks[1]) == want);
    for disk in &disks {
        disk.check_unchanged().unwrap();
        disk.check().unwrap();
        assert_eq!(disk.format().driver(), "vmdk");
    }
    let there = lab.host.path().join("vmfs/volumes/ds1/vm/vm-flat.vmdk");
    fs::File::options()
        .append(true)
        .open(there)
        .unwrap()
        .set_len(SIZE as u64 + 512)
        .unwrap();
    assert!(matches!(
        disks[0].check_unchanged(),
        Err(ImageError::Changed { .. })
    ));
}

#[test]
fn an_overlay_on_a_disk_there_is_copied_without_a_storage_daemon() {
    if !have(&["qemu-img", "qemu-storage-daemon"]) {
        return;
    }
    let lab = Lab::new();
    write(&lab.folder("d"), "disk.raw", &pattern(SIZE));
    let source = Image::open_info(&lab.mirror("/d/disk.raw").unwrap(), Some("raw"), &[]).unwrap();
    assert!(by_a_copy(&source) == pattern(SIZE));
    let here = tempfile::tempdir().unwrap();
    let export = Export::open_overlay(&source, &here.path().join("overlay.qcow2")).unwrap();
    let disk = export.disk();
    for (at, value) in [(0, 1), (1 << 20, 2), (SIZE as u64 - 700, 3)] {
        disk.write_at(at, &[value; 700]).unwrap();
    }
    disk.zero_at(2 << 20, 128 << 10).unwrap();
    let image = export.image().clone();
    export.close().unwrap();
    let mut want = pattern(SIZE);
    for (at, value) in [(0, 1), (1 << 20, 2), (SIZE - 700, 3)] {
        want[at..at + 700].fill(value);
    }
    want[2 << 20..(2 << 20) + (128 << 10)].fill(0);
    assert!(by_a_copy(&image) == want);
    assert!(contents(&image) == want, "through one connection");
}

#[test]
fn links_of_esxi_on_a_flat_base() {
    if !have(&["qemu-img", "qemu-storage-daemon"]) {
        return;
    }
    let lab = Lab::new();
    let vm = lab.folder("vm");
    let base = pattern(SIZE);
    let sectors = SIZE as u64 / 512;
    let line = |kind: &str, name: &str| format!("RW {sectors} {kind} \"{name}\"");
    write(
        &vm,
        "vm.vmdk",
        descriptor(None, "vmfs", &line("VMFS", "vm-flat.vmdk")).as_bytes(),
    );
    write(&vm, "vm-flat.vmdk", &base);
    cowd(
        &vm.join("vm-000001-delta.vmdk"),
        sectors as u32,
        &[(1, [0x11; 512]), (4097, [0x12; 512])],
    );
    let first = descriptor(
        Some(("00000001", "vm.vmdk")),
        "vmfsSparse",
        &line("VMFSSPARSE", "vm-000001-delta.vmdk"),
    );
    write(&vm, "vm-000001.vmdk", first.as_bytes());
    let grains = [
        (1, Some([0x21; 4096])),
        (2, None),
        (512, Some([0x22; 4096])),
    ];
    se_sparse(&vm.join("vm-000002-sesparse.vmdk"), sectors, &grains);
    let second = descriptor(
        Some(("00000001", "vm-000001.vmdk")),
        "seSparse",
        &line("SESPARSE", "vm-000002-sesparse.vmdk"),
    );
    write(&vm, "vm-000002.vmdk", second.as_bytes());

    // QEMU's reading of the same image as local files.
    let local = by_qemu(&image(&vm.join("vm-000002.vmdk")));
    let mut want = base.clone();
    want[512..1024].fill(0x11);
    want[4097 * 512..4098 * 512].fill(0x12);
    let older = want.clone();
    want[4096..8192].fill(0x21);
    want[8192..12288].fill(0);
    want[512 * 4096..513 * 4096].fill(0x22);
    assert!(local == want, "the generators");

    let path = lab.mirror("/vm/vm-000002.vmdk").unwrap();
    let newest = image(&path);
    assert!(contents(&newest) == want && by_qemu(&newest) == want);
    newest.check().unwrap();
    // An older link is detected by the files beside it.
    let path = lab.mirror("/vm/vm-000001.vmdk").unwrap();
    let newer = links::newer(&path);
    assert!(
        newer
            .last()
            .is_some_and(|link| link.ends_with("vm-000002.vmdk")),
        "{newer:?}"
    );
    assert!(contents(&image(&path)) == older);
}

#[test]
fn backing_files_are_found_there_and_never_here() {
    if !have(&["qemu-img", "qemu-storage-daemon"]) {
        return;
    }
    let lab = Lab::new();
    let images = lab.folder("images");
    let data = pattern(SIZE);
    let raw = write(&images, "base.raw", &data);
    let over = |name: &str, backing: &str| {
        let path = images.join(name);
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-u",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                backing,
                text(&path),
                "4M",
            ],
        );
    };
    for (name, backing) in [
        ("relative.qcow2", "base.raw"),
        ("absolute.qcow2", "/images/base.raw"),
    ] {
        over(name, backing);
        let path = lab.mirror(&format!("/images/{name}")).unwrap();
        assert!(contents(&image(&path)) == data, "{name}");
    }
    // The same file exists on this host under the same name.
    for backing in [
        text(&raw),
        "/etc/hostname",
        "nbd://127.0.0.1/x",
        "json:{\"driver\":\"null-co\"}",
    ] {
        over("hostile.qcow2", backing);
        let path = lab.mirror("/images/hostile.qcow2").unwrap();
        let error = Image::open_info(&path, None, &[]).unwrap_err();
        assert!(
            matches!(
                error,
                ImageError::Outside { .. }
                    | ImageError::NotAFileName { .. }
                    | ImageError::PartMissing { .. }
            ),
            "{backing}: {error}"
        );
    }
}

#[test]
fn descriptions_name_nothing_of_this_host() {
    let lab = Lab::new();
    let vm = lab.folder("vm");
    for name in [
        "/etc/hostname",
        "../../../../etc/hostname",
        "C:\\Windows\\win.ini",
    ] {
        let vmx = format!(
            "scsi0.present = \"TRUE\"\nscsi0:0.present = \"TRUE\"\nscsi0:0.fileName = \"{}\"\n",
            name.replace('\\', "|5C")
        );
        write(&vm, "vm.vmx", vmx.as_bytes());
        let xml = format!(
            "<domain type='kvm'><name>x</name><devices><disk type='file' device='disk'>\
             <source file='{name}'/><target dev='sda'/></disk></devices></domain>"
        );
        write(&vm, "vm.xml", xml.as_bytes());
        for file in ["/vm/vm.vmx", "/vm/vm.xml"] {
            let error = match lab.mirror(file) {
                Ok(path) => source::open(&path).unwrap_err(),
                Err(_) => continue,
            };
            assert!(
                matches!(
                    error,
                    SourceError::MissingDisk { .. } | SourceError::Outside { .. }
                ),
                "{file} {name}: {error}"
            );
        }
    }
}

#[test]
fn a_vm_that_runs_is_noticed() {
    let lab = Lab::new();
    let vm = lab.folder("vm");
    let line = "RW 8 VMFS \"vm-flat.vmdk\"";
    write(&vm, "vm.vmdk", descriptor(None, "vmfs", line).as_bytes());
    write(&vm, "vm-flat.vmdk", &[7; 4096]);
    Image::open_info(&lab.mirror("/vm/vm.vmdk").unwrap(), None, &[]).unwrap();
    for lock in ["vm.vmdk.lck/M1.lck", ".lck-3409000000000000"] {
        let lab = Lab::new();
        let there = lab.folder("vm");
        for file in ["vm.vmdk", "vm-flat.vmdk"] {
            fs::copy(vm.join(file), there.join(file)).unwrap();
        }
        let lock = there.join(lock);
        fs::create_dir_all(lock.parent().unwrap()).unwrap();
        fs::write(&lock, "").unwrap();
        let path = lab.mirror("/vm/vm.vmdk").unwrap();
        let error = Image::open_info(&path, None, &[]).unwrap_err();
        assert!(matches!(error, ImageError::VmwareLock { .. }), "{error}");
    }
}

#[test]
fn an_ova_is_read_in_place() {
    if !have(&["qemu-img", "qemu-storage-daemon", "tar"]) {
        return;
    }
    let lab = Lab::new();
    let folder = lab.folder("export");
    let raw = write(&folder, "d.raw", &pattern(SIZE));
    let disk = folder.join("vm-disk1.vmdk");
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            "subformat=streamOptimized",
            text(&raw),
            text(&disk),
        ],
    );
    let ovf = "<Envelope><References><File id='f1' href='vm-disk1.vmdk'/></References><DiskSection>\
               <Disk diskId='d1' fileRef='f1' capacity='4194304'/></DiskSection><VirtualSystem id='vm'>\
               <Name>from-ova</Name><VirtualHardwareSection><Item><InstanceID>3</InstanceID>\
               <ResourceType>6</ResourceType></Item><Item><InstanceID>4</InstanceID><ResourceType>17</ResourceType>\
               <HostResource>ovf:/disk/d1</HostResource><Parent>3</Parent></Item></VirtualHardwareSection>\
               </VirtualSystem></Envelope>";
    write(&folder, "vm.ovf", ovf.as_bytes());
    run(
        "tar",
        &[
            "-C",
            text(&folder),
            "-cf",
            text(&folder.join("vm.ova")),
            "vm.ovf",
            "vm-disk1.vmdk",
        ],
    );
    for file in ["vm.ovf", "vm-disk1.vmdk", "d.raw"] {
        fs::rename(folder.join(file), lab.host.path().join(file)).unwrap();
    }
    let path = lab.mirror("/export/vm.ova").unwrap();
    let vm = source::open(&path).unwrap();
    assert_eq!(vm.name, "from-ova");
    let image = Image::open_info(&vm.disks[0].path, Some("vmdk"), &[]).unwrap();
    assert!(contents(&image) == fs::read(lab.host.path().join("d.raw")).unwrap());
}

#[test]
fn a_directory_shows_its_machines() {
    if !have(&["qemu-img", "qemu-storage-daemon"]) {
        return;
    }
    let lab = Lab::new();
    for name in ["web", "db"] {
        let vm = lab.folder(&format!("ds1/{name}"));
        let line = format!("RW 256 VMFS \"{name}-flat.vmdk\"");
        write(
            &vm,
            &format!("{name}.vmdk"),
            descriptor(None, "vmfs", &line).as_bytes(),
        );
        write(&vm, &format!("{name}-flat.vmdk"), &pattern(128 << 10));
        let vmx = format!(
            "displayName = \"{name}\"\nscsi0.present = \"TRUE\"\nscsi0:0.present = \"TRUE\"\n\
             scsi0:0.fileName = \"{name}.vmdk\"\n"
        );
        write(&vm, &format!("{name}.vmx"), vmx.as_bytes());
    }
    let path = lab.mirror("/ds1").unwrap();
    let found = source::find::below(&path).unwrap();
    let names: Vec<_> = found
        .iter()
        .map(|f| f.strip_prefix(&path).unwrap())
        .collect();
    assert_eq!(names, [Path::new("db/db.vmx"), Path::new("web/web.vmx")]);
    let vm = source::open(&found[0]).unwrap();
    assert!(contents(&image(&vm.disks[0].path)) == pattern(128 << 10));
}

#[test]
fn names_stay_below_the_root() {
    let root = Path::new("/r");
    for (name, want) in [
        ("a/b", Some("/r/a/b")),
        ("/a", Some("/r/a")),
        ("./a", Some("/r/a")),
        ("..", None),
        ("a/../../b", None),
        ("", None),
        ("/", None),
    ] {
        assert_eq!(
            below(root, Path::new(name)).as_deref(),
            want.map(Path::new),
            "{name}"
        );
    }
    for (name, plain) in [
        ("a", true),
        ("..", false),
        ("a/b", false),
        ("", false),
        (".", false),
    ] {
        assert_eq!(one_name(root, name).is_some(), plain, "{name}");
    }
    assert_eq!(normal(Path::new("a/../b")).as_deref(), Some(Path::new("b")));
    assert_eq!(normal(Path::new("a/../../b")), None);
    for (name, want) in [
        ("[ds 1] vm/vm.vmdk", "/vmfs/volumes/ds 1/vm/vm.vmdk"),
        ("C:\\VMs\\vm.vmdk", "vm.vmdk"),
        ("sub\\vm.vmdk", "sub/vm.vmdk"),
        ("vm.vmdk", "vm.vmdk"),
    ] {
        assert_eq!(remote_path(name), want);
    }
}

#[test]
fn every_format_reads_as_it_does_there() {
    if !have(&["qemu-img", "qemu-storage-daemon"]) {
        return;
    }
    let lab = Lab::new();
    let images = lab.folder("images");
    let data = pattern(SIZE);
    let raw = write(&images, "disk.raw", &data);
    for (format, options, name) in [
        ("qcow2", "compat=1.1", "a.qcow2"),
        ("vmdk", "subformat=monolithicSparse", "sparse.vmdk"),
        ("vmdk", "subformat=streamOptimized", "stream.vmdk"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "split.vmdk"),
        ("vhdx", "subformat=dynamic", "a.vhdx"),
        ("vpc", "subformat=dynamic,force_size=on", "dynamic.vhd"),
        ("vpc", "subformat=fixed,force_size=on", "fixed.vhd"),
        ("vdi", "static=off", "a.vdi"),
        ("raw", "size=4M", "b.img"),
    ] {
        let path = images.join(name);
        if format == "raw" {
            fs::copy(&raw, &path).unwrap();
        } else {
            let args = ["convert", "-f", "raw", "-O", format, "-o", options];
            run(
                "qemu-img",
                &[&args[..], &[text(&raw), text(&path)]].concat(),
            );
        }
        let local = by_qemu(&image(&path));
        let there = lab.mirror(&format!("/images/{name}")).unwrap();
        let there = image(&there);
        assert_eq!(there.format().driver(), format, "{name}");
        assert!(
            by_qemu(&there) == local && contents(&there) == local,
            "{name}"
        );
        assert!(local[..SIZE] == data, "{name}");
        there.check().unwrap();
    }
    // VirtualBox's creator, whose geometry QEMU would use: the image gets another first sector.
    let path = images.join("dynamic.vhd");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 512;
    for at in [0, last] {
        let footer = &mut bytes[at..at + 512];
        footer[28..32].copy_from_slice(b"vbox");
        footer[64..68].fill(0);
        let sum: u32 = footer.iter().map(|b| u32::from(*b)).sum();
        footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    }
    write(&images, "vbox.vhd", &bytes);
    let there = image(&lab.mirror("/images/vbox.vhd").unwrap());
    assert!(by_qemu(&there) == by_qemu(&image(&images.join("vbox.vhd"))));
    assert_eq!(there.virtual_size(), SIZE as u64);
}
