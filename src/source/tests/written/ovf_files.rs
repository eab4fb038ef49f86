//! `.ovf`: any prefixes, both kinds of items, units, references, configurations and bounds.

use super::*;

#[test]
fn ovf_descriptors_are_read_as_they_were_written() {
    each(|dice| {
        let folder = Folder::new();
        let document = Document::new(dice);
        let mut ovf = Ovf::new(dice);
        let (body, want) = ovf.machine(dice, document.alphabet, folder.0.path());
        let text = document.bytes(&body);
        folder.file("v.ovf", &text);
        let options = Options {
            ovf_configuration: ovf.asked.clone(),
        };
        let seed = dice.seed;
        let got = open_with(&folder.path("v.ovf"), &options)
            .unwrap_or_else(|e| panic!("HYPER2KVM_CASE={seed}: {e:?}\n{body}"));
        assert_same(&got, &want, seed, body.as_bytes());
    });
}

const FORMATS: [(&str, Option<&str>); 5] = [
    (
        "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized",
        Some("vmdk"),
    ),
    (
        "http://www.gnome.org/~markmc/qcow-image-format.html",
        Some("qcow2"),
    ),
    (
        "http://go.microsoft.com/fwlink/?LinkId=137171#vhd",
        Some("vpc"),
    ),
    ("http://technet.microsoft.com/#VHDX", Some("vhdx")),
    ("", None),
];

struct Ovf {
    /// Prefixes of elements and attributes of the envelope, and of the fields of items.
    ns: &'static str,
    attrs: &'static str,
    rasd: &'static str,
    files: Vec<String>,
    disks: Vec<String>,
    items: Vec<String>,
    configurations: Vec<String>,
    asked: Option<String>,
}

impl Ovf {
    fn new(dice: &mut Dice) -> Self {
        let count = dice.pick(&[0, 0, 1, 3]);
        Self {
            ns: dice.pick(&["", "ovf:", "ns0:"]),
            attrs: dice.pick(&["ovf:", "ns0:", ""]),
            rasd: dice.pick(&["rasd:", "ns1:", "sasd:", ""]),
            files: Vec::new(),
            disks: Vec::new(),
            items: Vec::new(),
            configurations: (0..count).map(|n| format!("conf{n}")).collect(),
            asked: None,
        }
    }

    fn tag(&self, dice: &mut Dice, name: &str, attrs: &[(&str, &str)], inside: &str) -> String {
        let mut attrs: Vec<String> = attrs
            .iter()
            .map(|(key, value)| attr(dice, &format!("{}{key}", self.attrs), value))
            .collect();
        dice.shuffle(&mut attrs);
        let (ns, attrs) = (self.ns, attrs.concat());
        match inside.is_empty() && dice.coin() {
            true => format!("<{ns}{name}{attrs}/>"),
            false => format!("<{ns}{name}{attrs}>{inside}</{ns}{name}>\n"),
        }
    }

    fn item(&self, dice: &mut Dice, attrs: &[(&str, &str)], fields: &[(&str, String)]) -> String {
        let mut fields: Vec<String> = fields
            .iter()
            .map(|(key, value)| {
                let value = content(dice, value);
                format!("<{0}{key}>{value}</{0}{key}>", self.rasd)
            })
            .collect();
        dice.shuffle(&mut fields);
        let kind = match self.rasd {
            "sasd:" => dice.pick(&["Item", "StorageItem", "EthernetPortItem"]),
            _ => "Item",
        };
        self.tag(dice, kind, attrs, &fields.concat())
    }

