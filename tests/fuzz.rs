//! Runs every input with which the fuzz targets began, and those kept from their runs, once through
//! the same code: `fuzz/corpus/TARGET/seed-*` and `fuzz/kept/TARGET.tar.gz`.

#![allow(clippy::print_stderr)] // how many there were
#![allow(unused_attributes)] // the targets are programs of their own too

use std::collections::BTreeSet;
use std::fs;
use std::io::{Cursor, Read};
use std::path::Path;

use hyper2kvm::source::tar::members;

// The targets are written for the fuzzer's crates; here this file is both of them.
extern crate self as hyper2kvm_fuzz;
extern crate self as libfuzzer_sys;

#[path = "../fuzz/src/lib.rs"]
mod shared;

pub use shared::*;

#[path = "../fuzz/fuzz_targets/base_block.rs"]
mod base_block;
#[path = "../fuzz/fuzz_targets/bcd.rs"]
mod bcd;
#[path = "../fuzz/fuzz_targets/catalogue.rs"]
mod catalogue;
#[path = "../fuzz/fuzz_targets/child.rs"]
mod child;
#[path = "../fuzz/fuzz_targets/ext.rs"]
mod ext;
#[path = "../fuzz/fuzz_targets/fat.rs"]
mod fat;
#[path = "../fuzz/fuzz_targets/fve.rs"]
mod fve;
#[path = "../fuzz/fuzz_targets/hives.rs"]
mod hives;
#[path = "../fuzz/fuzz_targets/image_head.rs"]
mod image_head;
#[path = "../fuzz/fuzz_targets/inf.rs"]
mod inf;
#[path = "../fuzz/fuzz_targets/iso.rs"]
mod iso;
#[path = "../fuzz/fuzz_targets/libvirt.rs"]
mod libvirt;
#[path = "../fuzz/fuzz_targets/linux_text.rs"]
mod linux_text;
#[path = "../fuzz/fuzz_targets/log_replay.rs"]
mod log_replay;
#[path = "../fuzz/fuzz_targets/nbd.rs"]
mod nbd;
#[path = "../fuzz/fuzz_targets/ntfs.rs"]
mod ntfs;
#[path = "../fuzz/fuzz_targets/ovf.rs"]
mod ovf;
#[path = "../fuzz/fuzz_targets/partitions.rs"]
mod partitions;
#[path = "../fuzz/fuzz_targets/pe.rs"]
mod pe;
#[path = "../fuzz/fuzz_targets/tar.rs"]
mod tar;
#[path = "../fuzz/fuzz_targets/unpack.rs"]
mod unpack;
#[path = "../fuzz/fuzz_targets/vmx.rs"]
mod vmx;
#[path = "../fuzz/fuzz_targets/volume_head.rs"]
mod volume_head;
#[path = "../fuzz/fuzz_targets/wire.rs"]
mod wire;

/// Replaces the fuzzer's macro by a function.
#[macro_export]
macro_rules! fuzz_target {
    (|$input:ident: &[u8]| $body:block) => {
        pub fn run($input: &[u8]) $body
    };
}

type Target = (&'static str, fn(&[u8]));

const TARGETS: &[Target] = &[
    ("base_block", base_block::run),
    ("bcd", bcd::run),
    ("catalogue", catalogue::run),
    ("child", child::run),
    ("ext", ext::run),
    ("fat", fat::run),
    ("fve", fve::run),
    ("hives", hives::run),
    ("image_head", image_head::run),
    ("inf", inf::run),
    ("iso", iso::run),
    ("libvirt", libvirt::run),
    ("linux_text", linux_text::run),
    ("log_replay", log_replay::run),
    ("nbd", nbd::run),
    ("ntfs", ntfs::run),
    ("ovf", ovf::run),
    ("partitions", partitions::run),
    ("pe", pe::run),
    ("tar", tar::run),
    ("unpack", unpack::run),
    ("vmx", vmx::run),
    ("volume_head", volume_head::run),
    ("wire", wire::run),
];

fn inputs(fuzz: &Path, target: &str) -> Vec<(String, Vec<u8>)> {
    let mut inputs = Vec::new();
    for entry in fs::read_dir(fuzz.join("corpus").join(target)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        // What runs of the fuzzer left there is theirs.
        if name.starts_with("seed-") {
            inputs.push((name.to_owned(), fs::read(&path).unwrap()));
        }
    }
    assert!(!inputs.is_empty(), "{target} has no seeds");
    let kept = fuzz.join("kept").join(format!("{target}.tar.gz"));
    if !kept.exists() {
        return inputs;
    }
    let mut archive = Vec::new();
    flate2::read::GzDecoder::new(fs::File::open(kept).unwrap())
        .read_to_end(&mut archive)
        .unwrap();
    for member in members(Cursor::new(&archive)).unwrap() {
        let at = member.offset as usize;
        let bytes = &archive[at..at + member.size as usize];
        inputs.push((member.name, bytes.to_vec()));
    }
    inputs
}

#[test]
fn what_was_kept_does_no_harm() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    // One that is missing here would not be run.
    let files = fs::read_dir(fuzz.join("fuzz_targets")).unwrap();
    let files: BTreeSet<_> = files
        .map(|f| f.unwrap().path().file_stem().unwrap().to_owned())
        .collect();
    let named: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).into()).collect();
    assert_eq!(files, named);
    for (target, run) in TARGETS {
        let inputs = inputs(&fuzz, target);
        for (name, input) in &inputs {
            let run = std::panic::catch_unwind(|| run(input));
            if run.is_err() {
                drop(std::panic::take_hook());
                panic!("{target}: {name}");
            }
        }
        // One target hides panics that are caught.
        drop(std::panic::take_hook());
        eprintln!("{target}: {} inputs", inputs.len());
    }
}
