//! The script that runs inside Windows at the first boot, as pure text made from typed steps.
//!
//! One `.cmd`, no PowerShell. A service starts it as SYSTEM (why a service: `docs/first-boot.md`); it
//! logs every command with its exit code, tells COM1 how far it is, gives up after [`MAX_TRIES`] boots,
//! and puts back what was changed for the commissioning before it removes itself. No step is fatal.
//!
//! What is not a constant of ours gets into the text only through types that cannot hold anything cmd
//! would interpret: addresses, numbers, MAC addresses and [`FileName`]. Names of connections are
//! found by the running script and never written by us.

pub mod network;

use std::fmt::Write as _;

use crate::domain::MacAddr;
use network::{Binding, Settings};

/// The service that starts the script, and the prefix of everything it leaves on disk.
pub const SERVICE: &str = "hyper2kvm-firstboot";
/// The folder below Windows, next to the staged drivers.
pub const FOLDER: &str = "hyper2kvm";
pub const SCRIPT: &str = "firstboot.cmd";
pub const AGENT: &str = "qemu-ga.msi";
/// Boots in which the script works before it gives up and removes itself.
pub const MAX_TRIES: u32 = 5;
/// Stands for "there was no such value" among the saved ones.
pub const ABSENT: u32 = u32::MAX;

/// A file name that cmd takes as it is: letters, digits, `.`, `_`, `-`, and `\` between folders.
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
    SanPolicy,
}

impl Restore {
    /// The name under which the old value is kept, which is its own.
    pub fn name(self) -> &'static str {
        match self {
            Self::AutoReboot => "AutoReboot",
            Self::SanPolicy => "SanPolicy",
        }
    }

    /// Below the control set.
    pub fn key(self) -> &'static str {
        match self {
            Self::AutoReboot => r"Control\CrashControl",
            Self::SanPolicy => r"Services\partmgr\Parameters",
        }
    }
}

/// What the script is to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Script {
    /// Windows 10 and later: `pnputil /add-driver`; before, `pnputil -i -a`.
    pub modern_pnputil: bool,
    /// INFs in the staging folder, relative to [`FOLDER`].
    pub infs: Vec<FileName>,
    pub network: Vec<Settings>,
    /// [`AGENT`] lies beside the script.
    pub agent: bool,
    /// How many user scripts (`user-1.cmd`, ...) lie beside the script.
    pub user_scripts: usize,
    pub restore: Vec<Restore>,
    /// There are two boots: work is done only when no disk is on an emulated controller any more.
    pub two_boots: bool,
}

pub fn user_script(number: usize) -> String {
    format!("user-{number}.cmd")
}

impl Script {
    /// The text, with the line ends that cmd wants: labels are not found reliably without them.
    pub fn to_cmd(&self) -> String {
        let mut text = HEAD.replace("@MAX@", &MAX_TRIES.to_string());
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
        if self.agent {
            step("agent", AGENT_STEP);
        }
        for n in 1..=self.user_scripts {
            let body = format!(
                ">\"%DIR%done.user-{n}\" echo started\ncmd /d /c \"\"%DIR%{}\"\" >>\"%LOG%\" 2>&1\ncall :ran user script {n}\n",
                user_script(n)
            );
            step(&format!("user-{n}"), &body);
        }
        text.push_str(if self.two_boots { TWO_BOOTS } else { ONE_BOOT });
        text.push_str("\n:finish\n");
        for value in &self.restore {
            let (name, key) = (value.name(), value.key());
            let _ = writeln!(
                text,
                "set \"NAME={name}\"\nset \"KEY={key}\"\ncall :restore"
            );
        }
        text.push_str(TAIL);
        text.push_str(&routines);
        text.push_str(ROUTINES);
        text.replace('\n', "\r\n")
    }

    fn drivers(&self) -> String {
        let mut body = String::from("set \"STUCK=\"\n");
        for inf in &self.infs {
            let _ = writeln!(body, "call :driver {}", inf.as_str());
        }
        let add = if self.modern_pnputil {
            "pnputil /add-driver \"%DIR%%~2\" /install"
        } else {
            "pnputil -i -a \"%DIR%%~2\""
        };
        let _ = write!(
            body,
            "exit /b %BAD%\n\n:add_driver\n{add} >\"%DIR%install.log\" 2>&1\ngoto installed\n"
        );
        body
    }
}