    fn machine(&mut self, dice: &mut Dice, alphabet: &str, folder: &Path) -> (String, SourceVm) {
        let name = dice.text(alphabet);
        let mut vm = SourceVm::new(SourceKind::Ovf, &name);
        let active = self.choose(dice);
        self.sizes(dice, active.as_deref(), &mut vm);
        self.disk_items(dice, alphabet, folder, &mut vm);
        self.nic_items(dice, alphabet, &mut vm);
        vm.tpm = dice.coin();
        if vm.tpm {
            let subtype = ("ResourceSubType", "vmware.vtpm".to_owned());
            let fields = [
                ("InstanceID", "900".into()),
                ("ResourceType", "1".into()),
                subtype,
            ];
            let item = self.item(dice, &[], &fields);
            self.items.push(item);
        }
        let firmware = self.firmware(dice, &mut vm);
        dice.shuffle(&mut self.items);
        let named = dice.coin();
        let mut system = String::new();
        if named {
            let ns = self.ns;
            system += &format!("<{ns}Name>{}</{ns}Name>", content(dice, &name));
        }
        let hardware = format!("{}{}", self.items.concat(), firmware.0);
        system += &self.tag(dice, "VirtualHardwareSection", &[], &hardware);
        system += &firmware.1;
        let id = if named { "vm" } else { &name };
        let system = self.tag(dice, "VirtualSystem", &[("id", id)], &system);
        dice.shuffle(&mut self.files);
        dice.shuffle(&mut self.disks);
        let mut body = self.tag(dice, "References", &[], &self.files.concat());
        body += &self.tag(dice, "DiskSection", &[], &self.disks.concat());
        body += &self.options(dice, active.as_deref());
        body += &system;
        let uri = "http://schemas.dmtf.org/ovf/envelope/1";
        let rasd =
            "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData";
        let root = format!(
            "<{0}Envelope xmlns='{uri}' xmlns:ovf='{uri}' xmlns:ns0='{uri}' xmlns:rasd='{rasd}' xmlns:ns1='{rasd}' \
             xmlns:sasd='{rasd}' xmlns:vmw='v' xmlns:vbox='b'>{body}</{0}Envelope>",
            self.ns
        );
        (root, vm)
    }

    /// The chosen configuration: the requested one, the default or the first.
    fn choose(&mut self, dice: &mut Dice) -> Option<String> {
        if self.configurations.is_empty() {
            return None;
        }
        let names: Vec<&str> = self.configurations.iter().map(String::as_str).collect();
        let id = dice.pick(&names).to_owned();
        if dice.coin() {
            self.asked = Some(id.clone());
        }
        Some(id)
    }

    fn options(&self, dice: &mut Dice, active: Option<&str>) -> String {
        let Some(active) = active else {
            return String::new();
        };
        let mut ids = self.configurations.clone();
        // An unrequested configuration is the default, or first if there is none.
        let marked = self.asked.is_none() && dice.coin();
        if self.asked.is_none() && !marked {
            ids.sort_by_key(|id| id != active);
        }
        let list: String = ids
            .iter()
            .map(|id| {
                let mut attrs = vec![("id", id.as_str())];
                if marked {
                    let is = if id == active {
                        dice.pick(&["true", "1"])
                    } else {
                        "false"
                    };
                    attrs.push(("default", is));
                }
                self.tag(dice, "Configuration", &attrs, "")
            })
            .collect();
        self.tag(dice, "DeploymentOptionSection", &[], &list)
    }

    /// CPUs and memory, with limits and the values of other configurations among them.
    fn sizes(&mut self, dice: &mut Dice, active: Option<&str>, vm: &mut SourceVm) {
        let (cpus, mib) = (1 + dice.below(64) as u32, 1024 * (1 + dice.below(512)));
        vm.vcpus = Some(cpus);
        vm.memory_mib = Some(mib);
        vm.cores_per_socket = dice.maybe(|d| 1 + d.below(16) as u32);
        let (units, amount) = dice.pick(&[
            ("byte * 2^20", mib),
            ("byte*2^20", mib),
            ("byte * 2^30", mib / 1024),
            ("byte * 2^10", mib * 1024),
            ("byte", mib << 20),
            ("MegaBytes", mib),
            ("MB", mib),
            ("GigaBytes", mib / 1024),
            ("KB", mib * 1024),
        ]);
        let cpu = |n: u64| {
            vec![
                ("InstanceID", "1".to_owned()),
                ("ResourceType", "3".into()),
                ("VirtualQuantity", n.to_string()),
            ]
        };
        let memory = |n: u64| {
            vec![
                ("InstanceID", "2".to_owned()),
                ("ResourceType", "4".into()),
                ("VirtualQuantity", n.to_string()),
                ("AllocationUnits", units.to_owned()),
            ]
        };
        let mut right = [cpu(cpus.into()), memory(amount)];
        if let Some(cores) = vm.cores_per_socket {
            right[0].push(("CoresPerSocket", cores.to_string()));
        }
        let special = active.filter(|_| dice.coin());
        for (n, fields) in right.into_iter().enumerate() {
            let wrong = if n == 0 { cpu(7777) } else { memory(7777) };
            let ids = special.map(|id| format!("{}{id}", dice.pick(&["", "other ", "  "])));
            let mut attrs: Vec<(&str, &str)> = ids
                .iter()
                .map(|ids| ("configuration", ids.as_str()))
                .collect();
            if dice.coin() {
                attrs.push(("bound", "normal"));
            }
            let item = self.item(dice, &attrs, &fields);
            self.items.push(item);
            if special.is_some() && dice.coin() {
                let item = self.item(dice, &[], &wrong);
                self.items.push(item);
            }
            for bound in ["min", "max"] {
                if dice.coin() {
                    let item = self.item(dice, &[("bound", bound)], &wrong);
                    self.items.push(item);
                }
            }
            for other in self.configurations.clone() {
                if Some(other.as_str()) != active && dice.coin() {
                    let item = self.item(dice, &[("configuration", &other)], &wrong);
                    self.items.push(item);
                }
            }
        }
    }

