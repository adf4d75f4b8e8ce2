//! Sources as this node reads them, and from where it may.

use std::time::Duration;

use berth_api::fields::S3Source;
use berth_api::parse::{AskedSource, InvalidField};
use berth_objectstore::s3::{S3Config, S3Store};
use berth_objectstore::source::address::{AddressPolicy, NetworkError};
use berth_objectstore::source::{HttpConfig, HttpSource, ObjectSource, RangedSource};

use super::stores;
use super::transfers::WorkError;
use crate::credentials::{CredentialSource, SecretCredentials};
use crate::node::Node;
use crate::transfer::TransferError;

/// Networks that sources may not be read from unless they are allowed: the node's own.
const LOOPBACK: [&str; 2] = ["127.0.0.0/8", "::1/128"];

/// From where sources may be read: not from the node itself and not from where clouds keep credentials, unless allowed.
pub fn address_policy(allowed: &[String]) -> Result<AddressPolicy, NetworkError> {
    Ok(AddressPolicy {
        refused: LOOPBACK.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
        allowed: allowed.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
    })
}

/// A source that something in `namespace` asks for, as this node reads it.
pub(super) async fn open(
    node: &Node,
    namespace: &str,
    source: &AskedSource,
    stall: Duration,
) -> Result<RangedSource, WorkError> {
    match source {
        AskedSource::Http(http) => {
            let config = HttpConfig {
                url: http.url.clone(),
                headers: Vec::new(),
                ca_bundle: http.ca_bundle.clone().map(String::into_bytes),
                addresses: address_policy(&node.config.allow_source_cidrs)?,
                stall,
            };
            Ok(HttpSource::new(config).map_err(TransferError::from)?.into())
        }
        AskedSource::S3(s3) => open_object(node, namespace, s3, stall).await,
        AskedSource::StoreImage { .. } => {
            let problem = "an image of an image store is not read by range".to_owned();
            Err(InvalidField::Shape { field: "spec.source", problem }.into())
        }
    }
}

/// An object that something in `namespace` names, as this node reads it.
pub(super) async fn open_object(
    node: &Node,
    namespace: &str,
    s3: &S3Source,
    stall: Duration,
) -> Result<RangedSource, WorkError> {
    refuse_endpoint(&s3.endpoint, &address_policy(&node.config.allow_source_cidrs)?).await?;
    let secret = s3.secret_ref.as_ref().map(|reference| reference.name.as_str());
    let config = S3Config {
        endpoint: Some(s3.endpoint.clone()),
        region: stores::region(s3.region.as_ref()),
        bucket: s3.bucket.clone(),
        addressing: stores::addressing(s3.addressing),
        credentials: SecretCredentials::new(node.client.clone()).get(namespace, secret).await?,
        ca_bundle: s3.ca_bundle.clone().map(String::into_bytes),
    };
    let store = S3Store::connect(config).await?;
    Ok(ObjectSource::new(store, s3.key.clone(), s3.version_id.clone(), stall).into())
}

/// Refuses an endpoint whose name stands for an address that is refused. A name that changes its address afterwards is
/// not caught: the client resolves it anew.
pub(super) async fn refuse_endpoint(endpoint: &str, addresses: &AddressPolicy) -> Result<(), WorkError> {
    let (scheme, rest) = endpoint.split_once("://").unwrap_or(("https", endpoint));
    let authority = rest.trim_end_matches('/');
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let port = if scheme == "http" { 80 } else { 443 };
    let target = if has_port { authority.to_owned() } else { format!("{authority}:{port}") };
    let Ok(found) = tokio::net::lookup_host(target).await else { return Ok(()) }; // the client will say what is wrong
    for address in found {
        if !addresses.allows(address.ip()) {
            return Err(WorkError::Address { endpoint: endpoint.to_owned(), address: address.ip() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_itself_is_no_source_unless_allowed() {
        let refuses = |allowed: &[&str], address: &str| {
            let allowed: Vec<String> = allowed.iter().map(|text| (*text).to_owned()).collect();
            !address_policy(&allowed).unwrap().allows(address.parse().unwrap())
        };
        for address in ["127.0.0.1", "127.8.0.1", "::1", "169.254.169.254"] {
            assert!(refuses(&[], address), "{address}");
        }
        assert!(!refuses(&[], "10.0.0.1"));
        assert!(!refuses(&["127.0.0.0/8"], "127.0.0.1") && refuses(&["127.0.0.0/8"], "::1"));
        assert!(!refuses(&["127.0.0.1/32"], "127.0.0.1") && refuses(&["127.0.0.1/32"], "127.0.0.2"));
        assert!(!refuses(&["127.8.0.0/16"], "127.8.0.1") && refuses(&["127.8.0.0/16"], "127.0.0.1"));
        assert!(!refuses(&["169.254.0.0/16"], "169.254.169.254") && refuses(&["169.254.0.0/16"], "fe80::1"));
        assert!(address_policy(&["here".to_owned()]).is_err());
    }
}
