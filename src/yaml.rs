//! The YAML that people write: a catalogue of drivers, a list of VMs.
//!
//! Words such as `yes` and numbers such as `0755` are text, and what reads a mapping sees a key that
//! occurs twice.

use serde::Deserialize;
use serde_yaml::{DuplicateKeyPolicy, Error, MergeKeyPolicy, Options};

/// A fault of such a file.
#[derive(Debug)]
pub(crate) struct YamlFault {
    pub(crate) line: usize,
    /// The description, with line and column.
    pub(crate) message: String,
}

impl From<Error> for YamlFault {
    fn from(e: Error) -> Self {
        let (line, column) = e.location().map_or((1, 1), |at| (at.line(), at.column()));
        // As the messages of JSON have it.
        let message = plain(&e.without_snippet().to_string()).replace(
            &format!("line {line}, column {column}"),
            &format!("line {line} column {column}"),
        );
        Self {
            line: line as usize,
            message,
        }
    }
}

/// The message with the code points of characters as people write them: U+0000.
fn plain(message: &str) -> String {
    let mut parts = message.split("\\u{");
    let first = parts.next().unwrap_or_default();
    parts.fold(first.to_owned(), |text, part| {
        let (code, rest) = part.split_once('}').unwrap_or((part, ""));
        format!("{text}U+{code:0>4}{rest}")
    })
}

fn options() -> Options {
    serde_yaml::options! {
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: MergeKeyPolicy::AsOrdinary,
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        null_as_string: true,
        with_snippet: false,
    }
}

pub(crate) fn parse<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, YamlFault> {
    Ok(serde_yaml::from_str_with_options(text, options())?)
}

/// Parses a document with `read`.
pub(crate) fn parse_with<'de, T>(
    text: &'de str,
    read: impl for<'e> FnOnce(serde_yaml::Deserializer<'de, 'e>) -> Result<T, Error>,
) -> Result<T, YamlFault> {
    Ok(serde_yaml::with_deserializer_from_str_with_options(
        text,
        options(),
        read,
    )?)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn words_and_numbers_are_what_they_look_like() {
        for (text, value) in [
            ("yes", json!("yes")),
            ("no", json!("no")),
            ("on", json!("on")),
            ("true", json!(true)),
            ("False", json!(false)),
            ("0755", json!("0755")),
            ("1_000", json!("1_000")),
            ("4096", json!(4096)),
            ("-1", json!(-1)),
            ("1.5", json!(1.5)),
            ("00:11:22:33:44:55", json!("00:11:22:33:44:55")),
            ("~", json!(null)),
            ("'~'", json!("~")),
            ("{<<: {a: 1}, b: 2}", json!({"<<": {"a": 1}, "b": 2})),
            ("[&a x, *a]", json!(["x", "x"])),
            ("a: \"\\x1b[2J\"", json!({"a": "\u{1b}[2J"})),
        ] {
            assert_eq!(parse::<Value>(text).unwrap(), value, "{text}");
        }
    }

    #[test]
    fn a_fault_has_its_line() {
        let fault = parse::<Value>("a: 1\nb: [1,\n2\nc: }\n").unwrap_err();
        assert_eq!(fault.line, 4, "{}", fault.message);
        assert!(
            fault.message.contains("line 4 column "),
            "{}",
            fault.message
        );
        assert_eq!(fault.message.lines().count(), 1);
        let fault = parse::<Value>("\0").unwrap_err();
        assert_eq!(
            fault.message,
            "unexpected character: `U+0000' at line 1 column 1"
        );
        // More levels, and more nodes by references, than anybody writes.
        assert!(parse::<Value>(&"[".repeat(5000)).is_err());
        let bomb = (1..12).fold(String::from("- &a0 [x, x]\n"), |text, i| {
            let below = i - 1;
            text + &format!("- &a{i} [{}*a{below}]\n", format!("*a{below}, ").repeat(9))
        });
        assert!(parse::<Value>(&bomb).is_err());
    }
}
