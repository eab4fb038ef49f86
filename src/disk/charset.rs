//! Text of descriptions that declare their encoding (`.encoding` of a `.vmx`, `encoding` of a
//! VMDK).
//!
//! VMware writes in the encoding of its host and labels it. The labels are those of the WHATWG
//! Encoding Standard (crate `encoding_rs`) and a few of Windows and ICU. File names in such a file
//! may be the same bytes on disk, because they were copied without conversion.
//!
//! Newer products write UTF-8 under an older label. Whether a file does is decided from all its
//! values together. Under a one-byte label, valid UTF-8 is UTF-8, because nobody writes `Ã¼`. Under
//! a two-byte label, characters of three bytes are required, because two Chinese ones can look like
//! two bytes of UTF-8 each.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use encoding_rs::{Encoding, UTF_8, UTF_16BE, UTF_16LE};

/// The encoding of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Charset(&'static Encoding);

impl Default for Charset {
    fn default() -> Self {
        Self(UTF_8)
    }
}

/// Names of Windows and ICU for encodings that have other names in the standard.
const ALIASES: [(&str, &str); 15] = [
    ("cp936", "gbk"),
    ("ms936", "gbk"),
    ("windows-936", "gbk"),
    ("cp932", "shift_jis"),
    ("ms932", "shift_jis"),
    ("windows-932", "shift_jis"),
    ("ibm-943", "shift_jis"),
    ("cp950", "big5"),
    ("ms950", "big5"),
    ("windows-950", "big5"),
    ("cp949", "euc-kr"),
    ("ms949", "euc-kr"),
    ("windows-51949", "euc-kr"),
    ("windows-51932", "euc-jp"),
    ("ibm-5348", "windows-1252"),
];

impl Charset {
    /// The declared encoding, unless the `values` are actually UTF-8. `None` for an unknown label.
    pub fn declared<'v>(label: &str, values: impl Iterator<Item = &'v [u8]>) -> Option<Self> {
        let label = label.trim().to_ascii_lowercase();
        let alias = ALIASES.iter().find(|(name, _)| *name == label);
        let label = alias.map_or(label.as_str(), |(_, name)| name);
        let declared = Encoding::for_label_no_replacement(label.as_bytes())?;
        if declared == UTF_16LE || declared == UTF_16BE {
            // The file was converted since; otherwise it could not be read as lines.
            return Some(Self(UTF_8));
        }
        let (mut wide, mut any, mut utf8, mut fits) = (false, false, true, true);
        for value in values.filter(|v| !v.is_ascii()) {
            any = true;
            utf8 &= std::str::from_utf8(value).is_ok();
            wide |= value.iter().any(|b| *b >= 0xe0);
            fits &= declared
                .decode_without_bom_handling_and_without_replacement(value)
                .is_some();
        }
        let really_utf8 = any && utf8 && (wide || declared.is_single_byte() || !fits);
        Some(Self(if really_utf8 { UTF_8 } else { declared }))
    }

    pub fn of(encoding: &'static Encoding) -> Self {
        Self(encoding)
    }

    /// Decodes text, and returns whether some of it was invalid.
    pub fn decode(self, bytes: &[u8]) -> (String, bool) {
        let (text, lossy) = self.0.decode_without_bom_handling(bytes);
        (text.into_owned(), lossy)
    }

    /// Encodes `text`; `None` if the encoding lacks a character.
    pub fn encode(self, text: &str) -> Option<Vec<u8>> {
        let (bytes, used, unmappable) = self.0.encode(text);
        (used == self.0 && !unmappable).then(|| bytes.into_owned())
    }

    /// The file below `dir` for a name in the description. It is looked up by its text, then by its
    /// bytes in this encoding, then by the bytes `raw` of the description. The first one if none
    /// exists; `None` if the name leads out of `dir`.
    pub fn below(self, dir: &Path, name: &str, raw: &[u8]) -> Option<PathBuf> {
        let name = name.replace('\\', "/");
        let names = self.spellings(&name, raw).into_iter();
        let mut paths = names.map(|n| inside(dir, &n));
        let first = paths.next()??;
        if first.exists() {
            return Some(first);
        }
        Some(paths.flatten().find(|p| p.exists()).unwrap_or(first))
    }

    /// The possible file names on disk: the text, its bytes in this encoding, the bytes `raw` of
    /// the description.
    pub fn spellings(self, text: &str, raw: &[u8]) -> Vec<OsString> {
        let mut names = vec![OsString::from(text)];
        let bytes = self.encode(text).into_iter();
        for name in bytes.chain([raw.to_owned()]).map(OsString::from_vec) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

/// A file name in the encoding of the file that contains it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Name {
    pub text: String,
    raw: Vec<u8>,
    charset: Charset,
}

