//! The structures of NTFS inside and beside an MFT record, each declared once.
//!
//! Source: ntfs-3g's `layout.h`, the name of the structure there in brackets. All numbers are little-endian. The
//! boot sector is in [`crate::disk::bpb`].

use crate::bytes::layout;

layout! {
    /// The start of a `FILE`, `INDX` or `RSTR` record (`NTFS_RECORD`). The last word of each 512
    /// bytes is replaced by a number that is incremented at each write. The original words are in
    /// an array.
    Protected[8] {
        /// `FILE`, `INDX`, `RSTR` or `CHKD`.
        0 => signature: [u8; 4],
        /// Offset of the array: the number, then the words.
        4 => array: u16,
        /// Number of words in the array, including the number.
        6 => array_len: u16,
    }
}

layout! {
    /// A record of the MFT (`MFT_RECORD`); attributes follow.
    FileRecord[42] {
        /// Incremented each time the record is used for another file.
        16 => sequence: u16,
        /// Offset of the first attribute.
        20 => attributes: u16,
        /// 1 in use, 2 a directory.
        22 => flags: u16,
        /// Number of used bytes.
        24 => used: u32,
        /// Size of the record in bytes.
        28 => allocated: u32,
        /// Reference of the record that this one extends, 0 in a base record.
        32 => base: u64,
    }
}

layout! {
    /// The start of every attribute (`ATTR_RECORD`).
    AttributeHeader[16] {
        /// The type of the attribute; 0xffffffff after the last one.
        0 => kind: u32,
        /// Size of the attribute with its header in bytes.
        4 => len: u32,
        /// 0: the value is in the record; otherwise in clusters.
        8 => non_resident: u8,
        /// Length of its name in UTF-16 units.
        9 => name_len: u8,
        /// Offset of the name.
        10 => name: u16,
        /// 0x00ff compressed, 0x4000 encrypted, 0x8000 sparse.
        12 => flags: u16,
        /// Distinguishes it from others of its kind in the record.
        14 => instance: u16,
    }
}

layout! {
    /// An attribute whose value is in the record (`ATTR_RECORD`).
    Resident[24] {
        /// Length of the value in bytes.
        16 => len: u32,
        /// Offset of the value.
        20 => value: u16,
    }
}

layout! {
    /// An attribute whose value is in clusters (`ATTR_RECORD`).
    NonResident[64] {
        /// The first cluster of the value that this part maps.
        16 => lowest_vcn: u64,
        /// The last one.
        24 => highest_vcn: u64,
        /// Offset of the list of runs.
        32 => mapping: u16,
        /// Clusters of a compression unit, as a power of two; 0 if nothing is compressed.
        34 => unit: u8,
        /// Size of its clusters in bytes.
        40 => allocated: u64,
        /// Length of the value in bytes.
        48 => size: u64,
        /// Number of bytes that were written; zeroes follow.
        56 => initialized: u64,
    }
}

layout! {
    /// An entry of an attribute list (`ATTR_LIST_ENTRY`), which locates a part of an attribute.
    ListEntryHeader[26] {
        /// The type of the attribute.
        0 => kind: u32,
        /// Size of the entry in bytes.
        4 => len: u16,
        /// Length of the attribute's name in UTF-16 units.
        6 => name_len: u8,
        /// Offset of the name.
        7 => name: u8,
        /// The first cluster of the value that the part maps.
        8 => lowest_vcn: u64,
        /// Reference of the record with the part.
        16 => record: u64,
        /// The instance of the attribute in that record.
        24 => instance: u16,
    }
}

layout! {
    /// The start of the value of `$INDEX_ROOT` (`INDEX_ROOT`); a node follows.
    IndexRoot[16] {
        /// The type of the indexed attribute: file names.
        0 => kind: u32,
        /// The sort order of entries.
        4 => collation: u32,
        /// Size of an `INDX` block in bytes.
        8 => block_size: u32,
    }
}

