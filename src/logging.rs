//! What the program logs, how and where: all of it can change while the program runs. Only in the command: the libraries
//! install nothing.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clap::{Args, ValueEnum};
use tracing::subscriber::{Interest, Subscriber};
use tracing::{Metadata, level_filters::LevelFilter};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, fmt, reload};

use crate::api::firecracker::types::{LogLevel, Logger};
use crate::api::open_sink;
use crate::exit::UsageError;
use crate::machines::log::Log;
use crate::terminal::{Stderr, shows_colours};

/// Variable that says what is logged when no flag does.
const VARIABLE: &str = "VMM_LOG";

/// Flags for log lines.
#[derive(Args, Clone, Debug, Default)]
pub struct LogArgs {
    /// Which lines are logged, on standard error: a level, or levels of modules [default: $VMM_LOG, or warn]
    ///
    /// Levels are off, error, warn, info, debug and trace. A module has its level after '=', and commas between them:
    /// 'warn,vmm_core=debug,devices::virtio::net=trace'. 'vmm log-level' changes it while the machine runs.
    #[arg(long, value_name = "FILTER", value_parser = parse, help_heading = "Command")]
    log: Option<Targets>,

    /// The form of log lines: for people, or a JSON object each
    #[arg(long, value_name = "FORM", value_enum, default_value = "text", help_heading = "Command")]
    log_format: Form,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// For people
    #[default]
    Text,
    /// For programs
    Json,
}

/// Reads a filter, as [`LogArgs`] describes it. An error is a sentence.
pub fn parse(text: &str) -> Result<Targets, String> {
    let refused = || {
        format!(
            "'{text}' is no filter; write off, error, warn, info, debug or trace, or MODULE=LEVEL, with commas between them"
        )
    };
    // The parser takes a word that is no level for a module.
    let part = |part: &str| part.contains('=') || (!part.is_empty() && part.parse::<LevelFilter>().is_ok());
    match text.split(',').all(part) {
        true => text.parse().map_err(|_| refused()),
        false => Err(refused()),
    }
}

/// Where log lines go.
enum Sink {
    Stderr,
    /// A file, or a FIFO that may be without a reader.
    File(File),
    /// A file of a limited size.
    Log(Log),
}

/// Writes a line to where they go at that time.
#[derive(Clone)]
struct Writer(Arc<Mutex<Sink>>);

impl Writer {
    fn sink(&self) -> MutexGuard<'_, Sink> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Writer {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        match &mut *self.sink() {
            Sink::Stderr => return Stderr.write(data),
            // A FIFO that nobody reads takes nothing any more: the line is lost, and nobody waits.
            Sink::File(file) => return file.write(data).or(Ok(data.len())),
            Sink::Log(log) => log.append(data),
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Passes lines that are wanted, and all spans: they say where the lines come from, and are made once.
struct Filter(Targets);

impl<S: Subscriber> Layer<S> for Filter {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        match metadata.is_span() || self.0.would_enable(metadata.target(), metadata.level()) {
            true => Interest::always(),
            false => Interest::never(),
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.is_span() || self.0.would_enable(metadata.target(), metadata.level())
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let lines = <Targets as Layer<S>>::max_level_hint(&self.0)?;
        Some(lines.max(LevelFilter::ERROR))
    }
}

/// What a line looks like besides its form.
#[derive(Clone, Copy)]
struct Look {
    colours: bool,
    level: bool,
    origin: bool,
}

type Lines = Box<dyn Layer<Registry> + Send + Sync>;

fn lines(form: Form, look: Look, writer: &Writer) -> Lines {
    let writer = writer.clone();
    let layer = fmt::layer()
        .with_ansi(look.colours)
        .with_level(look.level)
        .with_file(look.origin)
        .with_line_number(look.origin)
        .with_writer(move || writer.clone());
    match form {
        Form::Text => Box::new(layer),
        Form::Json => Box::new(layer.json().flatten_event(true).with_current_span(false)),
    }
}

/// The log of this program.
pub struct Logging {
    form: Form,
    lines: reload::Handle<Lines, Registry>,
    filter: reload::Handle<Filter, Registered>,
    writer: Writer,
}

type Registered = tracing_subscriber::layer::Layered<reload::Layer<Lines, Registry>, Registry>;

impl Logging {
    /// A log of nothing yet, on standard error, and what makes it the log of this program.
    pub fn new(form: Form) -> (Self, impl SubscriberInitExt) {
        let writer = Writer(Arc::new(Mutex::new(Sink::Stderr)));
        let colours = shows_colours(&std::io::stderr());
        let look = Look { colours, level: true, origin: false };
        let (layer, lines) = reload::Layer::new(lines(form, look, &writer));
        let (targets, filter) = reload::Layer::new(Filter(Targets::new()));
        let subscriber = tracing_subscriber::registry().with(layer).with(targets);
        (Self { form, lines, filter, writer }, subscriber)
    }

