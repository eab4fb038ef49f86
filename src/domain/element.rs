//! A small XML tree for writing domain XML and reading foreign descriptors.
//!
//! Input is hostile. A document type declaration is an error, so there is no entity expansion. Only
//! the five predefined entities and character references are supported, and size, depth and node
//! count are limited. Namespaces are not resolved: [`Element::is`] and [`Element::attr`] compare
//! local names. OVF readers do that in practice because producers choose their own prefixes. The
//! order of mixed content is lost: an element has one text.

use std::borrow::Cow;
use std::collections::HashSet;

use encoding_rs::{Encoding, UTF_8, UTF_16BE, UTF_16LE};
use quick_xml::Writer;
use quick_xml::events::{BytesEnd, BytesStart, BytesText, Event};
use quick_xml::reader::Reader;

pub const MAX_BYTES: usize = 16 << 20;
pub const MAX_DEPTH: usize = 64;
pub const MAX_NODES: usize = 200_000;

#[derive(Debug, thiserror::Error)]
pub enum XmlError {
    #[error("the document is {size} bytes, more than the {MAX_BYTES} bytes allowed")]
    TooLarge { size: usize },
    #[error("elements are nested more than {MAX_DEPTH} deep")]
    TooDeep,
    #[error("the document has more than {MAX_NODES} elements and attributes")]
    TooManyNodes,
    #[error("the document has a DOCTYPE, which is not accepted")]
    Doctype,
    #[error("unknown entity &{name}; at byte {offset}")]
    Entity { name: String, offset: u64 },
    #[error("not well-formed at byte {offset}: {reason}")]
    Syntax { offset: u64, reason: String },
    #[error("the document has no root element")]
    Empty,
    #[error(
        "the document is not valid in the encoding it has or declares, {label}, or that is unknown"
    )]
    Encoding { label: String },
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Element {
    /// The name as written, with its prefix.
    pub name: String,
    pub attrs: Vec<(String, String)>,
    pub children: Vec<Element>,
    /// All character data of this element, concatenated and trimmed.
    pub text: String,
}

fn local(name: &str) -> &str {
    name.rsplit_once(':').map_or(name, |(_, local)| local)
}

impl Element {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }

    #[must_use]
    pub fn with(mut self, attr: &str, value: impl AsRef<str>) -> Self {
        self.attrs.push((attr.into(), value.as_ref().into()));
        self
    }

    #[must_use]
    pub fn text(mut self, text: impl AsRef<str>) -> Self {
        self.text = text.as_ref().to_owned();
        self
    }

    #[must_use]
    pub fn child(mut self, child: Element) -> Self {
        self.children.push(child);
        self
    }

    pub fn push(&mut self, child: Element) {
        self.children.push(child);
    }

    /// Whether the local name is `name`.
    pub fn is(&self, name: &str) -> bool {
        local(&self.name) == name
    }

    /// The attribute whose local name is `name`; `xmlns` declarations do not count.
    pub fn attr(&self, name: &str) -> Option<&str> {
        self.attrs
            .iter()
            .find(|(key, _)| local(key) == name && !key.starts_with("xmlns"))
            .map(|(_, value)| value.as_str())
    }

    /// The children with this local name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.is(name))
    }

    pub fn first(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.is(name))
    }

    /// Follows first children: `path("os/loader")`.
    pub fn path(&self, path: &str) -> Option<&Element> {
        path.split('/')
            .try_fold(self, |element, name| element.first(name))
    }

    /// Text of the first child with this local name.
    pub fn text_of(&self, name: &str) -> Option<&str> {
        self.first(name).map(|child| child.text.as_str())
    }

    /// Every element below this one (itself excluded) with this local name, in document order.
    pub fn descendants<'a>(&'a self, name: &str) -> Vec<&'a Element> {
        let mut found = Vec::new();
        let mut stack: Vec<&Element> = self.children.iter().rev().collect();
        while let Some(element) = stack.pop() {
            if element.is(name) {
                found.push(element);
            }
            stack.extend(element.children.iter().rev());
        }
        found
    }

    /// Serialises the document, indented, with a final newline. Characters that XML 1.0 forbids are
    /// left out.
    pub fn to_document(&self) -> String {
        let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
        // Writing to a Vec cannot fail.
        let written = self.write(&mut writer);
        debug_assert!(written.is_ok());
        let mut text = String::from_utf8_lossy(&writer.into_inner()).into_owned();
        text.push('\n');
        text
    }

    fn write(&self, writer: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
        let mut start = BytesStart::new(self.name.as_str());
        for (key, value) in &self.attrs {
            start.push_attribute((key.as_str(), xml_chars(value).as_ref()));
        }
        if self.text.is_empty() && self.children.is_empty() {
            return writer.write_event(Event::Empty(start));
        }
        writer.write_event(Event::Start(start))?;
        if !self.text.is_empty() {
            writer.write_event(Event::Text(BytesText::new(&xml_chars(&self.text))))?;
        }
        for child in &self.children {
            child.write(writer)?;
        }
        writer.write_event(Event::End(BytesEnd::new(self.name.as_str())))
    }

    /// Parses a document in UTF-8, UTF-16 or the encoding it declares.
    pub fn parse(bytes: &[u8]) -> Result<Element, XmlError> {
        Self::parse_with_encoding(bytes).map(|(root, _)| root)
    }

    /// Parses a document and returns its encoding too, because file names in it may use that
    /// encoding on disk.
    pub fn parse_with_encoding(bytes: &[u8]) -> Result<(Element, &'static Encoding), XmlError> {
        if bytes.len() > MAX_BYTES {
            return Err(XmlError::TooLarge { size: bytes.len() });
        }
        let (text, encoding) = decode(bytes)?;
        Ok((parse_text(&text)?, encoding))
    }
}

