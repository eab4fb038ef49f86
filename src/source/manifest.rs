//! OVF manifests (`.mf`): a digest for each file of the package.
//!
//! DSP0243 section 6: lines `SHA256(file.vmdk)= 64 hex digits`. Older tools write SHA-1; it guards
//! against damage here, not against attackers. A signature (`.cert`) is not checked.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use sha2::Digest as _;

use super::{Result, SourceError};
use crate::disk::charset::{text_of, without_mark};
use crate::text::hex;

const MAX_LINES: usize = 10_000;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    pub entries: Vec<ManifestEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestEntry {
    pub algorithm: Algorithm,
    pub file: String,
    /// Lower case hexadecimal.
    pub digest: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    Sha1,
    Sha256,
    Sha512,
}

impl Algorithm {
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "SHA1",
            Self::Sha256 => "SHA256",
            Self::Sha512 => "SHA512",
        }
    }

    fn digits(self) -> usize {
        match self {
            Self::Sha1 => 40,
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

impl Manifest {
    /// Parses the digests, and returns the numbers of invalid lines. A file with an unreadable line
    /// is not verified; the others are.
    pub fn parse(bytes: &[u8]) -> Result<(Self, Vec<usize>), String> {
        let bytes = &*without_mark(bytes);
        let (mut entries, mut unreadable) = (Vec::new(), Vec::new());
        for (n, line) in bytes.split(|b| *b == b'\n').enumerate() {
            let line = text_of(line.trim_ascii());
            if line.is_empty() {
                continue;
            }
            if n > MAX_LINES {
                return Err(format!("more than {MAX_LINES} lines"));
            }
            match parse_line(&line) {
                Some(entry) => entries.push(entry),
                None => unreadable.push(n + 1),
            }
        }
        Ok((Self { entries }, unreadable))
    }

    /// The entry for a file of a package that is not an archive.
    pub fn of_path(&self, path: &Path) -> Option<&ManifestEntry> {
        let path = PathBuf::from(text_of(path.as_os_str().as_bytes()));
        let ends = |name: &str| path.ends_with(name.trim_start_matches("./"));
        let mut entries = self.entries.iter();
        entries.find(|e| ends(&e.file) || ends(&text_of(&percent_decode(&e.file))))
    }

    /// The entry for a file of the package; some producers percent-encode its name, as in an href.
    pub fn of(&self, file: &str) -> Option<&ManifestEntry> {
        let plain = |name: &str| name.trim_start_matches("./").to_owned();
        let file = plain(file);
        let mut entries = self.entries.iter();
        let exact = entries.find(|e| plain(&e.file) == file);
        exact.or_else(|| {
            let mut entries = self.entries.iter();
            entries.find(|e| plain(&text_of(&percent_decode(&e.file))) == file)
        })
    }
}

fn parse_line(line: &str) -> Option<ManifestEntry> {
    let (name, rest) = line.split_once('(')?;
    // A file name may contain parentheses; the last one closes.
    let (file, digest) = rest.rsplit_once(')')?;
    let digest = digest.trim().strip_prefix('=')?.trim().to_ascii_lowercase();
    let algorithm = match name.trim().to_ascii_uppercase().replace('-', "").as_str() {
        "SHA1" => Algorithm::Sha1,
        "SHA256" => Algorithm::Sha256,
        "SHA512" => Algorithm::Sha512,
        _ => return None,
    };
    let valid = digest.len() == algorithm.digits() && digest.bytes().all(|b| b.is_ascii_hexdigit());
    valid.then(|| ManifestEntry {
        algorithm,
        file: file.to_owned(),
        digest,
    })
}

/// A digest being computed.
pub enum Hasher {
    Sha1(sha1_smol::Sha1),
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
}

impl Hasher {
    pub fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha1 => Self::Sha1(sha1_smol::Sha1::new()),
            Algorithm::Sha256 => Self::Sha256(sha2::Sha256::new()),
            Algorithm::Sha512 => Self::Sha512(sha2::Sha512::new()),
        }
    }

    pub fn update(&mut self, data: &[u8]) {
        match self {
            Self::Sha1(hasher) => hasher.update(data),
            Self::Sha256(hasher) => hasher.update(data),
            Self::Sha512(hasher) => hasher.update(data),
        }
    }

    /// In lower case hexadecimal.
    pub fn finish(self) -> String {
        match self {
            Self::Sha1(hasher) => hasher.digest().to_string(),
            Self::Sha256(hasher) => hex(&hasher.finalize()),
            Self::Sha512(hasher) => hex(&hasher.finalize()),
        }
    }
}

/// Decodes percent codes; a `%` that begins no code stays a `%`.
pub(super) fn percent_decode(href: &str) -> Vec<u8> {
    percent_encoding::percent_decode_str(href).collect()
}

/// Verifies a small file of the package that is already in memory.
pub(super) fn check_bytes(
    path: &Path,
    manifest: &Manifest,
    file: &str,
    bytes: &[u8],
) -> Result<()> {
    let Some(entry) = manifest.of(file) else {
        return Ok(());
    };
    let mut hasher = Hasher::new(entry.algorithm);
    hasher.update(bytes);
    let actual = hasher.finish();
    if actual == entry.digest {
        return Ok(());
    }
    Err(SourceError::Checksum {
        path: path.into(),
        file: super::clean(file),
        algorithm: entry.algorithm.name(),
        expected: entry.digest.clone(),
        actual,
    })
}
