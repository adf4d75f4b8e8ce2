//! The protocols that kubelet and the CSI sidecars speak, generated from `proto/`.

/// The Container Storage Interface, v1.12.0.
#[allow(missing_docs, unused_qualifications, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("csi.v1");
}

/// How kubelet finds plugins, v1.
#[allow(missing_docs, unused_qualifications, clippy::all, clippy::pedantic)]
pub mod registration {
    tonic::include_proto!("pluginregistration");
}
