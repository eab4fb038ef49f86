//! Writing and rolling back blocks, on files and on disks that misbehave.

use super::*;
use crate::block::FileDisk;
use crate::fix::journal::DiskRef;

fn image(path: &Path, seed: u8) -> Vec<u8> {
    image_of(path, seed, 3)
}

fn image_of(path: &Path, seed: u8, mib: u32) -> Vec<u8> {
    let bytes: Vec<u8> = (0..mib << 20)
        .map(|i| (i.wrapping_mul(31) >> 7) as u8 ^ seed)
        .collect();
    fs::write(path, &bytes).unwrap();
    bytes
}

fn setup(dir: &Path) -> (Journal, Vec<u8>, Vec<u8>) {
    let old = image(&dir.join("disk"), 0);
    let mut new = old.clone();
    new[5000..9000].fill(0xee);
    new[(2 << 20) - 10..(2 << 20) + 10].fill(0xdd);
    fs::write(dir.join("overlay"), &new).unwrap();
    let disk = DiskRef {
        path: dir.join("disk"),
        format: "raw".into(),
        size_bytes: old.len() as u64,
        in_place: true,
    };
    let mut journal = Journal::create(dir, disk, vec![], vec![]).unwrap();
    let before = FileDisk::open(&dir.join("disk")).unwrap();
    let after = FileDisk::open(&dir.join("overlay")).unwrap();
    let ranges = [(0, 65536), (65536, 65536), ((2 << 20) - 65536, 131072)];
    let changing = Changing {
        before: &before,
        after: &after,
        ranges: &ranges,
    };
    prepare(&mut journal, &[changing]).unwrap();
    (journal, old, new)
}

#[test]
fn commit_and_rollback_are_exact() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, old, new) = setup(dir.path());
    let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
    commit(&mut journal, &[&disk]).unwrap();
    assert_eq!(fs::read(dir.path().join("disk")).unwrap(), new);
    assert_eq!(journal.doc.state, JournalState::Committed);
    rollback(&mut journal, &[&disk], false).unwrap();
    assert_eq!(fs::read(dir.path().join("disk")).unwrap(), old);
    // A second rollback changes nothing.
    rollback(&mut journal, &[&disk], false).unwrap();
    assert_eq!(fs::read(dir.path().join("disk")).unwrap(), old);
}

