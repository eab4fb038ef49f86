//! The output directory of a conversion for `boot`: the two domains, and copies of them for a
//! watched start.

use std::path::{Path, PathBuf};

use serde_json::Value;
use uuid::Uuid;

use crate::domain::element::Element;
use crate::domain::{HYPER2KVM_NS, SYSTEM_DISK, Stage};
use crate::error::{Error, Result};
use crate::fix::trusted::{TrustError, TrustedFolder};
use crate::types::DiskBus;

#[derive(Debug)]
pub struct Files {
    pub folder: PathBuf,
    held: TrustedFolder,
    pub name: String,
    pub uuid: Uuid,
    /// `None` if Windows boots from virtio directly.
    pub bootstrap: Option<Domain>,
    pub production: Domain,
}

/// The XML file of one stage.
#[derive(Debug)]
pub struct Domain {
    pub path: PathBuf,
    root: Element,
}

/// A disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainDisk {
    pub path: PathBuf,
    pub format: String,
    /// The chain below it, from the top.
    pub below: Vec<PathBuf>,
    /// libvirt's name of it, e.g. `vda`.
    pub target: String,
    /// The name of its node in a running QEMU.
    pub node: Option<String>,
    /// Whether Windows is on it.
    pub system: bool,
    boot: bool,
}

impl DomainDisk {
    /// Whether the file is the disk, or below it.
    pub fn stands_on(&self, file: &Path) -> bool {
        self.path == file || self.below.iter().any(|below| below == file)
    }
}

/// Opens the output directory; `None` if it does not exist. Its domains are started, and its record
/// decides which files replace disks. So only the caller or root may be able to write to it. The
/// directory may be named by a link.
pub fn trust(folder: &Path) -> Result<Option<TrustedFolder>> {
    let Ok(real) = folder.canonicalize() else {
        return Ok(None);
    };
    match TrustedFolder::open(&real) {
        Err(TrustError::Kind { .. }) => Ok(None),
        Err(e) if e.is_missing() => Ok(None),
        opened => Ok(Some(opened?)),
    }
}

impl Files {
    pub fn open(folder: &Path) -> Result<Self> {
        let folder = std::path::absolute(folder)
            .map_err(|e| Error::usage(format!("{} is not a path", folder.display())).because(e))?;
        let not_ours = || {
            Error::usage(format!(
                "{} is not the output directory of a conversion",
                folder.display()
            ))
            .hint("name the directory that `hyper2kvm convert` wrote")
        };
        let held = trust(&folder)?.ok_or_else(not_ours)?;
        let text = match held.read(Path::new("report.json")) {
            Err(e) if e.is_missing() => return Err(not_ours().because(e)),
            text => text?,
        };
        let json: Value = serde_json::from_slice(&text).map_err(|e| not_ours().because(e))?;
        if json
            .pointer("/inspection/os/family")
            .and_then(Value::as_str)
            == Some("linux")
        {
            return Err(Error::usage(
                "this is a Linux machine: it needs one boot, and nothing is switched",
            )
            .hint("virsh define and virsh start its final XML (hyper2kvm docs linux)"));
        }
        let outputs = json.get("outputs").ok_or_else(not_ours)?;
        // The directory may have been renamed since: the files are in it, whatever its name was.
        let domain = |key: &str| -> Result<Option<Domain>> {
            let Some(path) = outputs.get(key).and_then(Value::as_str) else {
                return Ok(None);
            };
            let name = Path::new(path).file_name().ok_or_else(not_ours)?;
            Domain::open(&held, name.as_ref(), folder.join(name)).map(Some)
        };
        let production = domain("final_xml")?.ok_or_else(not_ours)?;
        let files = Self {
            name: production.text("name")?,
            uuid: production.uuid()?,
            bootstrap: domain("bootstrap_xml")?,
            production,
            folder,
            held,
        };
        files.check()?;
        Ok(files)
    }

