//! The output directory of a VM for `pull` and `release`, with any guest, started by any program.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::boot::files::{self, DomainDisk};
use crate::boot::record::Record as BootRecord;
use crate::domain::element::Element;
use crate::error::{Error, Result};
use crate::fix::journal::write_durably;
use crate::fix::trusted::TrustedFolder;
use crate::report::OutputFile;
use crate::tool;
use crate::tool::virsh::{DomainState, Tick, Virsh};

const REPORT: &str = "report.json";

/// An opened output directory.
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    held: TrustedFolder,
    report: Value,
    /// The disks in the order of the report; some may have been moved elsewhere.
    pub(crate) disks: Vec<PathBuf>,
    /// The domain XML of each stage.
    xml: Vec<PathBuf>,
    /// `None` if the domain XML is missing, as after a killed release.
    pub(crate) uuid: Option<Uuid>,
    pub(crate) boot: Option<BootRecord>,
}

/// The domain of the directory in libvirt.
pub(crate) struct Domain {
    pub(crate) virsh: Virsh,
    pub(crate) uuid: Uuid,
    pub(crate) tick: Tick,
}

impl Domain {
    pub(crate) fn is_active(&self) -> bool {
        self.tick.state != DomainState::Off
    }
}

impl Folder {
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let path = std::path::absolute(folder)
            .map_err(|e| Error::usage(format!("{} is not a path", folder.display())).because(e))?;
        let not_one = || {
            Error::usage(format!(
                "{} is not the output directory of a conversion",
                path.display()
            ))
            .hint("name the directory that `hyper2kvm convert` wrote")
        };
        let held = files::trust(&path)?.ok_or_else(not_one)?;
        let text = match held.read(Path::new(REPORT)) {
            Err(e) if e.is_missing() => return Err(not_one()),
            text => text?,
        };
        let report: Value = serde_json::from_slice(&text).map_err(|e| not_one().because(e))?;
        let outputs = report.get("outputs").ok_or_else(not_one)?;
        let disks = outputs["disks"].as_array().into_iter().flatten();
        let disks = disks.filter_map(Value::as_str).map(PathBuf::from).collect();
        let names = ["bootstrap_xml", "final_xml"].into_iter();
        let names = names.filter_map(|key| Path::new(outputs[key].as_str()?).file_name());
        let xml: Vec<PathBuf> = names.map(|name| path.join(name)).collect();
        let last = xml.last().ok_or_else(not_one)?;
        let uuid = match last.exists() {
            true => parsed(&held, last)?
                .text_of("uuid")
                .and_then(|text| text.parse().ok()),
            false => None,
        };
        Ok(Self {
            uuid,
            boot: BootRecord::load(&path)?,
            path,
            held,
            report,
            disks,
            xml,
        })
    }

    /// The domain that `boot`, or the user with the XML of this directory, defined. `None` if there
    /// is none, or no libvirt to query. A domain with that UUID that hyper2kvm did not define, or
    /// that has other disks, is somebody else's.
    pub(crate) fn domain(&self, uri: &str) -> Result<Option<Domain>> {
        let Some(uuid) = self.uuid.filter(|_| tool::find("virsh").is_some()) else {
            return Ok(None);
        };
        let uri = self.boot.as_ref().map_or(uri, |boot| &boot.uri);
        let virsh = Virsh::new(uri);
        let (tick, xml) = match virsh.look(uuid) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(None),
            // Without libvirt, the locks of QEMU show whether the disks are in use.
            Err(error) if virsh.uuids().is_err() => {
                tracing::info!("{uri}: {error}");
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let (stage, disks) = files::identify(&xml)?;
        if stage.is_none() || !self.names_ours(&disks) {
            return Ok(None);
        }
        Ok(Some(Domain { virsh, uuid, tick }))
    }

    fn names_ours(&self, disks: &[DomainDisk]) -> bool {
        let ours = |disk: &DomainDisk| self.disks.iter().any(|path| disk.stands_on(path));
        disks.iter().any(ours)
    }

    /// Removes the chains from the domain XML of both stages.
    pub(crate) fn describe_alone(&self) -> Result<()> {
        for path in &self.xml {
            let mut root = parsed(&self.held, path)?;
            stand_alone(&mut root, &self.disks);
            let text = root.to_document();
            write_durably(path, text.as_bytes())
                .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))?;
        }
        Ok(())
    }

    /// Removes the chains from the next start of the domain, if libvirt has not done so itself.
    /// Other changes by the user stay.
    pub(crate) fn define_alone(&self, domain: &Domain) -> Result<()> {
        let xml = domain.virsh.xml_to_change(domain.uuid)?;
        let mut root = Element::parse(xml.as_bytes())
            .map_err(|e| Error::failed("reading the domain XML of libvirt").because(e))?;
        let before = root.to_document();
        stand_alone(&mut root, &self.disks);
        let after = root.to_document();
        if after == before {
            return Ok(());
        }
        let path = self.path.join(".boot-domain.xml");
        write_durably(&path, after.as_bytes())
            .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))?;
        let defined = domain.virsh.define(&path);
        let _ = fs::remove_file(&path);
        Ok(defined?)
    }

    /// Records in the report that the disks stand alone, and the facts about the files.
    pub(crate) fn report_alone(&mut self) -> Result<()> {
        self.page_alone()?;
        let report = &mut self.report;
        report["outputs"]["complete"] = true.into();
        report["bytes"]["left"] = 0.into();
        if let Some(warnings) = report["warnings"].as_array_mut() {
            let gone = [Some(crate::later::WARNING), Some(crate::later::ON_WIRE)];
            warnings.retain(|w| !gone.contains(&w.as_str()));
        }
        for entry in report["files"].as_array_mut().into_iter().flatten() {
            let Some(name) = entry["path"].as_str().map(PathBuf::from) else {
                continue;
            };
            let found = fs::metadata(self.path.join(&name)).ok();
            if let Some(now) = found.and_then(|found| OutputFile::of(name, &found)) {
                *entry = json!(now);
            }
        }
        let path = self.path.join(REPORT);
        let text = format!("{:#}\n", self.report);
        write_durably(&path, text.as_bytes())
            .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))
    }

    /// Updates the HTML page accordingly.
    fn page_alone(&self) -> Result<()> {
        let path = self.path.join("report.html");
        let page = match self.held.read(Path::new("report.html")) {
            Err(e) if e.is_missing() => return Ok(()),
            page => String::from_utf8_lossy(&page?).into_owned(),
        };
        let alone = "the disks stand alone: everything was pulled";
        let said = page.replace(crate::later::WARNING, alone).replace(
            crate::later::ON_WIRE,
            "the other host is not needed any more",
        );
        write_durably(&path, said.as_bytes())
            .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))
    }

    /// Everything that the report lists, relative to the directory or, for a disk that was moved,
    /// absolute.
    pub(crate) fn listed(&self) -> Vec<OutputFile> {
        let list = self.report.get("files").cloned().unwrap_or_default();
        serde_json::from_value(list).unwrap_or_default()
    }

    /// The files of the directory in the report, and those moved out of it if they are unchanged.
    pub(crate) fn own_files(&self) -> Vec<PathBuf> {
        let plain = |path: &Path| path.components().all(|c| matches!(c, Component::Normal(_)));
        let list = self.listed().into_iter();
        let own = list.filter_map(|was| {
            if plain(&was.path) {
                return Some(self.path.join(&was.path));
            }
            let found = was.path.symlink_metadata().ok()?;
            (found.is_file() && found.ino() == was.inode).then_some(was.path)
        });
        own.collect()
    }

    /// The domain XML of each stage.
    pub(crate) fn xml(&self) -> &[PathBuf] {
        &self.xml
    }
}