/// Settings go to the adapter that netkvm drives; the old adapter keeps its values but no longer
/// claims the addresses.
fn network(settings: &Settings) -> String {
    let want = match settings.binding {
        Binding::Mac(mac) => hex(mac),
        Binding::Only => "ONLY".to_string(),
    };
    let mut body = format!(
        "set \"WANT={want}\"\ncall :find_nic\nset \"E=%ERRORLEVEL%\"\nif not \"%E%\"==\"0\" call :log no VirtIO adapter for {want}, it stays on DHCP: %E%\nif not \"%E%\"==\"0\" exit /b %E%\n"
    );
    let mut run = |command: String, shown: &str| {
        let _ = write!(body, "{command} >>\"%LOG%\" 2>&1\ncall :ran {shown}\n");
    };
    for guid in &settings.old_guids {
        run(
            format!(
                "reg add \"%CCS%\\Services\\Tcpip\\Parameters\\Interfaces\\{guid}\" /v EnableDHCP /t REG_DWORD /d 1 /f"
            ),
            &format!("old adapter {guid} to DHCP"),
        );
    }
    let netsh = |rest: String| format!("netsh interface {rest}");
    for (i, (ip, mask)) in settings.ipv4.iter().enumerate() {
        let (verb, source) = if i == 0 {
            ("set", " source=static")
        } else {
            ("add", "")
        };
        run(
            netsh(format!(
                "ipv4 {verb} address name=\"%NIC%\"{source} address={ip} mask={mask}"
            )),
            &format!("address {ip} {mask}"),
        );
    }
    for (i, gateway) in settings.gateways4.iter().enumerate() {
        // A gateway outside every subnet is refused as a gateway, but not as a route.
        run(
            format!(
                "netsh interface ipv4 add address name=\"%NIC%\" gateway={gateway} gwmetric={metric} >>\"%LOG%\" 2>&1 || netsh interface ipv4 add route prefix=0.0.0.0/0 interface=\"%NIC%\" nexthop={gateway} metric={metric}",
                metric = i + 1
            ),
            &format!("gateway {gateway}"),
        );
    }
    for address in &settings.ipv6 {
        run(
            netsh(format!(
                "ipv6 add address interface=\"%NIC%\" address={address}"
            )),
            &format!("address {address}"),
        );
    }
    for (family, servers) in [
        (
            "ipv4",
            settings
                .dns4
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>(),
        ),
        (
            "ipv6",
            settings.dns6.iter().map(ToString::to_string).collect(),
        ),
    ] {
        for (i, server) in servers.iter().enumerate() {
            let command = if i == 0 {
                format!(
                    "{family} set dnsservers name=\"%NIC%\" source=static address={server} register=primary validate=no"
                )
            } else {
                format!(
                    "{family} add dnsservers name=\"%NIC%\" address={server} index={} validate=no",
                    i + 1
                )
            };
            run(netsh(command), &format!("DNS server {server}"));
        }
    }
    body
}

fn hex(mac: MacAddr) -> String {
    mac.to_string().replace(':', "").to_uppercase()
}

const HEAD: &str = r#"@echo off
rem Written by hyper2kvm. What this does, and how to stop it: docs/first-boot.md of hyper2kvm.
setlocal EnableExtensions DisableDelayedExpansion
set "PATH=%SystemRoot%\System32;%SystemRoot%;%SystemRoot%\System32\Wbem"
set "DIR=%~dp0"
set "LOG=%DIR%firstboot.log"
set "CCS=HKLM\SYSTEM\CurrentControlSet"
set "SVC=hyper2kvm-firstboot"
set "BAD=0"
if "%~1"=="add-driver" goto add_driver
if "%~1"=="add-agent" goto add_agent
cd /d "%SystemDrive%\"
mode COM1: BAUD=115200 PARITY=n DATA=8 STOP=1 >nul 2>&1
set "TRY=0"
if exist "%DIR%tries" set /p TRY=<"%DIR%tries"
set /a TRY+=1
>"%DIR%tries" echo %TRY%
call :say started, boot %TRY% of at most @MAX@
if %TRY% gtr @MAX@ goto finish
"#;

