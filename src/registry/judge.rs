//! A second opinion on a merged hive, by the `nt-hive` crate.
//!
//! The hive was written by libhivex and is read by our own [`HiveView`](super::HiveView) everywhere
//! else. A reader that shares nothing with either says here whether Windows would accept its base block
//! and whether every edit is there. Not used on hives as they come from a guest: `nt-hive` 0.3 panics
//! on some damaged ones, which is why the panic is caught here too.

use std::panic::{AssertUnwindSafe, catch_unwind};

use nt_hive::{Hive, KeyNode, KeyValueDataType, NtHiveError};

use super::edit::{RegEdits, RegOp};
use super::hive::{BASE_BLOCK_SIZE, Value};

#[derive(Debug, thiserror::Error)]
pub enum JudgeError {
    #[error("the base block or a cell is not valid")]
    Invalid(#[from] NtHiveError),
    #[error("{count} edits are not there, the first in {key}")]
    Missing { count: usize, key: String },
    #[error("the hive is shorter than its hive bins")]
    Short,
    #[error("the reader gave up on the hive")]
    Panicked,
}

type Result<T> = std::result::Result<T, JudgeError>;

/// Whether the hive is one that Windows loads without recovery, and holds every edit.
pub fn holds(bytes: &[u8], edits: &RegEdits) -> Result<()> {
    catch_unwind(AssertUnwindSafe(|| check(bytes, edits))).unwrap_or(Err(JudgeError::Panicked))
}

fn check(bytes: &[u8], edits: &RegEdits) -> Result<()> {
    let size = bytes.get(40..44).ok_or(JudgeError::Short)?;
    let bins = u32::from_le_bytes([size[0], size[1], size[2], size[3]]) as usize;
    // Real files carry a tail behind the bins, which the strict constructor would refuse.
    let used = bytes
        .get(..BASE_BLOCK_SIZE.saturating_add(bins))
        .ok_or(JudgeError::Short)?;
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
        Some(key) => Err(JudgeError::Missing {
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
        holds(&bytes, &edits).unwrap();
        edits.ops.push(RegOp::set("A\\B", "n", RegData::Dword(8)));
        let error = holds(&bytes, &edits).unwrap_err();
        assert!(
            matches!(error, JudgeError::Missing { count: 1, .. }),
            "{error}"
        );

        // What Windows would replay logs over is not a finished hive.
        let mut dirty = bytes.clone();
        dirty[4] ^= 1;
        assert!(holds(&dirty, &RegEdits::new("X")).is_err());
        assert!(holds(&bytes[..5000], &RegEdits::new("X")).is_err());
        assert!(holds(&[], &RegEdits::new("X")).is_err());
    }
}
