//! SFTP through the system's OpenSSH client, with the user's configuration, agent, jump hosts and
//! known hosts.
//!
//! Host keys are always verified. A password goes to `ssh` through its askpass program, which is
//! this program again. It fetches the password from a socket in the private directory
//! ([`Prompter`]), so it is in no argument and no environment.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use base64::Engine;
use sha2::{Digest, Sha256};

use super::Access;
use super::control::Password;
use super::error::{Result, WireError};
use super::sftp::Sftp;
use super::upstream::{Connection, Dial, Meter, STALL};
use super::url::Server;
use crate::tool::{Child, Cmd, ToolError, clean};

/// The variable with the socket for the askpass program. It is no secret.
const ASKPASS: &str = "HYPER2KVM_ASKPASS";
const MAX_STDERR: usize = 16 << 10;
/// The time limit for a program to connect: keys, jump hosts, a reader that starts slowly.
const HELLO: Duration = Duration::from_secs(30);

/// Answers `ssh` if it started this process as its askpass program. Called in `main` with all
/// arguments.
pub fn ask_if_asked(args: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let socket = PathBuf::from(std::env::var_os(ASKPASS)?);
    let prompt = args.into_iter().nth(1)?;
    // One argument, and not a subcommand: `ssh` passes its prompt.
    let prompt = prompt.to_string_lossy().to_lowercase();
    let answered = match prompt.contains("passphrase") || prompt.contains("pin for") {
        true => Err(io::Error::other("that is no password of the other host")),
        false => hand_over(&socket),
    };
    Some(match answered {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

fn hand_over(socket: &Path) -> io::Result<()> {
    let mut password = zeroize::Zeroizing::new(Vec::new());
    UnixStream::connect(socket)?.read_to_end(&mut password)?;
    password.push(b'\n');
    io::stdout().write_all(&password)
}

/// The socket that provides the password to the askpass program.
pub(super) struct Prompter {
    socket: PathBuf,
}

impl Prompter {
    /// Starts to listen on `socket`, which is in a directory that only this user can enter.
    pub(super) fn start(socket: PathBuf, password: Password) -> io::Result<Self> {
        let listener = UnixListener::bind(&socket)?;
        std::thread::Builder::new()
            .name("askpass".into())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    let _ = (&stream).write_all(password.text().as_bytes());
                }
            })?;
        Ok(Self { socket })
    }
}

/// Starts `ssh` for each connection.
pub(super) struct SshDial {
    server: Server,
    access: Access,
    prompter: Option<Prompter>,
    meter: Arc<Meter>,
    /// The order in which ciphers are offered; `None` is that of the user's configuration.
    ciphers: OnceLock<Option<String>>,
}

impl SshDial {
    pub(super) fn new(
        server: Server,
        access: Access,
        prompter: Option<Prompter>,
        meter: Arc<Meter>,
    ) -> Self {
        Self {
            server,
            access,
            prompter,
            meter,
            ciphers: OnceLock::new(),
        }
    }

    fn command(&self) -> Result<Cmd> {
        let (mut cmd, host) = self.client()?;
        let ciphers = self.ciphers.get_or_init(|| self.preferred_ciphers());
        if let Some(ciphers) = ciphers {
            cmd = cmd.args(["-o", &format!("Ciphers={ciphers}")]);
        }
        Ok(cmd.args(["-s", "--", host, "sftp"]))
    }

    /// The ciphers to request instead of those in the user's configuration.
    fn preferred_ciphers(&self) -> Option<String> {
        if !has_aes() {
            return None;
        }
        let (cmd, host) = self.client().ok()?;
        // It prints its configuration and connects to nothing.
        let told = cmd.args(["-G", "--", host]).timeout(HELLO).run();
        let told = told.inspect_err(|e| tracing::debug!("the configuration of ssh: {e}"));
        preferred(&String::from_utf8_lossy(&told.ok()?.stdout))
    }

    /// The client with all options, and the host.
    fn client(&self) -> Result<(Cmd, &str)> {
        let Server::Ssh { user, host, port } = &self.server else {
            return Err(WireError::usage("not a server of ssh", ""));
        };
        let mut cmd = Cmd::new("ssh");
        for option in [
            "StrictHostKeyChecking=yes",
            "UpdateHostKeys=no",
            "ConnectTimeout=10",
            "ServerAliveInterval=5",
            "ServerAliveCountMax=2",
            "NumberOfPasswordPrompts=1",
            // Each needs a line of its own.
            "ControlMaster=no",
            "ControlPath=none",
            "ClearAllForwardings=yes",
            "ForwardAgent=no",
            "ForwardX11=no",
            "PermitLocalCommand=no",
            "RequestTTY=no",
            "LogLevel=ERROR",
        ] {
            cmd = cmd.args(["-o", option]);
        }
        if let Some(known) = &self.access.ssh_known_hosts {
            let known = format!("UserKnownHostsFile={}", quoted(known)?);
            cmd = cmd.args(["-o", &known, "-o", "GlobalKnownHostsFile=none"]);
        }
        if let Some(identity) = &self.access.ssh_identity {
            let identity = format!("IdentityFile={}", quoted(identity)?);
            cmd = cmd.args(["-o", &identity, "-o", "IdentitiesOnly=yes"]);
        }
        if let Some(user) = self.access.user.as_ref().or(user.as_ref()) {
            if !super::url::is_user(user) {
                return Err(WireError::usage("--user is not a name", "correct it"));
            }
            cmd = cmd.args(["-l", user]);
        }
        if let Some(port) = port {
            cmd = cmd.args(["-p", &port.to_string()]);
        }
        cmd = match &self.prompter {
            None => cmd.args(["-o", "BatchMode=yes"]),
            Some(prompter) => cmd
                .env("SSH_ASKPASS", std::env::current_exe().unwrap_or_default())
                .env("SSH_ASKPASS_REQUIRE", "force")
                // Older than 8.4: it calls askpass only with a display and without a terminal.
                .env(
                    "DISPLAY",
                    std::env::var_os("DISPLAY").unwrap_or(":0".into()),
                )
                .env(ASKPASS, &prompter.socket),
        };
        Ok((cmd, host))
    }
}

