//! The step from an inspected guest and a virtio-win driver source to a plan. `plan()` itself is
//! pure; everything it needs is read here.

use std::collections::{BTreeMap, BTreeSet};

use crate::actions::{Backups, EditedHives};
use crate::drivers::catalogue::Catalogue;
use crate::drivers::driver_source::{DriverSource, WithGenerated};
use crate::drivers::package;
use crate::drivers::select::{self, DriverSet};
use crate::drivers::signature;
use crate::error::{Blocker, Error, Result};
use crate::guest::{FileKind, GuestPath, GuestRead, VolumeId};
use crate::inspect::{Hives, Inspection, Survey, WindowsFacts};
use crate::plan::firstboot::{GENERATED, Generated, Preferences};
use crate::plan::outlook::Outlook;
use crate::plan::{self, At, Draft, Inputs, Layout, Options, Plan, Present};
use crate::types::DiskBus;

/// A plan for Windows and its inputs.
pub struct Prepared {
    pub plan: Plan,
    pub basis: Basis,
    /// The hives of the plan.
    pub edited: EditedHives,
    /// The running backups of their originals, if a conversion requested them.
    pub backups: Option<Backups>,
    /// The files it would leave; `None` if the documents of the VM cannot be rendered.
    pub outlook: Option<Outlook>,
}

/// The Windows and the drivers for which a plan is made.
pub struct Basis {
    pub windows: WindowsFacts,
    pub bootstrap: Option<DiskBus>,
    pub drivers: DriverSet,
    /// Files of the plan that are generated, not read from a driver source.
    pub generated: Vec<Generated>,
}

impl Basis {
    /// All sources of the plan's files.
    pub fn driver_source<'a>(&'a self, source: &'a dyn DriverSource) -> WithGenerated<'a> {
        with_generated(source, &self.generated)
    }

    /// The controllers from which a converted disk must boot.
    pub fn wanted(&self) -> Vec<DiskBus> {
        plan::wanted(self.bootstrap, &self.drivers)
    }
}

fn with_generated<'a>(
    source: &'a dyn DriverSource,
    generated: &'a [Generated],
) -> WithGenerated<'a> {
    WithGenerated {
        source,
        folder: GENERATED,
        generated,
    }
}

/// The controller of the first boot: the user's choice, or one that this guest supports.
pub fn bootstrap(
    asked: Option<Option<DiskBus>>,
    windows: &WindowsFacts,
    inspection: &Inspection,
) -> Option<DiskBus> {
    let sectors = [
        windows.sector_size,
        inspection.sector_size(windows.boot_disk),
    ];
    asked.unwrap_or({
        if sectors != [512, 512] {
            // QEMU's AHCI and IDE disks always have 512-byte sectors.
            None
        } else if windows.target.major < 6 {
            Some(DiskBus::Ide)
        } else {
            Some(DiskBus::Sata)
        }
    })
}

/// Refuses a guest that cannot be planned for, with all blockers in one error.
pub fn windows_or_refuse(survey: &Survey) -> Result<(&WindowsFacts, &Hives)> {
    let inspection = &survey.inspection;
    match (&inspection.windows, &survey.hives) {
        (Some(windows), Some(hives)) => Ok((windows, hives)),
        _ => {
            let mut blockers = inspection.blockers();
            if blockers.is_empty() {
                blockers.push(Blocker::new(
                    "no-windows",
                    "no Windows installation was found on this disk",
                    "name the disk Windows is installed on",
                ));
            }
            Err(refused(inspection, blockers))
        }
    }
}

pub fn refused(inspection: &Inspection, blockers: Vec<Blocker>) -> Error {
    Error::refused(
        format!(
            "{} cannot be converted in its present state",
            inspection.source.path
        ),
        blockers,
    )
}

