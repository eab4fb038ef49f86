//! Detects the format of an image file from its first and last bytes, without QEMU.
//!
//! QEMU is then always given the driver. Deciding here also keeps a hostile image from making QEMU
//! open anything. The file names in a vmdk descriptor are extracted before QEMU sees it.
//!
//! Specifications: QEMU `docs/interop/qcow2.rst`, VMware "Virtual Disk Format 5.0", Microsoft "VHD
//! image format" and [MS-VHDX], VirtualBox `VDICore.h`.

use std::io;

use super::headers::{
    COWD_MAGIC, PARALLELS_BLOCKS_MAGIC, PARALLELS_MAGIC, QED_MAGIC, QedHeader, VHD_COOKIE,
    VHDX_MAGIC, VMDK_MAGIC, VdiHeader, VhdFooter, VmdkHeader,
};
use super::qcow2;
use super::remote::ReadAt;
use crate::bytes::be32;

/// The QEMU driver of an image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format(&'static str);

impl Format {
    pub const RAW: Self = Self("raw");
    pub const QCOW2: Self = Self("qcow2");
    pub const VMDK: Self = Self("vmdk");
    pub const VPC: Self = Self("vpc");
    pub const VHDX: Self = Self("vhdx");
    pub const VDI: Self = Self("vdi");

    /// Looks a format up by the name in an option or image header; `None` for an unsupported one.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "raw" | "img" | "file" | "host_device" => Self::RAW,
            "qcow2" => Self::QCOW2,
            "qcow" => Self("qcow"),
            "vmdk" => Self::VMDK,
            "vpc" | "vhd" => Self::VPC,
            "vhdx" => Self::VHDX,
            "vdi" => Self::VDI,
            "qed" => Self("qed"),
            "parallels" => Self("parallels"),
            _ => return None,
        })
    }

    pub const NAMES: &'static str = "raw, qcow2, vmdk, vpc (vhd), vhdx, vdi, qcow, qed, parallels";

    /// The name of the QEMU driver.
    pub fn driver(self) -> &'static str {
        self.0
    }

    /// Whether QEMU's driver has a `backing` node.
    pub fn has_backing(self) -> bool {
        matches!(self.0, "qcow2" | "qcow" | "qed" | "vmdk")
    }

    /// Whether `qemu-img check` supports the format.
    pub fn has_check(self) -> bool {
        !matches!(self.0, "raw" | "vpc" | "qcow")
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

/// The kind of a file according to its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detected {
    Image(Format),
    /// An archive or a compressed file that may contain an image.
    Packed(&'static str),
}

/// The most bytes of a vmdk descriptor that QEMU reads.
const MAX_DESCRIPTOR: usize = 1 << 20;

const VHD_FOOTER: usize = VhdFooter::LEN;
/// [`VhdFooter::kind`] of a raw disk with a footer.
pub const VHD_FIXED: u32 = 2;
/// [`VhdFooter::kind`] of a VHD with a parent.
pub const VHD_DIFFERENCING: u32 = 4;

/// Examines the start and the end of the file.
pub fn detect(file: &dyn ReadAt, size: u64) -> io::Result<Detected> {
    let head = head(file, size)?;
    let tail = read_up_to(
        file,
        size.saturating_sub(VHD_FOOTER as u64),
        VHD_FOOTER,
        size,
    )?;
    Ok(detect_bytes(&head, &tail))
}

/// Text may begin with many comments.
fn head(file: &dyn ReadAt, size: u64) -> io::Result<Vec<u8>> {
    let head = read_up_to(file, 0, 512, size)?;
    match head.starts_with(b"#") {
        true => read_up_to(file, 0, MAX_DESCRIPTOR, size),
        false => Ok(head),
    }
}

pub fn detect_bytes(head: &[u8], tail: &[u8]) -> Detected {
    const PACKED: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", "gzip file"),
        (b"\xfd7zXZ\0", "xz file"),
        (b"\x28\xb5\x2f\xfd", "zstd file"),
        (b"PK\x03\x04", "zip archive"),
        (b"7z\xbc\xaf\x27\x1c", "7-zip archive"),
        (b"BZh", "bzip2 file"),
    ];
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|h| h.starts_with(magic));
    let format = if at(0, &qcow2::MAGIC) {
        if at(4, &[0, 0, 0, 1]) {
            Format("qcow")
        } else {
            Format::QCOW2
        }
    } else if at(0, &VMDK_MAGIC) || at(0, &COWD_MAGIC) || is_descriptor(head) {
        Format::VMDK
    } else if at(0, &VHD_COOKIE) || is_fixed_vhd(tail) {
        Format::VPC
    } else if at(0, &VHDX_MAGIC) {
        Format::VHDX
    } else if VdiHeader::of(head).is_some() {
        Format::VDI
    } else if at(0, &QED_MAGIC) {
        Format("qed")
    } else if at(0, &PARALLELS_MAGIC) || at(0, &PARALLELS_BLOCKS_MAGIC) {
        Format("parallels")
    } else if at(257, b"ustar") {
        return Detected::Packed("tar archive");
    } else if let Some((_, what)) = PACKED.iter().find(|(magic, _)| at(0, magic)) {
        return Detected::Packed(what);
    } else {
        Format::RAW
    };
    Detected::Image(format)
}

