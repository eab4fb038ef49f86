//! The Linux part of `inspect` for people.

use crate::inspect::linux::LinuxFacts;

/// Labels and values, in the order they are shown.
pub fn rows(facts: &LinuxFacts) -> Vec<(&'static str, String)> {
    let root = &facts.root;
    let layers = match &root.layers[..] {
        [] => String::new(),
        layers => format!(" on {}", layers.join(", ")),
    };
    let place = format!("{}{layers}, {}", root.filesystem, root.place);
    vec![("root", format!("{place} (read by {})", facts.reader))]
}
