//! One operation for one command: asked for, and its answer printed.

use std::io::{self, Write};
use std::process::ExitCode;

use berth_core::ids::Uid;
use thiserror::Error;

use super::session::{Session, SessionError};
use super::text;
use crate::args::{NodeArgs, Output};
use crate::operation::{Answer, MOST_PARTS, Operation, Outcome, Refusal, lines};

/// What a command asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asking {
    /// The operation.
    pub operation: Operation,
    /// The UID in it that the command has made, because none was given.
    pub made: Option<Uid>,
}

impl From<Operation> for Asking {
    fn from(operation: Operation) -> Self {
        Self { operation, made: None }
    }
}

/// The UID that was given, or a new one, twice.
pub fn named(given: Option<Uid>) -> (Uid, Option<Uid>) {
    if let Some(uid) = given {
        return (uid, None);
    }
    let made = Uid(uuid::Uuid::new_v4().to_string());
    (made.clone(), Some(made))
}

/// Why a command has no answer, or could not print it.
#[derive(Debug, Error)]
pub enum AskError {
    /// Nobody could be asked.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Standard output.
    #[error("failed to print the answer")]
    Print(#[source] io::Error),
}

/// What carries operations out: the agent, this process, or a test.
pub trait Carrier {
    /// Carries one out.
    ///
    /// # Errors
    /// If there is no answer; it may have been carried out.
    fn ask(&mut self, operation: &Operation) -> Result<Answer, SessionError>;
}

impl<F: FnMut(&Operation) -> Answer> Carrier for F {
    fn ask(&mut self, operation: &Operation) -> Result<Answer, SessionError> {
        Ok(self(operation))
    }
}

/// Asks, prints, and tells how the command ends: 0 if it was done, 1 if it was refused or something was found.
///
/// # Errors
/// If nobody could be asked, or nothing could be printed.
pub fn run(node: &NodeArgs, asking: &Asking) -> Result<ExitCode, AskError> {
    let (mut out, mut err) = (io::stdout().lock(), io::stderr());
    if let Some(uid) = &asking.made {
        // Before anything is done: a command that breaks off is repeated under this name.
        match node.output {
            Output::Text => writeln!(out, "{uid}").and_then(|()| out.flush()),
            Output::Json => writeln!(err, "uid {uid}"),
        }
        .map_err(AskError::Print)?;
    }
    let opened = Session::open(node, &format!("berth-node, for {}", asking.operation.name()));
    let mut session = match opened {
        Ok(session) => session,
        Err(error) => {
            let refused = Answer::Refused(error.refused()?);
            return print(node.output, &refused, None, &mut out, &mut err).map_err(AskError::Print);
        }
    };
    let mut operation = asking.operation.clone();
    loop {
        let (answer, at_stake) = ask(&mut session, &operation)?;
        let code = print(node.output, &answer, at_stake.as_deref(), &mut out, &mut err);
        let code = code.map_err(AskError::Print)?;
        match rest(&operation, &answer) {
            Some(next) => operation = next,
            None => return Ok(code),
        }
    }
}

/// What has to be asked for after this answer, if it tells a part of a volume only.
fn rest(operation: &Operation, answer: &Answer) -> Option<Operation> {
    let Answer::Done(Outcome::Map(parts)) = answer else { return None };
    let end = parts.last().filter(|_| parts.len() >= MOST_PARTS)?.end();
    let mut next = operation.clone();
    if let Operation::VolumeMap { offset, .. } | Operation::VolumeDelta { offset, .. } = &mut next {
        *offset = end;
    }
    Some(next)
}

/// The answer; and, if something destructive was refused, what would have been destroyed.
fn ask(carrier: &mut impl Carrier, operation: &Operation) -> Result<(Answer, Option<String>), SessionError> {
    let answer = carrier.ask(operation)?;
    let (pool, only) = match operation {
        Operation::PoolDestroy { pool, .. } => (pool, None),
        Operation::VolumeDestroy { pool, volume } => (pool, Some(volume)),
        _ => return Ok((answer, None)),
    };
    if matches!(answer, Answer::Done(_)) {
        return Ok((answer, None));
    }
    let Answer::Done(Outcome::Volumes(mut volumes)) =
        carrier.ask(&Operation::VolumeList { pool: pool.clone() })?
    else {
        return Ok((answer, None));
    };
    volumes.retain(|volume| only.is_none_or(|only| *only == volume.uid));
    let at_stake = (!volumes.is_empty()).then(|| text::show(&Outcome::Volumes(volumes)));
    Ok((answer, at_stake))
}

fn print(
    output: Output,
    answer: &Answer,
    at_stake: Option<&str>,
    out: &mut impl Write,
    err: &mut impl Write,
) -> io::Result<ExitCode> {
    if output == Output::Json {
        out.write_all(&lines::write(answer))?;
    }
    let code = match answer {
        Answer::Done(outcome) => {
            if output == Output::Text {
                out.write_all(text::show(outcome).as_bytes())?;
            }
            let found = matches!(outcome, Outcome::Findings(findings) if !findings.is_empty());
            if found { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Answer::Refused(refusal) => {
            complain(refusal, at_stake, err)?;
            ExitCode::FAILURE
        }
    };
    out.flush()?;
    Ok(code)
}

fn complain(refusal: &Refusal, at_stake: Option<&str>, err: &mut impl Write) -> io::Result<()> {
    writeln!(err, "{refusal}")?;
    if let Some(lost) = at_stake {
        write!(err, "What would be destroyed:\n{lost}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use berth_core::reason::Reason;
    use berth_core::units::Bytes;

    use super::*;
    use crate::operation::{Finding, FindingKind, MapFrom, MapLine, VolumeKind, VolumeLine};

    fn refused() -> Answer {
        Answer::Refused(Refusal { reason: Reason::InUse, message: "volume v is attached".to_owned() })
    }

    fn volume(uid: &str) -> VolumeLine {
        let kind = VolumeKind::Volume;
        let labels = [("app".to_owned(), "db".to_owned())].into();
        VolumeLine {
            uid: uid.into(),
            kind,
            size: Bytes::gib(1),
            mapped: None,
            origin: None,
            device: None,
            labels,
        }
    }

    fn printed(output: Output, answer: &Answer, at_stake: Option<&str>) -> (ExitCode, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = print(output, answer, at_stake, &mut out, &mut err).unwrap();
        (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn a_refused_destruction_says_what_it_would_have_destroyed() {
        let mut carrier = |operation: &Operation| match operation {
            Operation::VolumeList { .. } => Answer::Done(Outcome::Volumes(vec![volume("a"), volume("b")])),
            _ => refused(),
        };
        let pool = Operation::PoolDestroy { pool: "p".into(), with_contents: false };
        let (answer, lost) = ask(&mut carrier, &pool).unwrap();
        let (_, out, err) = printed(Output::Text, &answer, lost.as_deref());
        assert_eq!(out, "");
        assert!(err.starts_with("InUse: volume v is attached\nWhat would be destroyed:\n"), "{err}");
        assert!(err.contains("\na ") && err.contains("\nb ") && err.contains("app=db"), "{err}");
        let one = Operation::VolumeDestroy { pool: "p".into(), volume: "b".into() };
        let (_, lost) = ask(&mut carrier, &one).unwrap();
        assert!(
            lost.as_ref().is_some_and(|lost| lost.contains("\nb ") && !lost.contains("\na ")),
            "{lost:?}"
        );
        // What is not destructive, or was done, is only answered.
        assert_eq!(
            ask(&mut carrier, &Operation::PoolForget { pool: "p".into() }).unwrap(),
            (refused(), None)
        );
    }

    #[test]
    fn what_a_full_answer_leaves_out_is_asked_for() {
        let part = |n: usize| {
            let offset = Bytes(n as u64);
            MapLine { offset, length: Bytes(1), from: MapFrom::Own }
        };
        let asked = |offset| Operation::VolumeMap { pool: "p".into(), volume: "v".into(), offset };
        let told = |count| Answer::Done(Outcome::Map((0..count).map(part).collect()));
        let next = rest(&asked(Bytes::ZERO), &told(MOST_PARTS));
        assert_eq!(next, Some(asked(Bytes(MOST_PARTS as u64))));
        assert_eq!(rest(&asked(Bytes::ZERO), &told(MOST_PARTS - 1)), None);
        assert_eq!(rest(&asked(Bytes::ZERO), &told(0)), None);
    }

    #[test]
    fn json_is_the_answer_and_the_refusal_is_told_to_people_too() {
        let (code, out, err) = printed(Output::Json, &refused(), None);
        assert_eq!(code, ExitCode::FAILURE);
        assert_eq!(serde_json::from_str::<Answer>(&out).unwrap(), refused());
        assert_eq!(err, "InUse: volume v is attached\n");
        let done = printed(Output::Json, &Answer::Done(Outcome::Done), None);
        assert_eq!(done, (ExitCode::SUCCESS, "{\"done\":\"done\"}\n".to_owned(), String::new()));
    }

    #[test]
    fn findings_end_with_1() {
        let none = printed(Output::Text, &Answer::Done(Outcome::Findings(Vec::new())), None);
        assert_eq!(none.0, ExitCode::SUCCESS);
        let finding = Finding { kind: FindingKind::Leaked, about: "7".to_owned(), message: "m".to_owned() };
        let found = Answer::Done(Outcome::Findings(vec![finding]));
        assert_eq!(printed(Output::Text, &found, None).0, ExitCode::FAILURE);
        assert_eq!(printed(Output::Json, &found, None).0, ExitCode::FAILURE);
    }

    #[test]
    fn a_given_uid_is_kept_and_only_a_made_one_is_told() {
        assert_eq!(named(Some("u".into())), ("u".into(), None));
        let (uid, made) = named(None);
        assert_eq!(made.as_ref(), Some(&uid));
        assert_ne!(named(None).0, uid);
        assert!(crate::values::uid(uid.as_str()).is_ok());
    }
}
