//! The virtio-win drivers: their files, the selection for a Windows, and their installation.
//!
//! ```text
//!  ISO / directory --media--> Media --select--> DriverSet --package--> files + registry edits
//!                                   ^   ^
//!        drivers/*.yaml --catalogue-+   +--inf (which models of an INF are for this Windows)
//! ```
//!
//! No code here touches a guest: the result is data, which `plan` decides on and `fix` carries out.

pub mod authenticode;
pub mod catalogue;
pub mod inf;
pub mod iso;
pub(crate) mod media;
pub mod origin;
pub(crate) mod package;
pub mod pe;
pub(crate) mod select;
pub mod signature;
pub mod target;

pub use catalogue::{Catalogue, CatalogueError, Role};
pub use inf::DriverInf;
pub use media::{Media, MediaError, MediaFile};
pub use package::{Installation, Placement};
pub use select::{DriverError, DriverPackage, DriverSet, PackageFile, select};
pub use target::{Arch, WindowsTarget};
