//! What is shown: lines, spinners and bars on a terminal; elsewhere plain lines, one for every tenth.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Where things are shown.
pub struct Screen {
    terminal: bool,
}

/// A step under way.
pub struct Step {
    bar: Option<ProgressBar>,
    what: String,
    started: Instant,
    tenth: u64,
}

impl Screen {
    /// Standard output, with whatever it can do.
    pub fn new() -> Self {
        Self { terminal: std::io::stdout().is_terminal() }
    }

    /// One line. A reader that has gone away does not end the demonstration.
    #[allow(clippy::unused_self)] // what is said to a screen, though each writes to the same output
    pub fn line(&self, text: &str) {
        writeln!(std::io::stdout(), "{text}").ok();
    }

    /// A headline.
    pub fn headline(&self, text: &str) {
        self.line(&if self.terminal { format!("\n\x1b[1m{text}\x1b[0m") } else { format!("\n== {text}") });
    }

    /// A step of unknown length.
    pub fn step(&self, what: &str) -> Step {
        let style = ProgressStyle::with_template("  {spinner} {prefix} {msg}").expect("a constant template");
        self.begin(what, ProgressBar::new_spinner().with_style(style))
    }

    /// A step that counts to 100.
    pub fn meter(&self, what: &str) -> Step {
        let style = ProgressStyle::with_template("  {prefix} [{bar:32}] {pos:>3} % {msg}")
            .expect("a constant template");
        self.begin(what, ProgressBar::new(100).with_style(style.progress_chars("=> ")))
    }

    fn begin(&self, what: &str, bar: ProgressBar) -> Step {
        let bar = self.terminal.then(|| {
            bar.set_prefix(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            self.line(&format!("  {what} ..."));
        }
        Step { bar, what: what.to_owned(), started: Instant::now(), tenth: 0 }
    }
}

impl Step {
    /// What it does at the moment; only a terminal shows it.
    pub fn says(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_owned());
        }
    }

    /// How far it is, 0 to 100, and what it does.
    pub fn at(&mut self, percent: u64, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(percent);
            bar.set_message(text.to_owned());
        } else if percent / 10 > self.tenth {
            self.tenth = percent / 10;
            writeln!(std::io::stdout(), "  {} {percent:>3} % {text}", self.what).ok();
        }
    }

    /// It has ended well. Returns how long it took.
    pub fn done(self, result: &str) -> Duration {
        let took = self.started.elapsed();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let result = if result.is_empty() { String::new() } else { format!(": {result}") };
        writeln!(std::io::stdout(), "  {}{result} ({:.1} s)", self.what, took.as_secs_f32()).ok();
        took
    }
}

/// A size for people.
pub fn size(bytes: u64) -> String {
    // Two digits are shown, so the lost ones do not matter.
    #[allow(clippy::cast_precision_loss)]
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib >= 1024.0 { format!("{:.1} GiB", mib / 1024.0) } else { format!("{mib:.1} MiB") }
}
