//! Reads the dirty bitmaps of an NBD export: the ranges that were written to since each began.
//!
//! They are queried on a separate connection, because they need structured replies. A server
//! without bitmaps, or without support for the options, returns none.
//!
//! Specification: NetworkBlockDevice/nbd `doc/proto.md`, and `docs/interop/nbd.txt` of QEMU.

use std::collections::BTreeMap;

use super::Ranges;
use super::error::Result;
use super::nbd::{Names, Stream};
use crate::wire::nbd_protocol::{CMD_DISC, REP_ACK, REP_ERROR, REPLY_MAGIC, REQUEST_MAGIC};

const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_LIST_META_CONTEXT: u32 = 9;
const OPT_SET_META_CONTEXT: u32 = 10;
const REP_META_CONTEXT: u32 = 4;
const CMD_BLOCK_STATUS: u16 = 7;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const FLAG_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_BLOCK_STATUS: u16 = 5;
/// The bit of a bitmap's state that means written.
const DIRTY: u32 = 1;
/// The prefix of bitmap names in QEMU.
const BITMAPS: &str = "qemu:dirty-bitmap:";
/// The most bitmaps; no server has more.
const MAX_BITMAPS: usize = 64;
/// The limit of all chunks of one answer: a state for every 512 bytes of a step, for two bitmaps.
const MAX_ANSWER: usize = 64 << 20;
const MAX_REPLIES: usize = 4096;
/// The range of one query.
const STEP: u64 = 1 << 30;
/// Ranges closer than this are joined, or further apart if that is needed to limit their number.
const GAP: u64 = 64 << 10;
const MAX_RANGES: usize = 1 << 20;

/// The ranges in which any bitmap of the export is dirty. `None` if it has none.
pub(super) fn ranges(stream: &mut dyn Stream, flags: u16, names: &Names) -> Result<Option<Ranges>> {
    names.option(stream, OPT_STRUCTURED_REPLY, &[])?;
    if names.answer(stream, OPT_STRUCTURED_REPLY)?.0 != REP_ACK {
        return Ok(None);
    }
    let bitmaps = contexts(stream, names, OPT_LIST_META_CONTEXT, &[BITMAPS.into()])?;
    let bitmaps: Vec<String> = bitmaps.into_values().collect();
    if bitmaps.is_empty() {
        return Ok(None);
    }
    let chosen = contexts(stream, names, OPT_SET_META_CONTEXT, &bitmaps)?;
    if chosen.len() != bitmaps.len() {
        return Err(names.failed("the NBD server shows bitmaps that it does not give"));
    }
    let (size, ..) = names.go(stream, flags)?;
    let mut dirty = Gathered::default();
    let mut offset = 0;
    while offset < size {
        let length = STEP.min(size - offset);
        let told = block_status(stream, names, offset, length)?;
        let mut covered = length;
        for id in chosen.keys() {
            let states = told.get(id).map_or(&[][..], Vec::as_slice);
            let sum = states
                .iter()
                .fold(0, |sum: u64, (len, _)| sum + u64::from(*len));
            covered = covered.min(sum);
        }
        if covered == 0 {
            return Err(names.failed("the NBD server does not provide the contents of its bitmaps"));
        }
        for states in told.values() {
            let mut at = offset;
            for (len, state) in states {
                let end = (at + u64::from(*len)).min(offset + covered);
                if state & DIRTY != 0 && at < end {
                    dirty.add(at, end);
                }
                at += u64::from(*len);
            }
        }
        offset += covered;
    }
    let _ = request(stream, names, CMD_DISC, 0, 0);
    Ok(Some(dirty.ranges()))
}

/// The contexts that match the queries, by their identifiers. None if the server supports no
/// contexts.
fn contexts(
    stream: &mut dyn Stream,
    names: &Names,
    option: u32,
    queries: &[String],
) -> Result<BTreeMap<u32, String>> {
    let mut data = Vec::new();
    let mut text = |text: &str| {
        data.extend((text.len() as u32).to_be_bytes());
        data.extend(text.as_bytes());
    };
    text(&names.export);
    let mut all = Vec::new();
    for query in queries {
        all.extend((query.len() as u32).to_be_bytes());
        all.extend(query.as_bytes());
    }
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(all);
    names.option(stream, option, &data)?;
    let mut found = BTreeMap::new();
    for _ in 0..MAX_REPLIES {
        let (kind, data) = names.answer(stream, option)?;
        match kind {
            REP_ACK => return Ok(found),
            REP_META_CONTEXT if found.len() < MAX_BITMAPS => {
                let Some((id, name)) = data.split_first_chunk::<4>() else {
                    return Err(names.nonsense("a context without a number"));
                };
                let name = String::from_utf8_lossy(name).into_owned();
                // In a list each number is 0.
                let id = match option {
                    OPT_LIST_META_CONTEXT => found.len() as u32,
                    _ => u32::from_be_bytes(*id),
                };
                if name.starts_with(BITMAPS) {
                    found.insert(id, name);
                }
            }
            kind if kind & REP_ERROR != 0 => return Ok(found),
            _ => return Err(names.nonsense("too many contexts, or something else")),
        }
    }
    Err(names.nonsense("a list of contexts without an end"))
}

fn request(
    stream: &mut dyn Stream,
    names: &Names,
    command: u16,
    offset: u64,
    length: u64,
) -> Result<()> {
    let mut message = REQUEST_MAGIC.to_be_bytes().to_vec();
    message.extend(0u16.to_be_bytes());
    message.extend(command.to_be_bytes());
    message.extend(offset.to_be_bytes());
    message.extend(offset.to_be_bytes());
    message.extend((length as u32).to_be_bytes());
    stream.write_all(&message).map_err(|e| names.failed(e))
}

