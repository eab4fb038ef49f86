//! The first-boot script under wine's `cmd`: syntax, quoting, logging, retries, self-removal.
//!
//! wine has no netsh, pnputil or services worth the name; what is shown is that every step is reached
//! and logged with its exit code, that the adapter is found by its MAC address, that COM1 gets its lines,
//! and that what was changed is put back. For `diskpart`, `mountvol` and `pnputil /remove-device` there
//! are small stand-ins, so that what the script makes of their answers is shown too.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

#[path = "../src/skip.rs"]
mod skip;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use hyper2kvm::firstboot::disks::{Disk, DiskId, Disks};
use hyper2kvm::firstboot::network::{Binding, DeviceId, DnsName, Ghost, Settings};
use hyper2kvm::firstboot::{FileName, Inf, MAX_TRIES, Restore, SERVICE, Script};
use skip::have;

const CCS: &str = r"HKLM\SYSTEM\CurrentControlSet";
const GUID: &str = "{AAAAAAAA-1111-2222-3333-444444444444}";
const NET: &str = "{4D36E972-E325-11CE-BFC1-08002BE10318}";

const OLD_GUID: &str = "{00000000-0000-0000-0000-000000000005}";
const OLD_DEVICE: &str = r"PCI\VEN_15AD&DEV_07B0&SUBSYS_07B015AD&REV_01\FF56500000A1B2C300";
const VOLUME: &str = "{00000000-0000-0000-0000-00000000000e}";

/// Disk 0 is the system's, disk 1 has a signature, disk 2 a GUID; requests are recorded.
const DISKPART: &str = r#"@echo off
setlocal
for /f "usebackq tokens=1-3" %%a in ("%~2") do call :%%a %%b %%c
exit /b %ANSWER%
:select
set "NUMBER=%2"
set "ANSWER=0"
if %NUMBER% gtr 2 set "ANSWER=5"
exit /b 0
:uniqueid
if "%NUMBER%"=="0" echo Disk ID: 11111111
if "%NUMBER%"=="1" echo Disk ID: 5CBEA03E
if "%NUMBER%"=="2" echo Disk ID: {00000000-0000-0000-0000-00000000ABCD}
exit /b 0
:online
>>C:\fake\calls.txt echo online %NUMBER%
exit /b 0
:attributes
>>C:\fake\calls.txt echo writable %NUMBER%
exit /b 0
"#;

/// One letter, in a file.
const MOUNTVOL: &str = r#"@echo off
if /i "%2"=="/L" goto show
>>C:\fake\calls.txt echo mountvol %*
if /i "%2"=="/D" goto remove
>C:\fake\letter.txt echo %2
exit /b 0
:show
if exist C:\fake\cdrom.cmd call C:\fake\cdrom.cmd
if not exist C:\fake\letter.txt echo The system cannot find the file specified.
if exist C:\fake\letter.txt type C:\fake\letter.txt
exit /b 0
:remove
del C:\fake\letter.txt
exit /b 0
"#;

const PNPUTIL: &str = r#"@echo off
>>C:\fake\calls.txt echo pnputil %*
exit /b 0
"#;

struct Windows {
    dir: tempfile::TempDir,
    /// Reads the script's output on COM1.
    com1: Option<Child>,
}

impl Drop for Windows {
    fn drop(&mut self) {
        if let Some(reader) = &mut self.com1 {
            let _ = reader.kill();
            let _ = reader.wait();
        }
    }
}

impl Windows {
    fn new() -> Option<Self> {
        if !have(&["wine"]) {
            return None;
        }
        let mut windows = Self {
            dir: tempfile::tempdir().unwrap(),
            com1: None,
        };
        windows.wine(&["wineboot", "-i"]);
        windows.serial_port();
        let fakes = windows.dir.path().join("prefix/drive_c/fake");
        fs::create_dir_all(&fakes).unwrap();
        for (name, text) in [
            ("diskpart", DISKPART),
            ("mountvol", MOUNTVOL),
            ("pnputil", PNPUTIL),
        ] {
            fs::write(
                fakes.join(format!("{name}.cmd")),
                text.replace('\n', "\r\n"),
            )
            .unwrap();
        }
        Some(windows)
    }

