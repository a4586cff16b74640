//! A machine with VMX on any computer: Bochs emulates the CPU, and Debian's unmodified Xen boots on it, with a PV dom0
//! and the PVH benchmark guest.
//!
//! [`Lab::open`] is the start. Everything is built below one directory, in stages: the build [`tools`], Debian's
//! [`packages`], [`bochs`], dom0's [`kernel`], our own [programs](build), and for each [`Job`] an [`image`] that the
//! [`machine`] boots. A stage is a directory named after its inputs, so nothing is built twice and nothing stale is
//! used. [`plan`] spreads a bench over machines.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

pub mod apt;
pub mod bochs;
pub mod build;
mod checkout;
mod command;
pub mod drakvuf;
pub mod elf;
mod elsewhere;
mod error;
mod host;
pub mod image;
pub mod initramfs;
mod job;
pub mod kaslr;
pub mod kernel;
pub mod machine;
mod measure;
pub mod packages;
pub mod plan;
pub mod profile;
pub mod program;
pub mod progress;
pub mod protocol;
pub mod smartvmi;
mod stage;
pub mod tools;
pub mod vmi_rs;
mod vmicore;
pub mod windows;
mod xen;

pub use build::Program;
pub use checkout::{repo, target};
pub use command::Log;
pub use elsewhere::Elsewhere;
pub use error::{Error, Result, Tail};
pub use host::Host;
pub use job::{Job, Options};
pub use machine::{Machine, Outcome};
pub use measure::{Measure, Measured};
pub use progress::Progress;
pub use stage::{Inputs, Stages};
pub use vmicore::Introspection;
pub use xen::{Group, RELEASE, Xen};

use bochs::Emulator;
use kernel::Kernel;

/// Free space the lab asks for before it is built: at its largest, while Bochs is compiled, it takes about half.
const SPACE: u64 = 1536 << 20;

/// dom0's memory in MiB if there is a Linux guest: that one's kernel is in it too, in its file system.
const WITH_LINUX: u32 = 448;

/// The job scripts that come with the lab.
const BENCH: &str = include_str!("../dom0/bench.sh");
const DOMAINS: &str = include_str!("../dom0/domains.sh");
const CHECKS: &str = include_str!("../dom0/checks.sh");
const STORM: &str = include_str!("../dom0/storm.sh");
const HOSTILE: &str = include_str!("../dom0/hostile.sh");
const BALLOON: &str = include_str!("../dom0/balloon.sh");
const RECOVER: &str = include_str!("../dom0/recover.sh");
const DRAKVUF: &str = include_str!("../dom0/drakvuf.sh");
const TRACE: &str = include_str!("../dom0/trace.sh");
const WAITING: &str = include_str!("../dom0/waiting.sh");
const SMOKE: &str = include_str!("../dom0/smoke.sh");

/// The lab's directory, held by this process alone.
#[derive(Debug)]
pub struct Lab {
    host: Host,
    repo: PathBuf,
    stages: Stages,
    /// Whether its machines are to stop.
    stop: AtomicBool,
    /// Locked as long as this lives.
    _lock: File,
    /// What the user sees.
    pub progress: Progress,
}

