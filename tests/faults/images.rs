//! Disk images that name other files and hosts, none of which is opened.

use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::Path;

use crate::hostile::{bounded, trap};
use crate::support::{TOOLS, have, tool};
use crate::text;

/// Puts another text of the same length into an image.
fn exchange(image: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(image).unwrap();
    let found = bytes.windows(from.len()).position(|w| w == from.as_bytes());
    let at = found.unwrap_or_else(|| panic!("{from} is not in {}", image.display()));
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    fs::write(image, bytes).unwrap();
}

#[test]
fn images_that_name_others() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for folder in ["image", "other"] {
        fs::create_dir(dir.path().join(folder)).unwrap();
    }
    let here = dir.path().join("image");
    let (made, secret) = (dir.path().join("other/made"), dir.path().join("other/trap"));
    // Opening it blocks for ever.
    trap(&secret);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let port = server.local_addr().unwrap().port();
    let qcow2 = here.join("evil.qcow2");
    let create = |args: &[&str]| {
        let _ = fs::remove_file(&qcow2);
        let mut all = vec!["create", "-q", "-f", "qcow2"];
        all.extend(args);
        all.extend([text(&qcow2), "64M"]);
        tool("qemu-img", &all);
    };
    let refused = |what: &str, image: &Path, says: &str| {
        eprintln!("{what}");
        let out = here.join("out");
        let driver_source = text(crate::support::virtio_win());
        for args in [
            &["inspect", text(image)][..],
            &[
                "convert",
                text(image),
                "--virtio-iso",
                driver_source,
                "-o",
                text(&out),
            ],
        ] {
            let run = bounded(args);
            assert_eq!(run.code, 1, "{what}: {} {}", run.stdout, run.stderr);
            assert!(run.stderr.contains(says), "{what}: {}", run.stderr);
            assert!(!out.exists());
        }
        let asked = server.accept().unwrap_err();
        assert_eq!(asked.kind(), ErrorKind::WouldBlock, "{what}");
    };
    for (backing, says) in [
        (text(&secret).to_string(), "outside its directory"),
        ("../other/trap".into(), "outside its directory"),
        ("/etc/shadow".into(), "outside its directory"),
        (format!("nbd://127.0.0.1:{port}/x"), "not a file name"),
        (format!("http://127.0.0.1:{port}/x"), "not a file name"),
        (format!("https://127.0.0.1:{port}/x"), "not a file name"),
        ("nbd+unix:///x?socket=/run/x".into(), "not a file name"),
        (
            format!("json:{{\"driver\":\"nbd\",\"host\":\"127.0.0.1\",\"port\":\"{port}\"}}"),
            "not a file name",
        ),
        (
            format!(
                "json:{{\"driver\":\"file\",\"filename\":\"{}\"}}",
                text(&secret)
            ),
            "not a file name",
        ),
    ] {
        create(&["-u", "-F", "raw", "-b", &backing]);
        refused(&backing, &qcow2, says);
    }
    // A file of its own for the data.
    create(&["-o", &format!("data_file={},data_file_raw=on", text(&made))]);
    exchange(&qcow2, text(&made), text(&secret));
    refused("data file", &qcow2, "outside its directory");
    // Extents and parents of VMDK.
    let vmdk = here.join("evil.vmdk");
    let descriptor = |parent: &str, extent: &str| {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\n{parent}createType=\"monolithicFlat\"\n\n\
             {extent}\n\nddb.adapterType = \"ide\"\n"
        );
        fs::write(&vmdk, text).unwrap();
    };
    fs::write(here.join("flat.vmdk"), vec![0; 1 << 20]).unwrap();
    for (extent, says) in [
        (
            format!("RW 2048 FLAT \"{}\" 0", text(&secret)),
            "outside its directory",
        ),
        (
            "RW 2048 FLAT \"../other/trap\" 0".into(),
            "outside its directory",
        ),
        (
            "RW 2048 FLAT \"/etc/shadow\" 0".into(),
            "outside its directory",
        ),
        (
            "RW 2048 SPARSE \"/etc/shadow\"".into(),
            "outside its directory",
        ),
        (
            format!("RW 2048 FLAT \"nbd://127.0.0.1:{port}/x\" 0"),
            "does not exist",
        ),
    ] {
        descriptor("parentCID=ffffffff\n", &extent);
        refused(&extent, &vmdk, says);
    }
    let parent = format!(
        "parentCID=fffffffe\nparentFileNameHint=\"{}\"\n",
        text(&secret)
    );
    descriptor(&parent, "RW 2048 FLAT \"flat.vmdk\" 0");
    refused("parent", &vmdk, "outside its directory");
    // A link beside the image is followed, and leads outside.
    let link = here.join("link.raw");
    std::os::unix::fs::symlink(&secret, &link).unwrap();
    create(&["-u", "-F", "raw", "-b", "link.raw"]);
    refused("link", &qcow2, "outside its directory");
}
