//! Many conversions on one host.
//!
//! [`file`] parses the list. [`run`] starts one child of this same program per VM, a limited number
//! at a time. [`report`] summarises the results. A child that crashes, hangs or runs out of memory
//! affects no other VM, and all of them die with this process.
//!
//! There is no state besides the output directories. A VM is done if its directory is complete, and
//! was made from the same inputs with the same options ([`run::Conversion::done`]).

pub mod file;
pub(crate) mod page;
pub mod report;
pub mod run;
