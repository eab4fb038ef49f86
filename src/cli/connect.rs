//! `--connect`: the libvirt of a command.

/// The help of commands for a directory that may have been booted.
pub const RECORDED: &str = "libvirt of this host, where no `boot` has recorded one";

#[derive(Debug, clap::Args)]
pub struct ConnectArgs {
    /// libvirt of this host
    #[arg(
        long,
        value_name = "URI",
        env = "LIBVIRT_DEFAULT_URI",
        default_value = "qemu:///system"
    )]
    pub connect: String,
}
