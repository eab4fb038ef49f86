//! Keys for encrypted volumes, in the form `--key SELECTOR:TYPE:VALUE` (the syntax of virt-v2v).
//!
//! A key is in memory only. It is passed to guestfish through a pipe, is never an argument of a
//! program, and no `Debug` or error shows it. It is erased when it is dropped, and a process with a
//! key leaves no core dump. The type `clevis` of virt-v2v is not supported: its server is
//! unreachable, because the appliance has no network.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};
use zeroize::Zeroizing;

use super::fve::keys::{Credential, StartupKey, Stretched};
use super::{DiskId, VolumeId};
use crate::tool::cmd::keep_from_tools;
use crate::tool::guestfish::Secret;

/// The longest key: LUKS accepts 512 bytes, and guestfish a line.
const MAX_KEY: usize = 512;
/// The largest key file. A `.BEK` file has 156 bytes or a few more.
const MAX_FILE: u64 = 64 << 10;

/// All given keys. None by default.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    keys: Arc<Vec<Key>>,
    stretched: Arc<Stretched>,
    /// The disk for which they are.
    disk: DiskId,
}

#[derive(Debug)]
struct Key {
    selector: Selector,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Text(Secret),
    /// For BitLocker; the appliance does not support it.
    StartupKey(StartupKey),
}

#[derive(Debug, PartialEq, Eq)]
enum Selector {
    All,
    Volume {
        /// `None`: any disk with such a partition.
        disk: Option<u32>,
        partition: u32,
    },
    /// The UUID of a LUKS header, lower case.
    Uuid(String),
}

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Without the text, which may contain a key.
    #[error("--key is not of the form SELECTOR:key:KEY, SELECTOR:file:PATH or SELECTOR:env:NAME")]
    Form,
    #[error("keeping keys out of core dumps")]
    CoreDump(#[source] std::io::Error),
    #[error(
        "--key {0}: all, the number of a partition, DISK/PARTITION, /dev/sdaN or the UUID of a LUKS volume is expected"
    )]
    Selector(String),
    #[error("--key with clevis is not supported: the appliance has no network to ask its server")]
    Clevis,
    #[error("reading the key file {file}")]
    File {
        file: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the environment variable {0} with the key is not set")]
    Env(String),
    #[error("the key for {0} is {1}")]
    Unusable(String, &'static str),
}

impl Keys {
    /// Parses the keys of the command line. The second value is true if one was given in clear.
    pub fn parse(args: &[String]) -> Result<(Self, bool), KeyError> {
        let mut keys = Vec::new();
        let mut in_clear = false;
        for arg in args {
            let (name, rest) = arg.split_once(':').ok_or(KeyError::Form)?;
            if rest == "clevis" {
                return Err(KeyError::Clevis);
            }
            let (kind, value) = rest.split_once(':').ok_or(KeyError::Form)?;
            let value = match kind {
                "key" => {
                    in_clear = true;
                    text_key(name, Zeroizing::new(value.to_string()))?
                }
                "file" => read_file(name, value)?,
                "env" => {
                    let text = std::env::var(value).map_err(|_| KeyError::Env(value.to_string()));
                    keep_from_tools(value);
                    text_key(name, Zeroizing::new(text?))?
                }
                _ => return Err(KeyError::Form),
            };
            keys.push(Key {
                selector: selector(name)?,
                value,
            });
        }
        if !keys.is_empty() {
            leave_no_core_dump().map_err(KeyError::CoreDump)?;
        }
        let keys = Self {
            keys: Arc::new(keys),
            stretched: Arc::default(),
            disk: DiskId::ONLY,
        };
        Ok((keys, in_clear))
    }

    /// The same keys for the volumes of one disk of a VM.
    pub fn of_disk(&self, disk: DiskId) -> Self {
        Self {
            keys: self.keys.clone(),
            stretched: self.stretched.clone(),
            disk,
        }
    }

    /// Whether none of them can be for a volume of this disk.
    pub fn is_empty(&self) -> bool {
        !self.keys.iter().any(|key| match key.selector {
            Selector::Volume { disk, .. } => self.is_of(disk),
            Selector::All | Selector::Uuid(_) => true,
        })
    }

    fn is_of(&self, disk: Option<u32>) -> bool {
        disk.is_none_or(|number| number == self.disk.number())
    }

    /// The keys to try on a volume, in the given order.
    pub fn matching(&self, volume: VolumeId, uuid: Option<&str>) -> Vec<Secret> {
        let fitting = self.fitting(volume, uuid);
        let texts = fitting.filter_map(|key| match &key.value {
            Value::Text(secret) => Some(secret.clone()),
            Value::StartupKey(_) => None,
        });
        texts.collect()
    }

    /// The keys to try on a BitLocker volume, which also accepts startup keys.
    pub fn for_bitlocker(&self, volume: VolumeId) -> Vec<Credential<'_>> {
        let credentials = self.fitting(volume, None).map(|key| match &key.value {
            Value::Text(secret) => Credential::Text(secret.expose()),
            Value::StartupKey(key) => Credential::StartupKey(key),
        });
        credentials.collect()
    }

    /// The passwords already stretched with these keys.
    pub fn stretched(&self) -> &Stretched {
        &self.stretched
    }

    fn fitting(&self, volume: VolumeId, uuid: Option<&str>) -> impl Iterator<Item = &Key> {
        let fits = move |selector: &Selector| match selector {
            Selector::All => true,
            Selector::Volume { disk, partition } => {
                *partition == volume.partition && self.is_of(*disk)
            }
            Selector::Uuid(wanted) => uuid.is_some_and(|uuid| uuid.eq_ignore_ascii_case(wanted)),
        };
        self.keys.iter().filter(move |key| fits(&key.selector))
    }
}

