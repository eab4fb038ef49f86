//! Servers on loopback that sources on the wire are read from: openssh, nginx, nbdkit, and a line with latency
//! or a fault between. Each ends with its guard.

#![allow(dead_code)]
#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// A port that nobody listens on at the moment.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Whether these programs are there; not by the crate's own search, because the crate's own tests use this too.
pub fn installed(names: &[&str]) -> bool {
    names.iter().all(|name| find(name).is_some())
}

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

fn program(name: &str) -> PathBuf {
    find(name).unwrap_or_else(|| panic!("{name} is not installed"))
}

fn run(name: &str, args: &[&str]) {
    let out = Command::new(program(name)).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{name} {args:?}: {stderr}");
}

/// Killed with all its children when it is dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn until_connected(port: u16, server: &mut Child) {
    let start = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if let Some(status) = server.try_wait().unwrap() {
            panic!("the server ended: {status}");
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no server");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// An openssh server of its own: host key, user key, known hosts. Root or not, its user is ours.
pub struct Sshd {
    pub dir: tempfile::TempDir,
    pub port: u16,
    server: Option<Guard>,
}

impl Sshd {
    pub const TOOLS: [&'static str; 3] = ["sshd", "ssh", "ssh-keygen"];

    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        for key in ["host", "other", "identity"] {
            let args = ["-q", "-t", "ed25519", "-N", "", "-C", "", "-f", &path(key)];
            run("ssh-keygen", &args);
        }
        fs::copy(path("identity.pub"), path("authorized_keys")).unwrap();
        let port = free_port();
        for (known, key) in [("known_hosts", "host.pub"), ("wrong_hosts", "other.pub")] {
            let key = fs::read_to_string(path(key)).unwrap();
            fs::write(path(known), format!("[127.0.0.1]:{port} {key}")).unwrap();
        }
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\n\
             StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n\
             KbdInteractiveAuthentication no\nMaxStartups 50\nSubsystem sftp internal-sftp\n",
            path("host"),
            path("authorized_keys")
        );
        fs::write(path("sshd_config"), config).unwrap();
        let mut sshd = Self {
            dir,
            port,
            server: None,
        };
        sshd.again();
        sshd
    }

    /// Starts it, or restarts it after a stop.
    pub fn again(&mut self) {
        let _ = fs::create_dir_all("/run/sshd");
        let child = Command::new(program("sshd"))
            .args(["-D", "-e", "-f"])
            .arg(self.dir.path().join("sshd_config"))
            .stderr(fs::File::create(self.dir.path().join("log")).unwrap())
            .stdin(Stdio::null())
            .spawn();
        let mut child = child.unwrap();
        until_connected(self.port, &mut child);
        self.server = Some(Guard(child));
    }

    /// Stops the server and every connection it has.
    pub fn stop(&mut self) {
        let Some(server) = self.server.take() else {
            return;
        };
        let kill = |signal: &str, id: &str| {
            let _ = Command::new("kill").args([signal, id]).status();
        };
        // Its sessions would live on for a moment, and so would one that begins now.
        let mut left = vec![server.0.id().to_string()];
        kill("-STOP", &left[0]);
        while let Some(id) = left.pop() {
            let children = Command::new("pgrep").args(["-P", &id]).output().unwrap();
            let children = String::from_utf8(children.stdout).unwrap();
            left.extend(children.split_whitespace().map(str::to_owned));
            kill("-KILL", &id);
        }
    }

    /// The URL of a file of this host.
    pub fn url(&self, path: &Path) -> String {
        let user = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout);
        let path = path
            .to_str()
            .unwrap()
            .replace('%', "%25")
            .replace(' ', "%20");
        format!(
            "ssh://{}@127.0.0.1:{}{path}",
            user.unwrap().trim(),
            self.port
        )
    }

    /// The options that reach it.
    pub fn options(&self) -> Vec<String> {
        let path = |name: &str| self.dir.path().join(name).to_str().unwrap().to_owned();
        vec![
            "--ssh-identity".into(),
            path("identity"),
            "--ssh-known-hosts".into(),
            path("known_hosts"),
        ]
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.stop();
    }
}

/// nginx with TLS over a directory: `/` is open, `/locked/` asks for `user` and `secret`.
pub struct Nginx {
    pub dir: tempfile::TempDir,
    pub port: u16,
    server: Guard,
}

impl Nginx {
    pub const TOOLS: [&'static str; 2] = ["nginx", "openssl"];

    pub fn start(root: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Its worker is another user when we are root.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        certificate(&dir.path().join("cert.pem"), &dir.path().join("key.pem"));
        let hash = Command::new("openssl")
            .args(["passwd", "-apr1", "secret"])
            .output();
        let hash = String::from_utf8(hash.unwrap().stdout).unwrap();
        fs::write(path("htpasswd"), format!("user:{}\n", hash.trim())).unwrap();
        fs::write(path("password"), "secret\n").unwrap();
        let port = free_port();
        let user = match rustix::process::geteuid().is_root() {
            true => "user root;",
            false => "",
        };
        let (own, root) = (dir.path().display(), root.display());
        let config = format!(
            "daemon off; {user} worker_processes 1; pid {own}/pid; error_log {own}/error.log; events {{}}\n\
             http {{ access_log {own}/access.log; client_body_temp_path {own}/1; proxy_temp_path {own}/2;\n\
             fastcgi_temp_path {own}/3; uwsgi_temp_path {own}/4; scgi_temp_path {own}/5;\n\
             server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {own}/cert.pem;\n\
             ssl_certificate_key {own}/key.pem; root {root}; autoindex on;\n\
             location /locked/ {{ alias {root}/; auth_basic x; auth_basic_user_file {own}/htpasswd; }} }} }}\n"
        );
        fs::write(path("nginx.conf"), config).unwrap();
        let child = Command::new(program("nginx"))
            .args(["-c", &path("nginx.conf"), "-e", &path("error.log")])
            .stdin(Stdio::null())
            .process_group(0)
            .spawn();
        let mut child = child.unwrap();
        until_connected(port, &mut child);
        Self {
            dir,
            port,
            server: Guard(child),
        }
    }

    /// The URL of a path below the root.
    pub fn url(&self, path: &str) -> String {
        format!("https://127.0.0.1:{}/{path}", self.port)
    }

    pub fn options(&self) -> Vec<String> {
        vec!["--tls-ca".into(), self.file("cert.pem")]
    }

    /// Those and a user.
    pub fn options_with_password(&self) -> Vec<String> {
        let mut options = self.options();
        options.extend(["--user".into(), "user".into(), "--password-file".into()]);
        options.push(self.file("password"));
        options
    }

    pub fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // It ends its worker when it is asked.
        let id = self.server.0.id().to_string();
        let _ = Command::new("kill").args(["-TERM", &id]).status();
        let _ = self.server.0.wait();
    }
}

