//! Network adapters and their settings in Windows.
//!
//! Windows binds settings to the adapter's GUID, never to the MAC address. From there:
//! `Control\Class\{4d36e972-...}\NNNN` (`NetCfgInstanceId` is the GUID, `Characteristics` marks
//! hardware) -> `Control\Network\...\{GUID}\Connection` (name, device) -> `Services\Tcpip`,
//! `Tcpip6` and `NetBT` (`Parameters\Interfaces\{GUID}`, for NetBT `Tcpip_{GUID}`). The MAC address
//! is in `Control\NetworkSetup2` (10 and later). Older versions have it only as an override, or in
//! the instance id of PCIe adapters, which is their EUI-64. Static IPv6 addresses and gateways are
//! stored elsewhere, see [`super::nsi`].
//!
//! Whether a cable was plugged in is not on the disk, but in the description of the VM. Whether an
//! adapter is disabled in the device manager is on the disk (`ConfigFlags` of the device).

use std::net::{IpAddr, Ipv4Addr};

use crate::registry::HiveView;
use crate::registry::error::Result;
use crate::registry::hive::Key;
use crate::text::guest_text;
use crate::types::{ControlSet, KeyPath};

use super::model::{Adapter, Cidr, NetworkFacts, Route};
use super::nsi::{self, Luid, parse_hex};

const NET_CLASS: &str = "{4d36e972-e325-11ce-bfc1-08002be10318}";
const NCF_PHYSICAL: u32 = 4;
const CONFIGFLAG_DISABLED: u32 = 1;
/// `MAX_DEVICE_ID_LEN` of Windows.
const MAX_INSTANCE: usize = 200;
/// Valid MTUs. IPv4 requires at least 68 (RFC 791). Windows uses larger values for "the NIC's
/// maximum".
const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
/// A hive with more is damaged or hostile.
const MAX_ADAPTERS: usize = 256;
/// Metrics that a user can set; 0 means that Windows chooses.
const METRIC: std::ops::RangeInclusive<u32> = 1..=9999;
const MAX_ITEMS: usize = 64;

pub fn network(system: &HiveView<'_>, control_set: &ControlSet) -> Result<NetworkFacts> {
    let mut facts = NetworkFacts::default();
    let Some(set) = system.key(control_set)? else {
        return Ok(facts);
    };
    if let Some(class) = set.key(&KeyPath::new("Control\\Class").join(NET_CLASS))? {
        for key in class.keys()?.into_iter().take(MAX_ADAPTERS) {
            let Some(guid) = key.string("NetCfgInstanceId")?.and_then(|g| guid(&g)) else {
                continue;
            };
            if let Some(adapter) = adapter(&set, &key, guid)? {
                facts.adapters.push(adapter);
            }
        }
    }
    if let Some(routes) = set.key("Services\\Tcpip\\Parameters\\PersistentRoutes")? {
        let routes = routes.values()?.into_iter().take(MAX_ADAPTERS);
        let routes = routes.filter_map(|(name, _)| persistent_route(&name));
        // Windows also writes the gateways of adapters there.
        facts.routes = routes
            .filter(|r| {
                let own = |a: &Adapter| a.gateways.contains(&r.gateway);
                r.to.prefix != 0 || !facts.adapters.iter().any(own)
            })
            .collect();
    }
    Ok(facts)
}

/// Parses `destination,mask,gateway,metric`; the metric is -1 if Windows chooses.
fn persistent_route(text: &str) -> Option<Route> {
    let mut parts = text.split(',').map(str::trim);
    let to: Ipv4Addr = parts.next()?.parse().ok()?;
    let mask = parts.next()?.parse().ok()?;
    let gateway: Ipv4Addr = parts.next()?.parse().ok()?;
    let metric = parts.next().and_then(|m| m.parse().ok());
    Some(Route {
        to: Cidr {
            ip: to.into(),
            prefix: prefix_length(mask),
        },
        gateway: gateway.into(),
        metric: metric.filter(|m| METRIC.contains(m)),
    })
}

