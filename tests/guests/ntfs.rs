//! States of an NTFS volume that no tool makes, written byte by byte into its metadata.

use hyper2kvm::demo::{DemoVolume, Role};

use crate::Guest;

const DATA: u32 = 0x80;

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Where an attribute is in a record.
fn find(record: &[u8], kind: u32) -> Option<usize> {
    let mut at = usize::from(le16(record, 20));
    loop {
        match le32(record, at) {
            u32::MAX => return None,
            found if found == kind => return Some(at),
            _ => at += le32(record, at + 4) as usize,
        }
    }
}

impl Guest {
    /// The MFT record of a file as an offset on the disk; its cluster size.
    fn record(&self, role: Role, name: &str) -> (u64, u64) {
        let part = self.spec.partition(role).unwrap();
        let boot = self.bytes(part.start, 512);
        let cluster = u64::from(boot[13]) * 512;
        let mft = le64(&boot, 48) * cluster + part.start;
        let wanted: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let table = self.bytes(mft, 512 << 10);
        for (n, record) in table.chunks(1024).enumerate() {
            let in_use = record.starts_with(b"FILE") && record[22] & 1 == 1;
            let name = in_use.then(|| find(record, 0x30)).flatten();
            // The name lies at the end of a resident attribute, after 66 bytes.
            let name = name.map(|at| &record[at + 24..]).map(|content| {
                let units = usize::from(content[64]);
                &content[66..66 + 2 * units]
            });
            if name == Some(&wanted) {
                return (mft + n as u64 * 1024, cluster);
            }
        }
        panic!("no {name}");
    }

    /// An attribute of the MFT record of a file, as an offset on the disk.
    pub fn attribute(&self, role: Role, name: &str, kind: u32) -> u64 {
        let (at, _) = self.record(role, name);
        let record = self.bytes(at, 1024);
        at + find(&record, kind).unwrap() as u64
    }

    pub fn set_dirty_flag(&self, role: Role) {
        let info = self.attribute(role, "$Volume", 0x70);
        let content = u64::from(self.bytes(info + 20, 1)[0]);
        self.patch(info + content + 10, &[1]);
        // The first records are kept twice, and ntfs-3g compares them.
        let start = self.start(role);
        let boot = self.bytes(start, 512);
        let cluster = u64::from(boot[13]) * 512;
        let at = |i: usize| start + le64(&boot, i) * cluster;
        self.patch(at(56) + (info - at(48)) + content + 10, &[1]);
    }

    /// Puts restart pages at the start of `$LogFile`: the log is in use, and Windows did not close it.
    pub fn open_log(&self, role: Role, version: (u16, u16)) {
        let data = self.attribute(role, "$LogFile", DATA);
        let (_, cluster) = self.record(role, "$LogFile");
        let header = self.bytes(data, 128);
        let runs = &header[usize::from(le16(&header, 32))..];
        let (len, off) = (usize::from(runs[0] & 15), usize::from(runs[0] >> 4));
        let lcn = runs[1 + len..][..off].iter().rev();
        let lcn = lcn.fold(0u64, |lcn, byte| lcn << 8 | u64::from(*byte));
        let page = restart_page(version);
        self.patch(self.start(role) + lcn * cluster, &page.repeat(2));
    }

    /// Takes all clusters of the volume but `left` bytes.
    pub fn fill(&self, place: DemoVolume, left: u64) {
        let role = match place {
            DemoVolume::Windows => Role::Windows,
            DemoVolume::Boot => self.spec.boot_role(),
        };
        if role == Role::Esp {
            assert_eq!(left, 0);
            return self.fill_fat(role);
        }
        let data = self.attribute(role, "$Bitmap", DATA);
        let (_, cluster) = self.record(role, "$Bitmap");
        let header = self.bytes(data, 128);
        let size = le64(&header, 48) as usize;
        let runs = &header[usize::from(le16(&header, 32))..];
        let (len, off) = (usize::from(runs[0] & 15), usize::from(runs[0] >> 4));
        let lcn = runs[1 + len..][..off].iter().rev();
        let lcn = lcn.fold(0u64, |lcn, byte| lcn << 8 | u64::from(*byte));
        let at = self.start(role) + lcn * cluster;
        let mut map = self.bytes(at, size);
        let mut left = left / cluster;
        for byte in &mut map {
            let free = u64::from(byte.count_zeros());
            if free <= left {
                left -= free;
            } else {
                *byte = u8::MAX;
            }
        }
        self.patch(at, &map);
    }