#[test]
fn nothing_is_committed_over_what_another_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _, _) = setup(dir.path());
    let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
    disk.write_at(6000, b"somebody else").unwrap();
    let now = fs::read(dir.path().join("disk")).unwrap();
    let error = commit(&mut journal, &[&disk]).unwrap_err();
    assert!(
        matches!(
            error,
            CommitError::Stale {
                count: 1,
                total: 2,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(fs::read(dir.path().join("disk")).unwrap(), now);
    assert_ne!(
        journal.doc.state,
        JournalState::Committing,
        "nothing to roll back"
    );
    // The first of several is named.
    let named = journal.doc.changed()[0].1.ranges[0].offset;
    disk.write_at(2 << 20, b"somebody else").unwrap();
    let error = commit(&mut journal, &[&disk]).unwrap_err();
    assert!(
        matches!(error, CommitError::Stale { count: 2, offset, .. } if offset == named),
        "{error}"
    );
    let error = rollback(&mut journal, &[&disk], false).unwrap_err();
    assert!(
        matches!(error, CommitError::DiskChanged { count: 2, offset, .. } if offset == named),
        "{error}"
    );
}

/// Renames the journal's directory: no state can be saved, as on a full disk.
fn unsaved(dir: &Path, journal: &Journal) {
    fs::rename(journal.folder(), dir.join("elsewhere")).unwrap();
    journal.save().unwrap_err();
}

#[test]
fn a_commit_that_cannot_be_announced_leaves_nothing_to_undo() {
    let top = tempfile::tempdir().unwrap();
    let dir = top.path().join("work");
    fs::create_dir(&dir).unwrap();
    let (mut journal, old, _) = setup(&dir);
    let disk = FileDisk::open_rw(&dir.join("disk")).unwrap();
    journal.set_state(JournalState::Verified).unwrap();
    unsaved(top.path(), &journal);
    let error = commit(&mut journal, &[&disk]).unwrap_err();
    assert!(matches!(error, CommitError::Journal(_)), "{error}");
    assert_eq!(journal.doc.state, JournalState::Verified);
    let now = fs::read(top.path().join("elsewhere/disk")).unwrap();
    assert_eq!(now, old);
}

#[test]
fn a_disk_is_restored_when_no_state_can_be_saved() {
    let top = tempfile::tempdir().unwrap();
    let dir = top.path().join("work");
    fs::create_dir(&dir).unwrap();
    let (mut journal, old, new) = setup(&dir);
    let disk = FileDisk::open_rw(&dir.join("disk")).unwrap();
    commit(&mut journal, &[&disk]).unwrap();
    unsaved(top.path(), &journal);
    let now = || fs::read(top.path().join("elsewhere/disk")).unwrap();
    assert_eq!(now(), new);
    rollback(&mut journal, &[&disk], true).unwrap();
    assert_eq!(now(), old);
    // The journal is still valid: the rollback can be repeated.
    let saved = top.path().join("elsewhere/journal.json");
    fs::rename(top.path().join("elsewhere"), &dir).unwrap();
    assert!(!saved.exists());
    let mut read = Journal::load(journal.path()).unwrap();
    assert!(read.needs_undo());
    rollback(&mut read, &[&disk], false).unwrap();
    assert_eq!(read.doc.state, JournalState::RolledBack);
}

#[test]
fn a_disk_changed_by_others_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, old, _) = setup(dir.path());
    let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
    commit(&mut journal, &[&disk]).unwrap();
    disk.write_at(6000, b"somebody else").unwrap();
    let now = fs::read(dir.path().join("disk")).unwrap();
    let error = rollback(&mut journal, &[&disk], false).unwrap_err();
    let changed = matches!(&error, CommitError::DiskChanged { disk, count: 1, total: 2, .. }
        if *disk == dir.path().join("disk"));
    assert!(changed, "{error}");
    assert_eq!(fs::read(dir.path().join("disk")).unwrap(), now);
    rollback(&mut journal, &[&disk], true).unwrap();
    assert_eq!(fs::read(dir.path().join("disk")).unwrap(), old);
}

/// A loss of power in the middle of a write: some sectors of a range are new and some old.
#[test]
fn a_torn_write_of_ours_is_undone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, old, new) = setup(dir.path());
    let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
    // The same in the middle of a rollback.
    for state in [JournalState::Committing, JournalState::RollingBack] {
        journal.set_state(state).unwrap();
        disk.write_at(5120, &new[5120..7168]).unwrap();
        rollback(&mut journal, &[&disk], false).unwrap();
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), old);
    }
    // A sector that is neither was written by somebody else.
    journal.set_state(JournalState::Committing).unwrap();
    disk.write_at(5120, &new[5120..7168]).unwrap();
    disk.write_at(7168, b"somebody else").unwrap();
    let error = rollback(&mut journal, &[&disk], false).unwrap_err();
    assert!(
        matches!(error, CommitError::DiskChanged { count: 1, .. }),
        "{error}"
    );
    // After the end, no write of this program can be torn.
    disk.write_at(0, &new).unwrap();
    journal.set_state(JournalState::Committed).unwrap();
    disk.write_at(5120, &old[5120..7168]).unwrap();
    assert!(rollback(&mut journal, &[&disk], false).is_err());
}

#[test]
fn a_damaged_undo_log_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _, new) = setup(dir.path());
    let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
    commit(&mut journal, &[&disk]).unwrap();
    let log = dir.path().join(BEFORE_FILE);
    let whole = fs::read(&log).unwrap();
    let ranges = journal.doc.changed()[0].1.ranges.clone();
    let first = ranges[0].len as usize;
    for (at, range) in [(100, 0), (first, 1), (whole.len() - 1, 1)] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&log, bytes).unwrap();
        let error = rollback(&mut journal, &[&disk], false).unwrap_err();
        let of =
            matches!(error, CommitError::UndoDamaged { offset } if offset == ranges[range].offset);
        assert!(of, "{error}");
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), new);
    }
    // A range that no run can have written.
    fs::write(&log, &whole).unwrap();
    let mut long = Journal::load(journal.path()).unwrap();
    long.doc.undo.as_mut().unwrap().ranges[1].len = (1 << 20) + 1;
    let error = rollback(&mut long, &[&disk], true).unwrap_err();
    assert!(matches!(error, CommitError::UndoDamaged { .. }), "{error}");
    assert_eq!(fs::read(dir.path().join("disk")).unwrap(), new);
}

