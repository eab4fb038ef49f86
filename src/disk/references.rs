//! [`References`]: the files that an image may name.

use std::io;
use std::path::{Path, PathBuf};

use super::charset::Name;
use super::error::{ImageError, Result};
use super::hold::{Found, Held};
use super::remote;

/// The files to which a chain may refer.
pub(super) struct References {
    /// Canonical files and directories.
    roots: Vec<PathBuf>,
}

impl References {
    pub(super) fn new(named: &Held, allow: &[PathBuf]) -> Self {
        let is_file = !named.is_block_device();
        // The directory as named, and the real one of the file. Files beside a device, or in the
        // root directory, are unrelated to it.
        let own = [
            named.path().parent().map(Path::to_owned),
            named
                .real()
                .ok()
                .and_then(|p| p.parent().map(Path::to_owned)),
        ];
        let roots = own
            .into_iter()
            .flatten()
            .filter_map(|folder| folder.canonicalize().ok())
            .filter(|folder| is_file && folder.parent().is_some())
            .chain(allow.iter().filter_map(|path| path.canonicalize().ok()))
            .collect();
        Self { roots }
    }

    /// Opens the file that `name` in the image `path` means, if that is allowed. It keeps the name
    /// it was given, because its own references are relative to that.
    pub(super) fn open(&self, path: &Path, name: &Name) -> Result<Held> {
        let text = &name.text;
        if let Some(placeholder) = remote::backing(text) {
            return Held::open(&placeholder);
        }
        // A name that QEMU would parse as a protocol.
        let protocol = text
            .find([':', '/'])
            .is_some_and(|at| text.as_bytes()[at] == b':');
        if protocol || text.is_empty() || text.contains('\0') {
            return Err(ImageError::NotAFileName {
                path: path.into(),
                target: shown(text),
            });
        }
        let spellings = name.spellings().into_iter();
        let files = spellings.map(|name| remote::resolve(path, Path::new(&name)));
        let mut missing = None;
        for file in files {
            match Found::by_name(&file) {
                Ok(found) => {
                    let real = found.real().map_err(|e| ImageError::from_io(&file, e))?;
                    if !self.roots.iter().any(|root| real.starts_with(root)) {
                        return Err(self.outside(path, text));
                    }
                    return found.hold();
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    missing.get_or_insert(file);
                }
                // Not even the existence of a file elsewhere is revealed.
                Err(_) => return Err(self.outside(path, text)),
            }
        }
        match missing {
            Some(file) if self.allows_missing(&file) => Err(ImageError::PartMissing {
                path: file,
                needed_by: path.into(),
            }),
            _ => Err(self.outside(path, text)),
        }
    }

    fn allows_missing(&self, file: &Path) -> bool {
        file.parent()
            .and_then(|folder| folder.canonicalize().ok())
            .is_some_and(|folder| self.roots.iter().any(|root| folder.starts_with(root)))
    }

    fn outside(&self, path: &Path, name: &str) -> ImageError {
        ImageError::Outside {
            path: path.into(),
            target: shown(name),
        }
    }
}

pub(super) fn shown(name: &str) -> String {
    crate::tool::clean(name.as_bytes())
}
