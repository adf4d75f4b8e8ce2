//! The S3 client: the only module that names an SDK.

mod errors;
mod multipart;

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials as SdkCredentials, Region, RequestChecksumCalculation,
    ResponseChecksumValidation, SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::DisplayErrorContext;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::{ByteStream, Length};
use aws_smithy_http_client::tls;
use berth_core::ids::Sha256Sum;
use berth_core::units::Bytes as Size;
use futures::StreamExt as _;
use serde::Deserialize;
use thiserror::Error;

use self::errors::classify;
pub use self::multipart::{ListedPart, MAX_PARTS, MIN_PART, Part, Stored};
use crate::checksum::base64;
use crate::{Body, ETag, ListPage, Listed, Object, ObjectInfo, ObjectStore, Place, PutCondition, StoreError};

/// A text that never prints.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes the text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for whoever must send it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

/// How a bucket is named in a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Addressing {
    /// As the first part of the path: what most self-hosted stores want.
    #[default]
    Path,
    /// As a part of the host name: what AWS wants.
    VirtualHost,
}

/// Who is asking.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// A key pair.
    Static {
        /// The public part.
        access_key_id: String,
        /// The secret part.
        secret_key: Secret,
        /// For temporary credentials.
        session_token: Option<Secret>,
    },
    /// Whatever the environment provides: web identity, node role, profile.
    Ambient,
}

/// Which bucket of which store, and how it is reached.
#[derive(Clone, Debug)]
pub struct S3Config {
    /// The store's URL; nothing means AWS.
    pub endpoint: Option<String>,
    /// The region that signatures name. Self-hosted stores mostly accept `us-east-1`.
    pub region: String,
    /// The bucket.
    pub bucket: String,
    /// How it is named.
    pub addressing: Addressing,
    /// Who asks.
    pub credentials: Credentials,
    /// PEM certificates to trust beside the system's.
    pub ca_bundle: Option<Vec<u8>>,
}

/// Why a client could not be made.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The endpoint is not a URL.
    #[error("endpoint `{endpoint}` is not an http or https url")]
    Endpoint {
        /// What was given.
        endpoint: String,
    },
    /// The certificates are none.
    #[error("the ca bundle for bucket `{bucket}` is not usable: {reason}")]
    CaBundle {
        /// The bucket.
        bucket: String,
        /// What the TLS library said.
        reason: String,
    },
}

/// One bucket of an S3 store. Clones share connections.
#[derive(Clone, Debug)]
pub struct S3Store {
    client: Client,
    bucket: String,
}

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a store may take to begin its answer, sending a small request included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a transfer may stand still before it counts as failed.
const STALL_GRACE: Duration = Duration::from_secs(20);
/// Attempts that the SDK makes for one request, the first included.
const ATTEMPTS: u32 = 3;

