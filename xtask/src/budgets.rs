//! `cargo xtask budgets`, and what `cargo xtask test` does with them: what things may cost.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::{fs, slice};

use anyhow::{Context, Result, ensure};
use clap::Args;
use hyperbp_benches::{BREAKPOINTS, callgrind};
use hyperbp_lab::plan::Selection;
use hyperbp_lab::{Bench, Host, Lab, Program, Progress, tools};
use hyperbp_report::{Collection, Results};
use serde::{Deserialize, Serialize};

const EXAMPLES: &str = "\
Examples:
  cargo xtask budgets
      Measure, and say what costs more or less than bench/budgets.toml says. Exit code 1 if something costs more.
  cargo xtask budgets --no-lab
      The core's instructions alone: a minute.
  cargo xtask budgets --accept
      Measure, and write that file. The commit says why it changes.

`cargo xtask test` measures and compares the same.";

/// Compare what a hit costs with bench/budgets.toml: in instructions of the core, and in the lab in ticks
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Budgets {
    /// Make what is measured the budget
    #[arg(long)]
    accept: bool,

    /// Only the core's instructions
    #[arg(long)]
    no_lab: bool,
}

/// What is put in front of the budgets.
const HEAD: &str = "\
# What a hit may cost. `cargo xtask test` fails when something costs more. To accept that, run `cargo xtask budgets --accept`, and
# say why in the commit. docs/benchmarks.md explains.
#
# made_with: versions of what the figures depend on besides this repository.
# instructions: of the core, by mechanism, with 1, 100 and 10,000 breakpoints set.
# ticks: medians of the runner in the lab with one CPU, by mechanism and workload.

";

/// What the core's instructions depend on.
const OF_INSTRUCTIONS: [&str; 4] = ["rustc", "libc6", "valgrind", "memcpy"];
/// Debian's packages, of the machine this runs on, that what runs in the lab depends on: dom0 gets the one's libraries, and the
/// image the other's boot loader.
const OF_TICKS: [&str; 2] = ["libc6", "grub-pc-bin"];

/// What may be more than the budget, in thousandths, with the same versions and with others.
///
/// Instructions are exactly the same then. Ticks are so only in the same image; in another, where in the period of Xen's
/// scheduler a row falls is another, too: 750 ticks, which is 3 % of the cheapest row.
const INSTRUCTIONS_MORE: (u64, u64) = (0, 20);
const TICKS_MORE: (u64, u64) = (40, 50);

/// Names, and what they cost.
type Costs<T> = BTreeMap<String, BTreeMap<String, T>>;

/// What things cost, or may cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Table {
    made_with: BTreeMap<String, String>,
    instructions: Costs<[u64; BREAKPOINTS.len()]>,
    ticks: Costs<u64>,
}

/// Two tables, compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Comparison {
    /// How many figures were compared.
    pub(crate) figures: usize,
    /// What costs too much, and what to do about it.
    pub(crate) more: Vec<String>,
    /// What costs less.
    pub(crate) less: Vec<String>,
    /// What is no longer, or not yet, in the budget.
    pub(crate) missing: Vec<String>,
    /// Why it is not compared exactly.
    pub(crate) others: Vec<String>,
}

impl Budgets {
    pub(crate) fn run(self) -> Result<()> {
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), Progress::new())?;
        let bench = lab.prepare(hyperbp_lab::Xen::default(), false)?;
        let mut measured = Table::counted(&lab, &bench)?;
        if !self.no_lab {
            measured = measured.with_ticks(measure(&lab, &bench)?.results());
        }
        if self.accept {
            if self.no_lab && file().exists() {
                measured.take_ticks_of(Table::read()?);
            }
            measured.write()?;
            println!("{} has what was measured. Say in the commit why it changes.", file().display());
            return Ok(());
        }
        let compared = Table::read()?.compare(&measured);
        compared.print_notes();
        compared.more.iter().for_each(|more| println!("{more}"));
        ensure!(compared.more.is_empty(), "{} of {} figures are over budget", compared.more.len(), compared.figures);
        println!("All {} figures are within budget.", compared.figures);
        Ok(())
    }
}

/// Measures in the lab what has a budget there.
fn measure(lab: &Lab, bench: &Bench<'_>) -> Result<Collection> {
    let runner = lab.build(Program::Runner, Some(&bench.sysroot))?;
    let job = bench.bench("budgets", &runner, slice::from_ref(&selection()), 1);
    let image = bench.image(&job)?;
    let outcome = bench.run(&[(job, image)], 1)?.remove(0);
    let dir = crate::target().join("budgets");
    outcome.unpack(&dir)?;
    Collection::read(&dir.join("0"))
}

/// What is measured in the lab for it.
pub(crate) fn selection() -> Selection {
    Selection { samples: Some(100), page_samples: Some(2), ..Selection::default() }
}

fn file() -> PathBuf {
    crate::repo().join("bench").join("budgets.toml")
}

