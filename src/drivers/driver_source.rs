//! The origin of driver files: a directory, or an ISO image.
//!
//! Paths are relative, with `/`, in the driver source's own case. Lookups ignore case, because it
//! depends on the tool that made an image.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::iso::{Iso, IsoError, IsoFile, Names, is_clean_name};

/// The largest file that is read; driver packages and installers are far smaller.
pub const MAX_FILE: u64 = 256 * 1024 * 1024;
const MAX_DEPTH: usize = 16;
const MAX_ENTRIES: usize = 100_000;

#[derive(Debug, thiserror::Error)]
pub enum DriverSourceError {
    #[error("{path} does not exist")]
    NotFound { path: String },
    #[error("{path} is neither a directory nor an ISO image")]
    NotIso { path: String },
    #[error("{path} is empty")]
    Empty { path: String },
    #[error("{path} has more than {limit}")]
    Limit { path: String, limit: &'static str },
    #[error("{path} is {size} bytes, more than the {MAX_FILE} bytes read from a driver source")]
    TooLarge { path: String, size: u64 },
    #[error("reading {path}")]
    Io { path: String, source: io::Error },
    #[error("reading {path}")]
    Iso { path: String, source: IsoError },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverFile {
    pub path: String,
    pub size: u64,
}

pub trait DriverSource {
    /// Describes the driver source for people: its kind and path.
    fn describe(&self) -> String;
    /// The files, sorted by path.
    fn files(&self) -> &[DriverFile];
    /// Reads a whole file; the path may differ in case.
    fn read(&self, path: &str) -> Result<Vec<u8>, DriverSourceError>;
    /// Whether names are truncated to eight characters and three, so that drivers with longer names
    /// are not found.
    fn has_short_names(&self) -> bool {
        false
    }
}

/// The warning about a driver source with such names.
pub fn short_names_warning(driver_source: &dyn DriverSource) -> Option<String> {
    driver_source.has_short_names().then(|| {
        format!(
            "{} has names of 8.3 characters only (neither Joliet nor Rock Ridge): drivers and tools with \
             longer names are not found on it and are left out; use the ISO as the virtio-win project publishes \
             it, or a directory with its files",
            driver_source.describe()
        )
    })
}

/// A driver source with additional generated files under a directory.
pub struct WithGenerated<'a> {
    pub source: &'a dyn DriverSource,
    pub folder: &'a str,
    pub generated: &'a [(String, Vec<u8>)],
}

impl DriverSource for WithGenerated<'_> {
    fn describe(&self) -> String {
        self.source.describe()
    }

    fn has_short_names(&self) -> bool {
        self.source.has_short_names()
    }

    fn files(&self) -> &[DriverFile] {
        self.source.files()
    }

    fn read(&self, path: &str) -> Result<Vec<u8>, DriverSourceError> {
        let own = path
            .strip_prefix(self.folder)
            .and_then(|rest| rest.strip_prefix('/'))
            .and_then(|name| self.generated.iter().find(|(known, _)| known == name));
        match own {
            Some((_, bytes)) => Ok(bytes.clone()),
            None => self.source.read(path),
        }
    }
}

/// Opens a directory or an ISO image and lists its files.
pub fn open(path: &Path) -> Result<Box<dyn DriverSource>, DriverSourceError> {
    let name = path.display().to_string();
    let meta = std::fs::metadata(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => DriverSourceError::NotFound { path: name.clone() },
        _ => DriverSourceError::Io {
            path: name.clone(),
            source,
        },
    })?;
    let driver_source: Box<dyn DriverSource> = if meta.is_dir() {
        Box::new(Folder::open(path)?)
    } else if meta.is_file() {
        Box::new(IsoImage::open(path)?)
    } else {
        return Err(DriverSourceError::NotIso { path: name });
    };
    if driver_source.files().is_empty() {
        return Err(DriverSourceError::Empty { path: name });
    }
    Ok(driver_source)
}

fn index(files: &[DriverFile]) -> HashMap<String, usize> {
    files
        .iter()
        .enumerate()
        .map(|(i, f)| (f.path.to_lowercase(), i))
        .collect()
}

