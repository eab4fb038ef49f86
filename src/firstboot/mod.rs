//! The script that runs inside Windows at the first boot, as pure text made from typed steps.
//!
//! One `.cmd`, no PowerShell. A service starts it as SYSTEM (the reasons for a service:
//! `docs/first-boot.md`). It logs every command with its exit code and gives up after [`MAX_TRIES`]
//! boots. It reports its progress on COM1, or on COM2 if EMS owns COM1. It restores the settings
//! that were changed for the commissioning before it removes itself. No step is fatal.
//!
//! Text that is not a constant of the program gets into the script only through types whose
//! characters cmd does not interpret. These are addresses, numbers, MAC addresses and [`FileName`].
//! The running script finds names of connections; hyper2kvm never writes them.

pub mod disks;
pub mod network;
mod text;

use std::fmt::Write as _;

use crate::drivers::Catalogue;
use crate::drivers::catalogue::VirtioDevice;
use crate::inspect::model::{Cidr, Route};
use crate::types::MacAddr;
use disks::Disks;
use network::{Binding, Ghost, Settings};
use text::{
    AGENT_STEP, DISK_ROUTINES, GHOST_ROUTINES, HEAD, ONE_BOOT, PNP, ROUTINES, TAIL, TWO_BOOTS,
};

/// The name of the service that starts the script, and the prefix of all its traces on disk.
pub const SERVICE: &str = "hyper2kvm-firstboot";
/// The directory below Windows, next to the staged drivers.
pub const FOLDER: &str = crate::guest::security::OWN_FOLDER;
pub const SCRIPT: &str = "firstboot.cmd";
pub const AGENT: &str = "qemu-ga.msi";
/// The number of boots after which the script gives up and removes itself.
pub const MAX_TRIES: u32 = 5;
/// The saved value for "there was no such value".
pub const ABSENT: u32 = u32::MAX;

/// A file name without special meaning for cmd: letters, digits, `.`, `_`, `-`, and `\` between
/// directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileName(String);

impl FileName {
    pub fn new(name: &str) -> Option<Self> {
        let fits = name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-\\".contains(&b));
        let inside = !name.split('\\').any(|part| part.is_empty() || part == "..");
        (fits && inside && !name.starts_with('-') && name.len() < 200).then(|| Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A value that was changed for the commissioning boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restore {
    AutoReboot,
}

impl Restore {
    /// The name under which the old value is saved, which is that of the value.
    pub fn name(self) -> &'static str {
        match self {
            Self::AutoReboot => "AutoReboot",
        }
    }

    /// The path below the control set.
    pub fn key(self) -> &'static str {
        match self {
            Self::AutoReboot => r"Control\CrashControl",
        }
    }
}

/// A driver in the staging directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inf {
    /// Relative to [`FOLDER`].
    pub path: FileName,
    /// The service of its device and its version: a device with exactly this version needs no
    /// update.
    pub service: Option<(FileName, FileName)>,
}

/// The contents of the script.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Script {
    /// Windows 10 and later: `pnputil /add-driver`; before, `pnputil -i -a`.
    pub modern_pnputil: bool,
    /// Windows 10 2004 and later: `pnputil /remove-device`.
    pub removes_devices: bool,
    pub infs: Vec<Inf>,
    pub network: Vec<Settings>,
    pub ghosts: Vec<Ghost>,
    pub disks: Disks,
    /// Whether [`AGENT`] is beside the script.
    pub agent: bool,
    /// Product codes of the old hypervisor's tools, to be uninstalled.
    pub uninstall: Vec<uuid::fmt::Braced>,
    /// The number of user scripts (`user-1.cmd`, ...) beside the script.
    pub user_scripts: usize,
    pub restore: Vec<Restore>,
    /// Whether there are two boots: the script then works only when no disk is on an emulated
    /// controller any more.
    pub two_boots: bool,
    /// Whether Windows keeps COM1 for itself (EMS), so the lines go to COM2.
    pub com2: bool,
}

/// The service of the NIC's driver.
fn nic_service() -> String {
    let catalogue = Catalogue::builtin();
    catalogue
        .service_of(VirtioDevice::Net)
        .unwrap_or_default()
        .into()
}

