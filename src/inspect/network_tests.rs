use super::super::tests::survey_demo;
use super::*;
use crate::demo::{AdapterSpec, GuestSpec, IpSpec, MoreIp, WinVersion};
use crate::skip::corpus;

#[test]
fn small_parsers() {
    assert_eq!(
        mac_from_instance(r"PCI\VEN_8086&DEV_10D3&SUBSYS_07D015AD&REV_00\000C29FFFFF3FFDE00"),
        Some("00:0c:29:f3:ff:de".into())
    );
    assert_eq!(mac_from_instance(r"PCI\VEN_8086\4&b70f118&0&0888"), None);
    assert_eq!(
        addresses("10.0.0.1,10.0.0.2 0.0.0.0 junk,fe80::1"),
        ["10.0.0.1", "10.0.0.2", "fe80::1"].map(|a| a.parse::<IpAddr>().unwrap())
    );
    assert_eq!(prefix_length("255.255.252.0".parse().unwrap()), 22);
    assert_eq!(
        guid("{6AAFC9A9-0542-4DB2-8760-CCFFA953737C}")
            .unwrap()
            .len(),
        38
    );
    assert_eq!(guid("..\\{x}"), None);
    assert_eq!(parse_hex("00-0C-29").as_deref(), Some(&[0, 12, 41][..]));
    assert_eq!(parse_hex("0x"), None);
}

/// The real adapters, compared with the output of `hivexregedit --export`.
#[test]
fn adapters_of_real_hives() {
    let read = |file: &'static str| {
        let bytes = corpus(file)?;
        let facts = network(
            &HiveView::new(&bytes).unwrap(),
            &crate::types::ControlSet::new(1),
        )
        .unwrap();
        Some(serde_json::to_value(&facts).unwrap())
    };
    // Two PRO/1000 MT, whose instance ids contain no MAC. Windows wrote their gateways to the list
    // of persistent routes and, with the adapter, to Nsi: neither makes them routes.
    if let Some(seven) = read("win7-x86-vmware/SYSTEM") {
        let adapter = |guid: &str, name: &str, ip: &str, gateway: &str, dns: &str, slot: &str| {
            serde_json::json!({
                "guid": guid, "mac": null, "name": name, "dhcp": false,
                "addresses": [ip], "gateways": [gateway], "gateway_metrics": [null], "dns": [dns],
                "dns_suffix": null, "wins": [], "netbios": null, "mtu": null, "metric": null,
                "routes": [], "enabled": true,
                "device": format!("PCI\\VEN_8086&DEV_100F&SUBSYS_075015AD&REV_01\\4&B70F118&0&{slot}"),
            })
        };
        assert_eq!(
            seven,
            serde_json::json!({
                "adapters": [
                    adapter(
                        "{6aafc9a9-0542-4db2-8760-ccffa953737c}", "Local Area Connection",
                        "192.168.1.123/24", "192.168.1.1", "192.168.1.112", "0888",
                    ),
                    adapter(
                        "{698e50a9-4f58-4d86-b61d-f42e58dcacf6}", "Local Area Connection 2",
                        "10.3.58.5/24", "10.3.58.1", "10.3.58.4", "1888",
                    ),
                ],
                "routes": [],
            })
        );
    }
    // One 82574L on DHCP; the adapters of the debugger and of Bluetooth are no NICs.
    if let Some(ten) = read("win10-vmware/SYSTEM") {
        let nics = ten["adapters"].as_array().unwrap();
        assert_eq!(nics.len(), 1, "{nics:?}");
        assert_eq!(
            nics[0],
            serde_json::json!({
                "guid": "{5f3f359e-9d52-4566-9bec-37efdfb25abe}",
                "mac": "00:0c:29:f3:ff:de", "name": "Ethernet0", "dhcp": true,
                "addresses": [], "gateways": [], "gateway_metrics": [], "dns": [],
                "dns_suffix": null, "wins": [], "netbios": null, "mtu": null, "metric": null,
                "routes": [], "enabled": true,
                "device": "PCI\\VEN_8086&DEV_10D3&SUBSYS_07D015AD&REV_00\\000C29FFFFF3FFDE00",
            })
        );
        assert_eq!(ten["routes"], serde_json::json!([]));
    }
}

