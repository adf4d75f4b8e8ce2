//! From S3's types to the store's, and back.

#![allow(clippy::wildcard_imports)] // the types of a dozen requests and answers

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use s3s::dto::*;
use s3s::{S3Error, S3Result, s3_error};

use super::store::{After, Completed, Condition, Headers, ListQuery, Listed, StoreError, StoredObject};
use crate::wire::{FileBody, Piece};

/// Most entries of one page, as AWS has it.
pub(super) const PAGE: usize = 1000;

impl From<StoreError> for S3Error {
    fn from(error: StoreError) -> Self {
        let text = error.to_string();
        match error {
            StoreError::NoSuchBucket(_) => s3_error!(NoSuchBucket, "{text}"),
            StoreError::BucketExists(_) => s3_error!(BucketAlreadyOwnedByYou, "{text}"),
            StoreError::NoSuchKey(_) => s3_error!(NoSuchKey, "{text}"),
            StoreError::NoSuchUpload(_) => s3_error!(NoSuchUpload, "{text}"),
            StoreError::PreconditionFailed(_) => s3_error!(PreconditionFailed, "{text}"),
            StoreError::InvalidPart(_) => s3_error!(InvalidPart, "{text}"),
            StoreError::InvalidPartOrder(_) => s3_error!(InvalidPartOrder, "{text}"),
            StoreError::EntityTooSmall(_) => s3_error!(EntityTooSmall, "{text}"),
            StoreError::Io { .. } | StoreError::Damaged { .. } => s3_error!(error, InternalError, "{text}"),
        }
    }
}

macro_rules! headers_from {
    ($input:ty) => {
        impl From<&$input> for Headers {
            fn from(input: &$input) -> Self {
                Self {
                    content_type: input.content_type.clone(),
                    content_encoding: input.content_encoding.clone(),
                    content_disposition: input.content_disposition.clone(),
                    content_language: input.content_language.clone(),
                    cache_control: input.cache_control.clone(),
                    metadata: input.metadata.clone().unwrap_or_default().into_iter().collect(),
                }
            }
        }
    };
}
headers_from!(PutObjectInput);
headers_from!(CopyObjectInput);
headers_from!(CreateMultipartUploadInput);

macro_rules! object_output {
    ($output:ident, $object:expr, $sums:expr) => {{
        let (meta, headers) = (&$object.meta, &$object.meta.headers);
        let sums = $sums.then(|| meta.sums.clone()).unwrap_or_default();
        $output {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(signed(meta.size)),
            content_type: Some(
                headers.content_type.clone().unwrap_or_else(|| "binary/octet-stream".to_owned()),
            ),
            content_encoding: headers.content_encoding.clone(),
            content_disposition: headers.content_disposition.clone(),
            content_language: headers.content_language.clone(),
            cache_control: headers.cache_control.clone(),
            e_tag: Some(ETag::Strong(meta.etag.clone())),
            last_modified: Some(timestamp(meta.modified_ms)),
            metadata: Some(headers.metadata.clone().into_iter().collect()),
            checksum_crc32: sums.crc32,
            checksum_crc32c: sums.crc32c,
            checksum_crc64nvme: sums.crc64nvme,
            checksum_sha1: sums.sha1,
            checksum_sha256: sums.sha256,
            ..Default::default()
        }
    }};
}
pub(super) use object_output;

pub(super) fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

pub(super) fn timestamp(ms: u64) -> Timestamp {
    Timestamp::from(UNIX_EPOCH + Duration::from_millis(ms))
}

/// A page size of a request: AWS allows 1,000 and answers larger wishes with that.
pub(super) fn page_size(wish: Option<i32>) -> usize {
    wish.map_or(PAGE, |w| usize::try_from(w).unwrap_or(0).min(PAGE))
}

pub(super) fn page_size_out(size: usize) -> Option<i32> {
    i32::try_from(size).ok()
}

/// The condition of a write.
pub(super) fn condition(
    if_match: Option<&ETagCondition>,
    if_none_match: Option<&ETagCondition>,
) -> S3Result<Condition> {
    match (if_match, if_none_match) {
        (None, None) => Ok(Condition::None),
        (None, Some(ETagCondition::Any)) => Ok(Condition::Absent),
        (Some(ETagCondition::Any), None) => Ok(Condition::Present),
        (Some(ETagCondition::ETag(etag)), None) => Ok(Condition::ETag(etag.value().to_owned())),
        _ => Err(s3_error!(NotImplemented, "this combination of conditions is not implemented")),
    }
}