/// Selects the drivers and drafts the plan.
pub fn draft(
    survey: &Survey,
    guest: &dyn GuestRead,
    driver_source: &dyn DriverSource,
    catalogue: &Catalogue,
    (options, preferences): (Options, &Preferences),
) -> Result<(Draft, Basis)> {
    let inspection = &survey.inspection;
    let (windows, hives) = windows_or_refuse(survey)?;
    let mut drivers = select::select(driver_source, catalogue, &windows.target).map_err(|e| {
        let mut blockers = inspection.blockers();
        blockers.push(e.blocker());
        refused(inspection, blockers)
    })?;
    let digests = digests(&mut drivers, driver_source, inspection, windows)?;
    let used_oem = used_oem(guest, windows)?;
    let inputs = Inputs {
        inspection,
        windows,
        hives,
        drivers: &drivers,
        digests: &digests,
        used_oem: &used_oem,
        options,
        preferences,
        agent_size: drivers
            .guest_agent_msi
            .as_ref()
            .map_or(0, |path| size(driver_source, path)),
    };
    let unreadable = |e| Error::failed("planning").because(e);
    let layout = plan::layout(&inputs).map_err(unreadable)?;
    let generated = layout.generated.clone();
    let driver_source = with_generated(driver_source, &generated);
    let present = present(guest, windows.system_volume, &layout, &driver_source)?;
    let draft = plan::draft(&inputs, layout, &present).map_err(unreadable)?;
    let basis = Basis {
        windows: windows.clone(),
        bootstrap: options.bootstrap,
        drivers,
        generated,
    };
    Ok((draft, basis))
}

/// The digest of each package whose files can be read and fit. Packages that do not fit are left
/// out with a note, unless they are for boot storage.
fn digests(
    drivers: &mut DriverSet,
    driver_source: &dyn DriverSource,
    inspection: &Inspection,
    windows: &WindowsFacts,
) -> Result<BTreeMap<String, String>> {
    let mut digests = BTreeMap::new();
    let mut unusable = Vec::new();
    for package in &mut drivers.packages {
        match package.read_files(driver_source, windows.target.arch) {
            Ok(contents) => {
                package.signer = signature::catalogue_signer(package, &contents);
                digests.insert(package.driver.clone(), package::digest(&contents));
            }
            Err(e) if plan::is_boot(package) => return Err(refused(inspection, vec![e.blocker()])),
            Err(e) => unusable.push((package.driver.clone(), e.to_string())),
        }
    }
    for (driver, fault) in unusable {
        drivers.packages.retain(|p| p.driver != driver);
        drivers.notes.push(format!("{driver} is left out: {fault}"));
    }
    Ok(digests)
}

fn size(driver_source: &dyn DriverSource, path: &str) -> u64 {
    driver_source
        .files()
        .iter()
        .find(|f| f.path == path)
        .map_or(0, |f| f.size)
}

fn used_oem(guest: &dyn GuestRead, windows: &WindowsFacts) -> Result<BTreeSet<u32>> {
    let failed = |e| Error::failed("listing the INF directory of the guest").because(e);
    let Ok(folder) = windows.root.join("INF") else {
        return Ok(BTreeSet::new());
    };
    if guest
        .stat(windows.system_volume, &folder)
        .map_err(failed)?
        .is_none()
    {
        return Ok(BTreeSet::new());
    }
    let files = guest.list(windows.system_volume, &folder).map_err(failed)?;
    Ok(files
        .iter()
        .filter_map(|f| plan::oem_number(&f.name))
        .collect())
}