    fn check(&self) -> Result<()> {
        if let Some(bootstrap) = &self.bootstrap
            && (bootstrap.uuid()? != self.uuid || bootstrap.text("name")? != self.name)
        {
            return Err(Error::failed(
                "the two domain XML files are not of the same machine: UUID or name differ",
            )
            .hint("Windows has to see one VM in both boots; convert again"));
        }
        for disk in self.production.disks() {
            if !disk.path.exists() {
                return Err(Error::failed(format!("{} does not exist", disk.path.display()))
                    .hint("the domain XML has absolute paths: when files were moved, change them there"));
            }
        }
        self.system_disk().map(drop)
    }

    /// Fails if the directory was exchanged for another one.
    pub fn still_there(&self) -> Result<()> {
        match self.held.is_at(&self.folder) {
            true => Ok(()),
            false => Err(Error::failed(format!(
                "{} is another directory than it was at the start",
                self.folder.display()
            ))
            .hint("see who moved it, then run the same command again")),
        }
    }

    pub fn domain(&self, stage: Stage) -> Option<&Domain> {
        match stage {
            Stage::Bootstrap => self.bootstrap.as_ref(),
            Stage::Final => Some(&self.production),
        }
    }

    /// The disk with Windows.
    pub fn system_disk(&self) -> Result<DomainDisk> {
        let disks = self.production.disks();
        let system = disks.iter().find(|d| d.system);
        system
            .or(disks.iter().find(|d| d.boot))
            .cloned()
            .ok_or_else(|| Error::failed("the final domain has no disk to boot from"))
    }

    /// All files that QEMU opens: disks and CD-ROMs of both stages.
    pub fn paths(&self) -> Vec<PathBuf> {
        let domains = self.bootstrap.iter().chain([&self.production]);
        domains
            .flat_map(|domain| domain.root.descendants("source"))
            .filter_map(|source| source.attr("file"))
            .map(PathBuf::from)
            .collect()
    }

    /// The log of COM1 in one stage; COM2, if the domain has it, uses [`second_log`].
    pub fn serial_log(&self, stage: Stage) -> PathBuf {
        self.folder.join(format!("com1-{}.log", stage.as_str()))
    }
}

impl Domain {
    fn open(folder: &TrustedFolder, name: &Path, path: PathBuf) -> Result<Self> {
        let bytes = folder.read(name)?;
        let root = Element::parse(&bytes)
            .map_err(|e| Error::failed(format!("reading {}", path.display())).because(e))?;
        let domain = Self { path, root };
        if stage_of(&domain.root).is_none() {
            return Err(Error::failed(format!(
                "{} is not a domain of this program: its mark is missing",
                domain.path.display()
            )));
        }
        Ok(domain)
    }

    fn text(&self, element: &str) -> Result<String> {
        let text = self.root.text_of(element).map(str::to_owned);
        text.ok_or_else(|| Error::failed(format!("{} has no <{element}>", self.path.display())))
    }

    fn uuid(&self) -> Result<Uuid> {
        self.text("uuid")?
            .parse()
            .map_err(|e| Error::failed(format!("{}: bad UUID", self.path.display())).because(e))
    }

    /// The libvirt networks of its NICs.
    pub fn networks(&self) -> Vec<&str> {
        let nics = self.root.descendants("interface").into_iter();
        let sources = nics.filter_map(|nic| nic.first("source")?.attr("network"));
        sources.collect()
    }

    pub fn disks(&self) -> Vec<DomainDisk> {
        disks(&self.root)
    }

    pub fn nvram(&self) -> Option<PathBuf> {
        let text = &self.root.path("os/nvram")?.text;
        (!text.is_empty()).then(|| text.into())
    }

    pub fn bus(&self) -> DiskBus {
        let scsi = self.root.descendants("target");
        if scsi.iter().any(|t| t.attr("bus") == Some("scsi")) {
            DiskBus::VirtioScsi
        } else {
            DiskBus::VirtioBlk
        }
    }

    pub fn has_agent_channel(&self) -> bool {
        let targets = self.root.descendants("target");
        targets
            .iter()
            .any(|t| t.attr("name") == Some("org.qemu.guest_agent.0"))
    }