/// Checks the conditions of a read.
pub(super) fn check_read(
    object: &StoredObject,
    if_match: Option<&ETagCondition>,
    if_none_match: Option<&ETagCondition>,
) -> S3Result<()> {
    let hit = |c: &ETagCondition| c.as_etag().is_none_or(|e| e.value() == object.meta.etag);
    if if_match.is_some_and(|c| !hit(c)) {
        return Err(s3_error!(PreconditionFailed, "the object has ETag {}", object.meta.etag));
    }
    if if_none_match.is_some_and(hit) {
        return Err(s3_error!(NotModified));
    }
    Ok(())
}

/// The body of `range` of an object. The object's files stay until it has been read.
pub(super) fn body_of(object: &Arc<StoredObject>, range: &std::ops::Range<u64>) -> StreamingBlob {
    let mut start = 0;
    let mut pieces = Vec::new();
    for (file, segment) in object.files.iter().zip(&object.meta.segments) {
        let end = start + segment.len;
        let (from, to) = (range.start.max(start), range.end.min(end));
        if from < to {
            let path = file.path().to_owned();
            pieces.push(Piece { path, range: from - start..to - start, keep: Some(object.clone()) });
        }
        start = end;
    }
    StreamingBlob::new(FileBody::new(pieces, None))
}

/// Keys in XML, percent-encoded if the client asked for that.
pub(super) fn encoder(encoding: Option<&EncodingType>) -> impl Fn(&str) -> String + use<> {
    let url = encoding.is_some_and(|e| e.as_str() == EncodingType::URL);
    move |text| {
        let plain = |b: u8| !url || b.is_ascii_alphanumeric() || b"-_.~/*".contains(&b);
        if text.bytes().all(plain) {
            return text.to_owned();
        }
        text.bytes().fold(String::new(), |mut out, b| {
            if plain(b) {
                out.push(char::from(b));
            } else {
                write!(out, "%{b:02X}").expect("writing to a string does not fail");
            }
            out
        })
    }
}

pub(super) fn listed(object: &Listed, key: String) -> Object {
    Object {
        key: Some(key),
        size: Some(signed(object.size)),
        e_tag: Some(ETag::Strong(object.etag.clone())),
        last_modified: Some(timestamp(object.modified_ms)),
        storage_class: Some(ObjectStorageClass::from_static(ObjectStorageClass::STANDARD)),
        ..Default::default()
    }
}

pub(super) fn list_query(input: &ListObjectsV2Input, stale_ms: Option<u64>) -> S3Result<ListQuery> {
    let after = match &input.continuation_token {
        Some(token) => Some(
            After::from_token(token)
                .ok_or_else(|| s3_error!(InvalidArgument, "continuation token is not ours"))?,
        ),
        None => input.start_after.clone().map(After::Key),
    };
    Ok(ListQuery {
        prefix: input.prefix.clone().unwrap_or_default(),
        delimiter: input.delimiter.clone(),
        after,
        max: page_size(input.max_keys),
        stale_ms,
    })
}

pub(super) fn part_number(number: i32) -> S3Result<u32> {
    let valid = u32::try_from(number).ok().filter(|n| (1..=10_000).contains(n));
    valid.ok_or_else(|| s3_error!(InvalidArgument, "part number {number} is not between 1 and 10000"))
}

pub(super) fn completed_parts(input: &CompleteMultipartUploadInput) -> S3Result<Vec<Completed>> {
    let parts = input.multipart_upload.as_ref().and_then(|u| u.parts.as_ref());
    let parts = parts.ok_or_else(|| s3_error!(MalformedXML, "the list of parts is missing"))?;
    parts
        .iter()
        .map(|part| {
            let number = part_number(part.part_number.unwrap_or(0))?;
            let etag = part.e_tag.as_ref().map(|e| e.value().to_owned());
            let etag = etag.ok_or_else(|| s3_error!(InvalidPart, "part {number} has no ETag"))?;
            Ok(Completed { number, etag, sha256: part.checksum_sha256.clone() })
        })
        .collect()
}
