//! Volumes made in memory, and ones that Windows made, through this whole module.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex};

use flate2::Crc;
use sha2::{Digest, Sha256};

use super::cipher::Method;
use super::keys::{Credential, StartupKey, Stretched};
use super::layout::{BlockHeader, NTFS, SIGNATURE, Validation, VolumeHeader};
use super::{Closed, Look, Unlocked, look};
use crate::block::{BlockRead, BlockWrite, FileDisk, check_range};
use crate::demo::bitlocker::{Lock, MOVED_BYTES, Reserved, Spec, encrypt, startup_key_file};

const START: u64 = 64 << 10;
const LEN: u64 = 1 << 20;
const PLACES: Reserved = Reserved {
    copies: [256 << 10, 512 << 10, 768 << 10],
    moved: 320 << 10,
};

struct Memory(Mutex<Vec<u8>>);

impl BlockRead for Memory {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        buf.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }
}

impl BlockWrite for Memory {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len() as u64, self.size())?;
        self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(offset, &vec![0; len as usize])
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A disk with a volume whose start resembles NTFS, and data on both sides of it.
fn plain(sector: u16) -> Arc<Memory> {
    let mut bytes: Vec<u8> = (0..(LEN + 2 * START) as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let header = VolumeHeader {
        jump: [0xeb, 0x52, 0x90],
        signature: NTFS,
        bytes_per_sector: sector,
        sectors_per_cluster: (4096 / sector) as u8,
        total_sectors: LEN / u64::from(sector) - 1,
        metadata_cluster: 7,
    };
    header.write(&mut bytes[START as usize..]).unwrap();
    let (first, copy) = (START as usize, (START + LEN) as usize - usize::from(sector));
    bytes.copy_within(first..first + usize::from(sector), copy);
    // NTFS's view of BitLocker's files.
    for place in PLACES.copies {
        bytes[(START + place) as usize..][..64 << 10].fill(0);
    }
    bytes[(START + PLACES.moved) as usize..][..MOVED_BYTES as usize].fill(0);
    Arc::new(Memory(Mutex::new(bytes)))
}

fn spec(method: Method, locks: &[Lock<'static>]) -> Spec<'static> {
    let mut spec = Spec::new(method, locks, PLACES);
    spec.used_space_only = false;
    spec
}

fn encrypted(plain: &Arc<Memory>, spec: &Spec) -> Arc<Memory> {
    let disk = Arc::new(Memory(Mutex::new(plain.0.lock().unwrap().clone())));
    let source: Arc<dyn BlockRead> = plain.clone();
    encrypt(&source, disk.as_ref(), START, LEN, spec).unwrap();
    disk
}

fn open(disk: &dyn BlockRead, credentials: &[Credential]) -> Look {
    look(disk, START, LEN, credentials, &Stretched::default())
}

fn unlocked(disk: &Arc<Memory>) -> super::InClear<Memory> {
    let volume = open(disk.as_ref(), &[]).volume.unwrap();
    Unlocked::new(vec![volume]).over(disk.clone())
}

fn read(disk: &dyn BlockRead, range: std::ops::Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    disk.read_at(range.start, &mut bytes).unwrap();
    bytes
}

/// Every possible shape of a volume.
fn shapes() -> Vec<(u16, Spec<'static>)> {
    let mut shapes = Vec::new();
    for method in Method::ALL {
        shapes.push((512, spec(method, &[Lock::ClearKey])));
    }
    shapes.push((4096, spec(Method::XtsAes128, &[Lock::ClearKey])));
    shapes.push((4096, spec(Method::CbcAes256Diffuser, &[Lock::ClearKey])));
    for method in [Method::CbcAes128Diffuser, Method::CbcAes256] {
        let mut vista = spec(method, &[Lock::ClearKey]);
        vista.vista = true;
        shapes.push((512, vista));
    }
    let mut to_go = spec(Method::CbcAes128, &[Lock::ClearKey]);
    to_go.to_go = true;
    shapes.push((512, to_go));
    shapes
}

/// BitLocker's ranges. Vista's copies are smaller, and the bytes behind them are not BitLocker's.
fn ours(spec: &Spec) -> Vec<std::ops::Range<u64>> {
    let size = if spec.vista { 16 << 10 } else { 64 << 10 };
    let mut ours: Vec<_> = PLACES.copies.map(|c| c..c + size).to_vec();
    if !spec.vista {
        ours.push(PLACES.moved..PLACES.moved + MOVED_BYTES);
    }
    ours
}

#[test]
fn what_is_encrypted_reads_as_it_was_before() {
    for (sector, spec) in shapes() {
        let plain = plain(sector);
        let disk = encrypted(&plain, &spec);
        let shown = format!("{} {sector} vista {}", spec.method.name(), spec.vista);
        let hidden = read(disk.as_ref(), START + (16 << 10)..START + (32 << 10));
        let open = read(plain.as_ref(), START + (16 << 10)..START + (32 << 10));
        assert_ne!(hidden, open, "{shown}");
        let clear = unlocked(&disk);
        let all = 0..plain.size();
        assert!(
            read(&clear, all.clone()) == read(plain.as_ref(), all),
            "{shown}"
        );
        // Ranges that begin and end anywhere.
        for (at, len) in [
            (START - 5, 700),
            (START + 511, 2),
            (START + 8191, 9000),
            (START + LEN - 3, 6),
        ] {
            assert_eq!(
                read(&clear, at..at + len),
                read(plain.as_ref(), at..at + len),
                "{shown} {at}"
            );
        }
    }
}

#[test]
fn what_is_written_is_encrypted_and_the_metadata_stays() {
    for (sector, spec) in shapes() {
        let shown = format!("{} {sector} vista {}", spec.method.name(), spec.vista);
        let (model, disk) = (plain(sector), encrypted(&plain(sector), &spec));
        let before = disk.0.lock().unwrap().clone();
        let clear = unlocked(&disk);
        // Sectors, parts of sectors, the start of the volume, across its borders.
        let end = START + LEN;
        for (at, len) in [
            (START + 100, 40),
            (START + 1024, 512),
            (START + 8000, 1000),
            (START + (100 << 10) + 3, 5000),
            (START - 10, 11),
            (end - 5000, 300),
            (end, 20),
        ] {
            let mut data: Vec<u8> = (0..len).map(|i| (i as u8) ^ 0x5c).collect();
            if at < START {
                data[10] = 0xeb;
            }
            clear.write_at(at, &data).unwrap();
            model.write_at(at, &data).unwrap();
        }
        clear.zero_at(START + (200 << 10) + 7, 3000).unwrap();
        model.zero_at(START + (200 << 10) + 7, 3000).unwrap();
        clear.flush().unwrap();
        let again = unlocked(&disk);
        assert!(
            read(&again, 0..model.size()) == read(model.as_ref(), 0..model.size()),
            "{shown}"
        );
        let after = disk.0.lock().unwrap().clone();
        let zeroed = (START + (201 << 10)) as usize;
        assert!(
            after[zeroed..zeroed + 1024].iter().any(|b| *b != 0),
            "{shown}: in clear"
        );

        // BitLocker's own ranges: refused, and no part of the write is done.
        for range in ours(&spec) {
            for (at, len) in [
                (range.start, 512),
                (range.end - 1, 1),
                (range.start - 512, 1024),
            ] {
                let error = clear.write_at(START + at, &vec![1; len]).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{shown} {at}");
            }
            // The range of the moved start was written through the start.
            if range.start != PLACES.moved {
                let range = (START + range.start) as usize..(START + range.end) as usize;
                assert!(after[range.clone()] == before[range], "{shown}");
            }
        }
        assert!(
            *disk.0.lock().unwrap() == after,
            "{shown}: a refused write left something"
        );
    }
}

#[test]
fn the_boot_sector_of_vista_stays_bitlockers() {
    let mut spec = spec(Method::CbcAes128Diffuser, &[Lock::ClearKey]);
    spec.vista = true;
    let disk = encrypted(&plain(512), &spec);
    for at in [START, START + LEN - 512] {
        let on_disk = VolumeHeader::read(&read(disk.as_ref(), at..at + 512)).unwrap();
        assert_eq!(on_disk.signature, SIGNATURE);
        assert_eq!(on_disk.metadata_cluster, PLACES.copies[0] / 4096);
        let clear = unlocked(&disk);
        let mut sector = read(&clear, at..at + 512);
        let seen = VolumeHeader::read(&sector).unwrap();
        assert_eq!((seen.signature, seen.metadata_cluster), (NTFS, 7));
        sector[28] ^= 0xff;
        clear.write_at(at, &sector).unwrap();
        let again = VolumeHeader::read(&read(disk.as_ref(), at..at + 512)).unwrap();
        assert_eq!(again.metadata_cluster, on_disk.metadata_cluster);
        // The metadata has the offset of the mirror: it cannot be moved from here.
        sector[56] += 1;
        clear.write_at(at, &sector).unwrap_err();
    }
}

const RECOVERY: &str = "471207-278498-422125-177177-561902-537405-468006-693451";

#[test]
fn every_protector_opens_and_no_other_key_does() {
    let startup = Lock::StartupKey {
        guid: [9; 16],
        key: [0x31; 32],
    };
    let locks = [
        Lock::Tpm,
        Lock::RecoveryPassword(RECOVERY),
        Lock::Password("p\u{e4}ssword"),
        startup,
    ];
    let disk = encrypted(&plain(512), &spec(Method::XtsAes256, &locks));
    let stretched = Stretched::default();
    let open = |c: &[Credential]| look(disk.as_ref(), START, LEN, c, &stretched);
    let key =
        |guid: u8, byte: u8| StartupKey::parse(&startup_key_file([guid; 16], &[byte; 32])).unwrap();
    let (right, foreign, other) = (key(9, 0x31), key(8, 0x31), key(9, 0x32));
    let wrong_recovery = "111111-222222-333333-444444-555555-666666-111111-222222";
    use Credential::{StartupKey as File, Text};
    let opens: [(&[Credential], &str); 4] = [
        (&[Text(RECOVERY)], "RecoveryPassword"),
        (&[Text("p\u{e4}ssword")], "Password"),
        (&[File(&right)], "StartupKey"),
        (
            &[
                Text(wrong_recovery),
                Text("wrong"),
                File(&other),
                Text(RECOVERY),
            ],
            "RecoveryPassword",
        ),
    ];
    for (credentials, by) in opens {
        let volume = open(credentials).volume.map_err(|e| e.1).unwrap();
        assert_eq!(format!("{:?}", volume.by), by);
    }
    let closed: [(&[Credential], &str); 6] = [
        (
            &[],
            "no key was given for it; it is unlocked by: TPM, recovery password, password, startup key",
        ),
        (&[Text("wrong")], "none of the 1 keys"),
        (&[Text(wrong_recovery)], "none of the 1 keys"),
        (&[File(&foreign), File(&other)], "none of the 2 keys"),
        (&[Text(&RECOVERY.replacen('8', "9", 1))], "group 2 of 8"),
        (&[Text("")], "none of the 1 keys"),
    ];
    for (credentials, says) in closed {
        let (closed, reason) = open(credentials).volume.err().unwrap();
        assert_eq!(closed, Closed::Locked);
        assert!(reason.contains(says), "{reason}");
    }
    let disk = encrypted(&plain(512), &spec(Method::XtsAes256, &[Lock::Tpm]));
    let (closed, reason) = self::open(disk.as_ref(), &[Text(RECOVERY)])
        .volume
        .err()
        .unwrap();
    assert_eq!(closed, Closed::NoUsableProtector);
    assert!(reason.contains("unlocked by TPM only"), "{reason}");
}

#[test]
fn a_volume_that_is_not_encrypted_as_a_whole_stays_closed() {
    for (states, says) in [
        ((1, 1), "not encrypted (state 1 to 1"),
        ((2, 4), "encrypting the volume (state 2 to 4"),
        ((5, 1), "decrypting the volume (state 5 to 1"),
        ((3, 1), "decrypting the volume, and paused"),
        ((3, 4), "encrypting the volume, and paused"),
        ((4, 1), "decrypting the volume (state 4 to 1"),
        ((9, 9), "unknown state"),
    ] {
        let mut spec = spec(Method::XtsAes128, &[Lock::ClearKey]);
        spec.states = states;
        let disk = encrypted(&plain(512), &spec);
        let (closed, reason) = open(disk.as_ref(), &[]).volume.err().unwrap();
        assert_eq!(closed, Closed::Converting, "{states:?}");
        assert!(reason.contains(says), "{reason}");
    }
    let mut spec = spec(Method::XtsAes128, &[Lock::ClearKey]);
    spec.encrypts_on_write = true;
    let disk = encrypted(&plain(512), &spec);
    let (closed, reason) = open(disk.as_ref(), &[]).volume.err().unwrap();
    assert_eq!(closed, Closed::Converting);
    assert!(reason.contains("encrypt-on-write"), "{reason}");
}

/// Changes bytes of one copy of the metadata, optionally with a matching CRC-32.
fn forge(disk: &Memory, copy: usize, with_crc: bool, change: impl Fn(&mut [u8])) {
    let at = (START + PLACES.copies[copy]) as usize;
    let mut bytes = disk.0.lock().unwrap();
    let block = &mut bytes[at..at + (64 << 10)];
    change(block);
    let header = BlockHeader::read(block).unwrap();
    let size = usize::from(header.size) * 16;
    if with_crc {
        let mut crc = Crc::new();
        crc.update(&block[..size]);
        let mut validation = Validation::read(&block[size..]).unwrap();
        validation.crc32 = crc.sum();
        validation.write(&mut block[size..]).unwrap();
    }
}

#[test]
fn copies_are_checked_and_compared() {
    let spec = spec(Method::CbcAes128, &[Lock::ClearKey]);
    let made = || encrypted(&plain(512), &spec);
    let opens = |disk: &Arc<Memory>| open(disk.as_ref(), &[]).volume.map(drop).map_err(|e| e.1);
    let counter = |block: &mut [u8]| block[96] ^= 1;
    // One or two damaged copies are tolerated, three are not.
    let disk = made();
    for copy in 0..2 {
        forge(&disk, copy, false, counter);
        opens(&disk).unwrap();
    }
    forge(&disk, 2, false, counter);
    let reason = opens(&disk).unwrap_err();
    assert!(
        reason.contains("no copy of BitLocker's metadata is sound"),
        "{reason}"
    );
    assert!(reason.contains("at 0x40000: the CRC-32 is 0x"), "{reason}");
    // One that another program changed is outvoted; if all differ, none is used.
    let disk = made();
    forge(&disk, 0, true, counter);
    opens(&disk).unwrap();
    forge(&disk, 1, true, |block| block[96] ^= 2);
    let reason = opens(&disk).unwrap_err();
    assert!(reason.contains("differ from byte 0x60 on"), "{reason}");
    // All three have the same change: verification with the volume's key fails.
    let disk = made();
    for copy in 0..3 {
        forge(&disk, copy, true, counter);
    }
    let reason = opens(&disk).unwrap_err();
    assert!(
        reason.contains("not what the volume's key vouches for"),
        "{reason}"
    );
}

#[test]
fn structures_out_of_place_are_refused_with_numbers() {
    type Change = fn(&mut [u8]);
    let cases: [(Change, &str); 9] = [
        (|b| b[0] = b'x', "at 0x40000: the signature is 7846"),
        (|b| b[10] = 3, "the version is 3, expected 1 or 2"),
        (|b| b[8..10].fill(0xff), "the size is 1048560"),
        (|b| b[8..10].fill(0), "the size is 0, expected 112 to"),
        (|b| b[32] ^= 1, "vouches for"),
        (|b| b[72..76].fill(0xff), "the dataset's size is 4294967295"),
        (|b| b[100..102].fill(0x77), "the cipher is 0x7777"),
        (
            |b| b[57] = 0x20,
            "the place of the volume's start is 8192 bytes at 0x50000",
        ),
        (|b| b[28] = 0xff, "the place of the volume's start"),
    ];
    for (change, says) in cases {
        let disk = encrypted(&plain(512), &spec(Method::CbcAes128, &[Lock::ClearKey]));
        for copy in 0..3 {
            let size_stays = |b: &mut [u8]| {
                let before = b[8..12].to_vec();
                change(b);
                before == b[8..12]
            };
            let at = (START + PLACES.copies[copy]) as usize;
            let stays = size_stays(&mut disk.0.lock().unwrap()[at..at + (64 << 10)]);
            if stays {
                forge(&disk, copy, true, |_| {});
            }
        }
        let (closed, reason) = open(disk.as_ref(), &[]).volume.err().unwrap();
        assert_eq!(closed, Closed::Unreadable);
        assert!(reason.contains(says), "{says}: {reason}");
    }
    // The boot sector.
    for (at, byte, says) in [
        (11, 0x11, "the sector size is 529"),
        (160, 0, "the GUID before the places"),
    ] {
        let disk = encrypted(&plain(512), &spec(Method::CbcAes128, &[Lock::ClearKey]));
        disk.write_at(START + at, &[byte]).unwrap();
        let (_, reason) = open(disk.as_ref(), &[]).volume.err().unwrap();
        assert!(reason.contains(says), "{reason}");
    }
}

static SOUND: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let disk = encrypted(&plain(512), &spec(Method::CbcAes128, &[Lock::ClearKey]));
    disk.0.lock().unwrap().clone()
});

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(16))]
    #[test]
    fn damage_anywhere_is_survived(damage in proptest::collection::vec((0..3usize, 0..1200usize, 0u8..), 1..20)) {
        let disk = Arc::new(Memory(Mutex::new(SOUND.clone())));
        for (_, at, byte) in damage {
            for copy in 0..3 {
                let at = START + PLACES.copies[copy] + at as u64;
                disk.write_at(at, &[byte]).unwrap();
            }
        }
        if let Ok(volume) = open(disk.as_ref(), &[]).volume {
            let clear = Unlocked::new(vec![volume]).over(disk.clone());
            read(&clear, START..START + LEN);
        }
    }
}

