//! The documents and the report page: what they show is run, and what is generated is up to date.
//!
//! Every command shown is run. A fenced block marked `sh` in README.md or `docs/` is run by a shell, in one
//! directory per document, with disks and machines made by hyper2kvm under the names the documents use
//! (`docs/fleet/` by `tests/fleet.rs`, `docs/linux.md` by `tests/linux.rs`). Programs that act on other hosts,
//! build or need a virtual machine are stood in for: those check that what they are given is there.
//! hyper2kvm itself is real, but for the verbs that install packages or need a libvirtd (`tests/boot/` runs
//! those), and for sources on other hosts (`tests/wire/`): of these the arguments are checked. Commands and options named in the text go through the
//! program's own parser. Blocks marked `text` are for other hosts, or output.
//!
//! `HYPER2KVM_UPDATE=1 cargo test --test docs` writes the generated documents anew.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{CommandFactory, Parser};
use hyper2kvm::cli::Cli;
use hyper2kvm::demo::{GuestSpec, WinVersion};
use hyper2kvm::tool::host::PackageManager;
use serde_json::Value;
use support::{Lab, TOOLS, binary, blocks, have, tool, virtio_win};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README.md and every page in `docs/` and `docs/fleet/`.
fn documents() -> Vec<PathBuf> {
    let mut documents: Vec<PathBuf> = fs::read_dir(root().join("docs"))
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "md"))
        .collect();
    documents.push(root().join("README.md"));
    documents.push(root().join("docs/fleet/README.md"));
    documents.sort();
    documents
}

fn script(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Programs that act on other hosts, or on this one's libvirt: they do nothing.
const ELSEWHERE: [&str; 5] = ["scp", "ssh", "virsh", "VBoxManage", "sudo"];

/// Builds nothing; what it would run or build has to be there. `cargo run -- ...` is hyper2kvm.
const CARGO: &str = r#"
case $1 in +*) shift ;; esac
case $1 in
  run|test|check|build|install|auditable|deb|generate-rpm) ;;
  *) echo "cargo $1?" >&2; exit 1 ;;
esac
runs=$1
while [ $# -gt 0 ]; do
  case $1 in
    --example) runs=$root/examples/$2.rs; test -f "$runs" || exit 1 ;;
    --test) test -e "$root/tests/$2.rs" || test -e "$root/tests/$2/main.rs" || exit 1 ;;
    --)
      shift
      [ "$runs" = run ] && exec hyper2kvm "$@"
      for arg; do
        case $arg in --*) grep -q "\"$arg\"" "$runs" || { echo "no $arg" >&2; exit 1; } ;; esac
      done
      exit ;;
  esac
  shift
done
"#;

/// Needs the appliance; `tests/engines/` runs the real one.
const VIRT_WIN_REG: &str = r#"
for arg; do
  case $arg in *.raw|*.reg) test -s "$arg" || { echo "no $arg" >&2; exit 1; } ;; esac
done
"#;

/// Documents whose commands another test runs, because it has the guests for them.
const RUN_ELSEWHERE: [&str; 2] = ["linux.md", "fleet/README.md"];

/// A directory with everything the documents name.
struct Desk {
    lab: Lab,
}

impl Desk {
    fn new() -> Self {
        let lab = Lab::new(GuestSpec::new(WinVersion::Server2022));
        let bin = lab.path("bin");
        fs::create_dir(&bin).unwrap();
        for program in ELSEWHERE {
            script(&bin.join(program), "#!/bin/sh\nexit 0\n");
        }
        let cargo = format!("#!/bin/sh\nroot='{}'{CARGO}", root().display());
        script(&bin.join("cargo"), &cargo);
        let virt_win_reg = format!("#!/bin/sh{VIRT_WIN_REG}");
        script(&bin.join("virt-win-reg"), &virt_win_reg);
        script(
            &bin.join("hyper2kvm"),
            &format!(
                "#!/bin/sh\ncase \"$1 $*\" in\n\
                 boot*|rehearse*|*--install*|*://*|*--source-command*) exec {0} \"$@\" --help > help.txt ;;\n\
                 esac\nexec {0} \"$@\"\n",
                binary()
            ),
        );
        let desk = lab.path("desk");
        fs::create_dir(&desk).unwrap();
        for (format, name) in [
            ("vmdk", "disk.vmdk"),
            ("vhdx", "disk.vhdx"),
            ("vpc", "disk.vhd"),
            ("raw", "disk.raw"),
        ] {
            let made = lab.in_format(format, "", name);
            fs::rename(made, desk.join(name)).unwrap();
        }
        fs::hard_link(desk.join("disk.vmdk"), desk.join("vm.vmdk")).unwrap();
        fs::hard_link(desk.join("disk.raw"), desk.join("copy.raw")).unwrap();
        // These disks are not encrypted, so nothing asks for it; `tests/engines/` has such that are.
        fs::write(desk.join("recovery-key"), "none\n").unwrap();
        fs::write(
            desk.join("vm.vmx"),
            "displayName = \"vm\"\nmemsize = \"4096\"\nnumvcpus = \"2\"\nfirmware = \"efi\"\n\
             sata0.present = \"TRUE\"\nsata0:0.present = \"TRUE\"\nsata0:0.fileName = \"vm.vmdk\"\n",
        )
        .unwrap();
        ova(&lab, &desk);
        let iso = desk.join("virtio-win.iso");
        tool(
            "genisoimage",
            &[
                "-quiet",
                "-J",
                "-r",
                "-o",
                iso.to_str().unwrap(),
                virtio_win().to_str().unwrap(),
            ],
        );
        Self { lab }
    }

