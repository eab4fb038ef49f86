//! Registry edits as data, and as `.reg` text for people, `hivexregedit --merge` and `virt-win-reg
//! --merge`. [`super::confined`] edits a guest's hive from the data.
//!
//! Text values of printable ASCII are written as strings, everything else as `hex(type):` bytes, so
//! no tool's encoding can change them.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::build::{Format, KeyTree, Sparse};
use super::cell::SEGMENT;
use super::data::{RegData, escape};
use super::error::Result;
use super::hive::{HiveView, Key};
use super::name::fold;

/// One edit. Keys are `\`-separated paths below the hive's root; parents are created as needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum RegOp {
    CreateKey {
        key: String,
    },
    /// The default value has the `name` `""`.
    Set {
        key: String,
        name: String,
        data: RegData,
    },
    DeleteValue {
        key: String,
        name: String,
    },
    /// Deletes a key with everything below it.
    DeleteKey {
        key: String,
    },
}

impl RegOp {
    pub fn set(key: impl Into<String>, name: impl Into<String>, data: RegData) -> Self {
        RegOp::Set {
            key: key.into(),
            name: name.into(),
            data,
        }
    }

    pub fn key(&self) -> &str {
        match self {
            RegOp::CreateKey { key }
            | RegOp::Set { key, .. }
            | RegOp::DeleteValue { key, .. }
            | RegOp::DeleteKey { key } => key,
        }
    }

    /// Whether the hive below `root` already is in the state after this operation.
    pub fn is_done(&self, root: &Key<'_>) -> Result<bool> {
        let key = root.key(self.key())?;
        Ok(match (self, key) {
            (RegOp::CreateKey { .. }, key) => key.is_some(),
            (RegOp::DeleteKey { .. } | RegOp::DeleteValue { .. }, None) => true,
            (RegOp::DeleteKey { .. }, Some(_)) => false,
            (RegOp::DeleteValue { name, .. }, Some(key)) => key.value(name)?.is_none(),
            (RegOp::Set { .. }, None) => false,
            (RegOp::Set { name, data, .. }, Some(key)) => {
                key.value(name)?.is_some_and(|v| v == data.to_value())
            }
        })
    }
}

/// The edits of one hive, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegEdits {
    /// The hive's path in a running Windows, e.g. `HKEY_LOCAL_MACHINE\SYSTEM`.
    pub prefix: String,
    pub ops: Vec<RegOp>,
}

impl RegEdits {
    pub fn new(prefix: impl Into<String>) -> Self {
        Self {
            prefix: prefix.into(),
            ops: Vec::new(),
        }
    }

    /// Finds a value that libhivex would write in a form that Windows cannot read. For an edited
    /// key, it rewrites all values and stores each one in a single cell. Hives from format 1.4 on
    /// have no such cells over 16,344 bytes. Returns the key, the name and the bytes.
    pub fn too_large(&self, view: &HiveView<'_>) -> Result<Option<(String, String, usize)>> {
        if !view.has_segments() {
            return Ok(None);
        }
        let touches = |op: &&RegOp| matches!(op, RegOp::Set { .. } | RegOp::DeleteValue { .. });
        let keys: BTreeSet<&str> = self.ops.iter().filter(touches).map(RegOp::key).collect();
        for key in keys {
            let Some(found) = view.key(key)? else {
                continue;
            };
            for (name, value) in found.values()? {
                if value.data.len() > SEGMENT {
                    return Ok(Some((key.to_string(), name, value.data.len())));
                }
            }
        }
        Ok(None)
    }

    /// Removes the edits whose result already exists.
    pub fn pending(&self, root: &Key<'_>) -> Result<RegEdits> {
        let mut pending = RegEdits::new(self.prefix.clone());
        for op in &self.ops {
            if !op.is_done(root)? {
                pending.ops.push(op.clone());
            }
        }
        Ok(pending)
    }

    /// Applies the edits to a tree.
    pub fn apply(&self, tree: &mut KeyTree) {
        for op in &self.ops {
            match op {
                RegOp::CreateKey { key } => drop(tree.key_mut(key)),
                RegOp::Set { key, name, data } => {
                    tree.set(key, name, data.clone());
                }
                RegOp::DeleteValue { key, name } => {
                    if tree.get(key).is_some() {
                        let gone = fold(name);
                        tree.key_mut(key).values.retain(|(n, _)| fold(n) != gone);
                    }
                }
                RegOp::DeleteKey { key } => drop(tree.remove(key)),
            }
        }
    }

