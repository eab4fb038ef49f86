//! Things to try the program on without a Windows: made by our own code, the same on every run.

pub mod virtio_win;
