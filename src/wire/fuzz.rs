//! The entry of the fuzz target `wire`: data of a server, parsed by the clients of such servers.

use std::io::{self, Read, Write};
use std::sync::Arc;

use super::nbd::{Names, Nbd, Stream};
use super::sftp::Sftp;
use super::upstream::{Connection, Meter, RemoteFile, Wanted};
use super::url::Location;
use super::{Identity, dirty, listing};

/// A server with fixed output, whatever it receives.
struct Scripted(io::Cursor<Vec<u8>>);

impl Scripted {
    fn new(bytes: &[u8]) -> Self {
        Self(io::Cursor::new(bytes.to_vec()))
    }
}

impl Read for Scripted {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Scripted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn at(url: &str) -> Option<Location> {
    Location::parse(url).ok().flatten()
}

fn wanted(at: &Location) -> Wanted {
    Wanted {
        target: Arc::new(RemoteFile {
            id: 1,
            at: at.clone(),
            identity: Identity {
                size: 1 << 20,
                modified: None,
                etag: None,
            },
        }),
        offset: 4096,
        length: 8192,
    }
}

/// Reads from `connection` until it fails.
fn drain(connection: &mut dyn Connection, at: &Location) {
    let wanted = wanted(at);
    for token in 0..4 {
        if connection.send(token, &wanted).is_err() {
            return;
        }
    }
    for _ in 0..4 {
        match connection.receive() {
            Ok((_, Ok(bytes))) => assert_eq!(bytes.len(), wanted.length),
            Ok((_, Err(_))) => {}
            Err(_) => return,
        }
    }
}

/// Parses the answers of a server: of SFTP, of NBD, to queries of bitmaps, or a page with a
/// listing.
#[doc(hidden)]
pub fn answers(kind: u8, bytes: &[u8]) {
    let (Some(file), Some(export)) = (at("ssh://h/d/disk"), at("nbd://h/x")) else {
        return;
    };
    let names = Names {
        server: "the server".into(),
        export: "x".into(),
    };
    let meter = Arc::new(Meter::default());
    match kind % 6 {
        n @ 0..=2 => {
            let script = Scripted::new(bytes);
            let started = Sftp::start(script, "h".into(), meter, Box::new(|| None));
            let Ok(mut sftp) = started else { return };
            match n {
                0 => drain(&mut sftp, &file),
                1 => {
                    let listed = sftp.list(&file).unwrap_or_default();
                    assert!(listed.iter().all(|entry| !entry.name.contains('/')));
                }
                _ => drop(sftp.identify(&file)),
            }
        }
        3 => {
            let mut stream: Box<dyn Stream> = Box::new(Scripted::new(bytes));
            let Ok(flags) = names.greet(&mut *stream) else {
                return;
            };
            let started = Nbd::start(stream, flags, names, meter, Box::new(|| None));
            if let Ok(mut nbd) = started {
                drain(&mut nbd, &export);
            }
        }
        4 => {
            let ranges = dirty::ranges(&mut Scripted::new(bytes), 0, &names);
            let ordered = |ranges: &[(u64, u64)]| {
                ranges.windows(2).all(|pair| {
                    pair[0]
                        .0
                        .checked_add(pair[0].1)
                        .is_some_and(|end| end <= pair[1].0)
                })
            };
            if let Ok(Some(ranges)) = ranges {
                assert!(ordered(&ranges));
            }
        }
        _ => {
            let page = String::from_utf8_lossy(bytes);
            for entry in listing::entries(&page, &file) {
                assert!(!entry.name.is_empty() && !entry.name.contains('/'));
            }
        }
    }
}