#[test]
fn new_bytes_that_were_damaged_meanwhile_are_not_committed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, old, _) = setup(dir.path());
    let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
    let log = dir.path().join(AFTER_FILE);
    let mut bytes = fs::read(&log).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&log, bytes).unwrap();
    let error = commit(&mut journal, &[&disk]).unwrap_err();
    assert!(matches!(error, CommitError::UndoDamaged { .. }), "{error}");
    assert_eq!(fs::read(dir.path().join("disk")).unwrap(), old);
}

/// Two disks as one unit.
struct Pair {
    dir: tempfile::TempDir,
    journal: Journal,
    old: [Vec<u8>; 2],
    new: [Vec<u8>; 2],
}

const NAMES: [&str; 2] = ["windows", "boot"];

fn pair() -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let old = [
        image(&dir.path().join("windows"), 0),
        image_of(&dir.path().join("boot"), 9, 4),
    ];
    let mut new = old.clone();
    new[0][5000..9000].fill(0xee);
    new[1][70_000..70_100].fill(0xdd);
    // In another part of the range.
    new[1][(2 << 20) + 5..(2 << 20) + 9].fill(0xcc);
    for (name, bytes) in NAMES.iter().zip(&new) {
        fs::write(dir.path().join(format!("{name}.new")), bytes).unwrap();
    }
    let disk = |i: usize| DiskRef {
        path: dir.path().join(NAMES[i]),
        format: "raw".into(),
        size_bytes: old[i].len() as u64,
        in_place: true,
    };
    let (windows, boot) = (disk(0), disk(1));
    let mut journal = Journal::create(dir.path(), windows, vec![boot], vec![]).unwrap();
    assert_eq!(journal.doc.schema, crate::fix::journal::SCHEMA_SEVERAL);
    let open = |name: String| FileDisk::open(&dir.path().join(name)).unwrap();
    let before = NAMES.map(|name| open(name.to_string()));
    let after = NAMES.map(|name| open(format!("{name}.new")));
    let ranges = [(0, 3 << 20)];
    let changing: Vec<_> = (before.iter().zip(&after))
        .map(|(before, after)| Changing {
            before,
            after,
            ranges: &ranges,
        })
        .collect();
    // One part of the first, two of the second.
    assert_eq!(prepare(&mut journal, &changing).unwrap(), 3 << 20);
    Pair {
        dir,
        journal,
        old,
        new,
    }
}

impl Pair {
    fn now(&self) -> [Vec<u8>; 2] {
        NAMES.map(|name| fs::read(self.dir.path().join(name)).unwrap())
    }

    fn open(&self) -> [FileDisk; 2] {
        NAMES.map(|name| FileDisk::open_rw(&self.dir.path().join(name)).unwrap())
    }
}

#[test]
fn two_disks_are_committed_and_rolled_back_together() {
    let mut pair = pair();
    let [windows, boot] = pair.open();
    commit(&mut pair.journal, &[&windows, &boot]).unwrap();
    assert_eq!(pair.now(), pair.new);
    // The document as another run reads it.
    let mut read = Journal::load(pair.journal.path()).unwrap();
    assert_eq!(read.doc.changed().len(), 2);
    // One of them alone is not rolled back.
    let error = rollback(&mut read, &[&windows], true).unwrap_err();
    assert!(matches!(error, CommitError::NothingToUndo), "{error}");
    assert_eq!(pair.now(), pair.new);
    let restored = rollback(&mut read, &[&windows, &boot], false).unwrap();
    assert_eq!((pair.now(), restored), (pair.old, 3 << 20));
}

