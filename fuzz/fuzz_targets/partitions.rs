#![no_main]
//! The two ends of a disk: partition tables, and what the partitions look like.

use std::sync::Arc;

use hyper2kvm::disk::partition::read_layout;
use hyper2kvm::guest::GuestRead;
use hyper2kvm::guest::embedded;
use hyper2kvm_fuzz::disk::Ends;
use hyper2kvm_fuzz::{DISK, END, SEAL, bounded, seal_gpt};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((flags, input)) = input.split_first() else {
        return;
    };
    let (head, tail) = input.split_at(END.min(input.len()));
    let (mut head, mut tail) = (head.to_vec(), tail[..tail.len().min(END)].to_vec());
    tail.resize(END, 0);
    if flags & SEAL != 0 {
        seal_gpt(&mut head, 512, 1024);
        // The backup: entries first, its header in the last sector.
        seal_gpt(&mut tail, END - 512, END - 33 * 512);
    }
    bounded(|| {
        let disk = Arc::new(Ends {
            size: DISK,
            head,
            tail,
        });
        let Ok(layout) = read_layout(disk.as_ref()) else {
            return;
        };
        for partition in &layout.partitions {
            let end = partition.start_bytes.checked_add(partition.size_bytes);
            assert!(end.is_some_and(|end| end <= DISK), "{partition:?}");
        }
        if let Ok(reader) = embedded::open(disk, &layout) {
            assert!(reader.volumes().len() <= layout.partitions.len().max(1));
        }
    });
});
