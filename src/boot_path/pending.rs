//! Files that Windows deletes or renames at the beginning of its next start. `Control\Session
//! Manager\PendingFileRenameOperations` has pairs of source and target; an empty target deletes the
//! source (Microsoft, `MoveFileEx`). An uninstalled driver leaves such a pair if its file was in
//! use. The pair then applies to the file that a conversion has put there since.

use crate::guest::GuestPath;
use crate::registry::error::Result;
use crate::registry::{HiveView, RegData, RegOp};
use crate::types::ControlSet;

const KEY: &str = "Control\\Session Manager";
const VALUES: [&str; 2] = [
    "PendingFileRenameOperations",
    "PendingFileRenameOperations2",
];

/// The most pairs read; real lists have a few hundred.
const MAX_PAIRS: usize = 100_000;

#[derive(Debug, Clone, Default)]
pub struct Pending {
    lists: Vec<(&'static str, Vec<(String, String)>)>,
}

impl Pending {
    pub fn read(system: &HiveView<'_>, control_set: &ControlSet) -> Result<Self> {
        let mut lists = Vec::new();
        if let Some(key) = system.key(&control_set.key(KEY))? {
            for name in VALUES {
                if let Some(value) = key.value(name)? {
                    lists.push((name, pairs(&value.data)));
                }
            }
        }
        Ok(Self { lists })
    }

    /// Whether the file is missing after all operations. A file that is moved away and put back is
    /// replaced.
    pub fn removes(&self, path: &GuestPath) -> bool {
        let mut gone = false;
        for (source, target) in self.lists.iter().flat_map(|(_, pairs)| pairs) {
            if names(source, path) {
                gone = true;
            } else if names(target, path) {
                gone = false;
            }
        }
        gone
    }

