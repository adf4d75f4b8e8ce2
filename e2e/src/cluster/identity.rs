//! Who talks to the test control plane: the administrator and service accounts, as kubeconfig files.

use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Api, Client, Config, ResourceExt};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::{Cluster, Pki};
use crate::wait::WaitError;

/// How long a service account's token is good for: longer than any test. Unit: seconds.
const TOKEN_SECONDS: i64 = 8 * 3600;

/// Why somebody's kubeconfig or client could not be made.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The kubeconfig could not be written.
    #[error("failed to write kubeconfig {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The kubeconfig could not be read.
    #[error("failed to read kubeconfig {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: KubeconfigError,
    },
    /// No client could be made from the kubeconfig.
    #[error("failed to make a client from kubeconfig {path}")]
    Client {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: kube::Error,
    },
    /// The API server refused a request.
    #[error("failed to {action}")]
    Request {
        /// What was asked for.
        action: String,
        /// What it answered.
        source: kube::Error,
    },
    /// The API server issued no token.
    #[error("the API server issued no token for service account {namespace}/{name}")]
    NoToken {
        /// Namespace of the account.
        namespace: String,
        /// Name of the account.
        name: String,
    },
    /// The account's namespace did not come about.
    #[error(transparent)]
    Namespace(#[from] WaitError<kube::Error>),
}

impl Cluster {
    /// The kubeconfig of the administrator; usable by `kubectl` as long as the cluster's folder exists.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        admin_path(&self.dir)
    }

    /// A kubeconfig with a token, good for 8 hours, of a service account; account and namespace are created if need
    /// be. The account has no right that RBAC does not give it.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub async fn service_account_kubeconfig(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<PathBuf, IdentityError> {
        self.ensure_account(namespace, name).await?;
        self.token_kubeconfig(namespace, name, None).await
    }

    /// Like [`Cluster::service_account_kubeconfig`], with a token bound to the Node object `node` (created if need
    /// be), as a pod's token on that node is: policies see `authentication.kubernetes.io/node-name`. `server` is this
    /// machine as the node knows it; the API server's certificate names 127.0.0.1 and [`crate::kernel::GATEWAY`].
    ///
    /// # Errors
    /// [`IdentityError`].
    pub async fn node_bound_kubeconfig(
        &self,
        namespace: &str,
        name: &str,
        node: &str,
        server: Ipv4Addr,
    ) -> Result<PathBuf, IdentityError> {
        self.ensure_account(namespace, name).await?;
        let nodes: Api<Node> = Api::all(self.admin());
        let mut wanted = Node::default();
        wanted.metadata.name = Some(node.to_owned());
        created(nodes.create(&PostParams::default(), &wanted).await, || format!("create node {node}"))?;
        let get_error = |source| IdentityError::Request { action: format!("read node {node}"), source };
        let found = nodes.get(node).await.map_err(get_error)?;
        self.token_kubeconfig(namespace, name, Some((&found, server))).await
    }

    /// A client of whoever a kubeconfig file stands for.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub async fn client_for(&self, kubeconfig: &Path) -> Result<Client, IdentityError> {
        client(kubeconfig).await
    }

    async fn ensure_account(&self, namespace: &str, name: &str) -> Result<(), IdentityError> {
        self.ensure_namespace(namespace).await?;
        let accounts: Api<ServiceAccount> = Api::namespaced(self.admin(), namespace);
        let mut account = ServiceAccount::default();
        account.metadata.name = Some(name.to_owned());
        let action = || format!("create service account {namespace}/{name}");
        created(accounts.create(&PostParams::default(), &account).await, action)
    }

    async fn token_kubeconfig(
        &self,
        namespace: &str,
        name: &str,
        node: Option<(&Node, Ipv4Addr)>,
    ) -> Result<PathBuf, IdentityError> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.admin(), namespace);
        let bound_object_ref = node.map(|(node, _)| BoundObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(node.name_any()),
            uid: node.uid(),
        });
        let request = TokenRequest {
            spec: TokenRequestSpec {
                // Empty: the audience of the API server itself.
                audiences: Vec::new(),
                expiration_seconds: Some(TOKEN_SECONDS),
                bound_object_ref,
            },
            ..TokenRequest::default()
        };
        let issued: TokenRequest = accounts
            .create_subresource("token", name, &PostParams::default(), &request)
            .await
            .map_err(|source| IdentityError::Request {
                action: format!("request a token for service account {namespace}/{name}"),
                source,
            })?;
        let no_token = || IdentityError::NoToken { namespace: namespace.to_owned(), name: name.to_owned() };
        let token = issued.status.ok_or_else(no_token)?.token;
        let suffix = node.map(|(node, _)| format!(".{}", node.name_any())).unwrap_or_default();
        let path = self.dir.join(format!("{namespace}.{name}{suffix}.kubeconfig"));
        let server = node.map_or(Ipv4Addr::LOCALHOST, |(_, server)| server);
        let server = SocketAddrV4::new(server, self.ports.apiserver);
        write_kubeconfig(&path, &self.pki, server, &json!({ "token": token }))?;
        Ok(path)
    }
}

