//! Finds the UEFI firmware of this host through QEMU's firmware descriptors.
//!
//! Follows `docs/interop/firmware.json` of QEMU. Descriptors are `*.json` files in
//! `/usr/share/qemu/firmware` and `/etc/qemu/firmware`. A file in `/etc` replaces the one of the
//! same name, and an empty one hides it. The sorted order of the names is the distribution's order
//! of preference. Only split flash images (code + variables) for x86_64 are used, because a Windows
//! guest with its own NVRAM needs them.
//!
//! Distributions list a Secure Boot build first. Without Secure Boot, a build that does not need
//! SMM is preferred. Next is a Secure-Boot-capable one with an empty variable store, which leaves
//! Secure Boot off. A store with enrolled keys is never used then, because it would enable Secure
//! Boot for a guest that never had it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::model::{Chipset, Firmware};

/// Directories of descriptors, lowest priority first.
pub const DESCRIPTOR_DIRS: [&str; 2] = ["/usr/share/qemu/firmware", "/etc/qemu/firmware"];

const MAX_DESCRIPTOR: u64 = 1 << 20;

/// The firmware in `<os>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirmwareChoice {
    /// SeaBIOS, QEMU's default.
    Bios,
    /// `<os firmware='efi'>`: the host that defines the domain selects the images; for XML that
    /// moves between hosts.
    Portable { secure_boot: bool },
    /// Specific images of this host.
    Images(FirmwareImages),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirmwareImages {
    pub code: PathBuf,
    pub code_format: String,
    /// The template for each VM's own NVRAM.
    pub vars: PathBuf,
    pub vars_format: String,
    /// Whether Secure Boot is on: the template has enrolled keys.
    pub secure_boot: bool,
    /// Whether the code image runs only with SMM.
    pub smm: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    #[error(
        "this host has no UEFI firmware for a {chipset} guest{}: {found} descriptors in {searched}",
        if *secure_boot { " with Secure Boot keys" } else { "" }
    )]
    None {
        chipset: &'static str,
        secure_boot: bool,
        found: usize,
        searched: String,
    },
    #[error("reading the firmware descriptors in {dir}")]
    Read {
        dir: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl FirmwareError {
    pub fn hint(&self) -> &'static str {
        "install the OVMF firmware (Debian, Ubuntu: ovmf; Fedora, RHEL: edk2-ovmf; SUSE: \
         qemu-ovmf-x86_64) or write portable XML, which lets the target host pick"
    }
}

/// The descriptors of a host, in order of preference.
#[derive(Debug, Clone, Default)]
pub struct Descriptors {
    list: Vec<Descriptor>,
    searched: Vec<PathBuf>,
}

impl Descriptors {
    /// Reads [`DESCRIPTOR_DIRS`].
    pub fn of_host() -> Result<Self, FirmwareError> {
        Self::read(&DESCRIPTOR_DIRS.map(Path::new))
    }