/// Whether QEMU accepts the text: comments and blank lines, then `version=1`, 2 or 3; also 4, which
/// ESXi writes.
fn is_descriptor(head: &[u8]) -> bool {
    head.starts_with(b"#")
        && head
            .split(|&b| b == b'\n')
            .map(<[u8]>::trim_ascii)
            .find(|line| !line.is_empty() && !line.starts_with(b"#"))
            .is_some_and(|line| {
                matches!(
                    line,
                    [b'v', b'e', b'r', b's', b'i', b'o', b'n', b'=', b'1'..=b'4']
                )
            })
}

/// Whether this is a fixed VHD: a raw disk with a footer. QEMU's own probe reads only the first
/// bytes and detects a raw disk.
fn is_fixed_vhd(tail: &[u8]) -> bool {
    vhd_type(tail) == Some(VHD_FIXED)
}

/// A VHD footer with a valid checksum.
pub fn vhd_footer(bytes: &[u8]) -> Option<VhdFooter> {
    let footer = VhdFooter::read(bytes)?;
    let valid = footer.cookie == VHD_COOKIE && footer.checksum.0 == vhd_checksum(bytes);
    valid.then_some(footer)
}

/// The [`VhdFooter::kind`] of a VHD footer with a valid checksum.
pub fn vhd_type(footer: &[u8]) -> Option<u32> {
    vhd_footer(footer).map(|footer| footer.kind.0)
}

/// The checksum that a VHD footer must have.
pub fn vhd_checksum(footer: &[u8]) -> u32 {
    let bytes = footer.iter().take(VhdFooter::LEN).enumerate();
    let others = bytes.filter(|(i, _)| !(64..68).contains(i));
    !others.fold(0u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)))
}

/// Whether the footer at the end of a dynamic VHD is missing. A copy of it is at the start.
pub fn lost_footer(file: &dyn ReadAt, size: u64, format: Format) -> io::Result<bool> {
    if format != Format::VPC || vhd_type(&read_up_to(file, 0, VHD_FOOTER, size)?).is_none() {
        return Ok(false);
    }
    let end = size.saturating_sub(VHD_FOOTER as u64);
    Ok(vhd_type(&read_up_to(file, end, VHD_FOOTER, size)?).is_none())
}

