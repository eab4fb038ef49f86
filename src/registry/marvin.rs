//! Marvin32, the 64-bit keyed hash that guards the entries of a new-format transaction log.
//!
//! It detects only torn writes: the key is a constant, so anybody who writes the log can make any
//! entry valid. The key is published as the byte string `82 EF 4D 88 7A 4E 55 C5`. Measured on real
//! logs it is the *number* 0x82EF4D887A4E55C5, so the low half of the state starts with 0x7A4E55C5.

const SEED: u64 = 0x82EF_4D88_7A4E_55C5;

/// The hash of `data` under the registry's key.
pub fn marvin32(data: &[u8]) -> u64 {
    hash(SEED, data)
}

fn hash(seed: u64, data: &[u8]) -> u64 {
    let mut lo = seed as u32;
    let mut hi = (seed >> 32) as u32;
    let (words, rest) = data.as_chunks::<4>();
    for word in words {
        lo = lo.wrapping_add(u32::from_le_bytes(*word));
        (lo, hi) = mix(lo, hi);
    }
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    last[rest.len()] = 0x80;
    lo = lo.wrapping_add(u32::from_le_bytes(last));
    (lo, hi) = mix(lo, hi);
    (lo, hi) = mix(lo, hi);
    u64::from(hi) << 32 | u64::from(lo)
}

fn mix(mut lo: u32, mut hi: u32) -> (u32, u32) {
    hi ^= lo;
    lo = lo.rotate_left(20).wrapping_add(hi);
    hi = hi.rotate_left(9) ^ lo;
    lo = lo.rotate_left(27).wrapping_add(hi);
    (lo, hi.rotate_left(19))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Public vectors: skeeto/marvin32 (public domain) and the two of the SymCrypt self-test.
    #[test]
    fn vectors() {
        let table: [(u64, &[u8], u64); 10] = [
            (0x004f_b61a_001b_dbcc, b"", 0x30ed_35c1_00cd_3c7d),
            (0x004f_b61a_001b_dbcc, b"\xaf", 0x48e7_3fc7_7d75_ddc1),
            (0x004f_b61a_001b_dbcc, b"\xe7\x0f", 0xb5f6_e1fc_485d_bff8),
            (
                0x004f_b61a_001b_dbcc,
                b"\x37\xf4\x95",
                0xf0b0_7c78_9b8c_f7e8,
            ),
            (
                0x004f_b61a_001b_dbcc,
                b"\x86\x42\xdc\x59",
                0x7008_f2e8_7e9c_f556,
            ),
            (
                0x004f_b61a_001b_dbcc,
                b"\x15\x3f\xb7\x98\x26",
                0xe6c0_8c6d_a2af_a997,
            ),
            (
                0x004f_b61a_001b_dbcc,
                b"\x09\x32\xe6\x24\x6c\x47",
                0x6f04_bf1a_5ea2_4060,
            ),
            (0x804f_b61a_001b_dbcc, b"", 0x10a9_d5d3_996f_d65d),
            (0xd53c_d9ce_cd08_93b7, b"abc", 0x22c7_4339_4927_69bf),
            (
                0x0ddd_deee_efff_f000,
                b"abcdefghijklmnopqrstuvwxyz",
                0xa128_eb7e_7260_aca2,
            ),
        ];
        for (seed, data, expected) in table {
            assert_eq!(hash(seed, data), expected, "{seed:016x} {data:02x?}");
        }
        assert_ne!(marvin32(b""), hash(0, b""));
    }
}
