//! The part that runs in the guest: it gives the program under test one operation after another, writes and reads volumes
//! in between, and says on its standard output what was begun and what was answered. Before an operation and after
//! its answer it leaves a mark in the log of writes.
//!
//! Its output reaches the machine at once, so what it says is known whenever the power is cut.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::bed::{DISK, LOOK};
use super::stamp::{BLOCK, Content};
use super::step::Answer;

/// How long it stays when all is said: its end would be the end of the program under test.
const STAY: Duration = Duration::from_secs(600);

/// A line of the script.
#[derive(Debug, Deserialize)]
struct Line {
    number: usize,
    play: Play,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Play {
    Ask { operation: Value, volume: Option<String> },
    Write { volume: String, blocks: Vec<u64>, sequence: u64 },
    Read { volume: String, blocks: Vec<u64> },
    Look,
}

/// A line of what it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Said {
    /// The program under test is being started.
    Started,
    /// This line of the script is carried out from now on.
    Begun(usize),
    /// The program's answer to it.
    Answered(usize, Value),
    /// The blocks are written, and safe.
    Written(usize),
    /// They could not be written, and why.
    NotWritten(usize, String),
    /// What the blocks hold.
    Held(usize, Vec<(u64, Content)>),
    /// They could not be read, and why.
    NotRead(usize, String),
    /// What other programs say.
    Seen(usize, String),
    /// How long the line took; for the first one, with the start of the program. Unit: milliseconds.
    Took(usize, u64),
    /// The program under test has ended.
    Ended(String),
}

/// The name of the mark before a line, and after it.
pub fn marks(number: usize) -> (String, String) {
    (format!("begin-{number}"), format!("end-{number}"))
}

/// Plays the script on the standard input with this program.
///
/// # Errors
/// What has to do with itself; what the program under test does is said.
pub fn play(program: &[String]) -> anyhow::Result<()> {
    say(&Said::Started)?;
    let mut began = Instant::now();
    let mut player = Player::start(program)?;
    for line in io::stdin().lines() {
        let line: Line = serde_json::from_str(&line?).context("a line of the script")?;
        let marked = !matches!(line.play, Play::Read { .. } | Play::Look);
        let (before, after) = marks(line.number);
        if marked {
            mark(&before)?;
        }
        say(&Said::Begun(line.number))?;
        let said = match player.play(line.number, line.play) {
            Ok(said) => said,
            Err(error) => {
                let status = player.child.try_wait()?.map(|status| status.to_string());
                say(&Said::Ended(format!("{error:#}; {}", status.unwrap_or_default())))?;
                bail!("the program under test does not answer");
            }
        };
        say(&said)?;
        say(&Said::Took(line.number, u64::try_from(began.elapsed().as_millis())?))?;
        if marked {
            mark(&after)?;
        }
        began = Instant::now();
    }
    thread::sleep(STAY);
    Ok(())
}

struct Player {
    child: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
    devices: BTreeMap<String, String>,
}

impl Player {
    fn start(program: &[String]) -> anyhow::Result<Self> {
        let [name, arguments @ ..] = program else { bail!("no program") };
        let mut child = Command::new(name)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let asks = child.stdin.take().context("it has no standard input")?;
        let answers = BufReader::new(child.stdout.take().context("it has no standard output")?);
        Ok(Self { child, asks, answers, devices: BTreeMap::new() })
    }

    /// Carries out a line; an error is the end of the program under test.
    fn play(&mut self, number: usize, play: Play) -> anyhow::Result<Said> {
        Ok(match play {
            Play::Ask { operation, volume } => {
                let answer = self.ask(&operation)?;
                if let (Some(volume), Some(device)) = (volume, Answer::device(&answer)) {
                    self.devices.insert(volume, device.to_owned());
                }
                Said::Answered(number, answer)
            }
            Play::Write { volume, blocks, sequence } => match self.write(&volume, &blocks, sequence) {
                Ok(()) => Said::Written(number),
                Err(error) => Said::NotWritten(number, format!("{error:#}")),
            },
            Play::Read { volume, blocks } => match self.read(&volume, &blocks) {
                Ok(held) => Said::Held(number, held),
                Err(error) => Said::NotRead(number, format!("{error:#}")),
            },
            Play::Look => Said::Seen(number, look()?),
        })
    }

    fn ask(&mut self, operation: &Value) -> anyhow::Result<Value> {
        writeln!(self.asks, "{operation}")?;
        self.asks.flush()?;
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            self.child.wait()?;
            bail!("no answer to {operation}");
        }
        serde_json::from_str(&line).with_context(|| format!("the answer `{}`", line.trim_end()))
    }

    fn device(&self, volume: &str) -> anyhow::Result<&str> {
        Ok(self.devices.get(volume).context("no answer has named its device")?)
    }

    fn write(&self, volume: &str, blocks: &[u64], sequence: u64) -> anyhow::Result<()> {
        let file = OpenOptions::new().write(true).open(self.device(volume)?)?;
        for &block in blocks {
            let content = Content::Stamp { volume: volume.to_owned(), block, sequence };
            file.write_all_at(&content.bytes(), block * BLOCK as u64)?;
        }
        Ok(file.sync_all()?)
    }

    fn read(&self, volume: &str, blocks: &[u64]) -> anyhow::Result<Vec<(u64, Content)>> {
        let file = File::open(self.device(volume)?)?;
        let mut held = Vec::new();
        for &block in blocks {
            let mut bytes = vec![0; BLOCK];
            file.read_exact_at(&mut bytes, block * BLOCK as u64)?;
            held.push((block, Content::of(&bytes)));
        }
        Ok(held)
    }
}

fn look() -> anyhow::Result<String> {
    let output = Command::new("bash").args(["-c", LOOK]).stderr(Stdio::inherit()).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn say(said: &Said) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(said)?;
    line.push('\n');
    // One write, so that a line is there whole or not at all.
    io::stdout().write_all(line.as_bytes())?;
    Ok(io::stdout().flush()?)
}

fn mark(text: &str) -> anyhow::Result<()> {
    // Where nothing can be marked, the power is about to be cut.
    Command::new("dmsetup").args(["message", DISK, "0", "mark", text]).stdout(Stdio::null()).status()?;
    Ok(())
}
