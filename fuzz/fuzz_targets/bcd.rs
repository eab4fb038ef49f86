#![no_main]
//! A boot configuration store, which is a hive, so this is also the fuzz target of the hive reader.

use hyper2kvm::registry::{Bcd, BcdDevice, HiveView};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let _ = BcdDevice::parse(input);
    if let Ok(hive) = HiveView::new(input)
        && let Ok(bcd) = Bcd::parse(&hive)
        && let Some(loader) = bcd.default_loader()
    {
        assert!(bcd.objects.iter().any(|object| object.id == loader.id));
        let _ = loader.is_transient();
    }
});
