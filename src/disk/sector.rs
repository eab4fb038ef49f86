//! The start of a disk or a partition: reading and recognising it.

use std::io;

use super::bpb::FatBoot;
use crate::block::BlockRead;

/// Reads up to `len` bytes, fewer at the end of the disk.
pub(super) fn read_up_to(disk: &dyn BlockRead, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let len = (len as u64).min(disk.size().saturating_sub(offset));
    let mut buf = vec![0; len as usize];
    // Behind the end, not even an empty read is allowed.
    if !buf.is_empty() {
        disk.read_at(offset, &mut buf)?;
    }
    Ok(buf)
}

/// Whether this is the boot sector of a Windows file system, or of BitLocker.
pub fn is_boot_sector(sector: &[u8]) -> bool {
    let at =
        |offset: usize, magic: &[u8]| sector.get(offset..).is_some_and(|s| s.starts_with(magic));
    if [&b"NTFS    "[..], b"EXFAT   ", b"-FVE-FS-", b"ReFS\0\0\0\0"]
        .iter()
        .any(|magic| at(3, magic))
    {
        return true;
    }
    let sane_bpb = FatBoot::padded(sector).is_some_and(|boot| {
        matches!(boot.bytes_per_sector, 512 | 1024 | 2048 | 4096)
            && boot.sectors_per_cluster.is_power_of_two()
    });
    (at(0, b"\xeb") || at(0, b"\xe9"))
        && sane_bpb
        && (at(54, b"FAT12   ") || at(54, b"FAT16   ") || at(82, b"FAT32   "))
}
