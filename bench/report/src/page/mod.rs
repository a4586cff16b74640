//! The report: one page, that needs nothing but itself, and its pictures as files.

mod boxes;
mod comparison;
mod drawing;
mod explanations;
mod matrix;
mod monitor;
mod published;
mod stack;

use std::path::Path;

use anyhow::Result;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::collection::write_file;
use crate::format::{Row, grouped, unit};
use crate::{About, Breakdown, Collection, Kind, Results, Workload};
use monitor::{Monitor, host_title};

/// What the page may load: nothing. Its style sheet is in it.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// What the report is made of.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// What was measured.
    pub collection: &'a Collection,
    /// How, if that is known.
    pub about: Option<&'a About>,
    /// Where the ticks of a hit go, if that was counted.
    pub breakdown: Option<&'a Breakdown>,
}

/// A picture: the name of its file, its SVG, and the words that stand for it.
type Picture = (String, Markup, String);

impl Report<'_> {
    /// Writes `report.html`, `box-<workload>.svg` and `ticks-<workload>.svg` into a directory, those whose figures there are.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        for (name, picture, _) in self.boxes().into_iter().chain(self.stacks()) {
            write_file(&directory.join(name), &drawing::standalone(&picture.into_string()))?;
        }
        write_file(&directory.join("report.html"), &self.html())
    }

    fn results(&self) -> &Results {
        self.collection.results()
    }

    fn boxes(&self) -> Vec<Picture> {
        let rows = Row::all(&self.results().runs);
        let picture = |workload: Workload| {
            let (picture, words) = boxes::picture(self.collection, &rows, workload)?;
            Some((format!("box-{}.svg", workload.name()), picture, words))
        };
        Workload::ALL.into_iter().filter_map(picture).collect()
    }

    fn stacks(&self) -> Vec<Picture> {
        let picture = |workload: Workload| {
            let (picture, words) = stack::picture(self.breakdown?, workload)?;
            Some((format!("ticks-{}.svg", workload.name()), picture, words))
        };
        Workload::ALL.into_iter().filter_map(picture).collect()
    }

    /// The page. Everything that comes from outside is escaped.
    #[must_use]
    pub fn html(&self) -> String {
        let sections = [
            ("glance", "At a glance", self.glance()),
            ("medians", "Every monitor, mechanism and workload", self.medians()),
            ("samples", "The samples", self.samples()),
            ("hits", "Hits lost, and what the guest saw", matrix::counted(&Row::all(&self.results().runs))),
            ("ticks", "Where the ticks go", self.ticks()),
            ("published", "Beside what was published", comparison::section(self.results(), self.breakdown)),
            ("machine", "The machine, and how to repeat it", self.machine()),
        ];
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta http-equiv="Content-Security-Policy" content=(POLICY);
                    title { "What a breakpoint hit costs" }
                    style { (PreEscaped(drawing::STYLE)) (PreEscaped(drawing::PICTURE)) }
                }
                body { main {
                    h1 { "What a breakpoint hit costs" }
                    p { "Breakpoints set from outside a virtual machine, invisible to it: hyperbp beside the monitors it is \
                         compared with, all measured in one run. " (self.where_measured()) }
                    nav aria-label="Sections" { ul { @for (id, title, _) in &sections {
                        li { a href={ "#" (id) } { (title) } }
                    } } }
                    @for (id, title, section) in &sections {
                        section id=(id) aria-labelledby={ (id) "-title" } { h2 id={ (id) "-title" } { (title) } (section) }
                    }
                } }
            }
        };
        page.into_string() + "\n"
    }

    fn where_measured(&self) -> Markup {
        let machine = &self.results().machine;
        html! {
            "Xen " (machine.xen) ", " (machine.cpus) @if machine.cpus == 1 { " CPU" } @else { " CPUs" }
            @if machine.kind == Kind::Bochs { ", emulated" }
            @if let Some(about) = self.about { ", " (about.date) }
            ". A tick is one of the " (unit(machine.ticks_are)) "."
        }
    }

    /// What `auto` costs beside what others have themselves; of the floor's, beside the cheapest.
    fn glance(&self) -> Markup {
        let rows = Row::all(&self.results().runs);
        let find = |host: &str, backend: &str, mechanism: &str, workload| {
            let is = |row: &&Row<'_>| (row.host, row.backend, row.mechanism) == (host, backend, mechanism);
            rows.iter().find(is).and_then(|row| row.median(workload))
        };
        let mut tiles = Vec::new();
        for row in rows.iter().filter(|row| {
            !row.is_bare() && row.backend != "hyperbp" && (row.host != "floor" || row.mechanism == "emulate")
        }) {
            // In the same host where hyperbp runs there, else in its own runner.
            let host = if find(row.host, "hyperbp", "auto", Workload::ExecBp).is_some() { row.host } else { "runner" };
            for workload in [Workload::ExecBp, Workload::ReadBp] {
                let (own, auto) = (row.median(workload), find(host, "hyperbp", "auto", workload));
                let (Some(own), Some(auto)) = (own, auto) else { continue };
                let does = if workload == Workload::ExecBp { "executing" } else { "reading at" };
                let inside = if host == "runner" { String::new() } else { format!(" in {}", host_title(host)) };
                tiles.push(html! { li {
                    b { (format!("{:.2}×", own as f64 / auto.max(1) as f64)) }
                    (Monitor::of(row).title()) ", " (row.mechanism) ": " (does) " a breakpoint takes " span { (grouped(own)) }
                    " ticks, with hyperbp's auto" (inside) " " span { (grouped(auto)) } "."
                } });
            }
        }
        html! {
            @if tiles.is_empty() { p { "There is nothing in this run to compare " code { "auto" } " with." } }
            @else {
                p { "How many times what hyperbp takes, " code { "auto" } " being its default. In the same host where it is loaded there, else in its own runner." }
                ul.tiles { @for tile in &tiles { (tile) } }
            }
        }
    }

    fn medians(&self) -> Markup {
        let rows = Row::all(&self.results().runs);
        let measured = |workload: &Workload| rows.iter().any(|row| !row.is_bare() && row.run(*workload).is_some());
        html! {
            p { "A cell without a number says why. Rows of one event apart by less than 1 500 ticks are as good as equal: where in \
                 Xen's scheduler's period a row falls makes such differences." }
            @for workload in Workload::ALL.into_iter().filter(measured) {
                h3 { (workload.name()) }
                (matrix::matrix(&rows, self.about, workload))
            }
        }
    }

    fn samples(&self) -> Markup {
        html! {
            p { "Box: the middle half of the samples; thick mark and number: the median; line: the samples within one and a half \
                 of the box's width; circles: all others, most of them hits with a timer's interrupt in them. In the emulator \
                 most samples are equal, and a box is a stroke. Workloads whose samples are all the same have no picture." }
            @for (name, picture, _) in self.boxes() { (figure(&name, &picture)) }
        }
    }

    fn ticks(&self) -> Markup {
        match self.breakdown {
            Some(breakdown) => html! {
                p { "In the emulator every tick is an instruction of somebody's. What is longest is where to cut next." }
                @for (name, picture, _) in self.stacks() { (figure(&name, &picture)) }
                (stack::numbers(breakdown))
            },
            None => html! {
                p { "This was not counted in this run. In the emulator, with one CPU, it is made by" }
                pre { code { "cargo xtask bench --ticks" } }
            },
        }
    }

    fn machine(&self) -> Markup {
        let machine = &self.results().machine;
        let kind = match machine.kind {
            Kind::Bochs => "emulated by Bochs: real Xen and dom0, no cost of a VM exit, a cache or a TLB miss",
            Kind::Xen => "hardware",
        };
        let samples = self.results().runs.iter().map(|run| run.samples);
        html! {
            dl {
                dt { "CPU" } dd { (machine.cpu) " (" (kind) ")" }
                dt { "CPUs" } dd { (machine.cpus) }
                dt { "Xen" } dd { (machine.xen) }
                dt { "Ticks" } dd { (unit(machine.ticks_are)) }
                dt { "Samples" } dd { (samples.clone().min().unwrap_or(0)) " to " (samples.max().unwrap_or(0)) " of each workload" }
                @if let Some(about) = self.about {
                    dt { "Date" } dd { (about.date) }
                    @for (what, version) in &about.versions { dt { (what) } dd { (version) } }
                }
            }
            @match self.about {
                Some(about) => {
                    p { "The same again:" }
                    pre { code { (about.command) } }
                    p.faint { "In the emulator, runs of the same image give the same samples to the byte." }
                }
                None => p { "There is no " code { "run.json" } " beside these results: which command made them is not known." }
            }
        }
    }
}

