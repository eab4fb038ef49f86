//! The stop flag: raised by SIGINT, SIGTERM and SIGHUP, checked by everything that takes long.
//!
//! Children run in process groups of their own, so Ctrl-C reaches only this process. A rollback
//! that follows still finds its storage daemon alive.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

static FLAG: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Makes the signals raise the flag instead of ending the process.
pub fn install() -> io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, FLAG.clone())?;
    }
    // A write past the limit of a file's size is an error of that write, like in QEMU, and ends
    // nothing.
    signal_hook::flag::register(libc::SIGXFSZ, Arc::default())?;
    Ok(())
}

pub fn requested() -> bool {
    FLAG.load(Ordering::SeqCst)
}

/// The cause of an error after an early end because of the flag.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

impl From<Interrupted> for io::Error {
    /// Not of the kind `Interrupted`: the standard library would continue.
    fn from(cause: Interrupted) -> Self {
        Self::other(cause)
    }
}

/// Whether this error itself, not those below it, is that of the flag.
pub fn is_interrupted(error: &(dyn StdError + 'static)) -> bool {
    let inside = |e: &io::Error| e.get_ref().is_some_and(|inner| inner.is::<Interrupted>());
    error.is::<Interrupted>() || error.downcast_ref().is_some_and(inside)
}
