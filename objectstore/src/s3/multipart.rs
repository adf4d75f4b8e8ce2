//! Uploads in parts, as one object becomes of a file that may have to be gone on with after a restart.

use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumMode, CompletedMultipartUpload, CompletedPart};
use berth_core::ids::Sha256Sum;
use berth_core::units::Bytes as Size;
use bytes::Bytes;

use super::{ANSWER_TIMEOUT, CONNECT_TIMEOUT, S3Store, byte_stream, classify};
use crate::checksum::{base64, sum_of_base64};
use crate::{Body, ETag, StoreError};

/// The most parts that an upload may have.
pub const MAX_PARTS: u64 = 10_000;
/// The least size of a part that is not the last.
pub const MIN_PART: Size = Size::mib(5);

/// A part that the store has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What the store calls it.
    pub etag: ETag,
    /// SHA-256 of its bytes, which the store was asked to check.
    pub sha256: Sha256Sum,
}

/// A part as a store lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedPart {
    /// Its number, from 1 on.
    pub number: usize,
    /// Its size.
    pub size: Size,
    /// What the store calls it.
    pub etag: ETag,
    /// SHA-256 of its bytes, where the store tells it.
    pub sha256: Option<Sha256Sum>,
}

/// An object as a store tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its size.
    pub size: Size,
    /// Its version, where the store says it.
    pub etag: Option<ETag>,
    /// The id of its version, in a bucket that keeps versions.
    pub version: Option<String>,
    /// The checksum of its SHA-256 kind, as the store wrote it: of its bytes or, with `-` and a count, of those of its parts.
    pub sha256: Option<String>,
}

impl Stored {
    /// True if the store vouches for exactly these parts: it says the checksum that they make up.
    pub fn is_made_of(&self, parts: &[Part]) -> bool {
        let sums: Vec<u8> = parts.iter().flat_map(|part| part.sha256.0).collect();
        let whole = format!("{}-{}", base64(&Sha256Sum::of(&sums).0), parts.len());
        self.sha256.as_ref() == Some(&whole)
    }

    /// True if the store vouches for bytes of this sum.
    pub fn has_sum(&self, sum: Sha256Sum) -> bool {
        self.sha256.as_ref() == Some(&base64(&sum.0))
    }
}

impl S3Store {
    /// Begins an upload, and returns its id.
    pub async fn begin_upload(&self, key: &str) -> Result<String, StoreError> {
        let place = self.place(key);
        let request = self.client.create_multipart_upload().bucket(&self.bucket).key(key);
        let output = request
            .checksum_algorithm(ChecksumAlgorithm::Sha256)
            .send()
            .await
            .map_err(|error| classify(place.clone(), &error))?;
        let said = "an upload was begun without an id".to_owned();
        output.upload_id.ok_or(StoreError::Unsupported { place, said })
    }

    /// Sends part `number`, from 1 on; the store refuses it if it does not arrive with this sum. One that is there already
    /// is replaced.
    pub async fn put_part(
        &self,
        key: &str,
        upload: &str,
        number: usize,
        bytes: Bytes,
        sha256: Sha256Sum,
    ) -> Result<Part, StoreError> {
        let place = self.place(key);
        let patience = ANSWER_TIMEOUT + std::time::Duration::from_secs(bytes.len() as u64 >> 20);
        let timeouts =
            TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(patience).build();
        let request = self.client.upload_part().bucket(&self.bucket).key(key).upload_id(upload);
        let output = request
            .part_number(i32::try_from(number).unwrap_or(i32::MAX))
            .content_length(Size(bytes.len() as u64).as_i64())
            .checksum_sha256(base64(&sha256.0))
            .body(byte_stream(&place, Body::Bytes(bytes)).await?)
            .customize()
            .config_override(aws_sdk_s3::Config::builder().timeout_config(timeouts))
            .send()
            .await
            .map_err(|error| classify(place.clone(), &error))?;
        let said = format!("part {number} was stored without an entity tag");
        let etag = output.e_tag.map(ETag).ok_or(StoreError::Unsupported { place, said })?;
        Ok(Part { etag, sha256 })
    }

