//! The outlook that `plan` adds to the actions. It has the files of a conversion, the amount of
//! data to copy, and an estimate of the time.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::domain::DiskFormat;
use crate::source::vm::VmFacts;
use crate::text::lower;
use crate::ui::{Styled, Tone, bytes};

/// Speed of plain storage that is read and written at once. Local SSDs do several times as much.
const BYTES_PER_SECOND: u64 = 200_000_000;
/// Seconds for inspecting, fixing and verifying.
const BESIDES_COPYING_S: u64 = 2;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Outputs {
    #[serde(serialize_with = "crate::text::json_path::list")]
    pub disks: Vec<PathBuf>,
    pub bootstrap_xml: Option<PathBuf>,
    pub final_xml: Option<PathBuf>,
    /// The VM in other formats than libvirt's (`--emit`).
    pub emitted: Vec<PathBuf>,
    pub report: Option<PathBuf>,
    /// Whether the disks stand alone; `false` after `--copy later`, until `pull` is done.
    pub complete: bool,
}

impl Outputs {
    /// The output directory.
    pub fn folder(&self) -> Option<&Path> {
        self.report.as_deref()?.parent()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outlook {
    /// Absent for a disk image, which describes no VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<VmFacts>,
    pub outputs: Outputs,
    pub disks: Vec<DiskOutlook>,
    pub estimate: Estimate,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskOutlook {
    pub path: PathBuf,
    pub format: DiskFormat,
    #[serde(rename = "virtual")]
    pub virtual_size: u64,
    /// What is copied at most: what the source takes on this host. Free space of the guest is left out.
    pub copied_at_most: u64,
    /// Whether it will be an overlay on the source, until `pull` has copied it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub later: bool,
}

/// An estimate from an assumed, not a measured speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Estimate {
    pub seconds_at_most: u64,
    pub bytes_per_second: u64,
}

impl Outlook {
    /// Creates an outlook. `disks` are in the order of the outputs; in place nothing is copied.
    pub fn new(machine: Option<VmFacts>, outputs: Outputs, disks: Vec<DiskOutlook>) -> Self {
        let copied = (disks.iter()).fold(0u64, |sum, d| sum.saturating_add(d.copied_at_most));
        Self {
            machine,
            outputs,
            disks,
            estimate: Estimate {
                seconds_at_most: BESIDES_COPYING_S + copied.div_ceil(BYTES_PER_SECOND),
                bytes_per_second: BYTES_PER_SECOND,
            },
        }
    }

    /// Adds the outlook to the keys of the plan's document.
    pub fn add_to(&self, body: &mut serde_json::Map<String, serde_json::Value>) {
        if let serde_json::Value::Object(keys) = serde_json::json!(self) {
            body.extend(keys);
        }
    }

    /// Appends the outlook to the text for people.
    pub fn append_to(&self, text: &mut Styled) {
        if let Some(machine) = &self.machine {
            text.push(Tone::Strong, "\nMachine\n");
            for (label, value) in machine.rows() {
                text.row(label, value);
            }
        }
        text.push(Tone::Strong, "\nWrites\n");
        let mut file = |path: &Path, more: &str| {
            text.push(Tone::Code, format!("  {}", path.display()));
            text.push(Tone::Plain, format!("{more}\n"));
        };
        for disk in &self.disks {
            let copied = match disk.copied_at_most {
                _ if disk.later => "an overlay on the source; nothing is copied".to_string(),
                0 => "changed where it is".to_string(),
                n => format!("copies at most {}", bytes(n)),
            };
            let (format, size) = (lower(&disk.format), bytes(disk.virtual_size));
            file(&disk.path, &format!(" ({format}, {size}; {copied})"));
        }
        let files = [&self.outputs.bootstrap_xml, &self.outputs.final_xml];
        let files = files.into_iter().flatten();
        for path in files
            .chain(&self.outputs.emitted)
            .chain(&self.outputs.report)
        {
            file(path, "");
        }
        let seconds = self.estimate.seconds_at_most;
        let time = match seconds {
            0..120 => format!("{seconds} s"),
            120..7200 => format!("{} min", seconds.div_ceil(60)),
            _ => format!("{:.1} h", seconds as f64 / 3600.0),
        };
        let megabytes = self.estimate.bytes_per_second / 1_000_000;
        let time = format!("Time: at most {time} on storage of {megabytes} MB/s\n");
        text.push(Tone::Plain, time);
    }
}

impl DiskOutlook {
    /// A disk that is copied; `data` is the most to copy.
    pub fn copied(path: PathBuf, format: DiskFormat, virtual_size: u64, data: u64) -> Self {
        Self {
            path,
            format,
            virtual_size,
            copied_at_most: data.min(virtual_size),
            later: false,
        }
    }

    /// A disk that is an overlay on its source.
    pub fn later(path: PathBuf, virtual_size: u64) -> Self {
        Self {
            path,
            format: DiskFormat::Qcow2,
            virtual_size,
            copied_at_most: 0,
            later: true,
        }
    }

    /// A disk that is changed in its place.
    pub fn in_place(path: PathBuf, format: DiskFormat, virtual_size: u64) -> Self {
        Self {
            path,
            format,
            virtual_size,
            copied_at_most: 0,
            later: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_and_how_long_it_takes() {
        let outputs = Outputs {
            disks: vec!["/out/vm.qcow2".into(), "/dev/vg/data".into()],
            bootstrap_xml: Some("/out/vm-bootstrap.xml".into()),
            final_xml: Some("/out/vm-final.xml".into()),
            emitted: vec!["/out/vm-proxmox.sh".into()],
            report: Some("/out/report.json".into()),
            complete: true,
        };
        let disk = |path: &str, size, allocated| {
            DiskOutlook::copied(path.into(), DiskFormat::Qcow2, size, allocated)
        };
        let disks = vec![
            disk("/out/vm.qcow2", 100 << 30, 60_000_000_000),
            // A chain may take more space than its contents.
            disk("/dev/vg/data", 1 << 30, 1 << 30),
            disk("/out/vm-2.qcow2", 1 << 30, 5 << 30),
            DiskOutlook::in_place("/in/vm.qcow2".into(), DiskFormat::Qcow2, 1 << 30),
            DiskOutlook::later("/out/vm-3.qcow2".into(), 1 << 30),
        ];
        let outlook = Outlook::new(None, outputs, disks);
        let copied = 60_000_000_000 + 2 * (1u64 << 30);
        assert_eq!(
            outlook.estimate.seconds_at_most,
            2 + copied.div_ceil(200_000_000)
        );
        let mut text = Styled::default();
        outlook.append_to(&mut text);
        let text = text.plain();
        assert!(text.starts_with("\nWrites\n  /out/vm.qcow2"), "{text}");
        for line in [
            "  /out/vm.qcow2 (qcow2, 100.0 GiB; copies at most 55.9 GiB)",
            "  /dev/vg/data (qcow2, 1.0 GiB; copies at most 1.0 GiB)",
            "  /out/vm-2.qcow2 (qcow2, 1.0 GiB; copies at most 1.0 GiB)",
            "  /in/vm.qcow2 (qcow2, 1.0 GiB; changed where it is)",
            "  /out/vm-3.qcow2 (qcow2, 1.0 GiB; an overlay on the source; nothing is copied)",
            "  /out/vm-bootstrap.xml",
            "  /out/vm-final.xml",
            "  /out/vm-proxmox.sh",
            "  /out/report.json",
            "Time: at most 6 min on storage of 200 MB/s",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        assert!(!text.contains("Machine"), "a disk image describes none");
    }

    /// Seconds up to two minutes, minutes up to two hours.
    #[test]
    fn the_time_is_said_in_the_unit_that_suits_it() {
        for (copied, time) in [
            (0, "2 s"),
            (1, "3 s"),
            (117 * BYTES_PER_SECOND, "119 s"),
            (118 * BYTES_PER_SECOND, "2 min"),
            (118 * BYTES_PER_SECOND + 1, "3 min"),
            (7197 * BYTES_PER_SECOND, "120 min"),
            (7198 * BYTES_PER_SECOND, "2.0 h"),
            (u64::MAX, "25620477.9 h"),
        ] {
            let disk = DiskOutlook::copied("/d".into(), DiskFormat::Raw, u64::MAX, copied);
            let outlook = Outlook::new(None, Outputs::default(), vec![disk]);
            let mut text = Styled::default();
            outlook.append_to(&mut text);
            let last = format!("Time: at most {time} on storage of 200 MB/s");
            assert_eq!(text.plain().lines().last(), Some(&*last), "{copied}");
        }
    }

    #[test]
    fn the_outlook_is_part_of_the_document_of_the_plan() {
        let outputs = Outputs {
            disks: vec!["/out/a".into()],
            report: Some("/out/report.json".into()),
            ..Outputs::default()
        };
        assert_eq!(outputs.folder(), Some(Path::new("/out")));
        assert_eq!(Outputs::default().folder(), None);
        let disks = vec![
            DiskOutlook::copied("/out/a".into(), DiskFormat::Raw, 10, 5),
            DiskOutlook::copied("/out/b".into(), DiskFormat::Qcow2, 10, 50),
            DiskOutlook::later("/out/c".into(), 10),
            DiskOutlook::in_place("/in/d".into(), DiskFormat::Raw, 10),
        ];
        let mut body = serde_json::Map::new();
        Outlook::new(None, outputs, disks).add_to(&mut body);
        let disk = |path: &str, format: &str, copied: u64| serde_json::json!({"path": path, "format": format, "virtual": 10, "copied_at_most": copied});
        let mut later = disk("/out/c", "qcow2", 0);
        later["later"] = true.into();
        let expected = serde_json::json!({
            "outputs": {
                "disks": ["/out/a"],
                "bootstrap_xml": null,
                "final_xml": null,
                "emitted": [],
                "report": "/out/report.json",
                "complete": false,
            },
            "disks": [disk("/out/a", "raw", 5), disk("/out/b", "qcow2", 10), later, disk("/in/d", "raw", 0)],
            "estimate": {"seconds_at_most": 3, "bytes_per_second": 200_000_000},
        });
        assert_eq!(serde_json::Value::Object(body), expected);
    }

    #[test]
    fn the_machine_stands_before_what_is_written() {
        let machine = VmFacts {
            name: "vm".into(),
            memory_mib: Some(512),
            vcpus: None,
            firmware: None,
            secure_boot: false,
            tpm: true,
            nics: Vec::new(),
        };
        let outputs = Outputs {
            final_xml: Some("/out/f.xml".into()),
            ..Outputs::default()
        };
        let disk = DiskOutlook::in_place("/d".into(), DiskFormat::Raw, 1 << 20);
        let mut text = Styled::default();
        Outlook::new(Some(machine), outputs, vec![disk]).append_to(&mut text);
        insta::assert_snapshot!("outlook-with-machine", text.plain());
    }
}
