#![no_main]
//! The member table of an OVA.

use std::io::Cursor;

use hyper2kvm::source::tar::members;
use hyper2kvm_fuzz::{SEAL, bounded, seal_tar};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((flags, archive)) = input.split_first() else {
        return;
    };
    let mut archive = archive.to_vec();
    if flags & SEAL != 0 {
        seal_tar(&mut archive);
    }
    let size = archive.len() as u64;
    bounded(|| {
        if let Ok(members) = members(Cursor::new(archive)) {
            for member in members {
                let end = member.offset.checked_add(member.size);
                assert!(end.is_some_and(|end| end <= size), "{member:?}");
            }
        }
    });
});
