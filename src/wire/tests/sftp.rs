//! SFTP servers with wrong packets, one packet at a time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::super::sftp::Sftp;
use super::super::upstream::{Connection, Meter, RemoteFile, Wanted};
use super::super::{Identity, Location, WireError};

fn packet(kind: u8, id: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = (body.len() as u32 + 5).to_be_bytes().to_vec();
    bytes.push(kind);
    bytes.extend(id.to_be_bytes());
    bytes.extend(body);
    bytes
}

fn text(bytes: &[u8]) -> Vec<u8> {
    let mut text = (bytes.len() as u32).to_be_bytes().to_vec();
    text.extend(bytes);
    text
}

/// Size and times.
fn attributes(size: u64) -> Vec<u8> {
    let mut bytes = 9u32.to_be_bytes().to_vec();
    bytes.extend(size.to_be_bytes());
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 7]);
    bytes
}

fn status(id: u32, code: u32) -> Vec<u8> {
    let mut body = code.to_be_bytes().to_vec();
    body.extend(text(b"Fail\x1bure"));
    packet(101, id, &body)
}

fn data(id: u32, bytes: &[u8]) -> Vec<u8> {
    packet(103, id, &text(bytes))
}

const HELLO: [u8; 9] = [0, 0, 0, 5, 2, 0, 0, 0, 3];

/// A server with fixed output, whatever it receives.
fn scripted(script: Vec<Vec<u8>>) -> UnixStream {
    let (client, mut server) = UnixStream::pair().unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    std::thread::spawn(move || {
        let _ = server.write_all(&script.concat());
        let _ = server.shutdown(std::net::Shutdown::Write);
        let _ = std::io::copy(&mut server, &mut std::io::sink());
    });
    client
}

fn connected(mut script: Vec<Vec<u8>>) -> Result<Sftp<UnixStream>, WireError> {
    script.insert(0, HELLO.to_vec());
    let meter = Arc::new(Meter::default());
    Sftp::start(scripted(script), "h".into(), meter, Box::new(|| None))
}

fn at() -> Location {
    Location::parse("ssh://h/disk").unwrap().unwrap()
}

fn wanted(length: usize) -> Wanted {
    let identity = Identity {
        size: 100,
        modified: Some(7),
        etag: None,
    };
    Wanted {
        target: Arc::new(RemoteFile {
            id: 1,
            at: at(),
            identity,
        }),
        offset: 10,
        length,
    }
}

/// The result of reading 8 bytes with these answers.
fn read(answers: Vec<Vec<u8>>) -> Result<Vec<u8>, WireError> {
    let mut script = vec![
        packet(102, 1, &text(b"handle")),
        packet(105, 2, &attributes(100)),
    ];
    script.extend(answers);
    let mut sftp = connected(script)?;
    sftp.send(5, &wanted(8))?;
    let (token, bytes) = sftp.receive()?;
    assert_eq!(token, 5);
    bytes
}

#[test]
fn reads_what_comes_in_pieces() {
    assert_eq!(read(vec![data(3, b"abcdefgh")]).unwrap(), b"abcdefgh");
    // Short ones are requested again, as numbers 4 and 5.
    let pieces = vec![data(3, b"abc"), data(4, b"d"), data(5, b"efgh")];
    assert_eq!(read(pieces).unwrap(), b"abcdefgh");
}

#[test]
fn believes_no_length_and_no_number() {
    let long = |length: u32| {
        let mut bytes = data(3, b"abcdefgh");
        bytes[..4].copy_from_slice(&length.to_be_bytes());
        bytes
    };
    let inner = |length: u32| {
        let mut bytes = data(3, b"abcdefgh");
        bytes[9..13].copy_from_slice(&length.to_be_bytes());
        bytes
    };
    for (answers, want) in [
        (vec![data(4, b"abcdefgh")], "no request"),
        (vec![data(3, b"abcdefghi")], "9 bytes where 8"),
        (vec![data(3, b"")], "0 bytes"),
        (vec![inner(7)], "7 bytes"),
        (vec![inner(u32::MAX)], "4294967295 bytes"),
        (vec![long(u32::MAX)], "a packet of 4294967295"),
        (vec![long(0)], "a packet of 0"),
        (vec![long(3)], "without an identifier"),
        (vec![data(3, b"abcd"), data(3, b"efgh")], "no request"),
        (vec![packet(104, 3, b"xxxx")], "another kind"),
        (vec![], "fill whole buffer"),
        (vec![b"Welcome to this host!\n".to_vec()], "a packet of"),
    ] {
        let error = read(answers).unwrap_err();
        assert!(error.to_string().contains(want), "{error} / {want}");
        assert!(error.is_passing() && error.hint().is_some());
    }
}

