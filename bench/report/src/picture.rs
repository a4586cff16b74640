//! The summary as a picture.
//!
//! Written by hand, because colours must follow the reader's light or dark theme, which takes a style sheet. They are those of the
//! report, which the colour-blind can tell apart.

use std::fmt::Write;

use crate::format::{Row, grouped, unit};
use crate::schema::mechanism_rank;
use crate::{Results, Workload};

const WIDTH: u32 = 820;
const MARGIN: u32 = 16;
/// Where bars begin: right of the mechanisms' names.
const BARS_LEFT: u32 = 140;
/// The longest bar; what remains on its right is for the number.
const BARS_WIDTH: u32 = 590;
const BAR_HEIGHT: u32 = 14;
const BAR_PITCH: u32 = 17;
const GROUP_GAP: u32 = 9;
/// Height of a panel's heading.
const HEADING: u32 = 30;

/// The colour of what the others are measured against, whether there are many of them or few.
const FLOOR_COLOUR: usize = 1;
/// The colours of the others; more of them share the last one.
const COLOURS: [usize; 6] = [0, 2, 3, 4, 5, 6];

const STYLE: &str = "\
text{font:13px system-ui,sans-serif;fill:#1f2328}\
.title{font-size:16px;font-weight:600}\
.heading{font-weight:600}\
.faint{fill:#59636e}\
.number{font-size:12px;font-variant-numeric:tabular-nums}\
.s0{fill:#0072b2}.s1{fill:#7a828b}.s2{fill:#2a9fd6}.s3{fill:#d55e00}.s4{fill:#009e73}.s5{fill:#a2458a}.s6{fill:#9a6b00}\
@media(prefers-color-scheme:dark){\
text{fill:#e6edf3}.faint{fill:#9198a1}\
.s0{fill:#4aa3ff}.s1{fill:#8b949e}.s2{fill:#8fd3ff}.s3{fill:#ff8a3d}.s4{fill:#2fc49a}.s5{fill:#e08bc6}.s6{fill:#e6b84a}}";

/// Median ticks of `exec_bp` and `read_bp` as horizontal bars, on one scale: a group for each mechanism, in it a bar
/// for each monitor, so that hyperbp and the floor stand side by side. An SVG image without a background, for light and
/// dark.
///
/// A read that showed the guest the breakpoint has no bar: it is only cheap because nobody concealed anything.
#[must_use]
pub fn svg(results: &Results) -> String {
    let rows: Vec<_> = Row::all(&results.runs).into_iter().filter(|row| !row.is_bare()).collect();
    let mut monitors = unique(rows.iter().map(Row::monitor));
    // What is measured first, what it is measured against behind it.
    monitors.sort_by_key(|name| name == "floor");
    let panels = [
        Panel::new(&rows, &monitors, Workload::ExecBp, "Executing the breakpoint (exec_bp)"),
        Panel::new(&rows, &monitors, Workload::ReadBp, "Reading at the breakpoint (read_bp)"),
    ];
    let longest = panels.iter().flat_map(Panel::medians).max().unwrap_or(0);

    let mut body = String::new();
    let machine = &results.machine;
    let mut y = MARGIN + 16;
    text(&mut body, MARGIN, y, "title", "What a breakpoint hit costs");
    y += 20;
    let subtitle = format!("Median, {}. Xen {} on {}.", unit(machine.ticks_are), machine.xen, machine.cpu);
    text(&mut body, MARGIN, y, "faint", &subtitle);
    y += 24;
    let mut x = MARGIN;
    for (index, name) in monitors.iter().enumerate() {
        let width = 40 + 8 * name.chars().count() as u32;
        if x + width > WIDTH {
            (x, y) = (MARGIN, y + 20);
        }
        rectangle(&mut body, x, y - 11, 12, 12, colour(&monitors, index));
        text(&mut body, x + 18, y, "", name);
        x += width;
    }
    y += 8;
    for panel in &panels {
        y = panel.draw(&mut body, y, longest, &|monitor| colour(&monitors, monitor));
    }
    let height = y + MARGIN;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\" aria-label=\"What a breakpoint hit costs, by mechanism\">\n<style>{STYLE}</style>\n{body}</svg>\n"
    )
}

/// One workload: for each mechanism the monitors' medians, as (index of the monitor, median).
struct Panel<'a> {
    heading: &'static str,
    groups: Vec<(&'a str, Vec<(usize, u64)>)>,
}

