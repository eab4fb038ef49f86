//! Network adapters and the settings Windows keeps for them.
//!
//! Windows binds settings to the adapter's GUID, never to the MAC address. From there:
//! `Control\Class\{4d36e972-...}\NNNN` (`NetCfgInstanceId` is the GUID, `Characteristics` says what is
//! hardware) -> `Control\Network\...\{GUID}\Connection` (name, device) -> `Services\Tcpip` and `Tcpip6`
//! (`Parameters\Interfaces\{GUID}`). The MAC address is in `Control\NetworkSetup2` (10 and later);
//! before, only as an override, or in the instance id of PCIe adapters, which is their EUI-64.
//!
//! Static IPv6 addresses are not beside the IPv4 ones but in `Control\Nsi`, keyed by LUID; the layout
//! was read off the IPv4 table of a real hive, whose records have the same form.
//! Gateways of IPv6 are not read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::registry::HiveView;
use crate::registry::hive::{Key, Result};
use crate::text::guest_text;

use super::model::{Adapter, Cidr, NetworkFacts};

const NET_CLASS: &str = "{4d36e972-e325-11ce-bfc1-08002be10318}";
/// The IPv6 network provider.
const NSI_IPV6: &str = "{eb004a01-9b1a-11d4-9123-0050047759bc}";
const NCF_PHYSICAL: u32 = 4;
/// More is a damaged or hostile hive.
const MAX_ADAPTERS: usize = 256;
const MAX_ITEMS: usize = 64;

pub fn network(system: &HiveView<'_>, control_set: &str) -> Result<NetworkFacts> {
    let mut facts = NetworkFacts::default();
    let Some(set) = system.key(control_set)? else {
        return Ok(facts);
    };
    if let Some(class) = set.key(&format!("Control\\Class\\{NET_CLASS}"))? {
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
        let names = routes.values()?.into_iter().map(|(name, _)| name);
        facts.persistent_routes = names
            .filter_map(|n| guest_text(&n))
            .take(MAX_ITEMS)
            .collect();
    }
    Ok(facts)
}

/// Hardware, or anything that has settings of its own (a team, a virtual switch).
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
        addresses: Vec::new(),
        gateways: Vec::new(),
        dns: Vec::new(),
        device: device.as_deref().and_then(guest_text),
        guid,
    };
    if let Some(key) = interface(set, "Tcpip", &adapter.guid)? {
        adapter.dhcp = key.dword("EnableDHCP")? != Some(0);
        let ips = key.multi("IPAddress")?.unwrap_or_default();
        let masks = key.multi("SubnetMask")?.unwrap_or_default();
        for (ip, mask) in ips.iter().zip(&masks).take(MAX_ITEMS) {
            // Windows keeps the last static address when DHCP is on, and 0.0.0.0 for none.
            match (ip.trim().parse::<Ipv4Addr>(), mask.trim().parse()) {
                (Ok(ip), Ok(mask)) if !ip.is_unspecified() && !adapter.dhcp => {
                    adapter.addresses.push(Cidr {
                        ip: ip.into(),
                        prefix: prefix_length(mask),
                    });
                }
                _ => {}
            }
        }
        if !adapter.dhcp {
            let gateways = key.multi("DefaultGateway")?.unwrap_or_default();
            adapter.gateways = addresses(&gateways.join(" "));
        }
        adapter.dns = addresses(&key.string("NameServer")?.unwrap_or_default());
    }
    if let Some(key) = interface(set, "Tcpip6", &adapter.guid)? {
        let servers = key.string("NameServer")?.unwrap_or_default();
        adapter.dns.extend(addresses(&servers));
    }
    adapter.addresses.extend(ipv6_addresses(set, class)?);
    let physical = class.dword("Characteristics")?.unwrap_or(0) & NCF_PHYSICAL != 0;
    let configured = !adapter.addresses.is_empty() || !adapter.dns.is_empty();
    Ok((physical || configured).then_some(adapter))
}

fn interface<'h>(set: &Key<'h>, service: &str, guid: &str) -> Result<Option<Key<'h>>> {
    set.key(&format!(
        "Services\\{service}\\Parameters\\Interfaces\\{guid}"
    ))
}

/// `{...}` in lower case; nothing else may become part of a key path.
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

/// `PCI\...\000C29FFFFF3FFDE00`: the device serial number of a PCIe adapter, made from its MAC.
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

fn parse_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|b| !matches!(b, b'-' | b':'))
        .map(|b| char::from(b).to_digit(16).map(|d| d as u8))
        .collect::<Option<_>>()?;
    digits
        .len()
        .is_multiple_of(2)
        .then(|| digits.chunks(2).map(|d| d[0] << 4 | d[1]).collect())
}

