//! Which kernels the boot loader offers, with which initramfs and arguments, and which one it takes
//! by itself.
//!
//! Read are GRUB 2 (`grub.cfg`, the environment block), Boot Loader Specification entries
//! (`loader/entries/*.conf`), GRUB legacy (`menu.lst`) and extlinux. None of them is executed: of a
//! `grub.cfg` only its menu entries and plain `set default=` lines are understood, which is what
//! `grub-mkconfig` and the distributions' tools write.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde::Serialize;

/// Boot menus have dozens of entries, not thousands.
const MAX_ENTRIES: usize = 512;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    pub title: String,
    /// `--id`, or the name of the BLS file.
    pub id: String,
    /// Position in the menu: `[2]`, `[1, 0]` in a submenu.
    pub position: Vec<usize>,
    pub kernel: String,
    pub initrds: Vec<String>,
    pub args: String,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loader {
    Grub2,
    GrubBls,
    GrubLegacy,
    SystemdBoot,
    Extlinux,
    #[default]
    Unknown,
}

#[derive(Debug, Default)]
pub struct Menu {
    pub loader: Loader,
    pub entries: Vec<Entry>,
    /// Index in `entries`.
    pub default: Option<usize>,
}

impl Entry {
    /// `root=` and its kind come from here.
    pub fn argument(&self, name: &str) -> Option<&str> {
        let values = self.args.split_whitespace();
        values
            .filter_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .next_back()
            .map(|value| value.trim_matches('"'))
    }
}

/// `key=value` lines of GRUB's environment block.
pub fn grub_env(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.trim().to_string(), value.trim().to_string()))
        .collect()
}

/// `grub.cfg` as `grub-mkconfig` writes it.
pub fn grub_cfg(text: &str, env: &BTreeMap<String, String>) -> Menu {
    let mut menu = Menu {
        loader: Loader::Grub2,
        ..Menu::default()
    };
    let mut wanted = String::new();
    // Open blocks; those that are menus count their entries.
    let mut blocks: Vec<Block> = Vec::new();
    let mut top = 0usize;
    for line in text.lines() {
        let words = words(line);
        let Some(first) = words.first().map(String::as_str) else {
            continue;
        };
        let opens = words.last().is_some_and(|w| w == "{");
        match first {
            "}" => {
                blocks.pop();
            }
            "menuentry" | "submenu" if opens => {
                let place = blocks.iter_mut().rev().find_map(Block::menu);
                let mut position = place.as_ref().map_or(Vec::new(), |m| m.position.clone());
                let count = place.map_or(&mut top, |m| &mut m.count);
                position.push(*count);
                *count += 1;
                if first == "submenu" {
                    blocks.push(Block::Menu(Submenu { position, count: 0 }));
                } else if menu.entries.len() < MAX_ENTRIES {
                    menu.entries.push(Entry {
                        title: words.get(1).cloned().unwrap_or_default(),
                        id: id_of(&words),
                        position,
                        ..Entry::default()
                    });
                    blocks.push(Block::Entry);
                } else {
                    blocks.push(Block::Other);
                }
            }
            _ if opens => blocks.push(Block::Other),
            "set" => {
                if let Some(value) = words.get(1).and_then(|w| w.strip_prefix("default=")) {
                    // Of the two in an `if` the last is the ordinary one.
                    wanted = expand(value, env);
                }
            }
            "linux" | "linux16" | "linuxefi" if in_entry(&blocks) => {
                if let Some(entry) = menu.entries.last_mut() {
                    entry.kernel = path(words.get(1).map_or("", String::as_str));
                    entry.args = expand(&words.get(2..).unwrap_or_default().join(" "), env);
                }
            }
            "initrd" | "initrd16" | "initrdefi" if in_entry(&blocks) => {
                if let Some(entry) = menu.entries.last_mut() {
                    entry
                        .initrds
                        .extend(words.iter().skip(1).map(|word| path(word)));
                }
            }
            _ => {}
        }
    }
    menu.entries.retain(|e| !e.kernel.is_empty());
    menu.default = choose(&menu.entries, &wanted);
    menu
}

