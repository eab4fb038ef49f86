//! `sync.json`: describes the copies in a synced directory.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::disk::Image;
use crate::error::{Blocker, Error, Result};
use crate::files;
use crate::fix::trusted::TrustedFolder;
use crate::transfer::{ExtentJournal, Extents};

use super::super::place::untrusted;
use super::changes::{Link, Now, Since};
use super::sample;

pub(super) const FILE: &str = "sync.json";
const SCHEMA: &str = "hyper2kvm/sync/1";
/// File name endings of the copies and of their journals.
const COPY: &str = ".sync.qcow2";
const JOURNAL: &str = ".sync.journal";
/// The next `sync.json` before it is renamed.
const NEXT: &str = ".sync.json.new";
const OVER: &str = "hyper2kvm release deletes the synced directory; then sync again";

/// The state of all synced disks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SyncState {
    schema: String,
    version: String,
    pub(super) name: String,
    pub(super) source: String,
    /// The disks in the order of the source.
    pub(super) disks: Vec<SyncedDisk>,
    pub passes: Vec<Pass>,
    /// Changed bytes found since the last complete pass.
    #[serde(default)]
    pub(super) changed: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct SyncedDisk {
    pub(super) size: u64,
    /// The file name of the copy, in the directory.
    pub(super) file: String,
    /// The frozen links of the last pass, the newest first.
    pub(super) links: Vec<Link>,
}

/// One pass, in bytes and seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pass {
    /// Seconds since 1970.
    pub at: u64,
    pub seconds: f64,
    /// The part of the duration that is not the copy.
    pub overhead_s: f64,
    /// Bytes changed since the previous pass.
    pub changed: u64,
    pub copied: u64,
    /// Bytes known to be left for the last pass.
    pub left: u64,
    /// Changed bytes per second.
    pub change_rate: f64,
    /// The projected duration of a last pass at this time.
    pub projected_s: f64,
    /// The bandwidth limit of the copy, in bytes per second.
    #[serde(default)]
    pub bandwidth: Option<u64>,
}

