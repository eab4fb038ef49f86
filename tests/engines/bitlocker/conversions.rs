//! Conversions of guests with BitLocker.

use super::*;

/// A Windows with BitLocker's places in it, plain; and the same encrypted.
struct Locked {
    lab: Lab,
    places: Reserved,
    disk: PathBuf,
}

fn locked(locks: &[Lock]) -> Locked {
    let lab = Lab::new(GuestSpec {
        disk_size: 512 << 20,
        recovery: false,
        ..GuestSpec::new(WinVersion::Win10)
    });
    let (disk, places) = lock(&lab, &lab.raw, locks);
    Locked { lab, places, disk }
}

/// A copy of the disk whose Windows volume is encrypted.
fn lock(lab: &Lab, plain: &Path, locks: &[Lock]) -> (PathBuf, Reserved) {
    let part = lab.spec.partition(Role::Windows).unwrap();
    let raw: Arc<dyn BlockWrite> = Arc::new(FileDisk::open_rw(plain).unwrap());
    let layout = partition::read_layout(raw.as_ref()).unwrap();
    let places = bitlocker::reserve(raw, &layout, VolumeId::new(part.index)).unwrap();
    let disk = lab.path("locked.raw");
    // Everything but the Windows volume.
    let (from, to) = (plain.to_str().unwrap(), disk.to_str().unwrap());
    tool("cp", &["--sparse=always", from, to]);
    let hole = format!("--offset={}", part.start);
    tool(
        "fallocate",
        &[
            "--punch-hole",
            &hole,
            &format!("--length={}", part.size),
            to,
        ],
    );
    encrypt_at(
        plain,
        &disk,
        part.start,
        part.size,
        &Spec::new(Method::XtsAes128, locks, places),
    );
    (disk, places)
}

impl Locked {
    /// The disk with the Windows volume as dislocker decrypts it.
    fn decrypted(&self, disk: &Path, kind: &str, key: &str) -> PathBuf {
        let part = self.lab.spec.partition(Role::Windows).unwrap();
        let (volume, out) = (
            self.lab.path("volume.dislocked"),
            self.lab.path("decrypted.raw"),
        );
        let _ = fs::remove_file(&volume);
        dislocker(disk, part.start, kind, key, &volume);
        tool(
            "cp",
            &[
                "--sparse=always",
                disk.to_str().unwrap(),
                out.to_str().unwrap(),
            ],
        );
        let (from, to) = (
            format!("if={}", volume.display()),
            format!("of={}", out.display()),
        );
        let seek = format!("seek={}", part.start);
        let how = ["bs=1M", "oflag=seek_bytes", "conv=notrunc", "status=none"];
        tool("dd", &[&[from.as_str(), &to, &seek][..], &how].concat());
        out
    }

    fn convert(&self, source: &Path, out: &str, more: &[&str]) -> Run {
        let out = self.lab.path(out);
        let mut args = vec![
            "convert",
            source.to_str().unwrap(),
            "--json",
            "--format",
            "raw",
        ];
        args.extend([
            "-o",
            out.to_str().unwrap(),
            "--virtio-iso",
            virtio_win().to_str().unwrap(),
        ]);
        args.extend(more);
        h2k(args)
    }
}

fn findings(report: &Value) -> BTreeMap<String, String> {
    let list = report["findings"].as_array().unwrap().iter();
    let text = |f: &Value, key: &str| f[key].as_str().unwrap().to_string();
    list.map(|f| (text(f, "id"), text(f, "message"))).collect()
}

/// The files that differ are those that two conversions of one plain guest differ in.
fn same_guest(locked: &Locked, expected: &Path, found: &Path) {
    let (want, have) = (tree(expected), tree(found));
    let names = |tree: &BTreeMap<(u32, String), _>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&want), names(&have));
    for (path, contents) in &want {
        // Hives follow; a page file is emptied where the disk itself holds it.
        let apart =
            path.1.contains("/config/") || path.1.ends_with(".sys") && !path.1.contains('/');
        assert!(apart || have[path] == *contents, "{path:?}");
    }
    assert!(security(&locked.lab, expected) == security(&locked.lab, found));
    for (hive, prefix) in &HIVES[..2] {
        let text = |disk| hive_text(&locked.lab, disk, hive, prefix);
        equal_lines(hive, &text(expected), &text(found));
    }
    let volume = locked.lab.volume(found);
    tool("ntfsfix", &["--no-action", volume.to_str().unwrap()]);
}