    /// Redirects COM1, which wine opens through a link in the prefix, to a pipe that keeps every
    /// line.
    fn serial_port(&mut self) {
        let pipe = self.dir.path().join("com1");
        assert!(
            Command::new("mkfifo")
                .arg(&pipe)
                .status()
                .unwrap()
                .success()
        );
        // wine creates its links again whenever it starts.
        let (key, path) = (r"HKLM\Software\Wine\Ports", pipe.to_str().unwrap());
        let args = [
            "reg", "add", key, "/v", "COM1", "/t", "REG_SZ", "/d", path, "/f",
        ];
        assert_eq!(self.wine(&args).0, 0);
        // Opened for both, the pipe has no end.
        let reader = Command::new("sh")
            .args(["-c", "exec cat <>com1 >com1.txt"])
            .current_dir(self.dir.path())
            .spawn();
        self.com1 = Some(reader.unwrap());
    }

    /// The lines on COM1 so far.
    fn com1(&self) -> Vec<String> {
        std::thread::sleep(std::time::Duration::from_millis(200));
        let text = fs::read_to_string(self.dir.path().join("com1.txt")).unwrap();
        text.lines().map(|l| l.trim().to_string()).collect()
    }

    /// The requests to the stand-ins.
    fn calls(&self) -> Vec<String> {
        let path = self.dir.path().join("prefix/drive_c/fake/calls.txt");
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().map(|l| l.trim().to_string()).collect()
    }

