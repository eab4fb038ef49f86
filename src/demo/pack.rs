//! Compresses files like CompactOS: XPRESS Huffman in chunks of 4 KiB, without matches.
//!
//! The simplest packer whose output is valid: a zero takes one bit, every other byte nine. That
//! suffices for the generated program images, which are mostly zeroes.

use crate::guest::wof::Algorithm;

pub const ALGORITHM: Algorithm = Algorithm::Xpress4K;

/// The stream `WofCompressedData` of a file.
pub fn stream(data: &[u8]) -> Vec<u8> {
    let chunks: Vec<Vec<u8>> = data
        .chunks(ALGORITHM.chunk_size() as usize)
        .map(|chunk| {
            let packed = pack(chunk);
            match packed.len() < chunk.len() {
                true => packed,
                false => chunk.to_vec(),
            }
        })
        .collect();
    let mut out = Vec::new();
    let mut end = 0;
    for chunk in &chunks[..chunks.len().saturating_sub(1)] {
        end += chunk.len() as u32;
        out.extend(end.to_le_bytes());
    }
    out.extend(chunks.concat());
    out
}

fn pack(chunk: &[u8]) -> Vec<u8> {
    // Code lengths, a nibble each: 1 for zero, 9 for the other bytes and for the end of the data.
    let mut out = vec![0x99; 128];
    out[0] = 0x91;
    out.push(0x09);
    out.resize(256, 0);
    let (mut word, mut used) = (0u32, 0u32);
    for byte in chunk {
        let (code, len) = match byte {
            0 => (0, 1),
            byte => (0x100 + u32::from(*byte) - 1, 9),
        };
        word |= code << (32 - len - used);
        used += len;
        if used >= 16 {
            out.extend(((word >> 16) as u16).to_le_bytes());
            word <<= 16;
            used -= 16;
        }
    }
    // The rest, and what Windows reads ahead.
    out.extend(((word >> 16) as u16).to_le_bytes());
    out.extend([0; 2]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::{Arch, pe};

    #[test]
    fn comes_back() {
        let image = pe::image(Arch::Amd64, pe::Subsystem::Native);
        let packed = stream(&image);
        assert!(packed.len() < image.len());
        let unpacked = ALGORITHM.unpack(packed, image.len()).unwrap();
        assert_eq!(unpacked, image);
        let every: Vec<u8> = (0..=255).chain([0; 900]).collect();
        assert_eq!(ALGORITHM.unpack(pack(&every), every.len()).unwrap(), every);
    }
}