impl Name {
    pub fn new(charset: Charset, raw: &[u8]) -> Self {
        Self {
            text: charset.decode(raw).0,
            raw: raw.to_owned(),
            charset,
        }
    }

    /// Calls [`Charset::below`] for this name.
    pub fn below(&self, dir: &Path) -> Option<PathBuf> {
        self.charset.below(dir, &self.text, &self.raw)
    }

    /// The possible file names on disk, the likeliest first.
    pub fn spellings(&self) -> Vec<OsString> {
        let mut names = self.charset.spellings(&self.text, &self.raw);
        if self.text.contains('\\') {
            names.push(self.text.replace('\\', "/").into());
        }
        names
    }

    /// The last component of an absolute path on the old host.
    pub fn moved(&self) -> Option<Self> {
        let text = self.text.replace('\\', "/");
        let path = on_the_old_host(&text)?;
        let last = path.rsplit('/').next().filter(|last| !last.is_empty())?;
        Some(Self {
            text: last.to_owned(),
            // A backslash is no separator here, because it may be half of a character.
            raw: self.raw.rsplit(|b| *b == b'/').next()?.to_owned(),
            charset: self.charset,
        })
    }
}

/// Turns a name into unique text: UTF-8, or else a character for each byte.
pub fn text_of(name: &[u8]) -> String {
    match std::str::from_utf8(name) {
        Ok(text) => text.to_owned(),
        Err(_) => name.iter().copied().map(char::from).collect(),
    }
}

/// Converts a whole file to UTF-8 or a superset of ASCII: UTF-16 is converted, a UTF-8 byte order
/// mark is removed.
pub fn without_mark(bytes: &[u8]) -> std::borrow::Cow<'_, [u8]> {
    let by_bytes = match bytes {
        [0, 1..=0x7f, ..] => Some((UTF_16BE, 0)),
        [1..=0x7f, 0, ..] => Some((UTF_16LE, 0)),
        _ => None,
    };
    match Encoding::for_bom(bytes).or(by_bytes) {
        Some((encoding, mark)) if encoding == UTF_8 => bytes[mark..].into(),
        Some((encoding, mark)) => {
            let (text, _) = encoding.decode_without_bom_handling(&bytes[mark..]);
            text.into_owned().into_bytes().into()
        }
        None => bytes.into(),
    }
}

/// The part after the root in an absolute path of ESXi (`/vmfs/volumes/...`, `[datastore] ...`),
/// Linux or Windows (with slashes).
pub(crate) fn on_the_old_host(name: &str) -> Option<&str> {
    if let Some(path) = name.strip_prefix("/vmfs/volumes/") {
        return Some(path);
    }
    let drive = name.as_bytes().get(1) == Some(&b':') && name.as_bytes()[0].is_ascii_alphabetic();
    if drive {
        return Some(&name[2..]);
    }
    if let Some((_, path)) = name
        .strip_prefix('[')
        .and_then(|rest| rest.split_once("] "))
    {
        return Some(path);
    }
    name.starts_with('/').then_some(name)
}

