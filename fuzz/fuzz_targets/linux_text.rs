#![no_main]
//! Small files of a Linux guest: os-release, fstab, network configurations, lists of modules.

use hyper2kvm::linux::files::{fstab, fstab_names, interfaces, os_release};
use hyper2kvm::linux::modules::{builtin_of_config, parse_builtin, parse_dep};
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
    bounded(|| match kind % 10 {
        0 => assert!(os_release(&text).len() <= lines),
        1 => {
            let mounts = fstab(&text);
            assert!(mounts.len() <= lines && fstab_names(&mounts).len() <= mounts.len());
        }
        2 => assert!(parse_dep(&text).len() <= lines),
        3 => assert!(parse_builtin(&text).len() <= lines),
        4 => {
            let _ = builtin_of_config(&text);
        }
        n => {
            for name in interfaces(NETWORK[usize::from(n) - 5], &text) {
                assert!(name.bytes().all(|b| b.is_ascii_alphanumeric()), "{name:?}");
            }
        }
    });
});