    /// Reads the given directories, lowest priority first. A missing directory counts as empty. An
    /// invalid descriptor is skipped, because one bad file must not hide the others.
    pub fn read(dirs: &[&Path]) -> Result<Self, FirmwareError> {
        let mut files: BTreeMap<String, PathBuf> = BTreeMap::new();
        for dir in dirs {
            let error = |source| FirmwareError::Read {
                dir: dir.to_path_buf(),
                source,
            };
            let entries = match std::fs::read_dir(dir) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                entries => entries.map_err(error)?,
            };
            for entry in entries {
                let path = entry.map_err(error)?.path();
                let name = path.file_name().and_then(|n| n.to_str());
                if let Some(name) = name.filter(|n| n.ends_with(".json") && !n.starts_with('.')) {
                    files.insert(name.to_owned(), path.clone());
                }
            }
        }
        let list = files
            .into_values()
            .filter_map(|path| match parse_file(&path) {
                Ok(descriptor) => descriptor,
                Err(error) => {
                    tracing::warn!("skipping firmware descriptor {}: {error}", path.display());
                    None
                }
            })
            .collect();
        Ok(Self {
            list,
            searched: dirs.iter().map(|d| d.to_path_buf()).collect(),
        })
    }

    /// The images for this VM, or an error if there are none.
    pub fn pick(
        &self,
        firmware: Firmware,
        chipset: Chipset,
    ) -> Result<FirmwareChoice, FirmwareError> {
        let Firmware::Uefi { secure_boot } = firmware else {
            return Ok(FirmwareChoice::Bios);
        };
        let fits = |d: &&Descriptor| {
            let images = d.images();
            d.serves(chipset)
                && images.is_some_and(|(code, vars)| code.is_file() && vars.is_file())
                && d.has("enrolled-keys") == secure_boot
                && (!secure_boot || d.has("secure-boot"))
        };
        let mut fitting: Vec<&Descriptor> = self.list.iter().filter(fits).collect();
        // A stable sort, so the host's own order decides among equals.
        fitting.sort_by_key(|d| !secure_boot && d.has("requires-smm"));
        fitting
            .first()
            .and_then(|d| d.choice(secure_boot))
            .map(FirmwareChoice::Images)
            .ok_or_else(|| FirmwareError::None {
                chipset: chipset.as_str(),
                secure_boot,
                found: self.list.len(),
                searched: self
                    .searched
                    .iter()
                    .map(|d| d.display().to_string())
                    .collect::<Vec<_>>()
                    .join(" and "),
            })
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Descriptor {
    #[serde(default)]
    interface_types: Vec<String>,
    mapping: Mapping,
    #[serde(default)]
    targets: Vec<Target>,
    #[serde(default)]
    features: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Mapping {
    device: String,
    mode: Option<String>,
    executable: Option<Image>,
    nvram_template: Option<Image>,
}

#[derive(Debug, Clone, Deserialize)]
struct Image {
    filename: PathBuf,
    format: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Target {
    architecture: String,
    #[serde(default)]
    machines: Vec<String>,
}

impl Descriptor {
    fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|f| f == feature)
    }

    fn images(&self) -> Option<(&Path, &Path)> {
        let split = self.mapping.mode.as_deref().unwrap_or("split") == "split";
        if self.mapping.device != "flash" || !split {
            return None;
        }
        let code = self.mapping.executable.as_ref()?;
        let vars = self.mapping.nvram_template.as_ref()?;
        Some((&code.filename, &vars.filename))
    }

    fn serves(&self, chipset: Chipset) -> bool {
        // A versioned name stands for its family: descriptors match `pc-q35-*`, `pc-q35-10.?`.
        let family = match chipset {
            Chipset::Q35 => ["pc-q35-10.0", "q35"],
            Chipset::Pc => ["pc-i440fx-10.0", "pc"],
        };
        self.interface_types.iter().any(|t| t == "uefi")
            && self.targets.iter().any(|t| {
                t.architecture == "x86_64"
                    && t.machines
                        .iter()
                        .any(|pattern| family.iter().any(|name| glob(pattern, name)))
            })
    }

    fn choice(&self, secure_boot: bool) -> Option<FirmwareImages> {
        let code = self.mapping.executable.as_ref()?;
        let vars = self.mapping.nvram_template.as_ref()?;
        Some(FirmwareImages {
            code: code.filename.clone(),
            code_format: code.format.clone(),
            vars: vars.filename.clone(),
            vars_format: vars.format.clone(),
            secure_boot,
            smm: self.has("requires-smm"),
        })
    }
}

fn parse_file(path: &Path) -> Result<Option<Descriptor>, Box<dyn std::error::Error>> {
    let size = std::fs::metadata(path)?.len();
    if size > MAX_DESCRIPTOR {
        return Err(format!("it is {size} bytes").into());
    }
    // An empty file, or a link to /dev/null, hides the one of that name in a lower directory.
    let bytes = std::fs::read(path)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&bytes)?))
}

