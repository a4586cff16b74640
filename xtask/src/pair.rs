//! What is said of the two processes that share a page of code: by themselves (see `bench/lab/pair`), and by SmartVMI's plugin.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use hyperbp_report::{Pass, Ticks};
use serde_json::Value;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// What the processes have said on the guest's console.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Said {
    /// The address of the function in each process, and the number of its page in the guest's memory.
    pages: Vec<(String, u64, u64)>,
    passes: Vec<Work>,
}

/// What they have said of one pass.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    name: String,
    /// Whether it came to its end.
    ended: bool,
    /// For each round and each of the three things that are measured: how often it was done, and ticks for all of them.
    rounds: Vec<[(u64, u64); 3]>,
    /// How often `pair-a` has let another process run, and how often that was meant.
    left: Option<(u64, u64)>,
    calls: Vec<(String, u64)>,
    code: Vec<(String, String)>,
}

impl Said {
    pub(crate) fn parse(console: &str) -> Self {
        let mut said = Self::default();
        for line in console.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match (words[..].split_first(), said.passes.last_mut()) {
                (Some((&"page", [who, address, frame])), _) => {
                    let page = hexadecimal(address).zip(hexadecimal(frame));
                    said.pages.extend(page.map(|(address, frame)| ((*who).to_owned(), address, frame)));
                }
                (Some((&"begin", [name])), _) => said.passes.push(Work { name: (*name).to_owned(), ..Work::default() }),
                (Some((word, rest)), Some(work)) if !work.ended => work.add(word, rest),
                _ => {}
            }
        }
        said
    }

    /// What they said of this pass, if it came to its end.
    pub(crate) fn pass(&self, name: &str) -> Option<&Work> {
        self.passes.iter().find(|work| work.name == name && work.ended)
    }

    /// Whether the page of both is one page of the guest's memory.
    pub(crate) fn is_one_page(&self) -> bool {
        // Linux says 0 to those who are not to know.
        matches!(&self.pages[..], [(_, _, a), (_, _, b)] if a == b && *a != 0)
    }

    pub(crate) fn pages(&self) -> String {
        let page = |(who, address, frame): &(String, u64, u64)| format!("pair-{who} {address:#x} in gfn {frame:#x}");
        self.pages.iter().map(page).collect::<Vec<_>>().join(", ")
    }

    /// Whether `gpa` is where the function is.
    pub(crate) fn is_at(&self, gpa: u64) -> bool {
        self.pages.iter().all(|(_, address, frame)| frame * PAGE + address % PAGE == gpa)
    }
}

impl Work {
    fn add(&mut self, word: &str, rest: &[&str]) {
        let numbers: Vec<u64> = rest.iter().filter_map(|word| word.parse().ok()).collect();
        match (word, rest, &numbers[..]) {
            ("round", _, &[a, b, c, d, e, f]) => self.rounds.push([(a, b), (c, d), (e, f)]),
            ("left", _, &[left, of]) => self.left = Some((left, of)),
            ("calls", [who, _], &[calls]) => self.calls.push(((*who).to_owned(), calls)),
            ("code", [who, what @ ..], _) => self.code.push(((*who).to_owned(), what.join(" "))),
            ("end", [name], _) if *name == self.name => self.ended = true,
            _ => {}
        }
    }

    /// In numbers. It must have had so many rounds.
    pub(crate) fn summary(&self, name: &str, host: Option<String>, mechanism: &str, rounds: u32) -> Result<Pass> {
        let enough = self.rounds.len() == rounds as usize;
        let few = || format!("`{name}` has {} of {rounds} rounds", self.rounds.len());
        let ticks = |what: usize| {
            let each = self.rounds.iter().map(|round| round[what].1 / round[what].0.max(1));
            Ticks::of(&mut each.collect::<Vec<_>>()).filter(|_| enough).with_context(few)
        };
        let calls = |who: &str| {
            let mut calls = self.calls.iter().filter(|(caller, _)| caller == who);
            calls
                .next()
                .map(|(_, calls)| *calls)
                .with_context(|| format!("`{name}`: pair-{who} has not said its calls"))
        };
        Ok(Pass {
            name: name.to_owned(),
            host,
            mechanism: mechanism.to_owned(),
            switches: self.rounds.iter().map(|round| round[0].0).sum(),
            ticks_per_switch: ticks(0)?,
            calls: calls("a")?,
            calls_of_the_other: calls("b")?,
            reported: None,
            ticks_per_call: ticks(1)?,
            ticks_per_call_of_the_other: ticks(2)?,
        })
    }