fn static_adapters() -> Vec<AdapterSpec> {
    let texts = |items: &[&str]| items.iter().map(ToString::to_string).collect();
    let full = AdapterSpec {
        guid: "{5F3F359E-9D52-4566-9BEC-37EFDFB25ABE}".into(),
        name: "LAN \u{fc}ber & alles".into(),
        mac: [0x00, 0x50, 0x56, 0xab, 0xcd, 0xef],
        ip: IpSpec::Static {
            addresses: vec![
                ("10.0.0.5".into(), "255.255.255.0".into()),
                ("10.0.0.6".into(), "255.255.255.255".into()),
                ("172.16.4.9".into(), "255.255.252.0".into()),
            ],
            gateways: texts(&["10.0.0.1", "192.0.2.1"]),
            dns: texts(&["10.0.0.2", "10.0.0.3", "10.0.0.4", "198.51.100.53"]),
        },
        more: MoreIp {
            gateway_metrics: vec![0, 20],
            ipv6: vec![
                ("2001:db8::5".parse().unwrap(), 64),
                ("fd00::7".parse().unwrap(), 48),
            ],
            gateways6: vec![
                ("fe80::1".parse().unwrap(), 0),
                ("2001:db8::1".parse().unwrap(), 30),
            ],
            dns6: vec!["2001:db8::53".parse().unwrap()],
            dns_suffix: "corp.example".into(),
            wins: texts(&["10.0.0.7", "10.0.0.8"]),
            netbios: 2,
            mtu: Some(1400),
            metric: Some(15),
            // Windows' entry for a gateway is no route.
            routes: texts(&[
                "10.9.0.0,255.255.0.0,10.0.0.254,7",
                "172.30.0.0,255.255.0.0,172.16.4.1,-1",
                "0.0.0.0,0.0.0.0,10.0.0.1,-1",
            ]),
            disabled: false,
        },
    };
    let dhcp = AdapterSpec {
        guid: "{6AAFC9A9-0542-4DB2-8760-CCFFA953737C}".into(),
        name: "Backup".into(),
        mac: [0x00, 0x0c, 0x29, 0x01, 0x02, 0x03],
        ip: IpSpec::Dhcp,
        more: MoreIp {
            disabled: true,
            ..MoreIp::default()
        },
    };
    let bare = AdapterSpec {
        guid: "{698E50A9-4F58-4D86-B61D-F42E58DCACF6}".into(),
        name: "Storage".into(),
        mac: [0x00, 0x0c, 0x29, 0xaa, 0xbb, 0xcc],
        ip: IpSpec::Static {
            addresses: vec![("192.168.7.2".into(), "255.255.255.252".into())],
            gateways: Vec::new(),
            dns: Vec::new(),
        },
        more: MoreIp::default(),
    };
    vec![full, dhcp, bare]
}

/// One to three adapters with every special case that broke other tools, in the registry layouts of
/// 7, 10 and 11. The reader returns exactly what was written.
#[test]
fn adapters_are_read_as_they_are() {
    let expected = [
        serde_json::json!({
            "guid": "{5f3f359e-9d52-4566-9bec-37efdfb25abe}",
            "mac": "00:50:56:ab:cd:ef", "name": "LAN \u{fc}ber & alles", "dhcp": false,
            "addresses": [
                "10.0.0.5/24", "10.0.0.6/32", "172.16.4.9/22", "2001:db8::5/64", "fd00::7/48",
            ],
            "gateways": ["10.0.0.1", "192.0.2.1", "fe80::1", "2001:db8::1"],
            "gateway_metrics": [null, 20, null, 30],
            "dns": ["10.0.0.2", "10.0.0.3", "10.0.0.4", "198.51.100.53", "2001:db8::53"],
            "dns_suffix": "corp.example", "wins": ["10.0.0.7", "10.0.0.8"], "netbios": 2,
            "mtu": 1400, "metric": 15, "routes": [], "enabled": true,
            "device": "PCI\\VEN_8086&DEV_10D3&SUBSYS_07D015AD&REV_00\\005056FFFFABCDEF00",
        }),
        serde_json::json!({
            "guid": "{6aafc9a9-0542-4db2-8760-ccffa953737c}",
            "mac": "00:0c:29:01:02:03", "name": "Backup", "dhcp": true,
            "addresses": [], "gateways": [], "gateway_metrics": [], "dns": [],
            "dns_suffix": null, "wins": [], "netbios": null, "mtu": null, "metric": null,
            "routes": [], "enabled": false,
            "device": "PCI\\VEN_8086&DEV_10D3&SUBSYS_07D015AD&REV_00\\000C29FFFF01020301",
        }),
        serde_json::json!({
            "guid": "{698e50a9-4f58-4d86-b61d-f42e58dcacf6}",
            "mac": "00:0c:29:aa:bb:cc", "name": "Storage", "dhcp": false,
            "addresses": ["192.168.7.2/30"], "gateways": [], "gateway_metrics": [], "dns": [],
            "dns_suffix": null, "wins": [], "netbios": null, "mtu": null, "metric": null,
            "routes": [], "enabled": true,
            "device": "PCI\\VEN_8086&DEV_10D3&SUBSYS_07D015AD&REV_00\\000C29FFFFAABBCC02",
        }),
    ];
    let routes = serde_json::json!([
        {"to": "10.9.0.0/16", "gateway": "10.0.0.254", "metric": 7},
        {"to": "172.30.0.0/16", "gateway": "172.16.4.1", "metric": null},
    ]);
    for version in [WinVersion::Win7, WinVersion::Win10, WinVersion::Win11] {
        for count in 1..=3 {
            let mut spec = GuestSpec::new(version);
            spec.adapters = static_adapters();
            spec.adapters.truncate(count);
            let network = survey_demo(&spec).inspection.network;
            let network = serde_json::to_value(&network).unwrap();
            let adapters = serde_json::json!(expected[..count]);
            assert_eq!(network["adapters"], adapters, "{version:?} {count}");
            assert_eq!(network["routes"], routes, "{version:?} {count}");
        }
    }
}
