//! The structure of `src/`, read from the text of its files: which file uses which, and that no use runs
//! upwards or in a circle.
//!
//! A file uses another when it names something that is defined there: in a `use` line or in a path inside
//! the code. Names that a `mod.rs` hands on are followed to the file that defines them. Code under
//! `#[cfg(test)]` is left out.
//!
//! Two things are no use here. A parent that declares a child, or hands on its names (`pub use`), does not use
//! it. And a child may name what its parents define: the parent is the room in which it stands, so a `mod.rs`
//! with the types of its directory and a call of each child is no circle. Children among themselves, and all
//! files of different directories, have no such excuse.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Identifiers and single characters, without comments, strings, lifetimes and white space.
fn tokens(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut found = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        let c = chars[i];
        if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && chars[i] != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            while i < chars.len() && !(chars[i] == '*' && at(i + 1) == '/') {
                i += 1;
            }
            i += 2;
        } else if let Some(end) = raw_string(&chars, i) {
            i = end;
        } else if c == '"' {
            i += 1;
            while i < chars.len() && chars[i] != '"' {
                i += if chars[i] == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if c == '\'' {
            // A character ends in a quote, a lifetime does not.
            if at(i + 1) == '\\' {
                i += 3;
                while i < chars.len() && chars[i] != '\'' {
                    i += 1;
                }
                i += 1;
            } else if at(i + 2) == '\'' {
                i += 3;
            } else {
                i += 1;
                while word(at(i)) {
                    i += 1;
                }
            }
        } else if word(c) {
            let start = i;
            while word(at(i)) {
                i += 1;
            }
            found.push(chars[start..i].iter().collect());
        } else {
            if !c.is_whitespace() {
                found.push(c.to_string());
            }
            i += 1;
        }
    }
    found
}

/// Where a raw string that begins at `i` ends.
fn raw_string(chars: &[char], i: usize) -> Option<usize> {
    let before = i.checked_sub(1).map(|b| chars[b]);
    if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
        return None;
    }
    let mut at = i;
    if chars.get(at) == Some(&'b') {
        at += 1;
    }
    if chars.get(at) != Some(&'r') {
        return None;
    }
    at += 1;
    let hashes = chars[at..].iter().take_while(|c| **c == '#').count();
    at += hashes;
    if chars.get(at) != Some(&'"') {
        return None;
    }
    at += 1;
    while at < chars.len() {
        let closes = chars[at] == '"' && chars[at + 1..].iter().take(hashes).all(|c| *c == '#');
        if closes {
            return Some(at + 1 + hashes);
        }
        at += 1;
    }
    Some(at)
}

/// The index after the bracket that closes the one at `open`.
fn after_group(tokens: &[String], open: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => {
                depth -= 1;
                if depth == 0 {
                    return i + 1;
                }
            }
            _ => {}
        }
    }
    tokens.len()
}

/// The tokens without the items under `#[cfg(test)]`, and the names of the modules among those.
fn without_tests(tokens: &[String]) -> Vec<String> {
    let mut kept = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        let attribute = tokens[i] == "#" && tokens.get(i + 1).is_some_and(|t| t == "[");
        if !attribute {
            kept.push(tokens[i].clone());
            i += 1;
            continue;
        }
        let end = after_group(tokens, i + 1);
        let inside = &tokens[i + 2..end - 1];
        let test = inside.first().is_some_and(|t| t == "cfg")
            && inside.iter().any(|t| t == "test")
            && !inside.iter().any(|t| t == "not");
        i = end;
        if !test {
            continue;
        }
        while tokens.get(i).is_some_and(|t| t == "#") {
            i = after_group(tokens, i + 1);
        }
        // The item ends with its first block, or at a semicolon or comma outside brackets.
        while i < tokens.len() {
            match tokens[i].as_str() {
                "(" | "[" => i = after_group(tokens, i),
                "{" => {
                    i = after_group(tokens, i);
                    // `use a::{b};` has a semicolon behind its block.
                    if tokens.get(i).is_some_and(|t| t == ";") {
                        i += 1;
                    }
                    break;
                }
                ";" | "," => {
                    i += 1;
                    break;
                }
                _ => i += 1,
            }
        }
    }
    kept
}