/// virtio-blk disks are `Disk&Ven_Red_Hat&Prod_VirtIO`, virtio-scsi ones `Disk&Ven_QEMU&Prod_QEMU_HARDDISK`;
/// behind AHCI and IDE it is `Disk&Ven_QEMU&Prod_HARDDISK` or `IDE\DiskQEMU_HARDDISK`.
const TWO_BOOTS: &str = r#"set "EMULATED="
for /f "tokens=1,2,*" %%a in ('reg query "%CCS%\Services\disk\Enum" 2^>nul') do if "%%b"=="REG_SZ" set "DISK=%%c" & call :disk
if not defined EMULATED goto finish
call :log the disks are not on VirtIO yet: the rest follows at the next boot
goto end
"#;

const ONE_BOOT: &str = "goto finish\n";

/// `sc delete` takes effect at once, because to the service manager the service is not running.
const TAIL: &str = r#"sc delete %SVC% >>"%LOG%" 2>&1
call :ran remove the service
del /q "%DIR%done.*" "%DIR%tries" "%DIR%rc" "%DIR%install.log" "%DIR%user-*.cmd" "%DIR%qemu-ga.msi" >nul 2>&1
call :say first boot finished
rem The line has been read when the script goes.
del /q "%~f0" >nul 2>&1 & exit 0

:end
call :say first boot finished
exit /b 0
"#;

/// Windows goes on installing devices after the services have started.
const PNP: &str = r#"set "POLL=0"
set "IDLE=0"
:pnp_poll
set /a POLL+=1
ping -n 6 127.0.0.1 >nul 2>&1
set /a IDLE+=1
for /f "tokens=1" %%a in ('tasklist 2^>nul') do if /i "%%a"=="drvinst.exe" set "IDLE=0"
if %IDLE% geq 2 exit /b 0
if %POLL% lss 60 goto pnp_poll
call :log devices are still being installed after five minutes, going on
set "BAD=258"
"#;

const AGENT_STEP: &str = r#"reg query "%CCS%\Services\QEMU-GA" >nul 2>&1 && exit /b 0
call :watched add-agent
exit /b %BAD%

:add_agent
msiexec /i "%DIR%qemu-ga.msi" /qn /norestart >"%DIR%install.log" 2>&1
goto installed
"#;

const ROUTINES: &str = r#"
rem Runs a step unless an earlier boot did it.
:step
if exist "%DIR%done.%~1" exit /b 0
set "BAD=0"
call :log step %~1
call :s_%~1
set "RC=%ERRORLEVEL%"
if "%RC%"=="0" >"%DIR%done.%~1" echo %RC%
call :say step %~1 rc=%RC%
exit /b 0

rem EMULATED when DISK is a disk that is not on VirtIO.
:disk
if not "%DISK:Ven_Red_Hat=%"=="%DISK%" exit /b 0
if not "%DISK:Prod_QEMU_HARDDISK=%"=="%DISK%" exit /b 0
if not "%DISK:\Disk=%"=="%DISK%" set "EMULATED=1"
exit /b 0

rem Files and COM1.
:say
call :log %*
(>COM1 echo hyper2kvm: %*) 2>nul
exit /b 0

:log
>>"%LOG%" echo %DATE% %TIME% hyper2kvm: %*
exit /b 0

rem Logs how the command before it ended.
:ran
set "E=%ERRORLEVEL%"
call :log %*: rc=%E%
if not "%E%"=="0" set "BAD=%E%"
exit /b 0

:driver
if defined STUCK exit /b 0
call :watched add-driver %1
exit /b 0