/// Whether neither end of a file has the signature of a VHD.
pub fn no_vhd(file: &dyn ReadAt, size: u64) -> io::Result<bool> {
    let head = read_up_to(file, 0, VHD_FOOTER, size)?;
    let end = size.saturating_sub(VHD_FOOTER as u64);
    let tail = read_up_to(file, end, VHD_FOOTER, size)?;
    Ok(!head.starts_with(&VHD_COOKIE) && !tail.starts_with(&VHD_COOKIE))
}

/// A file that QEMU would open besides the vmdk file itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmdkExtent {
    /// `RW`, `RDONLY` or `NOACCESS`.
    pub access: String,
    /// `SPARSE`, `FLAT`, `VMFS`, ...
    pub kind: String,
    pub sectors: u64,
    /// The offset of a flat one in the file, in sectors; not every kind has one.
    pub offset: Option<u64>,
    /// The name in the encoding of the descriptor.
    pub name: Vec<u8>,
}

/// The descriptor that QEMU would use. It is the file itself if that is text, or the embedded one
/// if the sparse header has capacity 0. `None` for a self-contained vmdk.
pub fn vmdk_descriptor(file: &dyn ReadAt, size: u64) -> io::Result<Option<Vec<u8>>> {
    let head = head(file, size)?;
    let text = match VmdkHeader::of(&head) {
        _ if is_descriptor(&head) => head,
        Some(header) if header.capacity == 0 => {
            let start = header.descriptor.saturating_mul(512);
            read_up_to(file, start, MAX_DESCRIPTOR, size)?
        }
        _ => return Ok(None),
    };
    let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
    Ok(Some(text[..end].to_vec()))
}

/// Whether a file is one of the kinds of vmdk that contain their data.
pub fn is_sparse_vmdk(file: &dyn ReadAt, size: u64) -> io::Result<bool> {
    let magic = read_up_to(file, 0, 4, size)?;
    Ok(magic == VMDK_MAGIC || magic == COWD_MAGIC)
}

/// The descriptor for QEMU. It has the lines that QEMU reads, and the given extents under other
/// names, in their order. `Err` for a line that QEMU might parse as an extent but [`parse_extents`]
/// does not.
pub fn with_extents(
    descriptor: &[u8],
    names: impl IntoIterator<Item = String>,
) -> Result<Vec<u8>, String> {
    const READ: [&str; 4] = ["CID", "parentCID", "createType", "parentFileNameHint"];
    let mut names = names.into_iter();
    let mut out = b"# Disk DescriptorFile\nversion=1\n".to_vec();
    for line in lines(descriptor) {
        let key = cut(line, b'=').map(|(key, _)| String::from_utf8_lossy(key));
        let key = key.as_deref().map(str::trim).unwrap_or_default();
        if let Some(extent) = parse_extent(line) {
            let name = names.next().unwrap_or_default();
            out.extend_from_slice(extent.line(&name).as_bytes());
        } else if first_word(line) == "RW" && !is_zero_extent(line) {
            // QEMU parses with scanf: it needs no space between words, and continues in the next
            // line.
            return Err(crate::tool::clean(line));
        } else if is_zero_extent(line) || READ.contains(&key) || has_parent(line) {
            out.extend_from_slice(line.trim_ascii_start());
        } else {
            continue;
        }
        out.push(b'\n');
    }
    Ok(out)
}

/// QEMU finds it anywhere, even in a comment.
fn has_parent(line: &[u8]) -> bool {
    const HINT: &[u8] = b"parentFileNameHint";
    line.windows(HINT.len()).any(|w| w == HINT)
}

fn first_word(line: &[u8]) -> String {
    let line = String::from_utf8_lossy(line);
    line.split_whitespace().next().unwrap_or_default().into()
}

impl VmdkExtent {
    /// The extent's line with another name.
    fn line(&self, name: &str) -> String {
        let Self { access, kind, .. } = self;
        let offset = self
            .offset
            .map_or(String::new(), |offset| format!(" {offset}"));
        format!("{access} {} {kind} \"{name}\"{offset}", self.sectors)
    }
}

