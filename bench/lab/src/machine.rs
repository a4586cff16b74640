//! The emulated machine: boots an image, listens to it, and stops it when it is done, stuck or dead.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::command::spawn_error;
use crate::error::Tail;
use crate::job::LATE_AT;
use crate::protocol::{self, Message, Parser};
use crate::{Error, Host, Job, Progress, Result, windows};

/// How often the console and the limits are looked at.
const POLL: Duration = Duration::from_millis(250);
/// How long a crash may go on printing before the machine is stopped, and how long it may take to switch off.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The emulator and the firmware it needs.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Bochs.
    pub bochs: PathBuf,
    /// The PC's BIOS.
    pub bios: PathBuf,
    /// The graphics card's BIOS.
    pub vga_bios: PathBuf,
    /// Below it, each run has a directory with its configuration and logs.
    pub runs: PathBuf,
}

/// What a run that ended well left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The job's results: a tar.gz of its `$OUT`.
    pub results: Vec<u8>,
    /// Everything dom0 printed.
    pub log: PathBuf,
    /// What Xen, dom0's kernel and the guest printed on the serial console.
    pub console: PathBuf,
    /// What a [counting emulator](crate::bochs::Emulator::Counting) has written: a line for each [`Window`](crate::windows::Window).
    pub windows: PathBuf,
    /// When it began.
    pub begun: Instant,
    /// How long it took.
    pub took: Duration,
}

impl Machine {
    /// Boots `image` and waits for `job` to end, or for `stop` to become true.
    ///
    /// # Errors
    /// [`Error::JobFailed`], [`Error::Crashed`], [`Error::Hung`], [`Error::TimedOut`], [`Error::Died`],
    /// [`Error::Stopped`] and [`Error::Results`], whatever comes first. The emulator is stopped before this returns, and if this process is
    /// killed, the emulator is too.
    pub fn run(&self, host: &Host, image: &Path, job: &Job, progress: &Progress, stop: &AtomicBool) -> Result<Outcome> {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped { job: job.name.clone() });
        }
        let task = progress.start(&job.name);
        task.doing("booting Xen, half a minute");
        let dir = self.runs.join(&job.name);
        crate::stage::remove(&dir)?;
        fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        let config = dir.join("bochsrc");
        fs::write(&config, self.config(&dir, image, job)).map_err(Error::io("write", &config))?;
        if let Some(content) = job.rom() {
            let rom = dir.join(ROM);
            fs::write(&rom, content).map_err(Error::io("write", &rom))?;
        }

        // Bochs has its own process group, so that no signal from the terminal reaches it half-way; setpriv sees to it
        // that it does not outlive the thread that watches it.
        let mut command = host.command("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(&self.bochs).arg("-q").arg("-f").arg(&config);
        command.current_dir(&dir).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let child = command.spawn().map_err(|source| spawn_error(&command, source))?;
        Watch::new(Emulator(child), &dir, job)?.until_done(&task, stop)
    }

    /// Bochs's configuration.
    ///
    /// One tick is one instruction, and nothing depends on the host: its time (`sync=none`, a fixed `time0`) or its
    /// random numbers (RDRAND is left out). So the same image gives the same run, to the instruction.
    fn config(&self, dir: &Path, image: &Path, job: &Job) -> String {
        let (cpus, memory) = (job.cpus, job.machine_memory());
        let mut config = String::new();
        let mut line = |text: std::fmt::Arguments<'_>| {
            // Writing to a String cannot fail.
            let _ = writeln!(config, "{text}");
        };
        line(format_args!("config_interface: textconfig"));
        line(format_args!("display_library: nogui"));
        line(format_args!("memory: guest={memory}, host={memory}"));
        line(format_args!("romimage: file=\"{}\"", self.bios.display()));
        line(format_args!("vgaromimage: file=\"{}\"", self.vga_bios.display()));
        if !job.late.is_empty() {
            line(format_args!("optromimage1: file=\"{}\", address={LATE_AT:#x}", dir.join(ROM).display()));
        }
        line(format_args!("boot: cdrom"));
        line(format_args!("ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14"));
        line(format_args!("ata0-master: type=cdrom, path=\"{}\", status=inserted", image.display()));
        line(format_args!(
            "cpu: model=corei7_haswell_4770, count={cpus}, ips=200000000, reset_on_triple_fault=0, \
             ignore_bad_msrs=1, exclude_features=\"rdrand\""
        ));
        line(format_args!("clock: sync=none, time0=1700000000, rtc_sync=0"));
        line(format_args!("com1: enabled=1, mode=file, dev=\"{}\"", dir.join(CONSOLE).display()));
        line(format_args!("log: \"{}\"", dir.join(BOCHS_LOG).display()));
        line(format_args!("panic: action=fatal"));
        line(format_args!("error: action=ignore"));
        line(format_args!("info: action=ignore"));
        line(format_args!("debug: action=ignore"));
        line(format_args!("port_e9_hack: enabled=1"));
        line(format_args!("mouse: enabled=0"));
        config
    }
}

