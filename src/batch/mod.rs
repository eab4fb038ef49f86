//! Many conversions on one host.
//!
//! [`file`] reads the list, [`run`] starts one child of this same program per machine, so many at a
//! time, and [`report`] says what became of them. A child that crashes, hangs or runs out of memory
//! takes no other VM with it, and all of them die with us.
//!
//! There is no state besides the output directories: a VM whose directory is complete, and was made from
//! the same inputs with the same options, is done ([`run::Machine::done`]).

pub mod file;
pub(crate) mod page;
pub mod report;
pub mod run;
