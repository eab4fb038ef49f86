//! Checks the files behind a VMDK before QEMU opens them.
//!
//! A VMDK descriptor ([`crate::disk::vmdk`]) names further files, which QEMU opens. So they are
//! checked first. Each must exist (the error names a missing one) and lie in the directory of the
//! descriptor. A forged extent or parent could name any file of the host. Contents are not read.

use std::path::{Path, PathBuf};

use super::{Result, SourceError};
use crate::disk::charset::Name;
use crate::disk::vmdk::{self, DescriptorError, Unreadable, moved};
use crate::files::folder_of;

/// The most links of a chain; VMware allows 32 snapshots.
const MAX_CHAIN: usize = 64;

/// The description and the remedy of an unreadable file.
fn told(unreadable: Unreadable) -> (&'static str, &'static str) {
    match unreadable {
        Unreadable::RawDevice => (
            "a pointer to a raw device (RDM), which contains no data itself,",
            "copy the LUN: vmkfstools -i DISK.vmdk COPY.vmdk on ESXi makes an ordinary disk of it, or name \
                 the block device where this host sees the LUN",
        ),
        Unreadable::Encrypted => (
            "a disk encrypted by VMware",
            "remove the encryption in VMware, then copy the disk again",
        ),
        Unreadable::Object => (
            "a pointer to an object of vSAN or vVols, which are no files,",
            "make a file of it on ESXi: vmkfstools -i DISK.vmdk -d thin /vmfs/volumes/VMFS-OR-NFS/COPY.vmdk, or \
                 export the VM as OVF",
        ),
    }
}

/// Checks the image and everything below it.
pub fn check_files(path: &Path) -> Result<()> {
    let mut at = path.to_owned();
    let mut made_over = None;
    for _ in 0..MAX_CHAIN {
        let Some(descriptor) = vmdk::read(&at).map_err(|e| of_descriptor(e, &at))? else {
            return Ok(());
        };
        if let Some(unreadable) = descriptor.unreadable {
            let (what, remedy) = told(unreadable);
            return Err(SourceError::Unsupported {
                path: at,
                what: what.into(),
                remedy,
            });
        }
        if let (Some((child, wanted)), Some(found)) = (made_over, descriptor.content_id)
            && wanted != found
        {
            return Err(SourceError::OtherParent {
                path: child,
                parent: at,
                wanted,
                found,
            });
        }
        for name in &descriptor.extents {
            existing(&at, name)?;
        }
        match &descriptor.parent {
            Some(parent) => {
                let parent = moved(&at, &descriptor).unwrap_or_else(|| parent.clone());
                let next = existing(&at, &parent)?;
                made_over = descriptor.parent_content_id.map(|id| (at, id));
                at = next;
            }
            None => return Ok(()),
        }
    }
    Err(SourceError::Unsupported {
        path: path.into(),
        what: format!("a chain of more than {MAX_CHAIN} snapshots"),
        remedy: "consolidate the snapshots of the VM first",
    })
}

fn existing(at: &Path, name: &Name) -> Result<PathBuf> {
    let file = name
        .below(folder_of(at))
        .ok_or_else(|| SourceError::Outside {
            path: at.into(),
            reference: name.text.clone(),
        })?;
    if file.exists() {
        Ok(file)
    } else {
        Err(SourceError::MissingDisk {
            path: at.into(),
            disk: super::clean(&name.text),
            missing: file,
        })
    }
}

fn of_descriptor(error: DescriptorError, path: &Path) -> SourceError {
    let path = path.into();
    match error {
        DescriptorError::Io { what, source } => SourceError::Io { what, path, source },
        DescriptorError::Invalid(reason) => SourceError::Invalid { path, reason },
    }
}
