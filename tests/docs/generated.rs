//! Generated documents are up to date.

use super::*;

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
        "# Command line reference\n\nGenerated from `--help` by `tests/docs/`; do not edit.\n\n\
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
    text += &going_on(rows);
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

/// Copies of the disk `full`: with a journal, resumed, and the last pass of a sync.
fn going_on(rows: &Value) -> String {
    let (journal, resumed, last) = (&rows["journal"], &rows["resumed"], &rows["last"]);
    if [journal, resumed, last].iter().any(|row| !row.is_object()) {
        return String::new();
    }
    let left = resumed["left"].as_f64().unwrap_or_default() * 100.0;
    let mut text = "\n| copies of the disk `full` | seconds |\n|---|---|\n".to_owned();
    let mut row = |what: &str, seconds: String| text += &format!("| {what} | {seconds} |\n");
    row(
        "the copy loop, with its journal",
        shown(journal, "with_s", 2),
    );
    row("the copy loop, without", shown(journal, "without_s", 2));
    row(
        "`qemu-img convert -W -m 8`",
        shown(journal, "qemu_img_s", 2),
    );
    row("`nbdcopy --flush`", shown(journal, "nbdcopy_s", 2));
    row("`convert`, cold", shown(resumed, "cold_s", 2));
    row(
        &format!("`convert --resume`, {left:.0} % left"),
        shown(resumed, "resumed_s", 2),
    );
    row("`sync`, the first pass", shown(last, "first_s", 2));
    row(
        "`convert --from-sync`, a tenth changed",
        shown(last, "last_s", 2),
    );
    row("`convert` of all that", shown(last, "cold_s", 2));
    text
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

/// Without a date, because a new measurement replaces it as a whole.
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
