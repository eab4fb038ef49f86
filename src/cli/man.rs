//! `hyper2kvm man [FOLDER]`: the man pages, one per verb, generated from the same definitions as
//! `--help`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::CommandFactory;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::error::{Error, Result};
use crate::ui::Ui;

#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// Directory for one page per command; without it the main page goes to stdout
    folder: Option<PathBuf>,
}

/// Commands of each verb with their descriptions.
const EXAMPLES: &[(&str, &[(&str, &str)])] = &[
    (
        "",
        &[
            (
                "hyper2kvm doctor --install",
                "Install the host tools, and show what this host is ready for.",
            ),
            (
                "hyper2kvm inspect disk.vmdk",
                "Show what is on a disk and what a conversion has to fix.",
            ),
            (
                "hyper2kvm convert disk.vmdk --virtio-iso virtio-win.iso",
                "Write the output directory disk-kvm.",
            ),
            (
                "hyper2kvm boot disk-kvm",
                "Boot it twice on libvirt: bootstrap, then VirtIO.",
            ),
        ],
    ),
    (
        "inspect",
        &[
            (
                "hyper2kvm inspect vm.vmx",
                "A machine: all its disks are looked at.",
            ),
            (
                "hyper2kvm inspect /exports",
                "Every disk and VM below a directory, as a table.",
            ),
            (
                "hyper2kvm inspect disk.vmdk --json",
                "One JSON document on standard output.",
            ),
        ],
    ),
    (
        "plan",
        &[(
            "hyper2kvm plan disk.vmdk --virtio-iso virtio-win.iso",
            "Show the exact actions, and what blocks them.",
        )],
    ),
    (
        "convert",
        &[
            (
                "hyper2kvm convert disk.vmdk --virtio-iso virtio-win.iso",
                "Write disk-kvm: disk, domain XML, report.",
            ),
            (
                "hyper2kvm convert vm.ova -o /srv/vm --storage virtio-scsi",
                "Another directory, another controller.",
            ),
            (
                "hyper2kvm convert --batch fleet.yaml",
                "Many VMs, some at a time.",
            ),
        ],
    ),
    (
        "verify",
        &[
            (
                "hyper2kvm verify disk-kvm",
                "An output directory, from the controllers its report names.",
            ),
            (
                "hyper2kvm verify disk.qcow2 --controller virtio-blk",
                "A disk, from one controller.",
            ),
        ],
    ),
    (
        "boot",
        &[
            ("hyper2kvm boot disk-kvm", "Both boots on qemu:///system."),
            (
                "hyper2kvm boot disk-kvm --install-to /var/lib/libvirt/images",
                "Move the disks to where libvirt can read them first.",
            ),
        ],
    ),
    (
        "pull",
        &[(
            "hyper2kvm pull disk-kvm",
            "Copy what convert --copy later has left on the source.",
        )],
    ),
    (
        "release",
        &[(
            "hyper2kvm release disk-kvm",
            "Give such a directory up, with its domain.",
        )],
    ),
    (
        "rollback",
        &[(
            "hyper2kvm rollback disk-kvm",
            "Undo a fix made with convert --in-place.",
        )],
    ),
    (
        "drivers",
        &[
            (
                "hyper2kvm drivers virtio-win.iso",
                "Which Windows a driver source has drivers for.",
            ),
            (
                "hyper2kvm drivers --where",
                "Where virtio-win comes from, and which release old Windows needs.",
            ),
        ],
    ),
    (
        "demo",
        &[(
            "hyper2kvm demo --install",
            "Convert a small sample guest in ./hyper2kvm-demo.",
        )],
    ),
    (
        "doctor",
        &[(
            "hyper2kvm doctor",
            "Ready to convert, to boot, to rehearse? One line each.",
        )],
    ),
    (
        "docs",
        &[
            ("hyper2kvm docs", "List the pages."),
            ("hyper2kvm docs troubleshooting", "Print one."),
        ],
    ),
    (
        "completions",
        &[(
            "hyper2kvm completions bash > /etc/bash_completion.d/hyper2kvm",
            "For all users of a host.",
        )],
    ),
    (
        "man",
        &[(
            "hyper2kvm man /usr/local/share/man/man1",
            "Install the pages for all users of a host.",
        )],
    ),
];

const ENVIRONMENT: &[(&str, &str)] = &[
    (
        "HYPER2KVM_VIRTIO_ISO",
        "Driver source where --virtio-iso is not given.",
    ),
    (
        "HYPER2KVM_LOG",
        "Filter of the log on standard error, e.g. hyper2kvm=debug.",
    ),
    (
        "LIBVIRT_DEFAULT_URI",
        "libvirt where --connect is not given.",
    ),
    (
        "NO_COLOR",
        "When set and not empty: no colours. TERM=dumb has none either.",
    ),
    ("TMPDIR", "Where temporary files are made."),
];

