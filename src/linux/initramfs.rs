//! What an initramfs carries: kernel modules, and the tools that put a root file system together.
//!
//! An initramfs is a row of cpio archives (`newc`, Documentation/driver-api/early-userspace/
//! buffer-format.rst of Linux), each plain or compressed as a whole, with zeroes between them; the
//! early ones hold microcode. It is read as a stream, nothing is unpacked, and only the lists of
//! modules are kept. bzip2 and LZO are not read.
//!
//! The bytes come from a guest: names, sizes and the amount that comes out of a decompressor are
//! bounded, and every error says what was wrong.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Cursor, Read};

use liblzma::bufread::XzDecoder;
use liblzma::stream::Stream;

use super::modules;

/// What all initramfs of a guest may unpack to.
pub const MAX_UNPACKED: u64 = 2 << 30;
/// What one may unpack to for each byte of it, and besides. Modules and programs get to 10.
const MAX_RATIO: u64 = 32;
const SMALL: u64 = 8 << 20;
const MAX_ENTRIES: u32 = 500_000;
/// Linux refuses longer names.
const MAX_NAME: u32 = 4096;
const MAX_LIST: u64 = 16 << 20;
/// The window of Zstandard; `--ultra -22` stays below.
const MAX_WINDOW: u64 = 128 << 20;
/// What liblzma may take; `xz -9` needs 65 MiB.
const XZ_MEMORY: u64 = 128 << 20;
const MAX_ARCHIVES: u32 = 64;