rem Runs part of this script as a process of its own: an installer that asks somebody who is not there
rem must not hold up everything else.
:watched
del /q "%DIR%rc" "%DIR%install.log" >nul 2>&1
start "" /b cmd /d /c ""%~f0" %1 %2" >nul 2>&1
set "WAIT=0"
:watch
if exist "%DIR%rc" goto watch_end
set /a WAIT+=1
if %WAIT% gtr 300 goto watch_stuck
ping -n 2 127.0.0.1 >nul 2>&1
goto watch
:watch_stuck
call :log %1 %2: no end after five minutes
set "STUCK=1"
set "BAD=258"
taskkill /f /im pnputil.exe >nul 2>&1
exit /b 0
:watch_end
set "E=1"
set /p E=<"%DIR%rc"
type "%DIR%install.log" >>"%LOG%" 2>nul
call :log %1 %2: rc=%E%
rem No device for it, or a newer driver is there; a restart is wanted.
if "%E%"=="259" exit /b 0
if "%E%"=="3010" exit /b 0
if "%E%"=="1641" exit /b 0
if not "%E%"=="0" set "BAD=%E%"
exit /b 0

:installed
set "E=%ERRORLEVEL%"
>"%DIR%rc.tmp" echo %E%
move /y "%DIR%rc.tmp" "%DIR%rc" >nul
exit %E%

rem The value NAME of KEY as it was before.
:restore
set "OLD="
for /f "tokens=1,2,*" %%a in ('reg query "%CCS%\Services\%SVC%\Parameters" /v %NAME% 2^>nul') do if "%%b"=="REG_DWORD" set "OLD=%%c"
if not defined OLD exit /b 0
if /i "%OLD%"=="0xffffffff" reg delete "%CCS%\%KEY%" /v %NAME% /f >>"%LOG%" 2>&1
if /i not "%OLD%"=="0xffffffff" reg add "%CCS%\%KEY%" /v %NAME% /t REG_DWORD /d %OLD% /f >>"%LOG%" 2>&1
call :ran restore %NAME%
exit /b 0

rem The connection NIC: the one adapter of netkvm that is there (WANT=ONLY), or that with the MAC WANT.
:find_nic
set "NIC="
set "COUNT=0"
for /f "tokens=1,2,*" %%a in ('reg query "%CCS%\Services\netkvm\Enum" /v Count 2^>nul') do if "%%b"=="REG_DWORD" set /a COUNT=%%c
if "%WANT%"=="ONLY" if not "%COUNT%"=="1" exit /b 11
set "I=0"
:next_nic
if %I% geq %COUNT% exit /b 12
set "DEV="
set "DRV="
set "GUID="
for /f "tokens=1,2,*" %%a in ('reg query "%CCS%\Services\netkvm\Enum" /v %I% 2^>nul') do if "%%b"=="REG_SZ" set "DEV=%%c"
if defined DEV for /f "tokens=1,2,*" %%a in ('reg query "%CCS%\Enum\%DEV%" /v Driver 2^>nul') do if "%%b"=="REG_SZ" set "DRV=%%c"
if defined DRV for /f "tokens=1,2,*" %%a in ('reg query "%CCS%\Control\Class\%DRV%" /v NetCfgInstanceId 2^>nul') do if "%%b"=="REG_SZ" set "GUID=%%c"
set /a I+=1
if not defined GUID goto next_nic
if "%WANT%"=="ONLY" goto name_nic
set "MAC="
for /f "tokens=1,2,*" %%a in ('reg query "%CCS%\Control\NetworkSetup2\Interfaces\%GUID%\Kernel" /v PermanentAddress 2^>nul') do if "%%b"=="REG_BINARY" set "MAC=%%c"
rem Windows 7 and 8 do not keep it there.
if not defined MAC for /f "tokens=1,2 delims=," %%a in ('getmac /fo csv /nh 2^>nul') do if /i "%%~b"=="\Device\Tcpip_%GUID%" set "MAC=%%~a"
if not defined MAC goto next_nic
set "MAC=%MAC:-=%"
if /i not "%MAC%"=="%WANT%" goto next_nic
:name_nic
for /f "tokens=1,2,*" %%a in ('reg query "%CCS%\Control\Network\{4D36E972-E325-11CE-BFC1-08002BE10318}\%GUID%\Connection" /v Name 2^>nul') do if "%%b"=="REG_SZ" set "NIC=%%c"
if not defined NIC goto next_nic
exit /b 0
"#;

#[cfg(test)]
mod tests;