#[test]
fn tells_refusals_from_faults() {
    let error = read(vec![status(3, 1)]).unwrap_err();
    assert!(matches!(error, WireError::Changed { .. }), "{error}");
    // A failed read is tried again; the server's control characters are not printed.
    let error = read(vec![status(3, 4)]).unwrap_err();
    assert!(error.is_passing() && !error.to_string().contains('\x1b'));
    for (code, found) in [(2, false), (3, true), (4, true)] {
        let mut sftp = connected(vec![status(1, code)]).unwrap();
        let error = sftp.identify(&at()).unwrap_err();
        assert_eq!(error.is_not_found(), !found, "{error}");
        assert!(!error.is_passing(), "{error}");
    }
    // Another file by that name, when it is opened.
    let mut sftp = connected(vec![
        packet(102, 1, &text(b"handle")),
        packet(105, 2, &attributes(101)),
    ]);
    let error = sftp.as_mut().unwrap().send(5, &wanted(8)).unwrap_err();
    assert!(matches!(error, WireError::Changed { .. }), "{error}");
}

#[test]
fn greetings_and_listings_that_lie() {
    for hello in [
        vec![],
        b"motd: welcome\n".to_vec(),
        vec![0, 0, 0, 5, 2, 0, 0, 0, 2],
        vec![0xff; 9],
        vec![0, 0, 0, 1, 2],
    ] {
        let meter = Arc::new(Meter::default());
        let stream = scripted(vec![hello]);
        assert!(Sftp::start(stream, "h".into(), meter, Box::new(|| None)).is_err());
    }
    let directory = {
        let mut bytes = 4u32.to_be_bytes().to_vec();
        bytes.extend(0o040_755u32.to_be_bytes());
        bytes
    };
    let name = |name: &[u8]| [text(name), text(b"long"), attributes(5)].concat();
    let listing =
        |count: u32, names: &[Vec<u8>]| [count.to_be_bytes().to_vec(), names.concat()].concat();
    let start = || vec![packet(105, 1, &directory), packet(102, 2, &text(b"handle"))];
    let names = [
        name(b"."),
        name(b"a"),
        name(b"x/y"),
        name(b"\xff"),
        name(b"b"),
    ];
    let mut good = start();
    good.extend([
        packet(104, 3, &listing(5, &names)),
        status(4, 1),
        status(5, 0),
    ]);
    let listed = connected(good).unwrap().list(&at()).unwrap();
    let listed: Vec<_> = listed.iter().map(|l| (l.name.as_str(), l.size)).collect();
    assert_eq!(listed, [("a", Some(5)), ("b", Some(5))]);
    for bad in [
        listing(u32::MAX, &names),
        listing(0, &[]),
        listing(2, &names[..1]),
    ] {
        let mut script = start();
        script.push(packet(104, 3, &bad));
        assert!(connected(script).unwrap().list(&at()).is_err());
    }
}

#[test]
fn a_silent_server_is_given_up() {
    let (client, mut server) = UnixStream::pair().unwrap();
    client
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let silent = std::thread::spawn(move || server.read_to_end(&mut Vec::new()));
    let meter = Arc::new(Meter::default());
    let error = Sftp::start(client, "h".into(), meter, Box::new(|| None)).err();
    assert!(error.unwrap().to_string().contains("does not answer"));
    silent.join().unwrap().unwrap();
}
