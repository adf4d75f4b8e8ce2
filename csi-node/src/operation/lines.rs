//! Operations and answers as lines: one JSON object each, ended by a line feed.

use berth_core::reason::Reason;

use super::{Answer, Operation, Outcome, Refusal};

/// The longest line that an operation may be, in bytes, without its end. Labels are all that makes one long.
pub const LONGEST: usize = 64 << 10;

/// The longest line that is read of an answer, in bytes: the map of a volume that is written all over in small blocks is long.
pub const LONGEST_ANSWER: u64 = 1 << 30;

/// Reads an operation, and refuses one whose values can never be used.
///
/// # Errors
/// A refusal with [`Reason::InvalidSpec`].
pub fn read(line: &[u8]) -> Result<Operation, Refusal> {
    if line.len() > LONGEST {
        return Err(too_long());
    }
    let operation: Operation = serde_json::from_slice(line).map_err(|error| Refusal {
        reason: Reason::InvalidSpec,
        message: format!("no operation: {error}"),
    })?;
    operation.validate()?;
    Ok(operation)
}

/// What is told of a line that is longer than [`LONGEST`].
pub fn too_long() -> Refusal {
    let message = format!("no operation: the line is longer than {LONGEST} bytes");
    Refusal { reason: Reason::InvalidSpec, message }
}

/// An answer as a line, with its end.
pub fn write(answer: &Answer) -> Vec<u8> {
    let mut line = serde_json::to_vec(answer).unwrap_or_else(|error| {
        // Only a path that is no UTF-8 cannot be written.
        let message = format!("the answer cannot be written: {error}");
        format!(r#"{{"refused":{{"reason":"InvalidSpec","message":{}}}}}"#, serde_json::json!(message))
            .into_bytes()
    });
    line.push(b'\n');
    line
}

impl From<Result<Outcome, Refusal>> for Answer {
    fn from(result: Result<Outcome, Refusal>) -> Self {
        match result {
            Ok(outcome) => Self::Done(outcome),
            Err(refusal) => Self::Refused(refusal),
        }
    }
}

impl From<Answer> for Result<Outcome, Refusal> {
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Done(outcome) => Ok(outcome),
            Answer::Refused(refusal) => Err(refusal),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt as _;

    use super::*;

    #[test]
    fn what_is_no_operation_is_refused_with_the_place() {
        for (line, part) in [
            ("", "EOF"),
            ("{", "EOF"),
            (r#"{"do":"poolBurn"}"#, "poolBurn"),
            (r#"{"do":"poolList","pool":"p"}"#, "pool"),
            (r#"{"do":"poolForget","pool":"p"} x"#, "trailing"),
            (r#"{"do":"poolForget","pool":"/"}"#, "pool: "),
        ] {
            let refusal = read(line.as_bytes()).expect_err(line);
            assert_eq!(refusal.reason, Reason::InvalidSpec, "{line}");
            assert!(refusal.message.contains(part), "{line}: {refusal}");
        }
        assert_eq!(read(&vec![b' '; LONGEST + 1]), Err(too_long()));
        assert_eq!(read(br#"{"do":"poolList"}"#), Ok(Operation::PoolList {}));
    }

    #[test]
    fn an_answer_is_always_one_line_that_can_be_read() {
        let refused = Answer::Refused(Refusal { reason: Reason::InUse, message: "a\nb\"".to_owned() });
        let odd = Answer::Done(Outcome::Device(OsString::from_vec(vec![b'/', 0xff]).into()));
        for answer in [refused.clone(), Answer::Done(Outcome::Done), odd] {
            let line = write(&answer);
            assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1));
            serde_json::from_slice::<Answer>(&line).unwrap();
        }
        assert_eq!(serde_json::from_slice::<Answer>(&write(&refused)).unwrap(), refused);
    }
}
