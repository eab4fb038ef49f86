//! The access of each verb and each program that it starts, tested as root and as a user.
//!
//! Stand-ins for the programs try each access before they become the real program. A verb is tested
//! by a program that it starts with all its restrictions
//! (`HYPER2KVM_FAILPOINT=confined=start:...`). The table of `docs/security.md` is generated here:
//! `HYPER2KVM_UPDATE=1 cargo test --test confinement` writes it, a run without compares.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

#[path = "../support/mod.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use hyper2kvm::demo::{Firmware, GuestSpec, WinVersion};
use rustix::io::{FdFlags, fcntl_setfd};
use support::{Lab, Run, TOOLS, binary, finish, have, skip, tool, virtio_win};

/// `nobody`, and somebody else.
const USER: u32 = 65534;
const OTHER: u32 = 54321;
const AS_USER: [&str; 4] = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
/// The version of landlock with all restrictions in the table (Linux 6.12).
const LANDLOCK: u32 = 6;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The results of one program by column; several if it was started several times.
type Answers = BTreeMap<String, BTreeSet<String>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Root,
    User,
}

/// The columns of the table: their heads and the attempts of the probe for them.
const COLUMNS: [(&str, &[&str]); 12] = [
    ("reads the source", &["source"]),
    ("writes the source", &["change"]),
    ("reads other files", &["read"]),
    ("writes beside the output", &["output"]),
    ("writes elsewhere", &["write"]),
    ("files of others", &["others"]),
    (
        "`/proc/sys`, `/run`, devices",
        &["sysctl", "run", "units", "udev", "device"],
    ),
    ("Unix sockets", &["unix", "abstract"]),
    ("TCP", &["tcp"]),
    ("signals to others", &["signal"]),
    ("other programs", &["programs"]),
    ("system calls", &["calls"]),
];

