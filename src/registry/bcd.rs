//! Reads a boot configuration store (BCD), which is a registry hive.
//!
//! Finds the loader that the boot manager starts by default, and its partition. The store is never
//! changed here; keys to remove (see [`Bcd::graphics_mode_disabled`]) are returned as paths for
//! [`RegOp`](super::RegOp).
//!
//! Layout: `Objects\{guid}\Description` has `Type`, `Objects\{guid}\Elements\<8 hex digits>` has
//! `Element`. The numbers are those of Microsoft's BCD reference. The binary form of a device is
//! not documented; it was determined from real stores and, for MBR, from a published dump:
//!
//! ```text
//!  0 guid of the device options   16 kind   24 size of the rest from 16
//!  kind 6, partition:  52 scheme: 0 GPT   32 partition guid     56 disk guid
//!                                 1 MBR   32 offset in bytes    56 disk signature
//!  kind 0, block device:          32 type: 3 RAM disk
//! ```
//!
//! A RAM disk contains the description of the partition with its image. That is ignored here,
//! because such a loader (setup media, recovery) does not start the installed Windows.

use serde::Serialize;
use uuid::Uuid;

use super::error::HiveError;
use super::hive::{HiveView, Key, REG_BINARY};
use crate::bytes::{le32, le64};

const BOOTMGR: &str = "{9dea862c-5cdd-4e70-acc1-f32b344d4795}";

const TYPE_OS_LOADER: u32 = 0x1020_0003;

pub const APP_DEVICE: &str = "11000001";
const APP_PATH: &str = "12000002";
const DESCRIPTION: &str = "12000004";
const GRAPHICS_MODE_DISABLED: &str = "16000046";
pub const OS_DEVICE: &str = "21000001";
const SYSTEM_ROOT: &str = "22000002";
const DEFAULT_OBJECT: &str = "23000003";
const DISPLAY_ORDER: &str = "24000001";
const WIN_PE: &str = "26000022";
/// The emergency management console of Windows itself, and its port.
const OS_EMS: &str = "260000b0";
const EMS_PORT: &str = "15000022";
/// `KernelDebuggerEnabled` of a loader, then `DebuggerType` and `SerialDebuggerPort`
/// (BcdLibraryElementTypes).
const OS_DEBUG: &str = "260000a0";
const DEBUGGER_TYPE: &str = "15000011";
const DEBUGGER_PORT: &str = "15000013";

/// The most objects read; real stores have about twenty.
const MAX_OBJECTS: usize = 4096;
/// The longest text read from the store.
const MAX_TEXT: usize = 512;

#[derive(Debug, thiserror::Error)]
pub enum BcdError {
    #[error("the BCD store has no boot manager object")]
    NoBootManager,
    #[error("the BCD store cannot be read")]
    Hive(#[from] HiveError),
}

/// The device on which a boot application looks for a file. GUIDs are lower case with dashes, the
/// MBR signature is `0x` and 8 hex digits, as in [`DiskLayout`](crate::disk::layout::DiskLayout).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum BcdDevice {
    Gpt {
        disk: String,
        partition: String,
    },
    Mbr {
        signature: String,
        offset: u64,
    },
    /// The device from which the boot manager itself was started.
    Boot,
    /// The first partition with a certain file.
    Locate,
    /// A disk image loaded to memory.
    Ramdisk,
    Other {
        code: u32,
    },
}

impl BcdDevice {
    /// Parses the bytes of a device element.
    pub fn parse(element: &[u8]) -> Option<Self> {
        let number = |at| le32(element, at);
        let guid_at = |at| {
            let bytes = element.get(at..)?.first_chunk()?;
            Some(Uuid::from_bytes_le(*bytes).hyphenated().to_string())
        };
        Some(match (number(16)?, number(32)) {
            (0, Some(3)) => BcdDevice::Ramdisk,
            (5, _) => BcdDevice::Boot,
            (6, _) => match number(52)? {
                0 => BcdDevice::Gpt {
                    disk: guid_at(56)?,
                    partition: guid_at(32)?,
                },
                1 => BcdDevice::Mbr {
                    signature: format!("0x{:08x}", number(56)?),
                    offset: le64(element, 32)?,
                },
                _ => BcdDevice::Other { code: 6 },
            },
            (8, _) => BcdDevice::Locate,
            (code, _) => BcdDevice::Other { code },
        })
    }

