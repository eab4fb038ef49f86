//! The virtio-win drivers: their files, the selection for a Windows, and their installation.
//!
//! ```text
//!  ISO / directory --driver_source--> DriverSource --select--> DriverSet --package--> files + registry edits
//!                                                     ^   ^
//!                          drivers/*.yaml --catalogue-+   +--inf (which models of an INF are for this Windows)
//! ```
//!
//! No code here touches a guest: the result is data, which `plan` decides on and `fix` carries out.

pub mod authenticode;
pub mod catalogue;
pub(crate) mod driver_source;
pub mod inf;
pub mod iso;
pub mod origin;
pub(crate) mod package;
pub mod pe;
pub(crate) mod select;
pub mod signature;
pub mod target;

pub use catalogue::{Catalogue, CatalogueError, Role};
pub use driver_source::{DriverFile, DriverSource, DriverSourceError};
pub use inf::DriverInf;
pub use package::{Installation, Placement};
pub use select::{DriverError, DriverPackage, DriverSet, PackageFile, select};
pub use target::{Arch, WindowsTarget};
