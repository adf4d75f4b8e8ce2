//! The stage that an import is in, as the agent's log tells it: sooner than status, which is written every 2 s.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

/// A stage in which processes are killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The source's bytes come into the pool.
    Fetch,
    /// A tool makes them a raw image.
    Convert,
    /// Chunks go into the store.
    Upload,
    /// Every chunk is looked up there.
    Verify,
    /// Index and manifest are written.
    Publish,
}

impl Stage {
    /// All of them, in order.
    pub const ALL: [Self; 5] = [Self::Fetch, Self::Convert, Self::Upload, Self::Verify, Self::Publish];

    /// The range of milliseconds after its begin, or after the last recovery, in which a process is killed.
    pub fn moments(self) -> (u64, u64) {
        match self {
            Self::Fetch => (20, 900),
            Self::Convert => (0, 700),
            Self::Upload => (100, 2000),
            Self::Verify => (0, 600),
            Self::Publish => (0, 800),
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Reads an agent's log as it grows.
#[derive(Debug)]
pub struct StageWatch {
    log: PathBuf,
    offset: u64,
    rest: String,
    current: Option<Stage>,
    lines: u64,
    checkpoints: u64,
}

impl StageWatch {
    /// From the log's beginning.
    pub fn new(log: &Path) -> Self {
        Self { log: log.to_owned(), offset: 0, rest: String::new(), current: None, lines: 0, checkpoints: 0 }
    }

    /// The stage now, if an import is in one, and a number that rises with every line about stages.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn look(&mut self) -> io::Result<(Option<Stage>, u64)> {
        let mut file = File::open(&self.log)?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        self.offset += u64::try_from(file.read_to_end(&mut bytes)?).unwrap_or_default();
        self.rest.push_str(&String::from_utf8_lossy(&bytes));
        while let Some((line, rest)) = self.rest.split_once('\n') {
            let found = parse(line);
            let checkpoint = line.contains(": checkpoint ") && line.contains("stage=\"Upload\"");
            self.rest = rest.to_owned();
            self.checkpoints += u64::from(checkpoint);
            if let Some(stage) = found {
                self.current = stage;
                self.lines += 1;
            }
        }
        Ok((self.current, self.lines))
    }

    /// How many checkpoints of uploads were logged so far.
    pub fn checkpoints(&self) -> u64 {
        self.checkpoints
    }

    /// Forgets the stage: the agent was killed, or an import has ended.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn reset(&mut self) -> io::Result<()> {
        self.look()?;
        self.current = None;
        Ok(())
    }
}

/// `Some(None)` for a line that ends a stage.
#[allow(clippy::option_option)] // no line of a stage, the end of one, a stage
fn parse(line: &str) -> Option<Option<Stage>> {
    let (before, rest) = line.split_once("stage=\"")?;
    let (name, _) = rest.split_once('"')?;
    let stage = Stage::ALL.into_iter().find(|stage| stage.to_string() == name)?;
    Some((!before.trim_end().ends_with("fetched")).then_some(stage))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_tell_the_stage_and_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        std::fs::write(
            &log,
            "x INFO a::fetch: checkpoint stage=\"Fetch\" offset=1\nx INFO a: uploading stage=\"Upl",
        )
        .unwrap();
        let mut watch = StageWatch::new(&log);
        assert_eq!(watch.look().unwrap(), (Some(Stage::Fetch), 1));
        let more = "x INFO a::fetch: checkpoint stage=\"Fetch\" offset=1\nx INFO a: uploading stage=\"Upload\" offset=0\n\
                    x INFO a: checkpoint stage=\"Upload\" offset=3\nx INFO a: fetched stage=\"Fetch\" bytes=3\n";
        std::fs::write(&log, more).unwrap();
        assert_eq!(watch.look().unwrap(), (None, 4));
        assert_eq!(watch.checkpoints(), 1);
    }
}
