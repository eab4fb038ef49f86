//! Hives and logs made by the tests: one page per hive bin, each page filled with one letter.

use proptest::prelude::*;

use super::super::marvin::marvin32;
use super::*;

const PAGE: u32 = 4096;

fn bin(index: u32, letter: u8) -> Vec<u8> {
    let mut bin = vec![letter; PAGE as usize];
    bin[..4].copy_from_slice(b"hbin");
    put_u32(&mut bin, 4, index * PAGE);
    put_u32(&mut bin, 8, PAGE);
    bin[20..28].copy_from_slice(&TIME.to_le_bytes());
    bin
}

const TIME: u64 = 1000;

fn header(seq: (u32, u32), file_type: u32, pages: u32, time: u64) -> Vec<u8> {
    let mut header = vec![0; HEADER_SIZE];
    header[..4].copy_from_slice(b"regf");
    header[12..20].copy_from_slice(&time.to_le_bytes());
    let fields = [
        (4, seq.0),
        (8, seq.1),
        (20, 1),
        (24, 5),
        (28, file_type),
        (32, 1),
        (36, 32),
        (40, pages * PAGE),
        (44, 1),
    ];
    for (offset, value) in fields {
        put_u32(&mut header, offset, value);
    }
    let sum = base::checksum(&header);
    put_u32(&mut header, 508, sum);
    header
}

fn hive(seq: (u32, u32), letters: &str) -> Vec<u8> {
    let mut bytes = header(seq, 0, letters.len() as u32, TIME);
    bytes.resize(BASE_BLOCK_SIZE, 0);
    for (i, letter) in letters.bytes().enumerate() {
        bytes.extend(bin(i as u32, letter));
    }
    bytes
}

/// The letters of a hive's pages, up to its hive bins size.
fn letters(hive: &[u8]) -> String {
    let size = le32(hive, 40).unwrap() as usize;
    hive[BASE_BLOCK_SIZE..BASE_BLOCK_SIZE + size]
        .chunks(PAGE as usize)
        .map(|page| char::from(page[100]))
        .collect()
}

/// An entry that writes `letter` to each of the pages `at`, in a hive of `pages` pages.
fn entry(seq: u32, flags: u32, pages: u32, at: &[u32], letter: u8) -> Vec<u8> {
    let mut body = Vec::new();
    for index in at {
        body.extend((index * PAGE).to_le_bytes());
        body.extend(PAGE.to_le_bytes());
    }
    for index in at {
        body.extend(bin(*index, letter));
    }
    sealed(seq, flags, pages * PAGE, at.len() as u32, body)
}

/// An entry with all of a hive's bins.
pub fn entry_of(seq: u32, pages: u32, bins: &[u8]) -> Vec<u8> {
    let mut body = 0u32.to_le_bytes().to_vec();
    body.extend((bins.len() as u32).to_le_bytes());
    body.extend(bins);
    sealed(seq, 0, pages * PAGE, 1, body)
}

fn sealed(seq: u32, flags: u32, bins_size: u32, count: u32, mut body: Vec<u8>) -> Vec<u8> {
    body.resize((40 + body.len()).next_multiple_of(512) - 40, 0);
    let mut entry = b"HvLE".to_vec();
    for field in [40 + body.len() as u32, flags, seq, bins_size, count] {
        entry.extend(field.to_le_bytes());
    }
    entry.extend(marvin32(&body).to_le_bytes());
    entry.extend(marvin32(&entry).to_le_bytes());
    entry.extend(body);
    entry
}

pub fn log(seq: u32, pages: u32, entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = header((seq, seq), 6, pages, TIME);
    bytes.extend(entries.concat());
    bytes
}

fn page_log(seq: u32, time: u64, pages: u32, at: &[u32], letter: u8) -> Vec<u8> {
    let mut bytes = header((seq, seq), 1, pages, time);
    bytes.extend(b"DIRT");
    bytes.extend((0..pages).map(|i| if at.contains(&i) { 0xff } else { 0 }));
    bytes.resize(1024, 0);
    for index in at {
        bytes.extend(bin(*index, letter));
    }
    bytes
}