/// A name that a `use` line brings into a module: the name, and the path it stands for.
#[derive(Debug, Clone)]
struct Import {
    name: String,
    path: Vec<String>,
    /// Handed on to others (`pub use`).
    public: bool,
}

/// A module that has a file of its own.
#[derive(Default)]
struct Module {
    file: String,
    tokens: Vec<String>,
    children: BTreeSet<String>,
    imports: Vec<Import>,
    /// What is defined in the file, at whatever depth.
    defines: BTreeSet<String>,
}

/// Module path (`disk::chain`; the crate is the empty path) to module.
type Modules = BTreeMap<Vec<String>, Module>;

fn load(modules: &mut Modules, at: Vec<String>, file: &str) {
    let tokens = without_tests(&tokens(&read(file)));
    let mut module = Module {
        file: file.to_owned(),
        ..Module::default()
    };
    for pair in tokens.windows(2) {
        if matches!(
            pair[0].as_str(),
            "fn" | "struct" | "enum" | "trait" | "type" | "const" | "static" | "macro_rules"
        ) {
            module.defines.insert(pair[1].clone());
        }
    }
    for three in tokens.windows(3) {
        if three[0] == "macro_rules" {
            module.defines.insert(three[2].clone());
        }
        if three[0] == "mod" && three[2] == ";" {
            module.children.insert(three[1].clone());
        }
    }
    module.imports = imports(&tokens);
    module.tokens = tokens;
    let folder = match file.strip_suffix("/mod.rs") {
        Some(folder) => folder.to_owned(),
        None if at.is_empty() => "src".to_owned(),
        None => file.trim_end_matches(".rs").to_owned(),
    };
    let children = module.children.clone();
    modules.insert(at.clone(), module);
    for child in children {
        let mut path = at.clone();
        path.push(child.clone());
        let alone = format!("{folder}/{child}.rs");
        let own_folder = format!("{folder}/{child}/mod.rs");
        let file = if root().join(&alone).exists() {
            alone
        } else {
            own_folder
        };
        load(modules, path, &file);
    }
}

/// The `use` lines of a file.
fn imports(tokens: &[String]) -> Vec<Import> {
    let mut found = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        if tokens[i] != "use" {
            i += 1;
            continue;
        }
        let public = i > 0 && (tokens[i - 1] == "pub" || tokens[i - 1] == ")");
        let end = (i..tokens.len())
            .find(|at| tokens[*at] == ";")
            .unwrap_or(tokens.len());
        tree(&tokens[i + 1..end], &[], public, &mut found);
        i = end;
    }
    found
}

/// One tree of a `use` line, `a::{b, c as d}`.
fn tree(tokens: &[String], before: &[String], public: bool, found: &mut Vec<Import>) {
    let mut path = before.to_vec();
    let mut i = 0;
    while i < tokens.len() {
        match tokens[i].as_str() {
            ":" => {}
            "{" => {
                let inside = &tokens[i + 1..after_group(tokens, i) - 1];
                let mut start = 0;
                let mut at = 0;
                while at <= inside.len() {
                    if at == inside.len() || inside[at] == "," {
                        if start < at {
                            tree(&inside[start..at], &path, public, found);
                        }
                        start = at + 1;
                        at += 1;
                    } else if inside[at] == "{" {
                        at = after_group(inside, at);
                    } else {
                        at += 1;
                    }
                }
                return;
            }
            "as" => {
                let name = tokens[i + 1].clone();
                found.push(Import { name, path, public });
                return;
            }
            "self" if !path.is_empty() => {}
            token => path.push(token.to_owned()),
        }
        i += 1;
    }
    let name = path.last().cloned().unwrap_or_default();
    found.push(Import { name, path, public });
}

struct House {
    modules: Modules,
}

