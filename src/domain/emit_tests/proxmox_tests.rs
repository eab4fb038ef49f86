//! The Proxmox script, run against a stand-in for `qm`.

use super::*;

/// A stand-in for `qm`. It stores the options of a VM as Proxmox shows them, and records its
/// arguments. It refuses options that `qm create` and `qm set` of Proxmox VE 8 do not have.
const QM: &str = r#"#!/bin/sh
state=$(dirname "$0")
for a in "$@"; do printf '[%s]' "$a" >>"$state/calls"; done; echo >>"$state/calls"
if [ -e "$state/fail" ] && [ "$(grep -c . "$state/calls")" -ge "$(cat "$state/fail")" ]; then exit 1; fi
verb=$1; shift; vmid=$1; shift
conf=$state/$vmid.conf
drive() { # NAME VALUE: the properties a drive may have on its bus
  case $1 in virtio* | scsi*) threads=iothread ;; *) threads= ;; esac
  echo "$2" | tr ',' '\n' | sed -n 's/=.*//p' | while read -r key; do
    case $key in
      import-from | discard | serial | media | cache | ssd | $threads) ;;
      *) echo "$1: no property $key" >&2; exit 255 ;;
    esac
  done
}
net() {
  echo "$2" | tr ',' '\n' | sed -n 's/=.*//p' | while read -r key; do
    case $key in
      virtio | e1000 | e1000e | rtl8139 | bridge | tag | link_down | firewall | mtu) ;;
      *) echo "$1: no property $key" >&2; exit 255 ;;
    esac
  done
}
case $verb in
  config) cat "$conf" ;;
  status) cat "$state/status" 2>/dev/null || echo 'status: stopped' ;;
  listsnapshot)
    for s in "$state/$vmid".snap.*; do [ -e "$s" ] && echo "\`-> ${s##*.snap.}  2026-01-01 00:00:00"; done
    echo '`-> current  You are here!' ;;
  snapshot) [ ! -e "$state/no-snapshots" ] && cp "$conf" "$conf.snap"; mv "$conf.snap" "$state/$vmid.snap.$1" ;;
  rollback) cp "$state/$vmid.snap.$1" "$conf" ;;
  unlink) sed -i "/^$2:/d" "$conf" ;;
  create | set)
    if [ $verb = create ]; then [ -e "$conf" ] && exit 255; : >"$conf"; fi
    while [ $# -gt 0 ]; do
      key=${1#--}; value=$2; shift 2
      case $key in
        virtio[0-9]* | scsi[0-9]* | sata[0-5] | ide[0-3]) drive "$key" "$value" || exit 255 ;;
        net[0-9]*) net "$key" "$value" || exit 255 ;;
        name | ostype | machine | memory | sockets | cores | cpu | kvm | smbios1 | localtime | agent) ;;
        serial0 | tablet | balloon | vga | vmgenid | rng0 | bios | efidisk0 | tpmstate0 | scsihw) ;;
        boot | delete) ;;
        *) echo "Unknown option: $key" >&2; exit 255 ;;
      esac
      if [ "$key" = delete ]; then
        sed -i "s/^$value: \([^,]*\).*/unused0: \1/" "$conf"; continue
      fi
      case $value in *:0,import-from=*) value="${value%%:*}:vm-$vmid-disk-$key,${value#*,*,}" ;; esac
      case $value in *:vm-*) sed -i "/^unused0:/d" "$conf" ;; esac
      sed -i "/^$key:/d" "$conf"
      echo "$key: $value" >>"$conf"
    done ;;
  *) exit 9 ;;
esac
"#;

pub(in crate::domain) struct FakeQm {
    dir: tempfile::TempDir,
    script: std::path::PathBuf,
}

impl FakeQm {
    pub(in crate::domain) fn new(m: &Machine) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let qm = dir.path().join("qm");
        fs::write(&qm, QM).unwrap();
        let pvesh = dir.path().join("pvesh");
        fs::write(
            &pvesh,
            "#!/bin/sh\n[ \"$*\" = 'get /cluster/nextid' ] && echo 123\n",
        )
        .unwrap();
        for program in [&qm, &pvesh] {
            fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let script = place(&texts(Emit::Proxmox, m)[0], dir.path());
        Self { dir, script }
    }

    pub(in crate::domain) fn run(&self, args: &[&str]) -> (bool, String) {
        run_file(&self.script, args, Some(self.dir.path()))
    }

    /// The directory of the script and the disks.
    fn folder(&self) -> String {
        self.script.parent().unwrap().display().to_string()
    }