pub fn user_script(number: usize) -> String {
    format!("user-{number}.cmd")
}

impl Script {
    /// The text with the line ends that cmd requires: without them, labels are not found reliably.
    pub fn to_cmd(&self) -> String {
        let mut text = HEAD
            .replace("@MAX@", &MAX_TRIES.to_string())
            .replace("@PORT@", if self.com2 { "COM2" } else { "COM1" });
        let mut routines = String::new();
        let mut step = |name: &str, body: &str| {
            let _ = writeln!(text, "call :step {name}");
            let _ = write!(routines, "\n:s_{name}\n{body}exit /b %BAD%\n");
        };
        step("pnp", PNP);
        if !self.infs.is_empty() {
            step("drivers", &self.drivers());
        }
        for (i, settings) in self.network.iter().enumerate() {
            step(&format!("network-{}", i + 1), &network(settings));
        }
        if !self.disks.is_empty() {
            step("disks", &self.disks.to_cmd());
        }
        if self.agent {
            step("agent", AGENT_STEP);
        }
        for n in 1..=self.user_scripts {
            let body = format!(
                ">\"%DIR%done.user-{n}\" echo started\n%SYS%\\cmd.exe /d /q /c \"\"%DIR%{}\"\" >nul 2>&1\ncall :ran user script {n}\n",
                user_script(n)
            );
            step(&format!("user-{n}"), &body);
        }
        let mut last = String::new();
        for (i, ghost) in self.ghosts.iter().enumerate() {
            let name = format!("ghost-{}", i + 1);
            let _ = writeln!(last, "call :step {name}");
            let body = self.ghost(ghost);
            let _ = write!(routines, "\n:s_{name}\n{body}exit /b %BAD%\n");
        }
        for (i, product) in self.uninstall.iter().enumerate() {
            let name = format!("uninstall-{}", i + 1);
            let _ = writeln!(last, "call :step {name}");
            let _ = write!(
                routines,
                "\n:s_{name}\ncall :watched uninstall {product}\nexit /b %BAD%\n"
            );
        }
        if !self.uninstall.is_empty() {
            routines.push_str(UNINSTALL);
        }
        text.push_str(if self.two_boots { TWO_BOOTS } else { ONE_BOOT });
        text.push_str("\nrem Only on the disks and NICs that stay.\n:last\n");
        text.push_str(&last);
        text.push_str("goto finish\n\n:finish\n");
        for value in &self.restore {
            let (name, key) = (value.name(), value.key());
            let _ = writeln!(
                text,
                "set \"NAME={name}\"\nset \"KEY={key}\"\ncall :restore"
            );
        }
        text.push_str(TAIL);
        text.push_str(&routines);
        text.push_str(&ROUTINES.replace("@NIC@", &nic_service()));
        if !self.disks.is_empty() {
            text.push_str(DISK_ROUTINES);
        }
        if !self.ghosts.is_empty() {
            text.push_str(GHOST_ROUTINES);
        }
        text.replace('\n', "\r\n")
    }

    /// The commands that remove the old adapter, unless it exists after all, and give its name to
    /// the new one.
    fn ghost(&self, ghost: &Ghost) -> String {
        let mut body = String::new();
        if let Some(i) = ghost.after {
            let _ = write!(
                body,
                "if not exist \"%DIR%done.network-{0}\" call :log step network-{0} has not succeeded, the old adapter stays\nif not exist \"%DIR%done.network-{0}\" exit /b 21\n",
                i + 1
            );
        }
        let want = ghost.successor.map_or_else(String::new, Binding::want);
        let how = if self.removes_devices {
            "pnputil"
        } else {
            "registry"
        };
        let _ = write!(
            body,
            "set \"OLD_DEV={}\"\nset \"OLD_GUID={}\"\nset \"WANT={want}\"\ncall :ghost {how}\n",
            ghost.device.as_str(),
            ghost.guid
        );
        body
    }

