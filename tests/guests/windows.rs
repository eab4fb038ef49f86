//! Unfinished operations of Windows, and special roles of a guest.

use hyper2kvm::demo::{DemoVolume, GuestSpec, Role, WinVersion};
use hyper2kvm::registry::RegData;

use crate::rows::assert_row;
use crate::support::{Lab, TOOLS, have};
use crate::{Guest, SET, find, spec};

#[test]
fn states_of_windows_are_told() {
    if !have(&TOOLS) {
        return;
    }
    let guest = Guest::new(WinVersion::Win10);
    guest.write(
        DemoVolume::Windows,
        "System Volume Information\\{f3cf8f0b-0000-11ee-8c99-0242ac120002}{3808876b-c176-4e48-b7ae-04046e6cc752}",
        &[0; 4096],
    );
    guest.write(
        DemoVolume::Windows,
        "Windows\\WinSxS\\pending.xml",
        b"<xml/>",
    );
    guest.edit_hive("SYSTEM", |system| {
        system
            .sz(
                &format!("{SET}\\Control\\ProductOptions"),
                "ProductType",
                "LanmanNT",
            )
            .set(
                &format!("{SET}\\Control\\Session Manager"),
                "PendingFileRenameOperations",
                RegData::MultiSz(vec![r"\??\C:\x".into()]),
            )
            .dword(&format!("{SET}\\Services\\ClusSvc"), "Start", 2)
            .dword(&format!("{SET}\\Services\\SymEFASI"), "Start", 0)
            .dword(&format!("{SET}\\Services\\SymEFASI"), "Type", 1)
            .dword(&format!("{SET}\\Control\\DeviceGuard"), "Mandatory", 1)
            .dword(
                &format!("{SET}\\Control\\DeviceGuard"),
                "EnableVirtualizationBasedSecurity",
                1,
            )
            .dword("Setup", "SystemSetupInProgress", 1);
    });
    guest.edit_hive("SOFTWARE", |software| {
        software
            .dword(
                "Policies\\Microsoft\\Windows\\DeviceInstall\\Restrictions",
                "DenyUnspecified",
                1,
            )
            .key_mut(
                "Microsoft\\Windows\\CurrentVersion\\Component Based Servicing\\RebootPending",
            );
    });
    let data = guest.attribute(Role::Windows, "explorer.exe", 0x80);
    guest.patch(data + 12, &1u16.to_le_bytes());
    let seen = guest.inspect();
    for id in [
        "vss-snapshots",
        "pending-updates",
        "pending-reboot",
        "pending-renames",
        "device-install-policy",
        "cluster-node",
        "domain-controller",
        "vbs-mandatory",
        "setup-in-progress",
        "antivirus",
        "compressed-volume",
    ] {
        let found = find(&seen["findings"], "id", id);
        assert_row(id, found.unwrap_or_else(|| panic!("no {id}")));
    }
    let report = guest.run("convert", &[]).expect(0).json();
    assert_eq!(report["ready"], true);
    assert_eq!(report["inspection"]["pending_updates"], true);
}

#[test]
fn system_files_compressed_by_compact_os() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(GuestSpec {
        compact_os: true,
        ..spec(WinVersion::Win10)
    });
    let guest = Guest::of(&lab);
    guest.accepted("compact-os");
    let (report, _) = guest.converted(&[]);
    assert_eq!(report["ready"], true);
}