#[test]
fn a_conversion_equals_that_of_the_same_guest_without_bitlocker() {
    if !have(&TOOLS) || !have(&["dislocker-file", "ntfssecaudit", "fallocate"]) {
        return;
    }
    let locked = locked(&ALL);
    let report = locked
        .convert(&locked.lab.raw, "plain", &[])
        .expect(0)
        .json();
    let expected = PathBuf::from(report["outputs"]["disks"][0].as_str().unwrap());

    // Two keys, the wrong one first, in a file each.
    let mut keys = Vec::new();
    for (name, key) in [("other-key", OTHER_KEY), ("key", RECOVERY)] {
        fs::write(locked.lab.path(name), format!("{key}\r\n")).unwrap();
        keys.push(format!("all:file:{}", locked.lab.path(name).display()));
    }
    let args = ["--key", &keys[0], "--key", &keys[1]];
    let run = locked.convert(&locked.disk, "out", &args).expect(0);
    assert!(!run.stderr.contains("appliance"), "{}", run.stderr);
    let by_key = run.json();
    assert_eq!(by_key["engine"], "embedded");
    assert_eq!(
        by_key["engine_why"],
        "BitLocker is opened in this process, no appliance is needed"
    );
    assert_eq!(by_key["ready"], true);
    assert_eq!(by_key["actions"], report["actions"]);
    let state = &by_key["inspection"]["disks"][0]["partitions"];
    let windows = state
        .as_array()
        .unwrap()
        .iter()
        .find(|p| p["state"]["container"] == "bitlocker");
    assert_eq!(windows.unwrap()["filesystem"], "ntfs");
    assert!(findings(&by_key["inspection"]).contains_key("bitlocker-opened"));
    // Free clusters were not copied although they are encrypted.
    let trim = &by_key["trim"][0]["volumes"].as_array().unwrap();
    assert!(
        trim.iter()
            .any(|v| v["filesystem"] == "ntfs" && v["kept"].is_null()),
        "{trim:?}"
    );
    // No key in anything that is kept.
    for file in walk(&locked.lab.path("out")) {
        let bytes = fs::read(&file).unwrap();
        let at = bytes
            .windows(RECOVERY.len())
            .position(|w| w == RECOVERY.as_bytes());
        assert_eq!(at, None, "{}", file.display());
    }

    let converted = PathBuf::from(by_key["outputs"]["disks"][0].as_str().unwrap());
    // It is as encrypted as it was.
    h2k(["verify", converted.to_str().unwrap(), "--json"]).expect(4);
    h2k([
        "verify",
        converted.to_str().unwrap(),
        "--json",
        "--key",
        &keys[1],
    ])
    .expect(0);
    // What `boot` reads between the boots.
    let proof = |keys: &[String]| {
        let (keys, _) = Keys::parse(keys).unwrap();
        let disk = proof::GuestDisk {
            path: converted.clone(),
            format: "raw".to_owned(),
            keys: &keys,
            source: &[],
        };
        proof::read(&disk, DiskBus::VirtioBlk)
    };
    assert!(proof(&keys[..1]).is_err(), "the wrong key");
    let proof = proof(&keys).unwrap();
    assert!(!proof.bound && proof.clean_shutdown, "{proof:?}");
    let decrypted = locked.decrypted(&converted, "password", PASSWORD);
    same_guest(&locked, &expected, &decrypted);
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(walk(&path)),
            false => files.push(path),
        }
    }
    files
}

