//! Which static network settings can be carried over, and to which adapter.
//!
//! Windows keeps settings with the adapter's GUID, and the VirtIO adapter is a new one. It is the same
//! card to everybody else because it has the same MAC address: that is what ties the two. Where
//! that cannot be told safely, the new adapter stays on DHCP, and the reason is told.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Serialize;

use crate::domain::MacAddr;
use crate::inspect::model::{Adapter, Cidr};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    #[default]
    Preserve,
    Dhcp,
    Leave,
}

/// How the new adapter is told from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    Mac(MacAddr),
    /// One card before, one after: no MAC address is needed.
    Only,
}

/// The settings of one adapter, as typed values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub binding: Binding,
    /// Adapters that hold the same addresses now.
    pub old_guids: Vec<uuid::fmt::Braced>,
    pub ipv4: Vec<(Ipv4Addr, Ipv4Addr)>,
    pub gateways4: Vec<Ipv4Addr>,
    pub ipv6: Vec<Cidr>,
    pub dns4: Vec<Ipv4Addr>,
    pub dns6: Vec<Ipv6Addr>,
}

/// What is carried over, and what a person must know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    pub settings: Vec<Settings>,
    pub notes: Vec<String>,
}

/// `macs`: of the new machine's cards when they are given; otherwise it gets those of the adapters.
pub fn decide(
    policy: Policy,
    adapters: &[Adapter],
    macs: &[MacAddr],
    has_netkvm: bool,
) -> Decision {
    let mut decision = Decision::default();
    if policy != Policy::Preserve {
        return decision;
    }
    let cards: Vec<&Adapter> = adapters.iter().filter(|a| a.device.is_some()).collect();
    for adapter in &cards {
        let fixed = (!adapter.dhcp && !adapter.addresses.is_empty())
            || !adapter.dns.is_empty()
            || adapter.addresses.iter().any(|a| a.ip.is_ipv6());
        if !fixed {
            continue;
        }
        let shown = adapter.name.as_deref().unwrap_or(&adapter.guid);
        if !has_netkvm {
            decision.notes.push(format!(
                "adapter {shown:?} has static settings, and the medium has no netkvm for this Windows: set them again after the first boot"
            ));
            continue;
        }
        match bind(adapter, &cards, macs) {
            Ok(binding) => decision.settings.extend(settings(adapter, binding)),
            Err(reason) => decision.notes.push(format!(
                "adapter {shown:?} has static settings ({}) that cannot be tied to a new card: {reason}. It comes up with DHCP",
                list(&adapter.addresses)
            )),
        }
        if adapter.addresses.iter().any(|a| a.ip.is_ipv6()) {
            decision.notes.push(format!(
                "adapter {shown:?}: its IPv6 addresses are carried over, a static IPv6 gateway is not; router advertisements bring one"
            ));
        }
    }
    decision
}

fn bind(adapter: &Adapter, cards: &[&Adapter], macs: &[MacAddr]) -> Result<Binding, String> {
    let mac_of = |a: &Adapter| a.mac.as_deref().and_then(|m| m.parse::<MacAddr>().ok());
    let Some(mac) = mac_of(adapter) else {
        return if cards.len() == 1 && macs.len() <= 1 {
            Ok(Binding::Only)
        } else {
            Err("its MAC address is not recorded, and there are several cards".into())
        };
    };
    if cards
        .iter()
        .filter(|other| mac_of(other) == Some(mac))
        .count()
        > 1
    {
        return Err(format!("several adapters have its MAC address {mac}"));
    }
    if macs.is_empty() || macs.contains(&mac) {
        return Ok(Binding::Mac(mac));
    }
    if cards.len() == 1 && macs.len() == 1 {
        return Ok(Binding::Only);
    }
    Err(format!(
        "no card of the new machine has its MAC address {mac}"
    ))
}

fn settings(adapter: &Adapter, binding: Binding) -> Option<Settings> {
    let guid = uuid::Uuid::try_parse(adapter.guid.trim_matches(['{', '}'])).ok()?;
    let mut settings = Settings {
        binding,
        old_guids: vec![guid.braced()],
        ipv4: Vec::new(),
        gateways4: Vec::new(),
        ipv6: Vec::new(),
        dns4: Vec::new(),
        dns6: Vec::new(),
    };
    for cidr in &adapter.addresses {
        match cidr.ip {
            IpAddr::V4(ip) => settings.ipv4.push((ip, mask(cidr.prefix))),
            IpAddr::V6(_) => settings.ipv6.push(*cidr),
        }
    }
    for gateway in &adapter.gateways {
        if let IpAddr::V4(ip) = gateway {
            settings.gateways4.push(*ip);
        }
    }
    for server in &adapter.dns {
        match server {
            IpAddr::V4(ip) => settings.dns4.push(*ip),
            IpAddr::V6(ip) => settings.dns6.push(*ip),
        }
    }
    Some(settings)
}

