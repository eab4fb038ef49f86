//! VM descriptions are generated in every spelling that a format allows, and parsed without a
//! difference.
//!
//! Each case depends on its number alone. `HYPER2KVM_CASE=N` runs one.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use encoding_rs::{Encoding, UTF_8, UTF_16BE, UTF_16LE};

use super::*;

mod descriptors;
mod libvirt_files;
mod ovf_files;
mod vmx_files;

const CASES: u64 = 500;

/// Runs `check` for each case; it panics with `seed` in its message.
fn each(check: impl Fn(&mut Dice)) {
    let one = std::env::var("HYPER2KVM_CASE").ok();
    let one = one.map(|n| n.parse::<u64>().unwrap());
    for seed in one.map_or(0..CASES, |n| n..n + 1) {
        check(&mut Dice { seed, state: seed });
    }
}

/// A pseudo-random sequence (SplitMix64).
struct Dice {
    seed: u64,
    state: u64,
}

impl Dice {
    fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn maybe<T>(&mut self, value: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.coin().then(|| value(self))
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i as u64 + 1) as usize);
        }
    }

    /// Text of characters from `alphabet` and ASCII that neither begins nor ends with a space.
    fn text(&mut self, alphabet: &str) -> String {
        let letters: Vec<char> = alphabet.chars().collect();
        let plain: Vec<char> = "aZ09-_ .()+,&'<>#=%|\"".chars().collect();
        let mut text: String = (0..1 + self.below(12))
            .map(|_| match self.below(3) {
                0 => self.pick(&plain),
                _ if letters.is_empty() => self.pick(&plain),
                _ => self.pick(&letters),
            })
            .collect();
        text = text.trim().to_owned();
        text + self.pick(&["x", "9", "Q"])
    }

    /// A file name of one component, with every character allowed in a file of that format.
    fn file(&mut self, alphabet: &str, n: usize, extension: &str) -> String {
        let text = self.text(alphabet).replace(['"', '|'], "_");
        format!("{n}{text}.{extension}")
    }

    fn uuid(&mut self) -> Uuid {
        Uuid::from_u64_pair(self.number() | 1, self.number())
    }

    fn mac(&mut self) -> MacAddr {
        let [a, b, c, d, e, ..] = self.number().to_le_bytes();
        MacAddr::new([self.pick(&[0x00, 0x52, 0xfe]), a, b, c, d, e | 1]).unwrap()
    }

    /// A MAC address in a form that producers use.
    fn mac_text(&mut self, mac: MacAddr) -> String {
        let text = mac.to_string();
        match self.below(4) {
            0 => text.to_uppercase(),
            1 => text.replace(':', "-"),
            2 => text.replace(':', ""),
            _ => text,
        }
    }

    /// The letters in a random case.
    fn any_case(&mut self, text: &str) -> String {
        text.chars()
            .map(|c| {
                if self.coin() {
                    c.to_ascii_uppercase()
                } else {
                    c.to_ascii_lowercase()
                }
            })
            .collect()
    }

    fn gap(&mut self) -> &'static str {
        self.pick(&["", "", " ", "  ", "\t"])
    }

    /// Different numbers below `limit`, sorted.
    fn some_of(&mut self, count: u64, limit: u32) -> Vec<u32> {
        let mut all: Vec<u32> = (0..limit).collect();
        self.shuffle(&mut all);
        all.truncate(count as usize);
        all.sort_unstable();
        all
    }
}

/// Encodings by a label that producers use, with letters of each.
const ENCODINGS: [(&str, &str); 39] = [
    ("UTF-8", "磁盘ソфüł€𝄞"),
    ("utf8", "磁盘ソфüł€"),
    ("windows-1252", "üßéñ€"),
    ("ISO-8859-1", "üßéñ"),
    ("ISO-8859-2", "łčőž"),
    ("ISO-8859-5", "диск"),
    ("ISO-8859-15", "œ€é"),
    ("windows-1250", "łčőž"),
    ("windows-1251", "диск"),
    ("KOI8-R", "диск"),
    ("macintosh", "üé"),
    ("GBK", "磁盘服务器"),
    ("GB2312", "磁盘服务器"),
    ("GB18030", "磁盘服务器ü𠮷"),
    ("Big5", "磁碟伺服器"),
    ("Shift_JIS", "ソフト表能"),
    ("EUC-JP", "ソフト表能"),
    ("EUC-KR", "디스크"),
    ("ISO-2022-JP", "ソフト表能"),
    ("windows-874", "ดิสก์"),
    ("windows-1253", "δίσκος"),
    ("windows-1254", "şğı"),
    ("windows-1255", "דיסק"),
    ("windows-1256", "قرص"),
    ("windows-1257", "ąčę"),
    ("windows-1258", "ăđơư"),
    ("ISO-8859-3", "ĉĝħ"),
    ("ISO-8859-4", "ąķļ"),
    ("ISO-8859-6", "قرص"),
    ("ISO-8859-7", "δίσκος"),
    ("ISO-8859-8", "דיסק"),
    ("ISO-8859-10", "ąđŋ"),
    ("ISO-8859-13", "ąčę"),
    ("ISO-8859-14", "ŵŷẁ"),
    ("ISO-8859-16", "șță"),
    ("KOI8-U", "диск"),
    ("IBM866", "диск"),
    ("x-mac-cyrillic", "диск"),
    ("x-user-defined", "\u{f780}\u{f7ff}"),
];

