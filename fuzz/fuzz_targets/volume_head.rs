#![no_main]
//! The first sectors of volumes, BitLocker's list of keys, and the restart pages of an NTFS log.

use hyper2kvm::guest::{bitlocker, fs, logfile};
use hyper2kvm_fuzz::bounded;
use hyper2kvm_fuzz::disk::Ends;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((kind, head)) = input.split_first() else {
        return;
    };
    bounded(|| match kind & 1 {
        0 => {
            let _ = (fs::identify(head), fs::fat(head), fs::ntfs(head));
            let _ = logfile::state(head).is_clean();
        }
        _ => {
            let disk = Ends {
                size: 1 << 20,
                head: head.to_vec(),
                tail: Vec::new(),
            };
            assert!(bitlocker::protectors(&disk, 0, 1 << 20).len() <= 256);
            let _ = bitlocker::protectors(&disk, 512, head.len() as u64);
        }
    });
});