/// `text` without the characters that XML 1.0 forbids.
fn xml_chars(text: &str) -> Cow<'_, str> {
    let allowed = |c: char| {
        matches!(c, '\t' | '\n' | '\r') || (c >= ' ' && !matches!(c, '\u{fffe}' | '\u{ffff}'))
    };
    if text.chars().all(allowed) {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(text.chars().filter(|c| allowed(*c)).collect())
    }
}

/// Decodes as in appendix F of XML 1.0: by the byte order mark, the first bytes, or the
/// declaration.
fn decode(bytes: &[u8]) -> Result<(Cow<'_, str>, &'static Encoding), XmlError> {
    let (encoding, text) = match (Encoding::for_bom(bytes), bytes) {
        (Some((encoding, mark)), _) => (encoding, &bytes[mark..]),
        (None, [b'<', 0, ..]) => (UTF_16LE, bytes),
        (None, [0, b'<', ..]) => (UTF_16BE, bytes),
        (None, _) => (declared(bytes)?, bytes),
    };
    let text = encoding.decode_without_bom_handling_and_without_replacement(text);
    let text = text.ok_or_else(|| XmlError::Encoding {
        label: encoding.name().to_owned(),
    })?;
    Ok((text, encoding))
}

/// The encoding declared by `<?xml ... encoding="..."?>`; UTF-8 without one.
fn declared(bytes: &[u8]) -> Result<&'static Encoding, XmlError> {
    let head = bytes.get(..200).unwrap_or(bytes).trim_ascii_start();
    let end = head.windows(2).position(|w| w == b"?>").unwrap_or(0);
    let declaration = String::from_utf8_lossy(&head[..end]);
    let value = declaration
        .strip_prefix("<?xml")
        .and_then(|text| text.split_once("encoding"))
        .and_then(|(_, rest)| rest.trim_start().strip_prefix('='))
        .and_then(|rest| rest.trim_start().split(['"', '\'']).nth(1));
    let Some(label) = value else { return Ok(UTF_8) };
    match Encoding::for_label_no_replacement(label.as_bytes()) {
        // The text was converted since: the declaration itself is not UTF-16.
        Some(encoding) if encoding == UTF_16LE || encoding == UTF_16BE => Ok(UTF_8),
        Some(encoding) => Ok(encoding),
        None => Err(XmlError::Encoding {
            label: label.chars().filter(|c| !c.is_control()).take(40).collect(),
        }),
    }
}

