//! Reads `Control\Nsi` of Windows Vista and later, the store of its network modules. It has
//! manually set IPv6 addresses, and the static routes of an adapter.
//!
//! A table is a key below the module's GUID, named after its number: 10 has addresses, 16 routes. A
//! record's key is the name of a value, in hexadecimal; its settings are the value's data, where ff
//! means "not set". Microsoft does not document it. The evidence:
//! - the records are those of the `Nsi*` calls, whose layout wine checks against Windows in its
//!   tests (`include/wine/nsi.h`, `dlls/nsi/tests`);
//! - the IPv4 tables of a real Windows 7 have the addresses, prefix lengths and gateways that
//!   `Services\Tcpip` names for the same adapters;
//! - Citrix's and Xen's PV drivers carry IPv6 addresses from one adapter to another by renaming
//!   such values; Microsoft's traces set IPv6 routes as object 16 of the IPv6 module.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::registry::error::Result;
use crate::registry::hive::Key;
use crate::types::KeyPath;

use super::model::{Cidr, Route};

const IPV4: &str = "{eb004a00-9b1a-11d4-9123-0050047759bc}";
const IPV6: &str = "{eb004a01-9b1a-11d4-9123-0050047759bc}";
const ADDRESSES: u32 = 10;
const ROUTES: u32 = 16;
/// A hive with more is damaged or hostile.
const MAX_RECORDS: usize = 1024;
/// Offset of the prefix length in an address record, and of the metric in a route record.
const PREFIX_AT: usize = 16;
const METRIC_AT: usize = 12;

/// The identifier of an adapter in the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Luid([u8; 8]);

impl Luid {
    /// Reads it from the class key of the adapter.
    pub fn of(class: &Key<'_>) -> Result<Option<Self>> {
        let (Some(index), Some(kind)) = (class.dword("NetLuidIndex")?, class.dword("*IfType")?)
        else {
            return Ok(None);
        };
        let (index, kind) = (index & 0x00ff_ffff, kind & 0xffff);
        let value = u64::from(index) << 24 | u64::from(kind) << 48;
        Ok(Some(Self(value.to_le_bytes())))
    }
}

/// Manually set IPv6 addresses.
pub fn ipv6_addresses(set: &Key<'_>, luid: Luid) -> Result<Vec<Cidr>> {
    let mut found = Vec::new();
    for (name, data) in records(set, IPV6, ADDRESSES)? {
        let (Some(owner), Some(ip)) = (name.get(..8), array::<16>(&name, 8)) else {
            continue;
        };
        let prefix = data.get(PREFIX_AT).copied().filter(|p| *p <= 128);
        if let (true, Some(prefix)) = (owner == luid.0, prefix) {
            found.push(Cidr {
                ip: Ipv6Addr::from(ip).into(),
                prefix,
            });
        }
    }
    Ok(found)
}

/// The adapter's static routes, including default routes, without those that have no next hop ("on
/// link").
pub fn routes(set: &Key<'_>, luid: Luid) -> Result<Vec<Route>> {
    let mut found = Vec::new();
    for (name, data) in records(set, IPV4, ROUTES)? {
        // unknown 4, prefix 4, its length 1, unknown 15, adapter 8, adapter 8, next hop 4, padding 4
        let fields = (array::<4>(&name, 4), name.get(8), array::<4>(&name, 40));
        if let (Some(to), Some(&prefix), Some(hop)) = fields
            && name.len() == 48
            && name.get(24..32) == Some(&luid.0)
            && prefix <= 32
            && hop != [0; 4]
        {
            found.push(route(
                Ipv4Addr::from(to).into(),
                prefix,
                Ipv4Addr::from(hop).into(),
                &data,
            ));
        }
    }
    for (name, data) in records(set, IPV6, ROUTES)? {
        // unknown 4, prefix 16, its length 1, unknown 19, adapter 8, adapter 8, next hop 16
        let fields = (array::<16>(&name, 4), name.get(20), array::<16>(&name, 56));
        if let (Some(to), Some(&prefix), Some(hop)) = fields
            && name.len() == 72
            && name.get(40..48) == Some(&luid.0)
            && prefix <= 128
            && hop != [0; 16]
        {
            found.push(route(
                Ipv6Addr::from(to).into(),
                prefix,
                Ipv6Addr::from(hop).into(),
                &data,
            ));
        }
    }
    Ok(found)
}

