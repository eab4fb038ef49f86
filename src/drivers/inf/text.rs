//! The text of an INF file: parses bytes to sections of entries, with `%strings%` replaced.
//!
//! Follows Microsoft's "General syntax rules for INF files". Sections are case-insensitive, and
//! those of one name are merged. `;` starts a comment outside quotes. A `\` at the end of a line
//! continues it. `""` inside quotes is one quote. `%name%` is replaced from `[Strings]`, `%%` is
//! one `%`. A `%number%` is a directory id and stays unchanged.
//!
//! SetupAPI also replaces tokens inside quotes, which is why real INFs write
//! `"%%SystemRoot%%\System32\..."`.

use crate::text::windows_1252;
use std::collections::HashMap;

pub const MAX_BYTES: usize = 1024 * 1024;
const MAX_LINES: usize = 20_000;
const MAX_LINE: usize = 16 * 1024;
const MAX_FIELDS: usize = 1024;
/// The limit for all replaced fields together, so that a few strings cannot be multiplied without
/// end.
const MAX_EXPANDED: usize = 4 * MAX_BYTES;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InfError {
    #[error("INF is {size} bytes, more than the {MAX_BYTES} bytes allowed")]
    TooLarge { size: usize },
    #[error("INF has more than {MAX_LINES} lines")]
    TooManyLines,
    #[error("INF line {line} is too long or has too many fields")]
    LineTooLong { line: usize },
    #[error("INF line {line} has an entry before the first section")]
    NoSection { line: usize },
    #[error("INF line {line} has a section header without its closing bracket")]
    Header { line: usize },
    #[error("INF is not text: it contains control characters")]
    NotText,
    #[error("INF strings add up to more than {MAX_EXPANDED} bytes")]
    TooExpanded,
    #[error("INF has no [{0}] section")]
    MissingSection(&'static str),
    #[error("INF [{section}] has no usable {key}: {reason}")]
    Bad {
        section: String,
        key: String,
        reason: String,
    },
    #[error("INF names nothing for {target}")]
    NoModels { target: String },
}

/// One line of a section: `key = value, value` or just `value, value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfEntry {
    pub line: usize,
    pub key: Option<Field>,
    pub values: Vec<Field>,
}

/// A field as written in the file and with its strings replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Field {
    pub raw: String,
    pub text: String,
}

impl InfEntry {
    pub fn is(&self, key: &str) -> bool {
        self.key
            .as_ref()
            .is_some_and(|k| k.text.eq_ignore_ascii_case(key))
    }

    /// The value at that index, or an empty string.
    pub fn value(&self, index: usize) -> &str {
        self.values.get(index).map_or("", |f| f.text.as_str())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// The name as first written in the file.
    pub name: String,
    pub entries: Vec<InfEntry>,
}

impl Section {
    pub fn entry(&self, key: &str) -> Option<&InfEntry> {
        self.entries.iter().find(|e| e.is(key))
    }

    /// The first value of the entry with that key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.entry(key).map(|e| e.value(0))
    }

    /// Every value of every entry with that key.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.entries
            .iter()
            .filter(move |e| e.is(key))
            .flat_map(|e| e.values.iter().map(|f| f.text.as_str()))
            .filter(|v| !v.is_empty())
    }
}

/// The sections of an INF, in the order of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InfText {
    sections: Vec<Section>,
    index: HashMap<String, usize>,
}

impl InfText {
    pub fn parse(bytes: &[u8]) -> Result<Self, InfError> {
        if bytes.len() > MAX_BYTES {
            return Err(InfError::TooLarge { size: bytes.len() });
        }
        // DOS editors end a file with Ctrl-Z. A return alone must not survive inside quotes.
        let text = decode(bytes)
            .replace("\r\n", "\n")
            .replace('\r', "\n")
            .replace('\u{1a}', "");
        if text.contains(|c: char| c.is_ascii_control() && !matches!(c, '\n' | '\t' | '\u{c}')) {
            return Err(InfError::NotText);
        }
        let mut inf = Self::default();
        let mut current = None;
        for (line, content) in logical_lines(&text)? {
            if let Some(rest) = content.strip_prefix('[') {
                let name = rest.split(']').next().unwrap_or_default();
                if !rest.contains(']') {
                    return Err(InfError::Header { line });
                }
                current = Some(inf.open(name.trim().trim_matches('"')));
                continue;
            }
            let section = current.ok_or(InfError::NoSection { line })?;
            let entry = parse_entry(line, &content)?;
            if let Some(section) = inf.sections.get_mut(section) {
                section.entries.push(entry);
            }
        }
        inf.expand()?;
        Ok(inf)
    }

