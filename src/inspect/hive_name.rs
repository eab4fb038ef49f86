//! The hives of a guest, by name.

use serde::Serialize;

use super::model::{Hives, LoadedBytes};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum HiveName {
    System,
    Software,
    Drivers,
    /// The boot configuration store.
    Bcd,
}

impl HiveName {
    /// The file name; also used in the backup and registry directories.
    pub fn file_name(self) -> &'static str {
        match self {
            HiveName::System => "SYSTEM",
            HiveName::Software => "SOFTWARE",
            HiveName::Drivers => "DRIVERS",
            HiveName::Bcd => "BCD",
        }
    }

    /// The key under which a running Windows mounts it. DRIVERS is loaded by PnP only while needed;
    /// the name is the one in its own tools.
    pub fn prefix(self) -> &'static str {
        match self {
            HiveName::System => r"HKEY_LOCAL_MACHINE\SYSTEM",
            HiveName::Software => r"HKEY_LOCAL_MACHINE\SOFTWARE",
            HiveName::Drivers => r"HKEY_LOCAL_MACHINE\DRIVERS",
            HiveName::Bcd => r"HKEY_LOCAL_MACHINE\BCD00000000",
        }
    }
}

impl Hives {
    pub fn get(&self, name: HiveName) -> Option<&LoadedBytes> {
        match name {
            HiveName::System => Some(&self.system),
            HiveName::Software => Some(&self.software),
            HiveName::Drivers => self.drivers.as_ref(),
            HiveName::Bcd => self.bcd.as_ref(),
        }
    }
}
