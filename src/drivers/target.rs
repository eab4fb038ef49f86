//! The Windows for which a driver is chosen: version numbers, architecture and product type, never
//! a name.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::types::Arch;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowsTarget {
    /// The NT version: 10.0 for 10, 11 and Server 2016 and later, 6.1 for 7 and 2008 R2, ...
    pub major: u32,
    pub minor: u32,
    pub build: u32,
    pub arch: Arch,
    /// Whether it is a server or domain controller, from `InstallationType` or `ProductOptions`.
    pub server: bool,
}

impl WindowsTarget {
    /// Whether the kernel finds boot drivers through `SYSTEM\DriverDatabase` (8 and later), not
    /// through `CriticalDeviceDatabase`.
    pub fn has_driver_database(&self) -> bool {
        (self.major, self.minor) >= (6, 2)
    }
}

impl fmt::Display for WindowsTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Windows NT {}.{}.{} {} {}",
            self.major,
            self.minor,
            self.build,
            if self.server { "server" } else { "client" },
            self.arch
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_each_version_has() {
        let cases = [
            ((5, 1), false),
            ((6, 1), false),
            ((6, 2), true),
            ((6, 3), true),
            ((10, 0), true),
        ];
        for ((major, minor), database) in cases {
            let target = WindowsTarget {
                major,
                minor,
                build: 1,
                arch: Arch::Amd64,
                server: false,
            };
            assert_eq!(target.has_driver_database(), database, "{target}");
        }
        for (server, text) in [
            (false, "Windows NT 6.3.9600 client arm64"),
            (true, "Windows NT 6.3.9600 server arm64"),
        ] {
            let target = WindowsTarget {
                major: 6,
                minor: 3,
                build: 9600,
                arch: Arch::Arm64,
                server,
            };
            assert_eq!(target.to_string(), text);
        }
    }
}
