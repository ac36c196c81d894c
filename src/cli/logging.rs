//! Log lines on standard error, only in the command: the libraries install nothing.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, fmt, reload};

use crate::api::firecracker::types::{LogLevel, Logger};
use crate::api::{SetLogger, open_sink};

use crate::exit::UsageError;
use crate::terminal::{Stderr, shows_colours};

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
    let colours = shows_colours(&std::io::stderr());
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

/// Where log lines go that can be redirected: a file or FIFO, else standard error.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Option<File>>>);

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // A FIFO that nobody reads takes nothing any more: the line is lost, and nobody waits.
            Some(file) => file.write(data).or(Ok(data.len())),
            None => Stderr.write(data),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Starts logging with nothing; what is returned says what is logged, where and how, as often as one likes.
pub fn changeable() -> SetLogger {
    let sink = Sink::default();
    let writer = sink.clone();
    let lines = move |logger: Option<&Logger>| {
        let writer = writer.clone();
        fmt::layer::<Registry>()
            .with_ansi(false)
            .with_level(logger.is_none_or(|logger| logger.show_level))
            .with_file(logger.is_some_and(|logger| logger.show_log_origin))
            .with_line_number(logger.is_some_and(|logger| logger.show_log_origin))
            .with_writer(move || writer.clone())
    };
    let (layer, format) = reload::Layer::new(lines(None));
    let (targets, filter) = reload::Layer::new(Targets::new());
    // Only one of the process's threads is here, and only once.
    _ = tracing_subscriber::registry().with(layer).with(targets).try_init();
    Box::new(move |logger| {
        let level = match logger.level {
            LogLevel::Off => LevelFilter::OFF,
            LogLevel::Trace => LevelFilter::TRACE,
            LogLevel::Debug => LevelFilter::DEBUG,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Warn => LevelFilter::WARN,
            LogLevel::Error => LevelFilter::ERROR,
        };
        if let Some(path) = &logger.log_path {
            let file = open_sink(path);
            let file =
                file.map_err(|error| format!("Cannot open log_path '{}': {error}.", path.display()))?;
            *sink.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
        }
        let targets = match &logger.module {
            Some(module) => Targets::new().with_target(module, level),
            None => Targets::new().with_default(level),
        };
        let changed = filter.reload(targets).and_then(|()| format.reload(lines(Some(logger))));
        changed.map_err(|error| format!("The logger cannot be changed: {error}."))
    })
}
