//! Writes `images/` and the seed corpora: from files made by our own code and by the tools that make
//! such files (mkntfs, mkfs.fat, mke2fs, debugfs, genisoimage, tar, wimcapture, gzip, zstd, xz, lz4).
//!
//!   seeds [PART...]     hives, files, volumes, fve, linux, helpers; all of them when none is named
//!
//! New images make what was kept for the targets that patch them worthless.

mod files;
mod helpers;
mod hives;
mod linux;
mod volumes;

use std::fs;
use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

pub struct Seeds {
    root: PathBuf,
}

impl Seeds {
    pub fn write(&self, target: &str, name: &str, bytes: &[u8]) -> Result<()> {
        let folder = self.root.join("corpus").join(target);
        fs::create_dir_all(&folder)?;
        Ok(fs::write(folder.join(format!("seed-{name}")), bytes)?)
    }

    /// An image that targets patch, packed.
    pub fn image(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let folder = self.root.join("images");
        fs::create_dir_all(&folder)?;
        let file = fs::File::create(folder.join(name))?;
        let mut gz = flate2::write::GzEncoder::new(file, flate2::Compression::best());
        std::io::Write::write_all(&mut gz, bytes)?;
        gz.finish()?;
        Ok(())
    }
}

fn main() -> Result<()> {
    let seeds = Seeds {
        root: Path::new(env!("CARGO_MANIFEST_DIR")).to_owned(),
    };
    type Write = fn(&Seeds) -> Result<()>;
    let parts: [(&str, Write); 6] = [
        ("hives", hives::write),
        ("files", files::write),
        ("volumes", volumes::write),
        ("fve", volumes::fve),
        ("linux", linux::write),
        ("helpers", helpers::write),
    ];
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    for (name, write) in parts {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            write(&seeds)?;
        }
    }
    Ok(())
}