/// Reads an adapter that is hardware or has its own settings (a team, a virtual switch).
fn adapter(set: &Key<'_>, class: &Key<'_>, guid: String) -> Result<Option<Adapter>> {
    let connection = set.key(&format!(
        "Control\\Network\\{NET_CLASS}\\{guid}\\Connection"
    ))?;
    let (name, device) = match &connection {
        Some(key) => (key.string("Name")?, key.string("PnpInstanceId")?),
        None => (None, None),
    };
    let device = match device {
        Some(device) => Some(device),
        None => class.string("DeviceInstanceID")?,
    };
    let mut adapter = Adapter {
        mac: mac(set, class, &guid, device.as_deref())?,
        name: name.as_deref().and_then(guest_text),
        dhcp: true,
        enabled: enabled(set, device.as_deref())?,
        device: device.as_deref().and_then(guest_text),
        guid,
        ..Adapter::default()
    };
    if let Some(key) = interface(set, "Tcpip", &adapter.guid)? {
        ipv4(&key, &mut adapter)?;
    }
    if let Some(key) = interface(set, "Tcpip6", &adapter.guid)? {
        let servers = key.string("NameServer")?.unwrap_or_default();
        adapter.dns.extend(addresses(&servers));
    }
    let netbt = format!("Tcpip_{}", adapter.guid);
    if let Some(key) = interface(set, "NetBT", &netbt)? {
        let servers = key.multi("NameServerList")?.unwrap_or_default();
        let servers = addresses(&servers.join(" ")).into_iter();
        adapter.wins = servers
            .filter_map(|ip| match ip {
                IpAddr::V4(ip) => Some(ip),
                IpAddr::V6(_) => None,
            })
            .collect();
        let option = key.dword("NetbiosOptions")?;
        adapter.netbios = option.filter(|option| matches!(option, 1 | 2));
    }
    if let Some(luid) = Luid::of(class)? {
        adapter.addresses.extend(nsi::ipv6_addresses(set, luid)?);
        for route in nsi::routes(set, luid)? {
            let known = adapter.gateways.contains(&route.gateway);
            if route.to.prefix == 0 && route.gateway.is_ipv6() && !known {
                adapter.gateways.push(route.gateway);
                adapter.gateway_metrics.push(route.metric);
            } else if !(route.to.prefix == 0 && (known || adapter.dhcp)) {
                adapter.routes.push(route);
            }
        }
    }
    let physical = class.dword("Characteristics")?.unwrap_or(0) & NCF_PHYSICAL != 0;
    let configured = !adapter.addresses.is_empty() || !adapter.dns.is_empty();
    Ok((physical || configured).then_some(adapter))
}

fn ipv4(key: &Key<'_>, adapter: &mut Adapter) -> Result<()> {
    adapter.dhcp = key.dword("EnableDHCP")? != Some(0);
    // Windows keeps the last static address when DHCP is on, and 0.0.0.0 for none.
    if !adapter.dhcp {
        let ips = key.multi("IPAddress")?.unwrap_or_default();
        let masks = key.multi("SubnetMask")?.unwrap_or_default();
        for (ip, mask) in ips.iter().zip(&masks).take(MAX_ITEMS) {
            if let (Ok(ip), Ok(mask)) = (ip.trim().parse::<Ipv4Addr>(), mask.trim().parse())
                && !ip.is_unspecified()
            {
                adapter.addresses.push(Cidr {
                    ip: ip.into(),
                    prefix: prefix_length(mask),
                });
            }
        }
        let gateways = key.multi("DefaultGateway")?.unwrap_or_default();
        let metrics = key.multi("DefaultGatewayMetric")?.unwrap_or_default();
        for (i, gateway) in gateways.iter().enumerate().take(MAX_ITEMS) {
            if let Ok(gateway) = gateway.trim().parse::<Ipv4Addr>()
                && !gateway.is_unspecified()
            {
                let metric = metrics.get(i).and_then(|m| m.trim().parse().ok());
                adapter.gateways.push(gateway.into());
                let metric = metric.filter(|m| METRIC.contains(m));
                adapter.gateway_metrics.push(metric);
            }
        }
    }
    adapter.dns = addresses(&key.string("NameServer")?.unwrap_or_default());
    adapter.dns_suffix = key.string("Domain")?.as_deref().and_then(guest_text);
    adapter.mtu = key.dword("MTU")?.filter(|mtu| MTU.contains(mtu));
    let metric = key.dword("InterfaceMetric")?;
    adapter.metric = metric.filter(|m| METRIC.contains(m));
    Ok(())
}