    /// The domain with its serial ports logged to files, and preserved after a crash for
    /// examination. `overlays` are pairs of disk and overlay; such a disk is replaced by its
    /// overlay.
    pub fn watched(&self, log: &Path, overlays: &[(PathBuf, PathBuf)]) -> String {
        let mut root = self.root.clone();
        for element in &mut root.children {
            if element.is("on_crash") {
                element.text = "preserve".to_owned();
            }
            if !element.is("devices") {
                continue;
            }
            for disk in element.children.iter_mut().filter(|e| e.is("disk")) {
                put_over(disk, overlays);
            }
            let ports = element.children.iter_mut().filter(|e| e.is("serial"));
            for (serial, file) in ports.zip([log.to_path_buf(), second_log(log)]) {
                serial.children.retain(|e| !e.is("log"));
                serial.push(
                    Element::new("log")
                        .with("file", file.to_string_lossy())
                        .with("append", "off"),
                );
            }
        }
        root.to_document()
    }
}

/// The domain XML files in the report of an output directory.
pub(crate) fn domain_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let files = Files::open(folder)?;
    let domains = files.bootstrap.iter().chain([&files.production]);
    Ok(domains.map(|domain| domain.path.clone()).collect())
}

/// Replaces a disk by its overlay, with the disk's old definition as the chain below.
fn put_over(disk: &mut Element, overlays: &[(PathBuf, PathBuf)]) {
    let named = |source: &Element| {
        let path = source.attr("file").or(source.attr("dev"))?;
        let found = overlays.iter().find(|(old, _)| old == Path::new(path));
        found.map(|(_, overlay)| overlay.display().to_string())
    };
    let Some(overlay) = disk.first("source").and_then(named) else {
        return;
    };
    let is = |name: &'static str| move |e: &mut Element| e.is(name);
    let source = disk.children.extract_if(.., is("source")).next();
    let below = disk.children.extract_if(.., is("backingStore")).next();
    let driver = disk.children.iter_mut().find(|e| e.is("driver"));
    let (Some(source), Some(driver)) = (source, driver) else {
        return;
    };
    let mut format = "qcow2".to_owned();
    for (_, value) in driver.attrs.iter_mut().filter(|(key, _)| key == "type") {
        format = std::mem::replace(value, "qcow2".to_owned());
    }
    let kind = disk.attr("type").unwrap_or("file").to_owned();
    for (_, value) in disk.attrs.iter_mut().filter(|(key, _)| key == "type") {
        *value = "file".to_owned();
    }
    disk.push(Element::new("source").with("file", overlay));
    disk.push(
        Element::new("backingStore")
            .with("type", kind)
            .child(Element::new("format").with("type", format))
            .child(source)
            .child(below.unwrap_or_else(|| Element::new("backingStore"))),
    );
}

/// The log of COM2 that belongs to one of COM1.
pub fn second_log(log: &Path) -> PathBuf {
    let name = log.file_name().unwrap_or_default().to_string_lossy();
    log.with_file_name(name.replacen("com1", "com2", 1))
}

fn disks(root: &Element) -> Vec<DomainDisk> {
    let disks = root.first("devices").into_iter();
    disks
        .flat_map(|devices| devices.all("disk"))
        .filter(|disk| disk.attr("device") == Some("disk"))
        .filter_map(|disk| {
            let source = disk.first("source")?;
            Some(DomainDisk {
                path: source.attr("file").or(source.attr("dev"))?.into(),
                format: disk.first("driver")?.attr("type")?.to_owned(),
                below: below(disk),
                target: (disk.first("target").and_then(|t| t.attr("dev")))
                    .unwrap_or_default()
                    .to_owned(),
                node: source.attr("index").map(str::to_owned),
                system: disk.text_of("serial") == Some(SYSTEM_DISK),
                boot: disk.first("boot").is_some(),
            })
        })
        .collect()
}

/// The files of the chain below a disk.
fn below(disk: &Element) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut next = disk.first("backingStore");
    while let Some(level) = next {
        let source = level.first("source");
        let path = source.and_then(|source| {
            let socket = || source.first("host")?.attr("socket");
            source.attr("file").or(source.attr("dev")).or_else(socket)
        });
        files.extend(path.map(PathBuf::from));
        next = level.first("backingStore");
    }
    files
}