    /// Whether this is the partition with that GUID or start on the disk with that id.
    pub fn is_partition(&self, disk_id: &str, guid: Option<&str>, start_bytes: u64) -> bool {
        match self {
            BcdDevice::Gpt { disk, partition } => {
                disk.eq_ignore_ascii_case(disk_id)
                    && guid.is_some_and(|guid| partition.eq_ignore_ascii_case(guid))
            }
            BcdDevice::Mbr { signature, offset } => {
                signature.eq_ignore_ascii_case(disk_id) && *offset == start_bytes
            }
            _ => false,
        }
    }
}

/// An entry that starts a Windows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Loader {
    /// The name of its key: with braces, lower case.
    pub id: String,
    pub description: Option<String>,
    /// The device of the loader itself.
    pub device: Option<BcdDevice>,
    /// `\Windows\system32\winload.efi` or `.exe`.
    pub path: Option<String>,
    /// The device of Windows.
    pub os_device: Option<BcdDevice>,
    pub system_root: Option<String>,
    pub win_pe: bool,
}

impl Loader {
    /// Whether this is setup or recovery: it runs from a RAM disk or is marked as Windows PE.
    pub fn is_transient(&self) -> bool {
        self.win_pe
            || self.device == Some(BcdDevice::Ramdisk)
            || self.os_device == Some(BcdDevice::Ramdisk)
    }
}

/// Any object of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BcdObject {
    pub id: String,
    /// `0x10200003` is an OS loader; see Microsoft's BCD reference.
    #[serde(rename = "type")]
    pub type_code: u32,
    pub description: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bcd {
    pub objects: Vec<BcdObject>,
    /// The OS loaders, in stored order.
    pub loaders: Vec<Loader>,
    /// The boot manager's own device, usually the ESP or the active partition.
    pub boot_device: Option<BcdDevice>,
    /// The id that the boot manager starts without a choice.
    pub default: Option<String>,
    /// Keys that force text mode. virt-v2v removes that of the default loader, because a screen in
    /// text mode is lost on KVM.
    pub graphics_mode_disabled: Vec<String>,
    /// Elements that enable EMS (the console SAC), in any object. Entries inherit settings from
    /// other objects, so each of them counts.
    pub ems: Vec<String>,
    /// The serial port of EMS, if one is named: 1 is COM1.
    pub ems_port: Option<u64>,
    /// Entries that enable the kernel debugger.
    pub debugged: Vec<String>,
    /// The connection types of the debugger, in any object: 0 is a serial port.
    pub debugger_types: Vec<u64>,
    pub debugger_port: Option<u64>,
}

impl Bcd {
    /// The serial port of the kernel debugger, if that entry enables it.
    pub fn debugger_port_number(&self, loader: &str) -> Option<u64> {
        let on = self.debugged.iter().any(|id| id == loader);
        let serial = self.debugger_types.is_empty() || self.debugger_types.contains(&0);
        (on && serial).then(|| self.debugger_port.unwrap_or(1))
    }

