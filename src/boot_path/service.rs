//! Reads a kernel driver's service key: whether it is installed, when it starts, which file it
//! loads.

use crate::guest::{GuestPath, PathError};
use crate::registry::HiveView;
use crate::registry::error::Result;
use crate::registry::hive::{Key, Value};
use crate::types::ControlSet;

pub const BOOT_START: u32 = 0;
pub const DISABLED: u32 = 4;

/// A service key of the control set that boots.
#[derive(Debug, PartialEq, Eq)]
pub struct Service {
    pub name: String,
    pub start: Option<u32>,
    /// `Type`: 1 is a kernel driver, 2 a file system driver.
    pub kind: Option<u32>,
    /// The values below `StartOverride`, one per hardware configuration.
    pub overrides: Vec<u32>,
    /// The file it loads, or an error if `ImagePath` is not a path.
    pub image: std::result::Result<GuestPath, PathError>,
    /// The original `ImagePath`.
    pub image_path: Option<String>,
    /// Values with a type that Windows does not accept: it drops such a driver.
    pub mistyped: Vec<&'static str>,
    /// `DeleteFlag`: the service manager deletes the key at its next start.
    pub deleted: bool,
    /// Whether this Windows uses `StartOverride`.
    overridable: bool,
}

/// The required form of a value of a service key.
#[derive(Clone, Copy)]
enum Wanted {
    Number,
    Text,
}

const TYPES: [(&str, Wanted); 5] = [
    ("Start", Wanted::Number),
    ("Type", Wanted::Number),
    ("ErrorControl", Wanted::Number),
    ("Group", Wanted::Text),
    ("ImagePath", Wanted::Text),
];

impl Wanted {
    fn fits(self, value: &Value) -> bool {
        match self {
            Wanted::Number => value.as_dword().is_some(),
            Wanted::Text => value.as_string().is_some(),
        }
    }
}

fn mistyped(key: &Key<'_>) -> Result<Vec<&'static str>> {
    let mut names = Vec::new();
    for (name, wanted) in TYPES {
        if key.value(name)?.is_some_and(|value| !wanted.fits(&value)) {
            names.push(name);
        }
    }
    Ok(names)
}

impl Service {
    /// Reads a service key; `None` if it does not exist. A key may exist without the service being
    /// [installed](Self::is_installed).
    pub fn read(
        system: &HiveView<'_>,
        control_set: &ControlSet,
        windows_root: &GuestPath,
        nt: (u32, u32),
        name: &str,
    ) -> Result<Option<Self>> {
        // A name from a Configuration or a filter list is one key, never a path.
        if name.is_empty() || name.contains('\\') {
            return Ok(None);
        }
        let Some(key) = system.key(&control_set.service(name))? else {
            return Ok(None);
        };
        let mut overrides = Vec::new();
        if let Some(list) = key.key("StartOverride")? {
            overrides.extend(list.values()?.iter().filter_map(|(_, v)| v.as_dword()));
        }
        let image_path = key.string("ImagePath")?;
        Ok(Some(Self {
            name: name.to_string(),
            start: key.dword("Start")?,
            kind: key.dword("Type")?,
            overrides,
            image: image_file(image_path.as_deref(), name, windows_root),
            image_path,
            mistyped: mistyped(&key)?,
            // Windows writes 1; any value counts as the mark.
            deleted: key
                .value("DeleteFlag")?
                .is_some_and(|value| value.as_dword() != Some(0)),
            overridable: nt.0 >= 6,
        }))
    }

    /// Whether the service is installed. Some installers leave keys with one private value, or
    /// none.
    pub fn is_installed(&self) -> bool {
        self.start.is_some() && self.kind.is_some()
    }

    /// The override that counts. Which one applies depends on the VM, and that is a new one, so any
    /// value other than zero counts.
    pub fn start_override(&self) -> Option<u32> {
        self.overrides.iter().copied().find(|v| *v != BOOT_START)
    }

    /// The start type, as far as it can be known before Windows runs on the new VM.
    pub fn effective_start(&self) -> Option<u32> {
        match self.start? {
            BOOT_START if self.overridable => Some(self.start_override().unwrap_or(BOOT_START)),
            // An override of 0 may enable the driver, or belong to the old VM: it cannot be relied
            // on.
            start => Some(start),
        }
    }

    /// An override that this Windows ignores.
    pub fn idle_override(&self) -> Option<u32> {
        self.start_override().filter(|_| !self.overridable)
    }

    /// The form of the path. All boot loaders resolve a relative path from the directory of
    /// Windows, and the loaders since Vista accept `\SystemRoot\` too.
    pub fn path_form(&self) -> PathForm {
        let Some(path) = self.image_path.as_deref().filter(|p| !p.is_empty()) else {
            return PathForm::Relative;
        };
        let path = path.replace('/', "\\");
        if strip_prefix(&path, "\\SystemRoot\\").is_some() {
            return PathForm::SystemRoot;
        }
        let plain = path.trim() == path && !path.starts_with(['\\', '"', '%']);
        match path.as_bytes().get(1) {
            Some(b':') => PathForm::Other,
            _ if plain => PathForm::Relative,
            _ => PathForm::Other,
        }
    }

    pub fn is_disabled(&self) -> bool {
        self.effective_start() == Some(DISABLED)
    }
}

/// The form of an `ImagePath`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathForm {
    /// Relative to the directory of Windows; a missing path has this form too.
    Relative,
    /// `\SystemRoot\...`
    SystemRoot,
    /// With a drive letter, a variable or quotes, or from the root of the volume.
    Other,
}

