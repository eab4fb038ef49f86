//! `sync` over NBD servers of QEMU that show dirty bitmaps.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::support::{Lab, TOOLS, have, text, tool};
use super::sync::{file_in, lab, last_pass, run, write, write_differences};
use super::{MIB, noise};

/// A server that is killed with the test.
pub(super) struct Server(Child, PathBuf);

impl Server {
    fn start(mut command: Command, socket: PathBuf) -> Self {
        let _ = fs::remove_file(&socket);
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < Duration::from_secs(30), "no server");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self(child, socket)
    }

    /// A disk that is off, with its bitmaps.
    pub(super) fn of_image(lab: &Lab, image: &Path, bitmaps: &[&str]) -> Self {
        let socket = lab.path("nbd.sock");
        let mut command = Command::new("qemu-nbd");
        command.args(["-r", "-t", "-e", "16", "-x", "vm", "-f", "qcow2", "-k"]);
        command.arg(&socket);
        for bitmap in bitmaps {
            command.args(["-B", bitmap]);
        }
        command.arg(image);
        Self::start(command, socket)
    }

    pub(super) fn url(&self, export: &str) -> PathBuf {
        format!("nbd+unix:///{export}?socket={}", text(&self.1)).into()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn bitmap(image: &Path, how: &str, name: &str) {
    tool(
        "qemu-img",
        &["bitmap", how, "-f", "qcow2", text(image), name],
    );
}

fn as_qcow2(lab: &Lab) -> PathBuf {
    let image = lab.path("vm.qcow2");
    let convert = ["convert", "-f", "raw", "-O", "qcow2", text(&lab.raw)];
    tool("qemu-img", &[&convert[..], &[text(&image)]].concat());
    image
}

#[test]
fn a_pass_copies_what_a_dirty_bitmap_shows_and_refuses_without_one_or_with_a_late_one() {
    if !have(&TOOLS) || !have(&["qemu-nbd", "qemu-io"]) {
        return;
    }
    let lab = lab();
    write(&lab, &lab.raw, "first.bin", &noise(20 * MIB as usize, 1));
    let (image, out) = (as_qcow2(&lab), lab.path("out"));
    bitmap(&image, "--add", "b0");
    let name = &["--name", "guest"][..];
    let server = Server::of_image(&lab, &image, &["b0"]);
    let url = server.url("vm");
    let pass = last_pass(&run("sync", &url, &out, name, "").expect(0));
    assert!(pass["copied"].as_u64().unwrap() > 20 * MIB, "{pass}");
    drop(server);

    let now = lab.path("now.raw");
    fs::copy(&lab.raw, &now).unwrap();
    write(&lab, &now, "second.bin", &noise(2 * MIB as usize, 2));
    write_differences(&lab, &image, "qcow2", &lab.raw, &now);
    // Without its bitmap nothing tells what changed.
    let server = Server::of_image(&lab, &image, &[]);
    for (verb, more) in [("sync", &[][..]), ("convert", &["--from-sync"])] {
        let refused = run(verb, &url, &out, more, "").expect(3);
        assert!(
            refused.stderr.contains("sync-no-bitmap"),
            "{}",
            refused.stderr
        );
    }
    drop(server);
    let server = Server::of_image(&lab, &image, &["b0"]);
    let pass = last_pass(&run("sync", &url, &out, &[], "").expect(0));
    let copied = pass["copied"].as_u64().unwrap();
    assert!((2 * MIB..8 * MIB).contains(&copied), "{pass}");
    drop(server);

    // One that begins after a change.
    let last = lab.path("last.raw");
    fs::copy(&now, &last).unwrap();
    write(&lab, &last, "first.bin", &noise(20 * MIB as usize, 3));
    write_differences(&lab, &image, "qcow2", &now, &last);
    bitmap(&image, "--add", "late");
    let server = Server::of_image(&lab, &image, &["late"]);
    for (verb, more) in [("sync", &[][..]), ("convert", &["--from-sync"])] {
        let refused = run(verb, &url, &out, more, "").expect(3);
        assert!(
            refused.stderr.contains("sync-bitmap-late"),
            "{}",
            refused.stderr
        );
    }
    drop(server);
    // Of several, each counts.
    let _server = Server::of_image(&lab, &image, &["b0", "late"]);
    let from_sync = &["--from-sync", "--verify-copy", "--name", "guest"][..];
    let report = run("convert", &url, &out, from_sync, "").expect(0).json();
    assert_eq!(report["transport"], "nbd");
    let disk = out.join("guest.qcow2");
    assert!(file_in(&lab, &disk, "first.bin") == noise(20 * MIB as usize, 3));
    assert!(file_in(&lab, &disk, "second.bin") == noise(2 * MIB as usize, 2));
}

/// Where blocks of 64 KiB lie that are all of this file.
fn blocks_of(lab: &Lab, data: &[u8]) -> Vec<u64> {
    let chunks: HashSet<&[u8]> = data.chunks(4096).collect();
    let disk = File::open(&lab.raw).unwrap();
    let mut block = vec![0; 65536];
    let at = (0..lab.spec.disk_size).step_by(65536);
    at.filter(|at| {
        disk.read_exact_at(&mut block, *at).unwrap();
        block.chunks(4096).all(|chunk| chunks.contains(chunk))
    })
    .collect()
}

/// The storage daemon of QEMU has the disk open, one client writes to it all the time, and the bitmap counts
/// on.
#[test]
fn a_disk_is_synced_while_it_is_written() {
    if !have(&TOOLS) || !have(&["qemu-storage-daemon", "qemu-io"]) {
        return;
    }
    let lab = lab();
    let data = noise(24 * MIB as usize, 1);
    write(&lab, &lab.raw, "first.bin", &data);
    let blocks = blocks_of(&lab, &data);
    assert!(blocks.len() > 200, "{}", blocks.len());
    let image = as_qcow2(&lab);
    bitmap(&image, "--add", "b0");
    let socket = lab.path("qsd.sock");
    let mut command = Command::new("qemu-storage-daemon");
    let nbd = format!(
        "addr.type=unix,addr.path={},max-connections=0",
        text(&socket)
    );
    command
        .args([
            "--blockdev",
            &format!("file,node-name=f,filename={}", text(&image)),
        ])
        .args(["--blockdev", "qcow2,node-name=disk,file=f"])
        .args(["--nbd-server", &nbd])
        .args([
            "--export",
            "nbd,id=w,node-name=disk,name=writer,writable=on",
        ])
        .args([
            "--export",
            "nbd,id=s,node-name=disk,name=vm,writable=on,bitmaps.0=b0",
        ]);
    let server = Server::start(command, socket);
    let (url, out) = (server.url("vm"), lab.path("out"));

    let over = Arc::new(AtomicBool::new(false));
    let writer = {
        let (over, url) = (over.clone(), server.url("writer"));
        std::thread::spawn(move || {
            let mut child = Command::new("qemu-io")
                .args(["-f", "raw", text(&url)])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            let mut input = child.stdin.take().unwrap();
            let mut count = 0usize;
            while !over.load(Ordering::SeqCst) {
                let at = blocks[count * 37 % blocks.len()];
                writeln!(input, "write -P {} {at} 64k", 1 + count % 250).unwrap();
                count += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            writeln!(input, "flush").unwrap();
            drop(input);
            assert!(child.wait().unwrap().success());
            count
        })
    };
    for pass in 0..3 {
        let name = &["--name", "guest"][..];
        let copied = last_pass(&run("sync", &url, &out, name, "").expect(0))["copied"].clone();
        let copied = copied.as_u64().unwrap();
        assert!(
            copied > 0 && (pass == 0 || copied < 30 * MIB),
            "{pass}: {copied}"
        );
    }
    over.store(true, Ordering::SeqCst);
    assert!(writer.join().unwrap() > 20);
    let from_sync = &["--from-sync", "--verify-copy", "--name", "guest"][..];
    run("convert", &url, &out, from_sync, "").expect(0);
    drop(server);
    let now = lab.path("now.raw");
    let convert = [
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        text(&image),
        text(&now),
    ];
    tool("qemu-img", &convert);
    let was = lab.ntfscat(&lab.volume(&now), "first.bin");
    assert!(was != data);
    assert!(file_in(&lab, &out.join("guest.qcow2"), "first.bin") == was);
}
