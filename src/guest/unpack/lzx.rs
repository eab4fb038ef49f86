//! LZX of WIM archives and CompactOS: independent chunks of 32 KiB.
//!
//! It differs from the LZX of CAB files in three points. A bit marks a block of the default size.
//! There is no header with a file size. Targets of x86 calls are always translated, as if the file
//! had 12 000 000 bytes.

use super::{Bits, Huffman, copy_match};

/// Size of the window and of a chunk.
pub const MAX_SIZE: usize = 32 << 10;

const LITERALS: usize = 256;
const OFFSET_SLOTS: usize = 30;
const LENGTH_SYMBOLS: usize = 249;
const MAIN_SYMBOLS: usize = LITERALS + OFFSET_SLOTS * 8;
const MIN_MATCH: usize = 2;
const DEFAULT_BLOCK: usize = 32 << 10;
const CALL: u8 = 0xe8;
const CALL_FILE_SIZE: i32 = 12_000_000;

pub fn unpack(packed: &[u8], size: usize) -> Option<Vec<u8>> {
    if size > MAX_SIZE {
        return None;
    }
    let mut decoder = Decoder {
        bits: Bits::new(packed),
        out: Vec::with_capacity(size),
        size,
        main: [0; MAIN_SYMBOLS],
        lengths: [0; LENGTH_SYMBOLS],
        recent: [1; 3],
    };
    while decoder.out.len() < size {
        decoder.block()?;
    }
    let mut out = decoder.out;
    undo_calls(&mut out);
    Some(out)
}

struct Decoder<'i> {
    bits: Bits<'i>,
    out: Vec<u8>,
    size: usize,
    /// Code lengths; a block contains them as differences to those of the previous one.
    main: [u8; MAIN_SYMBOLS],
    lengths: [u8; LENGTH_SYMBOLS],
    recent: [usize; 3],
}

impl Decoder<'_> {
    fn block(&mut self) -> Option<()> {
        let kind = self.bits.take(3);
        let size = match self.bits.take(1) {
            1 => DEFAULT_BLOCK,
            _ => self.bits.take(16) as usize,
        };
        if size == 0 || size > self.size - self.out.len() {
            return None;
        }
        match kind {
            1 => self.coded(size, false),
            2 => self.coded(size, true),
            3 => self.plain(size),
            _ => None,
        }
    }

    /// A block without compression: aligned to a word, which costs 1 to 16 bits.
    fn plain(&mut self, size: usize) -> Option<()> {
        self.bits.fill();
        // A word read ahead belongs to the block's header.
        let mut ahead = Vec::new();
        if self.bits.left > 16 {
            let extra = self.bits.left - 16;
            self.bits.drop_bits(extra);
            ahead.extend(((self.bits.take_buffered(16)) as u16).to_le_bytes());
        } else {
            self.bits.drop_bits(16);
        }
        while ahead.len() < 12 {
            ahead.push(self.bits.raw_byte()?);
        }
        for (recent, bytes) in self.recent.iter_mut().zip(ahead.chunks_exact(4)) {
            *recent = u32::from_le_bytes(bytes.try_into().ok()?) as usize;
        }
        let (data, rest) = self.bits.input.split_at_checked(size)?;
        self.out.extend_from_slice(data);
        self.bits.input = rest;
        if size % 2 == 1 && self.out.len() < self.size {
            self.bits.raw_byte()?;
        }
        Some(())
    }

    fn coded(&mut self, size: usize, aligned: bool) -> Option<()> {
        let aligned = match aligned {
            true => {
                let lengths: [u8; 8] = std::array::from_fn(|_| self.bits.take(3) as u8);
                Some(Huffman::new(&lengths)?)
            }
            false => None,
        };
        let (literals, matches) = self.main.split_at_mut(LITERALS);
        code_lengths(&mut self.bits, literals)?;
        code_lengths(&mut self.bits, matches)?;
        let main = Huffman::new(&self.main)?;
        code_lengths(&mut self.bits, &mut self.lengths)?;
        let lengths = Huffman::new(&self.lengths)?;
        let end = self.out.len() + size;
        while self.out.len() < end {
            let symbol = main.symbol(&mut self.bits)?;
            if let Ok(literal) = u8::try_from(symbol) {
                self.out.push(literal);
                continue;
            }
            let symbol = usize::from(symbol) - LITERALS;
            let mut length = symbol % 8;
            if length == 7 {
                length += usize::from(lengths.symbol(&mut self.bits)?);
            }
            let offset = self.offset(symbol / 8, aligned.as_ref())?;
            copy_match(&mut self.out, offset, length + MIN_MATCH, end)?;
        }
        Some(())
    }

    fn offset(&mut self, slot: usize, aligned: Option<&Huffman>) -> Option<usize> {
        if slot < 3 {
            self.recent.swap(0, slot);
            return Some(self.recent[0]);
        }
        let (base, extra) = match slot {
            3 => (3, 0),
            _ => ((2 + slot % 2) << (slot / 2 - 1), slot as u32 / 2 - 1),
        };
        let low = match aligned {
            Some(code) if extra >= 3 => {
                let high = (self.bits.take(extra - 3) as usize) << 3;
                high | usize::from(code.symbol(&mut self.bits)?)
            }
            _ => self.bits.take(extra) as usize,
        };
        let offset = base + low - 2;
        self.recent = [offset, self.recent[0], self.recent[1]];
        Some(offset)
    }
}

