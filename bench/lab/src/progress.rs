//! What the user sees meanwhile: bars on a terminal, plain lines elsewhere.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shows what is going on, on stderr.
#[derive(Debug)]
pub struct Progress(Mode);

#[derive(Debug)]
enum Mode {
    Bars(MultiProgress),
    Lines,
    Silent,
}

impl Progress {
    /// Bars when stderr is a terminal, else a line at the start and the end of everything and at each tenth of it.
    #[must_use]
    pub fn new() -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        Self(if bars.is_hidden() { Mode::Lines } else { Mode::Bars(bars) })
    }

    /// Lines on a terminal, too: for when others write to it meanwhile.
    #[must_use]
    pub fn lines() -> Self {
        Self(Mode::Lines)
    }

    /// Shows nothing.
    #[must_use]
    pub fn silent() -> Self {
        Self(Mode::Silent)
    }

    /// Starts showing a piece of work. It is taken off the screen when the [`Task`] is dropped.
    #[must_use]
    pub fn start(&self, name: &str) -> Task {
        let bar = match &self.0 {
            Mode::Bars(bars) => {
                let bar = bars.add(ProgressBar::new_spinner().with_style(spinner()).with_prefix(name.to_owned()));
                bar.enable_steady_tick(Duration::from_millis(120));
                Some(bar)
            }
            Mode::Lines | Mode::Silent => None,
        };
        let task = Task {
            name: name.to_owned(),
            bar,
            lines: matches!(self.0, Mode::Lines),
            begun: Instant::now(),
            shown: Mutex::new(None),
        };
        task.line("...");
        task
    }

    /// Says something that stays on the screen.
    pub fn note(&self, text: &str) {
        match &self.0 {
            // Best effort: a terminal that went away is no reason to stop.
            Mode::Bars(bars) => drop(bars.println(text)),
            Mode::Lines => eprintln!("{text}"),
            Mode::Silent => {}
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

fn spinner() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {prefix:<10} {elapsed:>4} {wide_msg}").expect("a constant template")
}

fn bar() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {prefix:<10} {elapsed:>4} [{bar:24}] {percent:>3}% {wide_msg}")
        .expect("a constant template")
        .progress_chars("=> ")
}

/// A piece of work that is shown while it lasts.
#[derive(Debug)]
pub struct Task {
    name: String,
    bar: Option<ProgressBar>,
    lines: bool,
    begun: Instant,
    /// The tenth that was shown last; lines only.
    shown: Mutex<Option<u64>>,
}

impl Task {
    /// What is being done now.
    pub fn doing(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => self.line(text),
        }
    }

    /// `done` of `total` steps are done, `text` is being done now.
    pub fn at(&self, done: u64, total: u64, text: &str) {
        if let Some(shown) = &self.bar {
            if shown.length() != Some(total) {
                shown.set_style(bar());
                shown.set_length(total);
            }
            shown.set_position(done.min(total));
            shown.set_message(text.to_owned());
        } else if self.lines {
            let tenth = Some(done.saturating_mul(10) / total.max(1));
            let mut last = self.shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if *last != tenth {
                *last = tenth;
                self.line(&format!("{:>3}% {text}", done.saturating_mul(100) / total.max(1)));
            }
        }
    }

    /// How long it has lasted.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    fn line(&self, text: &str) {
        if self.lines {
            eprintln!("{:<10} {:>4}s {text}", self.name, self.elapsed().as_secs());
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
