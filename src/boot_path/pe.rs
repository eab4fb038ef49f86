//! Reads the properties of a PE image that matter to a boot loader. They are its processor
//! (`Machine` of its COFF header), whether the file is complete, and its imports.
//!
//! Specification: Microsoft, "PE Format" (`e_lfanew` at 0x3c, then `PE\0\0`, the COFF header, the
//! optional header with the data directories, the section table).

use std::rc::Rc;

use crate::bytes::{le16, le32};
use crate::drivers::pe::machine;
use crate::guest::{GuestError, GuestPath, GuestRead, IO_REPARSE_TAG_WOF, VolumeId};
use crate::types::Arch;

/// The processor of images with that machine field.
pub(super) fn processor(machine: u16) -> &'static str {
    Arch::of_pe(machine).map_or("another processor", Arch::name)
}

/// The state of a driver's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageState {
    Missing,
    /// `machine` is `None` if the file exists but is compressed in a way that only Windows reads.
    Present {
        machine: Option<u16>,
    },
    /// The file exists, but is empty, encrypted, unreadable or not a PE image.
    Unreadable,
}

/// A driver's file for the boot loader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub state: ImageState,
    /// The imported files, in its own spelling. Empty for a file that only Windows reads.
    pub imports: Rc<[String]>,
}

impl From<ImageState> for Image {
    fn from(state: ImageState) -> Self {
        Self {
            state,
            imports: Rc::new([]),
        }
    }
}

const HEAD: usize = 4096;

/// Examines a driver's file on a guest volume.
pub fn image(guest: &dyn GuestRead, volume: VolumeId, path: &GuestPath) -> Image {
    let info = match guest.stat(volume, path) {
        Ok(Some(info)) => info,
        Ok(None) => return ImageState::Missing.into(),
        Err(_) => return ImageState::Unreadable.into(),
    };
    if info.encrypted {
        return ImageState::Unreadable.into();
    }
    let compressed = info.reparse_tag == Some(IO_REPARSE_TAG_WOF) || info.compressed;
    let head = match guest.read_at(volume, path, 0, HEAD) {
        Ok(head) => head,
        Err(GuestError::Unreadable { .. }) if compressed => {
            return ImageState::Present { machine: None }.into();
        }
        Err(_) => return ImageState::Unreadable.into(),
    };
    let Some(machine) = machine(&head) else {
        return ImageState::Unreadable.into();
    };
    let mut window = Window {
        start: 0,
        bytes: head,
        read: &|offset, len| guest.read_at(volume, path, offset, len).ok(),
    };
    match imports(&mut window, info.size) {
        Some(imports) => Image {
            state: ImageState::Present {
                machine: Some(machine),
            },
            imports: imports.into(),
        },
        None => ImageState::Unreadable.into(),
    }
}

/// The part of the file that was read last: the names of imports are close together.
struct Window<'r> {
    start: u64,
    bytes: Vec<u8>,
    read: &'r dyn Fn(u64, usize) -> Option<Vec<u8>>,
}

const WINDOW: usize = 64 << 10;

impl Window<'_> {
    /// Reads up to `len` bytes; fewer at the end of the file.
    fn at(&mut self, offset: u64, len: usize) -> Option<&[u8]> {
        let end = offset.checked_add(len as u64)?;
        if offset < self.start || end > self.start + self.bytes.len() as u64 {
            self.bytes = (self.read)(offset, len.max(WINDOW))?;
            self.start = offset;
        }
        let from = usize::try_from(offset - self.start).ok()?;
        let rest = self.bytes.get(from..)?;
        Some(&rest[..len.min(rest.len())])
    }

    fn exactly(&mut self, offset: u64, len: usize) -> Option<&[u8]> {
        self.at(offset, len).filter(|bytes| bytes.len() == len)
    }
}

/// A section: its range in memory and in the file.
struct Section {
    address: u32,
    file_offset: u32,
    file_size: u32,
}

/// The most imports and sections; real drivers import a dozen files and have as many sections.
const MAX_IMPORTS: u64 = 256;
const MAX_SECTIONS: u16 = 96;
const MAX_NAME: usize = 260;
const PE32: u16 = 0x10b;
const PE32_PLUS: u16 = 0x20b;