#[test]
fn what_is_never_free() {
    let disk = encrypted(&plain(512), &spec(Method::CbcAes128, &[Lock::ClearKey]));
    let volume = open(disk.as_ref(), &[]).volume.unwrap();
    let all = START..START + LEN;
    let kib = |from: u64, to: u64| START + (from << 10)..START + (to << 10);
    assert_eq!(
        Unlocked::new(vec![volume]).without_reserved(all.clone()),
        [kib(0, 256), kib(328, 512), kib(576, 768), kib(832, 1024)]
    );
    assert_eq!(Unlocked::default().without_reserved(all.clone()), [all]);
}

/// The directory with the unpacked volumes of cryptsetup's tests (`tests/bitlk-images.tar.xz`).
fn images() -> Option<PathBuf> {
    std::env::var_os("HYPER2KVM_BITLK_IMAGES").map(PathBuf::from)
}

fn key_of(section: &str, name: &str) -> String {
    let prefix = format!("{name}=");
    let line = section.lines().find_map(|l| l.strip_prefix(&prefix));
    line.unwrap_or_default().to_string()
}

fn digest(disk: &dyn BlockRead) -> String {
    let mut hash = Sha256::new();
    let mut bytes = vec![0; 1 << 20];
    let mut at = 0;
    while at < disk.size() {
        let n = (disk.size() - at).min(bytes.len() as u64) as usize;
        disk.read_at(at, &mut bytes[..n]).unwrap();
        hash.update(&bytes[..n]);
        at += n as u64;
    }
    crate::text::hex(&hash.finalize())
}