/// Applied entries, skipped logs, warnings, letters of the result, `-` if it is not usable.
fn replay(hive: &[u8], logs: &[&[u8]]) -> String {
    let names = ["LOG1", "LOG2", "LOG"];
    let named: Vec<_> = names.into_iter().zip(logs.iter().copied()).collect();
    let result = match recover(hive, &named) {
        Ok(result) => result,
        Err(error) => return error.to_string(),
    };
    let mut text = if result.usable {
        assert_eq!(result.entries(), pending(hive, &named));
        letters(&result.bytes)
    } else {
        assert_eq!(result.bytes, hive);
        "-".to_string()
    };
    for log in &result.applied {
        text += &format!("\n{}: {}..={}", log.name, log.first_seq, log.last_seq);
    }
    for log in &result.skipped {
        text += &format!("\n{} skipped: {}", log.name, log.reason);
    }
    for warning in &result.warnings {
        text += &format!("\nwarning: {warning}");
    }
    if !result.applied.is_empty() {
        let base = BaseBlock::parse(&result.bytes).unwrap();
        let last = result.applied.last().unwrap().last_seq.wrapping_add(1);
        assert_eq!(
            (base.primary_sequence, base.secondary_sequence),
            (last, last)
        );
        let again = recover(&result.bytes, &named).unwrap();
        assert!(!again.was_dirty && again.bytes == result.bytes);
    }
    text
}

