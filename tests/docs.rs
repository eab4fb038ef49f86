//! The documents and the report page: what they show is run, and what is generated is up to date.
//!
//! A fenced block marked `sh` in README.md or `docs/` is run by a shell, in one folder per document,
//! with disks and machines of our own making under the names the documents use. Programs that act on other
//! hosts are stood in for; hyper2kvm itself is real, but for the verbs that install packages or need a
//! libvirtd (`tests/boot/` runs those): of these the arguments are checked.
//!
//! `HYPER2KVM_UPDATE=1 cargo test --test docs` writes the generated documents anew.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use hyper2kvm::demo::{GuestSpec, WinVersion};
use hyper2kvm::tool::host::PackageManager;
use support::{Lab, TOOLS, binary, have, tool, virtio_win};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README.md and everything in `docs/`.
fn documents() -> Vec<PathBuf> {
    let mut documents: Vec<PathBuf> = fs::read_dir(root().join("docs"))
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "md"))
        .collect();
    documents.push(root().join("README.md"));
    documents.sort();
    documents
}

/// The fenced blocks of a document with this info string, with their line numbers.
fn blocks(text: &str, kind: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut open: Option<(usize, bool, String)> = None;
    for (i, line) in text.lines().enumerate() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(info)) => open = Some((i + 2, info == kind, String::new())),
            (None, None) => {}
            (Some(_), Some(_)) => {
                if let Some((at, true, body)) = open.take() {
                    found.push((at, body));
                }
            }
            (Some((_, _, body)), None) => {
                body.push_str(line);
                body.push('\n');
            }
        }
    }
    assert!(open.is_none(), "a block is not closed");
    found
}