impl<'a> Panel<'a> {
    fn new(rows: &[Row<'a>], monitors: &[String], workload: Workload, heading: &'static str) -> Self {
        let mut mechanisms = unique(rows.iter().map(|row| row.mechanism));
        mechanisms.sort_by_key(|name| mechanism_rank(name));
        let bars = |mechanism| {
            let bar = |(index, monitor): (usize, &String)| {
                let row = rows.iter().find(|row| row.mechanism == mechanism && row.monitor() == *monitor)?;
                let run = row.run(workload)?;
                (workload != Workload::ReadBp || !run.guest_saw_breakpoint).then_some((index, run.ticks.median))
            };
            monitors.iter().enumerate().filter_map(bar).collect::<Vec<_>>()
        };
        let groups = mechanisms.into_iter().map(|name| (name, bars(name))).filter(|(_, bars)| !bars.is_empty());
        Self { heading, groups: groups.collect() }
    }

    fn medians(&self) -> impl Iterator<Item = u64> {
        self.groups.iter().flat_map(|(_, bars)| bars.iter().map(|(_, median)| *median))
    }

    /// Draws the panel below `y`, and says where it ends.
    fn draw(&self, body: &mut String, mut y: u32, longest: u64, colour: &dyn Fn(usize) -> usize) -> u32 {
        if self.groups.is_empty() {
            return y;
        }
        y += HEADING;
        text(body, MARGIN, y - 8, "heading", self.heading);
        for (mechanism, bars) in &self.groups {
            let middle = y + bars.len() as u32 * BAR_PITCH / 2;
            text(body, MARGIN, middle + 3, "", mechanism);
            for (monitor, median) in bars {
                let length = u128::from(*median) * u128::from(BARS_WIDTH) / u128::from(longest.max(1));
                rectangle(body, BARS_LEFT, y, length as u32, BAR_HEIGHT, colour(*monitor));
                text(body, BARS_LEFT + length as u32 + 6, y + 11, "number", &grouped(*median));
                y += BAR_PITCH;
            }
            y += GROUP_GAP;
        }
        y
    }
}

/// The colour of a monitor, of those in the picture.
fn colour(monitors: &[String], index: usize) -> usize {
    match &*monitors[index] {
        "floor" => FLOOR_COLOUR,
        _ => COLOURS[index.min(COLOURS.len() - 1)],
    }
}

/// Each once, in order of first appearance.
fn unique<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut once = Vec::new();
    for item in items {
        if !once.contains(&item) {
            once.push(item);
        }
    }
    once
}

fn rectangle(body: &mut String, x: u32, y: u32, width: u32, height: u32, colour: usize) {
    // Writing into a string cannot fail.
    let _ = writeln!(
        body,
        "<rect class=\"s{colour}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"2\"/>"
    );
}

fn text(body: &mut String, x: u32, y: u32, class: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    // Writing into a string cannot fail.
    let _ = writeln!(body, "<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{content}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{bochs, collection, measurement};
    use crate::{Collection, Machine, Measurement};

    #[test]
    fn every_monitor_of_every_mechanism_has_a_bar_in_both_panels() {
        let picture = svg(collection().results());
        for median in ["60 001", "30 001", "55 001"] {
            assert_eq!(picture.matches(&format!(">{median}<")).count(), 2, "{picture}");
        }
        assert_eq!(picture.matches(">view-step<").count(), 2);
        // A legend of two, and three bars in each panel; the guest without a breakpoint has none.
        assert_eq!(picture.matches("<rect").count(), 2 + 3 + 3);
        assert!(!picture.contains(">none<"));
    }

    #[test]
    fn monitors_have_colours_of_their_own_and_the_floor_always_the_same() {
        let monitors = ["hyperbp", "drakvuf_hyperbp", "drakvuf_original", "floor"].map(str::to_owned);
        assert_eq!([0, 1, 2, 3].map(|index| colour(&monitors, index)), [0, 2, 3, 1]);
        assert_eq!([0, 1].map(|index| colour(&["hyperbp".to_owned(), "floor".to_owned()], index)), [0, 1]);
    }

    #[test]
    fn the_longest_bar_fills_the_scale() {
        let picture = svg(collection().results());
        assert!(picture.contains(&format!("width=\"{BARS_WIDTH}\" height=\"{BAR_HEIGHT}\"")), "{picture}");
        assert!(picture.contains("width=\"295\" height=\"14\""), "{picture}");
    }

    #[test]
    fn names_from_elsewhere_are_escaped() {
        let machine = Machine { cpu: "<script>&".to_owned(), ..bochs() };
        assert!(svg(Collection::new(machine).results()).contains("&lt;script&gt;&amp;"));
    }

    #[test]
    fn a_read_that_shows_the_breakpoint_is_not_shown_as_a_cheap_one() {
        let mut collection = collection();
        let open = measurement("hyperbp", "skip", Workload::ReadBp);
        collection.push(Measurement { guest_saw_breakpoint: true, ..open }, vec![4]).unwrap();
        let picture = svg(collection.results());
        assert!(!picture.contains(">skip<"), "{picture}");
    }

    #[test]
    fn a_panel_with_nothing_in_it_is_left_out() {
        let mut collection = Collection::new(bochs());
        collection.push(measurement("hyperbp", "skip", Workload::ExecBp), vec![0]).unwrap();
        let picture = svg(collection.results());
        assert!(picture.contains("exec_bp") && !picture.contains("read_bp"), "{picture}");
    }
}