/// Joins `reference` to `dir`; `None` if it would lead out of it.
pub(crate) fn inside(dir: &Path, reference: &OsStr) -> Option<PathBuf> {
    // In other encodings a backslash may be half of a character.
    let reference = match reference.to_str() {
        Some(text) => text.replace('\\', "/").into(),
        None => reference.to_owned(),
    };
    if reference.is_empty() || reference.as_encoded_bytes().contains(&0) {
        return None;
    }
    let path = Path::new(&reference);
    let plain = |c: Component<'_>| matches!(c, Component::Normal(_) | Component::CurDir);
    path.components().all(plain).then(|| dir.join(path))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    fn charset(label: &str, values: &[&[u8]]) -> Option<Charset> {
        Charset::declared(label, values.iter().copied())
    }

    #[test]
    fn labels_and_what_is_utf8_after_all() {
        for (label, bytes, text) in [
            ("GBK", &b"\xb4\xc5\xc5\xcc.vmdk"[..], "磁盘.vmdk"),
            ("windows-936", b"\xb4\xc5", "磁"),
            ("GB18030", b"\xb4\xc5", "磁"),
            ("Big5", b"\xba\xcf\xba\xd0", "磁碟"),
            ("Shift_JIS", b"\x83\x5c\x83\x74\x83\x67", "ソフト"),
            ("EUC-JP", b"\xa5\xbd", "ソ"),
            ("EUC-KR", b"\xb5\xf0\xbd\xba\xc5\xa9", "디스크"),
            ("windows-1251", b"\xe4\xe8\xf1\xea", "диск"),
            ("ISO-8859-2", b"\xb3", "ł"),
            ("KOI8-R", b"\xc4", "д"),
            ("windows-1252", b"caf\xe9 \x80", "café €"),
            ("latin1", b"\xfc", "ü"),
            ("UTF-8", "磁盘".as_bytes(), "磁盘"),
            // Two Chinese characters that are also valid UTF-8.
            ("GBK", b"\xd2\xbb\xd0\xa9", "一些"),
            // UTF-8 under an older label.
            ("windows-1252", "Büro".as_bytes(), "Büro"),
            ("GBK", "磁盘".as_bytes(), "磁盘"),
            // Bytes that were converted from UTF-16.
            ("UTF-16LE", b"ascii", "ascii"),
            ("utf-16", "Büro".as_bytes(), "Büro"),
        ] {
            let charset = charset(label, &[b"ascii", bytes]).unwrap();
            assert_eq!(charset.decode(bytes), (text.to_owned(), false), "{label}");
        }
        assert_eq!(charset("klingon", &[]), None);
        assert_eq!(charset("iso-2022-kr", &[]), None);
        let sjis = charset("Shift_JIS", &[b"x\xff"]).unwrap();
        assert_eq!(sjis.decode(b"x\xff"), ("x\u{fffd}".into(), true));
    }

    #[test]
    fn byte_order_marks() {
        assert_eq!(*without_mark(b"\xef\xbb\xbfa"), *b"a");
        assert_eq!(*without_mark(b"\xff\xfea\0\xfc\0"), *"aü".as_bytes());
        assert_eq!(*without_mark(b"\xfe\xff\0a"), *b"a");
        assert_eq!(*without_mark(b"a\0\xfc\0"), *"aü".as_bytes());
        assert_eq!(*without_mark(b"\0a\0\xfc"), *"aü".as_bytes());
        assert_eq!(*without_mark(b""), *b"");
        assert_eq!(*without_mark(b"\xb4\xc5"), *b"\xb4\xc5");
    }

    #[test]
    fn names_by_text_or_by_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let gbk = charset("GBK", &[]).unwrap();
        let raw = b"\xb4\xc5\xc5\xcc.vmdk";
        let below = |name: &str| gbk.below(dir, name, raw);
        assert_eq!(below("磁盘.vmdk"), Some(dir.join("磁盘.vmdk")));
        let bytes = dir.join(OsStr::from_bytes(raw));
        std::fs::write(&bytes, "x").unwrap();
        assert_eq!(below("磁盘.vmdk"), Some(bytes));
        std::fs::write(dir.join("磁盘.vmdk"), "x").unwrap();
        assert_eq!(below("磁盘.vmdk"), Some(dir.join("磁盘.vmdk")));
        for out in ["../x", "/x", "", "a/../../x", "..\\x"] {
            assert_eq!(below(out), None, "{out}");
        }
    }
}
