//! The S3 operations, as answers of the [`Store`].

#![allow(clippy::wildcard_imports)] // the types of a dozen requests and answers

use std::sync::Arc;

use s3s::dto::*;
use s3s::{S3, S3Error, S3Request, S3Response, S3Result, s3_error};

use super::convert::{
    PAGE, body_of, check_read, completed_parts, condition, encoder, list_query, listed, object_output,
    page_size, page_size_out, part_number, signed, timestamp,
};
use super::fault::FaultAction;
use super::service::Trace;
use super::store::{Claims, Condition, Headers, Received, Store, StoreError};

/// The S3 operations on a [`Store`].
pub(crate) struct Operations {
    pub(crate) store: Arc<Store>,
}

fn trace<T>(request: &S3Request<T>) -> S3Result<Arc<Trace>> {
    let trace = request.extensions.get::<Arc<Trace>>().cloned();
    trace.ok_or_else(|| s3_error!(InternalError, "request without a trace"))
}

impl Operations {
    /// Runs `work` on a thread that may block, to its end even if the client goes away.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> S3Result<T> {
        let store = self.store.clone();
        Ok(tokio::task::spawn_blocking(move || work(&store)).await.map_err(S3Error::internal_error)??)
    }

    async fn receive<T>(
        &self,
        request: &mut S3Request<T>,
        body: Option<StreamingBlob>,
        claims: Claims,
    ) -> S3Result<Received> {
        let trailer = request.headers.get("x-amz-trailer").and_then(|t| t.to_str().ok());
        let claims = claims.announced(trailer);
        let received = self.store.receive(body, claims, request.trailing_headers.take()).await?;
        trace(request)?.note(|e| e.payload = Some(received.len));
        Ok(received)
    }
}

/// Notes whether the object was there, also where that is why the write was refused.
fn note_write<T>(trace: &Trace, result: S3Result<(T, bool)>) -> S3Result<T> {
    let existed = match &result {
        Ok((_, existed)) => Some(*existed),
        Err(e) if *e.code() == s3s::S3ErrorCode::PreconditionFailed => Some(true),
        Err(_) => None,
    };
    trace.note(|e| e.existed = existed);
    result.map(|(value, _)| value)
}