/// A process of the user's.
struct Sleeper(Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Sleeper {
    fn start() -> Self {
        let mut command = Command::new("setpriv");
        command.args(AS_USER).args(["sleep", "600"]);
        Self(command.spawn().unwrap())
    }
}

struct Place {
    lab: Lab,
    /// Stand-ins for programs; their directory has nothing beside it.
    stand: tempfile::TempDir,
    source: PathBuf,
    foreign: PathBuf,
    port: u16,
    abstract_name: String,
    sleeper: Sleeper,
    _listeners: (UnixListener, UnixListener, TcpListener),
}

impl Place {
    fn new() -> Self {
        let mut spec = GuestSpec::new(WinVersion::Win10);
        spec.disk_size = 512 << 20;
        spec.recovery = false;
        spec.firmware = Firmware::Bios;
        let lab = Lab::new(spec);
        let stand = tempfile::tempdir().unwrap();
        for folder in [lab.dir.path(), stand.path()] {
            fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
        }
        for folder in ["out", "tmp", "home", "elsewhere"] {
            fs::create_dir(lab.path(folder)).unwrap();
            fs::set_permissions(lab.path(folder), Permissions::from_mode(0o777)).unwrap();
        }
        let source = lab.in_format("qcow2", "", "guest.qcow2");
        let foreign = lab.path("foreign.qcow2");
        fs::copy(&source, &foreign).unwrap();
        fs::set_permissions(&foreign, Permissions::from_mode(0o600)).unwrap();
        chown(&foreign, Some(OTHER), Some(OTHER)).unwrap();
        fs::write(lab.path("elsewhere/readable"), "x").unwrap();
        tool(
            "cp",
            &["-r", text(virtio_win()), text(&lab.path("drivers"))],
        );
        tool("chmod", &["-R", "a+rX", text(&lab.path("drivers"))]);
        fs::copy(binary(), lab.path("hyper2kvm")).unwrap();
        let socket = lab.path("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
        let abstract_name = format!("hyper2kvm-{}", std::process::id());
        let name = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let place = Self {
            port: tcp.local_addr().unwrap().port(),
            _listeners: (listener, UnixListener::bind_addr(&name).unwrap(), tcp),
            abstract_name,
            sleeper: Sleeper::start(),
            source,
            foreign,
            stand,
            lab,
        };
        place.build();
        place
    }

    fn build(&self) {
        for folder in ["bin", "real"] {
            fs::create_dir(self.stand.path().join(folder)).unwrap();
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/confinement/probe.c");
        let loader = String::from_utf8(tool("readelf", &["-l", "/bin/sh"])).unwrap();
        let loader = loader.split("interpreter: ").nth(1).unwrap();
        let loader = format!("-DLOADER=\"{}\"", loader.split(']').next().unwrap());
        let args = ["-O", "-Wall", "-Werror", &loader, "-o"];
        let mut args = args.to_vec();
        let probe = self.probe();
        args.extend([text(&probe), text(&source)]);
        tool("cc", &args);
        fs::create_dir(self.libraries()).unwrap();
        let real = hyper2kvm::tool::host::find_library(hyper2kvm::tool::host::LIBHIVEX).unwrap();
        let real = format!("-DREAL=\"{}\"", text(&real));
        let library = self.libraries().join("libhivex.so.0");
        let args = ["-O", "-Wall", "-Werror", "-shared", "-fPIC", "-DLIBRARY"];
        let files = [&real, "-o", text(&library), text(&source), "-ldl"];
        tool("cc", &[&args[..], &files[..]].concat());
    }

    /// The directory of the stand-in library.
    fn libraries(&self) -> PathBuf {
        self.stand.path().join("lib")
    }

    fn probe(&self) -> PathBuf {
        self.stand.path().join("probe")
    }

    fn landlock(&self) -> u32 {
        let version = tool(text(&self.probe()), &["--landlock"]);
        let version = String::from_utf8(version).unwrap();
        version.trim().parse().unwrap_or(0)
    }

    fn path(&self, name: &str) -> String {
        text(&self.lab.path(name)).to_owned()
    }

    /// The attempts of the probe.
    fn attempts(&self, who: Who, source: &Path, output: &str) -> String {
        let target = match who {
            Who::Root => std::process::id(),
            Who::User => self.sleeper.0.id(),
        };
        let device = ["/dev/mem", "/dev/kmsg"];
        let device = device.iter().find(|d| Path::new(d).exists());
        [
            format!("source read {}", source.display()),
            format!("change write {}", source.display()),
            format!("read read {}", self.path("elsewhere/readable")),
            format!("output make {output}"),
            format!("write make {}", self.path("elsewhere")),
            format!("others read {}", self.foreign.display()),
            "sysctl write /proc/sys/kernel/core_pattern".into(),
            "run make /run".into(),
            "units make /run/systemd/system".into(),
            "udev make /run/udev".into(),
            format!("device write {}", device.unwrap_or(&"/dev/mem")),
            format!("unix unix {}", self.path("socket")),
            format!("abstract abstract {}", self.abstract_name),
            format!("tcp tcp {}", self.port),
            format!("signal signal {target}"),
            "calls calls".into(),
            "caps caps".into(),
            "nnp nnp".into(),
        ]
        .join("\n")
    }

    /// Runs hyper2kvm and returns the results of the probes, program by program.
    fn run(&self, who: Who, case: &Case<'_>) -> (Run, BTreeMap<String, Answers>) {
        let source = case.source.clone().unwrap_or(self.source.clone());
        let bin = self.stand.path().join("bin");
        let _ = fs::remove_dir_all(&bin);
        fs::create_dir(&bin).unwrap();
        for program in case.programs {
            fs::copy(self.probe(), bin.join(program)).unwrap();
            let real = self.stand.path().join("real").join(program);
            if let Some(path) = hyper2kvm::tool::find(program)
                && !real.exists()
            {
                symlink(path, real).unwrap();
            }
        }
        let answers = self.lab.path("answers");
        let file = File::create(&answers).unwrap();
        fcntl_setfd(&file, FdFlags::empty()).unwrap();
        let mut command = match who {
            Who::Root => Command::new(self.lab.path("hyper2kvm")),
            Who::User => {
                let mut command = Command::new("setpriv");
                command.args(AS_USER);
                command.arg(self.lab.path("hyper2kvm"));
                command
            }
        };
        let output = case.output.clone().unwrap_or(self.path("out"));
        let path = std::env::var("PATH").unwrap();
        command
            .args(&case.args)
            .current_dir(self.lab.dir.path())
            .env("PATH", format!("{}:{path}", text(&bin)))
            .env("HOME", self.lab.path("home"))
            .env("TMPDIR", self.lab.path("tmp"))
            .env_remove("XDG_RUNTIME_DIR")
            .env("PROBE_FD", file.as_raw_fd().to_string())
            .env("PROBE_DO", self.attempts(who, &source, &output))
            .env("PROBE_REAL", self.stand.path().join("real"))
            .env("PROBE_STOP", case.stop)
            .env("LD_LIBRARY_PATH", self.libraries());
        if let Some(point) = case.point {
            let start = case.start.clone().unwrap_or(self.probe());
            let start = format!("{point}=start:{}", start.display());
            command.env("HYPER2KVM_FAILPOINT", start);
        }
        let run = finish(command);
        drop(file);
        let mut found: BTreeMap<String, Answers> = BTreeMap::new();
        for line in fs::read_to_string(answers).unwrap().lines() {
            let mut fields = line.split('\t');
            let program = found.entry(fields.next().unwrap().into()).or_default();
            for (column, answer) in fields.filter_map(|f| f.split_once('=')) {
                program
                    .entry(column.into())
                    .or_default()
                    .insert(answer.into());
            }
        }
        (run, found)
    }
}

/// A run of hyper2kvm.
#[derive(Default)]
struct Case<'p> {
    args: Vec<String>,
    /// Programs with stand-ins; those in `stop` fail instead of becoming the real program.
    programs: &'p [&'p str],
    stop: &'p str,
    /// The place at which the verb itself is tested.
    point: Option<&'p str>,
    /// The program that tests it, instead of the probe.
    start: Option<PathBuf>,
    source: Option<PathBuf>,
    output: Option<String>,
}

/// The value of a cell: "yes" if one of its attempts succeeded once.
fn cell(answers: &Answers, attempts: &[&str]) -> String {
    let given: BTreeSet<&str> = attempts
        .iter()
        .filter_map(|attempt| answers.get(*attempt))
        .flatten()
        .map(String::as_str)
        .collect();
    match given {
        given if given.contains("yes") => "yes".into(),
        given if given.iter().all(|answer| *answer == "no") => "no".into(),
        given => given.into_iter().collect::<Vec<_>>().join(" "),
    }
}

/// The sets of capabilities that are not empty, as their names: `CapEff:2` is `CAP_DAC_OVERRIDE`.
fn capabilities(answers: &Answers) -> String {
    let mut all = BTreeSet::new();
    for set in answers["caps"].iter().flat_map(|sets| sets.split(',')) {
        let Some((_, bits)) = set.split_once(':') else {
            assert_eq!(set, "none");
            continue;
        };
        let bits = u64::from_str_radix(bits, 16).unwrap();
        all.insert(match bits {
            0b10 => "`DAC_OVERRIDE`",
            0b1011 => "`CHOWN`, `DAC_OVERRIDE`, `FOWNER`",
            _ => "root's",
        });
    }
    match all.len() {
        0 => "none".into(),
        _ => all.into_iter().collect::<Vec<_>>().join(" or "),
    }
}

#[derive(Default)]
struct Table {
    rows: Vec<(String, Option<Answers>, Option<Answers>)>,
}

impl Table {
    fn add(&mut self, name: &str, who: Who, answers: Answers) {
        let at = match self.rows.iter().position(|row| row.0 == name) {
            Some(at) => at,
            None => {
                self.rows.push((name.into(), None, None));
                self.rows.len() - 1
            }
        };
        match who {
            Who::Root => self.rows[at].1 = Some(answers),
            Who::User => self.rows[at].2 = Some(answers),
        }
    }

    fn text(&self) -> String {
        let mut heads: Vec<&str> = COLUMNS.iter().map(|c| c.0).collect();
        heads.extend(["capabilities of root", "may gain more"]);
        let mut table = format!(
            "| | {} |\n|{}\n",
            heads.join(" | "),
            "---|".repeat(heads.len() + 1)
        );
        for (name, root, user) in &self.rows {
            let mut cells = Vec::new();
            let both = |value: &dyn Fn(&Answers) -> String| {
                let (root, user) = (root.as_ref().map(value), user.as_ref().map(value));
                match (root, user) {
                    (Some(root), Some(user)) if root == user => root,
                    (Some(root), Some(user)) if root == "yes" && user == "no" => "root".into(),
                    // The user whose appliance may be run by a daemon that outlives the run.
                    (Some(root), Some(user))
                        if name == GUESTFISH && root == "no" && user == "yes" =>
                    {
                        "user".into()
                    }
                    (Some(root), Some(user)) => panic!("{name}: root {root}, a user {user}"),
                    (Some(one), None) | (None, Some(one)) => one,
                    (None, None) => panic!("{name} was not tried"),
                }
            };
            for (_, attempts) in COLUMNS {
                cells.push(both(&|answers| cell(answers, attempts)));
            }
            cells.push(root.as_ref().map_or("none".into(), capabilities));
            cells.push(both(&|answers| cell(answers, &["nnp"])));
            table += &format!("| {name} | {} |\n", cells.join(" | "));
        }
        table
    }

    fn compare(&self) {
        const START: &str = "<!-- privileges: generated by tests/confinement/main.rs -->\n";
        const END: &str = "<!-- privileges: end -->\n";
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/security.md");
        let page = fs::read_to_string(&file).unwrap();
        let (before, rest) = page.split_once(START).unwrap();
        let (old, after) = rest.split_once(END).unwrap();
        let table = self.text();
        if std::env::var_os("HYPER2KVM_UPDATE").is_some() {
            fs::write(&file, format!("{before}{START}{table}{END}{after}")).unwrap();
            return;
        }
        let rows = |table: &str| table.lines().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(rows(old), rows(&table), "HYPER2KVM_UPDATE=1 updates it");
    }
}

const READER: &str = "`ssh` and `--source-command` of a source on the wire";
const GUESTFISH: &str = "`guestfish`";

/// Restrictions of every program that reads a disk, whatever the table has.
fn nothing_of_root(name: &str, who: Who, answers: &Answers, capabilities_kept: &str) {
    let no = |column: &str| {
        let given = answers.get(column);
        assert!(
            given.is_none_or(|a| !a.contains("yes")),
            "{name} as {who:?}: {column} {answers:?}"
        );
    };
    for column in ["sysctl", "run", "units", "udev", "device", "nnp"] {
        no(column);
    }
    if who == Who::Root {
        assert_eq!(capabilities(answers), capabilities_kept, "{name}");
    } else {
        // Those a user may have are in the bounding set alone.
        let sets = answers["caps"].iter().flat_map(|sets| sets.split(','));
        let beyond: Vec<_> = sets
            .filter(|s| *s != "none" && !s.starts_with("CapBnd"))
            .collect();
        assert!(beyond.is_empty(), "{name}: {beyond:?}");
    }
    if capabilities_kept == "none" {
        no("others");
    }
}

const CONFINED: [&str; 3] = ["qemu-storage-daemon", "qemu-img", "virt-xml-validate"];

/// The library that has access to the hive alone.
const LIBHIVEX: &str = "libhivex in its child";

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| (*arg).to_owned()).collect()
}