    /// Logs what `level` says, else the flags, else `VMM_LOG`, else warnings.
    pub fn start(args: &LogArgs, level: Option<LevelFilter>) -> Result<Arc<Self>, UsageError> {
        let filter = match (level, &args.log) {
            (Some(level), _) => Targets::new().with_default(level),
            (None, Some(filter)) => filter.clone(),
            (None, None) => from_environment()?,
        };
        Ok(Self::install(args.log_format, filter))
    }

    /// Logs what passes `filter`.
    pub fn install(form: Form, filter: Targets) -> Arc<Self> {
        let (logging, subscriber) = Self::new(form);
        // Only one of the process's threads is here, and only once.
        _ = subscriber.try_init();
        // It fails only without the subscriber.
        _ = logging.set_filter(filter);
        Arc::new(logging)
    }

    /// What is logged.
    pub fn filter(&self) -> String {
        self.filter.with_current(|Filter(targets)| targets.to_string()).unwrap_or_default()
    }

    /// Changes what is logged, from the next line on.
    pub fn set_filter(&self, filter: Targets) -> Result<(), String> {
        self.filter.reload(Filter(filter)).map_err(|error| unchanged(&error))
    }

    /// Writes into `log` from now on.
    pub fn write_to(&self, log: Log) -> Result<(), String> {
        *self.writer.sink() = Sink::Log(log);
        self.set_look(Look { colours: false, level: true, origin: false })
    }

    fn set_look(&self, look: Look) -> Result<(), String> {
        self.lines.reload(lines(self.form, look, &self.writer)).map_err(|error| unchanged(&error))
    }

    /// Changes what is logged and how, and where if that is said. An error is a sentence.
    pub fn set(&self, logger: &Logger) -> Result<(), String> {
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
            *self.writer.sink() = Sink::File(file);
        }
        self.set_filter(match &logger.module {
            Some(module) => Targets::new().with_target(module, level),
            None => Targets::new().with_default(level),
        })?;
        self.set_look(Look { colours: false, level: logger.show_level, origin: logger.show_log_origin })
    }
}

fn unchanged(error: &reload::Error) -> String {
    format!("The log cannot be changed: {error}.")
}

fn from_environment() -> Result<Targets, UsageError> {
    match std::env::var(VARIABLE) {
        Err(_) => Ok(Targets::new().with_default(LevelFilter::WARN)),
        Ok(text) => parse(&text).map_err(|sentence| UsageError(format!("{VARIABLE}={text}: {sentence}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_levels_and_modules_with_levels() {
        for good in ["off", "debug", "WARN", "vmm_core=debug,devices::virtio::net=trace", "info,vmm=off"] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in ["", "loud", "debug,loud", "vmm_core=loud", "vmm_core=debug,"] {
            assert!(parse(bad).unwrap_err().contains("MODULE=LEVEL"), "{bad}");
        }
        assert_eq!(parse("info,vmm=off").unwrap().to_string(), "vmm=off,info");
    }
}