/// A driver source in memory.
#[cfg(test)]
pub struct Memory {
    files: Vec<DriverFile>,
    contents: Vec<Vec<u8>>,
    index: HashMap<String, usize>,
}

#[cfg(test)]
impl Memory {
    pub fn new(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let mut files: Vec<(String, Vec<u8>)> = files.into_iter().collect();
        files.sort();
        let (files, contents): (Vec<_>, Vec<_>) = files
            .into_iter()
            .map(|(path, bytes)| {
                let size = bytes.len() as u64;
                (DriverFile { path, size }, bytes)
            })
            .unzip();
        Self {
            index: index(&files),
            files,
            contents,
        }
    }
}

#[cfg(test)]
impl DriverSource for Memory {
    fn describe(&self) -> String {
        "driver files in memory".to_string()
    }

    fn files(&self) -> &[DriverFile] {
        &self.files
    }

    fn read(&self, path: &str) -> Result<Vec<u8>, DriverSourceError> {
        self.index
            .get(&path.to_lowercase())
            .and_then(|&i| self.contents.get(i))
            .cloned()
            .ok_or_else(|| DriverSourceError::NotFound { path: path.into() })
    }
}

struct Folder {
    root: String,
    files: Vec<DriverFile>,
    real: Vec<PathBuf>,
    index: HashMap<String, usize>,
}

impl Folder {
    fn open(path: &Path) -> Result<Self, DriverSourceError> {
        Self::with_at_most(MAX_ENTRIES, path)
    }

    fn with_at_most(most: usize, path: &Path) -> Result<Self, DriverSourceError> {
        let io = |at: &Path, source| DriverSourceError::Io {
            path: at.display().to_string(),
            source,
        };
        let root = path.canonicalize().map_err(|e| io(path, e))?;
        let mut found = Vec::new();
        let mut open = vec![(String::new(), root.clone(), 0usize)];
        let mut entries = 0usize;
        let limit = |limit| DriverSourceError::Limit {
            path: path.display().to_string(),
            limit,
        };
        while let Some((prefix, dir, depth)) = open.pop() {
            for entry in std::fs::read_dir(&dir).map_err(|e| io(&dir, e))? {
                let entry = entry.map_err(|e| io(&dir, e))?;
                entries += 1;
                if entries > most {
                    return Err(limit("100000 entries"));
                }
                let name = entry.file_name();
                let Some(name) = name.to_str().filter(|n| is_clean_name(n)) else {
                    continue;
                };
                // A link may point elsewhere in the directory, but neither out of it nor back up.
                let is_plain = entry.file_type().is_ok_and(|kind| !kind.is_symlink());
                let real = match is_plain {
                    true => Ok(entry.path()),
                    false => entry.path().canonicalize(),
                };
                let Ok(real) = real else {
                    continue;
                };
                if !real.starts_with(&root) || dir.starts_with(&real) {
                    continue;
                }
                let meta = std::fs::metadata(&real).map_err(|e| io(&real, e))?;
                let relative = if prefix.is_empty() {
                    name.to_string()
                } else {
                    format!("{prefix}/{name}")
                };
                if meta.is_dir() {
                    if depth + 1 > MAX_DEPTH {
                        return Err(limit("16 levels of directories"));
                    }
                    open.push((relative, real, depth + 1));
                } else if meta.is_file() {
                    let file = DriverFile {
                        path: relative,
                        size: meta.len(),
                    };
                    found.push((file, real));
                }
            }
        }
        found.sort_by(|a, b| a.0.path.cmp(&b.0.path));
        let (files, real): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        Ok(Self {
            root: path.display().to_string(),
            index: index(&files),
            files,
            real,
        })
    }
}

impl DriverSource for Folder {
    fn describe(&self) -> String {
        format!("directory {}", self.root)
    }

    fn files(&self) -> &[DriverFile] {
        &self.files
    }

    fn read(&self, path: &str) -> Result<Vec<u8>, DriverSourceError> {
        let (file, real) = self
            .index
            .get(&path.to_lowercase())
            .and_then(|&i| self.files.get(i).zip(self.real.get(i)))
            .ok_or_else(|| DriverSourceError::NotFound { path: path.into() })?;
        check_size(file)?;
        let io = |source| DriverSourceError::Io {
            path: real.display().to_string(),
            source,
        };
        let mut bytes = Vec::new();
        File::open(real)
            .map_err(io)?
            .take(MAX_FILE + 1)
            .read_to_end(&mut bytes)
            .map_err(io)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(DriverSourceError::TooLarge {
                path: path.into(),
                size: bytes.len() as u64,
            });
        }
        Ok(bytes)
    }
}

