//! Images for the tests of this folder.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

/// False, with a visible note, when a tool the test needs is not there.
pub fn have(tools: &[&str]) -> bool {
    for tool in tools {
        if crate::tool::find(tool).is_none() {
            assert!(
                std::env::var_os("HYPER2KVM_REQUIRE_TOOLS").is_none(),
                "{tool} is not installed"
            );
            eprintln!("SKIP: {tool} is not installed");
            return false;
        }
    }
    true
}

/// Runs a program that must succeed.
pub fn run(program: &str, args: &[&str]) {
    run_input(program, args, b"");
}

#[expect(
    clippy::disallowed_methods,
    reason = "a judge independent of the wrapper"
)]
pub fn run_input(program: &str, args: &[&str], input: &[u8]) {
    let path = crate::tool::find(program).unwrap();
    let mut child = Command::new(path)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input).unwrap();
    assert!(child.wait().unwrap().success(), "{program} {args:?}");
}

/// Bytes with a pattern: different in every sector, with holes.
pub fn pattern(size: usize) -> Vec<u8> {
    let mut data = vec![0; size];
    for (i, sector) in data.chunks_mut(512).enumerate() {
        if i / 64 % 3 != 1 {
            let seed = (i as u32).wrapping_mul(2_654_435_761);
            for (j, word) in sector.chunks_mut(4).enumerate() {
                let bytes = (seed ^ (j as u32)).to_le_bytes();
                word.copy_from_slice(&bytes[..word.len()]);
            }
        }
    }
    data
}

pub fn write(folder: &Path, name: &str, data: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, data).unwrap();
    path
}

pub fn sha256(path: &Path) -> Vec<u8> {
    Sha256::digest(std::fs::read(path).unwrap()).to_vec()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
