#![no_main]
//! The base block of a hive or log, and of whatever else begins with `regf`.

use hyper2kvm::registry::base::{BaseBlock, set_clean};
use hyper2kvm::registry::log::Log;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut bytes = input.to_vec();
    let parsed = BaseBlock::parse(&bytes);
    assert_eq!(parsed.is_ok(), set_clean(&mut bytes, 3).is_ok());
    if parsed.is_ok() {
        let base = BaseBlock::parse(&bytes).expect("it was one before");
        assert!(!base.is_dirty());
    }
    if let Ok(log) = Log::parse(&bytes) {
        let _ = log.entries(usize::MAX);
        let _ = log.pages(usize::MAX);
    }
});