impl Lab {
    /// The lab of the repository in `repo`, built in `target/lab`. Waits until no other process uses it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(repo: &Path, target: &Path, host: Host, progress: Progress) -> Result<Self> {
        let stages = Stages::new(&target.join("lab"))?;
        let path = stages.dir().join("lock");
        let lock = File::create(&path).map_err(Error::io("create", &path))?;
        use rustix::fs::FlockOperation::{LockExclusive, NonBlockingLockExclusive};
        if rustix::fs::flock(&lock, NonBlockingLockExclusive).is_err() {
            progress.note(&format!("Waiting for another run that uses {}.", stages.dir().display()));
            rustix::fs::flock(&lock, LockExclusive).map_err(|e| Error::io("lock", &path)(e.into()))?;
        }
        Ok(Self { host, repo: repo.to_owned(), stages, stop: AtomicBool::new(false), _lock: lock, progress })
    }

    /// Stops its machines: those that run, and those that another thread is about to start.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Installs missing build tools and unpacks Debian's packages; returns the sysroot, with the headers of `xen`.
    ///
    /// # Errors
    /// Those of [`tools::install`] and [`packages::unpack`]; [`Error::DiskSpace`].
    pub fn sysroot(&self, xen: Xen, update: bool) -> Result<PathBuf> {
        self.begin()?;
        packages::unpack(&self.host, xen, &self.apts(), &self.stages, &self.progress, update)
    }

    /// Where the private apts are.
    fn apts(&self) -> PathBuf {
        self.stages.dir().join("apt")
    }

    /// Sees to it that there are tools, and room.
    fn begin(&self) -> Result<()> {
        // A complete build is not built again, whatever room is left.
        if !self.stages.dir().join("complete").exists() {
            Host::check_space(self.stages.dir(), SPACE)?;
        }
        tools::install(&self.host, tools::TOOLS, &self.progress, &self.stages.log("tools")?)
    }

    /// Builds everything that does not depend on a job, to boot `xen`. `update` asks Debian's mirror for newer packages.
    ///
    /// # Errors
    /// Those of each stage.
    pub fn prepare(&self, xen: Xen, update: bool) -> Result<Bench<'_>> {
        self.prepare_for(Emulator::Plain, xen, update)
    }

    /// [`prepare`](Self::prepare), with this `emulator`.
    ///
    /// # Errors
    /// Those of each stage.
    pub fn prepare_for(&self, emulator: Emulator, xen: Xen, update: bool) -> Result<Bench<'_>> {
        let (host, stages, progress) = (&self.host, &self.stages, &self.progress);
        let sysroot = self.sysroot(xen, update)?;
        let apt = packages::apt(host, &self.apts(), RELEASE)?;
        let jobs = thread::available_parallelism().map_or(1, usize::from);
        let bochs = bochs::build(emulator, host, &apt, stages, progress, jobs)?;
        let kernel = kernel::extract(host, &sysroot, stages, progress)?;
        let e9 = self.build(Program::E9, None)?;
        let guest = self.build(Program::Guest, None)?;
        let complete = stages.dir().join("complete");
        fs::write(&complete, "").map_err(Error::io("write", &complete))?;
        let machine = Machine {
            bochs,
            bios: sysroot.join("usr/share/bochs/BIOS-bochs-latest"),
            vga_bios: sysroot.join("usr/share/vgabios/vgabios.bin"),
            runs: stages.dir().join("run"),
        };
        Ok(Bench { lab: self, xen, machine, sysroot, kernel, e9, guest })
    }

    /// Builds one of our programs, against `sysroot`'s Xen or the system's.
    ///
    /// # Errors
    /// Those of [`build::build`].
    pub fn build(&self, program: Program, sysroot: Option<&Path>) -> Result<PathBuf> {
        build::build(program, &self.host, &self.repo, sysroot, &self.stages, &self.progress)
    }

    /// Builds the benchmark's program for a Linux guest.
    ///
    /// # Errors
    /// Those of [`program::build`].
    pub fn program(&self) -> Result<PathBuf> {
        program::build(&self.host, &self.repo, &self.stages, &self.progress)
    }

    /// Builds the program that serves breakpoints from inside DRAKVUF, against the one that is built in `tree`.
    ///
    /// # Errors
    /// Those of [`drakvuf::build`].
    pub fn drakvuf(&self, tree: &Path) -> Result<Elsewhere> {
        drakvuf::build(&self.host, tree, &self.stages, &self.progress)
    }

    /// Builds the program that serves breakpoints from inside SmartVMI, against the one that is built in `tree`.
    ///
    /// # Errors
    /// Those of [`smartvmi::build`].
    pub fn smartvmi(&self, tree: &Path) -> Result<Elsewhere> {
        smartvmi::build(&self.host, tree, &self.stages, &self.progress)
    }

    /// Builds the program that serves a breakpoint with vmi-rs, against `sysroot`'s Xen or the system's.
    ///
    /// # Errors
    /// Those of [`vmi_rs::build`].
    pub fn vmi_rs(&self, sysroot: Option<&Path>) -> Result<Elsewhere> {
        vmi_rs::build(&self.host, &self.repo, sysroot, &self.stages, &self.progress)
    }
}

/// What [`Bench::trace`] is to trace.
#[derive(Clone, Copy, Debug)]
pub struct Trace<'a> {
    /// Functions of the kernel.
    pub functions: &'a [&'a str],
    /// The function that marks where the guest's work begins and ends.
    pub between: &'a str,
    /// How the breakpoints work.
    pub mechanism: &'a str,
    /// How long the guest works, in seconds of its own time.
    pub seconds: u32,
}

/// What [`Bench::drakvuf`] is to run.
#[derive(Clone, Copy, Debug)]
pub struct Monitor<'a> {
    /// The directory DRAKVUF was built in.
    pub build: &'a Path,
    /// The profile of the guest's kernel.
    pub profile: &'a Path,
    /// DRAKVUF's arguments, besides the profile and the domain. No space or other special character can be in one.
    pub arguments: &'a [String],
    /// How many rounds of work the guest does.
    pub rounds: u32,
}

