//! `cargo xtask test`

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use anyhow::{Result, ensure};
use clap::Args;
use hyperbp_lab::{Host, Lab, Progress, Xen, plan};

use crate::checks::{self, Checks};
use crate::elsewhere::{self, Skipped};
use crate::fuzz::Fuzz;
use crate::steps::Steps;
use crate::{cpp, deny, guest};

/// Run all tests: formatting, lints, unit and property tests, those of the C++ side, documentation, dependencies, a little
/// fuzzing, and checks on a real Xen in the lab
#[derive(Debug, Args)]
pub(crate) struct Test {
    /// Only what needs no emulator
    #[arg(long, conflicts_with_all = ["only_lab", "drakvuf", "smartvmi"])]
    no_lab: bool,

    /// Only what is about ffi/ and cpp-shim/
    #[arg(long, conflicts_with_all = ["no_lab", "only_lab"])]
    only_cpp: bool,

    /// Only what runs in the emulator
    #[arg(long)]
    only_lab: bool,

    /// Xen's version in the emulator: 4.17, or 4.20. (Its libraries may be too new for what runs outside.)
    #[arg(long, value_name = "VERSION", default_value_t, requires = "only_lab")]
    xen: Xen,

    /// Install what the benchmark's program for Windows needs (mingw-w64 and Wine, a gigabyte), and test that, too
    #[arg(long, conflicts_with_all = ["only_cpp", "only_lab"])]
    windows: bool,

    /// Measure in a program in a Linux guest, too: one more machine, for some minutes
    #[arg(long, conflicts_with_all = ["no_lab", "only_cpp"])]
    linux_guest: bool,

    #[command(flatten)]
    elsewhere: elsewhere::Trees,
}

/// A name, and cargo's arguments.
type Step<'a> = (&'a str, &'a [&'a str]);

const FORMATS: &[Step<'_>] = &[
    ("format", &["fmt", "--all", "--check"]),
    ("format of the guest", &["fmt", "--manifest-path", "bench/guest/Cargo.toml", "--check"]),
    ("format of the program on vmi-rs", &["fmt", "--manifest-path", "bench/vmi-rs/Cargo.toml", "--check"]),
    ("format of the fuzz targets", &["fmt", "--manifest-path", "plugin/fuzz/Cargo.toml", "--check"]),
];

const LINT_OF_FUZZ: Step<'_> = (
    "lint of the fuzz targets",
    &[
        "clippy",
        "--manifest-path",
        "plugin/fuzz/Cargo.toml",
        "--all-targets",
        "--target-dir",
        "target/fuzz",
        // As cargo-fuzz does.
        "--config",
        "build.rustflags=['--cfg', 'fuzzing']",
        // Nothing is linked, so libFuzzer need not be compiled: it would be taken from here.
        "--config",
        "env.CUSTOM_LIBFUZZER_PATH='/none/libfuzzer.a'",
        "--",
        "-D",
        "warnings",
    ],
);

/// What needs Xen's headers besides what builds on any machine. All of it at once, for then what it depends on is compiled once.
/// (ffi has steps of its own, and libvmi-sys is built with it, where there is LibVMI.)
const WITH_XEN: &[&str] = &["--workspace", "--exclude", "hyperbp-ffi", "--exclude", "libvmi-sys"];

/// What needs the lab's tools.
const GUEST: &[Step<'_>] = &[
    (
        "lint of the guest",
        &["clippy", "--release", "--all-targets", "--manifest-path", "bench/guest/Cargo.toml", "--", "-D", "warnings"],
    ),
    ("test of the guest", &["test", "--release", "--manifest-path", "bench/guest/Cargo.toml"]),
];

/// How long each fuzz target runs.
const FUZZ_SECONDS: u64 = 20;

impl Test {
    pub(crate) fn run(self) -> Result<()> {
        let steps = Steps::new();
        let result = self.all(&steps);
        steps.print();
        result
    }