/// Disables core dumps: a crash must not put keys on the disk of the host. Started programs inherit
/// the limit: a child of a process with keys leaves no core file either.
fn leave_no_core_dump() -> std::io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let limit = getrlimit(Resource::Core);
    let none = Rlimit {
        current: Some(0),
        maximum: limit.maximum,
    };
    Ok(setrlimit(Resource::Core, none)?)
}

fn selector(name: &str) -> Result<Selector, KeyError> {
    let on_any = |partition| Selector::Volume {
        disk: None,
        partition,
    };
    let number = name.strip_prefix("/dev/sda").unwrap_or(name);
    if name == "all" {
        Ok(Selector::All)
    } else if name == "/dev/sda" {
        Ok(on_any(0))
    } else if let Ok(partition) = number.parse() {
        Ok(on_any(partition))
    } else if let Some((Ok(disk @ 1..), Ok(partition))) = name
        .split_once('/')
        .map(|(disk, partition)| (disk.parse(), partition.parse()))
    {
        Ok(Selector::Volume {
            disk: Some(disk),
            partition,
        })
    } else if uuid::Uuid::try_parse(name).is_ok() {
        Ok(Selector::Uuid(name.to_lowercase()))
    } else {
        Err(KeyError::Selector(name.to_string()))
    }
}

fn text_key(name: &str, text: Zeroizing<String>) -> Result<Value, KeyError> {
    let problem = match text.as_str() {
        "" => Some("empty"),
        t if t.len() > MAX_KEY => Some("longer than 512 bytes"),
        t if t.chars().any(char::is_control) => Some("more than one line of text"),
        _ => None,
    };
    match problem {
        Some(problem) => Err(KeyError::Unusable(name.to_string(), problem)),
        None => Ok(Value::Text(Secret::new(text.to_string()))),
    }
}

