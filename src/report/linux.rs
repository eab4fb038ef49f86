//! What `inspect` shows of a Linux guest, for people.

use crate::linux::LinuxFacts;

/// Labels and values, in the order they are shown.
pub fn rows(facts: &LinuxFacts) -> Vec<(&'static str, String)> {
    let root = &facts.root;
    let layers = match &root.layers[..] {
        [] => String::new(),
        layers => format!(" on {}", layers.join(", ")),
    };
    let mut rows = vec![
        (
            "root",
            format!(
                "{}{layers}, {} (read by {})",
                root.filesystem, root.place, facts.reader
            ),
        ),
        (
            "boot loader",
            serde_json::to_value(facts.boot_loader)
                .ok()
                .and_then(|v| v.as_str().map(str::to_owned))
                .unwrap_or_default(),
        ),
    ];
    for kernel in &facts.kernels {
        let ready: Vec<&str> = kernel.ready.iter().map(|c| c.name()).collect();
        let mut text = kernel
            .version
            .clone()
            .unwrap_or_else(|| kernel.image.clone());
        if kernel.default {
            text.push_str(" (starts by itself)");
        }
        match (&kernel.problem, &ready[..]) {
            (Some(problem), _) => text.push_str(&format!(": {problem}")),
            (None, []) => text.push_str(": has the drivers of no controller"),
            (None, ready) => text.push_str(&format!(": {}", ready.join(", "))),
        }
        rows.push(("kernel", text));
    }
    rows
}