#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    #[error("reading it")]
    Io(#[from] io::Error),
    #[error("byte {offset} of an archive: {what}")]
    Cpio { offset: u64, what: &'static str },
    #[error("its compression is not one we read (first bytes {0:02x?})")]
    Compression([u8; 6]),
    #[error("{0}")]
    Limit(&'static str),
    #[error("it is empty")]
    Empty,
}

type Result<T, E = InitramfsError> = std::result::Result<T, E>;

/// What was found, over all archives.
#[derive(Debug, Default)]
pub struct Contents {
    /// Kernel version to the modules of that kernel, named as in `/proc/modules`.
    pub modules: BTreeMap<String, BTreeSet<String>>,
    /// `modules.dep` by kernel version.
    pub dep: BTreeMap<String, String>,
    /// `modules.builtin` by kernel version.
    pub builtin: BTreeMap<String, String>,
    /// The last component of everything in a `bin` or `sbin` folder.
    pub programs: BTreeSet<String>,
    pub files: u32,
}

/// Reads a whole initramfs. `budget` is what it may unpack to; what is left of it is for the next one.
pub fn scan(input: impl Read, budget: &mut u64) -> Result<Contents> {
    let packed = Cell::new(0);
    let input = Tally {
        inner: input,
        read: &packed,
    };
    let mut input = BufReader::with_capacity(64 << 10, input);
    let mut contents = Contents::default();
    let mut unpacked = 0;
    for _ in 0..MAX_ARCHIVES {
        let Some(magic) = next_magic(&mut input)? else {
            if contents.files == 0 {
                return Err(InitramfsError::Empty);
            }
            return Ok(contents);
        };
        let mut whole = Cursor::new(magic).chain(&mut input);
        if is_cpio(&magic) {
            let mut plain = Counted::new(&mut whole, *budget);
            let read = archive(&mut plain, &mut contents);
            *budget = plain.left;
            read?;
            continue;
        }
        let decoder: Box<dyn Read + '_> = match magic {
            [0x1f, 0x8b, ..] => Box::new(flate2::bufread::GzDecoder::new(&mut whole)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd(&mut whole)?),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => {
                Box::new(xz(&mut whole, Stream::new_stream_decoder(XZ_MEMORY, 0))?)
            }
            [0x02, 0x21, 0x4c, 0x18, ..] => Box::new(Lz4Legacy::new(&mut whole)?),
            [0x5d, 0, 0, ..] => Box::new(xz(&mut whole, Stream::new_lzma_decoder(XZ_MEMORY))?),
            _ => return Err(InitramfsError::Compression(magic)),
        };
        let mut inside = Counted::new(BufReader::with_capacity(64 << 10, decoder), *budget);
        inside.ratio = Some((unpacked, &packed));
        let read = archives(&mut inside, &mut contents);
        unpacked += *budget - inside.left;
        *budget = inside.left;
        read?;
    }
    Err(InitramfsError::Limit("it has too many archives"))
}

fn zstd<R: Read>(
    source: R,
) -> Result<ruzstd::decoding::StreamingDecoder<R, ruzstd::decoding::FrameDecoder>> {
    ruzstd::decoding::StreamingDecoder::new_with_max_window_size(source, MAX_WINDOW)
        .map_err(|e| io::Error::other(e).into())
}

fn xz<R: BufRead>(
    source: R,
    decoder: std::result::Result<Stream, liblzma::stream::Error>,
) -> Result<XzDecoder<R>> {
    Ok(XzDecoder::new_stream(
        source,
        decoder.map_err(io::Error::from)?,
    ))
}

fn is_cpio(magic: &[u8; 6]) -> bool {
    matches!(magic, b"070701" | b"070702")
}

/// Skips the zeroes between archives and gives the first bytes of the next; `None` at the end.
fn next_magic(input: &mut impl BufRead) -> Result<Option<[u8; 6]>> {
    loop {
        let buffer = input.fill_buf()?;
        if buffer.is_empty() {
            return Ok(None);
        }
        let zeroes = buffer.iter().take_while(|b| **b == 0).count();
        let all = zeroes == buffer.len();
        input.consume(zeroes);
        if !all {
            break;
        }
    }
    let mut magic = [0; 6];
    input.read_exact(&mut magic)?;
    Ok(Some(magic))
}

/// Several archives in one compressed stream, read to the end of that stream.
fn archives(input: &mut Counted<'_, impl Read>, contents: &mut Contents) -> Result<()> {
    loop {
        let mut first = [0; 1];
        if input.read(&mut first)? == 0 {
            return Ok(());
        }
        if first[0] == 0 {
            continue;
        }
        let mut magic = [first[0], 0, 0, 0, 0, 0];
        input.read_exact(&mut magic[1..])?;
        if !is_cpio(&magic) {
            return Err(InitramfsError::Cpio {
                offset: 0,
                what: "not a cpio archive (newc)",
            });
        }
        let left = input.left;
        let mut whole = Counted::new(Cursor::new(magic).chain(&mut *input), left);
        archive(&mut whole, contents)?;
    }
}

/// One archive up to its trailer.
fn archive(input: &mut Counted<'_, impl Read>, contents: &mut Contents) -> Result<()> {
    let mut at = 0u64;
    loop {
        let offset = at;
        let bad = |what| InitramfsError::Cpio { offset, what };
        let mut header = [0; 110];
        input.read_exact(&mut header).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => bad("the archive is cut off"),
            _ => e.into(),
        })?;
        if !header.starts_with(b"070701") && !header.starts_with(b"070702") {
            return Err(bad("no header where one belongs"));
        }
        let field = |n: usize| -> Result<u32> {
            let start = 6 + n * 8;
            let text = header.get(start..start + 8).unwrap_or_default();
            let text = std::str::from_utf8(text).map_err(|_| bad("a field is not a number"))?;
            // from_str_radix takes a sign.
            if !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad("a field is not a number"));
            }
            u32::from_str_radix(text, 16).map_err(|_| bad("a field is not a number"))
        };
        let (size, name_len) = (u64::from(field(6)?), field(11)?);
        if name_len == 0 || name_len > MAX_NAME {
            return Err(bad("the length of a name is impossible"));
        }
        let mut name = vec![0; name_len as usize];
        input.read_exact(&mut name)?;
        skip(input, pad(110 + u64::from(name_len)))?;
        at += 110 + u64::from(name_len) + pad(110 + u64::from(name_len));
        while name.last() == Some(&0) {
            name.pop();
        }
        if name == b"TRAILER!!!" {
            return Ok(());
        }
        contents.files += 1;
        if contents.files > MAX_ENTRIES {
            return Err(InitramfsError::Limit("it has too many files"));
        }
        // A name that is not text is no name of a module.
        let name = String::from_utf8_lossy(&name);
        entry(input, &name, size, contents)?;
        skip(input, pad(size))?;
        at += size + pad(size);
    }
}

/// Takes note of one file, whose contents are next in `input`.
fn entry(input: &mut impl Read, name: &str, size: u64, contents: &mut Contents) -> Result<()> {
    let name = name.trim_start_matches("./").trim_start_matches('/');
    if let Some((folder, file)) = name.rsplit_once('/')
        && (folder.ends_with("bin"))
        && !file.is_empty()
    {
        contents.programs.insert(file.to_string());
    }
    let below = name.strip_prefix("usr/").unwrap_or(name);
    let Some((version, path)) = below
        .strip_prefix("lib/modules/")
        .and_then(|rest| rest.split_once('/'))
    else {
        return skip(input, size);
    };
    if let Some(module) = modules::name_of_file(path) {
        contents
            .modules
            .entry(version.to_string())
            .or_default()
            .insert(module);
        return skip(input, size);
    }
    let list = match path {
        "modules.dep" => &mut contents.dep,
        "modules.builtin" => &mut contents.builtin,
        _ => return skip(input, size),
    };
    if size > MAX_LIST {
        return Err(InitramfsError::Limit("a list of modules is too long"));
    }
    let mut bytes = vec![0; size as usize];
    input.read_exact(&mut bytes)?;
    list.insert(
        version.to_string(),
        String::from_utf8_lossy(&bytes).into_owned(),
    );
    Ok(())
}

