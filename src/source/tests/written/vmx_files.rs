//! `.vmx`: every key in any case and order, quoted or bare, escaped, in every encoding.

use super::*;

#[test]
fn vmx_files_are_read_as_they_were_written() {
    each(|dice| {
        let folder = Folder::new();
        let (label, alphabet) = dice.pick(&ENCODINGS);
        let mut file = Vmx::new(label);
        let want = file.machine(dice, alphabet, folder.0.path());
        let text = file.bytes(dice);
        // By design UTF-8 under an older label is UTF-8, and these are the same bytes.
        let utf8 = encoding_rs::Encoding::for_label(label.as_bytes()) == Some(UTF_8);
        if !utf8 && !text.is_ascii() && std::str::from_utf8(&text).is_ok() {
            return;
        }
        folder.file("v.vmx", &text);
        let got = folder.open("v.vmx");
        let seed = dice.seed;
        let got = got.unwrap_or_else(|e| {
            panic!(
                "HYPER2KVM_CASE={seed}: {e}\n{}",
                String::from_utf8_lossy(&text)
            )
        });
        assert_same(&got, &want, seed, &text);
    });
}

struct Vmx {
    label: &'static str,
    lines: Vec<(String, String)>,
}

impl Vmx {
    fn new(label: &'static str) -> Self {
        Self {
            label,
            lines: Vec::new(),
        }
    }

    fn put(&mut self, key: &str, value: impl Into<String>) {
        self.lines.push((key.into(), value.into()));
    }

    fn flag(&mut self, dice: &mut Dice, key: &str, value: bool) {
        let words = if value {
            ["TRUE", "yes", "1"]
        } else {
            ["FALSE", "no", "0"]
        };
        let word = dice.pick(&words);
        let word = dice.any_case(word);
        self.put(key, word);
    }

    fn machine(&mut self, dice: &mut Dice, alphabet: &str, folder: &Path) -> SourceVm {
        let name = dice.text(alphabet);
        let mut vm = SourceVm::new(SourceKind::Vmx, &name);
        self.put("displayName", &name);
        self.put("config.version", "8");
        self.put("guestOS", "windows2019srv-64");
        self.put("annotation", dice.text(alphabet));
        vm.memory_mib = Some(4 * (1 + dice.below(1 << 18)));
        self.put("memSize", vm.memory_mib.unwrap().to_string());
        vm.vcpus = Some(1 + dice.below(128) as u32);
        if vm.vcpus != Some(1) || dice.coin() {
            self.put("numvcpus", vm.vcpus.unwrap().to_string());
        }
        vm.cores_per_socket = dice.maybe(|d| 1 + d.below(64) as u32);
        if let Some(cores) = vm.cores_per_socket {
            self.put("cpuid.coresPerSocket", cores.to_string());
        }
        let uefi = dice.coin();
        vm.firmware = Some(if uefi { Firmware::Uefi } else { Firmware::Bios });
        if uefi || dice.coin() {
            let word = dice.any_case(if uefi { "efi" } else { "bios" });
            self.put("firmware", word);
        }
        let secure = dice.coin();
        vm.secure_boot = uefi && secure;
        self.flag(dice, "uefi.secureBoot.enabled", secure);
        vm.tpm = dice.coin();
        if vm.tpm || dice.coin() {
            self.flag(dice, "vtpm.present", vm.tpm);
        }
        if let Some(uuid) = dice.maybe(Dice::uuid) {
            vm.uuid = Some(uuid);
            let hex: Vec<String> = uuid.as_bytes().iter().map(|b| format!("{b:02x}")).collect();
            let text = format!("{}-{}", hex[..8].join(" "), hex[8..].join(" "));
            vm.serial = Some(format!("VMware-{text}"));
            self.put("uuid.bios", text);
            self.put("uuid.location", "00");
        }
        if let Some(id) = dice.maybe(Dice::uuid) {
            vm.genid = Some(id);
            let bytes = id.to_bytes_le();
            let (low, high) = bytes.split_at(8);
            let number = |half: &[u8]| i64::from_le_bytes(half.try_into().unwrap()).to_string();
            self.put("vm.genid", number(low));
            self.put("vm.genidX", number(high));
        }
        self.disks(dice, alphabet, folder, &mut vm);
        self.nics(dice, alphabet, &mut vm);
        vm
    }