/// Some gigabytes: cargo test --release --lib volumes_of_windows -- --ignored
#[test]
#[ignore = "slow without optimization, and needs cryptsetup's images"]
fn volumes_of_windows_read_as_cryptsetup_says() {
    let Some(folder) = images() else {
        return crate::skip::skip(
            "bitlk-images",
            "HYPER2KVM_BITLK_IMAGES does not name cryptsetup's bitlk-images",
        );
    };
    let conf = std::fs::read_to_string(folder.join("images.conf")).unwrap();
    let startup_key = |guid: &str| {
        let file = folder.join(format!("{}.BEK", guid.to_uppercase()));
        StartupKey::parse(&std::fs::read(file).unwrap()).unwrap()
    };
    let mut read = 0;
    for section in conf.split("\n[").map(|s| s.trim_start_matches('[')) {
        let name = section.split(']').next().unwrap();
        let disk: Arc<dyn BlockRead> =
            Arc::new(FileDisk::open(&folder.join(format!("{name}.img"))).unwrap());
        let stretched = Stretched::default();
        let open = |c: &[Credential]| look(disk.as_ref(), 0, disk.size(), c, &stretched);
        let expected = key_of(section, "SHA256SUM");
        let startup = key_of(section, "SK_VMK_GUID");
        let startup = (!startup.is_empty()).then(|| startup_key(&startup));
        let texts = ["PW", "RP", "RP2"].map(|n| key_of(section, n));
        let mut looks: Vec<Look> = Vec::new();
        for text in texts.iter().filter(|t| !t.is_empty()) {
            looks.push(open(&[Credential::Text(text)]));
        }
        looks.extend(startup.iter().map(|k| open(&[Credential::StartupKey(k)])));
        if looks.is_empty() {
            looks.push(open(&[]));
        }
        for look in looks {
            match look.volume {
                Ok(volume) => {
                    eprintln!("{name}: {} by {:?}", volume.cipher_name, volume.by);
                    let clear = Unlocked::new(vec![volume]).over(disk.clone());
                    assert_eq!(digest(&clear), expected, "{name}");
                    read += 1;
                }
                Err((closed, reason)) => {
                    eprintln!("{name}: {closed:?} {reason}");
                    assert_eq!(
                        (closed, expected.as_str()),
                        (Closed::Converting, ""),
                        "{name}"
                    );
                }
            }
        }
    }
    assert!(read >= 30, "{read}");
}
