//! The security descriptor of the one directory in a guest that belongs to hyper2kvm.
//!
//! Its contents run as SYSTEM, and its log may contain private data. Any other new directory gets
//! its sibling's descriptor. Below `\Windows` that lets everybody read, and on some installations
//! write.
//!
//! Specification: [MS-DTYP] 2.4.6, `SECURITY_DESCRIPTOR`.

use super::GuestPath;

/// The directory's name, below that of Windows.
pub const OWN_FOLDER: &str = "hyper2kvm";

/// `O:BAG:SYD:PAI(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)`: access for SYSTEM and Administrators, and no
/// inheritance.
const PRIVATE: [u8; 100] = {
    let mut bytes = [0; 100];
    // Revision; self-relative, DACL present, protected and inherited automatically; offsets of
    // owner, group and DACL.
    let head = [
        1, 0, 0x04, 0x94, 72, 0, 0, 0, 88, 0, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0,
    ];
    // Revision, size 52, two entries. Each: allow, inherited by files and directories, size, all rights.
    let list = [2, 0, 52, 0, 2, 0, 0, 0];
    let system_entry = [0, 3, 20, 0, 0xff, 0x01, 0x1f, 0];
    let administrators_entry = [0, 3, 24, 0, 0xff, 0x01, 0x1f, 0];
    // S-1-5-18 and S-1-5-32-544.
    let system = [1, 1, 0, 0, 0, 0, 0, 5, 18, 0, 0, 0];
    let administrators = [1, 2, 0, 0, 0, 0, 0, 5, 32, 0, 0, 0, 0x20, 2, 0, 0];
    let parts: [&[u8]; 8] = [
        &head,
        &list,
        &system_entry,
        &system,
        &administrators_entry,
        &administrators,
        &administrators,
        &system,
    ];
    let (mut part, mut at) = (0, 0);
    while part < parts.len() {
        let mut i = 0;
        while i < parts[part].len() {
            bytes[at] = parts[part][i];
            i += 1;
            at += 1;
        }
        part += 1;
    }
    assert!(at == bytes.len());
    bytes
};

/// The descriptor of a new directory, if it must not get its sibling's.
pub fn of_new_folder(path: &GuestPath) -> Option<&'static [u8]> {
    let below_windows = path.parent().is_some_and(|parent| parent.name().is_some());
    let own = path.name()?.eq_ignore_ascii_case(OWN_FOLDER) && below_windows;
    own.then_some(&PRIVATE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_folder_of_our_own() {
        for (path, own) in [
            (r"\Windows\hyper2kvm", true),
            (r"\WINNT\Hyper2KVM", true),
            (r"\hyper2kvm", false),
            (r"\Windows\hyper2kvm\drivers", false),
            (r"\Windows\INF", false),
        ] {
            let path = GuestPath::parse(path).unwrap();
            assert_eq!(of_new_folder(&path).is_some(), own, "{path}");
        }
    }
}
