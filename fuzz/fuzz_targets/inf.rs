#![no_main]
//! A driver's INF, read for each kind of Windows.

use hyper2kvm::drivers::inf::DriverInf;
use hyper2kvm::drivers::target::{Arch, WindowsTarget};
use hyper2kvm_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        for (major, minor, build, arch) in [
            (5, 1, 2600, Arch::X86),
            (6, 1, 7601, Arch::Amd64),
            (10, 0, 22621, Arch::Arm64),
        ] {
            let target = WindowsTarget {
                major,
                minor,
                build,
                arch,
                server: major == 6,
            };
            if let Ok(inf) = DriverInf::parse(input, &target) {
                let _ = inf.strings();
                let _ = inf.device_service();
                let _ = inf.services().count();
                assert!(inf.models.len() <= input.len());
            }
        }
    });
});