/// Looks up every path of the layout, and the directories above them.
fn present(
    guest: &dyn GuestRead,
    volume: VolumeId,
    layout: &Layout,
    driver_source: &dyn DriverSource,
) -> Result<Present> {
    let mut present = Present::new();
    let mut absent = BTreeSet::new();
    for (path, path_in_source, size) in layout.files() {
        let mut known = true;
        for folder in ancestors(path) {
            if absent.contains(&folder) {
                known = false;
                break;
            }
            if present.contains_key(&folder) {
                continue;
            }
            match stat(guest, volume, &folder)? {
                Some(FileKind::Dir) => present.insert(folder, At::Folder),
                Some(FileKind::File) => {
                    return Err(Error::failed(format!("{folder} is a file in the guest")));
                }
                None => {
                    absent.insert(folder);
                    known = false;
                    break;
                }
            };
        }
        if !known {
            continue;
        }
        let failed = |e| Error::failed(format!("reading {path} in the guest")).because(e);
        let Some(info) = guest.stat(volume, path).map_err(failed)? else {
            continue;
        };
        let at = match info.kind {
            FileKind::Dir => At::Folder,
            FileKind::File if info.size == *size && info.reparse_tag.is_none() => {
                let theirs = guest.read(volume, path, *size).map_err(failed)?;
                let ours = driver_source.read(path_in_source).map_err(|e| {
                    Error::failed(format!("reading {path_in_source} from the drivers")).because(e)
                })?;
                if theirs == ours {
                    At::SameFile
                } else {
                    At::OtherFile
                }
            }
            FileKind::File => At::OtherFile,
        };
        present.insert(path.clone(), at);
    }
    Ok(present)
}

fn stat(guest: &dyn GuestRead, volume: VolumeId, path: &GuestPath) -> Result<Option<FileKind>> {
    let info = guest
        .stat(volume, path)
        .map_err(|e| Error::failed(format!("looking at {path} in the guest")).because(e))?;
    Ok(info.map(|i| i.kind))
}

