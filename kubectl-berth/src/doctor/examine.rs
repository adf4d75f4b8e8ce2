//! Everything that a diagnosis looks at, read once. What may not be read is remembered, and hides nothing else.

use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{Api, Client, ResourceExt as _};

use crate::observe::{Scope, Seen, look};
use crate::server::{self, Answer, ClockError};

/// What was read, or why it was not.
pub type Read<T> = Result<T, String>;

/// The state of a cluster.
#[derive(Debug)]
pub struct Examined {
    /// The namespace of Berth's own objects.
    pub system_namespace: String,
    /// The API server's answer.
    pub server: Answer,
    /// Its version.
    pub version: Read<String>,
    /// The definitions that are installed of those that this program knows, by the names of these.
    pub definitions: Vec<(CustomResourceDefinition, Read<Option<CustomResourceDefinition>>)>,
    /// Berth's namespace, if it is there.
    pub namespace: Read<Option<Namespace>>,
    /// Every object.
    pub seen: Read<Seen>,
}

/// Looks at everything.
///
/// # Errors
/// [`ClockError`] if the API server cannot be asked at all.
pub async fn examine(client: &Client, scope: &Scope) -> Result<Examined, ClockError> {
    // The first answer includes the connection; the second tells how fast it is.
    server::ask(client, scope.timeout).await?;
    let server = server::ask(client, scope.timeout).await?;
    let version = within(scope.timeout, client.apiserver_version()).await.map(|info| info.git_version);
    let installed = Api::<CustomResourceDefinition>::all(client.clone());
    let mut definitions = Vec::new();
    for known in berth_api::definitions() {
        let found = within(scope.timeout, installed.get_opt(&known.name_any())).await;
        definitions.push((known, found));
    }
    let namespaces = Api::<Namespace>::all(client.clone());
    let namespace = within(scope.timeout, namespaces.get_opt(&scope.system_namespace)).await;
    let seen = look(client, scope).await.map_err(|error| chain(&error));
    Ok(Examined {
        system_namespace: scope.system_namespace.clone(),
        server,
        version,
        definitions,
        namespace,
        seen,
    })
}

async fn within<T>(timeout: Duration, asked: impl Future<Output = kube::Result<T>>) -> Read<T> {
    match tokio::time::timeout(timeout, asked).await {
        Ok(answer) => answer.map_err(|error| chain(&error)),
        Err(_) => Err(format!("no answer within {} s", timeout.as_secs())),
    }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}
