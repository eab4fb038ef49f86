//! Clusters in which all bytes are the same, as compressed data of a few bytes.
//!
//! The log of an NTFS volume (`$LogFile`) is filled with FF by formatting, and again when it is
//! emptied. It has up to 64 MiB.

use std::io;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::empty::CLUSTER;

const CLUSTER_LEN: usize = CLUSTER as usize;

/// The byte of which a whole cluster consists.
pub(super) fn byte_of(cluster: &[u8]) -> Option<u8> {
    let (first, rest) = cluster.split_first()?;
    let is_whole = cluster.len() == CLUSTER_LEN;
    // Each byte is compared with the one before it.
    (is_whole && rest.first() == Some(first) && *rest == cluster[..rest.len()]).then_some(*first)
}

/// A cluster of that byte, compressed as in a qcow2 without a type of compression: deflate without
/// a header.
pub(super) fn compressed(byte: u8) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(CLUSTER_LEN);
    let mut deflate = Compress::new(Compression::best(), false);
    let status = deflate.compress_vec(&[byte; CLUSTER_LEN], &mut bytes, FlushCompress::Finish);
    match status {
        Ok(Status::StreamEnd) => Ok(bytes),
        _ => Err(io::Error::other("a cluster of one byte was not compressed")),
    }
}

/// What compressed data contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// A cluster of that byte.
    Filled(u8),
    /// A cluster of other data.
    Other,
    /// Nothing that was compressed: the data was not written.
    Lost,
}

impl Content {
    pub(super) fn of(bytes: &[u8]) -> Self {
        let mut cluster = Vec::with_capacity(CLUSTER_LEN);
        let mut inflate = Decompress::new(false);
        let status = inflate.decompress_vec(bytes, &mut cluster, FlushDecompress::Finish);
        match (status, byte_of(&cluster)) {
            (Ok(Status::StreamEnd), Some(byte)) => Self::Filled(byte),
            (Ok(Status::StreamEnd), None) if cluster.len() == CLUSTER_LEN => Self::Other,
            _ => Self::Lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_of_one_byte_is_compressed_and_read_back() {
        for byte in [0, 1, 0xaa, 0xff] {
            let packed = compressed(byte).unwrap();
            assert!(packed.len() < 200, "{}", packed.len());
            assert_eq!(Content::of(&packed), Content::Filled(byte));
            // An entry tells the end of the data in sectors.
            let sectors = [&packed[..], &[7; 400]].concat();
            assert_eq!(Content::of(&sectors), Content::Filled(byte));
            assert_eq!(Content::of(&packed[..packed.len() - 1]), Content::Lost);
        }
        assert_eq!(Content::of(&[0; 512]), Content::Lost);
        assert_eq!(Content::of(&[]), Content::Lost);
    }

    #[test]
    fn other_data_is_not_of_one_byte() {
        let mut cluster = vec![0xff; CLUSTER_LEN];
        assert_eq!(byte_of(&cluster), Some(0xff));
        assert_eq!(byte_of(&cluster[1..]), None);
        assert_eq!(byte_of(&[]), None);
        for at in [0, 1, 30_000, CLUSTER_LEN - 1] {
            cluster[at] = 0xfe;
            assert_eq!(byte_of(&cluster), None, "{at}");
            let mut bytes = Vec::with_capacity(CLUSTER_LEN);
            let mut deflate = Compress::new(Compression::best(), false);
            let end = deflate.compress_vec(&cluster, &mut bytes, FlushCompress::Finish);
            assert_eq!(end.unwrap(), Status::StreamEnd);
            assert_eq!(Content::of(&bytes), Content::Other, "{at}");
            cluster[at] = 0xff;
        }
    }
}