#[test]
fn a_suspended_windows_is_converted_in_place_and_back() {
    if !have(&TOOLS) || !have(&["dislocker-file", "ntfssecaudit", "fallocate"]) {
        return;
    }
    let locked = locked(&[Lock::ClearKey, Lock::RecoveryPassword(RECOVERY), Lock::Tpm]);
    let report = locked
        .convert(&locked.lab.raw, "plain", &["--no-trim"])
        .expect(0);
    let expected = PathBuf::from(report.json()["outputs"]["disks"][0].as_str().unwrap());
    let source = locked.disk.to_str().unwrap();
    let inspected = h2k(["inspect", source, "--json"]).expect(0).json();
    assert_eq!(inspected["bitlocker"], true);
    let said = &findings(&inspected)["bitlocker-suspended"];
    assert!(said.contains("stays so"), "{said}");
    let driver_source = virtio_win().to_str().unwrap();
    h2k(["plan", source, "--json", "--virtio-iso", driver_source]).expect(0);

    let before = sha256(&locked.disk);
    let out = locked.lab.path("in-place");
    let args = [
        "--in-place",
        "-o",
        out.to_str().unwrap(),
        "--virtio-iso",
        driver_source,
        "--json",
    ];
    let run = h2k([&["convert", source][..], &args].concat())
        .expect(0)
        .json();
    assert_eq!(run["engine"], "embedded");
    assert_ne!(sha256(&locked.disk), before);
    h2k(["verify", source, "--json"]).expect(0);
    // Still suspended, still encrypted, and its own places are what they were.
    let again = h2k(["inspect", source, "--json"]).expect(0).json();
    assert!(findings(&again).contains_key("bitlocker-suspended"));
    let decrypted = locked.decrypted(&locked.disk, "recovery", RECOVERY);
    same_guest(&locked, &expected, &decrypted);
    h2k(["rollback", out.to_str().unwrap()]).expect(0);
    assert_eq!(sha256(&locked.disk), before);
}

/// The boot files on a disk of their own, as they came, and Windows on an encrypted one.
#[test]
fn boot_files_on_another_disk_than_the_encrypted_windows() {
    if !have(&TOOLS) || !have(&["fallocate"]) {
        return;
    }
    let lab = Lab::new(GuestSpec {
        disk_size: 512 << 20,
        recovery: false,
        ..GuestSpec::new(WinVersion::Win10)
    });
    let split = lab.split();
    let (disk, _) = lock(&lab, &split.windows, &ALL);
    let source = lab.libvirt_xml("apart", &[&split.boot, &disk]);
    let out = lab.path("out");
    let index = lab.spec.partition(Role::Windows).unwrap().index;
    fs::write(lab.path("key"), RECOVERY).unwrap();
    let key = |disk: u32| format!("{disk}/{index}:file:{}", lab.path("key").display());
    let (source, to) = (source.to_str().unwrap(), out.to_str().unwrap());
    let iso = virtio_win();
    let convert = |key: &str| {
        h2k([
            "convert",
            source,
            "-o",
            to,
            "--virtio-iso",
            iso.to_str().unwrap(),
            "--json",
            "--key",
            key,
        ])
    };
    // The key is that of another disk's partition.
    let run = convert(&key(1)).expect(3);
    assert!(run.stdout.contains("\"bitlocker\""), "{}", run.stdout);
    let report = convert(&key(2)).expect(0).json();
    assert_eq!(
        (&report["engine"], &report["ready"]),
        (&"embedded".into(), &true.into())
    );
    let xml = report["outputs"]["final_xml"].as_str().unwrap();
    assert_eq!(report["outputs"]["disks"].as_array().unwrap().len(), 2);
    h2k(["verify", xml, "--json"]).expect(4);
    h2k(["verify", xml, "--json", "--key", &key(2)]).expect(0);
}