impl SyncState {
    pub(super) fn new(name: &str, source: &Path) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            name: name.to_owned(),
            source: crate::text::of_path(source).into_owned(),
            disks: Vec::new(),
            passes: Vec::new(),
            changed: 0,
        }
    }

    /// Loads the state in a directory; `None` if there is none. Only the caller and root may have
    /// written it.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        if !is_synced(folder) {
            return Ok(None);
        }
        let trusted = TrustedFolder::open(folder).map_err(untrusted)?;
        let bytes = trusted.read(Path::new(FILE)).map_err(untrusted)?;
        let damaged = |why: String| {
            Error::failed(format!(
                "{} cannot be used: {why}",
                folder.join(FILE).display()
            ))
            .hint(OVER)
        };
        let state: Self = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if state.schema != SCHEMA {
            return Err(damaged(format!("its schema is {:?}", state.schema)));
        }
        let plain = |name: &str| Path::new(name).file_name() == Some(OsStr::new(name));
        match state.disks.iter().all(|disk| plain(&disk.file)) {
            true => Ok(Some(state)),
            false => Err(damaged("it names files elsewhere".to_owned())),
        }
    }

    /// Writes the state to a temporary file and renames it. It is durable when this returns.
    pub(super) fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let beside = folder.join(NEXT);
        let write = || -> io::Result<()> {
            std::fs::write(&beside, format!("{:#}\n", json!(self)))?;
            files::sync(std::fs::File::open(&beside)?, &beside)?;
            files::rename(&beside, &path)?;
            files::sync(std::fs::File::open(folder)?, folder)
        };
        write().map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))
    }

    /// All files that syncs have written to the directory.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let copies = (0..self.disks.len().max(1)).map(|i| copy_name(&self.name, i));
        let of_copy = |file: String| {
            let journal = journal_name(&file);
            [format!("{journal}.new"), journal, file]
        };
        let own = [FILE, NEXT].map(str::to_owned);
        let all = copies.flat_map(of_copy).chain(own);
        all.map(PathBuf::from).collect()
    }

    /// The state for people and scripts, without the details for the next pass.
    pub fn summary(&self) -> Value {
        let disk = |disk: &SyncedDisk| json!({"file": disk.file, "size_bytes": disk.size});
        json!({
            "name": self.name,
            "source": self.source,
            "disks": self.disks.iter().map(disk).collect::<Vec<_>>(),
            "passes": self.passes,
        })
    }

    /// The ranges that may have changed on each disk since the last pass. Writes nothing.
    pub(super) fn changes(&self, sizes: &[u64], disks: &[Now]) -> Result<Vec<Extents>> {
        if sizes.iter().ne(self.disks.iter().map(|disk| &disk.size)) {
            let shown = |sizes: &mut dyn Iterator<Item = u64>| {
                let all: Vec<String> = sizes.map(|size| size.to_string()).collect();
                all.join(", ")
            };
            let blocker = Blocker::new(
                "sync-disks-changed",
                format!(
                    "the synced disks have {} bytes, and those of the VM {}",
                    shown(&mut self.disks.iter().map(|disk| disk.size)),
                    shown(&mut sizes.iter().copied()),
                ),
                OVER,
            );
            let what = "these are not the disks that were synced";
            return Err(Error::refused(what, vec![blocker]));
        }
        let disks = self.disks.iter().zip(disks);
        disks.map(|(disk, now)| disk.changes(now)).collect()
    }

    /// Refuses ranges that are reported as unchanged but differ. Only external bitmaps can be
    /// wrong.
    pub(super) fn check_sample(
        &self,
        folder: &Path,
        images: &[&Image],
        disks: &[Now],
        changed: &[Extents],
    ) -> Result<()> {
        for (i, disk) in self.disks.iter().enumerate() {
            let (Some(image), Some(changed)) = (images.get(i), changed.get(i)) else {
                continue;
            };
            if disks.get(i).is_none_or(|now| now.dirty.is_none()) {
                continue;
            }
            let unchanged = disk.done(folder)?.minus(changed);
            let copy = folder.join(&disk.file);
            let turn = self.passes.len();
            let mut differ = sample::differences(image, &copy, &unchanged, turn)?;
            // A disk in use may have changed since its bitmap was read.
            if !differ.is_empty()
                && let Some(dirty) = Now::of(image)?.dirty
            {
                differ = differ.minus(&dirty);
            }
            if let Some(at) = differ.iter().next().map(|range| range.start) {
                let blocker = Blocker::new(
                    "sync-bitmap-late",
                    format!(
                        "byte {at} of {} has changed since the last pass, and the dirty bitmap does not show it: it began later, or was cleared",
                        disk.file
                    ),
                    "export a bitmap that began at the last pass or earlier; or delete the synced directory (hyper2kvm release) and sync again",
                );
                let what = "the dirty bitmap does not show what has changed";
                return Err(Error::refused(what, vec![blocker]));
            }
        }
        Ok(())
    }

    /// Removes changed ranges from the journals, then records the chains that the copies follow. In
    /// this order, a run killed in between finds the same changes again.
    pub(super) fn follow(
        &mut self,
        folder: &Path,
        changed: &[Extents],
        disks: &[Now],
    ) -> Result<()> {
        for (disk, changed) in self.disks.iter().zip(changed) {
            let done = disk.done(folder)?;
            disk.restart(folder, done.minus(changed))?;
        }
        for (disk, now) in self.disks.iter_mut().zip(disks) {
            disk.links.clone_from(&now.links);
        }
        let found = changed.iter().map(Extents::bytes);
        self.changed = found.fold(self.changed, u64::saturating_add);
        self.save(folder)
    }

    /// The copy rate in bytes per second. It is that of the pass that copied most, or of one under
    /// the same limit that copied enough to measure.
    pub(super) fn rate(&self, limit: Option<u64>) -> Option<f64> {
        let worth = |pass: &&Pass| {
            (
                pass.copied.min(ENOUGH),
                pass.bandwidth == limit,
                pass.copied,
            )
        };
        let most = self.passes.iter().max_by_key(worth)?;
        let seconds = (most.seconds - most.overhead_s).max(0.01);
        let rate = most.copied as f64 / seconds;
        let limited = limit.map_or(rate, |limit| rate.min(limit as f64));
        (most.copied > 0).then_some(limited)
    }
}

