//! Drives the benchmark guest from dom0: `hyperbp-bench --help`.

mod balloon;
mod bench;
mod check;
mod cli;
mod core;
mod domain_checks;
mod elsewhere;
mod floor;
mod guest;
mod hostile;
mod patch;
mod program;
mod recover;
mod ring;
mod snippets;
mod storm;
mod symbols;
mod system_page;
mod trace;
mod trace_checks;
mod waiting;
mod write_checks;
mod xen;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;

use bench::{Plan, Subject};
use cli::{Cli, Command, Progress, Run};
use hyperbp::Mechanism;
use hyperbp_event_channel::Ways;
use xen::{Domain, OpenError};

fn main() -> ExitCode {
    env_logger::Builder::new().filter_level(log::LevelFilter::Warn).parse_default_env().init();
    let Cli { command, allow_guest_altp2m: allow } = Cli::parse();
    let result = match command {
        Command::Run(run) => measure(&run, allow),
        Command::Check(check) => self::check(&check, allow),
        Command::Storm(storm) => self::storm(&storm, allow),
        Command::Hostile(hostile) => self::hostile(&hostile),
        Command::Recover(recover) => self::recover(&recover),
        Command::Waiting(waiting) => self::waiting(&waiting, allow),
        Command::CheckDomain(check) => check_domain(&check, allow),
        Command::Settle(settle) => self::settle(&settle),
        Command::Trace(trace) => self::trace(&trace, allow),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // On one line, so that whoever reads it through a pipe gets it whole.
            eprintln!("error: {}", one_line(&error));
            ExitCode::from(exit_code(&error))
        }
    }
}

/// The error and its causes, without those that the one before tells already.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    let mut last = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if last.is_empty() {
            line.push_str(&cause);
        } else if !last.contains(&cause) {
            line.push_str(": ");
            line.push_str(&cause);
        }
        last = cause;
    }
    line
}

/// See the help text.
fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<Usage>() {
        return 2;
    }
    match error.downcast_ref() {
        Some(OpenError::NoSuchDomain(_)) => 3,
        Some(OpenError::NoAltp2m(_) | OpenError::GuestAltp2m { .. }) => 4,
        Some(OpenError::NotADom0(_)) => 5,
        Some(OpenError::Leftover { .. }) => 6,
        Some(OpenError::Ledger(_) | OpenError::Other(_)) | None => 1,
    }
}

/// The arguments make no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

fn measure(run: &Run, allow_guest_altp2m: bool) -> anyhow::Result<()> {
    let plan = plan(run)?;
    let mut domain = Domain::open(&run.domain, allow_guest_altp2m)?;
    domain.wait_by(Ways { watch: Duration::from_micros(run.watch.into()), halt: !run.no_halt });
    let (collection, order) =
        bench::measure(&mut domain, &plan, &mut |done, total, text| run.progress.report(done, total, text))?;
    collection.write(&run.out)?;
    hyperbp_report::Key::write_order(&run.out, &order)?;
    if run.progress == Progress::Text {
        println!("{}", hyperbp_report::table(collection.results()));
    }
    Ok(())
}

fn recover(arguments: &cli::Recover) -> anyhow::Result<()> {
    let done = recover::recover(&mut Domain::connect(&arguments.domain)?, arguments.force)?;
    if done.is_empty() {
        println!("There was nothing to recover in domain {}.", arguments.domain);
        return Ok(());
    }
    println!("Domain {} is as it was without a monitor. Found and undone:", arguments.domain);
    for line in done {
        println!("- {line}");
    }
    Ok(())
}

