#![no_main]
//! What servers of sources on the wire send: SFTP answers, NBD handshakes, replies and dirty bitmaps, and
//! pages that list a directory.

use hyper2kvm::wire::fuzz;
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

/// Fits the buffer of a socket, so that nobody waits.
const MAX: usize = 64 << 10;

fuzz_target!(|input: &[u8]| {
    let Some((kind, bytes)) = input.split_first() else {
        return;
    };
    if bytes.len() <= MAX {
        bounded(|| fuzz::answers(*kind, bytes));
    }
});
