//! Programs in place of Windows' boot loader, and guests with them.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use hyper2kvm::boot::MARKER;
use hyper2kvm::demo::{Firmware, GuestSpec, Role, WinVersion};

use crate::support::{Lab, Split, create_overlay, tool};

#[derive(Clone, Copy)]
pub enum End {
    PowerOff,
    Hang,
    Reset,
    Panic,
    /// Reads this sector in a loop.
    Read(u32),
    /// Writes to sectors of the first track, reads them back and compares, in a loop. It prints a
    /// `.` on COM1 for each 256 of them, and a `B` for a wrong one.
    Work,
}

/// Sector, head and disk for the number in AL, from sector 11 on; the first partition is far behind them.
const PLACE: [u8; 17] = [
    0x88, 0xc1, // mov cl, al
    0x80, 0xe1, 0x1f, // and cl, 1fh
    0x80, 0xc1, 0x0b, // add cl, 11
    0xb5, 0x00, // mov ch, 0
    0x88, 0xc6, // mov dh, al
    0xc0, 0xee, 0x05, // shr dh, 5
    0xb2, 0x80, // mov dl, 80h
];

/// Reads one sector of the disk it was loaded from, and continues.
pub fn read_sector(number: u32) -> Vec<u8> {
    let mut code = vec![
        0x66, 0x6a, 0x00, // push dword 0: the upper half of the number
        0x66, 0x68, // push dword: the lower one
    ];
    code.extend(number.to_le_bytes());
    code.extend([
        0x6a, 0x00, // push 0: segment
        0x68, 0x00, 0x7e, // push 7e00h: offset
        0x6a, 0x01, // push 1: sectors
        0x6a, 0x10, // push 16: size of this packet
        0x89, 0xe6, // mov si, sp
        0xb4, 0x42, // mov ah, 42h: read
        0xcd, 0x13, // int 13h
        0x83, 0xc4, 0x10, // add sp, 16
    ]);
    code
}

fn read(number: u32) -> Vec<u8> {
    let mut code = vec![0xb2, 0x80]; // again: mov dl, 80h
    code.extend(read_sector(number));
    let back = -i8::try_from(code.len() + 2).unwrap();
    code.extend([0xeb, back.to_le_bytes()[0]]); // jmp again
    code
}

fn work() -> Vec<u8> {
    const BUFFER: [u8; 5] = [0xbb, 0x00, 0x7e, 0xcd, 0x13]; // mov bx, 7e00h; int 13h
    let mut code = vec![
        0xfe, 0x06, 0x00, 0x80, // work: inc byte [8000h]
        0xa0, 0x00, 0x80, // mov al, [8000h]
        0xa2, 0x00, 0x7e, // mov [7e00h], al
    ];
    code.extend(PLACE);
    code.extend([0xb8, 0x01, 0x03]); // mov ax: write one sector
    code.extend(BUFFER);
    code.extend([
        0xc6, 0x06, 0x00, 0x7e, 0x00, // mov byte [7e00h], 0
        0xa0, 0x00, 0x80, // mov al, [8000h]
    ]);
    code.extend(PLACE);
    code.extend([0xb8, 0x01, 0x02]); // mov ax: read one sector
    code.extend(BUFFER);
    code.extend([
        0xa0, 0x00, 0x80, // mov al, [8000h]
        0x3a, 0x06, 0x00, 0x7e, // cmp al, [7e00h]
        0x74, 0x06, // je same
        0xba, 0xf8, 0x03, 0xb0, b'B', 0xee, // out 3f8h, 'B'
        0xa0, 0x00, 0x80, // same: mov al, [8000h]
        0x84, 0xc0, // test al, al
        0x75, 0x00, // jnz work
    ]);
    let back = |at: usize| (-i8::try_from(at).unwrap()).to_le_bytes()[0];
    let end = code.len();
    code[end - 1] = back(end);
    code.extend([0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0x00]); // out 3f8h, '.'; jmp work
    let end = code.len();
    code[end - 1] = back(end);
    code
}