enum Block {
    Menu(Submenu),
    Entry,
    Other,
}

struct Submenu {
    position: Vec<usize>,
    count: usize,
}

impl Block {
    fn menu(&mut self) -> Option<&mut Submenu> {
        match self {
            Block::Menu(menu) => Some(menu),
            _ => None,
        }
    }
}

fn in_entry(blocks: &[Block]) -> bool {
    blocks.iter().any(|b| matches!(b, Block::Entry))
}

/// The word after `--id`, or after the variable that older `grub-mkconfig` writes for it.
fn id_of(words: &[String]) -> String {
    let at = words
        .iter()
        .position(|w| w == "--id" || w == "$menuentry_id_option");
    at.and_then(|at| words.get(at + 1))
        .cloned()
        .unwrap_or_default()
}

/// The entry GRUB takes: by number, id or title, each with `>` for submenus. Anything that does not
/// exist, and nothing, is the first.
fn choose(entries: &[Entry], wanted: &str) -> Option<usize> {
    let first = (!entries.is_empty()).then_some(0);
    let last = wanted.rsplit('>').next().unwrap_or(wanted).trim();
    let numbers: Option<Vec<usize>> = wanted.split('>').map(|n| n.trim().parse().ok()).collect();
    let by_number = numbers.and_then(|n| {
        entries.iter().position(|e| e.position == n).or_else(|| {
            // A submenu: GRUB enters it and takes its first.
            entries.iter().position(|e| e.position.starts_with(&n))
        })
    });
    let by_name = || {
        let same = |e: &Entry| !last.is_empty() && (e.id == last || e.title == last);
        entries.iter().position(same)
    };
    by_number.or_else(by_name).or(first)
}

/// One Boot Loader Specification entry.
pub fn bls_entry(id: &str, text: &str, env: &BTreeMap<String, String>) -> Option<Entry> {
    let mut entry = Entry {
        id: id.to_string(),
        ..Entry::default()
    };
    for line in text.lines() {
        let line = line.trim();
        let Some((key, value)) = line.split_once(char::is_whitespace) else {
            continue;
        };
        let value = value.trim();
        match key {
            "title" => entry.title = value.to_string(),
            "linux" => entry.kernel = path(value),
            // GRUB takes several on one line, and variables such as $tuned_initrd.
            "initrd" => entry.initrds.extend(
                value
                    .split_whitespace()
                    .filter(|word| !word.starts_with('$'))
                    .map(path),
            ),
            "options" => {
                if !entry.args.is_empty() {
                    entry.args.push(' ');
                }
                entry.args.push_str(&expand(value, env));
            }
            _ => {}
        }
    }
    (!entry.kernel.is_empty()).then_some(entry)
}

/// The menu of BLS entries: newest first, `saved_entry` of GRUB or `default` of systemd-boot wins.
pub fn bls_menu(mut entries: Vec<Entry>, loader: Loader, wanted: &str) -> Menu {
    entries.truncate(MAX_ENTRIES);
    entries.sort_by(|a, b| compare_versions(&b.id, &a.id));
    for (i, entry) in entries.iter_mut().enumerate() {
        entry.position = vec![i];
    }
    let default = choose(&entries, wanted.trim_end_matches(".conf"));
    Menu {
        loader,
        entries,
        default,
    }
}