/// Whether the CPU has instructions for AES.
fn has_aes() -> bool {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    return std::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// The ciphers of a configuration (`ssh -G`) with AES-GCM first. If the CPU has instructions for
/// it, a byte takes a third of the time. `None` if another order than OpenSSH's default was
/// configured.
fn preferred(config: &str) -> Option<String> {
    let ciphers = config.lines().find_map(|l| l.strip_prefix("ciphers "))?;
    let ciphers: Vec<&str> = ciphers.trim().split(',').collect();
    if ciphers.first() != Some(&"chacha20-poly1305@openssh.com") {
        return None;
    }
    let is_gcm = |cipher: &&str| cipher.ends_with("-gcm@openssh.com");
    let (first, rest): (Vec<&str>, Vec<&str>) = ciphers.into_iter().partition(is_gcm);
    (!first.is_empty()).then(|| [first, rest].concat().join(","))
}

/// Quotes a file as the value of an ssh option, in which `%` and spaces are special.
fn quoted(path: &Path) -> Result<String> {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.into());
    let text = whole
        .to_str()
        .filter(|t| !t.contains(['"', '\n', '\\', '$']));
    let text = text.ok_or_else(|| {
        WireError::usage(
            format!("{}: ssh takes no file of that name", path.display()),
            "give it a name of plain letters",
        )
    })?;
    Ok(format!("\"{}\"", text.replace('%', "%%")))
}

impl Dial for SshDial {
    fn may_prepare(&self) -> bool {
        true
    }

    fn dial(&self) -> Result<Box<dyn Connection>> {
        let program = Program::start(self.command()?, &self.server)?;
        let stream = program.stream.try_clone();
        let stream = stream.map_err(|e| WireError::failed(&self.server, e, ""))?;
        let same = stream.try_clone();
        let (server, access) = (self.server.clone(), self.access.clone());
        let program = Mutex::new(program);
        let why = move || {
            let mut program = program.lock().unwrap_or_else(PoisonError::into_inner);
            let said = program.ended()?;
            Some(explain(&server, &access, &said))
        };
        let sftp = Sftp::start(
            stream,
            self.server.to_string(),
            self.meter.clone(),
            Box::new(why),
        )?;
        // From here on it answers immediately, or not at all.
        let patient = same.and_then(|stream| stream.set_read_timeout(Some(STALL)));
        patient.map_err(|e| WireError::failed(&self.server, e, ""))?;
        Ok(Box::new(sftp))
    }
}

