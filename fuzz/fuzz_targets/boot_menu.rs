#![no_main]
//! The menus of Linux' boot loaders, and GRUB's environment block.

use std::collections::BTreeMap;

use hyper2kvm::linux::bootloader::{
    Loader, Menu, bls_entry, bls_menu, compare_versions, extlinux, grub_cfg, grub_env, grub_legacy,
};
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fn check(menu: &Menu) {
    assert_eq!(menu.default.is_some(), !menu.entries.is_empty());
    assert!(menu.default.is_none_or(|i| i < menu.entries.len()));
    for entry in &menu.entries {
        assert!(!entry.kernel.is_empty());
        let _ = entry.argument("root");
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, text)) = input.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(text);
    bounded(|| match kind % 5 {
        0 => {
            // The environment block first, so that its variables can be used.
            let (env, config) = text.split_once('\0').unwrap_or(("", &text));
            check(&grub_cfg(config, &grub_env(env)));
        }
        1 => {
            let env = BTreeMap::from([("kernelopts".into(), "root=/dev/sda1 ro".into())]);
            let files = text.split('\0').enumerate();
            let entries: Vec<_> = files
                .filter_map(|(i, file)| {
                    let id = file.lines().next().unwrap_or_default();
                    bls_entry(&format!("{id}{i}"), file, &env)
                })
                .collect();
            let wanted = text.lines().next_back().unwrap_or_default();
            check(&bls_menu(entries, Loader::GrubBls, wanted));
        }
        2 => check(&grub_legacy(&text)),
        3 => check(&extlinux(&text)),
        _ => {
            let (a, b) = text.split_once('\n').unwrap_or(("", &text));
            assert_eq!(compare_versions(a, b), compare_versions(b, a).reverse());
        }
    });
});