    /// Whether every wait that was measured was a switch to the other process and one back.
    pub(crate) fn has_switched(&self) -> bool {
        self.left.is_some_and(|(left, of)| left >= of && of > 0)
    }

    pub(crate) fn times_left(&self) -> String {
        let (left, of) = self.left.unwrap_or_default();
        format!("{left} times, in {of} waits")
    }

    /// Whether both have read their code as it was at the start.
    pub(crate) fn code_is_whole(&self) -> bool {
        self.code.len() == 2 && self.changes().is_empty()
    }

    /// What else they have read.
    pub(crate) fn changes(&self) -> Vec<String> {
        let changed = self.code.iter().filter(|(_, what)| what != "same");
        changed.map(|(who, what)| format!("pair-{who}: {what}")).collect()
    }
}

fn hexadecimal(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

/// What the plugin reports of the breakpoint in one process: see smartvmi-patches/README.md.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reported {
    /// The guest-physical address.
    pub(crate) pa: u64,
    /// How often the plugin was told.
    pub(crate) callbacks: u64,
    /// How often any process has run through it, where hyperbp has set it.
    pub(crate) hits: Option<u64>,
}

impl Reported {
    pub(crate) fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        Self::parse(&text).with_context(|| format!("{} does not report one breakpoint", file.display()))
    }

    fn parse(text: &str) -> Option<Self> {
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut breakpoints = lines.filter(|line| line["Type"] == "Breakpoint");
        let (Some(one), None) = (breakpoints.next(), breakpoints.next()) else { return None };
        Some(Self {
            pa: hexadecimal(one["PA"].as_str()?)?,
            callbacks: one["Callbacks"].as_u64()?,
            hits: one["Hits"].as_u64(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "page a 0x7f0000001040 0x3cda\r
page b 0x7f0000002040 0x3cda\r
ready\r
original 2\r
begin original\r
round 100 300000 20 2000 20 9000\r
round 100 500000 20 4000 20 9000\r
left a 101 100\r
calls a 50\r
code a same\r
calls b 60\r
code b 0x0 [55, 48] [cc, 48]\r
end original\r
begin hyperbp\r
round 100 1 20";

    #[test]
    fn the_processes_are_understood() {
        let said = Said::parse(CONSOLE);
        assert!(said.is_one_page() && said.is_at(0x3cda040) && !said.is_at(0x3cda000));
        assert_eq!(said.pages(), "pair-a 0x7f0000001040 in gfn 0x3cda, pair-b 0x7f0000002040 in gfn 0x3cda");
        let work = said.pass("original").unwrap();
        assert_eq!(work.left, Some((101, 100)));
        assert!(!work.code_is_whole());
        assert_eq!(work.changes(), ["pair-b: 0x0 [55, 48] [cc, 48]"]);
        let pass = work.summary("original", Some("smartvmi".to_owned()), "repair", 2).unwrap();
        assert_eq!((pass.switches, pass.calls, pass.calls_of_the_other), (200, 50, 60));
        assert_eq!((pass.ticks_per_switch.median, pass.ticks_per_switch.max), (3000, 5000));
        assert_eq!(pass.ticks_per_call.max, 200);
        assert!(work.summary("original", None, "repair", 3).is_err());
        assert_eq!(said.pass("hyperbp"), None);
        assert!(!Said::parse("").is_one_page());
    }

    #[test]
    fn the_plugin_s_report_is_understood() {
        let own = r#"{"Callbacks":20,"PA":"0x3cda000","Type":"Breakpoint"}
{"Backend":"original","Type":"Total"}
"#;
        assert_eq!(Reported::parse(own), Some(Reported { pa: 0x3cda000, callbacks: 20, hits: None }));
        let ours = r#"{"Callbacks":20,"Hits":44,"PA":"0x3cda000","Type":"Breakpoint"}"#;
        assert_eq!(Reported::parse(ours).unwrap().hits, Some(44));
        assert_eq!(Reported::parse(&[ours, "\n", ours].concat()), None);
        assert_eq!(Reported::parse(r#"{"Type":"Total"}"#), None);
    }
}