fn format_mac(bytes: &[u8]) -> Option<String> {
    let real = bytes.len() == 6 && bytes.iter().any(|b| *b != 0);
    real.then(|| {
        let parts: Vec<_> = bytes.iter().map(|b| format!("{b:02x}")).collect();
        parts.join(":")
    })
}

/// A list as Windows writes it: separated by commas or spaces.
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

/// Manually set IPv6 addresses: values named `<LUID><address>` in hexadecimal, the prefix length at
/// byte 16 of the record.
fn ipv6_addresses(set: &Key<'_>, class: &Key<'_>) -> Result<Vec<Cidr>> {
    let mut found = Vec::new();
    let (Some(index), Some(kind)) = (class.dword("NetLuidIndex")?, class.dword("*IfType")?) else {
        return Ok(found);
    };
    let luid =
        (u64::from(index & 0x00ff_ffff) << 24 | u64::from(kind & 0xffff) << 48).to_le_bytes();
    let Some(table) = set.key(&format!("Control\\Nsi\\{NSI_IPV6}\\10"))? else {
        return Ok(found);
    };
    for (name, value) in table.values()?.into_iter().take(MAX_ADAPTERS) {
        let Some(key) = parse_hex(&name) else {
            continue;
        };
        let (Some(owner), Some(ip)) = (key.get(..8), key.get(8..24)) else {
            continue;
        };
        let prefix = value.data.get(16).copied().filter(|p| *p <= 128);
        if let (true, Ok(ip), Some(prefix)) = (owner == luid, <[u8; 16]>::try_from(ip), prefix) {
            found.push(Cidr {
                ip: Ipv6Addr::from(ip).into(),
                prefix,
            });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{KeyTree, RegData};

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

    /// Three DNS servers, two addresses, a gateway outside the subnet, IPv6, an adapter without MAC.
    #[test]
    fn everything_that_broke_others() {
        let guid = "{11111111-2222-3333-4444-555555555555}";
        let mut tree = KeyTree::new("ROOT");
        let class = format!("ControlSet001\\Control\\Class\\{NET_CLASS}\\0007");
        let multi =
            |items: &[&str]| RegData::MultiSz(items.iter().map(ToString::to_string).collect());
        tree.sz(&class, "NetCfgInstanceId", &guid.to_uppercase())
            .sz(&class, "NetworkAddress", "00-50-56-AB-CD-EF")
            .dword(&class, "Characteristics", 0x84)
            .dword(&class, "NetLuidIndex", 7)
            .dword(&class, "*IfType", 6);
        let ip = format!("ControlSet001\\Services\\Tcpip\\Parameters\\Interfaces\\{guid}");
        tree.dword(&ip, "EnableDHCP", 0)
            .set(&ip, "IPAddress", multi(&["10.0.0.5", "10.0.0.6"]))
            .set(
                &ip,
                "SubnetMask",
                multi(&["255.255.255.0", "255.255.255.255"]),
            )
            .set(&ip, "DefaultGateway", multi(&["192.0.2.1"]))
            .sz(&ip, "NameServer", "10.0.0.1,10.0.0.2,10.0.0.3");
        let ip6 = format!("ControlSet001\\Services\\Tcpip6\\Parameters\\Interfaces\\{guid}");
        tree.sz(&ip6, "NameServer", "2001:db8::53");
        let mut record = vec![0xff; 48];
        record[16] = 64;
        tree.set(
            &format!("ControlSet001\\Control\\Nsi\\{NSI_IPV6}\\10"),
            "000000070000060020010db8000000000000000000000005",
            RegData::Binary(record),
        );
        tree.set(
            "ControlSet001\\Services\\Tcpip\\Parameters\\PersistentRoutes",
            "10.9.0.0,255.255.0.0,10.0.0.254,1",
            RegData::Sz(String::new()),
        );
        let bytes = tree.to_bytes("SYSTEM");
        let facts = network(&HiveView::new(&bytes).unwrap(), "ControlSet001").unwrap();
        assert_eq!(
            serde_json::to_value(&facts).unwrap(),
            serde_json::json!({
                "adapters": [{
                    "guid": guid, "mac": "00:50:56:ab:cd:ef", "name": null, "dhcp": false,
                    "addresses": ["10.0.0.5/24", "10.0.0.6/32", "2001:db8::5/64"],
                    "gateways": ["192.0.2.1"],
                    "dns": ["10.0.0.1", "10.0.0.2", "10.0.0.3", "2001:db8::53"],
                    "device": null,
                }],
                "persistent_routes": ["10.9.0.0,255.255.0.0,10.0.0.254,1"],
            })
        );
    }
}
