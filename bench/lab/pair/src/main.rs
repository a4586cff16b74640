//! Two processes that share a page of code and are at work in turns: `pair-a`, which starts `pair-b` and leads, each by a name of
//! its own of one and the same file.
//!
//! For each line of its input, a name, `pair-a` has both go through so many rounds. In a round they first only switch to and
//! fro, then call the function in the page in turns, and then each many times. What it says, a line each:
//!
//! - at the start, of both: `page a|b ADDRESS FRAME`, where the function is and the number of the page's frame, in hexadecimal; then `ready`
//! - `begin NAME`
//! - `round SWITCHES TICKS A-CALLS TICKS B-CALLS TICKS`, for each round: ticks of the time-stamp counter
//! - `left a|b TIMES OF`: how often this process has let another run, by the kernel's count, while so many times were meant
//! - `calls a|b NUMBER`: how often each has called the function, by its own count
//! - `code a|b same`, or `code a|b OFFSET WAS IS`: whether its code is what it was at the start
//! - `end NAME`

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

mod page;

/// How often `pair-a` waits for `pair-b` in a round without any calls: each time is two switches.
const WAITS: u64 = 50;
/// How often they call in turns in a round: `pair-a` once, `pair-b` twice.
const TURNS: u64 = 5;
/// How often each then calls the function without the other.
const CALLS: u8 = 20;

/// What `pair-a` asks `pair-b` for besides a number of calls: to say what it has to say.
const SAY: u8 = 255;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let result = match (arguments.next().as_deref(), arguments.next()) {
        (Some("--with"), Some(other)) => lead(&other),
        (Some("--follow"), None) => follow(),
        _ => Err(io::Error::other("usage: pair-a --with PAIR-B ROUNDS")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("pair: {e}");
            ExitCode::FAILURE
        }
    }
}

/// One of the two.
struct Process {
    name: &'static str,
    /// How often it has called the function: which is what the function itself says.
    calls: u64,
    code: Vec<[u8; 8]>,
}

impl Process {
    fn new(name: &'static str) -> io::Result<Self> {
        // It has to be in memory before anybody can look for it there.
        page::function(0);
        eprintln!("page {name} {:#x} {:#x}", page::address(), page::frame()?);
        Ok(Self { name, calls: 0, code: page::bytes() })
    }

    fn call(&mut self, times: u8) {
        for _ in 0..times {
            self.calls = page::function(self.calls);
        }
    }

    /// Says what it has counted, and begins anew.
    fn say(&mut self) {
        let name = self.name;
        eprintln!("calls {name} {}", self.calls);
        self.calls = 0;
        let now = page::bytes();
        match self.code.iter().zip(&now).position(|(was, is)| was != is) {
            None => eprintln!("code {name} same"),
            Some(word) => eprintln!("code {name} {:#x} {:02x?} {:02x?}", word * 8, self.code[word], now[word]),
        }
    }
}

/// `pair-b`: for each byte of input, so many calls, and how many ticks these took, as 8 bytes of output.
fn follow() -> io::Result<()> {
    let (mut input, mut output) = (unbuffered(io::stdin())?, unbuffered(io::stdout())?);
    let mut process = Process::new("b")?;
    let (mut byte, mut took) = ([0], 0_u64);
    loop {
        output.write_all(&took.to_ne_bytes())?;
        if input.read(&mut byte)? == 0 {
            return Ok(());
        }
        took = match byte[0] {
            SAY => ticks(|| process.say()).0,
            calls => ticks(|| process.call(calls)).0,
        };
    }
}

/// Every byte is a system call then.
fn unbuffered(stream: impl AsFd) -> io::Result<File> {
    let stream: OwnedFd = stream.as_fd().try_clone_to_owned()?;
    Ok(stream.into())
}

/// `pair-b`, as `pair-a` sees it.
struct Other {
    _process: Child,
    to: ChildStdin,
    from: ChildStdout,
}

impl Other {
    fn start(program: &str) -> io::Result<Self> {
        let mut command = Command::new(program);
        let mut child = command.arg("--follow").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let (Some(to), Some(from)) = (to, from) else { return Err(io::Error::other("no pipes to the other process")) };
        let mut other = Self { _process: child, to, from };
        other.wait()?;
        Ok(other)
    }

    fn wait(&mut self) -> io::Result<u64> {
        let mut took = [0; 8];
        self.from.read_exact(&mut took)?;
        Ok(u64::from_ne_bytes(took))
    }

    /// Lets it call the function so many times, or [`SAY`], and waits until it has. On one virtual CPU that is a switch to it,
    /// and one back. Returns how many ticks it took, without the switches.
    fn ask(&mut self, what: u8) -> io::Result<u64> {
        self.to.write_all(&[what])?;
        self.wait()
    }
}

/// `pair-a`.
fn lead(other: &str) -> io::Result<()> {
    let mut process = Process::new("a")?;
    let mut other = Other::start(other)?;
    eprintln!("ready");
    for line in io::stdin().lines() {
        let line = line?;
        let (name, rounds) = line.trim().rsplit_once(' ').unwrap_or_default();
        let rounds: u32 = rounds.parse().map_err(io::Error::other)?;
        eprintln!("begin {name}");
        let mut left = 0;
        // On a console that somebody may read, a line takes longer than all it tells of.
        let mut said = String::new();
        for _ in 0..rounds {
            said += &round(&mut process, &mut other, &mut left)?;
        }
        eprint!("{said}");
        eprintln!("left a {left} {}", u64::from(rounds) * WAITS);
        process.say();
        other.ask(SAY)?;
        eprintln!("end {name}");
    }
    Ok(())
}

/// One round. Counts in `left` how often this process has let another run while it only waited.
fn round(process: &mut Process, other: &mut Other, left: &mut u64) -> io::Result<String> {
    let before = times_left()?;
    let (switching, done) = ticks(|| (0..WAITS).try_for_each(|_| other.ask(0).map(drop)));
    done?;
    *left += times_left()? - before;
    for _ in 0..TURNS {
        process.call(1);
        other.ask(2)?;
    }
    let (calling, ()) = ticks(|| process.call(CALLS));
    let other_calling = other.ask(CALLS)?;
    Ok(format!("round {} {switching} {CALLS} {calling} {CALLS} {other_calling}\n", 2 * WAITS))
}

/// How many ticks it takes, and what comes of it.
fn ticks<T>(what: impl FnOnce() -> T) -> (u64, T) {
    // SAFETY: every processor that runs this program has the instruction, and Linux lets programs use it.
    let now = || unsafe { std::arch::x86_64::_rdtsc() };
    let begin = now();
    let result = what();
    (now() - begin, result)
}

/// How often this process has let another run, of itself or not, by the kernel's count.
fn times_left() -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let counts = status.lines().filter_map(|line| line.split_once("voluntary_ctxt_switches:"));
    Ok(counts.filter_map(|(_, count)| count.trim().parse::<u64>().ok()).sum())
}
