//! Derives the key of a volume from the user's credential. That is a recovery password, a password,
//! a `.BEK` file, or nothing if the key is stored in clear.
//!
//! A password is hashed 0x100000 times with a salt. This is the only slow step; its results are
//! kept for as long as the keys are. All keys are erased from memory when they are dropped.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use aes::Aes256;
use ccm::aead::{AeadInOut, KeyInit};
use ccm::consts::{U12, U16};
use sha2::block_api::compress256;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::error::FveError;
use super::layout::{
    DatasetHeader, SealedHeader, StartupKeyHeader, StretchHeader, kind, method, role,
};
use super::metadata::{self, Metadata, Protector, Sealed, entries};
use super::protection::Protection;
use crate::text::hex;

/// AES-256-CCM with the parameters of BitLocker.
pub type Ccm = ccm::Ccm<Aes256, U16, U12>;

type Key = Zeroizing<[u8; 32]>;
type Result<T> = std::result::Result<T, FveError>;

const ROUNDS: u64 = 0x10_0000;
/// The initial hash value of SHA-256: FIPS 180-4, 5.3.3.
const SHA_256: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
/// The most passwords stretched for one volume, whatever its metadata contains.
const MAX_STRETCHED: usize = 32;
/// Groups of a recovery password, each of six digits and a multiple of 11.
const GROUPS: usize = 8;

/// The key in a `.BEK` file.
#[derive(Clone)]
pub struct StartupKey {
    guid: [u8; 16],
    key: Key,
}

impl fmt::Debug for StartupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(startup key)")
    }
}

impl StartupKey {
    /// Whether a file is a `.BEK` file, or a damaged one; a text is neither.
    pub fn is_one(file: &[u8]) -> bool {
        DatasetHeader::read(file).is_some_and(|header| {
            (header.version, header.header_size) == (1, DatasetHeader::LEN as u32)
        })
    }

    /// Parses the key of a file; `None` if it has none.
    pub fn parse(file: &[u8]) -> Option<Self> {
        let header = DatasetHeader::read(file).filter(|_| Self::is_one(file))?;
        let listed = file.get(DatasetHeader::LEN..header.size as usize)?;
        let entry = entries(listed)
            .find(|e| (e.header.role, e.header.kind) == (role::STARTUP_KEY, kind::STARTUP_KEY))?;
        let guid = StartupKeyHeader::read(entry.data)?.guid;
        let mut properties = entries(entry.data.get(StartupKeyHeader::LEN..)?);
        let property = properties.find(|p| p.header.kind == kind::KEY)?;
        let (_, bytes) = metadata::key(property.data)?;
        let key = Zeroizing::new(*bytes.first_chunk()?);
        Some(Self { guid, key })
    }
}

/// A user's credential for a volume.
#[derive(Debug, Clone, Copy)]
pub enum Credential<'a> {
    Text(&'a str),
    StartupKey(&'a StartupKey),
}

/// The passwords stretched so far.
#[derive(Default)]
pub struct Stretched(Mutex<Vec<(Key, [u8; 16], Key)>>);

impl fmt::Debug for Stretched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(stretched keys)")
    }
}

impl Stretched {
    fn get(&self, seed: &Key, salt: [u8; 16]) -> Key {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |(s, t, _): &&(Key, [u8; 16], Key)| s[..] == seed[..] && *t == salt;
        if let Some((_, _, key)) = lock().iter().find(known) {
            return key.clone();
        }
        let key = stretch(seed, salt);
        lock().push((seed.clone(), salt, key.clone()));
        key
    }
}

/// libbde, "Recovery key".
pub fn stretch(seed: &[u8; 32], salt: [u8; 16]) -> Key {
    stretch_rounds(seed, salt, ROUNDS)
}

