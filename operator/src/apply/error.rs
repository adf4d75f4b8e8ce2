//! Why a change did not go through.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use kube::Error;
use thiserror::Error;

/// Why a change did not go through.
#[derive(Clone, Debug, Error)]
pub enum ApplyError {
    /// Somebody else wrote the object since it was seen: decide anew.
    #[error("could not {operation} {object}: it has changed since it was seen")]
    Conflict {
        /// What was to be done.
        operation: &'static str,
        /// Kind and name.
        object: String,
    },
    /// The API server refused, or did not answer.
    #[error("could not {operation} {object}")]
    Request {
        /// What was to be done.
        operation: &'static str,
        /// Kind and name.
        object: String,
        /// What it said.
        source: Arc<Error>,
    },
    /// The API server did not answer in time. Whether it went through shows in the watches.
    #[error("the API server did not answer within {0:?}")]
    Silent(Duration),
}

/// What the API server's answer means for a change.
pub enum Answer<T> {
    /// It went through.
    Done(T),
    /// The object is not there.
    Gone,
    /// There is one with this name already.
    Exists,
}

/// Reads the answer to a write.
///
/// # Errors
/// [`ApplyError::Conflict`] if the object has changed, [`ApplyError::Request`] for everything else.
pub fn answer<T>(
    operation: &'static str,
    object: impl Display,
    result: Result<T, Error>,
) -> Result<Answer<T>, ApplyError> {
    let object = object.to_string();
    match result {
        Ok(value) => Ok(Answer::Done(value)),
        Err(Error::Api(status)) if status.code == 404 => Ok(Answer::Gone),
        Err(Error::Api(status)) if status.code == 409 && status.reason == "AlreadyExists" => {
            Ok(Answer::Exists)
        }
        Err(Error::Api(status)) if status.code == 409 => Err(ApplyError::Conflict { operation, object }),
        Err(source) => Err(ApplyError::Request { operation, object, source: Arc::new(source) }),
    }
}

/// Reads the answer to a compare-and-swap: an object that is gone has changed, too.
///
/// # Errors
/// As [`answer`].
pub fn swapped<T>(
    operation: &'static str,
    object: impl Display,
    result: Result<T, Error>,
) -> Result<T, ApplyError> {
    let object = object.to_string();
    match answer(operation, &object, result)? {
        Answer::Done(value) => Ok(value),
        Answer::Gone | Answer::Exists => Err(ApplyError::Conflict { operation, object }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    fn refused(code: u16, reason: &str) -> Result<(), Error> {
        Err(Error::Api(Box::new(Status::failure("no", reason).with_code(code))))
    }

    #[test]
    fn answers_are_told_apart() {
        assert!(matches!(answer("write", "X a", Ok(())), Ok(Answer::Done(()))));
        assert!(matches!(answer("write", "X a", refused(404, "NotFound")), Ok(Answer::Gone)));
        assert!(matches!(answer("write", "X a", refused(409, "AlreadyExists")), Ok(Answer::Exists)));
        assert!(matches!(answer("write", "X a", refused(409, "Conflict")), Err(ApplyError::Conflict { .. })));
        assert!(matches!(answer("write", "X a", refused(403, "Forbidden")), Err(ApplyError::Request { .. })));
        assert!(matches!(
            swapped("write", "X a", refused(404, "NotFound")),
            Err(ApplyError::Conflict { .. })
        ));
    }
}
