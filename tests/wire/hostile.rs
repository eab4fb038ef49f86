//! A web server over TLS that returns wrong data, disconnects, stalls and changes. Conversions by
//! the program itself end with the result of the local conversion, or with exit 1 and a remedy, and
//! then a resumed run with that result.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::proofs::{dirty, noise, same_files};
use super::{live_bytes, ready, run};
use crate::hostile_server::{
    Asked, End, FAULTS, Server, certificate, partial, spoil, status, whole,
};
use crate::support::wire::{Nginx, Sshd, free_port};
use crate::support::{self, Lab, finish, names, text, tool};

/// A fault at a place of the disk.
struct Trap {
    at: u64,
    fault: &'static str,
    /// Or once.
    lasts: bool,
}

/// A disk behind a server that announces nothing and answers ranges, like ESXi.
struct Site {
    disk: File,
    size: u64,
    traps: Mutex<Vec<Trap>>,
    /// From that request on replaced in the head of every answer.
    changed: Mutex<Option<(usize, &'static str, &'static str)>>,
    /// Every connection shows the other certificate.
    other: AtomicBool,
    /// Whether a password is asked for; a session is good for so many requests.
    session: Option<usize>,
    /// The range that was sent away for a second, and when; how long it stayed away.
    sent_away: Mutex<Option<(u64, Instant)>>,
    stayed_away: Mutex<Option<Duration>>,
}

impl Site {
    fn of(disk: &Path, session: Option<usize>) -> Arc<Self> {
        let disk = File::open(disk).unwrap();
        Arc::new(Self {
            size: disk.metadata().unwrap().len(),
            disk,
            traps: Mutex::default(),
            changed: Mutex::default(),
            other: AtomicBool::new(false),
            session,
            sent_away: Mutex::default(),
            stayed_away: Mutex::default(),
        })
    }

    /// The server, and the fingerprint of its other certificate.
    fn serve(self: &Arc<Self>) -> (Server, String) {
        let (first, pem, fingerprint) = certificate();
        let (second, _, other) = certificate();
        let (site, answering) = (self.clone(), self.clone());
        let config = move |_| match site.other.load(Ordering::SeqCst) {
            true => second.clone(),
            false => first.clone(),
        };
        let server = Server::with(config, &pem, fingerprint, move |asked| {
            answering.answer(asked)
        });
        (server, other)
    }

    /// What is refused because nobody logged in, and the cookie of the session.
    fn logged_in(&self, asked: &Asked) -> Result<String, (Vec<u8>, End)> {
        let Some(requests) = self.session else {
            return Ok(String::new());
        };
        let head = asked.head.to_ascii_lowercase();
        let cookie = format!("vmware_soap_session=\"s{}\"", asked.number / requests);
        let expired = head.contains("cookie:") && !head.contains(&cookie);
        // reader:secret
        match expired || !asked.head.contains("Basic cmVhZGVyOnNlY3JldA==") {
            true => Err(status(
                "401 Expired",
                "WWW-Authenticate: Basic realm=\"x\"\r\n",
            )),
            false => Ok(format!(
                "Set-Cookie: {cookie}; Path=/; HttpOnly; Secure\r\n"
            )),
        }
    }