    pub fn parse(hive: &HiveView<'_>) -> Result<Self, BcdError> {
        let mut bcd = Self {
            objects: Vec::new(),
            loaders: Vec::new(),
            boot_device: None,
            default: None,
            graphics_mode_disabled: Vec::new(),
            ems: Vec::new(),
            ems_port: None,
            debugged: Vec::new(),
            debugger_types: Vec::new(),
            debugger_port: None,
        };
        let mut found_bootmgr = false;
        let objects = hive.key("Objects")?.ok_or(BcdError::NoBootManager)?;
        for key in objects.keys()?.into_iter().take(MAX_OBJECTS) {
            let id = key.name()?.to_lowercase();
            // Nothing can refer to an object with another kind of name.
            if Uuid::try_parse(&id).is_err() {
                continue;
            }
            let type_code = match key.key("Description")? {
                Some(description) => description.dword("Type")?.unwrap_or(0),
                None => 0,
            };
            let elements = Elements(key.key("Elements")?);
            bcd.objects.push(BcdObject {
                id: id.clone(),
                type_code,
                description: elements.text(DESCRIPTION)?,
            });
            if elements.get(GRAPHICS_MODE_DISABLED)?.is_some() {
                bcd.graphics_mode_disabled.push(format!(
                    "Objects\\{}\\Elements\\{GRAPHICS_MODE_DISABLED}",
                    key.name()?
                ));
            }
            // The debugger of the boot manager and of loaders (16000020) is enabled by default in
            // Windows 7, and ends with them.
            if elements.boolean(OS_EMS)? {
                bcd.ems.push(format!("{id} {OS_EMS}"));
            }
            if let Some(port) = elements.number(EMS_PORT)? {
                bcd.ems_port.get_or_insert(port);
            }
            if elements.boolean(OS_DEBUG)? {
                bcd.debugged.push(id.clone());
            }
            bcd.debugger_types.extend(elements.number(DEBUGGER_TYPE)?);
            if let Some(port) = elements.number(DEBUGGER_PORT)? {
                bcd.debugger_port.get_or_insert(port);
            }
            if id == BOOTMGR {
                found_bootmgr = true;
                bcd.boot_device = elements.device(APP_DEVICE)?;
                // Without a default, the boot manager starts the first entry of its menu.
                bcd.default = match elements.text(DEFAULT_OBJECT)? {
                    Some(id) => Some(id),
                    None => elements.first_of(DISPLAY_ORDER)?,
                }
                .map(|id| id.to_lowercase());
            }
            if type_code == TYPE_OS_LOADER {
                bcd.loaders.push(Loader {
                    id,
                    description: elements.text(DESCRIPTION)?,
                    device: elements.device(APP_DEVICE)?,
                    path: elements.text(APP_PATH)?,
                    os_device: elements.device(OS_DEVICE)?,
                    system_root: elements.text(SYSTEM_ROOT)?,
                    win_pe: elements.boolean(WIN_PE)?,
                });
            }
        }
        match found_bootmgr {
            true => Ok(bcd),
            false => Err(BcdError::NoBootManager),
        }
    }

    /// The OS loader that starts without a choice. `None` also if the default is missing or is
    /// something else, such as a memory test.
    pub fn default_loader(&self) -> Option<&Loader> {
        let id = self.default.as_deref()?;
        self.loaders.iter().find(|loader| loader.id == id)
    }
}

/// The `Elements` key of an object, if there is one.
struct Elements<'h>(Option<Key<'h>>);

impl<'h> Elements<'h> {
    fn get(&self, code: &str) -> Result<Option<Key<'h>>, HiveError> {
        match &self.0 {
            Some(key) => key.key(code),
            None => Ok(None),
        }
    }

    fn text(&self, code: &str) -> Result<Option<String>, HiveError> {
        let Some(key) = self.get(code)? else {
            return Ok(None);
        };
        Ok(key.string("Element")?.map(|text| clean(&text)))
    }

    fn first_of(&self, code: &str) -> Result<Option<String>, HiveError> {
        let Some(key) = self.get(code)? else {
            return Ok(None);
        };
        let list = key.multi("Element")?.unwrap_or_default();
        Ok(list.first().map(|text| clean(text)))
    }

    fn binary(&self, code: &str) -> Result<Option<Vec<u8>>, HiveError> {
        let Some(key) = self.get(code)? else {
            return Ok(None);
        };
        let value = key.value("Element")?;
        Ok(value.filter(|v| v.ty == REG_BINARY).map(|v| v.data))
    }

    fn device(&self, code: &str) -> Result<Option<BcdDevice>, HiveError> {
        let bytes = self.binary(code)?;
        Ok(bytes.and_then(|bytes| BcdDevice::parse(&bytes)))
    }

    fn number(&self, code: &str) -> Result<Option<u64>, HiveError> {
        let bytes = self.binary(code)?;
        Ok(bytes.and_then(|bytes| le64(&bytes, 0)))
    }

    fn boolean(&self, code: &str) -> Result<bool, HiveError> {
        let bytes = self.binary(code)?;
        Ok(bytes.is_some_and(|bytes| bytes.first().is_some_and(|b| *b != 0)))
    }
}

