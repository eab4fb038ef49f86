//! Makes text safe for its destination: names from a guest for people, paths for a shell.
//!
//! Guests are hostile: a name may contain terminal escapes or characters that reorder the text
//! around it.

use std::borrow::Cow;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use sha2::{Digest, Sha256};

const MAX_CHARS: usize = 256;

/// Removes control and invisible formatting characters, trims, and limits to 256 characters; `None`
/// if nothing is left.
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

/// Decodes a byte of the default code page of Windows tools.
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

/// A word of a shell command: unchanged if that is safe, otherwise in single quotes.
pub fn shell_word(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-+=,:@%".contains(&b);
    if !text.is_empty() && text.bytes().all(plain) {
        text.to_owned()
    } else {
        quoted(text)
    }
}

/// Eight hex digits that distinguish a text from others.
pub fn digest8(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes())[..4])
}

pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Encodes bytes as base64 (RFC 4648).
pub fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// A word of a shell command, always in single quotes.
pub fn quoted(text: &str) -> String {
    format!("'{}'", in_single_quotes(text))
}

/// Escapes text between single quotes of the shell.
pub fn in_single_quotes(text: &str) -> String {
    text.replace('\'', r"'\''")
}

/// A path for a JSON document, without loss. It is unchanged text or, if it is not UTF-8, a `file:`
/// URI of its bytes (RFC 8089).
pub fn of_path(path: &Path) -> Cow<'_, str> {
    match path.to_str() {
        Some(text) if !text.starts_with(FILE) => text.into(),
        _ => {
            let absolute = if path.is_absolute() { "//" } else { "" };
            let mut text = format!("{FILE}{absolute}");
            for byte in path.as_os_str().as_bytes() {
                match byte {
                    b if b.is_ascii_alphanumeric() || b"/._-~".contains(b) => {
                        text.push(char::from(*b));
                    }
                    b => text += &format!("%{b:02X}"),
                }
            }
            text.into()
        }
    }
}

const FILE: &str = "file:";

/// The path for which [`of_path`] returned this text.
pub fn to_path(text: &str) -> PathBuf {
    let Some(name) = text.strip_prefix(FILE) else {
        return text.into();
    };
    let name = name.strip_prefix("//").unwrap_or(name);
    let mut bytes = Vec::new();
    let mut rest = name.as_bytes();
    while let [first, tail @ ..] = rest {
        let digit = |at: usize| tail.get(at).and_then(|b| char::from(*b).to_digit(16));
        let code = digit(0).zip(digit(1)).filter(|_| *first == b'%');
        bytes.push(code.map_or(*first, |(high, low)| (high * 16 + low) as u8));
        rest = if code.is_some() { &tail[2..] } else { tail };
    }
    OsString::from_vec(bytes).into()
}

/// Internal paths, and their names for people.
static CALLED: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// Makes texts for people and documents use `name` in place of `path`.
pub fn call(path: &Path, name: &str) {
    let mut called = CALLED.lock().unwrap_or_else(PoisonError::into_inner);
    called.push((path.to_string_lossy().into_owned(), name.to_owned()));
    // Files in a directory come before the directory.
    called.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
}

/// Replaces internal paths in text by the names of [`call`].
pub fn called(text: &str) -> Cow<'_, str> {
    let called = CALLED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut text = Cow::Borrowed(text);
    for (path, name) in called.iter() {
        if text.contains(path) {
            text = text.replace(path, name).into();
        }
    }
    text
}

/// Replaces an internal path by the name of [`call`].
pub fn called_path(path: &Path) -> PathBuf {
    match path.to_str().map(called) {
        Some(Cow::Owned(name)) => name.into(),
        _ => path.to_owned(),
    }
}

/// Applies [`called`] to every text of a document.
pub fn called_in(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::String(text) => {
            if let Cow::Owned(changed) = called(text) {
                *text = changed;
            }
        }
        serde_json::Value::Array(values) => values.iter_mut().for_each(called_in),
        serde_json::Value::Object(fields) => fields.values_mut().for_each(called_in),
        _ => {}
    }
}

/// Serialisation of a [`PathBuf`] for `#[serde(with = "...")]`.
pub mod json_path {
    use super::{Path, PathBuf, of_path, to_path};
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&of_path(path))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        String::deserialize(from).map(|text| to_path(&text))
    }

    /// Serialises a list of paths.
    pub fn list<S: Serializer>(paths: &[PathBuf], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(paths.iter().map(|path| of_path(path)))
    }
}

/// A path as a shell word.
pub fn quote(path: &Path) -> String {
    shell_word(&path.display().to_string())
}

/// The JSON name of a unit variant, so that text and JSON never differ.
pub fn lower<T: serde::Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_json_lose_nothing() {
        use std::ffi::OsStr;
        for (bytes, text) in [
            (&b"/vm/a b.vmdk"[..], "/vm/a b.vmdk"),
            ("磁盘.vmdk".as_bytes(), "磁盘.vmdk"),
            (b"/vm/\xb4\xc5 %41.vmdk", "file:///vm/%B4%C5%20%2541.vmdk"),
            (b"vm/\xff", "file:vm/%FF"),
            (b"file:x", "file:file%3Ax"),
            (b"", ""),
        ] {
            let path = Path::new(OsStr::from_bytes(bytes));
            assert_eq!(of_path(path), text);
            assert_eq!(to_path(text), path);
        }
        assert_eq!(to_path("file:%4"), Path::new("%4"));
    }

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