/// The lines without their ends. In no encoding of a descriptor is one of these bytes part of
/// another character.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    let empty = text.is_empty();
    let lines = text.split(|b| *b == b'\n').filter(move |_| !empty);
    lines.map(|line| line.strip_suffix(b"\r").unwrap_or(line))
}

fn cut(text: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|b| *b == at)?;
    Some((&text[..at], &text[at + 1..]))
}

/// `RW 20480 ZERO`
fn is_zero_extent(line: &[u8]) -> bool {
    zero_sectors(line).is_some()
}

fn zero_sectors(line: &[u8]) -> Option<u64> {
    let line = String::from_utf8_lossy(line);
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["RW", sectors, "ZERO"] => sectors.parse().ok(),
        _ => None,
    }
}

/// A line of a descriptor that represents a part of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// The number of sectors of zeroes.
    Zero(u64),
    Extent(VmdkExtent),
}

impl Part {
    pub fn sectors(&self) -> u64 {
        match self {
            Self::Zero(sectors) => *sectors,
            Self::Extent(extent) => extent.sectors,
        }
    }
}

/// The parts of the disk in order.
pub fn layout(descriptor: &[u8]) -> Vec<Part> {
    let part = |line: &[u8]| match parse_extent(line) {
        Some(extent) => Some(Part::Extent(extent)),
        None => zero_sectors(line).map(Part::Zero),
    };
    lines(descriptor).filter_map(part).collect()
}

/// Every line of the form `ACCESS SECTORS TYPE "NAME" [OFFSET]`.
pub fn parse_extents(descriptor: &[u8]) -> Vec<VmdkExtent> {
    let end = descriptor.iter().position(|&b| b == 0);
    let text = &descriptor[..end.unwrap_or(descriptor.len())];
    lines(text).filter_map(parse_extent).collect()
}

fn parse_extent(line: &[u8]) -> Option<VmdkExtent> {
    let (before, rest) = cut(line, b'"')?;
    let before = std::str::from_utf8(before).ok()?;
    let mut words = before.split_whitespace();
    let (access, sectors, kind) = (words.next()?, words.next()?, words.next()?);
    let known = matches!(access, "RW" | "RDONLY" | "NOACCESS") && words.next().is_none();
    if !known || sectors.parse::<i64>().is_err() {
        return None;
    }
    let (name, after) = cut(rest, b'"').unwrap_or((rest, b""));
    let after = String::from_utf8_lossy(after);
    let offset = after.split_whitespace().next();
    Some(VmdkExtent {
        access: access.to_owned(),
        kind: kind.to_owned(),
        sectors: sectors.parse().unwrap_or(0),
        offset: offset.and_then(|o| o.parse().ok()),
        name: name.to_owned(),
    })
}

/// The bytes of the backing file's name in the header of a qcow2, qcow or qed.
pub fn backing_name(file: &dyn ReadAt, size: u64) -> io::Result<Option<Vec<u8>>> {
    let head = read_up_to(file, 0, 64, size)?;
    let qed = QedHeader::padded(&head).filter(|header| header.magic == QED_MAGIC);
    // In a qcow the fields are at the same offsets.
    let (at, len) = if let Some(header) = qcow2::Header::of(&head) {
        (header.backing.0, header.backing_len.0)
    } else if let Some(header) = qed {
        (header.backing.into(), header.backing_len)
    } else {
        (0, 0)
    };
    if at == 0 || len == 0 {
        return Ok(None);
    }
    read_up_to(file, at, len.min(4096) as usize, size).map(Some)
}

/// The name of a qcow2's external data file, from its header extensions.
pub fn qcow2_data_file(file: &dyn ReadAt, size: u64) -> io::Result<Option<Vec<u8>>> {
    // All header extensions lie in the first cluster, and clusters have at most 2 MiB.
    let head = read_up_to(file, 0, 512, size)?;
    if !has_data_file(&head) {
        return Ok(None);
    }
    let head = read_up_to(file, 0, 2 << 20, size)?;
    Ok(qcow2_data_file_name(&head))
}