    /// The lists without the operations that remove these files.
    pub fn without(&self, control_set: &ControlSet, paths: &[GuestPath]) -> Vec<RegOp> {
        let key = control_set.key(KEY);
        let mut ops = Vec::new();
        for (name, pairs) in &self.lists {
            let kept: Vec<String> = pairs
                .iter()
                .filter(|(source, _)| !paths.iter().any(|path| names(source, path)))
                .flat_map(|(source, target)| [source.clone(), target.clone()])
                .collect();
            if kept.len() == pairs.len() * 2 {
                continue;
            }
            ops.push(if kept.is_empty() {
                RegOp::DeleteValue {
                    key: key.clone().into(),
                    name: name.to_string(),
                }
            } else {
                RegOp::set(key.clone(), *name, RegData::MultiSz(kept))
            });
        }
        ops
    }
}

/// Splits the list into pairs. Unlike in other lists of strings, every second one may be empty.
fn pairs(data: &[u8]) -> Vec<(String, String)> {
    let units: Vec<u16> = data
        .chunks_exact(2)
        .map(|b| u16::from_le_bytes([b[0], b[1]]))
        .collect();
    let text = String::from_utf16_lossy(&units);
    let parts: Vec<&str> = text.split('\0').collect();
    parts
        .chunks_exact(2)
        .take(MAX_PAIRS)
        .filter(|pair| !pair[0].is_empty())
        .map(|pair| (pair[0].to_string(), pair[1].to_string()))
        .collect()
}

/// Whether an entry names this file of the system volume: `\??\C:\Windows\...`, a target possibly
/// with `!`.
fn names(entry: &str, path: &GuestPath) -> bool {
    // `!` replaces an existing file; Windows also writes `*` and a number.
    let entry = entry.trim_start_matches(['!', '*']);
    let entry = entry.trim_start_matches(|c: char| c.is_ascii_digit());
    let entry = entry.strip_prefix("\\??\\").unwrap_or(entry);
    let rest = match entry.as_bytes() {
        [letter, b':', b'\\', ..] if letter.is_ascii_alphabetic() => &entry[3..],
        _ => return false,
    };
    GuestPath::parse(rest).is_ok_and(|named| named.key() == path.key())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::KeyTree;

    fn pending(entries: &[&str]) -> (Vec<u8>, GuestPath) {
        let mut tree = KeyTree::new("ROOT");
        let list = entries.iter().map(ToString::to_string).collect();
        tree.set(
            "ControlSet001\\Control\\Session Manager",
            VALUES[0],
            RegData::MultiSz(list),
        );
        let path = GuestPath::parse("\\Windows\\System32\\drivers\\viostor.sys").unwrap();
        (tree.to_bytes("SYSTEM"), path)
    }

    const FILE: &str = "\\??\\C:\\WINDOWS\\system32\\drivers\\VIOSTOR.SYS";

    #[test]
    fn what_is_left_of_a_file() {
        let temp = "\\??\\C:\\Temp\\a.tmp";
        for (entries, gone) in [
            (&[][..], false),
            (&[temp, ""], false),
            (&[temp, "", FILE, ""], true),
            (&[FILE, "", temp, "", temp, "\\??\\C:\\b"], true),
            (
                &["*1\\??\\C:\\Windows\\System32\\drivers\\viostor.sys", ""],
                true,
            ),
            (&[FILE, "!\\??\\C:\\Temp\\old.sys"], true),
            // Replaced by a newer one.
            (&[FILE, temp, "\\??\\C:\\new.sys", FILE], false),
            (&["\\??\\C:\\new.sys", FILE], false),
            (&[FILE], true),
            // That is no drive.
            (
                &["\\??\\1:\\Windows\\System32\\drivers\\viostor.sys", ""],
                false,
            ),
        ] {
            let (hive, path) = pending(entries);
            let view = HiveView::new(&hive).unwrap();
            let found = Pending::read(&view, &ControlSet::new(1)).unwrap();
            assert_eq!(found.removes(&path), gone, "{entries:?}");
        }
    }

    #[test]
    fn the_second_list_counts_after_the_first() {
        let session = "ControlSet001\\Control\\Session Manager";
        let temp = "\\??\\C:\\Temp\\a.tmp";
        for (first, second, gone) in [
            ([temp, ""], [FILE, ""], true),
            ([FILE, ""], [temp, FILE], false),
        ] {
            let mut tree = KeyTree::new("ROOT");
            for (name, list) in VALUES.iter().zip([first, second]) {
                let list = list.map(str::to_string).to_vec();
                tree.set(session, name, RegData::MultiSz(list));
            }
            let hive = tree.to_bytes("SYSTEM");
            let view = HiveView::new(&hive).unwrap();
            let found = Pending::read(&view, &ControlSet::new(1)).unwrap();
            let path = GuestPath::parse("\\Windows\\System32\\drivers\\viostor.sys").unwrap();
            assert_eq!(found.removes(&path), gone, "{first:?} {second:?}");
            if gone {
                let ops = found.without(&ControlSet::new(1), &[path]);
                assert_eq!(
                    ops,
                    [RegOp::DeleteValue {
                        key: session.into(),
                        name: VALUES[1].into()
                    }]
                );
            }
        }
    }

    #[test]
    fn both_lists_are_read_by_the_names_of_windows() {
        for name in [
            "PendingFileRenameOperations",
            "PendingFileRenameOperations2",
        ] {
            let mut tree = KeyTree::new("ROOT");
            let list = [FILE, ""].map(str::to_string).to_vec();
            let key = "ControlSet001\\Control\\Session Manager";
            tree.set(key, name, RegData::MultiSz(list));
            let hive = tree.to_bytes("SYSTEM");
            let view = HiveView::new(&hive).unwrap();
            let path = GuestPath::parse("\\Windows\\System32\\drivers\\viostor.sys").unwrap();
            let of = |set| Pending::read(&view, &ControlSet::new(set)).unwrap();
            assert!(of(1).removes(&path) && !of(2).removes(&path), "{name}");
        }
    }

    /// The forms of an entry: with marks of `MoveFileEx`, and only with a drive letter.
    #[test]
    fn an_entry_names_a_file_by_drive_and_path() {
        let path = GuestPath::parse("\\Windows\\System32\\drivers\\viostor.sys").unwrap();
        let rest = "windows\\system32\\drivers\\viostor.sys";
        for (entry, named) in [
            (format!("C:\\{rest}"), true),
            (format!("z:\\{rest}"), true),
            (format!("\\??\\C:\\{rest}"), true),
            (format!("!\\??\\C:\\{rest}"), true),
            (format!("*12\\??\\C:\\{rest}"), true),
            (format!("!*1C:\\{rest}"), true),
            (format!("1:\\{rest}"), false),
            (format!("C:{rest}"), false),
            (format!("\\{rest}"), false),
            (format!("\\??\\Volume{{1}}\\{rest}"), false),
            (format!("C:\\{rest}x"), false),
            ("C:\\windows\\system32\\drivers".into(), false),
            (String::new(), false),
        ] {
            assert_eq!(names(&entry, &path), named, "{entry}");
        }
        let utf16 = |text: &str| {
            text.encode_utf16()
                .flat_map(u16::to_le_bytes)
                .collect::<Vec<_>>()
        };
        // An entry without a source is skipped; what has no second part is none.
        let list = utf16("a\0b\0\0c\0d\0\0e");
        let pair = |a: &str, b: &str| (a.to_string(), b.to_string());
        assert_eq!(pairs(&list), [pair("a", "b"), pair("d", "")]);
        assert_eq!(pairs(&[]), []);
    }

    #[test]
    fn the_rest_of_the_list_stays() {
        let temp = "\\??\\C:\\Temp\\a.tmp";
        let (b, moved) = ("\\??\\C:\\b", "\\??\\C:\\Temp\\old.sys");
        // Moved away it is gone as well.
        for (list, rest) in [
            (&[temp, "", FILE, "", temp, b][..], &[temp, "", temp, b][..]),
            (&[temp, "", FILE, moved], &[temp, ""]),
        ] {
            let (hive, path) = pending(list);
            let view = HiveView::new(&hive).unwrap();
            let found = Pending::read(&view, &ControlSet::new(1)).unwrap();
            let rest = rest.iter().map(ToString::to_string).collect();
            assert_eq!(
                found.without(&ControlSet::new(1), &[path]),
                [RegOp::set(
                    "ControlSet001\\Control\\Session Manager",
                    VALUES[0],
                    RegData::MultiSz(rest)
                )]
            );
        }
        let (hive, path) = pending(&[FILE, ""]);
        let view = HiveView::new(&hive).unwrap();
        let found = Pending::read(&view, &ControlSet::new(1)).unwrap();
        assert!(matches!(
            found.without(&ControlSet::new(1), &[path])[..],
            [RegOp::DeleteValue { .. }]
        ));
    }
}
