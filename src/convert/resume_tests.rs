//! What an interrupted copy leaves, and which runs continue with it.

use serde_json::json;

use super::super::output::FolderOptions;
use super::super::testing::{job, ui};
use super::super::work::WORK;
use crate::guest::DiskId;

use super::*;

fn document(options: &[(&str, &str)]) -> Document {
    Document {
        schema: SCHEMA.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        options: named(options),
        plan: digest(&json!([{"kind": "edit-hive"}])),
        disks: Vec::new(),
        trim: Vec::new(),
        boot: None,
    }
}

fn named(options: &[(&str, &str)]) -> BTreeMap<String, Vec<String>> {
    let owned = |(name, value): &(&str, &str)| (name.to_string(), vec![value.to_string()]);
    options.iter().map(owned).collect()
}

#[test]
fn another_plan_than_that_of_the_interrupted_run_is_refused() {
    let resumed = Resumed {
        plan: document(&[]).plan,
        disks: Vec::new(),
        changed: BTreeSet::new(),
        trim: Vec::new(),
    };
    resumed
        .check_plan(&json!([{"kind": "edit-hive"}]))
        .expect("the same plan");
    for other in [
        json!([]),
        json!([{"kind": "copy-files"}]),
        json!([{"kind": "edit-hive"}, {"kind": "edit-hive"}]),
    ] {
        let error = resumed.check_plan(&other).unwrap_err();
        assert!(error.message.contains("decided otherwise"), "{error:?}");
        assert!(error.hints[0].contains("without --resume"), "{error:?}");
    }
}

#[test]
fn options_that_were_added_left_out_or_changed_are_refused_by_name() {
    let begun = document(&[("memory", "4096"), ("keep-tools", "true")]);
    begun
        .refuse_other_options(&begun.options)
        .expect("the same options");
    for (now, says) in [
        (
            &[("memory", "2048"), ("keep-tools", "true")][..],
            "--memory: 4096 then, 2048 now",
        ),
        (
            &[("memory", "4096")],
            "--keep-tools: given then, not given now",
        ),
        (
            &[
                ("memory", "4096"),
                ("keep-tools", "true"),
                ("compress", "true"),
            ],
            "--compress: not given then, given now",
        ),
    ] {
        let error = begun.refuse_other_options(&named(now)).unwrap_err();
        assert_eq!(error.kind, crate::error::ErrorKind::Usage);
        assert_eq!(error.hints[0], says);
        assert_eq!(error.hints.len(), 2, "{error:?}");
    }
}

#[test]
fn files_are_the_same_by_what_they_hold() {
    let file = |size: u64, writes: Value| json!([{"path": "/a", "size": size, "writes": writes}]);
    let cases = [
        (file(1, Value::Null), file(1, Value::Null), true),
        (file(1, Value::Null), file(2, Value::Null), false),
        (
            file(1, json!(["boot", 5])),
            file(1, json!(["boot", 5])),
            true,
        ),
        (
            file(1, json!(["boot", 5])),
            file(1, json!(["boot", 6])),
            false,
        ),
        // Not comparable: the host was restarted.
        (
            file(1, json!(["boot", 5])),
            file(1, json!(["other", 6])),
            true,
        ),
        (json!([]), json!([]), false),
        (file(1, Value::Null), json!([]), false),
        // One link of a chain is gone.
        (
            json!([{"path": "/a", "size": 1}, {"path": "/b", "size": 1}]),
            json!([{"path": "/a", "size": 1}]),
            false,
        ),
        (Value::Null, Value::Null, false),
    ];
    for (was, now, same) in cases {
        assert_eq!(is_same(&was, &now), same, "{was} {now}");
    }
}

/// A directory with two raw disks; the first is taken for the one with the system.
struct Left {
    dir: tempfile::TempDir,
}

const DECIDED: &str = "what was decided";

