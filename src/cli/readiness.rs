//! Checks a host for everything besides programs: the libvirt daemon, KVM, firmware, a TPM, groups,
//! space. Derives the verdict: ready to convert, to boot, to rehearse.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde_json::{Value, json};

use crate::domain::{Chipset, Descriptors, Firmware};
use crate::tool::host;
use crate::tool::probe::Found;
use crate::tool::virsh::Virsh;
use crate::tool::{self};
use crate::ui::{Styled, Tone, bytes};

/// Programs required for booting a converted VM.
const TO_BOOT: [&str; 2] = ["virsh", "qemu-system-x86_64"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ok,
    /// Only some guests or some uses need it.
    Limits(&'static str),
    /// Nothing can be booted without it.
    Missing,
}

/// One checked item.
#[derive(Debug)]
pub struct Check {
    name: &'static str,
    state: State,
    detail: String,
    remedy: String,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            detail: detail.into(),
            remedy: String::new(),
        }
    }

    fn not(name: &'static str, state: State, detail: String, remedy: impl Into<String>) -> Self {
        Self {
            name,
            state,
            detail,
            remedy: remedy.into(),
        }
    }

    pub fn json(&self) -> Value {
        let state = match self.state {
            State::Ok => "ok",
            State::Limits(_) => "limited",
            State::Missing => "missing",
        };
        json!({"name": self.name, "state": state, "detail": self.detail, "remedy": self.remedy})
    }

    pub fn append_to(&self, text: &mut Styled) {
        let (tone, word) = match self.state {
            State::Ok => (Tone::Good, "ok"),
            State::Limits(_) => (Tone::Warn, "limited"),
            State::Missing => (Tone::Bad, "MISSING"),
        };
        text.push(tone, format!("{word:>8}"));
        text.push(Tone::Plain, format!("  {:<20} ", self.name));
        text.hang();
        text.push(Tone::Plain, self.detail.as_str());
        if !self.remedy.is_empty() {
            text.push(Tone::Plain, format!(": {}", self.remedy));
        }
        text.push(Tone::Plain, "\n");
    }
}

/// Runs every check.
pub fn checks() -> Vec<Check> {
    vec![
        daemon(),
        kvm(),
        firmware(),
        program(
            "swtpm",
            "guests with a TPM (Windows 11)",
            "apt-get install swtpm swtpm-tools, or dnf install swtpm",
        ),
        program(
            "nbdkit",
            "--source-command with nbdkit",
            "apt-get install nbdkit, or dnf install nbdkit",
        ),
        groups(),
        space(Path::new(".")),
    ]
}

fn daemon() -> Check {
    const NAME: &str = "libvirt daemon";
    if tool::find("virsh").is_none() {
        let remedy = host::hint("virsh");
        return Check::not(NAME, State::Missing, "no virsh to query it".into(), remedy);
    }
    let uri = std::env::var("LIBVIRT_DEFAULT_URI").unwrap_or("qemu:///system".to_string());
    match Virsh::new(&uri).names() {
        Ok(_) => Check::ok(NAME, format!("answers at {uri}")),
        Err(error) => {
            let said = error.to_string();
            let said = said.lines().next().unwrap_or_default().to_string();
            let remedy = match said.to_lowercase().contains("denied") {
                true => "join the group libvirt: sudo usermod -aG libvirt $USER, then log in again",
                false => {
                    "start it: sudo systemctl start libvirtd (or virtqemud); package libvirt-daemon-system on Debian, libvirt-daemon-kvm on Fedora"
                }
            };
            Check::not(
                NAME,
                State::Missing,
                format!("{uri} does not answer"),
                remedy,
            )
        }
    }
}

fn kvm() -> Check {
    const NAME: &str = "/dev/kvm";
    kvm_from(
        NAME,
        File::options().read(true).write(true).open(NAME).map(drop),
    )
}

fn kvm_from(name: &'static str, opened: io::Result<()>) -> Check {
    match opened {
        Ok(()) => Check::ok(name, "can be used"),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Check::not(
            name,
            State::Limits("VMs of qemu:///session run without KVM"),
            "this user may not open it".into(),
            "sudo usermod -aG kvm $USER, then log in again",
        ),
        Err(_) => Check::not(
            name,
            State::Missing,
            "is not there".into(),
            "turn virtualisation on in the firmware of this host (or nesting in its hypervisor); convert --domain-type qemu does without, slowly",
        ),
    }
}