/// Hashes 88 bytes in each round: the last hash, the seed, the salt and the number of the round.
/// They are two blocks of SHA-256, whose padding is always the same.
fn stretch_rounds(seed: &[u8; 32], salt: [u8; 16], rounds: u64) -> Key {
    const LEN: usize = 88;
    let mut blocks = Zeroizing::new([[0; 64]; 2]);
    let mut hash = Zeroizing::new([0; 8]);
    {
        let bytes = blocks.as_flattened_mut();
        bytes[32..64].copy_from_slice(seed);
        bytes[64..80].copy_from_slice(&salt);
        bytes[LEN] = 0x80;
        bytes[120..].copy_from_slice(&(8 * LEN as u64).to_be_bytes());
    }
    for round in 0..rounds {
        blocks[1][16..24].copy_from_slice(&round.to_le_bytes());
        *hash = SHA_256;
        compress256(&mut hash, &blocks[..]);
        for (word, to) in hash.iter().zip(blocks[0].chunks_exact_mut(4)) {
            to.copy_from_slice(&word.to_be_bytes());
        }
    }
    let mut key = Zeroizing::new([0; 32]);
    key.copy_from_slice(&blocks[0][..32]);
    key
}

/// libbde, "User key".
pub fn password_seed(password: &str) -> Key {
    let mut wide = Zeroizing::new(Vec::with_capacity(password.len() * 2));
    wide.extend(password.encode_utf16().flat_map(u16::to_le_bytes));
    let once = Zeroizing::new(<[u8; 32]>::from(Sha256::digest(&wide[..])));
    Zeroizing::new(Sha256::digest(&once[..]).into())
}

/// The seed of a recovery password; `None` if the text does not have its form, an error if it has
/// but is invalid.
pub fn recovery_seed(text: &str) -> Option<Result<Key>> {
    let groups: Vec<&str> = text.trim().split('-').map(str::trim).collect();
    let digits = |g: &&str| !g.is_empty() && g.bytes().all(|b| b.is_ascii_digit());
    if groups.len() < GROUPS - 1 || groups.len() > GROUPS + 1 || !groups.iter().all(digits) {
        return None;
    }
    let mistyped = |text: String| Some(Err(FveError::Mistyped(text)));
    if groups.len() != GROUPS {
        return mistyped(format!("it has {} groups, expected {GROUPS}", groups.len()));
    }
    let mut binary = Zeroizing::new([0; 2 * GROUPS]);
    for (i, group) in groups.iter().enumerate() {
        let number: u32 = group.parse().unwrap_or(u32::MAX);
        let part = u16::try_from(number / 11).ok();
        let Some(part) = part.filter(|_| group.len() == 6 && number.is_multiple_of(11)) else {
            let what = "is not six digits that make a multiple of 11 below 720896";
            return mistyped(format!(
                "group {} of {GROUPS} {what}: check it for a typing error",
                i + 1
            ));
        };
        binary[2 * i..2 * i + 2].copy_from_slice(&part.to_le_bytes());
    }
    Some(Ok(Zeroizing::new(Sha256::digest(&binary[..]).into())))
}

/// Decrypts data that is sealed with a key, if this is the key.
fn unseal(key: &[u8; 32], sealed: &Sealed) -> Option<Zeroizing<Vec<u8>>> {
    let SealedHeader { nonce, tag } = sealed.header;
    let mut bytes = Zeroizing::new(sealed.bytes.clone());
    let cipher = Ccm::new_from_slice(key).ok()?;
    let buffer = bytes.as_mut_slice().into();
    cipher
        .decrypt_inout_detached(&nonce.into(), b"", buffer, &tag.into())
        .ok()?;
    Some(bytes)
}

/// The key or digest in decrypted data: its method and its bytes.
fn inner(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let entry = entries(bytes)
        .next()
        .filter(|e| e.header.kind == kind::KEY)?;
    metadata::key(entry.data)
}

fn master_key(key: &[u8; 32], protector: &Protector) -> Option<Key> {
    let bytes = unseal(key, protector.master_key.as_ref()?)?;
    let (_, key) = inner(&bytes)?;
    Some(Zeroizing::new(*key.first_chunk()?))
}

/// The key of the volume and the credential that opened it.
pub struct Opened {
    pub key: Zeroizing<Vec<u8>>,
    pub by: Protection,
}

