//! Box plots of the samples, one picture for each workload.

use maud::{Markup, html};

use super::drawing::{Axis, drawing};
use super::monitor::Monitor;
use crate::format::{Row, grouped};
use crate::schema::mechanism_rank;
use crate::{Collection, Key, Workload};

/// Where the plot begins, right of the monitors' names, and where it ends: the medians are on its right.
const LEFT: f64 = 172.0;
const RIGHT: f64 = 690.0;
const PITCH: f64 = 19.0;
/// A box is at least so wide: in the emulator most samples are the same.
const NARROWEST: f64 = 3.0;

/// A sample of samples, as Tukey draws it. All are values that were measured.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tukey {
    /// Quartiles.
    quartiles: [u64; 3],
    /// The outermost samples within one and a half interquartile ranges of the box.
    whiskers: [u64; 2],
    /// All that are further out.
    outliers: Vec<u64>,
}

impl Tukey {
    /// `None` if there are no samples.
    fn of(samples: &[u64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        // Nearest rank, as in the summary.
        let quartile = |n: usize| sorted.get((n * sorted.len()).div_ceil(4).checked_sub(1)?).copied();
        let quartiles = [quartile(1)?, quartile(2)?, quartile(3)?];
        let reach = (quartiles[2] - quartiles[0]).saturating_mul(3) / 2;
        let (lowest, highest) = (quartiles[0].saturating_sub(reach), quartiles[2].saturating_add(reach));
        let (inside, outliers): (Vec<_>, Vec<_>) =
            sorted.into_iter().partition(|sample| (lowest..=highest).contains(sample));
        Some(Self { quartiles, whiskers: [*inside.first()?, *inside.last()?], outliers })
    }
}

/// The picture of a workload, with the words that stand for it. `None` if it was not measured, or if all samples are equal:
/// what there is to say then, the table says.
pub(super) fn picture(collection: &Collection, rows: &[Row<'_>], workload: Workload) -> Option<(Markup, String)> {
    let mut groups: Vec<(&str, Vec<(Monitor<'_>, Tukey)>)> = Vec::new();
    let mut rows: Vec<_> = rows.iter().filter(|row| !row.is_bare()).collect();
    rows.sort_by_key(|row| mechanism_rank(row.mechanism));
    for row in rows {
        let samples = row.run(workload).and_then(|run| collection.samples(&Key::of(run)));
        let Some(tukey) = samples.and_then(Tukey::of) else { continue };
        let boxed = (Monitor::of(row), tukey);
        match groups.last_mut() {
            Some((mechanism, boxes)) if *mechanism == row.mechanism => boxes.push(boxed),
            _ => groups.push((row.mechanism, vec![boxed])),
        }
    }
    let all = || groups.iter().flat_map(|(_, boxes)| boxes);
    let whisker = all().map(|(_, tukey)| tukey.whiskers[1]).max()?;
    let equal = all().all(|(_, tukey)| tukey.whiskers == [whisker; 2] && tukey.outliers.is_empty());
    if equal {
        return None;
    }
    // A few samples that a timer has made dear must not push all others together.
    let furthest = all().flat_map(|(_, tukey)| &tukey.outliers).copied().max().unwrap_or(0).max(whisker);
    let axis = Axis::new(LEFT, RIGHT, furthest.min(whisker.saturating_add(whisker / 4)));

    let (count, cheapest) = (all().count(), all().map(|(_, tukey)| tukey.quartiles[1]).min()?);
    let words = format!(
        "Box plots of {}, {count} of them, by mechanism and monitor. The lowest median is {} ticks. All medians are in the table \
         of this workload.",
        workload.name(),
        grouped(cheapest)
    );
    let mut y = 30.0;
    let mut body = Vec::new();
    for (mechanism, boxes) in &groups {
        body.push(html! { text.group x="0" y=(y + 13.0) { (mechanism) } });
        y += PITCH;
        for (monitor, tukey) in boxes {
            body.push(drawn(*monitor, tukey, &axis, y));
            y += PITCH;
        }
        y += 7.0;
    }
    let height = y + 22.0;
    let title = format!("{}: ticks of each sample", workload.name());
    Some((drawing(&title, &words, 780.0, height, html! { (axis.grid(26.0, y)) @for part in &body { (part) } }), words))
}

fn drawn(monitor: Monitor<'_>, tukey: &Tukey, axis: &Axis, y: f64) -> Markup {
    let at = |value| axis.at(value);
    let ([low, median, high], middle) = (tukey.quartiles.map(at), y + PITCH / 2.0);
    let width = (high - low).max(NARROWEST);
    let left = if high - low < NARROWEST { median - NARROWEST / 2.0 } else { low };
    // One dot for all that would lie on each other.
    let (mut dots, mut beyond): (Vec<i64>, usize) = (Vec::new(), 0);
    for outlier in &tukey.outliers {
        match axis.holds(*outlier) {
            true => dots.push(at(*outlier).round() as i64),
            false => beyond += 1,
        }
    }
    dots.dedup();
    let colour = monitor.colour();
    html! {
        text x="12" y=(middle + 4.0) { (monitor.title()) }
        line class=(colour) x1=(at(tukey.whiskers[0])) x2=(at(tukey.whiskers[1])) y1=(middle) y2=(middle) {}
        rect class={ "box " (colour) } x=(left) y=(middle - 6.0) width=(width) height="12" {}
        line.mark x1=(median) x2=(median) y1=(middle - 7.0) y2=(middle + 7.0) {}
        @for dot in dots { circle class=(colour) style="fill:none" cx=(dot) cy=(middle) r="2.5" {} }
        @if beyond > 0 { text.small x=(RIGHT - 4.0) y=(middle + 4.0) text-anchor="end" { (beyond) " beyond ▸" } }
        text.value x="778" y=(middle + 4.0) text-anchor="end" { (grouped(tukey.quartiles[1])) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{bochs, collection, measurement};

    #[test]
    fn a_box_is_tukeys() {
        let samples = [10, 12, 11, 13, 100, 14, 12, 11];
        let tukey = Tukey::of(&samples).unwrap();
        assert_eq!(tukey, Tukey { quartiles: [11, 12, 13], whiskers: [10, 14], outliers: vec![100] });
        assert_eq!(Tukey::of(&[7]), Some(Tukey { quartiles: [7; 3], whiskers: [7; 2], outliers: vec![] }));
        assert_eq!(Tukey::of(&[]), None);
        assert_eq!(Tukey::of(&[0, u64::MAX]).map(|tukey| tukey.outliers), Some(vec![]));
    }

    #[test]
    fn every_monitor_has_a_box_with_its_median() {
        let collection = collection();
        let rows = Row::all(&collection.results().runs);
        let (picture, words) = picture(&collection, &rows, Workload::ExecBp).unwrap();
        let picture = picture.into_string();
        for text in ["60 001", "30 001", "55 001", "view-step", "floor"] {
            assert!(picture.contains(&format!(">{text}<")), "{text}: {picture}");
        }
        assert!(words.contains("3 of them") && words.contains("30 001"), "{words}");
    }

    #[test]
    fn what_is_all_the_same_has_no_picture() {
        let mut collection = Collection::new(bochs());
        collection.push(measurement("hyperbp", "emulate", Workload::Timer), vec![3, 3, 3]).unwrap();
        let rows = Row::all(&collection.results().runs);
        assert!(picture(&collection, &rows, Workload::Timer).is_none());
        assert!(picture(&collection, &rows, Workload::ExecBp).is_none());
    }

    #[test]
    fn dots_far_out_are_counted_instead() {
        let mut collection = Collection::new(bochs());
        let samples = [vec![100; 20], vec![101, 115, 100_000, 100_001]].concat();
        collection.push(measurement("hyperbp", "emulate", Workload::ExecBp), samples).unwrap();
        let rows = Row::all(&collection.results().runs);
        let picture = picture(&collection, &rows, Workload::ExecBp).unwrap().0.into_string();
        assert!(picture.contains("2 beyond"), "{picture}");
        assert_eq!(picture.matches("<circle").count(), 2, "{picture}");
    }
}
