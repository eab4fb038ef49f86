//! The boot configuration data: a hive with one boot manager and one loader.
//!
//! Shape from a real BCD (Windows 10, UEFI): `Objects\{guid}\Elements\<type>` with one value
//! `Element`. Format 1.3, as in Windows.

use uuid::{Uuid, uuid};

use super::{DISK_GUID, Firmware, GuestSpec, MBR_SIGNATURE, PartitionSpec, Role};
use crate::registry::KeyTree;
use crate::registry::RegData;
use crate::registry::build::Format;

pub const BOOT_MANAGER: Uuid = uuid!("9dea862c-5cdd-4e70-acc1-f32b344d4795");
pub const LOADER: Uuid = uuid!("733b62e5-f608-11eb-825c-c112f60133ab");
const RESUME: Uuid = uuid!("733b62e4-f608-11eb-825c-c112f60133ab");
const GLOBAL_SETTINGS: Uuid = uuid!("7ea2e1ac-2e61-4728-aaa3-896d9d0a9f0e");
const LOADER_SETTINGS: Uuid = uuid!("6efb52bf-1766-41db-a6b3-0ee5eff72bd7");

/// The BCD store; `None` for NT 5, which boots through `ntldr` and `boot.ini`.
pub fn bytes(spec: &GuestSpec) -> Option<Vec<u8>> {
    if !spec.version.nt_at_least(6, 0) {
        return None;
    }
    let file = match spec.firmware {
        Firmware::Uefi => "\\EFI\\Microsoft\\Boot\\BCD",
        Firmware::Bios => "\\Boot\\BCD",
    };
    Some(tree(spec).to_bytes_as(file, Format::V1_3))
}

fn tree(spec: &GuestSpec) -> KeyTree {
    let uefi = spec.firmware == Firmware::Uefi;
    let extension = if uefi { "efi" } else { "exe" };
    let mut store = KeyTree::new("NewStoreRoot");
    store.sz("Description", "KeyName", "BCD00000000");
    store.dword("Description", "System", 1);
    store.dword("Description", "TreatAsSystem", 1);

    let boot = device(spec, spec.boot_role());
    let windows = device(spec, Role::Windows);
    let list = |guid: Uuid| RegData::MultiSz(vec![guid.braced().to_string()]);
    let one = |guid: Uuid| RegData::Sz(guid.braced().to_string());
    let number = |n: u64| RegData::Binary(n.to_le_bytes().to_vec());
    let text = |text: &str| RegData::Sz(text.to_string());

    let mut object = |guid: Uuid, kind: u32, elements: Vec<(&str, RegData)>| {
        let key = format!("Objects\\{}", guid.braced());
        store.dword(&format!("{key}\\Description"), "Type", kind);
        store.key_mut(&format!("{key}\\Elements"));
        for (element, data) in elements {
            store.set(&format!("{key}\\Elements\\{element}"), "Element", data);
        }
    };

    let mut manager = vec![
        ("11000001", boot),
        ("12000004", text("Windows Boot Manager")),
        ("12000005", text("en-US")),
        ("14000006", list(GLOBAL_SETTINGS)),
        ("23000003", one(LOADER)),
        ("23000006", one(RESUME)),
        ("24000001", list(LOADER)),
        ("25000004", number(30)),
    ];
    if uefi {
        let path = "\\EFI\\Microsoft\\Boot\\bootmgfw.efi";
        manager.push(("12000002", text(path)));
    }
    object(BOOT_MANAGER, 0x1010_0002, manager);

    let folder = format!("\\{}", spec.windows_dir);
    let description = match spec.version.facts().product_name {
        name if name.contains("Server") => "Windows Server",
        name if name.contains("10") => "Windows 10",
        name if name.contains("8.1") => "Windows 8.1",
        _ => "Windows 7",
    };
    let loader = format!("{folder}\\system32\\winload.{extension}");
    object(
        LOADER,
        0x1020_0003,
        vec![
            ("11000001", windows.clone()),
            ("12000002", text(&loader)),
            ("12000004", text(description)),
            ("12000005", text("en-US")),
            ("14000006", list(LOADER_SETTINGS)),
            ("16000060", RegData::Binary(vec![1])),
            ("21000001", windows.clone()),
            ("22000002", text(&folder)),
            ("23000003", one(RESUME)),
            ("25000020", number(0)),
        ],
    );
    let resume = format!("{folder}\\system32\\winresume.{extension}");
    object(
        RESUME,
        0x1020_0004,
        vec![
            ("11000001", windows.clone()),
            ("12000002", text(&resume)),
            ("12000004", text("Windows Resume Application")),
            ("21000001", windows),
            ("22000002", text("\\hiberfil.sys")),
        ],
    );
    object(GLOBAL_SETTINGS, 0x2010_0000, Vec::new());
    object(LOADER_SETTINGS, 0x2020_0003, Vec::new());
    store
}

/// A device element: 16 bytes for absent options, then a "qualified partition".
fn device(spec: &GuestSpec, role: Role) -> RegData {
    let mut data = vec![0; 16];
    let mut put = |bytes: &[u8]| data.extend_from_slice(bytes);
    put(&6u32.to_le_bytes());
    put(&[0; 4]);
    put(&0x48u64.to_le_bytes());
    match spec.firmware {
        Firmware::Uefi => {
            put(&role.guid().to_bytes_le());
            put(&[0; 4]);
            put(&0u32.to_le_bytes());
            put(&DISK_GUID.to_bytes_le());
        }
        Firmware::Bios => {
            let start = spec.partition(role).map_or(0, |p: PartitionSpec| p.start);
            put(&start.to_le_bytes());
            put(&[0; 8]);
            put(&[0; 4]);
            put(&1u32.to_le_bytes());
            put(&MBR_SIGNATURE.to_le_bytes());
            put(&[0; 12]);
        }
    }
    put(&[0; 16]);
    RegData::Binary(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::WinVersion;
    use crate::registry::HiveView;
    use crate::registry::walk::walk;

    #[test]
    fn the_store_names_the_partition_windows_is_on() {
        for version in [WinVersion::Win7, WinVersion::Win10] {
            let spec = GuestSpec::new(version);
            let bytes = bytes(&spec).unwrap();
            walk(&bytes).unwrap();
            let view = HiveView::new(&bytes).unwrap();
            let elements = format!("Objects\\{}\\Elements", LOADER.braced());
            let element = |id: &str| {
                let key = view.key(&format!("{elements}\\{id}")).unwrap().unwrap();
                key.value("Element").unwrap().unwrap()
            };
            let device = element("21000001").data;
            // Like the real one: 16 bytes and 0x48 more.
            assert_eq!(device.len(), 88);
            let windows = spec.partition(Role::Windows).unwrap();
            match spec.firmware {
                Firmware::Uefi => assert_eq!(device[32..48], windows.role.guid().to_bytes_le()),
                Firmware::Bios => assert_eq!(device[32..40], windows.start.to_le_bytes()),
            }
            let root = element("22000002").as_string();
            assert_eq!(root.as_deref(), Some("\\Windows"));
        }
        assert!(super::bytes(&GuestSpec::new(WinVersion::Xp)).is_none());
    }
}
