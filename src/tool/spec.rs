//! The block device tree for a program of QEMU's, and the access that follows from it.

use std::path::PathBuf;

use serde_json::Value;

use super::confine::Confinement;
use super::pass::Passed;

/// The input of a QEMU program: a block device tree and its files.
#[derive(Debug, Clone)]
pub struct Spec {
    pub node: Value,
    /// Files that the tree names by their descriptors.
    pub passed: Vec<Passed>,
    /// Connections to NBD servers, which the tree names by number. Each serves one program only.
    pub sockets: Vec<Passed>,
    /// Files of this run that the tree names by path, and whether they may be written.
    pub named: Vec<(PathBuf, bool)>,
}

impl Spec {
    /// A tree without descriptors.
    pub fn named(node: Value, files: impl IntoIterator<Item = (PathBuf, bool)>) -> Self {
        Self {
            node,
            passed: Vec::new(),
            sockets: Vec::new(),
            named: files.into_iter().collect(),
        }
    }

    /// All descriptors that the program has to inherit.
    pub fn given(&self) -> Vec<Passed> {
        self.passed.iter().chain(&self.sockets).cloned().collect()
    }

    /// Every file, and whether it may be written.
    pub fn files(&self) -> impl Iterator<Item = (PathBuf, bool)> {
        let passed = self.passed.iter();
        let passed = passed.map(|p| (PathBuf::from(p.name()), p.is_writable()));
        passed.chain(self.named.iter().cloned())
    }

    /// Access to these files and no others.
    pub fn confinement(&self) -> Confinement {
        Confinement::to_files(self.files())
    }
}