fn parsed(held: &TrustedFolder, path: &Path) -> Result<Element> {
    let name = path.file_name().unwrap_or_default();
    let bytes = held.read(Path::new(name))?;
    Element::parse(&bytes)
        .map_err(|e| Error::failed(format!("reading {}", path.display())).because(e))
}

/// Removes the chain, and the policies for an unreachable one, from the disks of a domain.
fn stand_alone(domain: &mut Element, disks: &[PathBuf]) {
    let devices = domain.children.iter_mut().filter(|e| e.is("devices"));
    let all = devices.flat_map(|devices| &mut devices.children);
    for disk in all.filter(|e| e.is("disk")) {
        let source = disk.first("source");
        let path = source.and_then(|s| s.attr("file").or(s.attr("dev")));
        let ours = path.is_some_and(|path| disks.iter().any(|disk| disk == Path::new(path)));
        if !ours {
            continue;
        }
        disk.children.retain(|e| !e.is("backingStore"));
        for driver in disk.children.iter_mut().filter(|e| e.is("driver")) {
            let policy = |key: &str| crate::domain::xml::POLICIES.contains(&key);
            (driver.attrs).retain(|(key, value)| !(policy(key) && value == "stop"));
        }
    }
}

/// Whether the switch is in progress, during which the disks must not change.
pub(crate) fn between_boots(boot: &BootRecord) -> bool {
    use crate::boot::record::Phase;
    !matches!(boot.phase, Phase::New | Phase::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Backing, FirmwareChoice, Stage, to_xml};

    #[test]
    fn a_domain_stands_alone_as_if_it_had_been_copied() {
        let mut machine = crate::domain::tests::machine();
        let portable = FirmwareChoice::Portable { secure_boot: false };
        for stage in [Stage::Bootstrap, Stage::Final] {
            let copied = to_xml(&machine, stage, &portable).unwrap();
            machine.disks[0].backing = vec![Backing {
                path: "/old/win10.vmdk".into(),
                format: "vmdk".into(),
                socket: false,
            }];
            let later = to_xml(&machine, stage, &portable).unwrap();
            machine.disks[0].backing.clear();
            assert_ne!(later, copied);
            let mut root = Element::parse(later.as_bytes()).unwrap();
            // Of somebody else: unchanged.
            stand_alone(&mut root, &["/vm/other.qcow2".into()]);
            assert_eq!(root.to_document(), later);
            stand_alone(&mut root, &[machine.disks[0].path.clone()]);
            assert_eq!(root.to_document(), copied);
        }
    }
}