fn parse_text(text: &str) -> Result<Element, XmlError> {
    let mut reader = Reader::from_str(text);
    reader.config_mut().expand_empty_elements = true;
    let mut open: Vec<Element> = Vec::new();
    let mut root: Option<Element> = None;
    let mut nodes = 0usize;
    loop {
        let offset = reader.buffer_position();
        let syntax = |reason: &dyn std::fmt::Display| XmlError::Syntax {
            offset,
            reason: reason.to_string(),
        };
        match reader.read_event().map_err(|e| syntax(&e))? {
            Event::Start(start) => {
                if root.is_some() {
                    return Err(syntax(&"a second root element"));
                }
                if open.len() >= MAX_DEPTH {
                    return Err(XmlError::TooDeep);
                }
                let element = with_attributes(&start, &mut nodes, offset)?;
                open.push(element);
            }
            Event::End(_) => {
                // The parser has checked that the name matches an open element.
                let Some(mut element) = open.pop() else {
                    return Err(syntax(&"an end tag without its start"));
                };
                element.text = element.text.trim().to_owned();
                match open.last_mut() {
                    Some(parent) => parent.push(element),
                    None => root = Some(element),
                }
            }
            Event::Text(text) => {
                if let Some(element) = open.last_mut() {
                    element.text.push_str(&text.xml10_content());
                }
            }
            Event::CData(data) => {
                if let Some(element) = open.last_mut() {
                    element.text.push_str(&data.xml10_content());
                }
            }
            Event::GeneralRef(reference) => {
                let name = reference.xml10_content();
                let text = match reference.resolve_char_ref().map_err(|e| syntax(&e))? {
                    Some(c) => Some(Cow::Owned(c.to_string())),
                    None => quick_xml::escape::resolve_predefined_entity(&name).map(Cow::Borrowed),
                };
                let Some(text) = text else {
                    return Err(XmlError::Entity {
                        name: name.chars().take(40).collect(),
                        offset,
                    });
                };
                if let Some(element) = open.last_mut() {
                    element.text.push_str(&text);
                }
            }
            Event::DocType(_) => return Err(XmlError::Doctype),
            Event::Eof if !open.is_empty() => return Err(syntax(&"the document ends too early")),
            Event::Eof => return root.ok_or(XmlError::Empty),
            Event::Empty(_) | Event::Comment(_) | Event::Decl(_) | Event::PI(_) => {}
        }
    }
}

