#![no_main]
//! What the storage daemon sends: it parses the disk image in C, and may be in the hands of whoever
//! made that.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hyper2kvm::block::{BlockRead, BlockWrite};
use hyper2kvm::disk::nbd::{Nbd, Patience};
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

/// Fits the buffer of a socket, so that nobody waits.
const MAX: usize = 64 << 10;
const PATIENCE: Patience = Patience {
    silence: Duration::from_secs(5),
    stopping: Duration::from_secs(5),
};

fuzz_target!(|input: &[u8]| {
    if input.len() > MAX {
        return;
    }
    bounded(|| {
        let (mut server, client) = UnixStream::pair().expect("a socket");
        server.write_all(input).expect("room in its buffer");
        server.shutdown(Shutdown::Write).expect("an open socket");
        // It hears us out, as `Export` would not wait for ever for one that does not.
        std::thread::spawn(move || io::copy(&mut server, &mut io::sink()));
        let Ok(nbd) = Nbd::handshake(client, "disk", PATIENCE) else {
            return;
        };
        let _ = nbd.is_read_only();
        let mut sector = [0; 512];
        let _ = nbd.read_at((nbd.size() / 2) & !511, &mut sector);
        let _ = nbd.write_at(0, &sector);
        let _ = nbd.zero_at(0, nbd.size().min(1 << 30));
        let _ = nbd.flush();
        let mut large = vec![0; 2 << 20];
        let _ = nbd.read_at(0, &mut large);
        nbd.disconnect();
    });
});
