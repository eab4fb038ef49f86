//! Lists of VMs on other hosts, and their progress.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::proofs::{dirty, same_files};
use super::{assert_few, live_bytes, ready, run};
use crate::support::wire::{Nginx, Sshd};
use crate::support::{h2k, text, virtio_win};

const MIB: u64 = 1 << 20;

/// One VM over ssh and one over https at once: both results are the local one's, and one bandwidth holds for both.
#[test]
fn a_list_over_ssh_and_https_shares_a_bandwidth() {
    if !ready(&[&Sshd::TOOLS[..], &Nginx::TOOLS].concat()) {
        return;
    }
    let lab = dirty(24, 8);
    let local = lab.path("local");
    run(
        "convert",
        text(&lab.raw),
        &[],
        &["-o", text(&local), "--name", "vm"],
    )
    .expect(0);
    let (sshd, nginx) = (Sshd::start(), Nginx::start(lab.dir.path()));
    let (ssh, tls) = (sshd.options(), nginx.options());
    let machines = format!(
        "defaults: {{virtio-iso: '{}'}}\nmachines:\n\
         - {{source: '{}', name: a, ssh-identity: '{}', ssh-known-hosts: '{}'}}\n\
         - {{source: '{}', name: b, tls-ca: '{}'}}\n",
        virtio_win().display(),
        sshd.url(&lab.raw),
        ssh[1],
        ssh[3],
        nginx.url("guest.raw"),
        tls[1]
    );
    let list = lab.path("list.yaml");
    fs::write(&list, machines).unwrap();
    let out = lab.path("fleet");
    let start = Instant::now();
    let args = [
        "convert",
        "--batch",
        text(&list),
        "--jobs",
        "2",
        "-o",
        text(&out),
    ];
    h2k([&args[..], &["--bandwidth", "16", "--json"]].concat()).expect(0);
    let took = start.elapsed();
    let mut copied = 0;
    for (name, transport) in [("a", "ssh"), ("b", "https")] {
        let folder = out.join(format!("{name}-kvm"));
        let report = fs::read(folder.join("report.json")).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        assert_eq!(report["transport"], transport);
        assert_few(
            report["bytes"]["fetched"].as_u64().unwrap(),
            live_bytes(&report),
        );
        copied += live_bytes(&report);
        let disk = folder.join(format!("{name}.qcow2"));
        same_files(&disk, &local.join("vm.qcow2"), lab.dir.path());
    }
    let least = Duration::from_secs_f64(copied as f64 / (16 * MIB) as f64 - 0.3);
    assert!(took > least, "{took:?} for {copied} bytes");
}

#[test]
fn progress_tells_what_was_fetched_and_skipped_how_fast_and_how_long() {
    if !ready(&Sshd::TOOLS) {
        return;
    }
    let lab = dirty(24, 8);
    let sshd = Sshd::start();
    let out = lab.path("out");
    let more = ["-o", text(&out), "--bandwidth", "24", "--progress", "json"];
    let done = run("convert", &sshd.url(&lab.raw), &sshd.options(), &more).expect(0);
    let lines = done
        .stderr
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    let copying: Vec<Value> = lines
        .filter(|line: &Value| line["step"] == "Copying" && line["done_bytes"].is_u64())
        .collect();
    let number = |line: &Value, name: &str| line[name].as_u64().unwrap();
    assert!(copying.len() > 2, "{}", done.stderr);
    for pair in copying.windows(2) {
        assert!(number(&pair[0], "fetched_bytes") <= number(&pair[1], "fetched_bytes"));
    }
    let (report, last) = (done.json(), copying.last().unwrap());
    // What was read before the copy counts too.
    assert!(number(last, "fetched_bytes") >= number(last, "done_bytes"));
    assert!(number(last, "fetched_bytes") <= report["bytes"]["fetched"].as_u64().unwrap());
    // The page file alone is 32 MiB.
    assert!(number(last, "skipped_bytes") > 32 * MIB, "{last}");
    let middle = &copying[copying.len() / 2];
    let rate = number(middle, "bytes_per_second");
    assert!((MIB..48 * MIB).contains(&rate), "{middle}");
    let left = number(middle, "total_bytes") - number(middle, "done_bytes");
    assert_eq!(
        number(middle, "seconds_left"),
        left / rate.max(1),
        "{middle}"
    );
}