#[test]
fn each_of_two_disks_has_its_own_size() {
    for grown in NAMES {
        let mut pair = pair();
        let [windows, boot] = pair.open();
        commit(&mut pair.journal, &[&windows, &boot]).unwrap();
        let (path, size) = (pair.dir.path().join(grown), 5 << 20);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(size).unwrap();
        let [windows, boot] = pair.open();
        let error = rollback(&mut pair.journal, &[&windows, &boot], true).unwrap_err();
        let of = matches!(&error, CommitError::OtherDisk { disk, actual, .. }
            if *disk == path && *actual == size);
        assert!(of, "{error}");
        assert_eq!(pair.now()[1][..3 << 20], pair.new[1][..3 << 20]);
    }
}

/// The second disk is made durable and read back as the first is.
#[test]
fn a_write_to_the_second_disk_that_is_lost_is_noticed_and_undone() {
    let mut pair = pair();
    let [windows, boot] = pair.open();
    // In the last of its parts.
    let lost = Forgetful(boot, (2 << 20) + 5);
    let error = commit(&mut pair.journal, &[&windows, &lost]).unwrap_err();
    let of = matches!(error, CommitError::ReadBack { offset } if offset == 2 << 20);
    assert!(of, "{error}");
    assert!(pair.journal.needs_undo());
    // A loss of power in the middle of a part of the second disk.
    let [windows, boot] = pair.open();
    boot.write_at(
        70_000 / 512 * 512,
        &pair.old[1][70_000 / 512 * 512..][..512],
    )
    .unwrap();
    rollback(&mut pair.journal, &[&windows, &boot], false).unwrap();
    assert_eq!(pair.now(), pair.old);
}

/// Counts what makes it durable, which fails from a certain time on.
struct Flushed(FileDisk, std::sync::atomic::AtomicUsize, usize);

impl BlockRead for Flushed {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }
}

impl BlockWrite for Flushed {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, data)
    }

    fn zero_at(&self, _: u64, _: u64) -> io::Result<()> {
        unreachable!()
    }

    fn flush(&self) -> io::Result<()> {
        match self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            n if n >= self.2 => Err(io::ErrorKind::StorageFull.into()),
            _ => self.0.flush(),
        }
    }
}

#[test]
fn every_disk_is_made_durable() {
    let mut pair = pair();
    let disks = pair.open().map(|disk| Flushed(disk, 0.into(), 9));
    let disks: Vec<_> = disks.iter().collect();
    let of = |disk: &&Flushed| disk.1.load(std::sync::atomic::Ordering::Relaxed);
    commit(&mut pair.journal, &[disks[0], disks[1]]).unwrap();
    assert_eq!(disks.iter().map(of).collect::<Vec<_>>(), [1, 1]);
    rollback(&mut pair.journal, &[disks[0], disks[1]], false).unwrap();
    assert_eq!(disks.iter().map(of).collect::<Vec<_>>(), [2, 2]);
}

#[test]
fn what_cannot_be_made_durable_is_neither_committed_nor_rolled_back() {
    let mut pair = pair();
    let flushed = |pair: &Pair, times| {
        let [windows, boot] = pair.open();
        (windows, Flushed(boot, 0.into(), times))
    };
    let (windows, boot) = flushed(&pair, 0);
    let error = commit(&mut pair.journal, &[&windows, &boot]).unwrap_err();
    assert!(matches!(error, CommitError::Io { .. }), "{error}");
    assert_eq!(pair.journal.doc.state, JournalState::Committing);
    let (windows, boot) = flushed(&pair, 0);
    rollback(&mut pair.journal, &[&windows, &boot], false).unwrap_err();
    assert!(pair.journal.needs_undo());
    let (windows, boot) = flushed(&pair, 1);
    rollback(&mut pair.journal, &[&windows, &boot], false).unwrap();
    assert_eq!(pair.now(), pair.old);
}