pub fn unlock(
    metadata: &Metadata,
    credentials: &[Credential],
    stretched: &Stretched,
) -> Result<Opened> {
    let clear = metadata.protectors.iter().find_map(|protector| {
        let key = protector.clear_key.as_ref()?;
        let is_clear = protector.protection == Protection::ClearKey;
        is_clear.then(|| master_key(key, protector)).flatten()
    });
    if let Some(master) = clear {
        return volume_key(metadata, &master, Protection::ClearKey);
    }
    let protectors = metadata.protections();
    if credentials.is_empty() || !protectors.iter().any(|p| p.takes_key()) {
        return Err(FveError::Locked { protectors });
    }
    let mut left = MAX_STRETCHED;
    let mut mistyped = None;
    for credential in credentials {
        let opened = match credential {
            Credential::StartupKey(startup) => by_startup_key(metadata, startup),
            Credential::Text(text) => match by_text(metadata, text, stretched, &mut left) {
                Err(error @ FveError::Mistyped(_)) => {
                    mistyped = mistyped.or(Some(error));
                    None
                }
                opened => opened?,
            },
        };
        if let Some((master, by)) = opened {
            return volume_key(metadata, &master, by);
        }
    }
    Err(mistyped.unwrap_or(FveError::WrongKeys {
        tried: credentials.len(),
        protectors,
    }))
}

fn by_startup_key(metadata: &Metadata, startup: &StartupKey) -> Option<(Key, Protection)> {
    let mut named = metadata
        .protectors
        .iter()
        .filter(|p| p.protection == Protection::StartupKey && p.guid == startup.guid);
    let key = named.find_map(|protector| master_key(&startup.key, protector))?;
    Some((key, Protection::StartupKey))
}

fn by_text(
    metadata: &Metadata,
    text: &str,
    stretched: &Stretched,
    left: &mut usize,
) -> Result<Option<(Key, Protection)>> {
    let recovery = recovery_seed(text);
    let password = password_seed(text);
    // Every attempt costs a stretching: if the volume has a recovery password, text in its form
    // counts as one.
    let has_recovery = metadata
        .protections()
        .contains(&Protection::RecoveryPassword);
    let is_recovery = has_recovery && matches!(recovery, Some(Ok(_)));
    for protector in &metadata.protectors {
        let seed = match (protector.protection, &recovery) {
            (Protection::RecoveryPassword, Some(Ok(seed))) => seed,
            (Protection::Password, _) if !is_recovery => &password,
            _ => continue,
        };
        let Some(stretch) = &protector.stretch else {
            continue;
        };
        if !metadata::stretches(stretch) {
            let StretchHeader { method, flags, .. } = stretch;
            let text = format!("a password stretched by method {method:#x}, flags {flags:#x}");
            return Err(FveError::Unsupported(text));
        }
        if *left == 0 {
            let text = format!("more than {MAX_STRETCHED} passwords to try on one volume");
            return Err(FveError::Unsupported(text));
        }
        *left -= 1;
        if let Some(master) = master_key(&stretched.get(seed, stretch.salt), protector) {
            return Ok(Some((master, protector.protection)));
        }
    }
    match recovery {
        Some(Err(error)) => Err(error),
        _ => Ok(None),
    }
}

fn volume_key(metadata: &Metadata, master: &[u8; 32], by: Protection) -> Result<Opened> {
    vouched(metadata, master)?;
    let fault = |field, expected: String, actual: String| {
        FveError::structure("volume key", metadata.copies[0], field, expected, actual)
    };
    let bytes = unseal(master, &metadata.volume_key).ok_or_else(|| {
        fault(
            "its tag",
            "sealed with the master key".into(),
            "another".into(),
        )
    })?;
    let (method, key) =
        inner(&bytes).ok_or_else(|| fault("its content", "a key".into(), "none".into()))?;
    if method != metadata.method.number() {
        let expected = format!("{:#06x}", metadata.method.number());
        return Err(fault("the cipher", expected, format!("{method:#06x}")));
    }
    let wanted = metadata.method.key_bytes();
    if key.len() < wanted {
        return Err(fault(
            "its length",
            wanted.to_string(),
            key.len().to_string(),
        ));
    }
    Ok(Opened {
        key: Zeroizing::new(key[..wanted].to_vec()),
        by,
    })
}