    pub fn section(&self, name: &str) -> Option<&Section> {
        let index = *self.index.get(&name.to_ascii_lowercase())?;
        self.sections.get(index)
    }

    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    fn open(&mut self, name: &str) -> usize {
        let next = self.sections.len();
        let index = *self.index.entry(name.to_ascii_lowercase()).or_insert(next);
        if index == next {
            self.sections.push(Section {
                name: name.to_string(),
                entries: Vec::new(),
            });
        }
        index
    }

    /// The tables of `[Strings]` and, for entries missing there, of `[Strings.0409]` and the
    /// others.
    fn strings(&self) -> HashMap<String, String> {
        let mut tables: Vec<&Section> = self
            .sections
            .iter()
            .filter(|s| {
                let name = s.name.to_ascii_lowercase();
                name == "strings" || name.starts_with("strings.")
            })
            .collect();
        tables.sort_by_key(|s| match s.name.to_ascii_lowercase().as_str() {
            "strings" => 0,
            "strings.0409" => 1,
            _ => 2,
        });
        let mut strings = HashMap::new();
        for entry in tables.iter().flat_map(|s| &s.entries) {
            if let (Some(key), Some(value)) = (&entry.key, entry.values.first()) {
                strings
                    .entry(key.raw.to_ascii_lowercase())
                    .or_insert_with(|| value.raw.clone());
            }
        }
        strings
    }

    fn expand(&mut self) -> Result<(), InfError> {
        let strings = self.strings();
        let mut total = 0usize;
        for entry in self.sections.iter_mut().flat_map(|s| &mut s.entries) {
            for field in entry.key.iter_mut().chain(&mut entry.values) {
                field.text = expand(&field.raw, &strings);
                total = total.saturating_add(field.text.len());
                if total > MAX_EXPANDED {
                    return Err(InfError::TooExpanded);
                }
            }
        }
        Ok(())
    }
}

fn expand(raw: &str, strings: &HashMap<String, String>) -> String {
    let mut text = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((before, after)) = rest.split_once('%') {
        text.push_str(before);
        match after.split_once('%') {
            Some(("", tail)) => {
                text.push('%');
                rest = tail;
            }
            Some((token, tail)) => match strings.get(&token.to_ascii_lowercase()) {
                Some(value) => {
                    text.push_str(value);
                    rest = tail;
                }
                None if token.bytes().all(|b| b.is_ascii_digit()) => {
                    text.push('%');
                    text.push_str(token);
                    text.push('%');
                    rest = tail;
                }
                None => {
                    text.push('%');
                    rest = after;
                }
            },
            None => {
                text.push('%');
                rest = after;
            }
        }
    }
    text.push_str(rest);
    text
}

/// Lines without comments and trailing blanks; continuation lines are joined, with the number of
/// the first.
fn logical_lines(text: &str) -> Result<Vec<(usize, String)>, InfError> {
    let mut lines = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (i, line) in text.lines().enumerate() {
        if i >= MAX_LINES {
            return Err(InfError::TooManyLines);
        }
        let number = i + 1;
        let (body, in_quotes) = strip_comment(line);
        let body = body.trim();
        let (start, mut whole) = open.take().unwrap_or((number, String::new()));
        // A quote left open ends with its line, so a backslash there is text: `"C:\dir\`.
        let continued = if in_quotes {
            None
        } else {
            body.strip_suffix('\\')
        };
        whole.push_str(continued.unwrap_or(body));
        if whole.len() > MAX_LINE {
            return Err(InfError::LineTooLong { line: number });
        }
        if continued.is_some() {
            open = Some((start, whole));
        } else if !whole.is_empty() {
            lines.push((start, whole));
        }
    }
    if let Some((start, whole)) = open.filter(|(_, whole)| !whole.is_empty()) {
        lines.push((start, whole));
    }
    Ok(lines)
}

