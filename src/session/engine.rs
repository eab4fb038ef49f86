//! The engines that read and write the guest's file systems. No code behind this module depends on
//! the choice.

use std::sync::Arc;

use crate::block::{BlockRead, BlockWrite};
use crate::disk::chain::Image;
use crate::disk::export::{self, DaemonAccess, EXPORT, Export};
use crate::disk::layout::DiskLayout;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::fve::Unlocked;
use crate::guest::guestfish::{self, Appliance, Attach};
use crate::guest::keys::Keys;
use crate::guest::ntfs3g::MountOptions;
use crate::guest::{
    EmbeddedWriter, FsKind, GuestError, GuestRead, GuestWrite, GuestfishWriter, MappedReader,
    embedded,
};
use crate::inspect::Inspection;
use crate::stop;
use crate::tool::{self, host};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Embedded,
    Guestfish,
    /// The embedded reader, on devices opened by the appliance: reads back what guestfish wrote.
    Opened,
}

/// An engine and the reason for its choice.
#[derive(Debug, Clone, Copy)]
pub struct Engine {
    kind: Kind,
    /// The user did not choose it: another one may do better.
    auto: bool,
    pub why: &'static str,
}

impl Engine {
    pub const EMBEDDED: Self = Self {
        kind: Kind::Embedded,
        auto: false,
        why: "only reading",
    };
    /// The second reader for a volume that is encrypted or otherwise contained; shares no code with
    /// guestfish.
    pub const OPENED: Self = Self {
        kind: Kind::Opened,
        auto: false,
        why: "only reading",
    };

    /// Returns the engine that the user chose; otherwise the embedded engine if it can write.
    pub fn choose(asked: Option<Kind>) -> Result<Self> {
        let (kind, why) = match asked {
            Some(Kind::Guestfish) if !guestfish() => {
                return Err(Error::missing_tool("guestfish is not installed")
                    .hint(host::hint(crate::tool::guestfish::TOOL))
                    .hint("--engine embedded does without"));
            }
            Some(kind) => (kind, "asked for"),
            None if host::find_library(host::LIBNTFS).is_some() => {
                (Kind::Embedded, "plain volumes, and libntfs-3g is installed")
            }
            None if guestfish() => (Kind::Guestfish, "libntfs-3g is not installed, guestfish is"),
            // What is missing is reported when it is about to write.
            None => (Kind::Embedded, "guestfish is not installed"),
        };
        Ok(Self {
            kind,
            auto: asked.is_none(),
            why,
        })
    }

    /// The engine with which `inspect` and `verify` read; only `guestfish` needs something
    /// installed.
    pub fn choose_reader(asked: Option<Kind>) -> Result<Self> {
        match asked {
            None => Ok(Self {
                auto: true,
                ..Self::EMBEDDED
            }),
            asked => Self::choose(asked),
        }
    }

    /// The engine that sees more of a disk on which this one found no system, if there is one. Its
    /// start takes long, so the disk must have something that it can open.
    pub fn instead(self, seen: &Inspection, kinds: &[FsKind], has_key: bool) -> Option<Self> {
        if !self.auto || self.kind != Kind::Embedded || seen.windows.is_some() {
            return None;
        }
        let why = opened_by_guestfish(kinds, has_key)?;
        guestfish().then_some(Self {
            kind: Kind::Guestfish,
            auto: false,
            why,
        })
    }

    /// The same engine with a reason that names the volumes it opened.
    pub fn because_of(self, guest: &dyn GuestRead) -> Self {
        let mut volumes = guest.volumes().iter();
        let bitlocker = volumes.any(|v| v.state.container == Some(FsKind::Bitlocker));
        let why = match self.kind {
            Kind::Embedded if self.auto && bitlocker => {
                "BitLocker is opened in this process, no appliance is needed"
            }
            _ => self.why,
        };
        Self { why, ..self }
    }

