//! Runs the commands in the documents, and checks them with the parser.

use super::*;

fn script(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Stand-ins that do nothing, for programs that act on other hosts, on libvirt or on the repository.
const ELSEWHERE: [&str; 6] = ["git", "scp", "ssh", "virsh", "VBoxManage", "sudo"];

/// Builds nothing; the programs it would run or build have to exist. `cargo run -- ...` is
/// hyper2kvm.
const CARGO: &str = r#"
case $1 in +*) shift ;; esac
case $1 in
  run|test|check|build|install|auditable|deb|generate-rpm|mutants) ;;
  *) echo "cargo $1?" >&2; exit 1 ;;
esac
runs=$1
while [ $# -gt 0 ]; do
  case $1 in
    --example) runs=$root/examples/$2.rs; test -f "$runs" || exit 1 ;;
    --test) test -e "$root/tests/$2.rs" || test -e "$root/tests/$2/main.rs" || exit 1 ;;
    --in-diff) test -e "$2" || exit 1 ;;
    --)
      shift
      [ "$runs" = mutants ] && exec test -d "$root/src/${1%::}"
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
        // These disks are not encrypted, so no key is requested; `tests/engines/` has encrypted
        // ones.
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
        // The documents that start with the result of a conversion.
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
        if document.ends_with("contributing.md") {
            let campaign = root().join(".ci/campaign");
            let part = format!(
                "mkdir .ci && printf '#!/bin/sh\\ngrep -q ^part_$1 {}\\n' > .ci/campaign && chmod +x .ci/campaign",
                campaign.display()
            );
            desk.run(&name, 0, &part);
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

/// A block is run, or is for another host, or is not a command.
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

/// clap's objection to a command line. A document may leave out required arguments, and writes `N`
/// or `a|b` for values.
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