    fn disk_items(&mut self, dice: &mut Dice, alphabet: &str, folder: &Path, vm: &mut SourceVm) {
        let adapters = [
            (Controller::Ide, "5", ""),
            (Controller::Scsi, "6", "VirtualSCSI"),
            (Controller::Scsi, "6", "lsilogicsas"),
            (Controller::Virtio, "6", "virtio-blk"),
            (Controller::Sata, "20", "vmware.sata.ahci"),
            (Controller::Sata, "20", "AHCI"),
            (Controller::Nvme, "20", "vmware.nvme.controller"),
            (Controller::Usb, "23", ""),
        ];
        let mut taken = Vec::new();
        for n in 0..1 + dice.below(4) {
            let (controller, kind, subtype) = dice.pick(&adapters);
            let order = (dice.below(3) as u32, dice.below(15) as u32);
            if taken.contains(&(controller, order)) {
                continue;
            }
            taken.push((controller, order));
            let parent = format!("{}", 100 + 2 * n);
            let mut fields = vec![
                ("InstanceID", parent.clone()),
                ("ResourceType", kind.into()),
                ("Address", order.0.to_string()),
            ];
            if !subtype.is_empty() {
                fields.push(("ResourceSubType", subtype.into()));
            }
            let item = self.item(dice, &[], &fields);
            self.items.push(item);
            let (resource, disk) = self.backing(dice, alphabet, folder, n as usize);
            let fields = [
                ("InstanceID", format!("{}", 101 + 2 * n)),
                ("ResourceType", "17".into()),
                ("Parent", parent),
                ("AddressOnParent", order.1.to_string()),
                ("HostResource", resource),
                ("ElementName", dice.text(alphabet)),
            ];
            let item = self.item(dice, &[], &fields);
            self.items.push(item);
            vm.disks.push(SourceDisk {
                controller,
                order,
                ..disk
            });
        }
        vm.disks.sort_by_key(|d| (d.controller, d.order));
        // No disk file: created at deployment.
        let _ = self.tag(dice, "Disk", &[("diskId", "empty"), ("capacity", "1")], "");
    }

