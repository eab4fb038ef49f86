//! Volumes of every cipher and protector, read by other programs.

use super::*;

/// Each cipher and version, each protector at least twice.
#[test]
fn others_read_what_we_write_in_every_cipher() {
    if !have(&["mkntfs", "dislocker-file", "cryptsetup"]) {
        return;
    }
    let Some(python) = readers() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (plain, places) = plain_volume(dir.path());
    let bek = dir.path().join("startup.bek");
    let file = startup_key_file([0x42; 16], &[0x17; 32]);
    fs::write(&bek, &file).unwrap();
    let startup = StartupKey::parse(&file).unwrap();
    let text = Credential::Text;
    let keys = [
        ("recovery", RECOVERY, text(RECOVERY)),
        ("password", PASSWORD, text(PASSWORD)),
        (
            "file",
            bek.to_str().unwrap(),
            Credential::StartupKey(&startup),
        ),
    ];
    let mut shapes: Vec<(Method, bool, &[Lock])> = Method::ALL
        .into_iter()
        .map(|method| (method, false, &ALL[..]))
        .collect();
    shapes.push((Method::CbcAes128Diffuser, true, &ALL));
    shapes.push((Method::CbcAes256Diffuser, true, &ALL));
    shapes.push((Method::XtsAes128, false, &[Lock::ClearKey]));
    for (i, (method, vista, locks)) in shapes.into_iter().enumerate() {
        eprintln!("{} vista {vista} {locks:?}", method.name());
        let mut spec = Spec::new(method, locks, places);
        spec.vista = vista;
        let image = dir.path().join("locked");
        let _ = fs::remove_file(&image);
        encrypted(&plain, &image, &spec);
        let (kind, key, credential) = match locks {
            [Lock::ClearKey] => ("clear", "", text("")),
            _ => keys[i % keys.len()],
        };
        let list = dir.path().join("sectors");
        let expected = {
            let disk = open(&image, &[credential]);
            // What the maker encrypted is what it was, in whole.
            let mut bytes = vec![0; 4 << 20];
            disk.read_at(0, &mut bytes[..512]).unwrap();
            let mut wanted = vec![0; 512];
            FileDisk::open(&plain)
                .unwrap()
                .read_at(0, &mut wanted)
                .unwrap();
            assert!(bytes[..512] == wanted);
            write_sectors(&disk, &places, &list)
        };
        for program in ["dissect", "libbde"] {
            let said = read_by(&python, program, &image, [kind, key], &list);
            assert_eq!(said, expected, "{program}");
        }
        // Debian's dislocker (0.7.3) opens no volume of Vista, cryptsetup none at all.
        if !vista {
            let digest = by_dislocker(&image, kind, key, &list);
            assert_eq!(digest, expected, "dislocker");
            let dump = tool("cryptsetup", &["bitlkDump", image.to_str().unwrap()]);
            let dump = String::from_utf8_lossy(&dump).into_owned();
            let mode = [
                "cbc-elephant",
                "cbc-elephant",
                "cbc-eboiv",
                "cbc-eboiv",
                "xts-plain64",
                "xts-plain64",
            ];
            let number = usize::from(method.number() - 0x8000);
            assert!(dump.contains(mode[number]), "{dump}");
        }
    }
}

/// Volumes that Windows made, from the tests of dissect.fve: their file, and what opens them.
const OF_WINDOWS: [(&str, &str, &str); 11] = [
    ("aes_128", "password", "password12!@"),
    ("aes_256", "password", "password12!@"),
    ("aes_128_diffuser", "password", "password12!@"),
    ("aes_256_diffuser", "password", "password12!@"),
    ("aes-xts_128", "password", "password12!@"),
    ("aes-xts_256", "password", "password12!@"),
    (
        "recovery_password",
        "recovery",
        "284867-596541-514998-422114-660297-261613-215424-199408",
    ),
    ("recovery_key", "file", "recovery_key.bek"),
    ("startup_key", "file", "startup_key.bek"),
    ("suspended", "clear", ""),
    (
        "vista",
        "recovery",
        "517506-503998-044583-576191-587004-635965-501270-087802",
    ),
];

#[test]
fn volumes_that_windows_made() {
    let Some(python) = readers() else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/bitlocker-readers/dissect_fve-4.6/tests/_data/bde");
    if !folder.exists() {
        return support::skip(
            "bitlocker-images",
            format!("no {}: .ci/run unpacks it", folder.display()),
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("volume");
    let list = dir.path().join("sectors");
    for (name, kind, key) in OF_WINDOWS {
        let packed = folder.join(format!("{name}.bin.gz"));
        fs::write(&image, tool("gzip", &["-dc", packed.to_str().unwrap()])).unwrap();
        let key_file = folder.join(key);
        let startup = (kind == "file").then(|| {
            let bytes = fs::read(&key_file).unwrap();
            StartupKey::parse(&bytes).unwrap()
        });
        let credentials: Vec<Credential> = match (&startup, kind) {
            (Some(key), _) => vec![Credential::StartupKey(key)],
            (None, "clear") => Vec::new(),
            _ => vec![Credential::Text(key)],
        };
        // The images end where their data does, and the volumes do not.
        let there = fs::metadata(&image).unwrap().len() / 512;
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(1 << 37)
            .unwrap();
        let disk = Arc::new(FileDisk::open(&image).unwrap());
        let found = look(
            disk.as_ref(),
            0,
            disk.size(),
            &credentials,
            &Stretched::default(),
        );
        let volume = found.volume.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let clear = Unlocked::new(vec![volume]).over(disk);
        let (mut text, mut hash) = (String::new(), Sha256::new());
        let mut state = 0x9e37_79b9_7f4a_7c15;
        // The beginning, which is moved and made up, and any others.
        let sectors = (0..40).chain((0..SECTORS).map(|_| random(&mut state) % there));
        for sector in sectors.collect::<BTreeSet<_>>() {
            let mut bytes = [0; 512];
            clear.read_at(sector * 512, &mut bytes).unwrap();
            hash.update(bytes);
            text.push_str(&format!("{sector}\n"));
        }
        fs::write(&list, text).unwrap();
        let ours: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let key = if kind == "file" {
            key_file.to_str().unwrap()
        } else {
            key
        };
        // libbde wants every copy of the metadata, and this image ends before two of them.
        let programs = ["dissect", "libbde"]
            .into_iter()
            .take(if name == "vista" { 1 } else { 2 });
        for program in programs {
            assert_eq!(
                read_by(&python, program, &image, [kind, key], &list),
                ours,
                "{name} by {program}"
            );
        }
    }
}

/// What another program says of the sectors.
fn read_by(python: &Path, program: &str, image: &Path, key: [&str; 2], list: &Path) -> String {
    let mut reader = Command::new(python);
    reader
        .arg("tests/support/fve_reader.py")
        .arg(program)
        .arg(image)
        .args(key)
        .arg(list)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    let run = reader.output().unwrap();
    let said = String::from_utf8_lossy(&run.stdout).trim().to_string();
    assert!(!said.is_empty(), "{}", String::from_utf8_lossy(&run.stderr));
    said
}