layout! {
    /// The start of an `INDX` block (`INDEX_BLOCK`); a node follows.
    IndexBlock[24] {
        /// `INDX`.
        0 => signature: [u8; 4],
        /// Its own position in the index.
        16 => vcn: u64,
    }
}

layout! {
    /// The start of a node (`INDEX_HEADER`), from which its offsets count.
    IndexNode[16] {
        /// Offset of the first entry.
        0 => first: u32,
        /// End of the entries.
        4 => end: u32,
        /// Number of bytes for entries.
        8 => allocated: u32,
    }
}

layout! {
    /// An entry of a directory (`INDEX_ENTRY`). Its key follows, and its last eight bytes locate
    /// the node below it.
    IndexEntryHeader[16] {
        /// Reference of the file's record.
        0 => reference: u64,
        /// Size of the entry in bytes.
        8 => len: u16,
        /// Length of the key in bytes.
        10 => key_len: u16,
        /// 1 if a node is below it, 2 for the last one, which has no key.
        12 => flags: u16,
    }
}

layout! {
    /// The value of `$FILE_NAME`, and the key of a directory's entry (`FILE_NAME_ATTR`); the name follows.
    FileNameHeader[66] {
        /// Reference of the directory's record.
        0 => parent: u64,
        /// Size of the file in bytes.
        48 => size: u64,
        /// The attributes as Windows displays them, and 0x10000000 for a directory.
        56 => attributes: u32,
        /// The kind of a reparse point.
        60 => reparse_tag: u32,
        /// Length of the name in UTF-16 units.
        64 => name_len: u8,
        /// 0 POSIX, 1 long, 2 the 8.3 name beside a long one, 3 both.
        65 => namespace: u8,
    }
}

layout! {
    /// The value of `$VOLUME_INFORMATION` (`VOLUME_INFORMATION`).
    VolumeInformation[12] {
        /// 3.
        8 => major: u8,
        /// 1 since Windows XP.
        9 => minor: u8,
        /// 1: chkdsk is requested.
        10 => flags: u16,
    }
}

layout! {
    /// The start of a restart page of `$LogFile` (`RESTART_PAGE_HEADER`); its update sequence array is before its
    /// area.
    RestartPage[30] {
        /// `RSTR`, or `CHKD` after chkdsk.
        0 => signature: [u8; 4],
        /// Offset of the update sequence array.
        4 => array: u16,
        /// Number of its words; chkdsk leaves none.
        6 => array_len: u16,
        /// The newest record that chkdsk has processed.
        8 => checked_lsn: u64,
        /// Size of a restart page in bytes.
        16 => page_size: u32,
        /// Size of a page of records in bytes.
        20 => record_page_size: u32,
        /// Offset of the [`RestartArea`].
        24 => area: u16,
        /// The minor version, 1 or 0.
        26 => minor: u16,
        /// The major version, 1, or 2 with the fast start of Windows 8.
        28 => major: u16,
    }
}

layout! {
    /// The area of a restart page (`RESTART_AREA`); the clients of the log follow.
    RestartArea[48] {
        /// The newest record of the log.
        0 => lsn: u64,
        /// Number of clients: NTFS alone.
        8 => clients: u16,
        /// The first client that is not in use, 0xffff for none.
        10 => free: u16,
        /// The first one in use, 0xffff for none.
        12 => in_use: u16,
        /// 2: the volume was closed cleanly.
        14 => flags: u16,
    }
}

layout! {
    /// The start of a run of clusters in a list of runs (`mapping pairs`). Its length and then its
    /// position follow, as signed numbers of so many bytes. The position is relative to that of the
    /// previous run. One of no bytes is a hole, and a byte of 0 ends the list.
    RunHeader[1] {
        /// Number of bytes of the length in the lower half, of the position in the upper half.
        0 => lens: u8,
    }
}

impl RunHeader {
    /// The numbers of bytes of length and position; `None` at the end of the list.
    pub fn lengths(&self) -> Option<(usize, usize)> {
        let half = |bits: u8| usize::from(bits & 15);
        (self.lens != 0).then(|| (half(self.lens), half(self.lens >> 4)))
    }
}
