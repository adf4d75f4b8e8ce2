//! The HTTP client of web sources: what it trusts, and the addresses to which it connects.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use thiserror::Error;

use super::address::AddressPolicy;
use super::http::HttpConfig;

/// How long a connection may take to be made.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// An address that is refused, on its way through the HTTP client's errors.
#[derive(Clone, Debug, Error)]
#[error("{0} is a refused address")]
pub(super) struct RefusedAddress(pub String);

/// Resolves names to the addresses that are allowed. A name that has others too can therefore not be turned later.
struct Resolver(AddressPolicy);

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = self.0.clone();
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let refused = found.iter().find(|address| !policy.allows(address.ip())).map(SocketAddr::ip);
            let allowed: Vec<SocketAddr> =
                found.into_iter().filter(|address| policy.allows(address.ip())).collect();
            match refused {
                Some(address) if allowed.is_empty() => {
                    Err(RefusedAddress(format!("{address} ({})", name.as_str())).into())
                }
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

/// The address in a URL, if it holds one instead of a name.
fn literal(url: &Url) -> Option<IpAddr> {
    url.host_str()?.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// The address in a URL, if it must not be read.
pub(super) fn refused_literal(policy: &AddressPolicy, url: &Url) -> Option<String> {
    literal(url).filter(|address| !policy.allows(*address)).map(|address| address.to_string())
}

/// A client that follows no redirects.
pub(super) fn client(config: &HttpConfig) -> Result<reqwest::Client, String> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        // Followed one by one in `get`, which checks where each leads and to whom headers are sent.
        .redirect(reqwest::redirect::Policy::none())
        .dns_resolver(Arc::new(Resolver(config.addresses.clone())));
    if let Some(pem) = &config.ca_bundle {
        let certificates = reqwest::Certificate::from_pem_bundle(pem).map_err(|error| chain(&error))?;
        if certificates.is_empty() {
            return Err("the ca bundle holds no PEM certificate".to_owned());
        }
        builder = builder.tls_certs_merge(certificates);
    }
    builder.build().map_err(|error| chain(&error))
}

/// The cause of a kind in an error's chain.
pub(super) fn caused_by<'a, E: std::error::Error + 'static>(
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a E> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

/// An error and its causes as one phrase, without the URL, which may hold secrets.
pub(super) fn chain(error: &reqwest::Error) -> String {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    let mut parts = Vec::new();
    while let Some(error) = cause {
        parts.push(error.to_string());
        cause = error.source();
    }
    if parts.is_empty() { "the request failed".to_owned() } else { parts.join(": ") }
}