#[test]
fn order_gaps_and_stale_logs() {
    let dirty = hive((8, 7), "aaa");
    let seven = log(
        7,
        3,
        &[entry(7, 0, 3, &[0], b'b'), entry(8, 0, 3, &[1], b'c')],
    );
    let nine = log(9, 3, &[entry(9, 0, 3, &[0], b'd')]);
    let ten = log(10, 3, &[entry(10, 0, 3, &[0], b'e')]);
    let six = log(
        6,
        3,
        &[entry(6, 0, 3, &[0], b'x'), entry(7, 0, 3, &[2], b'x')],
    );

    insta::assert_snapshot!(replay(&dirty, &[&seven, &nine]), @r"
    dca
    LOG1: 7..=8
    LOG2: 9..=9
    ");
    insta::assert_snapshot!(replay(&dirty, &[&nine, &seven]), @r"
    dca
    LOG2: 7..=8
    LOG1: 9..=9
    ");
    insta::assert_snapshot!(replay(&dirty, &[&seven, &ten]), @r"
    bca
    LOG1: 7..=8
    LOG2 skipped: it starts at 10, but 9 would be next
    warning: LOG2 cannot be used: it starts at 10, but 9 would be next; changes that were only there are lost
    ");
    insta::assert_snapshot!(replay(&dirty, &[&six, &ten]), @r"
    eaa
    LOG2: 10..=10
    LOG1 skipped: its changes are already in the hive: it starts at 6, the hive is at 7
    ");
    insta::assert_snapshot!(replay(&dirty, &[&six, b""]), @r"
    -
    LOG2 skipped: the log is empty
    LOG1 skipped: its changes are already in the hive: it starts at 6, the hive is at 7
    ");
}

#[test]
fn numbers_wrap() {
    let dirty = hive((u32::MAX, u32::MAX - 1), "a");
    let before = log(u32::MAX, 1, &[entry(u32::MAX, 0, 1, &[0], b'b')]);
    let after = log(
        0,
        1,
        &[entry(0, 0, 1, &[0], b'c'), entry(1, 0, 1, &[0], b'd')],
    );
    insta::assert_snapshot!(replay(&dirty, &[&after, &before]), @r"
    d
    LOG2: 4294967295..=4294967295
    LOG1: 0..=1
    ");
    // No order over the circle exists for these three; the sort must cope with them.
    let third = 0x5555_5555;
    let logs: Vec<_> = (0..3).map(|i| log(third * i, 1, &[])).collect();
    replay(&vec![0; 4096], &[&logs[0], &logs[1], &logs[2]]);
}

#[test]
fn grows_shrinks_and_takes_the_flag() {
    let dirty = hive((2, 1), "aa");
    let grow = log(1, 2, &[entry(1, 1, 4, &[2, 3], b'b')]);
    insta::assert_snapshot!(replay(&dirty, &[&grow]), @r"
    aabb
    LOG1: 1..=1
    ");
    let grown = recover(&dirty, &[("LOG1", &grow)]).unwrap().bytes;
    assert_eq!(le32(&grown, 144), Some(1));
    assert_eq!(grown.len(), 4096 * 5);

    // The page that is cut off stays behind the hive bins, as Windows leaves it.
    let shrink = log(1, 2, &[entry(1, 0, 1, &[0], b'b')]);
    insta::assert_snapshot!(replay(&dirty, &[&shrink]), @r"
    b
    LOG1: 1..=1
    ");
    assert_eq!(
        recover(&dirty, &[("LOG1", &shrink)]).unwrap().bytes.len(),
        dirty.len()
    );

    // A page of the new bins is missing.
    let hole = log(1, 2, &[entry(1, 0, 4, &[3], b'b')]);
    insta::assert_snapshot!(replay(&dirty, &[&hole]), @r"
    -
    LOG1 skipped: after replay the hive bin at offset 0x2000 is damaged
    ");
}

#[test]
fn bad_entries_end_the_replay() {
    let dirty = hive((2, 1), "aa");
    let good = entry(1, 0, 2, &[0], b'b');
    let next = entry(2, 0, 2, &[1], b'c');
    let flip = |at: usize| {
        let mut bad = next.clone();
        bad[at] ^= 1;
        bad
    };
    let mut body = (PAGE * 2).to_le_bytes().to_vec();
    body.extend(PAGE.to_le_bytes());
    body.extend(bin(2, b'x'));
    let outside = sealed(2, 0, 2 * PAGE, 1, body);
    let too_many = sealed(2, 0, 2 * PAGE, 5000, bin(0, b'x'));
    let overflow = sealed(2, 0, 2 * PAGE, u32::MAX, bin(0, b'x'));
    let odd = sealed(2, 0, 2 * PAGE + 512, 0, vec![]);
    let huge = sealed(2, 0, 0x7000_0000, 0, vec![]);
    let old = entry(0, 0, 2, &[1], b'x');

    let table: &[(&str, Vec<u8>, &str)] = &[
        ("remnant", old, ""),
        ("magic", flip(0), ""),
        ("sequence", flip(12), ""),
        ("size", flip(4), "its size is not possible"),
        ("larger", flip(6), "it was not written to its end"),
        ("flags", flip(8), "the hash of its header is wrong"),
        ("first hash", flip(24), "the hash of its header is wrong"),
        ("second hash", flip(32), "the hash of its header is wrong"),
        ("page", flip(3000), "the hash of its pages is wrong"),
        (
            "cut",
            next[..4096].to_vec(),
            "it was not written to its end",
        ),
        (
            "outside",
            outside,
            "its pages do not fit the hive or the entry",
        ),
        (
            "too many",
            too_many,
            "its pages do not fit the hive or the entry",
        ),
        (
            "overflow",
            overflow,
            "its pages do not fit the hive or the entry",
        ),
        ("odd size", odd, "its hive bins size is not possible"),
        ("huge", huge, "its hive bins size is not possible"),
    ];
    for (name, bad, why) in table {
        let log = log(1, 2, &[good.clone(), bad.clone()]);
        let warning = match *why {
            "" => String::new(),
            why => format!(
                "\nwarning: LOG1: the entry with sequence number 2 is damaged: {why}; \
                 changes from there on are lost"
            ),
        };
        let expected = format!("ba\nLOG1: 1..=1{warning}");
        assert_eq!(replay(&dirty, &[&log]), expected, "{name}");
    }
    insta::assert_snapshot!(replay(&dirty, &[&log(1, 2, &[flip(12)])]), @r"
    -
    LOG1 skipped: it has no entry of its own: there are no more entries
    ");
}

#[test]
fn damaged_base_block() {
    let mut dirty = hive((2, 1), "aa");
    dirty[40] ^= 1;
    let first = log(1, 2, &[entry(1, 0, 2, &[0], b'b')]);
    let second = log(2, 2, &[entry(2, 0, 2, &[1], b'c')]);
    insta::assert_snapshot!(replay(&dirty, &[&second, &first]), @r"
    ac
    LOG1: 2..=2
    LOG2 skipped: a later log is used instead
    warning: the base block of the hive was damaged; as Windows does, the copy in LOG1 was used and no other log replayed
    ");
    insta::assert_snapshot!(replay(&dirty, &[]), @"the base block of the hive is damaged and no log can replace it");
    insta::assert_snapshot!(replay(&dirty[..100], &[]), @"the hive is 100 bytes, too short for a base block");
    let old = page_log(1, TIME, 2, &[1], b'd');
    insta::assert_snapshot!(replay(&dirty, &[&old]), @r"
    ad
    LOG1: 1..=1
    warning: the base block of the hive was damaged; as Windows does, the copy in LOG1 was used and no other log replayed
    ");
    let older = page_log(1, TIME - 1, 2, &[1], b'd');
    insta::assert_snapshot!(replay(&dirty, &[&older]), @"the base block of the hive is damaged and no log can replace it");
}

#[test]
fn page_logs() {
    let dirty = hive((2, 1), "aaa");
    let good = page_log(2, TIME, 3, &[0, 2], b'b');
    let later = page_log(2, TIME + 1, 3, &[0, 1, 2], b'c');
    let older = page_log(2, TIME - 1, 3, &[0], b'x');
    let stale = page_log(0, TIME, 3, &[0], b'x');
    let cut = &later[..later.len() - 512];
    insta::assert_snapshot!(replay(&dirty, &[&good, b""]), @r"
    bab
    LOG1: 2..=2
    LOG2 skipped: the log is empty
    ");
    insta::assert_snapshot!(replay(&dirty, &[&good, &later]), @r"
    ccc
    LOG2: 2..=2
    LOG1 skipped: a later log is used instead
    ");
    insta::assert_snapshot!(replay(&dirty, &[&good, cut]), @r"
    bab
    LOG1: 2..=2
    LOG2 skipped: the log ends before its last dirty page: 12800 bytes, 13312 needed
    warning: LOG2 cannot be used: the log ends before its last dirty page: 12800 bytes, 13312 needed; changes that were only there are lost
    ");
    insta::assert_snapshot!(replay(&dirty, &[&older, &stale]), @r"
    -
    LOG2 skipped: its changes are already in the hive: it starts at 0, the hive is at 1
    LOG1 skipped: it is older than the hive
    ");
    // After an upgrade of Windows the old log still exists.
    let entries = log(1, 3, &[entry(1, 0, 3, &[1], b'n')]);
    insta::assert_snapshot!(replay(&dirty, &[&entries, b"", &later]), @r"
    ana
    LOG1: 1..=1
    LOG2 skipped: the log is empty
    LOG skipped: a later log is used instead
    ");
}

#[test]
fn broken_bins_are_not_accepted() {
    let dirty = hive((2, 1), "aa");
    let mut body = PAGE.to_le_bytes().to_vec();
    body.extend(PAGE.to_le_bytes());
    body.extend(vec![0; PAGE as usize]);
    let log = log(1, 2, &[sealed(1, 0, 2 * PAGE, 1, body)]);
    let result = recover(&dirty, &[("LOG1", &log)]).unwrap();
    assert!(!result.usable);
    assert_eq!(result.bytes, dirty);
    assert_eq!(
        result.skipped[0].reason,
        SkipReason::BrokenBin { offset: PAGE }
    );
    let mut headless = dirty;
    headless[508] ^= 1;
    assert_eq!(
        recover(&headless, &[("LOG1", &log)]),
        Err(ReplayError::NoBaseBlock)
    );
}

#[test]
fn a_clean_hive_is_left_alone() {
    let clean = hive((2, 2), "aa");
    let behind = log(
        1,
        2,
        &[entry(1, 0, 2, &[0], b'x'), entry(2, 0, 2, &[0], b'x')],
    );
    let ahead = log(
        3,
        2,
        &[entry(3, 0, 2, &[0], b'x'), entry(4, 0, 2, &[0], b'x')],
    );
    insta::assert_snapshot!(replay(&clean, &[&behind, b"junk"]), @"aa");
    insta::assert_snapshot!(replay(&clean, &[&behind, &ahead]), @r"
    aa
    warning: the hive is clean at sequence number 2, but LOG2 continues to 4: some program saved the hive without replaying its logs, and their changes are lost
    ");
    let result = recover(&clean, &[("LOG1", &ahead)]).unwrap();
    assert!(matches!(result.bytes, Cow::Borrowed(_)) && !result.was_dirty && result.usable);
}

proptest! {
    /// Flipped bytes end the replay or change nothing; the result is exactly a prefix.
    #[test]
    fn flipped_bytes_never_get_in(
        flips in proptest::collection::vec((0usize..3, 0usize..14000, 1u8..), 1..4),
        cut in 0usize..20000,
    ) {
        let mut hive = hive((8, 7), "aaa");
        let one = log(7, 3, &[entry(7, 0, 3, &[0], b'b'), entry(8, 0, 3, &[1], b'c')]);
        let two = log(9, 3, &[entry(9, 0, 4, &[2, 3], b'd')]);
        let mut files = [one, two];
        let mut hive_flipped = false;
        for (file, at, mask) in flips {
            let bytes = if file == 2 { &mut hive } else { &mut files[file] };
            hive_flipped |= file == 2;
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= mask;
            }
        }
        files[1].truncate(cut);
        let logs = [("LOG1", &files[0][..]), ("LOG2", &files[1][..])];
        if let Ok(result) = recover(&hive, &logs) {
            prop_assert!(result.bytes.len() <= hive.len() + files[0].len() + files[1].len());
            if !hive_flipped && result.usable {
                prop_assert!(
                    ["baa", "bca", "bcdd", "aadd"].contains(&letters(&result.bytes).as_str()),
                    "{}", letters(&result.bytes)
                );
            }
        }
    }

    #[test]
    fn any_bytes(hive in proptest::collection::vec(any::<u8>(), 0..5000),
                 log in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = recover(&hive, &[("LOG1", &log)]);
    }
}