#[test]
fn no_program_can_do_what_its_work_does_not_take() {
    let needed = ["cc", "readelf", "setpriv", "virt-xml-validate"];
    if !have(&TOOLS) || !have(&needed) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return skip(
            "root",
            "root can try it as a user, too; a user cannot try it as root",
        );
    }
    let place = Place::new();
    if place.landlock() < LANDLOCK {
        let version = place.landlock();
        return skip(
            "landlock",
            format!("this kernel has version {version} of landlock, the table is of {LANDLOCK}"),
        );
    }
    let mut table = Table::default();
    for who in [Who::Root, Who::User] {
        eprintln!("{who:?}");
        programs_of_convert(&place, who, &mut table);
        other_programs(&place, who, &mut table);
        verbs(&place, who, &mut table);
    }
    images_of_others(&place, &mut table);
    table.rows.sort_by_key(|row| row.0.starts_with("hyper2kvm"));
    table.compare();
}

/// Converts, also in place, with stand-ins for every program.
fn programs_of_convert(place: &Place, who: Who, table: &mut Table) {
    let (drivers, disk) = (place.path("drivers"), place.lab.path("work.qcow2"));
    for in_place in [false, true] {
        fs::copy(&place.source, &disk).unwrap();
        if who == Who::User {
            chown(&disk, Some(USER), Some(USER)).unwrap();
        }
        let out = place.path("out/vm");
        // Has the domains validated.
        let patch = place.path("patch.xml");
        fs::write(&patch, "<domain><iothreads>1</iothreads></domain>").unwrap();
        let mut args = vec!["convert", text(&disk), "--virtio-iso", &drivers, "-o", &out];
        args.extend(["--xml-patch", &patch]);
        args.extend(in_place.then_some("--in-place"));
        let case = Case {
            args: strings(&args),
            programs: &CONFINED,
            source: Some(disk.clone()),
            ..Case::default()
        };
        let (run, mut found) = place.run(who, &case);
        run.expect(0);
        for program in CONFINED {
            let answers = found
                .remove(program)
                .unwrap_or_else(|| panic!("{program} was not started"));
            nothing_of_root(program, who, &answers, "none");
            let name = match in_place {
                true => format!("`{program}`, in place"),
                false => format!("`{program}`"),
            };
            table.add(&name, who, answers);
        }
        let answers = found.remove("libhivex").unwrap();
        nothing_of_root(LIBHIVEX, who, &answers, "none");
        let able: Vec<_> = answers.iter().filter(|(_, a)| a.contains("yes")).collect();
        assert!(able.is_empty(), "{able:?}");
        table.add(LIBHIVEX, who, answers);
        fs::remove_dir_all(&out).unwrap();
    }
}

