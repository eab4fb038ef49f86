//! `guestfish`: one process for a whole session, commands on its stdin, replies on one pipe.
//!
//! stdout and stderr share the pipe, because their order assigns output to commands: guestfish
//! flushes stdout after each one. After every command it has to `echo` a random token; the output
//! before the token is the reply. `--listen` is not used: that server would not be a child of this
//! process and would outlive it. This one ends at the end of its stdin, whoever closes it.
//!
//! Commands are prefixed with `-`, so that a failed one does not end the session. Arguments are
//! quoted with `\xHH` except for the plainest characters. There is no shell between the pipe and
//! the commands unless a line has a bare `|` or begins with `!`.
//!
//! A command that needs a key is followed by a line with the key; guestfish prints neither. A
//! guestfish that does not support the command would parse that line as one: ask for its `help`
//! first.

use std::fmt::{self, Write as _};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::{Child, Cmd, Result, ToolError, appliance, clean};
use crate::stop;

pub const TOOL: &str = "guestfish";

/// The longest line; guestfish has a buffer of 8192 bytes.
pub const MAX_LINE: usize = 8000;
/// The number of bytes sent before the replies are read; well below the size of a pipe, so that it
/// never blocks.
const WINDOW: usize = 16 << 10;
const MAX_REPLY: usize = 64 << 20;
const TICK: Duration = Duration::from_millis(20);
/// The longest time that one tick counts.
const STEP: Duration = Duration::from_secs(1);
/// The time for guestfish to end after its last command.
const CLOSE_LIMIT: Duration = Duration::from_secs(60);
/// libguestfs' prefix of the reason of every failure.
const FAILURE: &str = "libguestfs: error: ";

/// Text that is never printed, and is erased from memory when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// A command with its arguments, quoted.
#[derive(Debug, Clone)]
pub struct Line {
    text: String,
    key: Option<Secret>,
}

impl Line {
    pub fn new(command: &str) -> Self {
        Self {
            text: command.to_string(),
            key: None,
        }
    }

    /// Sets the key for the command: one line of text.
    #[must_use]
    pub fn key(mut self, key: &Secret) -> Self {
        self.key = Some(key.clone());
        self
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<[u8]>) -> Self {
        self.text.push_str(" \"");
        for &byte in arg.as_ref() {
            if byte.is_ascii_alphanumeric() || b"/._- =,:".contains(&byte) {
                self.text.push(char::from(byte));
            } else {
                // Writing to a String cannot fail.
                let _ = write!(self.text, "\\x{byte:02x}");
            }
        }
        self.text.push('"');
        self
    }

    pub fn len(&self) -> usize {
        let key = self.key.as_ref().map_or(0, |key| key.0.len() + 1);
        self.text.len() + key
    }
}

/// The output of a command, or libguestfs' reason for its failure.
pub type Reply = std::result::Result<Vec<u8>, String>;

/// A running guestfish.
pub struct Shell {
    child: Child,
    stdin: PipeWriter,
    output: Receiver<Vec<u8>>,
    token: String,
    received: Vec<u8>,
    /// The length of `received` already searched for the token.
    searched: usize,
    /// The complete output of the last command, if it failed.
    failed: Vec<u8>,
}

/// Building the appliance as root unpacks an archive whose files have other owners. Root without
/// capabilities cannot change owners, and the appliance does not need that, because it is built for
/// a user.
pub(super) const APPLIANCE: (&str, &str) = ("TAR_OPTIONS", "--no-same-owner");

