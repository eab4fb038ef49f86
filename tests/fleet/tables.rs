//! The display of many VMs: tables, colours, progress.

use super::*;

#[test]
fn a_table_of_machines() {
    if !have(&TOOLS) {
        return;
    }
    let fleet = Fleet::new(&["web", "db"]);
    // A snapshot: its base is not a VM of its own.
    support::create_overlay(
        fleet.path("db.raw").to_str().unwrap(),
        "raw",
        &fleet.path("snapshot.qcow2"),
    );
    fs::write(fleet.path("garbage.vmdk"), vec![1; 4096]).unwrap();
    fs::write(fleet.path("notes.txt"), "x").unwrap();
    let folder = fleet.dir.path().to_str().unwrap();
    let list = h2k(["inspect", folder, "--json"]).expect(101).json();
    assert_eq!(list["schema"], "hyper2kvm/inspect-list/1");
    let rows: Vec<_> = list["machines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| (r["name"].as_str().unwrap(), r["verdict"].as_str().unwrap()))
        .collect();
    assert_eq!(
        rows,
        [
            ("garbage.vmdk", "error"),
            ("snapshot", "convertible"),
            ("web", "convertible")
        ]
    );
    let web = &list["machines"][2];
    assert_eq!(
        (&web["arch"], &web["firmware"]),
        (&"x86_64".into(), &"uefi".into())
    );
    assert!(list["machines"][0]["error"].is_string());

    // The same document as for a single one.
    let one = h2k(["inspect", fleet.path("web.raw").to_str().unwrap(), "--json"])
        .expect(0)
        .json();
    assert_eq!(one["schema"], "hyper2kvm/inspect/1");
    for key in ["os", "controllers", "findings", "hives"] {
        assert_eq!(one[key], web["inspection"][key], "{key}");
    }

    let text = h2k(["inspect", folder]).expect(101).stdout;
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[0].starts_with("MACHINE ") && lines[3].starts_with("web "),
        "{text}"
    );
    let column = lines[0].find("VERDICT").unwrap();
    assert!(lines[3][column..].starts_with("convertible"), "{text}");
    assert!(text.contains("1 error"), "{text}");
    assert!(!text.contains('\u{1b}'), "colours into a pipe");

    // One description, or one disk of Hyper-V, hides nothing that lies beside it.
    for name in ["only.vmx", "only.vhdx"] {
        let beside = fleet.path("beside");
        fs::create_dir(&beside).unwrap();
        let disk = |name: &str| {
            let to = beside.join(name);
            let (from, to) = (fleet.path("web.raw"), to.to_str().unwrap().to_string());
            let format = if name.ends_with("vhdx") {
                "vhdx"
            } else {
                "vmdk"
            };
            let from = from.to_str().unwrap();
            support::tool(
                "qemu-img",
                &["convert", "-f", "raw", "-O", format, from, &to],
            );
        };
        disk("other.vmdk");
        if name == "only.vmx" {
            disk("mine.vmdk");
            let text = "displayName = \"only\"\nsata0.present = \"TRUE\"\n\
                        sata0:0.present = \"TRUE\"\nsata0:0.fileName = \"mine.vmdk\"\n";
            fs::write(beside.join(name), text).unwrap();
        } else {
            disk(name);
        }
        let list = h2k(["inspect", beside.to_str().unwrap(), "--json"])
            .expect(0)
            .json();
        let names: Vec<_> = (list["machines"].as_array().unwrap().iter())
            .map(|r| r["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["only", "other"], "{name}");
        fs::remove_dir_all(&beside).unwrap();
    }

    // What a description says of the VM is part of the document; a disk says nothing.
    fs::write(
        fleet.path("web.vmx"),
        "displayName = \"web\"\nmemsize = \"6144\"\nvtpm.present = \"TRUE\"\n\
         sata0.present = \"TRUE\"\nsata0:0.present = \"TRUE\"\nsata0:0.fileName = \"web.vmdk\"\n\
         ethernet0.present = \"TRUE\"\nethernet0.networkName = \"prod\"\n",
    )
    .unwrap();
    let (raw, vmdk) = (fleet.path("web.raw"), fleet.path("web.vmdk"));
    let (raw, vmdk) = (raw.to_str().unwrap(), vmdk.to_str().unwrap());
    support::tool(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "vmdk", raw, vmdk],
    );
    let vmx = fleet.path("web.vmx");
    let machine = h2k(["inspect", vmx.to_str().unwrap(), "--json"])
        .expect(0)
        .json();
    assert_eq!(machine["machine"]["memory_mib"], 6144);
    assert_eq!(machine["machine"]["nics"][0]["network"], "prod");
    assert_eq!(machine["machine"]["tpm"], true);
    assert!(one.get("machine").is_none());
    let text = h2k(["inspect", vmx.to_str().unwrap()]).expect(0).stdout;
    assert!(text.contains("6144 MiB") && text.contains("prod"), "{text}");
    let plan = |more: &[&str]| {
        let (vmx, iso) = (vmx.to_str().unwrap(), support::virtio_win());
        let args = ["plan", vmx, "--virtio-iso", iso.to_str().unwrap()];
        h2k([&args[..], more].concat()).expect(0)
    };
    let planned = plan(&["--json", "--emit", "proxmox"]).json();
    assert_eq!(planned["machine"], machine["machine"]);
    let ends = |value: &Value, end: &str| value.as_str().unwrap().ends_with(end);
    assert!(ends(&planned["outputs"]["disks"][0], "web-kvm/web.qcow2"));
    assert!(ends(
        &planned["outputs"]["emitted"][0],
        "web-kvm/web-proxmox.sh"
    ));
    assert!(planned["estimate"]["seconds_at_most"].as_u64() > Some(1));
    let text = plan(&[]).stdout;
    for part in ["6144 MiB", "prod", "web-final.xml", "Time: at most"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    fs::remove_file(vmx).unwrap();

    // Several named ones, all good; the most important first when it is one.
    let named = ["web.raw", "snapshot.qcow2"].map(|n| fleet.path(n).to_str().unwrap().to_string());
    h2k(["inspect", &named[0], &named[1]]).expect(0);
    let text = h2k(["inspect", &named[0]]).expect(0).stdout;
    let order = [
        "Windows Server 2022",
        "can be converted",
        "Would it start",
        "Details",
    ];
    let places: Vec<_> = order.iter().map(|w| text.find(w).expect(w)).collect();
    assert!(places.is_sorted(), "{text}");
    h2k(["inspect", &named[0], &named[1], "--root", r"\Windows"]).expect(2);
    fs::create_dir(fleet.path("empty")).unwrap();
    h2k(["inspect", fleet.path("empty").to_str().unwrap()]).expect(1);
}

#[test]
fn colours_on_a_terminal_only() {
    if !have(&TOOLS) || !have(&["script"]) {
        return;
    }
    let fleet = Fleet::new(&["web"]);
    let line = format!("{} inspect {}", binary(), fleet.path("web.raw").display());
    let on_terminal = |no_color: &str| {
        let out = Command::new("script")
            .args(["-qec", &line, "/dev/null"])
            .env("TERM", "xterm")
            .env("NO_COLOR", no_color)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    let colours = on_terminal("");
    assert!(
        colours.contains("\u{1b}[32mcan be converted"),
        "{colours:?}"
    );
    assert!(!on_terminal("1").contains('\u{1b}'));
}

/// The output of inspect, plan, convert and verify on a terminal of 80 columns.
#[test]
fn a_terminal_of_80_columns() {
    if !have(&TOOLS) || !have(&["script"]) {
        return;
    }
    let fleet = Fleet::new(&["web"]);
    let (raw, out) = (fleet.path("web.raw"), fleet.path("shown"));
    let (raw, out) = (raw.to_str().unwrap(), out.to_str().unwrap());
    let iso = support::virtio_win().to_str().unwrap();
    let on_terminal = |arguments: &str| {
        let line = format!("stty cols 80; {} {arguments}", binary());
        let run = Command::new("script")
            .args(["-qec", &line, "/dev/null"])
            .env("TERM", "xterm")
            .env("NO_COLOR", "1")
            .env("HYPER2KVM_VIRTIO_ISO", iso)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8(run.stdout).unwrap().replace('\r', "\n");
        let short = |l: &&str| l.chars().count() > 80 && !l.contains('/');
        assert_eq!(text.lines().find(short), None, "{arguments}");
        text
    };
    let text = on_terminal(&format!("inspect {raw}"));
    assert!(
        text.contains("convert fixes these") && text.contains("not used"),
        "{text}"
    );
    assert!(!text.contains("NOT READY"), "{text}");
    assert!(text.contains(&format!("hyper2kvm plan {raw}")), "{text}");
    let text = on_terminal(&format!("plan {raw} -o {out}"));
    assert!(
        text.contains(&format!("hyper2kvm convert {raw} -o {out}")),
        "{text}"
    );
    let text = on_terminal(&format!("convert {raw} -o {out} --progress none"));
    let place = |what: &str| text.find(what).unwrap_or_else(|| panic!("{what}: {text}"));
    let order = ["READY: ", "Next", "hyper2kvm boot", "Warnings"].map(place);
    assert!(
        order.is_sorted() && !text.contains("files-viostor"),
        "{text}"
    );
    // The whole directory, and what it says besides.
    let text = on_terminal(&format!("verify {out}"));
    assert!(
        text.contains("READY: ") && text.contains("checks passed"),
        "{text}"
    );

    // Into a pipe lines stay whole; quiet runs say what went wrong, or nothing.
    let verbose = h2k([
        "convert",
        raw,
        "--virtio-iso",
        iso,
        "-o",
        out,
        "--force",
        "-v",
    ])
    .expect(0);
    assert!(
        verbose.stdout.contains("files-viostor"),
        "{}",
        verbose.stdout
    );
    assert!(verbose.stdout.lines().any(|l| l.chars().count() > 80));
    let quiet = h2k([
        "convert",
        raw,
        "--virtio-iso",
        iso,
        "-o",
        out,
        "--force",
        "-q",
    ])
    .expect(0);
    assert_eq!(quiet.stdout, "");
    let warned = quiet.stderr.lines().all(|l| l.starts_with("warning: "));
    assert!(
        warned && quiet.stderr.contains("is not signed"),
        "{}",
        quiet.stderr
    );
    assert_eq!(h2k(["verify", out, "-q"]).expect(0).stderr, "");
    let failed = h2k(["verify", raw, "-q"]).expect(4);
    assert_eq!(failed.stdout, "");
    assert!(
        failed.stderr.contains("warning: [boot-path]"),
        "{}",
        failed.stderr
    );
    assert!(
        failed.stderr.contains("convert makes it ready"),
        "{}",
        failed.stderr
    );
}
