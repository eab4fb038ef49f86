use super::*;

fn full() -> Script {
    let mac: MacAddr = "00:50:56:ab:cd:ef".parse().unwrap();
    let guid = uuid::Uuid::from_u128(0x1111_2222).braced();
    Script {
        modern_pnputil: true,
        infs: ["drivers\\netkvm.inf", "drivers\\vioserial\\vioser.inf"]
            .map(|n| FileName::new(n).unwrap())
            .into(),
        network: vec![Settings {
            binding: Binding::Mac(mac),
            old_guids: vec![guid],
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
            gateways4: vec!["10.0.0.1".parse().unwrap(), "192.0.2.1".parse().unwrap()],
            ipv6: vec![crate::inspect::Cidr {
                ip: "2001:db8::5".parse().unwrap(),
                prefix: 64,
            }],
            dns4: ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
                .map(|a| a.parse().unwrap())
                .into(),
            dns6: vec!["2001:db8::53".parse().unwrap()],
        }],
        agent: true,
        user_scripts: 2,
        restore: vec![Restore::AutoReboot, Restore::SanPolicy],
        two_boots: true,
    }
}

#[test]
fn golden() {
    insta::assert_snapshot!(full().to_cmd().replace("\r\n", "\n"));
}

/// Every label that is called or jumped to exists, once; nothing but CRLF ends a line.
#[test]
fn labels() {
    let old = Script {
        modern_pnputil: false,
        two_boots: false,
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
            // Only what the script does has its routine; entries for child processes come first.
            let optional = ["add_driver", "add_agent", "s_%~1"].contains(&target);
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
