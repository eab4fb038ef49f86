#![no_main]
//! Small files of a Linux guest: os-release, fstab, network configurations.

use hyper2kvm::linux::files::{fstab, hardware_names, interfaces, os_release};
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

const NETWORK: [&str; 5] = [
    "/etc/sysconfig/network-scripts/ifcfg-ens160",
    "/etc/NetworkManager/system-connections/a.nmconnection",
    "/etc/netplan/00.yaml",
    "/etc/systemd/network/10.network",
    "/etc/network/interfaces",
];

fuzz_target!(|input: &[u8]| {
    let Some((kind, text)) = input.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(text);
    let lines = text.lines().count();
    bounded(|| match kind % 7 {
        0 => assert!(os_release(&text).len() <= lines),
        1 => {
            let mounts = fstab(&text);
            assert!(mounts.len() <= lines && hardware_names(&mounts).len() <= mounts.len());
        }
        n => {
            for name in interfaces(NETWORK[usize::from(n) - 2], &text) {
                assert!(name.bytes().all(|b| b.is_ascii_alphanumeric()), "{name:?}");
            }
        }
    });
});
