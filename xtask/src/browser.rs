//! The report in a real browser, without a screen.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use hyperbp_lab::{Host, Log, Progress, tools};
use serde_json::Value;

/// Debian's package, and the program in it.
const CHROMIUM: &str = "chromium";

/// A phone's width and a desk's.
const WIDTHS: [u32; 2] = [360, 1280];
/// Chromium's names of the reader's preference.
const THEMES: [(&str, &str); 2] = [("dark", "0"), ("light", "1")];

const SECTIONS: [&str; 7] = ["glance", "medians", "samples", "hits", "ticks", "published", "machine"];

/// Tells the page around it what the report looks like from inside.
const PROBE: &str = "<script>addEventListener('load', () => {
    const page = document.documentElement;
    parent.postMessage(JSON.stringify({
        inner: innerWidth, scroll: page.scrollWidth, client: page.clientWidth,
        dark: getComputedStyle(document.body).backgroundColor !== 'rgb(255, 255, 255)',
        sections: [...document.querySelectorAll('main section')].filter(section => section.offsetHeight > 40).map(section => section.id),
        pictures: [...document.querySelectorAll('svg')].map(picture => Math.round(picture.getBoundingClientRect().width)),
        unlabelled: document.querySelectorAll('svg:not([aria-label]), table:not(:has(caption)), th:not([scope])').length,
    }), '*');
});</script>";

/// The page around it: a window of a browser cannot be as narrow as a phone.
fn frame(width: u32) -> String {
    format!(
        "<!DOCTYPE html><iframe src=\"probed.html\" width=\"{width}\" height=\"900\" style=\"border:0\"></iframe>\
         <script>addEventListener('message', told => document.documentElement.dataset.probe = told.data)</script>"
    )
}

/// Looks at the report in a directory: in light and dark, on a desk and on a phone, and printed. The pictures stay in
/// `DIR/browser`.
///
/// # Errors
/// If it says anything to the console, is wider than the page, lacks a section, or asks for anything from outside.
pub(crate) fn check(directory: &Path) -> Result<()> {
    let (host, out) = (Host::this(), directory.join("browser"));
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    if host.find(CHROMIUM).is_none() {
        let log = Log::create(&out.join("tools.log"), "tools")?;
        tools::install(&host, &[CHROMIUM], &Progress::new(), &log)?;
    }
    let report = directory.join("report.html");
    let page = fs::read_to_string(&report).with_context(|| format!("cannot read {}", report.display()))?;
    let policy = "default-src 'none'; ";
    ensure!(page.contains(policy), "the report may load things from outside");
    let probed = out.join("probed.html");
    // The probe is a script, which the report itself neither has nor allows.
    let page = page.replacen(policy, &format!("{policy}script-src 'unsafe-inline'; "), 1) + PROBE;
    fs::write(&probed, page).with_context(|| format!("cannot write {}", probed.display()))?;

    for width in WIDTHS {
        let framed = out.join(format!("frame-{width}.html"));
        fs::write(&framed, frame(width)).with_context(|| format!("cannot write {}", framed.display()))?;
        for (theme, preference) in THEMES {
            let look =
                [format!("--window-size={width},1000"), format!("--blink-settings=preferredColorScheme={preference}")];
            let picture = out.join(format!("{width}-{theme}.png"));
            let screenshot = format!("--screenshot={}", picture.display());
            chromium(&out, &report, &[&look[..], &[screenshot, "--hide-scrollbars".to_owned()]].concat())?;
            ensure!(picture.exists(), "the browser drew nothing for {}", picture.display());
            let dom = chromium(&out, &framed, &[&look[..], &["--dump-dom".to_owned()]].concat())?;
            seen(&String::from_utf8_lossy(&dom.stdout), width, theme == "dark")
                .with_context(|| format!("the report in {theme}, {width} wide"))?;
        }
    }
    let pdf = out.join("printed.pdf");
    chromium(&out, &report, &[format!("--print-to-pdf={}", pdf.display()), "--no-pdf-header-footer".to_owned()])?;
    let printed = fs::metadata(&pdf).map_or(0, |file| file.len());
    ensure!(printed > 20_000, "printed, the report is only {printed} bytes");
    Ok(())
}

/// Checks what [`PROBE`] has told.
fn seen(dom: &str, width: u32, dark: bool) -> Result<()> {
    let probe = dom.split_once("data-probe=\"").and_then(|(_, rest)| rest.split_once('"'));
    let probe = probe.context("the page ran no script: it did not load")?.0.replace("&quot;", "\"");
    let probe: Value = serde_json::from_str(&probe).with_context(|| format!("it told {probe}"))?;
    ensure!(probe["inner"] == width, "the browser's frame is {} wide", probe["inner"]);
    let (scroll, client) = (probe["scroll"].as_u64(), probe["client"].as_u64());
    ensure!(scroll.is_some() && scroll <= client, "it is {scroll:?} wide, on a page of {client:?}");
    ensure!(probe["dark"] == dark, "it does not follow the reader's theme");
    ensure!(probe["sections"] == serde_json::json!(SECTIONS), "its sections are {}", probe["sections"]);
    ensure!(probe["unlabelled"] == 0, "{} pictures, tables or headings are not labelled", probe["unlabelled"]);
    let pictures = probe["pictures"].as_array().map_or(&[][..], Vec::as_slice);
    ensure!(
        !pictures.is_empty() && pictures.iter().all(|picture| picture.as_u64() > Some(300)),
        "its pictures are {pictures:?} wide"
    );
    Ok(())
}

/// Runs the browser with a profile of its own.
fn chromium(out: &Path, page: &Path, arguments: &[String]) -> Result<Output> {
    let profile = out.join("profile");
    if profile.exists() {
        fs::remove_dir_all(&profile).with_context(|| format!("cannot remove {}", profile.display()))?;
    }
    let mut command = Command::new(CHROMIUM);
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]);
    command.args(["--disable-background-networking", "--disable-component-update", "--disable-sync"]);
    command.args(["--enable-logging=stderr", "--virtual-time-budget=10000"]);
    command.arg(format!("--user-data-dir={}", profile.display())).args(arguments);
    let page = std::path::absolute(page).with_context(|| format!("cannot find {}", page.display()))?;
    let output = command.arg(format!("file://{}", page.display())).output().context("cannot run chromium")?;
    fs::remove_dir_all(&profile).ok();
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "chromium failed ({}): {said}", output.status);
    let console: Vec<_> = said.lines().filter(|line| line.contains("CONSOLE")).collect();
    ensure!(console.is_empty(), "the report says to the browser's console: {}", console.join("\n"));
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dom(scroll: u32) -> String {
        let sections = SECTIONS.map(|id| format!("&quot;{id}&quot;")).join(",");
        format!(
            "<html data-probe=\"{{&quot;inner&quot;:360,&quot;scroll&quot;:{scroll},&quot;client&quot;:360,&quot;dark&quot;:true,\
             &quot;sections&quot;:[{sections}],&quot;pictures&quot;:[600],&quot;unlabelled&quot;:0}}\">"
        )
    }

    #[test]
    fn what_is_too_wide_or_not_there_is_told() {
        seen(&dom(360), 360, true).unwrap();
        assert!(seen(&dom(361), 360, true).unwrap_err().to_string().contains("361"));
        assert!(seen(&dom(360), 360, false).unwrap_err().to_string().contains("theme"));
        assert!(seen(&dom(360).replace("hits", "hats"), 360, true).unwrap_err().to_string().contains("sections"));
        assert!(seen("<html>", 360, true).is_err());
    }
}