fn firmware() -> Check {
    const NAME: &str = "OVMF (UEFI)";
    let wanted = Firmware::Uefi { secure_boot: false };
    let found = Descriptors::of_host().and_then(|d| d.pick(wanted, Chipset::Q35));
    match found {
        Ok(_) => Check::ok(NAME, "there"),
        Err(_) => Check::not(
            NAME,
            State::Limits("no guests with UEFI"),
            "no UEFI firmware for QEMU".into(),
            "apt-get install ovmf, or dnf install edk2-ovmf",
        ),
    }
}

fn program(name: &'static str, lacking: &'static str, remedy: &str) -> Check {
    match tool::find(name) {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => Check::not(
            name,
            State::Limits(lacking),
            "not installed".into(),
            format!("needed for {lacking}: {remedy}"),
        ),
    }
}

/// The groups through which an ordinary user reaches libvirt and KVM.
fn groups() -> Check {
    const NAME: &str = "groups";
    if rustix::process::geteuid().is_root() {
        return Check::ok(NAME, "root needs none");
    }
    let mut mine = vec![rustix::process::getegid().as_raw()];
    let more = rustix::process::getgroups().unwrap_or_default();
    mine.extend(more.iter().map(|gid| gid.as_raw()));
    let file = fs::read_to_string("/etc/group").unwrap_or_default();
    groups_from(NAME, &file, &mine)
}

fn groups_from(name: &'static str, file: &str, mine: &[u32]) -> Check {
    let gid = |group: &str| {
        file.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(group)).then(|| fields.nth(1)?.parse::<u32>().ok())?
        })
    };
    let lacking: Vec<&str> = ["libvirt", "kvm"]
        .into_iter()
        .filter(|group| gid(group).is_some_and(|gid| !mine.contains(&gid)))
        .collect();
    if lacking.is_empty() {
        return Check::ok(
            name,
            "this user is in libvirt and kvm, where there are such",
        );
    }
    let names = lacking.join(",");
    Check::not(
        name,
        State::Limits("libvirt may ask for a password"),
        format!("this user is not in {}", lacking.join(" and ")),
        format!("sudo usermod -aG {names} $USER, then log in again"),
    )
}

/// The space in the default directory of a conversion.
fn space(folder: &Path) -> Check {
    const NAME: &str = "space";
    let shown = std::path::absolute(folder).unwrap_or(folder.to_path_buf());
    match rustix::fs::statvfs(folder) {
        Ok(stat) => {
            let free = bytes(stat.f_bavail.saturating_mul(stat.f_frsize));
            Check::ok(NAME, format!("{free} free in {}", shown.display()))
        }
        Err(e) => Check::not(
            NAME,
            State::Limits("name another directory with --output-dir"),
            format!("{}: {e}", shown.display()),
            "",
        ),
    }
}

/// Whether a host is ready for a task, with the obstacles.
#[derive(Debug)]
pub struct Verdict {
    purpose: &'static str,
    missing: Vec<String>,
    limits: Vec<&'static str>,
}

/// Ready to convert, to boot, to rehearse: in this order.
pub fn verdicts(found: &[Found], checks: &[Check]) -> [Verdict; 3] {
    let missing = |wanted: &dyn Fn(&Found) -> bool| -> Vec<String> {
        let absent = found.iter().filter(|f| wanted(f) && f.path.is_none());
        let old = found
            .iter()
            .filter(|f| wanted(f))
            .filter_map(Found::too_old);
        absent
            .map(|f| format!("no {}", f.tool.name))
            .chain(old)
            .collect()
    };
    let convert = missing(&|f| f.tool.required);
    let mut boot = missing(&|f| TO_BOOT.contains(&f.tool.name));
    let lacking = checks.iter().filter(|c| c.state == State::Missing);
    boot.extend(lacking.map(|c| format!("{} {}", c.name, c.detail)));
    let limits: Vec<&str> = checks
        .iter()
        .filter_map(|c| match c.state {
            State::Limits(what) if ["OVMF (UEFI)", "swtpm"].contains(&c.name) => Some(what),
            _ => None,
        })
        .collect();
    let both = convert.iter().chain(&boot).cloned().collect();
    [
        Verdict {
            purpose: "convert",
            missing: convert,
            limits: Vec::new(),
        },
        Verdict {
            purpose: "boot",
            missing: boot,
            limits: limits.clone(),
        },
        Verdict {
            purpose: "rehearse",
            missing: both,
            limits,
        },
    ]
}