/// The line up to an unquoted `;`, and whether a quote is still open there.
fn strip_comment(line: &str) -> (&str, bool) {
    let mut quoted = false;
    for (i, c) in line.char_indices() {
        match c {
            '"' => quoted = !quoted,
            ';' if !quoted => return (&line[..i], false),
            _ => {}
        }
    }
    (line, quoted)
}

fn parse_entry(line: usize, content: &str) -> Result<InfEntry, InfError> {
    let mut key = None;
    let mut values = Vec::new();
    let mut field = String::new();
    // Blanks count only between other characters or inside quotes.
    let mut blanks = String::new();
    let mut quoted = false;
    let mut chars = content.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                field.push('"');
            }
            '"' => {
                field.push_str(&blanks);
                blanks.clear();
                quoted = !quoted;
            }
            '=' if !quoted && key.is_none() && values.is_empty() => {
                key = Some(Field {
                    raw: std::mem::take(&mut field),
                    text: String::new(),
                });
                blanks.clear();
            }
            ',' if !quoted => {
                if values.len() >= MAX_FIELDS {
                    return Err(InfError::LineTooLong { line });
                }
                values.push(Field {
                    raw: std::mem::take(&mut field),
                    text: String::new(),
                });
                blanks.clear();
            }
            c if c.is_whitespace() && !quoted => {
                if !field.is_empty() {
                    blanks.push(c);
                }
            }
            c => {
                field.push_str(&blanks);
                blanks.clear();
                field.push(c);
            }
        }
    }
    values.push(Field {
        raw: field,
        text: String::new(),
    });
    Ok(InfEntry { line, key, values })
}

