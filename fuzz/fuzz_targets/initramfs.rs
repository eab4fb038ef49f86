#![no_main]
//! An initramfs of a Linux guest: cpio archives in a row, in every compression that is read.

use hyper2kvm::linux::initramfs::{MAX_UNPACKED, scan};
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        if let Ok(contents) = scan(input, &mut MAX_UNPACKED.clone()) {
            assert!(contents.files > 0);
        }
    });
});
