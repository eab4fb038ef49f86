//! Web servers over TLS that return wrong data, disconnect and stall. Every fault leads to the
//! right bytes or to a precise error.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::super::{Access, Location, Wire, WireError};
use super::hostile::{Asked, End, FAULTS, Server, certificate, partial, spoil, status};
use super::real::client;
use super::{pattern, right};
use crate::block::BlockRead;

const SIZE: u64 = 3 << 20;

impl Server {
    fn at(&self, target: &str) -> Location {
        let url = format!("https://localhost:{}{target}", self.port);
        Location::parse(&url).unwrap().unwrap()
    }

    fn access(&self) -> Access {
        Access {
            tls_ca: Some(self.authority.clone()),
            connections: Some(2),
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

/// The answer of a correct server, to be corrupted.
fn honest(asked: &Asked) -> (String, Vec<u8>) {
    partial(asked, SIZE, pattern)
}

fn good(asked: &Asked) -> (Vec<u8>, End) {
    let (head, bytes) = honest(asked);
    ([head.as_bytes(), b"\r\n", &bytes].concat(), End::Keep)
}

fn is_large(asked: &Asked) -> bool {
    asked.range.is_some_and(|(first, last)| last > first)
}

/// Corrupts the first `times` large answers.
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

/// Temporary faults are survived; others end the run.
#[test]
fn every_fault_ends_in_the_right_bytes_or_in_an_error() {
    std::thread::scope(|scope| {
        for name in FAULTS {
            scope.spawn(move || {
                let spoil = move |asked: &Asked| {
                    let (head, bytes) = honest(asked);
                    spoil(name, &head, &bytes, SIZE)
                };
                let start = Instant::now();
                let bytes = spoiled(1, spoil).read();
                let bytes = bytes.unwrap_or_else(|e| panic!("{name}: {e}"));
                assert!(bytes.len() as u64 == SIZE && right(0, &bytes), "{name}");
                let lasting = spoiled(usize::MAX, spoil);
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
    // ESXi announces no ranges at all, but serves them.
    let server = Server::start(good);
    let bytes = server.read().unwrap();
    assert!(right(0, &bytes));
    let asked = server.asked.lock().unwrap().clone();
    assert!(
        asked
            .iter()
            .all(|asked| asked.head.starts_with("GET ") && asked.range.is_some())
    );
    // The whole file for a range: the bytes at offset 0 would be taken for others.
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
        let server = Server::start(move |_| status(line, ""));
        let error = server.read().unwrap_err();
        assert_eq!(error.is_not_found(), not_found, "{error}");
        assert!(!error.is_passing(), "{error}");
        // At most once more, in another session.
        let asked = server.asked.lock().unwrap().len();
        assert!(asked <= 2, "{error}: asked {asked} times");
    }
}

#[test]
fn connections_are_made_ahead_and_made_again_where_the_server_ends_what_is_idle() {
    const CONNECTIONS: u32 = 4;
    for kept in [true, false] {
        let accepted = Arc::new(AtomicUsize::new(0));
        let counted = accepted.clone();
        let (config, pem, fingerprint) = certificate();
        let config = move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
            config.clone()
        };
        let server = Server::with(config, &pem, fingerprint, move |asked| match good(asked) {
            (bytes, _) if !kept && !is_large(asked) => (bytes, End::Close),
            answer => answer,
        });
        let access = Access {
            connections: Some(CONNECTIONS),
            ..server.access()
        };
        let at = server.at("/d");
        let wire = Wire::connect(&at, &access).unwrap();
        let remote = wire.open(&at).unwrap();
        remote.prepare().unwrap();
        let asked = || server.asked.lock().unwrap().len();
        let start = Instant::now();
        while asked() < CONNECTIONS as usize {
            assert!(start.elapsed() < Duration::from_secs(30), "{}", asked());
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(100));
        // A byte for the size, and one over each of the others.
        assert_eq!(asked(), CONNECTIONS as usize);
        assert_eq!(wire.fetched(), u64::from(CONNECTIONS));
        let made = accepted.load(Ordering::SeqCst);
        assert_eq!(made, CONNECTIONS as usize);
        let mut bytes = vec![0; SIZE as usize];
        client(&remote).read_at(0, &mut bytes).unwrap();
        assert!(right(0, &bytes));
        assert_eq!(accepted.load(Ordering::SeqCst) == made, kept);
        assert!(wire.trouble().is_none());
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
        connections: Some(1),
        ..server.access()
    };
    // A session is valid for two requests.
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
        (system, "an authority that this host trusts"),
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
    // A name that is not in the certificate.
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