/// The names in the import directory. `None` if the file is incomplete: no loader accepts a file
/// without its headers, a section or a name. A file without an optional header has no imports.
fn imports(file: &mut Window<'_>, size: u64) -> Option<Vec<String>> {
    let pe = u64::from(le32(file.exactly(0x3c, 4)?, 0)?);
    let coff = file.exactly(pe, 24)?;
    let (sections, optional_size) = (le16(coff, 6)?, le16(coff, 20)?);
    let optional = file.exactly(pe + 24, optional_size.into())?.to_vec();
    let directory = directory(&optional);
    let table = file.exactly(
        pe + 24 + u64::from(optional_size),
        usize::from(sections.min(MAX_SECTIONS)) * 40,
    )?;
    let mut list = Vec::new();
    for row in table.chunks_exact(40) {
        list.push(Section {
            address: le32(row, 12)?,
            file_size: le32(row, 16)?,
            file_offset: le32(row, 20)?,
        });
    }
    let whole = |s: &Section| u64::from(s.file_offset) + u64::from(s.file_size) <= size;
    if !list.iter().filter(|s| s.file_size > 0).all(whole) {
        return None;
    }
    let Some(directory) = directory.filter(|rva| *rva != 0) else {
        return Some(Vec::new());
    };
    let mut names = Vec::new();
    for i in 0..MAX_IMPORTS {
        let at = file_offset(&list, directory)? + i * 20;
        let name = le32(file.exactly(at, 20)?, 12)?;
        if name == 0 {
            break;
        }
        let text = file.at(file_offset(&list, name)?, MAX_NAME)?;
        let end = text.iter().position(|b| *b == 0)?;
        names.push(String::from_utf8_lossy(&text[..end]).into_owned());
    }
    Some(names)
}

/// The address of the import directory, the second of the data directories.
fn directory(optional: &[u8]) -> Option<u32> {
    let (count, first) = match le16(optional, 0)? {
        PE32 => (92, 96),
        PE32_PLUS => (108, 112),
        _ => return None,
    };
    if le32(optional, count)? < 2 {
        return None;
    }
    le32(optional, first + 8)
}

