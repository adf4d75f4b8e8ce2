//! What the SDK's errors, and the answers of stores, mean.

use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};

use crate::{Place, StoreError};

/// The one place where the SDK's errors become ours.
pub(super) fn classify<E>(place: Place, error: &SdkError<E>) -> StoreError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let status = error.raw_response().map(|response| response.status().as_u16());
    let SdkError::ServiceError(service) = error else {
        let said = DisplayErrorContext(error).to_string();
        return match (error, status) {
            (SdkError::ConstructionFailure(_), _) => StoreError::InvalidRequest { place, said },
            (_, Some(401 | 403)) => StoreError::AccessDenied { place, said },
            (_, Some(404)) => StoreError::NotFound { place },
            (_, Some(412)) => StoreError::PreconditionFailed { place },
            _ => StoreError::Unavailable { place, said },
        };
    };
    let code = service.err().code().unwrap_or_default();
    let said = words(status, code, service.err().message());
    refusal(place, code, status.unwrap_or_default(), said)
}

/// What a store means that answers with this code and status.
fn refusal(place: Place, code: &str, status: u16, said: String) -> StoreError {
    match (code, status) {
        (
            "QuotaExceeded"
            | "StorageFull"
            | "XMinioStorageFull"
            | "XMinioAdminBucketQuotaExceeded"
            | "InsufficientCapacity",
            _,
        )
        | (_, 507) => StoreError::Full { place, said },
        ("NoSuchBucket", _) => StoreError::NoSuchBucket { place, said },
        ("NoSuchKey" | "NoSuchVersion" | "NoSuchUpload" | "NotFound", _) => StoreError::NotFound { place },
        ("PreconditionFailed" | "ConditionalRequestConflict", _) | (_, 409 | 412) => {
            StoreError::PreconditionFailed { place }
        }
        ("BadDigest" | "InvalidDigest" | "XAmzContentSHA256Mismatch" | "XAmzContentChecksumMismatch", _) => {
            StoreError::BadDigest { place, said }
        }
        ("NotImplemented", _) | (_, 501) => StoreError::Unsupported { place, said },
        (
            "SlowDown" | "RequestTimeout" | "RequestTimeTooSkewed" | "InternalError" | "ServiceUnavailable",
            _,
        )
        | (_, 408 | 429 | 500..) => StoreError::Unavailable { place, said },
        (
            "AccessDenied" | "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "ExpiredToken" | "InvalidToken",
            _,
        )
        | (_, 401 | 403) => StoreError::AccessDenied { place, said },
        (_, 404) => StoreError::NotFound { place },
        _ => StoreError::InvalidRequest { place, said },
    }
}

/// Status, code and message as one phrase; those that are missing left out.
fn words(status: Option<u16>, code: &str, message: Option<&str>) -> String {
    let mut parts = Vec::new();
    parts.extend(status.map(|status| format!("status {status}")));
    parts.extend((!code.is_empty()).then(|| code.to_owned()));
    parts.extend(message.filter(|message| !message.is_empty()).map(str::to_owned));
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a60_a_store_without_room_is_told_from_one_that_is_away() {
        let refusal = |code, status| {
            let place = Place { bucket: "b".to_owned(), key: "k".to_owned() };
            refusal(place, code, status, words(Some(status), code, Some("no room")))
        };
        for (code, status) in [
            ("XMinioStorageFull", 507),
            ("XMinioAdminBucketQuotaExceeded", 400),
            ("QuotaExceeded", 403),
            ("", 507),
        ] {
            let full = refusal(code, status);
            assert!(matches!(full, StoreError::Full { .. }) && !full.is_transient(), "{full}");
            assert!(full.to_string().contains("no room"), "the store's words: {full}");
        }
        assert!(matches!(refusal("AccessDenied", 403), StoreError::AccessDenied { .. }));
        assert!(refusal("SlowDown", 503).is_transient() && refusal("", 500).is_transient());
    }
}