impl Shell {
    pub fn start() -> Result<Self> {
        let io = |source| ToolError::Io {
            tool: TOOL.to_string(),
            source,
        };
        let (stdin, writer) = io::pipe().map_err(io)?;
        let (reader, stdout) = io::pipe().map_err(io)?;
        let stderr = stdout.try_clone().map_err(io)?;
        let cmd = Cmd::new(TOOL)
            .arg("--keys-from-stdin")
            .stdin(stdin)
            .output(stdout, stderr)
            // If set in the user's shell, their output would mix with the replies.
            .env("LIBGUESTFS_DEBUG", "0")
            .env("LIBGUESTFS_TRACE", "0")
            .env(APPLIANCE.0, APPLIANCE.1);
        let child = appliance::prepare(cmd).spawn()?;
        let (sender, output) = mpsc::channel();
        std::thread::Builder::new()
            .name("guestfish".into())
            .spawn(move || forward(reader, &sender))
            .map_err(io)?;
        // Hashers are seeded from the operating system's randomness.
        let random = || RandomState::new().hash_one(0);
        Ok(Self {
            child,
            stdin: writer,
            output,
            token: format!("end-{:016x}{:016x}", random(), random()),
            received: Vec::new(),
            searched: 0,
            failed: Vec::new(),
        })
    }

    /// Runs the commands in order, each within `limit`, and returns the reply of each.
    pub fn run(&mut self, lines: &[Line], limit: Duration) -> Result<Vec<Reply>> {
        let mut replies = Vec::with_capacity(lines.len());
        let mut rest = lines;
        while !rest.is_empty() {
            let mut text = String::new();
            let mut count = 0;
            for line in rest {
                if count > 0 && text.len() + line.len() > WINDOW {
                    break;
                }
                if line.len() > MAX_LINE {
                    return Err(ToolError::output(TOOL, "a command is too long"));
                }
                let key = line.key.as_ref().map(|key| format!("{}\n", key.expose()));
                let key = key.unwrap_or_default();
                text.push_str(&format!("-{}\n{key}-echo {}\n", line.text, self.token));
                count += 1;
            }
            if self.stdin.write_all(text.as_bytes()).is_err() {
                return Err(self.gone());
            }
            for _ in 0..count {
                let output = self.reply(limit)?;
                replies.push(match failure(&output) {
                    None => Ok(output),
                    Some(reason) => {
                        self.failed = output;
                        Err(reason)
                    }
                });
            }
            rest = &rest[count..];
        }
        Ok(replies)
    }

    /// Runs one command.
    pub fn one(&mut self, line: Line, limit: Duration) -> Result<Reply> {
        let replies = self.run(&[line], limit)?;
        replies
            .into_iter()
            .next()
            .ok_or_else(|| ToolError::output(TOOL, "no reply"))
    }

    fn reply(&mut self, limit: Duration) -> Result<Vec<u8>> {
        let mut left = limit;
        let mut last = Instant::now();
        loop {
            let token = self.token.as_bytes();
            let from = self.searched.saturating_sub(token.len());
            let found = self.received[from..]
                .windows(token.len() + 1)
                .position(|w| w.starts_with(token) && w.ends_with(b"\n"));
            if let Some(at) = found {
                let mut output = self.received.split_off(from + at + token.len() + 1);
                std::mem::swap(&mut output, &mut self.received);
                output.truncate(from + at);
                self.searched = 0;
                return Ok(output);
            }
            self.searched = self.received.len();
            match self.output.recv_timeout(TICK) {
                Ok(chunk) => self.received.extend_from_slice(&chunk),
                Err(RecvTimeoutError::Timeout) if self.child.try_wait()?.is_none() => {}
                Err(_) => return Err(self.gone()),
            }
            if self.received.len() > MAX_REPLY {
                return Err(ToolError::TooMuchOutput {
                    tool: TOOL.to_string(),
                    limit: MAX_REPLY,
                });
            }
            if stop::requested() {
                return Err(stop::Interrupted.into());
            }
            // While this process was stopped (^Z), so was guestfish: that time does not count.
            left = left.saturating_sub(last.elapsed().min(STEP));
            last = Instant::now();
            if left.is_zero() {
                return Err(ToolError::TimedOut {
                    tool: TOOL.to_string(),
                    after: limit,
                });
            }
        }
    }

    /// The output since the last reply; for the log of a start that never ended.
    pub fn unanswered(&self) -> &[u8] {
        &self.received
    }

    /// The complete output of the last failed command, including the reason.
    pub fn last_failure(&self) -> &[u8] {
        &self.failed
    }