    fn disks(&mut self, dice: &mut Dice, alphabet: &str, folder: &Path, vm: &mut SourceVm) {
        let buses = [
            ("scsi", Controller::Scsi, 4, 16),
            ("sata", Controller::Sata, 4, 30),
            ("ide", Controller::Ide, 2, 2),
            ("nvme", Controller::Nvme, 4, 15),
        ];
        for (kind, controller, adapters, units) in buses {
            for bus in dice.some_of(2, adapters) {
                let on = dice.below(4) != 0;
                if !on || dice.coin() {
                    self.flag(dice, &format!("{kind}{bus}.present"), on);
                }
                let count = dice.below(3);
                for unit in dice.some_of(count, units) {
                    let label = format!("{kind}{bus}:{unit}");
                    let file = dice.file(alphabet, vm.disks.len(), "vmdk");
                    match dice.below(6) {
                        0 => {
                            self.flag(dice, &format!("{label}.present"), false);
                            self.put(&format!("{label}.fileName"), file);
                            continue;
                        }
                        1 => {
                            self.flag(dice, &format!("{label}.present"), true);
                            self.put(
                                &format!("{label}.deviceType"),
                                dice.pick(&["cdrom-image", "atapi-cdrom"]),
                            );
                            self.put(&format!("{label}.fileName"), "auto detect");
                            continue;
                        }
                        _ => {}
                    }
                    let (written, path) = place(dice, &file, self.label);
                    let declared = dice.coin();
                    if declared {
                        self.flag(dice, &format!("{label}.present"), true);
                    }
                    let kinds = ["disk", "scsi-hardDisk", "ata-hardDisk"];
                    if let Some(kind) = dice.maybe(|d| d.pick(&kinds)) {
                        self.put(&format!("{label}.deviceType"), kind);
                    }
                    self.put(&format!("{label}.fileName"), &written);
                    let path = folder.join(path);
                    fs::create_dir_all(path.parent().unwrap()).unwrap();
                    fs::write(&path, "x").unwrap();
                    if on {
                        vm.disks.push(SourceDisk {
                            name: format!("{label} ({written})"),
                            path,
                            format: Some("vmdk".into()),
                            controller,
                            order: (bus, unit),
                            packed: None,
                        });
                    }
                }
            }
        }
        if vm.disks.is_empty() {
            fs::write(folder.join("only.vmdk"), "x").unwrap();
            self.lines.retain(|(key, _)| !key.starts_with("ide1"));
            self.flag(dice, "ide1:1.present", true);
            self.put("ide1:1.fileName", "only.vmdk");
            vm.disks.push(SourceDisk {
                name: "ide1:1 (only.vmdk)".into(),
                path: folder.join("only.vmdk"),
                format: Some("vmdk".into()),
                controller: Controller::Ide,
                order: (1, 1),
                packed: None,
            });
        }
        vm.disks.sort_by_key(|d| (d.controller, d.order));
    }

