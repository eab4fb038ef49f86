//! The network adapters of a guest and their settings in Windows.

use super::driver_database::NET;
use super::{AdapterSpec, GuestSpec, IpSpec, services};
use crate::registry::KeyTree;
use crate::registry::RegData;
use crate::text::hex;

/// The instance path of an adapter below `Enum`.
fn adapter_instance(spec: &GuestSpec, n: usize, adapter: &AdapterSpec) -> String {
    let m = adapter.mac;
    match services::net_service(spec) {
        Some("netvsc") => format!(
            "VMBUS\\{{f8615163-df3e-46c5-913f-f2d2f965ed0e}}\\{{7a2d1c40-8b5e-4c8e-9d1f-00155d00000{n}}}"
        ),
        // The serial number of the PCIe device, derived from its MAC address.
        _ => format!(
            "PCI\\VEN_8086&DEV_10D3&SUBSYS_07D015AD&REV_00\\{:02X}{:02X}{:02X}FFFF{:02X}{:02X}{:02X}0{n}",
            m[0], m[1], m[2], m[3], m[4], m[5]
        ),
    }
}

/// Writes the adapters below a control set.
pub(super) fn write(spec: &GuestSpec, set: &mut KeyTree) {
    let parameters = "Services\\Tcpip\\Parameters";
    set.sz(parameters, "Hostname", &spec.hostname);
    set.sz(parameters, "NV Hostname", &spec.hostname);
    set.sz(parameters, "Domain", "")
        .sz(parameters, "NameServer", "");
    set.key_mut(&format!("{parameters}\\PersistentRoutes"));
    set.dword("Services\\Tcpip", "Start", 0)
        .dword("Services\\Tcpip", "Type", 1);

    for (n, adapter) in spec.adapters.iter().enumerate() {
        let lower = adapter.guid.to_lowercase();
        let (instance, description) = match services::net_service(spec) {
            Some("netvsc") => (
                adapter_instance(spec, n, adapter),
                "Microsoft Hyper-V Network Adapter",
            ),
            _ => (
                adapter_instance(spec, n, adapter),
                "Intel(R) 82574L Gigabit Network Connection",
            ),
        };
        let interface = format!("{parameters}\\Interfaces\\{lower}");
        interface_settings(set, &interface, &adapter.ip);
        more_settings(set, n, adapter);

        let class = format!("Control\\Class\\{}\\{n:04}", NET.braced());
        set.dword(&class, "*IfType", 6)
            .dword(&class, "*MediaType", 0);
        set.dword(&class, "NetLuidIndex", 0x8001 + n as u32);
        set.dword(&class, "Characteristics", 0x84);
        set.sz(&class, "DriverDesc", description);
        set.sz(&class, "DeviceInstanceID", &instance);
        set.sz(&class, "NetCfgInstanceId", &adapter.guid);
        set.sz(&class, "ProviderName", "Microsoft");

        let connection = format!(
            "Control\\Network\\{}\\{}\\Connection",
            NET.braced().to_string().to_uppercase(),
            adapter.guid
        );
        set.sz(&connection, "Name", &adapter.name);
        set.sz(&connection, "PnPInstanceId", &instance);

        if spec.version.nt_at_least(10, 0) {
            let kernel = format!(
                "Control\\NetworkSetup2\\Interfaces\\{}\\Kernel",
                adapter.guid
            );
            let mac = RegData::Binary(adapter.mac.to_vec());
            set.set(&kernel, "CurrentAddress", mac.clone());
            set.set(&kernel, "PermanentAddress", mac);
            set.sz(&kernel, "IfAlias", &adapter.name);
            set.sz(&kernel, "IfDescr", description);
            set.dword(&kernel, "IfType", 6);
        }

        let device = format!("Enum\\{instance}");
        set.sz(&device, "ClassGUID", &NET.braced().to_string());
        set.sz(&device, "DeviceDesc", description);
        set.sz(&device, "FriendlyName", description);
        set.sz(&device, "Driver", &format!("{}\\{n:04}", NET.braced()));
        set.sz(
            &device,
            "Service",
            services::net_service(spec).unwrap_or_default(),
        );
        set.dword(&device, "ConfigFlags", u32::from(adapter.more.disabled));
    }
}

