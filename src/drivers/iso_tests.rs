//! Images written byte by byte: which tree is read, and what of it.

use std::io::Cursor;

use super::*;

/// A directory record; `name` is as it lies in the image.
fn record(name: &[u8], flags: u8, (sector, size): (u32, u32), system_use: &[u8]) -> Vec<u8> {
    let mut record = vec![0; 33];
    record[2..6].copy_from_slice(&sector.to_le_bytes());
    record[10..14].copy_from_slice(&size.to_le_bytes());
    record[25] = flags;
    record[32] = name.len() as u8;
    record.extend(name);
    record.resize(record.len().next_multiple_of(2), 0);
    record.extend(system_use);
    record.resize(record.len().next_multiple_of(2), 0);
    record[0] = record.len() as u8;
    record
}

fn volume(kind: u8, escape: &[u8], root: u32) -> Vec<u8> {
    let mut sector = vec![0; SECTOR as usize];
    sector[0] = kind;
    sector[1..6].copy_from_slice(b"CD001");
    sector[88..88 + escape.len()].copy_from_slice(escape);
    sector[128..130].copy_from_slice(&2048u16.to_le_bytes());
    let record = record(&[0], FLAG_DIRECTORY, (root, 2048), &[]);
    sector[156..190].copy_from_slice(&record);
    sector
}

