//! Text made fit for where it goes: names from a guest for people, paths for a shell.
//!
//! Guests are hostile: a name may carry terminal escapes or characters that reorder what is shown
//! around it.

const MAX_CHARS: usize = 256;

/// Without control and invisible formatting characters, trimmed, at most 256 characters; `None` when
/// nothing is left.
pub fn guest_text(raw: &str) -> Option<String> {
    let clean: String = raw
        .chars()
        .filter(|c| !c.is_control() && !is_format(*c))
        .take(MAX_CHARS)
        .collect();
    let clean = clean.trim();
    (!clean.is_empty()).then(|| clean.to_string())
}

/// Zero-width characters, bidirectional overrides, line and paragraph separators.
fn is_format(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// A byte of the code page that Windows tools write text in when they say nothing else.
pub fn windows_1252(byte: u8) -> char {
    const HIGH: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž',
        '\u{8f}', '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}',
        'ž', 'Ÿ',
    ];
    match byte {
        0x80..=0x9f => HIGH[usize::from(byte - 0x80)],
        _ => char::from(byte),
    }
}

/// A word of a shell command: as it is where that is safe, else in single quotes.
pub fn shell_word(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-+=,:@%".contains(&b);
    if !text.is_empty() && text.bytes().all(plain) {
        text.to_owned()
    } else {
        quoted(text)
    }
}

/// A word of a shell command, in single quotes in any case.
pub fn quoted(text: &str) -> String {
    format!("'{}'", in_single_quotes(text))
}

/// Text between single quotes of the shell.
pub fn in_single_quotes(text: &str) -> String {
    text.replace('\'', r"'\''")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_words() {
        for (text, word) in [
            ("/vm/a-1.qcow2", "/vm/a-1.qcow2"),
            ("", "''"),
            ("a b", "'a b'"),
            ("it's $HOME", r"'it'\''s $HOME'"),
            ("a\nb", "'a\nb'"),
        ] {
            assert_eq!(shell_word(text), word);
        }
    }

    #[test]
    fn guest_text_is_harmless() {
        let long = "x".repeat(1000);
        let cases = [
            ("Windows 10 Pro", Some("Windows 10 Pro")),
            ("\u{1b}[31mred\u{7}\n", Some("[31mred")),
            ("a\u{202e}b\u{feff}", Some("ab")),
            (" \0 ", None),
            (long.as_str(), Some(&long[..256])),
        ];
        for (raw, clean) in cases {
            assert_eq!(guest_text(raw).as_deref(), clean, "{raw:?}");
        }
    }
}
