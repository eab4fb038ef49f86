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

/// The means to write to a disk without an appliance.
pub(super) struct Direct {
    unlocked: Unlocked,
    layout: DiskLayout,
}

impl Direct {
    fn of(guest: &Guest, layout: &DiskLayout) -> Self {
        Self {
            unlocked: guest.unlocked.clone(),
            layout: layout.clone(),
        }
    }

    pub(super) fn writer(
        &self,
        disk: Arc<dyn BlockWrite>,
        options: MountOptions,
    ) -> EmbeddedWriter {
        let disk = Arc::new(self.unlocked.over(disk));
        EmbeddedWriter::new(disk, &self.layout, options)
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
            None => Box::new(Direct::of(self, layout).writer(disk, options)),
            Some(appliance) => Box::new(GuestfishWriter::new(
                appliance.clone(),
                disk,
                layout,
                options,
            )),
        }
    }

    /// Writes without an appliance, if this engine does.
    pub(super) fn direct(&self, layout: &DiskLayout) -> Option<Direct> {
        self.appliance.is_none().then(|| Direct::of(self, layout))
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

    #[test]
    fn what_each_engine_is_and_does() {
        let of = |kind| Engine::choose(Some(kind)).ok();
        let embedded = of(Kind::Embedded).unwrap();
        assert_eq!((embedded.kind, embedded.auto), (Kind::Embedded, false));
        let all = [Engine::EMBEDDED, Engine::OPENED].into_iter();
        for engine in all.chain(of(Kind::Guestfish)) {
            let guestfish = engine.kind == Kind::Guestfish;
            let plain = engine.kind == Kind::Embedded;
            assert_eq!(engine.name() == "guestfish", guestfish);
            // What it writes is seen through another connection alone.
            assert_eq!(engine.writes_past_us(), guestfish);
            assert_eq!(engine.starts_slowly(), !plain);
            assert_eq!(engine.access() == DaemonAccess::Private, plain);
        }
        let reader = Engine::choose_reader(None).unwrap();
        assert_eq!((reader.kind, reader.auto), (Kind::Embedded, true));
        assert!(!Engine::choose_reader(Some(Kind::Embedded)).unwrap().auto);
        assert!(Engine::choose(None).unwrap().auto);
    }

    /// An engine that the user asked for is not replaced, nor one that has found Windows.
    #[test]
    fn another_engine_is_tried_only_where_none_was_asked_for_and_no_windows_was_seen() {
        use crate::demo::WinVersion;
        use crate::testing::MemoryGuest;
        let guest = MemoryGuest::new(WinVersion::Win10);
        let seen = guest.look(&[], |_, survey| survey.inspection.clone());
        let mut nothing = seen.clone();
        nothing.windows = None;
        let auto = Engine::choose_reader(None).unwrap();
        let kinds = [FsKind::Luks];
        let tried = |engine: Engine, seen, key| engine.instead(seen, &kinds, key).is_some();
        assert_eq!(tried(auto, &nothing, true), guestfish());
        assert!(!tried(auto, &nothing, false));
        assert!(!tried(auto, &seen, true));
        assert!(!tried(Engine::EMBEDDED, &nothing, true));
        let other = Engine {
            kind: Kind::Opened,
            ..auto
        };
        assert!(!tried(other, &nothing, true));
    }

    #[test]
    fn an_engine_that_is_not_there_is_a_missing_tool_with_a_way_out() {
        let hint = || "apt install it".to_owned();
        let missing = GuestError::MissingTool {
            what: "guestfish".into(),
            hint: hint(),
        };
        let appliance = GuestError::Appliance {
            reason: "no kernel".into(),
            hint: hint(),
        };
        for (error, hints) in [(missing, 1), (appliance, 2)] {
            let error = open_error(error, "/vm");
            assert_eq!(error.kind, ErrorKind::MissingTool, "{error}");
            assert_eq!(error.hints.len(), hints, "{error:?}");
        }
        let broken = GuestError::Unreadable {
            path: "\\".into(),
            reason: "damaged".into(),
        };
        let error = open_error(broken, "/vm");
        assert_eq!(error.kind, ErrorKind::Failed);
        assert!(error.message.contains("/vm"), "{error}");
    }

    #[test]
    fn bitlocker_that_was_opened_here_is_the_reason_where_the_engine_was_chosen() {
        use crate::demo::WinVersion;
        use crate::testing::MemoryGuest;
        let auto = Engine::choose_reader(None).unwrap();
        for (container, says) in [
            (Some(FsKind::Bitlocker), true),
            (Some(FsKind::Luks), false),
            (None, false),
        ] {
            MemoryGuest::new(WinVersion::Win10).look(&[], |guest, survey| {
                let mut guest = guest.clone();
                let windows = survey.inspection.windows.as_ref().unwrap();
                let volume = guest.volume_mut(windows.system_volume.partition);
                volume.state.container = container;
                let why = auto.because_of(&guest).why;
                assert_eq!(why.contains("BitLocker"), says, "{container:?}");
                assert_eq!(
                    Engine::EMBEDDED.because_of(&guest).why,
                    Engine::EMBEDDED.why
                );
            });
        }
    }
}