    /// Rewrites the hive of `view` with the edits. Only the edited keys become a tree, because a
    /// tree takes several times the memory of its hive.
    pub fn rewritten(
        &self,
        view: &HiveView<'_>,
        file_name: &str,
        format: Format,
    ) -> Result<Vec<u8>> {
        if self.makes_anew() {
            let mut tree = KeyTree::from_view(view)?;
            self.apply(&mut tree);
            return Ok(tree.to_bytes_as(file_name, format));
        }
        let mut sparse = Sparse::new(view)?;
        for op in &self.ops {
            sparse.load(op.key())?;
        }
        self.apply(&mut sparse.tree);
        sparse.to_bytes_as(file_name, format)
    }

    /// Whether a key is deleted and then created again without its old contents.
    fn makes_anew(&self) -> bool {
        let gone = |op: &RegOp| matches!(op, RegOp::DeleteKey { .. });
        self.ops.iter().enumerate().any(|(n, op)| {
            let key = fold(op.key());
            let again = |later: &RegOp| {
                let later = fold(later.key());
                later == key || later.starts_with(&format!("{key}\\"))
            };
            gone(op) && self.ops[n + 1..].iter().any(|op| !gone(op) && again(op))
        })
    }

    /// Renders the edits as `.reg` text. The parents of every key are named too: regedit creates
    /// them, hivexregedit requires them. A value that is named twice is in two sections, because
    /// hivexregedit applies a section as a whole.
    pub fn to_reg_text(&self) -> String {
        let mut text = String::from("Windows Registry Editor Version 5.00\n");
        let mut open: Option<&str> = None;
        let mut named = BTreeSet::new();
        let mut made = BTreeSet::new();
        for op in &self.ops {
            if let RegOp::DeleteKey { key } = op {
                let _ = write!(text, "\n[-{}\\{key}]\n", self.prefix);
                open = None;
                let gone = key.to_lowercase();
                let below = format!("{gone}\\");
                made.retain(|k: &String| *k != gone && !k.starts_with(&below));
                continue;
            }
            let value = match op {
                RegOp::Set { name, .. } | RegOp::DeleteValue { name, .. } => Some(fold(name)),
                RegOp::CreateKey { .. } | RegOp::DeleteKey { .. } => None,
            };
            let again = value.as_ref().is_some_and(|name| named.contains(name));
            if again || open != Some(op.key()) {
                named.clear();
                for (end, _) in op.key().match_indices('\\') {
                    let parent = &op.key()[..end];
                    if made.insert(parent.to_lowercase()) {
                        let _ = write!(text, "\n[{}\\{parent}]\n", self.prefix);
                    }
                }
                made.insert(op.key().to_lowercase());
                let _ = write!(text, "\n[{}\\{}]\n", self.prefix, op.key());
                open = Some(op.key());
            }
            named.extend(value);
            match op {
                RegOp::Set { name, data, .. } => {
                    let _ = writeln!(text, "{}={}", value_name(name), data.to_reg());
                }
                RegOp::DeleteValue { name, .. } => {
                    let _ = writeln!(text, "{}=-", value_name(name));
                }
                RegOp::CreateKey { .. } | RegOp::DeleteKey { .. } => {}
            }
        }
        text
    }
}

