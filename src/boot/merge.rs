//! Merges overlays after Windows has come up on VirtIO: the writes since the switch go into the
//! disks.
//!
//! For a VM that is off, `qemu-img commit` does this; for a running one, a block job of libvirt.
//! Both may be interrupted at any point and repeated: the overlay is discarded only when the disk
//! has all of its data.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Run, files, protect::Protected};
use crate::disk::chain::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::stop;
use crate::tool::qemu_img;
use crate::tool::virsh::JobKind;

/// The interval between two queries of a libvirt job.
const TICK: Duration = Duration::from_millis(200);

/// One disk with the overlay from which it runs.
struct Pair {
    disk: PathBuf,
    overlay: PathBuf,
}

impl Run<'_> {
    /// The disks that have run from an overlay since the switch.
    pub(super) fn overlays(&self) -> Vec<(PathBuf, PathBuf)> {
        let protected = self.record.protected.iter();
        protected
            .filter_map(|kept| match kept {
                Protected::Overlay { disk, overlay } => Some((disk.clone(), overlay.clone())),
                _ => None,
            })
            .collect()
    }

    /// Whether Windows writes to an overlay from the switch on: reading the disk may then take its
    /// time.
    pub(super) fn is_system_disk_kept(&self) -> bool {
        let system = self.files.system_disk();
        system.is_ok_and(|disk| self.overlays().iter().any(|(kept, _)| *kept == disk.path))
    }

    /// Merges every overlay into its disk and removes it. The overlay is no longer needed.
    pub(super) fn merge_overlays(&mut self) -> Result<()> {
        for (disk, overlay) in self.overlays() {
            self.ui
                .status("Merging", "what was written since the switch");
            let pair = Pair { disk, overlay };
            self.merge(&pair).map_err(|e| {
                if e.kind == ErrorKind::Interrupted {
                    return e;
                }
                Error::failed(format!(
                    "Windows is up, and what it wrote since the switch is not in {} yet",
                    pair.disk.display()
                ))
                .because(e)
                .hint("run the same command again to continue")
            })?;
            self.point("boot-merged")?;
        }
        Ok(())
    }

    fn merge(&mut self, pair: &Pair) -> Result<()> {
        if self.is_off()? || !self.merge_running(pair)? {
            self.merge_off(pair)?;
        }
        // From here on nothing names the overlay: neither the record nor, with the next definition,
        // libvirt.
        let is_it = |kept: &Protected| matches!(kept, Protected::Overlay { disk, .. } if *disk == pair.disk);
        self.point("boot-merging")?;
        self.define(crate::domain::Stage::Final, None)?;
        let kept = self
            .record
            .protected
            .iter()
            .find(|kept| is_it(kept))
            .cloned();
        self.record.protected.retain(|kept| !is_it(kept));
        self.record.save(&self.files.folder)?;
        kept.map_or(Ok(()), |kept| kept.forget())
    }

    /// Merges while the VM runs; `false` if it was turned off in the meantime.
    fn merge_running(&self, pair: &Pair) -> Result<bool> {
        let domain = self.files.uuid;
        let Some(target) = self.target(pair)? else {
            return Ok(!self.is_off()?);
        };
        loop {
            if stop::requested() {
                return Err(
                    Error::new(ErrorKind::Interrupted, "interrupted; the VM continues")
                        .hint("run the same command again to continue"),
                );
            }
            if self.is_off()? {
                return Ok(false);
            }
            match self.virsh.job(domain, &target)? {
                None if self.target(pair)?.is_none() => return Ok(true),
                None => self.virsh.start_commit(domain, &target)?,
                Some(job) if job.kind != JobKind::Commit => {
                    return Err(Error::failed(format!(
                        "libvirt is at work on {target} of {}",
                        self.files.name
                    ))
                    .hint(format!(
                        "wait for it, or end it: virsh -c {} blockjob {domain} {target} --abort",
                        self.options.uri
                    )));
                }
                // The job waits at the end until it gets the command to pivot.
                Some(job) if job.end > 0 && job.done == job.end => {
                    if let Err(error) = self.virsh.pivot(domain, &target) {
                        tracing::info!("going over to {}: {error}", pair.disk.display());
                    }
                }
                Some(_) => {}
            }
            std::thread::sleep(TICK);
        }
    }

    /// libvirt's name of the disk that runs from the overlay; `None` if no disk does any more.
    fn target(&self, pair: &Pair) -> Result<Option<String>> {
        let (_, disks) = files::identify(&self.virsh.xml(self.files.uuid, true)?)?;
        let disk = disks.into_iter().find(|disk| disk.path == pair.overlay);
        Ok(disk.map(|disk| disk.target))
    }

    fn merge_off(&self, pair: &Pair) -> Result<()> {
        if pair.overlay.symlink_metadata().is_err() {
            let shown = pair.overlay.display();
            return Err(Error::failed(format!(
                "{shown} is gone, and with it what was written there"
            ))
            .hint("put it back, or convert again"));
        }
        let image = Image::open_info(&pair.disk, Some("qcow2"), &self.source)?;
        image.hold_for_writing()?;
        let image = image.with_overlay(&pair.overlay)?;
        qemu_img::commit(&image.spec_to_commit(), &mut |_| {})?;
        sync(&pair.disk)
    }

    fn point(&self, name: &str) -> Result<()> {
        failpoint::hit(name).map_err(|e| Error::failed("booting").because(e))
    }
}

fn sync(path: &Path) -> Result<()> {
    let file = File::options().write(true).open(path);
    file.and_then(|file| file.sync_all())
        .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))
}