    fn run(&self, document: &str, at: usize, body: &str) {
        let desk = self.lab.path("desk");
        let path = std::env::var("PATH").unwrap();
        let out = Command::new("sh")
            .args(["-e", "-c", body])
            .current_dir(&desk)
            .env("PATH", format!("{}:{path}", self.lab.path("bin").display()))
            .env("HYPER2KVM_VIRTIO_ISO", desk.join("virtio-win.iso"))
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{document}:{at}: {}\n{body}\n{}{}",
            out.status,
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
    }
}

fn ova(lab: &Lab, desk: &Path) {
    let disk = lab.in_format("vmdk", "subformat=streamOptimized", "ova-disk1.vmdk");
    let size = fs::metadata(&lab.raw).unwrap().len();
    let ovf = lab.path("vm.ovf");
    fs::write(
        &ovf,
        format!(
            r#"<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
 <References><File ovf:id="file1" ovf:href="ova-disk1.vmdk"/></References>
 <DiskSection><Info>disks</Info><Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:capacity="{size}"/></DiskSection>
 <VirtualSystem ovf:id="vm"><Info>vm</Info><Name>vm</Name>
  <VirtualHardwareSection><Info>hardware</Info>
   <Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
   <Item><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:AllocationUnits>MegaBytes</rasd:AllocationUnits><rasd:VirtualQuantity>4096</rasd:VirtualQuantity></Item>
   <Item><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceType>20</rasd:ResourceType><rasd:ResourceSubType>AHCI</rasd:ResourceSubType><rasd:Address>0</rasd:Address></Item>
   <Item><rasd:InstanceID>4</rasd:InstanceID><rasd:ResourceType>17</rasd:ResourceType><rasd:Parent>3</rasd:Parent><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/d1</rasd:HostResource></Item>
  </VirtualHardwareSection>
 </VirtualSystem>
</Envelope>
"#
        ),
    )
    .unwrap();
    let folder = lab.dir.path().to_str().unwrap();
    tool(
        "tar",
        &[
            "-C",
            folder,
            "-cf",
            desk.join("vm.ova").to_str().unwrap(),
            "vm.ovf",
            "ova-disk1.vmdk",
        ],
    );
    fs::remove_file(disk).unwrap();
}

#[test]
fn the_commands_of_the_documents_run() {
    if !have(&TOOLS) || !have(&["jq", "genisoimage", "tar", "virt-xml"]) {
        return;
    }
    let desk = Desk::new();
    let mut ran = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        let name = document.display().to_string();
        let scripts = blocks(&text, "sh");
        if RUN_ELSEWHERE.iter().any(|d| document.ends_with(d)) || scripts.is_empty() {
            continue;
        }
        // Where a document starts with what a conversion left.
        let left = ["engines.md", "machines.md"];
        if left.iter().any(|d| document.ends_with(d)) {
            let hive = "hyper2kvm convert vm.vmdk && cp vm-kvm/backup/DRIVERS .";
            desk.run(&name, 0, hive);
        }
        if document.ends_with("releasing.md") {
            let built = "mkdir -p target/release .ci && ln -s $(command -v hyper2kvm) target/release/ \
                         && printf '#!/bin/sh\\n' > .ci/run && chmod +x .ci/run";
            desk.run(&name, 0, built);
        }
        for (at, body) in scripts {
            desk.run(&name, at, &body);
            ran += 1;
        }
        // What one document made must not be in the way of the next.
        for entry in fs::read_dir(desk.lab.path("desk")).unwrap().flatten() {
            if entry.path().is_dir() {
                fs::remove_dir_all(entry.path()).unwrap();
            }
        }
    }
    assert!(ran >= 20, "only {ran} blocks were found");
}

