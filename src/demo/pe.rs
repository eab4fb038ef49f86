//! Minimal PE images, for readers of headers: drivers and boot loaders.
//!
//! Specification: "PE Format" (Microsoft). An image has one `.text` section that returns
//! immediately, no resources, and a right checksum (the boot loader refuses drivers without). An
//! import directory in a second section is optional.

use super::Arch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Subsystem {
    Native = 1,
    Gui = 2,
    EfiApplication = 10,
    BootApplication = 16,
}

const PE_OFFSET: usize = 0x80;
const OPTIONAL_OFFSET: usize = PE_OFFSET + 24;
const FILE_ALIGNMENT: usize = 0x200;
const SECTION_ALIGNMENT: u32 = 0x1000;
const CHECKSUM_OFFSET: usize = OPTIONAL_OFFSET + 64;

/// The bytes of an image.
pub fn image(arch: Arch, subsystem: Subsystem) -> Vec<u8> {
    importing(arch, subsystem, &[])
}

/// The bytes of an image that imports the first export of each of these files.
pub fn importing(arch: Arch, subsystem: Subsystem, files: &[&str]) -> Vec<u8> {
    let idata = import_section(arch, files);
    let sections: u16 = if idata.is_empty() { 1 } else { 2 };
    let (machine, code): (u16, &[u8]) = match arch {
        Arch::X86 => (0x014c, &[0x31, 0xc0, 0xc2, 0x08, 0x00]),
        Arch::Amd64 => (0x8664, &[0x31, 0xc0, 0xc3]),
        Arch::Arm64 => (0xaa64, &[0x00, 0x00, 0x80, 0x52, 0xc0, 0x03, 0x5f, 0xd6]),
    };
    let wide = arch != Arch::X86;
    let optional_size: u16 = if wide { 240 } else { 224 };

    let mut out = Bytes(Vec::with_capacity(2 * FILE_ALIGNMENT));
    out.put(b"MZ").pad_to(0x3c).u32(PE_OFFSET as u32);
    out.pad_to(PE_OFFSET).put(b"PE\0\0");
    out.u16(machine)
        .u16(sections)
        .u32(0x6592_0080)
        .u32(0)
        .u32(0);
    // Executable; large addresses, or 32-bit.
    let characteristics = if wide { 0x0022 } else { 0x0102 };
    out.u16(optional_size).u16(characteristics);

    out.u16(if wide { 0x20b } else { 0x10b }).put(&[14, 0]);
    out.u32(FILE_ALIGNMENT as u32).u32(0).u32(0);
    out.u32(SECTION_ALIGNMENT).u32(SECTION_ALIGNMENT);
    if wide {
        out.u64(0x1_4000_0000);
    } else {
        out.u32(2 * SECTION_ALIGNMENT).u32(0x0001_0000);
    }
    out.u32(SECTION_ALIGNMENT).u32(FILE_ALIGNMENT as u32);
    out.u16(10).u16(0).u16(10).u16(0).u16(10).u16(0).u32(0);
    out.u32((u32::from(sections) + 1) * SECTION_ALIGNMENT);
    out.u32(FILE_ALIGNMENT as u32);
    out.u32(0).u16(subsystem as u16).u16(0x0160);
    for (reserve, commit) in [(0x4_0000u32, 0x1000), (0x10_0000, 0x1000)] {
        for size in [reserve, commit] {
            match wide {
                true => out.u64(u64::from(size)),
                false => out.u32(size),
            };
        }
    }
    out.u32(0).u32(16);
    let mut directories = [0; 128];
    if !idata.is_empty() {
        directories[8..12].copy_from_slice(&IDATA.to_le_bytes());
        let size = (files.len() as u32 + 1) * 20;
        directories[12..16].copy_from_slice(&size.to_le_bytes());
    }
    out.put(&directories);

    out.put(b".text\0\0\0").u32(code.len() as u32);
    out.u32(SECTION_ALIGNMENT).u32(FILE_ALIGNMENT as u32);
    out.u32(FILE_ALIGNMENT as u32).put(&[0; 12]);
    out.u32(0x6000_0020);
    let idata_len = idata.len().next_multiple_of(FILE_ALIGNMENT);
    if !idata.is_empty() {
        out.put(b".idata\0\0").u32(idata.len() as u32);
        out.u32(IDATA).u32(idata_len as u32);
        out.u32(2 * FILE_ALIGNMENT as u32).put(&[0; 12]);
        out.u32(0xc000_0040);
    }
    out.pad_to(FILE_ALIGNMENT).put(code);
    out.pad_to(2 * FILE_ALIGNMENT).put(&idata);
    out.pad_to(2 * FILE_ALIGNMENT + idata_len);

    let mut image = out.0;
    let sum = checksum(&image);
    image[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4].copy_from_slice(&sum.to_le_bytes());
    image
}