/// Hangs if the BIOS cannot read the second disk.
const READS_SECOND_DISK: &[u8] = &[
    0xb2, 0x81, // mov dl, 81h
    0xb6, 0x00, // mov dh, 0
    0xb8, 0x01, 0x02, // mov ax: read one sector
    0xb9, 0x01, 0x00, // mov cx, 1: the first
    0xbb, 0x00, 0x7e, // mov bx, 7e00h
    0xcd, 0x13, // int 13h
    0x73, 0x03, // jnc on
    0xf4, // hlt
    0xeb, 0xfd, // jmp back
];

/// Real mode, loaded at 7C00h with the disk in DL. `count` adds one to the first byte of sector 10.
pub fn boot_code(message: &str, count: bool, end: End) -> Vec<u8> {
    code_after(COM1, &[], message, count, end)
}

const COM1: u16 = 0x3f8;

/// The same with the message on another port, after some other code.
pub fn boot_code_on(port: u16, before: &[u8], message: &str, end: End) -> Vec<u8> {
    code_after(port, before, message, false, end)
}

fn code_after(port: u16, before: &[u8], message: &str, count: bool, end: End) -> Vec<u8> {
    let mut code = vec![
        0xfa, // cli
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x8e, 0xc0, // mov es, ax
        0x8e, 0xd0, // mov ss, ax
        0xbc, 0x00, 0x7c, // mov sp, 7c00h
        0xfc, // cld
    ];
    code.extend(before);
    if count {
        for (service, more) in [(0x02, &[0xfe, 0x06, 0x00, 0x7e][..]), (0x03, &[])] {
            code.extend([
                0xb6, 0x00, // mov dh, 0
                0xb8, 0x01, service, // mov ax: read or write one sector
                0xb9, 0x0b, 0x00, // mov cx, 11: cylinder 0, sector 11
                0xbb, 0x00, 0x7e, // mov bx, 7e00h
                0xcd, 0x13, // int 13h
            ]);
            code.extend(more); // inc byte [7e00h]
        }
    }
    let tail: Vec<u8> = match end {
        // Sleep state S5 through the PM1a control register.
        End::PowerOff => vec![0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, 0xeb, 0xfd],
        End::Hang => vec![0xf4, 0xeb, 0xfd],
        // The keyboard controller pulls the reset line.
        End::Reset => vec![0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd],
        // pvpanic
        End::Panic => vec![0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd],
        End::Read(number) => read(number),
        End::Work => work(),
    };
    let print = 14;
    let text = 0x7c00 + code.len() + print + tail.len();
    code.push(0xbe); // mov si, text
    code.extend(u16::try_from(text).unwrap().to_le_bytes());
    code.push(0xba); // mov dx, port
    code.extend(port.to_le_bytes());
    code.extend([
        0xac, // next: lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz done
        0xee, // out dx, al
        0xeb, 0xf8, // jmp next
    ]);
    code.extend(tail);
    code.extend(message.bytes());
    code.extend(b"\r\n\0");
    assert!(code.len() <= 440, "the partition table begins there");
    code.resize(440, 0);
    code
}

