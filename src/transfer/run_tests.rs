use std::sync::atomic::AtomicU64;

use serde_json::json;

use super::*;

const MIB: u64 = 1 << 20;

/// A disk in memory. A simulated loss of power discards everything that was not flushed.
struct Memory {
    now: Mutex<Vec<u8>>,
    durable: Mutex<Vec<u8>>,
    writes: AtomicU64,
    zeroes: AtomicU64,
    /// The number of the first failing write.
    fails_at: AtomicU64,
}

impl Memory {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            durable: Mutex::new(bytes.clone()),
            now: Mutex::new(bytes),
            writes: AtomicU64::new(0),
            zeroes: AtomicU64::new(0),
            fails_at: AtomicU64::new(u64::MAX),
        })
    }

    fn lose_power(&self) {
        let durable = self.durable.lock().unwrap().clone();
        *self.now.lock().unwrap() = durable;
        self.fails_at.store(u64::MAX, Ordering::SeqCst);
    }

    fn bytes(&self) -> Vec<u8> {
        self.now.lock().unwrap().clone()
    }
}

impl BlockRead for Memory {
    fn size(&self) -> u64 {
        self.now.lock().unwrap().len() as u64
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let at = offset as usize;
        buf.copy_from_slice(&self.now.lock().unwrap()[at..at + buf.len()]);
        Ok(())
    }
}

impl BlockWrite for Memory {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let n = self.writes.fetch_add(1, Ordering::SeqCst);
        if n >= self.fails_at.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(28));
        }
        let at = offset as usize;
        self.now.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zeroes.fetch_add(len, Ordering::SeqCst);
        let at = offset as usize;
        self.now.lock().unwrap()[at..at + len as usize].fill(0);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        let now = self.now.lock().unwrap().clone();
        *self.durable.lock().unwrap() = now;
        Ok(())
    }
}

/// Data interspersed with grains of zeroes.
fn pattern(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; len as usize];
    for grain in bytes.chunks_mut(GRAIN) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if !state.is_multiple_of(3) {
            grain.fill((state >> 40) as u8 | 1);
        }
    }
    bytes
}

fn transfer<'a>(
    source: &Arc<Memory>,
    target: &Arc<Memory>,
    ranges: &'a Extents,
    journal: Option<&'a mut ExtentJournal>,
) -> Transfer<'a> {
    Transfer {
        source: source.clone(),
        target: target.clone(),
        ranges,
        zeroes: Zeroes::Leave,
        checkpoint: journal.into(),
        pace: None,
        cancel: None,
    }
}

#[test]
fn copies_what_the_ranges_hold_and_no_zeroes() {
    let size = 40 * MIB + 512;
    let source = Memory::new(pattern(size, 1));
    let target = Memory::new(vec![0; size as usize]);
    let ranges = Extents::whole(size);
    let mut last = 0;
    let moved = transfer(&source, &target, &ranges, None)
        .run(&mut |step| last = step.done)
        .unwrap();
    assert!(source.bytes() == target.bytes());
    assert_eq!((moved.read, last, moved.resumed), (size, size, 0));
    let zeroes = source.bytes().iter().filter(|b| **b == 0).count() as u64;
    assert_eq!(moved.written, size - zeroes);
    assert_eq!(target.zeroes.load(Ordering::SeqCst), 0);
    assert!(*target.durable.lock().unwrap() == source.bytes(), "flushed");

    // Only the ranges, and zeroes if the target may contain something.
    let target = Memory::new(vec![7; size as usize]);
    let ranges: Extents = [MIB + 5..9 * MIB, 20 * MIB..size].into_iter().collect();
    let mut some = transfer(&source, &target, &ranges, None);
    some.zeroes = Zeroes::Write;
    some.run(&mut |_| {}).unwrap();
    let mut want = vec![7; size as usize];
    for range in ranges.iter() {
        let range = range.start as usize..range.end as usize;
        want[range.clone()].copy_from_slice(&source.bytes()[range]);
    }
    assert!(target.bytes() == want);
    assert!(target.zeroes.load(Ordering::SeqCst) > 0);
}

