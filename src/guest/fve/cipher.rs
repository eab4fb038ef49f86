//! The ciphers of a BitLocker volume, one sector at a time.
//!
//! AES-CBC takes the encrypted offset of the sector as its initialization vector, XTS-AES the sector's number as
//! its tweak. The Elephant diffuser of Vista and 7 is in N. Ferguson, "AES-CBC + Elephant diffuser: A Disk
//! Encryption Algorithm for Windows Vista" (2006); it has no crate, everything else is RustCrypto's.

use aes::cipher::{
    Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt,
    BlockSizeUser, InnerIvInit, KeyInit, consts::U16,
};
use aes::{Aes128, Aes256};
use xts_mode::Xts128;

/// The cipher of a volume (libbde, "Encryption methods").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    CbcAes128Diffuser,
    CbcAes256Diffuser,
    CbcAes128,
    CbcAes256,
    XtsAes128,
    XtsAes256,
}

impl Method {
    pub const ALL: [Self; 6] = [
        Self::CbcAes128Diffuser,
        Self::CbcAes256Diffuser,
        Self::CbcAes128,
        Self::CbcAes256,
        Self::XtsAes128,
        Self::XtsAes256,
    ];

    pub fn of(number: u16) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|method| method.number() == number)
    }

    pub fn number(self) -> u16 {
        match self {
            Self::CbcAes128Diffuser => 0x8000,
            Self::CbcAes256Diffuser => 0x8001,
            Self::CbcAes128 => 0x8002,
            Self::CbcAes256 => 0x8003,
            Self::XtsAes128 => 0x8004,
            Self::XtsAes256 => 0x8005,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::CbcAes128Diffuser => "AES-CBC 128 with diffuser",
            Self::CbcAes256Diffuser => "AES-CBC 256 with diffuser",
            Self::CbcAes128 => "AES-CBC 128",
            Self::CbcAes256 => "AES-CBC 256",
            Self::XtsAes128 => "XTS-AES 128",
            Self::XtsAes256 => "XTS-AES 256",
        }
    }

    /// The length of the key. With the diffuser there are two keys of 32 bytes, of each of which
    /// 128-bit AES uses the first half (libbde).
    pub fn key_bytes(self) -> usize {
        match self {
            Self::CbcAes128Diffuser | Self::CbcAes256Diffuser | Self::XtsAes256 => 64,
            Self::CbcAes256 | Self::XtsAes128 => 32,
            Self::CbcAes128 => 16,
        }
    }
}

/// Encrypts and decrypts sectors with the key of a volume.
pub struct Cipher {
    sectors: Box<dyn Sectors>,
    sector_size: u64,
}

impl Cipher {
    /// Creates the cipher; `None` if the length of the key does not match the method.
    pub fn new(method: Method, key: &[u8], sector_size: u64) -> Option<Self> {
        if key.len() < method.key_bytes() {
            return None;
        }
        fn aes<C: KeyInit>(key: &[u8]) -> Option<C> {
            C::new_from_slice(key.get(..C::key_size())?).ok()
        }
        let second = key.get(32..).unwrap_or_default();
        let sectors: Box<dyn Sectors> = match method {
            Method::CbcAes128Diffuser => Box::new(Cbc::<Aes128> {
                data: aes(key)?,
                tweak: Some(aes(second)?),
            }),
            Method::CbcAes256Diffuser => Box::new(Cbc::<Aes256> {
                data: aes(key)?,
                tweak: Some(aes(second)?),
            }),
            Method::CbcAes128 => Box::new(Cbc::<Aes128> {
                data: aes(key)?,
                tweak: None,
            }),
            Method::CbcAes256 => Box::new(Cbc::<Aes256> {
                data: aes(key)?,
                tweak: None,
            }),
            Method::XtsAes128 => {
                Box::new(Xts(Xts128::<Aes128>::new(aes(key)?, aes(key.get(16..)?)?)))
            }
            Method::XtsAes256 => Box::new(Xts(Xts128::<Aes256>::new(aes(key)?, aes(second)?))),
        };
        Some(Self {
            sectors,
            sector_size,
        })
    }

    /// Decrypts whole sectors that begin at `offset` of the volume, their position on the disk.
    pub fn decrypt(&self, offset: u64, bytes: &mut [u8]) {
        self.each(offset, bytes, |offset, number, sector| {
            self.sectors.decrypt(offset, number, sector);
        });
    }

    pub fn encrypt(&self, offset: u64, bytes: &mut [u8]) {
        self.each(offset, bytes, |offset, number, sector| {
            self.sectors.encrypt(offset, number, sector);
        });
    }

    fn each(&self, offset: u64, bytes: &mut [u8], act: impl Fn(u64, u64, &mut [u8])) {
        debug_assert!(offset.is_multiple_of(self.sector_size));
        let mut at = offset;
        for sector in bytes.chunks_exact_mut(self.sector_size as usize) {
            act(at, at / self.sector_size, sector);
            at += self.sector_size;
        }
    }
}

trait Sectors: Send + Sync {
    fn decrypt(&self, offset: u64, number: u64, sector: &mut [u8]);
    fn encrypt(&self, offset: u64, number: u64, sector: &mut [u8]);
}

struct Xts<C>(Xts128<C>);