fn enabled(set: &Key<'_>, device: Option<&str>) -> Result<bool> {
    let device = match device.filter(|d| d.len() <= MAX_INSTANCE) {
        Some(device) => set.key(&KeyPath::new("Enum").join(device))?,
        None => None,
    };
    let flags = match device {
        Some(device) => device.dword("ConfigFlags")?.unwrap_or(0),
        None => 0,
    };
    Ok(flags & CONFIGFLAG_DISABLED == 0)
}

fn interface<'h>(set: &Key<'h>, service: &str, guid: &str) -> Result<Option<Key<'h>>> {
    set.key(&format!(
        "Services\\{service}\\Parameters\\Interfaces\\{guid}"
    ))
}

/// Parses `{...}` to lower case; no other text may become part of a key path.
fn guid(text: &str) -> Option<String> {
    let inner = text.trim().strip_prefix('{')?.strip_suffix('}')?;
    let id = uuid::Uuid::try_parse(inner).ok()?;
    Some(format!("{{{id}}}"))
}

fn mac(set: &Key<'_>, class: &Key<'_>, guid: &str, device: Option<&str>) -> Result<Option<String>> {
    if let Some(kernel) = set.key(&format!(
        "Control\\NetworkSetup2\\Interfaces\\{guid}\\Kernel"
    ))? {
        for name in ["PermanentAddress", "CurrentAddress"] {
            if let Some(mac) = kernel.value(name)?.and_then(|v| format_mac(&v.data)) {
                return Ok(Some(mac));
            }
        }
    }
    for name in ["OriginalNetworkAddress", "NetworkAddress"] {
        if let Some(text) = class.string(name)?
            && let Some(mac) = parse_hex(&text).and_then(|b| format_mac(&b))
        {
            return Ok(Some(mac));
        }
    }
    Ok(device.and_then(mac_from_instance))
}

/// Extracts the MAC from `PCI\...\000C29FFFFF3FFDE00`: a PCIe adapter's serial number contains it.
fn mac_from_instance(device: &str) -> Option<String> {
    let instance = device.rsplit('\\').next()?;
    if instance.len() != 18 || !device.get(..4)?.eq_ignore_ascii_case("PCI\\") {
        return None;
    }
    let bytes = parse_hex(instance)?;
    match bytes.as_slice() {
        &[a, b, c, 0xff, 0xff | 0xfe, d, e, f, _] => format_mac(&[a, b, c, d, e, f]),
        _ => None,
    }
}

fn format_mac(bytes: &[u8]) -> Option<String> {
    let real = bytes.len() == 6 && bytes.iter().any(|b| *b != 0);
    real.then(|| {
        let parts: Vec<_> = bytes.iter().map(|b| format!("{b:02x}")).collect();
        parts.join(":")
    })
}

/// Parses a list as Windows writes it: separated by commas or spaces.
fn addresses(list: &str) -> Vec<IpAddr> {
    list.split([',', ' ', ';'])
        .filter_map(|item| item.trim().parse::<IpAddr>().ok())
        .filter(|ip| !ip.is_unspecified())
        .take(MAX_ITEMS)
        .collect()
}

fn prefix_length(mask: Ipv4Addr) -> u8 {
    u32::from(mask).leading_ones() as u8
}

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