    fn nics(&mut self, dice: &mut Dice, alphabet: &str, vm: &mut SourceVm) {
        let count = dice.below(11);
        for n in dice.some_of(count, 10) {
            let mut put = |key: &str, value: String| self.put(&format!("ethernet{n}.{key}"), value);
            let mac = dice.maybe(Dice::mac);
            let fixed = dice.coin();
            if fixed || dice.coin() {
                let kind = if fixed {
                    "static"
                } else {
                    dice.pick(&["generated", "vpx"])
                };
                put("addressType", dice.any_case(kind));
            }
            if let Some(mac) = mac {
                let (own, other) = match fixed {
                    true => ("address", "generatedAddress"),
                    false => ("generatedAddress", "address"),
                };
                put(own, dice.mac_text(mac));
                if dice.coin() {
                    let stale = dice.mac();
                    put(other, stale.to_string());
                }
            }
            let model = dice.maybe(|d| d.pick(&["vmxnet3", "e1000", "e1000e"]).to_owned());
            if let Some(model) = &model {
                put("virtualDev", model.clone());
            }
            let network = dice.maybe(|d| d.text(alphabet));
            if let Some(network) = &network {
                put(
                    dice.pick(&["networkName", "dvs.portgroupId", "vnet", "connectionType"]),
                    network.clone(),
                );
            }
            let connected = dice.coin();
            if !connected || dice.coin() {
                self.flag(dice, &format!("ethernet{n}.startConnected"), connected);
            }
            self.flag(dice, &format!("ethernet{n}.present"), true);
            vm.nics.push(SourceNic {
                mac,
                model,
                network,
                connected,
            });
        }
        self.flag(dice, "ethernet77.present", false);
    }

    fn bytes(&self, dice: &mut Dice) -> Vec<u8> {
        let end = dice.pick(&["\n", "\r\n"]);
        let mut lines: Vec<Vec<u8>> = Vec::new();
        let head = self.label.to_owned();
        for (key, value) in &self.lines {
            lines.push(self.line(dice, key, value));
        }
        lines.push(self.line(dice, ".encoding", &head));
        lines.push(b"# displayName = \"no\"".to_vec());
        lines.push(Vec::new());
        dice.shuffle(&mut lines);
        let mut text = Vec::new();
        if dice.coin() {
            text.extend(b"#!/usr/bin/vmware");
            text.extend(end.as_bytes());
        }
        for line in lines {
            text.extend(dice.gap().as_bytes());
            text.extend(line);
            text.extend(dice.gap().as_bytes());
            text.extend(end.as_bytes());
        }
        text
    }

    fn line(&self, dice: &mut Dice, key: &str, value: &str) -> Vec<u8> {
        let mut line = dice.any_case(key).into_bytes();
        line.extend(format!("{}={}", dice.gap(), dice.gap()).bytes());
        let bare = value.bytes().all(|b| b.is_ascii_alphanumeric()) && dice.below(4) == 0;
        if bare {
            line.extend(value.bytes());
            return line;
        }
        line.push(b'"');
        for byte in encode(self.label, value) {
            // A quote would end it; a bar begins an escape only if two digits follow.
            if matches!(byte, b'"' | b'|') || dice.below(8) == 0 {
                line.extend(match dice.coin() {
                    true => format!("|{byte:02x}").bytes().collect::<Vec<_>>(),
                    false => format!("|{byte:02X}").bytes().collect(),
                });
            } else {
                line.push(byte);
            }
        }
        line.push(b'"');
        line
    }
}

/// The name of a file in a `.vmx`, and its path below the directory of the `.vmx`.
fn place(dice: &mut Dice, file: &str, label: &str) -> (String, OsString) {
    let (written, folder) = match dice.below(7) {
        0 => (format!("/vmfs/volumes/5f3e-1/vm/{file}"), ""),
        1 => (format!("[datastore 1] vm/{file}"), ""),
        2 => (format!("C:\\VMs\\vm\\{file}"), ""),
        3 => (format!("disks/{file}"), "disks/"),
        4 => (format!("disks\\{file}"), "disks/"),
        5 => (format!("/vmfs/volumes/other/vm/{file}"), "other/vm/"),
        _ => (file.to_owned(), ""),
    };
    // A file name is stored as the file's bytes if no directories have to be separated from it.
    let bytes = encode(label, file);
    let plain = written == file && dice.coin();
    let name = match plain {
        true => bytes,
        false => format!("{folder}{file}").into_bytes(),
    };
    (written, OsString::from_vec(name))
}
