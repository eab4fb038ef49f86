//! The child that connects to remote hosts, from its parent's view: its access, and its end.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A child and the parent's end of the conversation.
struct Dialling {
    child: Child,
    stream: BufReader<UnixStream>,
    dir: tempfile::TempDir,
}

impl Dialling {
    fn start(failpoint: &str) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_hyper2kvm"))
            .args(["__wire", &std::process::id().to_string()])
            .env("HYPER2KVM_FAILPOINT", failpoint)
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        Self {
            child,
            stream: BufReader::new(ours),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.stream.get_mut(), "{request}").unwrap();
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn order(&mut self, server: &Value) -> Value {
        let socket = self.dir.path().join("nbd.sock");
        let order = json!({"Start": {
            "server": server,
            "access": {
                "user": null, "password_file": null, "ssh_identity": null, "ssh_known_hosts": null,
                "tls_ca": null, "tls_fingerprint": null, "connections": 2, "retries": 1,
                "source_command": null, "patience": {"secs": 5, "nanos": 0}, "socket": null,
            },
            "password": null,
            "socket": socket,
        }});
        self.ask(&order)
    }

    fn ends(mut self) {
        drop(self.stream);
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(20), "it lives on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn the_child_that_dials_reaches_its_server_and_nothing_else() {
    let https = json!({"Https": {"user": null, "host": "localhost", "port": 9}});
    let unix = json!({"NbdUnix": {"socket": "/run/no-such-socket"}});
    for server in [https, unix] {
        let mut dialling = Dialling::start("wire-child=escape");
        assert_eq!(dialling.order(&server), json!("Done"), "{server}");
        let answer = dialling.ask(&json!("Status"));
        let tried = answer["Failed"]["Failed"]["reason"].as_str().unwrap();
        // No file but those of programs and names, no program, no signal to its parent.
        assert_eq!(
            tried,
            "it can write to a device, use the network, use a Unix socket, start a thread"
        );
        dialling.ends();
    }
    assert!(!Path::new("/tmp/hyper2kvm-escaped").exists());
}

#[test]
fn its_socket_is_private_and_it_ends_with_the_conversation() {
    use std::os::unix::fs::PermissionsExt;
    let mut dialling = Dialling::start("");
    let server = json!({"NbdUnix": {"socket": "/run/no-such-socket"}});
    assert_eq!(dialling.order(&server), json!("Done"));
    let socket = dialling.dir.path().join("nbd.sock");
    let mode = std::fs::metadata(socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(dialling.ask(&json!("Status"))["Status"]["fetched"] == json!(0));
    dialling.ends();
    // Invalid input ends it too.
    let mut dialling = Dialling::start("");
    writeln!(dialling.stream.get_mut(), "{{\"Start\": 1}}").unwrap();
    dialling.ends();
}