/// The file that an `ImagePath` names, on the system volume. Drive letters are dropped, because a
/// boot driver is on the volume of Windows.
fn image_file(
    image_path: Option<&str>,
    service: &str,
    windows_root: &GuestPath,
) -> std::result::Result<GuestPath, PathError> {
    let path = image_path
        .unwrap_or_default()
        .trim()
        .trim_matches('"')
        .replace('/', "\\");
    if path.is_empty() {
        return windows_root.join(&format!("System32\\drivers\\{service}.sys"));
    }
    for prefix in ["\\SystemRoot\\", "%SystemRoot%\\", "%windir%\\"] {
        if let Some(rest) = strip_prefix(&path, prefix) {
            return windows_root.join(rest);
        }
    }
    let dos = strip_prefix(&path, "\\??\\").unwrap_or(&path);
    match dos.as_bytes() {
        [letter, b':', b'\\', ..] if letter.is_ascii_alphabetic() => GuestPath::parse(&dos[3..]),
        [b'\\', ..] => GuestPath::parse(dos),
        _ => windows_root.join(dos),
    }
}

fn strip_prefix<'t>(text: &'t str, prefix: &str) -> Option<&'t str> {
    let (head, rest) = text.split_at_checked(prefix.len())?;
    head.eq_ignore_ascii_case(prefix).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_paths() {
        let root = GuestPath::parse("\\WINNT").unwrap();
        let cases = [
            (None, r"\WINNT\System32\drivers\disk.sys"),
            (Some(""), r"\WINNT\System32\drivers\disk.sys"),
            (
                Some(r"system32\DRIVERS\disk.sys"),
                r"\WINNT\system32\drivers\disk.sys",
            ),
            (
                Some(r"\SystemRoot\System32\a.sys"),
                r"\WINNT\System32\a.sys",
            ),
            (
                Some(r"\SYSTEMROOT\System32\a.sys"),
                r"\WINNT\System32\a.sys",
            ),
            (
                Some(r"%systemroot%\System32\a.sys"),
                r"\WINNT\System32\a.sys",
            ),
            (Some(r"%WinDir%\System32\a.sys"), r"\WINNT\System32\a.sys"),
            (
                Some("System32/drivers/a.sys"),
                r"\WINNT\System32\drivers\a.sys",
            ),
            (Some(r"\??\C:\Windows\x\a.sys"), r"\Windows\x\a.sys"),
            (Some(r#""C:\Windows\x\a.sys""#), r"\Windows\x\a.sys"),
            (Some(r"\Windows\a.sys"), r"\Windows\a.sys"),
            (Some("/SystemRoot/System32/a.sys"), r"\WINNT\System32\a.sys"),
            (Some(" system32\\a.sys\t"), r"\WINNT\system32\a.sys"),
        ];
        for (image_path, file) in cases {
            let expected = GuestPath::parse(file).unwrap();
            assert_eq!(
                image_file(image_path, "disk", &root),
                Ok(expected),
                "{image_path:?}"
            );
        }
        for bad in [
            r"1:\Windows\a.sys",
            r"..\a.sys",
            r"\??\Volume{x}\a?.sys",
            "system32\\a\u{7}.sys",
        ] {
            assert!(image_file(Some(bad), "disk", &root).is_err(), "{bad}");
        }
    }

    #[test]
    fn effective_start() {
        let service = |start, overrides: &[u32]| Service {
            name: "x".into(),
            start,
            kind: Some(1),
            overrides: overrides.to_vec(),
            image: Ok(GuestPath::root()),
            image_path: None,
            mistyped: Vec::new(),
            deleted: false,
            overridable: true,
        };
        for (start, overrides, effective) in [
            (Some(0), &[][..], Some(0)),
            (Some(0), &[0, 0], Some(0)),
            (Some(0), &[0, 3], Some(3)),
            (Some(0), &[4], Some(4)),
            (Some(3), &[0], Some(3)),
            (None, &[0], None),
        ] {
            assert_eq!(service(start, overrides).effective_start(), effective);
        }
        // NT 5 has no overrides.
        let old = Service {
            overridable: false,
            ..service(Some(0), &[0, 3])
        };
        assert_eq!(old.effective_start(), Some(0));
        assert_eq!(old.idle_override(), Some(3));
        assert_eq!(service(Some(0), &[3]).idle_override(), None);
    }

    /// A key with every value, and with each of them of another type.
    #[test]
    fn a_service_is_read_with_all_its_values() {
        use crate::registry::{KeyTree, RegData};
        let root = GuestPath::parse("\\Windows").unwrap();
        let key = "ControlSet001\\Services\\x";
        let read = |tree: &KeyTree, nt, name: &str| {
            let bytes = tree.to_bytes("SYSTEM");
            let view = HiveView::new(&bytes).unwrap();
            Service::read(&view, &ControlSet::new(1), &root, nt, name).unwrap()
        };
        let mut tree = KeyTree::new("ROOT");
        tree.dword(key, "Start", 2)
            .dword(key, "Type", 16)
            .dword(key, "ErrorControl", 1)
            .dword(key, "DeleteFlag", 1)
            .sz(key, "Group", "g")
            .set(key, "ImagePath", RegData::ExpandSz("a\\b.sys".into()))
            .dword(&format!("{key}\\StartOverride"), "0", 0)
            .sz(&format!("{key}\\StartOverride"), "1", "3")
            .dword(&format!("{key}\\StartOverride"), "2", 4)
            .dword(&format!("{key}\\StartOverride"), "3", 3);
        let whole = Service {
            name: "X".into(),
            start: Some(2),
            kind: Some(16),
            overrides: vec![0, 4, 3],
            image: GuestPath::parse("\\Windows\\a\\b.sys"),
            image_path: Some("a\\b.sys".into()),
            mistyped: Vec::new(),
            deleted: true,
            overridable: true,
        };
        assert_eq!(read(&tree, (6, 0), "X"), Some(whole));
        let old = read(&tree, (5, 2), "x").unwrap();
        assert!(!old.overridable);
        // Of several overrides the first that is not zero counts.
        assert_eq!(
            (old.start_override(), old.idle_override()),
            (Some(4), Some(4))
        );
        assert_eq!(old.effective_start(), Some(2));
        for name in ["", "y", "x\\StartOverride"] {
            assert_eq!(read(&tree, (6, 0), name), None, "{name:?}");
        }
        let mut wrong = KeyTree::new("ROOT");
        for name in ["Group", "ImagePath"] {
            wrong.dword(key, name, 1);
        }
        for name in ["ErrorControl", "Start", "Type"] {
            wrong.sz(key, name, "1");
        }
        let found = read(&wrong, (6, 0), "x").unwrap();
        assert_eq!(
            found.mistyped,
            ["Start", "Type", "ErrorControl", "Group", "ImagePath"]
        );
        assert!(!found.is_installed() && !found.deleted && !found.is_disabled());
        let image = GuestPath::parse("\\Windows\\System32\\drivers\\x.sys");
        assert_eq!((found.image, found.image_path), (image, None));
        // A disabled service starts neither by its own value nor by an override.
        for (start, override_, disabled) in
            [(4, 0, true), (0, 4, true), (0, 3, false), (3, 4, false)]
        {
            let mut tree = KeyTree::new("ROOT");
            tree.dword(key, "Start", start)
                .dword(&format!("{key}\\StartOverride"), "0", override_);
            let found = read(&tree, (6, 0), "x").unwrap();
            assert_eq!(found.is_disabled(), disabled, "{start} {override_}");
        }
        for (has, installed) in [
            (&["Start"][..], false),
            (&["Type"], false),
            (&["Start", "Type"], true),
        ] {
            let mut tree = KeyTree::new("ROOT");
            for name in has {
                tree.dword(key, name, 1);
            }
            assert_eq!(read(&tree, (6, 0), "x").unwrap().is_installed(), installed);
        }
    }

    #[test]
    fn forms_of_image_paths() {
        use PathForm::{Other, Relative, SystemRoot};
        for (image_path, form) in [
            (None, Relative),
            (Some(""), Relative),
            (Some(r"system32\DRIVERS\disk.sys"), Relative),
            (Some("System32/drivers/disk.sys"), Relative),
            (Some(r"\systemroot\System32\drivers\disk.sys"), SystemRoot),
            (Some("/SystemRoot/System32/drivers/disk.sys"), SystemRoot),
            (Some("/System32/drivers/disk.sys"), Other),
            (Some(r"%SystemRoot%\System32\drivers\disk.sys"), Other),
            (Some(r"\??\C:\Windows\System32\drivers\disk.sys"), Other),
            (Some(r"C:\Windows\System32\drivers\disk.sys"), Other),
            (Some(r"\Windows\System32\drivers\disk.sys"), Other),
            (Some("\"system32\\drivers\\disk.sys\""), Other),
            (Some(" system32\\drivers\\disk.sys"), Other),
        ] {
            let service = Service {
                image_path: image_path.map(str::to_string),
                name: "disk".into(),
                start: Some(0),
                kind: Some(1),
                overrides: Vec::new(),
                image: Ok(GuestPath::root()),
                mistyped: Vec::new(),
                deleted: false,
                overridable: true,
            };
            assert_eq!(service.path_form(), form, "{image_path:?}");
        }
    }
}