impl Left {
    /// A copy that was interrupted: two overlays, two journals, and a record.
    fn new() -> Self {
        let left = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        for name in ["windows", "data"] {
            std::fs::write(left.path(name), vec![0; 1 << 20]).unwrap();
        }
        let (job, mut folder) = left.open();
        let disks = job.source.disks(folder.path()).unwrap();
        let none = Resumed::take(&job, &ui(), &mut folder, &disks).unwrap();
        assert!(none.is_none(), "nothing was interrupted yet");
        let overlays = ["one", "two"].map(|name| work_file(&folder, name).unwrap());
        for (i, overlay) in overlays.iter().enumerate() {
            std::fs::write(overlay, "overlay").unwrap();
            std::fs::write(journal(&folder, i).unwrap(), "journal").unwrap();
        }
        let of = |i: usize| (disks[i].image.identity(), Some(overlays[i].as_path()));
        let trim = ["windows", "data"].map(|name| DiskTrim {
            disk: left.path(name),
            volumes: Vec::new(),
        });
        let decided = json!(DECIDED);
        let decided = (&decided, false);
        save(&job, &folder, decided, vec![of(0), of(1)], &trim).unwrap();
        folder.keep(true);
        drop(folder);
        assert!(OutputFolder::holds_a_copy(&job.target_folder()));
        left
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn partial(&self) -> PathBuf {
        self.path(".out.partial")
    }

    fn job(&self) -> Job {
        let disks = ["windows", "data"].map(|name| self.path(name));
        let mut job = job(&disks, &self.path("out"));
        job.output.resume = true;
        let option = |name: &str| (name.to_owned(), vec!["1".to_owned()]);
        job.request.options = ["memory", "retries"].map(option).into();
        job
    }

    fn open(&self) -> (Job, OutputFolder) {
        let job = self.job();
        let preference = FolderOptions {
            resume: true,
            ..FolderOptions::default()
        };
        let folder = OutputFolder::create(&job.target_folder(), &preference).unwrap();
        (job, folder)
    }

    /// Takes over as the next run does.
    fn take(&self, change: impl FnOnce(&mut Job)) -> (Result<Option<Resumed>>, OutputFolder) {
        let (mut job, mut folder) = self.open();
        change(&mut job);
        let disks = job.source.disks(folder.path()).unwrap();
        let taken = Resumed::take(&job, &ui(), &mut folder, &disks);
        (taken, folder)
    }

    fn there(&self) -> Vec<bool> {
        ["one", "two", "copy-0.journal", "copy-1.journal", RESUME]
            .map(|name| self.partial().join(WORK).join(name).exists())
            .to_vec()
    }
}

#[test]
fn what_is_as_it_was_is_continued_with() {
    let left = Left::new();
    let (taken, folder) = left.take(|job| {
        // How the source is reached may be another way now.
        job.request.options.remove("retries");
        let name = |name: &str| (name.to_owned(), vec!["x".to_owned()]);
        job.request
            .options
            .extend(["verify-copy", "ssh-identity", "pool"].map(name));
    });
    let resumed = taken.unwrap().unwrap();
    for (i, name) in ["one", "two"].into_iter().enumerate() {
        let overlay = resumed.overlay(&folder, i).unwrap();
        assert_eq!(overlay, folder.path().join(WORK).join(name));
    }
    assert_eq!(resumed.overlay(&folder, 2), None);
    assert!(resumed.has_overlays());
    assert_eq!(resumed.trim().len(), 2);
    resumed.check_plan(&json!(DECIDED)).unwrap();
    assert!(resumed.check_plan(&json!("another")).is_err());
    assert_eq!(left.there(), [true; 5]);
    // A run that fails before it copies leaves it for the next.
    drop(folder);
    assert_eq!(left.there(), [true; 5]);
}

#[test]
fn a_data_disk_that_has_changed_is_copied_from_its_start() {
    let left = Left::new();
    std::fs::write(left.path("data"), vec![1; 1 << 20]).unwrap();
    let (taken, folder) = left.take(|_| {});
    let resumed = taken.unwrap().unwrap();
    assert!(resumed.overlay(&folder, 0).is_some());
    assert_eq!(resumed.overlay(&folder, 1), None);
    assert_eq!(left.there(), [true, false, true, false, true]);
    let trim: Vec<_> = resumed.trim().into_iter().map(|trim| trim.disk).collect();
    assert_eq!(trim, [left.path("windows")]);
    resumed.check_plan(&json!(DECIDED)).unwrap();
}

/// The boot files were fixed in an overlay over what they were.
#[test]
fn a_disk_with_the_boot_files_that_has_changed_leaves_nothing_to_continue_with() {
    let left = Left::new();
    std::fs::write(left.path("data"), vec![1; 1 << 20]).unwrap();
    let (job, mut folder) = left.open();
    let list = job.source.disks(folder.path()).unwrap().to_vec();
    let disks = VmDisks::with_roles(list, DiskId::nth(0, 2), DiskId::nth(1, 2));
    let taken = Resumed::take(&job, &ui(), &mut folder, &disks).unwrap();
    assert!(taken.is_none() && !folder.was_taken_over());
    assert_eq!(left.there(), [false; 5]);
}

#[test]
fn each_changed_disk_is_forgotten_and_any_overlay_counts() {
    let left = Left::new();
    let (_, folder) = left.open();
    let disks = ["one", "two"].map(|name| DiskRecord {
        source: Value::Null,
        overlay: Some(format!("{WORK}/{name}")),
    });
    let mut resumed = Resumed {
        plan: String::new(),
        disks: disks.to_vec(),
        changed: [0, 1].into(),
        trim: Vec::new(),
    };
    resumed.forget(&folder, 0).unwrap();
    assert_eq!(left.there(), [false, true, false, true, true]);
    // What is gone already is no fault.
    resumed.forget(&folder, 0).unwrap();
    for (overlays, has) in [
        ([true, true], true),
        ([true, false], true),
        ([false, true], true),
        ([false, false], false),
    ] {
        for (disk, overlay) in resumed.disks.iter_mut().zip(overlays) {
            disk.overlay = overlay.then(|| "one".to_owned());
        }
        assert_eq!(resumed.has_overlays(), has, "{overlays:?}");
    }
}

#[test]
fn of_several_disks_that_have_changed_each_is_copied_from_its_start() {
    let left = Left::new();
    let (job, mut folder) = left.open();
    for name in ["windows", "data"] {
        std::fs::write(left.path(name), vec![1; 1 << 20]).unwrap();
    }
    // Neither is a disk that a fix changes.
    let list = job.source.disks(folder.path()).unwrap().to_vec();
    let disks = VmDisks::with_roles(list, DiskId::nth(2, 3), DiskId::nth(2, 3));
    let taken = Resumed::take(&job, &ui(), &mut folder, &disks).unwrap();
    let resumed = taken.unwrap();
    assert_eq!(left.there(), [false, false, false, false, true]);
    assert!(resumed.trim().is_empty());
}

/// Nothing of an overlay over other contents is of use.
#[test]
fn a_run_starts_over_where_nothing_can_be_continued_with() {
    type Change = fn(&Left);
    let changes: [(&str, Change); 6] = [
        ("an overlay is gone", |left| {
            std::fs::remove_file(left.partial().join(WORK).join("two")).unwrap();
        }),
        ("the disk with Windows has changed", |left| {
            std::fs::write(left.path("windows"), vec![1; 1 << 20]).unwrap();
        }),
        ("another version", |left| {
            left.edit("version", json!("0.0.1"))
        }),
        ("another schema", |left| {
            left.edit("schema", json!("hyper2kvm/resume/9"))
        }),
        ("a disk more", |left| left.edit("disks", json!([]))),
        ("the record cannot be read", |left| {
            std::fs::write(left.partial().join(resume_file()), "{").unwrap();
        }),
    ];
    for (at, change) in changes {
        let left = Left::new();
        change(&left);
        let (taken, folder) = left.take(|_| {});
        assert!(taken.unwrap().is_none(), "{at}");
        assert_eq!(left.there(), [false; 5], "{at}");
        assert!(!folder.was_taken_over() && !folder.is_kept(), "{at}");
        drop(folder);
        assert!(!left.partial().exists(), "{at}");
    }
}

impl Left {
    fn edit(&self, key: &str, value: Value) {
        let path = self.partial().join(resume_file());
        let mut doc: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        doc[key] = value;
        std::fs::write(path, doc.to_string()).unwrap();
    }
}

#[test]
fn other_options_are_refused_and_the_copy_is_kept() {
    let left = Left::new();
    let (taken, folder) = left.take(|job| {
        job.request
            .options
            .insert("memory".into(), vec!["2".into()]);
    });
    let error = taken.map(|_| ()).unwrap_err();
    assert_eq!(error.kind, crate::error::ErrorKind::Usage);
    drop(folder);
    assert_eq!(left.there(), [true; 5]);
}

#[test]
fn without_resume_nothing_is_taken_over() {
    let left = Left::new();
    let (taken, folder) = left.take(|job| job.output.resume = false);
    assert!(taken.unwrap().is_none());
    drop(folder);
    // The directory was opened for it all the same; one that is not is emptied.
    assert_eq!(left.there(), [true; 5]);
    let folder = OutputFolder::create(&left.path("out"), &FolderOptions::default()).unwrap();
    assert_eq!(left.there(), [false; 5]);
    assert!(!folder.was_taken_over());
}

/// Unpacked files are gone with the run that unpacked them.
#[test]
fn a_packed_disk_is_copied_from_its_start() {
    for (packed, kept) in [(false, true), (true, false)] {
        let left = Left::new();
        let (mut job, mut folder) = left.open();
        assert!(folder.was_taken_over());
        job.source.vm.disks[1].packed = packed.then(|| crate::source::Packed {
            name: "data".into(),
            member: None,
            gzip: true,
            capacity: None,
        });
        refuse_packed(&job, &mut folder).unwrap();
        assert_eq!(folder.was_taken_over(), kept);
        assert_eq!(left.there(), [kept; 5]);
    }
    // A run does so before it unpacks; this disk cannot be.
    let left = Left::new();
    let (mut job, folder) = left.open();
    drop(folder);
    job.source.vm.disks[1].packed = Some(crate::source::Packed {
        name: "data".into(),
        member: None,
        gzip: true,
        capacity: None,
    });
    let ui = ui();
    assert!(super::super::run::Run::open(&job, &ui).is_err());
    assert_eq!(left.there(), [false; 5]);
}

/// A recorded range relies on files that must survive a loss of power.
#[test]
fn everything_is_durable_before_the_record_of_a_copy_counts_for_longer_than_the_host_runs() {
    let left = Left::new();
    let (job, folder) = left.open();
    let seen = crate::files::order::seen;
    let boot = || {
        let record = std::fs::read(folder.path().join(resume_file())).unwrap();
        serde_json::from_slice::<Document>(&record).unwrap().boot
    };
    let above = left.dir.path().file_name().unwrap().to_string_lossy();
    let steps = [
        "sync all of .out.partial",
        &format!("sync {above}"),
        "sync resume.new",
        "rename resume.json",
        "sync .work",
    ];
    let decided = json!(DECIDED);
    seen();
    let foundation = save(&job, &folder, (&decided, false), Vec::new(), &[]).unwrap();
    assert_eq!(seen(), ["rename resume.json"]);
    assert_eq!(boot(), boot_id());
    foundation.lay().unwrap();
    assert_eq!(seen(), steps);
    assert_eq!(boot(), None);
    // Another disk of the same copy begins to record.
    foundation.lay().unwrap();
    assert!(seen().is_empty());
    // A resumed copy has recorded something.
    save(&job, &folder, (&decided, true), Vec::new(), &[]).unwrap();
    assert_eq!(seen(), steps);
    assert_eq!(boot(), None);
}

#[test]
fn a_record_that_is_durable_counts_after_the_host_was_restarted() {
    for (boot, counts) in [
        (json!(boot_id()), true),
        (Value::Null, true),
        (json!("another"), false),
    ] {
        let left = Left::new();
        left.edit("boot", boot);
        let (taken, _folder) = left.take(|_| {});
        assert_eq!(taken.unwrap().is_some(), counts);
        assert_eq!(left.there(), [counts; 5]);
    }
}

/// Everything else may make another result.
#[test]
fn only_options_about_the_way_to_the_disks_may_differ() {
    let mut job = super::super::testing::job(&["/a.raw".into()], Path::new("/out"));
    let way = [
        "connections",
        "retries",
        "user",
        "password-file",
        "ssh-identity",
        "ssh-known-hosts",
        "tls-ca",
        "tls-fingerprint",
        "verify-copy",
        "connect",
        "install-to",
        "pool",
    ];
    let kept = [
        "accept",
        "bootstrap",
        "compress",
        "format",
        "no-trim",
        "output-device",
        "script",
        "storage",
        "virtio-iso",
    ];
    for name in way.iter().chain(&kept) {
        let values = vec!["x".to_owned()];
        job.request.options.insert(name.to_string(), values);
    }
    let options = options(&job);
    let names: Vec<_> = options.keys().map(String::as_str).collect();
    assert_eq!(names, kept);
}

/// A run that is killed while it removes its work files leaves no record of files that are gone.
#[test]
fn the_record_of_a_copy_goes_before_what_it_names() {
    let left = Left::new();
    let overlay = left.partial().join(super::super::work::OVERLAY);
    std::fs::create_dir(&overlay).unwrap();
    super::super::output::remove_work_files(&left.partial()).unwrap_err();
    assert_eq!(left.there(), [true, true, true, true, false]);
    std::fs::remove_dir(&overlay).unwrap();
    std::fs::write(&overlay, "overlay").unwrap();
    for _ in 0..2 {
        super::super::output::remove_work_files(&left.partial()).unwrap();
        assert!(!overlay.exists() && !left.partial().join(WORK).exists());
    }
}
