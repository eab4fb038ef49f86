//! Decides what to do: a pure function from what was found to a list of actions.

pub mod model;
