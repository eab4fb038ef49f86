//! Sparse links of ESXi's snapshots, which no free program writes. QEMU reads them; the tests have it confirm each.

#![allow(dead_code)] // not every test makes both

use std::path::Path;

/// A COWD link over a disk of so many sectors: one sector for each grain.
pub fn cowd(path: &Path, sectors: u32, grains: &[(u32, [u8; 512])]) {
    let mut file = vec![0; 40 * 512];
    let put = |file: &mut Vec<u8>, at: usize, value: u32| {
        file[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    file[..4].copy_from_slice(b"COWD");
    // Version 1, one sector a grain, the directory in sector 4 with an entry for each 4096 sectors.
    let tables = sectors.div_ceil(4096);
    for (at, value) in [
        (4, 1),
        (8, 3),
        (12, sectors),
        (16, 1),
        (20, 4),
        (24, tables),
    ] {
        put(&mut file, at, value);
    }
    for (sector, data) in grains {
        let entry = 4 * 512 + 4 * (sector / 4096) as usize;
        if file[entry..entry + 4] == [0; 4] {
            let table = (file.len() / 512) as u32;
            file.resize(file.len() + 4096 * 4, 0);
            put(&mut file, entry, table);
        }
        let table = u32::from_le_bytes(file[entry..entry + 4].try_into().unwrap());
        let place = (file.len() / 512) as u32;
        put(
            &mut file,
            table as usize * 512 + 4 * (sector % 4096) as usize,
            place,
        );
        file.extend_from_slice(data);
    }
    std::fs::write(path, file).unwrap();
}

/// A seSparse link over a disk of so many sectors: grains of 4 KiB, `None` for one of zeroes.
pub fn se_sparse(path: &Path, sectors: u64, grains: &[(u64, Option<[u8; 4096]>)]) {
    const DIRECTORY: u64 = 16;
    const TABLES: u64 = 32;
    const GRAINS: u64 = 1024;
    const PER_TABLE: u64 = 64 * 512 / 8;
    let mut file = vec![0; GRAINS as usize * 512];
    let put = |file: &mut Vec<u8>, at: usize, value: u64| {
        file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    let fields = [
        (0, 0xcafe_babe),
        (1, 0x2_0000_0001),
        (2, sectors),
        (3, 8),
        (4, 64),
        // The volatile header, and the journal.
        (10, 1),
        (11, 1),
        (12, 2),
        (13, 2),
        (14, 4),
        (15, 4),
        (16, DIRECTORY),
        (17, 8),
        (18, TABLES),
        (19, GRAINS - TABLES),
        (24, GRAINS),
        (25, 1 << 20),
    ];
    for (n, value) in fields {
        put(&mut file, 8 * n, value);
    }
    put(&mut file, 512, 0xcafe_cafe);
    let mut used = 0;
    for (grain, data) in grains {
        let (table, entry) = (grain / PER_TABLE, grain % PER_TABLE);
        assert!(table < (GRAINS - TABLES) / 64, "the tables are full");
        let at = (DIRECTORY * 512 + 8 * table) as usize;
        put(&mut file, at, 0x1000_0000_0000_0000 | table);
        let value = match data {
            None => 2 << 60,
            Some(data) => {
                file.extend_from_slice(data);
                used += 1;
                let number = used - 1u64;
                3 << 60 | (number & 0xfff) << 48 | number >> 12
            }
        };
        put(
            &mut file,
            ((TABLES + 64 * table) * 512 + 8 * entry) as usize,
            value,
        );
    }
    std::fs::write(path, file).unwrap();
}
