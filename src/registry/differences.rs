//! Differences between two hives, for tests.

use std::collections::HashMap;
use std::fmt;

use super::cell::MAX_DEPTH;
use super::error::Result as HiveResult;
use super::hive::{HiveView, Key, Value};
use super::name::fold;

/// A difference between two hives at one key or value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Path below the root; empty for the root itself.
    pub key: String,
    pub what: Change,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    OnlyInA,
    OnlyInB,
    /// A value, by name, with the data of either side.
    Value {
        name: String,
        a: Option<Value>,
        b: Option<Value>,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.key.escape_debug();
        match &self.what {
            Change::OnlyInA => write!(f, "[{key}] only in the first"),
            Change::OnlyInB => write!(f, "[{key}] only in the second"),
            Change::Value { name, a, b } => {
                let name = name.escape_debug();
                write!(f, "[{key}] \"{name}\": {a:?} / {b:?}")
            }
        }
    }
}

/// Compares two hives key by key and value by value. Names compare without regard to case; order is
/// ignored. A key missing on one side is one difference, whatever is below it.
pub fn deep_eq(a: &HiveView<'_>, b: &HiveView<'_>) -> HiveResult<Vec<Difference>> {
    let mut differences = Vec::new();
    let mut pending = vec![(String::new(), a.root()?, b.root()?, 0)];
    while let Some((path, a, b, depth)) = pending.pop() {
        compare_values(&path, &a, &b, &mut differences)?;
        let b_keys = keys_by_name(&b)?;
        let mut b_left: HashMap<String, Key<'_>> = b_keys.into_iter().collect();
        for (name, key) in keys_by_name(&a)? {
            let path = match path.as_str() {
                "" => key.name()?,
                path => format!("{path}\\{}", key.name()?),
            };
            match b_left.remove(&name) {
                // The guard matters only for cycles in hives that were not walked.
                Some(other) if depth < MAX_DEPTH => pending.push((path, key, other, depth + 1)),
                Some(_) => {}
                None => differences.push(Difference {
                    key: path,
                    what: Change::OnlyInA,
                }),
            }
        }
        for key in b_left.values() {
            let name = key.name()?;
            differences.push(Difference {
                key: if path.is_empty() {
                    name
                } else {
                    format!("{path}\\{name}")
                },
                what: Change::OnlyInB,
            });
        }
    }
    differences.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(differences)
}

fn keys_by_name<'h>(key: &Key<'h>) -> HiveResult<Vec<(String, Key<'h>)>> {
    key.keys()?
        .into_iter()
        .map(|key| Ok((fold(&key.name()?), key)))
        .collect()
}

fn compare_values(
    path: &str,
    a: &Key<'_>,
    b: &Key<'_>,
    differences: &mut Vec<Difference>,
) -> HiveResult<()> {
    let mut left: HashMap<String, (String, Value)> = b
        .values()?
        .into_iter()
        .map(|(name, value)| (fold(&name), (name, value)))
        .collect();
    let mut differ = |name, a, b| {
        differences.push(Difference {
            key: path.to_string(),
            what: Change::Value { name, a, b },
        });
    };
    for (name, value) in a.values()? {
        match left.remove(&fold(&name)) {
            Some((_, other)) if other == value => {}
            other => differ(name, Some(value), other.map(|(_, value)| value)),
        }
    }
    for (name, value) in left.into_values() {
        differ(name, None, Some(value));
    }
    Ok(())
}
