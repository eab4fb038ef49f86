#![no_main]
//! The first and last bytes of a disk image, VMDK descriptors, and what qemu-img says of an image.

use hyper2kvm::disk::detect::{detect_bytes, parse_extents, vhd_type};
use hyper2kvm::disk::vmdk::Descriptor;
use hyper2kvm::tool::qemu_img::{parse_check, parse_info};
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        let (head, tail) = input.split_at(input.len().saturating_sub(512));
        let _ = detect_bytes(head, tail);
        let _ = detect_bytes(input, tail);
        let _ = vhd_type(tail);
        assert!(parse_extents(input).len() <= input.len());
        let _ = Descriptor::parse(input);
        let _ = parse_info(input);
        let _ = parse_check(input);
    });
});