/// The power fails at any write. The ranges in the journal are present, the rest is copied, and no
/// more than the window is copied again.
#[test]
fn a_copy_that_lost_power_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let size = 48 * MIB;
    let source = Memory::new(pattern(size, 2));
    let ranges = Extents::whole(size);
    for fails_at in [0, 1, 40, 90, 150] {
        let path = dir.path().join(format!("{fails_at}"));
        let target = Memory::new(vec![0; size as usize]);
        target.fails_at.store(fails_at, Ordering::SeqCst);
        let mut journal = ExtentJournal::create(&path, &json!(0), (None, false)).unwrap();
        let failed = transfer(&source, &target, &ranges, Some(&mut journal)).run(&mut |_| {});
        let error = failed.unwrap_err();
        assert_eq!(error.cause().unwrap().raw_os_error(), Some(28));
        assert!(!error.of_source());
        target.lose_power();
        let mut journal = ExtentJournal::open(&path).unwrap().unwrap().journal;
        for range in journal.done().iter() {
            let range = range.start as usize..range.end as usize;
            assert!(target.bytes()[range.clone()] == source.bytes()[range]);
        }
        let before = journal.done().bytes();
        let moved = transfer(&source, &target, &ranges, Some(&mut journal))
            .run(&mut |_| {})
            .unwrap();
        assert_eq!((moved.resumed, moved.read), (before, size - before));
        assert!(source.bytes() == target.bytes(), "{fails_at}");
        assert_eq!(journal.done(), &ranges);
    }
}

/// Little of the written data is unrecorded, whenever the copy stops.
#[test]
fn the_window_bounds_what_is_copied_again() {
    struct Watched {
        inner: Arc<Memory>,
        cancel: Arc<AtomicBool>,
        /// Bytes written since the last flush that began.
        open: AtomicU64,
        most: AtomicU64,
    }
    impl BlockRead for Watched {
        fn size(&self) -> u64 {
            self.inner.size()
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            self.inner.read_at(offset, buf)
        }
    }
    impl BlockWrite for Watched {
        fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            let len = data.len() as u64;
            let open = self.open.fetch_add(len, Ordering::SeqCst) + len;
            self.most.fetch_max(open, Ordering::SeqCst);
            if open > 200 * MIB {
                self.cancel.store(true, Ordering::SeqCst);
            }
            self.inner.write_at(offset, data)
        }
        fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
            self.inner.zero_at(offset, len)
        }
        fn flush(&self) -> io::Result<()> {
            let open = self.open.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
            self.open.fetch_sub(open, Ordering::SeqCst);
            self.inner.flush()
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let size = 128 * MIB;
    let mut journal =
        ExtentJournal::create(&dir.path().join("j"), &json!(0), (None, false)).unwrap();
    let ranges = Extents::whole(size);
    for checkpoint in [Checkpoint::Journal(&mut journal), Checkpoint::Target] {
        let cancel = Arc::new(AtomicBool::new(false));
        let target = Arc::new(Watched {
            inner: Memory::new(vec![0; size as usize]),
            cancel: cancel.clone(),
            open: AtomicU64::new(0),
            most: AtomicU64::new(0),
        });
        Transfer {
            source: Memory::new(vec![1; size as usize]),
            target: target.clone(),
            ranges: &ranges,
            zeroes: Zeroes::Leave,
            checkpoint,
            pace: None,
            cancel: Some(cancel),
        }
        .run(&mut |_| {})
        .unwrap();
        // The window, and the piece that passed the limit.
        let most = target.most.load(Ordering::SeqCst);
        assert!(most <= LEAST_WINDOW + PIECE, "{most}");
    }
}

/// Otherwise the target could not write it past the page cache.
#[test]
fn bytes_lie_in_memory_as_on_the_disk() {
    struct Aligned(u64);
    impl BlockRead for Aligned {
        fn size(&self) -> u64 {
            self.0
        }
        fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
            buf.fill(1);
            Ok(())
        }
    }
    impl BlockWrite for Aligned {
        fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            let inside = data.as_ptr().addr() % ALIGN;
            assert_eq!(inside as u64, offset % ALIGN as u64);
            Ok(())
        }
        fn zero_at(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }
    let disk = Arc::new(Aligned(64 * MIB));
    let ranges: Extents = [
        0..5 * MIB,
        9 * MIB + 512..30 * MIB,
        40 * MIB + 4608..64 * MIB,
    ]
    .into_iter()
    .collect();
    Transfer {
        source: disk.clone(),
        target: disk,
        ranges: &ranges,
        zeroes: Zeroes::Leave,
        checkpoint: Checkpoint::Never,
        pace: None,
        cancel: None,
    }
    .run(&mut |_| {})
    .unwrap();
}

