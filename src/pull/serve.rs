//! `serve`: keeps the connection to a source on another host, and resumes a VM that QEMU has paused
//! because of it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::folder::Folder;
use crate::boot::access;
use crate::error::Result;
use crate::later::record::{self, Record};
use crate::later::serve::{Server, Trouble, hit};
use crate::stop;
use crate::ui::Ui;

/// The interval of checks whether the directory still needs the source.
const TICK: Duration = Duration::from_millis(250);
/// The interval of checks of the VM.
const LOOK: Duration = Duration::from_secs(2);
/// The interval between two attempts to resume a VM.
const AGAIN: Duration = Duration::from_secs(5);

/// The served source and its VM.
pub(crate) struct Serving {
    folder: PathBuf,
    uri: String,
    server: Server,
}

/// The reason for a normal end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Asked,
    /// Everything was pulled.
    Alone,
    /// The directory was released.
    Released,
}

impl Serving {
    pub(crate) fn start(folder: &Folder, record: &Record, uri: &str) -> Result<Self> {
        let uri = folder.boot.as_ref().map_or(uri, |boot| &boot.uri);
        Ok(Self {
            folder: folder.path.clone(),
            uri: uri.to_owned(),
            server: Server::start(&folder.path, record, access::owner(uri))?,
        })
    }

    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    /// Serves until it is asked to end, or until nothing needs it any more. Also returns the bytes
    /// that have crossed the wire.
    pub(crate) fn watch(self, ui: &Ui) -> Result<(End, u64)> {
        let (mut looked, mut tried) = (Instant::now(), None::<Instant>);
        let mut said = String::new();
        loop {
            std::thread::sleep(TICK);
            let end = match Record::load(&self.folder) {
                _ if stop::requested() => Some(End::Asked),
                Ok(None) => Some(End::Released),
                Ok(Some(record)) if record.state == record::LaterState::Alone => Some(End::Alone),
                // Being written, or unreachable for a moment: the VM still needs the source.
                _ => None,
            };
            if let Some(end) = end {
                hit("serve-ending")?;
                return Ok((end, self.server.fetched()));
            }
            if looked.elapsed() < LOOK || tried.is_some_and(|t| t.elapsed() < AGAIN) {
                continue;
            }
            looked = Instant::now();
            self.server.check_children()?;
            match self.resume(ui, &mut said) {
                Ok(true) => tried = Some(Instant::now()),
                Ok(false) => tried = None,
                Err(error) => {
                    tracing::info!("looking at the VM: {error}");
                    tried = Some(Instant::now());
                }
            }
        }
    }

    /// Resumes the VM if QEMU has paused it and the source answers. Returns whether it was paused.
    fn resume(&self, ui: &Ui, said: &mut String) -> Result<bool> {
        let Some(domain) = Folder::open(&self.folder)?.domain(&self.uri)? else {
            return Ok(false);
        };
        if !domain.tick.is_io_error() {
            return Ok(false);
        }
        if domain.virsh.is_full(domain.uuid)? {
            let why = "the VM is paused: a disk of this host is full; make room, then resume it (virsh resume)";
            once(ui, said, why.to_owned());
            return Ok(true);
        }
        let why = match self.server.answers() {
            Ok(()) => {
                said.clear();
                ui.status("Resuming", "the VM: its source answers again");
                hit("serve-resuming")?;
                domain.virsh.resume(domain.uuid)?;
                return Ok(true);
            }
            Err(Trouble::Line(error)) => format!("the VM is paused: {error}"),
            Err(Trouble::Changed(what)) => {
                format!("the VM is paused and stays so: its source has changed ({what})")
            }
        };
        once(ui, said, why);
        Ok(true)
    }
}

/// Prints a message unless it was the last one printed.
fn once(ui: &Ui, said: &mut String, why: String) {
    if *said != why {
        ui.warn(&why);
        *said = why;
    }
}