fn has_data_file(head: &[u8]) -> bool {
    let header = qcow2::Header::of(head);
    header.is_some_and(|header| header.incompatible.0 & qcow2::EXTERNAL_DATA != 0)
}

fn qcow2_data_file_name(head: &[u8]) -> Option<Vec<u8>> {
    const DATA_FILE: u32 = 0x4441_5441;
    let mut at = qcow2::Header::read(head)?.len.0 as usize;
    loop {
        let (kind, len) = (be32(head, at)?, be32(head, at.checked_add(4)?)? as usize);
        let start = at.checked_add(8)?;
        let data = head.get(start..start.checked_add(len)?)?;
        match kind {
            0 => return None,
            DATA_FILE => return Some(data.to_vec()),
            _ => at = start.checked_add(len.checked_next_multiple_of(8)?)?,
        }
    }
}

/// Reads up to `len` bytes, fewer at the end of the file.
pub fn read_up_to(file: &dyn ReadAt, offset: u64, len: usize, size: u64) -> io::Result<Vec<u8>> {
    let len = (len as u64).min(size.saturating_sub(offset));
    let mut buf = vec![0; len as usize];
    file.read_exact_at(&mut buf, offset)?;
    Ok(buf)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut head = vec![0; 512];
        head[offset..offset + magic.len()].copy_from_slice(magic);
        head
    }

    #[test]
    fn magics() {
        for (head, want) in [
            (head(0, b"QFI\xfb\0\0\0\x03"), "qcow2"),
            (head(0, b"QFI\xfb\0\0\0\x01"), "qcow"),
            (head(0, b"KDMV"), "vmdk"),
            (
                head(0, b"# Disk DescriptorFile\r\n\r\nversion=1\r\nCID=1"),
                "vmdk",
            ),
            (head(0, b"# notes\nversion=9\n"), "raw"),
            (head(0, b"#!/bin/sh\n"), "raw"),
            (head(0, b"conectix"), "vpc"),
            (head(0, b"vhdxfile"), "vhdx"),
            (head(64, &[0x7f, 0x10, 0xda, 0xbe]), "vdi"),
            (head(0, b"QED\0"), "qed"),
            (head(510, &[0x55, 0xaa]), "raw"),
            (b"short".to_vec(), "raw"),
            (Vec::new(), "raw"),
        ] {
            let got = detect_bytes(&head, &[]);
            assert_eq!(
                got,
                Detected::Image(Format::by_name(want).unwrap()),
                "{want}"
            );
        }
        for (head, want) in [
            (head(0, b"\x1f\x8b\x08"), "gzip file"),
            (head(0, b"PK\x03\x04"), "zip archive"),
            (head(257, b"ustar\0"), "tar archive"),
        ] {
            assert_eq!(detect_bytes(&head, &[]), Detected::Packed(want));
        }
    }

    #[test]
    fn vhd_footers() {
        let mut footer = head(0, b"conectix");
        footer[63] = 2;
        assert_eq!(vhd_type(&footer), None, "no checksum");
        let sum: u32 = footer.iter().map(|&b| u32::from(b)).sum();
        footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
        assert_eq!(vhd_type(&footer), Some(2));
        assert_eq!(
            detect_bytes(&[0; 512], &footer),
            Detected::Image(Format::VPC)
        );
        assert_eq!(vhd_type(&footer[..511]), None);
    }

    #[test]
    fn descriptors() {
        let text = b"# Disk DescriptorFile\nversion=1\nRW 20480 SPARSE \"a b-s001.vmdk\"\r\n\
            RW 1 FLAT \"/etc/shadow\" 0\nRW 5 ZERO\nNOACCESS 1 FLAT \"nbd://x\"\n\
            ddb.uuid = \"60 00\"\nparentFileNameHint=\"p.vmdk\"\nRW x FLAT \"no\"\n\0RW 1 FLAT \"z\"";
        let names: Vec<_> = parse_extents(text).into_iter().map(|e| e.name).collect();
        assert_eq!(names, [&b"a b-s001.vmdk"[..], b"/etc/shadow", b"nbd://x"]);
        assert!(parse_extents(b"").is_empty());
        assert!(parse_extents(&[0xff; 100]).is_empty());
    }

    #[test]
    fn extents_get_other_names() {
        let text = b"# Disk DescriptorFile\nversion=1\nRW 20 FLAT \"a b.vmdk\" 8\r\nRW 5 ZERO\n\
            RW 4 SPARSE \"/etc/shadow\"\nddb.uuid = \"RW 1\"\n";
        let names = ["/proc/self/fd/7", "/proc/self/fd/8"].map(String::from);
        let got = String::from_utf8(with_extents(text, names).unwrap()).unwrap();
        assert_eq!(
            got,
            "# Disk DescriptorFile\nversion=1\nRW 20 FLAT \"/proc/self/fd/7\" 8\nRW 5 ZERO\n\
             RW 4 SPARSE \"/proc/self/fd/8\"\n"
        );
        // All of these are extents for QEMU's scanf.
        for odd in [
            "RW 5FLAT \"x\" 0",
            "RW",
            "  RW 5 FLAT",
            "\x0bRW",
            "\x0c\x0bRW\r",
            "RW 5 FLAT x \"y\" 0",
        ] {
            let text = format!("version=1\n{odd}\n5 FLAT \"x\" 0\n");
            assert!(with_extents(text.as_bytes(), []).is_err(), "{odd}");
        }
    }

    #[test]
    fn qemu_gets_what_it_reads_and_nothing_else() {
        let text = b"# Disk DescriptorFile\nversion=4\n\n# /etc/x\n CID=1\nparentCID=2\nchangeTrackPath=\"c\"\n\
            createType=\"vmfs\"\n#parentFileNameHint=\"p\"\n\n\x0bRW 8 VMFS \"a\"\n\nddb.x = \"1\"\n";
        let got = String::from_utf8(with_extents(text, ["/n".to_owned()]).unwrap()).unwrap();
        assert_eq!(
            got,
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=2\ncreateType=\"vmfs\"\n\
             #parentFileNameHint=\"p\"\nRW 8 VMFS \"/n\"\n"
        );
    }

    #[test]
    fn descriptors_may_begin_with_many_comments() {
        use std::io::Write;
        for version in [1, 4] {
            let mut file = tempfile::tempfile().unwrap();
            let text = format!(
                "# Disk DescriptorFile\n#{}\nversion={version}\n",
                "#".repeat(600)
            );
            file.write_all(text.as_bytes()).unwrap();
            let size = text.len() as u64;
            let found = detect(&file, size).unwrap();
            assert_eq!(found, Detected::Image(Format::VMDK), "{version}");
            let found = vmdk_descriptor(&file, size).unwrap();
            assert_eq!(found.as_deref(), Some(text.as_bytes()));
        }
    }

    #[test]
    fn data_files_of_qcow2() {
        let mut head = head(0, b"QFI\xfb\0\0\0\x03");
        head[79] = 4;
        head[103] = 104;
        head[104..112].copy_from_slice(&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3]);
        head[120..128].copy_from_slice(b"DATA\0\0\0\x06");
        head[128..134].copy_from_slice(b"d.data");
        assert!(has_data_file(&head));
        assert_eq!(qcow2_data_file_name(&head).as_deref(), Some(&b"d.data"[..]));
        head[127] = 0xff;
        head[126] = 0xff;
        assert_eq!(qcow2_data_file_name(&head), None, "past the end");
        head[79] = 0;
        assert!(!has_data_file(&head) && !has_data_file(b"QFI"));
    }
}