    /// Marks every free cluster of a FAT32 or FAT16 as bad.
    fn fill_fat(&self, role: Role) {
        let start = self.start(role);
        let boot = self.bytes(start, 512);
        let sector = u64::from(le16(&boot, 11));
        let (entry, sectors) = match le16(&boot, 22) {
            0 => (4, le32(&boot, 36)),
            sectors => (2, u32::from(sectors)),
        };
        let size = u64::from(sectors) * sector;
        for copy in 0..u64::from(boot[16]) {
            let at = start + u64::from(le16(&boot, 14)) * sector + copy * size;
            let mut table = self.bytes(at, size as usize);
            let bad = 0x0fff_fff7u32.to_le_bytes();
            for cell in table.chunks_exact_mut(entry).skip(2) {
                if cell.iter().all(|byte| *byte == 0) {
                    cell.copy_from_slice(if entry == 4 { &bad } else { &[0xf7, 0xff] });
                }
            }
            self.patch(at, &table);
        }
        if entry == 4 {
            // The count that the file system keeps beside.
            let info = start + u64::from(le16(&boot, 48)) * sector;
            self.patch(info + 488, &[0; 4]);
        }
    }

    /// Marks a file as compressed (LZNT1) whose units are all stored as they are, as NTFS does with data
    /// that does not shrink. Its size must be a multiple of 64 KiB.
    pub fn pack(&self, name: &str) {
        let (place, _) = self.record(Role::Windows, name);
        let mut record = self.bytes(place, 1024);
        fix_up(&mut record, false);
        let info = find(&record, 0x10).unwrap();
        let flags = info + usize::from(le16(&record, info + 20)) + 32;
        record[flags + 1] |= 8;
        let data = find(&record, DATA).unwrap();
        assert_eq!(record[data + 8], 1, "{name} is resident");
        assert_eq!(le64(&record, data + 48) % 65536, 0, "{name}");
        let runs = usize::from(le16(&record, data + 32));
        // A size on disk stands before the runs of a compressed attribute.
        let allocated = record[data + 40..data + 48].to_vec();
        record.splice(data + runs..data + runs, allocated);
        record.truncate(1024);
        record[data + 12] = 1;
        record[data + 34] = 4;
        record[data + 32] += 8;
        for size in [data + 4, 24] {
            let longer = le32(&record, size) + 8;
            record[size..size + 4].copy_from_slice(&longer.to_le_bytes());
        }
        fix_up(&mut record, true);
        self.patch(place, &record);
    }
}

/// The last two bytes of each sector are kept in the update sequence array.
fn fix_up(record: &mut [u8], on_disk: bool) {
    let array = usize::from(le16(record, 4));
    for n in 1..usize::from(le16(record, 6)) {
        let (end, kept) = (n * 512 - 2, array + 2 * n);
        let from = if on_disk {
            record.copy_within(end..end + 2, kept);
            array
        } else {
            kept
        };
        record.copy_within(from..from + 2, end);
    }
}

fn restart_page((major, minor): (u16, u16)) -> Vec<u8> {
    let mut page = vec![0u8; 4096];
    page[..4].copy_from_slice(b"RSTR");
    let words = [
        (4, 30),
        (6, 9),
        (24, 48),
        (26, minor),
        (28, major),
        (48 + 8, 1),
        (48 + 10, 0xffff),
        // Client 0 is in use, and the volume is not marked clean.
        (48 + 12, 0),
        (48 + 14, 0),
        (30, 7),
    ];
    for (at, word) in words {
        page[at..at + 2].copy_from_slice(&word.to_le_bytes());
    }
    page[16..20].copy_from_slice(&4096u32.to_le_bytes());
    page[20..24].copy_from_slice(&4096u32.to_le_bytes());
    page[48] = 1;
    for end in (510..4096).step_by(512) {
        page[end..end + 2].copy_from_slice(&7u16.to_le_bytes());
    }
    page
}
