//! Fixed PCI addresses.
//!
//! Windows identifies a PCI device by its address. A NIC or controller that moves between the two
//! stages is a new device to it. That means a second adapter without the static IP, or a storage
//! driver that is not bound yet. So the address of a device depends on the VM alone, never on the
//! stage. The first-boot probe has the address of the later boot disk.
//!
//! On q35 each device has its own PCIe root port (bus 1 upwards), and a few spare ports are left
//! for hot-plug. On i440fx devices are in slots 3 upwards of bus 0. Before them come the host
//! bridge (0), the PIIX3 (1) and the display adapter (2).

use super::element::Element;
use super::model::Chipset;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress {
    pub bus: u8,
    pub slot: u8,
    pub function: u8,
}

impl PciAddress {
    pub const fn new(bus: u8, slot: u8, function: u8) -> Self {
        Self {
            bus,
            slot,
            function,
        }
    }

    pub fn element(self) -> Element {
        Element::new("address")
            .with("type", "pci")
            .with("domain", "0x0000")
            .with("bus", format!("0x{:02x}", self.bus))
            .with("slot", format!("0x{:02x}", self.slot))
            .with("function", format!("0x{:x}", self.function))
    }
}

/// The device at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The virtio controller from which Windows boots in the end; the probe in the first boot.
    Storage,
    Serial,
    Balloon,
    Rng,
    Usb,
    Nic(usize),
    /// Data disk `n` on virtio-blk.
    Data(usize),
}

const FIXED: usize = 5;
const SPARE_PORTS: usize = 2;
/// The most root ports: slots 2 to 15 of bus 0, eight functions each.
const MAX_PORTS: usize = 14 * 8;
/// The most devices on i440fx: slots 3 to 27; AHCI controllers take 28 to 30.
const MAX_PC_DEVICES: usize = 25;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slots {
    chipset: Chipset,
    nics: usize,
    data_disks: usize,
}

impl Slots {
    /// Assigns addresses; `Err((needed, max))` if the devices do not fit.
    pub fn new(chipset: Chipset, nics: usize, data_disks: usize) -> Result<Self, (usize, usize)> {
        let needed = FIXED.saturating_add(nics).saturating_add(data_disks);
        let max = match chipset {
            Chipset::Q35 => MAX_PORTS - SPARE_PORTS,
            Chipset::Pc => MAX_PC_DEVICES,
        };
        if needed > max {
            return Err((needed, max));
        }
        Ok(Self {
            chipset,
            nics,
            data_disks,
        })
    }

    pub fn of(&self, role: Role) -> PciAddress {
        let ordinal = match role {
            Role::Storage => 0,
            Role::Serial => 1,
            Role::Balloon => 2,
            Role::Rng => 3,
            Role::Usb => 4,
            Role::Nic(n) => FIXED + n,
            Role::Data(n) => FIXED + self.nics + n,
        };
        // `new` has limited the ordinals to far below 256.
        let ordinal = u8::try_from(ordinal).unwrap_or(u8::MAX);
        match self.chipset {
            Chipset::Q35 => PciAddress::new(ordinal.saturating_add(1), 0, 0),
            Chipset::Pc => PciAddress::new(0, ordinal.saturating_add(3), 0),
        }
    }

    pub fn video(&self) -> PciAddress {
        match self.chipset {
            Chipset::Q35 => PciAddress::new(0, 1, 0),
            Chipset::Pc => PciAddress::new(0, 2, 0),
        }
    }

    /// AHCI controller `index`; the first of q35 is part of the ICH9.
    pub fn sata(&self, index: u8) -> PciAddress {
        match (self.chipset, index) {
            (Chipset::Q35, 0) => PciAddress::new(0, 0x1f, 2),
            (Chipset::Q35, n) => PciAddress::new(0, 0x17 + n, 0),
            (Chipset::Pc, n) => PciAddress::new(0, 0x1e - n, 0),
        }
    }