/// The same in long mode, in the smallest PE32+ file the firmware loads.
pub fn efi_application() -> Vec<u8> {
    let mut code = vec![
        0xfc, // cld
        0x48, 0x8d, 0x35, 0x19, 0x00, 0x00, 0x00, // lea rsi, [message]
        0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
        0xac, // next: lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz off
        0xee, // out dx, al
        0xeb, 0xf8, // jmp next
        0x66, 0xba, 0x04, 0x06, // off: mov dx, 604h
        0x66, 0xb8, 0x00, 0x20, // mov ax, 2000h
        0x66, 0xef, // out dx, ax
        0xf4, // halt: hlt
        0xeb, 0xfd, // jmp halt
    ];
    // The firmware has written to the line already.
    code.extend(format!("\r\n{MARKER}\r\n\0").bytes());
    code.resize(0x200, 0);

    let mut pe = vec![0u8; 0x200];
    let mut put = |at: usize, bytes: &[u8]| pe[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x3c, &0x40u32.to_le_bytes());
    put(0x40, b"PE\0\0");
    put(0x44, &0x8664u16.to_le_bytes()); // x86-64
    put(0x46, &1u16.to_le_bytes()); // sections
    put(0x54, &240u16.to_le_bytes()); // size of the optional header
    put(0x56, &0x22u16.to_le_bytes()); // executable, large addresses
    let optional = 0x58;
    put(optional, &0x20bu16.to_le_bytes()); // PE32+
    put(optional + 4, &0x200u32.to_le_bytes()); // size of code
    put(optional + 16, &0x1000u32.to_le_bytes()); // entry point
    put(optional + 20, &0x1000u32.to_le_bytes()); // base of code
    put(optional + 32, &0x1000u32.to_le_bytes()); // section alignment
    put(optional + 36, &0x200u32.to_le_bytes()); // file alignment
    put(optional + 56, &0x2000u32.to_le_bytes()); // size of image
    put(optional + 60, &0x200u32.to_le_bytes()); // size of headers
    put(optional + 68, &10u16.to_le_bytes()); // EFI application
    put(optional + 108, &16u32.to_le_bytes()); // data directories
    let section = optional + 240;
    put(section, b".text");
    put(section + 8, &0x200u32.to_le_bytes()); // size in memory
    put(section + 12, &0x1000u32.to_le_bytes()); // address
    put(section + 16, &0x200u32.to_le_bytes()); // size in the file
    put(section + 20, &0x200u32.to_le_bytes()); // offset in the file
    put(section + 36, &0x6000_0020u32.to_le_bytes()); // code, execute, read
    pe.extend(code);
    pe
}

/// An empty qcow2 over the disk of [`guest`].
pub fn link_over(lab: &Lab) -> PathBuf {
    let link = lab.path("delta.qcow2");
    create_overlay("guest.raw", "raw", &link);
    link
}

/// A guest with the payload in it that comes up and powers off.
pub fn guest(firmware: Firmware) -> Lab {
    let version = match firmware {
        Firmware::Uefi => WinVersion::Server2022,
        Firmware::Bios => WinVersion::Win10,
    };
    let mut spec = GuestSpec::new(version);
    spec.firmware = firmware;
    spec.disk_size = 1 << 30;
    let lab = Lab::new(spec);
    match firmware {
        Firmware::Bios => {
            let mut disk = fs::File::options().write(true).open(&lab.raw).unwrap();
            disk.seek(SeekFrom::Start(0)).unwrap();
            disk.write_all(&boot_code(MARKER, false, End::PowerOff))
                .unwrap();
        }
        Firmware::Uefi => {
            let payload = lab.path("payload.efi");
            fs::write(&payload, efi_application()).unwrap();
            let esp = lab.spec.partition(Role::Esp).unwrap();
            let image = format!("{}@@{}", lab.raw.display(), esp.start);
            // Windows' own loader and the fall-back: a foreign fall-back is replaced.
            for to in [
                "::/EFI/Boot/bootx64.efi",
                "::/EFI/Microsoft/Boot/bootmgfw.efi",
            ] {
                tool(
                    "mcopy",
                    &["-o", "-i", &image, payload.to_str().unwrap(), to],
                );
            }
        }
    }
    lab
}

/// A guest whose boot files, with the payload, and Windows are on separate disks. The payload for
/// BIOS comes up only if it can read the other disk, which a boot manager needs.
pub fn split_guest(firmware: Firmware) -> (Lab, Split) {
    let lab = guest(firmware);
    let split = lab.split();
    if firmware == Firmware::Bios {
        let write = |disk: &Path, code: &[u8]| {
            let mut disk = fs::File::options().write(true).open(disk).unwrap();
            disk.write_all(code).unwrap();
        };
        let needs_both = code_after(COM1, READS_SECOND_DISK, MARKER, false, End::PowerOff);
        write(&split.boot, &needs_both);
        write(
            &split.windows,
            &boot_code("the wrong disk", false, End::Hang),
        );
    }
    (lab, split)
}
