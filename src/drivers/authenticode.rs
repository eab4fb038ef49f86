//! The hashes under which a driver catalogue lists a file.
//!
//! A PE image is hashed without the parts that signing changes. They are its checksum, the
//! directory entry of the certificates, and the certificates. Every other file is hashed unchanged.
//! Specification: Microsoft, "Windows Authenticode Portable Executable Signature Format",
//! "Calculating the PE image hash".

use sha2::{Digest, Sha256};

use crate::bytes::{le16, le32};
/// Every hash a catalogue may list for a file: SHA-1 and SHA-256, as an image and as plain bytes.
pub fn hashes(file: &[u8]) -> Vec<Vec<u8>> {
    let mut all = both(&[file]);
    if let Some(parts) = signed_parts(file) {
        all.extend(both(&parts));
        // The signing tools pad the image to 8 bytes first.
        let pad = file.len().next_multiple_of(8) - file.len();
        if pad > 0 {
            let mut padded = parts;
            padded.push(&[0; 8][..pad]);
            all.extend(both(&padded));
        }
    }
    all
}

/// The SHA-256 by which a current catalogue lists the file.
pub fn member_hash(file: &[u8]) -> Vec<u8> {
    let parts = signed_parts(file).unwrap_or_else(|| vec![file]);
    both(&parts).pop().unwrap_or_default()
}

fn both(parts: &[&[u8]]) -> Vec<Vec<u8>> {
    let mut sha1 = sha1_smol::Sha1::new();
    let mut sha256 = Sha256::new();
    for part in parts {
        sha1.update(part);
        sha256.update(part);
    }
    vec![sha1.digest().bytes().to_vec(), sha256.finalize().to_vec()]
}

/// The parts of a PE image that its hash covers; `None` for a file that is not an image.
fn signed_parts(file: &[u8]) -> Option<Vec<&[u8]>> {
    let u16_at = |at: usize| le16(file, at);
    let u32_at = |at: usize| le32(file, at).map(|n| n as usize);
    if !file.starts_with(b"MZ") {
        return None;
    }
    let pe = u32_at(0x3c)?;
    if file.get(pe..pe.checked_add(4)?)? != b"PE\0\0" {
        return None;
    }
    let optional = pe + 24;
    let directories = match u16_at(optional)? {
        0x10b => optional + 96,
        0x20b => optional + 112,
        _ => return None,
    };
    let checksum = optional + 64;
    // Number 4 of the data directories; their count precedes them.
    let (certificates, mut end) = match u32_at(directories - 4)? {
        5.. => {
            let entry = directories + 4 * 8;
            let (at, size) = (u32_at(entry)?, u32_at(entry + 4)?);
            let end = match size {
                0 => file.len(),
                _ => at
                    .checked_add(size)
                    .filter(|end| *end <= file.len())
                    .map(|_| at)?,
            };
            (Some(entry), end)
        }
        _ => (None, file.len()),
    };
    let mut parts = vec![file.get(..checksum)?];
    let mut from = checksum + 4;
    if let Some(entry) = certificates {
        parts.push(file.get(from..entry)?);
        from = entry + 8;
    }
    // In every linked image, headers, sections and the data behind them are contiguous.
    end = end.max(from).min(file.len());
    parts.push(file.get(from..end)?);
    if let Some(entry) = certificates {
        let (at, size) = (u32_at(entry)?, u32_at(entry + 4)?);
        if size > 0 {
            parts.push(file.get(at + size..)?);
        }
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::{Arch, pe};

    fn image(arch: Arch) -> Vec<u8> {
        pe::image(arch, pe::Subsystem::Native)
    }

    #[test]
    fn what_signing_changes_does_not_count() {
        for arch in [Arch::X86, Arch::Amd64] {
            let bare = image(arch);
            let before = hashes(&bare)[3].clone();
            let directory = 0x80 + 24 + if arch == Arch::X86 { 96 } else { 112 } + 32;
            let mut signed = bare.clone();
            signed[directory..directory + 4].copy_from_slice(&(bare.len() as u32).to_le_bytes());
            signed[directory + 4] = 16;
            signed[0x80 + 24 + 64] ^= 0xff;
            signed.extend([7; 16]);
            assert_eq!(hashes(&signed)[3], before, "{arch:?}");
            for at in [0x84, directory - 1, directory + 8, 600] {
                let mut changed = bare.clone();
                changed[at] ^= 1;
                assert_ne!(hashes(&changed)[3], before, "{arch:?} {at:#x}");
            }
        }
    }

    /// The signing tools pad an image to 8 bytes, and hash the zeros too.
    #[test]
    fn an_image_is_listed_as_it_is_and_padded() {
        let mut odd = image(Arch::Amd64);
        assert_eq!(hashes(&odd).len(), 4, "a multiple of 8 has no padding");
        odd.extend([1, 2, 3]);
        let mut padded = odd.clone();
        padded.extend([0; 5]);
        let found = hashes(&odd);
        assert_eq!(found.len(), 6);
        assert_eq!(found[4..], hashes(&padded)[2..4]);
        assert_eq!(found[3], member_hash(&odd));
        // Other files have the hashes of their bytes only.
        let text = hashes(b"[Version]");
        assert_eq!(text.len(), 2);
        assert_eq!(text[1], member_hash(b"[Version]"));
    }

    /// Behind the certificates may be more, which counts; a table that lies wrongly is of no image.
    #[test]
    fn the_data_around_the_certificates_counts() {
        let bare = image(Arch::Amd64);
        let directory = 0x80 + 24 + 112 + 32;
        let with = |at: u32, size: u32, more: &[u8]| {
            let mut signed = bare.clone();
            signed[directory..directory + 4].copy_from_slice(&at.to_le_bytes());
            signed[directory + 4..directory + 8].copy_from_slice(&size.to_le_bytes());
            signed.extend([7; 16]);
            signed.extend(more);
            signed
        };
        let end = bare.len() as u32;
        let mut longer = bare.clone();
        longer.extend([9; 8]);
        let wanted = hashes(&longer)[3].clone();
        assert_eq!(hashes(&with(end, 16, &[9; 8]))[3], wanted);
        assert_ne!(hashes(&with(end, 16, &[8; 8]))[3], wanted);
        for (at, size, image) in [
            (end, 16, true),
            (end, 17, false),
            (u32::MAX, 2, false),
            (0, 16, true),
        ] {
            let found = hashes(&with(at, size, &[]));
            assert_eq!(found.len(), if image { 4 } else { 2 }, "{at} {size}");
        }
    }

    /// The digest that `osslsigncode` calculates for the same image.
    #[test]
    fn as_osslsigncode_has_it() {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02X}")).collect::<String>();
        let all = hashes(&image(Arch::Amd64));
        assert_eq!(hex(&all[2]), "DB9987DF09085F2A6A80764B077E9144B238D8C7");
        assert_eq!(
            hex(&all[3]),
            "1DCFEB35F37E22DEE239DFF4E3DD0E024F1A5EB3F77254BD54A87E36C1F90242"
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(
            at in 0usize..600,
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..40),
        ) {
            let mut file = image(Arch::Amd64);
            file.splice(at..at + bytes.len(), bytes);
            hashes(&file);
            hashes(&file[..at]);
        }
    }
}