fn script(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Programs that act on other hosts, or on this one's libvirt: they do nothing.
const ELSEWHERE: [&str; 6] = ["scp", "ssh", "virsh", "VBoxManage", "sudo", "cargo"];

/// A folder with everything the documents name.
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
        script(
            &bin.join("hyper2kvm"),
            &format!(
                "#!/bin/sh\ncase \"$1 $*\" in\n\
                 boot*|*--install*) exec {0} \"$@\" --help > help.txt ;;\n\
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
    if !have(&TOOLS) || !have(&["jq", "genisoimage", "tar"]) {
        return;
    }
    let desk = Desk::new();
    let mut ran = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        let name = document.display().to_string();
        for (at, body) in blocks(&text, "sh") {
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
    assert!(ran >= 15, "only {ran} blocks were found");
}

/// Every `hyper2kvm ...` in inline code or blocks of every document names verbs and options that exist.
#[test]
fn options_named_in_documents_exist() {
    let known = reference();
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for (i, line) in text.lines().enumerate() {
            for part in line.split('`').flat_map(|p| p.split("hyper2kvm ").skip(1)) {
                let mut words = part.split_whitespace();
                let verb = words.next().unwrap_or_default();
                if !known.contains(&format!("## hyper2kvm {verb}\n")) {
                    continue; // prose
                }
                let section = known
                    .split(&format!("## hyper2kvm {verb}\n"))
                    .nth(1)
                    .and_then(|s| s.split("\n## ").next())
                    .unwrap_or_default();
                for option in words
                    .take_while(|w| !["|", "||", ";", ">", "2>", "#"].contains(w))
                    .filter(|w| w.starts_with("--"))
                {
                    let name: String = option
                        .chars()
                        .take_while(|c| c.is_ascii_alphanumeric() || *c == '-')
                        .collect();
                    assert!(
                        section.contains(&name),
                        "{}:{}: {verb} has no {name}",
                        document.display(),
                        i + 1
                    );
                }
            }
        }
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

/// Man pages and completions are made by the program itself, so they cannot be older than it.
#[test]
fn man_pages_and_completions_are_complete() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("man");
    support::h2k(["man", folder.to_str().unwrap()]).expect(0);
    for verb in ["", "-inspect", "-convert", "-verify", "-boot", "-rollback"] {
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

/// The report in a real browser, on a desk and on a telephone.
#[test]
fn the_report_can_be_looked_at() {
    if !have(&TOOLS) || !have(&["chromium"]) {
        return;
    }
    let lab = Lab::new(GuestSpec::new(WinVersion::Server2022));
    lab.convert(&lab.raw, &[]).expect(0);
    let report = lab.path("out/report.html");
    let text = fs::read_to_string(&report).unwrap();
    for outside in ["<script", "src=", "http://", "https://", "@import", "url("] {
        assert!(
            !text.contains(outside),
            "the page is not self-contained: {outside}"
        );
    }

    // The browser opens the page in a frame of that width and tells what it finds.
    let harness = lab.path("harness.html");
    fs::write(
        &harness,
        "<!DOCTYPE html><title>wait</title><body><script>\n\
         const said = [];\n\
         function look(width) { return new Promise(done => {\n\
           const f = document.createElement('iframe');\n\
           f.style = `width:${width}px;height:4000px;border:0`;\n\
           f.onload = () => { const d = f.contentDocument, e = d.documentElement;\n\
             d.querySelectorAll('details').forEach(x => x.open = true);\n\
             const all = [...d.body.querySelectorAll('*')];\n\
             const small = all.filter(x => x.innerText && parseFloat(f.contentWindow.getComputedStyle(x).fontSize) < 12).length;\n\
             const wide = all.filter(x => x.getBoundingClientRect().right > width + 1).length;\n\
             said.push(`width=${width} scroll=${e.scrollWidth} small=${small} wide=${wide} chains=${d.querySelectorAll('.chain').length} keys=${d.querySelectorAll('td[colspan]').length}`);\n\
             done(); };\n\
           f.src = 'out/report.html'; document.body.append(f); }); }\n\
         (async () => { await look(1280); await look(400);\n\
           document.body.innerHTML = '<pre>' + said.join('\\n') + '</pre>'; document.title = 'done'; })();\n\
         </script></body>",
    )
    .unwrap();
    let dom = browser(
        &lab,
        &["--dump-dom", "--virtual-time-budget=20000"],
        &harness,
    );
    for width in [1280, 400] {
        let line = dom
            .lines()
            .find(|l| l.contains(&format!("width={width} ")))
            .unwrap_or_else(|| panic!("the browser said nothing of {width}: {dom}"));
        let scroll = line
            .split("scroll=")
            .nth(1)
            .and_then(|s| s.split(' ').next());
        let scroll: u32 = scroll.unwrap().parse().unwrap();
        assert!(scroll <= width, "wider than the window: {line}");
        assert!(line.contains("small=0 wide=0"), "{line}");
        assert!(
            line.contains("chains=9"),
            "four controllers twice, and the rest: {line}"
        );
        let keys = line.rsplit("keys=").next().unwrap();
        let keys: usize = keys.split('<').next().unwrap().trim().parse().unwrap();
        assert!(keys > 30, "the registry keys are not all there: {line}");
    }
    for width in [1280, 400] {
        let png = lab.path(&format!("{width}.png"));
        browser(
            &lab,
            &[
                &format!("--screenshot={}", png.display()),
                &format!("--window-size={width},1600"),
                "--hide-scrollbars",
            ],
            &report,
        );
        let png = fs::read(png).unwrap();
        assert_eq!(&png[1..4], b"PNG");
        let size = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
        assert_eq!((size(16), size(20)), (width, 1600));
        assert!(png.len() > 30_000, "the page is blank");
    }
    let pdf = lab.path("report.pdf");
    browser(
        &lab,
        &[&format!("--print-to-pdf={}", pdf.display())],
        &report,
    );
    assert!(fs::read(pdf).unwrap().starts_with(b"%PDF"));
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

/// Licences whose code may be linked into a program under GPL-2.0-or-later. Apache-2.0 alone may not
/// (Free Software Foundation, "Various Licenses and Comments about Them").
const COMPATIBLE: [&str; 10] = [
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
        ("Apache-2.0", false),
        ("MIT AND Apache-2.0", false),
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
