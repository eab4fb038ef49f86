//! A file system of Linux in memory: ext2 in one block group, with what a reader of files needs.
//!
//! Specification: `Documentation/filesystems/ext4` of the kernel.

use std::collections::BTreeMap;

const BLOCK: usize = 4096;
const INODE: usize = 128;
const INODES: usize = 512;
/// The first block of the inodes; before it lie the superblock and the table of groups.
const TABLE: usize = 2;
const ROOT: u32 = 2;
/// Inodes before this one are reserved.
const FIRST: u32 = 11;
/// Blocks that an inode names itself; a file here has no more.
const MOST: usize = 12;
const FOLDER: u16 = 0o40755;
const FILE: u16 = 0o100_644;

/// The UUID of the volume.
pub const UUID: uuid::Uuid = uuid::uuid!("6f1d6c0e-2f0a-4b0b-9a6e-6a5f1b1f7e21");

enum Node {
    Folder(BTreeMap<String, Node>),
    File(Vec<u8>),
}

/// The start of a volume with these files; the rest of its partition is free.
pub fn volume(files: &[(&str, &str)]) -> Vec<u8> {
    let mut root = BTreeMap::new();
    for (path, contents) in files {
        let mut folder = &mut root;
        let (parents, name) = path.trim_start_matches('/').rsplit_once('/').unwrap();
        for parent in parents.split('/') {
            let node = folder
                .entry(parent.to_owned())
                .or_insert_with(|| Node::Folder(BTreeMap::new()));
            let Node::Folder(below) = node else {
                panic!("{parent} is a file");
            };
            folder = below;
        }
        folder.insert(name.to_owned(), Node::File(contents.as_bytes().to_vec()));
    }
    let mut volume = Volume {
        bytes: vec![0; TABLE * BLOCK + INODES * INODE],
        next: FIRST,
    };
    volume.folder(ROOT, ROOT, &root);
    volume.superblock();
    volume.bytes
}

struct Volume {
    bytes: Vec<u8>,
    /// The next free inode.
    next: u32,
}

impl Volume {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn superblock(&mut self) {
        let blocks = (self.bytes.len() / BLOCK) as u32;
        for (at, value) in [
            (0x00, INODES as u32),
            (0x04, blocks),
            // Blocks of 4096 bytes.
            (0x18, 2),
            (0x1c, 2),
            (0x20, 8 * BLOCK as u32),
            (0x24, 8 * BLOCK as u32),
            (0x28, INODES as u32),
            // Cleanly unmounted; the second revision, which has sizes of inodes and features.
            (0x38, 0xef53 | 1 << 16),
            (0x4c, 1),
            (0x54, FIRST),
            (0x58, INODE as u32),
            // Entries of directories have the kind of their file.
            (0x60, 2),
        ] {
            self.put(1024 + at, &value.to_le_bytes());
        }
        self.put(1024 + 0x68, UUID.as_bytes());
        self.put(BLOCK + 8, &(TABLE as u32).to_le_bytes());
    }

    /// Writes an inode and its contents.
    fn inode(&mut self, number: u32, mode: u16, contents: &[u8]) {
        let at = TABLE * BLOCK + (number as usize - 1) * INODE;
        self.put(at, &mode.to_le_bytes());
        self.put(at + 4, &(contents.len() as u32).to_le_bytes());
        self.put(at + 0x1a, &2u16.to_le_bytes());
        let blocks: Vec<_> = contents.chunks(BLOCK).collect();
        assert!(blocks.len() <= MOST);
        for (i, block) in blocks.into_iter().enumerate() {
            let place = (self.bytes.len() / BLOCK) as u32;
            self.bytes.extend(block);
            self.bytes.resize((place as usize + 1) * BLOCK, 0);
            self.put(at + 0x28 + 4 * i, &place.to_le_bytes());
        }
    }

    fn folder(&mut self, number: u32, parent: u32, nodes: &BTreeMap<String, Node>) {
        let mut entries = vec![(number, ".", 2u8), (parent, "..", 2)];
        for (name, node) in nodes {
            let inode = self.next;
            self.next += 1;
            match node {
                Node::Folder(below) => self.folder(inode, number, below),
                Node::File(contents) => self.inode(inode, FILE, contents),
            }
            let kind = if matches!(node, Node::Folder(_)) {
                2
            } else {
                1
            };
            entries.push((inode, name, kind));
        }
        let mut block = Vec::new();
        let last = entries.len() - 1;
        for (i, (inode, name, kind)) in entries.into_iter().enumerate() {
            let len = match i == last {
                true => BLOCK - block.len(),
                false => (8 + name.len()).next_multiple_of(4),
            };
            let end = block.len() + len;
            block.extend(inode.to_le_bytes());
            block.extend((len as u16).to_le_bytes());
            block.extend([name.len() as u8, kind]);
            block.extend(name.as_bytes());
            block.resize(end, 0);
        }
        assert_eq!(block.len(), BLOCK);
        self.inode(number, FOLDER, &block);
    }
}
