//! Decompression of Windows' file compression: XPRESS Huffman and LZX (CompactOS, see `wof`), and
//! LZNT1 (the NTFS attribute "compressed").
//!
//! Specifications: [MS-XCA] for XPRESS and LZNT1; [MS-PATCH] for LZX with the changes of WIM, as
//! documented by wimlib. Pure functions: a chunk and its size in, bytes out. Every loop writes at
//! least a byte or consumes input, nothing is allocated beyond the given size, and damaged input
//! returns `None`.
//!
//! No crate is suitable. `lzxd` reads the CAB kind of LZX only, and `xpress-huffman` and `lznt1`
//! are one format each. `ms-compress` has all, but needs a newer compiler than the supported one.

pub mod lznt1;
pub mod lzx;
pub mod xpress;

/// Bits from little-endian 16-bit words, highest first. Beyond the end there are zeroes.
struct Bits<'i> {
    input: &'i [u8],
    buffer: u32,
    left: u32,
}

impl<'i> Bits<'i> {
    fn new(input: &'i [u8]) -> Self {
        Self {
            input,
            buffer: 0,
            left: 0,
        }
    }

    /// Makes at least 16 bits available. In XPRESS the position of raw bytes depends on how far
    /// ahead the words are read. So this is never more than one word too many.
    fn fill(&mut self) {
        if self.left < 16 {
            let word = match self.input {
                [low, high, rest @ ..] => {
                    self.input = rest;
                    u32::from(*low) | u32::from(*high) << 8
                }
                _ => {
                    self.input = &[];
                    0
                }
            };
            self.buffer |= word << (16 - self.left);
            self.left += 16;
        }
    }

    fn drop_bits(&mut self, count: u32) {
        self.buffer = self.buffer.checked_shl(count).unwrap_or(0);
        self.left = self.left.saturating_sub(count);
    }

    /// Takes up to 16 bits.
    fn take(&mut self, count: u32) -> u32 {
        if count == 0 {
            return 0;
        }
        self.fill();
        let bits = self.buffer >> (32 - count);
        self.drop_bits(count);
        bits
    }

    /// Takes up to 16 of the available bits, without reading a word.
    fn take_buffered(&mut self, count: u32) -> u32 {
        if count == 0 {
            return 0;
        }
        let bits = self.buffer >> (32 - count);
        self.drop_bits(count);
        bits
    }

    /// A byte of the input itself, behind the words read so far.
    fn raw_byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.input.split_first()?;
        self.input = rest;
        Some(*byte)
    }
}

const MAX_CODE: usize = 16;

/// A canonical prefix code.
struct Huffman {
    /// Number of codes of each length.
    counts: [u16; MAX_CODE + 1],
    /// The symbols by length, then by value.
    symbols: Vec<u16>,
}

impl Huffman {
    /// Creates a code; `None` if there are more codes than lengths allow.
    fn new(lengths: &[u8]) -> Option<Self> {
        let mut counts = [0u16; MAX_CODE + 1];
        for length in lengths {
            *counts.get_mut(usize::from(*length))? += 1;
        }
        counts[0] = 0;
        let mut free = 1i32;
        for count in &counts[1..] {
            free = free * 2 - i32::from(*count);
            if free < 0 {
                return None;
            }
        }
        let mut symbols: Vec<u16> = (0..lengths.len() as u16)
            .filter(|symbol| lengths[usize::from(*symbol)] != 0)
            .collect();
        symbols.sort_by_key(|symbol| lengths[usize::from(*symbol)]);
        Some(Self { counts, symbols })
    }

    fn symbol(&self, bits: &mut Bits<'_>) -> Option<u16> {
        bits.fill();
        let (mut first, mut index) = (0u32, 0u32);
        for length in 1..=MAX_CODE as u32 {
            let code = bits.buffer >> (32 - length);
            let count = u32::from(self.counts[length as usize]);
            if code < first + count {
                bits.drop_bits(length);
                return self.symbols.get((index + code - first) as usize).copied();
            }
            index += count;
            first = (first + count) << 1;
        }
        None
    }
}

/// Appends a match; the bytes may overlap the appended ones. `None` if it starts before the output
/// or exceeds `size`.
fn copy_match(out: &mut Vec<u8>, offset: usize, length: usize, size: usize) -> Option<()> {
    let from = out.len().checked_sub(offset).filter(|_| offset > 0)?;
    if length > size.saturating_sub(out.len()) {
        return None;
    }
    for at in from..from + length {
        out.push(out[at]);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes() {
        // 0, 10, 110, 111 for the symbols 2, 0, 1, 3.
        let code = Huffman::new(&[2, 3, 1, 3]).unwrap();
        let mut bits = Bits::new(&[0b0000_0000, 0b0101_1011]);
        let symbols: Vec<_> = (0..4).map(|_| code.symbol(&mut bits).unwrap()).collect();
        assert_eq!(symbols, [2, 0, 1, 1]);
        assert!(Huffman::new(&[1, 1, 1]).is_none(), "too many");
        assert!(Huffman::new(&[17]).is_none(), "too long");
        let empty = Huffman::new(&[0; 20]).unwrap();
        assert!(empty.symbol(&mut Bits::new(&[0; 8])).is_none());
        let alone = Huffman::new(&[0, 1]).unwrap();
        assert!(alone.symbol(&mut Bits::new(&[0xff; 8])).is_none());
    }

    #[test]
    fn matches_stay_inside() {
        let mut out = b"ab".to_vec();
        copy_match(&mut out, 2, 5, 7).unwrap();
        assert_eq!(out, b"abababa");
        assert!(copy_match(&mut out, 1, 1, 7).is_none());
        assert!(copy_match(&mut out, 0, 1, 99).is_none());
        assert!(copy_match(&mut out, 8, 1, 99).is_none());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..3000),
            size in 0usize..40_000,
        ) {
            for out in [xpress::unpack(&bytes, size), lzx::unpack(&bytes, size)].into_iter().flatten() {
                assert_eq!(out.len(), size);
            }
            if let Some(out) = lznt1::unpack(&bytes, size) {
                assert!(out.len() <= size);
            }
        }
    }
}