/// Whether a directory with only this file was started by a killed run.
pub(super) fn is_begun(file: &OsStr) -> bool {
    file == NEXT
}

/// Whether a sync writes files of that name, besides `sync.json`.
pub(super) fn is_copy(name: &str) -> bool {
    let ends = |end: &str| name.ends_with(end);
    name == NEXT || ends(COPY) || ends(JOURNAL) || ends(&format!("{JOURNAL}.new"))
}

/// Whether a directory belongs to a sync.
pub(crate) fn is_synced(folder: &Path) -> bool {
    folder.join(FILE).symlink_metadata().is_ok()
}

pub(super) fn copy_name(name: &str, i: usize) -> String {
    match i {
        0 => format!("{name}{COPY}"),
        i => format!("{name}-{i}{COPY}"),
    }
}

fn journal_name(file: &str) -> String {
    format!("{}{JOURNAL}", file.strip_suffix(COPY).unwrap_or(file))
}

impl SyncedDisk {
    fn changes(&self, now: &Now) -> Result<Extents> {
        let blocker = match now.since(&self.links) {
            Since::Changed(changed) => return Ok(changed),
            Since::OtherBase => Blocker::new(
                "sync-base-changed",
                format!(
                    "the image at the bottom of the chain of {} was written to or replaced since the last pass",
                    self.file
                ),
                OVER,
            ),
            Since::NoBitmap => Blocker::new(
                "sync-no-bitmap",
                format!(
                    "the NBD server shows no dirty bitmap (qemu:dirty-bitmap:NAME) for {}",
                    self.file
                ),
                "export one that began at the pass before or earlier; or delete the synced directory (hyper2kvm release) and sync again",
            ),
        };
        let what = "nothing shows what has changed";
        Err(Error::refused(what, vec![blocker]))
    }

    /// The journal of its copy, if it belongs to the existing file.
    pub(super) fn journal(&self, folder: &Path) -> Result<Option<ExtentJournal>> {
        let path = folder.join(journal_name(&self.file));
        let opened = ExtentJournal::open(&path)
            .map_err(|e| Error::failed("reading what was copied").because(e))?;
        let what = self.what(folder)?;
        Ok(opened.and_then(|opened| (opened.what == what).then_some(opened.journal)))
    }

    /// The ranges in which the copy equals the recorded links.
    pub(super) fn done(&self, folder: &Path) -> Result<Extents> {
        let journal = self.journal(folder)?;
        Ok(journal.map_or_else(Extents::default, |journal| journal.done().clone()))
    }

    /// Replaces the journal by one with only these ranges.
    pub(super) fn restart(&self, folder: &Path, done: Extents) -> Result<ExtentJournal> {
        let path = folder.join(journal_name(&self.file));
        ExtentJournal::restart(&path, &self.what(folder)?, done)
            .map_err(|e| Error::failed("recording what is copied").because(e))
    }

    fn what(&self, folder: &Path) -> Result<Value> {
        use std::os::unix::fs::MetadataExt;
        let file = folder.join(&self.file);
        let meta = file
            .symlink_metadata()
            .map_err(|e| Error::failed(format!("looking at {}", file.display())).because(e))?;
        Ok(json!({"sync": self.file, "size": self.size, "inode": meta.ino()}))
    }
}

/// The assumed rate before anything was copied, in bytes per second.
const ASSUMED_RATE: f64 = 100.0 * 1024.0 * 1024.0;

/// The smallest copy from which a rate can be measured.
const ENOUGH: u64 = 64 << 20;

/// Seconds for the fix, besides [`READINGS`].
const FIX: f64 = 0.1;