const ROM: &str = "late.rom";
const CONSOLE: &str = "console.log";
const OUTPUT: &str = "output.log";
const BOCHS_LOG: &str = "bochs.log";

/// The running emulator; killed when this goes.
#[derive(Debug)]
struct Emulator(Child);

impl Emulator {
    /// Ends it, if it has not ended, and says how it ended.
    fn end(&mut self) -> std::io::Result<ExitStatus> {
        if let Some(status) = self.0.try_wait()? {
            return Ok(status);
        }
        let group = i32::try_from(self.0.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(group) = group {
            // It may end by itself at this very moment.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        self.0.wait()
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // Nobody is left to tell.
        let _ = self.end();
    }
}

/// Listens to a running machine.
#[derive(Debug)]
struct Watch<'a> {
    emulator: Emulator,
    job: &'a Job,
    lines: mpsc::Receiver<String>,
    log: File,
    log_path: PathBuf,
    console: Console,
    dir: PathBuf,
    begun: Instant,
    parser: Parser,
    exit: Option<i32>,
    results: Option<Result<Vec<u8>, String>>,
}

impl<'a> Watch<'a> {
    fn new(mut emulator: Emulator, dir: &Path, job: &'a Job) -> Result<Self> {
        let log_path = dir.join(OUTPUT);
        let log = File::create(&log_path).map_err(Error::io("create", &log_path))?;
        let (sender, lines) = mpsc::channel();
        if let Some(stdout) = emulator.0.stdout.take() {
            // It ends when Bochs does, or when nobody listens any more.
            thread::spawn(move || {
                let mut reader = BufReader::new(stdout);
                let mut line = Vec::new();
                while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                    if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                        break;
                    }
                    line.clear();
                }
            });
        }
        let console = Console { path: dir.join(CONSOLE), read: 0, partial: String::new() };
        let (dir, begun, parser) = (dir.to_owned(), Instant::now(), Parser::new());
        Ok(Self { emulator, job, lines, log, log_path, console, dir, begun, parser, exit: None, results: None })
    }

    fn until_done(mut self, task: &crate::progress::Task, stop: &AtomicBool) -> Result<Outcome> {
        let mut heard = self.begun;
        loop {
            match self.lines.recv_timeout(POLL) {
                Ok(line) => {
                    heard = Instant::now();
                    if self.hear(&line, task)? {
                        return self.finish();
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.died()),
            }
            if let Some(who) = self.console.crash() {
                // The reasons come after the first sign.
                thread::sleep(LAST_WORDS);
                return Err(self.crashed(who));
            }
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped { job: self.job.name.clone() });
            }
            let (job, tail) = (|| self.job.name.clone(), || Tail::of_file(&self.log_path));
            if heard.elapsed() > self.job.silence {
                return Err(Error::Hung { job: job(), silence: self.job.silence, tail: tail() });
            }
            if self.begun.elapsed() > self.job.limit {
                return Err(Error::TimedOut { job: job(), limit: self.job.limit, tail: tail() });
            }
        }
    }

    /// Takes a line; says whether it was the last.
    fn hear(&mut self, line: &str, task: &crate::progress::Task) -> Result<bool> {
        let message = self.parser.line(line);
        if matches!(message, Message::Text | Message::Exit(_) | Message::End) {
            writeln!(self.log, "{}", line.trim_end()).map_err(Error::io("write to", &self.log_path))?;
        }
        match message {
            Message::Progress { done, total, text } => task.at(done, total, &text),
            Message::Exit(code) => self.exit = Some(code),
            Message::Results(results) => self.results = Some(results),
            Message::End => return Ok(true),
            Message::Data | Message::Text => {}
        }
        Ok(false)
    }

    /// After `@end`.
    fn finish(mut self) -> Result<Outcome> {
        // It switches itself off now, which lets its logs be whole.
        let ends = Instant::now() + LAST_WORDS;
        while Instant::now() < ends && matches!(self.emulator.0.try_wait(), Ok(None)) {
            thread::sleep(POLL / 5);
        }
        let job = self.job.name.clone();
        let damaged = |problem: String| Error::Results { job: job.clone(), problem, log: self.log_path.clone() };
        match (self.exit, self.results.take()) {
            (Some(0), Some(Ok(results))) => {
                let (log, console) = (self.log_path.clone(), self.console.path.clone());
                let (windows, begun, took) = (self.dir.join(windows::FILE), self.begun, self.begun.elapsed());
                Ok(Outcome { results, log, console, windows, begun, took })
            }
            (Some(0), Some(Err(problem))) => Err(damaged(problem)),
            (Some(0), None) => Err(damaged("there are none".to_owned())),
            (Some(code), _) => Err(Error::JobFailed { job, code, tail: Tail::of_file(&self.log_path) }),
            (None, _) => Err(damaged("the job's exit code is missing".to_owned())),
        }
    }

    /// The emulator has closed its output. A crash of what ran in it explains that better than its exit does.
    fn died(&mut self) -> Error {
        let status = match self.emulator.end() {
            Ok(status) => status,
            Err(e) => return Error::io("wait for", Path::new("bochs"))(e),
        };
        if let Some(who) = self.console.crash() {
            return self.crashed(who);
        }
        let tail = [self.dir.join(BOCHS_LOG), self.log_path.clone()]
            .iter()
            .map(|log| Tail::of_file(log))
            .find(|tail| !tail.lines.is_empty())
            .unwrap_or_else(|| Tail::of_file(&self.log_path));
        Error::Died { job: self.job.name.clone(), status, tail }
    }

    fn crashed(&self, who: &'static str) -> Error {
        Error::Crashed { job: self.job.name.clone(), who, tail: Tail::of_file(&self.console.path) }
    }
}

/// The file Bochs writes what arrives at the first serial port to.
#[derive(Debug)]
struct Console {
    path: PathBuf,
    read: u64,
    /// A line whose end has not come yet.
    partial: String,
}

impl Console {
    /// Reads on, and says who crashed if it says so.
    fn crash(&mut self) -> Option<&'static str> {
        // Not there before Bochs makes it.
        let mut file = File::open(&self.path).ok()?;
        file.seek(SeekFrom::Start(self.read)).ok()?;
        let mut bytes = Vec::new();
        self.read += file.read_to_end(&mut bytes).ok()? as u64;
        self.partial.push_str(&String::from_utf8_lossy(&bytes));
        let complete = self.partial.rfind('\n').map_or(0, |end| end + 1);
        let lines: String = self.partial.drain(..complete).collect();
        lines.lines().find_map(protocol::crash)
    }
}
