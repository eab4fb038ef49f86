//! The member table of a tar archive, as far as an OVA needs it.
//!
//! Reads headers and seeks over contents, so a large archive costs a few reads. Knows POSIX ustar,
//! GNU long names and base-256 sizes, and pax `path` and `size`; a sparse member is an error and
//! anything that is not a regular file is passed over (a link must not stand for a disk).
//! Specification: POSIX.1-2017 pax, and the GNU tar manual, "Basic Tar Format".

use std::io::{self, Read, Seek, SeekFrom};

const BLOCK: usize = 512;
const MAX_MEMBERS: usize = 10_000;
/// Long names and pax records.
const MAX_EXTRA: u64 = 1 << 20;
const SPARSE: &str = "a sparse member, which an OVA cannot have";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    pub offset: u64,
    pub size: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("tar header at byte {offset}: {reason}")]
    Header { offset: u64, reason: &'static str },
    #[error("{name} ends at byte {end} of an archive of {size} bytes: the archive is cut short")]
    Truncated { name: String, end: u64, size: u64 },
    #[error("more than {MAX_MEMBERS} members")]
    TooMany,
    #[error("reading")]
    Io(#[from] io::Error),
}

/// The regular files of the archive, in its order.
pub fn members<R: Read + Seek>(mut archive: R) -> Result<Vec<Member>, TarError> {
    let total = archive.seek(SeekFrom::End(0))?;
    let mut list = Vec::new();
    let (mut at, mut headers) = (0u64, 0usize);
    let (mut long_name, mut pax_size): (Option<String>, Option<u64>) = (None, None);
    while at.saturating_add(BLOCK as u64) <= total {
        let error = |reason| TarError::Header { offset: at, reason };
        let mut header = [0u8; BLOCK];
        archive.seek(SeekFrom::Start(at))?;
        archive.read_exact(&mut header)?;
        if header.iter().all(|b| *b == 0) {
            break;
        }
        headers += 1;
        if headers > MAX_MEMBERS {
            return Err(TarError::TooMany);
        }
        if number(&header[148..156]) != Some(checksum(&header)) {
            return Err(error("wrong checksum, or not a tar archive"));
        }
        let kind = header[156];
        let own_size = number(&header[124..136]).ok_or_else(|| error("no valid size"))?;
        let meta = matches!(kind, b'L' | b'K' | b'x' | b'g');
        let size = if meta {
            own_size
        } else {
            pax_size.take().unwrap_or(own_size)
        };
        let start = at + BLOCK as u64;
        let end = start
            .checked_add(size)
            .ok_or_else(|| error("no valid size"))?;
        let name = match kind {
            b'0' | 0 | b'7' if long_name.is_some() => long_name.take().unwrap_or_default(),
            _ => header_name(&header),
        };
        if end > total {
            return Err(TarError::Truncated {
                name: super::clean(&name),
                end,
                size: total,
            });
        }
        match kind {
            b'0' | 0 | b'7' => list.push(Member {
                name,
                offset: start,
                size,
            }),
            b'L' | b'x' => {
                if size > MAX_EXTRA {
                    return Err(error("an extended header of more than 1 MiB"));
                }
                let mut extra = vec![0; usize::try_from(size).unwrap_or(0)];
                archive.read_exact(&mut extra)?;
                if kind == b'L' {
                    long_name = Some(text(&extra));
                } else {
                    take_pax(&extra, &mut long_name, &mut pax_size).map_err(error)?;
                }
            }
            b'S' => return Err(error(SPARSE)),
            b'K' | b'g' => {}
            // Links, directories, devices.
            _ => long_name = None,
        }
        at = end
            .checked_next_multiple_of(BLOCK as u64)
            .ok_or_else(|| error("no valid size"))?;
    }
    if list.is_empty() {
        return Err(TarError::Header {
            offset: 0,
            reason: "no files, or not a tar archive",
        });
    }
    Ok(list)
}

/// What the records of an extended header say of the next member.
fn take_pax(
    extra: &[u8],
    name: &mut Option<String>,
    size: &mut Option<u64>,
) -> Result<(), &'static str> {
    for (key, value) in pax_records(extra).ok_or("bad pax data")? {
        match key {
            b"path" => *name = Some(text(value)),
            b"size" => {
                let found = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
                *size = Some(found.ok_or("bad pax size")?);
            }
            key if key.starts_with(b"GNU.sparse") => return Err(SPARSE),
            _ => {}
        }
    }
    Ok(())
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    crate::disk::charset::text_of(&bytes[..end])
}

fn header_name(header: &[u8; BLOCK]) -> String {
    let name = text(&header[..100]);
    // The prefix field is POSIX; GNU tar keeps other things there ("ustar  ").
    if &header[257..263] == b"ustar\0" && header[345] != 0 {
        format!("{}/{name}", text(&header[345..500]))
    } else {
        name
    }
}

/// Octal text, or base 256 when the first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    match field {
        [first, rest @ ..] if first & 0x80 != 0 => {
            let start = u64::from(first & 0x7f);
            rest.iter().try_fold(start, |n, byte| {
                n.checked_mul(256)?.checked_add(u64::from(*byte))
            })
        }
        _ => {
            let text = std::str::from_utf8(field).ok()?;
            let text = text.trim_matches(['\0', ' ']);
            match text {
                "" => Some(0),
                _ if text.bytes().all(|b| b.is_ascii_digit()) => u64::from_str_radix(text, 8).ok(),
                _ => None,
            }
        }
    }
}

fn checksum(header: &[u8; BLOCK]) -> u64 {
    let field = 148..156;
    let bytes = header.iter().enumerate();
    bytes
        .map(|(n, b)| u64::from(if field.contains(&n) { b' ' } else { *b }))
        .sum()
}

/// `LENGTH KEY=VALUE\n`, the length counting itself.
fn pax_records(mut data: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut records = Vec::new();
    while !data.is_empty() && data[0] != 0 {
        let blank = data.iter().position(|b| *b == b' ')?;
        let length: usize = std::str::from_utf8(&data[..blank]).ok()?.parse().ok()?;
        let record = data.get(blank + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|b| *b == b'=')?;
        records.push((&record[..equals], &record[equals + 1..]));
        data = &data[length..];
    }
    Some(records)
}
