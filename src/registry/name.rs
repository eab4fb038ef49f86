//! Names of keys and values as Windows compares them.

/// Folds a name to upper case, one character for each, as Windows does for comparison.
pub fn fold(name: &str) -> String {
    if name.is_ascii() {
        return name.to_ascii_uppercase();
    }
    name.chars()
        .map(|c| {
            let mut upper = c.to_uppercase();
            match (upper.next(), upper.next()) {
                (Some(upper), None) => upper,
                _ => c,
            }
        })
        .collect()
}

/// The hash of an `lh` list.
pub fn name_hash(name: &str) -> u32 {
    fold(name).encode_utf16().fold(0u32, |hash, unit| {
        hash.wrapping_mul(37).wrapping_add(u32::from(unit))
    })
}