fn check_size(file: &DriverFile) -> Result<(), DriverSourceError> {
    if file.size > MAX_FILE {
        return Err(DriverSourceError::TooLarge {
            path: file.path.clone(),
            size: file.size,
        });
    }
    Ok(())
}

/// Whether every part of the path has at most eight characters and three.
fn is_short(file: &DriverFile) -> bool {
    file.path.split('/').all(|name| {
        let (stem, extension) = name.rsplit_once('.').unwrap_or((name, ""));
        stem.len() <= 8 && extension.len() <= 3
    })
}

struct IsoImage {
    path: String,
    label: String,
    short_names: bool,
    image: Mutex<Iso<BufReader<File>>>,
    files: Vec<DriverFile>,
    iso_files: Vec<IsoFile>,
    index: HashMap<String, usize>,
}

impl IsoImage {
    fn open(path: &Path) -> Result<Self, DriverSourceError> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|source| DriverSourceError::Io {
            path: name.clone(),
            source,
        })?;
        let mut iso = Iso::open(BufReader::new(file)).map_err(|source| match source {
            IsoError::NotIso => DriverSourceError::NotIso { path: name.clone() },
            source => DriverSourceError::Iso {
                path: name.clone(),
                source,
            },
        })?;
        let iso_files = std::mem::take(&mut iso.files);
        let files: Vec<DriverFile> = iso_files
            .iter()
            .map(|f| DriverFile {
                path: f.path.clone(),
                size: f.size,
            })
            .collect();
        Ok(Self {
            path: name,
            label: iso.label.clone(),
            short_names: iso.names() == Names::Plain && files.iter().all(is_short),
            image: Mutex::new(iso),
            index: index(&files),
            files,
            iso_files,
        })
    }
}

impl DriverSource for IsoImage {
    fn describe(&self) -> String {
        format!("ISO image {} ({})", self.path, self.label)
    }

    fn has_short_names(&self) -> bool {
        self.short_names
    }

    fn files(&self) -> &[DriverFile] {
        &self.files
    }

    fn read(&self, path: &str) -> Result<Vec<u8>, DriverSourceError> {
        let (file, iso_file) = self
            .index
            .get(&path.to_lowercase())
            .and_then(|&i| self.files.get(i).zip(self.iso_files.get(i)))
            .ok_or_else(|| DriverSourceError::NotFound { path: path.into() })?;
        check_size(file)?;
        // The reader of a thread that panicked is reused safely: every read seeks first.
        let mut image = self.image.lock().unwrap_or_else(|e| e.into_inner());
        image
            .read(iso_file)
            .map_err(|source| DriverSourceError::Iso {
                path: format!("{} in {}", path, self.path),
                source,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_folder_with_links() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), b"s").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("Viostor/w10")).unwrap();
        std::fs::write(root.join("Viostor/w10/a.inf"), b"inf").unwrap();
        // Names that no path of Windows may have.
        for name in ["a\\b", "c\u{7}"] {
            std::fs::write(root.join(name), b"x").unwrap();
        }
        symlink("w10", root.join("Viostor/2k22")).unwrap();
        symlink(outside.path(), root.join("out")).unwrap();
        symlink(outside.path().join("secret"), root.join("secret")).unwrap();
        symlink("..", root.join("Viostor/loop")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        let driver_source = open(root).unwrap();
        let paths: Vec<&str> = driver_source
            .files()
            .iter()
            .map(|f| f.path.as_str())
            .collect();
        assert_eq!(paths, ["Viostor/2k22/a.inf", "Viostor/w10/a.inf"]);
        assert_eq!(driver_source.read("VIOSTOR/W10/A.INF").unwrap(), b"inf");
        for path in ["secret", "out/secret", "../secret", "/etc/passwd", ""] {
            assert!(
                matches!(
                    driver_source.read(path),
                    Err(DriverSourceError::NotFound { .. })
                ),
                "{path}"
            );
        }
    }