    fn all(&self, steps: &Steps) -> Result<()> {
        if self.only_cpp {
            return cpp::run(steps);
        }
        if !self.only_lab {
            steps.cargo_each(FORMATS)?;
        }
        if self.no_lab {
            self.here(steps, None)?;
            steps.skip("everything that needs the lab");
            return Ok(());
        }
        // While others write to the terminal, it can have no bars.
        let progress = if self.only_lab { Progress::new() } else { Progress::lines() };
        let lab = Lab::open(&crate::repo(), &crate::target(), Host::this(), progress)?;
        if self.only_lab {
            return self.in_the_lab(&lab, steps, |_| ());
        }
        // A machine takes a CPU, a compiler now one and now several, and a download none: so both at the same time.
        let (sender, sysroot) = mpsc::channel();
        thread::scope(|scope| {
            let lab = &lab;
            // If nobody waits for it any more, it has failed here.
            let send = move |sysroot: &Path| drop(sender.send(sysroot.to_owned()));
            let there = scope.spawn(|| told(self.in_the_lab(lab, steps, send)));
            let here = told(self.here(steps, Some(sysroot)));
            if here.is_err() {
                lab.stop();
            }
            // A panic of ours goes on in this thread.
            let there = there.join().unwrap_or_else(|panic| resume_unwind(panic));
            here.and(there)
        })
    }

    /// What runs without an emulator. With a `sysroot`, to come from the lab, also what needs that.
    fn here(&self, steps: &Steps, sysroot: Option<mpsc::Receiver<PathBuf>>) -> Result<()> {
        steps.cargo(LINT_OF_FUZZ.0, LINT_OF_FUZZ.1, None)?;
        // There is none if the lab has failed, which says so.
        let sysroot = sysroot.and_then(|sysroot| steps.time("wait for Xen's headers", || sysroot.recv()).ok());
        let packages = if sysroot.is_some() { WITH_XEN } else { &[] };
        let of_all = |name, command: &[&str], options: &[&str]| {
            steps.cargo(name, &[command, packages, options].concat(), sysroot.as_deref())
        };
        of_all("lint", &["clippy"], &["--all-targets", "--", "-D", "warnings"])?;
        of_all("test", &["test"], &[])?;
        of_all("documentation", &["doc", "--no-deps"], &[])?;
        if sysroot.is_some() {
            steps.cargo_each(GUEST)?;
        }
        cpp::run(steps)?;
        guest::run(self.windows, steps)?;
        deny::run(steps)?;
        Fuzz::all(FUZZ_SECONDS).run_in(steps)
    }

    /// What runs in the emulator. Lends the sysroot, with Xen's headers, as soon as it is there.
    fn in_the_lab(&self, lab: &Lab, steps: &Steps, lend: impl FnOnce(&Path)) -> Result<()> {
        lend(&steps.time("lab: Debian's packages", || lab.sysroot(self.xen, false))?);
        let bench = steps.time("lab: Bochs", || lab.prepare(self.xen, false))?;
        let programs = steps.time("lab: other hosts", || {
            let mut programs = self.elsewhere.build(lab)?;
            programs.add_vmi_rs(lab, Some(&bench.sysroot));
            anyhow::Ok(programs)
        })?;
        let mut checks = Checks::default();
        checks::run(lab, &bench, &programs.all, steps, &mut checks)?;
        if self.linux_guest {
            println!("A program in a Linux guest:");
            let found = steps.time("lab: a program in a Linux guest", || guest::in_linux(lab, &bench))?;
            found.iter().for_each(|(what, holds)| checks.check(what, *holds));
        } else {
            steps.skip("a program in a Linux guest (to measure in it, `--linux-guest`)");
        }
        for skipped in plan::ELSEWHERE.iter().filter_map(|host| programs.skipped(host)) {
            let (Skipped::Host(what) | Skipped::Hyperbp(what)) = skipped;
            steps.skip(what);
        }
        println!("{} passed, {} failed", checks.passed, checks.failed);
        ensure!(checks.failed == 0, "checks in the lab failed: they are named above");
        Ok(())
    }
}

/// An error is told at once, for the other half of the test may go on for minutes.
fn told(result: Result<()>) -> Result<()> {
    if let Err(error) = &result {
        eprintln!("error: {error:#}");
    }
    result
}