/// A program whose stdin and stdout are one private socket. It ends when this is dropped.
pub(super) struct Program {
    pub(super) stream: UnixStream,
    child: Child,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Program {
    pub(super) fn start(cmd: Cmd, server: &Server) -> Result<Self> {
        let failed = |e: io::Error| WireError::failed(server, e, "");
        let (stream, theirs) = UnixStream::pair().map_err(failed)?;
        stream.set_read_timeout(Some(HELLO)).map_err(failed)?;
        stream.set_write_timeout(Some(STALL)).map_err(failed)?;
        let (mut errors, stderr) = io::pipe().map_err(failed)?;
        let stdout = theirs.try_clone().map_err(failed)?;
        let child = cmd
            .stdin(OwnedFd::from(theirs))
            .output(OwnedFd::from(stdout), OwnedFd::from(stderr))
            .spawn()
            .map_err(|error| match error {
                ToolError::NotFound { tool, hint } => WireError::MissingTool { tool, hint },
                error => WireError::failed(server, error, ""),
            })?;
        let said = Arc::new(Mutex::new(Vec::new()));
        let kept = said.clone();
        std::thread::Builder::new()
            .name("stderr".into())
            .spawn(move || {
                let mut buffer = [0; 1024];
                while let Ok(read @ 1..) = errors.read(&mut buffer) {
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    if kept.len() < MAX_STDERR {
                        kept.extend_from_slice(&buffer[..read]);
                    }
                }
            })
            .map_err(failed)?;
        Ok(Self {
            stream,
            child,
            said,
        })
    }

    /// Its last output, if it has ended or ends now.
    pub(super) fn ended(&mut self) -> Option<String> {
        let ended = self.child.wait(Duration::from_millis(500));
        if matches!(ended, Err(ToolError::TimedOut { .. })) {
            return None;
        }
        // Its last output may still be on its way.
        std::thread::sleep(Duration::from_millis(20));
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let how = ended.err().map(|error| error.to_string());
        Some(match clean(&said) {
            said if said.is_empty() => how.unwrap_or_else(|| "it ended".into()),
            said => said,
        })
    }
}

/// Explains OpenSSH's messages.
fn explain(server: &Server, access: &Access, said: &str) -> WireError {
    let at = server.to_string();
    let Server::Ssh { host, port, .. } = server else {
        return WireError::failed(at, said, "");
    };
    let has = |text: &str| said.contains(text);
    let last = said.lines().rev().find(|line| !line.trim().is_empty());
    let last = last.unwrap_or(said).trim().to_owned();
    let scan = match port {
        Some(port) => format!("ssh-keyscan -p {port} {host}"),
        None => format!("ssh-keyscan {host}"),
    };
    if has("REMOTE HOST IDENTIFICATION HAS CHANGED") || has("host key for") && has("has changed") {
        return WireError::Untrusted {
            at,
            shown: fingerprints(said)
                .next()
                .unwrap_or("another host key")
                .into(),
            expected: offending(said).unwrap_or_else(|| "the one in known_hosts".into()),
            hint: format!(
                "if the host was reinstalled, compare the key on its own screen (or: {scan} | ssh-keygen -lf -) \
                 and correct known_hosts; otherwise somebody is in between"
            ),
        };
    }
    if has("host key is known for") || has("Host key verification failed") {
        let file = match &access.ssh_known_hosts {
            Some(file) => file.display().to_string(),
            None => "~/.ssh/known_hosts".into(),
        };
        return WireError::Untrusted {
            at,
            shown: fingerprints(said)
                .next()
                .unwrap_or("an unknown host key")
                .into(),
            expected: format!("a key listed in {file}"),
            hint: format!(
                "run {scan} >> {file}, and compare ssh-keygen -lf {file} with what the host itself shows"
            ),
        };
    }
    if has("Permission denied") || has("Too many authentication failures") {
        return WireError::Denied {
            at,
            reason: last,
            hint: "give --ssh-identity FILE, a key in ssh-agent, or --password-file FILE; --user names the user"
                .into(),
        };
    }
    if has("subsystem request failed") {
        return WireError::Denied {
            at,
            reason: "the host has no SFTP server".into(),
            hint: "on ESXi before 7.0 there is none: copy the disk here first, or use https://"
                .into(),
        };
    }
    if has("Bad configuration option") || has("Could not resolve hostname") {
        return WireError::Denied {
            at,
            reason: last,
            hint: "check the name of the host, and ~/.ssh/config".into(),
        };
    }
    WireError::failed(
        at,
        last,
        "see that the host is up and SSH is on (ESXi: Host > Services > TSM-SSH)",
    )
}

/// Fingerprints in a message.
fn fingerprints(said: &str) -> impl Iterator<Item = &str> {
    let words = said.split_whitespace();
    words
        .filter(|word| word.starts_with("SHA256:"))
        .map(|word| word.trim_end_matches('.'))
}

/// The fingerprint of the known key to which a message points with `Offending ... key in
/// FILE:LINE`.
fn offending(said: &str) -> Option<String> {
    let place = said.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("Offending ")?;
        Some(rest.split_once(" key in ")?.1)
    })?;
    let (file, line) = place.rsplit_once(':')?;
    let number: usize = line.trim().parse().ok()?;
    let known = std::fs::read_to_string(file).ok()?;
    let line = known.lines().nth(number.checked_sub(1)?)?;
    // Possibly a marker, then hosts, kind and key.
    let key = line
        .split_whitespace()
        .find(|word| word.starts_with("AAAA"))?;
    let key = base64::engine::general_purpose::STANDARD.decode(key).ok()?;
    let digest = Sha256::digest(key);
    let text = base64::engine::general_purpose::STANDARD_NO_PAD.encode(digest);
    Some(format!("SHA256:{text} ({file}:{number})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aes_goes_before_openssh_s_own_first_choice_and_no_one_else_s() {
        let config = |ciphers: &str| format!("user root\nciphers {ciphers}\nmacs x\n");
        let own = "chacha20-poly1305@openssh.com,aes128-ctr,aes256-ctr,aes128-gcm@openssh.com,aes256-gcm@openssh.com";
        let wanted = "aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com,aes128-ctr,aes256-ctr";
        assert_eq!(preferred(&config(own)).as_deref(), Some(wanted));
        for configured in [
            "aes256-ctr",
            "aes256-gcm@openssh.com,chacha20-poly1305@openssh.com",
            "chacha20-poly1305@openssh.com",
            "",
        ] {
            assert_eq!(preferred(&config(configured)), None, "{configured}");
        }
        assert_eq!(preferred(""), None);
    }
}
