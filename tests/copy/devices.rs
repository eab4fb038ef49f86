//! Copies to block devices: refusals, and the state of the device after a fault. With loop devices,
//! if there are any.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use hyper2kvm::demo::{GuestSpec, WinVersion};
use rustix::fs::OFlags;

use super::support::{Lab, Run, TOOLS, binary, finish, h2k, have, sha256, skip, tool, virtio_win};
use super::{MIB, bytes_at, gaps, live_files_are_the_same};

const DISK: u64 = 512 * MIB;
/// The size of the device beyond that of the disk.
const MORE: u64 = 4 * MIB;
const MARK: &[u8] = b"hyper2kvm: the copy to this device was not finished";

/// A loop device; removed when this is dropped.
struct Loop {
    device: PathBuf,
    file: PathBuf,
}

/// The old contents of the device.
const EARLIER: &[u8] = b"an earlier disk";

impl Loop {
    fn new(lab: &Lab, name: &str, size: u64) -> Option<Self> {
        let file = lab.path(name);
        File::create(&file).unwrap().set_len(size).unwrap();
        Self::over(file)
    }

    fn over(file: PathBuf) -> Option<Self> {
        let out = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(&file)
            .output()
            .ok()?;
        if !out.status.success() {
            skip("loop-devices", "no loop devices here");
            return None;
        }
        let device = String::from_utf8(out.stdout).unwrap();
        Some(Self {
            device: device.trim_end().into(),
            file,
        })
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let disk = File::options().write(true).open(&self.device).unwrap();
        disk.write_all_at(bytes, at).unwrap();
        disk.sync_all().unwrap();
    }

    fn start(&self) -> Vec<u8> {
        bytes_at(&self.device, &(0..MIB))
    }