fn file_offset(sections: &[Section], address: u32) -> Option<u64> {
    sections.iter().find_map(|s| {
        let into = address.checked_sub(s.address)?;
        (into < s.file_size).then(|| u64::from(s.file_offset) + u64::from(into))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::pe::{self, Subsystem};
    use crate::inspect::fake::FakeGuest;

    fn look(bytes: Vec<u8>) -> Image {
        let mut guest = FakeGuest::default();
        guest.file(1, "\\a.sys", bytes);
        image(
            &guest,
            VolumeId::new(1),
            &GuestPath::parse("\\a.sys").unwrap(),
        )
    }

    fn present(machine: u16) -> ImageState {
        ImageState::Present {
            machine: Some(machine),
        }
    }

    #[test]
    fn imports_of_both_forms() {
        for arch in [Arch::X86, Arch::Amd64] {
            let machine = arch.pe_machine();
            let names = ["ntoskrnl.exe", "HAL.dll", "storport.sys"];
            let image = look(pe::importing(arch, Subsystem::Native, &names));
            assert_eq!(image.state, present(machine));
            assert_eq!(&image.imports[..], &names);
            let none = look(pe::image(arch, Subsystem::Native));
            assert_eq!((none.state, none.imports.len()), (present(machine), 0));
        }
        let many: Vec<String> = (0..20).map(|n| format!("{n}.sys")).collect();
        let names: Vec<&str> = many.iter().map(String::as_str).collect();
        let image = look(pe::importing(Arch::Amd64, Subsystem::Native, &names));
        assert_eq!(&image.imports[..], &names);
        // Only the headers that name the processor.
        assert_eq!(
            look(crate::drivers::pe::head(0x8664)).state,
            present(0x8664)
        );
    }

    /// Real drivers are larger than what is read at once, and their sections lie in any order.
    #[test]
    fn imports_are_found_wherever_they_lie_in_the_file() {
        let whole = pe::importing(Arch::Amd64, Subsystem::Native, &["a.sys", "b.sys"]);
        let coff = 0x80;
        let sections = usize::from(le16(&whole, coff + 6).unwrap());
        let table = coff + 24 + usize::from(le16(&whole, coff + 20).unwrap());
        let rows = (0..sections).map(|n| table + 40 * n);
        let first = rows
            .clone()
            .map(|row| le32(&whole, row + 20).unwrap())
            .min();
        for moved in [0x1000, 0x20_0000u32] {
            let mut file = whole.clone();
            let at = first.unwrap() as usize;
            file.splice(at..at, vec![0; moved as usize]);
            for row in rows.clone() {
                let offset = le32(&whole, row + 20).unwrap() + moved;
                file[row + 20..row + 24].copy_from_slice(&offset.to_le_bytes());
            }
            let image = look(file);
            assert_eq!(image.state, present(Arch::Amd64.pe_machine()));
            assert_eq!(&image.imports[..], ["a.sys", "b.sys"]);
        }
    }

    #[test]
    fn a_file_that_is_not_whole_is_not_usable() {
        let whole = pe::importing(Arch::Amd64, Subsystem::Native, &["storport.sys"]);
        for len in [0x90, 0x100, 512, whole.len() - 1] {
            let image = look(whole[..len].to_vec());
            assert_eq!(image.state, ImageState::Unreadable, "{len} bytes");
        }
        // An import directory outside of the sections, and names without an end.
        let at = 0x80 + 24 + 112 + 8;
        let mut lost = whole.clone();
        lost[at..at + 4].copy_from_slice(&0x7fff_0000u32.to_le_bytes());
        assert_eq!(look(lost).state, ImageState::Unreadable);
        for byte in 0..whole.len() {
            let mut bad = whole.clone();
            bad[byte] ^= 0xff;
            look(bad);
        }
    }

    /// A section without data lies nowhere; one with a single byte must be there.
    #[test]
    fn only_a_section_with_data_has_to_be_in_the_file() {
        let whole = pe::importing(Arch::Amd64, Subsystem::Native, &["a.sys"]);
        let sections = le16(&whole, 0x80 + 6).unwrap();
        let optional = usize::from(le16(&whole, 0x80 + 20).unwrap());
        let end = 0x80 + 24 + optional + 40 * usize::from(sections);
        assert!(
            whole[end..end + 40].iter().all(|b| *b == 0),
            "room for a row"
        );
        for (size, usable) in [(0u32, true), (1, false)] {
            let mut file = whole.clone();
            file[0x80 + 6] += 1;
            file[end + 12..end + 16].copy_from_slice(&0x10_0000u32.to_le_bytes());
            file[end + 16..end + 20].copy_from_slice(&size.to_le_bytes());
            file[end + 20..end + 24].copy_from_slice(&0x7000_0000u32.to_le_bytes());
            let found = look(file);
            let expected = match usable {
                true => present(Arch::Amd64.pe_machine()),
                false => ImageState::Unreadable,
            };
            assert_eq!(found.state, expected, "{size}");
        }
    }

    /// The table of imports is the second of the directories.
    #[test]
    fn an_image_with_one_directory_has_no_imports() {
        let whole = pe::importing(Arch::Amd64, Subsystem::Native, &["a.sys"]);
        let count = 0x80 + 24 + 108;
        for (directories, imports) in [(0u32, 0), (1, 0), (2, 1), (3, 1), (16, 1)] {
            let mut file = whole.clone();
            file[count..count + 4].copy_from_slice(&directories.to_le_bytes());
            assert_eq!(look(file).imports.len(), imports, "{directories}");
        }
    }

    /// In the file, the data of sections need not stand in the order of their addresses.
    #[test]
    fn an_address_is_in_the_section_that_it_is_below_the_end_of() {
        let section = |address, file_offset| Section {
            address,
            file_offset,
            file_size: 0x1000,
        };
        let sections = [section(0x1000, 0x8000), section(0x2000, 0x400)];
        for (address, offset) in [
            (0xfff, None),
            (0x1000, Some(0x8000)),
            (0x1fff, Some(0x8fff)),
            (0x2000, Some(0x400)),
            (0x2fff, Some(0x13ff)),
            (0x3000, None),
        ] {
            assert_eq!(file_offset(&sections, address), offset, "{address:#x}");
        }
    }

    /// Windows reads files that NTFS compresses; the boot loader cannot read encrypted ones.
    #[test]
    fn a_file_that_only_windows_reads_is_there_and_an_encrypted_one_is_of_no_use() {
        use crate::guest::FileInfo;
        let none = ImageState::Present { machine: None };
        let amd64 = present(Arch::Amd64.pe_machine());
        for (change, state) in [
            ((|_| {}) as fn(&mut FileInfo), amd64),
            (|info| info.compressed = true, amd64),
            (|info| info.encrypted = true, ImageState::Unreadable),
            (|info| info.reparse_tag = Some(IO_REPARSE_TAG_WOF), none),
            // Compressed in a form that only Windows reads.
            (
                |info| {
                    info.reparse_tag = Some(0xa000_000c);
                    info.compressed = true;
                },
                none,
            ),
            // A link, for one.
            (
                |info| info.reparse_tag = Some(0xa000_000c),
                ImageState::Unreadable,
            ),
        ] {
            let mut guest = FakeGuest::default();
            let whole = pe::importing(Arch::Amd64, Subsystem::Native, &["storport.sys"]);
            change(guest.file(1, "\\a.sys", whole));
            let path = |name: &str| GuestPath::parse(name).unwrap();
            let found = image(&guest, VolumeId::new(1), &path("\\a.sys"));
            assert_eq!(found.state, state);
            let missing = image(&guest, VolumeId::new(1), &path("\\b.sys"));
            assert_eq!(missing.state, ImageState::Missing);
        }
    }
}
