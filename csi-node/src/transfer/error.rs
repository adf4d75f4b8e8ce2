//! Why a transfer failed, and what users are told of it.

use std::io;
use std::path::PathBuf;

use berth_core::ids::Sha256Sum;
use berth_core::reason::{Reason, ReasonClass};
use berth_core::retry::Fault;
use berth_core::transfer::NoRoute;
use berth_core::units::Bytes;
use berth_device::qemu::{ConvertError, UnknownDriver};
use berth_image::{ProbeError, ReadError, Refusal, WriteError};
use berth_objectstore::StoreError;
use berth_objectstore::chunks::publish::PublishError;
use berth_objectstore::chunks::remote::{OpenRemoteError, RemoteError};
use berth_objectstore::chunks::session::SessionError;
use berth_objectstore::chunks::store::OpenError;
use berth_objectstore::chunks::upload::UploadError;
use berth_objectstore::chunks::verify::VerifyError;
use berth_objectstore::source::SourceError;
use berth_record::{ChangeError, ReadError as RecordReadError};
use thiserror::Error;

/// What ended an attempt.
#[derive(Debug, Error)]
pub enum TransferError {
    /// The image is not one that is read.
    #[error("the source is refused")]
    Refused(#[from] Refusal),
    /// The fetched file is not one that is read.
    #[error("the fetched source is refused")]
    Probe(#[from] ProbeError),
    /// The disk is larger than allowed.
    #[error(
        "the image's virtual size is {found}, more than the {limit} that `spec.limits.virtualSize` allows"
    )]
    VirtualSize {
        /// What it is.
        found: Bytes,
        /// What it may be.
        limit: Bytes,
    },
    /// The source is larger than allowed.
    #[error("the source has {found}, more than the {limit} that `spec.limits.bytes` allows")]
    SourceSize {
        /// What it has.
        found: Bytes,
        /// What it may have.
        limit: Bytes,
    },
    /// The source's bytes are not those that were expected.
    #[error("the source's bytes have sha256:{found}, not sha256:{expected}")]
    Checksum {
        /// What `spec.checksum` says.
        expected: Sha256Sum,
        /// What came.
        found: Sha256Sum,
    },
    /// The source does not say how many bytes it has.
    #[error("the source does not say how many bytes it has")]
    NoSize,
    /// The source ended early.
    #[error("the source ended after {found} of {expected}")]
    Short {
        /// What came.
        found: Bytes,
        /// What was to come.
        expected: Bytes,
    },
    /// The source is not what it was when the transfer began.
    #[error("the source is not what it was when the transfer began")]
    Changed,
    /// The plan was made of another look at the source.
    #[error("the source is not what it was when the transfer was planned")]
    NotDirect(#[source] NoRoute),
    /// The source.
    #[error("failed to read the source")]
    Source(#[from] SourceError),
    /// The image in the reservation.
    #[error("failed to read the image")]
    Read(#[from] ReadError),
    /// The image in the image store that it is read from.
    #[error("failed to read the image in its image store")]
    Remote(#[from] RemoteError),
    /// The image in the image store that it is read from, at its opening.
    #[error("failed to open the image in its image store")]
    OpenRemote(#[from] OpenRemoteError),
    /// The conversion.
    #[error("failed to convert the image")]
    Convert(#[from] ConvertError),
    /// The tool that would read the format is not one that is run.
    #[error("no tool reads this format")]
    Driver(#[from] UnknownDriver),
    /// The image store.
    #[error("failed to open the image store")]
    Open(#[from] OpenError),
    /// The writer's session.
    #[error("failed to keep the upload's session")]
    Session(#[from] SessionError),
    /// The upload.
    #[error("failed to upload the image")]
    Upload(#[from] UploadError),
    /// The verification.
    #[error("failed to verify the image in its store")]
    Verify(#[from] VerifyError),
    /// The publication.
    #[error("failed to publish the image")]
    Publish(#[from] PublishError),
    /// The image cannot be written in this format, or its upload cannot be gone on with.
    #[error("failed to write the image")]
    Write(#[from] WriteError),
    /// The object is not what was sent.
    #[error("{place} is not what was sent: {problem}")]
    Object {
        /// Where it is.
        place: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Somebody else has the work now.
    #[error("the transfer is not this node's any more, or that cannot be told")]
    NotOurs,
    /// The object store itself.
    #[error("the object store failed")]
    Store(#[from] StoreError),
    /// The promise does not cover what the work needs.
    #[error("{needed} are needed where {promised} are promised")]
    Promise {
        /// What is needed.
        needed: Bytes,
        /// What is promised.
        promised: Bytes,
    },
    /// A file of the reservation.
    #[error("failed to {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The node's record cannot be read.
    #[error("failed to read the record of the transfer")]
    RecordRead(#[from] RecordReadError),
    /// The node's record cannot be written.
    #[error("failed to write the record of the transfer")]
    RecordChange(#[from] ChangeError),
    /// The record is not readable as a job.
    #[error("the record of the transfer is damaged")]
    RecordCorrupt(#[source] serde_json::Error),
    /// The work was told to stop.
    #[error("stopped")]
    Cancelled,
    /// A worker is gone: the program is shutting down, or it panicked.
    #[error("a worker of the transfer is gone")]
    Worker(#[from] tokio::task::JoinError),
    /// It was tried as often as allowed.
    #[error("given up after {attempts} attempts")]
    Exhausted {
        /// How often.
        attempts: u32,
        /// What went wrong last.
        source: Box<TransferError>,
    },
}

impl TransferError {
    /// A file error of the reservation.
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Refused(refusal) | Self::Probe(ProbeError::Refused { source: refusal, .. }) => {
                refusal.reason()
            }
            Self::VirtualSize { .. } => Reason::VirtualSizeTooLarge,
            Self::SourceSize { .. } => Reason::SourceTooLarge,
            Self::Checksum { .. } => Reason::ChecksumMismatch,
            Self::Short { .. } => Reason::SourceUnavailable,
            Self::NoSize => Reason::SourceUnusable,
            Self::Changed | Self::NotDirect(_) => Reason::SourceChanged,
            Self::Source(error) => source_reason(error),
            Self::Read(error) => read_reason(error),
            Self::Remote(error) => remote_reason(error),
            Self::OpenRemote(error) => open_remote_reason(error),
            Self::Convert(error) => convert_reason(error),
            Self::Driver(_) => Reason::ImageFormatUnsupported,
            Self::Open(error) => open_reason(error),
            Self::Session(error) => session_reason(error),
            Self::Upload(error) => upload_reason(error),
            Self::Verify(error) => verify_reason(error),
            Self::Publish(error) => publish_reason(error),
            Self::Store(error) => store_reason(error),
            Self::Write(error) => write_reason(error),
            Self::Object { .. } => Reason::VerificationFailed,
            Self::Promise { .. } => Reason::PromiseBroken,
            Self::File { source, .. } => io_reason(source),
            Self::RecordChange(ChangeError::StaleGeneration { .. }) => Reason::Superseded,
            Self::Exhausted { .. } => Reason::RetriesExhausted,
            Self::Probe(ProbeError::Io { .. })
            | Self::NotOurs
            | Self::RecordRead(_)
            | Self::RecordChange(_)
            | Self::RecordCorrupt(_)
            | Self::Cancelled
            | Self::Worker(_) => Reason::Retrying,
        }
    }

    /// True if the same may succeed later without anyone doing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Cancelled => false,
            Self::Convert(ConvertError::Stalled { .. }) => true,
            other => other.reason().class() == ReasonClass::Transient,
        }
    }

    /// What decides how it goes on. Only what the image store itself says counts as the store being away: an S3 source
    /// that does not answer is a source.
    pub fn fault(&self) -> Fault {
        if self.is_store_away() {
            return Fault::StoreAway;
        }
        if self.is_transient() && !self.is_superseded() { Fault::Passing } else { Fault::Lasting }
    }

    /// True if an image store did not answer.
    fn is_store_away(&self) -> bool {
        match self {
            Self::Store(error)
            | Self::Open(OpenError::Store { source: error, .. })
            | Self::Session(
                SessionError::Store { source: error, .. }
                | SessionError::Upload(UploadError::Chunk { source: error, .. }),
            )
            | Self::Upload(UploadError::Chunk { source: error, .. })
            | Self::Verify(VerifyError::Store(error))
            | Self::Publish(PublishError::Store(error)) => error.is_transient(),
            Self::Remote(error) | Self::OpenRemote(OpenRemoteError::Read(error)) => {
                matches!(error, RemoteError::Unavailable { .. })
            }
            _ => false,
        }
    }

    /// True if another generation of the same work goes on elsewhere: nothing may be touched any more.
    pub fn is_superseded(&self) -> bool {
        self.reason() == Reason::Superseded
    }

    /// True if the session that the work had is not in its image store any more.
    pub fn is_session_gone(&self) -> bool {
        matches!(self, Self::Session(SessionError::Gone { .. }))
    }

    /// The whole chain of causes, on one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let said = error.to_string();
            if !text.ends_with(&said) {
                text.push_str(": ");
                text.push_str(&said);
            }
            cause = error.source();
        }
        text
    }
}

/// What a source's refusal means to a user.
pub fn source_reason(error: &SourceError) -> Reason {
    match error {
        SourceError::Refused { .. } => Reason::SourceAddressRefused,
        SourceError::NotFound { .. } => Reason::SourceNotFound,
        SourceError::Forbidden { .. } => Reason::SourceForbidden,
        SourceError::Changed { .. } => Reason::SourceChanged,
        SourceError::Stalled { .. } => Reason::SourceStalled,
        SourceError::Unavailable { .. } => Reason::SourceUnavailable,
        SourceError::Url { .. }
        | SourceError::Unusable { .. }
        | SourceError::Redirects { .. }
        | SourceError::Client { .. } => Reason::SourceUnusable,
    }
}

fn read_reason(error: &ReadError) -> Reason {
    match error {
        ReadError::Truncated { .. } => Reason::ImageTruncated,
        ReadError::Corrupt { .. } | ReadError::OutOfRange { .. } => Reason::ImageCorrupt,
        ReadError::NotNative { .. } => Reason::ImageFormatUnsupported,
        ReadError::Refused { source, .. } => source.reason(),
        ReadError::Source { .. } => {
            error.source_error::<SourceError>().map_or(Reason::Retrying, source_reason)
        }
        ReadError::Changed { .. } => Reason::Retrying,
    }
}

fn write_reason(error: &WriteError) -> Reason {
    match error {
        WriteError::Empty | WriteError::Unaligned { .. } | WriteError::TooLarge { .. } => {
            Reason::ImageFormatUnsupported
        }
        WriteError::Level { .. } => Reason::InvalidSpec,
        WriteError::OutOfOrder { .. }
        | WriteError::BlockLength { .. }
        | WriteError::OtherOutput
        | WriteError::Incomplete { .. }
        | WriteError::StateVersion { .. }
        | WriteError::State { .. }
        | WriteError::Diverged => Reason::Retrying,
    }
}

fn remote_reason(error: &RemoteError) -> Reason {
    match error {
        RemoteError::Unavailable { .. } => Reason::ObjectStoreUnavailable,
        RemoteError::Refused { .. } => Reason::ObjectStoreDenied,
        RemoteError::Missing { .. }
        | RemoteError::Damaged { .. }
        | RemoteError::IndexDamaged { .. }
        | RemoteError::Range { .. } => Reason::ImageCorrupt,
        RemoteError::Stopped { .. } => Reason::Retrying,
    }
}

fn open_remote_reason(error: &OpenRemoteError) -> Reason {
    match error {
        OpenRemoteError::NotFound { .. } => Reason::SourceNotFound,
        OpenRemoteError::Read(error) => remote_reason(error),
        OpenRemoteError::Index { .. } | OpenRemoteError::WrongIndex { .. } => Reason::ImageCorrupt,
        OpenRemoteError::Memory { .. } | OpenRemoteError::Items { .. } => Reason::ImageFormatUnsupported,
    }
}

fn open_reason(error: &OpenError) -> Reason {
    match error {
        OpenError::ChunkSize { .. } | OpenError::NewerVersion { .. } | OpenError::Corrupt { .. } => {
            Reason::ImageStoreIncompatible
        }
        OpenError::Absent { .. } => Reason::ImageStoreNotFound,
        OpenError::Store { source, .. } => store_reason(source),
    }
}

fn convert_reason(error: &ConvertError) -> Reason {
    match error {
        ConvertError::NotInstalled => Reason::PreflightFailed,
        ConvertError::Failed { .. } | ConvertError::Stalled { .. } => Reason::ConversionFailed,
        ConvertError::Guard(_) => Reason::ImageFormatUnsupported,
        ConvertError::File { source, .. } | ConvertError::Run { source, .. } => io_reason(source),
    }
}

fn session_reason(error: &SessionError) -> Reason {
    match error {
        SessionError::Superseded { .. } | SessionError::Gone { .. } => Reason::Superseded,
        SessionError::Corrupt { .. } | SessionError::Newer { .. } => Reason::ImageStoreIncompatible,
        SessionError::Uid(_) => Reason::InvalidSpec,
        SessionError::Store { source, .. } => store_reason(source),
        SessionError::Upload(source) => upload_reason(source),
        SessionError::Index(source) => index_reason(source),
        SessionError::Contended { .. } | SessionError::Worker(_) => Reason::Retrying,
    }
}

fn upload_reason(error: &UploadError) -> Reason {
    match error {
        UploadError::Chunk { source, .. } => store_reason(source),
        UploadError::Index(source) => index_reason(source),
        UploadError::Compress { .. } | UploadError::Misaligned { .. } | UploadError::Worker(_) => {
            Reason::Retrying
        }
    }
}

/// Of the local index: what the system said of its files decides.
fn index_reason(error: &dyn std::error::Error) -> Reason {
    error.source().and_then(|source| source.downcast_ref()).map_or(Reason::Retrying, io_reason)
}

fn verify_reason(error: &VerifyError) -> Reason {
    match error {
        VerifyError::Missing { .. } | VerifyError::Size { .. } | VerifyError::Damaged { .. } => {
            Reason::VerificationFailed
        }
        VerifyError::Store(source) => store_reason(source),
        VerifyError::Index(source) => index_reason(source),
        VerifyError::Worker(_) => Reason::Retrying,
    }
}

fn publish_reason(error: &PublishError) -> Reason {
    match error {
        PublishError::Conflict { .. } => Reason::NameTaken,
        PublishError::Superseded { .. } => Reason::Superseded,
        PublishError::DamagedIndex { .. } => Reason::VerificationFailed,
        PublishError::Corrupt { .. } => Reason::ImageStoreIncompatible,
        PublishError::Name(_) => Reason::InvalidSpec,
        PublishError::Store(source) => store_reason(source),
        PublishError::Contended { .. } => Reason::Retrying,
    }
}

/// A full file system inside of a promise is a broken promise; everything else may pass.
fn io_reason(error: &io::Error) -> Reason {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Reason::PromiseBroken,
        _ => Reason::Retrying,
    }
}

/// What a store's refusal means to a user.
pub fn store_reason(error: &StoreError) -> Reason {
    match error {
        StoreError::NoSuchBucket { .. } => Reason::BucketNotFound,
        StoreError::Full { .. } => Reason::ObjectStoreFull,
        StoreError::AccessDenied { .. }
        | StoreError::InvalidRequest { .. }
        | StoreError::Unsupported { .. } => Reason::ObjectStoreDenied,
        StoreError::Unavailable { .. }
        | StoreError::BadDigest { .. }
        | StoreError::PreconditionFailed { .. }
        | StoreError::NotFound { .. } => Reason::ObjectStoreUnavailable,
        StoreError::TooLarge { .. } => Reason::ImageStoreIncompatible,
        StoreError::LocalFile { .. } => Reason::Retrying,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::ids::Uid;
    use berth_objectstore::Place;

    fn place() -> Place {
        Place { bucket: "b".to_owned(), key: "k".to_owned() }
    }

    fn away() -> StoreError {
        StoreError::Unavailable { place: place(), said: "connection refused".to_owned() }
    }

    #[test]
    fn only_an_image_store_that_does_not_answer_counts_as_away() {
        let session = SessionError::Store { uid: Uid("u".to_owned()), source: away() };
        let errors = [
            TransferError::Store(away()),
            OpenError::Store { at: "k".to_owned(), source: away() }.into(),
            VerifyError::Store(away()).into(),
            PublishError::Store(away()).into(),
            session.into(),
        ];
        for error in errors {
            assert_eq!(error.fault(), Fault::StoreAway, "{}", error.chain());
            assert_eq!(error.reason(), Reason::ObjectStoreUnavailable, "{}", error.chain());
        }
        let location = "http://h/x".to_owned();
        let source: TransferError = SourceError::Unavailable { location, said: "503".to_owned() }.into();
        assert_eq!(source.fault(), Fault::Passing);
        let damaged = StoreError::BadDigest { place: place(), said: String::new() };
        assert_eq!(TransferError::Store(damaged).fault(), Fault::Passing, "it answers");
        let said = || String::new();
        for refused in [
            StoreError::AccessDenied { place: place(), said: said() },
            StoreError::Full { place: place(), said: said() },
            StoreError::NoSuchBucket { place: place(), said: said() },
        ] {
            assert_eq!(TransferError::Store(refused).fault(), Fault::Lasting);
        }
        let taken_over = TransferError::Session(SessionError::Gone { uid: Uid("u".to_owned()) });
        assert_eq!(taken_over.fault(), Fault::Lasting, "nothing may be tried again");
    }
}
