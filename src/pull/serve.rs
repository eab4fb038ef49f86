//! `serve`: holds the way to a source on another host, and resumes a VM that QEMU has paused for it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::folder::Folder;
use crate::boot::access;
use crate::error::Result;
use crate::later::record::{self, Record};
use crate::later::serve::{Server, Trouble, hit};
use crate::stop;
use crate::ui::Ui;

/// How often is looked whether the directory still needs it.
const TICK: Duration = Duration::from_millis(250);
/// How often the VM is looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Between two attempts to resume a VM.
const AGAIN: Duration = Duration::from_secs(5);

/// What is served, and to whom.
pub(crate) struct Serving {
    folder: PathBuf,
    uri: String,
    server: Server,
}

/// Why it ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Asked,
    /// Everything was pulled.
    Alone,
    /// The directory was given up.
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

    /// Serves until it is asked to end, or until nobody needs it any more. With the bytes that have crossed
    /// the wire.
    pub(crate) fn watch(self, ui: &Ui) -> Result<(End, u64)> {
        let (mut looked, mut tried) = (Instant::now(), None::<Instant>);
        let mut said = String::new();
        loop {
            std::thread::sleep(TICK);
            let end = match Record::load(&self.folder) {
                _ if stop::requested() => Some(End::Asked),
                Ok(None) => Some(End::Released),
                Ok(Some(record)) if record.state == record::State::Alone => Some(End::Alone),
                // Being written, or out of reach for a moment: the VM still needs it.
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

    /// Resumes the VM when QEMU has paused it and the source answers. Whether it was paused.
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

/// Says what was not said last.
fn once(ui: &Ui, said: &mut String, why: String) {
    if *said != why {
        ui.warn(&why);
        *said = why;
    }
}