/// Lengths and states from `offset` on, by context. The offset also is the cookie of the request.
fn block_status(
    stream: &mut dyn Stream,
    names: &Names,
    offset: u64,
    length: u64,
) -> Result<BTreeMap<u32, Vec<(u32, u32)>>> {
    request(stream, names, CMD_BLOCK_STATUS, offset, length)?;
    let mut told = BTreeMap::new();
    let mut left = MAX_ANSWER;
    for _ in 0..MAX_REPLIES {
        let magic = u32::from_be_bytes(names.array(stream)?);
        if magic == REPLY_MAGIC {
            let errno = u32::from_be_bytes(names.array(stream)?);
            let said = std::io::Error::from_raw_os_error(errno.cast_signed());
            return Err(names.failed(format!("the NBD server answers: {said}")));
        }
        let flags = u16::from_be_bytes(names.array(stream)?);
        let kind = u16::from_be_bytes(names.array(stream)?);
        let cookie = u64::from_be_bytes(names.array(stream)?);
        let length = u32::from_be_bytes(names.array(stream)?) as usize;
        if magic != STRUCTURED_MAGIC || cookie != offset || length > left {
            return Err(names.nonsense("a reply to no request, or too long a one"));
        }
        left -= length;
        let mut data = vec![0; length];
        names.fill(stream, &mut data)?;
        match kind {
            CHUNK_BLOCK_STATUS => {
                let mut numbers = data
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|n| u32::from_be_bytes(*n));
                let id = numbers.next().unwrap_or_default();
                let states: &mut Vec<(u32, u32)> = told.entry(id).or_default();
                while let (Some(len), Some(state)) = (numbers.next(), numbers.next()) {
                    states.push((len, state));
                }
            }
            CHUNK_NONE => {}
            kind => {
                return Err(names.failed(format!("the NBD server answers with error {kind:#x}")));
            }
        }
        if flags & FLAG_DONE != 0 {
            return Ok(told);
        }
    }
    Err(names.nonsense("an answer without an end"))
}

/// Ranges that arrive in order for each bitmap, step by step.
#[derive(Default)]
struct Gathered {
    /// The end of each range by its start; they neither overlap nor are closer than the gap.
    ranges: BTreeMap<u64, u64>,
    gap: u64,
}

impl Gathered {
    fn add(&mut self, start: u64, end: u64) {
        let gap = self.gap.max(GAP);
        let (mut from, mut to) = (start, end);
        let below = self.ranges.range(..=start).next_back();
        if let Some((&at, &until)) = below
            && until.saturating_add(gap) >= start
        {
            (from, to) = (at, to.max(until));
        }
        while let Some((&at, &until)) = self.ranges.range(from..=to.saturating_add(gap)).next() {
            self.ranges.remove(&at);
            to = to.max(until);
        }
        self.ranges.insert(from, to);
        if self.ranges.len() > MAX_RANGES {
            self.gap = gap * 2;
            for (start, end) in std::mem::take(&mut self.ranges) {
                self.add(start, end);
            }
        }
    }

    fn ranges(self) -> Ranges {
        self.ranges
            .iter()
            .map(|(start, end)| (*start, end - start))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};

    use super::*;
    use crate::wire::nbd_protocol::OPTION_REPLY_MAGIC;

    /// A server that repeats the same reply for ever.
    struct Endless(Vec<u8>, usize);

    impl Read for Endless {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            for byte in &mut *buf {
                *byte = self.0[self.1 % self.0.len()];
                self.1 += 1;
            }
            Ok(buf.len())
        }
    }

    impl Write for Endless {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn answers_without_an_end_are_refused() {
        let names = Names {
            server: "the server".into(),
            export: String::new(),
        };
        for states in [0usize, 1, 1 << 17] {
            let mut chunk = STRUCTURED_MAGIC.to_be_bytes().to_vec();
            chunk.extend(0u16.to_be_bytes());
            chunk.extend(CHUNK_BLOCK_STATUS.to_be_bytes());
            chunk.extend(0u64.to_be_bytes());
            chunk.extend((4 + 8 * states as u32).to_be_bytes());
            chunk.resize(chunk.len() + 4 + 8 * states, 0);
            let answer = block_status(&mut Endless(chunk, 0), &names, 0, 512);
            let error = answer.unwrap_err().to_string();
            let ends = error.contains("without an end") || error.contains("too long");
            assert!(ends, "{states}: {error}");
        }
        let name = b"\0\0\0\x01base:allocation";
        let mut context = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        for number in [OPT_LIST_META_CONTEXT, REP_META_CONTEXT, name.len() as u32] {
            context.extend(number.to_be_bytes());
        }
        context.extend(name);
        let found = contexts(&mut Endless(context, 0), &names, OPT_LIST_META_CONTEXT, &[]);
        let error = found.unwrap_err().to_string();
        assert!(error.contains("without an end"), "{error}");
    }

    #[test]
    fn ranges_close_to_each_other_are_told_as_one() {
        let mut dirty = Gathered::default();
        for (start, end) in [
            (GAP * 10, GAP * 11),
            (0, 512),
            (GAP, GAP + 1),
            (GAP * 11, GAP * 12),
        ] {
            dirty.add(start, end);
        }
        assert_eq!(dirty.ranges(), [(0, GAP + 1), (GAP * 10, GAP * 2)]);
    }
}