/// The identifier of an adapter in the tables of `Control\\Nsi`.
fn luid(n: usize) -> String {
    let value = 6u64 << 48 | (0x8001 + n as u64) << 24;
    hex(&value.to_le_bytes())
}

fn more_settings(set: &mut KeyTree, n: usize, adapter: &AdapterSpec) {
    let (more, guid) = (&adapter.more, adapter.guid.to_lowercase());
    let parameters = |service: &str| format!("Services\\{service}\\Parameters");
    let interface = format!("{}\\Interfaces\\{guid}", parameters("Tcpip"));
    if let IpSpec::Static { gateways, .. } = &adapter.ip {
        let metric = |i| more.gateway_metrics.get(i).copied().unwrap_or(0);
        let metrics = (0..gateways.len()).map(|i| metric(i).to_string()).collect();
        set.set(
            &interface,
            "DefaultGatewayMetric",
            RegData::MultiSz(metrics),
        );
    }
    set.sz(&interface, "Domain", &more.dns_suffix);
    for (name, value) in [("MTU", more.mtu), ("InterfaceMetric", more.metric)] {
        if let Some(value) = value {
            set.dword(&interface, name, value);
        }
    }
    let netbt = format!("{}\\Interfaces\\Tcpip_{guid}", parameters("NetBT"));
    set.set(
        &netbt,
        "NameServerList",
        RegData::MultiSz(more.wins.clone()),
    );
    set.dword(&netbt, "NetbiosOptions", more.netbios);
    let dns6: Vec<_> = more.dns6.iter().map(ToString::to_string).collect();
    let interface6 = format!("{}\\Interfaces\\{guid}", parameters("Tcpip6"));
    set.dword(&interface6, "EnableDHCP", 1);
    set.sz(&interface6, "NameServer", &dns6.join(","));
    let routes = format!("{}\\PersistentRoutes", parameters("Tcpip"));
    for route in &more.routes {
        set.sz(&routes, route, "");
    }
    let module = "Control\\Nsi\\{eb004a01-9b1a-11d4-9123-0050047759bc}";
    for (address, prefix) in &more.ipv6 {
        let mut record = vec![0xff; 48];
        record[16..20].copy_from_slice(&u32::from(*prefix).to_le_bytes());
        let name = luid(n) + &hex(&address.octets());
        set.set(&format!("{module}\\10"), &name, RegData::Binary(record));
    }
    for (gateway, metric) in &more.gateways6 {
        let mut record = vec![0xff; 56];
        if *metric != 0 {
            record[12..16].copy_from_slice(&metric.to_le_bytes());
        }
        let name = format!("{:080}{1}{1}{2}", 0, luid(n), hex(&gateway.octets()));
        set.set(&format!("{module}\\16"), &name, RegData::Binary(record));
    }
}

fn interface_settings(set: &mut KeyTree, key: &str, ip: &IpSpec) {
    set.sz(key, "Domain", "");
    match ip {
        IpSpec::Dhcp => {
            set.dword(key, "EnableDHCP", 1).sz(key, "NameServer", "");
            set.sz(key, "DhcpIPAddress", "192.0.2.128");
            set.sz(key, "DhcpSubnetMask", "255.255.255.0");
            set.sz(key, "DhcpServer", "192.0.2.254");
            set.sz(key, "DhcpNameServer", "192.0.2.2");
            let gateways = RegData::MultiSz(vec!["192.0.2.2".into()]);
            set.set(key, "DhcpDefaultGateway", gateways);
        }
        IpSpec::Static {
            addresses,
            gateways,
            dns,
        } => {
            let (address, mask) = addresses.iter().cloned().unzip();
            set.dword(key, "EnableDHCP", 0);
            set.set(key, "IPAddress", RegData::MultiSz(address));
            set.set(key, "SubnetMask", RegData::MultiSz(mask));
            set.set(key, "DefaultGateway", RegData::MultiSz(gateways.clone()));
            set.sz(key, "NameServer", &dns.join(","));
        }
    }
}