impl<C> Sectors for Xts<C>
where
    C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn decrypt(&self, _: u64, number: u64, sector: &mut [u8]) {
        let tweak = xts_mode::get_tweak_default(u128::from(number));
        self.0.decrypt_sector(sector, tweak);
    }

    fn encrypt(&self, _: u64, number: u64, sector: &mut [u8]) {
        let tweak = xts_mode::get_tweak_default(u128::from(number));
        self.0.encrypt_sector(sector, tweak);
    }
}

/// AES-CBC, with the key of the diffuser if there is one.
struct Cbc<C> {
    data: C,
    tweak: Option<C>,
}

impl<C> Cbc<C>
where
    C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt,
{
    fn iv(&self, offset: u64) -> Array<u8, U16> {
        let mut iv = block(offset, 0);
        self.data.encrypt_block(&mut iv);
        iv
    }

    /// Applies the sector key, which has two blocks and repeats over the sector.
    fn mask(tweak: &C, offset: u64, sector: &mut [u8]) {
        let mut key = [block(offset, 0), block(offset, 0x80)];
        for half in &mut key {
            tweak.encrypt_block(half);
        }
        for (i, byte) in sector.iter_mut().enumerate() {
            *byte ^= key[i / 16 % 2][i % 16];
        }
    }
}

fn block(offset: u64, last: u8) -> Array<u8, U16> {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&offset.to_le_bytes());
    bytes[15] = last;
    Array(bytes)
}

impl<C> Sectors for Cbc<C>
where
    C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn decrypt(&self, offset: u64, _: u64, sector: &mut [u8]) {
        let mut mode = cbc::Decryptor::inner_iv_init(&self.data, &self.iv(offset));
        let (blocks, _) = Array::slice_as_chunks_mut(sector);
        mode.decrypt_blocks(blocks);
        if let Some(tweak) = &self.tweak {
            diffuse(sector, |words| {
                diffuser_b(words);
                diffuser_a(words);
            });
            Self::mask(tweak, offset, sector);
        }
    }

    fn encrypt(&self, offset: u64, _: u64, sector: &mut [u8]) {
        if let Some(tweak) = &self.tweak {
            Self::mask(tweak, offset, sector);
            diffuse(sector, |words| {
                undo_diffuser_a(words);
                undo_diffuser_b(words);
            });
        }
        let mut mode = cbc::Encryptor::inner_iv_init(&self.data, &self.iv(offset));
        let (blocks, _) = Array::slice_as_chunks_mut(sector);
        mode.encrypt_blocks(blocks);
    }
}

fn diffuse(sector: &mut [u8], act: impl Fn(&mut [u32])) {
    let (chunks, _) = sector.as_chunks_mut::<4>();
    let mut words: Vec<u32> = chunks.iter().map(|b| u32::from_le_bytes(*b)).collect();
    act(&mut words);
    for (bytes, word) in chunks.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
}

const A_ROTATIONS: [u32; 4] = [9, 0, 13, 0];
const A_ROUNDS: usize = 5;
const B_ROTATIONS: [u32; 4] = [0, 10, 0, 25];
const B_ROUNDS: usize = 3;

/// The value that diffuser A (from the words before) or B (from those behind) mixes into word `i`.
fn mixed_a(words: &[u32], i: usize) -> u32 {
    let n = words.len();
    words[(i + n - 2) % n] ^ words[(i + n - 5) % n].rotate_left(A_ROTATIONS[i % 4])
}

fn mixed_b(words: &[u32], i: usize) -> u32 {
    let n = words.len();
    words[(i + 2) % n] ^ words[(i + 5) % n].rotate_left(B_ROTATIONS[i % 4])
}

fn diffuser_a(words: &mut [u32]) {
    let n = words.len();
    for i in (0..A_ROUNDS).flat_map(move |_| 0..n) {
        words[i] = words[i].wrapping_add(mixed_a(words, i));
    }
}

fn diffuser_b(words: &mut [u32]) {
    let n = words.len();
    for i in (0..B_ROUNDS).flat_map(move |_| 0..n) {
        words[i] = words[i].wrapping_add(mixed_b(words, i));
    }
}

fn undo_diffuser_a(words: &mut [u32]) {
    let n = words.len();
    for i in (0..A_ROUNDS).flat_map(move |_| (0..n).rev()) {
        words[i] = words[i].wrapping_sub(mixed_a(words, i));
    }
}

fn undo_diffuser_b(words: &mut [u32]) {
    let n = words.len();
    for i in (0..B_ROUNDS).flat_map(move |_| (0..n).rev()) {
        words[i] = words[i].wrapping_sub(mixed_b(words, i));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encrypted_comes_back_and_depends_on_its_place() {
        let key: Vec<u8> = (0..64).collect();
        for method in Method::ALL {
            assert_eq!(Method::of(method.number()), Some(method));
            assert!(Cipher::new(method, &key[..method.key_bytes() - 1], 512).is_none());
            for sector_size in [512, 4096] {
                let cipher = Cipher::new(method, &key, sector_size).unwrap();
                let plain: Vec<u8> = (0..2 * sector_size).map(|i| (i % 251) as u8).collect();
                let mut bytes = plain.clone();
                cipher.encrypt(8 * sector_size, &mut bytes);
                let (first, second) = bytes.split_at(sector_size as usize);
                assert_ne!(first, second);
                let mut alone = plain[sector_size as usize..].to_vec();
                cipher.encrypt(9 * sector_size, &mut alone);
                assert_eq!(alone, second, "{}", method.name());
                cipher.decrypt(8 * sector_size, &mut bytes);
                assert!(bytes == plain, "{}", method.name());
            }
        }
    }
}
