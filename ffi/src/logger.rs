//! The core's messages go to stderr, where a host has no better place for them.

use std::env;
use std::io::{self, Write as _};

use log::{LevelFilter, Log, Metadata, Record};

/// Which messages: `error`, `warn` (the default), `info`, `debug`, `trace` or `off`.
const LEVEL: &str = "HYPERBP_LOG";

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        // `log` has compared the level already.
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = record.level().as_str().to_ascii_lowercase();
        // Not eprintln, which panics where there is no stderr.
        let _ = writeln!(io::stderr(), "hyperbp: {level}: {}", record.args());
    }

    fn flush(&self) {}
}

/// Has messages printed, unless somebody else in this process logs them.
pub(crate) fn install() {
    if log::set_logger(&Stderr).is_ok() {
        let level = env::var(LEVEL).ok().and_then(|level| level.parse().ok());
        log::set_max_level(level.unwrap_or(LevelFilter::Warn));
    }
}