    fn config(&self) -> BTreeSet<String> {
        let text = fs::read_to_string(self.dir.path().join("100.conf")).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    pub(in crate::domain) fn calls(&self) -> String {
        fs::read_to_string(self.dir.path().join("calls")).unwrap()
    }
}

fn lines(list: &[&str]) -> BTreeSet<String> {
    list.iter().map(|l| (*l).to_owned()).collect()
}

#[test]
fn proxmox_script_creates_and_switches() {
    let mut m = full();
    m.disks[0].path = "/vm/it's $HOME.qcow2".into();
    let qm = FakeQm::new(&m);
    assert!(qm.run(&["-n"]).0);
    let (ok, text) = qm.run(&["bootstrap", "100", "zfs"]);
    assert!(ok, "{text}");
    assert!(text.contains("qm terminal 100"), "{text}");
    // Every name or path stays one argument, and the script looks for the disk beside itself.
    assert!(
        qm.calls().contains(&format!(
            "[zfs:0,import-from={}/it's $HOME.qcow2,discard=on,serial=h2k-0]",
            qm.folder()
        )),
        "{}",
        qm.calls()
    );
    assert!(!Path::new("/tmp/oops").exists());
    let common = lines(&[
        "name: B-ro-s---touch--tmp-oops--VM",
        "ostype: win10",
        "machine: q35",
        "memory: 4096",
        "sockets: 1",
        "cores: 4",
        "cpu: host",
        "localtime: 1",
        "agent: enabled=1",
        "serial0: socket",
        "tablet: 1",
        "balloon: 4096",
        "vga: std",
        "vmgenid: 00000000-0000-0000-0000-000000000007",
        "rng0: source=/dev/urandom",
        "bios: ovmf",
        "efidisk0: zfs:0,efitype=4m,pre-enrolled-keys=0",
        "tpmstate0: zfs:0,version=v2.0",
        "smbios1: uuid=564d1234-5678-9abc-def0-123456789abc,serial=Vk13YXJlLTU2IDRk,base64=1",
    ]);
    let with = |more: &[&str]| common.union(&lines(more)).cloned().collect::<BTreeSet<_>>();
    let first = qm.config();
    for line in with(&[
        "sata0: zfs:vm-100-disk-sata0,discard=on,serial=h2k-0",
        "sata1: zfs:vm-100-disk-sata1,discard=on,serial=h2k-1",
        "virtio0: zfs:1,serial=h2k-probe",
        "boot: order=sata0",
        "net0: e1000e=00:0c:29:aa:bb:01,bridge=vmbr0",
        "net1: e1000e=00:0c:29:aa:bb:02,bridge=br0,link_down=1",
    ]) {
        assert!(first.contains(&line), "{line}\n{first:#?}");
    }
    fs::write(qm.dir.path().join("status"), "status: running\n").unwrap();
    let (ok, text) = qm.run(&["final", "100"]);
    assert!(!ok && text.contains("shut the VM down"), "{text}");
    fs::remove_file(qm.dir.path().join("status")).unwrap();
    let production = with(&[
        "virtio0: zfs:vm-100-disk-sata0,discard=on,iothread=1,serial=h2k-0",
        "virtio1: zfs:vm-100-disk-sata1,discard=on,iothread=1,serial=h2k-1",
        "boot: order=virtio0",
        "net0: virtio=00:0c:29:aa:bb:01,bridge=vmbr0",
        "net1: virtio=00:0c:29:aa:bb:02,bridge=br0,link_down=1",
    ]);
    // The second time there is nothing left to move.
    for _ in 0..2 {
        let (ok, text) = qm.run(&["final", "100"]);
        assert!(ok, "{text}");
        assert_eq!(qm.config(), production);
    }
    assert_eq!(
        qm.calls().matches("[snapshot]").count(),
        1,
        "{}",
        qm.calls()
    );
    let (ok, text) = qm.run(&["back", "100"]);
    assert!(ok, "{text}");
    assert_eq!(
        qm.config(),
        first,
        "the rollback ends where the first boot was"
    );
    for args in [&[][..], &["final"], &["final", "x"], &["delete", "100"]] {
        let (ok, text) = qm.run(args);
        assert!(!ok && text.contains("usage:"), "{args:?}: {text}");
    }
}

#[test]
fn proxmox_without_a_first_boot_and_refusals() {
    let mut m = machine();
    m.bootstrap = None;
    m.bus = DiskBus::VirtioScsi;
    (m.firmware, m.nvram) = (Firmware::Bios, None);
    let qm = FakeQm::new(&m);
    let (ok, text) = qm.run(&["bootstrap", "100"]);
    assert!(!ok && text.contains("needs no first boot"), "{text}");
    let (ok, text) = qm.run(&["final", "100"]);
    assert!(ok, "{text}");
    let config = qm.config();
    for line in [
        "scsi0: local-lvm:vm-100-disk-scsi0,discard=on,iothread=1,serial=h2k-0",
        "scsihw: virtio-scsi-single",
        "boot: order=scsi0",
    ] {
        assert!(config.contains(line), "{line}\n{config:#?}");
    }
    m.bootstrap = Some(DiskBus::Sata);
    for n in 0..5 {
        let mut more = m.disks[0].clone();
        (more.path, more.system, more.boot_order) = (format!("/d{n}").into(), false, None);
        m.disks.push(more);
    }
    let script = |m: &Machine| proxmox::script(m, Path::new(FOLDER));
    for n in 5..30 {
        let mut more = m.disks[1].clone();
        more.path = format!("/d{n}").into();
        m.disks.push(more);
    }
    // The probe of the first boot needs a place too.
    let error = script(&m).unwrap_err().to_string();
    assert!(error.contains("30 places on scsi"), "{error}");
    m.disks.truncate(30);
    assert!(script(&m).is_ok());
    m.bus = DiskBus::Sata;
    assert!(script(&m).is_err());
    m.bus = DiskBus::VirtioScsi;
    m.disks.truncate(1);
    m.disks[0].sector_size = 4096;
    assert!(script(&m).is_err());
    m.disks[0].sector_size = 512;
    m.disks[0].path = "/a,b".into();
    assert!(script(&m).is_err());
}

/// Data disks that do not fit on the first bus are on the final one from the start.
#[test]
fn proxmox_has_more_disks_than_the_first_bus() {
    for (bus, name, probe) in [
        (DiskBus::VirtioBlk, "virtio", "virtio0"),
        (DiskBus::VirtioScsi, "scsi", "scsi9"),
    ] {
        let mut m = full();
        m.bus = bus;
        m.disks.truncate(1);
        m.disks[0].path = "/vm/a.qcow2".into();
        for n in 1..9 {
            let mut more = m.disks[0].clone();
            more.path = format!("/vm/d{n}.qcow2").into();
            (more.system, more.boot_order) = (false, None);
            more.serial = Some(format!("h2k-{n}"));
            m.disks.push(more);
        }
        let iso = m.driver_iso.is_some();
        let fit = if iso { 5 } else { 6 };
        let qm = FakeQm::new(&m);
        let (ok, text) = qm.run(&["bootstrap", "100"]);
        assert!(ok, "{text}");
        let first = qm.config();
        let place = |bus: &str, n: usize, from: &str, thread: &str| {
            format!("{bus}{n}: local-lvm:vm-100-disk-{from}{n},discard=on{thread},serial=h2k-{n}")
        };
        let thread = ",iothread=1";
        for n in 0..9 {
            let line = match n < fit {
                true => place("sata", n, "sata", ""),
                false => place(name, n, name, thread),
            };
            assert!(first.contains(&line), "{line}\n{first:#?}");
        }
        let probe = format!("{probe}: local-lvm:1,serial=h2k-probe");
        assert!(first.contains(&probe), "{probe}\n{first:#?}");
        let (ok, text) = qm.run(&["final", "100"]);
        assert!(ok, "{text}");
        let last = qm.config();
        for n in 0..9 {
            let line = place(name, n, if n < fit { "sata" } else { name }, thread);
            assert!(last.contains(&line), "{line}\n{last:#?}");
        }
        assert!(
            !last
                .iter()
                .any(|l| l.starts_with("sata") || l.contains("h2k-probe"))
        );
        assert!(qm.run(&["back", "100"]).0);
        assert_eq!(qm.config(), first);
        // Without a snapshot only the moved disks return.
        let text = &texts(Emit::Proxmox, &m)[0];
        let (_, back) = text.split_once("\nback() {").unwrap();
        for n in 0..9 {
            let moved = back.contains(&format!("move {name}{n} sata{n} "));
            assert_eq!(moved, n < fit, "{n}: {back}");
        }
    }
}

#[test]
fn proxmox_goes_on_after_an_interruption() {
    let m = full();
    let mut m = Machine {
        driver_iso: None,
        ..m
    };
    m.disks[0].path = "/vm/a.qcow2".into();
    let whole = FakeQm::new(&m);
    assert!(whole.run(&["bootstrap", "100"]).0);
    let calls = whole.calls().lines().count();
    for fail in 1..=calls {
        let qm = FakeQm::new(&m);
        fs::write(qm.dir.path().join("fail"), fail.to_string()).unwrap();
        // A failed query counts as "no", so some runs succeed.
        let _ = qm.run(&["bootstrap", "100"]);
        fs::remove_file(qm.dir.path().join("fail")).unwrap();
        let (ok, text) = qm.run(&["bootstrap", "100"]);
        assert!(ok, "{fail}: {text}");
        assert_eq!(qm.config(), whole.config(), "stopped at call {fail}");
    }
}

#[test]
fn proxmox_names_and_snapshots() {
    let mut m = full();
    m.disks[0].path = "/vm/a.qcow2".into();
    let qm = FakeQm::new(&m);
    let (ok, text) = qm.run(&["bootstrap", "next"]);
    assert!(ok && text.contains("VMID 123"), "{text}");
    assert!(qm.dir.path().join("123.conf").exists());
    // Another VM with that number is never changed.
    fs::write(qm.dir.path().join("100.conf"), "smbios1: uuid=other\n").unwrap();
    for verb in ["bootstrap", "final", "back"] {
        let (ok, text) = qm.run(&[verb, "100"]);
        assert!(!ok && text.contains("another VM"), "{verb}: {text}");
        assert_eq!(qm.config().len(), 1, "{verb}");
    }
    // Without snapshots the disks return to their bus.
    fs::remove_file(qm.dir.path().join("100.conf")).unwrap();
    fs::write(qm.dir.path().join("no-snapshots"), "").unwrap();
    assert!(qm.run(&["bootstrap", "100"]).0);
    let (ok, text) = qm.run(&["final", "100"]);
    assert!(ok && text.contains("no snapshots"), "{text}");
    let (ok, text) = qm.run(&["back", "100"]);
    assert!(
        ok && text.contains("what Windows wrote since stays"),
        "{text}"
    );
    let config = qm.config();
    for line in [
        "sata0: local-lvm:vm-100-disk-sata0,discard=on,serial=h2k-0",
        "boot: order=sata0",
    ] {
        assert!(config.contains(line), "{line}\n{config:#?}");
    }
    // Without a first boot, the script prints that and succeeds.
    let qm = FakeQm::new(&m);
    let (ok, text) = qm.run(&["final", "100"]);
    assert!(ok && text.contains("0x7B"), "{text}");
}

#[test]
fn proxmox_networks_follow_the_map() {
    let mut m = machine();
    let map = ["a=pve:vmbr7@20", "b=br:br1@30", "c=none"];
    let map = NetworkMap::new(map.iter().map(|m| m.parse().unwrap()).collect()).unwrap();
    m.nics = ["a", "b", "c", "d"]
        .into_iter()
        .enumerate()
        .map(|(n, network)| {
            let mut nic = Nic {
                network: Some(network.into()),
                ..Nic::new(
                    MacAddr::qemu([0, 0, n as u8]),
                    NicSource::Network("default".into()),
                )
            };
            map.apply(&mut nic);
            nic
        })
        .collect();
    let qm = FakeQm::new(&m);
    let (ok, text) = qm.run(&["final", "100"]);
    assert!(ok, "{text}");
    let config = qm.config();
    for line in [
        "net0: virtio=52:54:00:00:00:00,bridge=vmbr7,tag=20",
        "net1: virtio=52:54:00:00:00:01,bridge=br1,tag=30",
        "net2: virtio=52:54:00:00:00:02,bridge=vmbr0,link_down=1",
        "net3: virtio=52:54:00:00:00:03,bridge=vmbr0",
    ] {
        assert!(config.contains(line), "{line}\n{config:#?}");
    }
    let said = warnings(Emit::Proxmox, &m);
    assert!(
        said.len() == 1 && said[0].contains("--network-map 'd=pve:"),
        "{said:#?}"
    );
    let said = warnings(Emit::Qemu, &m);
    assert!(said.len() == 1 && said[0].contains("VLAN 30"), "{said:#?}");
}

#[test]
fn proxmox_names_are_names_of_dns() {
    for (name, want) in [
        ("Dr. No", "Dr.No"),
        ("a.-b-.c", "a.b.c"),
        ("..a..b..", "a.b"),
        ("- . -", "vm"),
        ("win-2019", "win-2019"),
    ] {
        let mut m = machine();
        m.name = name.to_owned();
        let script = &texts(Emit::Proxmox, &m)[0];
        let line = format!("--name {want} ");
        assert!(script.contains(&line), "{name}: {script}");
    }
}

/// Each choice of the VM as an option of `qm create`.
#[test]
fn proxmox_has_what_the_vm_has() {
    fn os(m: &mut Machine, major: u32, minor: u32, build: u32, server: bool) {
        if let System::Windows(w) = &mut m.system {
            (w.major, w.minor, w.build, w.server) = (major, minor, build, server);
        }
    }
    for (change, option) in [
        (
            (|m| os(m, 10, 0, 22000, false)) as fn(&mut Machine),
            "--ostype win11",
        ),
        (|m| os(m, 10, 0, 21999, false), "--ostype win10"),
        (|m| os(m, 10, 0, 20348, true), "--ostype win11"),
        (|m| os(m, 10, 0, 20347, true), "--ostype win10"),
        (|m| os(m, 6, 3, 9600, false), "--ostype win8"),
        (|m| os(m, 6, 2, 9200, true), "--ostype win8"),
        (|m| os(m, 6, 1, 7601, true), "--ostype win7"),
        (|m| os(m, 6, 0, 6002, true), "--ostype w2k8"),
        (|m| os(m, 6, 0, 6002, false), "--ostype wvista"),
        (|m| os(m, 5, 2, 3790, true), "--ostype w2k3"),
        (|m| os(m, 5, 2, 3790, false), "--ostype wxp"),
        (|m| os(m, 5, 1, 2600, false), "--ostype wxp"),
        (|m| os(m, 5, 0, 2195, false), "--ostype w2k"),
        (
            |m| {
                m.system = System::Linux {
                    arch: crate::types::Arch::Amd64,
                    osinfo_id: None,
                }
            },
            "--ostype l26",
        ),
        (|_| {}, "--serial0 socket --tablet 1"),
        (
            |m| m.second_serial = true,
            "--serial0 socket --serial1 socket --tablet 1",
        ),
        (|_| {}, "--cpu host"),
        (|m| m.cpu = CpuMode::HostModel, "--cpu x86-64-v2-AES"),
        (|m| m.domain_type = DomainType::Qemu, "--kvm 0 --cpu max"),
        (|_| {}, "--vga std"),
        (|m| m.graphics = Graphics::None, "--vga none"),
        (|m| m.graphics = Graphics::Spice, "--vga qxl"),
        (|m| m.video = Video::Qxl, "--vga qxl"),
        (|m| m.video = Video::Virtio, "--vga virtio"),
        (|m| m.clock_utc = true, "--localtime 0"),
        (|m| m.drivers.agent = false, "--agent enabled=0"),
        (|m| m.drivers.balloon = false, "--balloon 0"),
        (
            |m| {
                m.topology = Some(Topology {
                    sockets: 2,
                    cores: 3,
                    threads: 2,
                })
            },
            "--sockets 2 --cores 6",
        ),
        (
            |m| m.firmware = Firmware::Uefi { secure_boot: true },
            "--bios ovmf --efidisk0 \"$storage\":0,efitype=4m,pre-enrolled-keys=1",
        ),
        (
            |m| m.machine_type = Some("pc-q35-8.2".into()),
            "--machine pc-q35-8.2",
        ),
    ] {
        let mut m = full();
        m.disks[0].path = "/vm/a.qcow2".into();
        change(&mut m);
        let script = proxmox::script(&m, Path::new(FOLDER)).unwrap();
        let mut lines = script
            .lines()
            .map(|line| line.trim().trim_end_matches(" \\"));
        assert!(lines.any(|line| line == option), "{option} in\n{script}");
    }
    // Four places on IDE, of which the driver ISO takes one.
    let mut m = machine();
    m.bootstrap = Some(DiskBus::Ide);
    for n in 1..5 {
        let mut more = m.disks[0].clone();
        (more.path, more.system, more.boot_order) = (format!("/d{n}").into(), false, None);
        m.disks.push(more);
    }
    let script = proxmox::script(&m, Path::new(FOLDER)).unwrap();
    for (place, there) in [
        ("import ide2 ", true),
        ("import ide3 ", false),
        ("import virtio3 ", true),
    ] {
        assert_eq!(script.contains(place), there, "{place}\n{script}");
    }
}

/// The drivers are for looking up in the first boot; the final VM has no need of them.
#[test]
fn the_driver_image_is_there_in_the_first_boot_only() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("virtio-win.iso");
    fs::write(&image, "").unwrap();
    let mut m = machine();
    m.driver_iso = Some(image.clone());
    let qm = FakeQm::new(&m);
    let there = || {
        qm.config()
            .into_iter()
            .find(|line| line.contains("media=cdrom"))
    };
    assert!(qm.run(&["bootstrap", "100"]).0);
    assert_eq!(
        there(),
        Some(format!("sata1: {},media=cdrom", image.display()))
    );
    let (ok, text) = qm.run(&["final", "100"]);
    assert!(ok, "{text}");
    assert_eq!(there(), None);
}