fn pad(len: u64) -> u64 {
    len.wrapping_neg() & 3
}

fn skip(input: &mut impl Read, len: u64) -> Result<()> {
    if io::copy(&mut input.take(len), &mut io::sink())? < len {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(())
}

/// Stops what never ends, and what unpacks to far more than files of a Linux do.
struct Counted<'p, R> {
    inner: R,
    left: u64,
    /// What came out before, and how much was packed up to here.
    ratio: Option<(u64, &'p Cell<u64>)>,
}

impl<R: Read> Counted<'_, R> {
    fn new(inner: R, left: u64) -> Self {
        Self {
            inner,
            left,
            ratio: None,
        }
    }
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.left = self
            .left
            .checked_sub(n as u64)
            .ok_or_else(|| io::Error::other("it unpacks to too much"))?;
        if let Some((unpacked, packed)) = &mut self.ratio {
            *unpacked += n as u64;
            if *unpacked > SMALL + packed.get() * MAX_RATIO {
                let error = format!("it unpacks to more than {MAX_RATIO} times its size");
                return Err(io::Error::other(error));
            }
        }
        Ok(n)
    }
}

/// Counts what is read.
struct Tally<'p, R> {
    inner: R,
    read: &'p Cell<u64>,
}

impl<R: Read> Read for Tally<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.read.set(self.read.get() + n as u64);
        Ok(n)
    }
}

/// The frame format of `lz4 -l`, which is what Linux takes: a magic, then blocks with their length.
struct Lz4Legacy<R> {
    input: R,
    block: Vec<u8>,
    at: usize,
}

const LZ4_BLOCK: usize = 8 << 20;

impl<R: Read> Lz4Legacy<R> {
    fn new(mut input: R) -> io::Result<Self> {
        input.read_exact(&mut [0; 4])?;
        Ok(Self {
            input,
            block: Vec::new(),
            at: 0,
        })
    }

    /// `false` at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        let mut len = [0; 4];
        if self.input.read(&mut len[..1])? == 0 {
            return Ok(false);
        }
        self.input.read_exact(&mut len[1..])?;
        let len = u32::from_le_bytes(len) as usize;
        // The zeroes after the last block.
        if len == 0 {
            return Ok(false);
        }
        if len > LZ4_BLOCK + LZ4_BLOCK / 255 + 16 {
            return Err(io::Error::other("an LZ4 block is too long"));
        }
        let mut packed = vec![0; len];
        self.input.read_exact(&mut packed)?;
        self.block.resize(LZ4_BLOCK, 0);
        let n =
            lz4_flex::block::decompress_into(&packed, &mut self.block).map_err(io::Error::other)?;
        self.block.truncate(n);
        self.at = 0;
        Ok(true)
    }
}

