//! Common parts of both pages: `report.html` and that of a batch. Self-contained, without scripts;
//! all text that may be from a guest is escaped.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

use crate::ui::clean;

/// Colours and frame of both pages, in a light and a dark form.
pub const STYLE: &str = "\
:root{color-scheme:light dark;--line:#c8c8c8;--soft:#f3f3f3;--ok:#0a6b2d;--bad:#a40000;--warn:#7a4b00;\
--okbg:#e6f4ea;--badbg:#fdecea;--warnbg:#fff4e0;--link:#0b57d0}\
@media(prefers-color-scheme:dark){:root{--line:#555;--soft:#2a2a2a;--ok:#6fd08c;--bad:#ff8a80;\
--warn:#ffc069;--okbg:#16321f;--badbg:#3b1a18;--warnbg:#3a2c12;--link:#8ab4f8}\
body{background:#181818;color:#ddd}}\
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;padding:0 1rem}\
h1,h2,h3,td,th,li,p,code,summary{overflow-wrap:anywhere}a{color:var(--link)}\
table{border-collapse:collapse;width:100%}\
td,th{border-bottom:1px solid var(--line);padding:.3rem .5rem;text-align:left;vertical-align:top}\
.ok{color:var(--ok)}.bad{color:var(--bad)}.warn{color:var(--warn)}\
code,pre{background:var(--soft);padding:.1rem .3rem}pre{white-space:pre-wrap;overflow-wrap:anywhere}\
summary{cursor:pointer}";

/// The start of a page, up to its body. `title` is not escaped yet.
pub fn head(title: &str, style: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <link rel=\"icon\" href=\"data:,\"><title>{}</title><style>{STYLE}{style}</style></head><body>\n",
        escape(title)
    )
}

/// Escapes text for elements and quoted attributes.
pub fn escape(text: &str) -> String {
    clean(text)
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&#39;")
}

/// A link that remains valid when both files have moved together; absolute for a file elsewhere.
pub fn link(path: &Path, folder: &Path) -> String {
    match path.strip_prefix(folder) {
        // `./`: a name with a colon would be parsed as an address.
        Ok(below) => format!("./{}", percent(below)),
        Err(_) => format!("file://{}", percent(path)),
    }
}

/// Percent-encodes everything but the plainest characters.
fn percent(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    const SET: AsciiSet = NON_ALPHANUMERIC
        .remove(b'/')
        .remove(b'.')
        .remove(b'_')
        .remove(b'-')
        .remove(b'~');
    percent_encode(path.as_os_str().as_bytes(), &SET).to_string()
}

/// The present, as `2026-11-28 22:04 UTC`.
pub fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    utc(since.map_or(0, |t| t.as_secs()))
}

fn utc(seconds: u64) -> String {
    // Civil from days, Howard Hinnant; years begin in March.
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_text_is_escaped() {
        assert_eq!(
            escape("<script>\"x\"&'y'\u{1b}</script>"),
            "&lt;script&gt;&quot;x&quot;&amp;&#39;y&#39;&lt;/script&gt;"
        );
        let start = head("<b>", "");
        assert!(start.contains("<title>&lt;b&gt;</title>"), "{start}");
    }

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (951_868_800, "2000-03-01 00:00 UTC"),
            (1_735_689_599, "2024-12-31 23:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }

    #[test]
    fn links() {
        let link = |path: &str| link(Path::new(path), Path::new("/out"));
        assert_eq!(link("/out/a#b/report.html"), "./a%23b/report.html");
        assert_eq!(link("/dev/vg/x y"), "file:///dev/vg/x%20y");
    }
}
