//! Runs the tests and adds up what every test program counted.

use std::env;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;

/// What the test programs counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Runs `cargo test --no-fail-fast` over the workspace, or over what `selection` names, passing its output on. The
/// last line is always `N passed, N failed, N skipped`. Ends this process with status 1 when a test failed; a build
/// that failed, or a test program that died without a count, counts as one failure.
///
/// # Errors
/// When cargo cannot be run.
pub fn run(root: &Path, selection: &[String]) -> anyhow::Result<()> {
    if !build_programs(root)? {
        println!("0 passed, 1 failed, 0 skipped");
        io::stdout().flush().ok();
        std::process::exit(1);
    }
    let mut cargo = cargo(root);
    // The suite runs the programs that were just built.
    cargo.args(["test", "--no-fail-fast"]).env("BERTH_E2E_USE_BUILT", "1");
    if selection.is_empty() {
        cargo.arg("--workspace");
    }
    let mut child =
        cargo.args(selection).stdout(Stdio::piped()).spawn().context("failed to run cargo test")?;
    let output = child.stdout.take().context("cargo test has no output")?;
    let (mut counts, failures) =
        pass_on(BufReader::new(output), io::stdout().lock()).context("failed to read cargo test")?;
    let status = child.wait().context("failed to wait for cargo test")?;
    if !status.success() && counts.failed == 0 {
        println!("cargo test ended with {status}: the build failed, or a test program died without a count");
        counts.failed = 1;
    }
    for failure in &failures {
        println!("{}", failure.join("\n    "));
    }
    println!("{} passed, {} failed, {} skipped", counts.passed, counts.failed, counts.skipped);
    if counts.failed > 0 || !status.success() {
        // Not an error: nothing may be printed after the counts.
        io::stdout().flush().ok();
        std::process::exit(1);
    }
    Ok(())
}

fn cargo(root: &Path) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root);
    cargo
}

/// Builds every program that the tests start, with the features of the whole workspace, so that nothing is built twice.
fn build_programs(root: &Path) -> anyhow::Result<bool> {
    let shipped = ["build", "--workspace", "--bins"];
    let sabotaged = [
        "build",
        "--workspace",
        "--features=berth-operator/sabotage,berth-node/sabotage",
        "--bin=berth-operator-sabotage",
        "--bin=berth-node-sabotage",
    ];
    for arguments in [&shipped[..], &sabotaged[..]] {
        let status = cargo(root).args(arguments).status().context("failed to run cargo build")?;
        if !status.success() {
            println!("cargo build ended with {status}");
            return Ok(false);
        }
    }
    Ok(true)
}

/// Of what a failed test said, the first lines are told again at the end, where only the end of a run is kept.
const TOLD_AGAIN: usize = 3;

/// The name of a test that failed, and the first lines of what it said.
type Failure = Vec<String>;

/// Copies lines, as they come, adds up the counts among them, and keeps what failed tests said.
fn pass_on(mut input: impl BufRead, mut output: impl Write) -> io::Result<(Counts, Vec<Failure>)> {
    let (mut counts, mut failures) = (Counts::default(), Vec::<Failure>::new());
    let mut within_failure = false;
    let mut line = Vec::new();
    while input.read_until(b'\n', &mut line)? > 0 {
        output.write_all(&line)?;
        output.flush()?;
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if let Some(found) = parse(text) {
            counts.add(found);
        }
        if let Some(name) = text.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" ----")) {
            failures.push(vec![name.to_owned()]);
            within_failure = true;
        } else if text == "failures:" || text.starts_with("test result: ") {
            within_failure = false;
        } else if let Some(failure) = failures.last_mut().filter(|_| within_failure && !text.is_empty())
            && failure.len() <= TOLD_AGAIN
        {
            failure.push(text.to_owned());
        }
        line.clear();
    }
    Ok((counts, failures))
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s`.
fn parse(line: &str) -> Option<Counts> {
    let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |word: &str| {
        numbers.split("; ").find_map(|part| part.trim().strip_suffix(word)?.trim().parse::<u64>().ok())
    };
    Some(Counts { passed: number("passed")?, failed: number("failed")?, skipped: number("ignored")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counts_of_all_programs_are_added_and_every_line_passes() {
        let input = "running 3 tests\n\
                     test a ... ok\n\
                     test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.01s\n\
                     \n\
                     test result: FAILED. 10 passed; 2 failed; 3 ignored; 0 measured; 0 filtered out; finished in 1s\n\
                     a line that mentions test result: ok. 7 passed; 7 failed; 7 ignored;\n\
                     \u{fffd} no newline at the end";
        let mut output = Vec::new();
        let (counts, failures) = pass_on(input.as_bytes(), &mut output).unwrap();
        assert_eq!(counts, Counts { passed: 12, failed: 2, skipped: 4 });
        assert_eq!(failures, Vec::<Failure>::new());
        assert_eq!(output, input.as_bytes());
    }

    #[test]
    fn what_failed_tests_said_first_is_kept_for_the_end() {
        let input = "failures:\n\n\
                     ---- kernel::boots stdout ----\n\n\
                     thread panicked at a.rs:1:\nno guest\nthird\nfourth\n\n\
                     ---- volume::mounts ----\n\
                     no mount\n\n\n\
                     failures:\n    kernel::boots\n    volume::mounts\n\n\
                     test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s\n\
                     afterwards\n";
        let (counts, failures) = pass_on(input.as_bytes(), &mut Vec::new()).unwrap();
        assert_eq!(counts.failed, 2);
        let boots = vec!["kernel::boots stdout", "thread panicked at a.rs:1:", "no guest", "third"];
        assert_eq!(failures, [boots, vec!["volume::mounts", "no mount"]]);
    }

    #[test]
    fn a_line_without_all_counts_is_no_result() {
        assert_eq!(parse("test result: ok. 2 passed; 0 failed"), None);
        assert_eq!(parse("test result: unknown"), None);
    }
}