#[test]
fn a_copy_that_is_cancelled_records_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let size = 64 * MIB;
    let source = Memory::new(pattern(size, 3));
    let target = Memory::new(vec![0; size as usize]);
    let mut journal =
        ExtentJournal::create(&dir.path().join("j"), &json!(0), (None, false)).unwrap();
    let ranges = Extents::whole(size);
    let cancel = Arc::new(AtomicBool::new(false));
    // So slow that the first progress report comes before the end.
    let pace = Pace::new(40 * MIB);
    let mut copy = transfer(&source, &target, &ranges, Some(&mut journal));
    copy.cancel = Some(cancel.clone());
    copy.pace = Some(&pace);
    let ended = copy.run(&mut |step| {
        if step.done >= 12 * MIB {
            cancel.store(true, Ordering::SeqCst);
        }
    });
    assert!(matches!(ended, Err(TransferError::Interrupted(_))));
    let done = journal.done().bytes();
    assert!((12 * MIB..size).contains(&done), "{done}");
}

#[test]
fn a_bandwidth_is_kept() {
    let size = 40 * MIB;
    let source = Memory::new(pattern(size, 4));
    let target = Memory::new(vec![0; size as usize]);
    let ranges = Extents::whole(size);
    let pace = Pace::new(80 * MIB);
    let start = std::time::Instant::now();
    let mut copy = transfer(&source, &target, &ranges, None);
    copy.pace = Some(&pace);
    copy.run(&mut |_| {}).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    assert!((0.3..1.5).contains(&seconds), "{seconds}");
}

/// The ranges in the journal were flushed before, at any time. Each piece has begun to be written
/// before it is flushed.
#[test]
fn a_line_names_only_what_was_flushed() {
    struct Noted {
        size: u64,
        journal: std::path::PathBuf,
        written: Mutex<Extents>,
        begun: Mutex<Extents>,
        flushed: Mutex<Extents>,
        lines: AtomicU64,
    }
    impl Noted {
        fn look(&self) {
            // Read before the journal, so that the journal cannot name more than this.
            let text = std::fs::read_to_string(&self.journal).unwrap();
            let flushed = self.flushed.lock().unwrap();
            let mut lines = 0;
            for line in text.split_inclusive('\n').skip(1) {
                let Some(line) = line.strip_suffix('\n') else {
                    break;
                };
                lines += 1;
                for [start, len] in serde_json::from_str::<Vec<[u64; 2]>>(&line[9..]).unwrap() {
                    let named: Extents = std::iter::once(start..start + len).collect();
                    assert!(named.minus(&flushed).is_empty(), "{named:?} {flushed:?}");
                }
            }
            self.lines.fetch_max(lines, Ordering::SeqCst);
        }
    }
    impl BlockRead for Noted {
        fn size(&self) -> u64 {
            self.size
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
    }
    impl BlockWrite for Noted {
        fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.look();
            let range = offset..offset + data.len() as u64;
            self.written.lock().unwrap().insert(range);
            Ok(())
        }
        fn zero_at(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            let written = self.written.lock().unwrap().clone();
            self.look();
            std::thread::sleep(Duration::from_millis(5));
            self.look();
            let begun = self.begun.lock().unwrap().clone();
            assert!(self.flushed.lock().unwrap().minus(&begun).is_empty());
            self.flushed.lock().unwrap().extend(&written);
            Ok(())
        }
        fn start_writeback(&self, offset: u64, len: u64) {
            let range: Extents = std::iter::once(offset..offset + len).collect();
            assert!(range.minus(&self.written.lock().unwrap()).is_empty());
            self.begun.lock().unwrap().extend(&range);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let size = 200 * MIB;
    let path = dir.path().join("j");
    let mut journal = ExtentJournal::create(&path, &json!(0), (None, false)).unwrap();
    let target = Arc::new(Noted {
        size,
        journal: path.clone(),
        written: Mutex::default(),
        begun: Mutex::default(),
        flushed: Mutex::default(),
        lines: AtomicU64::new(0),
    });
    let ranges = Extents::whole(size);
    Transfer {
        source: Memory::new(vec![1; size as usize]),
        target: target.clone(),
        ranges: &ranges,
        zeroes: Zeroes::Leave,
        checkpoint: Checkpoint::Journal(&mut journal),
        pace: None,
        cancel: None,
    }
    .run(&mut |_| {})
    .unwrap();
    target.look();
    assert!(target.lines.load(Ordering::SeqCst) > 4);
    assert_eq!(*target.begun.lock().unwrap(), ranges);
    let again = ExtentJournal::open(&path).unwrap().unwrap().journal;
    assert_eq!(again.done(), &ranges);
}
