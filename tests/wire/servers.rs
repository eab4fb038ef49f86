//! Servers on loopback for every protocol of sources on the wire. Each ends with its guard.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::tool;

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// A program that is ended when this is dropped.
pub struct Server {
    child: Child,
    pub port: u16,
}

impl Server {
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // nginx ends its workers only when it is asked to.
        let _ = Command::new("kill")
            .arg(self.child.id().to_string())
            .status();
        let start = Instant::now();
        while self.child.try_wait().is_ok_and(|s| s.is_none()) {
            if start.elapsed() > Duration::from_secs(3) {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Server {
    fn start(mut command: Command, port: u16, log: &Path) -> Self {
        let log_file = File::create(log).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(log_file.try_clone().unwrap())
            .stderr(log_file);
        let mut server = Self {
            child: command.spawn().unwrap(),
            port,
        };
        server.wait(log, || TcpStream::connect(("127.0.0.1", port)).is_ok());
        server
    }

    fn wait(&mut self, log: &Path, ready: impl Fn() -> bool) {
        let start = Instant::now();
        while !ready() {
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() && start.elapsed() < Duration::from_secs(20),
                "the server did not start: {}",
                fs::read_to_string(log).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// OpenSSH's server for this user alone, with the keys to get in.
pub struct Ssh {
    pub server: Server,
    pub identity: PathBuf,
    pub known_hosts: PathBuf,
}

impl Ssh {
    pub fn start(folder: &Path) -> Self {
        let (identity, host_key) = (folder.join("id"), folder.join("host_key"));
        for key in [&identity, &host_key] {
            let key = key.to_str().unwrap();
            tool("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", key]);
        }
        fs::copy(identity.with_extension("pub"), folder.join("authorized")).unwrap();
        let port = free_port();
        let shown = folder.display();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {shown}/host_key\nPidFile none\n\
             AuthorizedKeysFile {shown}/authorized\nStrictModes no\nUsePAM no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n\
             Subsystem sftp internal-sftp\nMaxSessions 64\nMaxStartups 64\n"
        );
        let file = folder.join("sshd_config");
        fs::write(&file, config).unwrap();
        // Root's sshd wants this directory; another user's does not.
        let _ = fs::create_dir_all("/run/sshd");
        let mut command = Command::new("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f"]).arg(&file);
        let server = Server::start(command, port, &folder.join("sshd.log"));
        let key = fs::read_to_string(folder.join("host_key.pub")).unwrap();
        let known_hosts = folder.join("known_hosts");
        fs::write(&known_hosts, format!("[127.0.0.1]:{port} {key}")).unwrap();
        Self {
            server,
            identity,
            known_hosts,
        }
    }

    pub fn url(&self, path: &Path) -> String {
        format!("ssh://127.0.0.1:{}{}", self.server.port, path.display())
    }

    pub fn options(&self) -> Vec<String> {
        vec![
            "--ssh-identity".into(),
            self.identity.display().to_string(),
            "--ssh-known-hosts".into(),
            self.known_hosts.display().to_string(),
        ]
    }
}

/// nginx with a certificate of its own and a user `reader`.
pub struct Https {
    pub server: Server,
    pub certificate: PathBuf,
    pub password_file: PathBuf,
}

pub const PASSWORD: &str = "correct-horse-7";

impl Https {
    /// What lies below `root`; `/folder/` is `root` too, as ESXi has its datastores.
    pub fn start(folder: &Path, root: &Path) -> Self {
        let (key, certificate) = (folder.join("tls.key"), folder.join("tls.pem"));
        tool(
            "openssl",
            &[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=127.0.0.1",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-keyout",
                key.to_str().unwrap(),
                "-out",
                certificate.to_str().unwrap(),
            ],
        );
        let hash = String::from_utf8(tool("openssl", &["passwd", "-apr1", PASSWORD])).unwrap();
        fs::write(folder.join("users"), format!("reader:{hash}")).unwrap();
        let password_file = folder.join("password");
        fs::write(&password_file, format!("{PASSWORD}\n")).unwrap();
        fs::set_permissions(&password_file, fs::Permissions::from_mode(0o600)).unwrap();
        let port = free_port();
        let (shown, root) = (folder.display(), root.display());
        let config = format!(
            "daemon off; master_process off; worker_processes 1; pid {shown}/nginx.pid;\n\
             error_log {shown}/nginx.err; events {{ worker_connections 256; }}\n\
             http {{ access_log {shown}/access.log; client_body_temp_path {shown}/t1;\n\
             proxy_temp_path {shown}/t2; fastcgi_temp_path {shown}/t3; uwsgi_temp_path {shown}/t4;\n\
             scgi_temp_path {shown}/t5; keepalive_requests 100000;\n\
             server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {shown}/tls.pem;\n\
             ssl_certificate_key {shown}/tls.key; auth_basic x; auth_basic_user_file {shown}/users;\n\
             location / {{ root {root}; }} location /folder/ {{ alias {root}/; }}\n\
             location /listed/ {{ alias {root}/; autoindex on; }} }} }}\n"
        );
        let file = folder.join("nginx.conf");
        fs::write(&file, config).unwrap();
        let mut command = Command::new("/usr/sbin/nginx");
        command.arg("-p").arg(folder).arg("-c").arg(&file);
        let server = Server::start(command, port, &folder.join("nginx.log"));
        Self {
            server,
            certificate,
            password_file,
        }
    }

    pub fn url(&self, path: &str) -> String {
        format!("https://127.0.0.1:{}{path}", self.server.port)
    }

    pub fn options(&self) -> Vec<String> {
        vec![
            "--user".into(),
            "reader".into(),
            "--password-file".into(),
            self.password_file.display().to_string(),
            "--tls-ca".into(),
            self.certificate.display().to_string(),
        ]
    }
}

/// `qemu-nbd` on a Unix socket, read-only.
pub fn qemu_nbd(disk: &Path, socket: &Path) -> Server {
    let mut command = Command::new("qemu-nbd");
    command
        .args(["-r", "-t", "-e", "16", "-f", "raw", "-x", "disk", "-k"])
        .arg(socket)
        .arg(disk);
    let log = socket.with_extension("log");
    command
        .stdout(Stdio::null())
        .stderr(File::create(&log).unwrap());
    let mut server = Server {
        child: command.spawn().unwrap(),
        port: 0,
    };
    server.wait(&log, || socket.exists());
    server
}
