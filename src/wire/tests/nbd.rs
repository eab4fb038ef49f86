//! NBD servers with wrong answers, one answer at a time.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::super::nbd::{Names, Nbd, Stream};
use super::super::upstream::{Connection, Meter, RemoteFile, Wanted};
use super::super::{Identity, Location, Result, WireError};

const SIZE: u64 = 1 << 20;

fn greeting(flags: u16) -> Vec<u8> {
    [b"NBDMAGIC", b"IHAVEOPT", &flags.to_be_bytes()[..]].concat()
}

fn option_reply(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut reply = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
    reply.extend(7u32.to_be_bytes());
    reply.extend(kind.to_be_bytes());
    reply.extend((data.len() as u32).to_be_bytes());
    reply.extend(data);
    reply
}

fn export(size: u64) -> Vec<u8> {
    let mut info = vec![0, 0];
    info.extend(size.to_be_bytes());
    info.extend([0, 3]);
    option_reply(3, &info)
}

fn blocks(least: u32, most: u32) -> Vec<u8> {
    let mut info = vec![0, 3];
    for size in [least, 4096, most] {
        info.extend(size.to_be_bytes());
    }
    option_reply(3, &info)
}

fn reply(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
    let mut reply = 0x6744_6698u32.to_be_bytes().to_vec();
    reply.extend(error.to_be_bytes());
    reply.extend(cookie.to_be_bytes());
    reply.extend(data);
    reply
}

fn connected(script: &[Vec<u8>]) -> Result<Nbd> {
    let (client, mut server) = UnixStream::pair().unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let script = script.concat();
    std::thread::spawn(move || {
        let _ = server.write_all(&script);
        let _ = server.shutdown(std::net::Shutdown::Write);
        let _ = std::io::copy(&mut server, &mut std::io::sink());
    });
    let names = Names {
        server: "nbd://h".into(),
        export: "x".into(),
    };
    let mut stream: Box<dyn Stream> = Box::new(client);
    let flags = names.greet(&mut *stream)?;
    Nbd::start(
        stream,
        flags,
        names,
        Arc::new(Meter::default()),
        Box::new(|| None),
    )
}

fn read(size: u64, answers: &[Vec<u8>]) -> Result<Vec<u8>> {
    let mut script = vec![greeting(3), export(size), option_reply(1, &[])];
    script.extend_from_slice(answers);
    let mut nbd = connected(&script)?;
    let identity = Identity {
        size: SIZE,
        modified: None,
        etag: None,
    };
    let target = Arc::new(RemoteFile {
        id: 1,
        at: Location::parse("nbd://h/x").unwrap().unwrap(),
        identity,
    });
    let wanted = Wanted {
        target,
        offset: 4096,
        length: 8192,
    };
    nbd.send(9, &wanted)?;
    let (token, bytes) = nbd.receive()?;
    assert_eq!(token, 9);
    bytes
}

#[test]
fn greetings_that_lie() {
    let info = |data: &[u8]| option_reply(3, data);
    let mut long = option_reply(3, &[]);
    let at = long.len() - 4;
    long[at..].copy_from_slice(&u32::MAX.to_be_bytes());
    for (script, want) in [
        (vec![], "fill whole buffer"),
        (vec![vec![b'x'; 40]], "no newstyle"),
        (vec![greeting(0)], "old handshake"),
        (vec![greeting(3), option_reply(1, &[])], "no size"),
        (
            vec![greeting(3), info(&[0, 0, 1]), option_reply(1, &[])],
            "no size",
        ),
        (vec![greeting(3), long], "wrong option reply"),
        (
            vec![greeting(3), vec![option_reply(9, &[]); 70].concat()],
            "too many",
        ),
        (
            vec![
                greeting(3),
                export(SIZE),
                blocks(65536, 1 << 20),
                option_reply(1, &[]),
            ],
            "65536 to",
        ),
        (
            vec![
                greeting(3),
                export(SIZE),
                blocks(1, 3),
                option_reply(1, &[]),
            ],
            "1 to 3 bytes",
        ),
        (
            vec![greeting(3), option_reply((1 << 31) + 2, b"no\x1bpe")],
            "(nope",
        ),
        (vec![greeting(3), option_reply((1 << 31) + 5, b"")], "TLS"),
    ] {
        let error = connected(&script).err().unwrap();
        assert!(error.to_string().contains(want), "{error} / {want}");
        assert!(error.hint().is_some() && error.kind().code() == 1);
    }
    let error = connected(&[greeting(3), option_reply((1 << 31) + 6, b"")]).err();
    assert!(error.unwrap().is_not_found());
    // A server from before GO.
    let mut old = SIZE.to_be_bytes().to_vec();
    old.extend([0, 3]);
    let nbd = connected(&[greeting(3), option_reply((1 << 31) + 1, &[]), old]);
    let at = Location::parse("nbd://h/x").unwrap().unwrap();
    assert_eq!(nbd.unwrap().identify(&at).unwrap().size, SIZE);
}

#[test]
fn replies_that_lie() {
    assert_eq!(read(SIZE, &[reply(1, 0, &[7; 8192])]).unwrap(), [7; 8192]);
    let mut magic = reply(1, 0, &[7; 8192]);
    magic[0] = 0;
    for (answer, want) in [
        (reply(2, 0, &[7; 8192]), "no request"),
        (magic, "no request"),
        (reply(1, 0, &[7; 100]), "fill whole buffer"),
        (reply(1, 5, &[]), "Input/output error"),
        (reply(1, u32::MAX, &[]), "the NBD server answers"),
        (vec![], "fill whole buffer"),
    ] {
        let error = read(SIZE, &[answer]).unwrap_err();
        assert!(error.to_string().contains(want), "{error} / {want}");
        assert!(error.is_passing());
    }
    let error = read(SIZE + 1, &[]).unwrap_err();
    assert!(matches!(error, WireError::Changed { .. }), "{error}");
}
