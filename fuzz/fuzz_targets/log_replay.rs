#![no_main]
//! A hive with two logs: whatever they hold, replay ends, stays within the size of its input, and what
//! it calls recovered is clean and has whole bins.

use hyper2kvm::registry::load::load;
use hyper2kvm::registry::recover::{broken_bin, pending, recover};
use hyper2kvm_fuzz::Files;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some(files) = Files::from_input(input) else {
        return;
    };
    let logs = [("LOG1", &files.logs[0][..]), ("LOG2", &files.logs[1][..])];
    if let Ok(result) = recover(&files.hive, &logs) {
        assert!(result.bytes.len() <= 4096 + input.len());
        if result.usable {
            assert_eq!(result.entries(), pending(&files.hive, &logs));
        }
        if result.entries() > 0 {
            assert_eq!(broken_bin(&result.bytes), None);
            let again = recover(&result.bytes, &logs).expect("a recovered hive");
            assert!(!again.was_dirty && again.bytes == result.bytes);
        } else {
            assert_eq!(result.bytes, files.hive);
        }
    }
    let _ = load(
        "HIVE",
        std::sync::Arc::new(files.hive.clone().into()),
        &logs,
    );
});