#[test]
fn volumes_that_stay_closed_say_why_and_what_helps() {
    if !have(&TOOLS) || !have(&["fallocate"]) {
        return;
    }
    let locked = locked(&ALL);
    let part = locked.lab.spec.partition(Role::Windows).unwrap();
    let source = locked.disk.to_str().unwrap();
    let refused = |more: &[&str], id: &str, says: &str, remedy: &str| {
        let started = std::time::Instant::now();
        let run = locked.convert(&locked.disk, "refused", more).expect(3);
        let took = started.elapsed();
        let blockers = run.json()["error"]["blockers"].clone();
        let blocker = blockers
            .as_array()
            .unwrap()
            .iter()
            .find(|b| b["code"] == id);
        let blocker = blocker.unwrap_or_else(|| panic!("{id}: {blockers}"));
        let text = |key: &str| blocker[key].as_str().unwrap().to_string();
        assert!(text("reason").contains(says), "{blocker}");
        assert!(text("remedy").contains(remedy), "{blocker}");
        assert!(!run.stdout.contains(OTHER_KEY) && !run.stderr.contains(OTHER_KEY));
        took
    };
    refused(&[], "bitlocker", "no key was given for it", "--key");
    fs::write(locked.lab.path("wrong"), OTHER_KEY).unwrap();
    let wrong = format!("all:file:{}", locked.lab.path("wrong").display());
    let took = refused(
        &["--key", &wrong],
        "bitlocker",
        "none of the 1 keys",
        "--key",
    );
    eprintln!("a wrong recovery password: {took:?}");
    fs::write(locked.lab.path("typo"), RECOVERY.replacen("22", "23", 1)).unwrap();
    let typo = format!("all:file:{}", locked.lab.path("typo").display());
    refused(&["--key", &typo], "bitlocker", "group 2 of 8", "--key");
    // A startup key of another volume, and the right one.
    fs::write(
        locked.lab.path("other.bek"),
        startup_key_file([1; 16], &[1; 32]),
    )
    .unwrap();
    let other = format!("all:file:{}", locked.lab.path("other.bek").display());
    refused(
        &["--key", &other],
        "bitlocker",
        "none of the 1 keys",
        "--key",
    );
    fs::write(
        locked.lab.path("right.BEK"),
        startup_key_file([0x42; 16], &[0x17; 32]),
    )
    .unwrap();
    let right = format!("all:file:{}", locked.lab.path("right.BEK").display());
    for engine in ["auto", "embedded"] {
        let args = [
            "inspect", source, "--json", "--engine", engine, "--key", &right,
        ];
        let seen = h2k(args).expect(0).json();
        assert_eq!(seen["os"]["family"], "windows", "{engine}");
    }

    // Only the metadata decides what follows.
    let plain = FileDisk::open(&locked.lab.raw).unwrap();
    let disk = FileDisk::open_rw(&locked.disk).unwrap();
    let rewrite = |change: fn(&mut Spec)| {
        let mut spec = Spec::new(Method::XtsAes128, &[Lock::Tpm], locked.places);
        change(&mut spec);
        bitlocker::write_metadata(&plain, &disk, part.start, part.size, &spec).unwrap();
    };
    rewrite(|_| {});
    let remedy = "manage-bde -protectors -disable C: -rc 0";
    refused(
        &["--key", &wrong],
        "bitlocker",
        "unlocked by TPM only",
        remedy,
    );
    for (states, says) in [
        ((2, 4), "encrypting the volume"),
        ((5, 1), "decrypting the volume"),
        ((3, 1), "paused"),
    ] {
        match states {
            (2, 4) => rewrite(|s| s.states = (2, 4)),
            (5, 1) => rewrite(|s| s.states = (5, 1)),
            _ => rewrite(|s| s.states = (3, 1)),
        }
        refused(&[], "bitlocker-converting", says, "manage-bde -status");
    }
    rewrite(|s| s.encrypts_on_write = true);
    refused(
        &[],
        "bitlocker-converting",
        "encrypt-on-write",
        "manage-bde -status",
    );
    // All copies damaged.
    for place in locked.places.copies {
        disk.write_at(part.start + place + 70, &[0xff; 8]).unwrap();
    }
    refused(&["--key", &wrong], "bitlocker", "the CRC-32 is", "--key");
}

/// cryptsetup in the appliance opens what `--engine guestfish` is asked to open.
#[test]
#[ignore = "an appliance and a key to stretch: cargo test --test engines -- --ignored"]
fn the_appliance_opens_it_when_asked() {
    if !ready() || !have(&["fallocate"]) {
        return;
    }
    let locked = locked(&ALL);
    fs::write(locked.lab.path("key"), RECOVERY).unwrap();
    let windows = locked.lab.spec.partition(Role::Windows).unwrap().index;
    let key = format!("{windows}:file:{}", locked.lab.path("key").display());
    let mut command = Command::new(support::binary());
    command.args([
        "inspect",
        locked.disk.to_str().unwrap(),
        "--json",
        "--engine",
        "guestfish",
    ]);
    command
        .args(["--key", &key])
        .env("LIBGUESTFS_BACKEND", "direct");
    let report = support::finish(command).expect(0).json();
    let found = findings(&report);
    assert!(found.contains_key("bitlocker-opened"), "{found:#?}");
}