/// The stage of a domain defined by hyper2kvm.
fn stage_of(root: &Element) -> Option<Stage> {
    let marks = root.path("metadata")?.all("conversion");
    let mark = marks.into_iter().find(|mark| {
        let prefix = mark.name.split_once(':').map(|(prefix, _)| prefix);
        let declaration = prefix.map_or("xmlns".to_owned(), |p| format!("xmlns:{p}"));
        mark.attrs
            .iter()
            .any(|(key, value)| *key == declaration && value == HYPER2KVM_NS)
    })?;
    match mark.attr("stage")? {
        "bootstrap" => Some(Stage::Bootstrap),
        "final" => Some(Stage::Final),
        _ => None,
    }
}

/// Identifies a domain of libvirt: its stage if hyper2kvm defined it, and its disks.
pub fn identify(xml: &str) -> Result<(Option<Stage>, Vec<DomainDisk>)> {
    let root = Element::parse(xml.as_bytes())
        .map_err(|e| Error::failed("reading the domain XML of libvirt").because(e))?;
    Ok((stage_of(&root), disks(&root)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{FirmwareChoice, to_xml};

    #[test]
    fn our_domains_are_known_and_watched() {
        let mut machine = crate::domain::tests::machine();
        machine.drivers.agent = true;
        let portable = FirmwareChoice::Portable { secure_boot: false };
        for stage in [Stage::Bootstrap, Stage::Final] {
            let xml = to_xml(&machine, stage, &portable).unwrap();
            let (found, disks) = identify(&xml).unwrap();
            assert_eq!(found, Some(stage));
            assert_eq!(disks[0].path, Path::new("/vm/win10.qcow2"));
            assert!(disks[0].system && disks[0].boot);
            let domain = Domain {
                path: "x".into(),
                root: Element::parse(xml.as_bytes()).unwrap(),
            };
            assert!(domain.has_agent_channel());
            let watched = domain.watched(Path::new("/vm/com1.log"), &[]);
            assert!(watched.contains("<log file=\"/vm/com1.log\" append=\"off\"/>"));
            assert!(!watched.contains("com2"));
            assert!(watched.contains("<on_crash>preserve</on_crash>"));
            machine.second_serial = true;
            let xml = to_xml(&machine, stage, &portable).unwrap();
            let domain = Domain {
                path: "x".into(),
                root: Element::parse(xml.as_bytes()).unwrap(),
            };
            let watched = domain.watched(Path::new("/vm/com1.log"), &[]);
            assert!(watched.contains("<log file=\"/vm/com2.log\" append=\"off\"/>"));
            machine.second_serial = false;
            // After the switch the disk runs from an overlay, whatever is below it.
            for below in [vec![], vec!["/old/win10.vmdk"]] {
                machine.disks[0].backing = (below.iter())
                    .map(|path| crate::domain::Backing {
                        path: path.into(),
                        format: "vmdk".into(),
                        socket: false,
                    })
                    .collect();
                let xml = to_xml(&machine, stage, &portable).unwrap();
                let root = Element::parse(xml.as_bytes()).unwrap();
                let path = "x".into();
                let overlay = ("/vm/win10.qcow2".into(), "/vm/trial".into());
                let xml = Domain { path, root }.watched(Path::new("/vm/com1.log"), &[overlay]);
                let disk = &identify(&xml).unwrap().1[0];
                assert_eq!(disk.path, Path::new("/vm/trial"));
                let mut want = vec!["/vm/win10.qcow2"];
                want.extend(below);
                let want: Vec<PathBuf> = want.into_iter().map(PathBuf::from).collect();
                assert_eq!(disk.below, want);
                assert!(disk.stands_on(Path::new("/vm/win10.qcow2")));
                assert!(!disk.stands_on(Path::new("/vm/other.qcow2")));
            }
            machine.disks[0].backing.clear();
            let other = xml.replace(HYPER2KVM_NS, "urn:other");
            assert_eq!(identify(&other).unwrap().0, None);
        }
    }
}
