//! Determines which static network settings can be transferred, and to which adapter.
//!
//! Windows keeps settings with the adapter's GUID, and the VirtIO adapter is a new one. For
//! everybody else it is the same NIC because it has the same MAC address, so that connects the two.
//! If it cannot be determined safely, the new adapter stays on DHCP, and the reason is reported.
//!
//! An adapter whose settings were transferred is a ghost: Windows still lists it, hidden, and still
//! reserves its name and addresses. [`Ghost`]s are removed after the new adapter has everything.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Serialize;

use crate::inspect::model::{Adapter, Cidr, NetworkFacts, Route};
use crate::types::MacAddr;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Keep the addresses on the new NIC
    #[default]
    Preserve,
    /// Take addresses from DHCP
    Dhcp,
    /// Change nothing
    Leave,
}

/// The criterion by which the new adapter is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    Mac(MacAddr),
    /// One NIC before, one after: no MAC address is needed.
    Only,
}

/// The settings of one adapter, as typed values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub binding: Binding,
    /// The adapter that has the same addresses now.
    pub old_guid: uuid::fmt::Braced,
    pub ipv4: Vec<(Ipv4Addr, Ipv4Addr)>,
    pub gateways4: Vec<(Ipv4Addr, Option<u32>)>,
    pub ipv6: Vec<Cidr>,
    pub gateways6: Vec<(Ipv6Addr, Option<u32>)>,
    pub routes: Vec<Route>,
    pub dns4: Vec<Ipv4Addr>,
    pub dns6: Vec<Ipv6Addr>,
    pub suffix: Option<DnsName>,
    pub wins: Vec<Ipv4Addr>,
    pub netbios: Option<u32>,
    pub mtu: Option<u32>,
    pub metric: Option<u32>,
}

/// Letters, digits, `-`, `_` and dots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsName(String);

