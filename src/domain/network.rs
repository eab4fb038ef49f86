//! `--network-map`: the target network for each network of the source.
//!
//! A source network may be mapped once for each kind of target. `convert` always writes libvirt's
//! domains, and may write other formats beside them. `net:` and `br:` are for libvirt and QEMU,
//! `nad:` for KubeVirt, `pve:` for Proxmox VE. `br:` is also for KubeVirt, as a bridge of the node.

use std::str::FromStr;

use super::model::{Attachment, Bridge, Nic, NicSource};

/// The right side of one mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MappedTo {
    Libvirt(String),
    Bridge(Bridge),
    Attachment(Attachment),
    Proxmox(Bridge),
    /// The link stays down on every target.
    None,
}

/// One `SOURCE=TARGET`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// The name of the network on the source host.
    pub network: String,
    pub target: MappedTo,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    #[error("{0:?} is not SOURCE=TARGET")]
    NoTarget(String),
    #[error(
        "{0:?} is no target of a network: net:NAME, br:NAME[@VLAN], nad:NAMESPACE/NAME, pve:BRIDGE[@VLAN], or none"
    )]
    Kind(String),
    #[error("{0:?} is not the name of a bridge: 1 to 15 characters without blanks and slashes")]
    Bridge(String),
    #[error("{0:?} is not a VLAN: 1 to 4094")]
    Vlan(String),
    #[error("{0:?} is not a name in Kubernetes: lower case letters, digits and `-`")]
    Kubernetes(String),
    #[error("{0:?} is not the name of a libvirt network")]
    Libvirt(String),
    #[error("the network {network:?} is mapped twice for the same kind of target")]
    Twice { network: String },
}

impl FromStr for Mapping {
    type Err = MapError;

    fn from_str(text: &str) -> Result<Self, MapError> {
        let (network, target) = text
            .rsplit_once('=')
            .filter(|(network, _)| !network.is_empty())
            .ok_or_else(|| MapError::NoTarget(text.to_owned()))?;
        let target = if target == "none" {
            MappedTo::None
        } else {
            match target.split_once(':') {
                Some(("net", name)) => MappedTo::Libvirt(libvirt_network(name)?),
                Some(("br", name)) => MappedTo::Bridge(bridge(name)?),
                Some(("pve", name)) => MappedTo::Proxmox(bridge(name)?),
                Some(("nad", name)) => MappedTo::Attachment(attachment(name)?),
                _ => return Err(MapError::Kind(target.to_owned())),
            }
        };
        Ok(Self {
            network: network.to_owned(),
            target,
        })
    }
}

fn libvirt_network(name: &str) -> Result<String, MapError> {
    let bad = name.is_empty() || name.contains('/') || name.chars().any(char::is_control);
    match bad {
        true => Err(MapError::Libvirt(name.to_owned())),
        false => Ok(name.to_owned()),
    }
}

/// Checks the kernel's rules for the name of an interface.
fn bridge(text: &str) -> Result<Bridge, MapError> {
    let (name, vlan) = match text.split_once('@') {
        Some((name, vlan)) => {
            let number = vlan.bytes().all(|b| b.is_ascii_digit());
            let number = number.then(|| vlan.parse().ok()).flatten();
            let in_range = number.filter(|v| (1..=4094).contains(v));
            let vlan = in_range.ok_or_else(|| MapError::Vlan(vlan.to_owned()))?;
            (name, Some(vlan))
        }
        None => (text, None),
    };
    let plain = |c: char| c.is_ascii_graphic() && !"/:,'\"\\$`;&|<>*?()[]{}!#~".contains(c);
    if name.is_empty() || name.len() > 15 || matches!(name, "." | "..") || !name.chars().all(plain)
    {
        return Err(MapError::Bridge(name.to_owned()));
    }
    Ok(Bridge {
        name: name.to_owned(),
        vlan,
    })
}