/// The address of the import section in memory.
const IDATA: u32 = 2 * SECTION_ALIGNMENT;

/// Writes descriptors, then for each file its name and two tables with the import of ordinal 1.
fn import_section(arch: Arch, files: &[&str]) -> Vec<u8> {
    if files.is_empty() {
        return Vec::new();
    }
    let (thunk, ordinal): (usize, u64) = match arch {
        Arch::X86 => (4, 1 << 31),
        Arch::Amd64 | Arch::Arm64 => (8, 1 << 63),
    };
    let mut descriptors = Bytes(Vec::new());
    let mut rest = Bytes(Vec::new());
    let first = (files.len() + 1) * 20;
    for file in files {
        let name = (first + rest.0.len()) as u32;
        rest.put(file.as_bytes()).put(&[0]);
        let aligned = rest.0.len().next_multiple_of(8);
        rest.pad_to(aligned);
        let tables = (first + rest.0.len()) as u32;
        for _ in 0..2 {
            rest.put(&(ordinal | 1).to_le_bytes()[..thunk]);
            rest.put(&[0; 8][..thunk]);
        }
        descriptors.u32(IDATA + tables).u32(0).u32(0);
        descriptors.u32(IDATA + name);
        descriptors.u32(IDATA + tables + 2 * thunk as u32);
    }
    descriptors.put(&[0; 20]).put(&rest.0);
    descriptors.0
}

/// The image checksum: the 16-bit words added with end-around carry, plus the length.
fn checksum(image: &[u8]) -> u32 {
    let sum = image
        .chunks(2)
        .map(|word| u32::from(word[0]) | u32::from(word.get(1).copied().unwrap_or(0)) << 8)
        .fold(0u32, |sum, word| {
            let sum = sum + word;
            (sum & 0xffff) + (sum >> 16)
        });
    sum + image.len() as u32
}

struct Bytes(Vec<u8>);

impl Bytes {
    fn put(&mut self, data: &[u8]) -> &mut Self {
        self.0.extend_from_slice(data);
        self
    }

    fn u16(&mut self, n: u16) -> &mut Self {
        self.put(&n.to_le_bytes())
    }

    fn u32(&mut self, n: u32) -> &mut Self {
        self.put(&n.to_le_bytes())
    }

    fn u64(&mut self, n: u64) -> &mut Self {
        self.put(&n.to_le_bytes())
    }

    fn pad_to(&mut self, len: usize) -> &mut Self {
        self.0.resize(len, 0);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers() {
        for (arch, machine, magic, optional) in [
            (Arch::X86, 0x014c, 0x10b, 224),
            (Arch::Amd64, 0x8664, 0x20b, 240),
            (Arch::Arm64, 0xaa64, 0x20b, 240),
        ] {
            let image = image(arch, Subsystem::Native);
            let u16_at = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
            assert_eq!(&image[..2], b"MZ");
            assert_eq!(u16_at(0x3c), 0x80);
            assert_eq!(&image[0x80..0x84], b"PE\0\0");
            assert_eq!(u16_at(0x84), machine);
            assert_eq!(u16_at(0x80 + 20), optional);
            assert_eq!(u16_at(OPTIONAL_OFFSET), magic);
            assert_eq!(u16_at(OPTIONAL_OFFSET + 68), Subsystem::Native as u16);
            // The optional header ends where the section table begins.
            let section = OPTIONAL_OFFSET + usize::from(optional);
            assert_eq!(&image[section..section + 5], b".text");
            assert_eq!(image.len(), 1024);
            // Adding the checksum to the words results in a sum that differs only by it.
            let mut bare = image.clone();
            bare[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4].fill(0);
            let stored = u32::from(u16_at(CHECKSUM_OFFSET));
            assert_eq!(checksum(&bare), stored);
        }
    }
}