/// Decodes UTF-16 with a byte order mark, UTF-8 with or without one, or else Windows-1252.
pub fn decode(bytes: &[u8]) -> String {
    let utf16 = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
        let units: Vec<u16> = bytes.chunks_exact(2).map(|b| unit([b[0], b[1]])).collect();
        String::from_utf16_lossy(&units)
    };
    match bytes {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
        [0xef, 0xbb, 0xbf, rest @ ..] => String::from_utf8_lossy(rest).into_owned(),
        _ => match std::str::from_utf8(bytes) {
            Ok(text) => text.to_string(),
            Err(_) => bytes.iter().map(|&b| windows_1252(b)).collect(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(line: &str) -> (Option<String>, Vec<String>) {
        let inf = InfText::parse(format!("[s]\n{line}\n[Strings]\nA=\"a, b\"\nreg=1\n").as_bytes())
            .unwrap();
        let entry = &inf.section("S").unwrap().entries[0];
        (
            entry.key.as_ref().map(|k| k.text.clone()),
            entry.values.iter().map(|v| v.text.clone()).collect(),
        )
    }

    #[test]
    fn entries() {
        let cases: &[(&str, Option<&str>, &[&str])] = &[
            ("k = v ; c", Some("k"), &["v"]),
            ("a, b c ,\"d, ;e\" ,", None, &["a", "b c", "d, ;e", ""]),
            (r#"x = "say ""hi""""#, Some("x"), &[r#"say "hi""#]),
            (
                "%A% = %a%, %%A%%, %12%\\x.sys, %no%, 5%",
                Some("a, b"),
                &["a, b", "%A%", "%12%\\x.sys", "%no%", "5%"],
            ),
            ("a = b, \\\n  c, \\ ; why\n d", Some("a"), &["b", "c", "d"]),
            (r#"p = "C:\dir\""#, Some("p"), &[r"C:\dir\"]),
            (r#"q = "open \"#, Some("q"), &["open \\"]),
            (
                r#"HKR,,E,%reg%,"%%SystemRoot%%\x""#,
                None,
                &["HKR", "", "E", "1", r"%SystemRoot%\x"],
            ),
            ("v = a=b", Some("v"), &["a=b"]),
            // A key stands before the first comma, and an equals sign in quotes is none.
            ("HKR,,Name,,a=b", None, &["HKR", "", "Name", "", "a=b"]),
            ("a, k = v", None, &["a", "k = v"]),
            (r#""k=1" = v"#, Some("k=1"), &["v"]),
            (r#"w = "a "" , b",c"#, Some("w"), &["a \" , b", "c"]),
            (r#"b = a "b"c "d" "#, Some("b"), &["a bc d"]),
            ("m = %no%a%,%12%a%", Some("m"), &["%noa, b", "%12%a%"]),
            ("*IfType = 6", Some("*IfType"), &["6"]),
        ];
        for (line, key, values) in cases {
            let (got_key, got) = fields(line);
            assert_eq!(got_key.as_deref(), *key, "{line}");
            assert_eq!(got, *values, "{line}");
        }
    }

    #[test]
    fn encodings() {
        let text = "[Strings]\r\nN=\"Gerät\"\r\n";
        let utf16: Vec<u16> = text.encode_utf16().collect();
        let le: Vec<u8> = [0xff, 0xfe]
            .into_iter()
            .chain(utf16.iter().flat_map(|u| u.to_le_bytes()))
            .collect();
        let be: Vec<u8> = [0xfe, 0xff]
            .into_iter()
            .chain(utf16.iter().flat_map(|u| u.to_be_bytes()))
            .collect();
        let bom: Vec<u8> = [&[0xef, 0xbb, 0xbf], text.as_bytes()].concat();
        let latin: Vec<u8> = text
            .chars()
            .map(|c| u8::try_from(u32::from(c)).unwrap())
            .collect();
        for bytes in [text.as_bytes().to_vec(), le, be, bom, latin] {
            let inf = InfText::parse(&bytes).unwrap();
            assert_eq!(inf.section("strings").unwrap().get("n"), Some("Gerät"));
        }
        assert_eq!(decode(b"\x80\x99\xfc\xff"), "€™üÿ");
    }

    #[test]
    fn sections_merge_and_localised_strings_only_fill_gaps() {
        let inf = InfText::parse(
            b"[a]\nx=%s%\n[Strings.0407]\ns=de\nt=de\n[Strings.0409]\nt=en\n[A]\ny=%t%\n[Strings]\ns=base\n",
        )
        .unwrap();
        let a = inf.section("a").unwrap();
        assert_eq!((a.get("X"), a.get("Y")), (Some("base"), Some("en")));
    }

    #[test]
    fn bad_text() {
        let cases: Vec<(Vec<u8>, InfError)> = vec![
            (
                vec![b' '; MAX_BYTES + 1],
                InfError::TooLarge {
                    size: MAX_BYTES + 1,
                },
            ),
            (vec![b'\n'; MAX_LINES + 1], InfError::TooManyLines),
            (b"x=1".to_vec(), InfError::NoSection { line: 1 }),
            (b"\n[x".to_vec(), InfError::Header { line: 2 }),
            (b"[x]\n\0\0".to_vec(), InfError::NotText),
            (b"[x]\na=\x1b[31m".to_vec(), InfError::NotText),
            (
                [b"[x]\n".to_vec(), vec![b','; MAX_FIELDS + 1]].concat(),
                InfError::LineTooLong { line: 2 },
            ),
            (
                [b"[x]\n".to_vec(), vec![b'a'; MAX_LINE + 1]].concat(),
                InfError::LineTooLong { line: 2 },
            ),
        ];
        for (bytes, error) in cases {
            assert_eq!(InfText::parse(&bytes).unwrap_err(), error);
        }
        let mut bomb = format!("[Strings]\na=\"{}\"\n[x]\n", "x".repeat(8000));
        for _ in 0..200 {
            bomb.push_str(&"%a%".repeat(100));
            bomb.push('\n');
        }
        assert_eq!(
            InfText::parse(bomb.as_bytes()).unwrap_err(),
            InfError::TooExpanded
        );
    }

    /// A file at each limit is read.
    #[test]
    fn the_limits_themselves_are_allowed() {
        let largest = vec![b' '; MAX_BYTES];
        assert_eq!(InfText::parse(&largest), Ok(InfText::default()));
        assert!(InfText::parse(&vec![b'\n'; MAX_LINES]).is_ok());
        let longest = [b"[x]\n".to_vec(), vec![b'a'; MAX_LINE]].concat();
        let inf = InfText::parse(&longest).unwrap();
        assert_eq!(
            inf.section("x").unwrap().entries[0].value(0).len(),
            MAX_LINE
        );
        let most = [b"[x]\n".to_vec(), vec![b','; MAX_FIELDS]].concat();
        let inf = InfText::parse(&most).unwrap();
        assert_eq!(
            inf.section("x").unwrap().entries[0].values.len(),
            MAX_FIELDS + 1
        );
        // Counted are the string itself with its name, and each value that it is put into.
        let name = format!("[Strings]\na=\"{}\"\n[x]\n", "x".repeat(16_000));
        let left = MAX_EXPANDED - 1 - 262 * 16_000;
        let values = ["%a%".repeat(200), "%a%".repeat(61) + &"y".repeat(left)].join("\n");
        assert!(InfText::parse((name.clone() + &values).as_bytes()).is_ok());
        let error = InfText::parse((name + &values + "y").as_bytes()).unwrap_err();
        assert_eq!(error, InfError::TooExpanded);
        // A continued line counts as one.
        let halves = format!("[x]\n{}\\\n{}", "a".repeat(MAX_LINE), "b");
        let error = InfText::parse(halves.as_bytes()).unwrap_err();
        assert_eq!(error, InfError::LineTooLong { line: 3 });
    }

    #[test]
    fn lines_are_told_apart_whoever_wrote_them() {
        let text =
            b"; head\r\n[ \"A b\" ] ; why\rx = 1\r\n\ty = 2 \\\r\n   , 3\n\x0c\n[C]no\nz=\\\n\x1a";
        let inf = InfText::parse(text).unwrap();
        let names: Vec<_> = inf.sections().iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["A b", "C"]);
        let entries = |name: &str| {
            let entries = inf.section(name).unwrap().entries.iter();
            let shown = entries.map(|e| {
                let key = e.key.as_ref().map_or("", |k| k.text.as_str());
                let values: Vec<_> = e.values.iter().map(|v| v.text.as_str()).collect();
                format!("{} {key}={}", e.line, values.join("|"))
            });
            shown.collect::<Vec<_>>()
        };
        assert_eq!(entries("a B"), ["3 x=1", "4 y=2|3"]);
        assert_eq!(entries("c"), ["8 z="]);
        assert!(inf.section("b").is_none());
    }

    /// The first of two strings with one name counts, and only tables of strings are read.
    #[test]
    fn a_string_is_the_first_of_its_name_in_the_tables_of_strings() {
        let inf = InfText::parse(
            b"[Strings]\na=1\nA=2\nnested=%a%\n=none\n[Strings.0409]\nb=3\n[Strings2]\nc=4\n\
              [x]\nv = %a%,%B%,%c%,%nested%,%a,%%%a%%%,%12%,%1a%\nw = 1\nw = 2, ,3\nW = 4\n",
        )
        .unwrap();
        let x = inf.section("x").unwrap();
        let values: Vec<_> = x.entries[0].values.iter().map(|v| &*v.text).collect();
        assert_eq!(
            values,
            ["1", "3", "%c%", "%a%", "%a", "%1%", "%12%", "%1a%"]
        );
        assert_eq!(x.entries[0].values[0].raw, "%a%");
        assert_eq!(x.get("w"), Some("1"));
        assert_eq!(x.all("w").collect::<Vec<_>>(), ["1", "2", "3", "4"]);
        assert_eq!(x.get("q"), None);
        assert_eq!(x.entries[0].value(99), "");
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400),
                        text in "[\\[\\]a%\",=; \\\\\n]{0,120}") {
            let _ = InfText::parse(&bytes);
            let _ = InfText::parse(text.as_bytes());
        }
    }
}
