//! Certificates and keys of the test control plane: one authority, one server, one administrator.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

/// The names under which the API server is reached; the last one is where hosts with a kernel of their own see this
/// machine ([`crate::kernel::GATEWAY`]).
const SERVER_NAMES: [&str; 5] =
    ["127.0.0.1", "localhost", "kubernetes", "kubernetes.default.svc", "10.77.0.1"];

/// The files of the test control plane's trust, all PEM.
#[derive(Debug, Clone)]
pub struct Pki {
    dir: PathBuf,
    authority_pem: String,
}

/// Why the certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A key or certificate could not be made.
    #[error("failed to make {name}")]
    Make {
        /// The file it was meant for.
        name: &'static str,
        /// What the library said.
        source: rcgen::Error,
    },
    /// A file could not be written.
    #[error("failed to write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Pki {
    /// Makes everything anew in `dir`.
    pub fn create(dir: &Path) -> Result<Self, PkiError> {
        fs::create_dir_all(dir).map_err(|source| PkiError::Write { path: dir.to_owned(), source })?;
        let (issuer, authority_pem) = authority().map_err(make_error("ca.crt"))?;
        let pki = Self { dir: dir.to_owned(), authority_pem };
        pki.write("ca.crt", &pki.authority_pem)?;
        let server = subject(SERVER_NAMES, "kube-apiserver", None);
        pki.issue(&issuer, "apiserver", server, ExtendedKeyUsagePurpose::ServerAuth)?;
        // The group that RBAC's bootstrap policy binds to cluster-admin.
        let admin = subject([], "admin", Some("system:masters"));
        pki.issue(&issuer, "admin", admin, ExtendedKeyUsagePurpose::ClientAuth)?;
        let key = KeyPair::generate().map_err(make_error("service-account.key"))?;
        pki.write("service-account.key", &key.serialize_pem())?;
        pki.write("service-account.pub", &key.public_key_pem())?;
        Ok(pki)
    }

    /// The path of `name`: `ca.crt`, `apiserver.crt`, `apiserver.key`, `admin.crt`, `admin.key`,
    /// `service-account.key` (which signs tokens) or `service-account.pub` (which verifies them).
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The certificate of the authority.
    pub fn authority_pem(&self) -> &str {
        &self.authority_pem
    }

    fn issue(
        &self,
        issuer: &Issuer<'_, KeyPair>,
        name: &'static str,
        params: Result<CertificateParams, rcgen::Error>,
        usage: ExtendedKeyUsagePurpose,
    ) -> Result<(), PkiError> {
        let mut params = params.map_err(make_error(name))?;
        params.extended_key_usages = vec![usage];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().map_err(make_error(name))?;
        let certificate = params.signed_by(&key, issuer).map_err(make_error(name))?;
        self.write(&format!("{name}.crt"), &certificate.pem())?;
        self.write(&format!("{name}.key"), &key.serialize_pem())
    }

    fn write(&self, name: &str, pem: &str) -> Result<(), PkiError> {
        let path = self.file(name);
        fs::write(&path, pem).map_err(|source| PkiError::Write { path, source })
    }
}

fn authority() -> Result<(Issuer<'static, KeyPair>, String), rcgen::Error> {
    let mut params = subject([], "berth-e2e-ca", None)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate()?;
    let pem = params.self_signed(&key)?.pem();
    Ok((Issuer::new(params, key), pem))
}

fn subject<const N: usize>(
    names: [&str; N],
    common_name: &str,
    organization: Option<&str>,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names.map(str::to_owned))?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    if let Some(organization) = organization {
        params.distinguished_name.push(DnType::OrganizationName, organization);
    }
    Ok(params)
}

fn make_error(name: &'static str) -> impl FnOnce(rcgen::Error) -> PkiError {
    move |source| PkiError::Make { name, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::GATEWAY;

    #[test]
    fn the_server_has_the_name_that_guests_know_it_by() {
        assert!(SERVER_NAMES.contains(&GATEWAY.to_string().as_str()));
    }
}