/// A certificate for localhost and 127.0.0.1, signed on its own.
pub fn certificate(certificate: &Path, key: &Path) {
    let (certificate, key) = (certificate.to_str().unwrap(), key.to_str().unwrap());
    run(
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            key,
            "-out",
            certificate,
            "-days",
            "30",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ],
    );
}

/// nbdkit on a port, with whatever plugin and filters: `&["--filter=delay", "file", "x", "rdelay=20ms"]`.
pub struct Nbdkit {
    pub port: u16,
    server: Guard,
}

impl Nbdkit {
    pub fn start(args: &[&str]) -> Self {
        let port = free_port();
        let child = Command::new(program("nbdkit"))
            .args(["-f", "-i", "127.0.0.1", "-p", &port.to_string()])
            .args(args)
            .stdin(Stdio::null())
            .spawn();
        let mut child = child.unwrap();
        until_connected(port, &mut child);
        Self {
            port,
            server: Guard(child),
        }
    }

    pub fn url(&self, export: &str) -> String {
        format!("nbd://127.0.0.1:{}/{export}", self.port)
    }
}

/// A line to another port of this host with a latency in each direction, which can be cut.
pub struct Line {
    pub port: u16,
    /// No new connections, and the old ones are gone, while this is set.
    cut: Arc<AtomicBool>,
    /// Bytes that came from the server.
    carried: Arc<AtomicU64>,
    /// Every connection is cut after so many bytes from the server; 0: never.
    cut_after: Arc<AtomicU64>,
}

impl Line {
    /// `latency` is that of a round trip.
    pub fn to(port: u16, latency: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let line = Self {
            port: listener.local_addr().unwrap().port(),
            cut: Arc::default(),
            carried: Arc::default(),
            cut_after: Arc::default(),
        };
        let (cut, carried, after) = (
            line.cut.clone(),
            line.carried.clone(),
            line.cut_after.clone(),
        );
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), false) = (client, cut.load(Ordering::SeqCst)) else {
                    continue;
                };
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else {
                    continue;
                };
                let ends = [&client, &server].map(|end| end.try_clone().unwrap());
                let [client2, server2] = ends;
                let none = (Arc::default(), Arc::default());
                carry(client, server, latency / 2, cut.clone(), none);
                let counted = (carried.clone(), after.clone());
                carry(server2, client2, latency / 2, cut.clone(), counted);
            }
        });
        line
    }

    pub fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
    }

    pub fn cut_after(&self, bytes: u64) {
        self.cut_after.store(bytes, Ordering::SeqCst);
    }

    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::SeqCst)
    }
}

/// Hands bytes on, each a while after it came, however many are on their way. The buffers come back to be
/// used again: new ones would cost more than all else.
fn carry(
    mut from: TcpStream,
    mut to: TcpStream,
    delay: Duration,
    cut: Arc<AtomicBool>,
    (carried, after): (Arc<AtomicU64>, Arc<AtomicU64>),
) {
    let _ = to.set_nodelay(true);
    let _ = from.set_read_timeout(Some(Duration::from_millis(50)));
    let (sender, queue) = mpsc::channel::<(Instant, Vec<u8>, usize)>();
    let (used, unused) = mpsc::channel::<Vec<u8>>();
    let ending = cut.clone();
    std::thread::spawn(move || {
        for (due, bytes, length) in queue {
            let early = due.saturating_duration_since(Instant::now());
            if !early.is_zero() {
                std::thread::sleep(early);
            }
            if ending.load(Ordering::SeqCst) || to.write_all(&bytes[..length]).is_err() {
                break;
            }
            let _ = used.send(bytes);
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
    std::thread::spawn(move || {
        let mut own = 0;
        let mut spare = None;
        loop {
            let limit = after.load(Ordering::SeqCst);
            if cut.load(Ordering::SeqCst) || (limit > 0 && own >= limit) {
                break;
            }
            let buffer = spare.take().or_else(|| unused.try_recv().ok());
            let mut buffer = buffer.unwrap_or_else(|| vec![0; 256 << 10]);
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    own += n as u64;
                    carried.fetch_add(n as u64, Ordering::SeqCst);
                    if sender.send((Instant::now() + delay, buffer, n)).is_err() {
                        break;
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => spare = Some(buffer),
                Err(_) => break,
            }
        }
        let _ = from.shutdown(std::net::Shutdown::Both);
    });
}