    fn answer(&self, asked: &Asked) -> (Vec<u8>, End) {
        let cookie = match self.logged_in(asked) {
            Ok(cookie) => cookie,
            Err(refused) => return refused,
        };
        if self.other.load(Ordering::SeqCst) {
            return (Vec::new(), End::Close);
        }
        if asked.target != "/d/vm.raw" {
            return status("404 None", "");
        }
        let (head, body) = partial(asked, self.size, |offset, length| {
            let mut bytes = vec![0; length];
            self.disk.read_exact_at(&mut bytes, offset).unwrap();
            bytes
        });
        let mut head = format!("{head}Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n{cookie}");
        if let Some((since, from, to)) = *self.changed.lock().unwrap()
            && asked.number >= since
        {
            head = head.replace(from, to);
        }
        let (first, last) = asked.range.unwrap();
        if let Some((_, since)) = self
            .sent_away
            .lock()
            .unwrap()
            .take_if(|(offset, _)| *offset == first)
        {
            *self.stayed_away.lock().unwrap() = Some(since.elapsed());
        }
        let trap = {
            let mut traps = self.traps.lock().unwrap();
            let here = |trap: &Trap| (first..=last).contains(&trap.at) && first < last;
            traps.iter().position(here).map(|found| {
                let trap = &traps[found];
                let (fault, lasts) = (trap.fault, trap.lasts);
                if !lasts {
                    traps.remove(found);
                }
                fault
            })
        };
        match trap {
            None => (whole(&head, &body), End::Keep),
            Some("another certificate") => {
                self.other.store(true, Ordering::SeqCst);
                (Vec::new(), End::Close)
            }
            Some("another ETag") => self.change("\"one\"", "\"two\"", &head, &body),
            Some("the whole file") => (b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), End::Endless),
            Some("401") => status("401 No", "WWW-Authenticate: Basic realm=\"x\"\r\n"),
            Some("503 for a second") => {
                *self.sent_away.lock().unwrap() = Some((first, Instant::now()));
                status("503 Busy", "Retry-After: 1\r\n")
            }
            Some(fault) => spoil(fault, &head, &body, self.size),
        }
    }

    fn change(
        &self,
        from: &'static str,
        to: &'static str,
        head: &str,
        body: &[u8],
    ) -> (Vec<u8>, End) {
        *self.changed.lock().unwrap() = Some((0, from, to));
        (whole(&head.replace(from, to), body), End::Keep)
    }

    /// All is well again.
    fn mended(&self) {
        self.traps.lock().unwrap().clear();
        *self.changed.lock().unwrap() = None;
        self.other.store(false, Ordering::SeqCst);
    }
}

/// Places of live data, a MiB apart, in their order on the disk.
fn places(lab: &Lab, live_mib: u64) -> Vec<u64> {
    let length = live_mib << 17;
    let heads: Vec<Vec<u8>> = (0..8).map(|i| noise(64, i + 9)).collect();
    let tails = (0..8).map(|i| noise(length, i + 9).split_off(length as usize - 64));
    let tails: Vec<Vec<u8>> = tails.collect();
    let disk = File::open(&lab.raw).unwrap();
    let mut found = Vec::new();
    let mut chunk = vec![0; 1 << 20];
    for at in (0..lab.spec.disk_size).step_by(chunk.len()) {
        disk.read_exact_at(&mut chunk, at).unwrap();
        for (i, cluster) in chunk.chunks(4096).enumerate() {
            let start = at + i as u64 * 4096;
            let Some(file) = heads.iter().position(|head| cluster.starts_with(head)) else {
                continue;
            };
            // A deleted file begins alike, and is shorter.
            let mut tail = [0; 64];
            disk.read_exact_at(&mut tail, start + length - 64).unwrap();
            if tail[..] == tails[file] {
                found.extend((0..live_mib / 8).map(|mib| start + (mib << 20) + (512 << 10)));
            }
        }
    }
    found
}

fn url(server: &Server) -> String {
    format!("https://localhost:{}/d/vm.raw", server.port)
}

fn trusting(server: &Server) -> Vec<String> {
    vec!["--tls-ca".into(), text(&server.authority).into()]
}

/// The local conversion.
fn local(lab: &Lab) -> std::path::PathBuf {
    let out = lab.path("local");
    let options = ["-o", text(&out), "--name", "vm"];
    finish(support::command("convert", &lab.raw, &options)).expect(0);
    out.join("vm.qcow2")
}

