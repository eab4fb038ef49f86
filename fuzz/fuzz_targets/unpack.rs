#![no_main]
//! One compressed chunk, in each of the formats of Windows.

use hyper2kvm::guest::unpack::{lznt1, lzx, xpress};
use hyper2kvm::guest::wof;
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&[kind, low, high], packed)) = input.split_first_chunk() else {
        return;
    };
    let size = usize::from(u16::from_le_bytes([low, high]));
    bounded(|| match kind & 3 {
        0 => {
            if let Some(out) = xpress::unpack(packed, size) {
                assert_eq!(out.len(), size);
            }
        }
        1 => {
            if let Some(out) = lzx::unpack(packed, size) {
                assert_eq!(out.len(), size);
            }
        }
        2 => {
            if let Some(out) = lznt1::unpack(packed, size) {
                assert!(out.len() <= size);
            }
        }
        _ => {
            let Ok(algorithm) = wof::algorithm(packed) else {
                return;
            };
            let chunks = wof::Chunks {
                algorithm,
                size: (size as u64) << (kind >> 2),
                packed: packed.len() as u64,
            };
            for index in 0..chunks.count().min(100) {
                if let Ok((from, len)) = chunks.table_part(index)
                    && let Some(part) = packed.get(from as usize..from as usize + len)
                    && let Ok((at, len)) = chunks.place(index, part)
                {
                    assert!(at + len as u64 <= chunks.packed);
                    let _ = chunks.unpacked(index);
                }
            }
        }
    });
});
