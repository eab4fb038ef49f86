//! `hyper2kvm drivers [PATH]`

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::convert::job::DEFAULT_ISO;
use crate::drivers::catalogue::{Catalogue, Product, Windows};
use crate::drivers::driver_source::DriverSource;
use crate::drivers::{Arch, WindowsTarget, origin, select};
use crate::error::{Error, Result};
use crate::ui::{Styled, Tone, Ui, count};

use super::confine::{self, Writes};

#[derive(Debug, clap::Args)]
pub struct DriversArgs {
    /// virtio-win ISO or directory; without it only the catalogue is shown
    #[arg(env = "HYPER2KVM_VIRTIO_ISO")]
    path: Option<PathBuf>,
    /// Driver catalogue merged over the built-in one (YAML or JSON, repeatable)
    #[arg(long, value_name = "FILE")]
    driver_config: Vec<PathBuf>,
    /// Print where virtio-win comes from, which release old Windows needs, and what to check
    #[arg(long = "where")]
    origin: bool,
}

pub fn run(args: &DriversArgs, ui: &Ui) -> Result<()> {
    confine::looks(&Writes::default())?;
    let mut catalogue = Catalogue::builtin();
    for file in &args.driver_config {
        catalogue.merge_file(file).map_err(|e| {
            Error::usage(format!("reading the driver catalogue {}", file.display()))
                .because(e)
                .hint("hyper2kvm docs drivers describes the format")
        })?;
    }
    if args.origin {
        let text = origin::text(&catalogue, DEFAULT_ISO);
        let mut shown = Styled::default();
        for line in text.lines() {
            // An address is printed for copying.
            let tone = match line.contains("https://") {
                true => Tone::Code,
                false => Tone::Plain,
            };
            shown.push(tone, format!("{line}\n"));
        }
        ui.styled(&shown);
        ui.document("drivers-where", json!({"text": text}));
        return Ok(());
    }
    let path = args.path.as_deref();
    let driver_source = path
        .map(|path| origin::open(path, &catalogue))
        .transpose()?;
    let rows = rows(&catalogue, driver_source.as_deref());
    ui.styled(&table(&rows, driver_source.as_deref(), ui.is_verbose()));
    ui.document(
        "drivers",
        json!({"media": driver_source.as_ref().map(|m| m.describe()),
            "windows": rows.iter().map(Row::json).collect::<Vec<_>>()}),
    );
    Ok(())
}

fn architectures(windows: &Windows) -> Vec<Arch> {
    if windows.archs.is_empty() {
        vec![Arch::Amd64, Arch::X86, Arch::Arm64]
    } else {
        windows.archs.clone()
    }
}

/// A Windows for which the entry is.
fn target(windows: &Windows, arch: Arch) -> WindowsTarget {
    WindowsTarget {
        major: windows.nt.major,
        minor: windows.nt.minor,
        build: windows.builds.from.or(windows.builds.to).unwrap_or(0),
        arch,
        server: windows.product == Some(Product::Server),
    }
}

/// One Windows on one architecture.
struct Row<'c> {
    windows: &'c Windows,
    arch: Arch,
    /// `None` without a driver source.
    choice: Option<Result<select::DriverSet, select::DriverError>>,
}

fn rows<'c>(catalogue: &'c Catalogue, driver_source: Option<&dyn DriverSource>) -> Vec<Row<'c>> {
    let mut rows = Vec::new();
    for windows in &catalogue.windows {
        for arch in architectures(windows) {
            let target = target(windows, arch);
            // An earlier entry may have precedence for this build.
            if catalogue.windows_for(&target).map(|w| &w.id) != Some(&windows.id) {
                continue;
            }
            rows.push(Row {
                windows,
                arch,
                choice: driver_source
                    .map(|driver_source| select::select(driver_source, catalogue, &target)),
            });
        }
    }
    rows
}