impl House {
    fn read() -> Self {
        let mut modules = Modules::new();
        load(&mut modules, Vec::new(), "src/lib.rs");
        Self { modules }
    }

    /// The module that defines what `path` names, seen from `at`. None: another crate, or a module itself.
    fn resolve(&self, at: &[String], path: &[String], depth: usize) -> Option<Vec<String>> {
        if depth > 12 {
            return None;
        }
        let (mut here, mut rest) = (at.to_vec(), path);
        match rest.first()?.as_str() {
            "crate" => (here, rest) = (Vec::new(), &rest[1..]),
            "self" => rest = &rest[1..],
            "super" => {
                while rest.first().is_some_and(|s| s == "super") {
                    here.pop();
                    rest = &rest[1..];
                }
            }
            first => {
                let module = &self.modules[&here];
                let known = module.children.contains(first)
                    || (module.imports.iter()).any(|i| i.name == first && i.path != path);
                if !known {
                    return None;
                }
            }
        }
        loop {
            let module = &self.modules[&here];
            let name = rest.first()?;
            if module.children.contains(name) {
                here.push(name.clone());
                rest = &rest[1..];
                continue;
            }
            let import = module.imports.iter().find(|i| &i.name == name);
            // A function may have the name of a module that is imported beside it.
            if module.defines.contains(name) && (rest.len() == 1 || import.is_none()) {
                return Some(here);
            }
            if let Some(import) = import {
                if import.path == path {
                    return None;
                }
                let mut path = import.path.clone();
                path.extend_from_slice(&rest[1..]);
                return self.resolve(&here, &path, depth + 1);
            }
            for glob in module.imports.iter().filter(|i| i.name == "*") {
                let mut path = glob.path.clone();
                path.pop();
                path.extend_from_slice(rest);
                if let Some(found) = self.resolve(&here, &path, depth + 1) {
                    return Some(found);
                }
            }
            // A variant, a derived name, what a macro makes: it belongs to this file.
            return Some(here);
        }
    }

    /// The paths that a file names, `use` lines and code.
    fn paths(&self, at: &[String]) -> Vec<Vec<String>> {
        let module = &self.modules[at];
        let mut found: Vec<Vec<String>> = (module.imports.iter())
            .filter(|i| !i.public && i.name != "*")
            .map(|i| i.path.clone())
            .collect();
        let tokens = &module.tokens;
        let mut i = 0;
        while i < tokens.len() {
            if tokens[i] == "use" {
                while i < tokens.len() && tokens[i] != ";" {
                    i += 1;
                }
            }
            let colons = |at: usize| {
                tokens.get(at).is_some_and(|t| t == ":")
                    && tokens.get(at + 1).is_some_and(|t| t == ":")
            };
            let begins = i < tokens.len()
                && tokens[i].starts_with(|c: char| c.is_alphabetic() || c == '_')
                && !(i >= 2 && colons(i - 2))
                && colons(i + 1);
            if !begins {
                i += 1;
                continue;
            }
            let mut path = vec![tokens[i].clone()];
            while colons(i + 1)
                && (tokens.get(i + 3))
                    .is_some_and(|t| t.starts_with(|c: char| c.is_alphabetic() || c == '_'))
            {
                path.push(tokens[i + 3].clone());
                i += 3;
            }
            found.push(path);
            i += 1;
        }
        found
    }

    /// File to the files it uses, each with the names it takes. Parents are left out.
    fn uses(&self) -> BTreeMap<&str, BTreeMap<&str, BTreeSet<String>>> {
        let mut uses: BTreeMap<&str, BTreeMap<&str, BTreeSet<String>>> = BTreeMap::new();
        for (at, module) in &self.modules {
            let of_file = uses.entry(&module.file).or_default();
            for path in self.paths(at) {
                let Some(target) = self.resolve(at, &path, 0) else {
                    continue;
                };
                let parent = at.starts_with(&target);
                let target = &self.modules[&target];
                if !parent {
                    let names = of_file.entry(&target.file).or_default();
                    names.insert(path.last().cloned().unwrap_or_default());
                }
            }
        }
        uses
    }
}

