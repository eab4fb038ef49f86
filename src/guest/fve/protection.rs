//! The protections of a BitLocker volume's key.

/// The kind of a protector (libbde, "Key protection types"; bitlk for smart cards).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    ClearKey,
    Tpm,
    StartupKey,
    TpmAndPin,
    TpmAndStartupKey,
    RecoveryPassword,
    SmartCard,
    Password,
    Other(u16),
}

impl Protection {
    /// Parses the number. The lower byte is a priority among protectors of one kind (dislocker,
    /// dissect).
    pub fn of(number: u16) -> Self {
        match number & 0xff00 {
            0x0000 => Self::ClearKey,
            0x0100 => Self::Tpm,
            0x0200 => Self::StartupKey,
            0x0300 => Self::TpmAndStartupKey,
            0x0400 | 0x0500 => Self::TpmAndPin,
            0x0800 => Self::RecoveryPassword,
            0x1000 => Self::SmartCard,
            0x2000 => Self::Password,
            _ => Self::Other(number),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::ClearKey => "clear key",
            Self::Tpm => "TPM",
            Self::StartupKey => "startup key",
            Self::TpmAndPin => "TPM and PIN",
            Self::TpmAndStartupKey => "TPM and startup key",
            Self::RecoveryPassword => "recovery password",
            Self::SmartCard => "smart card",
            Self::Password => "password",
            Self::Other(_) => "another protector",
        }
    }

    /// Whether a key that a user can give opens it.
    pub fn takes_key(self) -> bool {
        matches!(
            self,
            Self::StartupKey | Self::RecoveryPassword | Self::Password
        )
    }

    pub fn list(protections: &[Self]) -> String {
        match protections {
            [] => "nothing that its metadata names".to_string(),
            some => some.iter().map(|p| p.name()).collect::<Vec<_>>().join(", "),
        }
    }
}