impl Verdict {
    pub fn purpose(&self) -> &'static str {
        self.purpose
    }

    pub fn json(&self) -> Value {
        json!({"ready": self.missing.is_empty(), "missing": self.missing, "not_for": self.limits})
    }

    pub fn append_to(&self, text: &mut Styled) {
        text.push(
            Tone::Strong,
            format!("ready to {:<9}", format!("{}:", self.purpose)),
        );
        text.push(Tone::Plain, " ");
        text.hang();
        match (self.missing.is_empty(), self.limits.is_empty()) {
            (true, true) => text.push(Tone::Good, "yes"),
            (true, false) => {
                text.push(Tone::Good, "yes");
                let limits = self.limits.join("; ");
                text.push(Tone::Plain, format!(", with limits: {limits}"));
            }
            (false, _) => {
                text.push(Tone::Bad, "no");
                text.push(Tone::Plain, format!(": {}", self.missing.join("; ")));
            }
        }
        text.push(Tone::Plain, "\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tool::host::TOOLS;

    fn found(absent: &[&str]) -> Vec<Found> {
        let probe = |tool: &'static host::Tool| Found {
            tool,
            path: (!absent.contains(&tool.name)).then(|| "/bin/x".into()),
            version: None,
        };
        TOOLS.iter().map(probe).collect()
    }

    fn lines(absent: &[&str], checks: &[Check]) -> Vec<String> {
        let verdicts = verdicts(&found(absent), checks);
        verdicts
            .iter()
            .map(|v| {
                let mut text = Styled::default();
                v.append_to(&mut text);
                text.plain().trim_end().to_string()
            })
            .collect()
    }

    #[test]
    fn one_line_each() {
        let kvm = |kind: io::ErrorKind| kvm_from("/dev/kvm", Err(kind.into()));
        let fine = [Check::ok("/dev/kvm", "")];
        let yes = [
            "ready to convert:  yes",
            "ready to boot:     yes",
            "ready to rehearse: yes",
        ];
        assert_eq!(lines(&[], &fine), yes);
        assert_eq!(lines(&[], &[kvm(io::ErrorKind::PermissionDenied)]), yes);
        let no_kvm = lines(&[], &[kvm(io::ErrorKind::NotFound)]);
        assert_eq!(no_kvm[0], yes[0]);
        assert_eq!(no_kvm[1], "ready to boot:     no: /dev/kvm is not there");
        assert_eq!(no_kvm[2], "ready to rehearse: no: /dev/kvm is not there");
        let no_virsh = lines(&["virsh"], &fine);
        assert_eq!(no_virsh[0], yes[0]);
        assert_eq!(no_virsh[1], "ready to boot:     no: no virsh");
        let no_ntfs = lines(&[host::LIBNTFS], &fine);
        assert_eq!(no_ntfs[0], "ready to convert:  no: no libntfs-3g.so");
        assert_eq!(no_ntfs[1], yes[1]);
        assert_eq!(no_ntfs[2], "ready to rehearse: no: no libntfs-3g.so");
        let tpm = Check::not("swtpm", State::Limits("no TPM"), String::new(), "");
        assert_eq!(
            lines(&[], &[tpm])[1],
            "ready to boot:     yes, with limits: no TPM"
        );
    }

    #[test]
    fn groups_of_a_user() {
        let file = "root:x:0:\nlibvirt:x:110:\nkvm:x:111:a,b\n";
        let state = |mine: &[u32]| groups_from("groups", file, mine);
        assert_eq!(state(&[1000, 110, 111]).state, State::Ok);
        let one = state(&[1000, 110]);
        assert_eq!(one.detail, "this user is not in kvm");
        assert!(one.remedy.contains("-aG kvm "), "{}", one.remedy);
        let both = state(&[1000]);
        assert!(both.remedy.contains("-aG libvirt,kvm "), "{}", both.remedy);
        assert_eq!(groups_from("groups", "", &[1000]).state, State::Ok);
    }
}
