#![no_main]
//! The first sectors of volumes, and the restart pages of an NTFS log.

use hyper2kvm::guest::{fs, logfile};
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((_, head)) = input.split_first() else {
        return;
    };
    bounded(|| {
        let _ = (fs::identify(head), fs::fat(head), fs::ntfs(head));
        let _ = logfile::state(head).is_clean();
    });
});