/// A block is run, or is for another host, or is no command at all.
#[test]
fn no_command_hides_in_a_block() {
    for document in documents() {
        if document.ends_with("cli.md") {
            continue; // `--help`
        }
        let text = fs::read_to_string(&document).unwrap();
        for kind in ["", "text", "console", "bash", "shell"] {
            for (at, body) in blocks(&text, kind) {
                let ours = ["hyper2kvm ", "cargo ", "virsh ", "virt-", "qemu-", "sh "];
                let hidden = body.lines().find(|l| {
                    let line = l.trim_start().trim_start_matches("$ ");
                    ours.iter().any(|program| line.starts_with(program))
                });
                assert!(
                    hidden.is_none(),
                    "{}:{at}: {hidden:?} is not in a block marked `sh`",
                    document.display()
                );
            }
        }
    }
}

/// The code between backticks, outside of blocks.
fn spans(text: &str) -> Vec<String> {
    let mut prose = String::new();
    let mut inside = false;
    for line in text.lines() {
        if line.starts_with("```") {
            inside = !inside;
        } else if !inside {
            prose.push_str(line);
            prose.push(' ');
        }
    }
    let parts: Vec<&str> = prose.split('`').collect();
    assert!(parts.len() % 2 == 1, "a backtick has no partner");
    let odd = parts.iter().skip(1).step_by(2);
    odd.map(|part| part.trim().to_string()).collect()
}

/// What clap has against a command line. A document may leave out what is required, and writes `N` or
/// `a|b` for values.
fn objection(command: &str) -> Option<String> {
    use clap::error::ErrorKind as Clap;
    let words: Vec<String> = command
        .split_whitespace()
        .take_while(|w| !["|", "||", "&&", ";", ";;", ">", "2>", "<", "#"].contains(w))
        .map(|w| w.trim_matches(['\'', '"', ';', '[', ']']).to_string())
        .filter(|w| w != "...")
        .collect();
    let error = Cli::try_parse_from(&words).err()?;
    let placeholder = |w: &String| {
        let value = w.rsplit('=').next().unwrap_or_default();
        w.contains('|') || value.chars().all(|c| c.is_ascii_uppercase())
    };
    match error.kind() {
        Clap::MissingRequiredArgument | Clap::MissingSubcommand => None,
        Clap::InvalidValue | Clap::ValueValidation if words.iter().any(placeholder) => None,
        // An option named without its value.
        Clap::InvalidValue if error.to_string().contains("none was supplied") => None,
        _ => Some(error.to_string()),
    }
}

