#![no_main]
//! The hives and the boot store of a Windows guest with damage anywhere, as `inspect` reads them: what
//! starts, which drivers and adapters there are, what is installed.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use hyper2kvm::block::BlockRead;
use hyper2kvm::guest::DiskId;
use hyper2kvm::inspect::{Disk, InspectOptions, SourceFacts, inspect};
use hyper2kvm_fuzz::bounded;
use hyper2kvm_fuzz::disk::Patched;
use hyper2kvm_fuzz::guest::{Demo, KINDS, VERSIONS};
use libfuzzer_sys::fuzz_target;

static DEMOS: OnceLock<Vec<Demo>> = OnceLock::new();

fuzz_target!(|input: &[u8]| {
    let Some((kind, input)) = input.split_first() else {
        return;
    };
    bounded(|| {
        let demos = DEMOS.get_or_init(|| VERSIONS.map(Demo::new).into());
        let demo = &demos[usize::from(*kind) % demos.len()];
        let hive = KINDS[usize::from(*kind) / demos.len() % KINDS.len()];
        let mut changed = BTreeMap::new();
        if let Some(base) = demo.hive(hive) {
            let disk = Patched::new(base, input);
            let mut bytes = vec![0; disk.size() as usize];
            disk.read_at(0, &mut bytes).expect("all of it");
            changed.insert(hive, bytes);
        }
        let disk = Disk {
            id: DiskId::ONLY,
            layout: demo.layout.clone(),
            source: SourceFacts {
                path: "disk".into(),
                format: "raw".into(),
                virtual_size_bytes: 2 << 30,
            },
        };
        let guest = demo.guest(&changed);
        let options = InspectOptions::default();
        let _ = inspect(&guest, &[disk], &options);
    });
});