/// GRUB legacy: `menu.lst`, `grub.conf`.
pub fn grub_legacy(text: &str) -> Menu {
    let mut menu = Menu {
        loader: Loader::GrubLegacy,
        ..Menu::default()
    };
    let mut wanted = String::new();
    for line in text.lines() {
        let line = line.trim();
        let (key, value) = line
            .split_once(|c: char| c.is_whitespace() || c == '=')
            .unwrap_or((line, ""));
        let value = value.trim();
        let count = menu.entries.len();
        match (key, menu.entries.last_mut()) {
            ("default", None) => wanted = value.to_string(),
            ("title", _) if count < MAX_ENTRIES => {
                menu.entries.push(Entry {
                    title: value.to_string(),
                    position: vec![count],
                    ..Entry::default()
                });
            }
            ("kernel", Some(entry)) => {
                let mut words = value.split_whitespace().skip_while(|w| w.starts_with("--"));
                entry.kernel = path(words.next().unwrap_or_default());
                entry.args = words.collect::<Vec<_>>().join(" ");
            }
            ("initrd", Some(entry)) => entry.initrds.push(path(value)),
            _ => {}
        }
    }
    menu.entries.retain(|e| !e.kernel.is_empty());
    menu.default = choose(&menu.entries, &wanted);
    menu
}

/// `extlinux.conf`, `syslinux.cfg`.
pub fn extlinux(text: &str) -> Menu {
    let mut menu = Menu {
        loader: Loader::Extlinux,
        ..Menu::default()
    };
    let mut wanted = String::new();
    for line in text.lines() {
        let line = line.trim();
        let (key, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let value = value.trim();
        let count = menu.entries.len();
        match (key.to_ascii_lowercase().as_str(), menu.entries.last_mut()) {
            ("default" | "ontimeout", _) if wanted.is_empty() => wanted = value.to_string(),
            ("label", _) if count < MAX_ENTRIES => {
                menu.entries.push(Entry {
                    title: value.to_string(),
                    id: value.to_string(),
                    position: vec![count],
                    ..Entry::default()
                });
            }
            ("kernel" | "linux", Some(entry)) => entry.kernel = path(value),
            ("initrd", Some(entry)) => entry.initrds.extend(value.split(',').map(path)),
            ("append", Some(entry)) => {
                for word in value.split_whitespace() {
                    match word.strip_prefix("initrd=") {
                        Some(list) => entry.initrds.extend(list.split(',').map(path)),
                        None => {
                            entry.args.push_str(word);
                            entry.args.push(' ');
                        }
                    }
                }
            }
            _ => {}
        }
    }
    menu.entries.retain(|e| !e.kernel.is_empty());
    menu.default = choose(&menu.entries, &wanted);
    menu
}

/// Without the device GRUB may be told in front: `(hd0,gpt2)/vmlinuz`, `($root)/vmlinuz`.
fn path(word: &str) -> String {
    let path = match word.split_once(')') {
        Some((device, path)) if device.starts_with('(') => path,
        _ => word,
    };
    path.to_string()
}

/// `$name` and `${name}` from the environment block; what is not there becomes nothing.
fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let braced = after.starts_with('{');
        let name_at = usize::from(braced);
        let len = after[name_at..]
            .bytes()
            .take_while(|b| b.is_ascii_alphanumeric() || *b == b'_')
            .count();
        let end = name_at + len;
        if let Some(value) = env.get(&after[name_at..end]) {
            out.push_str(value);
        }
        rest = &after[end..];
        if braced {
            rest = rest.strip_prefix('}').unwrap_or(rest);
        }
    }
    out.push_str(rest);
    out
}

/// Words of a line of GRUB script: quotes group, `#` at the start of a word ends it.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut open = false;
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), c) => word.push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                open = true;
            }
            (None, '\\') => {
                word.extend(chars.next());
                open = true;
            }
            (None, '#') if !open => break,
            (None, c) if c.is_whitespace() || c == ';' => {
                if open {
                    words.push(std::mem::take(&mut word));
                    open = false;
                }
            }
            (None, c) => {
                word.push(c);
                open = true;
            }
        }
    }
    if open {
        words.push(word);
    }
    words
}