/// Programs with more access than to their disk.
fn other_programs(place: &Place, who: Who, table: &mut Table) {
    let case = Case {
        args: strings(&["inspect", text(&place.source), "--engine", "guestfish"]),
        programs: &["guestfish"],
        stop: "guestfish",
        ..Case::default()
    };
    let (run, mut found) = place.run(who, &case);
    let answers = found.remove("guestfish");
    let answers = answers.unwrap_or_else(|| panic!("guestfish: {}", run.stderr));
    nothing_of_root(GUESTFISH, who, &answers, "none");
    table.add(GUESTFISH, who, answers);
    // As `convert` starts it for a Linux guest.
    let script = place.lab.path("virt-v2v");
    let launch = format!(
        "#!/bin/sh\nexec {} __exec $PPID files-of-others -- {}\n",
        place.path("hyper2kvm"),
        text(&place.probe())
    );
    fs::write(&script, launch).unwrap();
    fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
    let case = Case {
        args: strings(&[
            "convert",
            text(&place.source),
            "-o",
            &place.path("out/linux"),
        ]),
        start: Some(script),
        point: Some("confined"),
        ..Case::default()
    };
    let (run, mut found) = place.run(who, &case);
    let answers = found.remove("probe");
    let answers = answers.unwrap_or_else(|| panic!("virt-v2v: {}", run.stderr));
    nothing_of_root("virt-v2v", who, &answers, "`DAC_OVERRIDE`");
    table.add("`virt-v2v`", who, answers);
    // Started by the child that connects, like `ssh`.
    let case = Case {
        args: strings(&["inspect", "vm", "--source-command", "reader"]),
        programs: &["reader"],
        stop: "reader",
        ..Case::default()
    };
    let (run, mut found) = place.run(who, &case);
    assert_eq!(run.code, 1, "{}", run.stderr);
    let answers = found.remove("reader");
    let answers = answers.unwrap_or_else(|| panic!("the reader: {}", run.stderr));
    nothing_of_root(READER, who, &answers, "none");
    for column in [
        "change", "output", "write", "sysctl", "run", "units", "udev", "device", "nnp",
    ] {
        assert!(!answers[column].contains("yes"), "{READER}: {answers:?}");
    }
    table.add(READER, who, answers);
    // As the launcher is asked for them by `boot` and `doctor --install`.
    for (name, flags, kept) in [
        (
            "`virsh` of a system's libvirt, `mkntfs`, `--version`",
            &["no-privileges", "writes-named"][..],
            Some("none"),
        ),
        (
            "`cp -p` and `chcon` of `boot`",
            &["owners-of-files", "writes-named"],
            Some("`CHOWN`, `DAC_OVERRIDE`, `FOWNER`"),
        ),
        (
            "`virsh` of a session's libvirt, `sudo`",
            &["privileges"],
            None,
        ),
    ] {
        let parent = std::process::id().to_string();
        let probe = place.probe();
        let case = Case {
            args: strings(&[&["__exec", &parent], flags, &["--", text(&probe)]].concat()),
            ..Case::default()
        };
        let (run, mut found) = place.run(who, &case);
        let answers = found.remove("probe");
        let answers = answers.unwrap_or_else(|| panic!("{name}: {}", run.stderr));
        if let Some(kept) = kept {
            nothing_of_root(name, who, &answers, kept);
        }
        table.add(name, who, answers);
    }
}