impl S3Store {
    /// A client for the bucket. Nothing is sent yet.
    pub async fn connect(config: S3Config) -> Result<Self, ConnectError> {
        if let Some(endpoint) = &config.endpoint
            && !(endpoint.starts_with("http://") || endpoint.starts_with("https://"))
        {
            return Err(ConnectError::Endpoint { endpoint: endpoint.clone() });
        }
        let http = http_client(config.ca_bundle.as_deref())
            .map_err(|reason| ConnectError::CaBundle { bucket: config.bucket.clone(), reason })?;
        let builder = match &config.credentials {
            Credentials::Static { access_key_id, secret_key, session_token } => aws_sdk_s3::Config::builder()
                .credentials_provider(SdkCredentials::new(
                    access_key_id,
                    secret_key.reveal(),
                    session_token.as_ref().map(|token| token.reveal().to_owned()),
                    None,
                    "berth",
                )),
            Credentials::Ambient => {
                let shared = aws_config::defaults(BehaviorVersion::latest())
                    .http_client(http.clone())
                    .region(Region::new(config.region.clone()))
                    .load()
                    .await;
                aws_sdk_s3::config::Builder::from(&shared)
            }
        };
        let mut builder = builder
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(config.region))
            .http_client(http)
            .force_path_style(config.addressing == Addressing::Path)
            .retry_config(RetryConfig::standard().with_max_attempts(ATTEMPTS))
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .read_timeout(ANSWER_TIMEOUT)
                    .build(),
            )
            .stalled_stream_protection(
                StalledStreamProtectionConfig::enabled().grace_period(STALL_GRACE).build(),
            )
            // Chunks carry a checksum of our own; older stores refuse the SDK's default trailers.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        if let Some(endpoint) = config.endpoint {
            builder = builder.endpoint_url(endpoint);
        }
        Ok(Self { client: Client::from_conf(builder.build()), bucket: config.bucket })
    }

    /// The bucket.
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// Reads one version of an object, as [`ObjectStore::get`] reads the current one.
    pub async fn get_version(
        &self,
        key: &str,
        version: Option<&str>,
        range: Option<Range<u64>>,
        if_match: Option<&ETag>,
    ) -> Result<Object, StoreError> {
        let place = self.place(key);
        let output = self
            .client
            .get_object()
            .bucket(&self.bucket)
            .key(key)
            .set_version_id(version.map(str::to_owned))
            .set_range(range.as_ref().map(|r| format!("bytes={}-{}", r.start, r.end.saturating_sub(1))))
            .set_if_match(if_match.map(|etag| etag.0.clone()))
            .send()
            .await
            .map_err(|error| classify(place.clone(), &error))?;
        object(place, range.is_some(), output)
    }

    fn place(&self, key: &str) -> Place {
        Place { bucket: self.bucket.clone(), key: key.to_owned() }
    }
}

impl ObjectStore for S3Store {
    async fn put(
        &self,
        key: &str,
        body: Body,
        condition: PutCondition,
        sha256: Option<Sha256Sum>,
    ) -> Result<Option<ETag>, StoreError> {
        let place = self.place(key);
        let len = body.len();
        let mut request = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .content_length(len.as_i64())
            .set_checksum_sha256(sha256.map(|sum| base64(&sum.0)))
            .body(byte_stream(&place, body).await?);
        request = match condition {
            PutCondition::Always => request,
            PutCondition::IfAbsent => request.if_none_match("*"),
            PutCondition::IfMatch(etag) => request.if_match(etag.0),
        };
        // The time for an answer includes sending the body: at least 1 MiB/s is expected.
        let patience = ANSWER_TIMEOUT + Duration::from_secs(len.0 >> 20);
        let timeouts =
            TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(patience).build();
        let output = request
            .customize()
            .config_override(aws_sdk_s3::Config::builder().timeout_config(timeouts))
            .send()
            .await
            .map_err(|error| classify(place, &error))?;
        Ok(output.e_tag.map(ETag))
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        if_match: Option<&ETag>,
    ) -> Result<Object, StoreError> {
        self.get_version(key, None, range, if_match).await
    }

    async fn head(&self, key: &str) -> Result<ObjectInfo, StoreError> {
        let place = self.place(key);
        let output = self
            .client
            .head_object()
            .bucket(&self.bucket)
            .key(key)
            .send()
            .await
            .map_err(|error| classify(place, &error))?;
        Ok(ObjectInfo {
            size: Size::from_i64(output.content_length.unwrap_or_default()),
            etag: output.e_tag.map(ETag),
        })
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let place = self.place(key);
        match self.client.delete_object().bucket(&self.bucket).key(key).send().await {
            Ok(_) => Ok(()),
            Err(error) => match classify(place, &error) {
                StoreError::NotFound { .. } => Ok(()),
                other => Err(other),
            },
        }
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<ListPage, StoreError> {
        let output = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(prefix)
            .set_start_after(start_after.map(str::to_owned))
            .send()
            .await
            .map_err(|error| classify(self.place(prefix), &error))?;
        let objects = output
            .contents
            .unwrap_or_default()
            .into_iter()
            .filter_map(|object| {
                Some(Listed {
                    key: object.key?,
                    size: Size::from_i64(object.size.unwrap_or_default()),
                    etag: object.e_tag.map(ETag),
                    last_modified: object.last_modified.map(|time| time.secs()),
                })
            })
            .collect();
        Ok(ListPage { objects, more: output.is_truncated.unwrap_or(false) })
    }

    async fn lists_uploads(&self) -> Result<bool, StoreError> {
        let request = self.client.list_multipart_uploads().bucket(&self.bucket).max_uploads(1);
        match request.send().await {
            Ok(_) => Ok(true),
            Err(error) => match classify(self.place(""), &error) {
                transient if transient.is_transient() => Err(transient),
                StoreError::NoSuchBucket { place, said } => Err(StoreError::NoSuchBucket { place, said }),
                _ => Ok(false),
            },
        }
    }
}

/// The SDK's own HTTP client, trusting the system's certificates and those of `ca_bundle`.
fn http_client(ca_bundle: Option<&[u8]>) -> Result<SharedHttpClient, String> {
    let mut trust = tls::TrustStore::default();
    if let Some(pem) = ca_bundle {
        if !pem.windows(27).any(|window| window == b"-----BEGIN CERTIFICATE-----") {
            return Err("it holds no PEM certificate".to_owned());
        }
        trust = trust.with_pem_certificate(pem);
    }
    let context =
        tls::TlsContext::builder().with_trust_store(trust).build().map_err(|error| error.to_string())?;
    Ok(aws_smithy_http_client::Builder::new()
        .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc))
        .tls_context(context)
        .build_https())
}