/// As RPM compares versions: runs of digits by value, runs of letters by letter, digits above letters.
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (runs(a).into_iter(), runs(b).into_iter());
    loop {
        let order = match (a.next(), b.next()) {
            (None, None) => return Ordering::Equal,
            (None, Some(_)) => Ordering::Less,
            (Some(_), None) => Ordering::Greater,
            (Some((true, x)), Some((true, y))) => x.len().cmp(&y.len()).then_with(|| x.cmp(y)),
            (Some((x, _)), Some((y, _))) if x != y => x.cmp(&y),
            (Some((_, x)), Some((_, y))) => x.cmp(y),
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// Runs of digits (without leading zeroes) and of letters.
fn runs(text: &str) -> Vec<(bool, &str)> {
    let parts = text.split(|c: char| !c.is_ascii_alphanumeric());
    let mut list = Vec::new();
    for part in parts.filter(|p| !p.is_empty()) {
        let mut rest = part;
        while let Some(first) = rest.bytes().next() {
            let digits = first.is_ascii_digit();
            let len = rest
                .bytes()
                .take_while(|b| b.is_ascii_digit() == digits)
                .count();
            let run = &rest[..len];
            list.push((
                digits,
                if digits {
                    run.trim_start_matches('0')
                } else {
                    run
                },
            ));
            rest = &rest[len..];
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = r#"
if [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set boot_once=true
else
   set default="1>2"
fi
function load_video {
  insmod all_video
}
### BEGIN /etc/grub.d/10_linux ###
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-ab' {
	load_video
	if [ x$feature_platform_search_hint = xy ]; then
	  search --no-floppy --fs-uuid --set=root --hint='hd0,msdos1' 12ab
	else
	  search --no-floppy --fs-uuid --set=root 12ab
	fi
	echo	'Loading Linux 6.1.0-9-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-9-amd64 root=UUID=12ab ro  quiet "a b" # x
	initrd	/boot/initrd.img-6.1.0-9-amd64
}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-ab' {
	menuentry 'Linux 6.1.0-9' --class debian $menuentry_id_option 'six-nine' {
		linux	/boot/vmlinuz-6.1.0-9-amd64 root=UUID=12ab ro
		initrd	/boot/early.img /boot/initrd.img-6.1.0-9-amd64
	}
	menuentry 'Linux 6.1.0-9 (recovery)' --id 'six-nine-rec' {
		linux	/boot/vmlinuz-6.1.0-9-amd64 root=UUID=12ab ro single
	}
	menuentry 'Linux 5.10' { linux ; }
	menuentry 'Linux 5.10.0' --id 'five' {
		linux ($root)/boot/vmlinuz-5.10.0-1-amd64 root=/dev/sda1
		initrd (hd0,msdos1)/boot/initrd.img-5.10.0-1-amd64
	}
}
menuentry 'Memory test' --id mem {
	linux16 /boot/memtest86+.bin
}
menuentry 'Firmware' { 
	fwsetup
}
"#;

    #[test]
    fn grub_2() {
        let menu = grub_cfg(DEBIAN, &BTreeMap::new());
        let seen: Vec<_> = menu
            .entries
            .iter()
            .map(|e| (e.id.as_str(), e.position.as_slice(), e.initrds.len()))
            .collect();
        assert_eq!(
            seen,
            [
                ("gnulinux-simple-ab", &[0][..], 1),
                ("six-nine", &[1, 0], 2),
                ("six-nine-rec", &[1, 1], 0),
                ("five", &[1, 2], 1),
                ("mem", &[2], 0),
            ]
        );
        assert_eq!(menu.entries[0].argument("root"), Some("UUID=12ab"));
        assert_eq!(menu.entries[3].kernel, "/boot/vmlinuz-5.10.0-1-amd64");
        assert_eq!(menu.entries[3].argument("root"), Some("/dev/sda1"));
        assert_eq!(menu.default, Some(3));
        for (wanted, index) in [
            ("0", 0),
            ("1", 1),
            ("1>1", 2),
            ("gnulinux-advanced-ab>five", 3),
            ("Debian GNU/Linux", 0),
            ("no such entry", 0),
            ("", 0),
        ] {
            let text = DEBIAN.replace("1>2", wanted);
            assert_eq!(
                grub_cfg(&text, &BTreeMap::new()).default,
                Some(index),
                "{wanted}"
            );
        }
        let text = DEBIAN.replace("\"1>2\"", "\"${saved_entry}\"");
        let env = grub_env("# GRUB Environment Block\nsaved_entry=five\n#####");
        assert_eq!(grub_cfg(&text, &env).default, Some(3));
        assert!(
            grub_cfg("menuentry {\n}\n}}}\nlinux x", &env)
                .entries
                .is_empty()
        );
    }

    #[test]
    fn boot_loader_specification() {
        let env =
            grub_env("kernelopts=root=/dev/mapper/rhel-root ro\nsaved_entry=m-5.14.0-9.el9\n");
        let one = |id: &str, text: &str| bls_entry(id, text, &env);
        let entries: Vec<Entry> = [
            one(
                "m-5.14.0-9.el9",
                "title RHEL\nversion 5.14.0-9.el9\nlinux /vmlinuz-5.14.0-9.el9\n\
                 initrd /initramfs-5.14.0-9.el9.img $tuned_initrd\noptions $kernelopts $tuned_params\n",
            ),
            one("m-5.14.0-70.el9", "linux /vmlinuz-5.14.0-70.el9\noptions root=UUID=1 ro\noptions quiet\n"),
            one("m-0-rescue", "linux /vmlinuz-0-rescue\n"),
            one("other", "title no kernel\n"),
        ]
        .into_iter()
        .flatten()
        .collect();
        let menu = bls_menu(entries.clone(), Loader::GrubBls, "m-5.14.0-9.el9");
        let ids: Vec<_> = menu.entries.iter().map(|e| e.id.as_str()).collect();
        assert_eq!(ids, ["m-5.14.0-70.el9", "m-5.14.0-9.el9", "m-0-rescue"]);
        assert_eq!(menu.default, Some(1));
        assert_eq!(
            menu.entries[1].argument("root"),
            Some("/dev/mapper/rhel-root")
        );
        assert_eq!(menu.entries[1].initrds, ["/initramfs-5.14.0-9.el9.img"]);
        assert_eq!(menu.entries[0].args, "root=UUID=1 ro quiet");
        assert_eq!(bls_menu(entries, Loader::GrubBls, "").default, Some(0));
    }

    #[test]
    fn old_loaders() {
        let menu = grub_legacy(
            "default=1\ntimeout 5\ntitle One\n root (hd0,0)\n kernel /vmlinuz-2.6 root=/dev/hda1\n\
             title Two\n\tkernel --no-mem-option (hd0,0)/vmlinuz-3 ro\n\tinitrd /initrd-3\n",
        );
        assert_eq!(menu.default, Some(1));
        assert_eq!(menu.entries[0].argument("root"), Some("/dev/hda1"));
        assert_eq!(
            (&*menu.entries[1].kernel, &menu.entries[1].initrds[..]),
            ("/vmlinuz-3", &["/initrd-3".to_string()][..])
        );
        let menu = extlinux(
            "DEFAULT lts\nPROMPT 0\nLABEL edge\n  LINUX vmlinuz-edge\n  INITRD initramfs-edge\n\
             LABEL lts\n  LINUX vmlinuz-lts\n  APPEND root=UUID=1 initrd=a,b quiet\n",
        );
        assert_eq!(menu.default, Some(1));
        assert_eq!(menu.entries[1].initrds, ["a", "b"]);
        assert_eq!(menu.entries[1].argument("root"), Some("UUID=1"));
    }

    #[test]
    fn versions() {
        for (older, newer) in [
            ("5.14.0-9", "5.14.0-70"),
            ("5.9", "5.10"),
            ("6.1", "6.1.1"),
            ("5.14.0-70.el8", "5.14.0-70.el9"),
            ("0-rescue", "5.1"),
            ("6.1.0-rc1", "6.1.0-1"),
        ] {
            assert_eq!(
                compare_versions(older, newer),
                Ordering::Less,
                "{older} {newer}"
            );
            assert_eq!(compare_versions(newer, older), Ordering::Greater);
        }
        assert_eq!(compare_versions("6.01", "6-1"), Ordering::Equal);
    }
}
