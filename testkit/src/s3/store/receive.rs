//! Receiving bytes: written, hashed and checked as they come, a mebibyte at a time.

use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Checksum as _, Md5};
use s3s::dto::{PutObjectInput, StreamingBlob, UploadPartInput};
use s3s::{S3Error, S3ErrorCode, S3Result, TrailingHeaders, s3_error};

use super::{DataFile, Store, StoreError, Sums};
use crate::wire::hex;

/// Bytes collected before they are written and hashed on a thread that may block.
const BATCH: usize = 1 << 20;

/// What the client says about the body: checksums in base64.
#[derive(Debug, Clone, Default)]
pub(crate) struct Claims {
    sums: Sums,
    content_md5: Option<String>,
    /// Content length in bytes.
    length: Option<u64>,
    /// A checksum that is wanted or follows as a trailer.
    algorithm: Option<String>,
}

macro_rules! claims_from {
    ($input:ty) => {
        impl From<&$input> for Claims {
            fn from(input: &$input) -> Self {
                Self {
                    sums: Sums {
                        crc32: input.checksum_crc32.clone(),
                        crc32c: input.checksum_crc32c.clone(),
                        crc64nvme: input.checksum_crc64nvme.clone(),
                        sha1: input.checksum_sha1.clone(),
                        sha256: input.checksum_sha256.clone(),
                    },
                    content_md5: input.content_md5.clone(),
                    length: input.content_length.and_then(|l| u64::try_from(l).ok()),
                    algorithm: input.checksum_algorithm.as_ref().map(|a| a.as_str().to_ascii_uppercase()),
                }
            }
        }
    };
}
claims_from!(PutObjectInput);
claims_from!(UploadPartInput);

impl Claims {
    /// Adds the checksum that a trailer announces.
    pub(crate) fn announced(mut self, trailer: Option<&str>) -> Self {
        if let Some(name) = trailer.and_then(|t| t.trim().strip_prefix("x-amz-checksum-")) {
            self.algorithm = Some(name.to_ascii_uppercase());
        }
        self
    }

    fn hasher(&self) -> ChecksumHasher {
        let wants =
            |claim: &Option<String>, name: &str| claim.is_some() || self.algorithm.as_deref() == Some(name);
        ChecksumHasher {
            crc32: wants(&self.sums.crc32, "CRC32").then(Default::default),
            crc32c: wants(&self.sums.crc32c, "CRC32C").then(Default::default),
            crc64nvme: wants(&self.sums.crc64nvme, "CRC64NVME").then(Default::default),
            sha1: wants(&self.sums.sha1, "SHA1").then(Default::default),
            sha256: wants(&self.sums.sha256, "SHA256").then(Default::default),
        }
    }

    fn add_trailers(&mut self, trailers: Option<&TrailingHeaders>) {
        let Some(headers) = trailers.and_then(TrailingHeaders::take) else { return };
        let get = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let sums = &mut self.sums;
        for (claim, name) in [
            (&mut sums.crc32, "x-amz-checksum-crc32"),
            (&mut sums.crc32c, "x-amz-checksum-crc32c"),
            (&mut sums.crc64nvme, "x-amz-checksum-crc64nvme"),
            (&mut sums.sha1, "x-amz-checksum-sha1"),
            (&mut sums.sha256, "x-amz-checksum-sha256"),
        ] {
            *claim = get(name).or(claim.take());
        }
    }

    fn check(&self, actual: &Sums, md5: &[u8], len: u64) -> S3Result<()> {
        if self.length.is_some_and(|l| l != len) {
            return Err(s3_error!(IncompleteBody, "received {len} bytes, announced {:?}", self.length));
        }
        let pairs = [
            ("crc32", &self.sums.crc32, &actual.crc32),
            ("crc32c", &self.sums.crc32c, &actual.crc32c),
            ("crc64nvme", &self.sums.crc64nvme, &actual.crc64nvme),
            ("sha1", &self.sums.sha1, &actual.sha1),
            ("sha256", &self.sums.sha256, &actual.sha256),
            ("Content-MD5", &self.content_md5, &Some(base64(md5))),
        ];
        match pairs.iter().find(|(_, claimed, actual)| claimed.is_some() && claimed != actual) {
            Some((name, claimed, actual)) => {
                Err(s3_error!(BadDigest, "{name} is {actual:?}, the request says {claimed:?}"))
            }
            None => Ok(()),
        }
    }
}

/// A received body.
#[derive(Debug)]
pub(crate) struct Received {
    pub(super) file: DataFile,
    /// Bytes.
    pub(crate) len: u64,
    pub(super) md5: [u8; 16],
    pub(crate) sums: Sums,
}

impl Received {
    /// The MD5 in hex: the `ETag` of an object that came in one piece.
    pub(crate) fn etag(&self) -> String {
        hex(&self.md5)
    }

    #[cfg(test)]
    pub(super) fn of(disk: &super::Disk, data: &[u8]) -> Self {
        let (file, mut out) = disk.create().unwrap();
        out.write_all(data).unwrap();
        Self { file, len: data.len() as u64, md5: Md5::checksum(data), sums: Sums::default() }
    }
}