/// Writes the administrator's kubeconfig into the cluster's folder and returns its path.
pub(super) fn write_admin_kubeconfig(dir: &Path, pki: &Pki, port: u16) -> Result<PathBuf, IdentityError> {
    let path = admin_path(dir);
    let user = json!({ "client-certificate": pki.file("admin.crt"), "client-key": pki.file("admin.key") });
    write_kubeconfig(&path, pki, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), &user)?;
    Ok(path)
}

/// A client of whoever `kubeconfig` stands for.
pub(super) async fn client(kubeconfig: &Path) -> Result<Client, IdentityError> {
    let path = || kubeconfig.to_owned();
    let read_error = |source| IdentityError::Read { path: path(), source };
    let parsed = Kubeconfig::read_from(kubeconfig).map_err(read_error)?;
    let config = Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default()).await;
    let mut config = config.map_err(read_error)?;
    // Loopback is never behind the proxy that the environment may name.
    config.proxy_url = None;
    Client::try_from(config).map_err(|source| IdentityError::Client { path: path(), source })
}

fn admin_path(dir: &Path) -> PathBuf {
    dir.join("admin.kubeconfig")
}

/// Writes a kubeconfig, as JSON, which is YAML too.
fn write_kubeconfig(path: &Path, pki: &Pki, server: SocketAddrV4, user: &Value) -> Result<(), IdentityError> {
    let server = format!("https://{server}");
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "berth",
            "cluster": { "server": server, "certificate-authority": pki.file("ca.crt") },
        }],
        "users": [{ "name": "user", "user": user }],
        "contexts": [{ "name": "berth", "context": { "cluster": "berth", "user": "user" } }],
        "current-context": "berth",
    });
    replace(path, &format!("{config:#}\n"))
        .map_err(|source| IdentityError::Write { path: path.to_owned(), source })
}

/// Puts `text` in the place of what stands at `path`. Two programs of one account share a kubeconfig: the first may
/// be reading it while it is written for the second, and must find a whole one.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = NamedTempFile::new_in(dir)?;
    file.write_all(text.as_bytes())?;
    file.persist(path)?;
    Ok(())
}

/// Takes "it exists already" for success.
fn created<T>(outcome: kube::Result<T>, action: impl FnOnce() -> String) -> Result<(), IdentityError> {
    match outcome {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
        Err(source) => Err(IdentityError::Request { action: action(), source }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read as _;

    use super::*;

    #[test]
    fn whoever_reads_while_a_file_is_replaced_finds_the_whole_of_the_former() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        replace(&path, "the first").unwrap();
        let mut reader = File::open(&path).unwrap();
        replace(&path, "the second").unwrap();
        let mut found = String::new();
        reader.read_to_string(&mut found).unwrap();
        assert_eq!(found, "the first");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "the second");
    }
}