/// A repair of the boot files alone changes the second disk alone.
#[test]
fn a_disk_without_differences_is_neither_saved_nor_asked_for() {
    let mut pair = pair();
    let open = |name: &str| FileDisk::open(&pair.dir.path().join(name)).unwrap();
    let disks = [["windows", "windows"], ["boot", "boot.new"]].map(|pair| pair.map(open));
    let changing = [0, 1].map(|i| Changing {
        before: &disks[i][0],
        after: &disks[i][1],
        ranges: &[(0, 3 << 20)],
    });
    let total = prepare(&mut pair.journal, &changing).unwrap();
    assert_eq!(total, 2 << 20);
    let changed = pair.journal.doc.changed();
    let [(disk, log)] = &changed[..] else {
        panic!("{changed:?}");
    };
    assert_eq!(disk.path, pair.dir.path().join("boot"));
    assert_eq!(
        [log.before.as_str(), log.after.as_str()],
        ["backup/blocks-2.before", "backup/blocks-2.after"]
    );
    let [_, boot] = pair.open();
    commit(&mut pair.journal, &[&boot]).unwrap();
    assert_eq!(pair.now(), [&pair.old[0], &pair.new[1]].map(Vec::clone));
    rollback(&mut pair.journal, &[&boot], false).unwrap();
    assert_eq!(pair.now(), pair.old);
}

#[test]
fn what_keeps_one_disk_from_being_written_keeps_both() {
    let stranger = b"somebody else".as_slice();
    // Before the commit, one of them has changed since it was read.
    for (n, name) in NAMES.into_iter().enumerate() {
        let mut before = pair();
        let disks = before.open();
        disks[n].write_at([6_000, 70_020][n], stranger).unwrap();
        let now = before.now();
        let error = commit(&mut before.journal, &[&disks[0], &disks[1]]).unwrap_err();
        assert!(error.to_string().contains(&format!("/{name} ")), "{error}");
        assert!(before.now() == now, "{name}");
        assert_ne!(before.journal.doc.state, JournalState::Committing);
    }

    // Afterwards, somebody wrote to the second disk, or its saved blocks are damaged.
    for damaged in ["first", "", "short", "changed"] {
        let mut pair = pair();
        let [windows, boot] = pair.open();
        commit(&mut pair.journal, &[&windows, &boot]).unwrap();
        let saved = pair.dir.path().join("backup/blocks-2.before");
        let mut bytes = fs::read(&saved).unwrap();
        match damaged {
            "first" => windows.write_at(6_000, stranger).unwrap(),
            "" => boot.write_at(70_020, stranger).unwrap(),
            "short" => bytes.truncate(1 << 20),
            _ => bytes[(1 << 20) + 7] ^= 1,
        }
        fs::write(&saved, bytes).unwrap();
        let now = pair.now();
        let force = matches!(damaged, "short" | "changed");
        rollback(&mut pair.journal, &[&windows, &boot], force).unwrap_err();
        assert!(pair.now() == now, "{damaged}");
    }
}

#[test]
fn a_disk_of_another_size_is_never_written() {
    for grown in [4 << 20, 2 << 20] {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, ..) = setup(dir.path());
        let path = dir.path().join("disk");
        let disk = FileDisk::open_rw(&path).unwrap();
        commit(&mut journal, &[&disk]).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(grown).unwrap();
        let now = fs::read(&path).unwrap();
        let disk = FileDisk::open_rw(&path).unwrap();
        for force in [false, true] {
            let error = rollback(&mut journal, &[&disk], force).unwrap_err();
            let of = matches!(error, CommitError::OtherDisk { expected, actual, .. }
                if (expected, actual) == (3 << 20, grown));
            assert!(of, "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), now);
        assert_eq!(journal.doc.state, JournalState::Committed);
    }
}

/// A disk that accepts writes to one place without storing them.
struct Forgetful(FileDisk, u64);

impl BlockRead for Forgetful {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }
}

impl BlockWrite for Forgetful {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match (offset..offset + data.len() as u64).contains(&self.1) {
            true => Ok(()),
            false => self.0.write_at(offset, data),
        }
    }

    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero_at(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
}