    /// Fails unless the start has the mark, and there is no partition table.
    #[track_caller]
    fn assert_unfinished(&self) {
        let start = self.start();
        assert!(start.starts_with(MARK));
        // A line end, and the name of the copy.
        assert!(start[MARK.len() + 33..].iter().all(|b| *b == 0));
        // No verb treats it as a disk with Windows.
        let run = h2k(["verify", self.device.to_str().unwrap()]);
        assert_ne!(run.code, 0, "{}", run.stdout);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

fn convert(lab: &Lab, device: &Path, more: &[&str], point: &str) -> Run {
    let mut command = Command::new(binary());
    command
        .args(["convert", "--json", "--virtio-iso"])
        .args([virtio_win(), &lab.raw, Path::new("-o"), &lab.path("out")])
        .arg("--output-device")
        .arg(device)
        .args(more);
    if !point.is_empty() {
        command.env("HYPER2KVM_FAILPOINT", point);
    }
    finish(command)
}

#[test]
fn a_block_device_as_target() {
    if !have(&TOOLS) || !have(&["losetup"]) {
        return;
    }
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = DISK;
    spec.recovery = false;
    let lab = Lab::new(spec);
    let Some(device) = Loop::new(&lab, "device", DISK + MORE) else {
        return;
    };
    let path = device.device.as_path();
    let digest = sha256(&lab.raw);
    let nothing_written = |run: Run, code: i32, says: &str, untouched: &Loop, before: &str| {
        let run = run.expect(code);
        assert!(run.stderr.contains(says), "{says:?}: {}", run.stderr);
        assert_eq!(sha256(&untouched.file), before);
        assert!(!lab.path("out").exists() && !lab.path(".out.partial").exists());
    };

    // An earlier disk, of which no data may remain visible.
    for at in (0..DISK).step_by(MIB as usize) {
        device.write(at + 4096, EARLIER);
    }
    // Existing data is not overwritten without the option.
    device.write(DISK + MORE - 4096, b"precious");
    let full = sha256(&device.file);
    let run = convert(&lab, path, &[], "");
    nothing_written(run, 1, "is not empty", &device, &full);
    let run = convert(&lab, path, &["--force", "--target-is-zero"], "");
    nothing_written(run, 1, "does not read as zeroes", &device, &full);
    // In use, as a mounted one is.
    let holder = File::options()
        .read(true)
        .custom_flags(OFlags::EXCL.bits().cast_signed())
        .open(path)
        .unwrap();
    let run = convert(&lab, path, &["--force"], "");
    nothing_written(run, 1, "is in use", &device, &full);
    drop(holder);
    // Too small, with both numbers.
    {
        let small = Loop::new(&lab, "small", DISK - 512).unwrap();
        let run = convert(&lab, &small.device, &[], "");
        let says = format!("{} bytes, {DISK} bytes needed", DISK - 512);
        nothing_written(run, 1, &says, &small, &sha256(&small.file));
    }
    // The source under another name.
    {
        let source = Loop::over(lab.raw.clone()).unwrap();
        let run = convert(&lab, &source.device, &["--force"], "");
        nothing_written(run, 2, "contains the source", &source, &digest);
    }
    let run = convert(&lab, &lab.path("device"), &["--force"], "");
    nothing_written(run, 2, "is not a block device", &device, &full);
    // One too many.
    let more = ["--output-device", "/dev/null", "--force"];
    let run = convert(&lab, path, &more, "");
    nothing_written(run, 2, "2 devices are named for 1 disks", &device, &full);
    // A plan writes nothing, and refuses the same.
    let run = convert(&lab, path, &["--force", "--dry-run"], "").expect(0);
    assert_eq!(run.json()["schema"], "hyper2kvm/plan/1");
    let run = convert(&lab, path, &["--dry-run"], "");
    nothing_written(run, 1, "is not empty", &device, &full);
    // The fix comes before the first byte of the copy.
    let run = convert(&lab, path, &["--force"], "fixed=fail");
    nothing_written(run, 1, "fail point", &device, &full);

    // A killed run leaves no disk, and the next one recognises it.
    convert(&lab, path, &["--force"], "copying=kill").expect(-1);
    device.assert_unfinished();
    assert!(!lab.path("out").exists());
    // A failure at the very end invalidates the complete disk again.
    let run = convert(&lab, path, &[], "devices-finished=fail").expect(1);
    assert!(run.stderr.contains("fail point"), "{}", run.stderr);
    device.assert_unfinished();
    assert!(!lab.path("out").exists() && !lab.path(".out.partial").exists());

    // Killed before and within the first MiB, it is still marked, and the next run recognises it.
    convert(&lab, path, &[], "before-rename=kill").expect(-1);
    device.assert_unfinished();
    convert(&lab, path, &[], "device-start=kill").expect(-1);
    assert!(device.start().starts_with(MARK));
    // Killed after it, it has the whole disk, which does not count as an unfinished one.
    convert(&lab, path, &[], "devices-finished=kill").expect(-1);
    h2k(["verify", path.to_str().unwrap()]).expect(0);
    let run = convert(&lab, path, &[], "").expect(1);
    assert!(run.stderr.contains("is not empty"), "{}", run.stderr);

    let more = ["--verify-copy", "--force"];
    let report = convert(&lab, path, &more, "").expect(0).json();
    assert_eq!(report["outputs"]["disks"][0], path.to_str().unwrap());
    let verified = report["checks"].to_string();
    assert!(verified.contains("copy-identical"), "{verified}");
    for stage in ["bootstrap", "final"] {
        let xml = fs::read_to_string(lab.path(&format!("out/guest-{stage}.xml"))).unwrap();
        let source = format!("<source dev=\"{}\"/>", path.display());
        assert!(xml.contains(&source), "{xml}");
        assert!(
            xml.contains("<disk type=\"block\" device=\"disk\">"),
            "{xml}"
        );
    }
    assert!(!lab.path("out/guest.raw").exists() && !lab.path("out/guest.qcow2").exists());
    h2k(["verify", path.to_str().unwrap()]).expect(0);
    for gap in gaps(&lab) {
        assert!(bytes_at(&lab.raw, &gap) == bytes_at(path, &gap), "{gap:?}");
    }
    // Neither the data behind the disk nor the source was changed.
    let tail = bytes_at(path, &(DISK..DISK + MORE));
    assert!(tail[MORE as usize - 4096..].starts_with(b"precious"));
    assert_eq!(tail.iter().filter(|b| **b != 0).count(), b"precious".len());
    assert_eq!(sha256(&lab.raw), digest);
    for at in (0..DISK).step_by(MIB as usize) {
        let at = at + 4096;
        let bytes = bytes_at(path, &(at..at + EARLIER.len() as u64));
        assert_ne!(bytes, EARLIER, "{at}");
    }
    assert!(live_files_are_the_same(&lab, path, 0) > 50);
    drop(device);

    // Zeroes are not written to a device that has them: no more than the data is allocated.
    let Some(blank) = Loop::new(&lab, "blank", DISK) else {
        return;
    };
    let again = ["--target-is-zero", "--force"];
    convert(&lab, &blank.device, &again, "").expect(0);
    h2k(["verify", blank.device.to_str().unwrap()]).expect(0);
    tool("sync", &[blank.file.to_str().unwrap()]);
}