struct Sink {
    file: DataFile,
    out: File,
    md5: Md5,
    hasher: ChecksumHasher,
    len: u64,
}

impl Sink {
    fn write(mut self, batch: Vec<Bytes>) -> Result<Self, StoreError> {
        for data in batch {
            self.out.write_all(&data).map_err(|e| StoreError::io(self.file.path(), e))?;
            self.md5.update(&data);
            self.hasher.update(&data);
            self.len += data.len() as u64;
        }
        Ok(self)
    }

    fn finish(self, store: &Store, claims: &Claims) -> S3Result<Received> {
        let md5 = self.md5.finalize();
        let sums = self.hasher.finalize();
        let sums = Sums {
            crc32: sums.checksum_crc32,
            crc32c: sums.checksum_crc32c,
            crc64nvme: sums.checksum_crc64nvme,
            sha1: sums.checksum_sha1,
            sha256: sums.checksum_sha256,
        };
        claims.check(&sums, &md5, self.len)?;
        store.disk.sync(&self.out, self.file.path())?;
        Ok(Received { file: self.file, len: self.len, md5, sums })
    }
}

impl Store {
    /// Receives `body` into a new data file and checks it against `claims`. What was received is gone when the result is
    /// dropped without being stored.
    pub(crate) async fn receive(
        self: &Arc<Self>,
        body: Option<StreamingBlob>,
        mut claims: Claims,
        trailers: Option<TrailingHeaders>,
    ) -> S3Result<Received> {
        let (file, out) = self.disk.create()?;
        let mut sink = Sink { file, out, md5: Md5::new(), hasher: claims.hasher(), len: 0 };
        let mut body = body.unwrap_or_else(|| StreamingBlob::from(s3s::Body::empty()));
        let (mut batch, mut size) = (Vec::new(), 0);
        while let Some(data) = body.next().await {
            let data = data.map_err(|error| broken_body(&error))?;
            size += data.len();
            batch.push(data);
            if size >= BATCH {
                let full = std::mem::take(&mut batch);
                sink = blocking(move || sink.write(full)).await?;
                size = 0;
            }
        }
        claims.add_trailers(trailers.as_ref());
        let store = self.clone();
        blocking(move || sink.write(batch)?.finish(&store, &claims)).await
    }
}

async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> S3Result<T>
where
    T: Send + 'static,
    E: Into<S3Error> + Send + 'static,
{
    tokio::task::spawn_blocking(work).await.map_err(S3Error::internal_error)?.map_err(Into::into)
}

/// The answer to a body that did not arrive as announced. s3s has no public type for the reason, hence the text.
fn broken_body(error: &s3s::StdError) -> S3Error {
    let text = error.to_string();
    let code = if text.contains("Sha256Mismatch") {
        S3ErrorCode::Custom("XAmzContentSHA256Mismatch".into())
    } else if text.contains("Signature") {
        S3ErrorCode::SignatureDoesNotMatch
    } else {
        S3ErrorCode::IncompleteBody
    };
    let mut answer = S3Error::with_message(code, text);
    if matches!(answer.code(), S3ErrorCode::Custom(_)) {
        answer.set_status_code(hyper::StatusCode::BAD_REQUEST);
    }
    answer
}

/// Standard base64 with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let sextet = (word >> (18 - 6 * i)) & 63;
            out.push(if i <= chunk.len() { char::from(ALPHABET[sextet as usize]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_matches_the_vectors_of_rfc_4648() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[tokio::test]
    async fn claims_are_checked_and_refused_bodies_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path(), false, 1).unwrap());
        let body = || Some(StreamingBlob::from(s3s::Body::from(Bytes::from_static(b"abc"))));
        let files = || std::fs::read_dir(dir.path().join("data")).unwrap().count();
        // MD5 and SHA-256 of "abc", RFC 1321 and FIPS 180-2.
        let good = Claims {
            content_md5: Some("kAFQmDzST7DWlj99KOF/cg==".into()),
            sums: Sums {
                sha256: Some("ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=".into()),
                ..Sums::default()
            },
            length: Some(3),
            algorithm: None,
        };
        let received = store.receive(body(), good.clone(), None).await.unwrap();
        assert_eq!((received.len, received.etag().as_str()), (3, "900150983cd24fb0d6963f7d28e17f72"));
        drop(received);
        let bad_md5 = Claims { content_md5: Some("AAAAAAAAAAAAAAAAAAAAAA==".into()), ..good.clone() };
        let error = store.receive(body(), bad_md5, None).await.unwrap_err();
        assert_eq!(*error.code(), S3ErrorCode::BadDigest);
        let short = Claims { length: Some(4), ..good };
        let error = store.receive(body(), short, None).await.unwrap_err();
        assert_eq!(*error.code(), S3ErrorCode::IncompleteBody);
        assert_eq!(files(), 0);
    }
}
