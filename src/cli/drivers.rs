//! `hyper2kvm drivers [PATH]`

use std::path::PathBuf;

use serde_json::json;

use crate::drivers::catalogue::{Catalogue, Product, Windows};
use crate::drivers::media::{self, Media};
use crate::drivers::select;
use crate::drivers::{Arch, WindowsTarget};
use crate::error::{Error, Result};
use crate::ui::Ui;

use super::confine::{self, Writes};

#[derive(Debug, clap::Args)]
pub struct DriversArgs {
    /// virtio-win ISO or folder; without it only the catalogue is shown
    #[arg(env = "HYPER2KVM_VIRTIO_ISO")]
    path: Option<PathBuf>,
    /// Driver catalogue merged over the built-in one (YAML or JSON, repeatable)
    #[arg(long, value_name = "FILE")]
    driver_config: Vec<PathBuf>,
}

pub fn run(args: &DriversArgs, ui: &Ui) -> Result<()> {
    confine::looks(&Writes::default())?;
    let mut catalogue = Catalogue::builtin();
    for file in &args.driver_config {
        catalogue.merge_file(file).map_err(|e| {
            Error::usage(format!("reading the driver catalogue {}", file.display()))
                .because(e)
                .hint("docs/drivers.md describes the format")
        })?;
    }
    let media = args
        .path
        .as_ref()
        .map(|path| {
            media::open(path).map_err(|e| {
                Error::failed(format!("opening {}", path.display()))
                    .because(e)
                    .hint("a virtio-win ISO, or a folder laid out like it or like its RPM")
            })
        })
        .transpose()?;
    let mut rows = Vec::new();
    for windows in &catalogue.windows {
        for arch in architectures(windows) {
            let target = target(windows, arch);
            // An entry further up may take precedence for this build.
            if catalogue.windows_for(&target).map(|w| &w.id) != Some(&windows.id) {
                continue;
            }
            rows.push(row(windows, &target, &catalogue, media.as_deref(), ui));
        }
    }
    ui.document(
        "drivers",
        json!({"media": media.as_ref().map(|m| m.describe()), "windows": rows}),
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

/// A Windows the entry is about.
fn target(windows: &Windows, arch: Arch) -> WindowsTarget {
    WindowsTarget {
        major: windows.nt.major,
        minor: windows.nt.minor,
        build: windows.builds.from.or(windows.builds.to).unwrap_or(0),
        arch,
        server: windows.product == Some(Product::Server),
    }
}

fn row(
    windows: &Windows,
    target: &WindowsTarget,
    catalogue: &Catalogue,
    media: Option<&dyn Media>,
    ui: &Ui,
) -> serde_json::Value {
    let name = format!("{} {}", windows.name, target.arch.name());
    let folders = windows.folders.join(", ");
    let Some(media) = media else {
        ui.line(&format!("{name:<32} folders {folders}"));
        return json!({"windows": windows.name, "arch": target.arch, "folders": windows.folders});
    };
    match select::select(media, catalogue, target) {
        Ok(set) => {
            let drivers: Vec<String> = set
                .packages
                .iter()
                .map(|p| format!("{} {}", p.driver, p.inf.driver_ver.version_text()))
                .collect();
            ui.line(&format!(
                "{name:<32} {:<8} {}",
                set.os_folder,
                drivers.join(", ")
            ));
            json!({"windows": windows.name, "arch": target.arch, "folders": windows.folders,
                "usable": true, "folder": set.os_folder, "drivers": drivers, "notes": set.notes})
        }
        Err(error) => {
            ui.line(&format!("{name:<32} none     {}", error.remedy()));
            json!({"windows": windows.name, "arch": target.arch, "folders": windows.folders,
                "usable": false, "reason": error.to_string(), "remedy": error.remedy()})
        }
    }
}