impl DnsName {
    pub fn new(name: &str) -> Option<Self> {
        let letters = name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        (letters && !name.is_empty() && !name.starts_with('-') && name.len() <= 253)
            .then(|| Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A Plug and Play device id, without any characters that cmd would interpret between quotes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceId(String);

impl DeviceId {
    /// Accepts only buses whose devices belong to a VM: a device on USB may come back.
    pub fn new(instance: &str) -> Option<Self> {
        let upper = instance.to_ascii_uppercase();
        let bus = ["PCI\\", "VMBUS\\", "XENVIF\\", "XEN\\"];
        let fits = instance
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"\\&_{}-.#".contains(&b));
        (fits && bus.iter().any(|b| upper.starts_with(b)) && instance.len() <= 200)
            .then(|| Self(instance.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An adapter of the old VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ghost {
    pub device: DeviceId,
    pub guid: uuid::fmt::Braced,
    /// The NIC that replaces it, and gets its name.
    pub successor: Option<Binding>,
    /// The index of the settings after which it is removed.
    pub after: Option<usize>,
}

/// The transferred settings, and notes for the user.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    pub settings: Vec<Settings>,
    pub ghosts: Vec<Ghost>,
    pub notes: Vec<String>,
}

/// Decides. `macs` are those of all NICs of the new VM; if empty, it gets those of the adapters.
pub fn decide(
    policy: Policy,
    facts: &NetworkFacts,
    macs: &[MacAddr],
    has_netkvm: bool,
) -> Decision {
    let mut decision = Decision::default();
    if policy == Policy::Leave {
        return decision;
    }
    let adapters: Vec<&Adapter> = facts
        .adapters
        .iter()
        .filter(|a| a.device.is_some())
        .collect();
    let mut routes = facts.routes.clone();
    for adapter in &adapters {
        let shown = adapter.name.as_deref().unwrap_or(&adapter.guid);
        let binding = bind(adapter, &adapters, macs);
        if !adapter.enabled {
            decision.notes.push(format!(
                "adapter {shown:?} is switched off in Windows: the NIC that takes its place is on"
            ));
        }
        let mut after = None;
        if policy == Policy::Preserve && is_static(adapter) {
            if !has_netkvm {
                decision.notes.push(format!(
                    "adapter {shown:?} has static settings, and the driver source has no netkvm for this Windows: set them again after the first boot"
                ));
                continue;
            }
            let binding = match &binding {
                Ok(binding) => *binding,
                Err(reason) => {
                    decision.notes.push(format!(
                        "adapter {shown:?} has static settings ({}) that cannot be tied to a new NIC: {reason}. It comes up with DHCP",
                        list(&adapter.addresses)
                    ));
                    continue;
                }
            };
            let Some(mut settings) = settings(adapter, binding) else {
                continue;
            };
            settings
                .routes
                .extend(routes.extract_if(.., |route| reaches(adapter, route.gateway)));
            if let (Some(suffix), None) = (&adapter.dns_suffix, &settings.suffix) {
                decision.notes.push(format!(
                    "adapter {shown:?}: its DNS suffix {suffix:?} is not a domain name and is left out"
                ));
            }
            after = Some(decision.settings.len());
            decision.settings.push(settings);
        }
        if has_netkvm
            && let Some(device) = adapter.device.as_deref().and_then(DeviceId::new)
            && let Some(guid) = guid(adapter)
        {
            decision.ghosts.push(Ghost {
                device,
                guid,
                successor: binding.ok(),
                after,
            });
        }
    }
    if policy == Policy::Preserve {
        let lost = routes.iter().map(|r| {
            format!(
                "the persistent route to {} by {} belongs to no static adapter: Windows keeps it, see that it still leads somewhere",
                r.to, r.gateway
            )
        });
        decision.notes.extend(lost);
    }
    decision
}

/// Whether there is any setting that DHCP would not provide.
fn is_static(adapter: &Adapter) -> bool {
    !adapter.addresses.is_empty()
        || !adapter.dns.is_empty()
        || !adapter.wins.is_empty()
        || !adapter.routes.is_empty()
        || adapter.gateways.iter().any(IpAddr::is_ipv6)
        || adapter.dns_suffix.is_some()
        || [adapter.netbios, adapter.mtu, adapter.metric]
            .iter()
            .any(Option::is_some)
}

/// Whether an address is in one of the adapter's subnets.
fn reaches(adapter: &Adapter, ip: IpAddr) -> bool {
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)) << 96,
        IpAddr::V6(ip) => u128::from(ip),
    };
    adapter.addresses.iter().any(|own| {
        let differ = bits(own.ip) ^ bits(ip);
        own.ip.is_ipv4() == ip.is_ipv4() && differ.leading_zeros() >= u32::from(own.prefix)
    })
}

fn bind(adapter: &Adapter, adapters: &[&Adapter], macs: &[MacAddr]) -> Result<Binding, String> {
    let mac_of = |a: &Adapter| a.mac.as_deref().and_then(|m| m.parse::<MacAddr>().ok());
    let Some(mac) = mac_of(adapter) else {
        return if adapters.len() == 1 && macs.len() <= 1 {
            Ok(Binding::Only)
        } else {
            Err("its MAC address is not recorded, and there are several NICs".into())
        };
    };
    if adapters
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
    if adapters.len() == 1 && macs.len() == 1 {
        return Ok(Binding::Only);
    }
    Err(format!("no NIC of the new VM has its MAC address {mac}"))
}

fn guid(adapter: &Adapter) -> Option<uuid::fmt::Braced> {
    let guid = uuid::Uuid::try_parse(adapter.guid.trim_matches(['{', '}']));
    guid.ok().map(uuid::Uuid::braced)
}

fn settings(adapter: &Adapter, binding: Binding) -> Option<Settings> {
    let mut settings = Settings {
        binding,
        old_guid: guid(adapter)?,
        ipv4: Vec::new(),
        gateways4: Vec::new(),
        ipv6: Vec::new(),
        gateways6: Vec::new(),
        routes: adapter.routes.clone(),
        dns4: Vec::new(),
        dns6: Vec::new(),
        suffix: adapter.dns_suffix.as_deref().and_then(DnsName::new),
        wins: adapter.wins.clone(),
        netbios: adapter.netbios,
        mtu: adapter.mtu,
        metric: adapter.metric,
    };
    for cidr in &adapter.addresses {
        match cidr.ip {
            IpAddr::V4(ip) => settings.ipv4.push((ip, mask(cidr.prefix))),
            IpAddr::V6(_) => settings.ipv6.push(*cidr),
        }
    }
    for (i, gateway) in adapter.gateways.iter().enumerate() {
        let metric = adapter.gateway_metrics.get(i).copied().flatten();
        match gateway {
            IpAddr::V4(ip) => settings.gateways4.push((*ip, metric)),
            IpAddr::V6(ip) => settings.gateways6.push((*ip, metric)),
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

pub(super) fn mask(prefix: u8) -> Ipv4Addr {
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
            enabled: true,
            device: Some("PCI\\X\\1".into()),
            ..Adapter::default()
        }
    }

    fn facts(adapters: Vec<Adapter>) -> NetworkFacts {
        NetworkFacts {
            adapters,
            routes: Vec::new(),
        }
    }

    #[test]
    fn what_ties_an_adapter_to_a_nic() {
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
            let decision = decide(Policy::Preserve, &facts(adapters.clone()), &macs, true);
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
        let mut facts = facts(vec![adapter(
            None,
            &[("10.0.0.5", 24), ("2001:db8::5", 64)],
        )]);
        let leave = decide(Policy::Leave, &facts, &[], true);
        assert_eq!(leave, Decision::default());
        let dhcp = decide(Policy::Dhcp, &facts, &[], true);
        assert!(dhcp.settings.is_empty() && dhcp.notes.is_empty());
        assert_eq!(dhcp.ghosts[0].after, None);
        let none = decide(Policy::Preserve, &facts, &[], false);
        assert!(none.settings.is_empty() && none.notes[0].contains("netkvm"));
        assert!(none.ghosts.is_empty(), "its values are all there is");
        let route = |to: &str, gateway: &str| Route {
            to: Cidr {
                ip: to.parse().unwrap(),
                prefix: 16,
            },
            gateway: gateway.parse().unwrap(),
            metric: None,
        };
        facts.routes = vec![
            route("10.9.0.0", "10.0.0.254"),
            route("10.8.0.0", "10.0.1.1"),
        ];
        let decision = decide(Policy::Preserve, &facts, &[], true);
        let settings = &decision.settings[0];
        assert_eq!(settings.ipv4[0].1, Ipv4Addr::new(255, 255, 255, 0));
        assert_eq!(settings.ipv6[0].to_string(), "2001:db8::5/64");
        assert_eq!(settings.routes, facts.routes[..1]);
        assert!(
            decision.notes[0].contains("10.8.0.0/16"),
            "{:?}",
            decision.notes
        );
        assert_eq!(decision.ghosts[0].after, Some(0));
    }

    /// Its values are the only record of its settings: it must stay.
    #[test]
    fn what_could_not_be_carried_over_stays() {
        let fixed: &[(&str, u8)] = &[("10.0.0.5", 24)];
        let adapters = vec![adapter(None, fixed), adapter(None, &[])];
        let decision = decide(Policy::Preserve, &facts(adapters), &[], true);
        assert_eq!(decision.notes.len(), 1);
        assert_eq!(decision.ghosts.len(), 1, "only the one on DHCP");
    }

    #[test]
    fn text_of_the_guest() {
        for (device, fits) in [
            (
                r"PCI\VEN_15AD&DEV_07B0&SUBSYS_07B015AD&REV_01\FF56500000A1B2C300",
                true,
            ),
            (
                r"VMBUS\{f8615163-df3e-46c5-913f-f2d2f965ed0e}\{7a2d1c40}",
                true,
            ),
            (r"USB\VID_0BDA&PID_8153\1", false),
            (r#"PCI\X" & calc & ""#, false),
            (r"PCI\%PATH%", false),
            (r"PCI\^X", false),
            (r"PCI\a b", false),
        ] {
            assert_eq!(DeviceId::new(device).is_some(), fits, "{device}");
        }
        for (name, fits) in [
            ("corp.example", true),
            ("", false),
            ("a b", false),
            ("a&b", false),
            ("a%b%", false),
            ("\u{fc}.example", false),
        ] {
            assert_eq!(DnsName::new(name).is_some(), fits, "{name}");
        }
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