/// Every command and option of hyper2kvm that a document names exists.
#[test]
fn commands_in_the_text_are_understood() {
    for (command, right) in [
        ("hyper2kvm convert d.vmdk --force", true),
        ("hyper2kvm convert d.vmdk --vcpus N | jq", true),
        ("hyper2kvm convert d.vmdk --farce", false),
        ("hyper2kvm convart d.vmdk", false),
        ("hyper2kvm convert d.vmdk --vcpus many", false),
    ] {
        assert_eq!(objection(command).is_none(), right, "{command}");
    }
    let program = Cli::command();
    let verbs: Vec<&str> = program.get_subcommands().map(|v| v.get_name()).collect();
    let options: Vec<&str> = program
        .get_subcommands()
        .chain([&program])
        .flat_map(|v| v.get_arguments().filter_map(|a| a.get_long()))
        .chain(["help", "version"])
        .collect();
    let (mut looked_at, mut wrong) = (0, Vec::new());
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        let name = document.display();
        let mut commands = Vec::new();
        for kind in ["sh", "text", ""] {
            for (_, body) in blocks(&text, kind) {
                let lines = body.replace("\\\n", " ");
                for line in lines.lines() {
                    let starts = line.match_indices("hyper2kvm ").map(|(at, _)| at);
                    let first = |at: &usize| {
                        let before = line[..*at].trim_end();
                        before.is_empty() || before.ends_with(['|', '&', '(', ')', ';'])
                    };
                    let ours = starts.filter(first).map(|at| line[at..].to_string());
                    commands.extend(ours.filter(|_| !document.ends_with("cli.md")));
                }
            }
        }
        for span in spans(&text) {
            let (first, rest) = span.split_once(' ').unwrap_or((&span, ""));
            if first == "hyper2kvm" && !rest.is_empty() && !NAMES.contains(&rest) {
                commands.push(span);
            } else if verbs.contains(&first) && !rest.is_empty() {
                commands.push(format!("hyper2kvm {span}"));
            } else if let Some(option) = first.strip_prefix("--") {
                let option = option.split(['=', ',', '|']).next().unwrap_or_default();
                looked_at += 1;
                if !options.contains(&option) && !OF_OTHERS.contains(&option) {
                    wrong.push(format!("{name}: there is no option {first}"));
                }
            }
        }
        for command in commands {
            looked_at += 1;
            if let Some(why) = objection(&command) {
                wrong.push(format!("{name}: {command}\n{why}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(looked_at > 150, "{looked_at}");
}

/// Not commands: the name of the first boot's service.
const NAMES: [&str; 1] = ["first boot"];

/// Options of other programs that documents name on their own.
const OF_OTHERS: [&str; 1] = ["ostype"];

/// The tests that `docs/reliability.md` names are there.
#[test]
fn the_tests_that_are_named_exist() {
    let mut code = String::new();
    let mut left = vec![root().join("tests"), root().join("src")];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                code += &fs::read_to_string(path).unwrap();
            }
        }
    }
    let page = fs::read_to_string(root().join("docs/reliability.md")).unwrap();
    let (_, page) = page.split_once("<!-- steps: end -->").unwrap();
    let named: Vec<String> = spans(page)
        .into_iter()
        .filter(|span| {
            let plain = |c: char| c.is_ascii_lowercase() || c == '_';
            span.contains('_') && span.chars().all(plain)
        })
        .collect();
    assert!(named.len() > 50, "{named:?}");
    for name in named {
        let test = format!("#[test]\nfn {name}()");
        let unit = format!("#[test]\n    fn {name}()");
        assert!(
            code.contains(&test) || code.contains(&unit),
            "no test {name}"
        );
    }
}

fn help(args: &[&str]) -> String {
    let out = Command::new(binary())
        .args(args)
        .arg("--help")
        .env("COLUMNS", "100")
        .env_remove("HYPER2KVM_VIRTIO_ISO")
        .env_remove("LIBVIRT_DEFAULT_URI")
        .output()
        .unwrap();
    assert!(out.status.success(), "{args:?}");
    let text = String::from_utf8(out.stdout).unwrap();
    text.lines()
        .map(|l| l.trim_end().to_string() + "\n")
        .collect()
}

/// `docs/cli.md`
fn reference() -> String {
    let main = help(&[]);
    let verbs: Vec<&str> = main
        .lines()
        .skip_while(|l| *l != "Commands:")
        .skip(1)
        .take_while(|l| !l.is_empty())
        .filter_map(|l| l.strip_prefix("  ")?.split_whitespace().next())
        .filter(|v| *v != "help")
        .collect();
    assert!(verbs.len() >= 11, "{verbs:?}");
    let mut text = format!(
        "# Command line reference\n\nGenerated from `--help` by `tests/docs.rs`; do not edit.\n\n\
         ```text\n{main}```\n"
    );
    for verb in verbs {
        text += &format!("\n## hyper2kvm {verb}\n\n```text\n{}```\n", help(&[verb]));
    }
    text
}

#[test]
fn the_command_line_reference_is_up_to_date() {
    let path = root().join("docs/cli.md");
    let made = reference();
    if std::env::var_os("HYPER2KVM_UPDATE").is_some() {
        fs::write(&path, &made).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == made,
        "docs/cli.md is out of date: HYPER2KVM_UPDATE=1 cargo test --test docs"
    );
}

/// A number of `docs/bench.json`, or `-`.
fn shown(row: &Value, what: &str, digits: usize) -> String {
    let number = row[what].as_f64();
    number.map_or("-".to_owned(), |n| format!("{n:.digits$}"))
}

/// The tables and the time line of `docs/performance.md`, from what `cargo run --example bench` has written.
fn measured(bench: &Value) -> String {
    let (rows, mut text) = (&bench["rows"], String::new());
    text += &format!(
        "Medians of {} rounds, {} MiB of live data, on {}. Seconds.\n",
        bench["rounds"],
        bench["live_mib"],
        bench["machine"].as_str().unwrap_or("a machine")
    );
    text += "\n| disk | live of all, MiB | convert, everything | of it the copy | plain `qemu-img convert` | the floor: live data only | ours / floor |\n|---|---|---|---|---|---|---|\n";
    for name in ["deleted", "full", "many", "sparse"] {
        let row = &rows[name];
        if row.is_object() {
            text += &format!(
                "| `{name}` | {} of {} | {} | {} | {} | {} | {} |\n",
                row["live_mib"],
                row["virtual_mib"],
                shown(row, "convert_s", 2),
                shown(row, "copy_s", 2),
                shown(row, "plain_s", 2),
                shown(row, "floor_s", 2),
                shown(row, "to_floor", 2),
            );
        }
    }
    let full = &rows["full"];
    if full["compress_s"].is_number() {
        text += &format!(
            "\n`full` with `--compress`: {} s, everything; `qemu-img convert -c` of its live data with zstd: {} s.\n",
            shown(full, "compress_s", 2),
            shown(full, "compress_floor_s", 2)
        );
    }
    let fix = &rows["fix"];
    let hives = match fix["real_hives"].as_bool() {
        Some(true) => "real hives (SYSTEM 12 MB, SOFTWARE 38 MB)",
        _ => "generated hives",
    };
    text += &format!(
        "\n| Windows 7 on 2 GiB, {hives} | measured |\n|---|---|\n\
         | inspect | {} s |\n| inspect, plan, fix, trim, verify | {} s |\n\
         | peak memory of hyper2kvm | {} MiB |\n| programs started by the conversion | {} |\n",
        shown(fix, "inspect_s", 3),
        shown(fix, "before_copy_s", 3),
        shown(fix, "peak_mib", 0),
        fix["programs"],
    );
    text += "\nThe time line of one such conversion, in milliseconds:\n\n```text\n";
    text += &drawn(fix["timeline"].as_array().map_or(&[], Vec::as_slice));
    text + "```\n"
}

/// One line for each step that takes a millisecond.
fn drawn(timeline: &[Value]) -> String {
    const WIDTH: f64 = 60.0;
    let at = |row: &Value, i: usize| row[i].as_f64().unwrap_or_default();
    let end = timeline.iter().map(|row| at(row, 1)).fold(1.0, f64::max);
    let long = timeline.iter().filter(|row| at(row, 1) - at(row, 0) >= 1.0);
    let column = |ms: f64| (ms / end * WIDTH).round() as usize;
    let line = |row: &Value| {
        let (from, to) = (at(row, 0), at(row, 1));
        let bar = "#".repeat((column(to) - column(from)).max(1));
        format!(
            "{:>4.0} {:>4.0} |{:<61}| {}\n",
            from,
            to,
            format!("{}{bar}", " ".repeat(column(from))),
            row[2].as_str().unwrap_or_default()
        )
    };
    long.map(line).collect()
}

/// Without a date, since who measures anew replaces it as a whole.
#[test]
fn the_tables_of_performance_are_those_that_were_measured() {
    const BEGIN: &str = "<!-- from docs/bench.json -->\n";
    const END: &str = "<!-- end -->\n";
    let bench = fs::read(root().join("docs/bench.json")).unwrap();
    let made = measured(&serde_json::from_slice(&bench).unwrap());
    let path = root().join("docs/performance.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (kept, after) = rest.split_once(END).unwrap();
    if std::env::var_os("HYPER2KVM_UPDATE").is_some() {
        return fs::write(&path, format!("{before}{BEGIN}{made}{END}{after}")).unwrap();
    }
    assert!(
        kept == made,
        "docs/performance.md is out of date: HYPER2KVM_UPDATE=1 cargo test --test docs"
    );
}

/// Man pages and completions are made by the program itself, so they cannot be older than it.
#[test]
fn man_pages_and_completions_are_complete() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("man");
    support::h2k(["man", folder.to_str().unwrap()]).expect(0);
    for verb in [
        "",
        "-inspect",
        "-convert",
        "-verify",
        "-boot",
        "-rehearse",
        "-rollback",
    ] {
        let page = fs::read_to_string(folder.join(format!("hyper2kvm{verb}.1"))).unwrap();
        assert!(page.contains(".SH NAME"), "{verb}");
    }
    let page = fs::read_to_string(folder.join("hyper2kvm-convert.1")).unwrap();
    assert!(page.contains("virtio\\-iso"), "{page}");
    let bash = support::h2k(["completions", "bash"]).expect(0).stdout;
    assert!(bash.contains("--virtio-iso"));
    let file = dir.path().join("hyper2kvm.bash");
    fs::write(&file, bash).unwrap();
    tool("bash", &["-n", file.to_str().unwrap()]);
}

/// The report of a conversion and the summary of a batch in a real browser, on a desk and on a telephone.
#[test]
fn the_reports_can_be_looked_at() {
    if !have(&TOOLS) || !have(&["chromium"]) {
        return;
    }
    let lab = Lab::new(GuestSpec::new(WinVersion::Server2022));
    lab.convert(&lab.raw, &[]).expect(0);
    // One machine that is done, one that never will be, under a name no line is long enough for.
    let damaged = format!("{}.raw", "damaged".repeat(12));
    fs::write(lab.path(&damaged), vec![7; 1 << 20]).unwrap();
    let list = format!(
        "output-dir: all\ndefaults:\n  virtio-iso: {}\nmachines:\n- source: guest.raw\n- source: {damaged}\n",
        virtio_win().display()
    );
    fs::write(lab.path("fleet.yaml"), list).unwrap();
    support::h2k([
        "convert",
        "--batch",
        lab.path("fleet.yaml").to_str().unwrap(),
    ])
    .expect(101);

    let pages = ["out/report.html", "all/fleet-report.html"];
    for page in pages {
        let text = fs::read_to_string(lab.path(page)).unwrap();
        for outside in ["<script", "src=", "http://", "https://", "@import", "url("] {
            assert!(
                !text.contains(outside),
                "{page} is not self-contained: {outside}"
            );
        }
    }
    for seen in look(&lab, &pages) {
        let number = |key: &str| seen[key].as_u64().unwrap();
        assert!(
            number("scroll") <= number("width"),
            "wider than the window: {seen}"
        );
        assert_eq!((number("small"), number("wide")), (0, 0), "{seen}");
        if seen["page"] == pages[0] {
            // Four controllers twice, and the rest; and the registry keys.
            assert!(number("chains") == 9 && number("keys") > 30, "{seen}");
        } else {
            assert_eq!((number("rows"), number("links")), (3, 1), "{seen}");
        }
    }
    for (page, file) in pages.iter().zip(["report", "summary"]) {
        let page = lab.path(page);
        for width in [1280, 400] {
            let png = lab.path(&format!("{file}-{width}.png"));
            browser(
                &lab,
                &[
                    &format!("--screenshot={}", png.display()),
                    &format!("--window-size={width},1600"),
                    "--hide-scrollbars",
                ],
                &page,
            );
            let png = fs::read(png).unwrap();
            assert_eq!(&png[1..4], b"PNG");
            let size = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
            assert_eq!((size(16), size(20)), (width, 1600));
            let least = if file == "report" { 30_000 } else { 8_000 };
            assert!(png.len() > least, "the page is blank: {}", png.len());
        }
        let pdf = lab.path(&format!("{file}.pdf"));
        browser(&lab, &[&format!("--print-to-pdf={}", pdf.display())], &page);
        assert!(fs::read(pdf).unwrap().starts_with(b"%PDF"));
    }
}

/// Has the browser open each page in a frame of each width and tell what it finds.
fn look(lab: &Lab, pages: &[&str]) -> Vec<Value> {
    let harness = lab.path("harness.html");
    let wanted = serde_json::to_string(pages).unwrap();
    fs::write(
        &harness,
        format!("<!DOCTYPE html><title>wait</title><body><script>const pages = {wanted};\n")
            + "const said = [];\n\
         function look(page, width) { return new Promise(done => {\n\
           const f = document.createElement('iframe');\n\
           f.style = `width:${width}px;height:4000px;border:0`;\n\
           f.onload = () => { const d = f.contentDocument, e = d.documentElement;\n\
             d.querySelectorAll('details').forEach(x => x.open = true);\n\
             const all = [...d.body.querySelectorAll('*')];\n\
             const count = what => d.querySelectorAll(what).length;\n\
             const small = all.filter(x => x.innerText && parseFloat(f.contentWindow.getComputedStyle(x).fontSize) < 12).length;\n\
             const wide = all.filter(x => x.getBoundingClientRect().right > width + 1).length;\n\
             said.push(JSON.stringify({page, width, scroll: e.scrollWidth, small, wide, chains: count('.chain'),\n\
               keys: count('td[colspan]'), rows: count('tr'), links: count('td a')}));\n\
             done(); };\n\
           f.src = page; document.body.append(f); }); }\n\
         (async () => { for (const page of pages) { await look(page, 1280); await look(page, 400); }\n\
           document.body.innerHTML = '<pre>' + said.join('\\n') + '</pre>'; document.title = 'done'; })();\n\
         </script></body>",
    )
    .unwrap();
    let args = ["--dump-dom", "--virtual-time-budget=20000"];
    let dom = browser(lab, &args, &harness);
    let lines = dom
        .lines()
        .filter_map(|l| l.find('{').zip(l.rfind('}')).map(|(a, b)| &l[a..=b]));
    let seen: Vec<Value> = lines.filter_map(|l| serde_json::from_str(l).ok()).collect();
    assert_eq!(seen.len(), 2 * pages.len(), "the browser said: {dom}");
    seen
}

/// Runs headless Chromium; what a page writes to the console is an error.
fn browser(lab: &Lab, args: &[&str], page: &Path) -> String {
    let out = Command::new("timeout")
        .args([
            "120",
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
        ])
        .args([
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            "--log-level=0",
        ])
        .arg(format!("--user-data-dir={}", lab.path("browser").display()))
        .args(args)
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{stderr}");
    let said: Vec<_> = stderr.lines().filter(|l| l.contains("CONSOLE")).collect();
    assert!(said.is_empty(), "{said:?}");
    String::from_utf8(out.stdout).unwrap()
}

/// Licences whose code may be linked into a program under GPL-3.0-or-later. Apache-2.0 goes with version 3,
/// not with version 2 (Free Software Foundation, "Various Licenses and Comments about Them").
const COMPATIBLE: [&str; 12] = [
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "Unlicense",
    "BSL-1.0",
    "Unicode-3.0",
    "GPL-2.0-or-later",
    "GPL-3.0-or-later",
    "Apache-2.0",
];

/// Whether an SPDX expression, or cargo's older `A/B`, can be met.
fn compatible(expression: &str) -> bool {
    let text = expression.replace(['(', ')'], " ").replace('/', " OR ");
    text.split(" AND ").all(|all| {
        all.split(" OR ")
            .any(|one| COMPATIBLE.contains(&one.trim()))
    })
}

#[test]
fn every_linked_crate_has_a_compatible_licence() {
    for (expression, verdict) in [
        ("MIT OR Apache-2.0", true),
        ("Apache-2.0 / MIT", true),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
        ("Apache-2.0 AND ISC", true),
        ("GPL-2.0-only", false),
        ("MIT AND OpenSSL", false),
        ("", false),
    ] {
        assert_eq!(compatible(expression), verdict, "{expression}");
    }
    let out = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--offline", "--edges", "normal"])
        .args(["--prefix", "none", "--format", "{p}|{l}"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let text = String::from_utf8(out.stdout).unwrap();
    let mut crates: Vec<_> = text
        .lines()
        .filter_map(|l| l.split_once('|'))
        .map(|(p, l)| (p, l.trim_end_matches(" (*)")))
        .collect();
    crates.sort_unstable();
    crates.dedup();
    assert!(crates.len() > 30, "{}", crates.len());
    for (package, licence) in crates {
        assert!(compatible(licence), "{package}: {licence:?}");
    }
}

/// `rust-version`, what CI compiles with, and what the page says are one.
#[test]
fn the_oldest_rust_is_the_same_everywhere() {
    let read = |file: &str| fs::read_to_string(root().join(file)).unwrap();
    let oldest = env!("CARGO_PKG_RUST_VERSION");
    assert!(!oldest.is_empty());
    assert!(read(".ci/run").contains(&format!("oldest={oldest}\n")));
    assert!(read("docs/releasing.md").contains(&format!("cargo +{oldest} check")));
}

/// The packages depend on what `doctor` calls required.
#[test]
fn packages_ask_for_the_tools() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let depends = manifest
        .lines()
        .find(|l| l.starts_with("depends = "))
        .unwrap();
    let requires = manifest
        .split("[package.metadata.generate-rpm.requires]")
        .nth(1)
        .and_then(|s| s.split("\n[").next())
        .unwrap();
    for tool in hyper2kvm::tool::host::TOOLS.iter().filter(|t| t.required) {
        let (apt, dnf) = (
            tool.package(PackageManager::Apt),
            tool.package(PackageManager::Dnf),
        );
        assert!(depends.contains(apt), "{}: {apt}", tool.name);
        assert!(requires.contains(dnf), "{}: {dnf}", tool.name);
    }
}

/// A source package holds what the build and the packages need, and nothing that only this repository uses.
#[test]
fn the_source_package_is_complete() {
    let out = Command::new(env!("CARGO"))
        .args(["package", "--list", "--allow-dirty", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let files: Vec<&str> = text.lines().collect();
    assert!(
        out.status.success() && files.len() > 100,
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    for file in [
        "Cargo.lock",
        "LICENSE",
        "README.md",
        "docs/boot.md",
        "docs/fleet/Containerfile",
        "drivers/windows.yaml",
        "packaging/changelog",
        "packaging/copyright",
        "src/main.rs",
    ] {
        assert!(files.contains(&file), "{file} is missing");
    }
    let only_here = ["tests/", ".ci/", "fuzz/", "target/", ".git"];
    let odd = files
        .iter()
        .find(|f| only_here.iter().any(|o| f.starts_with(o)));
    assert_eq!(odd, None);
}

/// The packages carry a version, a maintainer that can be written to, and no debug symbols.
#[test]
fn the_package_metadata_agrees() {
    let read = |file: &str| fs::read_to_string(root().join(file)).unwrap();
    let manifest = read("Cargo.toml");
    let field = |name: &str| {
        let line = manifest
            .lines()
            .find(|l| l.starts_with(&format!("{name} = ")));
        let line = line.unwrap_or_else(|| panic!("no {name}"));
        line.split_once(" = ")
            .unwrap()
            .1
            .trim_matches('"')
            .to_string()
    };
    let (version, maintainer) = (field("version"), field("maintainer"));
    let changelog = read("packaging/changelog");
    assert!(
        changelog.starts_with(&format!("hyper2kvm ({version}-1) ")),
        "{changelog}"
    );
    assert!(
        changelog.contains(&format!(" -- {maintainer}  ")),
        "{maintainer}"
    );
    assert!(maintainer.contains(" <") && maintainer.ends_with('>'));
    let copyright = read("packaging/copyright");
    assert!(copyright.contains("License: GPL-3+") && manifest.contains("GPL-3.0-or-later"));
    let (_, release) = manifest.split_once("[profile.release]\n").unwrap();
    let release = release.split("\n[").next().unwrap();
    assert!(release.lines().any(|l| l == "strip = true"), "{release}");
    assert!(
        !release.lines().any(|l| l.starts_with("debug")),
        "{release}"
    );
}

/// Every page can be printed by the program, so who has only that can read what a hint names.
#[test]
fn the_program_prints_its_documents() {
    let list = support::h2k(["docs"]).expect(0).stdout;
    for document in documents() {
        let name = match document.file_stem().unwrap().to_str().unwrap() {
            "README" if document.parent().unwrap().ends_with("fleet") => "fleet".to_string(),
            name => name.to_lowercase(),
        };
        assert!(
            list.lines()
                .any(|l| l.split_whitespace().next() == Some(&name)),
            "{name}: {list}"
        );
    }
    let page = support::h2k(["docs", "troubleshooting"]).expect(0).stdout;
    let kept = fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    assert_eq!(page.trim_end(), kept.trim_end());
    let unknown = support::h2k(["docs", "nothing"]).expect(2);
    assert!(
        unknown.stderr.contains("troubleshooting"),
        "{}",
        unknown.stderr
    );
}

/// What a newcomer needs before the first command works.
#[test]
fn newcomers_are_told_what_they_need() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let oldest = format!("Rust {}", env!("CARGO_PKG_RUST_VERSION"));
    for word in [
        oldest.as_str(),
        "rustup.rs",
        ".deb",
        ".rpm",
        "Containerfile",
    ] {
        assert!(readme.contains(word), "{word}");
    }
    let origin = support::h2k(["drivers", "--where"]).expect(0).stdout;
    let current = hyper2kvm::drivers::origin::CURRENT;
    assert!(readme.contains(current) && origin.contains(current));
    assert!(origin.contains("0.1.173") && origin.contains("Windows 7"));
    // The build of the container has what the program is built from.
    let ignored = fs::read_to_string(root().join(".dockerignore")).unwrap();
    let container = fs::read_to_string(root().join("docs/fleet/Containerfile")).unwrap();
    for part in ["src", "drivers", "docs", "README.md"] {
        assert!(ignored.lines().any(|l| l == format!("!{part}")), "{part}");
        assert!(
            container.contains(&format!("COPY {part} {part}\n")),
            "{part}"
        );
    }
}

/// The rule of docs/architecture.md. The lint is on for every target; what takes it off is here.
#[test]
fn unsafe_stands_in_two_directories() {
    let mut found = Vec::new();
    let mut open = vec![root().join("src"), root().join("examples")];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if fs::read_to_string(&path).is_ok_and(|t| t.contains("(unsafe_code)")) {
                let path = path.strip_prefix(root()).unwrap();
                found.push(path.to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    let allowed = ["src/guest/ntfs3g/mod.rs", "src/registry/libhivex/mod.rs"];
    assert_eq!(found, allowed);
    let page = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    for folder in ["`guest/ntfs3g/`", "`registry/libhivex/`"] {
        assert!(page.contains(folder), "{folder}");
    }
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    assert!(manifest.contains("\nunsafe_code = \"deny\"\n"));
}