    /// The PCI controllers for the XML; i440fx has none besides its root.
    pub fn controllers(&self) -> Vec<Element> {
        let controller = |index: u8, model: &str| {
            Element::new("controller")
                .with("type", "pci")
                .with("index", index.to_string())
                .with("model", model)
        };
        match self.chipset {
            Chipset::Pc => vec![controller(0, "pci-root")],
            Chipset::Q35 => {
                let ports = FIXED + self.nics + self.data_disks + SPARE_PORTS;
                let mut list = vec![controller(0, "pcie-root")];
                for port in 0..u8::try_from(ports).unwrap_or(u8::MAX) {
                    let address = PciAddress::new(0, 2 + port / 8, port % 8);
                    let mut element = address.element();
                    if address.function == 0 {
                        element = element.with("multifunction", "on");
                    }
                    let index = port.saturating_add(1);
                    list.push(
                        controller(index, "pcie-root-port")
                            .child(
                                Element::new("target")
                                    .with("chassis", index.to_string())
                                    .with("port", format!("0x{:x}", 0x10 + port)),
                            )
                            .child(element),
                    );
                }
                list
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_distinct_and_in_range() {
        for (chipset, nics, disks) in [
            (Chipset::Q35, 0, 0),
            (Chipset::Q35, 8, 97),
            (Chipset::Pc, 4, 16),
        ] {
            let slots = Slots::new(chipset, nics, disks).unwrap();
            let mut all: Vec<PciAddress> = [
                Role::Storage,
                Role::Serial,
                Role::Balloon,
                Role::Rng,
                Role::Usb,
            ]
            .into_iter()
            .chain((0..nics).map(Role::Nic))
            .chain((0..disks).map(Role::Data))
            .map(|role| slots.of(role))
            .chain((0..3).map(|n| slots.sata(n)))
            .chain([slots.video()])
            .collect();
            let count = all.len();
            all.sort();
            all.dedup();
            assert_eq!(all.len(), count);
            assert!(all.iter().all(|a| a.slot < 0x20));
            if chipset == Chipset::Q35 {
                let ports = slots.controllers().len() as u8;
                assert!(all.iter().all(|a| a.bus < ports));
            }
        }
    }

    #[test]
    fn too_many_devices() {
        assert_eq!(Slots::new(Chipset::Pc, 10, 11), Err((26, 25)));
        assert_eq!(Slots::new(Chipset::Q35, 10, 96), Err((111, 110)));
        assert!(Slots::new(Chipset::Q35, usize::MAX, usize::MAX).is_err());
    }

    /// The addresses themselves: Windows knows each device by its own.
    #[test]
    fn every_device_has_its_address_for_good() {
        let at = PciAddress::new;
        for (chipset, roles, video, sata) in [
            (
                Chipset::Q35,
                [
                    at(1, 0, 0),
                    at(2, 0, 0),
                    at(3, 0, 0),
                    at(4, 0, 0),
                    at(5, 0, 0),
                    at(7, 0, 0),
                    at(8, 0, 0),
                ],
                at(0, 1, 0),
                [at(0, 31, 2), at(0, 24, 0), at(0, 25, 0)],
            ),
            (
                Chipset::Pc,
                [
                    at(0, 3, 0),
                    at(0, 4, 0),
                    at(0, 5, 0),
                    at(0, 6, 0),
                    at(0, 7, 0),
                    at(0, 9, 0),
                    at(0, 10, 0),
                ],
                at(0, 2, 0),
                [at(0, 30, 0), at(0, 29, 0), at(0, 28, 0)],
            ),
        ] {
            let slots = Slots::new(chipset, 2, 1).unwrap();
            let found = [
                Role::Storage,
                Role::Serial,
                Role::Balloon,
                Role::Rng,
                Role::Usb,
                Role::Nic(1),
                Role::Data(0),
            ]
            .map(|role| slots.of(role));
            assert_eq!(found, roles);
            assert_eq!(slots.video(), video);
            assert_eq!([0, 1, 2].map(|n| slots.sata(n)), sata);
        }
        // Root ports for five fixed devices, three more and two to spare, eight in a slot.
        let ports = Slots::new(Chipset::Q35, 2, 1).unwrap().controllers();
        let shown: Vec<String> = ports[1..]
            .iter()
            .map(|port| {
                let (target, address) = (
                    port.first("target").unwrap(),
                    port.first("address").unwrap(),
                );
                let of = |e: &Element, name: &str| e.attr(name).unwrap_or("-").to_owned();
                format!(
                    "{} {} {} {} {} {}",
                    of(port, "index"),
                    of(target, "chassis"),
                    of(target, "port"),
                    of(address, "slot"),
                    of(address, "function"),
                    of(address, "multifunction")
                )
            })
            .collect();
        assert_eq!(shown.len(), 10);
        assert_eq!(shown[0], "1 1 0x10 0x02 0x0 on");
        assert_eq!(shown[7], "8 8 0x17 0x02 0x7 -");
        assert_eq!(shown[8], "9 9 0x18 0x03 0x0 on");
        assert_eq!(
            Slots::new(Chipset::Pc, 0, 0).unwrap().controllers().len(),
            1
        );
        assert!(
            Slots::new(Chipset::Pc, 10, 10).is_ok() && Slots::new(Chipset::Q35, 10, 95).is_ok()
        );
    }
}
