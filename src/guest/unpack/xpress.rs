//! XPRESS with Huffman codes: [MS-XCA] 2.1 and 2.2, one block (up to 64 KiB) with one code.
//!
//! Lengths beyond 17 are raw bytes between the words of the bit stream, after the words read ahead.
//! The end-of-data symbol is unused here, because the size is known.

use super::{Bits, Huffman, copy_match};

const TABLE: usize = 256;
const MIN_MATCH: usize = 3;

/// The largest size of data with one code.
pub const MAX_SIZE: usize = 64 << 10;

pub fn unpack(packed: &[u8], size: usize) -> Option<Vec<u8>> {
    if size > MAX_SIZE {
        return None;
    }
    let (table, rest) = packed.split_at_checked(TABLE)?;
    let lengths: Vec<u8> = table.iter().flat_map(|b| [b & 15, b >> 4]).collect();
    let code = Huffman::new(&lengths)?;
    let mut bits = Bits::new(rest);
    let mut out = Vec::with_capacity(size);
    while out.len() < size {
        let symbol = code.symbol(&mut bits)?;
        if let Ok(literal) = u8::try_from(symbol) {
            out.push(literal);
            continue;
        }
        bits.fill();
        let offset_bits = u32::from(symbol >> 4 & 15);
        let offset = (1 << offset_bits) | bits.take_buffered(offset_bits) as usize;
        let mut length = usize::from(symbol & 15);
        if length == 15 {
            length += usize::from(bits.raw_byte()?);
            if length == 15 + 255 {
                length = usize::from(bits.raw_byte()?) | usize::from(bits.raw_byte()?) << 8;
                if length < 15 {
                    return None;
                }
            }
        }
        copy_match(&mut out, offset, length + MIN_MATCH, size)?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// [MS-XCA] 3.2, "Huffman example": the alphabet, then 300 bytes of "abc".
    #[test]
    fn specification() {
        let mut packed = vec![0u8; TABLE];
        packed[0x30..0x3b].fill(0x55);
        packed[0x30] = 0x50;
        packed[0x3b..0x3e].copy_from_slice(&[0x45, 0x44, 0x04]);
        packed[0x80] = 0x04;
        packed.extend([
            0xd8, 0x52, 0x3e, 0xd7, 0x94, 0x11, 0x5b, 0xe9, 0x19, 0x5f, 0xf9, 0xd6, 0x7c, 0xdf,
            0x8d, 0x04, 0x00, 0x00, 0x00, 0x00,
        ]);
        assert_eq!(unpack(&packed, 26).unwrap(), b"abcdefghijklmnopqrstuvwxyz");

        let mut packed = vec![0u8; TABLE];
        packed[0x30..0x32].copy_from_slice(&[0x30, 0x23]);
        packed[0x80] = 0x02;
        packed[0x8f] = 0x20;
        packed.extend([0xa8, 0xdc, 0x00, 0x00, 0xff, 0x26, 0x01, 0x00, 0x00]);
        assert_eq!(unpack(&packed, 300).unwrap(), b"abc".repeat(100));
        assert!(unpack(&packed, 299).is_none(), "a match beyond the end");
        assert!(unpack(&packed[..255], 300).is_none());
        assert!(unpack(&packed[..256 + 4], 300).is_none());
    }
}
