use super::*;

fn full() -> Script {
    let mac: MacAddr = "00:50:56:ab:cd:ef".parse().unwrap();
    let guid = uuid::Uuid::from_u128(0x1111_2222).braced();
    let name = |n: &str| FileName::new(n).unwrap();
    let cidr = |ip: &str, prefix| Cidr {
        ip: ip.parse().unwrap(),
        prefix,
    };
    Script {
        modern_pnputil: true,
        removes_devices: true,
        infs: vec![
            Inf {
                path: name("drivers\\netkvm.inf"),
                service: Some((name("netkvm"), name("100.101.104.27100"))),
            },
            Inf {
                path: name("drivers\\vioserial\\vioser.inf"),
                service: None,
            },
        ],
        network: vec![Settings {
            binding: Binding::Mac(mac),
            old_guid: guid,
            ipv4: vec![
                (
                    "10.0.0.5".parse().unwrap(),
                    "255.255.255.0".parse().unwrap(),
                ),
                (
                    "10.0.0.6".parse().unwrap(),
                    "255.255.255.255".parse().unwrap(),
                ),
            ],
            gateways4: vec![
                ("10.0.0.1".parse().unwrap(), None),
                ("192.0.2.1".parse().unwrap(), Some(20)),
            ],
            ipv6: vec![cidr("2001:db8::5", 64)],
            gateways6: vec![("fe80::1".parse().unwrap(), Some(5))],
            routes: vec![Route {
                to: cidr("10.9.0.0", 16),
                gateway: "10.0.0.254".parse().unwrap(),
                metric: Some(1),
            }],
            dns4: ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
                .map(|a| a.parse().unwrap())
                .into(),
            dns6: vec!["2001:db8::53".parse().unwrap()],
            suffix: network::DnsName::new("corp.example"),
            wins: vec!["10.0.0.7".parse().unwrap(), "10.0.0.8".parse().unwrap()],
            netbios: Some(2),
            mtu: Some(1400),
            metric: Some(15),
        }],
        ghosts: vec![Ghost {
            device: network::DeviceId::new(r"PCI\VEN_15AD&DEV_07B0&SUBSYS_07B015AD&REV_01\1")
                .unwrap(),
            guid,
            successor: Some(Binding::Mac(mac)),
            after: Some(0),
        }],
        disks: Disks(vec![
            disks::Disk {
                id: disks::DiskId::Mbr(0x5cbe_a03e),
                read_only: false,
                letters: vec![('E', guid)],
            },
            disks::Disk {
                id: disks::DiskId::Gpt(uuid::Uuid::from_u128(0xabcd)),
                read_only: true,
                letters: Vec::new(),
            },
        ]),
        agent: true,
        uninstall: vec![guid],
        user_scripts: 2,
        restore: vec![Restore::AutoReboot],
        two_boots: true,
        com2: false,
    }
}

#[test]
fn golden() {
    insta::assert_snapshot!(full().to_cmd().replace("\r\n", "\n"));
}

/// Every label that is called or jumped to exists, once; CRLF ends every line.
#[test]
fn labels() {
    let old = Script {
        modern_pnputil: false,
        removes_devices: false,
        two_boots: false,
        com2: false,
        ..full()
    };
    for script in [full(), old, Script::default()] {
        let text = script.to_cmd();
        assert_eq!(text.matches('\n').count(), text.matches("\r\n").count());
        assert!(text.is_ascii());
        let mut labels: Vec<String> = text
            .lines()
            .filter_map(|l| l.strip_prefix(':'))
            .map(str::to_string)
            .collect();
        labels.sort();
        let count = labels.len();
        labels.dedup();
        assert_eq!(labels.len(), count, "a label twice");
        let words: Vec<&str> = text.split_whitespace().collect();
        for pair in words.windows(2) {
            let target = match pair {
                ["goto", label] => label.trim_end_matches(')'),
                ["call", label] => label.trim_start_matches(':'),
                _ => continue,
            };
            // Only used steps have a routine; entries for child processes come first.
            if target == "disk_%ID%" {
                continue;
            }
            let optional = ["add_driver", "add_agent", "uninstall", "s_%~1"].contains(&target);
            assert!(optional || labels.iter().any(|l| l == target), "{target}");
        }
        for step in words.windows(3).filter(|w| w[..2] == ["call", ":step"]) {
            assert!(labels.contains(&format!("s_{}", step[2])), "{step:?}");
        }
    }
}

#[test]
fn file_names() {
    for (name, fits) in [
        ("drivers\\netkvm.inf", true),
        ("a&calc.inf", false),
        ("a%PATH%.inf", false),
        ("a b.inf", false),
        ("..\\x.inf", false),
        ("-x.inf", false),
        ("", false),
        ("x^.inf", false),
        ("\u{fc}.inf", false),
    ] {
        assert_eq!(FileName::new(name).is_some(), fits, "{name}");
    }
}

/// A program in a directory of PATH or beside the script is never run instead.
#[test]
fn programs_are_named_with_their_folder() {
    let text = full().to_cmd();
    const PROGRAMS: [&str; 12] = [
        "reg", "netsh", "sc", "msiexec", "ping", "tasklist", "taskkill", "diskpart", "mountvol",
        "getmac", "pnputil", "cmd",
    ];
    let mut named = 0;
    for line in text.lines().filter(|l| !l.starts_with("rem ")) {
        for program in PROGRAMS {
            for (at, _) in line.match_indices(program) {
                let (before, after) = (&line[..at], &line[at + program.len()..]);
                if before.ends_with(r"%SYS%\") {
                    assert!(after.starts_with(".exe "), "{line}");
                    named += 1;
                    continue;
                }
                // A command is preceded by nothing, or by a construct of cmd.
                let start = before.is_empty() || before.ends_with(['&', '|', '(', '\'']);
                let start = start || before.ends_with("do ") || before.ends_with("& ");
                assert!(!(start && after.starts_with([' ', '.'])), "{line}");
            }
        }
    }
    assert!(named > 30, "{named}");
    for (i, line) in text.lines().enumerate() {
        let first = ["@echo off"].contains(&line);
        assert_eq!(first, i == 0);
    }
    assert!(text.contains("set \"NoDefaultCurrentDirectoryInExePath=1\""));
    // Scripts of the user do not echo their commands, and their output is in no log.
    assert!(text.contains("%SYS%\\cmd.exe /d /q /c \"\"%DIR%user-1.cmd\"\" >nul 2>&1"));
}