fn encode(label: &str, text: &str) -> Vec<u8> {
    let encoding = Encoding::for_label(label.as_bytes()).unwrap();
    let (bytes, _, unmappable) = encoding.encode(text);
    assert!(!unmappable, "{label}: {text}");
    bytes.into_owned()
}

/// A document with a declaration, in any encoding that XML readers support; and the letters it may
/// contain.
struct Document {
    declaration: String,
    encoding: &'static Encoding,
    mark: bool,
    alphabet: &'static str,
}

impl Document {
    fn new(dice: &mut Dice) -> Self {
        let (label, alphabet) = dice.pick(&ENCODINGS);
        let (encoding, mark, label, alphabet) = match dice.below(6) {
            0 => (UTF_16LE, true, "UTF-16", ENCODINGS[0].1),
            1 => (UTF_16BE, true, "utf-16", ENCODINGS[0].1),
            2 => (UTF_8, dice.coin(), "", ENCODINGS[0].1),
            _ => {
                let encoding = Encoding::for_label(label.as_bytes()).unwrap();
                (encoding, encoding == UTF_8 && dice.coin(), label, alphabet)
            }
        };
        let quote = dice.pick(&["'", "\""]);
        let declared = match label {
            "" => String::new(),
            label => format!(
                " encoding{0}={0}{quote}{label}{quote}",
                dice.pick(&["", " "])
            ),
        };
        let declaration = match label.is_empty() && dice.coin() {
            true => String::new(),
            false => format!("<?xml version={quote}1.0{quote}{declared}?>\r\n"),
        };
        Self {
            declaration,
            encoding,
            mark,
            alphabet,
        }
    }

    fn bytes(&self, body: &str) -> Vec<u8> {
        let mark = if self.mark { "\u{feff}" } else { "" };
        let text = format!("{mark}{}{body}", self.declaration);
        match self.encoding {
            e if e == UTF_16LE => text.encode_utf16().flat_map(u16::to_le_bytes).collect(),
            e if e == UTF_16BE => text.encode_utf16().flat_map(u16::to_be_bytes).collect(),
            e => encode(e.name(), &text),
        }
    }
}

/// Escapes text as element content or attribute value.
fn escape(dice: &mut Dice, text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out += dice.pick(&["&amp;", "&#38;", "&#x26;"]),
            '<' => out += dice.pick(&["&lt;", "&#60;"]),
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&apos;",
            c if dice.below(10) == 0 => out += &format!("&#x{:X};", u32::from(c)),
            c => out.push(c),
        }
    }
    out
}

fn attr(dice: &mut Dice, name: &str, value: &str) -> String {
    let quote = dice.pick(&["'", "\""]);
    format!(
        " {name}{0}={0}{quote}{1}{quote}",
        dice.pick(&["", "", " "]),
        escape(dice, value)
    )
}

fn content(dice: &mut Dice, text: &str) -> String {
    let gap = dice.gap();
    match dice.below(5) {
        0 if !text.contains("]]>") => format!("{gap}<![CDATA[{text}]]>{gap}"),
        1 => format!("{gap}<!-- no -->{}{gap}", escape(dice, text)),
        _ => format!("{gap}{}{gap}", escape(dice, text)),
    }
}

/// Compares everything of a VM except the notes, which are for people.
#[track_caller]
fn assert_same(got: &SourceVm, want: &SourceVm, seed: u64, text: &[u8]) {
    let got = SourceVm {
        notes: Vec::new(),
        manifest: Manifest::default(),
        ..got.clone()
    };
    assert!(
        got == *want,
        "HYPER2KVM_CASE={seed}\n got {got:#?}\nwant {want:#?}\n{}",
        String::from_utf8_lossy(text)
    );
}