/// The image of another user, which root reads as root.
fn images_of_others(place: &Place, table: &mut Table) {
    let case = Case {
        args: strings(&["inspect", text(&place.foreign)]),
        programs: &CONFINED,
        source: Some(place.foreign.clone()),
        ..Case::default()
    };
    let (run, found) = place.run(Who::Root, &case);
    run.expect(0);
    for (program, answers) in found {
        nothing_of_root(&program, Who::Root, &answers, "`DAC_OVERRIDE`");
        let name = format!("`{program}`, an image of another user");
        table.add(&name, Who::Root, answers);
    }
}

/// The verbs themselves.
fn verbs(place: &Place, who: Who, table: &mut Table) {
    let (drivers, disk) = (place.path("drivers"), place.lab.path("work.qcow2"));
    fs::copy(&place.source, &disk).unwrap();
    if who == Who::User {
        chown(&disk, Some(USER), Some(USER)).unwrap();
    }
    let disk_name = text(&disk);
    let out = place.path("out/vm");
    let convert = ["convert", disk_name, "--virtio-iso", &drivers, "-o", &out];
    let convert_with = |more: &[&str]| strings(&[&convert[..], more].concat());
    let confined: [(&str, Vec<String>, Option<String>); 8] = [
        ("`inspect`", strings(&["inspect", disk_name]), None),
        (
            "`plan`",
            strings(&["plan", disk_name, "--virtio-iso", &drivers]),
            None,
        ),
        ("`convert --dry-run`", convert_with(&["--dry-run"]), None),
        ("`verify`", strings(&["verify", disk_name]), None),
        ("`drivers`", strings(&["drivers", &drivers]), None),
        ("`convert`", convert_with(&[]), None),
        (
            "`convert --in-place`",
            convert_with(&["--in-place", "--force"]),
            None,
        ),
        (
            "`rollback`",
            strings(&["rollback", &out]),
            Some(out.clone()),
        ),
    ];
    for (name, args, output) in confined {
        let case = Case {
            args,
            point: Some("confined"),
            source: Some(disk.clone()),
            output,
            ..Case::default()
        };
        let (run, mut found) = place.run(who, &case);
        let codes: &[i32] = if name == "`verify`" { &[4] } else { &[0] };
        assert!(
            codes.contains(&run.code),
            "{name}: {} {}",
            run.code,
            run.stderr
        );
        let answers = found.remove("probe").unwrap();
        for column in ["sysctl", "run", "units", "udev", "device", "nnp", "write"] {
            assert!(!answers[column].contains("yes"), "{name}: {answers:?}");
        }
        table.add(&format!("hyper2kvm {name}"), who, answers);
    }
    let _ = fs::remove_dir_all(&out);
    let folder = place.path("out/demo");
    for (name, point, args) in [
        (
            "hyper2kvm `doctor`, `demo`, `boot`, `rehearse`",
            "before qemu-img version #1",
            strings(&["doctor"]),
        ),
        (
            "hyper2kvm `doctor`, `demo`, `boot`, `rehearse`",
            "before mkntfs quick #1",
            strings(&["demo", &folder]),
        ),
    ] {
        let case = Case {
            args,
            point: Some(point),
            ..Case::default()
        };
        let (run, mut found) = place.run(who, &case);
        let answers = found.remove("probe");
        let answers = answers.unwrap_or_else(|| panic!("{name}: {}", run.stderr));
        table.add(name, who, answers);
    }
    let _ = fs::remove_dir_all(&folder);
}
