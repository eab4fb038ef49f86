//! Checks an edited hive with the `nt-hive` crate.
//!
//! The hive was written by libhivex, and hyper2kvm's own [`HiveView`] reads it everywhere else.
//! This reader shares no code with either. It verifies that Windows would accept the base block and
//! that every edit is present. It is not used on hives of a guest before an edit: `nt-hive` 0.3
//! panics on some damaged ones, which is why panics are caught here too.
//!
//! libhivex rewrites all values of an edited key; [`Kept`] verifies that the others are unchanged.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nt_hive::{Hive, KeyNode, KeyValueDataType, NtHiveError};

use super::edit::{RegEdits, RegOp};
use super::error::HiveError;
use super::hive::{BASE_BLOCK_SIZE, HiveView, Value};
use super::name::fold;

#[derive(Debug, thiserror::Error)]
pub enum SecondReaderError {
    #[error("the base block or a cell is not valid")]
    Invalid(#[from] NtHiveError),
    #[error("{count} edits are not there, the first in {key}")]
    Missing { count: usize, key: String },
    #[error("the hive is shorter than its hive bins")]
    Short,
    #[error("the reader gave up on the hive")]
    Panicked,
    #[error("the hive cannot be read")]
    Unreadable(#[from] HiveError),
    #[error("values of {0} that were not edited have changed")]
    Lost(String),
}

type Result<T> = std::result::Result<T, SecondReaderError>;

/// Fails unless Windows loads the hive without recovery and it has every edit.
pub fn verify(bytes: &[u8], edits: &RegEdits) -> Result<()> {
    catch_unwind(AssertUnwindSafe(|| check(bytes, edits)))
        .unwrap_or(Err(SecondReaderError::Panicked))
}

fn check(bytes: &[u8], edits: &RegEdits) -> Result<()> {
    let size = bytes.get(40..44).ok_or(SecondReaderError::Short)?;
    let bins = u32::from_le_bytes([size[0], size[1], size[2], size[3]]) as usize;
    // Real files have a tail behind the bins, which the strict constructor would refuse.
    let used = bytes
        .get(..BASE_BLOCK_SIZE.saturating_add(bins))
        .ok_or(SecondReaderError::Short)?;
    let hive = Hive::new(used)?;
    let root = hive.root_key_node()?;
    let mut missing = Vec::new();
    for op in &edits.ops {
        if !is_done(&root, op)? {
            missing.push(op.key());
        }
    }
    match missing.first() {
        None => Ok(()),
        Some(key) => Err(SecondReaderError::Missing {
            count: missing.len(),
            key: (*key).to_string(),
        }),
    }
}

fn is_done(root: &KeyNode<'_, &[u8]>, op: &RegOp) -> Result<bool> {
    let key = root.subpath(op.key()).transpose()?;
    Ok(match (op, key) {
        (RegOp::CreateKey { .. }, key) => key.is_some(),
        (RegOp::DeleteKey { .. }, key) => key.is_none(),
        (RegOp::DeleteValue { .. }, None) => true,
        (RegOp::DeleteValue { name, .. }, Some(key)) => value(&key, name)?.is_none(),
        (RegOp::Set { .. }, None) => false,
        (RegOp::Set { name, data, .. }, Some(key)) => value(&key, name)? == Some(data.to_value()),
    })
}

fn value(key: &KeyNode<'_, &[u8]>, name: &str) -> Result<Option<Value>> {
    let Some(value) = key.value(name).transpose()? else {
        return Ok(None);
    };
    let ty: KeyValueDataType = value.data_type()?;
    Ok(Some(Value {
        ty: ty as u32,
        data: value.data()?.into_vec()?,
    }))
}

/// The values of edited keys that no edit names.
pub struct Kept(Vec<(String, Vec<(String, Value)>)>);

impl Kept {
    /// Collects the values before the edits.
    pub fn of(bytes: &[u8], edits: &RegEdits) -> Result<Self> {
        let view = HiveView::new(bytes)?;
        let named: BTreeSet<(String, String)> = (edits.ops.iter())
            .filter_map(|op| match op {
                RegOp::Set { key, name, .. } | RegOp::DeleteValue { key, name } => {
                    Some((fold(key), fold(name)))
                }
                RegOp::CreateKey { .. } | RegOp::DeleteKey { .. } => None,
            })
            .collect();
        let keys: BTreeSet<&String> = named.iter().map(|(key, _)| key).collect();
        let mut kept = Vec::new();
        for key in keys {
            if deleted(key, edits) {
                continue;
            }
            let Some(found) = view.key(key)? else {
                continue;
            };
            let others = |(name, _): &(String, Value)| !named.contains(&(key.clone(), fold(name)));
            kept.push((
                key.clone(),
                found.values()?.into_iter().filter(others).collect(),
            ));
        }
        Ok(Self(kept))
    }

    /// Fails unless the edited hive still has the values, in their order.
    pub fn check(&self, edited: &[u8]) -> Result<()> {
        let view = HiveView::new(edited)?;
        for (key, kept) in &self.0 {
            let found = match view.key(key)? {
                Some(found) => found.values()?,
                None => Vec::new(),
            };
            let known = |value: &&(String, Value)| kept.iter().any(|(name, _)| *name == value.0);
            if !found.iter().filter(known).eq(kept) {
                return Err(SecondReaderError::Lost(key.clone()));
            }
        }
        Ok(())
    }
}

/// Whether an edit deletes the key or one above it. It may be created again, empty.
fn deleted(folded: &str, edits: &RegEdits) -> bool {
    edits.ops.iter().any(|op| match op {
        RegOp::DeleteKey { key } => {
            let key = fold(key);
            let below = folded.strip_prefix(&key);
            below.is_some_and(|rest| rest.is_empty() || rest.starts_with('\\'))
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::RegData;
    use crate::registry::build::KeyTree;

    #[test]
    fn says_what_is_there_and_what_is_not() {
        let mut tree = KeyTree::new("ROOT");
        tree.dword("A\\B", "n", 7).sz("A", "", "text");
        let bytes = tree.to_bytes("SYSTEM");
        let mut edits = RegEdits::new("X");
        edits.ops = vec![
            RegOp::set("a\\b", "N", RegData::Dword(7)),
            RegOp::set("A", "", RegData::Sz("text".into())),
            RegOp::DeleteKey { key: "A\\C".into() },
        ];
        verify(&bytes, &edits).unwrap();
        edits.ops.push(RegOp::set("A\\B", "n", RegData::Dword(8)));
        let error = verify(&bytes, &edits).unwrap_err();
        assert!(
            matches!(error, SecondReaderError::Missing { count: 1, .. }),
            "{error}"
        );

        // A hive over which Windows would replay logs is not finished.
        let mut dirty = bytes.clone();
        dirty[4] ^= 1;
        assert!(verify(&dirty, &RegEdits::new("X")).is_err());
        assert!(verify(&bytes[..5000], &RegEdits::new("X")).is_err());
        assert!(verify(&[], &RegEdits::new("X")).is_err());
    }

    #[test]
    fn values_that_no_edit_names_are_kept() {
        let tree = |other: u32| {
            let mut tree = KeyTree::new("ROOT");
            tree.dword("A", "other", other).dword("A", "edited", 1);
            tree.dword("Gone\\Below", "x", 1);
            tree
        };
        let mut edits = RegEdits::new("X");
        edits.ops = vec![
            RegOp::set("a", "EDITED", RegData::Dword(2)),
            RegOp::DeleteKey { key: "gone".into() },
            RegOp::set("Gone\\Below", "y", RegData::Dword(2)),
            RegOp::set("New", "y", RegData::Dword(2)),
        ];
        let kept = Kept::of(&tree(1).to_bytes("SYSTEM"), &edits).unwrap();
        let check = |mut tree: KeyTree| {
            edits.apply(&mut tree);
            kept.check(&tree.to_bytes("SYSTEM"))
        };
        check(tree(1)).unwrap();
        let lost = check(tree(2)).unwrap_err();
        assert!(matches!(lost, SecondReaderError::Lost(_)), "{lost}");
        let mut without = tree(1);
        without.remove("A");
        assert!(check(without).is_err());
    }
}
