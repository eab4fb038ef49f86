//! The report pages in a browser.

use super::*;

/// The report of a conversion and the summary of a batch in a real browser, with the widths of a
/// desktop and a phone.
#[test]
fn the_reports_can_be_looked_at() {
    if !have(&TOOLS) || !have(&["chromium"]) {
        return;
    }
    let lab = Lab::new(GuestSpec::new(WinVersion::Server2022));
    lab.convert(&lab.raw, &[]).expect(0);
    // One VM that is done, one that never will be, under a name no line is long enough for.
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

/// Opens each page in a frame of each width, and returns the browser's measurements.
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

/// Runs headless Chromium; a message of a page on the console is an error.
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
