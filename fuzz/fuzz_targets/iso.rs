#![no_main]
//! A driver CD: the tree and every file of it.

use std::io::Cursor;

use hyper2kvm::drivers::iso::Iso;
use hyper2kvm_fuzz::{bounded, sectors};
use libfuzzer_sys::fuzz_target;

const SYSTEM_AREA: usize = 16 * 2048;

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        let mut image = vec![0; SYSTEM_AREA];
        image.extend(sectors(input, 2048));
        let size = image.len();
        let Ok(mut iso) = Iso::open(Cursor::new(image)) else {
            return;
        };
        let files = iso.files.clone();
        for file in files.iter().take(64) {
            let escapes = |part| matches!(part, "" | "." | "..");
            assert!(!file.path.split('/').any(escapes), "{:?}", file.path);
            if let Ok(bytes) = iso.read(file) {
                assert_eq!(bytes.len() as u64, file.size);
                assert!(bytes.len() <= size * 64);
            }
        }
    });
});