#[test]
fn faults_that_pass_cost_time_and_nothing_else() {
    if !ready(&[]) {
        return;
    }
    let lab = dirty(24, 8);
    let local = local(&lab);
    let site = Site::of(&lab.raw, Some(9));
    let (server, _) = site.serve();
    let password = lab.path("password");
    fs::write(&password, "secret\n").unwrap();
    fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).unwrap();
    let mut options = trusting(&server);
    options.extend(["--user", "reader", "--password-file", text(&password)].map(str::to_owned));
    let places = places(&lab, 24);
    // The one that is waited for lies apart, so that no other fault of its piece is in the way.
    let apart = (&places[23], &"503 for a second");
    let traps = places.iter().zip(&FAULTS).chain([apart]);
    let traps = traps.map(|(&at, fault)| Trap {
        at,
        fault,
        lasts: false,
    });
    *site.traps.lock().unwrap() = traps.collect();
    let out = lab.path("out");
    let more = ["-o", text(&out), "--name", "vm"];
    let report = run("convert", &url(&server), &options, &more)
        .expect(0)
        .json();
    let left: Vec<_> = site.traps.lock().unwrap().iter().map(|t| t.fault).collect();
    assert_eq!(left, Vec::<&str>::new(), "faults that were not met");
    let stayed_away = site.stayed_away.lock().unwrap().unwrap();
    assert!(stayed_away >= Duration::from_secs(1), "{stayed_away:?}");
    assert_eq!(report["ready"], true);
    // What came with a fault is fetched again, once for each.
    let fetched = report["bytes"]["fetched"].as_u64().unwrap();
    assert!(fetched < live_bytes(&report) + (80 << 20), "{fetched}");
    same_files(&out.join("vm.qcow2"), &local, lab.dir.path());
    // Sessions expired all the time, and were renewed.
    let asked = server.asked.lock().unwrap();
    let sessions = asked.iter().map(|asked| asked.number / 9).max().unwrap();
    assert!(sessions > 3, "{sessions}");
    assert!(asked.iter().all(|asked| asked.head.starts_with("GET ")));
}

#[test]
fn faults_that_last_are_exit_1_and_a_resumed_run_ends_alike() {
    if !ready(&[]) {
        return;
    }
    let lab = dirty(24, 8);
    let local = local(&lab);
    let site = Site::of(&lab.raw, None);
    let (server, other) = site.serve();
    let options = trusting(&server);
    let out = lab.path("out");
    let base = [
        "-o",
        text(&out),
        "--name",
        "vm",
        "--connections",
        "2",
        "--retries",
    ];
    let faults = [
        ("cuts", "1", "bytes:"),
        ("stalls", "0", "of"),
        ("416", "1", "HTTP 416"),
        ("503", "0", "busy (HTTP 503)"),
        ("too short", "1", "another length"),
        ("endless", "1", "where it announced"),
        ("the whole file", "1", "the whole file"),
        ("401", "1", "HTTP 401"),
        ("another certificate", "4", &other),
        ("another ETag", "1", "changed while it was read"),
    ];
    let mut resume = Vec::new();
    // Whatever else is copied meanwhile, this is not.
    let at = places(&lab, 24)[12];
    for (fault, retries, says) in faults {
        *site.traps.lock().unwrap() = vec![Trap {
            at,
            fault,
            lasts: true,
        }];
        let more = [&base[..], &[retries], &resume].concat();
        let run = run("convert", &url(&server), &options, &more);
        assert_eq!(run.code, 1, "{fault}: {}", run.stderr);
        let said = run.json()["error"].to_string();
        assert!(said.contains(says), "{fault}: {said}");
        assert!(said.contains("--resume"), "{fault}: {said}");
        let hints = run.json()["error"]["hints"].as_array().unwrap().len();
        assert!(hints >= 2, "{fault}: what to do about it: {said}");
        assert!(!out.exists(), "{fault}");
        if fault == "another certificate" {
            assert!(said.contains(&server.fingerprint), "{fault}: {said}");
        }
        resume = vec!["--resume"];
        site.mended();
    }
    let more = [&base[..], &["1", "--resume"]].concat();
    let report = run("convert", &url(&server), &options, &more)
        .expect(0)
        .json();
    let resumed = report["bytes"]["resumed"].as_u64().unwrap();
    assert!(resumed > 0, "nothing was kept");
    same_files(&out.join("vm.qcow2"), &local, lab.dir.path());
    let left = names(lab.dir.path());
    assert!(!left.iter().any(|n| n.contains(".partial")), "{left:?}");
}

