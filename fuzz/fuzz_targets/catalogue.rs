#![no_main]
//! A driver catalogue: a PKCS#7 message with the hashes of files.

use hyper2kvm::drivers::signature::listing;
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        if let Some(listing) = listing(input) {
            let _ = listing.lists(b"file");
            if let Some(signer) = &listing.signer {
                let _ = signer.is_test();
            }
        }
    });
});