#[async_trait::async_trait]
impl S3 for Operations {
    async fn create_bucket(
        &self,
        req: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        let name = req.input.bucket;
        let location = Some(format!("/{name}"));
        self.run(move |s| s.create_bucket(&name)).await?;
        Ok(S3Response::new(CreateBucketOutput { location }))
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.store.check_bucket(&req.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn get_bucket_location(
        &self,
        req: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        self.store.check_bucket(&req.input.bucket)?;
        Ok(S3Response::new(GetBucketLocationOutput::default()))
    }

    async fn list_buckets(&self, _: S3Request<ListBucketsInput>) -> S3Result<S3Response<ListBucketsOutput>> {
        let bucket = |(name, created_ms)| Bucket {
            name: Some(name),
            creation_date: Some(timestamp(created_ms)),
            ..Default::default()
        };
        let buckets = Some(self.store.buckets().into_iter().map(bucket).collect());
        Ok(S3Response::new(ListBucketsOutput { buckets, ..Default::default() }))
    }

    async fn put_object(&self, mut req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let trace = trace(&req)?;
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        self.store.check_bucket(&bucket)?;
        let condition = condition(req.input.if_match.as_ref(), req.input.if_none_match.as_ref())?;
        let (claims, headers, body) =
            (Claims::from(&req.input), Headers::from(&req.input), req.input.body.take());
        let received = self.receive(&mut req, body, claims).await?;
        let lose = trace.fault() == Some(FaultAction::Lose);
        let stored = self.run(move |s| {
            let put = if lose { Store::lose } else { Store::put };
            put(s, &bucket, &key, received, headers, &condition)
        });
        let meta = &note_write(&trace, stored.await)?.meta;
        let sums = meta.sums.clone();
        Ok(S3Response::new(PutObjectOutput {
            e_tag: Some(ETag::Strong(meta.etag.clone())),
            checksum_crc32: sums.crc32,
            checksum_crc32c: sums.crc32c,
            checksum_crc64nvme: sums.crc64nvme,
            checksum_sha1: sums.sha1,
            checksum_sha256: sums.sha256,
            ..Default::default()
        }))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        let object = self.store.get(&input.bucket, &input.key)?;
        check_read(&object, input.if_match.as_ref(), input.if_none_match.as_ref())?;
        let size = object.meta.size;
        let range = input.range.map(|r| r.check(size)).transpose()?;
        let sums = input.checksum_mode.is_some() && range.is_none();
        let mut output: GetObjectOutput = object_output!(GetObjectOutput, object, sums);
        if let Some(range) = &range {
            output.content_length = Some(signed(range.end - range.start));
            output.content_range = Some(format!("bytes {}-{}/{size}", range.start, range.end - 1));
        }
        output.body = Some(body_of(&object, &range.unwrap_or(0..size)));
        Ok(S3Response::new(output))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = req.input;
        let object = self.store.get(&input.bucket, &input.key)?;
        check_read(&object, input.if_match.as_ref(), input.if_none_match.as_ref())?;
        let output: HeadObjectOutput =
            object_output!(HeadObjectOutput, object, input.checksum_mode.is_some());
        Ok(S3Response::new(output))
    }

    async fn delete_object(
        &self,
        req: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let trace = trace(&req)?;
        let condition = condition(req.input.if_match.as_ref(), None)?;
        let (bucket, key) = (req.input.bucket, req.input.key);
        let existed = self.run(move |s| s.delete(&bucket, &key, &condition)).await?;
        trace.note(|e| e.existed = Some(existed));
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        req: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let trace = trace(&req)?;
        let bucket = req.input.bucket;
        let keys: Vec<_> = req.input.delete.objects.into_iter().map(|o| o.key).collect();
        if keys.len() > PAGE {
            return Err(s3_error!(MalformedXML, "{} keys are more than {PAGE}", keys.len()));
        }
        trace.note(|e| e.keys.clone_from(&keys));
        let quiet = req.input.delete.quiet.unwrap_or(false);
        let deleted = keys.clone().into_iter().filter(|_| !quiet);
        let deleted = deleted.map(|key| DeletedObject { key: Some(key), ..Default::default() }).collect();
        let delete = move |s: &Store| {
            s.check_bucket(&bucket)?;
            keys.iter().try_for_each(|key| s.delete(&bucket, key, &Condition::None).map(|_| ()))
        };
        self.run(delete).await?;
        Ok(S3Response::new(DeleteObjectsOutput { deleted: Some(deleted), ..Default::default() }))
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let stale_ms = match trace(&req)?.fault() {
            Some(FaultAction::StaleList { age_ms }) => Some(age_ms),
            _ => None,
        };
        let input = req.input;
        let query = list_query(&input, stale_ms)?;
        let (bucket, max) = (input.bucket.clone(), query.max);
        let page = self.run(move |s| s.list(&bucket, &query)).await?;
        let encode = encoder(input.encoding_type.as_ref());
        let prefix = |p: &String| CommonPrefix { prefix: Some(encode(p)) };
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            max_keys: page_size_out(max),
            key_count: page_size_out(page.objects.len() + page.prefixes.len()),
            is_truncated: Some(page.next.is_some()),
            next_continuation_token: page.next.map(|n| n.to_token()),
            common_prefixes: Some(page.prefixes.iter().map(prefix).collect()),
            contents: Some(page.objects.iter().map(|o| listed(o, encode(&o.key))).collect()),
            prefix: input.prefix.as_deref().map(&encode),
            start_after: input.start_after.as_deref().map(&encode),
            delimiter: input.delimiter,
            continuation_token: input.continuation_token,
            encoding_type: input.encoding_type,
            ..Default::default()
        }))
    }

    async fn copy_object(&self, req: S3Request<CopyObjectInput>) -> S3Result<S3Response<CopyObjectOutput>> {
        let trace = trace(&req)?;
        let input = req.input;
        let CopySource::Bucket { bucket, key, .. } = &input.copy_source else {
            return Err(s3_error!(NotImplemented, "access points are not implemented"));
        };
        let source = self.store.get(bucket, key)?;
        let (if_match, if_none_match) = (&input.copy_source_if_match, &input.copy_source_if_none_match);
        if check_read(&source, if_match.as_ref(), if_none_match.as_ref()).is_err() {
            return Err(s3_error!(PreconditionFailed, "the source has ETag {}", source.meta.etag));
        }
        let replace =
            input.metadata_directive.as_ref().is_some_and(|d| d.as_str() == MetadataDirective::REPLACE);
        let headers = replace.then(|| Headers::from(&input));
        let stored = self.run(move |s| s.copy(&source, &input.bucket, &input.key, headers)).await;
        let meta = &note_write(&trace, stored)?.meta;
        let result = CopyObjectResult {
            e_tag: Some(ETag::Strong(meta.etag.clone())),
            last_modified: Some(timestamp(meta.modified_ms)),
            ..Default::default()
        };
        Ok(S3Response::new(CopyObjectOutput { copy_object_result: Some(result), ..Default::default() }))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let trace = trace(&req)?;
        let headers = Headers::from(&req.input);
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        let id = self.run(move |s| s.create_upload(&bucket, &key, headers)).await?;
        trace.note(|e| e.upload_id = Some(id.clone()));
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(req.input.bucket),
            key: Some(req.input.key),
            upload_id: Some(id),
            checksum_algorithm: req.input.checksum_algorithm,
            ..Default::default()
        }))
    }

    async fn upload_part(
        &self,
        mut req: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let trace = trace(&req)?;
        let number = part_number(req.input.part_number)?;
        let (bucket, key, id) =
            (req.input.bucket.clone(), req.input.key.clone(), req.input.upload_id.clone());
        self.store.check_upload(&bucket, &key, &id)?;
        let (claims, body) = (Claims::from(&req.input), req.input.body.take());
        let received = self.receive(&mut req, body, claims).await?;
        let (etag, sums) = (received.etag(), received.sums.clone());
        let existed = self.run(move |s| s.put_part(&bucket, &key, &id, number, received)).await?;
        trace.note(|e| e.existed = Some(existed));
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(ETag::Strong(etag)),
            checksum_crc32: sums.crc32,
            checksum_crc32c: sums.crc32c,
            checksum_crc64nvme: sums.crc64nvme,
            checksum_sha1: sums.sha1,
            checksum_sha256: sums.sha256,
            ..Default::default()
        }))
    }

    async fn list_parts(&self, req: S3Request<ListPartsInput>) -> S3Result<S3Response<ListPartsOutput>> {
        let input = req.input;
        let after = input.part_number_marker.and_then(|m| u32::try_from(m).ok()).unwrap_or(0);
        let max = page_size(input.max_parts);
        let (parts, more) = self.store.parts((&input.bucket, &input.key, &input.upload_id), after, max)?;
        let next = parts.last().and_then(|p| i32::try_from(p.number).ok());
        let part = |p: super::store::PartMeta| Part {
            part_number: i32::try_from(p.number).ok(),
            e_tag: Some(ETag::Strong(p.etag)),
            size: Some(signed(p.size)),
            last_modified: Some(timestamp(p.modified_ms)),
            checksum_crc32: p.sums.crc32,
            checksum_crc32c: p.sums.crc32c,
            checksum_crc64nvme: p.sums.crc64nvme,
            checksum_sha1: p.sums.sha1,
            checksum_sha256: p.sums.sha256,
        };
        Ok(S3Response::new(ListPartsOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(input.upload_id),
            is_truncated: Some(more),
            max_parts: page_size_out(max),
            next_part_number_marker: next,
            part_number_marker: input.part_number_marker,
            parts: Some(parts.into_iter().map(part).collect()),
            ..Default::default()
        }))
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let input = req.input;
        let max = page_size(input.max_uploads);
        let after = input.key_marker.as_deref().filter(|k| !k.is_empty());
        let after = after.map(|key| (key, input.upload_id_marker.as_deref().filter(|i| !i.is_empty())));
        let prefix = input.prefix.as_deref().unwrap_or("");
        let (uploads, more) = self.store.uploads(&input.bucket, prefix, after, max)?;
        let encode = encoder(input.encoding_type.as_ref());
        let last = uploads.last().filter(|_| more);
        let upload = |u: &super::store::UploadMeta| MultipartUpload {
            key: Some(encode(&u.key)),
            upload_id: Some(u.id.clone()),
            initiated: Some(timestamp(u.initiated_ms)),
            ..Default::default()
        };
        Ok(S3Response::new(ListMultipartUploadsOutput {
            is_truncated: Some(more),
            max_uploads: page_size_out(max),
            next_key_marker: last.map(|u| encode(&u.key)),
            next_upload_id_marker: last.map(|u| u.id.clone()),
            uploads: Some(uploads.iter().map(upload).collect()),
            prefix: input.prefix.as_deref().map(&encode),
            bucket: Some(input.bucket),
            encoding_type: input.encoding_type,
            key_marker: input.key_marker,
            upload_id_marker: input.upload_id_marker,
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let trace = trace(&req)?;
        let input = req.input;
        let (bucket, key, id) = (input.bucket.clone(), input.key.clone(), input.upload_id.clone());
        self.store.check_upload(&bucket, &key, &id)?;
        let parts = completed_parts(&input)?;
        let condition = condition(input.if_match.as_ref(), input.if_none_match.as_ref())?;
        let stored = self.run(move |s| s.complete((&bucket, &key, &id), &parts, &condition)).await;
        let object = note_write(&trace, stored)?;
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            location: Some(format!("/{}/{}", input.bucket, input.key)),
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(ETag::Strong(object.meta.etag.clone())),
            ..Default::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let (bucket, key, id) = (req.input.bucket, req.input.key, req.input.upload_id);
        self.run(move |s| s.abort(&bucket, &key, &id)).await?;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }
}