#[test]
fn what_was_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, old, _) = setup(dir.path());
    let open = || FileDisk::open_rw(&dir.path().join("disk")).unwrap();
    // In the first range, and in the second.
    for (lost, range) in [(6000, 0), (2 << 20, (2 << 20) - 65536)] {
        let error = commit(&mut journal, &[&Forgetful(open(), lost)]).unwrap_err();
        let of = matches!(error, CommitError::ReadBack { offset } if offset == range);
        assert!(of, "{error}");
        assert!(journal.needs_undo());
        rollback(&mut journal, &[&open()], false).unwrap();
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), old);
    }
}

#[test]
fn every_state_from_the_first_write_on_needs_an_undo() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, ..) = setup(dir.path());
    for (state, needs) in [
        (JournalState::Planned, false),
        (JournalState::Fixing, false),
        (JournalState::Verified, false),
        (JournalState::Committing, true),
        (JournalState::Committed, true),
        (JournalState::RollingBack, true),
        (JournalState::RolledBack, false),
    ] {
        journal.doc.state = state;
        assert_eq!(journal.needs_undo(), needs, "{state:?}");
    }
    journal.doc.disk.in_place = false;
    journal.doc.state = JournalState::Committed;
    assert!(!journal.needs_undo(), "only an overlay was written");
}

/// Looks at the journal whenever it is to do something, and notes it.
struct Watching<'j> {
    disk: FileDisk,
    folder: &'j Path,
    seen: std::sync::Mutex<Vec<(&'static str, JournalState)>>,
}

impl Watching<'_> {
    fn note(&self, what: &'static str) {
        let journal = Journal::load(&self.folder.join("journal.json")).unwrap();
        assert_eq!(
            journal.doc.changed().len(),
            1,
            "what undoes it is in the journal"
        );
        let mut seen = self.seen.lock().unwrap();
        if seen.last() != Some(&(what, journal.doc.state)) {
            seen.push((what, journal.doc.state));
        }
    }
}

impl BlockRead for Watching<'_> {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.note("read");
        self.disk.read_at(offset, buf)
    }
}

impl BlockWrite for Watching<'_> {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.note("write");
        self.disk.write_at(offset, data)
    }

    fn zero_at(&self, _: u64, _: u64) -> io::Result<()> {
        unreachable!()
    }

    fn flush(&self) -> io::Result<()> {
        self.note("flush");
        self.disk.flush()
    }
}

/// A loss of power at any of these steps leaves a journal that tells what to do.
#[test]
fn a_disk_is_looked_at_announced_written_made_durable_and_read_back_in_this_order() {
    use JournalState::{Committed, Committing, Planned, RollingBack};
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, ..) = setup(dir.path());
    let watched = || Watching {
        disk: FileDisk::open_rw(&dir.path().join("disk")).unwrap(),
        folder: dir.path(),
        seen: Default::default(),
    };
    let seen = |disk: Watching<'_>| disk.seen.into_inner().unwrap();
    let disk = watched();
    commit(&mut journal, &[&disk]).unwrap();
    let during = [
        ("write", Committing),
        ("flush", Committing),
        ("read", Committing),
    ];
    assert_eq!(seen(disk)[..1], [("read", Planned)]);
    let disk = watched();
    rollback(&mut journal, &[&disk], false).unwrap();
    let mut wanted = vec![("read", Committed)];
    wanted.extend(during.map(|(what, _)| (what, RollingBack)));
    assert_eq!(seen(disk), wanted);
    let disk = watched();
    commit(&mut journal, &[&disk]).unwrap();
    assert_eq!(seen(disk)[1..], during);
}