    /// The uploads to exactly this key that were begun and not ended.
    ///
    /// # Errors
    /// [`StoreError::Unsupported`] or [`StoreError::InvalidRequest`] from a store that does not list them.
    pub async fn list_uploads(&self, key: &str) -> Result<Vec<String>, StoreError> {
        let request = self.client.list_multipart_uploads().bucket(&self.bucket).prefix(key);
        let (mut uploads, mut after) = (Vec::new(), None::<(String, String)>);
        loop {
            let (key_marker, id_marker) = after.clone().unzip();
            let page = request
                .clone()
                .set_key_marker(key_marker)
                .set_upload_id_marker(id_marker)
                .send()
                .await
                .map_err(|error| classify(self.place(key), &error))?;
            let found = page.uploads.unwrap_or_default().into_iter();
            let ours = found.filter(|upload| upload.key.as_deref() == Some(key));
            uploads.extend(ours.filter_map(|upload| upload.upload_id));
            let next = page.next_key_marker.zip(page.next_upload_id_marker);
            if !page.is_truncated.unwrap_or(false) || next.is_none() || next == after {
                return Ok(uploads);
            }
            after = next;
        }
    }

    /// The parts that an upload has, by number.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such upload.
    pub async fn list_parts(&self, key: &str, upload: &str) -> Result<Vec<ListedPart>, StoreError> {
        let request = self.client.list_parts().bucket(&self.bucket).key(key).upload_id(upload);
        let mut pages = request.into_paginator().send();
        let mut parts = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| classify(self.place(key), &error))?;
            parts.extend(page.parts.unwrap_or_default().into_iter().filter_map(|part| {
                Some(ListedPart {
                    number: usize::try_from(part.part_number?).ok()?,
                    size: Size::from_i64(part.size.unwrap_or_default()),
                    etag: ETag(part.e_tag?),
                    sha256: part.checksum_sha256.as_deref().and_then(sum_of_base64),
                })
            }));
        }
        Ok(parts)
    }

    /// Makes the object of its parts, in place of what may be under its key.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such upload: also after it was completed, and the answer was lost.
    pub async fn complete_upload(&self, key: &str, upload: &str, parts: &[Part]) -> Result<(), StoreError> {
        let parts = (1_i32..).zip(parts).map(|(number, part)| {
            let completed = CompletedPart::builder().part_number(number).e_tag(&part.etag.0);
            completed.checksum_sha256(base64(&part.sha256.0)).build()
        });
        let whole = CompletedMultipartUpload::builder().set_parts(Some(parts.collect())).build();
        let request = self.client.complete_multipart_upload().bucket(&self.bucket).key(key);
        let sent = request.upload_id(upload).multipart_upload(whole).send().await;
        sent.map(drop).map_err(|error| classify(self.place(key), &error))
    }

    /// Gives an upload up, with the parts that it has. One that does not exist is no error.
    pub async fn abort_upload(&self, key: &str, upload: &str) -> Result<(), StoreError> {
        let request = self.client.abort_multipart_upload().bucket(&self.bucket).key(key);
        match request.upload_id(upload).send().await.map_err(|error| classify(self.place(key), &error)) {
            Ok(_) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What the store tells of an object, its checksum included.
    pub async fn stored(&self, key: &str) -> Result<Stored, StoreError> {
        let request = self.client.head_object().bucket(&self.bucket).key(key);
        let output = request
            .checksum_mode(ChecksumMode::Enabled)
            .send()
            .await
            .map_err(|error| classify(self.place(key), &error))?;
        Ok(Stored {
            size: Size::from_i64(output.content_length.unwrap_or_default()),
            etag: output.e_tag.map(ETag),
            version: output.version_id,
            sha256: output.checksum_sha256,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_vouches_for_parts_by_the_sum_of_their_sums() {
        let part = |bytes: &[u8]| Part { etag: ETag("e".to_owned()), sha256: Sha256Sum::of(bytes) };
        let parts = [part(b"one"), part(b"two")];
        let sums = [parts[0].sha256.0, parts[1].sha256.0].concat();
        let stored = |sha256: Option<String>| Stored { size: Size(6), etag: None, version: None, sha256 };
        let sum = base64(&Sha256Sum::of(&sums).0);
        assert!(stored(Some(format!("{sum}-2"))).is_made_of(&parts));
        for other in [None, Some(sum.clone()), Some(format!("{sum}-3"))] {
            assert!(!stored(other.clone()).is_made_of(&parts), "{other:?}");
        }
        assert!(stored(Some(base64(&Sha256Sum::of(b"x").0))).has_sum(Sha256Sum::of(b"x")));
        assert!(!stored(None).has_sum(Sha256Sum::of(b"x")));
    }
}