/// Verifies the metadata with the master key: otherwise anybody with write access to the disk could
/// move the parts of a volume.
fn vouched(metadata: &Metadata, master: &[u8; 32]) -> Result<()> {
    let offset = metadata.copies[0];
    let fault = |expected: &str, actual: &str| {
        FveError::structure("validation", offset, "the sealed digest", expected, actual)
    };
    let sealed = metadata
        .vouched
        .as_ref()
        .ok_or_else(|| fault("one", "none"))?;
    let bytes = unseal(master, sealed)
        .ok_or_else(|| fault("sealed with the master key", "sealed with another"))?;
    let digest = inner(&bytes).filter(|(of, _)| *of == method::DIGEST);
    let (_, digest) = digest.ok_or_else(|| fault("a SHA-256", "something else"))?;
    if digest.get(..32) == Some(&metadata.digest[..]) {
        return Ok(());
    }
    let start = |bytes: &[u8]| hex(bytes.get(..32).unwrap_or(bytes));
    Err(FveError::Tampered {
        expected: start(digest),
        actual: start(&metadata.digest),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECOVERY: &str = "471207-278498-422125-177177-561902-537405-468006-693451";

    #[test]
    fn recovery_passwords_are_told_from_passwords_and_from_typing_errors() {
        assert!(matches!(recovery_seed(RECOVERY), Some(Ok(_))));
        assert!(matches!(
            recovery_seed(&format!(" {RECOVERY}\n")),
            Some(Ok(_))
        ));
        for (text, says) in [
            (RECOVERY.replacen("278498", "278499", 1), "group 2 of 8"),
            (RECOVERY.replacen("693451", "999999", 1), "group 8 of 8"),
            (RECOVERY.replacen("471207", "47127", 1), "group 1 of 8"),
            (RECOVERY[7..].to_string(), "7 groups, expected 8"),
            (format!("{RECOVERY}-000011"), "9 groups, expected 8"),
        ] {
            let error = recovery_seed(&text).unwrap().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
            assert!(!error.contains("278"), "shows the key: {error}");
        }
        for text in ["", "secret", "1-2-3", "a-b-c-d-e-f-g-h", "2020-01-01"] {
            assert!(recovery_seed(text).is_none(), "{text}");
        }
    }

    #[test]
    fn each_round_hashes_the_last_hash_the_seed_the_salt_and_its_number() {
        let (seed, salt) = ([5; 32], [6; 16]);
        let mut hash = [0; 32];
        for round in 0..1000u64 {
            let mut hashed = [&hash[..], &seed, &salt].concat();
            hashed.extend(round.to_le_bytes());
            hash = Sha256::digest(&hashed).into();
        }
        assert_eq!(*stretch_rounds(&seed, salt, 1000), hash);
    }

    #[test]
    fn a_password_is_stretched_once() {
        let stretched = Stretched::default();
        let seed = password_seed("anaconda");
        let first = stretched.get(&seed, [7; 16]);
        assert_eq!(*stretched.get(&seed, [7; 16]), *first);
        assert_ne!(*stretched.get(&seed, [8; 16]), *first);
        assert_eq!(stretched.0.lock().unwrap().len(), 2);
        assert_eq!(format!("{stretched:?}"), "(stretched keys)");
    }

    #[test]
    fn damaged_startup_keys() {
        let file = crate::demo::bitlocker::startup_key_file([5; 16], &[9; 32]);
        let key = StartupKey::parse(&file).unwrap();
        assert_eq!((key.guid, *key.key), ([5; 16], [9; 32]));
        assert_eq!(format!("{key:?}"), "(startup key)");
        for len in 0..file.len() {
            assert!(StartupKey::parse(&file[..len]).is_none(), "{len}");
        }
        assert!(!StartupKey::is_one(RECOVERY.as_bytes()));
    }
}