    pub fn name(self) -> &'static str {
        match self.kind {
            Kind::Embedded | Kind::Opened => "embedded",
            Kind::Guestfish => "guestfish",
        }
    }

    /// Whether opening a guest takes so long that the user is informed.
    pub fn starts_slowly(self) -> bool {
        self.kind != Kind::Embedded
    }

    /// Whether it writes through another connection than the one the disk is read by.
    pub fn writes_past_us(self) -> bool {
        self.kind == Kind::Guestfish
    }

    /// Whether the image is read directly as a file, without a storage daemon.
    pub(crate) fn reads_directly(self, image: &Image) -> Result<bool> {
        Ok(self.access() == DaemonAccess::Private && export::direct(image)?.is_some())
    }

    pub(crate) fn access(self) -> DaemonAccess {
        match self.kind {
            Kind::Embedded => DaemonAccess::Private,
            Kind::Guestfish | Kind::Opened => DaemonAccess::User,
        }
    }

    /// Opens the volumes of an exported disk.
    pub(crate) fn open<D: BlockRead + ?Sized>(
        self,
        export: &Export<D>,
        disk: Arc<dyn BlockRead>,
        layout: &DiskLayout,
        keys: &Keys,
    ) -> Result<Guest, GuestError> {
        let Some(socket) = export.socket() else {
            let reader = embedded::open_with(disk, layout, keys)?;
            return Ok(Guest {
                unlocked: reader.unlocked().clone(),
                reader: Box::new(reader),
                appliance: None,
            });
        };
        let attach = Attach {
            socket: &socket,
            export: EXPORT,
            read_only: !export.is_writable(),
            sector_size: layout.sector_size,
        };
        let appliance = Appliance::start(&attach)?;
        let reader: Box<dyn GuestRead> = if self.kind == Kind::Opened {
            Box::new(MappedReader::open(&appliance, disk, layout, keys)?)
        } else {
            Box::new(guestfish::open(appliance.clone(), disk, layout, keys)?)
        };
        Ok(Guest {
            reader,
            unlocked: Unlocked::default(),
            appliance: Some(appliance),
        })
    }
}

/// The reason why guestfish sees more of volumes of these kinds. Both engines refuse a dynamic
/// disk.
fn opened_by_guestfish(kinds: &[FsKind], has_key: bool) -> Option<&'static str> {
    let linux = [FsKind::Ext, FsKind::Xfs, FsKind::Btrfs, FsKind::Swap];
    if has_key && kinds.contains(&FsKind::Luks) {
        Some("a volume is encrypted with LUKS, and a key was given")
    } else if kinds.contains(&FsKind::Lvm) && !linux.iter().any(|kind| kinds.contains(kind)) {
        Some("the disk has logical volumes (LVM)")
    } else {
        None
    }
}

fn guestfish() -> bool {
    tool::find(crate::tool::guestfish::TOOL).is_some()
}

pub(super) fn open_error(error: GuestError, shown: &str) -> Error {
    if stop::requested() {
        return Error::new(
            ErrorKind::Interrupted,
            "interrupted; the source is untouched",
        );
    }
    let doing = format!("opening the volumes of {shown}");
    match &error {
        GuestError::MissingTool { hint, .. } => {
            Error::missing_tool(error.to_string()).hint(hint.clone())
        }
        GuestError::Appliance { hint, .. } => Error::missing_tool(error.to_string())
            .hint(hint.clone())
            .hint("--engine embedded does without an appliance"),
        _ => Error::failed(doing).because(error),
    }
}

/// The volumes of a disk, opened by one of the engines.
pub struct Guest {
    pub reader: Box<dyn GuestRead>,
    /// BitLocker volumes opened in this process.
    unlocked: Unlocked,
    appliance: Option<Appliance>,
}

impl Guest {
    /// The same engine for writing. The reader is invalid after the writer was closed.
    pub fn writer(
        &self,
        disk: Arc<dyn BlockWrite>,
        layout: &DiskLayout,
        options: MountOptions,
    ) -> Box<dyn GuestWrite> {
        match &self.appliance {
            None => {
                let disk = Arc::new(self.unlocked.over(disk));
                Box::new(EmbeddedWriter::new(disk, layout, options))
            }
            Some(appliance) => Box::new(GuestfishWriter::new(
                appliance.clone(),
                disk,
                layout,
                options,
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_guestfish_is_worth_its_start() {
        use FsKind::{Bitlocker, Ext, Fat, Ldm, Luks, Lvm, Ntfs};
        let cases: [(&[FsKind], bool, Option<&str>); 7] = [
            (&[Fat, Ntfs], true, None),
            (&[Fat, Bitlocker], true, None),
            (&[Luks], true, Some("LUKS")),
            (&[Luks], false, None),
            (&[Lvm], false, Some("LVM")),
            (&[Ext, Lvm], false, None),
            (&[Ldm], true, None),
        ];
        for (kinds, has_key, says) in cases {
            let why = opened_by_guestfish(kinds, has_key);
            assert_eq!(why.is_some(), says.is_some(), "{kinds:?}");
            assert!(why.unwrap_or_default().contains(says.unwrap_or_default()));
        }
    }
}
