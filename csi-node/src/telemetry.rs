//! Log lines: text or JSON on standard error, filtered by `RUST_LOG`.

use std::io::{self, Write};

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Standard error, for a process that outlives whoever reads it: what nobody reads is lost, and nothing fails.
struct Lenient(io::Stderr);

impl Write for Lenient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(self.0.write(bytes).unwrap_or(bytes.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.0.flush(); // as above
        Ok(())
    }
}

/// Starts logging for this process, filtered by `RUST_LOG` or, without it, as given. A second call changes nothing.
pub fn init(format: LogFormat, unless_set: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(unless_set));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Lenient(io::stderr()));
    let started = match format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    if let Err(error) = started {
        tracing::debug!(error, "logging was started before");
    }
}

/// An error with all that caused it, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let next = inner.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = inner.source();
    }
    text
}
