//! Inline volumes of pods: the file of a reservation in the pod's own namespace.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_api::StagingReservation;
use berth_api::conditions::{ConditionType, find};
use berth_api::staging_reservation::ReservationState;
use berth_core::ids::{ObjectName, Uid};
use berth_device::mounts;
use berth_record::{FileEntry, FileFetch, FilePublication};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt as _};

use super::Services;
use super::attach::{not_open, unpublish as unmount};
use super::request::{Use, path, use_of, volume_id};
use super::status::RpcError;
use crate::agent::files::{FileDir, directory};
use crate::agent::observe::wanted_pools;
use crate::agent::pools::{OpenPool, Pools};
use crate::csi::v1::NodePublishVolumeRequest;
use crate::files::boot;
use crate::node::now;

/// What kubelet says of the pod.
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";
const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
/// Attributes of the volume.
const RESERVATION: &str = "reservation";
const DISCARD: &str = "discard";

/// An inline volume that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRequest {
    /// The handle that kubelet has made for it.
    pub volume: String,
    /// Where it is to be.
    pub target: PathBuf,
    /// The reservation.
    pub reservation: ObjectName,
    /// Whether the pod may write.
    pub writer: bool,
    /// Whether what it writes is wanted by nobody.
    pub discard: bool,
}

impl FileRequest {
    /// Reads a request; `None` if it is for no inline volume.
    pub fn parse(request: &NodePublishVolumeRequest) -> Result<Option<Self>, RpcError> {
        let context = &request.volume_context;
        if context.get(EPHEMERAL).is_none_or(|text| text != "true") {
            return Ok(None);
        }
        if use_of(request.volume_capability.as_ref())? == Use::Block {
            let problem = "a file of a reservation is no block device; use a generic ephemeral volume";
            return Err(RpcError::invalid("volume_capability", problem));
        }
        let known =
            |key: &str| [RESERVATION, DISCARD].contains(&key) || key.starts_with("csi.storage.k8s.io/");
        if let Some(other) = context.keys().find(|key| !known(key)) {
            return Err(RpcError::invalid("volumeAttributes", format!("`{other}` is not known")));
        }
        let name = context.get(RESERVATION).filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| {
            RpcError::invalid("volumeAttributes", "`reservation` must name a StagingReservation")
        })?;
        let namespace = context.get(POD_NAMESPACE).filter(|namespace| !namespace.is_empty());
        let namespace = namespace.ok_or_else(|| {
            RpcError::invalid("volume_context", "the pod's namespace: the CSIDriver needs `podInfoOnMount`")
        })?;
        Ok(Some(Self {
            volume: volume_id(&request.volume_id)?.to_owned(),
            target: path("target_path", &request.target_path)?,
            reservation: ObjectName::new(namespace, name),
            writer: !request.readonly,
            discard: discard(context)?,
        }))
    }
}

fn discard(context: &HashMap<String, String>) -> Result<bool, RpcError> {
    let Some(text) = context.get(DISCARD) else { return Ok(false) };
    text.parse().map_err(|_| {
        RpcError::invalid("volumeAttributes", format!("`discard: {text}` is neither true nor false"))
    })
}

impl Services {
    /// Shows a pod the file that it names.
    pub(super) async fn publish_file(&self, request: FileRequest) -> Result<(), RpcError> {
        let guard = self.node.in_flight.begin(&request.volume, "NodePublishVolume")?;
        let object = self.reservation_of_pod(&request.reservation).await?;
        let (pool, uid) = self.place(&request, &object)?;
        self.guarded(guard, move |_| show(&pool, &uid, &request)).await?;
        self.node.wake.notify_one(); // its report changes
        Ok(())
    }