fn clean(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .take(MAX_TEXT)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::RegData;
    use crate::registry::build::{Format, KeyTree};

    fn device(kind: u32, at: &[(usize, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 88];
        bytes[16..20].copy_from_slice(&kind.to_le_bytes());
        bytes[24] = 72;
        for (offset, data) in at {
            bytes[*offset..offset + data.len()].copy_from_slice(data);
        }
        bytes
    }

    fn mbr() -> Vec<u8> {
        let offset = 0x15f0_0000_u64.to_le_bytes();
        device(
            6,
            &[(32, &offset), (52, &[1]), (56, &[0xf1, 0xa8, 0xeb, 0xb3])],
        )
    }

    #[test]
    fn devices() {
        let guid = |n: u8| [n; 16];
        let name = |n: u8| Uuid::from_bytes([n; 16]).to_string();
        let other = |code| Some(BcdDevice::Other { code });
        let mbr_device = Some(BcdDevice::Mbr {
            signature: "0xb3eba8f1".into(),
            offset: 368_050_176,
        });
        let gpt_device = Some(BcdDevice::Gpt {
            disk: name(2),
            partition: name(1),
        });
        let table = [
            (mbr(), mbr_device),
            (device(6, &[(32, &guid(1)), (56, &guid(2))]), gpt_device),
            (device(6, &[(52, &[2])]), other(6)),
            (device(5, &[]), Some(BcdDevice::Boot)),
            (device(8, &[]), Some(BcdDevice::Locate)),
            (device(0, &[(32, &[3])]), Some(BcdDevice::Ramdisk)),
            (device(0, &[]), other(0)),
            (mbr()[..56].to_vec(), None),
            (vec![], None),
        ];
        for (bytes, expected) in table {
            assert_eq!(BcdDevice::parse(&bytes), expected, "{bytes:02x?}");
        }
    }

    #[test]
    fn partitions() {
        let mbr = BcdDevice::parse(&mbr()).unwrap();
        assert!(mbr.is_partition("0xB3EBA8F1", None, 368_050_176));
        assert!(!mbr.is_partition("0xb3eba8f1", None, 0));
        assert!(!mbr.is_partition("0xb3eba8f2", None, 368_050_176));
        let gpt = BcdDevice::Gpt {
            disk: "d".into(),
            partition: "p".into(),
        };
        assert!(gpt.is_partition("D", Some("P"), 0));
        assert!(!gpt.is_partition("d", None, 0) && !gpt.is_partition("x", Some("p"), 0));
        assert!(!BcdDevice::Boot.is_partition("d", Some("p"), 0));
    }

    const LOADER: &str = "{11111111-1111-1111-1111-111111111111}";

    fn element(store: &mut KeyTree, id: &str, code: &str, data: RegData) {
        store.set(&format!("Objects\\{id}\\Elements\\{code}"), "Element", data);
    }

    /// A store of Windows 7 on a BIOS machine.
    fn bios_store() -> KeyTree {
        let mut store = KeyTree::new("NewStoreRoot");
        let sz = |text: &str| RegData::Sz(text.into());
        for (id, ty) in [(LOADER, TYPE_OS_LOADER), (BOOTMGR, 0x1010_0002)] {
            store.dword(&format!("Objects\\{id}\\Description"), "Type", ty);
        }
        element(&mut store, LOADER, APP_DEVICE, RegData::Binary(mbr()));
        element(
            &mut store,
            LOADER,
            APP_PATH,
            sz("\\Windows\\system32\\winload.exe"),
        );
        element(&mut store, LOADER, DESCRIPTION, sz("Windows\u{7} 7"));
        element(
            &mut store,
            LOADER,
            GRAPHICS_MODE_DISABLED,
            RegData::Binary(vec![1]),
        );
        store
    }

    fn parse(store: &KeyTree) -> Result<Bcd, BcdError> {
        let bytes = store.to_bytes_as("\\Boot\\BCD", Format::V1_3);
        Bcd::parse(&HiveView::new(&bytes).unwrap())
    }

    #[test]
    fn a_bios_store_without_default() {
        let mut store = bios_store();
        store.dword(
            "Objects\\{not a guid\u{1b}}\\Description",
            "Type",
            TYPE_OS_LOADER,
        );
        let order = RegData::MultiSz(vec![LOADER.to_uppercase(), "{other}".into()]);
        element(&mut store, BOOTMGR, DISPLAY_ORDER, order);
        let bcd = parse(&store).unwrap();
        assert_eq!((bcd.objects.len(), bcd.loaders.len()), (2, 1));
        let found = bcd.default_loader().unwrap();
        assert_eq!(found.device, BcdDevice::parse(&mbr()));
        assert_eq!(found.description.as_deref(), Some("Windows 7"));
        assert_eq!((&found.os_device, found.is_transient()), (&None, false));
        assert_eq!(
            bcd.graphics_mode_disabled,
            [format!("Objects\\{LOADER}\\Elements\\16000046")]
        );
    }

    #[test]
    fn ems_wherever_it_is_switched_on() {
        const EMS_SETTINGS: &str = "{0ce4991b-e6b3-4b16-b23c-5e0d9250e5d9}";
        let on = || RegData::Binary(vec![1]);
        for object in [LOADER, EMS_SETTINGS] {
            let mut store = bios_store();
            element(&mut store, object, OS_EMS, RegData::Binary(vec![0]));
            // The debugger of boot applications is enabled by default in Windows 7.
            element(&mut store, EMS_SETTINGS, "16000020", on());
            assert_eq!(parse(&store).unwrap().ems, [""; 0]);
            element(&mut store, object, OS_EMS, on());
            let port = RegData::Binary(2u64.to_le_bytes().to_vec());
            element(&mut store, EMS_SETTINGS, EMS_PORT, port);
            let bcd = parse(&store).unwrap();
            assert_eq!(bcd.ems, [format!("{object} {OS_EMS}")]);
            assert_eq!(bcd.ems_port, Some(2));
        }
    }

    #[test]
    fn the_kernel_debugger_and_its_port() {
        const SETTINGS: &str = "{4636856e-540f-4170-a130-a84776f4c654}";
        let number = |n: u64| RegData::Binary(n.to_le_bytes().to_vec());
        let mut store = bios_store();
        assert_eq!(
            parse(&store).unwrap().debugger_port_number(&id(LOADER)),
            None
        );
        element(&mut store, LOADER, OS_DEBUG, RegData::Binary(vec![1]));
        let port = |store: &KeyTree| parse(store).unwrap().debugger_port_number(&id(LOADER));
        // The defaults of Windows.
        assert_eq!(port(&store), Some(1));
        element(&mut store, SETTINGS, DEBUGGER_TYPE, number(0));
        element(&mut store, SETTINGS, DEBUGGER_PORT, number(2));
        assert_eq!(port(&store), Some(2));
        // A debugger on the network.
        element(&mut store, SETTINGS, DEBUGGER_TYPE, number(3));
        assert_eq!(port(&store), None);
        // Another entry.
        assert_eq!(parse(&store).unwrap().debugger_port_number("{x}"), None);
    }

    fn id(object: &str) -> String {
        object.to_lowercase()
    }

    #[test]
    fn a_default_that_is_not_there() {
        let mut store = bios_store();
        element(
            &mut store,
            BOOTMGR,
            DEFAULT_OBJECT,
            RegData::Sz("{gone}".into()),
        );
        let bcd = parse(&store).unwrap();
        assert_eq!(bcd.default_loader(), None);
        assert_eq!(bcd.default.as_deref(), Some("{gone}"));

        let empty = parse(&KeyTree::new("NewStoreRoot"));
        assert!(matches!(empty, Err(BcdError::NoBootManager)));
    }

    /// A cell size of zero and a root cell outside the bins once crashed the reader.
    #[test]
    fn damaged_stores_are_errors_at_worst() {
        let mut store = bios_store();
        element(
            &mut store,
            BOOTMGR,
            DEFAULT_OBJECT,
            RegData::Sz(LOADER.into()),
        );
        let good = store.to_bytes_as("\\Boot\\BCD", Format::V1_3);
        for at in (0..good.len()).filter(|at| good[*at] != 0) {
            for value in [0, 0xff, good[at] ^ 1] {
                let mut bad = good.clone();
                bad[at] = value;
                if let Ok(hive) = HiveView::new(&bad) {
                    let _ = Bcd::parse(&hive);
                }
            }
        }
    }
}
