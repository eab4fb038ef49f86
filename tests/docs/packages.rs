//! Licences, packages and what they ask for.

use super::*;

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