impl Table {
    /// The budgets.
    ///
    /// # Errors
    /// If the file is not there or makes no sense.
    pub(crate) fn read() -> Result<Self> {
        let what = || format!("cannot read {}: `cargo xtask budgets --accept` makes it", file().display());
        toml::from_str(&fs::read_to_string(file()).with_context(what)?).with_context(what)
    }

    fn write(&self) -> Result<()> {
        let text = HEAD.to_owned() + &toml::to_string(self)?;
        fs::write(file(), text).with_context(|| format!("cannot write {}", file().display()))
    }

    /// What callgrind counts now.
    ///
    /// # Errors
    /// Those of [`callgrind::measure`], or if a version cannot be told.
    pub(crate) fn counted(lab: &Lab, bench: &Bench<'_>) -> Result<Self> {
        let mut table = Self { made_with: made_with(bench)?, ..Self::default() };
        let program = lab.build(Program::Hits, None)?;
        for (case, count) in callgrind::measure(&program, &crate::target(), &lab.progress)? {
            let of_mechanism = table.instructions.entry(case.mechanism.to_owned()).or_default();
            let counts = of_mechanism.entry(case.what.name().to_owned()).or_default();
            let of_number = BREAKPOINTS.iter().zip(counts).find(|(breakpoints, _)| **breakpoints == case.breakpoints);
            of_number.into_iter().for_each(|(_, of_number)| *of_number = count);
        }
        Ok(table)
    }

    /// And what was measured in the lab.
    #[must_use]
    pub(crate) fn with_ticks(mut self, results: &Results) -> Self {
        let ours = |run: &&hyperbp_report::Run| run.host == "runner" && run.mechanism != "none";
        for run in results.runs.iter().filter(ours) {
            let of_mechanism = self.ticks.entry(run.mechanism.clone()).or_default();
            of_mechanism.insert(run.workload.name().to_owned(), run.ticks.median);
        }
        self
    }

    /// Takes from another table the ticks, and the versions that only they depend on.
    fn take_ticks_of(&mut self, other: Self) {
        self.ticks = other.ticks;
        let of_ticks = other.made_with.into_iter().filter(|(name, _)| !OF_INSTRUCTIONS.contains(&name.as_str()));
        self.made_with.extend(of_ticks);
    }

    /// Compares what was measured with this, the budget.
    pub(crate) fn compare(&self, measured: &Self) -> Comparison {
        let mut compared = Comparison::default();
        let different = |name: &&String| self.made_with.get(*name) != measured.made_with.get(*name);
        let names: Vec<&String> = self.made_with.keys().chain(measured.made_with.keys()).filter(different).collect();
        let of_instructions = |name: &&String| OF_INSTRUCTIONS.contains(&name.as_str());
        let of_ticks = |name: &&String| !["valgrind", "memcpy"].contains(&name.as_str());
        let version =
            |table: &Self, name: &str| table.made_with.get(name).cloned().unwrap_or_else(|| "none".to_owned());
        compared.others =
            names.iter().map(|n| format!("{n}: {}, not {}", version(measured, n), version(self, n))).collect();
        compared.others.sort();
        compared.others.dedup();
        let allowed = |more: (u64, u64), others: bool| if others { more.1 } else { more.0 };

        let more = allowed(INSTRUCTIONS_MORE, names.iter().copied().any(|name| of_instructions(&name)));
        let numbers = |(what, counts): (String, &[u64; BREAKPOINTS.len()])| {
            let what = move |breakpoints| format!("{what} with {breakpoints} breakpoints, instructions of the core");
            BREAKPOINTS.into_iter().map(what).zip(*counts).collect::<Vec<_>>()
        };
        let flat = |table: &Self| flat(&table.instructions).flat_map(numbers).collect::<BTreeMap<_, _>>();
        compared.add(&flat(self), &flat(measured), more);

        let more = allowed(TICKS_MORE, names.iter().copied().any(|name| of_ticks(&name)));
        let in_ticks = |(what, ticks): (String, &u64)| (what + ", ticks in the lab", *ticks);
        let flat = |table: &Self| self::flat(&table.ticks).map(in_ticks).collect::<BTreeMap<_, _>>();
        compared.add(&flat(self), &flat(measured), more);
        compared
    }
}

/// Mechanism and what it does, in one name.
fn flat<T>(costs: &Costs<T>) -> impl Iterator<Item = (String, &T)> {
    costs.iter().flat_map(|(mechanism, of_mechanism)| {
        of_mechanism.iter().map(move |(what, cost)| (format!("{mechanism} {what}"), cost))
    })
}