    /// The reservation as the watch shows it, or, if it is not on this node, as the API server does.
    async fn reservation_of_pod(&self, name: &ObjectName) -> Result<Arc<StagingReservation>, RpcError> {
        let reference = ObjectRef::<StagingReservation>::new(&name.name).within(&name.namespace);
        if let Some(found) = self.node.watches.assigned.get(&reference) {
            return Ok(found);
        }
        let api: Api<StagingReservation> = Api::namespaced(self.node.client.clone(), &name.namespace);
        let found = api.get_opt(&name.name).await.map_err(|source| RpcError::Api {
            action: "read",
            name: name.clone(),
            source: Box::new(source),
        })?;
        found.map(Arc::new).ok_or_else(|| RpcError::NoReservation(name.clone()))
    }

    /// The pool in which the reservation's file is, if a pod of this node may see it as it asks.
    fn place(
        &self,
        request: &FileRequest,
        object: &StagingReservation,
    ) -> Result<(Arc<OpenPool>, Uid), RpcError> {
        let refuse = |why: String| RpcError::NotForPod { reservation: request.reservation.clone(), why };
        check_use(request, object).map_err(refuse)?;
        let status = object.status.clone().unwrap_or_default();
        let waiting = |why: &str| RpcError::Waiting {
            what: format!("StagingReservation {}", request.reservation),
            why: why.to_owned(),
        };
        let Some(assignment) = &status.assignment else {
            let promised = find(&status.conditions, ConditionType::Promised);
            let why = promised.map_or_else(String::new, |told| format!("{}: {}", told.reason, told.message));
            return Err(match status.state {
                Some(ReservationState::Refused) => refuse(format!("it is refused: {why}")),
                _ => waiting(&format!("it has no place yet ({why})")),
            });
        };
        if assignment.node != self.node.name.as_str() {
            let (there, here) = (&assignment.node, &self.node.name);
            return Err(refuse(format!("its file is on node {there}, not on {here}: let the pod run there")));
        }
        let name = assignment.pool.as_deref().unwrap_or_default().into();
        let Some(pool) = self.node.pools.get(&name) else {
            return Err(not_open(&self.node.pools, name, &request.volume));
        };
        let ready = find(&status.conditions, ConditionType::Ready);
        let why = ready.map_or_else(String::new, |told| format!("{}: {}", told.reason, told.message));
        let uid = Uid::from(object.uid().unwrap_or_default());
        let entry = recorded(&pool, &uid)?;
        let dir = entry.as_ref().map(|entry| directory(&pool, &uid, entry)).transpose()?;
        match entry {
            _ if dir == Some(FileDir::Lost) => return Err(refuse(format!("its file is lost: {why}"))),
            Some(FileEntry { fetch: FileFetch::Complete, .. }) if dir == Some(FileDir::Shown) => {}
            _ if status.last_error.is_some_and(|error| !error.retryable) => {
                return Err(refuse(format!("its object cannot be fetched: {why}")));
            }
            _ => return Err(waiting(&why)),
        }
        Ok((pool, uid))
    }
}

/// Why a pod may not use it so, whatever its state.
fn check_use(request: &FileRequest, object: &StagingReservation) -> Result<(), String> {
    let Some(file) = &object.spec.file else {
        return Err("it has no `spec.file`, so pods do not see its directory".to_owned());
    };
    if object.metadata.deletion_timestamp.is_some() {
        return Err("it is being deleted".to_owned());
    }
    if request.writer && file.result.is_none() && !request.discard {
        return Err(
            "it has no `spec.file.result` for what the pod writes: set `readOnly: true` on the volume, or \
                    `discard: \"true\"` among its attributes"
                .to_owned(),
        );
    }
    Ok(())
}

fn recorded(pool: &OpenPool, uid: &Uid) -> Result<Option<FileEntry>, RpcError> {
    pool.record.file(uid).map_err(|source| RpcError::Record { pool: pool.name.clone(), source })
}

/// Records that the pod is to see the directory, then shows it. Blocks.
fn show(pool: &OpenPool, uid: &Uid, request: &FileRequest) -> Result<(), RpcError> {
    let (target, writer) = (request.target.clone(), request.writer);
    let publication = FilePublication { target, writer, boot: boot().to_owned() };
    pool.record.publish_file(uid, &request.volume, &publication, request.discard)?;
    let shown = mounts::bind_files(&pool.area.work_dir(uid), &request.target, !writer);
    if shown.is_err() && mounts::is_mounted(&request.target)?.is_none() {
        // Nobody takes back what was refused. That the pod might have written stays.
        pool.record.unpublish_file(&request.volume, now())?;
    }
    Ok(shown?)
}

