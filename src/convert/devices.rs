//! `--output-device`: the target devices of a conversion. They are claimed before any other step,
//! and their last bytes are written after every other step.

use std::sync::Arc;

use crate::disk::device::{ClaimedDevice, DeviceOptions};
use crate::error::{Error, Result};

use super::job::Job;
use crate::session::Disk;

/// The claimed devices: one per disk, in the order of `disks`, or none.
pub struct Devices(Vec<Arc<ClaimedDevice>>);

impl Devices {
    /// Claims the devices of the job without writing to them. `write` opens them for later writes.
    pub fn claim(job: &Job, disks: &[Disk], write: bool) -> Result<Self> {
        let names = &job.copy.devices;
        if names.is_empty() {
            return Ok(Self(Vec::new()));
        }
        if names.len() != disks.len() {
            let mut error = Error::usage(format!(
                "{} devices are named for {} disks",
                names.len(),
                disks.len()
            ))
            .hint("--output-device is given once for each disk, in this order:");
            for (i, disk) in disks.iter().enumerate() {
                error = error.hint(format!("disk {}: {}", i + 1, disk.path.display()));
            }
            return Err(error);
        }
        let options = options(job, write);
        let mut devices = Vec::new();
        for (name, disk) in names.iter().zip(disks) {
            devices.push(Arc::new(ClaimedDevice::claim(name, &disk.image, options)?));
        }
        Ok(Self(devices))
    }

    pub fn of_disk(&self, i: usize) -> Option<&Arc<ClaimedDevice>> {
        self.0.get(i)
    }

    /// Writes the last bytes, which make the devices valid disks.
    pub fn finish(&self) -> Result<()> {
        for device in &self.0 {
            if let Err(error) = device.finish() {
                self.give_up();
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Makes the devices invalid disks again.
    pub fn give_up(&self) {
        for device in &self.0 {
            if let Err(error) = device.mark() {
                tracing::warn!(
                    "{} looks complete and is not to be used: {error}",
                    device.path().display()
                );
            }
        }
    }
}

fn options(job: &Job, write: bool) -> DeviceOptions {
    DeviceOptions {
        write,
        force: job.output.force,
        zero: job.copy.target_is_zero,
        resume: job.output.resume,
    }
}

#[cfg(test)]
impl Devices {
    pub(super) fn of(devices: Vec<ClaimedDevice>) -> Self {
        Self(devices.into_iter().map(Arc::new).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;

    use super::super::testing::job;
    use super::*;
    use crate::error::ErrorKind;

    /// Data is overwritten where the user says so, and by nothing else that was said.
    #[test]
    fn each_option_for_a_device_is_its_own() {
        let mut job = job(&["/a.raw".into()], Path::new("/out"));
        for [write, force, zero, resume] in [
            [false; 4],
            [true, false, false, false],
            [false, true, false, false],
            [false, false, true, false],
            [false, false, false, true],
        ] {
            (job.output.force, job.output.resume) = (force, resume);
            job.copy.target_is_zero = zero;
            let wanted = DeviceOptions {
                write,
                force,
                zero,
                resume,
            };
            assert_eq!(options(&job, write), wanted);
        }
    }

    /// A VM of which one disk is complete and another is not would start.
    #[test]
    fn the_devices_become_disks_together_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["a", "b", "c"].map(|name| dir.path().join(name));
        let start = |path: &Path| std::fs::read(path).unwrap()[..4].to_vec();
        for read_only in [None, Some(0), Some(1), Some(2)] {
            let mut devices = Vec::new();
            for (i, path) in paths.iter().enumerate() {
                std::fs::write(path, vec![0; 2 << 20]).unwrap();
                let writes = read_only != Some(i);
                let file = File::options().read(true).write(writes).open(path).unwrap();
                devices.push(ClaimedDevice::of_file(path, file, Some(&vec![7; 1 << 20])));
            }
            let devices = Devices::of(devices);
            assert_eq!(devices.finish().is_ok(), read_only.is_none());
            for (i, path) in paths.iter().enumerate() {
                let wanted = match read_only {
                    None => [7; 4],
                    Some(failed) if failed == i => [0; 4],
                    Some(_) => *b"hype",
                };
                assert_eq!(start(path), wanted, "{i} {read_only:?}");
            }
        }
    }

    /// One too few would leave a disk out, and another order would mix them up.
    #[test]
    fn there_is_a_device_for_each_disk_or_for_none() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["a.raw", "b.raw"].map(|name| dir.path().join(name));
        for path in &paths {
            std::fs::write(path, vec![0; 1 << 20]).unwrap();
        }
        let mut job = job(&paths, Path::new("/out"));
        let disks = job.source.disks(dir.path()).unwrap();
        let claim = |job: &Job| Devices::claim(job, &disks, false);
        let none = claim(&job).unwrap_or_else(|e| panic!("{e}"));
        assert!(none.of_disk(0).is_none());
        none.finish().unwrap();
        for count in [1, 3] {
            job.copy.devices = vec!["/dev/null".into(); count];
            let error = claim(&job).map(drop).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Usage);
            let said = format!("{count} devices are named for 2 disks");
            assert_eq!(error.message, said);
            for (i, path) in paths.iter().enumerate() {
                let line = format!("disk {}: {}", i + 1, path.display());
                assert_eq!(error.hints[i + 1], line);
            }
        }
        // What is no block device is not written to.
        job.copy.devices = paths.map(|path| path.with_extension("out")).to_vec();
        assert!(claim(&job).map(drop).is_err());
    }
}
