//! Continued copies: the cost of the journal, a resumed copy, and the last pass of a sync.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyper2kvm::disk::Image;
use hyper2kvm::disk::copy::{self, CopyOptions};
use serde_json::{Value, json};

use super::{Disk, Lab, MIB, STEP, build, durable, median, run, step};

/// The copy loop with its journal and without, `qemu-img convert` and nbdcopy, in turns.
pub fn journal(lab: &Lab, mib: u64) -> Result<Value> {
    let disk = lab.dir.join("journal.raw");
    build(Disk::Full, mib, &disk)?;
    let target = lab.dir.join("target.qcow2");
    let record = lab.dir.join("target.journal");
    let ours = |how: CopyOptions| -> Result<f64> {
        let _ = fs::remove_file(&target);
        let source = Image::open_info(&disk, Some("raw"), &[])?;
        let start = Instant::now();
        copy::copy(&source, &target, &how, &mut |_| {})?;
        Ok(start.elapsed().as_secs_f64())
    };
    let (mut with, mut without, mut shares) = (Vec::new(), Vec::new(), Vec::new());
    let (mut plain, mut nbd) = (Vec::new(), Vec::new());
    // Pairs are cheap, and differ by little.
    for round in 0..lab.rounds * 2 {
        let _ = fs::remove_file(&record);
        let recorded = || CopyOptions::default().recorded(record.clone());
        // The order alternates: the second finds the host as the first left it.
        let (a, b) = match round % 2 {
            0 => (ours(recorded())?, ours(CopyOptions::default())?),
            _ => {
                let b = ours(CopyOptions::default())?;
                (ours(recorded())?, b)
            }
        };
        shares.push(a / b);
        with.push(a);
        without.push(b);
        if round % 2 == 1 {
            continue;
        }
        fs::remove_file(&target)?;
        plain.push(lab.qemu_img(&["-W", "-m", "8"], &disk, &target)?);
        fs::remove_file(&target)?;
        nbd.push(nbdcopy(&disk, &target)?);
    }
    fs::remove_file(&target)?;
    fs::remove_file(&disk)?;
    let all: Vec<String> = shares.iter().map(|share| format!("{share:.3}")).collect();
    println!("  with / without: {}", all.join(" "));
    let (with, without, share) = (median(with), median(without), median(shares));
    let (plain, nbd) = (median(plain), median(nbd));
    println!("journal: {mib} MiB of live data");
    println!("  the loop, with its journal   {with:7.2} s");
    println!(
        "  without                      {without:7.2} s: the journal costs {:.1} % (median of the pairs)",
        (share - 1.0) * 100.0
    );
    println!("  qemu-img convert -W -m 8     {plain:7.2} s");
    println!("  nbdcopy --flush              {nbd:7.2} s\n");
    Ok(json!({
        "with_s": with, "without_s": without, "share": share, "qemu_img_s": plain, "nbdcopy_s": nbd,
    }))
}

/// A whole copy by nbdcopy, called for a raw disk and a qcow2.
fn nbdcopy(from: &Path, to: &Path) -> Result<f64> {
    let start = Instant::now();
    let size = fs::metadata(from)?.len().to_string();
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(to)
        .arg(size))?;
    run(Command::new("nbdcopy")
        .args(["--flush", "--"])
        .arg(from)
        .args(["[", "qemu-nbd", "-f", "qcow2"])
        .arg(to)
        .arg("]"))?;
    durable(to)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Recorded in the journal of the first disk.
fn recorded(partial: &Path) -> u64 {
    let text = fs::read_to_string(partial.join(".work/copy-0.journal")).unwrap_or_default();
    let batches = text.lines().skip(1).filter_map(|line| {
        let pairs: Vec<[u64; 2]> = serde_json::from_str(line.get(9..)?).ok()?;
        Some(pairs.iter().map(|pair| pair[1]).sum::<u64>())
    });
    batches.sum()
}