fn attachment(text: &str) -> Result<Attachment, MapError> {
    let (namespace, name) = text
        .split_once('/')
        .ok_or_else(|| MapError::Kind(format!("nad:{text}")))?;
    for (part, dots) in [(namespace, false), (name, true)] {
        if !kubernetes_name(part, dots) {
            return Err(MapError::Kubernetes(part.to_owned()));
        }
    }
    Ok(Attachment {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

/// Checks a label of RFC 1123, or several separated by dots.
pub fn kubernetes_name(text: &str, dots: bool) -> bool {
    let label = |label: &str| {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(plain)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    match dots {
        true => text.len() <= 253 && text.split('.').all(label),
        false => label(text),
    }
}

/// All mappings of a command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkMap(Vec<Mapping>);

impl NetworkMap {
    pub fn new(mappings: Vec<Mapping>) -> Result<Self, MapError> {
        for (n, mapping) in mappings.iter().enumerate() {
            let same = |other: &&Mapping| {
                other.network == mapping.network
                    && (excludes(&mapping.target, &other.target)
                        || excludes(&other.target, &mapping.target))
            };
            if mappings[..n].iter().any(|other| same(&other)) {
                return Err(MapError::Twice {
                    network: mapping.network.clone(),
                });
            }
        }
        Ok(Self(mappings))
    }

    /// Attaches a NIC to the targets that are mapped for its source network.
    pub fn apply(&self, nic: &mut Nic) {
        let Some(network) = &nic.network else {
            return;
        };
        for mapping in self.0.iter().filter(|m| m.network == *network) {
            match &mapping.target {
                MappedTo::Libvirt(name) => nic.source = NicSource::Network(name.clone()),
                MappedTo::Bridge(bridge) => nic.source = NicSource::Bridge(bridge.clone()),
                MappedTo::Attachment(attachment) => nic.attachment = Some(attachment.clone()),
                MappedTo::Proxmox(bridge) => nic.proxmox = Some(bridge.clone()),
                MappedTo::None => nic.link_up = false,
            }
        }
    }

    pub fn maps(&self, network: &str) -> bool {
        self.0.iter().any(|m| m.network == network)
    }

    /// The mappings of networks without a NIC.
    pub fn unused<'a>(&'a self, networks: &[&str]) -> Vec<&'a str> {
        let mut unused: Vec<&str> = self
            .0
            .iter()
            .map(|m| m.network.as_str())
            .filter(|network| !networks.contains(network))
            .collect();
        unused.dedup();
        unused
    }
}

/// Whether two targets are for the same writer. `none` excludes every other target.
fn excludes(one: &MappedTo, other: &MappedTo) -> bool {
    use MappedTo::{Attachment, Bridge, Libvirt, None, Proxmox};
    match one {
        None => true,
        Libvirt(_) | Bridge(_) => matches!(other, Libvirt(_) | Bridge(_)),
        Attachment(_) => matches!(other, Attachment(_)),
        Proxmox(_) => matches!(other, Proxmox(_)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str) -> Result<MappedTo, MapError> {
        text.parse::<Mapping>().map(|m| m.target)
    }

    #[test]
    fn mappings_are_read() {
        let bridge = |name: &str, vlan| Bridge {
            name: name.into(),
            vlan,
        };
        let attachment = Attachment {
            namespace: "prod".into(),
            name: "vlan20.net".into(),
        };
        for (text, want) in [
            (
                "VM Network=net:default",
                MappedTo::Libvirt("default".into()),
            ),
            ("a=br:br0", MappedTo::Bridge(bridge("br0", None))),
            ("a=br:br0@20", MappedTo::Bridge(bridge("br0", Some(20)))),
            (
                "a=pve:vmbr1@4094",
                MappedTo::Proxmox(bridge("vmbr1", Some(4094))),
            ),
            ("a=nad:prod/vlan20.net", MappedTo::Attachment(attachment)),
            ("a=none", MappedTo::None),
        ] {
            assert_eq!(target(text), Ok(want), "{text}");
        }
        // The name of a network may contain a `=`.
        let mapping: Mapping = "dv=PG 7=net:x".parse().unwrap();
        assert_eq!(mapping.network, "dv=PG 7");
    }

    #[test]
    fn what_is_no_mapping_is_refused() {
        for text in [
            "",
            "a",
            "=net:x",
            "a=",
            "a=x",
            "a=vlan:3",
            "a=net:",
            "a=net:a/b",
            "a=br:",
            "a=br:br0@0",
            "a=br:br0@4095",
            "a=br:br0@+7",
            "a=br:br0@",
            "a=br:averylongbridgename",
            "a=br:a b",
            "a=pve:$(id)",
            "a=pve:a,firewall=0",
            "a=nad:x",
            "a=nad:X/y",
            "a=nad:/y",
            "a=nad:x/-y",
        ] {
            assert!(target(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_network_is_mapped_once_for_each_kind_of_target() {
        let map = |list: &[&str]| {
            NetworkMap::new(list.iter().map(|text| text.parse().unwrap()).collect())
        };
        assert!(map(&["a=net:x", "a=nad:y/z", "a=pve:vmbr0", "b=net:x"]).is_ok());
        for twice in [
            ["a=net:x", "a=br:br0"],
            ["a=pve:vmbr0", "a=pve:vmbr1"],
            ["a=none", "a=net:x"],
            ["a=nad:y/z", "a=none"],
        ] {
            assert!(map(&twice).is_err(), "{twice:?}");
        }
        let map = map(&["a=net:x", "a=pve:vmbr0", "b=none"]).unwrap();
        assert_eq!(map.unused(&["b"]), ["a"]);
        assert!(map.maps("a") && !map.maps("c"));
    }

    #[test]
    fn what_is_wrong_with_a_mapping_is_said() {
        for (text, message) in [
            ("a", "\"a\" is not SOURCE=TARGET"),
            (
                "a=x",
                "\"x\" is no target of a network: net:NAME, br:NAME[@VLAN], nad:NAMESPACE/NAME, pve:BRIDGE[@VLAN], or none",
            ),
            (
                "a=nad:x",
                "\"nad:x\" is no target of a network: net:NAME, br:NAME[@VLAN], nad:NAMESPACE/NAME, pve:BRIDGE[@VLAN], or none",
            ),
            (
                "a=br:sixteen-letters-",
                "\"sixteen-letters-\" is not the name of a bridge: 1 to 15 characters without blanks and slashes",
            ),
            ("a=br:b@4095", "\"4095\" is not a VLAN: 1 to 4094"),
            (
                "a=nad:A/b",
                "\"A\" is not a name in Kubernetes: lower case letters, digits and `-`",
            ),
            (
                "a=nad:a.b/c",
                "\"a.b\" is not a name in Kubernetes: lower case letters, digits and `-`",
            ),
            ("a=net:", "\"\" is not the name of a libvirt network"),
        ] {
            assert_eq!(target(text).unwrap_err().to_string(), message, "{text}");
        }
        let twice = ["a=net:x", "a=net:y"].map(|text| text.parse().unwrap());
        let error = NetworkMap::new(twice.to_vec()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the network \"a\" is mapped twice for the same kind of target"
        );
        for name in [".", "..", "a/b", "a:b", "a;b", "a'b", "ü"] {
            assert!(bridge(name).is_err(), "{name}");
        }
        for (name, vlan) in [("fifteen-letters", None), ("a_b.c-1@1", Some(1))] {
            assert_eq!(bridge(name).unwrap().vlan, vlan, "{name}");
        }
    }

    /// Each kind of target changes its own part of the NIC, of NICs on that network only.
    #[test]
    fn a_mapping_is_applied_to_the_nics_of_its_network() {
        let map: Vec<Mapping> = [
            "a=br:br0@7",
            "a=nad:n/x",
            "a=pve:vmbr1",
            "b=net:lan",
            "c=none",
        ]
        .iter()
        .map(|text| text.parse().unwrap())
        .collect();
        let map = NetworkMap::new(map).unwrap();
        let nic = |network: Option<&str>| {
            let mut nic = Nic::new("52:54:00:00:00:01".parse().unwrap(), NicSource::User);
            nic.network = network.map(str::to_owned);
            nic
        };
        let bridge = |name: &str, vlan| Bridge {
            name: name.into(),
            vlan,
        };
        let a = Nic {
            source: NicSource::Bridge(bridge("br0", Some(7))),
            attachment: Some(Attachment {
                namespace: "n".into(),
                name: "x".into(),
            }),
            proxmox: Some(bridge("vmbr1", None)),
            ..nic(Some("a"))
        };
        let b = Nic {
            source: NicSource::Network("lan".into()),
            ..nic(Some("b"))
        };
        let c = Nic {
            link_up: false,
            ..nic(Some("c"))
        };
        for expected in [a, b, c, nic(Some("d")), nic(None)] {
            let mut found = nic(expected.network.as_deref());
            map.apply(&mut found);
            assert_eq!(found, expected);
        }
        assert_eq!(map.unused(&["b"]), ["a", "c"]);
        assert_eq!(map.unused(&["a", "b", "c"]), [""; 0]);
    }
}
