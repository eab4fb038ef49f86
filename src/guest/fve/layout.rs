//! The on-disk structures of BitLocker, each declared once.
//!
//! Sources are named at each structure. *libbde* is libyal's "BitLocker Drive Encryption (BDE)
//! format", *bitlk* the notes in cryptsetup's `lib/bitlk`. The names *dislocker* and *dissect* mean
//! the structure names in Aorimn/dislocker and fox-it/dissect.fve, whose authors compared them with
//! `fvevol.sys`. All numbers are little-endian.

use crate::bytes::layout;
pub use crate::disk::superblock::{BlockHeader, PLACES_OFFSET, Places, SIGNATURE};

/// The file system name of NTFS in place of [`SIGNATURE`].
pub const NTFS: [u8; 8] = *b"NTFS    ";
/// The jump at the start of a Vista volume; later ones begin like FAT32 (libbde, "Volume header").
pub const VISTA_JUMP: [u8; 3] = [0xeb, 0x52, 0x90];
/// Precedes the offsets of the metadata: 4967d63b-2e29-4ad8-8399-f6a339e3d001 (libbde, "Volume
/// header").
pub const PLACES_GUID: [u8; 16] = [
    0x3b, 0xd6, 0x67, 0x49, 0x29, 0x2e, 0xd8, 0x4a, 0x83, 0x99, 0xf6, 0xa3, 0x39, 0xe3, 0xd0, 0x01,
];
/// The same while Windows 10 and later encrypt on write: 92a84d3b-dd80-4d0e-9e4e-b1e3284eaed8
/// (bitlk).
pub const CONVERTING_GUID: [u8; 16] = [
    0x3b, 0x4d, 0xa8, 0x92, 0x80, 0xdd, 0x0e, 0x4d, 0x9e, 0x4e, 0xb1, 0xe3, 0x28, 0x4e, 0xae, 0xd8,
];
/// Offsets of the GUID: Windows 7 and later, and BitLocker To Go (libbde, "Volume header").
pub const GUID_OFFSETS: [usize; 2] = [PLACES_OFFSET, 424];

layout! {
    /// The first sector of a volume (libbde, "Volume header"): the part common to NTFS and
    /// BitLocker.
    VolumeHeader[512] {
        /// A jump instruction; distinguishes Vista from later versions.
        0 => jump: [u8; 3],
        /// [`SIGNATURE`], or the name of FAT with BitLocker To Go.
        3 => signature: [u8; 8],
        /// 512 or 4096; the unit of encryption.
        11 => bytes_per_sector: u16,
        /// With Vista, determines the size of the clusters in which offsets are counted.
        13 => sectors_per_cluster: u8,
        /// Vista: the sectors of NTFS; its copy of this sector follows them.
        40 => total_sectors: u64,
        /// Vista: the cluster of the first metadata copy, in place of the MFT's mirror in NTFS.
        56 => metadata_cluster: u64,
    }
}

layout! {
    /// Follows the block header, and is at the start of a `.BEK` file (libbde, "FVE metadata header").
    DatasetHeader[48] {
        /// Length of this header and the entries after it in bytes.
        0 => size: u32,
        /// 1.
        4 => version: u32,
        /// Length of this header in bytes, 48.
        8 => header_size: u32,
        /// `size` again; the end of the entries (dissect, `EndOffset`).
        12 => end: u32,
        /// Identifies the volume, or the key in a `.BEK` file.
        16 => guid: [u8; 16],
        /// The counter of the next nonce to use.
        32 => next_nonce: u32,
        /// The cipher of the volume, 0x8000 to 0x8005.
        36 => method: u16,
        /// The same again, or 0 (real volumes have either).
        38 => method_copy: u16,
        /// A FILETIME.
        40 => created: u64,
    }
}

layout! {
    /// Before each entry of a dataset, and before each property in an entry (libbde, "FVE metadata entry").
    EntryHeader[8] {
        /// Length of the entry with this header in bytes.
        0 => size: u16,
        /// The purpose of the entry: see [`role`].
        2 => role: u16,
        /// The layout of its data: see [`kind`].
        4 => kind: u16,
        /// 1, or 3 for the protectors of newer versions.
        6 => version: u16,
    }
}

layout! {
    /// A protector of the volume master key; properties follow (libbde, "FVE Volume Master Key").
    ProtectorHeader[28] {
        /// Identifies the protector; a `.BEK` file names it.
        0 => guid: [u8; 16],
        /// A FILETIME.
        16 => changed: u64,
        /// The kind of protection: see `Protection`.
        26 => protection: u16,
    }
}

layout! {
    /// A key or digest under AES-256-CCM with a key of 32 bytes; the sealed bytes follow (libbde, "FVE AES-CCM
    /// encrypted key").
    SealedHeader[28] {
        /// A FILETIME and a counter.
        0 => nonce: [u8; 12],
        /// The tag of AES-CCM.
        12 => tag: [u8; 16],
    }
}