    fn wine(&self, args: &[&str]) -> (i32, String) {
        let out = Command::new("timeout")
            .args(["120", "wine"])
            .args(args)
            .env("WINEPREFIX", self.dir.path().join("prefix"))
            .env("WINEARCH", "win64")
            .env("WINEDEBUG", "-all")
            .env("WINEDLLOVERRIDES", "mscoree,mshtml=")
            .env_remove("DISPLAY")
            .output()
            .unwrap();
        (
            out.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&out.stdout).into_owned(),
        )
    }

    fn set(&self, key: &str, name: &str, kind: &str, data: &str) {
        let key = format!("{CCS}\\{key}");
        let args = ["reg", "add", &key, "/v", name, "/t", kind, "/d", data, "/f"];
        assert_eq!(self.wine(&args).0, 0, "{args:?}");
    }

    /// The data of a value; `None` if it does not exist.
    fn get(&self, key: &str, name: &str) -> Option<String> {
        let key = format!("{CCS}\\{key}");
        let (code, text) = self.wine(&["reg", "query", &key, "/v", name]);
        let line = text.lines().find(|l| l.contains("REG_"))?;
        (code == 0).then(|| {
            line.split_whitespace()
                .last()
                .unwrap_or_default()
                .to_string()
        })
    }

    /// A virtio NIC as Windows 10 records it, with a name that contains a command.
    fn nic(&self) {
        let instance = r"PCI\VEN_1AF4&DEV_1041&SUBSYS_11001AF4&REV_01\3&11583659&0&18";
        self.set(r"Services\netkvm\Enum", "Count", "REG_DWORD", "1");
        self.set(r"Services\netkvm\Enum", "0", "REG_SZ", instance);
        self.set(
            &format!("Enum\\{instance}"),
            "Driver",
            "REG_SZ",
            &format!("{NET}\\0012"),
        );
        self.set(
            &format!("Control\\Class\\{NET}\\0012"),
            "NetCfgInstanceId",
            "REG_SZ",
            GUID,
        );
        self.set(
            &format!("Control\\NetworkSetup2\\Interfaces\\{GUID}\\Kernel"),
            "PermanentAddress",
            "REG_BINARY",
            "005056ABCDEF",
        );
        self.set(
            &format!("Control\\Network\\{NET}\\{GUID}\\Connection"),
            "Name",
            "REG_SZ",
            r#"LAN" & echo OWNED> owned.txt & "(2) ^%PATH%"#,
        );
        self.set(
            &format!("Control\\Class\\{NET}\\0012"),
            "DriverVersion",
            "REG_SZ",
            "100.101.104.27100",
        );
    }

    /// The NIC of the old VM, which no longer exists.
    fn old_nic(&self) {
        self.set(
            &format!("Enum\\{OLD_DEVICE}"),
            "Service",
            "REG_SZ",
            "vmxnet3ndis6",
        );
        let connection = format!("Control\\Network\\{NET}\\{OLD_GUID}\\Connection");
        self.set(
            &connection,
            "Name",
            "REG_SZ",
            "Ethernet0 & echo OWNED> owned.txt",
        );
    }

    /// A CD-ROM has the letter E.
    fn cdrom(&self) {
        let fakes = self.dir.path().join("prefix/drive_c/fake");
        let volume = format!("    \\\\?\\Volume{GUID}\\\r\n");
        fs::write(fakes.join("letter.txt"), volume).unwrap();
        // wine keeps MountedDevices only while it runs: the stand-in of mountvol writes it.
        let device: String = r"\??\IDE#CdRomQEMU_DVD-ROM"
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .map(|b| format!("{b:02X}"))
            .collect();
        let add = format!(
            "@reg add HKLM\\SYSTEM\\MountedDevices /v \"\\DosDevices\\E:\" /t REG_BINARY /d {device} /f >nul 2>&1\r\n"
        );
        fs::write(fakes.join("cdrom.cmd"), add).unwrap();
    }

    fn install(&self, script: &Script) -> PathBuf {
        let folder = self.dir.path().join("prefix/drive_c/windows/hyper2kvm");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(folder.join("drivers")).unwrap();
        let mut text = script.to_cmd();
        for (program, stand_in) in [
            (r"%SYS%\diskpart.exe /s", r"call C:\fake\diskpart.cmd /s"),
            (r"%SYS%\mountvol.exe %1", r"call C:\fake\mountvol.cmd %1"),
            (
                r"%SYS%\pnputil.exe /remove-device",
                r"call C:\fake\pnputil.cmd /remove-device",
            ),
        ] {
            text = text.replace(program, stand_in);
        }
        fs::write(folder.join("firstboot.cmd"), text).unwrap();
        for n in 1..=script.user_scripts {
            let text = format!("@echo user script {n} %~nx0\r\n@exit /b {n}\r\n");
            fs::write(folder.join(format!("user-{n}.cmd")), text).unwrap();
        }
        folder
    }

    /// Runs the script like the service.
    fn boot(&self) -> i32 {
        // Started before, so that this session does not change the link.
        self.wine(&["cmd", "/c", "rem"]);
        let link = self.dir.path().join("prefix/dosdevices/com1");
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(self.dir.path().join("com1"), &link).unwrap();
        self.wine(&["cmd", "/d", "/c", r"C:\windows\hyper2kvm\firstboot.cmd"])
            .0
    }
}

fn log(folder: &Path) -> String {
    fs::read_to_string(folder.join("firstboot.log")).unwrap()
}

fn script() -> Script {
    let name = |n: &str| FileName::new(n).unwrap();
    let binding = Binding::Mac("00:50:56:ab:cd:ef".parse().unwrap());
    let old_guid = uuid::Uuid::from_u128(5).braced();
    let inf = |path, service, version| Inf {
        path: name(path),
        service: Some((name(service), name(version))),
    };
    Script {
        modern_pnputil: true,
        removes_devices: true,
        infs: vec![
            inf("drivers\\netkvm.inf", "netkvm", "100.101.104.27100"),
            inf("drivers\\balloon.inf", "BALLOON", "100.101.104.27100"),
        ],
        network: vec![Settings {
            binding,
            old_guid,
            ipv4: vec![(
                "10.0.0.5".parse().unwrap(),
                "255.255.255.0".parse().unwrap(),
            )],
            gateways4: vec![("192.0.2.1".parse().unwrap(), Some(3))],
            ipv6: Vec::new(),
            gateways6: vec![("fe80::1".parse().unwrap(), None)],
            routes: Vec::new(),
            dns4: vec!["10.0.0.2".parse().unwrap(), "10.0.0.3".parse().unwrap()],
            dns6: Vec::new(),
            suffix: DnsName::new("corp.example"),
            wins: vec!["10.0.0.7".parse().unwrap()],
            netbios: Some(2),
            mtu: Some(1400),
            metric: None,
        }],
        ghosts: vec![Ghost {
            device: DeviceId::new(OLD_DEVICE).unwrap(),
            guid: old_guid,
            successor: Some(binding),
            after: None,
        }],
        disks: Disks(vec![
            Disk {
                id: DiskId::Mbr(0x5cbe_a03e),
                read_only: false,
                letters: vec![('E', uuid::Uuid::from_u128(0xe).braced())],
            },
            Disk {
                id: DiskId::Gpt(uuid::Uuid::from_u128(0xabcd)),
                read_only: true,
                letters: Vec::new(),
            },
            Disk {
                id: DiskId::Mbr(0x7777_7777),
                read_only: false,
                letters: vec![('F', uuid::Uuid::from_u128(0xf).braced())],
            },
        ]),
        agent: false,
        uninstall: Vec::new(),
        user_scripts: 2,
        restore: vec![Restore::AutoReboot],
        two_boots: true,
        com2: false,
    }
}