    #[test]
    fn what_cannot_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text.iso");
        std::fs::write(&text, b"not an image").unwrap();
        let empty = dir.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        let error = |path: &Path| open(path).err().unwrap().to_string();
        assert!(error(&text).contains("neither a directory nor an ISO"));
        assert!(error(&empty).contains("is empty"));
        assert!(error(&dir.path().join("gone")).contains("does not exist"));
        assert!(error(Path::new("/dev/null")).contains("neither"));
    }

    #[test]
    fn only_what_was_generated_in_its_directory_replaces_a_file_of_the_source() {
        let source = Memory::new([
            ("own/a.inf".to_owned(), b"source".to_vec()),
            ("b.inf".to_owned(), b"source".to_vec()),
        ]);
        let generated = [("a.inf".to_owned(), b"generated".to_vec())];
        let driver_source = WithGenerated {
            source: &source,
            folder: "own",
            generated: &generated,
        };
        for (path, found) in [
            ("own/a.inf", Some("generated")),
            ("b.inf", Some("source")),
            ("a.inf", None),
            ("owna.inf", None),
            ("own/b.inf", None),
            ("own/own/a.inf", None),
        ] {
            let bytes = driver_source.read(path).ok();
            assert_eq!(bytes.as_deref(), found.map(str::as_bytes), "{path}");
        }
    }

    #[test]
    fn names_are_short_when_every_part_of_the_path_is() {
        for (path, short) in [
            ("VIOSTOR/W10/AMD64/VIOSTOR.INF", true),
            ("12345678.123", true),
            ("123456789.123", false),
            ("12345678.1234", false),
            ("LONGFOLDER/A.INF", false),
            ("A/LONG-NAME", false),
            ("README", true),
            ("w8.1/a.b", true),
        ] {
            let file = DriverFile {
                path: path.into(),
                size: 1,
            };
            assert_eq!(is_short(&file), short, "{path}");
        }
    }

    #[test]
    fn a_file_of_a_size_that_no_driver_has_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        for (name, size, fine) in [("most", MAX_FILE, true), ("more", MAX_FILE + 2, false)] {
            let path = dir.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(size).unwrap();
            let file = DriverFile {
                path: name.into(),
                size,
            };
            assert_eq!(check_size(&file).is_ok(), fine, "{name}");
        }
        let read = open(dir.path()).unwrap().read("more").unwrap_err();
        assert_eq!(
            read.to_string(),
            "more is 268435458 bytes, more than the 268435456 bytes read from a driver source"
        );
    }

    /// The limit is for the whole tree, and for what is no file of a driver too.
    #[test]
    fn a_directory_with_too_many_entries_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a/1", "a/2", "b/1", "b/2", "b/c\u{7}"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, b"x").unwrap();
        }
        assert_eq!(MAX_ENTRIES, 100_000);
        assert_eq!(Folder::with_at_most(7, dir.path()).unwrap().files.len(), 4);
        let error = Folder::with_at_most(6, dir.path()).err().unwrap();
        let message = format!("{} has more than 100000 entries", dir.path().display());
        assert_eq!(error.to_string(), message);
    }

    #[test]
    fn directories_are_read_down_to_a_depth() {
        let dir = tempfile::tempdir().unwrap();
        let levels = |n: usize| dir.path().join(vec!["d"; n].join("/"));
        std::fs::create_dir_all(levels(MAX_DEPTH)).unwrap();
        std::fs::write(levels(MAX_DEPTH).join("a"), b"x").unwrap();
        let driver_source = open(dir.path()).unwrap();
        assert_eq!(
            driver_source.files()[0].path,
            format!("{}a", "d/".repeat(MAX_DEPTH))
        );
        assert_eq!(
            driver_source.describe(),
            format!("directory {}", dir.path().display())
        );
        assert!(!driver_source.has_short_names());
        assert_eq!(short_names_warning(driver_source.as_ref()), None);
        std::fs::create_dir(levels(MAX_DEPTH + 1)).unwrap();
        let error = open(dir.path()).err().unwrap();
        let message = format!(
            "{} has more than 16 levels of directories",
            dir.path().display()
        );
        assert_eq!(error.to_string(), message);
    }
}