#[test]
fn the_old_and_the_new_bytes_are_durable_before_the_journal_names_them() {
    let dir = tempfile::tempdir().unwrap();
    crate::files::order::seen();
    let (journal, old, new) = setup(dir.path());
    let folder = dir
        .path()
        .file_name()
        .unwrap()
        .to_string_lossy()
        .into_owned();
    let mut seen = crate::files::order::seen();
    // The journal of a plan comes first.
    let save = [
        "sync journal.json".into(),
        "rename journal.json".into(),
        format!("sync {folder}"),
    ];
    assert_eq!(seen.drain(..3).collect::<Vec<_>>(), save);
    let logs = ["sync blocks.before", "sync blocks.after", "sync backup"].map(String::from);
    assert_eq!(seen, [&logs[..], &save].concat());
    let read = Journal::load(journal.path()).unwrap();
    let (_, log) = read.doc.changed().remove(0);
    assert_eq!(log.ranges.len(), 2);
    for range in &log.ranges {
        let at = range.offset as usize..(range.offset + range.len) as usize;
        assert_eq!(range.before_sha256, sha256_hex(&old[at.clone()]));
        assert_eq!(range.after_sha256, sha256_hex(&new[at]));
    }
}

/// A range of 1 MiB and a half is handled in two parts.
#[test]
fn long_ranges_are_saved_to_their_end() {
    let dir = tempfile::tempdir().unwrap();
    let old = image(&dir.path().join("disk"), 0);
    let new: Vec<u8> = old.iter().map(|byte| byte ^ 0xff).collect();
    fs::write(dir.path().join("overlay"), &new).unwrap();
    let disk = DiskRef {
        path: dir.path().join("disk"),
        format: "raw".into(),
        size_bytes: old.len() as u64,
        in_place: true,
    };
    let mut journal = Journal::create(dir.path(), disk, vec![], vec![]).unwrap();
    let [before, after] = ["disk", "overlay"].map(|n| FileDisk::open(&dir.path().join(n)).unwrap());
    let ranges = [(512, (1 << 20) + (1 << 19)), ((2 << 20) + 512, 1024)];
    let changing = Changing {
        before: &before,
        after: &after,
        ranges: &ranges,
    };
    let total = prepare(&mut journal, &[changing]).unwrap();
    assert_eq!(total, (1 << 20) + (1 << 19) + 1024);
    let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
    commit(&mut journal, &[&disk]).unwrap();
    let now = fs::read(dir.path().join("disk")).unwrap();
    for (i, (now, (old, new))) in now.iter().zip(old.iter().zip(&new)).enumerate() {
        let changed = ranges
            .iter()
            .any(|(at, len)| (*at..at + len).contains(&(i as u64)));
        assert_eq!(now, if changed { new } else { old }, "byte {i}");
    }
    assert_eq!(rollback(&mut journal, &[&disk], false).unwrap(), total);
    assert!(fs::read(dir.path().join("disk")).unwrap() == old);
}

#[test]
fn a_journal_without_an_undo_log_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, old, _) = setup(dir.path());
    journal.doc.undo = None;
    let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
    for disks in [&[&disk as &dyn BlockWrite][..], &[]] {
        let error = commit(&mut journal, disks).unwrap_err();
        assert!(matches!(error, CommitError::NothingToUndo), "{error}");
        let error = rollback(&mut journal, disks, true).unwrap_err();
        assert!(matches!(error, CommitError::NothingToUndo), "{error}");
    }
    assert!(fs::read(dir.path().join("disk")).unwrap() == old);
}

#[test]
fn saved_blocks_are_seen_whatever_else_lies_beside_them() {
    let dir = tempfile::tempdir().unwrap();
    let backup = dir.path().join("backup");
    assert!(!holds_saved_blocks(dir.path()));
    fs::write(&backup, "a file").unwrap();
    assert!(!holds_saved_blocks(dir.path()));
    // What cannot be looked through may hold them.
    fs::remove_file(&backup).unwrap();
    std::os::unix::fs::symlink(&backup, &backup).unwrap();
    assert!(holds_saved_blocks(dir.path()));
    fs::remove_file(&backup).unwrap();
    fs::create_dir(&backup).unwrap();
    for (name, holds) in [
        ("SYSTEM", false),
        ("blocks.after", false),
        ("other.before", false),
        ("blocks.before", true),
        ("blocks-2.before", true),
        ("blocks-10.before", true),
    ] {
        fs::write(backup.join(name), "").unwrap();
        assert_eq!(holds_saved_blocks(dir.path()), holds, "{name}");
        fs::remove_file(backup.join(name)).unwrap();
    }
}