fn value_name(name: &str) -> String {
    if name.is_empty() {
        "@".to_string()
    } else {
        format!("\"{}\"", escape(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rewritten hive is the same with a tree in between or without.
    #[test]
    fn rewriting_a_hive_equals_editing_its_tree() {
        let mut tree = KeyTree::new("ROOT");
        for (path, name, value) in [
            ("Select", "Default", 1),
            (r"Set001\Services\viostor\Parameters", "BusType", 1),
            (r"Set001\Services\storahci\StartOverride", "0", 3),
            (r"Set001\Services\storahci", "Start", 0),
            (r"Set002\Services\Other\Deep\Deeper", "x", 9),
        ] {
            tree.dword(path, name, value);
        }
        let bytes = tree.to_bytes("SYSTEM");
        let key = |key: &str| key.to_string();
        let delete = |path: &str| RegOp::DeleteKey { key: key(path) };
        let create = |path: &str| RegOp::CreateKey { key: key(path) };
        let set = |path: &str, name: &str| RegOp::Set {
            key: key(path),
            name: name.to_string(),
            data: RegData::Dword(7),
        };
        let cases = [
            vec![],
            vec![delete(r"SET001\services\storahci\StartOverride")],
            vec![
                set(r"Set001\services\VIOSTOR", "Start"),
                set(r"Set001\Services\new\below", "x"),
                create(r"Set003"),
                RegOp::DeleteValue {
                    key: key(r"Set002\Services\Other\Deep\Deeper"),
                    name: "X".to_string(),
                },
            ],
            vec![delete(r"Set001\Services"), delete("Set002")],
            // Created again, without anything of its old contents.
            vec![
                delete(r"Set001\Services\storahci"),
                set(r"Set001\Services\storahci", "Start"),
            ],
        ];
        for ops in cases {
            let edits = RegEdits {
                prefix: String::new(),
                ops,
            };
            let mut edited = tree.clone();
            edits.apply(&mut edited);
            let view = HiveView::new(&bytes).unwrap();
            let rewritten = edits.rewritten(&view, "SYSTEM", Format::V1_5).unwrap();
            assert_eq!(rewritten, edited.to_bytes("SYSTEM"), "{:?}", edits.ops);
        }
    }

    #[test]
    fn applied_to_a_tree() {
        let mut tree = KeyTree::new("ROOT");
        tree.sz("A\\B", "old", "1")
            .dword("A", "Keep", 7)
            .dword("A", "Gone", 8);
        let mut edits = RegEdits::new("HKEY_LOCAL_MACHINE\\SYSTEM");
        edits.ops = vec![
            RegOp::DeleteKey { key: "a\\b".into() },
            RegOp::set("A\\C", "new", RegData::Dword(1)),
            RegOp::set("A", "keep", RegData::Dword(9)),
            RegOp::DeleteValue {
                key: "A".into(),
                name: "GONE".into(),
            },
            RegOp::DeleteValue {
                key: "Z".into(),
                name: "x".into(),
            },
            RegOp::CreateKey { key: "A\\D".into() },
        ];
        edits.apply(&mut tree);
        assert!(tree.get("A\\B").is_none() && tree.get("A\\D").is_some());
        assert!(tree.get("Z").is_none(), "nothing is made by a deletion");
        assert!(tree.value("A", "Gone").is_none());
        let bytes = tree.to_bytes("SYSTEM");
        let view = crate::registry::HiveView::new(&bytes).unwrap();
        let pending = edits.pending(&view.root().unwrap()).unwrap();
        assert_eq!(pending.ops, []);
    }

    #[test]
    fn reg_text() {
        let mut edits = RegEdits::new("HKEY_LOCAL_MACHINE\\SYSTEM");
        edits.ops = vec![
            RegOp::DeleteKey { key: "A\\B".into() },
            RegOp::set("A", "x\"y", RegData::Sz("C:\\a \"b\"".into())),
            RegOp::set("A", "", RegData::Sz("ü".into())),
            RegOp::set("A", "d", RegData::Dword(10)),
            RegOp::set("A\\B\\D", "e", RegData::Dword(1)),
            RegOp::DeleteKey { key: "a\\b".into() },
            RegOp::CreateKey {
                key: "A\\B\\E".into(),
            },
            RegOp::set("C", "m", RegData::MultiSz(vec!["a".into()])),
            RegOp::DeleteValue {
                key: "C".into(),
                name: "gone".into(),
            },
        ];
        insta::assert_snapshot!(edits.to_reg_text(), @r#"
        Windows Registry Editor Version 5.00

        [-HKEY_LOCAL_MACHINE\SYSTEM\A\B]

        [HKEY_LOCAL_MACHINE\SYSTEM\A]
        "x\"y"="C:\\a \"b\""
        @=hex(1):fc,00,00,00
        "d"=dword:0000000a

        [HKEY_LOCAL_MACHINE\SYSTEM\A\B]

        [HKEY_LOCAL_MACHINE\SYSTEM\A\B\D]
        "e"=dword:00000001

        [-HKEY_LOCAL_MACHINE\SYSTEM\a\b]

        [HKEY_LOCAL_MACHINE\SYSTEM\A\B]

        [HKEY_LOCAL_MACHINE\SYSTEM\A\B\E]

        [HKEY_LOCAL_MACHINE\SYSTEM\C]
        "m"=hex(7):61,00,00,00,00,00
        "gone"=-
        "#);
    }

    #[test]
    fn a_large_value_beside_an_edit() {
        let mut tree = KeyTree::new("ROOT");
        tree.set("A\\B", "large", RegData::Binary(vec![1; SEGMENT + 1]))
            .set("A\\C", "fits", RegData::Binary(vec![1; SEGMENT]));
        let bytes = tree.to_bytes("SYSTEM");
        let view = HiveView::new(&bytes).unwrap();
        let found = |key: &str| {
            let mut edits = RegEdits::new("HKEY_LOCAL_MACHINE\\SYSTEM");
            edits.ops.push(RegOp::set(key, "other", RegData::Dword(1)));
            edits.too_large(&view).unwrap()
        };
        assert_eq!(
            found("a\\b"),
            Some(("a\\b".into(), "large".into(), SEGMENT + 1))
        );
        assert_eq!(found("A\\C"), None);
        assert_eq!(found("A"), None, "nothing of A itself");
        assert_eq!(found("new"), None);
        // A deleted key is not written.
        let gone = RegEdits {
            ops: vec![RegOp::DeleteKey { key: "A\\B".into() }],
            ..RegEdits::new("HKEY_LOCAL_MACHINE\\SYSTEM")
        };
        assert_eq!(gone.too_large(&view).unwrap(), None);
    }
}
