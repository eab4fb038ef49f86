//! Web servers over TLS with answers of a test: wrong data, disconnects and stalls.

#![allow(dead_code)]

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// A request from the view of a server.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Counts from 1.
    pub number: usize,
    pub target: String,
    pub range: Option<(u64, u64)>,
    pub head: String,
}

/// The action of a server after its bytes.
pub enum End {
    Keep,
    Close,
    Stall,
    Endless,
}

pub type Answer = dyn Fn(&Asked) -> (Vec<u8>, End) + Send + Sync;

pub struct Server {
    pub port: u16,
    pub authority: PathBuf,
    pub fingerprint: String,
    pub asked: Arc<Mutex<Vec<Asked>>>,
    _dir: tempfile::TempDir,
}

pub fn certificate() -> (Arc<ServerConfig>, String, String) {
    use sha2::Digest;
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], PrivateKeyDer::from(key))
        .unwrap();
    let digest = sha2::Sha256::digest(made.cert.der());
    let hex = digest.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    (Arc::new(config), made.cert.pem(), format!("sha256:{hex}"))
}

impl Server {
    pub fn start(answer: impl Fn(&Asked) -> (Vec<u8>, End) + Send + Sync + 'static) -> Self {
        let (config, pem, fingerprint) = certificate();
        Self::with(move |_| config.clone(), &pem, fingerprint, answer)
    }

    /// `config` is asked for the certificate of each connection, counted from 0.
    pub fn with(
        config: impl Fn(usize) -> Arc<ServerConfig> + Send + 'static,
        pem: &str,
        fingerprint: String,
        answer: impl Fn(&Asked) -> (Vec<u8>, End) + Send + Sync + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = dir.path().join("ca.pem");
        std::fs::write(&authority, pem).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (log, answer, number) = (
            asked.clone(),
            Arc::new(answer),
            Arc::new(AtomicUsize::new(0)),
        );
        std::thread::spawn(move || {
            for (count, stream) in listener.incoming().flatten().enumerate() {
                let connection = ServerConnection::new(config(count)).unwrap();
                let stream = StreamOwned::new(connection, stream);
                let (log, answer, number) = (log.clone(), answer.clone(), number.clone());
                std::thread::spawn(move || talk(stream, &log, &*answer, &number));
            }
        });
        Self {
            port,
            authority,
            fingerprint,
            asked,
            _dir: dir,
        }
    }
}

type Tls = StreamOwned<ServerConnection, TcpStream>;

fn talk(mut stream: Tls, log: &Mutex<Vec<Asked>>, answer: &Answer, number: &AtomicUsize) {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(1) => head.push(byte[0]),
                _ => return,
            }
        }
        let head = String::from_utf8(head).unwrap();
        let range = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            let value = value.strip_prefix("bytes=")?;
            let (first, last) = value.split_once('-')?;
            name.eq_ignore_ascii_case("range")
                .then(|| Some((first.parse().ok()?, last.parse().ok()?)))?
        });
        let asked = Asked {
            number: number.fetch_add(1, Ordering::SeqCst) + 1,
            target: head.split(' ').nth(1).unwrap().to_owned(),
            range,
            head,
        };
        log.lock().unwrap().push(asked.clone());
        let (bytes, end) = answer(&asked);
        if stream
            .write_all(&bytes)
            .and_then(|()| stream.flush())
            .is_err()
        {
            return;
        }
        match end {
            End::Keep => {}
            End::Close => {
                let _ = stream.sock.shutdown(std::net::Shutdown::Both);
                return;
            }
            End::Stall => {
                std::thread::sleep(Duration::from_secs(30));
                return;
            }
            End::Endless => while stream.write_all(&[b'x'; 4096]).is_ok() {},
        }
    }
}

pub fn status(line: &str, headers: &str) -> (Vec<u8>, End) {
    let head = format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\n{headers}\r\n");
    (head.into_bytes(), End::Keep)
}

/// The answer to a range: head, without the empty line that ends it, and body.
pub fn partial(
    asked: &Asked,
    size: u64,
    read: impl Fn(u64, usize) -> Vec<u8>,
) -> (String, Vec<u8>) {
    let (first, last) = asked.range.expect("a range");
    let last = last.min(size - 1);
    let bytes = read(first, (last + 1 - first) as usize);
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{size}\r\n\
         Content-Length: {}\r\nETag: \"one\"\r\n",
        bytes.len()
    );
    (head, bytes)
}

/// Head and body as they are sent.
pub fn whole(head: &str, body: &[u8]) -> Vec<u8> {
    [head.as_bytes(), b"\r\n", body].concat()
}

/// The faults that a server can have at any request.
pub const FAULTS: [&str; 18] = [
    "cuts",
    "cuts in the head",
    "hangs up",
    "stalls",
    "says nothing",
    "503",
    "429",
    "500",
    "416",
    "another range",
    "no range",
    "a range of words",
    "too long",
    "too short",
    "endless",
    "packed",
    "no HTTP",
    "endless head",
];

/// The honest answer corrupted by one of [`FAULTS`].
pub fn spoil(fault: &str, head: &str, body: &[u8], size: u64) -> (Vec<u8>, End) {
    let length = format!("Content-Length: {}", body.len());
    let replaced = |from: &str, to: &str| (whole(&head.replace(from, to), body), End::Close);
    match fault {
        "cuts" => (whole(head, &body[..body.len() / 2]), End::Close),
        "cuts in the head" => (b"HTTP/1.1 206 Pa".to_vec(), End::Close),
        "hangs up" => (Vec::new(), End::Close),
        "stalls" => (whole(head, &body[..100]), End::Stall),
        "says nothing" => (Vec::new(), End::Stall),
        "503" => status("503 Busy", "Retry-After: 0\r\n"),
        "429" => status("429 Slow", ""),
        "500" => status("500 Oops", ""),
        "416" => status("416 No", &format!("Content-Range: bytes */{size}\r\n")),
        "another range" => replaced("bytes ", "bytes 1"),
        "no range" => replaced("Content-Range", "X-Range"),
        "a range of words" => replaced("Content-Range: bytes", "Content-Range: words"),
        "too long" => {
            let longer = format!("Content-Length: {}", body.len() + 7);
            let body = [body, b"1234567"].concat();
            (whole(&head.replace(&length, &longer), &body), End::Close)
        }
        "too short" => (
            whole(&head.replace(&length, "Content-Length: 5"), &body[..5]),
            End::Close,
        ),
        "endless" => {
            let length = format!("{length}\r\n");
            let head = head.replace(&length, "Connection: close\r\n");
            (whole(&head, body), End::Endless)
        }
        "packed" => replaced("ETag", "Content-Encoding: gzip\r\nETag"),
        "no HTTP" => (b"SSH-2.0-OpenSSH_9.2\r\n\r\n".to_vec(), End::Close),
        "endless head" => (b"HTTP/1.1 206 OK\r\nX: ".to_vec(), End::Endless),
        other => panic!("no fault {other}"),
    }
}