fn mask(prefix: u8) -> Ipv4Addr {
    let host = 32u32.saturating_sub(prefix.into());
    Ipv4Addr::from(u32::MAX.checked_shl(host).unwrap_or(0))
}

fn list(addresses: &[Cidr]) -> String {
    let texts: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(mac: Option<&str>, addresses: &[(&str, u8)]) -> Adapter {
        Adapter {
            guid: "{11111111-2222-3333-4444-555555555555}".into(),
            mac: mac.map(str::to_string),
            name: Some("LAN & \"more\" %PATH%".into()),
            dhcp: addresses.is_empty(),
            addresses: addresses
                .iter()
                .map(|(ip, prefix)| Cidr {
                    ip: ip.parse().unwrap(),
                    prefix: *prefix,
                })
                .collect(),
            gateways: Vec::new(),
            dns: Vec::new(),
            device: Some("PCI\\X\\1".into()),
        }
    }

    #[test]
    fn what_ties_an_adapter_to_a_card() {
        const A: &str = "00:0c:29:00:00:0a";
        const B: &str = "00:0c:29:00:00:0b";
        let fixed: &[(&str, u8)] = &[("10.0.0.5", 24)];
        type Case<'a> = (&'a [(Option<&'a str>, bool)], &'a [&'a str], &'a str);
        let cases: &[Case<'_>] = &[
            (&[(Some(A), true)], &[], "mac a"),
            (&[(Some(A), true)], &[A], "mac a"),
            (&[(Some(A), true)], &[B], "only"),
            (&[(Some(A), true)], &[B, B], "dhcp"),
            (&[(None, true)], &[], "only"),
            (&[(None, true), (Some(B), false)], &[], "dhcp"),
            (&[(Some(A), true), (Some(B), true)], &[A, B], "mac a, mac b"),
            (&[(Some(A), true), (Some(B), true)], &[A], "mac a, dhcp"),
            (&[(Some(A), true), (Some(A), false)], &[], "dhcp"),
            (&[(Some(A), false)], &[], ""),
        ];
        for (adapters, macs, expected) in cases {
            let adapters: Vec<_> = adapters
                .iter()
                .map(|(mac, is_fixed)| adapter(*mac, if *is_fixed { fixed } else { &[] }))
                .collect();
            let macs: Vec<MacAddr> = macs.iter().map(|m| m.parse().unwrap()).collect();
            let decision = decide(Policy::Preserve, &adapters, &macs, true);
            let mut found: Vec<&str> = decision
                .settings
                .iter()
                .map(|s| match s.binding {
                    Binding::Only => "only",
                    Binding::Mac(mac) if mac == A.parse().unwrap() => "mac a",
                    Binding::Mac(_) => "mac b",
                })
                .collect();
            found.extend(decision.notes.iter().map(|_| "dhcp"));
            assert_eq!(found.join(", "), *expected, "{adapters:?} {macs:?}");
        }
    }

    #[test]
    fn policies_and_missing_drivers() {
        let adapters = [adapter(None, &[("10.0.0.5", 24), ("2001:db8::5", 64)])];
        for policy in [Policy::Dhcp, Policy::Leave] {
            assert_eq!(decide(policy, &adapters, &[], true), Decision::default());
        }
        let decision = decide(Policy::Preserve, &adapters, &[], false);
        assert!(decision.settings.is_empty() && decision.notes[0].contains("netkvm"));
        let decision = decide(Policy::Preserve, &adapters, &[], true);
        assert_eq!(
            decision.settings[0].ipv4[0].1,
            Ipv4Addr::new(255, 255, 255, 0)
        );
        assert_eq!(decision.settings[0].ipv6[0].to_string(), "2001:db8::5/64");
        assert!(decision.notes[0].contains("IPv6"));
    }

    #[test]
    fn masks() {
        for (prefix, text) in [
            (0, "0.0.0.0"),
            (22, "255.255.252.0"),
            (32, "255.255.255.255"),
        ] {
            assert_eq!(mask(prefix).to_string(), text);
        }
    }
}