impl Row<'_> {
    fn drivers(set: &select::DriverSet) -> Vec<String> {
        let packages = set.packages.iter();
        packages
            .map(|p| format!("{} {}", p.driver, p.inf.driver_ver.version_text()))
            .collect()
    }

    fn json(&self) -> Value {
        let mut json = json!({"windows": self.windows.name, "arch": self.arch, "folders": self.windows.folders});
        let more = match &self.choice {
            None => return json,
            Some(Ok(set)) => json!({"usable": true, "folder": set.os_folder,
                "drivers": Self::drivers(set), "notes": set.notes}),
            Some(Err(error)) => json!({"usable": false, "reason": error.to_string(),
                "remedy": error.remedy()}),
        };
        if let (Some(json), Value::Object(more)) = (json.as_object_mut(), more) {
            json.extend(more);
        }
        json
    }

    /// Directory, version and notes.
    fn cells(&self) -> (String, String) {
        match &self.choice {
            None => (self.windows.folders.join(", "), String::new()),
            Some(Ok(set)) => {
                let version = set.packages.first();
                let version = version.map(|p| p.inf.driver_ver.version_text());
                let drivers = count(set.packages.len(), "driver");
                let version = version.unwrap_or_default();
                (set.os_folder.clone(), format!("{version:<18} {drivers}"))
            }
            Some(Err(select::DriverError::NoDriver(_) | select::DriverError::NotSigned { .. })) => {
                ("-".to_string(), format!("needs {}", self.windows.media))
            }
            Some(Err(_)) => ("-".to_string(), "not usable (see -v)".to_string()),
        }
    }
}

/// Renders a table that fits in 80 columns.
fn table(rows: &[Row<'_>], driver_source: Option<&dyn DriverSource>, verbose: bool) -> Styled {
    let mut text = Styled::default();
    let (folder, last) = match driver_source {
        Some(_) => ("DIR", "VERSION            DRIVERS"),
        None => ("DIRECTORIES, THE BEST FIRST", ""),
    };
    let head = format!("{:<29} {:<7} {folder:<8} {last}", "WINDOWS", "ARCH");
    text.push(Tone::Strong, head.trim_end());
    text.push(Tone::Plain, "\n");
    for row in rows {
        let (folder, last) = row.cells();
        let tone = match &row.choice {
            Some(Err(_)) => Tone::Warn,
            _ => Tone::Plain,
        };
        let start = format!("{:<29} {:<7} ", row.windows.name, row.arch.name());
        text.push(Tone::Plain, start);
        text.hang();
        let rest = match folder.as_str() {
            "-" => format!("- {last}"),
            _ => format!("{folder:<8} {last}"),
        };
        text.push(tone, rest.trim_end());
        text.push(Tone::Plain, "\n");
        let more = match &row.choice {
            Some(Ok(set)) if verbose => Row::drivers(set).join(", "),
            Some(Err(error)) if verbose => format!("{error}; {}", error.remedy()),
            _ => continue,
        };
        text.push(Tone::Plain, "    ");
        text.hang();
        text.push(Tone::Faint, more);
        text.push(Tone::Plain, "\n");
    }
    if driver_source.is_none() {
        text.push(
            Tone::Plain,
            "\nhyper2kvm drivers PATH: what a driver source offers; --where: where to get one\n",
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drivers::catalogue::Product;

    #[test]
    fn the_table_fits_80_columns() {
        let catalogue = Catalogue::builtin();
        let driver_source = crate::drivers::driver_source::Memory::new([(
            "viostor/w10/amd64/viostor.inf".to_string(),
            vec![1],
        )]);
        for driver_source in [None, Some(&driver_source as &dyn DriverSource)] {
            let plain = table(&rows(&catalogue, driver_source), driver_source, false).plain();
            for line in plain.lines() {
                assert!(line.chars().count() <= 80, "{line}");
            }
            assert!(plain.contains("Windows Server 2003 or XP x64"), "{plain}");
        }
    }

    #[test]
    fn no_system_that_never_existed() {
        let catalogue = Catalogue::builtin();
        let shown: Vec<(String, Arch)> = rows(&catalogue, None)
            .iter()
            .map(|r| (r.windows.name.clone(), r.arch))
            .collect();
        for row in rows(&catalogue, None) {
            let windows = row.windows;
            let first = windows.builds.from.unwrap_or_default();
            let server = windows.product == Some(Product::Server);
            let old = windows.nt.major < 10 || (server && first < 26100);
            assert!(row.arch != Arch::Arm64 || !old, "{} on ARM64", windows.name);
        }
        let has = |name: &str, arch| shown.contains(&(name.to_string(), arch));
        assert!(has("Windows 7", Arch::X86) && has("Windows 11", Arch::Arm64));
        assert!(!has("Windows XP", Arch::Amd64), "XP x64 is NT 5.2");
        assert!(has("Windows 10", Arch::Arm64));
    }
}
