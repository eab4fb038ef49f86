//! Options of remote sources, and their compatibility with each kind of source.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::error::{Error, Result};
use crate::source::mirror;
use crate::wire::{Access, Location, Transport};

#[derive(Debug, Clone, Default, Args)]
pub struct WireArgs {
    /// User on the other host [default: the one in the URL; for ssh also that of its configuration]
    #[arg(long, value_name = "NAME", help_heading = HEADING)]
    pub user: Option<String>,
    /// File whose first line is the password of the user; - is standard input
    #[arg(long, value_name = "FILE", help_heading = HEADING)]
    pub password_file: Option<PathBuf>,
    /// Private key for ssh [default: the agent's, and those of the ssh configuration]
    #[arg(long, value_name = "FILE", help_heading = HEADING)]
    pub ssh_identity: Option<PathBuf>,
    /// Host keys for ssh, instead of the user's known_hosts
    #[arg(long, value_name = "FILE", help_heading = HEADING)]
    pub ssh_known_hosts: Option<PathBuf>,
    /// Certificate authority for https and nbds (PEM), instead of those of this host
    #[arg(long, value_name = "FILE", conflicts_with = "tls_fingerprint", help_heading = HEADING)]
    pub tls_ca: Option<PathBuf>,
    /// Fingerprint of the server's certificate, for https, instead of an authority
    #[arg(long, value_name = "sha256:HEX", value_parser = fingerprint, help_heading = HEADING)]
    pub tls_fingerprint: Option<String>,
    /// Connections to the other host at a time, at most [default: 12 for ssh, 8 for others]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), help_heading = HEADING)]
    pub connections: Option<u32>,
    /// How often a failed request is repeated, each time after a longer pause [default: 10]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1000), help_heading = HEADING)]
    pub retries: Option<u32>,
    /// Program that speaks NBD on its standard input and output, started for each connection;
    /// SOURCE is then a name. Split like in a POSIX shell, without a shell
    #[arg(long, value_name = "PROGRAM ARG...", help_heading = HEADING)]
    pub source_command: Option<String>,
}

const HEADING: &str = "Sources on the wire";

fn fingerprint(text: &str) -> Result<String, String> {
    let digits = text.strip_prefix("sha256:").unwrap_or_default();
    let digits: String = digits.chars().filter(|c| *c != ':').collect();
    let hex = digits.len() == 64 && digits.chars().all(|c| c.is_ascii_hexdigit());
    match hex {
        true => Ok(format!("sha256:{}", digits.to_ascii_lowercase())),
        false => Err(
            "sha256: and 64 hex digits, as openssl x509 -noout -fingerprint -sha256 prints them"
                .into(),
        ),
    }
}

/// The location of a SOURCE that is not a local path.
pub(crate) fn location(source: &Path, wire: &WireArgs) -> Result<Option<Location>> {
    let parsed = match source.to_str() {
        // Even a relative path in this form is a URL; ./ in front of it makes it a path.
        Some(text) => Location::parse(text)?,
        None => None,
    };
    if wire.source_command.is_none() {
        return Ok(parsed);
    }
    if parsed.is_some() {
        return Err(Error::usage("--source-command and a URL name two sources")
            .hint("with --source-command SOURCE is a name for the disk"));
    }
    Ok(Some(Location::command(&source.to_string_lossy())))
}