/// The place of a file in the order: its directory, or the file itself when it stands in `src/`.
fn place(file: &str) -> &str {
    let inside = file.trim_start_matches("src/");
    match inside.split_once('/') {
        Some((folder, _)) => folder,
        None => inside.trim_end_matches(".rs"),
    }
}

/// The directories and files of the table in docs/architecture.md, from above to below.
fn order() -> Vec<String> {
    read("docs/architecture.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// Groups of nodes that reach each other.
fn circles<'a>(uses: &BTreeMap<&'a str, BTreeMap<&'a str, BTreeSet<String>>>) -> Vec<Vec<&'a str>> {
    let reach = |from: &'a str| -> BTreeSet<&'a str> {
        let mut seen = BTreeSet::new();
        let mut open = vec![from];
        while let Some(file) = open.pop() {
            for next in uses.get(file).into_iter().flat_map(|u| u.keys()) {
                if seen.insert(*next) {
                    open.push(next);
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&str, BTreeSet<&str>> = uses.keys().map(|f| (*f, reach(f))).collect();
    let mut found: Vec<Vec<&str>> = Vec::new();
    for (file, reaches) in &reached {
        if !reaches.contains(file) || found.iter().any(|c| c.contains(file)) {
            continue;
        }
        let circle = (reaches.iter().copied())
            .filter(|other| reached.get(other).is_some_and(|r| r.contains(file)))
            .collect();
        found.push(circle);
    }
    found
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    let house = House::read();
    let uses = house.uses();
    let mut told = String::new();
    for circle in circles(&uses) {
        told += &format!("circle of {}:\n", circle.len());
        for from in &circle {
            for (to, names) in uses[from].iter().filter(|(to, _)| circle.contains(to)) {
                told += &format!("  {from} -> {to}: {names:?}\n");
            }
        }
    }
    assert!(told.is_empty(), "{told}");
}

#[test]
fn no_file_uses_a_folder_that_stands_above_it_in_the_architecture() {
    let order = order();
    let floor = |file: &str| {
        order
            .iter()
            .position(|name| name == place(file))
            .unwrap_or_else(|| {
                panic!(
                    "docs/architecture.md does not name `{}` ({file})",
                    place(file)
                )
            })
    };
    let house = House::read();
    let mut told = String::new();
    for (from, targets) in house.uses() {
        if from == "src/lib.rs" {
            continue;
        }
        for (to, names) in targets {
            if floor(to) < floor(from) {
                told += &format!("{from} -> {to}: {names:?}\n");
            }
        }
    }
    assert!(told.is_empty(), "{told}");
}

#[test]
fn the_architecture_names_what_stands_in_src_and_lib_rs_has_its_drawing() {
    let lib = tokens(&read("src/lib.rs"));
    let modules: BTreeSet<String> = without_tests(&lib)
        .windows(2)
        .filter(|pair| pair[0] == "mod")
        .map(|pair| pair[1].clone())
        .collect();
    let rows = order();
    assert_eq!(rows.iter().cloned().collect::<BTreeSet<_>>(), modules);
    assert_eq!(rows.len(), modules.len(), "a row stands twice");

    let drawing = |text: &str, begin: &str| -> Vec<String> {
        (text.lines().skip_while(|line| *line != begin).skip(1))
            .map(|line| {
                line.strip_prefix("//! ")
                    .unwrap_or(line)
                    .trim_end()
                    .to_owned()
            })
            .take_while(|line| !line.starts_with("```"))
            .collect()
    };
    let of_document = drawing(&read("docs/architecture.md"), "```");
    assert!(of_document.len() > 5, "{of_document:#?}");
    assert_eq!(drawing(&read("src/lib.rs"), "//! ```text"), of_document);
}

#[test]
fn nothing_below_cli_prints_or_exits() {
    let house = House::read();
    for module in house.modules.values() {
        if ["cli", "ui"].contains(&place(&module.file)) {
            continue;
        }
        // `print_stdout` and `print_stderr` of clippy are denied; here is nothing that allows them.
        for word in [
            "print",
            "println",
            "eprint",
            "eprintln",
            "print_stdout",
            "print_stderr",
        ] {
            let macros = (module.tokens.windows(2)).any(|t| t[0] == word && t[1] == "!");
            let allowed = word.contains('_') && module.tokens.iter().any(|t| t == word);
            assert!(!macros && !allowed, "{}: {word}", module.file);
        }
        let exits = (module.tokens.windows(4))
            .any(|t| t[0] == "process" && t[1] == ":" && t[2] == ":" && t[3] == "exit");
        let names = (module.tokens.windows(4))
            .any(|t| t[0] == ":" && t[1] == ":" && t[2] == "exit" && t[3] == "(");
        assert!(!exits || !names, "{} ends the process", module.file);
    }
}

/// Every file of a directory and below, with one of these endings.
fn files(folder: &Path, endings: &[&str], found: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        match path.is_dir() {
            true => files(&path, endings, found),
            false if endings.contains(&ending) => found.push(path),
            false => {}
        }
    }
}

/// A file has one subject, and a subject fits in so many lines.
#[test]
fn no_file_has_more_than_800_lines() {
    let mut all = Vec::new();
    for folder in ["src", "tests", "examples", "fuzz/fuzz_targets"] {
        files(&root().join(folder), &["rs"], &mut all);
    }
    assert!(all.len() > 300, "{} files", all.len());
    let long: Vec<String> = (all.iter())
        .map(|path| (path, fs::read_to_string(path).unwrap().lines().count()))
        .filter(|(_, lines)| *lines > 800)
        .map(|(path, lines)| format!("{}: {lines}", path.display()))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

/// `docs/glossary.md` has the words that stand for these.
#[test]
fn words_that_the_glossary_replaces_are_not_used() {
    let replaced = [
        "network card",
        "virtio-win medium",
        "driver medium",
        "output folder",
        "partial folder",
        "goes on",
        "of our own making",
        " of ours",
        "as a rule",
        "hangs on",
        "way back",
        " anew",
        "by itself",
        "at this place",
        "has to say",
        "is told",
        "what hangs",
    ];
    let mut all = vec![root().join("README.md")];
    for folder in ["docs", "src", "tests"] {
        files(&root().join(folder), &["md", "rs"], &mut all);
    }
    assert!(all.len() > 300, "{} files", all.len());
    let mut found = Vec::new();
    for path in all.iter().filter(|path| !path.ends_with("tests/house.rs")) {
        let text = fs::read_to_string(path).unwrap();
        for (number, line) in text.lines().enumerate() {
            let whole = |word: &str| {
                line.match_indices(word).any(|(at, _)| {
                    let next = line[at + word.len()..].chars().next();
                    !next.is_some_and(|c| c.is_alphabetic() && c != 's')
                })
            };
            for word in replaced.iter().filter(|word| whole(word)) {
                found.push(format!("{}:{}: {word}", path.display(), number + 1));
            }
        }
    }
    assert!(
        found.is_empty(),
        "see docs/glossary.md\n{}",
        found.join("\n")
    );
}

/// The paragraphs of the comments of a file, each with the number of its first line. Code blocks,
/// tables and headings are left out; an item of a list is a paragraph.
fn paragraphs(text: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let mut open = false;
    let mut code = false;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim_start();
        let doc = line
            .strip_prefix("///")
            .or_else(|| line.strip_prefix("//!"));
        let Some(comment) = doc.or_else(|| line.strip_prefix("//")) else {
            (open, code) = (false, false);
            continue;
        };
        let comment = comment.trim();
        if comment.starts_with("```") {
            (open, code) = (false, !code);
            continue;
        }
        if code || comment.is_empty() || comment.starts_with(['|', '#']) {
            open = false;
            continue;
        }
        let item = comment.strip_prefix("- ").or(comment.strip_prefix("* "));
        match found.last_mut() {
            Some((_, words)) if open && item.is_none() => *words += &format!(" {comment}"),
            _ => found.push((number + 1, item.unwrap_or(comment).to_owned())),
        }
        open = true;
    }
    found
}

/// The sentences of a paragraph. A colon ends none; the full stop inside a name does not either.
fn sentences(paragraph: &str) -> Vec<String> {
    let mut found = vec![String::new()];
    let mut words = paragraph.split_whitespace().peekable();
    while let Some(word) = words.next() {
        let sentence = found.last_mut().unwrap();
        if !sentence.is_empty() {
            sentence.push(' ');
        }
        sentence.push_str(word);
        let ends = word
            .trim_end_matches(['"', ')', '*'])
            .ends_with(['.', ';', ':', '!', '?']);
        let begins = |next: &&str| next.starts_with(|c: char| !c.is_lowercase());
        if ends && words.peek().is_none_or(begins) {
            found.push(String::new());
        }
    }
    found.retain(|sentence| !sentence.is_empty());
    found
}

#[test]
fn no_sentence_of_a_comment_has_more_than_22_words() {
    const MOST: usize = 22;
    let made = "One two. Three:\nfour (a.b) five; six\n\n```\nlong code\n```\n- item"
        .replace('\n', "\n// ");
    let found: Vec<String> = (paragraphs(&format!("// {made}")).iter())
        .flat_map(|(_, paragraph)| sentences(paragraph))
        .collect();
    assert_eq!(found, ["One two.", "Three: four (a.b) five; six", "item"]);

    let mut all = Vec::new();
    files(&root().join("src"), &["rs"], &mut all);
    let mut long = String::new();
    let mut count = 0;
    for path in all {
        for (line, paragraph) in paragraphs(&fs::read_to_string(&path).unwrap()) {
            for sentence in sentences(&paragraph) {
                count += 1;
                let words = sentence.split(' ').count();
                if words > MOST {
                    long += &format!("{}:{line}: {words} words: {sentence}\n", path.display());
                }
            }
        }
    }
    assert!(count > 8000, "{count} sentences");
    assert!(long.is_empty(), "{long}");
}

/// A doc comment names its object or tells in the third person what the function does.
#[test]
fn no_doc_comment_of_a_function_is_an_order() {
    let orders = [
        "It", "This", "That", "Return", "Get", "Set", "Create", "Read", "Write", "Check", "Parse",
        "Make", "Open", "Find", "Add", "Remove", "Take", "Give", "Put", "Run", "Stop", "Wait",
        "Send", "Close", "Compare", "Convert", "Load", "Save", "Print", "Tell", "Say", "Says",
        "Tells", "Fail", "Refuse", "Keep", "Build", "Call", "Apply", "Move", "Compute", "Decide",
        "Do", "Does", "Begin", "Look", "What", "Who",
    ];
    let is_order = |doc: &str| {
        let first = doc.split(' ').next().unwrap_or("");
        orders.contains(&first.trim_end_matches(','))
    };
    assert!(is_order("Return the size.") && is_order("It is empty."));
    assert!(!is_order("Returns the size.") && !is_order("Whether it is empty."));

    let mut all = Vec::new();
    files(&root().join("src"), &["rs"], &mut all);
    let mut found = String::new();
    let mut count = 0;
    for path in all {
        let text = fs::read_to_string(&path).unwrap();
        let mut doc: Option<&str> = None;
        for (number, line) in text.lines().enumerate() {
            let line = line.trim_start();
            if let Some(comment) = line.strip_prefix("/// ") {
                doc = doc.or(Some(comment));
            } else if !line.starts_with("///") && !line.starts_with("#[") {
                let function = line.split(' ').take(5).any(|word| word == "fn");
                if let Some(doc) = doc.take().filter(|_| function) {
                    count += 1;
                    if is_order(doc) {
                        found += &format!("{}:{}: {doc}\n", path.display(), number + 1);
                    }
                }
            }
        }
    }
    assert!(count > 1500, "{count} functions");
    assert!(found.is_empty(), "{found}");
}