/// Updates code lengths from the stream, where they are encoded in a small code of their own.
fn code_lengths(bits: &mut Bits<'_>, lengths: &mut [u8]) -> Option<()> {
    let pre: [u8; 20] = std::array::from_fn(|_| bits.take(4) as u8);
    let pre = Huffman::new(&pre)?;
    let changed = |old: u8, by: u16| (17 + u16::from(old) - by) as u8 % 17;
    let mut at = 0;
    while at < lengths.len() {
        let (run, length) = match pre.symbol(bits)? {
            by @ 0..=16 => (1, changed(lengths[at], by)),
            17 => (4 + bits.take(4) as usize, 0),
            18 => (20 + bits.take(5) as usize, 0),
            _ => {
                let run = 4 + bits.take(1) as usize;
                let by = pre.symbol(bits)?;
                if by > 17 {
                    return None;
                }
                (run, changed(lengths[at], by))
            }
        };
        // A run may be longer than the rest to fill.
        let end = (at + run).min(lengths.len());
        lengths[at..end].fill(length);
        at = end;
    }
    Some(())
}

/// Reverts the compressor's translation of relative targets of x86 calls into absolute ones.
fn undo_calls(data: &mut [u8]) {
    let end = data.len().saturating_sub(10);
    let mut at = 0;
    while at < end {
        if data[at] != CALL {
            at += 1;
            continue;
        }
        let place = at as i32;
        if let Some(bytes) = data.get_mut(at + 1..at + 5) {
            let target = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            if (0..CALL_FILE_SIZE).contains(&target) {
                bytes.copy_from_slice(&(target - place).to_le_bytes());
            } else if target < 0 && target >= -place {
                bytes.copy_from_slice(&(target + CALL_FILE_SIZE).to_le_bytes());
            }
        }
        at += 5;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An uncompressed block of odd size, then another: the padding and the alignment.
    #[test]
    fn plain_blocks() {
        let mut packed = Vec::new();
        for text in [&b"odd"[..], b"even"] {
            // Three bits of kind, a zero, sixteen of size; twelve bits of padding.
            let head = 3u32 << 29 | (text.len() as u32) << 12;
            packed.extend(((head >> 16) as u16).to_le_bytes());
            packed.extend((head as u16).to_le_bytes());
            packed.extend([1, 0, 0, 0].repeat(3));
            packed.extend(text);
            if text.len() % 2 == 1 {
                packed.push(0);
            }
        }
        assert_eq!(unpack(&packed, 7).unwrap(), b"oddeven");
        assert!(unpack(&packed, 5).is_none(), "a block beyond the end");
        assert!(unpack(&packed[..packed.len() - 1], 7).is_none());
    }

    #[test]
    fn calls() {
        let mut data = vec![0u8; 32];
        data[4] = CALL;
        data[5..9].copy_from_slice(&100i32.to_le_bytes());
        data[10] = CALL;
        data[11..15].copy_from_slice(&(-3i32).to_le_bytes());
        data[22] = CALL;
        undo_calls(&mut data);
        assert_eq!(data[5..9], 96i32.to_le_bytes());
        assert_eq!(data[11..15], (CALL_FILE_SIZE - 3).to_le_bytes());
        assert_eq!(data[23..27], [0; 4], "the last ten bytes stay");
    }
}
