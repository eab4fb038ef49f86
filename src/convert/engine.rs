//! Which engine reads and writes the guest's file systems. Behind this nothing knows.

use std::sync::Arc;

use crate::disk::block::{BlockRead, BlockWrite};
use crate::disk::export::{EXPORT, Export, Reach};
use crate::disk::layout::DiskLayout;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::guestfish::{self, Appliance, Attach};
use crate::guest::ntfs3g::MountOptions;
use crate::guest::{EmbeddedWriter, GuestError, GuestRead, GuestWrite, GuestfishWriter, embedded};
use crate::tool::{self, host, stop};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Embedded,
    Guestfish,
}

/// An engine and why it is this one.
#[derive(Debug, Clone, Copy)]
pub struct Engine {
    kind: Kind,
    pub why: &'static str,
}

impl Engine {
    pub const EMBEDDED: Self = Self {
        kind: Kind::Embedded,
        why: "only reading",
    };

    /// The engine asked for; without one, the embedded engine where it can write.
    pub fn choose(asked: Option<Kind>) -> Result<Self> {
        let guestfish = || tool::find(crate::tool::guestfish::TOOL).is_some();
        let (kind, why) = match asked {
            Some(Kind::Guestfish) if !guestfish() => {
                return Err(Error::missing_tool("guestfish is not installed")
                    .hint(host::hint(crate::tool::guestfish::TOOL))
                    .hint("--engine embedded does without"));
            }
            Some(kind) => (kind, "asked for"),
            None if host::find_library(host::LIBNTFS).is_some() => {
                (Kind::Embedded, "libntfs-3g is installed")
            }
            None if guestfish() => (Kind::Guestfish, "libntfs-3g is not installed, guestfish is"),
            // It says what is missing when it comes to writing.
            None => (Kind::Embedded, "guestfish is not installed"),
        };
        Ok(Self { kind, why })
    }

    pub fn name(self) -> &'static str {
        match self.kind {
            Kind::Embedded => "embedded",
            Kind::Guestfish => "guestfish",
        }
    }

    /// Whether opening a guest takes so long that the user is told.
    pub fn starts_slowly(self) -> bool {
        self.kind == Kind::Guestfish
    }

    /// Whether it writes through another connection than the one the disk is read by.
    pub fn writes_past_us(self) -> bool {
        self.kind == Kind::Guestfish
    }

    pub(super) fn reach(self) -> Reach {
        match self.kind {
            Kind::Embedded => Reach::Private,
            Kind::Guestfish => Reach::User,
        }
    }

    /// Opens the volumes of an exported disk.
    pub(super) fn open<D: BlockRead + ?Sized>(
        self,
        export: &Export<D>,
        disk: Arc<dyn BlockRead>,
        layout: &DiskLayout,
        shown: &str,
    ) -> Result<Guest> {
        let failed = |e| open_error(e, shown);
        let Some(socket) = export.socket() else {
            let reader = embedded::open(disk, layout).map_err(failed)?;
            return Ok(Guest {
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
        let appliance = Appliance::start(&attach).map_err(failed)?;
        let reader = guestfish::open(appliance.clone(), disk, layout).map_err(failed)?;
        Ok(Guest {
            reader: Box::new(reader),
            appliance: Some(appliance),
        })
    }
}

fn open_error(error: GuestError, shown: &str) -> Error {
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
    appliance: Option<Appliance>,
}

impl Guest {
    /// The same engine, for writing. The reader is of no use after the writer was closed.
    pub fn writer(
        &self,
        disk: Arc<dyn BlockWrite>,
        layout: &DiskLayout,
        options: MountOptions,
    ) -> Box<dyn GuestWrite> {
        match &self.appliance {
            None => Box::new(EmbeddedWriter::new(disk, layout, options)),
            Some(appliance) => Box::new(GuestfishWriter::new(
                appliance.clone(),
                disk,
                layout,
                options,
            )),
        }
    }
}