/// A picture in the page. It can be scrolled sideways where the page is narrow.
fn figure(name: &str, picture: &Markup) -> Markup {
    html! { figure { (scroll(name, picture.clone())) } }
}

/// What may be wider than the page, and is then scrolled alone; with the keyboard, too.
fn scroll(label: &str, content: Markup) -> Markup {
    html! { div.scroll tabindex="0" role="region" aria-label=(label) { (content) } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{bochs, collection, measurement};
    use crate::{Machine, Measurement};

    /// Nothing lost, nothing seen.
    pub(super) fn good() -> Collection {
        collection()
    }

    fn page(collection: &Collection) -> String {
        Report { collection, about: None, breakdown: None }.html()
    }

    #[test]
    fn the_page_has_its_sections_and_asks_for_nothing() {
        let page = page(&collection());
        for id in ["glance", "medians", "samples", "hits", "ticks", "published", "machine"] {
            assert!(page.contains(&format!("<section id=\"{id}\"")), "{id}");
        }
        assert!(page.contains("cargo xtask bench --ticks") && page.contains("no <code>run.json</code>"));
        for request in ["src=", "@import", "url(", "<link", "<script"] {
            assert!(!page.contains(request), "{request}");
        }
    }

    #[test]
    fn what_comes_from_outside_is_escaped() {
        let mut collection = Collection::new(Machine { cpu: "<script>alert(1)</script>".to_owned(), ..bochs() });
        collection.push(measurement("hyperbp", "emulate", Workload::ExecBp), vec![1, 2]).unwrap();
        let text = "\"><img src=x>".to_owned();
        let about = About {
            date: text.clone(),
            command: text.clone(),
            versions: [(text.clone(), text.clone())].into(),
            missing: [("drakvuf".to_owned(), text)].into(),
        };
        let page = Report { collection: &collection, about: Some(&about), breakdown: None }.html();
        assert!(page.contains("&lt;script&gt;") && !page.contains("<script") && !page.contains("<img"), "{page}");
    }

    #[test]
    fn hosts_with_both_are_compared_in_themselves() {
        let mut collection = collection();
        for (backend, mechanism, ticks) in [("original", "view-step", 60_000), ("hyperbp", "auto", 20_000)] {
            let run = Measurement { host: "drakvuf".to_owned(), ..measurement(backend, mechanism, Workload::ExecBp) };
            collection.push(run, vec![ticks]).unwrap();
        }
        let page = page(&collection);
        assert!(page.contains("<b>3.00×</b>DRAKVUF itself, view-step"), "{page}");
    }

    #[test]
    fn nothing_measured_is_a_page_too() {
        assert!(page(&Collection::new(bochs())).contains("nothing in this run to compare"));
    }

    #[test]
    fn pictures_are_files_too() {
        let directory = tempfile::tempdir().unwrap();
        let collection = collection();
        Report { collection: &collection, about: None, breakdown: None }.write(directory.path()).unwrap();
        let svg = std::fs::read_to_string(directory.path().join("box-exec_bp.svg")).unwrap();
        assert!(svg.starts_with("<svg xmlns=") && svg.contains("<style>"), "{svg}");
        assert!(directory.path().join("report.html").exists());
    }
}