impl Comparison {
    /// Compares figures; `more` thousandths of the budget over it are let pass.
    fn add(&mut self, budget: &BTreeMap<String, u64>, measured: &BTreeMap<String, u64>, more: u64) {
        self.figures += measured.len();
        for (what, cost) in measured {
            match budget.get(what) {
                None => self.missing.push(format!("{what}: {cost}, and no budget")),
                Some(may) if cost * 1000 > may * (1000 + more) => {
                    let percent = (*cost as f64 / (*may).max(1) as f64 - 1.0) * 100.0;
                    self.more.push(format!(
                        "{what}: {cost}, over its budget of {may} (+{percent:.2} %); to accept, run `cargo xtask budgets \
                         --accept`, and say why in the commit"
                    ));
                }
                Some(may) if cost < may => self.less.push(format!("{what}: {cost}, under its budget of {may}")),
                Some(_) => {}
            }
        }
        let gone = budget.keys().filter(|what| !measured.contains_key(*what));
        self.missing.extend(gone.map(|what| format!("{what}: has a budget, and was not measured")));
    }

    /// Says what does not fail.
    pub(crate) fn print_notes(&self) {
        if !self.others.is_empty() {
            println!("Other versions than the budgets were made with, so a little more is let pass:");
            self.others.iter().for_each(|other| println!("  {other}"));
        }
        self.missing.iter().chain(&self.less).for_each(|note| println!("{note}"));
        if !(self.missing.is_empty() && self.less.is_empty()) {
            println!("`cargo xtask budgets --accept` writes down what was measured.");
        }
    }
}

/// Versions of what the figures depend on.
fn made_with(bench: &Bench<'_>) -> Result<BTreeMap<String, String>> {
    let rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .current_dir(crate::repo())
        .arg("--version")
        .output()
        .context("cannot run rustc")?;
    let mut versions = BTreeMap::from([
        ("rustc".to_owned(), String::from_utf8_lossy(&rustc.stdout).trim().to_owned()),
        ("memcpy".to_owned(), memcpy().to_owned()),
    ]);
    let packages = [&OF_TICKS[..], &["valgrind"]].concat();
    versions.extend(tools::versions(&Host::this(), &packages)?);
    versions.extend(bench.versions()?.into_iter().map(|package| (package.name, package.version)));
    Ok(versions)
}

/// Which of glibc's ways to copy memory this CPU gets: some of what callgrind counts.
fn memcpy() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        return if std::arch::is_x86_feature_detected!("ermsb") { "avx2, erms" } else { "avx2" };
    }
    "other"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rustc: &str, instructions: u64, ticks: u64) -> Table {
        let of = |name: &str, version: &str| (name.to_owned(), version.to_owned());
        let made_with = BTreeMap::from([of("rustc", rustc), of("libc6", "2")]);
        let costs = |what: &str, cost| BTreeMap::from([("auto".to_owned(), BTreeMap::from([(what.to_owned(), cost)]))]);
        let instructions = costs("hit", 0)
            .into_keys()
            .map(|mechanism| (mechanism, BTreeMap::from([("hit".to_owned(), [instructions; BREAKPOINTS.len()])])));
        Table { made_with, instructions: instructions.collect(), ticks: costs("exec_bp", ticks) }
    }

    #[test]
    fn one_instruction_more_is_too_much_and_one_less_is_told() {
        let budget = table("1", 500, 25_000);
        assert_eq!(budget.compare(&budget), Comparison { figures: 4, ..Comparison::default() });
        let more = budget.compare(&table("1", 501, 25_000));
        assert_eq!(more.more.len(), 3);
        assert!(more.more[0].contains("auto hit with 1 breakpoints") && more.more[0].contains("budgets --accept"));
        let less = budget.compare(&table("1", 499, 24_999));
        assert_eq!((less.more.len(), less.less.len()), (0, 4));
    }

    #[test]
    fn ticks_have_a_little_room() {
        let budget = table("1", 500, 25_000);
        assert!(budget.compare(&table("1", 500, 26_000)).more.is_empty());
        assert_eq!(budget.compare(&table("1", 500, 26_001)).more.len(), 1);
    }

    #[test]
    fn other_versions_are_named_and_have_more_room() {
        let budget = table("1", 500, 25_000);
        let other = budget.compare(&table("2", 510, 26_250));
        assert_eq!((other.more.len(), other.others), (0, vec!["rustc: 2, not 1".to_owned()]));
        assert_eq!(budget.compare(&table("2", 511, 26_251)).more.len(), 4);
    }

    #[test]
    fn what_has_no_budget_is_told() {
        let budget = table("1", 500, 25_000);
        let compared = Table { ticks: BTreeMap::new(), ..budget.clone() }.compare(&budget);
        assert_eq!(compared.missing, ["auto exec_bp, ticks in the lab: 25000, and no budget"]);
        let compared = budget.compare(&Table { ticks: BTreeMap::new(), ..budget.clone() });
        assert_eq!(compared.missing, ["auto exec_bp, ticks in the lab: has a budget, and was not measured"]);
    }

    #[test]
    fn a_table_reads_as_it_was_written() {
        let table = table("1", 500, 25_000);
        assert_eq!(toml::from_str::<Table>(&toml::to_string(&table).unwrap()).unwrap(), table);
    }
}
