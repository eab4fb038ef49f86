//! Real servers on loopback: openssh, nginx, nbdkit, `qemu-nbd`.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::{Access, Location, Remote, Result, Wire, WireError};
use super::support::{Line, Nbdkit, Nginx, Sshd, certificate};
use super::{SOON, pattern, right};
use crate::block::BlockRead;
use crate::disk::nbd::Nbd;
use crate::skip::have;

fn disk(folder: &Path, size: usize) {
    fs::write(folder.join("a disk"), pattern(0, size)).unwrap();
}

fn at(url: &str) -> Location {
    Location::parse(url).unwrap().unwrap()
}

fn ssh_access(sshd: &Sshd) -> Access {
    Access {
        ssh_identity: Some(sshd.dir.path().join("identity")),
        ssh_known_hosts: Some(sshd.dir.path().join("known_hosts")),
        connections: Some(3),
        ..Access::default()
    }
}

pub(super) fn client(remote: &Remote) -> Nbd {
    let stream = UnixStream::connect(&remote.socket).unwrap();
    Nbd::handshake(stream, &remote.export, SOON).unwrap()
}

/// Reads all of it.
fn read(remote: &Remote) {
    let client = client(remote);
    let mut bytes = vec![0; remote.size as usize];
    client.read_at(0, &mut bytes).unwrap();
    assert!(right(0, &bytes));
}

#[test]
fn reads_lists_and_tells_over_openssh() {
    if !have(&Sshd::TOOLS) {
        return;
    }
    let sshd = Sshd::start();
    let folder = tempfile::tempdir().unwrap();
    disk(folder.path(), 20 << 20);
    let url = at(&sshd.url(&folder.path().join("a disk")));
    let wire = Wire::connect(&url, &ssh_access(&sshd)).unwrap();
    let remote = wire.open(&url).unwrap();
    let metadata = fs::metadata(folder.path().join("a disk")).unwrap();
    let modified = metadata.modified().unwrap();
    let modified = modified.duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(remote.identity.modified, Some(modified.as_secs()));
    read(&remote);
    assert_eq!(wire.fetched(), 20 << 20);
    let listed = wire.list(&url.directory()).unwrap();
    let listed: Vec<_> = listed.iter().map(|l| (l.name.as_str(), l.size)).collect();
    assert_eq!(listed, [("a disk", Some(20 << 20))]);
    assert!(matches!(wire.list(&url), Err(WireError::CannotList { .. })));
    let none = url.join("none.vmdk").unwrap();
    assert!(wire.open(&none).unwrap_err().is_not_found());
    assert_eq!(wire.open(&url.directory()).unwrap_err().kind().code(), 2);
    remote.check_unchanged().unwrap();
    let file = fs::File::options()
        .append(true)
        .open(folder.path().join("a disk"));
    file.unwrap().set_len((20 << 20) + 1).unwrap();
    let error = remote.check_unchanged().unwrap_err();
    assert!(matches!(error, WireError::Changed { .. }), "{error}");
}

#[test]
fn host_keys_are_always_verified_and_a_mismatch_shows_both() {
    if !have(&Sshd::TOOLS) {
        return;
    }
    let sshd = Sshd::start();
    let url = at(&sshd.url(Path::new("/etc/hostname")));
    let fingerprint = |key: &str| {
        let key = sshd.dir.path().join(key);
        let out = crate::tool::Cmd::new("ssh-keygen")
            .arg("-lf")
            .arg(key)
            .run();
        let text = String::from_utf8(out.unwrap().stdout).unwrap();
        text.split(' ').nth(1).unwrap().to_owned()
    };
    let with = |known: &str| Access {
        ssh_known_hosts: Some(sshd.dir.path().join(known)),
        ..ssh_access(&sshd)
    };
    let start = Instant::now();
    let error = Wire::connect(&url, &with("wrong_hosts")).unwrap_err();
    let text = error.to_string();
    for key in ["host.pub", "other.pub"] {
        assert!(text.contains(&fingerprint(key)), "{key}: {text}");
    }
    assert!(matches!(error, WireError::Untrusted { .. }), "{error}");
    fs::write(sshd.dir.path().join("none"), "").unwrap();
    let error = Wire::connect(&url, &with("none")).unwrap_err();
    assert!(matches!(error, WireError::Untrusted { .. }), "{error}");
    assert!(error.hint().unwrap().contains("ssh-keyscan -p"), "{error}");
    // A key that the server does not accept.
    let access = Access {
        ssh_identity: Some(sshd.dir.path().join("other")),
        ..ssh_access(&sshd)
    };
    let error = Wire::connect(&url, &access).unwrap_err();
    assert!(matches!(error, WireError::Denied { .. }), "{error}");
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "none is tried again"
    );
}