/// Takes what an inline volume shows away from `target`, then records that. Nothing there: nothing to do, once every pool
/// is open that was before or is `wanted`. Blocks.
pub(super) fn hide(services: &Services, volume: &str, target: &Path) -> Result<(), RpcError> {
    unmount(target)?;
    let pools: &Pools = &services.node.pools;
    // Before the look at the open ones: one that is opened meanwhile may have been missed there.
    let unopened = pools.unopened(wanted_pools(&services.node).into_keys());
    for pool in pools.all() {
        if pool.record.unpublish_file(volume, now())? {
            services.node.wake.notify_one(); // it may be sent, or go, now
            return Ok(());
        }
    }
    match unopened?.pop_first() {
        Some(pool) => Err(not_open(pools, pool, volume)),
        None => Ok(()),
    }
}

/// Where an inline volume is shown, by its handle; `None` if it is recorded nowhere.
pub(super) fn find_shown(pools: &Pools, volume: &str) -> Result<Option<PathBuf>, RpcError> {
    for pool in pools.all() {
        let files = pool.record.record().entries(berth_record::tables::FILES);
        let files = files.map_err(|source| RpcError::Record { pool: pool.name.clone(), source })?;
        let found = files.into_iter().find_map(|(_, file)| file.published.get(volume).cloned());
        if let Some(found) = found {
            return Ok(Some(found.target));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csi::v1::VolumeCapability;
    use crate::csi::v1::volume_capability::access_mode::Mode;
    use crate::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};

    fn request(context: &[(&str, &str)], access: AccessType) -> NodePublishVolumeRequest {
        let context = context.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let access_mode = Some(AccessMode { mode: Mode::SingleNodeWriter.into() });
        NodePublishVolumeRequest {
            volume_id: "csi-1".to_owned(),
            target_path: "/pods/1/mount".to_owned(),
            volume_capability: Some(VolumeCapability { access_mode, access_type: Some(access) }),
            volume_context: context.collect(),
            readonly: true,
            ..NodePublishVolumeRequest::default()
        }
    }

    fn mount() -> AccessType {
        AccessType::Mount(MountVolume::default())
    }

    #[test]
    fn a_volume_of_a_pod_names_a_reservation_of_its_namespace() {
        let whole = [(EPHEMERAL, "true"), (POD_NAMESPACE, "team"), (RESERVATION, "data"), (DISCARD, "true")];
        let read = FileRequest::parse(&request(&whole, mount())).unwrap().unwrap();
        assert_eq!(
            (read.reservation, read.writer, read.discard),
            (ObjectName::new("team", "data"), false, true)
        );
        assert_eq!(FileRequest::parse(&request(&[(EPHEMERAL, "false")], mount())).unwrap(), None);
        assert_eq!(FileRequest::parse(&request(&[], AccessType::Block(BlockVolume {}))).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_is_named() {
        let whole = [(EPHEMERAL, "true"), (POD_NAMESPACE, "team"), (RESERVATION, "data")];
        let without = |key: &str| whole.iter().copied().filter(|(name, _)| *name != key).collect::<Vec<_>>();
        let with = |key, value| [&whole[..], &[(key, value)]].concat();
        let block = AccessType::Block(BlockVolume {});
        for (context, access, mentions) in [
            (without(RESERVATION), mount(), "`reservation`"),
            (without(POD_NAMESPACE), mount(), "podInfoOnMount"),
            (with("pool", "fast"), mount(), "`pool` is not known"),
            (with(DISCARD, "yes"), mount(), "`discard: yes`"),
            (whole.to_vec(), block, "block device"),
        ] {
            let error = FileRequest::parse(&request(&context, access)).expect_err(mentions).to_string();
            assert!(error.contains(mentions), "{error}");
        }
    }
}
