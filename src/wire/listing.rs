//! Listings of web servers: nginx, Apache, and ESXi's `/folder`. They are HTML for people, so only
//! links to entries right below the page are used, without sizes or times.

use super::Listed;
use super::url::Location;

const MAX_ENTRIES: usize = 10_000;

/// The entries that a page links to.
pub(super) fn entries(page: &str, at: &Location) -> Vec<Listed> {
    let mut listed: Vec<Listed> = Vec::new();
    let lower = page.to_ascii_lowercase();
    let mut rest = 0;
    while let Some(found) = lower.get(rest..).and_then(|rest| rest.find("href=")) {
        rest += found + 5;
        let Some(value) = page.get(rest..).and_then(quoted) else {
            continue;
        };
        if let Some(entry) = entry(value, at)
            && listed.len() < MAX_ENTRIES
            && !listed.iter().any(|known| known.name == entry.name)
        {
            listed.push(entry);
        }
    }
    listed
}

fn quoted(text: &str) -> Option<&str> {
    let quote = text.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    text[1..].split(quote).next()
}

fn entry(link: &str, at: &Location) -> Option<Listed> {
    let path = link.split(['?', '#']).next()?;
    let path = match path.split_once("://") {
        Some((_, rest)) => &rest[rest.find('/')?..],
        None => path,
    };
    let decoded = super::url::decode(&path.replace("&amp;", "&"))?;
    let name = match decoded.starts_with('/') {
        true => {
            let below = decoded.strip_prefix(at.path().trim_end_matches('/'))?;
            below.strip_prefix('/')?
        }
        false => decoded.strip_prefix("./").unwrap_or(&decoded),
    };
    let is_directory = name.ends_with('/');
    let name = name.trim_end_matches('/');
    let below = !name.is_empty() && !name.contains('/') && !matches!(name, "." | "..");
    below.then(|| Listed {
        name: name.to_owned(),
        is_directory,
        size: None,
        modified: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_lies_right_below_and_nothing_else() {
        let at = Location::parse("https://h/folder/vm/?dcPath=dc&dsName=ds1");
        let at = at.unwrap().unwrap();
        // Of nginx, and of ESXi 8.
        let page = r#"<h1>Index of /</h1><a href="../">../</a>
            <a href="vm.vmx">vm.vmx</a> 12-Jan 2026 <A HREF='a%20b-flat.vmdk'>x</A>
            <a href="/folder/vm/vm.vmdk?dcPath=dc&amp;dsName=ds1">vm.vmdk</a>
            <a href="/folder?dcPath=dc">parent</a> <a href="/folder/vm/snap/?dsName=ds1">snap</a>
            <a href="https://h/folder/vm/vm.nvram">n</a> <a href="/etc/passwd">x</a>
            <a href="..%2fescape">x</a> <a href="?C=N;O=D">sort</a> <a href="vm.vmx">twice</a> <a href="open"#;
        let names: Vec<_> = entries(page, &at)
            .into_iter()
            .map(|entry| (entry.name, entry.is_directory))
            .collect();
        let want = [
            ("vm.vmx", false),
            ("a b-flat.vmdk", false),
            ("vm.vmdk", false),
            ("snap", true),
            ("vm.nvram", false),
            ("open", false),
        ];
        assert_eq!(
            names,
            want.map(|(name, directory)| (name.to_owned(), directory))
        );
    }
}