#[test]
#[ignore = "minutes: cargo test --test firstboot -- --ignored two_boots; .ci/run has it"]
fn two_boots() {
    let Some(windows) = Windows::new() else {
        return;
    };
    windows.nic();
    windows.old_nic();
    windows.cdrom();
    let folder = windows.install(&script());
    let saved = format!("Services\\{SERVICE}\\Parameters");
    windows.set(&saved, "AutoReboot", "REG_DWORD", "1");
    windows.set(r"Control\CrashControl", "AutoReboot", "REG_DWORD", "0");
    let disk = r"SCSI\Disk&Ven_QEMU&Prod_HARDDISK\4&35424867&0&000000";
    windows.set(r"Services\disk\Enum", "0", "REG_SZ", disk);

    windows.boot();
    let first = log(&folder);
    eprintln!("{first}");
    for line in [
        "started, boot 1 of at most 5",
        "step pnp rc=0",
        "drivers\\netkvm.inf: version 100.101.104.27100 is in use already",
        "add-driver drivers\\balloon.inf: rc=",
        "step drivers rc=",
        "old adapter {00000000-0000-0000-0000-000000000005} to DHCP: rc=0",
        "address 10.0.0.5 255.255.255.0: rc=",
        "gateway 192.0.2.1: rc=",
        "route ::/0 by fe80::1: rc=",
        "DNS server 10.0.0.3: rc=",
        "WINS server 10.0.0.7: rc=",
        "DNS suffix corp.example: rc=0",
        "NetBIOS 2: rc=0",
        "MTU 1400: rc=",
        "disk 1 online: rc=0",
        "letter E was with a CD-ROM",
        "letter E: rc=0",
        "step disks rc=0",
        "step network-1 rc=",
        "step user-1 rc=1",
        "step user-2 rc=2",
        "the rest follows at the next boot",
        "first boot finished",
    ] {
        assert!(first.contains(line), "{line}");
    }
    assert!(first.trim_end().ends_with("hyper2kvm: first boot finished"));
    assert!(!first.contains("no VirtIO adapter"), "found by its MAC");
    assert_eq!(
        windows.get(
            r"Services\Tcpip\Parameters\Interfaces\{00000000-0000-0000-0000-000000000005}",
            "EnableDHCP"
        ),
        Some("0x1".into())
    );
    let tcpip = format!(r"Services\Tcpip\Parameters\Interfaces\{GUID}");
    assert_eq!(windows.get(&tcpip, "Domain"), Some("corp.example".into()));
    let netbt = format!(r"Services\NetBT\Parameters\Interfaces\Tcpip_{GUID}");
    assert_eq!(windows.get(&netbt, "NetbiosOptions"), Some("0x2".into()));
    // The read-only disk stays so, a missing one is skipped.
    let disks = ["online 1", "writable 1", "mountvol E: /D"].map(String::from);
    let volume = format!(r"mountvol E: \\?\Volume{VOLUME}\");
    let expected: Vec<String> = disks
        .into_iter()
        .chain([volume, "online 2".into()])
        .collect();
    assert_eq!(windows.calls(), expected);
    let serial = windows.com1();
    for line in [
        "hyper2kvm: started, boot 1 of at most 5",
        "hyper2kvm: step pnp rc=0",
        "hyper2kvm: step user-2 rc=2",
    ] {
        assert!(serial.iter().any(|l| l == line), "{line}: {serial:?}");
    }
    assert_eq!(serial.last().unwrap(), "hyper2kvm: first boot finished");
    assert!(!first.contains("ghost"), "its time has not come");
    let prefix = windows.dir.path().join("prefix/drive_c");
    for place in ["", "windows", "windows/hyper2kvm", "windows/system32"] {
        assert!(!prefix.join(place).join("owned.txt").exists(), "{place}");
    }
    assert_eq!(
        windows.get(r"Control\CrashControl", "AutoReboot"),
        Some("0x0".into())
    );
    assert!(folder.join("firstboot.cmd").exists());

    // The second boot, on VirtIO: finished steps are not repeated, and everything is removed.
    let disk = r"SCSI\Disk&Ven_Red_Hat&Prod_VirtIO\4&35424867&0&000000";
    windows.set(r"Services\disk\Enum", "0", "REG_SZ", disk);
    windows.boot();
    let both = log(&folder);
    let second = both.split_once("boot 2 of at most 5").unwrap().1;
    eprintln!("{second}");
    assert!(
        !second.contains("step pnp")
            && !first.contains("user script 1 user-1.cmd")
            && !second.contains("user script 1:"),
        "{second}"
    );
    assert!(second.contains("restore AutoReboot: rc=0"));
    assert!(second.contains("remove the service: rc="));
    assert!(
        second
            .trim_end()
            .ends_with("hyper2kvm: first boot finished")
    );
    assert_eq!(
        windows.get(r"Control\CrashControl", "AutoReboot"),
        Some("0x1".into())
    );
    // Disks are new again on the new bus; the letter is the right one.
    assert!(second.contains("step disks rc=0"), "{second}");
    assert!(second.contains("step ghost-1 rc="), "{second}");
    let calls = windows.calls();
    let again = ["online 1", "writable 1", "online 2"].map(String::from);
    assert_eq!(calls[expected.len()..][..3], again);
    assert_eq!(
        calls.last().unwrap(),
        &format!(r#"pnputil /remove-device "{OLD_DEVICE}""#)
    );
    let connection = format!("Control\\Network\\{NET}\\{OLD_GUID}\\Connection");
    assert_eq!(
        windows.get(&connection, "Name"),
        None,
        "the ghost's records go"
    );
    for place in ["", "windows", "windows/hyper2kvm", "windows/system32"] {
        assert!(!prefix.join(place).join("owned.txt").exists(), "{place}");
    }
    let serial = windows.com1();
    let finished = serial.iter().filter(|l| l.ends_with("first boot finished"));
    assert_eq!(finished.count(), 2, "{serial:?}");
    let left: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(
        left.iter().all(|n| n == "drivers" || n == "firstboot.log"),
        "{left:?}"
    );
}

#[test]
fn gives_up() {
    let Some(windows) = Windows::new() else {
        return;
    };
    // No NIC: the settings stay, and the step reports that.
    let folder = windows.install(&Script {
        infs: Vec::new(),
        user_scripts: 0,
        disks: Disks::default(),
        ..script()
    });
    let disk = r"IDE\DiskQEMU_HARDDISK___________2.5+____\5&2770a7af&0&0.0.0";
    windows.set(r"Services\disk\Enum", "0", "REG_SZ", disk);
    windows.boot();
    assert!(log(&folder).contains("no VirtIO adapter for 005056ABCDEF"));
    assert!(log(&folder).contains("step network-1 rc=12"));
    fs::write(folder.join("tries"), format!("{MAX_TRIES}\r\n")).unwrap();
    windows.boot();
    assert!(
        log(&folder)
            .trim_end()
            .ends_with("hyper2kvm: first boot finished")
    );
    assert!(!folder.join("firstboot.cmd").exists());
}
