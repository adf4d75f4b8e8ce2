//! How a node gets the credentials that its assigned work needs.

use std::future::Future;

use berth_objectstore::s3::{Credentials, Secret};
use k8s_openapi::api::core::v1::Secret as KubeSecret;
use kube::{Api, Client};
use thiserror::Error;

/// Why there are no credentials. All of it may be mended by people while the work waits.
#[derive(Debug, Error)]
pub enum CredentialsError {
    /// The Secret is not there, or this node may not read it.
    #[error("secret {namespace}/{name} cannot be read")]
    Read {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// What the API server said.
        source: Box<kube::Error>,
    },
    /// A key is missing or is not text.
    #[error("secret {namespace}/{name} has no usable key `{key}`")]
    Key {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// The key.
        key: &'static str,
    },
}

impl CredentialsError {
    /// True if the Secret is not there.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Read { source, .. } if matches!(&**source, kube::Error::Api(status) if status.code == 404))
    }
}

/// Where credentials come from.
pub trait CredentialSource: Send + Sync + 'static {
    /// The credentials that `name` in `namespace` stands for; nothing named means the node's own identity.
    fn get(
        &self,
        namespace: &str,
        name: Option<&str>,
    ) -> impl Future<Output = Result<Credentials, CredentialsError>> + Send;
}

/// Reads exactly the named Secret, each time it is asked: nothing is kept.
#[derive(Clone)]
pub struct SecretCredentials {
    client: Client,
}

impl SecretCredentials {
    /// By this client.
    pub fn new(client: Client) -> Self {
        Self { client }
    }
}

impl CredentialSource for SecretCredentials {
    async fn get(&self, namespace: &str, name: Option<&str>) -> Result<Credentials, CredentialsError> {
        let Some(name) = name else { return Ok(Credentials::Ambient) };
        let api = Api::<KubeSecret>::namespaced(self.client.clone(), namespace);
        let secret = api.get(name).await.map_err(|source| CredentialsError::Read {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            source: Box::new(source),
        })?;
        credentials_in(&secret, namespace, name)
    }
}

/// The credentials in the keys `accessKeyId`, `secretKey` and, if there, `sessionToken`.
fn credentials_in(secret: &KubeSecret, namespace: &str, name: &str) -> Result<Credentials, CredentialsError> {
    let text = |key: &'static str| -> Option<String> {
        let bytes = secret.data.as_ref()?.get(key)?;
        let text = std::str::from_utf8(&bytes.0).ok()?.trim();
        (!text.is_empty()).then(|| text.to_owned())
    };
    let required = |key: &'static str| {
        text(key).ok_or_else(|| CredentialsError::Key {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            key,
        })
    };
    Ok(Credentials::Static {
        access_key_id: required("accessKeyId")?,
        secret_key: Secret::new(required("secretKey")?),
        session_token: text("sessionToken").map(Secret::new),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::ByteString;

    fn secret(keys: &[(&str, &[u8])]) -> KubeSecret {
        let data = keys.iter().map(|(key, value)| ((*key).to_owned(), ByteString(value.to_vec()))).collect();
        KubeSecret { data: Some(data), ..KubeSecret::default() }
    }

    #[test]
    fn keys_are_named_when_they_are_missing_and_never_printed() {
        let whole = secret(&[("accessKeyId", b"id"), ("secretKey", b"hidden\n")]);
        let found = credentials_in(&whole, "ns", "s").unwrap();
        assert!(!format!("{found:?}").contains("hidden"));
        for (keys, missing) in [
            (vec![("secretKey", &b"x"[..])], "accessKeyId"),
            (vec![("accessKeyId", &b"x"[..])], "secretKey"),
            (vec![("accessKeyId", &b"x"[..]), ("secretKey", &b"\xFF"[..])], "secretKey"),
        ] {
            let error = credentials_in(&secret(&keys), "ns", "s").unwrap_err().to_string();
            assert!(error.contains("ns/s") && error.contains(missing), "{error}");
        }
    }

    #[test]
    fn a42_nothing_but_credentials_is_read_from_a_secret() {
        let plain = [("accessKeyId", &b"id"[..]), ("secretKey", b"x")];
        let more = [("path", &b"/mnt"[..]), ("staging", b"Never"), ("pool", b"fast"), ("size", b"1Gi")];
        let read = |keys: &[(&str, &[u8])]| {
            let Credentials::Static { access_key_id, secret_key: _, session_token } =
                credentials_in(&secret(keys), "ns", "s").unwrap()
            else {
                panic!("not from the keys of the Secret");
            };
            (access_key_id, session_token.is_some())
        };
        assert_eq!(read(&[&plain[..], &more].concat()), ("id".to_owned(), false));
    }
}
