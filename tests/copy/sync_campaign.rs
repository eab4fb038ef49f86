//! Many passes with random writes, kills, merged links and data that its file system does not show yet:
//! `.ci/campaign sync`.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::support::{Lab, TOOLS, have};
use super::sync::{file_in, lab, link, run, write};
use super::{MIB, noise};

const FILES: usize = 6;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

/// What the VM has on its disk, and the links it is made of, the newest last.
struct Vm {
    lab: Lab,
    now: PathBuf,
    links: Vec<PathBuf>,
    made: usize,
    files: Vec<Vec<u8>>,
    seed: u64,
}

impl Vm {
    fn new() -> Self {
        let lab = lab();
        let files: Vec<Vec<u8>> = (0..FILES)
            .map(|i| noise(2 * MIB as usize, i as u64))
            .collect();
        for (i, data) in files.iter().enumerate() {
            write(&lab, &lab.raw, &name(i), data);
        }
        let now = lab.path("now.raw");
        fs::copy(&lab.raw, &now).unwrap();
        Self {
            links: vec![lab.raw.clone()],
            seed: 100,
            made: 0,
            lab,
            now,
            files,
        }
    }

    /// Writes files, some new and some over old ones.
    fn write(&mut self, random: &mut Random) {
        for _ in 0..1 + random.below(3) {
            let i = random.below(FILES as u64) as usize;
            self.seed += 1;
            self.files[i] = noise((1 + random.below(3 * MIB)) as usize, self.seed);
            write(&self.lab, &self.now, &name(i), &self.files[i]);
        }
    }

    /// A link over the first `keep` links that reads as `state`.
    fn link(&mut self, keep: usize, state: &Path) {
        let below = self.links[keep - 1].clone();
        let format = if keep == 1 { "raw" } else { "qcow2" };
        self.made += 1;
        let new = link(
            &self.lab,
            &format!("link-{}.qcow2", self.made),
            &below,
            format,
            state,
        );
        for gone in self.links.drain(keep..) {
            fs::remove_file(gone).unwrap();
        }
        self.links.push(new);
    }

    /// A snapshot in which the data of what is written next is there, and what shows it is not.
    fn snapshot_that_is_behind(&mut self, random: &mut Random) {
        let frozen = self.lab.path("frozen.raw");
        fs::copy(&self.now, &frozen).unwrap();
        let i = random.below(FILES as u64) as usize;
        self.seed += 1;
        let data = noise(MIB as usize, self.seed);
        write(&self.lab, &self.now, &name(i), &data);
        let chunks: HashSet<&[u8]> = data.chunks(4096).collect();
        let (old, new) = (
            File::options()
                .read(true)
                .write(true)
                .open(&frozen)
                .unwrap(),
            File::open(&self.now).unwrap(),
        );
        let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
        for at in (0..self.lab.spec.disk_size).step_by(4096) {
            old.read_exact_at(&mut a, at).unwrap();
            new.read_exact_at(&mut b, at).unwrap();
            if a != b && chunks.contains(b.as_slice()) {
                old.write_all_at(&b, at).unwrap();
            }
        }
        self.files[i] = data;
        self.link(self.links.len(), &frozen);
    }

    /// A snapshot; more links are merged the longer the chain is.
    fn snapshot(&mut self, random: &mut Random) {
        let keep = match self.links.len() {
            links if links > 4 || random.below(4) == 0 => 1 + random.below(links as u64) as usize,
            links => links,
        };
        let state = self.now.clone();
        self.link(keep, &state);
    }
}

fn name(i: usize) -> String {
    format!("file-{i}.bin")
}

#[test]
#[ignore = "an hour and more: .ci/campaign sync"]
fn a_campaign_of_passes() {
    if !have(&TOOLS) {
        return;
    }
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().unwrap())
    };
    let passes = number("HYPER2KVM_PASSES", 1000);
    let mut random = Random(number("HYPER2KVM_SEED", 1));
    let (mut vm, mut kills, mut cutovers) = (Vm::new(), 0, 0);
    let out = vm.lab.path("out");
    for pass in 1..=passes {
        vm.write(&mut random);
        match random.below(3) {
            0 => vm.snapshot_that_is_behind(&mut random),
            _ => vm.snapshot(&mut random),
        }
        vm.write(&mut random);
        // What the VM writes from then on is in the newest link.
        let state = vm.now.clone();
        vm.link(vm.links.len(), &state);
        let top = vm.links.last().unwrap().clone();
        let more = &["--name", "guest"][..];
        if random.below(2) == 0 {
            let killed = run("sync", &top, &out, more, "copy-recorded=kill");
            kills += u64::from(killed.code != 0);
        }
        run("sync", &top, &out, more, "").expect(0);
        if pass % 8 != 0 && pass != passes {
            continue;
        }
        let more = &["--from-sync", "--verify-copy", "--name", "guest"][..];
        let points = ["copy-recorded=kill", "copied=kill", "before-rename=kill"];
        if let Some(point) = points.get(random.below(4) as usize) {
            run("convert", &top, &out, more, point).expect(-1);
            kills += 1;
        }
        run("convert", &top, &out, more, "").expect(0);
        for (i, data) in vm.files.iter().enumerate() {
            let found = file_in(&vm.lab, &out.join("guest.qcow2"), &name(i));
            assert!(found == *data, "pass {pass}: {} is another", name(i));
        }
        fs::remove_dir_all(&out).unwrap();
        cutovers += 1;
    }
    println!("{passes} passes, {cutovers} last passes, {kills} killed, 0 lost");
}
