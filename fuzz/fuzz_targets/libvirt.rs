#![no_main]
//! Domain XML of libvirt.

use std::path::Path;

use hyper2kvm::source::libvirt;
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        if let Ok((_, disks)) = libvirt::parse(Path::new("a.xml"), input) {
            assert!(disks.len() <= input.len());
        }
    });
});
