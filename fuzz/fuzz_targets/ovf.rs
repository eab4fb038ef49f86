#![no_main]
//! An OVF envelope and the manifest beside it.

use std::path::Path;

use hyper2kvm::source::manifest::Manifest;
use hyper2kvm::source::ovf;
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        if let Ok((_, disks)) = ovf::parse(Path::new("a.ovf"), input, &Default::default()) {
            assert!(disks.len() <= input.len());
        }
        if let Ok((manifest, _)) = Manifest::parse(input) {
            let _ = manifest.of("disk.vmdk");
        }
    });
});
