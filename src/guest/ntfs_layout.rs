//! The structures of NTFS inside and beside an MFT record, each declared once.
//!
//! Source: ntfs-3g's `layout.h`, the name of the structure there in brackets. All numbers are little-endian. The
//! boot sector is in [`crate::disk::bpb`].

use crate::bytes::layout;

layout! {
    /// The start of a `FILE`, `INDX` or `RSTR` record (`NTFS_RECORD`): the last word of each 512 bytes is replaced by
    /// a number that is raised at each write, and kept in an array.
    Protected[8] {
        /// `FILE`, `INDX`, `RSTR` or `CHKD`.
        0 => signature: [u8; 4],
        /// Where the array is: the number, then the words.
        4 => array: u16,
        /// How many words the array has, the number included.
        6 => array_len: u16,
    }
}

layout! {
    /// A record of the MFT (`MFT_RECORD`); attributes follow.
    FileRecord[42] {
        /// Raised each time the record is used for another file.
        16 => sequence: u16,
        /// Where the first attribute is.
        20 => attributes: u16,
        /// 1 in use, 2 a directory.
        22 => flags: u16,
        /// Bytes that are used.
        24 => used: u32,
        /// Bytes of the record.
        28 => allocated: u32,
        /// Reference of the record that this one extends, 0 in a base record.
        32 => base: u64,
    }
}

layout! {
    /// What every attribute begins with (`ATTR_RECORD`).
    AttributeHeader[16] {
        /// What the attribute is, 0xffffffff after the last one.
        0 => kind: u32,
        /// Bytes of the attribute with its header.
        4 => len: u32,
        /// 0: the value is here; else in clusters.
        8 => non_resident: u8,
        /// UTF-16 units of its name.
        9 => name_len: u8,
        /// Where the name is.
        10 => name: u16,
        /// 0x00ff compressed, 0x4000 encrypted, 0x8000 sparse.
        12 => flags: u16,
        /// Tells it from others of its kind in the record.
        14 => instance: u16,
    }
}

layout! {
    /// An attribute whose value is in the record (`ATTR_RECORD`).
    Resident[24] {
        /// Bytes of the value.
        16 => len: u32,
        /// Where the value is.
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
        /// Where the list of runs is.
        32 => mapping: u16,
        /// Clusters of a compression unit, as a power of two; 0 where nothing is compressed.
        34 => unit: u8,
        /// Bytes of its clusters.
        40 => allocated: u64,
        /// Bytes of the value.
        48 => size: u64,
        /// Bytes that were written; zeroes follow.
        56 => initialized: u64,
    }
}

layout! {
    /// An entry of an attribute list (`ATTR_LIST_ENTRY`): where a part of an attribute is.
    ListEntryHeader[26] {
        /// What the attribute is.
        0 => kind: u32,
        /// Bytes of the entry.
        4 => len: u16,
        /// UTF-16 units of the attribute's name.
        6 => name_len: u8,
        /// Where the name is.
        7 => name: u8,
        /// The first cluster of the value that the part maps.
        8 => lowest_vcn: u64,
        /// Reference of the record the part is in.
        16 => record: u64,
        /// Which attribute of that record.
        24 => instance: u16,
    }
}

layout! {
    /// The start of the value of `$INDEX_ROOT` (`INDEX_ROOT`); a node follows.
    IndexRoot[16] {
        /// The attribute that is indexed: file names.
        0 => kind: u32,
        /// How entries are sorted.
        4 => collation: u32,
        /// Bytes of an `INDX` block.
        8 => block_size: u32,
    }
}

layout! {
    /// The start of an `INDX` block (`INDEX_BLOCK`); a node follows.
    IndexBlock[24] {
        /// `INDX`.
        0 => signature: [u8; 4],
        /// Its own place in the index.
        16 => vcn: u64,
    }
}

layout! {
    /// The start of a node (`INDEX_HEADER`), from which its offsets count.
    IndexNode[16] {
        /// Where the first entry is.
        0 => first: u32,
        /// Where the entries end.
        4 => end: u32,
        /// Bytes there are for entries.
        8 => allocated: u32,
    }
}

layout! {
    /// An entry of a directory (`INDEX_ENTRY`); its key follows, and the place of the node below it is in its last
    /// eight bytes.
    IndexEntryHeader[16] {
        /// Reference of the file's record.
        0 => reference: u64,
        /// Bytes of the entry.
        8 => len: u16,
        /// Bytes of the key.
        10 => key_len: u16,
        /// 1 a node is below it, 2 the last one, which has no key.
        12 => flags: u16,
    }
}

layout! {
    /// The value of `$FILE_NAME`, and the key of a directory's entry (`FILE_NAME_ATTR`); the name follows.
    FileNameHeader[66] {
        /// Reference of the directory's record.
        0 => parent: u64,
        /// Bytes of the file.
        48 => size: u64,
        /// As Windows shows them, and 0x10000000 for a directory.
        56 => attributes: u32,
        /// What a reparse point is.
        60 => reparse_tag: u32,
        /// UTF-16 units of the name.
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
        /// 1: chkdsk is asked for.
        10 => flags: u16,
    }
}

layout! {
    /// The start of a restart page of `$LogFile` (`RESTART_PAGE_HEADER`); its update sequence array is before its
    /// area.
    RestartPage[30] {
        /// `RSTR`, or `CHKD` after chkdsk.
        0 => signature: [u8; 4],
        /// Where the update sequence array is.
        4 => array: u16,
        /// How many words it has; chkdsk leaves none.
        6 => array_len: u16,
        /// The newest record that chkdsk has seen.
        8 => checked_lsn: u64,
        /// Bytes of a restart page.
        16 => page_size: u32,
        /// Bytes of a page of records.
        20 => record_page_size: u32,
        /// Where the [`RestartArea`] is.
        24 => area: u16,
        /// 1 or 0; after the dot of the version.
        26 => minor: u16,
        /// 1, or 2 with the fast start of Windows 8.
        28 => major: u16,
    }
}

layout! {
    /// What a restart page says (`RESTART_AREA`); the clients of the log follow.
    RestartArea[48] {
        /// The newest record of the log.
        0 => lsn: u64,
        /// How many clients there are: NTFS alone.
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
    /// What a run of clusters begins with in a list of runs (`mapping pairs`): its length and then its place follow, as
    /// signed numbers of so many bytes. The place counts from that of the run before it; one of no bytes is a hole,
    /// and a byte of 0 ends the list.
    RunHeader[1] {
        /// Bytes of the length in the lower half, bytes of the place in the upper half.
        0 => lens: u8,
    }
}

impl RunHeader {
    /// Bytes of the length and of the place; `None` at the end of the list.
    pub fn lengths(&self) -> Option<(usize, usize)> {
        let half = |bits: u8| usize::from(bits & 15);
        (self.lens != 0).then(|| (half(self.lens), half(self.lens >> 4)))
    }
}