impl<R: Read> Read for Lz4Legacy<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at == self.block.len() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let rest = &self.block[self.at..];
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        self.at += n;
        Ok(n)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    /// A cpio archive, written independently of the reader's field order.
    pub fn cpio(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, data) in files.iter().chain([&("TRAILER!!!", &b""[..])]) {
            let mode = 0o100_644;
            let (size, name_len) = (data.len(), name.len() + 1);
            write!(
                out,
                "070701{:08X}{mode:08X}{:08X}{:08X}{:08X}{:08X}{size:08X}{:08X}{:08X}{:08X}{:08X}{name_len:08X}{:08X}",
                1, 0, 0, 1, 0, 0, 0, 0, 0, 0
            )
            .unwrap();
            out.extend(name.as_bytes());
            out.push(0);
            out.resize(out.len().next_multiple_of(4), 0);
            out.extend(*data);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    fn sample() -> Vec<u8> {
        cpio(&[
            (
                "usr/lib/modules/6.1/kernel/drivers/block/virtio_blk.ko.xz",
                b"abc",
            ),
            ("./lib/modules/6.1/kernel/drivers/ata/ahci.ko", b""),
            (
                "usr/lib/modules/6.1/modules.dep",
                b"kernel/drivers/ata/ahci.ko:\n",
            ),
            ("usr/sbin/lvm", b"#!"),
        ])
    }

    fn check(bytes: &[u8]) {
        let contents = scan(bytes, &mut MAX_UNPACKED.clone()).unwrap();
        assert_eq!(
            contents.modules["6.1"],
            BTreeSet::from(["virtio_blk".to_string(), "ahci".to_string()])
        );
        assert!(contents.dep["6.1"].starts_with("kernel/drivers"));
        assert!(contents.programs.contains("lvm"));
    }

    fn pack(program: &str, args: &[&str], bytes: &[u8]) -> Option<Vec<u8>> {
        crate::tool::find(program).or_else(|| {
            eprintln!("SKIP {program} is not installed");
            None
        })?;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let out = crate::tool::Cmd::new(program)
            .args(args)
            .stdin(std::fs::File::open(file.path()).unwrap())
            .run()
            .unwrap();
        Some(out.stdout)
    }

    #[test]
    fn all_compressions_after_an_early_archive() {
        let early = cpio(&[("kernel/x86/microcode/GenuineIntel.bin", b"code")]);
        let both = |packed: &[u8]| {
            let mut bytes = early.clone();
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            bytes.extend(packed);
            bytes.extend([0; 8]);
            check(&bytes);
        };
        both(&sample());
        for (program, args) in [
            ("gzip", &["-c"][..]),
            ("zstd", &["-c", "-19"]),
            ("xz", &["-c", "--check=crc32"]),
            ("xz", &["-c", "--format=lzma"]),
            ("lz4", &["-c", "-l"]),
        ] {
            if let Some(packed) = pack(program, args, &sample()) {
                both(&packed);
            }
        }
        // What `lz4 -l` makes, in case it is not installed.
        let block = lz4_flex::block::compress(&sample());
        let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
        packed.extend((block.len() as u32).to_le_bytes());
        packed.extend(block);
        both(&packed);
    }

    /// One compressed archive in front of another, as dracut and mkinitcpio may leave them.
    #[test]
    fn archives_in_a_row() {
        let one = cpio(&[("usr/lib/modules/6.1/kernel/drivers/ata/ahci.ko", b"x")]);
        let two = cpio(&[
            ("usr/lib/modules/6.1/kernel/a/virtio-blk.ko.zst", b"y"),
            ("usr/lib/modules/6.1/modules.dep", b"kernel/drivers/x:\n"),
            ("bin/lvm", b""),
        ]);
        let gzip = |bytes: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let mut row = gzip(&one);
        row.extend([0; 100]);
        row.extend(gzip(&two));
        check(&row);
        let mut inside = one.clone();
        inside.extend([0; 12]);
        inside.extend(two);
        check(&gzip(&inside));
    }

    #[test]
    fn hostile_archives_are_errors() {
        let good = sample();
        let huge_name = {
            let mut bytes = good.clone();
            bytes[94..102].copy_from_slice(b"7FFFFFFF");
            bytes
        };
        let huge_file = {
            let mut bytes = good.clone();
            bytes[54..62].copy_from_slice(b"FFFFFFFF");
            bytes
        };
        let signed = {
            let mut bytes = good.clone();
            bytes[54..62].copy_from_slice(b"+0000003");
            bytes
        };
        let huge_list = {
            let mut bytes = cpio(&[("lib/modules/1/modules.dep", b"")]);
            bytes[54..62].copy_from_slice(b"F0000000");
            bytes
        };
        for (bytes, says) in [
            (&b""[..], "empty"),
            (&[0; 4096], "empty"),
            (&good[..200], "cut off"),
            (&good[..112], "reading it"),
            (&huge_name, "length of a name"),
            (&huge_file, "reading it"),
            (&signed, "not a number"),
            (&huge_list, "too long"),
            (b"BZh91AY&SY", "compression"),
            (b"070701", "cut off"),
            (b"070", "reading it"),
            (&[0x1f, 0x8b, 8, 0, 1, 2, 3, 4], "reading it"),
            (&[0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff, 0xff], "reading it"),
            (b"\xfd7zXZ\0\0\x04", "reading it"),
            (
                &[0x02, 0x21, 0x4c, 0x18, 0xff, 0xff, 0xff, 0xff],
                "reading it",
            ),
            (
                &[0x5d, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
                "reading it",
            ),
        ] {
            let error = scan(bytes, &mut MAX_UNPACKED.clone())
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(says),
                "{error} for {:02x?}",
                &bytes[..bytes.len().min(16)]
            );
        }
        // A bomb: a gigabyte and more of zeroes between archives, and no end to it.
        let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let zeroes = vec![0; 16 << 20];
        for _ in 0..4 {
            bomb.write_all(&zeroes).unwrap();
        }
        let bomb = bomb.finish().unwrap();
        let mut left = Counted::new(flate2::read::GzDecoder::new(&bomb[..]), 1 << 20);
        let error = archives(&mut left, &mut Contents::default()).unwrap_err();
        assert!(matches!(error, InitramfsError::Io(_)), "{error}");
        let mut budget = MAX_UNPACKED;
        let error = scan(&bomb[..], &mut budget).unwrap_err();
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.contains("32 times"), "{why}");
        assert!(budget > MAX_UNPACKED - (20 << 20));
    }
}
