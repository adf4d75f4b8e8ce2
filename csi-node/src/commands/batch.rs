//! `berth-node batch`: many operations by one process, a line each.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use berth_core::reason::Reason;
use clap::Args;
use thiserror::Error;

use super::asking::Carrier;
use super::session::{Session, SessionError};
use crate::args::NodeArgs;
use crate::operation::{Answer, Refusal, lines};

/// Flags of `berth-node batch`.
#[derive(Clone, Debug, Args)]
pub struct BatchArgs {
    /// The operations, one JSON object a line. Default, or `-`: standard input.
    pub file: Option<PathBuf>,
    /// Where.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// Why a batch did not reach its end.
#[derive(Debug, Error)]
pub enum BatchError {
    /// The file.
    #[error("failed to read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Standard output.
    #[error("failed to print an answer")]
    Print(#[source] io::Error),
    /// Nobody carries anything out.
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// Carries out all operations, and tells how the command ends.
///
/// # Errors
/// If the operations cannot be read, the answers not be printed, or there is no answer.
pub fn run(args: &BatchArgs) -> Result<ExitCode, BatchError> {
    let path = args.file.clone().filter(|path| path.as_os_str() != "-");
    let name = path.clone().unwrap_or_else(|| PathBuf::from("standard input"));
    let read = |source| BatchError::Read { path: name.clone(), source };
    let input: Box<dyn BufRead> = match &path {
        Some(path) => Box::new(BufReader::new(File::open(path).map_err(read)?)),
        None => Box::new(io::stdin().lock()),
    };
    let mut out = io::stdout().lock();
    let mut session = match Session::open(&args.node, "berth-node batch") {
        Ok(session) => session,
        Err(error) => {
            let refusal = error.refused()?;
            let line = lines::write(&Answer::Refused(refusal));
            out.write_all(&line).and_then(|()| out.flush()).map_err(BatchError::Print)?;
            return Ok(ExitCode::FAILURE);
        }
    };
    let refused = converse(&mut session, input, &mut out, &name)?;
    Ok(if refused == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Answers line after line; how many were refused.
fn converse(
    carrier: &mut impl Carrier,
    mut input: impl BufRead,
    out: &mut impl Write,
    name: &std::path::Path,
) -> Result<u64, BatchError> {
    let (mut line, mut number, mut refused) = (Vec::new(), 0_u64, 0);
    loop {
        line.clear();
        number += 1;
        let mut limited = (&mut input).take(lines::LONGEST as u64 + 2);
        let read = limited.read_until(b'\n', &mut line);
        if read.map_err(|source| BatchError::Read { path: name.to_owned(), source })? == 0 {
            return Ok(refused);
        }
        let whole = line.pop_if(|byte| *byte == b'\n').is_some();
        if line.trim_ascii().is_empty() && line.len() <= lines::LONGEST {
            continue;
        }
        let answer = match lines::read(&line) {
            Ok(operation) => carrier.ask(&operation)?,
            Err(refusal) => Answer::Refused(at_line(number, refusal)),
        };
        refused += u64::from(matches!(answer, Answer::Refused(_)));
        out.write_all(&lines::write(&answer)).and_then(|()| out.flush()).map_err(BatchError::Print)?;
        if !whole && line.len() > lines::LONGEST {
            return Ok(refused); // where the next line begins is not known
        }
    }
}

fn at_line(number: u64, Refusal { reason, message }: Refusal) -> Refusal {
    debug_assert_eq!(reason, Reason::InvalidSpec);
    Refusal { reason, message: format!("line {number}: {message}") }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::operation::{Operation, Outcome};

    /// Refuses to forget pools, does everything else.
    fn fake(operation: &Operation) -> Answer {
        match operation {
            Operation::PoolForget { pool } => {
                Answer::Refused(Refusal { reason: Reason::PoolNotFound, message: pool.to_string() })
            }
            _ => Answer::Done(Outcome::Done),
        }
    }

    fn answers(input: &[u8]) -> (u64, Vec<Answer>) {
        let mut out = Vec::new();
        let refused = converse(&mut fake, input, &mut out, Path::new("test")).unwrap();
        let read = |line: &[u8]| serde_json::from_slice(line).unwrap();
        (refused, out.split_inclusive(|byte| *byte == b'\n').map(read).collect())
    }

    #[test]
    fn each_line_has_its_answer_in_order_and_a_bad_one_ends_nothing() {
        let input = b"{\"do\":\"poolList\"}\n\n  \n{\"do\":\"nothing\"}\n{\"do\":\"poolForget\",\"pool\":\"p\"}\n{\"do\":\"poolList\"}\n ";
        let (refused, answers) = answers(input);
        assert_eq!((refused, answers.len()), (2, 4));
        assert_eq!((&answers[0], &answers[3]), (&Answer::Done(Outcome::Done), &Answer::Done(Outcome::Done)));
        let Answer::Refused(bad) = &answers[1] else { panic!("{answers:?}") };
        assert!(bad.message.starts_with("line 4: no operation: "), "{bad}");
        assert!(matches!(&answers[2], Answer::Refused(refusal) if refusal.reason == Reason::PoolNotFound));
    }

    #[test]
    fn a_line_without_end_is_refused_and_never_kept_whole() {
        let (refused, answers) = answers(&vec![b'x'; lines::LONGEST * 3]);
        assert_eq!((refused, answers.len()), (1, 1));
    }

    /// Answers must be there before the next line is: a script may decide by them.
    #[test]
    fn an_answer_is_flushed_at_once() {
        struct Flushed(Vec<u8>, usize);
        impl Write for Flushed {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                self.1 = self.0.len();
                Ok(())
            }
        }
        let mut out = Flushed(Vec::new(), 0);
        converse(&mut fake, &b"{\"do\":\"poolList\"}\n"[..], &mut out, Path::new("test")).unwrap();
        assert!(out.1 > 0 && out.1 == out.0.len());
    }
}
