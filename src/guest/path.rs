//! A path inside a guest volume, parsed once at the edge.

use std::fmt;
use std::hash::{Hash, Hasher};

/// An absolute, normalised path on one volume: no drive letter, no `.`/`..`, no control characters.
/// Compares case-insensitively, like in Windows.
#[derive(Debug, Clone, Default)]
pub struct GuestPath {
    parts: Vec<String>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PathError {
    #[error("path component {0:?} is not allowed")]
    Component(String),
    #[error("path is deeper than {0} components")]
    TooDeep(usize),
}

const MAX_DEPTH: usize = 64;

impl GuestPath {
    pub fn root() -> Self {
        Self::default()
    }

    /// Parses a path. Accepts `\` and `/` as separators and ignores leading, trailing and doubled
    /// ones.
    pub fn parse(text: &str) -> Result<Self, PathError> {
        Self::root().join(text)
    }

    /// Appends one or several components.
    pub fn join(&self, text: &str) -> Result<Self, PathError> {
        let mut parts = self.parts.clone();
        for part in text.split(['\\', '/']).filter(|p| !p.is_empty()) {
            let bad = part == "."
                || part == ".."
                || part.encode_utf16().count() > 255
                || part.chars().any(|c| {
                    c.is_control() || matches!(c, '<' | '>' | ':' | '"' | '|' | '?' | '*')
                });
            if bad {
                return Err(PathError::Component(part.to_string()));
            }
            parts.push(part.to_string());
        }
        if parts.len() > MAX_DEPTH {
            return Err(PathError::TooDeep(MAX_DEPTH));
        }
        Ok(Self { parts })
    }

    pub fn parts(&self) -> &[String] {
        &self.parts
    }

    pub fn is_root(&self) -> bool {
        self.parts.is_empty()
    }

    pub fn name(&self) -> Option<&str> {
        self.parts.last().map(String::as_str)
    }

    pub fn parent(&self) -> Option<Self> {
        let (_, parents) = self.parts.split_last()?;
        Some(Self {
            parts: parents.to_vec(),
        })
    }

    /// The normal form of equal paths: lower case, `\` between components.
    pub fn key(&self) -> String {
        self.to_string().to_lowercase()
    }

    /// Converts `\Windows\System32` to `Windows/System32`, for tools that require slashes.
    pub fn to_slashes(&self) -> String {
        self.parts.join("/")
    }
}

impl fmt::Display for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\\{}", self.parts.join("\\"))
    }
}

impl PartialEq for GuestPath {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for GuestPath {}

impl Hash for GuestPath {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl PartialOrd for GuestPath {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for GuestPath {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl serde::Serialize for GuestPath {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for GuestPath {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separators_case_and_escapes() {
        let path = GuestPath::parse(r"\Windows/System32\\drivers\").unwrap();
        assert_eq!(path.to_string(), r"\Windows\System32\drivers");
        assert_eq!(path, GuestPath::parse("windows/SYSTEM32/Drivers").unwrap());
        assert_eq!(path.parent().unwrap().name(), Some("System32"));
        for bad in ["..", r"a\..\b", "a/./b", "c:\\x", "a\u{1b}b", "a?b"] {
            assert!(GuestPath::parse(bad).is_err(), "{bad}");
        }
        assert!(GuestPath::parse(&"a/".repeat(65)).is_err());
    }
}