    /// A file with its disk, if there is one, and the reference of an item.
    fn backing(
        &mut self,
        dice: &mut Dice,
        alphabet: &str,
        folder: &Path,
        n: usize,
    ) -> (String, SourceDisk) {
        let file = dice.file(alphabet, n, "img");
        let below = dice.pick(&["", "", "sub dir/"]);
        let name = format!("{below}{file}");
        let gzip = dice.below(4) == 0;
        let said = gzip && dice.coin();
        let path = folder.join(&name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(
            &path,
            if gzip {
                b"\x1f\x8b\x08".as_slice()
            } else {
                b"x"
            },
        )
        .unwrap();
        // A literal percent sign must be encoded if two digits follow.
        let encoded: String = match dice.coin() {
            true => name
                .bytes()
                .map(|b| {
                    if b.is_ascii_alphanumeric() || b == b'/' || b == b'.' {
                        char::from(b).to_string()
                    } else {
                        format!("%{b:02X}")
                    }
                })
                .collect(),
            false => name.replace('%', "%25"),
        };
        let (file_id, disk_id) = (format!("f{n}"), format!("d{n}"));
        let mut attrs = vec![("id", file_id.as_str()), ("href", encoded.as_str())];
        if said {
            attrs.push(("compression", "gzip"));
        } else if dice.coin() {
            attrs.push(("compression", dice.pick(&["identity", ""])));
        }
        let tag = self.tag(dice, "File", &attrs, "");
        self.files.push(tag);
        let slash = dice.pick(&["ovf:/", "/", "ovf://"]);
        let mut disk = SourceDisk {
            name: name.clone(),
            path,
            format: None,
            controller: Controller::Unknown,
            order: (0, 0),
            packed: None,
        };
        let mut capacity = None;
        let resource = if dice.coin() {
            let (uri, format) = dice.pick(&FORMATS);
            let (units, unit) = dice.pick(&[
                ("byte * 2^30", 1u64 << 30),
                ("byte * 2^20", 1 << 20),
                ("byte", 1),
                ("", 1),
            ]);
            let number = 1 + dice.below(4096);
            let text = number.to_string();
            let mut attrs = vec![
                ("diskId", disk_id.as_str()),
                ("fileRef", file_id.as_str()),
                ("capacity", text.as_str()),
            ];
            if !units.is_empty() {
                attrs.push(("capacityAllocationUnits", units));
            }
            if !uri.is_empty() {
                attrs.push(("format", uri));
            }
            let tag = self.tag(dice, "Disk", &attrs, "");
            self.disks.push(tag);
            capacity = Some(number * unit);
            disk.format = format.map(str::to_owned);
            format!("{slash}disk/{disk_id}")
        } else {
            format!("{slash}file/{file_id}")
        };
        disk.packed = gzip.then_some(Packed {
            name,
            member: None,
            gzip: true,
            capacity,
        });
        (resource, disk)
    }

    fn nic_items(&mut self, dice: &mut Dice, alphabet: &str, vm: &mut SourceVm) {
        let mut items = Vec::new();
        for n in 0..dice.below(11) {
            let mac = dice.maybe(Dice::mac);
            let model = dice.maybe(|d| d.pick(&["VmxNet3", "E1000", "PCNet32"]).to_owned());
            let network = dice.maybe(|d| d.text(alphabet));
            let connected = dice.coin();
            let mut fields = vec![
                ("InstanceID", format!("{}", 500 + n)),
                ("ResourceType", "10".into()),
            ];
            fields.extend(mac.map(|mac| ("Address", dice.mac_text(mac))));
            fields.extend(model.clone().map(|m| ("ResourceSubType", m)));
            fields.extend(network.clone().map(|n| ("Connection", n)));
            if !connected || dice.coin() {
                fields.push(("AutomaticAllocation", connected.to_string()));
            }
            items.push(self.item(dice, &[], &fields));
            vm.nics.push(SourceNic {
                mac,
                model,
                network,
                connected,
            });
        }
        // Their order determines the order of the NICs, and nothing else.
        self.items.push(items.concat());
    }

    /// Inside the hardware section, or beside it.
    fn firmware(&self, dice: &mut Dice, vm: &mut SourceVm) -> (String, String) {
        let uefi = dice.coin();
        vm.firmware = Some(if uefi { Firmware::Uefi } else { Firmware::Bios });
        let (mut inside, mut beside) = (String::new(), String::new());
        if dice.coin() {
            let mut config = |dice: &mut Dice, key: &str, value: &str| {
                inside += &format!(
                    "<vmw:Config{}{}/>",
                    attr(dice, "vmw:key", key),
                    attr(dice, "ovf:value", value)
                );
            };
            let word = if uefi { "efi" } else { "bios" };
            config(dice, "firmware", word);
            let secure = dice.coin();
            config(
                dice,
                "bootOptions.efiSecureBootEnabled",
                if secure { "true" } else { "false" },
            );
            vm.secure_boot = uefi && secure;
        } else {
            let kind = if uefi {
                dice.pick(&["EFI", "EFI32", "EFI64", "EFIDUAL"])
            } else {
                "BIOS"
            };
            let uuid = dice.uuid();
            vm.uuid = Some(uuid);
            beside = format!(
                "<vbox:Machine uuid='{}'><Hardware><Firmware type='{kind}'/></Hardware></vbox:Machine>",
                uuid.braced()
            );
        }
        (inside, beside)
    }
}