/// Readings of a guest during the last pass, each as long as in an earlier pass. They find changes,
/// inspect, verify, and map the disks and check the copy.
const READINGS: f64 = 4.0;

/// The projected duration of the last pass. It has inspection, fix, verification, and the copy of
/// the rest at no more than `limit` bytes per second.
pub(super) fn projection(state: &SyncState, left: u64, limit: Option<u64>) -> f64 {
    // The chain of the latest pass is the most similar one.
    let overhead = state.passes.last().map_or(0.0, |pass| pass.overhead_s);
    let assumed = limit.map_or(ASSUMED_RATE, |limit| ASSUMED_RATE.min(limit as f64));
    FIX + READINGS * overhead + left as f64 / state.rate(limit).unwrap_or(assumed)
}

/// The duration of `--verify-copy` for so many bytes. It is unmeasured, but reading is at least as
/// fast as copying.
pub(super) fn comparison(state: &SyncState, bytes: u64) -> f64 {
    bytes as f64 / state.rate(None).unwrap_or(ASSUMED_RATE).max(ASSUMED_RATE)
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod more_tests;
#[cfg(test)]
#[expect(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    fn state() -> SyncState {
        let mut state = SyncState::new("vm", Path::new("/vm.vmx"));
        state.disks.push(SyncedDisk {
            size: 1 << 30,
            file: copy_name("vm", 0),
            links: Vec::new(),
        });
        state
    }

    #[test]
    fn a_state_is_read_back_and_names_nothing_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        assert!(SyncState::load(dir.path()).unwrap().is_none());
        state().save(dir.path()).unwrap();
        let read = SyncState::load(dir.path()).unwrap().unwrap();
        assert_eq!(read.disks[0].file, "vm.sync.qcow2");
        let files = read.files();
        assert!(files.contains(&"vm.sync.journal".into()) && files.contains(&FILE.into()));
        for elsewhere in ["../vm.sync.qcow2", "/etc/passwd", "", "a/b"] {
            let mut state = state();
            state.disks[0].file = elsewhere.to_owned();
            state.save(dir.path()).unwrap();
            assert!(SyncState::load(dir.path()).is_err(), "{elsewhere}");
        }
        std::fs::write(dir.path().join(FILE), "{}").unwrap();
        assert!(SyncState::load(dir.path()).is_err());
        // Of a later program, and with a second disk elsewhere.
        let mut other = state();
        other.schema = "hyper2kvm/sync/2".to_owned();
        let mut second = state();
        second.disks.push(SyncedDisk {
            file: "../vm-1.sync.qcow2".to_owned(),
            ..second.disks[0].clone()
        });
        for state in [other, second] {
            state.save(dir.path()).unwrap();
            let error = SyncState::load(dir.path()).unwrap_err();
            assert!(error.message.contains("cannot be used"), "{error}");
        }
    }

    fn passed(copied: u64, seconds: f64, bandwidth: Option<u64>) -> Pass {
        Pass {
            at: 0,
            seconds,
            overhead_s: 2.0,
            changed: 0,
            copied,
            left: 0,
            change_rate: 0.0,
            projected_s: 0.0,
            bandwidth,
        }
    }

    #[test]
    fn the_rate_is_that_of_the_largest_pass() {
        let mut state = state();
        assert_eq!(state.rate(None), None);
        for (copied, seconds) in [(1000, 3.0), (10, 2.5), (0, 2.0)] {
            state.passes.push(passed(copied, seconds, None));
        }
        assert_eq!(state.rate(None), Some(1000.0));
        assert_eq!(state.rate(Some(600)), Some(600.0));
    }

    #[test]
    fn a_limit_of_a_pass_is_none_of_the_last_one() {
        const MIB: u64 = 1 << 20;
        let mut state = state();
        state.passes.push(passed(1000 * MIB, 102.0, Some(10 * MIB)));
        // Too little to measure a rate.
        state.passes.push(passed(MIB, 2.1, None));
        assert_eq!(state.rate(None), Some(10.0 * MIB as f64));
        state.passes.push(passed(100 * MIB, 3.0, None));
        assert_eq!(state.rate(None), Some(100.0 * MIB as f64));
        assert_eq!(state.rate(Some(10 * MIB)), Some(10.0 * MIB as f64));
        let expected = FIX + READINGS * 2.0 + 50.0;
        assert!((projection(&state, 500 * MIB, Some(10 * MIB)) - expected).abs() < 0.01);
    }

    #[test]
    fn an_expectation_is_of_the_latest_pass_and_never_without_end() {
        const MIB: u64 = 1 << 20;
        let mut state = state();
        // Nothing was measured: 100 MiB a second, or less where less is allowed.
        let expected = |state: &SyncState, limit| projection(state, 200 * MIB, limit);
        assert!((expected(&state, None) - FIX - 2.0).abs() < 0.001);
        assert!((expected(&state, Some(50 * MIB)) - FIX - 4.0).abs() < 0.001);
        assert!((expected(&state, Some(500 * MIB)) - FIX - 2.0).abs() < 0.001);
        // A pass that copied nothing, as long as its overhead, measures nothing.
        state.passes.push(passed(0, 2.0, None));
        assert_eq!(state.rate(None), None);
        let mut longer = passed(100 * MIB, 5.0, None);
        longer.overhead_s = 5.0;
        state.passes.push(longer);
        assert_eq!(state.rate(None), Some(100.0 * MIB as f64 / 0.01));
        let readings = READINGS * 5.0;
        assert!((expected(&state, Some(100 * MIB)) - FIX - readings - 2.0).abs() < 0.001);
        assert!((comparison(&state, 100 * MIB) - 0.01).abs() < 0.001);
    }

    #[test]
    fn a_state_is_durable_before_it_has_its_name() {
        let dir = tempfile::tempdir().unwrap();
        crate::files::order::seen();
        state().save(dir.path()).unwrap();
        let folder = dir.path().file_name().unwrap().to_string_lossy();
        let steps = [
            "sync .sync.json.new",
            "rename sync.json",
            &format!("sync {folder}"),
        ];
        assert_eq!(crate::files::order::seen(), steps);
    }

    #[test]
    fn a_state_is_told_in_full_but_for_what_only_a_pass_needs() {
        let mut state = state();
        state.disks.push(SyncedDisk {
            size: 512,
            file: copy_name("vm", 1),
            links: now(&[("base", &[[1, 2]])]).links,
        });
        state.changed = 99;
        state.passes.push(Pass {
            at: 1,
            seconds: 2.5,
            overhead_s: 3.5,
            changed: 4,
            copied: 5,
            left: 6,
            change_rate: 7.5,
            projected_s: 8.5,
            bandwidth: Some(9),
        });
        let passes = json!([{
            "at": 1, "seconds": 2.5, "overhead_s": 3.5, "changed": 4, "copied": 5, "left": 6,
            "change_rate": 7.5, "projected_s": 8.5, "bandwidth": 9,
        }]);
        let summary = json!({
            "name": "vm",
            "source": "/vm.vmx",
            "disks": [
                {"file": "vm.sync.qcow2", "size_bytes": 1 << 30},
                {"file": "vm-1.sync.qcow2", "size_bytes": 512},
            ],
            "passes": passes,
        });
        assert_eq!(state.summary(), summary);
        let mut kept = json!(state);
        kept["version"] = json!("");
        let wanted = json!({
            "schema": "hyper2kvm/sync/1",
            "version": "",
            "name": "vm",
            "source": "/vm.vmx",
            "disks": [
                {"size": 1 << 30, "file": "vm.sync.qcow2", "links": []},
                {
                    "size": 512, "file": "vm-1.sync.qcow2",
                    "links": [{"files": "base", "ranges": [[1, 2]]}],
                },
            ],
            "passes": passes,
            "changed": 99,
        });
        assert_eq!(kept, wanted);
        // An older one has no such figures.
        let old = kept.as_object_mut().unwrap();
        old.remove("changed");
        old["passes"][0]
            .as_object_mut()
            .unwrap()
            .remove("bandwidth");
        let read: SyncState = serde_json::from_value(kept).unwrap();
        assert_eq!((read.changed, read.passes[0].bandwidth), (0, None));
        for (name, begun) in [
            (".sync.json.new", true),
            (FILE, false),
            ("vm.sync.qcow2", false),
        ] {
            assert_eq!(is_begun(OsStr::new(name)), begun, "{name}");
        }
    }

    fn set(ranges: &[std::ops::Range<u64>]) -> Extents {
        ranges.iter().cloned().collect()
    }

    fn now(links: &[(&str, &[[u64; 2]])]) -> Now {
        let link = |(name, ranges): &(&str, &[[u64; 2]])| Link {
            files: json!(name),
            ranges: ranges.to_vec(),
        };
        Now {
            links: links.iter().map(link).collect(),
            dirty: None,
        }
    }

    /// A run that is killed in between finds the same changes again.
    #[test]
    fn what_has_changed_leaves_the_journal_of_its_disk() {
        const G: u64 = 64 << 10;
        let dir = tempfile::tempdir().unwrap();
        let mut state = state();
        state.disks.push(SyncedDisk {
            file: copy_name("vm", 1),
            ..state.disks[0].clone()
        });
        let base = now(&[("base", &[])]);
        for disk in &mut state.disks {
            std::fs::write(dir.path().join(&disk.file), "copy").unwrap();
            disk.links.clone_from(&base.links);
            disk.restart(dir.path(), set(&[0..10 * G])).unwrap();
        }
        let newer = now(&[("snapshot", &[[2 * G, G]]), ("base", &[])]);
        let sizes = [1 << 30, 1 << 30];
        let all = [newer.clone(), base.clone()];
        let changed = state.changes(&sizes, &all).unwrap();
        assert_eq!(changed, [set(&[2 * G..3 * G]), set(&[])]);
        // Nothing was written yet.
        assert_eq!(state.disks[0].done(dir.path()).unwrap(), set(&[0..10 * G]));
        state.follow(dir.path(), &changed, &all).unwrap();
        assert_eq!(
            state.disks[0].done(dir.path()).unwrap(),
            set(&[0..2 * G, 3 * G..10 * G])
        );
        assert_eq!(state.disks[1].done(dir.path()).unwrap(), set(&[0..10 * G]));
        assert_eq!(state.changed, G);
        let read = SyncState::load(dir.path()).unwrap().unwrap();
        assert_eq!(read.disks[0].links, newer.links);
        assert_eq!(read.disks[1].links, base.links);
        // Found before a pass that was killed: both count.
        let changed = [set(&[0..G]), set(&[G..3 * G])];
        state.follow(dir.path(), &changed, &all).unwrap();
        assert_eq!(state.changed, 4 * G);
        let done = |i: usize| state.disks[i].done(dir.path()).unwrap();
        assert_eq!(done(0), set(&[G..2 * G, 3 * G..10 * G]));
        assert_eq!(done(1), set(&[0..G, 3 * G..10 * G]));
    }

    #[test]
    fn other_disks_than_those_that_were_synced_are_refused() {
        let mut state = state();
        let base = now(&[("base", &[])]);
        state.disks[0].links.clone_from(&base.links);
        let refused = |sizes: &[u64], now: &[Now]| {
            let error = state.changes(sizes, now).unwrap_err();
            assert_eq!(error.kind, crate::error::ErrorKind::Refused);
            error.blockers[0].code.clone()
        };
        for sizes in [&[1 << 20][..], &[1 << 30, 1 << 30], &[]] {
            let code = refused(sizes, std::slice::from_ref(&base));
            assert_eq!(code, "sync-disks-changed", "{sizes:?}");
        }
        assert_eq!(
            refused(&[1 << 30], &[now(&[("other", &[])])]),
            "sync-base-changed"
        );
        let export = Now {
            links: Vec::new(),
            dirty: None,
        };
        let mut exported = state.clone();
        exported.disks[0].links.clear();
        let error = exported.changes(&[1 << 30], &[export]).unwrap_err();
        assert_eq!(error.blockers[0].code, "sync-no-bitmap");
    }

    /// A copy that somebody exchanged holds nothing that the journal says.
    #[test]
    fn a_journal_is_of_the_file_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let state = state();
        let disk = &state.disks[0];
        assert!(disk.done(dir.path()).is_err(), "the copy is gone");
        let copy = dir.path().join(&disk.file);
        std::fs::write(&copy, "copy").unwrap();
        assert_eq!(disk.done(dir.path()).unwrap(), set(&[]));
        disk.restart(dir.path(), set(&[0..1 << 20])).unwrap();
        assert_eq!(disk.done(dir.path()).unwrap(), set(&[0..1 << 20]));
        let beside = dir.path().join("beside");
        std::fs::write(&beside, "another").unwrap();
        std::fs::rename(&beside, &copy).unwrap();
        assert_eq!(disk.done(dir.path()).unwrap(), set(&[]));
        let larger = SyncedDisk {
            size: 2 << 30,
            ..disk.clone()
        };
        disk.restart(dir.path(), set(&[0..1 << 20])).unwrap();
        assert_eq!(larger.done(dir.path()).unwrap(), set(&[]));
    }

    #[test]
    fn files_of_a_sync_are_told_from_those_of_the_user() {
        for (name, own) in [
            ("vm.sync.qcow2", true),
            ("vm-1.sync.journal", true),
            ("vm-1.sync.journal.new", true),
            (".sync.json.new", true),
            ("vm.qcow2", false),
            ("sync.json", false),
            ("notes.txt", false),
        ] {
            assert_eq!(is_copy(name), own, "{name}");
        }
        let mut state = state();
        state.disks.push(state.disks[0].clone());
        let files = state.files();
        for name in [
            "vm.sync.qcow2",
            "vm-1.sync.qcow2",
            "vm-1.sync.journal",
            FILE,
            NEXT,
        ] {
            assert!(files.contains(&name.into()), "{name}");
        }
        // Of a directory that was just begun the first copy may be there.
        state.disks.clear();
        assert!(state.files().contains(&"vm.sync.qcow2".into()));
    }
    /// A bitmap that began later hides what was written before.
    #[test]
    fn a_bitmap_that_hides_a_change_is_refused_and_a_chain_is_not_compared() {
        const SIZE: usize = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source.raw");
        std::fs::write(&path, vec![7; SIZE]).unwrap();
        let image = Image::open_info(&path, Some("raw"), &[]).unwrap();
        let mut state = state();
        state.disks[0].size = SIZE as u64;
        // A copy of zeroes, which is recorded as the same.
        let copy = dir.path().join(&state.disks[0].file);
        crate::disk::refill::Refill::create(&copy, SIZE as u64).unwrap();
        state.disks[0]
            .restart(dir.path(), set(&[0..SIZE as u64]))
            .unwrap();
        let all = set(&[0..SIZE as u64]);
        for (dirty, changed, refused) in [
            (true, set(&[]), true),
            (true, set(&[0..512 << 10]), true),
            (true, all, false),
            (false, set(&[]), false),
        ] {
            let now = Now {
                links: Vec::new(),
                dirty: dirty.then(Extents::default),
            };
            let checked = state.check_sample(
                dir.path(),
                &[&image],
                &[now],
                std::slice::from_ref(&changed),
            );
            assert_eq!(checked.is_err(), refused, "{dirty} {changed:?}");
            if let Err(error) = checked {
                let blocker = &error.blockers[0];
                assert_eq!(blocker.code, "sync-bitmap-late");
                let at = changed.iter().next().map_or(0, |range| range.end);
                let says = format!("byte {at} of vm.sync.qcow2 has changed");
                assert!(blocker.reason.starts_with(&says), "{}", blocker.reason);
            }
        }
    }
}