/// An image with these sectors.
fn image(sectors: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut image = vec![0; 64 * SECTOR as usize];
    for (sector, bytes) in sectors {
        let at = *sector as usize * SECTOR as usize;
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    image
}

/// An image with one volume, whose root has these records.
fn plain(records: &[Vec<u8>], more: &[(u32, Vec<u8>)]) -> Result<Iso<Cursor<Vec<u8>>>, IsoError> {
    let mut sectors = vec![(16, volume(1, b"", 20)), (20, records.concat())];
    sectors.extend_from_slice(more);
    Iso::open(Cursor::new(image(&sectors)))
}

fn paths<R>(iso: &Iso<R>) -> Vec<&str> {
    iso.files.iter().map(|file| file.path.as_str()).collect()
}

fn utf16(name: &str) -> Vec<u8> {
    name.encode_utf16().flat_map(u16::to_be_bytes).collect()
}

#[test]
fn the_tree_with_the_longest_names_is_read() {
    let primary = || volume(1, b"", 20);
    let joliet = |escape| volume(2, escape, 21);
    let end = || volume(255, b"", 0);
    for (volumes, names) in [
        (vec![primary(), end()], Names::Plain),
        // Some writers omit the terminator.
        (vec![primary()], Names::Plain),
        (vec![primary(), joliet(b"%/@"), end()], Names::Joliet),
        (vec![primary(), joliet(b"%/C"), end()], Names::Joliet),
        (vec![joliet(b"%/E"), primary(), end()], Names::Joliet),
        // Another character set, and a descriptor behind the end.
        (vec![primary(), joliet(b"%/G"), end()], Names::Plain),
        (vec![primary(), end(), joliet(b"%/E")], Names::Plain),
        // Of two primary volumes the first counts.
        (vec![primary(), volume(1, b"", 21), end()], Names::Plain),
    ] {
        let long = record(&utf16("long name.inf;1"), 0, (30, 5), &[]);
        let mut sectors: Vec<_> = (16..).zip(volumes).collect();
        sectors.push((20, record(b"SHORT.INF;1", 0, (30, 5), &[])));
        sectors.push((21, long));
        let iso = Iso::open(Cursor::new(image(&sectors))).unwrap();
        assert_eq!(iso.names(), names);
        let path = match names {
            Names::Joliet => "long name.inf",
            _ => "SHORT.INF",
        };
        assert_eq!(paths(&iso), [path]);
    }
    let only_joliet = image(&[(16, joliet(b"%/E")), (21, Vec::new())]);
    let opened = Iso::open(Cursor::new(only_joliet));
    assert!(matches!(opened, Err(IsoError::NotIso)));
}

/// A file of more than 4 GiB has several records.
#[test]
fn a_file_is_all_its_pieces_and_nothing_else() {
    let (more, other) = (FLAG_MULTI_EXTENT, FLAG_ASSOCIATED);
    let records = [
        record(b"A;1", more, (30, 2048), &[]),
        record(b"A;1", more, (33, 2048), &[]),
        record(b"A;1", 0, (31, 3), &[]),
        // The resource fork of a Macintosh has the name of its file.
        record(b"B;1", other, (33, 7), &[]),
        record(b"B;1", 0, (32, 4), &[]),
        record(b"C.;1", more, (30, 1), &[]),
        record(b"D", 0, (31, 1), &[]),
    ];
    let data = [(30, b'a'), (31, b'b'), (32, b'c'), (33, b'd')];
    let data = data.map(|(sector, byte)| (sector, vec![byte; 2048]));
    let mut iso = plain(&records, &data).unwrap();
    assert_eq!(paths(&iso), ["A", "B", "C", "D"]);
    let wanted = [
        [&[b'a'; 2048][..], &[b'd'; 2048], b"bbb"].concat(),
        b"cccc".to_vec(),
        b"a".to_vec(),
        b"b".to_vec(),
    ];
    for (file, bytes) in iso.files.clone().iter().zip(wanted) {
        assert_eq!(file.size, bytes.len() as u64, "{}", file.path);
        assert!(iso.read(file).unwrap() == bytes, "{}", file.path);
    }
    // The data of a truncated image is not filled up.
    let mut iso = plain(&[record(b"A", 0, (63, 4096), &[])], &[]).unwrap();
    let file = iso.files[0].clone();
    assert!(matches!(iso.read(&file), Err(IsoError::Damaged { .. })));
}

#[test]
fn the_names_of_rock_ridge_are_those_of_all_its_entries() {
    let announced = |skip| [b'S', b'P', 7, 1, 0xbe, 0xef, skip];
    let entry = |kind: &[u8], flags: u8, text: &[u8]| {
        let head = [kind[0], kind[1], text.len() as u8 + 5, 1, flags];
        [&head[..], text].concat()
    };
    let mut more = vec![b'C', b'E', 28, 1];
    for number in [40u32, 6, 9] {
        more.extend(number.to_le_bytes());
        more.extend(number.to_be_bytes());
    }
    let continued = [vec![0; 6], entry(b"NM", 0, b"long")].concat();
    for (system_use, name) in [
        (entry(b"NM", 0, b"name"), Some("name")),
        (
            [entry(b"NM", 1, b"na"), entry(b"NM", 0, b"me")].concat(),
            Some("name"),
        ),
        // Flags for "." and "..", which name no file.
        (entry(b"NM", 2, b"name"), Some("FILE")),
        (entry(b"NM", 4, b"name"), Some("FILE")),
        (
            [
                entry(b"NM", 0, b"a"),
                entry(b"ST", 0, b""),
                entry(b"NM", 0, b"b"),
            ]
            .concat(),
            Some("a"),
        ),
        (
            [entry(b"NM", 1, b"very "), more.clone()].concat(),
            Some("very long"),
        ),
        (
            [entry(b"NM", 0, b"link"), entry(b"SL", 0, b"x")].concat(),
            None,
        ),
        (Vec::new(), Some("FILE")),
    ] {
        for skip in [0, 3] {
            let system_use = [&vec![0xff; usize::from(skip)], &system_use[..]].concat();
            let records = [
                record(&[0], FLAG_DIRECTORY, (20, 2048), &announced(skip)),
                record(&[1], FLAG_DIRECTORY, (20, 2048), &[]),
                record(b"FILE.;1", 0, (30, 1), &system_use),
            ];
            let mut even = records.to_vec();
            even[2] = record(b"FILE;1", 0, (30, 1), &system_use);
            let iso = plain(&even, &[(40, continued.clone())]).unwrap();
            assert_eq!(paths(&iso), Vec::from_iter(name), "even {system_use:?}");
            let iso = plain(&records, &[(40, continued.clone())]).unwrap();
            assert_eq!(iso.names(), Names::RockRidge);
            assert_eq!(paths(&iso), Vec::from_iter(name), "{system_use:?}");
        }
    }
}

#[test]
fn what_is_hostile_in_an_image_is_refused_and_a_loop_is_read_once() {
    let root = (20, 2048);
    let file = record(b"F;1", 0, (30, 1), &[]);
    let folder = |name: &[u8], at| record(name, FLAG_DIRECTORY, at, &[]);
    // Directories that contain themselves, and each other.
    let records = [
        file.clone(),
        folder(b"SELF", root),
        folder(b"SUB", (21, 2048)),
    ];
    let sub = [
        file.clone(),
        folder(b"UP", root),
        folder(b"SUB", (21, 2048)),
    ]
    .concat();
    let iso = plain(&records, &[(21, sub)]).unwrap();
    assert_eq!(paths(&iso), ["F", "SUB/F"]);

    for name in [&b".."[..], b"A/B", b"A\\B", b"A\x1b", b"..;1", b"...;1"] {
        let opened = plain(&[record(name, 0, (30, 1), &[])], &[]);
        assert!(matches!(opened, Err(IsoError::Name(_))), "{name:?}");
    }
    let mut interleaved = file.clone();
    interleaved[26] = 1;
    let opened = plain(&[interleaved], &[]);
    assert!(matches!(opened, Err(IsoError::Damaged { .. })));
    let opened = plain(&[folder(b"D", (30, MAX_DIRECTORY as u32 + 1))], &[]);
    assert!(matches!(opened, Err(IsoError::Limit(_))));
    let root = folder(b"D", (64, MAX_DIRECTORY as u32));
    let mut largest = image(&[(16, volume(1, b"", 20)), (20, root)]);
    largest.resize(largest.len() + MAX_DIRECTORY as usize, 0);
    assert!(Iso::open(Cursor::new(largest)).is_ok());
    // As many levels as are allowed, and one more.
    for (levels, fine) in [(MAX_DEPTH as u32, true), (MAX_DEPTH as u32 + 1, false)] {
        let below = |i| (20 + i, folder(b"D", (21 + i, 2048)));
        let deep: Vec<_> = (1..levels).map(below).collect();
        let opened = plain(&[folder(b"D", (21, 2048))], &deep);
        assert_eq!(opened.is_ok(), fine, "{levels}");
    }
    for (block, fine) in [
        (512u16, true),
        (1024, true),
        (2048, true),
        (0, false),
        (4096, false),
    ] {
        let mut volume = volume(1, b"", 0);
        volume[128..130].copy_from_slice(&block.to_le_bytes());
        let opened = Iso::open(Cursor::new(image(&[(16, volume)])));
        assert_eq!(opened.is_ok(), fine, "{block}");
    }
}

/// The limit is for the whole image, however its entries are spread over directories.
#[test]
fn an_image_with_too_many_entries_is_refused() {
    let file = record(b"F;1", 0, (30, 1), &[]);
    let per_sector = SECTOR as usize / file.len();
    let files = |count: usize| -> Vec<u8> {
        let mut sectors = Vec::new();
        for first in (0..count).step_by(per_sector) {
            sectors.extend(file.repeat(per_sector.min(count - first)));
            sectors.resize(sectors.len().next_multiple_of(SECTOR as usize), 0);
        }
        sectors
    };
    for (entries, fine) in [(MAX_ENTRIES, true), (MAX_ENTRIES + 1, false)] {
        // Two entries of them are the directories.
        let (a, b) = (files(MAX_ENTRIES / 2), files(entries - 2 - MAX_ENTRIES / 2));
        let folder = |name: &[u8], at, data: &[u8]| {
            record(name, FLAG_DIRECTORY, (at, data.len() as u32), &[])
        };
        let second = 64 + (a.len() / SECTOR as usize) as u32;
        let root = [folder(b"A", 64, &a), folder(b"B", second, &b)].concat();
        let mut bytes = image(&[(16, volume(1, b"", 20)), (20, root)]);
        bytes.extend([a, b].concat());
        match Iso::open(Cursor::new(bytes)) {
            Ok(iso) => assert!(fine && iso.files.len() == entries - 2),
            Err(error) => {
                let limit = matches!(error, IsoError::Limit("100000 entries"));
                assert!(!fine && limit, "{error}");
            }
        }
    }
}

/// The image as a driver source: what it is called, and what of it is read.
#[test]
fn an_image_is_a_driver_source() {
    use crate::drivers::driver_source::{self, DriverSource, DriverSourceError, WithGenerated};
    let dir = tempfile::tempdir().unwrap();
    let open = |name: &str, sectors: &[(u32, Vec<u8>)]| {
        let path = dir.path().join(name);
        std::fs::write(&path, image(sectors)).unwrap();
        (driver_source::open(&path), path)
    };
    let labelled = |kind, escape: &[u8], root, label: &[u8]| {
        let mut volume = volume(kind, escape, root);
        volume[40..40 + label.len()].copy_from_slice(label);
        volume
    };
    let data = (30, b"hello".to_vec());
    let root = |name: &[u8]| {
        let records = [
            record(b"Z;1", 0, (30, 1), &[]),
            record(name, 0, (30, 5), &[]),
        ];
        (20, records.concat())
    };
    let short = [
        (16, labelled(1, b"", 20, b" VIRTIO\x07WIN  ")),
        root(b"A.INF;1"),
        data.clone(),
    ];
    let (opened, path) = open("short.iso", &short);
    let source = opened.unwrap();
    let shown = format!("ISO image {} (VIRTIOWIN)", path.display());
    assert_eq!(source.describe(), shown);
    let files: Vec<_> = source.files().iter().map(|f| (&*f.path, f.size)).collect();
    assert_eq!(files, [("A.INF", 5), ("Z", 1)]);
    for name in ["a.inf", "A.INF", "A.inf"] {
        assert_eq!(source.read(name).unwrap(), b"hello", "{name}");
    }
    let missing = source.read("b.inf").unwrap_err();
    assert_eq!(missing.to_string(), "b.inf does not exist");
    assert!(source.has_short_names());
    let warning = driver_source::short_names_warning(source.as_ref()).unwrap();
    assert!(warning.starts_with(&format!("{shown} has names of 8.3 characters only")));
    let generated = WithGenerated {
        source: source.as_ref(),
        folder: "g",
        generated: &[],
    };
    assert_eq!(generated.describe(), shown);
    assert!(generated.has_short_names());
    assert_eq!(generated.files(), source.files());
    // One longer name, or names of another tree, and nothing is cut off.
    let long = [short[0].clone(), root(b"LONG-NAME.INF;1"), data.clone()];
    let joliet = [
        (16, volume(1, b"", 20)),
        (17, labelled(2, b"%/E", 21, &utf16("Label"))),
        (20, Vec::new()),
        (21, record(&utf16("A.INF;1"), 0, (30, 5), &[])),
        data,
    ];
    for (name, sectors, label) in [
        ("long.iso", &long[..], "(VIRTIOWIN)"),
        ("joliet.iso", &joliet, "(Label)"),
    ] {
        let source = open(name, sectors).0.unwrap();
        assert!(source.describe().ends_with(label), "{}", source.describe());
        assert!(!source.has_short_names());
        assert_eq!(driver_source::short_names_warning(source.as_ref()), None);
    }
    let (opened, path) = open("empty.iso", &[(16, volume(1, b"", 20))]);
    let message = format!("{} is empty", path.display());
    assert_eq!(opened.err().unwrap().to_string(), message);
    // More than any driver has is not even begun.
    let huge = record(b"HUGE", 0, (30, 256 * 1024 * 1024 + 1), &[]);
    let opened = open("huge.iso", &[(16, volume(1, b"", 20)), (20, huge)]).0;
    let read = opened.unwrap().read("huge").unwrap_err();
    assert!(matches!(read, DriverSourceError::TooLarge { .. }), "{read}");
}

#[test]
fn what_is_wrong_with_an_image_is_said_with_its_place() {
    let of = |opened: Result<Iso<Cursor<Vec<u8>>>, IsoError>| opened.err().unwrap().to_string();
    // The second descriptor is cut off.
    let mut cut = image(&[(16, volume(1, b"", 20))]);
    cut.truncate(17 * SECTOR as usize + 7);
    assert_eq!(
        of(Iso::open(Cursor::new(cut))),
        "damaged ISO image: image ends early at byte 34816"
    );
    let mut block = volume(1, b"", 20);
    block[128] = 1;
    assert_eq!(
        of(Iso::open(Cursor::new(image(&[(16, block)])))),
        "damaged ISO image: logical block size at byte 32896"
    );
    let mut root = volume(1, b"", 20);
    root[156 + 26] = 1;
    assert_eq!(
        of(Iso::open(Cursor::new(image(&[(16, root)])))),
        "damaged ISO image: root directory record at byte 32924"
    );
    let mut bad = record(b"A", 0, (30, 1), &[]);
    bad[0] = 20;
    assert_eq!(
        of(plain(&[bad], &[])),
        "damaged ISO image: directory record at byte 40960"
    );
    assert_eq!(
        of(plain(&[record(b"..", 0, (30, 1), &[])], &[])),
        "ISO image has a file name that is not allowed: \"..\""
    );
    // Interleaved files are not read, and those with an attribute record begin behind it.
    for byte in [26, 27] {
        let mut interleaved = record(b"A", 0, (30, 1), &[]);
        interleaved[byte] = 1;
        assert!(plain(&[interleaved], &[]).is_err(), "{byte}");
    }
    let mut attributes = record(b"A", 0, (29, 1), &[]);
    attributes[1] = 1;
    let twice = [
        attributes,
        record(b"B", 0, (30, 1), &[]),
        record(b"B", 0, (30, 1), &[]),
    ];
    let mut iso = plain(&twice, &[(30, b"x".to_vec())]).unwrap();
    assert_eq!(paths(&iso), ["A", "B", "B"]);
    let first = iso.files[0].clone();
    assert_eq!(iso.read(&first).unwrap(), b"x");
    // Blocks may be smaller than a sector, and of a directory all sectors are read.
    let mut small = volume(1, b"", 0);
    small[128..130].copy_from_slice(&512u16.to_le_bytes());
    let root = record(&[0], FLAG_DIRECTORY, (80, 4096), &[]);
    small[156..190].copy_from_slice(&root);
    let second = record(b"B;1", 0, (121, 2), &[]);
    let mut iso = Iso::open(Cursor::new(image(&[
        (16, small),
        (20, record(b"A.;1", 0, (120, 2), &[])),
        (21, second),
        (30, [vec![b'a'; 512], vec![b'b'; 512]].concat()),
    ])))
    .unwrap();
    assert_eq!(paths(&iso), ["A", "B"]);
    let files = iso.files.clone();
    assert_eq!(iso.read(&files[0]).unwrap(), b"aa");
    assert_eq!(iso.read(&files[1]).unwrap(), b"bb");
    for (name, stripped) in [
        ("A.INF;1", "A.INF"),
        ("A.;12", "A"),
        ("A;x", "A;x"),
        ("A;1;2", "A;1"),
        ("A.", "A."),
        ("A;", "A"),
    ] {
        assert_eq!(strip_version(name.into()), stripped, "{name}");
    }
}
