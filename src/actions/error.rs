//! Reasons why an action fails.

use crate::drivers::driver_source::DriverSourceError;
use crate::guest::GuestError;
use crate::registry::confined::HiveEditError;
use crate::registry::second_reader::SecondReaderError;

#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    #[error("changing the guest")]
    Guest(#[from] GuestError),
    #[error("editing the {hive} hive")]
    Edit {
        hive: &'static str,
        #[source]
        source: HiveEditError,
    },
    #[error("the {hive} hive is not as it should be after the edit")]
    Hive {
        hive: &'static str,
        #[source]
        source: SecondReaderError,
    },
    #[error("reading {path} from the driver source")]
    DriverSource {
        path: String,
        #[source]
        source: DriverSourceError,
    },
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the hive {0} is needed by the plan but was not read")]
    NoHive(&'static str),
}

pub type Result<T, E = ActionError> = std::result::Result<T, E>;

pub(super) fn io_error(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> ActionError {
    let doing = doing.into();
    |source| ActionError::Io { doing, source }
}
