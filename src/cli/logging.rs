//! Log lines on standard error, only in the command: the libraries install nothing.

use tracing_subscriber::filter::LevelFilter;

use crate::exit::UsageError;
use crate::terminal::Stderr;

/// Variable that sets the level when no flag does.
const VARIABLE: &str = "VMM_LOG";

/// Starts logging: `VMM_LOG`, or warnings, and one level more for each `-v`; with `-q` only errors.
pub fn start(verbose: u8, quiet: bool) -> Result<(), UsageError> {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => from_environment()?,
        (false, 1) => LevelFilter::INFO,
        (false, 2) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    let colours =
        std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(level).with_ansi(colours).with_writer(|| Stderr);
    // Only one of the process's threads is here, and only once.
    _ = subscriber.try_init();
    Ok(())
}

fn from_environment() -> Result<LevelFilter, UsageError> {
    match std::env::var(VARIABLE) {
        Err(_) => Ok(LevelFilter::WARN),
        Ok(text) => text.parse().map_err(|_| {
            UsageError(format!("{VARIABLE}={text} is no level; use off, error, warn, info, debug or trace"))
        }),
    }
}