/// Reads a key file: a `.BEK` file, or text. The end of its line is not part of the key. Windows
/// saves UTF-16.
fn read_file(name: &str, file: &str) -> Result<Value, KeyError> {
    let failed = |source| KeyError::File {
        file: file.to_string(),
        source,
    };
    let unusable = |problem| KeyError::Unusable(name.to_string(), problem);
    let mut bytes = Zeroizing::new(Vec::new());
    let opened = std::fs::File::open(Path::new(file)).map_err(failed)?;
    opened
        .take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(unusable("in a file of more than 64 KiB"));
    }
    if StartupKey::is_one(&bytes) {
        let key = StartupKey::parse(&bytes);
        return key
            .map(Value::StartupKey)
            .ok_or_else(|| unusable("a damaged .BEK file"));
    }
    let text = match bytes.strip_prefix(&[0xff, 0xfe]) {
        Some(wide) => {
            let units = wide
                .chunks_exact(2)
                .map(|b| u16::from_le_bytes([b[0], b[1]]));
            let units = Zeroizing::new(units.collect::<Vec<u16>>());
            String::from_utf16(&units).ok()
        }
        None => std::str::from_utf8(&bytes).ok().map(str::to_string),
    };
    let text = Zeroizing::new(text.ok_or_else(|| unusable("not text"))?);
    let line = text.trim_end_matches(['\r', '\n']);
    text_key(name, Zeroizing::new(line.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<(Keys, bool), KeyError> {
        Keys::parse(&args.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn which_key_for_which_volume() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, "from: a file\r\n").unwrap();
        let wide = dir.path().join("wide");
        let utf16: Vec<u8> = "wide".encode_utf16().flat_map(u16::to_le_bytes).collect();
        std::fs::write(&wide, [&[0xff, 0xfe], &utf16[..]].concat()).unwrap();
        let uuid = "0D5bb6dd-76ca-4b96-9f5d-9a2b3fbf9d33";
        let (keys, in_clear) = parse(&[
            "/dev/sda2:key:a:b c",
            &format!("3:file:{}", file.display()),
            &format!("all:file:{}", wide.display()),
            &format!("{uuid}:key:of uuid"),
        ])
        .unwrap();
        assert!(in_clear);
        let of = |volume, uuid| {
            let keys = keys.matching(VolumeId::new(volume), uuid);
            keys.iter()
                .map(|k| k.expose().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(of(2, None), ["a:b c", "wide"]);
        assert_eq!(of(3, None), ["from: a file", "wide"]);
        assert_eq!(of(0, Some(uuid)), ["wide", "of uuid"]);
        // For one disk: the only one counts as the first.
        let (keys, _) = parse(&["2/3:key:second", "1/3:key:first", "3:key:any"]).unwrap();
        let of = |disk: DiskId| {
            let keys = keys.of_disk(disk).matching(VolumeId::new(3), None);
            keys.iter()
                .map(|k| k.expose().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(of(DiskId::ONLY), ["first", "any"]);
        assert_eq!(of(DiskId::nth(0, 2)), ["first", "any"]);
        assert_eq!(of(DiskId::nth(1, 2)), ["second", "any"]);
        assert_eq!(of(DiskId::nth(2, 3)), ["any"]);
        let (keys, _) = parse(&["2/3:key:second"]).unwrap();
        assert!(keys.is_empty() && !keys.of_disk(DiskId::nth(1, 2)).is_empty());
        assert!(!format!("{keys:?}").contains("wide"));
        // cargo sets it for every test.
        let (_, in_clear) = parse(&["all:env:CARGO_PKG_NAME"]).unwrap();
        assert!(!in_clear);
    }

    #[test]
    fn refused_without_showing_the_key() {
        for (arg, says) in [
            ("123-456", "not of the form"),
            ("all:123-456", "not of the form"),
            ("all:password:123-456", "not of the form"),
            ("all:key:", "empty"),
            ("all:key:123-456\n!id", "more than one line"),
            ("all:clevis", "no network"),
            ("sda2:key:123-456", "number of a partition"),
            ("0/2:key:123-456", "DISK/PARTITION"),
            ("1/2/3:key:123-456", "DISK/PARTITION"),
            ("1/:key:123-456", "DISK/PARTITION"),
            ("all:file:/nowhere/123", "key file"),
            ("all:env:NO_SUCH_NAME_123", "not set"),
        ] {
            let error = parse(&[arg]).unwrap_err().to_string();
            assert!(error.contains(says), "{arg}: {error}");
            assert!(!error.contains("123-456"), "{error}");
        }
    }
}