layout! {
    /// Precedes a key in clear or a digest; the key follows (libbde, "FVE key"; dissect,
    /// `FVE_DATUM_KEY`).
    KeyHeader[4] {
        /// The purpose of the key: see [`method`].
        0 => method: u16,
        /// Unknown except for the keys used here.
        2 => flags: u16,
    }
}

layout! {
    /// The stretching of a password (libbde, "FVE Stretch encrypted key").
    StretchHeader[20] {
        /// 0x1000 or 0x1001.
        0 => method: u16,
        /// 0x40: PBKDF2 in place of BitLocker's own stretching (dissect, `FVE_KEY_FLAG`).
        2 => flags: u16,
        /// Used in every round.
        4 => salt: [u8; 16],
    }
}

layout! {
    /// A startup key in a `.BEK` file; properties follow (libbde, "FVE External Key").
    StartupKeyHeader[24] {
        /// The protector that it opens.
        0 => guid: [u8; 16],
        /// A FILETIME.
        16 => changed: u64,
    }
}

layout! {
    /// The stored start of the volume (libbde, "FVE Volume header block"). Newer versions of
    /// Windows 10 may omit it, because [`BlockHeader`] has the same data.
    MovedHeader[16] {
        /// An offset in the volume.
        0 => offset: u64,
        /// Commonly 8192.
        8 => size: u64,
    }
}

layout! {
    /// Follows a copy of the metadata. An entry may follow it with the SHA-256 of the copy, sealed
    /// with the volume master key (dissect, `FVE_VALIDATION`).
    Validation[8] {
        /// Number of bytes from here to the end of what follows.
        0 => size: u16,
        /// 1 for Vista, 2 for later versions.
        2 => version: u16,
        /// The CRC-32 of the copy, over `BlockHeader::size` bytes.
        4 => crc32: u32,
    }
}

/// The purposes of entries (libbde, "FVE metadata entry types").
pub mod role {
    pub const PROPERTY: u16 = 0;
    pub const PROTECTOR: u16 = 2;
    pub const VOLUME_KEY: u16 = 3;
    pub const STARTUP_KEY: u16 = 6;
    pub const DESCRIPTION: u16 = 7;
    pub const MOVED_HEADER: u16 = 15;
}

/// The layouts of entries' data (libbde, "FVE metadata value types").
pub mod kind {
    pub const KEY: u16 = 1;
    pub const TEXT: u16 = 2;
    pub const STRETCH: u16 = 3;
    pub const SEALED: u16 = 5;
    pub const PROTECTOR: u16 = 8;
    pub const STARTUP_KEY: u16 = 9;
    pub const MOVED_HEADER: u16 = 15;
}

/// The purposes of keys (libbde, "Encryption methods").
pub mod method {
    pub const STRETCHED: [u16; 2] = [0x1000, 0x1001];
    pub const PBKDF2: u16 = 0x40;
    pub const STARTUP_KEY: u16 = 0x2002;
    pub const MASTER_KEY: u16 = 0x2003;
    pub const DIGEST: u16 = 0x2005;
}

/// The state of a volume (dissect, `FVE_STATE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProtectionState {
    /// BitLocker is set up, and nothing is encrypted.
    Decrypted,
    /// Encrypting or decrypting.
    Converting,
    /// Encrypting or decrypting, paused by the user.
    Paused,
    Encrypted,
    Other(u16),
}

impl ProtectionState {
    pub fn of(number: u16) -> Self {
        match number {
            1 => Self::Decrypted,
            2 | 5 => Self::Converting,
            3 => Self::Paused,
            4 => Self::Encrypted,
            other => Self::Other(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_they_are_declared() {
        let mut bytes = [0xaa; BlockHeader::LEN];
        let header = BlockHeader {
            signature: SIGNATURE,
            size: 0x0102,
            version: 2,
            state: 4,
            next_state: 5,
            encrypted_bytes: 0x0102_0304_0506_0708,
            conversion_bytes: 6,
            moved_sectors: 16,
            copies: [1, 2, 3],
            moved_to: u64::MAX,
        };
        header.write(&mut bytes).unwrap();
        assert_eq!(bytes[8..12], [2, 1, 2, 0]);
        assert_eq!(bytes[16..24], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[40], 2);
        assert_eq!(BlockHeader::read(&bytes), Some(header.clone()));
        assert_eq!(BlockHeader::read(&bytes[..63]), None);
        assert_eq!(header.write(&mut bytes[..63]), None);
        // Bytes outside of all fields are kept.
        let mut bytes = [0xaa; ProtectorHeader::LEN];
        let header = ProtectorHeader {
            guid: [0; 16],
            changed: 0,
            protection: 0,
        };
        header.write(&mut bytes).unwrap();
        assert_eq!(bytes[24..], [0xaa, 0xaa, 0, 0]);
    }
}