/// The directories above a path, outermost first, without the root.
fn ancestors(path: &GuestPath) -> Vec<GuestPath> {
    let mut list = Vec::new();
    let mut next = path.parent();
    while let Some(folder) = next {
        if folder.is_root() {
            break;
        }
        next = folder.parent();
        list.push(folder);
    }
    list.reverse();
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::{GuestSpec, WinVersion};
    use crate::drivers::driver_source::Memory;
    use crate::error::ErrorKind;
    use crate::guest::DiskId;
    use crate::inspect::{Finding, Severity};
    use crate::testing::{self, MemoryGuest, driver_source};

    /// QEMU's SATA and IDE disks have sectors of 512 bytes; the boot files may lie on another disk.
    #[test]
    fn the_first_boot_is_straight_to_virtio_where_a_disk_it_needs_has_other_sectors() {
        let (sata, ide) = (Some(DiskBus::Sata), Some(DiskBus::Ide));
        for (version, windows_disk, boot_disk, wanted) in [
            (WinVersion::Win10, 512, 512, sata),
            (WinVersion::Win7, 512, 512, sata),
            (WinVersion::Xp, 512, 512, ide),
            (WinVersion::Win10, 4096, 4096, None),
            (WinVersion::Win10, 512, 4096, None),
            (WinVersion::Win10, 4096, 512, None),
        ] {
            let guest = MemoryGuest::of(GuestSpec::new(version));
            let mut inspection = guest.look(&[], |_, survey| survey.inspection.clone());
            let mut windows = inspection.windows.clone().unwrap();
            let mut other = inspection.disks[0].clone();
            other.index = 2;
            other.sector_size = boot_disk;
            inspection.disks.push(other);
            (windows.boot_disk, windows.sector_size) = (DiskId::nth(1, 2), windows_disk);
            let found = bootstrap(None, &windows, &inspection);
            assert_eq!(found, wanted, "{version:?} {windows_disk} {boot_disk}");
            // The user's choice takes precedence.
            assert_eq!(bootstrap(Some(ide), &windows, &inspection), ide);
        }
    }

    /// Windows does not start without its boot driver; it starts without any other.
    #[test]
    fn a_boot_driver_of_another_processor_is_refused_and_another_driver_left_out() {
        let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        let whole = driver_source();
        let draft_with = |driver: &str| {
            let changed = whole.files().iter().map(|file| {
                let mut bytes = whole.read(&file.path).unwrap();
                if file.path.to_lowercase().ends_with(&format!("{driver}.sys")) {
                    bytes[0] = b'?';
                }
                (file.path.clone(), bytes)
            });
            let driver_source = Memory::new(changed);
            let (catalogue, preferences) = (Catalogue::builtin(), Preferences::default());
            let options = testing::options(Some(DiskBus::Sata));
            guest.look(&[], |fake, survey| {
                draft(
                    survey,
                    fake,
                    &driver_source,
                    &catalogue,
                    (options, &preferences),
                )
            })
        };
        for driver in ["viostor", "vioscsi"] {
            let error = draft_with(driver).map(|_| ()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Refused, "{driver}");
            assert_eq!(error.blockers[0].code, "driver-wrong-image", "{driver}");
        }
        let (draft, basis) = draft_with("netkvm").unwrap();
        assert!(basis.drivers.package("netkvm").is_none());
        let said = |w: &String| w.starts_with("netkvm is left out");
        assert!(draft.warnings.iter().any(said), "{:?}", draft.warnings);
    }

    fn dirty() -> Finding {
        Finding {
            id: "volume-dirty",
            severity: Severity::Blocker,
            message: "m".into(),
            remedy: "r".into(),
            evidence: String::new(),
        }
    }

    fn codes(error: Error) -> Vec<String> {
        let blockers = error.blockers.into_iter();
        blockers.map(|blocker| blocker.code.to_string()).collect()
    }

    /// The user repairs all of it before the next attempt.
    #[test]
    fn drivers_that_are_missing_are_refused_together_with_what_was_found_on_the_disk() {
        let (catalogue, wishes) = (Catalogue::builtin(), Preferences::default());
        let options = testing::options(Some(DiskBus::Sata));
        MemoryGuest::new(WinVersion::Win10).look(&[], |fake, survey| {
            let mut survey = survey.clone();
            let none = Memory::new([]);
            let refused = |survey: &Survey| {
                let made = draft(survey, fake, &none, &catalogue, (options, &wishes));
                let error = made.map(drop).unwrap_err();
                assert_eq!(error.kind, ErrorKind::Refused);
                codes(error)
            };
            let missing = refused(&survey);
            assert_eq!(missing.len(), 1);
            survey.inspection.findings.push(dirty());
            assert_eq!(refused(&survey), ["volume-dirty", &missing[0]]);
        });
    }

    #[test]
    fn a_disk_without_windows_is_refused_with_what_was_found_on_it() {
        MemoryGuest::new(WinVersion::Win10).look(&[], |_, survey| {
            assert!(windows_or_refuse(survey).is_ok());
            let mut survey = survey.clone();
            let refused = |survey: &Survey| codes(windows_or_refuse(survey).map(drop).unwrap_err());
            survey.hives = None;
            assert_eq!(refused(&survey), ["no-windows"]);
            survey.inspection.findings.push(dirty());
            assert_eq!(refused(&survey), ["volume-dirty"]);
        });
    }

    /// A file of that name in the guest is compared byte for byte.
    #[test]
    fn a_file_of_the_guest_is_the_drivers_only_where_its_contents_are() {
        let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        let driver_source = driver_source();
        let (catalogue, wishes) = (Catalogue::builtin(), Preferences::default());
        let to = "\\Windows\\System32\\drivers\\viostor.sys";
        let options = testing::options(Some(DiskBus::Sata));
        let planned = |there: Option<Vec<u8>>| {
            let more: Vec<_> = there
                .into_iter()
                .map(|bytes| (to.to_owned(), bytes))
                .collect();
            guest.look(&more, |fake, survey| {
                let made = draft(survey, fake, &driver_source, &catalogue, (options, &wishes));
                let (draft, _) = made.unwrap();
                let wanted = GuestPath::parse(to).unwrap();
                draft.actions.iter().find_map(|action| match action {
                    crate::actions::Action::CopyFiles(copy) => {
                        let copied = copy.files.iter().find(|file| file.to == wanted)?;
                        Some((copied.from.clone(), copied.replaces))
                    }
                    _ => None,
                })
            })
        };
        let (from, replaces) = planned(None).unwrap();
        assert!(!replaces);
        let driver = driver_source.read(&from).unwrap();
        let mut other = driver.clone();
        *other.last_mut().unwrap() ^= 1;
        assert_eq!(planned(Some(other)), Some((from.clone(), true)));
        assert_eq!(planned(Some(driver[1..].to_vec())), Some((from, true)));
        assert_eq!(planned(Some(driver)), None);
    }

    /// The contents of a reparse point are elsewhere.
    #[test]
    fn a_driver_that_is_a_reparse_point_in_the_guest_is_replaced() {
        let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        let driver_source = driver_source();
        let (catalogue, wishes) = (Catalogue::builtin(), Preferences::default());
        let to = "\\Windows\\System32\\drivers\\viostor.sys";
        let options = testing::options(Some(DiskBus::Sata));
        let wanted = GuestPath::parse(to).unwrap();
        guest.look(&[], |fake, survey| {
            let copied = |fake: &crate::inspect::fake::FakeGuest| {
                let made = draft(survey, fake, &driver_source, &catalogue, (options, &wishes));
                let (draft, _) = made.unwrap();
                let mut actions = draft.actions.into_iter();
                actions.find_map(|action| match action {
                    crate::actions::Action::CopyFiles(copy) => {
                        let mut files = copy.files.into_iter();
                        files.find(|file| file.to == wanted)
                    }
                    _ => None,
                })
            };
            let new = copied(fake).unwrap();
            assert!(!new.replaces);
            let volume = survey.inspection.windows.as_ref().unwrap().system_volume;
            let mut fake = fake.clone();
            let same = driver_source.read(&new.from).unwrap();
            fake.file(volume.partition, to, same.clone());
            assert!(copied(&fake).is_none());
            let there = fake.file(volume.partition, to, same);
            there.reparse_tag = Some(0x8000_0017);
            assert!(copied(&fake).is_some_and(|file| file.replaces));
        });
    }

    /// Nothing in the guest is removed for a driver.
    #[test]
    fn a_directory_in_the_place_of_a_driver_is_a_blocker_and_stays() {
        let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        let (catalogue, wishes) = (Catalogue::builtin(), Preferences::default());
        let to = r"\Windows\System32\drivers\viostor.sys";
        let options = testing::options(Some(DiskBus::Sata));
        let within = (format!(r"{to}\notes.txt"), Vec::new());
        guest.look(&[within], |fake, survey| {
            let made = draft(
                survey,
                fake,
                &driver_source(),
                &catalogue,
                (options, &wishes),
            );
            let (draft, _) = made.unwrap();
            let [blocker] = &draft.blockers[..] else {
                panic!("{:?}", draft.blockers);
            };
            assert_eq!(blocker.code, "path-taken");
            assert!(blocker.reason.starts_with(to), "{}", blocker.reason);
            for action in &draft.actions {
                if let crate::actions::Action::CopyFiles(copy) = action {
                    assert!(copy.files.iter().all(|file| file.to.to_string() != to));
                }
            }
        });
    }

    /// Windows records who signed a driver beside its package.
    #[test]
    fn a_package_knows_the_signer_of_its_catalogue() {
        use crate::demo::cat::{self, Certificate};
        use crate::registry::{RegData, RegOp};
        let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        let certificate = Certificate {
            serial: 1,
            subject: &[("2.5.4.3", 0x0c, "A Signer")],
            issuer: &[("2.5.4.3", 0x0c, "A Root")],
        };
        let hash = |bytes: &[u8]| {
            use sha2::Digest;
            sha2::Sha256::digest(bytes).to_vec()
        };
        let signed = cat::signed(&[b"x"], &[certificate], &certificate, hash);
        let whole = driver_source();
        let files = whole.files().iter().map(|file| {
            let bytes = match file.path.as_str() {
                "viostor/w10/amd64/viostor.cat" => signed.clone(),
                path => whole.read(path).unwrap(),
            };
            (file.path.clone(), bytes)
        });
        let prepared = guest.prepare(&Memory::new(files), Some(DiskBus::Sata));
        for package in &prepared.basis.drivers.packages {
            let known = (package.driver == "viostor").then_some("A Signer");
            assert_eq!(package.signer.as_deref(), known, "{}", package.driver);
        }
        let mut recorded = Vec::new();
        for (_, edits) in crate::actions::edits(&prepared.plan.actions) {
            recorded.extend(edits.ops.iter().filter_map(|op| match op {
                RegOp::Set { name, data, .. } if name == "SignerName" => Some(data.clone()),
                _ => None,
            }));
        }
        assert_eq!(recorded, [RegData::Sz("A Signer".into())]);
    }

    #[test]
    fn the_directories_above_a_file_come_from_the_outside_without_the_root() {
        let above = |path: &str| -> Vec<_> {
            let all = ancestors(&GuestPath::parse(path).unwrap());
            all.iter().map(ToString::to_string).collect()
        };
        assert_eq!(above(r"\a\b\c.sys"), [r"\a", r"\a\b"]);
        assert_eq!(above(r"\c.sys"), [""; 0]);
        let driver_source = Memory::new([("a.msi".to_string(), vec![0; 7])]);
        assert_eq!(
            (size(&driver_source, "a.msi"), size(&driver_source, "b.msi")),
            (7, 0)
        );
    }

    /// A number in use is that of another driver.
    #[test]
    fn the_numbers_of_drivers_are_those_of_the_inf_directory() {
        let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        let more = [7, 40].map(|n| (format!(r"\Windows\INF\oem{n}.inf"), Vec::new()));
        let found = |more: &[(String, Vec<u8>)]| {
            guest.look(more, |fake, survey| {
                used_oem(fake, survey.inspection.windows.as_ref().unwrap()).unwrap()
            })
        };
        let known = found(&[]);
        assert!(known.contains(&3) && !known.contains(&7), "{known:?}");
        let mut wanted = known.clone();
        wanted.extend([7, 40]);
        assert_eq!(found(&more), wanted);
        let mut bare = guest.clone();
        let inf = GuestPath::parse(r"\Windows\INF").unwrap();
        bare.files
            .retain(|file| file.path.parent().as_ref() != Some(&inf));
        let none = bare.look(&[], |fake, survey| {
            used_oem(fake, survey.inspection.windows.as_ref().unwrap()).unwrap()
        });
        assert!(none.is_empty());
    }

    /// A directory that is there is not created again, and none is created over a file.
    #[test]
    fn the_directories_of_a_plan_are_those_that_the_guest_lacks() {
        let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        let driver_source = driver_source();
        let (catalogue, wishes) = (Catalogue::builtin(), Preferences::default());
        let options = testing::options(Some(DiskBus::Sata));
        let drafted = |more: &[(String, Vec<u8>)]| {
            guest.look(more, |fake, survey| {
                let volume = survey.inspection.windows.as_ref().unwrap().system_volume;
                let (draft, _) =
                    draft(survey, fake, &driver_source, &catalogue, (options, &wishes))?;
                let mut made = BTreeSet::new();
                for action in &draft.actions {
                    let crate::actions::Action::CopyFiles(copy) = action else {
                        continue;
                    };
                    for folder in &copy.folders {
                        assert_eq!(stat(fake, volume, folder)?, None, "{folder}");
                        assert!(made.insert(folder.clone()), "{folder} twice");
                    }
                    for file in &copy.files {
                        for above in ancestors(&file.to) {
                            let there = stat(fake, volume, &above)? == Some(FileKind::Dir);
                            assert!(there || made.contains(&above), "{above}");
                        }
                    }
                }
                Ok::<_, Error>(made)
            })
        };
        let made = drafted(&[]).unwrap();
        assert!(!made.is_empty());
        let first = made.iter().next().unwrap().to_string();
        let error = drafted(&[(first.clone(), b"a file".to_vec())]).unwrap_err();
        assert!(error.message.contains(&first), "{error}");
        let within = format!(r"{first}\another.txt");
        assert_eq!(
            drafted(&[(within, Vec::new())]).unwrap().len(),
            made.len() - 1
        );
    }
}