/// Before anything is copied an error leaves nothing; a mismatch shows both fingerprints.
#[test]
fn who_is_not_who_was_expected_is_shown_with_both_fingerprints() {
    if !ready(&[&Sshd::TOOLS[..], &Nginx::TOOLS].concat()) {
        return;
    }
    let lab = Lab::small();
    let site = Site::of(&lab.raw, None);
    let (server, other) = site.serve();
    let pinned = ["--tls-fingerprint".to_owned(), other.clone()];
    let out = lab.path("out");
    for verb in ["inspect", "plan", "convert", "verify"] {
        let more = ["-o", text(&out)];
        let more = match verb {
            "plan" | "convert" => &more[..],
            _ => &[],
        };
        let run = run(verb, &url(&server), &pinned, more).expect(1);
        let said = run.json()["error"].to_string();
        assert!(
            said.contains(&other) && said.contains(&server.fingerprint),
            "{said}"
        );
        assert!(run.stderr.contains("--tls-fingerprint"), "{}", run.stderr);
    }
    assert!(!out.exists() && !names(lab.dir.path()).iter().any(|n| n.contains("partial")));
    run(
        "inspect",
        &url(&server),
        &["--tls-fingerprint".to_owned(), server.fingerprint.clone()],
        &[],
    )
    .expect(0);

    let sshd = Sshd::start();
    let wrong = sshd.dir.path().join("wrong_hosts");
    let mut options = sshd.options();
    *options.last_mut().unwrap() = text(&wrong).into();
    let said = run("inspect", &sshd.url(&lab.raw), &options, &[]).expect(1);
    for key in ["host.pub", "other.pub"] {
        let key = tool("ssh-keygen", &["-lf", text(&sshd.dir.path().join(key))]);
        let key = String::from_utf8(key).unwrap();
        let key = key.split(' ').nth(1).unwrap();
        assert!(said.stderr.contains(key), "{key}: {}", said.stderr);
    }

    // A key that is too short for today's TLS, as that of govmomi's simulator.
    let (key, certificate) = (lab.path("key.pem"), lab.path("cert.pem"));
    let made = [
        "req",
        "-x509",
        "-newkey",
        "rsa:1024",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ];
    let names = [
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        text(&key),
        "-out",
        text(&certificate),
    ];
    tool("openssl", &[&made[..], &names].concat());
    let port = free_port().to_string();
    let mut weak = std::process::Command::new("openssl")
        .args([
            "s_server",
            "-quiet",
            "-accept",
            &port,
            "-cipher",
            "DEFAULT@SECLEVEL=0",
            "-www",
        ])
        .args(["-key", text(&key), "-cert", text(&certificate)])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while std::net::TcpStream::connect(format!("localhost:{port}")).is_err() {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(10));
    }
    let options = ["--tls-ca".to_owned(), text(&certificate).to_owned()];
    let said = run(
        "inspect",
        &format!("https://localhost:{port}/x"),
        &options,
        &[],
    );
    let _ = weak.kill();
    let _ = weak.wait();
    let said = said.expect(1).stderr;
    assert!(
        said.contains("RSA key of 1024 bits") && said.contains("2048 bits or more"),
        "{said}"
    );
}

#[test]
fn a_file_that_changes_while_it_is_inspected_ends_that() {
    if !ready(&[]) {
        return;
    }
    let lab = Lab::small();
    let site = Site::of(&lab.raw, None);
    let (server, _) = site.serve();
    for (from, to) in [
        ("\"one\"", "\"two\""),
        ("08:49:37", "08:49:38"),
        ("/536870912", "/536870913"),
    ] {
        let so_far = server.asked.lock().unwrap().len();
        *site.changed.lock().unwrap() = Some((so_far + 12, from, to));
        let run = run("inspect", &url(&server), &trusting(&server), &[]);
        let said = run.expect(1).stderr;
        assert!(said.contains(" changed "), "{to}: {said}");
        assert!(said.contains("hint: "), "{to}: {said}");
        // There is no listing of the directory, which is no reason to blame.
        assert!(!said.contains("no such file"), "{to}: {said}");
        site.mended();
    }
}