/// A conversion, and one that is killed with half of it copied and resumed.
pub fn resumed(lab: &Lab, mib: u64) -> Result<Value> {
    let disk = lab.dir.join("resumed.raw");
    build(Disk::Full, mib, &disk)?;
    let out = lab.dir.join("out");
    let partial = lab.dir.join(".out.partial");
    let (mut cold, mut rest, mut left) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..lab.rounds {
        cold.push(lab.convert(&disk, &lab.fresh("out")?, &[])?.seconds);
        fs::remove_dir_all(&out)?;
        let mut child = lab
            .command()?
            .args(lab.conversion(&disk, &out))
            .arg("--quiet")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        while recorded(&partial) < mib * MIB / 2 {
            ensure!(child.try_wait()?.is_none(), "it ended before it was killed");
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill()?;
        child.wait()?;
        let mut again = lab.conversion(&disk, &out);
        again.push("--resume".into());
        let again: Vec<_> = again.iter().map(AsRef::as_ref).collect();
        let run = lab.h2k(&again)?;
        let bytes = |name: &str| run.json["bytes"][name].as_f64().unwrap_or(0.0);
        left.push(1.0 - bytes("resumed") / bytes("read"));
        rest.push(run.seconds);
    }
    fs::remove_file(&disk)?;
    let (cold, rest, left) = (median(cold), median(rest), median(left));
    println!("resumed: {mib} MiB of live data");
    println!("  convert                      {cold:7.2} s");
    println!(
        "  convert --resume             {rest:7.2} s, with {:.0} % to copy\n",
        left * 100.0
    );
    Ok(json!({"cold_s": cold, "resumed_s": rest, "left": left}))
}

/// Where so many steps of the large file of a [`Disk::Full`] lie in one piece on the disk.
fn places(disk: &Path, mib: u64, steps: u64) -> Result<Vec<u64>> {
    const CLUSTER: usize = 4096;
    let wanted = (0..mib / STEP).skip((mib / STEP / 2) as usize);
    let data: Vec<Vec<u8>> = wanted
        .take(steps as usize)
        .map(|i| step(i * STEP, STEP))
        .collect();
    let file = fs::File::open(disk)?;
    let size = file.metadata()?.len();
    let (mut found, mut chunk) = (Vec::new(), vec![0; MIB as usize]);
    let mut whole = vec![0; (STEP * MIB) as usize];
    for at in (0..size - size % MIB).step_by(MIB as usize) {
        file.read_exact_at(&mut chunk, at)?;
        for (i, cluster) in chunk.chunks(CLUSTER).enumerate() {
            let at = at + (i * CLUSTER) as u64;
            let Some(step) = data.iter().find(|step| step.starts_with(&cluster[..64])) else {
                continue;
            };
            if at + STEP * MIB <= size {
                file.read_exact_at(&mut whole, at)?;
                found.extend((whole == *step).then_some(at));
            }
        }
    }
    ensure!(!found.is_empty(), "no part of the file lies in one piece");
    Ok(found)
}

/// A sync of a VM, and the last pass once a tenth of it has changed.
pub fn last_pass(lab: &Lab, mib: u64) -> Result<Value> {
    let disk = lab.dir.join("last.raw");
    build(Disk::Full, mib, &disk)?;
    // A tenth of the file that fills the disk.
    let live = places(&disk, mib, (mib / 10).div_ceil(STEP))?;
    let (top, out) = (lab.dir.join("last.qcow2"), lab.dir.join("out"));
    let target = lab.dir.join("target.qcow2");
    let (mut first, mut last, mut projected) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cold, mut plain, mut nbd) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..lab.rounds {
        let _ = fs::remove_file(&top);
        run(Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .arg(&disk)
            .arg(&top))?;
        let folder = lab.fresh("out")?;
        let sync = lab.h2k(&[
            "sync".as_ref(),
            top.as_ref(),
            "-o".as_ref(),
            folder.as_ref(),
        ])?;
        first.push(sync.seconds);
        let mut write = Command::new("qemu-io");
        write.args(["-f", "qcow2"]);
        for at in &live {
            write.args(["-c", &format!("write -q -P 7 {at} {}", STEP * MIB)]);
        }
        run(write.arg(&top))?;
        let mut args = lab.conversion(&top, &out);
        args.push("--from-sync".into());
        let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
        let end = lab.h2k(&args)?;
        let told = end.json["sync"]["last"]["projected_s"].as_f64();
        let met = end.json["sync"]["last"]["seconds"].as_f64();
        projected.push(told.context("no projection")? / met.context("no last pass")?);
        last.push(end.seconds);
        cold.push(lab.convert(&top, &lab.fresh("out")?, &[])?.seconds);
        let _ = fs::remove_file(&target);
        plain.push(lab.qemu_img(&["-W", "-m", "8"], &disk, &target)?);
        fs::remove_file(&target)?;
        nbd.push(nbdcopy(&disk, &target)?);
    }
    for file in [&disk, &top, &target] {
        fs::remove_file(file)?;
    }
    let (first, last, projected) = (median(first), median(last), median(projected));
    let (cold, plain, nbd) = (median(cold), median(plain), median(nbd));
    println!("last pass: {mib} MiB of live data, a tenth of it changed");
    println!("  sync, the first pass         {first:7.2} s, while the VM runs");
    println!("  convert --from-sync          {last:7.2} s; expected: {projected:.2} times that");
    println!(
        "  convert, all of it           {cold:7.2} s: {:.1} times the last pass",
        cold / last
    );
    println!("  qemu-img convert, all of it  {plain:7.2} s");
    println!("  nbdcopy, all of it           {nbd:7.2} s\n");
    Ok(json!({
        "first_s": first, "last_s": last, "projected": projected,
        "cold_s": cold, "qemu_img_s": plain, "nbdcopy_s": nbd,
    }))
}
