//! Web servers that lie, break off and stall, over TLS: every fault ends in the right bytes or in an error that
//! says what is wrong.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::super::{Access, Location, Wire, WireError};
use super::{pattern, right};

const SIZE: u64 = 3 << 20;

/// A request as a server sees it.
#[derive(Debug, Clone)]
struct Asked {
    /// Counts from 1.
    number: usize,
    target: String,
    range: Option<(u64, u64)>,
    head: String,
}

/// What a server does after its bytes.
enum End {
    Keep,
    Close,
    Stall,
    Endless,
}

type Answer = dyn Fn(&Asked) -> (Vec<u8>, End) + Send + Sync;

struct Server {
    port: u16,
    authority: PathBuf,
    fingerprint: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    _dir: tempfile::TempDir,
}

fn certificate() -> (Arc<ServerConfig>, String, String) {
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
    let hex = crate::text::hex(&digest);
    (Arc::new(config), made.cert.pem(), format!("sha256:{hex}"))
}

impl Server {
    fn start(answer: impl Fn(&Asked) -> (Vec<u8>, End) + Send + Sync + 'static) -> Self {
        let (config, pem, fingerprint) = certificate();
        Self::with(move |_| config.clone(), &pem, fingerprint, answer)
    }

    /// `config` is asked for the certificate of each connection, counted from 0.
    fn with(
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

    fn at(&self, target: &str) -> Location {
        let url = format!("https://localhost:{}{target}", self.port);
        Location::parse(&url).unwrap().unwrap()
    }

    fn access(&self) -> Access {
        Access {
            tls_ca: Some(self.authority.clone()),
            connections: 2,
            retries: 3,
            patience: Duration::from_secs(8),
            ..Access::default()
        }
    }

    fn read(&self) -> Result<Vec<u8>, WireError> {
        self.read_with(&self.access())
    }

    fn read_with(&self, access: &Access) -> Result<Vec<u8>, WireError> {
        let at = self.at("/d");
        Wire::connect(&at, access)?.read_whole(&at, SIZE)
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

fn status(line: &str, headers: &str) -> (Vec<u8>, End) {
    let head = format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\n{headers}\r\n");
    (head.into_bytes(), End::Keep)
}

/// The answer of an honest server, to be spoiled.
fn honest(asked: &Asked) -> (String, Vec<u8>) {
    let (first, last) = asked.range.expect("a range");
    let last = last.min(SIZE - 1);
    let bytes = pattern(first, (last + 1 - first) as usize);
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{SIZE}\r\n\
         Content-Length: {}\r\nETag: \"one\"\r\n",
        bytes.len()
    );
    (head, bytes)
}

fn good(asked: &Asked) -> (Vec<u8>, End) {
    let (head, bytes) = honest(asked);
    ([head.as_bytes(), b"\r\n", &bytes].concat(), End::Keep)
}

fn is_large(asked: &Asked) -> bool {
    asked.range.is_some_and(|(first, last)| last > first)
}

/// Spoils the first `times` large answers.
fn spoiled(
    times: usize,
    spoil: impl Fn(&Asked) -> (Vec<u8>, End) + Send + Sync + 'static,
) -> Server {
    let left = AtomicUsize::new(times);
    Server::start(move |asked| {
        let mine = || left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        match is_large(asked) && mine().is_ok() {
            true => spoil(asked),
            false => good(asked),
        }
    })
}

fn replaced(from: &'static str, to: &'static str) -> impl Fn(&Asked) -> (Vec<u8>, End) {
    move |asked| {
        let (head, bytes) = honest(asked);
        let head = head.replace(from, to);
        ([head.as_bytes(), b"\r\n", &bytes].concat(), End::Close)
    }
}

type Spoil = Box<dyn Fn(&Asked) -> (Vec<u8>, End) + Send + Sync>;

/// Faults that pass are survived; those that do not end the run.
#[test]
fn every_fault_ends_in_the_right_bytes_or_in_an_error() {
    let faults: Vec<(&str, Spoil)> = vec![
        (
            "cuts",
            Box::new(|asked| {
                let (head, bytes) = honest(asked);
                (
                    [head.as_bytes(), b"\r\n", &bytes[..bytes.len() / 2]].concat(),
                    End::Close,
                )
            }),
        ),
        (
            "cuts in the head",
            Box::new(|_| (b"HTTP/1.1 206 Pa".to_vec(), End::Close)),
        ),
        ("hangs up", Box::new(|_| (Vec::new(), End::Close))),
        (
            "stalls",
            Box::new(|asked| {
                let (head, bytes) = honest(asked);
                (
                    [head.as_bytes(), b"\r\n", &bytes[..100]].concat(),
                    End::Stall,
                )
            }),
        ),
        ("says nothing", Box::new(|_| (Vec::new(), End::Stall))),
        (
            "503",
            Box::new(|_| status("503 Busy", "Retry-After: 0\r\n")),
        ),
        ("429", Box::new(|_| status("429 Slow", ""))),
        ("500", Box::new(|_| status("500 Oops", ""))),
        (
            "416",
            Box::new(|_| status("416 No", "Content-Range: bytes */3145728\r\n")),
        ),
        ("another range", Box::new(replaced("bytes ", "bytes 1"))),
        ("no range", Box::new(replaced("Content-Range", "X-Range"))),
        (
            "a range of words",
            Box::new(replaced("Content-Range: bytes", "Content-Range: words")),
        ),
        (
            "too long",
            Box::new(|asked| {
                let (head, bytes) = honest(asked);
                let length = format!("Content-Length: {}", bytes.len());
                let head = head.replace(&length, &format!("Content-Length: {}", bytes.len() + 7));
                (
                    [head.as_bytes(), b"\r\n", &bytes, b"1234567"].concat(),
                    End::Close,
                )
            }),
        ),
        (
            "too short",
            Box::new(|asked| {
                let (head, bytes) = honest(asked);
                let length = format!("Content-Length: {}", bytes.len());
                let head = head.replace(&length, "Content-Length: 5");
                ([head.as_bytes(), b"\r\n", &bytes[..5]].concat(), End::Close)
            }),
        ),
        (
            "endless",
            Box::new(|asked| {
                let (head, bytes) = honest(asked);
                let length = format!("Content-Length: {}\r\n", bytes.len());
                let head = head.replace(&length, "Connection: close\r\n");
                ([head.as_bytes(), b"\r\n", &bytes].concat(), End::Endless)
            }),
        ),
        (
            "packed",
            Box::new(replaced("ETag", "Content-Encoding: gzip\r\nETag")),
        ),
        (
            "no HTTP",
            Box::new(|_| (b"SSH-2.0-OpenSSH_9.2\r\n\r\n".to_vec(), End::Close)),
        ),
        (
            "endless head",
            Box::new(|_| (b"HTTP/1.1 206 OK\r\nX: ".to_vec(), End::Endless)),
        ),
    ];
    std::thread::scope(|scope| {
        for (name, spoil) in faults {
            scope.spawn(move || {
                let spoil: Arc<Spoil> = Arc::new(spoil);
                let passing = spoil.clone();
                let start = Instant::now();
                let bytes = spoiled(1, move |asked| passing(asked)).read();
                let bytes = bytes.unwrap_or_else(|e| panic!("{name}: {e}"));
                assert!(bytes.len() as u64 == SIZE && right(0, &bytes), "{name}");
                let lasting = spoiled(usize::MAX, move |asked| spoil(asked));
                let error = lasting.read().expect_err(name);
                assert_eq!(error.kind().code(), 1, "{name}: {error}");
                assert!(error.hint().is_some(), "{name}: {error}");
                let limit = Duration::from_secs(30);
                assert!(start.elapsed() < limit, "{name}: {:?}", start.elapsed());
            });
        }
    });
}

#[test]
fn believes_only_206_and_never_asks_with_head() {
    // ESXi announces no ranges at all, and answers them.
    let server = Server::start(good);
    let bytes = server.read().unwrap();
    assert!(right(0, &bytes));
    let asked = server.asked.lock().unwrap().clone();
    assert!(
        asked
            .iter()
            .all(|asked| asked.head.starts_with("GET ") && asked.range.is_some())
    );
    // The whole file for a range: the bytes of offset 0 would be taken for others.
    let whole = Server::start(|_| {
        let bytes = pattern(0, SIZE as usize);
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n");
        ([head.as_bytes(), &bytes].concat(), End::Close)
    });
    let error = whole.read().unwrap_err();
    assert!(error.to_string().contains("the whole file"), "{error}");
    for (line, not_found) in [
        ("404 No", true),
        ("403 No", false),
        ("401 Who", false),
        ("400 x", false),
    ] {
        let start = Instant::now();
        let error = Server::start(move |_| status(line, "")).read().unwrap_err();
        assert_eq!(error.is_not_found(), not_found, "{error}");
        assert!(
            !error.is_passing() && start.elapsed() < Duration::from_secs(2),
            "{error}"
        );
    }
}

#[test]
fn a_file_that_changes_ends_the_run() {
    for (from, to) in [
        ("\"one\"", "\"two\""),
        ("/3145728", "/3145729"),
        (
            "ETag: \"one\"",
            "Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\nETag: \"one\"",
        ),
    ] {
        let start = Instant::now();
        let server = Server::start(move |asked| match asked.number {
            1 => replaced(
                "ETag",
                "Last-Modified: Sun, 06 Nov 1994 08:49:36 GMT\r\nETag",
            )(asked),
            _ => replaced(from, to)(asked),
        });
        let error = server.read().unwrap_err();
        assert!(
            matches!(error, WireError::Changed { .. }),
            "{from}: {error}"
        );
        assert!(start.elapsed() < Duration::from_secs(3), "{from}");
    }
    // One that is shorter by now answers 416.
    let server = Server::start(|asked| match (asked.number, is_large(asked)) {
        (1, _) => good(asked),
        (_, true) => status("416 No", "Content-Range: bytes */100\r\n"),
        _ => replaced("/3145728", "/100")(asked),
    });
    assert!(matches!(server.read(), Err(WireError::Changed { .. })));
}

#[test]
fn an_expired_session_is_renewed_and_a_wrong_password_is_not_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    std::fs::write(&file, "pass word\nnext line\n").unwrap();
    let with = |server: &Server| Access {
        user: Some("root".into()),
        password_file: Some(file.clone()),
        connections: 1,
        ..server.access()
    };
    // A session is good for two requests.
    let server = Server::start(|asked| {
        let session = format!("vmware_soap_session=\"s{}\"", asked.number.div_ceil(3));
        let none = !asked.head.to_ascii_lowercase().contains("cookie:");
        match none || asked.head.contains(&session) {
            true => {
                let (bytes, end) = good(asked);
                let set = format!("\r\nSet-Cookie: {session}; Path=/; HttpOnly; Secure\r\n");
                let text = String::from_utf8_lossy(&bytes[..60]).into_owned();
                let line = text.find("\r\n").unwrap();
                let mut whole = bytes[..line].to_vec();
                whole.extend(set.as_bytes());
                whole.extend(&bytes[line + 2..]);
                (whole, end)
            }
            false => status("401 Expired", "WWW-Authenticate: Basic realm=\"x\"\r\n"),
        }
    });
    let bytes = server.read_with(&with(&server)).unwrap();
    assert!(right(0, &bytes));
    let asked = server.asked.lock().unwrap().clone();
    // root:pass word
    let basic = "Basic cm9vdDpwYXNzIHdvcmQ=";
    assert!(asked.iter().all(|asked| asked.head.contains(basic)));
    assert!(
        asked
            .iter()
            .any(|asked| asked.head.contains("vmware_soap_session=\"s1\""))
    );

    let server = Server::start(|_| status("401 No", "WWW-Authenticate: Basic realm=\"x\"\r\n"));
    let error = server.read_with(&with(&server)).unwrap_err();
    assert!(matches!(error, WireError::Denied { .. }), "{error}");
    assert!(!format!("{error:?}").contains("pass word"));
    assert!(
        server.asked.lock().unwrap().len() <= 2,
        "accounts are locked after a few"
    );
    let access = Access {
        user: None,
        ..with(&server)
    };
    assert_eq!(server.read_with(&access).unwrap_err().kind().code(), 2);
}

#[test]
fn redirects_stay_on_the_host() {
    let server = Server::start(|asked| match asked.target.as_str() {
        "/d" => status("302 Found", "Location: /real?x=y\r\n"),
        "/real?x=y" => good(asked),
        other => panic!("{other}"),
    });
    assert!(right(0, &server.read().unwrap()));
    for to in [
        "https://example.com/d",
        "http://localhost/d",
        "//example.com/d",
        "https://localhost:1/d",
        "file:///etc/passwd",
    ] {
        let server = Server::start(move |_| status("302 Found", &format!("Location: {to}\r\n")));
        let error = server.read().unwrap_err();
        assert!(error.to_string().contains("redirects"), "{to}: {error}");
        assert_eq!(server.asked.lock().unwrap().len(), 1, "{to}");
    }
    let server = Server::start(|_| status("302 Found", "Location: /d\r\n"));
    assert!(
        server
            .read()
            .unwrap_err()
            .to_string()
            .contains("without an end")
    );
}

#[test]
fn certificates_are_always_verified_and_a_mismatch_shows_both() {
    let server = Server::start(good);
    let other = Server::start(good);
    let read = |access: Access| server.read_with(&access);
    assert!(read(server.access()).is_ok());
    let pinned = |pin: &str| Access {
        tls_ca: None,
        tls_fingerprint: Some(pin.to_owned()),
        ..server.access()
    };
    assert!(read(pinned(&server.fingerprint)).is_ok());
    let upper = server.fingerprint.to_uppercase();
    assert!(read(pinned(&upper)).is_ok());
    let start = Instant::now();
    let system = Access {
        tls_ca: None,
        ..server.access()
    };
    let another = Access {
        tls_ca: Some(other.authority.clone()),
        ..server.access()
    };
    for (access, expected) in [
        (system, "an authority that this host knows"),
        (another, other.fingerprint.as_str()),
        (pinned(&other.fingerprint), other.fingerprint.as_str()),
    ] {
        let error = read(access).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(&server.fingerprint) && text.contains(expected),
            "{text}"
        );
        assert_eq!(error.kind().code(), 1);
    }
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "none is tried again"
    );
    for bad in [
        "",
        "sha256:",
        "sha256:00",
        "sha1:0000000000000000000000000000000000000000",
        "x",
    ] {
        assert_eq!(read(pinned(bad)).unwrap_err().kind().code(), 2, "{bad}");
    }
    // Another name than those in the certificate.
    let url = format!("https://localhost.localdomain:{}/d", server.port);
    let at = Location::parse(&url).unwrap().unwrap();
    let wire = Wire::connect(&at, &server.access()).unwrap();
    assert!(wire.open(&at).is_err());
}

#[test]
fn a_certificate_that_changes_ends_the_run() {
    let (first, pem, fingerprint) = certificate();
    let (second, ..) = certificate();
    let config = move |count: usize| {
        if count == 0 {
            first.clone()
        } else {
            second.clone()
        }
    };
    // The first connection is closed after the first answer.
    let server = Server::with(config, &pem, fingerprint.clone(), |asked| {
        replaced("ETag", "Connection: close\r\nETag")(asked)
    });
    let start = Instant::now();
    let error = server.read().unwrap_err();
    assert!(matches!(error, WireError::Untrusted { .. }), "{error}");
    assert!(error.to_string().contains(&fingerprint), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5));
}