    fn drivers(&self) -> String {
        let mut body = String::from("set \"STUCK=\"\n");
        for inf in &self.infs {
            let _ = write!(body, "call :driver {}", inf.path.as_str());
            if let Some((service, version)) = &inf.service {
                let _ = write!(body, " {} {}", service.as_str(), version.as_str());
            }
            body.push('\n');
        }
        let add = if self.modern_pnputil {
            "%SYS%\\pnputil.exe /add-driver \"%DIR%%~2\" /install"
        } else {
            "%SYS%\\pnputil.exe -i -a \"%DIR%%~2\""
        };
        let _ = write!(
            body,
            "exit /b %BAD%\n\n:add_driver\n{add} >\"%DIR%install.log\" 2>&1\ngoto installed\n"
        );
        body
    }
}

/// The commands that apply settings to the adapter with netkvm. The old adapter keeps its values
/// but no longer claims the addresses.
fn network(settings: &Settings) -> String {
    let want = settings.binding.want();
    let mut body = format!(
        "set \"WANT={want}\"\ncall :find_nic\nset \"E=%ERRORLEVEL%\"\nif not \"%E%\"==\"0\" call :log no VirtIO adapter for {want}, it stays on DHCP: %E%\nif not \"%E%\"==\"0\" exit /b %E%\n"
    );
    let mut step = Commands(&mut body);
    release_old_adapter(&mut step, settings);
    ipv4(&mut step, settings);
    ipv6(&mut step, settings);
    routes(&mut step, settings);
    servers(&mut step, "ipv4", "dns", "DNS", &settings.dns4);
    servers(&mut step, "ipv6", "dns", "DNS", &settings.dns6);
    servers(&mut step, "ipv4", "wins", "WINS", &settings.wins);
    rest(&mut step, settings);
    body
}

fn release_old_adapter(step: &mut Commands<'_>, settings: &Settings) {
    step.run(
        format!(
            "%SYS%\\reg.exe add \"%CCS%\\Services\\Tcpip\\Parameters\\Interfaces\\{}\" /v EnableDHCP /t REG_DWORD /d 1 /f",
            settings.old_guid
        ),
        &format!("old adapter {} to DHCP", settings.old_guid),
    );
}

fn ipv4(step: &mut Commands<'_>, settings: &Settings) {
    // Settings of an earlier attempt would conflict.
    if !settings.ipv4.is_empty() {
        step.quiet("%SYS%\\netsh.exe interface ipv4 set address name=\"%NIC%\" source=dhcp");
    }
    for (i, (ip, mask)) in settings.ipv4.iter().enumerate() {
        let (verb, source) = if i == 0 {
            ("set", " source=static")
        } else {
            ("add", "")
        };
        step.run(
            format!(
                "%SYS%\\netsh.exe interface ipv4 {verb} address name=\"%NIC%\"{source} address={ip} mask={mask}"
            ),
            &format!("address {ip} {mask}"),
        );
    }
    for (gateway, metric) in &settings.gateways4 {
        // A gateway outside every subnet is refused as a gateway, but not as a route.
        step.run(
            format!(
                "%SYS%\\netsh.exe interface ipv4 add address name=\"%NIC%\" gateway={gateway}{} >>\"%LOG%\" 2>&1 || %SYS%\\netsh.exe interface ipv4 add route prefix=0.0.0.0/0 interface=\"%NIC%\" nexthop={gateway}{}",
                option("gwmetric", *metric),
                option("metric", *metric)
            ),
            &format!("gateway {gateway}"),
        );
    }
}

fn ipv6(step: &mut Commands<'_>, settings: &Settings) {
    for address in &settings.ipv6 {
        step.quiet(&format!(
            "%SYS%\\netsh.exe interface ipv6 delete address interface=\"%NIC%\" address={}",
            address.ip
        ));
        step.run(
            format!(
                "%SYS%\\netsh.exe interface ipv6 add address interface=\"%NIC%\" address={address}"
            ),
            &format!("address {address}"),
        );
    }
}