#[test]
fn goes_on_after_the_server_was_killed() {
    if !have(&Sshd::TOOLS) {
        return;
    }
    let mut sshd = Sshd::start();
    let folder = tempfile::tempdir().unwrap();
    disk(folder.path(), 16 << 20);
    let url = at(&sshd.url(&folder.path().join("a disk")));
    let access = Access {
        patience: Duration::from_secs(2),
        retries: 100,
        ..ssh_access(&sshd)
    };
    let wire = Wire::connect(&url, &access).unwrap();
    let remote = wire.open(&url).unwrap();
    let client = client(&remote);
    let mut bytes = vec![0; 1 << 20];
    client.read_at(0, &mut bytes).unwrap();
    sshd.stop();
    let start = Instant::now();
    let error = client.read_at(4 << 20, &mut [0; 4096]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5));
    assert!(start.elapsed() < Duration::from_secs(6));
    assert!(wire.trouble().is_some());
    sshd.again();
    let start = Instant::now();
    while client.read_at(4 << 20, &mut bytes).is_err() {
        assert!(start.elapsed() < Duration::from_secs(20));
    }
    assert!(right(4 << 20, &bytes));
    read(&remote);
}

#[test]
fn reads_and_lists_over_nginx_with_tls_and_a_password() {
    if !have(&Nginx::TOOLS) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    disk(folder.path(), 12 << 20);
    fs::create_dir(folder.path().join("deep")).unwrap();
    let nginx = Nginx::start(folder.path());
    let access = Access {
        tls_ca: Some(nginx.file("cert.pem").into()),
        ..Access::default()
    };
    let url = at(&nginx.url("a%20disk"));
    let wire = Wire::connect(&url, &access).unwrap();
    let remote = wire.open(&url).unwrap();
    assert!(remote.identity.etag.is_some() && remote.identity.modified.is_some());
    read(&remote);
    let listed = wire.list(&url.directory()).unwrap();
    let mut listed: Vec<_> = listed
        .into_iter()
        .map(|l| (l.name, l.is_directory))
        .collect();
    listed.sort();
    assert_eq!(
        listed,
        [("a disk".to_owned(), false), ("deep".to_owned(), true)]
    );
    let locked = at(&nginx.url("locked/a%20disk"));
    let error = wire.open(&locked).unwrap_err();
    assert!(matches!(error, WireError::Denied { .. }), "{error}");
    let access = Access {
        user: Some("user".into()),
        password_file: Some(nginx.file("password").into()),
        ..access
    };
    let wire = Wire::connect(&locked, &access).unwrap();
    read(&wire.open(&locked).unwrap());
    // From here on the file is another one, which the next read of uncached data detects.
    fs::write(folder.path().join("a disk"), pattern(0, 1 << 20)).unwrap();
    let error = remote.check_unchanged().unwrap_err();
    assert!(matches!(error, WireError::Changed { .. }), "{error}");
}

#[test]
fn reads_nbdkit_and_qemu_nbd_and_finds_what_is_not_exported() {
    if !have(&["nbdkit", "qemu-nbd"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    disk(folder.path(), 12 << 20);
    let file = folder.path().join("a disk");
    let server = Nbdkit::start(&["file", file.to_str().unwrap()]);
    let url = at(&server.url(""));
    let wire = Wire::connect(&url, &Access::default()).unwrap();
    let remote = wire.open(&url).unwrap();
    assert_eq!(remote.identity.modified, None);
    read(&remote);
    // A server that requires whole blocks of its own size.
    let server = Nbdkit::start(&[
        "--filter=blocksize-policy",
        "file",
        file.to_str().unwrap(),
        "blocksize-minimum=4096",
        "blocksize-maximum=65536",
        "blocksize-error-policy=error",
    ]);
    let url = at(&server.url("x"));
    let wire = Wire::connect(&url, &Access::default()).unwrap();
    read(&wire.open(&url).unwrap());
    let socket = folder.path().join("nbd");
    let served = crate::tool::Cmd::new("qemu-nbd")
        .args(["-r", "-t", "-e", "8", "-f", "raw", "-x", "disk", "-k"])
        .arg(&socket)
        .arg(&file)
        .spawn()
        .unwrap();
    let start = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(10));
    }
    let url = at(&format!("nbd+unix:///disk?socket={}", socket.display()));
    let wire = Wire::connect(&url, &Access::default()).unwrap();
    read(&wire.open(&url).unwrap());
    assert!(wire.open(&url.with_path("no")).unwrap_err().is_not_found());
    drop(served);
}

