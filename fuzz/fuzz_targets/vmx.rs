#![no_main]
//! A VMware machine file.

use hyper2kvm::source::vmx::Vmx;
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        if let Ok(vmx) = Vmx::parse(input) {
            let (_, disks) = vmx.machine();
            assert!(disks.len() <= input.len());
        }
    });
});