async fn byte_stream(place: &Place, body: Body) -> Result<ByteStream, StoreError> {
    match body {
        Body::Bytes(bytes) => Ok(ByteStream::from(bytes)),
        Body::File { path, len } => {
            ByteStream::read_from().path(&path).length(Length::Exact(len.0)).build().await.map_err(|error| {
                StoreError::LocalFile {
                    place: place.clone(),
                    path,
                    reason: DisplayErrorContext(error).to_string(),
                }
            })
        }
    }
}

fn object(place: Place, ranged: bool, output: GetObjectOutput) -> Result<Object, StoreError> {
    let length = Size::from_i64(output.content_length.unwrap_or_default());
    let size = match (ranged, output.content_range.as_deref().and_then(whole_size)) {
        (true, Some(total)) => total,
        (true, None) => {
            return Err(StoreError::Unsupported {
                place,
                said: "a range was asked for, all was sent".to_owned(),
            });
        }
        (false, _) => length,
    };
    let broken = place.clone();
    let body = futures::stream::unfold(Some(output.body), move |body| {
        let broken = broken.clone();
        async move {
            let mut body = body?;
            match body.next().await? {
                Ok(bytes) => Some((Ok(bytes), Some(body))),
                Err(error) => {
                    let said = DisplayErrorContext(error).to_string();
                    Some((Err(StoreError::Unavailable { place: broken, said }), None))
                }
            }
        }
    });
    Ok(Object { size, etag: output.e_tag.map(ETag), place, body: body.boxed() })
}

/// The size in `bytes 0-9/100`.
fn whole_size(content_range: &str) -> Option<Size> {
    content_range.rsplit_once('/')?.1.trim().parse().ok().map(Size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_print() {
        let credentials = Credentials::Static {
            access_key_id: "id".to_owned(),
            secret_key: Secret::new("hush"),
            session_token: Some(Secret::new("hush")),
        };
        assert!(!format!("{credentials:?}").contains("hush"));
    }

    #[test]
    fn sizes_come_from_content_range() {
        assert_eq!(whole_size("bytes 0-9/100"), Some(Size(100)));
        assert_eq!(whole_size("bytes */0"), Some(Size(0)));
        assert_eq!(whole_size("bytes 0-9/*"), None);
    }

    #[tokio::test]
    async fn bad_configurations_are_named() {
        let config = S3Config {
            endpoint: Some("store:9000".to_owned()),
            region: "us-east-1".to_owned(),
            bucket: "b".to_owned(),
            addressing: Addressing::Path,
            credentials: Credentials::Ambient,
            ca_bundle: None,
        };
        assert!(matches!(S3Store::connect(config.clone()).await, Err(ConnectError::Endpoint { .. })));
        let config = S3Config {
            endpoint: None,
            credentials: Credentials::Static {
                access_key_id: "a".to_owned(),
                secret_key: Secret::new("b"),
                session_token: None,
            },
            ca_bundle: Some(b"nothing".to_vec()),
            ..config
        };
        assert!(matches!(S3Store::connect(config).await, Err(ConnectError::CaBundle { .. })));
    }
}