/// The element of a start tag. `nodes` counts elements and attributes.
fn with_attributes(
    start: &BytesStart<'_>,
    nodes: &mut usize,
    offset: u64,
) -> Result<Element, XmlError> {
    let syntax = |reason: &dyn std::fmt::Display| XmlError::Syntax {
        offset,
        reason: reason.to_string(),
    };
    let mut element = Element::new(start.name().as_ref());
    *nodes += 1;
    // The reader's own check compares each attribute with all before it.
    let mut names = HashSet::new();
    for attr in start.attributes().with_checks(false) {
        let attr = attr.map_err(|e| syntax(&e))?;
        if !names.insert(attr.key) {
            return Err(syntax(&"an attribute stands twice"));
        }
        *nodes += 1;
        if *nodes > MAX_NODES {
            break;
        }
        let value = quick_xml::escape::unescape(&attr.value).map_err(|e| syntax(&e))?;
        element
            .attrs
            .push((attr.key.as_ref().to_owned(), value.into_owned()));
    }
    match *nodes > MAX_NODES {
        true => Err(XmlError::TooManyNodes),
        false => Ok(element),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_keeps_hostile_text() {
        let nasty = "a&b<c>\"d'e\u{1}\u{fffe}]]>";
        let document = Element::new("x")
            .with("a", nasty)
            .child(Element::new("y").text(nasty))
            .to_document();
        let read = Element::parse(document.as_bytes()).unwrap();
        let clean = "a&b<c>\"d'e]]>";
        assert_eq!(read.attr("a"), Some(clean));
        assert_eq!(read.text_of("y"), Some(clean));
    }

    #[test]
    fn reads_utf16_prefixes_cdata_and_references() {
        let text = "<?xml version='1.0'?><o:a xmlns:o='u' o:b='&#65;&amp;'><!-- no --><o:c> x<![CDATA[<y>]]>&lt; </o:c></o:a>";
        let mut bytes = vec![0xff, 0xfe];
        bytes.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
        for bytes in [text.as_bytes(), &bytes] {
            let root = Element::parse(bytes).unwrap();
            assert!(root.is("a"));
            assert_eq!(root.attr("b"), Some("A&"));
            assert_eq!(root.text_of("c"), Some("x<y><"));
        }
    }

    #[test]
    fn reads_the_encoding_that_is_declared() {
        let text = |label: &str, name: &[u8]| {
            let mut bytes = format!("<?xml version='1.0' encoding = \"{label}\"?><a>").into_bytes();
            bytes.extend(name);
            bytes.extend(b"</a>");
            bytes
        };
        let utf16 = |mark: &str, unit: fn(u16) -> [u8; 2]| -> Vec<u8> {
            let text = format!("{mark}<?xml version='1.0' encoding='utf-16'?><a>磁盘</a>");
            text.encode_utf16().flat_map(unit).collect()
        };
        for (bytes, want) in [
            (text("ISO-8859-1", b"B\xfcro"), "Büro"),
            (text("iso-8859-2", b"\xb3"), "ł"),
            (text("ISO-8859-15", b"\xa4"), "€"),
            (text("windows-1251", b"\xe4\xe8\xf1\xea"), "диск"),
            (text("GB18030", b"\xb4\xc5\xc5\xcc"), "磁盘"),
            (text("Shift_JIS", b"\x83\x5c"), "ソ"),
            (text("UTF-8", "磁盘".as_bytes()), "磁盘"),
            (
                b"<?xml version='1.0' encoding='ISO-8859-1'?><a>B\xfcro</a>".to_vec(),
                "Büro",
            ),
            // Converted by a program that left the declaration unchanged.
            (text("UTF-16", "磁盘".as_bytes()), "磁盘"),
            (utf16("\u{feff}", u16::to_le_bytes), "磁盘"),
            (utf16("\u{feff}", u16::to_be_bytes), "磁盘"),
            (utf16("", u16::to_le_bytes), "磁盘"),
            (utf16("", u16::to_be_bytes), "磁盘"),
        ] {
            assert_eq!(Element::parse(&bytes).unwrap().text, want, "{want}");
        }
        for bytes in [
            text("klingon", b"x"),
            text("UTF-8", b"\xfc"),
            text("GBK", b"\xff"),
        ] {
            let error = Element::parse(&bytes).unwrap_err();
            assert!(matches!(error, XmlError::Encoding { .. }), "{error}");
        }
    }

    #[test]
    fn refuses_what_it_should() {
        let deep = "<a>".repeat(MAX_DEPTH + 1);
        for (text, want) in [
            ("", "no root"),
            ("<a>", "too early"),
            ("<a></b>", "not well-formed"),
            ("<a/><b/>", "second root"),
            ("<a b='1' b='1'/>", "stands twice"),
            ("<a>&boom;</a>", "unknown entity &boom;"),
            ("<a b='&boom;'/>", "not well-formed"),
            ("<!DOCTYPE a [<!ENTITY boom 'x'>]><a>&boom;</a>", "DOCTYPE"),
            (&deep, "nested"),
        ] {
            let error = Element::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
        let wide = format!("<a>{}</a>", "<b/>".repeat(MAX_NODES + 1));
        assert!(matches!(
            Element::parse(wide.as_bytes()),
            Err(XmlError::TooManyNodes)
        ));
        assert!(matches!(
            Element::parse(&vec![b' '; MAX_BYTES + 1]),
            Err(XmlError::TooLarge { .. })
        ));
        assert!(matches!(
            Element::parse(b"\xff\xfea"),
            Err(XmlError::Encoding { .. })
        ));
    }

    /// Local names count, the first of several, and no declaration of a namespace.
    #[test]
    fn descendants_are_found_inside_one_another() {
        let root = Element::parse(b"<a n='0'><a n='1'><b><a n='2'/></b></a><c/><x:a n='3'/></a>");
        let root = root.unwrap();
        let found = root.descendants("a");
        let numbers: Vec<_> = found.iter().filter_map(|e| e.attr("n")).collect();
        assert_eq!(numbers, ["1", "2", "3"]);
    }

    #[test]
    fn elements_are_found_by_their_local_names() {
        let root = Element::parse(
            b"<a xmlns:b='ns' x:b='1' b='2'><x:c><d>one</d></x:c><c><d>two</d><d/></c><d>three</d></a>",
        )
        .unwrap();
        assert_eq!((root.attr("b"), root.attr("xmlns")), (Some("1"), None));
        assert_eq!(root.path("c/d").unwrap().text, "one");
        assert_eq!(root.path("c/e"), None);
        assert_eq!(root.text_of("d"), Some("three"));
        assert_eq!(root.text_of("e"), None);
        let texts: Vec<_> = root.descendants("d").iter().map(|e| &*e.text).collect();
        assert_eq!(texts, ["one", "two", "", "three"]);
        assert_eq!(root.all("c").count(), 2);
        assert_eq!(
            root.to_document(),
            "<a xmlns:b=\"ns\" x:b=\"1\" b=\"2\">\n  <x:c>\n    <d>one</d>\n  </x:c>\n  <c>\n    <d>two</d>\n    <d/>\n  </c>\n  <d>three</d>\n</a>\n"
        );
    }

    #[test]
    fn the_limits_themselves_are_allowed() {
        let deep = |n: usize| format!("{}{}", "<a>".repeat(n), "</a>".repeat(n));
        assert!(Element::parse(deep(MAX_DEPTH).as_bytes()).is_ok());
        let wide = |n: usize| format!("<a>{}</a>", "<b/>".repeat(n - 1));
        assert!(Element::parse(wide(MAX_NODES).as_bytes()).is_ok());
        assert!(Element::parse(wide(MAX_NODES + 1).as_bytes()).is_err());
        // An attribute counts like an element: each of these is a hundred.
        let list: String = (1..100).map(|i| format!(" a{i}=''")).collect();
        let attributes = |n: usize| format!("<a>{}</a>", format!("<b{list}/>").repeat(n));
        assert!(Element::parse(attributes(MAX_NODES / 100 - 1).as_bytes()).is_ok());
        assert!(Element::parse(attributes(MAX_NODES / 100).as_bytes()).is_err());
        // Many attributes of one element take no longer than many elements.
        let list: String = (1..MAX_NODES).map(|i| format!(" a{i}=''")).collect();
        assert!(Element::parse(format!("<a{list}/>").as_bytes()).is_ok());
        let largest = [b"<a/>".to_vec(), vec![b' '; MAX_BYTES - 4]].concat();
        assert!(Element::parse(&largest).is_ok());
        for (text, message) in [
            (
                format!("<a>&{};</a>", "x".repeat(50)),
                format!("unknown entity &{}; at byte 3", "x".repeat(40)),
            ),
            (
                deep(MAX_DEPTH + 1),
                "elements are nested more than 64 deep".to_owned(),
            ),
            (
                wide(MAX_NODES + 1),
                "the document has more than 200000 elements and attributes".to_owned(),
            ),
            (String::new(), "the document has no root element".to_owned()),
            (
                "<a/><b/>".to_owned(),
                "not well-formed at byte 4: a second root element".to_owned(),
            ),
            (
                "<?xml version='1.0' encoding='klingon'?><a/>".to_owned(),
                "the document is not valid in the encoding it has or declares, klingon, or that is unknown"
                    .to_owned(),
            ),
        ] {
            let error = Element::parse(text.as_bytes()).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
        let error = Element::parse(&vec![b' '; MAX_BYTES + 1]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the document is 16777217 bytes, more than the 16777216 bytes allowed"
        );
    }
}