/// Appends the routes. The gateways of IPv6 are routes too.
fn routes(step: &mut Commands<'_>, settings: &Settings) {
    let gateways6 = settings.gateways6.iter().map(|(gateway, metric)| Route {
        to: Cidr {
            ip: std::net::Ipv6Addr::UNSPECIFIED.into(),
            prefix: 0,
        },
        gateway: (*gateway).into(),
        metric: *metric,
    });
    for route in gateways6.chain(settings.routes.iter().copied()) {
        let family = if route.to.ip.is_ipv6() {
            "ipv6"
        } else {
            "ipv4"
        };
        let what = format!(
            "prefix={} interface=\"%NIC%\" nexthop={}",
            route.to, route.gateway
        );
        if let (std::net::IpAddr::V4(to), gateway) = (route.to.ip, route.gateway) {
            // The one that Windows keeps for no particular adapter.
            let mask = network::mask(route.to.prefix);
            step.quiet(&format!("route delete {to} mask {mask} {gateway}"));
        }
        step.quiet(&format!(
            "%SYS%\\netsh.exe interface {family} delete route {what}"
        ));
        step.run(
            format!(
                "%SYS%\\netsh.exe interface {family} add route {what}{}",
                option("metric", route.metric)
            ),
            &format!("route {} by {}", route.to, route.gateway),
        );
    }
}

/// Appends DNS suffix, NetBIOS, metric and MTU.
fn rest(step: &mut Commands<'_>, settings: &Settings) {
    if let Some(suffix) = &settings.suffix {
        let suffix = suffix.as_str();
        step.run(
            format!(
                "%SYS%\\reg.exe add \"%CCS%\\Services\\Tcpip\\Parameters\\Interfaces\\%GUID%\" /v Domain /t REG_SZ /d {suffix} /f"
            ),
            &format!("DNS suffix {suffix}"),
        );
    }
    if let Some(option) = settings.netbios {
        step.run(
            format!(
                "%SYS%\\reg.exe add \"%CCS%\\Services\\NetBT\\Parameters\\Interfaces\\Tcpip_%GUID%\" /v NetbiosOptions /t REG_DWORD /d {option} /f"
            ),
            &format!("NetBIOS {option}"),
        );
    }
    if let Some(metric) = settings.metric {
        step.run(
            format!(
                "%SYS%\\netsh.exe interface ipv4 set interface interface=\"%NIC%\" metric={metric}"
            ),
            &format!("interface metric {metric}"),
        );
    }
    if let Some(mtu) = settings.mtu {
        step.run(
            format!(
                "%SYS%\\netsh.exe interface ipv4 set subinterface interface=\"%NIC%\" mtu={mtu} store=persistent"
            ),
            &format!("MTU {mtu}"),
        );
    }
}

fn option(name: &str, metric: Option<u32>) -> String {
    metric.map_or_else(String::new, |m| format!(" {name}={m}"))
}

fn servers(
    step: &mut Commands<'_>,
    family: &str,
    kind: &str,
    shown: &str,
    servers: &[impl std::fmt::Display],
) {
    // WINS servers are not checked.
    let check = if kind == "dns" { " validate=no" } else { "" };
    let register = if kind == "dns" {
        " register=primary"
    } else {
        ""
    };
    for (i, server) in servers.iter().enumerate() {
        let command = if i == 0 {
            format!(
                "set {kind}servers name=\"%NIC%\" source=static address={server}{register}{check}"
            )
        } else {
            format!(
                "add {kind}servers name=\"%NIC%\" address={server} index={}{check}",
                i + 1
            )
        };
        step.run(
            format!("%SYS%\\netsh.exe interface {family} {command}"),
            &format!("{shown} server {server}"),
        );
    }
}

/// Commands of a step, each with its line in the log.
struct Commands<'b>(&'b mut String);

impl Commands<'_> {
    fn run(&mut self, command: impl std::fmt::Display, shown: &str) {
        let _ = write!(self.0, "{command} >>\"%LOG%\" 2>&1\ncall :ran {shown}\n");
    }

    /// Appends a command that may fail: there may be nothing to remove.
    fn quiet(&mut self, command: &str) {
        let _ = writeln!(self.0, "{command} >nul 2>&1");
    }
}

const UNINSTALL: &str = r#"
:uninstall
%SYS%\msiexec.exe /x %~2 /qn /norestart REBOOT=ReallySuppress >"%DIR%install.log" 2>&1
goto installed
"#;

impl Binding {
    /// The criterion by which the running script finds the NIC.
    fn want(self) -> String {
        match self {
            Self::Mac(mac) => hex(mac),
            Self::Only => "ONLY".to_string(),
        }
    }
}

fn hex(mac: MacAddr) -> String {
    mac.to_string().replace(':', "").to_uppercase()
}

#[cfg(test)]
mod tests;
