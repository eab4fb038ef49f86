#![no_main]
//! A program image: its machine and the hashes a catalogue may list.

use hyper2kvm::drivers::authenticode::{hashes, member_hash};
use hyper2kvm::drivers::pe::machine;
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        let _ = machine(input);
        assert!(hashes(input).contains(&member_hash(input)));
    });
});