fn route(to: IpAddr, prefix: u8, gateway: IpAddr, data: &[u8]) -> Route {
    Route {
        to: Cidr { ip: to, prefix },
        gateway,
        metric: array::<4>(data, METRIC_AT)
            .map(u32::from_le_bytes)
            .filter(|m| (1..=9999).contains(m)),
    }
}

/// The records of a table: the decoded name of the value, and its data.
fn records(set: &Key<'_>, module: &str, table: u32) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let path = KeyPath::new("Control\\Nsi")
        .join(module)
        .join(&table.to_string());
    let Some(table) = set.key(&path)? else {
        return Ok(Vec::new());
    };
    let values = table.values()?.into_iter().take(MAX_RECORDS);
    Ok(values
        .filter_map(|(name, value)| Some((parse_hex(&name)?, value.data)))
        .collect())
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

pub(super) fn parse_hex(text: &str) -> Option<Vec<u8>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{HiveView, KeyTree, RegData};

    /// Records of a real Windows 7, and others that are truncated or belong to another adapter.
    #[test]
    fn tables() {
        let mut tree = KeyTree::new("ROOT");
        let mut record = |module: &str, table: u32, name: &str, set: &[(usize, u32)]| {
            let mut data = vec![0xff; 56];
            for (at, value) in set {
                data[*at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            let key = format!("CS\\Control\\Nsi\\{module}\\{table}");
            tree.set(&key, name, RegData::Binary(data));
        };
        let mine = "0000000600000600";
        let other = "0000000700000600";
        let zeros = |bytes: usize| "00".repeat(bytes);
        record(
            IPV4,
            ROUTES,
            &format!("{}{mine}{mine}c0a8010100000000", zeros(24)),
            &[],
        );
        record(
            IPV4,
            ROUTES,
            &format!(
                "000000000a090000{}{}{mine}{mine}c0a801fe00000000",
                "10",
                zeros(15)
            ),
            &[(METRIC_AT, 7)],
        );
        record(
            IPV4,
            ROUTES,
            &format!("{}{other}{other}c0a8010200000000", zeros(24)),
            &[],
        );
        record(IPV4, ROUTES, &format!("{}{mine}{mine}c0a8", zeros(24)), &[]);
        record(IPV4, ROUTES, "not hexadecimal", &[]);
        let gateway = "fe800000000000000000000000000001";
        record(
            IPV6,
            ROUTES,
            &format!("{}{mine}{mine}{gateway}", zeros(40)),
            &[(METRIC_AT, 0)],
        );
        let address = "20010db8000000000000000000000005";
        record(
            IPV6,
            ADDRESSES,
            &format!("{mine}{address}"),
            &[(PREFIX_AT, 64)],
        );
        record(
            IPV6,
            ADDRESSES,
            &format!("{other}{address}"),
            &[(PREFIX_AT, 64)],
        );
        record(IPV6, ADDRESSES, &format!("{mine}2001"), &[(PREFIX_AT, 64)]);
        let class = "CS\\Control\\Class\\0007";
        tree.dword(class, "NetLuidIndex", 6)
            .dword(class, "*IfType", 6);
        let bytes = tree.to_bytes("SYSTEM");
        let view = HiveView::new(&bytes).unwrap();
        let set = view.key("CS").unwrap().unwrap();
        let luid = Luid::of(&view.key(class).unwrap().unwrap())
            .unwrap()
            .unwrap();
        let mut shown: Vec<String> = routes(&set, luid)
            .unwrap()
            .iter()
            .map(|r| format!("{} {} {:?}", r.to, r.gateway, r.metric))
            .collect();
        shown.sort();
        assert_eq!(
            shown,
            [
                "0.0.0.0/0 192.168.1.1 None",
                "10.9.0.0/16 192.168.1.254 Some(7)",
                "::/0 fe80::1 None",
            ]
        );
        let addresses = ipv6_addresses(&set, luid).unwrap();
        let shown: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["2001:db8::5/64"]);
    }
}
