//! Names of VMs that are valid for files and libvirt.

use crate::text::digest8;

/// Returns a name valid for files and libvirt: letters, digits, `.`, `_`, `-`; never empty or
/// hidden.
pub fn safe_name(name: &str) -> String {
    let mapped: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') {
                c
            } else {
                '-'
            }
        })
        .take(64)
        .collect();
    let trimmed = mapped.trim_matches(['-', '.']);
    if !trimmed.is_empty() {
        trimmed.to_string()
    } else if name.is_ascii() {
        "vm".to_string()
    } else {
        // Two names in another script are two VMs.
        format!("vm-{}", digest8(name))
    }
}

/// The original name, if the safe name shows nothing of it.
pub fn title(name: &str) -> Option<String> {
    let lost = !name.is_ascii() && !name.contains(|c: char| c.is_ascii_alphanumeric() || c == '_');
    lost.then(|| name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe() {
        for (name, safe) in [
            ("vm", "vm"),
            ("my vm/../x", "my-vm-..-x"),
            ("...", "vm"),
            ("äö", "vm-6641ae9e"),
            ("服务器", "vm-2388cbc6"),
            ("服务器 2", "2"),
            ("服_务", "_"),
            ("---", "vm"),
            ("", "vm"),
            ("-rf", "rf"),
        ] {
            assert_eq!(safe_name(name), safe);
            let hashed = safe.len() == 11 && safe.starts_with("vm-");
            assert_eq!(title(name), hashed.then(|| name.to_string()));
        }
        let long = |n: usize| "x".repeat(n);
        assert_eq!(safe_name(&long(64)), long(64));
        assert_eq!(safe_name(&long(65)), long(64));
        // What is trimmed counts.
        assert_eq!(safe_name(&format!("-{}", long(64))), long(63));
    }
}
