//! What pictures of the page have in common.
//!
//! They are written with the page's template and not by a plotting library, because their colours must follow the reader's
//! light or dark theme, which takes a style sheet.

use maud::{Markup, PreEscaped, html};

/// Colours, and what they are in the dark; the page's style sheet begins with them.
pub(super) const STYLE: &str = include_str!("style.css");
/// What pictures look like, in these colours.
pub(super) const PICTURE: &str = include_str!("picture.css");

/// An SVG image, which says what it shows to who does not see it.
pub(super) fn drawing(title: &str, words: &str, width: f64, height: f64, body: Markup) -> Markup {
    html! {
        svg xmlns="http://www.w3.org/2000/svg" viewBox=(format!("0 0 {width} {height}")) role="img" aria-label=(words) {
            title { (title) }
            text.title x="0" y="16" { (title) }
            (body)
        }
    }
}

/// A drawing as a file of its own: with colours, those of the page.
pub(super) fn standalone(drawing: &str) -> String {
    let colours = STYLE.split_inclusive("}}").next().unwrap_or_default();
    let style = html! { style { (PreEscaped(colours)) (PreEscaped(PICTURE)) } }.into_string();
    drawing.replacen("<title>", &format!("{style}<title>"), 1) + "\n"
}

/// A horizontal axis that begins at zero.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    left: f64,
    right: f64,
    end: u64,
    step: u64,
}

impl Axis {
    pub(super) fn new(left: f64, right: f64, largest: u64) -> Self {
        // The smallest of 1, 2, 5, 10, 20, … with which there are at most eight steps.
        let steps = (0..19).flat_map(|power| [1, 2, 5].map(|digit: u64| digit * 10_u64.pow(power)));
        let step = { steps }.find(|step| largest / step < 8).unwrap_or(u64::MAX);
        Self { left, right, end: largest.max(1), step }
    }

    /// Where a value is.
    pub(super) fn at(&self, value: u64) -> f64 {
        let share = value as f64 / self.end as f64;
        // To a tenth of a unit: more would only make the file longer.
        ((self.left + share.min(1.0) * (self.right - self.left)) * 10.0).round() / 10.0
    }

    /// Whether a value is on the axis.
    pub(super) fn holds(&self, value: u64) -> bool {
        value <= self.end
    }

    /// Lines from `top` to `bottom`, and their numbers below.
    pub(super) fn grid(&self, top: f64, bottom: f64) -> Markup {
        let marks = (0..=self.end / self.step).map(|n| n * self.step);
        html! {
            @for mark in marks {
                line.grid x1=(self.at(mark)) x2=(self.at(mark)) y1=(top) y2=(bottom) {}
                text.small x=(self.at(mark)) y=(bottom + 15.0) text-anchor="middle" { (short(mark)) }
            }
        }
    }
}

/// A round number, short.
fn short(number: u64) -> String {
    match number {
        0 => "0".to_owned(),
        _ if number.is_multiple_of(1_000_000) => format!("{}M", number / 1_000_000),
        _ if number.is_multiple_of(1000) => format!("{}k", number / 1000),
        _ => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_has_round_marks_and_holds_its_largest_value() {
        let axis = Axis::new(100.0, 200.0, 126_000);
        assert_eq!(axis.step, 20_000);
        assert!((axis.at(63_000) - 150.0).abs() < 0.1 && (axis.at(200_000) - 200.0).abs() < 0.1);
        assert!(axis.holds(126_000) && !axis.holds(126_001));
        assert!(axis.grid(0.0, 10.0).into_string().contains(">120k<"));
        assert_eq!([0, 500, 2000, 15_000_000].map(short), ["0", "500", "2k", "15M"]);
        assert!(Axis::new(0.0, 1.0, 0).at(0) < 0.1);
        assert!(Axis::new(0.0, 1.0, u64::MAX).at(1) < 0.1);
    }

    #[test]
    fn a_file_of_its_own_has_its_colours() {
        let svg = standalone(&drawing("<a>", "b", 1.0, 1.0, html! {}).into_string());
        assert!(
            svg.contains("<style>:root{") && svg.contains("prefers-color-scheme:dark") && svg.contains("--c7"),
            "{svg}"
        );
        assert!(svg.contains("&lt;a&gt;") && !svg.contains("<a>"), "{svg}");
    }
}