    fn gone(&mut self) -> ToolError {
        while let Ok(chunk) = self.output.recv_timeout(TICK) {
            self.received.extend_from_slice(&chunk);
        }
        let said = failure(&self.received).unwrap_or_else(|| clean(&self.received));
        match self.child.wait(CLOSE_LIMIT) {
            Err(ToolError::Failed { tool, status, .. }) => ToolError::Failed {
                tool,
                status,
                stderr: said,
            },
            Err(error) => error,
            Ok(()) => ToolError::output(TOOL, format!("it ended early: {said}")),
        }
    }

    /// Ends guestfish and with it the appliance.
    pub fn close(mut self) -> Result<()> {
        drop(self.stdin);
        self.child.wait(CLOSE_LIMIT)
    }
}

fn forward(mut pipe: PipeReader, sender: &mpsc::Sender<Vec<u8>>) {
    let mut buf = vec![0; 64 << 10];
    while let Ok(n @ 1..) = pipe.read(&mut buf) {
        if sender.send(buf[..n].to_vec()).is_err() {
            break;
        }
    }
}

/// The reason, if the output is that of a failed command.
fn failure(output: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(output);
    let at = text.rfind(FAILURE).map(|at| at + FAILURE.len());
    // Errors in the command itself begin differently.
    let ours = || text.starts_with("guestfish: ") || text.ends_with(": unknown command\n");
    let at = at.or_else(|| ours().then_some(0))?;
    Some(clean(text[at..].trim().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn quoting() {
        let line = Line::new("ls0").arg("/a b'\"$\\|#\n").arg("ä");
        assert_eq!(
            line.text,
            r#"ls0 "/a b\x27\x22\x24\x5c\x7c\x23\x0a" "\xc3\xa4""#
        );
    }

    #[test]
    fn failures() {
        for (output, reason) in [
            ("", None),
            ("data", None),
            (
                "*stdin*:4: libguestfs: error: rm: /x: No such file\n",
                Some("rm: /x: No such file"),
            ),
            ("guestfish: unterminated\n", Some("guestfish: unterminated")),
        ] {
            assert_eq!(failure(output.as_bytes()).as_deref(), reason, "{output}");
        }
    }

    /// No appliance is started: these commands work without one.
    #[test]
    fn a_conversation() {
        if !crate::skip::have(&[TOOL]) {
            return;
        }
        let mut shell = Shell::start().unwrap();
        let odd = "a 'b' \"c\" \\ $HOME * ~ | cat # ä";
        let replies = shell
            .run(
                &[
                    Line::new("echo").arg(odd),
                    Line::new("ls").arg("/"),
                    Line::new("no-such-command"),
                    Line::new("echo").arg("on"),
                ],
                LIMIT,
            )
            .unwrap();
        assert_eq!(replies[0], Ok(format!("{odd}\n").into_bytes()));
        assert!(replies[1].as_ref().unwrap_err().contains("launch"));
        assert!(replies[2].is_err(), "{:?}", replies[2]);
        assert_eq!(replies[3], Ok(b"on\n".to_vec()));
        // The key is read before anything else is checked, and is in no reply.
        let secret = Secret::new("!echo secret words".into());
        let open = Line::new("cryptsetup-open").arg("/dev/sda").arg("m");
        let replies = shell.run(&[open.key(&secret), Line::new("echo")], LIMIT);
        let replies = replies.unwrap();
        assert!(replies[0].as_ref().unwrap_err().contains("launch"));
        assert_eq!(replies[1], Ok(b"\n".to_vec()));
        assert!(!format!("{replies:?}").contains("secret"), "{replies:?}");
        // More than a pipe's capacity at a time.
        let many = vec![Line::new("echo").arg("x".repeat(500)); 400];
        assert!(shell.run(&many, LIMIT).unwrap().iter().all(Result::is_ok));
        shell.close().unwrap();

        let mut shell = Shell::start().unwrap();
        let ended = shell.one(Line::new("quit"), LIMIT);
        assert!(ended.is_err(), "{ended:?}");
    }
}