impl WireArgs {
    /// Fails if an option has no meaning for this source.
    pub(crate) fn check(&self, at: Option<&Location>) -> Result<()> {
        let transport = at.map_or(Transport::File, Location::transport);
        let is = |known: &[Transport]| known.contains(&transport);
        use Transport::{Https, Nbd, Ssh};
        for (given, name, fits) in [
            (self.user.is_some(), "user", is(&[Ssh, Https])),
            (
                self.password_file.is_some(),
                "password-file",
                is(&[Ssh, Https]),
            ),
            (self.ssh_identity.is_some(), "ssh-identity", is(&[Ssh])),
            (
                self.ssh_known_hosts.is_some(),
                "ssh-known-hosts",
                is(&[Ssh]),
            ),
            (self.tls_ca.is_some(), "tls-ca", is(&[Https, Nbd])),
            (
                self.tls_fingerprint.is_some(),
                "tls-fingerprint",
                is(&[Https]),
            ),
            (self.connections.is_some(), "connections", at.is_some()),
            (self.retries.is_some(), "retries", at.is_some()),
        ] {
            if given && !fits {
                let source = match at {
                    Some(at) => format!("a source over {}", at.transport().name()),
                    None => "a source of this host".to_owned(),
                };
                return Err(Error::usage(format!("--{name} means nothing for {source}"))
                    .hint("leave it out, or name the source by its URL: ssh://HOST/PATH, https://HOST/PATH"));
            }
        }
        Ok(())
    }

    pub(crate) fn access(&self) -> Access {
        let default = Access::default();
        Access {
            user: self.user.clone(),
            password_file: self.password_file.clone(),
            ssh_identity: self.ssh_identity.clone(),
            ssh_known_hosts: self.ssh_known_hosts.clone(),
            tls_ca: self.tls_ca.clone(),
            tls_fingerprint: self.tls_fingerprint.clone(),
            connections: self.connections,
            retries: self.retries.unwrap_or(default.retries),
            source_command: self.source_command.clone(),
            ..default
        }
    }

    /// The local path of a source: itself, or its mirror. Connects, so it comes before this process
    /// gives up the network.
    pub fn locate(&self, source: &Path) -> Result<PathBuf> {
        let Some(at) = location(source, self)? else {
            return Ok(source.to_owned());
        };
        self.check(Some(&at))?;
        Ok(mirror::open(&at, &self.access())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_go_with_their_transports() {
        let at = |text: &str| location(Path::new(text), &WireArgs::default()).unwrap();
        let user = WireArgs {
            user: Some("root".into()),
            ..WireArgs::default()
        };
        let pinned = WireArgs {
            tls_fingerprint: Some("sha256:00".into()),
            ..WireArgs::default()
        };
        let patient = WireArgs {
            retries: Some(3),
            ..WireArgs::default()
        };
        for (args, source, fits) in [
            (&user, "ssh://h/x", true),
            (&user, "https://h/x", true),
            (&user, "nbd://h/x", false),
            (&user, "disk.vmdk", false),
            (&pinned, "https://h/x", true),
            (&pinned, "nbds://h/x", false),
            (&pinned, "ssh://h/x", false),
            (&patient, "nbd+unix:///x?socket=/s", true),
            (&patient, "disk.vmdk", false),
        ] {
            let checked = args.check(at(source).as_ref());
            assert_eq!(checked.is_ok(), fits, "{source}");
            assert!(checked.is_ok() || !checked.unwrap_err().hints.is_empty());
        }
    }

    #[test]
    fn a_command_takes_a_name_and_no_url() {
        let command = WireArgs {
            source_command: Some("nbdkit -s null".into()),
            ..WireArgs::default()
        };
        let found = location(Path::new("vm1"), &command).unwrap().unwrap();
        assert_eq!(found.transport(), Transport::Command);
        let error = location(Path::new("ssh://h/x"), &command).unwrap_err();
        assert_eq!(error.kind.code(), 2);
        for password in ["ssh://u:secret@h/x", "https://u:secret@h/x"] {
            let error = location(Path::new(password), &WireArgs::default()).unwrap_err();
            assert_eq!(error.kind.code(), 2);
            assert!(!error.message.contains("secret"), "{}", error.message);
        }
    }

    #[test]
    fn fingerprints_in_both_spellings() {
        let plain = format!("sha256:{}", "ab".repeat(32));
        let colons = format!("sha256:{}", vec!["AB"; 32].join(":"));
        assert_eq!(fingerprint(&plain).unwrap(), plain);
        assert_eq!(fingerprint(&colons).unwrap(), plain);
        for wrong in ["", "ab", "sha256:ab", "sha1:abab", &plain[..70]] {
            assert!(fingerprint(wrong).is_err(), "{wrong}");
        }
    }
}