fn check_domain(arguments: &cli::CheckDomain, allow_guest_altp2m: bool) -> anyhow::Result<()> {
    let ram = arguments.ram.iter().map(|gfn| Ok(hyperbp::Gfn(frame(gfn)?))).collect::<Result<Vec<_>, Usage>>()?;
    let open = || Domain::open(&arguments.domain, allow_guest_altp2m);
    let other = || Domain::connect(&arguments.domain);
    let (pages, stride) = (arguments.pages, arguments.stride);
    let (mechanism, image) = (&*arguments.mechanism, &*arguments.image);
    match arguments.what {
        cli::DomainCheck::Memory => domain_checks::memory(&mut open()?, &ram),
        cli::DomainCheck::Views => domain_checks::views(&mut open()?, &mut other()?),
        cli::DomainCheck::Limit => domain_checks::limit(&mut open()?, &other()?),
        cli::DomainCheck::Pages => domain_checks::pages(&mut open()?, pages, stride),
        cli::DomainCheck::Insert => domain_checks::insert(&mut open()?, pages, stride),
        cli::DomainCheck::Rom => write_checks::rom(&mut open()?, &other()?),
        cli::DomainCheck::LogDirty => write_checks::log_dirty(&mut open()?, &other()?),
        cli::DomainCheck::RefusedInjection => write_checks::refused_injection(&mut open()?, &mut other()?),
        // The others have a trace in another process.
        cli::DomainCheck::Crash => trace_checks::crash(&other()?, false),
        cli::DomainCheck::TripleFault => trace_checks::crash(&other()?, true),
        cli::DomainCheck::Save => trace_checks::save(&other()?, mechanism, image, false),
        cli::DomainCheck::SaveAndResume => trace_checks::save(&other()?, mechanism, image, true),
    }
}

/// A frame number, in hexadecimal.
fn frame(text: &str) -> Result<u64, Usage> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).map_err(|error| Usage(format!("`{text}` is no frame number: {error}")))
}

fn settle(arguments: &cli::Settle) -> anyhow::Result<()> {
    check::settle(&mut Domain::connect(&arguments.domain)?, arguments.count)
}

