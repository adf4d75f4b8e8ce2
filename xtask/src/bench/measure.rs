//! One run of one command.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use berth_core::units::Bytes;

use super::programs::TIME;
use super::server::Arrived;

/// Seconds that one command may take.
const LIMIT: &str = "3600";

/// What a command took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// From start to end.
    pub wall: Duration,
    /// User and system time, of its children too.
    pub cpu: Duration,
    /// The most memory that was resident at once.
    pub memory: Bytes,
}

/// What one run of a case took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// Of the client.
    pub cost: Cost,
    /// CPU time of the S3 server meanwhile.
    pub server_cpu: Duration,
    /// What was stored, and in how many requests.
    pub stored: Arrived,
}

/// Every round of one input.
pub struct Series {
    /// What is measured, as a heading.
    pub title: String,
    /// The cases; ours first.
    pub cases: Vec<&'static str>,
    /// By round, a sample of each case.
    pub rounds: Vec<Vec<Sample>>,
}

/// Runs every case of one round once, in an order that turns with every round; the samples are in the order of the cases.
pub fn in_turn<C: Copy + std::fmt::Debug>(
    round: u32,
    cases: &[C],
    mut run: impl FnMut(C) -> anyhow::Result<Sample>,
) -> anyhow::Result<Vec<Sample>> {
    let mut samples = vec![Sample::default(); cases.len()];
    let mut order: Vec<usize> = (0..cases.len()).collect();
    order.rotate_left(usize::try_from(round).unwrap_or_default() % cases.len().max(1));
    for place in order {
        let case = cases[place];
        samples[place] = run(case).with_context(|| format!("{case:?}"))?;
        let Cost { wall, cpu, memory } = samples[place].cost;
        eprintln!("round {round} {case:?}: {wall:.2?} wall, {cpu:.2?} CPU, {memory}");
    }
    Ok(samples)
}

/// Runs a command to its end and tells what it took, and what it printed. A command that fails is an error.
pub fn timed(command: &Command, scratch: &Path) -> anyhow::Result<(Cost, Vec<u8>)> {
    let notes = scratch.join("time.txt");
    let mut timed = Command::new("timeout");
    timed
        .args(["--kill-after", "10", LIMIT, TIME, "--quiet", "--format", "%U %S %M", "--output"])
        .arg(&notes);
    timed.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => timed.env(name, value),
            None => timed.env_remove(name),
        };
    }
    let start = Instant::now();
    let printed = finish(&mut timed)?;
    let wall = start.elapsed();
    let notes = std::fs::read_to_string(&notes).context("reading what GNU time wrote")?;
    let (cpu, memory) = parse(&notes).with_context(|| format!("GNU time wrote `{}`", notes.trim()))?;
    Ok((Cost { wall, cpu, memory }, printed))
}

/// Runs a command that is not measured.
pub fn succeed(command: &mut Command) -> anyhow::Result<()> {
    finish(command).map(drop)
}

fn finish(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {command:?}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}\n{}", output.status, said.trim());
    }
    Ok(output.stdout)
}

/// Reads `%U %S %M`: seconds, seconds, KiB.
fn parse(notes: &str) -> Option<(Duration, Bytes)> {
    let mut numbers = notes.lines().last()?.split(' ');
    let mut seconds = || Duration::try_from_secs_f64(numbers.next()?.parse().ok()?).ok();
    let cpu = seconds()? + seconds()?;
    Some((cpu, Bytes::kib(numbers.next()?.parse().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notes_of_gnu_time() {
        assert_eq!(parse("1.50 0.25 2048\n"), Some((Duration::from_millis(1750), Bytes::mib(2))));
        assert_eq!(parse("1.50 0.25"), None);
        assert_eq!(parse("Command terminated by signal 9"), None);
    }

    #[test]
    fn a_command_that_fails_is_an_error_with_what_it_said() {
        let error = succeed(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).expect_err("fails");
        assert!(error.to_string().contains("broken") && error.to_string().contains('3'), "{error}");
    }
}