/// Matches a pattern with `*` and `?`, as used for machine types.
fn glob(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    n = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    const UEFI: Firmware = Firmware::Uefi { secure_boot: false };
    const SECURE: Firmware = Firmware::Uefi { secure_boot: true };

    struct Host {
        dir: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for sub in ["usr", "etc"] {
                std::fs::create_dir(dir.path().join(sub)).unwrap();
            }
            for image in ["code.fd", "secboot.fd", "vars.fd", "vars.ms.fd", "c.qcow2"] {
                std::fs::write(dir.path().join(image), b"x").unwrap();
            }
            Self { dir }
        }

        fn file(&self, name: &str, contents: &str) {
            std::fs::write(self.dir.path().join(name), contents).unwrap();
        }

        fn add(&self, name: &str, (code, vars): (&str, &str), machine: &str, features: &[&str]) {
            let image = |file: &str| {
                let format = if file.ends_with("qcow2") {
                    "qcow2"
                } else {
                    "raw"
                };
                serde_json::json!({"filename": self.dir.path().join(file), "format": format})
            };
            let descriptor = serde_json::json!({
                "interface-types": ["uefi"],
                "mapping": {"device": "flash", "executable": image(code), "nvram-template": image(vars)},
                "targets": [{"architecture": "x86_64", "machines": [machine]}],
                "features": features,
                "tags": [],
            });
            self.file(name, &descriptor.to_string());
        }

        fn pick(&self, firmware: Firmware, chipset: Chipset) -> Result<String, FirmwareError> {
            let dir = self.dir.path();
            let found = Descriptors::read(&[&dir.join("usr"), &dir.join("etc")])?;
            Ok(match found.pick(firmware, chipset)? {
                FirmwareChoice::Images(i) => format!(
                    "{} {} {} {} sb={} smm={}",
                    i.code.file_name().unwrap().display(),
                    i.code_format,
                    i.vars.file_name().unwrap().display(),
                    i.vars_format,
                    i.secure_boot,
                    i.smm
                ),
                other => format!("{other:?}"),
            })
        }
    }

    #[test]
    fn no_descriptor_is_an_error_with_a_hint() {
        let host = Host::new();
        let error = host.pick(UEFI, Chipset::Q35).unwrap_err();
        assert!(error.to_string().contains("0 descriptors"), "{error}");
        assert!(error.hint().contains("ovmf"));
        assert_eq!(host.pick(Firmware::Bios, Chipset::Q35).unwrap(), "Bios");
        let nowhere = host.dir.path().join("nowhere");
        assert!(Descriptors::read(&[&nowhere]).unwrap().list.is_empty());
    }

    /// QEMU has firmware of 32 bits for the same chipset.
    #[test]
    fn firmware_for_another_processor_is_passed_over() {
        let host = Host::new();
        let file = host.dir.path().join("usr/10.json");
        host.add("usr/10.json", ("code.fd", "vars.fd"), "pc-q35-*", &[]);
        assert!(host.pick(UEFI, Chipset::Q35).is_ok());
        let text = std::fs::read_to_string(&file).unwrap();
        for other in ["i386", "aarch64"] {
            host.file("usr/10.json", &text.replace("x86_64", other));
            assert!(host.pick(UEFI, Chipset::Q35).is_err(), "{other}");
        }
    }

    #[test]
    fn picks_by_need_and_keeps_the_host_order() {
        let host = Host::new();
        let q35 = "pc-q35-*";
        let secure = ["secure-boot", "requires-smm"];
        host.add(
            "usr/40.json",
            ("secboot.fd", "vars.ms.fd"),
            q35,
            &[&secure[..], &["enrolled-keys"]].concat(),
        );
        let error = host.pick(UEFI, Chipset::Q35).unwrap_err().to_string();
        assert!(
            error.contains("no UEFI firmware for a q35 guest:"),
            "{error}"
        );
        host.add("usr/50.json", ("secboot.fd", "vars.fd"), q35, &secure);
        // Only a Secure-Boot-capable build with an empty store: usable, SMM on, Secure Boot off.
        assert_eq!(
            host.pick(UEFI, Chipset::Q35).unwrap(),
            "secboot.fd raw vars.fd raw sb=false smm=true"
        );
        host.add("usr/60.json", ("code.fd", "vars.fd"), "pc-*", &[]);
        host.add("usr/70.json", ("c.qcow2", "vars.fd"), q35, &[]);
        assert_eq!(
            host.pick(UEFI, Chipset::Q35).unwrap(),
            "code.fd raw vars.fd raw sb=false smm=false"
        );
        assert_eq!(
            host.pick(UEFI, Chipset::Pc).unwrap(),
            "code.fd raw vars.fd raw sb=false smm=false"
        );
        assert_eq!(
            host.pick(SECURE, Chipset::Q35).unwrap(),
            "secboot.fd raw vars.ms.fd raw sb=true smm=true"
        );
        let error = host.pick(SECURE, Chipset::Pc).unwrap_err().to_string();
        assert!(
            error.contains("pc guest with Secure Boot keys: 4 descriptors"),
            "{error}"
        );
        // /etc replaces and hides by name; the order stays that of the names.
        host.add("etc/60.json", ("gone.fd", "vars.fd"), "pc-*", &[]);
        assert_eq!(
            host.pick(UEFI, Chipset::Q35).unwrap(),
            "c.qcow2 qcow2 vars.fd raw sb=false smm=false"
        );
        host.file("etc/70.json", "");
        host.file("etc/65.json", "{ not json");
        host.file("etc/README", "no descriptor");
        assert_eq!(
            host.pick(UEFI, Chipset::Q35).unwrap(),
            "secboot.fd raw vars.fd raw sb=false smm=true"
        );
    }

    /// An administrator hides a descriptor by an empty file, which is no reason for a warning.
    #[test]
    fn an_empty_descriptor_is_no_error_and_a_broken_one_is() {
        let host = Host::new();
        host.add("usr/good.json", ("code.fd", "vars.fd"), "q35", &[]);
        host.file("usr/empty.json", "");
        host.file("usr/broken.json", "{ not json");
        host.file("usr/large.json", &" ".repeat(MAX_DESCRIPTOR as usize + 1));
        let parsed = |name: &str| parse_file(&host.dir.path().join("usr").join(name));
        assert!(parsed("good.json").unwrap().is_some());
        assert!(parsed("empty.json").unwrap().is_none());
        assert!(parse_file(Path::new("/dev/null")).unwrap().is_none());
        for bad in ["broken.json", "large.json", "missing.json"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn other_kinds_of_firmware_are_passed_over() {
        let host = Host::new();
        let code = host.dir.path().join("code.fd");
        let (image, target) = (
            serde_json::json!({"filename": code, "format": "raw"}),
            serde_json::json!([{"architecture": "x86_64", "machines": ["pc-q35-*"]}]),
        );
        for (n, value) in [
            serde_json::json!({"interface-types": ["uefi"], "mapping": {"device": "memory", "filename": code}, "targets": target, "features": []}),
            serde_json::json!({"interface-types": ["uefi"], "mapping": {"device": "flash", "mode": "stateless", "executable": image}, "targets": target, "features": []}),
            serde_json::json!({"interface-types": ["bios"], "mapping": {"device": "flash", "executable": image, "nvram-template": image}, "targets": target, "features": []}),
            serde_json::json!({"interface-types": ["uefi"], "mapping": {"device": "flash", "executable": image, "nvram-template": image}, "targets": [{"architecture": "aarch64", "machines": ["virt-*"]}], "features": []}),
        ]
        .iter()
        .enumerate()
        {
            host.file(&format!("usr/{n}.json"), &value.to_string());
            assert!(host.pick(UEFI, Chipset::Q35).is_err(), "{value}");
        }
    }

    #[test]
    fn globs() {
        for (pattern, name, want) in [
            ("pc-q35-*", "pc-q35-10.0", true),
            ("pc-q35-1?.*", "pc-q35-10.0", true),
            ("*", "", true),
            ("*-q35*0", "pc-q35-10.0", true),
            ("pc-q35", "pc-q35-10.0", false),
            ("pc-i440fx-*", "pc-q35-10.0", false),
            ("", "q35", false),
        ] {
            assert_eq!(glob(pattern, name), want, "{pattern} {name}");
        }
    }

    #[test]
    fn what_is_missing_is_said_with_what_was_searched() {
        let host = Host::new();
        let dir = host.dir.path();
        let (usr, etc) = (dir.join("usr"), dir.join("etc"));
        for (firmware, guest) in [
            (UEFI, "q35 guest"),
            (SECURE, "q35 guest with Secure Boot keys"),
        ] {
            assert_eq!(
                host.pick(firmware, Chipset::Q35).unwrap_err().to_string(),
                format!(
                    "this host has no UEFI firmware for a {guest}: 0 descriptors in {} and {}",
                    usr.display(),
                    etc.display()
                )
            );
        }
        let file = dir.join("code.fd");
        let error = Descriptors::read(&[&file]).unwrap_err();
        let message = format!("reading the firmware descriptors in {}", file.display());
        assert_eq!(error.to_string(), message);
        assert_eq!(
            DESCRIPTOR_DIRS,
            ["/usr/share/qemu/firmware", "/etc/qemu/firmware"]
        );
    }

    /// Keys without Secure Boot, a missing image, a hidden file, and a descriptor of the largest size.
    #[test]
    fn a_descriptor_counts_if_all_of_it_fits() {
        for (name, images, features, plain, secure) in [
            ("a.json", ("code.fd", "vars.fd"), &[][..], true, false),
            ("a.json", ("gone.fd", "vars.fd"), &[], false, false),
            ("a.json", ("code.fd", "gone.fd"), &[], false, false),
            (".a.json", ("code.fd", "vars.fd"), &[], false, false),
            ("a.jso", ("code.fd", "vars.fd"), &[], false, false),
            (
                "a.json",
                ("code.fd", "vars.fd"),
                &["enrolled-keys"],
                false,
                false,
            ),
            (
                "a.json",
                ("code.fd", "vars.fd"),
                &["enrolled-keys", "secure-boot"],
                false,
                true,
            ),
            (
                "a.json",
                ("code.fd", "vars.fd"),
                &["secure-boot"],
                true,
                false,
            ),
        ] {
            let host = Host::new();
            host.add(&format!("usr/{name}"), images, "pc-q35-*", features);
            let found = [UEFI, SECURE].map(|firmware| host.pick(firmware, Chipset::Q35).is_ok());
            assert_eq!(found, [plain, secure], "{name} {images:?} {features:?}");
        }
        let host = Host::new();
        host.add("usr/a.json", ("code.fd", "vars.fd"), "q35", &[]);
        let path = host.dir.path().join("usr/a.json");
        let mut text = std::fs::read_to_string(&path).unwrap();
        for (size, read) in [(MAX_DESCRIPTOR, true), (MAX_DESCRIPTOR + 1, false)] {
            let spaces = usize::try_from(size).unwrap() - text.len();
            text.push_str(&" ".repeat(spaces));
            host.file("usr/a.json", &text);
            assert_eq!(parse_file(&path).is_ok(), read, "{size}");
        }
    }
}