/// How far the guest's kernel is moved for a monitor that is to find it.
const MOVED: u32 = 16 << 20;

/// The memory, in MiB, of a dom0 where a monitor reads a profile of so many bytes: as json-c has it, it takes 14 times its size.
fn memory_for_profile(size: u64) -> u32 {
    WITH_LINUX + 14 * u32::try_from(size >> 20).unwrap_or(u32::MAX / 64)
}

/// A lab with everything built that jobs have in common.
#[derive(Debug)]
pub struct Bench<'a> {
    lab: &'a Lab,
    /// What it boots.
    pub xen: Xen,
    /// The emulator.
    pub machine: Machine,
    /// Debian's packages, unpacked.
    pub sysroot: PathBuf,
    kernel: Kernel,
    e9: PathBuf,
    guest: PathBuf,
}

impl Bench<'_> {
    /// A job that shows Xen, its tools and the benchmark guest at work, and measures nothing.
    #[must_use]
    pub fn smoke(&self, cpus: u32) -> Job {
        self.job("smoke".to_owned(), SMOKE, cpus, Duration::from_secs(600))
    }

    /// A job that checks every mechanism on a live guest, and what the `runner` does with bad input. It leaves a file
    /// `checks` with a line for each, which begins with `ok: ` or `FAILED: `.
    #[must_use]
    pub fn checks(&self, runner: &Path, cpus: u32) -> Job {
        let mut job = self.job(format!("checks-{cpus}"), CHECKS, cpus, Duration::from_secs(3600));
        job.programs.push(runner.to_owned());
        job
    }

    /// A job that checks what the `runner` does to memory, views and limits that are not its own. It leaves a file `checks`
    /// as [`checks`](Self::checks) does.
    #[must_use]
    pub fn domains(&self, runner: &Path, cpus: u32) -> Job {
        let mut job = self.job(format!("domains-{cpus}"), DOMAINS, cpus, Duration::from_secs(3600));
        job.programs.push(runner.to_owned());
        job
    }

    /// A job that runs `selections` one after the other with the `runner`, [`Program::Runner`] built against
    /// [`Bench::sysroot`]. Each leaves its results in a directory with its number.
    #[must_use]
    pub fn bench(&self, name: &str, runner: &Path, selections: &[plan::Selection], cpus: u32) -> Job {
        let limit = selections.iter().map(plan::Selection::limit).sum();
        let mut job = self.job(name.to_owned(), BENCH, cpus, limit);
        let runs: Vec<String> = selections.iter().map(|selection| selection.arguments().join(" ")).collect();
        job.variables.push(("RUNS".to_owned(), runs.join("\n")));
        job.programs.push(runner.to_owned());
        job
    }

    /// The same in the Linux guest, where `program`, [`Lab::program`], is what executes the breakpoint.
    #[must_use]
    pub fn bench_in_linux(
        &self,
        name: &str,
        runner: &Path,
        program: &Path,
        selections: &[plan::Selection],
        cpus: u32,
    ) -> Job {
        let mut job = self.bench(name, runner, selections, cpus);
        job.linux = true;
        job.guest_programs.push(program.to_owned());
        job.memory = WITH_LINUX;
        // It boots as long as Xen and dom0 together, and its memory is looked through.
        job.limit += Duration::from_secs(1800);
        job.variables.push(("GUEST".to_owned(), "linux".to_owned()));
        job
    }

    /// A job with storms of `calls` calls for each virtual CPU, in a guest with each of these numbers of virtual CPUs, under
    /// `mechanisms`, or all there are if there are none. Each leaves `storm.json` in a directory named after the number.
    #[must_use]
    pub fn storm(&self, runner: &Path, cpus: u32, vcpus: &[u32], calls: u32, mechanisms: &[String]) -> Job {
        let mut job = self.job(format!("storm-{cpus}"), STORM, cpus, Duration::from_secs(3600));
        let vcpus: Vec<String> = vcpus.iter().map(u32::to_string).collect();
        job.variables.push(("VCPUS".to_owned(), vcpus.join(" ")));
        let mechanisms = mechanisms.iter().map(|mechanism| format!(" --mechanism {mechanism}")).collect::<String>();
        job.variables.push(("STORM".to_owned(), format!("--count {calls}{mechanisms}")));
        job.programs.push(runner.to_owned());
        job
    }

    /// A job with a hostile guest, with each of these numbers of vCPUs, under `mechanisms`, or all there are if there are none.
    /// It tries the probes whose names begin with one of `probes`, or all if there are none. Each leaves `hostile.json` in a
    /// directory named after the number.
    #[must_use]
    pub fn hostile(&self, runner: &Path, cpus: u32, vcpus: &[u32], mechanisms: &[String], probes: &[String]) -> Job {
        let mut job = self.job(format!("hostile-{cpus}"), HOSTILE, cpus, Duration::from_secs(7200));
        let vcpus: Vec<String> = vcpus.iter().map(u32::to_string).collect();
        job.variables.push(("VCPUS".to_owned(), vcpus.join(" ")));
        let mechanisms = mechanisms.iter().map(|mechanism| format!(" --mechanism {mechanism}"));
        let arguments = mechanisms.chain(probes.iter().map(|probe| format!(" --probe {probe}"))).collect::<String>();
        job.variables.push(("HOSTILE".to_owned(), arguments));
        job.programs.push(runner.to_owned());
        job
    }

    /// A job that measures what it takes that a monitor waits, for so many seconds of the guest's each. It leaves
    /// `waiting.json`.
    #[must_use]
    pub fn waiting(&self, runner: &Path, cpus: u32, seconds: u32) -> Job {
        let mut job = self.job(format!("waiting-{cpus}"), WAITING, cpus, Duration::from_secs(3600));
        job.variables.push(("SECONDS".to_owned(), seconds.to_string()));
        job.programs.push(runner.to_owned());
        job
    }

    /// A job that kills the `runner` so many times in the middle of a storm and recovers the domain, and attaches and detaches
    /// so many times. It leaves a file `checks` as [`checks`](Self::checks) does.
    #[must_use]
    pub fn recover(&self, runner: &Path, cpus: u32, kills: u32, attach: u32) -> Job {
        let mut job = self.job(format!("recover-{cpus}"), RECOVER, cpus, Duration::from_secs(3600));
        job.variables.push(("KILLS".to_owned(), kills.to_string()));
        job.variables.push(("ATTACH".to_owned(), attach.to_string()));
        job.programs.push(runner.to_owned());
        job
    }

    /// A job that has guests with so many virtual CPUs, one after the other, replace their pages under load, so many times
    /// each. It leaves a file `checks` as [`checks`](Self::checks) does.
    #[must_use]
    pub fn balloon(&self, runner: &Path, cpus: u32, vcpus: &[u32], rounds: u32) -> Job {
        let mut job = self.job(format!("balloon-{cpus}"), BALLOON, cpus, Duration::from_secs(3600));
        let vcpus: Vec<String> = vcpus.iter().map(u32::to_string).collect();
        job.variables.push(("VCPUS".to_owned(), vcpus.join(" ")));
        job.variables.push(("ROUNDS".to_owned(), rounds.to_string()));
        job.programs.push(runner.to_owned());
        job
    }

    /// A job that traces `functions` of a Linux guest with the `runner` while the guest works. `between` is the function
    /// that the guest calls at the beginning and at the end of that. It leaves `trace.json`, what the guest said in
    /// `console`, and a file `checks` as [`checks`](Self::checks) does.
    #[must_use]
    pub fn trace(&self, runner: &Path, cpus: u32, vcpus: u32, trace: &Trace<'_>) -> Job {
        let mut job = self.job(format!("trace-{cpus}-{vcpus}"), TRACE, cpus, Duration::from_secs(3600));
        job.linux = true;
        job.memory = WITH_LINUX;
        let Trace { functions, between, mechanism, seconds } = trace;
        let functions: String = functions.iter().map(|function| format!(" --function {function}")).collect();
        let arguments = format!("--mechanism {mechanism} --between {between}{functions}");
        let variables = [("VCPUS", vcpus.to_string()), ("SECONDS", seconds.to_string()), ("TRACE", arguments)];
        job.variables.extend(variables.map(|(name, value)| (name.to_owned(), value)));
        job.programs.push(runner.to_owned());
        job
    }

    /// A job that runs a DRAKVUF on a Linux guest at work. With the [late](Job::late) variables `HYPERBP` and `ENVIRONMENT` it
    /// has more arguments, and an environment (`NAME=VALUE`). It leaves what the guest said in `console`, what DRAKVUF printed
    /// in `events` and `messages`, and in `ended` its exit code and, `early` or `late`, whether it was there to the end.
    ///
    /// # Errors
    /// [`Error::NoDrakvuf`] when there is no program; those of [`profile::check`].
    pub fn drakvuf(&self, monitor: &Monitor<'_>) -> Result<Job> {
        let Monitor { build, profile, arguments, rounds } = monitor;
        let program = build.join("drakvuf");
        if !program.is_file() {
            let problem = format!("there is no {}", program.display());
            return Err(Error::NoDrakvuf { build: build.to_path_buf(), problem });
        }
        let size = profile::check(profile, &self.kernel)?;
        let mut job = self.job("drakvuf".to_owned(), DRAKVUF, 1, Duration::from_secs(3600));
        job.linux = true;
        job.moved = MOVED;
        job.memory = memory_for_profile(size);
        job.files.push(("profile.json".to_owned(), profile.to_path_buf()));
        job.libraries.extend(elsewhere::LOADS.map(str::to_owned));
        job.programs.push(program);
        let variables = [("DRAKVUF", arguments.join(" ")), ("ROUNDS", rounds.to_string())];
        job.variables.extend(variables.map(|(name, value)| (name.to_owned(), value)));
        Ok(job)
    }

    fn job(&self, name: String, script: &str, cpus: u32, limit: Duration) -> Job {
        let silence = Duration::from_secs(600);
        Job {
            name,
            script: script.to_owned(),
            variables: Vec::new(),
            late: Vec::new(),
            programs: Vec::new(),
            libraries: Vec::new(),
            files: Vec::new(),
            guest: self.guest.clone(),
            linux: false,
            guest_programs: Vec::new(),
            moved: 0,
            memory: 256,
            cpus,
            options: Options::default(),
            limit,
            silence,
        }
    }

    /// Debian's packages that are in it, and their versions.
    ///
    /// # Errors
    /// Those of [`packages::unpack`].
    pub fn versions(&self) -> Result<Vec<apt::Package>> {
        let Lab { host, stages, progress, .. } = self.lab;
        let of = |group: &Group| {
            let apt = packages::apt(host, &self.lab.apts(), group.release)?;
            packages::versions(&apt, group, stages, progress, false)
        };
        Ok(self.xen.packages().iter().map(of).collect::<Result<Vec<_>>>()?.concat())
    }

    /// Builds the image of `job`, and returns it.
    ///
    /// # Errors
    /// Those of [`image::build`].
    pub fn image(&self, job: &Job) -> Result<PathBuf> {
        let lab = self.lab;
        let parts = image::Parts { xen: self.xen, sysroot: &self.sysroot, kernel: &self.kernel, e9: &self.e9 };
        image::build(&lab.host, &parts, job, &lab.stages, &lab.progress)
    }

    /// Boots each image and runs its job to its end, `parallel` machines at a time: in this order, each as soon as there is room
    /// for it. When one fails, the lab [is stopped](Lab::stop).
    ///
    /// # Errors
    /// Those of [`Machine::run`]: the first.
    pub fn run(&self, jobs: &[(Job, PathBuf)], parallel: usize) -> Result<Vec<Outcome>> {
        let next = AtomicUsize::new(0);
        let one_after_the_other = || {
            let mut outcomes = Vec::new();
            while let Some((n, (job, image))) = jobs.iter().enumerate().nth(next.fetch_add(1, Ordering::Relaxed)) {
                let outcome = self.machine.run(&self.lab.host, image, job, &self.lab.progress, &self.lab.stop);
                if outcome.is_err() {
                    self.lab.stop();
                }
                outcomes.push((n, outcome));
            }
            outcomes
        };
        let mut outcomes = thread::scope(|scope| {
            let running: Vec<_> = (0..parallel.max(1)).map(|_| scope.spawn(one_after_the_other)).collect();
            // A panic of ours goes on in this thread.
            running.into_iter().flat_map(|r| r.join().unwrap_or_else(|p| resume_unwind(p))).collect::<Vec<_>>()
        });
        // That a machine was stopped is only the consequence of another's failure.
        outcomes.sort_by_key(|(n, outcome)| (matches!(outcome, Err(Error::Stopped { .. })), *n));
        outcomes.into_iter().map(|(_, outcome)| outcome).collect()
    }
}

impl Outcome {
    /// Unpacks the results into `dir`, which is created.
    ///
    /// # Errors
    /// [`Error::Results`] when they are not a tar.gz.
    pub fn unpack(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let unpacked = tar::Archive::new(flate2::read::GzDecoder::new(&self.results[..])).unpack(dir);
        unpacked.map_err(|e| Error::Results {
            job: dir.display().to_string(),
            problem: e.to_string(),
            log: self.log.clone(),
        })
    }
}
