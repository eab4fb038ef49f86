//! The stop flag: raised by SIGINT, SIGTERM and SIGHUP, looked at by everything that takes long.
//!
//! Children run in process groups of their own, so Ctrl-C reaches only us: a rollback that follows
//! still finds its storage daemon alive.

use std::io;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};

static FLAG: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Makes the signals raise the flag instead of ending the process.
pub fn install() -> io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, FLAG.clone())?;
    }
    Ok(())
}

pub fn requested() -> bool {
    FLAG.load(Ordering::SeqCst)
}
