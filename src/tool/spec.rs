//! What a program of QEMU's is given to open, and what it can reach then.

use std::path::PathBuf;

use serde_json::Value;

use super::confine::Confinement;
use super::pass::Passed;

/// What a QEMU program is to open: a block device tree and the files it is made of.
#[derive(Debug, Clone)]
pub struct Spec {
    pub node: Value,
    /// Files the tree names by their descriptors.
    pub passed: Vec<Passed>,
    /// Connections to NBD servers, which it names by their numbers. Each is good for one program.
    pub sockets: Vec<Passed>,
    /// Files the tree names as they are called, and whether they may be written: those made by this
    /// run.
    pub named: Vec<(PathBuf, bool)>,
}

impl Spec {
    /// A tree that names no descriptor.
    pub fn named(node: Value, files: impl IntoIterator<Item = (PathBuf, bool)>) -> Self {
        Self {
            node,
            passed: Vec::new(),
            sockets: Vec::new(),
            named: files.into_iter().collect(),
        }
    }

    /// Everything the program must be given open.
    pub fn given(&self) -> Vec<Passed> {
        self.passed.iter().chain(&self.sockets).cloned().collect()
    }

    /// Every file, and whether it may be written.
    pub fn files(&self) -> impl Iterator<Item = (PathBuf, bool)> {
        let passed = self.passed.iter();
        let passed = passed.map(|p| (PathBuf::from(p.name()), p.is_writable()));
        passed.chain(self.named.iter().cloned())
    }

    /// These files and no others.
    pub fn confinement(&self) -> Confinement {
        Confinement::to_files(self.files())
    }
}