#[test]
fn nbds_is_encrypted_and_verified() {
    if !have(&["nbdkit", "openssl"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    disk(folder.path(), 6 << 20);
    let path = |name: &str| folder.path().join(name);
    certificate(&path("server-cert.pem"), &path("server-key.pem"));
    fs::copy(path("server-cert.pem"), path("ca-cert.pem")).unwrap();
    certificate(&path("other.pem"), &path("other-key.pem"));
    let (file, certificates) = (
        path("a disk"),
        format!("--tls-certificates={}", folder.path().display()),
    );
    let server = Nbdkit::start(&[
        "--tls=require",
        &certificates,
        "file",
        file.to_str().unwrap(),
    ]);
    let with = |authority: &str| Access {
        tls_ca: Some(path(authority)),
        ..Access::default()
    };
    let url = at(&format!("nbds://localhost:{}/", server.port));
    let wire = Wire::connect(&url, &with("ca-cert.pem")).unwrap();
    read(&wire.open(&url).unwrap());
    let wire = Wire::connect(&url, &with("other.pem")).unwrap();
    let error = wire.open(&url).unwrap_err();
    assert!(matches!(error, WireError::Untrusted { .. }), "{error}");
    assert_eq!(error.to_string().matches("sha256:").count(), 2, "{error}");
    let plain = at(&server.url(""));
    let wire = Wire::connect(&plain, &Access::default()).unwrap();
    let error = wire.open(&plain).unwrap_err();
    assert!(error.hint().unwrap().contains("nbds://"), "{error}");
    // And one without TLS is not read in the clear instead.
    let server = Nbdkit::start(&["file", file.to_str().unwrap()]);
    let url = at(&format!("nbds://localhost:{}/", server.port));
    let wire = Wire::connect(&url, &with("ca-cert.pem")).unwrap();
    let error = wire.open(&url).unwrap_err();
    assert!(error.to_string().contains("no TLS"), "{error}");
}

/// The seconds for reading a whole file.
fn seconds(url: &Location, access: &Access, expected: bool) -> Result<f64> {
    let wire = Wire::connect(url, access)?;
    let remote = wire.open(url)?;
    if expected {
        remote.expect(&[(0, remote.size)])?;
        // As during the fix.
        remote.prepare()?;
        std::thread::sleep(Duration::from_secs(3));
    }
    let client = client(&remote);
    let mut bytes = vec![0; 8 << 20];
    let start = Instant::now();
    for offset in (0..remote.size).step_by(8 << 20) {
        client.read_at(offset, &mut bytes).unwrap();
    }
    Ok(start.elapsed().as_secs_f64())
}

#[test]
#[ignore = "minutes: cargo test --release --lib wire::tests::real::keeps -- --ignored --nocapture"]
fn keeps_its_throughput_at_a_distance() {
    const SIZE: u64 = 1 << 30;
    let sshd = Sshd::start();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("large");
    let written = fs::File::create(&file).unwrap();
    for offset in (0..SIZE).step_by(1 << 20) {
        written
            .write_all_at(&pattern(offset, 1 << 20), offset)
            .unwrap();
    }
    let mut before = 0.0;
    for (milliseconds, least) in [(0, 1.0), (20, 0.8), (60, 0.6)] {
        let line = Line::to(sshd.port, Duration::from_millis(milliseconds));
        // The same key, under the name of the line.
        let known = fs::read_to_string(sshd.dir.path().join("known_hosts")).unwrap();
        let known = known.replace(&sshd.port.to_string(), &line.port.to_string());
        fs::write(sshd.dir.path().join("line"), known).unwrap();
        let url = sshd.url(&file);
        let url = at(&url.replace(&sshd.port.to_string(), &line.port.to_string()));
        let access = Access {
            ssh_known_hosts: Some(sshd.dir.path().join("line")),
            connections: Access::default().connections,
            ..ssh_access(&sshd)
        };
        let taken = seconds(&url, &access, true).unwrap();
        let rate = SIZE as f64 / taken / f64::from(1 << 20);
        eprintln!("{milliseconds} ms: {rate:.0} MiB/s");
        if milliseconds == 0 {
            before = rate;
        }
        assert!(
            rate >= least * before,
            "{rate} of {before} at {milliseconds} ms"
        );
    }
}