const FILES: &[(&str, &str)] = &[
    (
        "/usr/share/virtio-win/virtio-win.iso",
        "Driver source where none is named.",
    ),
    (
        "./NAME-kvm/",
        "Output directory: disks, domain XML, report.json, report.html, plan.json, journal.json, registry/, backup/.",
    ),
    (
        "./.NAME-kvm.partial/",
        "The same while a conversion is at work.",
    ),
    (
        "/usr/share/doc/hyper2kvm/",
        "The documentation of a package; hyper2kvm-docs(1) prints the same.",
    ),
];

pub fn run(args: &ManArgs, ui: &Ui) -> Result<()> {
    let failed = |e: io::Error| Error::failed("writing the man pages").because(e);
    match &args.folder {
        Some(folder) => {
            std::fs::create_dir_all(folder).map_err(failed)?;
            for command in commands() {
                let page = page(&command).map_err(failed)?;
                let name = format!("{}.1", display_name(&command));
                std::fs::write(folder.join(name), page).map_err(failed)?;
            }
            Ok(())
        }
        None => {
            let main = commands().pop();
            let page = main.map_or_else(|| Ok(Vec::new()), |main| page(&main));
            ui.raw(&String::from_utf8_lossy(&page.map_err(failed)?));
            Ok(())
        }
    }
}

/// Every verb, then the program itself.
fn commands() -> Vec<clap::Command> {
    let mut program = super::Cli::command().disable_help_subcommand(true);
    program.build();
    let verbs = program.get_subcommands().filter(|v| !v.is_hide_set());
    let mut commands: Vec<clap::Command> = verbs.cloned().collect();
    commands.push(program);
    commands
}

fn display_name(command: &clap::Command) -> String {
    command
        .get_display_name()
        .unwrap_or(command.get_name())
        .to_string()
}

fn page(command: &clap::Command) -> io::Result<Vec<u8>> {
    let is_program = command.has_subcommands();
    let verb = if is_program { "" } else { command.get_name() };
    let man = Man::new(command.clone())
        .source(concat!("hyper2kvm ", env!("CARGO_PKG_VERSION")))
        .manual("User Commands");
    let mut out = Vec::new();
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;
    if is_program {
        man.render_subcommands_section(&mut out)?;
    }
    exit_status(&mut out)?;
    pairs(&mut out, "ENVIRONMENT", ENVIRONMENT)?;
    pairs(&mut out, "FILES", FILES)?;
    let help = format!("hyper2kvm {verb} --help");
    let help = [(help.as_str(), "Show its options.")];
    let examples = EXAMPLES.iter().find(|(of, _)| *of == verb);
    pairs(
        &mut out,
        "EXAMPLES",
        examples.map_or(&help[..], |(_, list)| *list),
    )?;
    see_also(&mut out, verb)?;
    Ok(out)
}

fn exit_status(out: &mut Vec<u8>) -> io::Result<()> {
    let mut roff = Roff::default();
    roff.control("SH", ["EXIT STATUS"]);
    roff.control("nf", []);
    for line in super::EXIT_CODES.lines() {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
    roff.to_writer(out)
}

fn pairs(out: &mut Vec<u8>, heading: &str, pairs: &[(&str, &str)]) -> io::Result<()> {
    if pairs.is_empty() {
        return Ok(());
    }
    let mut roff = Roff::default();
    roff.control("SH", [heading]);
    for (name, what) in pairs {
        roff.control("TP", []);
        roff.text([bold(*name)]);
        roff.text([roman(*what)]);
    }
    roff.to_writer(out)
}

fn see_also(out: &mut Vec<u8>, verb: &str) -> io::Result<()> {
    let own = |name: &str| match verb {
        "" => name.to_string(),
        _ => "hyper2kvm".to_string(),
    };
    let mut pages = vec![own("hyper2kvm-convert")];
    pages.extend(["hyper2kvm-docs", "qemu-img", "virsh", "virt-v2v"].map(str::to_string));
    pages.retain(|page| *page != format!("hyper2kvm-{verb}"));
    let pages: Vec<String> = pages.iter().map(|page| format!("{page}(1)")).collect();
    let mut roff = Roff::default();
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(pages.join(", "))]);
    roff.to_writer(out)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn every_page_has_its_sections() {
        let commands = commands();
        assert!(commands.len() > 10);
        for command in &commands {
            let name = display_name(command);
            let page = String::from_utf8(page(command).unwrap()).unwrap();
            for section in [
                "NAME",
                "SYNOPSIS",
                "DESCRIPTION",
                "\"EXIT STATUS\"",
                "ENVIRONMENT",
                "FILES",
                "EXAMPLES",
                "\"SEE ALSO\"",
            ] {
                let heading = format!(".SH {section}\n");
                assert_eq!(page.matches(&heading).count(), 1, "{name}: {section}");
            }
        }
    }

    #[test]
    fn the_examples_are_commands() {
        for (verb, examples) in EXAMPLES {
            for (example, _) in *examples {
                let words = example.split_whitespace().take_while(|w| *w != ">");
                if let Err(error) = super::super::Cli::try_parse_from(words) {
                    panic!("{verb}: {example}: {error}");
                }
            }
        }
    }
}