fn waiting(arguments: &cli::Waiting, allow_guest_altp2m: bool) -> anyhow::Result<()> {
    let mut domain = Domain::open(&arguments.domain, allow_guest_altp2m)?;
    let time = Duration::from_secs(arguments.seconds);
    let progress = &mut |done, total, text: &str| arguments.progress.report(done, total, text);
    let rows = waiting::all(&mut domain, time, progress)?;
    if let Some(dir) = &arguments.out {
        let file = dir.join("waiting.json");
        std::fs::write(&file, hyperbp_report::waiting_to_json(&rows)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    if arguments.progress == Progress::Text {
        println!("{}", hyperbp_report::waiting_table(&rows));
    }
    let problems = hyperbp_report::waiting_problems(&rows);
    anyhow::ensure!(problems.is_empty(), "{}", problems.join("; "));
    Ok(())
}

fn check(arguments: &cli::Check, allow_guest_altp2m: bool) -> anyhow::Result<()> {
    let programs = arguments.elsewhere.programs()?;
    let mut domain = Domain::open(&arguments.domain, allow_guest_altp2m)?;
    let failed = match (arguments.attach, arguments.balloon) {
        (Some(times), _) => check::attach(&mut domain, times)?,
        (None, Some(rounds)) => check::balloon(&mut domain, rounds)?,
        (None, None) => check::all(&mut domain, &programs, arguments.only.as_deref())?,
    };
    anyhow::ensure!(failed == 0, "{failed} checks failed");
    Ok(())
}

fn storm(arguments: &cli::Storm, allow_guest_altp2m: bool) -> anyhow::Result<()> {
    let mechanisms = match arguments.mechanisms.is_empty() {
        true => Mechanism::all().collect(),
        false => arguments.mechanisms.iter().map(|name| mechanism(name)).collect::<anyhow::Result<Vec<_>>>()?,
    };
    let smartvmi = arguments.smartvmi.as_deref().map(|path| elsewhere::Program::new(cli::Host::Smartvmi, path));
    let subjects = match smartvmi.transpose()? {
        None => mechanisms.into_iter().map(Subject::Core).collect(),
        Some(program) => {
            // Its own comes last: it may leave a guest in pieces.
            let original = program.originals().iter().map(|original| elsewhere::Backend::Original(*original));
            let core = mechanisms.into_iter().map(elsewhere::Backend::Hyperbp).filter(|_| program.has_hyperbp());
            core.chain(original).map(|backend| Subject::Elsewhere(program, backend)).collect::<Vec<_>>()
        }
    };
    let mut domain = Domain::open(&arguments.domain, allow_guest_altp2m)?;
    let storms = storm::all(&mut domain, &subjects, arguments.count, &mut |done, total, text| {
        arguments.progress.report(done, total, text);
    })?;
    println!("{}", hyperbp_report::storm_table(&storms));
    if let Some(dir) = &arguments.out {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let file = dir.join("storm.json");
        let json = hyperbp_report::storms_to_json(&storms)?;
        std::fs::write(&file, json).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let wrong: Vec<_> = storms.iter().filter(|storm| !storm.is_right()).map(|storm| &*storm.mechanism).collect();
    anyhow::ensure!(wrong.is_empty(), "something is wrong with {}: see the table", wrong.join(", "));
    Ok(())
}

fn hostile(arguments: &cli::Hostile) -> anyhow::Result<()> {
    let mechanisms = match arguments.mechanisms.is_empty() {
        true => Mechanism::all().collect(),
        false => arguments.mechanisms.iter().map(|name| mechanism(name)).collect::<anyhow::Result<Vec<_>>>()?,
    };
    let plan = hostile::Plan { mechanisms, probes: &arguments.probes, config: arguments.config.as_deref() };
    if let Some(dir) = &arguments.out {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let results = hostile::all(
        &arguments.domain,
        &plan,
        &mut |done, total, text| arguments.progress.report(done, total, text),
        &mut |results| {
            if let (Progress::Lines, Some(last)) = (arguments.progress, results.last()) {
                print!("{}", hyperbp_report::hostile_details(std::slice::from_ref(last)));
            }
            let Some(dir) = &arguments.out else { return Ok(()) };
            let (file, whole) = (dir.join("hostile.json"), dir.join("hostile.json.new"));
            std::fs::write(&whole, hyperbp_report::hostile_to_json(results)?)
                .and_then(|()| std::fs::rename(&whole, &file))
                .with_context(|| format!("cannot write {}", file.display()))
        },
    )?;
    if arguments.progress == Progress::Text {
        println!("{}", hyperbp_report::hostile_table(&results));
    }
    let wrong: Vec<_> = results.iter().filter(|result| !result.is_right()).map(|result| &*result.mechanism).collect();
    anyhow::ensure!(wrong.is_empty(), "the guest has found something under {}", wrong.join(", "));
    Ok(())
}

fn trace(arguments: &cli::Trace, allow_guest_altp2m: bool) -> anyhow::Result<()> {
    let mechanism = mechanism(&arguments.mechanism)?;
    let limit = arguments.limit.map(std::time::Duration::from_secs);
    let mut domain = Domain::open(&arguments.domain, allow_guest_altp2m)?;
    let names: Vec<_> = arguments.functions.iter().chain(&arguments.between).map(String::as_str).collect();
    let mut places = trace::locate(&mut domain, arguments.symbols.as_deref(), &names)?;
    let between = arguments.between.as_ref().and_then(|_| places.pop());
    let plan = trace::Plan { functions: places, between, mechanism, limit };
    let trace::Traced { trace, ended, problem } = trace::trace(&mut domain, &arguments.domain, &plan)?;
    print!("{}", trace.table());
    if let Some(ended) = ended {
        eprintln!("The trace has ended: {ended}.");
    }
    if let Some(file) = &arguments.json {
        std::fs::write(file, trace.to_json()?).with_context(|| format!("cannot write {}", file.display()))?;
    }
    problem.map_or(Ok(()), Err)
}

/// A mechanism by name, or spelled out.
fn mechanism(name: &str) -> anyhow::Result<Mechanism> {
    Ok(name.parse().map_err(|error: hyperbp::Error| Usage(error.to_string()))?)
}

fn plan(run: &Run) -> anyhow::Result<Plan<'_>> {
    let programs = run.elsewhere.programs()?;
    let all = Subject::all(&programs);
    let named = |subject: &Subject<'_>| run.mechanisms.is_empty() || run.mechanisms.contains(&subject.mechanism());
    let mut subjects: Vec<_> = all.iter().copied().filter(named).collect();
    for name in run.mechanisms.iter().filter(|name| !all.iter().any(|subject| subject.mechanism() == **name)) {
        subjects.extend(Subject::of_core(mechanism(name)?, &programs));
    }
    subjects.retain(|subject| {
        (run.hosts.is_empty() || run.hosts.contains(&subject.host()))
            && (run.backends.is_empty() || run.backends.contains(&subject.backend()))
    });
    let workloads = hyperbp_report::Workload::ALL;
    let workloads = workloads.into_iter().filter(|w| run.workloads.is_empty() || run.workloads.contains(w)).collect();
    Ok(Plan { subjects, workloads, samples: run.samples, page_samples: run.page_samples, kind: run.machine.into() })
}
