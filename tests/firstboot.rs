//! The first-boot script under wine's `cmd`: syntax, quoting, logging, retries, self-removal.
//!
//! wine has no netsh, pnputil or services worth the name; what is shown is that every step is reached
//! and logged with its exit code, that the adapter is found by its MAC address, and that what was
//! changed is put back.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // skips must be seen

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use hyper2kvm::firstboot::network::{Binding, Settings};
use hyper2kvm::firstboot::{FileName, MAX_TRIES, Restore, SERVICE, Script};

const CCS: &str = r"HKLM\SYSTEM\CurrentControlSet";
const GUID: &str = "{AAAAAAAA-1111-2222-3333-444444444444}";
const NET: &str = "{4D36E972-E325-11CE-BFC1-08002BE10318}";

struct Windows {
    dir: tempfile::TempDir,
}

impl Windows {
    fn new() -> Option<Self> {
        if hyper2kvm::tool::find("wine").is_none() {
            assert!(
                std::env::var_os("HYPER2KVM_REQUIRE_TOOLS").is_none(),
                "missing tool: wine"
            );
            eprintln!("SKIP: wine is not installed");
            return None;
        }
        let windows = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        windows.wine(&["wineboot", "-i"]);
        Some(windows)
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

    /// The data of a value, `None` when it is not there.
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

    /// A virtio card as Windows 10 records it, with a name that wants to be a command.
    fn network_card(&self) {
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
            "LAN & echo OWNED> owned.txt (2) ^%PATH%",
        );
    }

    fn install(&self, script: &Script) -> PathBuf {
        let folder = self.dir.path().join("prefix/drive_c/windows/hyper2kvm");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(folder.join("drivers")).unwrap();
        fs::write(folder.join("firstboot.cmd"), script.to_cmd()).unwrap();
        for n in 1..=script.user_scripts {
            let text = format!("@echo user script {n} %~nx0\r\n@exit /b {n}\r\n");
            fs::write(folder.join(format!("user-{n}.cmd")), text).unwrap();
        }
        folder
    }

    /// As the service starts it.
    fn boot(&self) -> i32 {
        self.wine(&["cmd", "/d", "/c", r"C:\windows\hyper2kvm\firstboot.cmd"])
            .0
    }
}

fn log(folder: &Path) -> String {
    fs::read_to_string(folder.join("firstboot.log")).unwrap()
}

fn script() -> Script {
    Script {
        modern_pnputil: true,
        infs: vec![FileName::new("drivers\\netkvm.inf").unwrap()],
        network: vec![Settings {
            binding: Binding::Mac("00:50:56:ab:cd:ef".parse().unwrap()),
            old_guids: vec![uuid::Uuid::from_u128(5).braced()],
            ipv4: vec![(
                "10.0.0.5".parse().unwrap(),
                "255.255.255.0".parse().unwrap(),
            )],
            gateways4: vec!["192.0.2.1".parse().unwrap()],
            ipv6: Vec::new(),
            dns4: vec!["10.0.0.2".parse().unwrap(), "10.0.0.3".parse().unwrap()],
            dns6: Vec::new(),
        }],
        agent: false,
        user_scripts: 2,
        restore: vec![Restore::AutoReboot, Restore::SanPolicy],
        two_boots: true,
    }
}

#[test]
fn two_boots() {
    let Some(windows) = Windows::new() else {
        return;
    };
    windows.network_card();
    let folder = windows.install(&script());
    let saved = format!("Services\\{SERVICE}\\Parameters");
    windows.set(&saved, "AutoReboot", "REG_DWORD", "1");
    windows.set(&saved, "SanPolicy", "REG_DWORD", "0xffffffff");
    windows.set(r"Control\CrashControl", "AutoReboot", "REG_DWORD", "0");
    windows.set(
        r"Services\partmgr\Parameters",
        "SanPolicy",
        "REG_DWORD",
        "1",
    );
    let disk = r"SCSI\Disk&Ven_QEMU&Prod_HARDDISK\4&35424867&0&000000";
    windows.set(r"Services\disk\Enum", "0", "REG_SZ", disk);

    windows.boot();
    let first = log(&folder);
    eprintln!("{first}");
    for line in [
        "started, boot 1 of at most 5",
        "step pnp rc=0",
        "add-driver drivers\\netkvm.inf: rc=",
        "step drivers rc=",
        "old adapter {00000000-0000-0000-0000-000000000005} to DHCP: rc=0",
        "address 10.0.0.5 255.255.255.0: rc=",
        "DNS server 10.0.0.3: rc=",
        "step network-1 rc=",
        "user script 1 user-1.cmd",
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
    let prefix = windows.dir.path().join("prefix/drive_c");
    for place in ["", "windows", "windows/hyper2kvm", "windows/system32"] {
        assert!(!prefix.join(place).join("owned.txt").exists(), "{place}");
    }
    assert_eq!(
        windows.get(r"Control\CrashControl", "AutoReboot"),
        Some("0x0".into())
    );
    assert!(folder.join("firstboot.cmd").exists());

    // The second boot, on VirtIO: what was done is not done again, and everything goes.
    let disk = r"SCSI\Disk&Ven_Red_Hat&Prod_VirtIO\4&35424867&0&000000";
    windows.set(r"Services\disk\Enum", "0", "REG_SZ", disk);
    windows.boot();
    let both = log(&folder);
    let second = both.split_once("boot 2 of at most 5").unwrap().1;
    eprintln!("{second}");
    assert!(
        !second.contains("step pnp") && !second.contains("user script"),
        "{second}"
    );
    assert!(second.contains("restore AutoReboot: rc=0"));
    assert!(second.contains("restore SanPolicy: rc=0"));
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
    assert_eq!(
        windows.get(r"Services\partmgr\Parameters", "SanPolicy"),
        None
    );
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
    // No card: the settings stay where they are, and the step says so.
    let folder = windows.install(&Script {
        infs: Vec::new(),
        user_scripts: 0,
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
