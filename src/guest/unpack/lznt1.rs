//! LZNT1: [MS-XCA] 2.5, chunks of 4 KiB with a header each.

use super::copy_match;

const CHUNK: usize = 4096;
const PACKED: u16 = 0x8000;
const MIN_MATCH: usize = 3;

/// Unpacks a compression unit of up to `size` bytes; the result is shorter if the chunks end
/// before. A chunk that ends early is followed by zeroes.
pub fn unpack(mut packed: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(size.min(packed.len().saturating_mul(8)));
    while out.len() < size {
        let Some((header, rest)) = packed.split_first_chunk::<2>() else {
            break;
        };
        let header = u16::from_le_bytes(*header);
        if header == 0 {
            break;
        }
        let (data, rest) = rest.split_at_checked(usize::from(header & 0xfff) + 1)?;
        packed = rest;
        let end = (out.len() + CHUNK).min(size);
        if header & PACKED != 0 {
            chunk(data, &mut out, end)?;
        } else {
            out.extend_from_slice(data.get(..end - out.len()).unwrap_or(data));
        }
        out.resize(end, 0);
    }
    Some(out)
}

fn chunk(mut data: &[u8], out: &mut Vec<u8>, end: usize) -> Option<()> {
    let start = out.len();
    while let Some((&flags, rest)) = data.split_first() {
        data = rest;
        for bit in 0..8 {
            if data.is_empty() || out.len() >= end {
                return Some(());
            }
            if flags >> bit & 1 == 0 {
                out.push(data[0]);
                data = &data[1..];
                continue;
            }
            let (token, rest) = data.split_first_chunk::<2>()?;
            data = rest;
            let token = u16::from_le_bytes(*token);
            // The offset gets more bits further into the chunk: 4 to 12.
            let position = out.len() - start;
            let length_bits = 12
                - position
                    .saturating_sub(1)
                    .checked_ilog2()
                    .map_or(0, |n| n.saturating_sub(3));
            let offset = usize::from(token >> length_bits) + 1;
            let length = usize::from(token & ((1 << length_bits) - 1)) + MIN_MATCH;
            if offset > position {
                return None;
            }
            copy_match(out, offset, length.min(end - out.len()), end)?;
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// [MS-XCA] 3.3, "LZNT1 example".
    #[test]
    fn specification() {
        let packed = [
            0x38, 0xb0, 0x88, 0x46, 0x23, 0x20, 0x00, 0x20, 0x47, 0x20, 0x41, 0x00, 0x10, 0xa2,
            0x47, 0x01, 0xa0, 0x45, 0x20, 0x44, 0x00, 0x08, 0x45, 0x01, 0x50, 0x79, 0x00, 0xc0,
            0x45, 0x20, 0x05, 0x24, 0x13, 0x88, 0x05, 0xb4, 0x02, 0x4a, 0x44, 0xef, 0x03, 0x58,
            0x02, 0x8c, 0x09, 0x16, 0x01, 0x48, 0x45, 0x00, 0xbe, 0x00, 0x9e, 0x00, 0x04, 0x01,
            0x18, 0x90, 0x00,
        ];
        let expected =
            b"F# F# G A A G F# E D D E F# F# E E F# F# G A A G F# E D D E F# E D D E E F# D E \
F# G F# D E F# G F# E D E A F# F# G A A G F# E D D E F# E D D\0";
        let out = unpack(&packed, 4096).unwrap();
        assert_eq!(&out[..expected.len()], expected);
        assert!(out[expected.len()..].iter().all(|b| *b == 0));
        assert!(unpack(&packed[..20], 4096).is_none(), "cut off");
        assert!(
            unpack(&[0x02, 0xb0, 0x01, 0x00, 0x10], 9).is_none(),
            "before the start"
        );
    }
}
