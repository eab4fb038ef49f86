//! The console SAC has the first serial port: the marker of the first boot appears on the second.

use std::fs;
use std::sync::Arc;

use hyper2kvm::block::FileDisk;
use hyper2kvm::boot::MARKER;
use hyper2kvm::demo::guest::layout;
use hyper2kvm::demo::{Firmware, Role};
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{EmbeddedWriter, GuestPath, GuestRead, GuestWrite, VolumeId, embedded};
use hyper2kvm::registry::build::Format;
use hyper2kvm::registry::{HiveView, KeyTree, RegData};

use crate::convert;
use crate::libvirt::{Libvirt, able};
use crate::payload::{End, boot_code_on, guest};
use crate::support::Lab;

const LOADER_EMS: &str = "Objects\\{733b62e5-f608-11eb-825c-c112f60133ab}\\Elements\\260000b0";

/// `bcdedit /ems on`
fn switch_ems_on(lab: &Lab) {
    let role = lab.spec.boot_role();
    assert_ne!(role, Role::Esp, "of a BIOS guest");
    let volume = VolumeId::new(lab.spec.partition(role).unwrap().index);
    let path = GuestPath::parse("Boot\\BCD").unwrap();
    let disk = Arc::new(FileDisk::open_rw(&lab.raw).unwrap());
    let layout = layout(&lab.spec);
    let reader = embedded::open(disk.clone(), &layout).unwrap();
    let store = reader.read(volume, &path, 64 << 20).unwrap();
    let mut tree = KeyTree::from_view(&HiveView::new(&store).unwrap()).unwrap();
    tree.set(LOADER_EMS, "Element", RegData::Binary(vec![1]));
    let bytes = tree.to_bytes_as("BCD", Format::V1_3);
    let mut writer = Box::new(EmbeddedWriter::new(disk, &layout, MountOptions::default()));
    writer.write_file(volume, &path, &bytes).unwrap();
    writer.close().unwrap();
}

#[test]
fn the_marker_comes_on_the_second_port_where_ems_has_the_first() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Bios), Libvirt::new());
    switch_ems_on(&lab);
    // The output of SAC, then the marker on COM2.
    let sac = [
        0xba, 0xf8, 0x03, // mov dx, 3f8h
        0xb0, b'!', // mov al, '!'
        0xee, // out dx, al
    ];
    let code = boot_code_on(0x2f8, &sac, MARKER, End::PowerOff);
    let disk = fs::File::options().write(true).open(&lab.raw).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, &code, 0).unwrap();
    let (out, _) = convert(&lab, &lab.raw, "ems", &[]);
    libvirt.give(lab.dir.path());
    let record = libvirt.boot(&out, &["--timeout", "300"]).expect(0).json();
    assert_eq!(record["phase"], "done");
    for stage in ["bootstrap", "final"] {
        assert_eq!(record[stage]["up_by"], "marker", "{stage}: {record:#}");
    }
}
