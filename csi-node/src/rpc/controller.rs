//! The controller service, on each node: volumes of this node, by reservations that the operator answers.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use berth_api::StagingReservation;
use berth_api::conditions::{self, ConditionType};
use berth_api::defaults::{ANNOTATION_VOLUME_NAME, LABEL_CLAIM_NAME, LABEL_CLAIM_NAMESPACE, TOPOLOGY_KEY};
use berth_api::fields::{ObjectRef, Quantity, WhenFull};
use berth_api::parse;
use berth_api::staging_reservation::{Access, ImageReference, ReservationState, StagingReservationSpec};
use berth_core::ids::{
    ObjectName, PoolName, Uid, csi_reservation_name, node_lease_name, reservation_of_volume, volume_handle,
};
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_record::tables;
use kube::api::{DeleteParams, ObjectMeta, PostParams, Preconditions};
use kube::{Api, ResourceExt as _};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::Services;
use super::attach;
use super::patience;
use super::request::{VolumeRequest, uses, volume_id};
use super::status::RpcError;
use crate::agent::observe::wanted_pools;
use crate::agent::watches::LABEL_MADE_BY;
use crate::csi::v1::controller_server::Controller;
use crate::csi::v1::controller_service_capability::{Rpc, Type, rpc};
use crate::csi::v1::validate_volume_capabilities_response::Confirmed;
use crate::csi::v1::{
    ControllerExpandVolumeRequest, ControllerExpandVolumeResponse, ControllerGetCapabilitiesRequest,
    ControllerGetCapabilitiesResponse, ControllerServiceCapability, CreateVolumeRequest,
    CreateVolumeResponse, DeleteVolumeRequest, DeleteVolumeResponse, GetCapacityRequest, GetCapacityResponse,
    Topology, ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse, Volume,
};

/// How long a call waits for a volume that starts from a template, whose image may have to be staged first, before it
/// says that it is under way.
const PATIENCE_FOR_IMAGES: Duration = Duration::from_secs(8);
/// The longest value of a label.
const MAX_LABEL: usize = 63;

/// Volume context: whether the host may mount what came out of an image.
pub const CONTEXT_HOST_MOUNT: &str = "hostMount";
/// Volume context: which partition the host mounts.
pub const CONTEXT_PARTITION: &str = "partition";

#[tonic::async_trait]
impl Controller for Services {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let until = patience::until(request.metadata());
        let outcome = self.create(&request.into_inner(), until).await;
        self.answer("CreateVolume", outcome)
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let until = patience::until(request.metadata());
        let outcome = self.delete(&request.into_inner(), until).await;
        self.answer("DeleteVolume", outcome)
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        let outcome = self.validate(request.into_inner());
        self.answer("ValidateVolumeCapabilities", outcome)
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Result<Response<GetCapacityResponse>, Status> {
        let outcome = self.capacity(&request.into_inner()).await;
        self.answer("GetCapacity", outcome)
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        let until = patience::until(request.metadata());
        let outcome = self.controller_expand(&request.into_inner(), until).await;
        self.answer("ControllerExpandVolume", outcome)
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let of = |kind: rpc::Type| ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })),
        };
        let capabilities = [
            rpc::Type::CreateDeleteVolume,
            rpc::Type::GetCapacity,
            rpc::Type::SingleNodeMultiWriter,
            rpc::Type::ExpandVolume,
        ];
        let capabilities = capabilities.into_iter().map(of).collect();
        self.answer("ControllerGetCapabilities", Ok(ControllerGetCapabilitiesResponse { capabilities }))
    }
}

impl Services {
    pub(super) fn reservations(&self) -> Api<StagingReservation> {
        Api::namespaced(self.node.client.clone(), &self.node.config.system_namespace)
    }

    pub(super) fn full_name(&self, name: &str) -> ObjectName {
        ObjectName::new(self.node.config.system_namespace.clone(), name)
    }

    pub(super) fn api_error(&self, action: &'static str, name: &str) -> impl FnOnce(kube::Error) -> RpcError {
        let name = self.full_name(name);
        move |source| RpcError::Api { action, name, source: Box::new(source) }
    }

    /// The CSI reservation of this name, as it was last seen.
    fn made(&self, name: &str) -> Option<Arc<StagingReservation>> {
        self.node.watches.made.find(|found| found.name_any() == name)
    }

    async fn create(
        &self,
        request: &CreateVolumeRequest,
        until: Instant,
    ) -> Result<CreateVolumeResponse, RpcError> {
        let asked = VolumeRequest::parse(request, &self.node.name)?;
        if !self.node.watches.synced() {
            return Err(RpcError::NotSynced);
        }
        let _running = self.node.in_flight.begin(&asked.name, "CreateVolume")?;
        let name = csi_reservation_name(&asked.name, &self.node.name);
        let spec = spec(&asked, self.node.name.as_str());
        let uid = self.reserve(&asked, &name, &spec).await?;
        let ready = self.wait_until_decided(&asked, &name, &uid, until).await?;
        let size = asked.size_with(image_size(&ready))?;
        Ok(CreateVolumeResponse { volume: Some(self.volume(&asked, &uid, size)) })
    }

    fn volume(&self, asked: &VolumeRequest, uid: &Uid, size: Bytes) -> Volume {
        let mut context = HashMap::from([("pool".to_owned(), asked.pool.to_string())]);
        if let Some(template) = &asked.template {
            context.insert("template".to_owned(), template.to_string());
            context.insert(CONTEXT_HOST_MOUNT.to_owned(), asked.host_mount.to_string());
        }
        if let Some(partition) = asked.partition {
            context.insert(CONTEXT_PARTITION.to_owned(), partition.to_string());
        }
        let segments = HashMap::from([(TOPOLOGY_KEY.to_owned(), self.node.name.to_string())]);
        Volume {
            capacity_bytes: size.as_i64(),
            volume_id: volume_handle(uid),
            volume_context: context,
            content_source: None,
            accessible_topology: vec![Topology { segments }],
        }
    }

    /// The volume's reservation, made if it is not there. One for other arguments is left alone.
    async fn reserve(
        &self,
        asked: &VolumeRequest,
        name: &str,
        wanted: &StagingReservationSpec,
    ) -> Result<Uid, RpcError> {
        let api = self.reservations();
        let found = match api.get_opt(name).await.map_err(self.api_error("read", name))? {
            Some(found) => found,
            None => match api.create(&PostParams::default(), &self.reservation(asked, name, wanted)).await {
                Ok(made) => made,
                Err(error) => return Err(self.api_error("make", name)(error)),
            },
        };
        if let Some(what) = difference(&found.spec, wanted) {
            return Err(RpcError::Different { volume: asked.name.clone(), what });
        }
        let uid = Uid::from(found.uid().unwrap_or_default());
        if found.metadata.deletion_timestamp.is_some() {
            let what = format!("volume {}", asked.name);
            return Err(RpcError::Waiting {
                what,
                why: "its earlier reservation is being released".to_owned(),
            });
        }
        Ok(uid)
    }

    fn reservation(
        &self,
        asked: &VolumeRequest,
        name: &str,
        spec: &StagingReservationSpec,
    ) -> StagingReservation {
        let mut labels = BTreeMap::from([(LABEL_MADE_BY.to_owned(), node_lease_name(&self.node.name))]);
        if let Some(claim) = &asked.claim {
            labels.insert(LABEL_CLAIM_NAMESPACE.to_owned(), claim.namespace.clone());
            if claim.name.len() <= MAX_LABEL {
                labels.insert(LABEL_CLAIM_NAME.to_owned(), claim.name.clone());
            }
        }
        let annotations = BTreeMap::from([(ANNOTATION_VOLUME_NAME.to_owned(), asked.name.clone())]);
        let metadata = ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(self.node.config.system_namespace.clone()),
            labels: Some(labels),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        };
        StagingReservation { metadata, spec: spec.clone(), status: None }
    }

    /// Watches the reservation until the volume is there or refused, or patience ends.
    async fn wait_until_decided(
        &self,
        asked: &VolumeRequest,
        name: &str,
        uid: &Uid,
        until: Instant,
    ) -> Result<Arc<StagingReservation>, RpcError> {
        let images = asked.template.as_ref().map(|_| Instant::now() + PATIENCE_FOR_IMAGES);
        let deadline = images.map_or(until, |images| images.min(until));
        let mut changes = self.node.watches.changes();
        loop {
            let seen = self.made(name).filter(|found| found.metadata.uid.as_deref() == Some(uid.as_str()));
            if let Some(found) = &seen {
                // Known with the place, before anything is made.
                if let Err(too_large) = asked.size_with(image_size(found)) {
                    self.withdraw(name, uid, until).await?;
                    return Err(too_large);
                }
                if is_ready(found, self.node.name.as_str()) {
                    return Ok(Arc::clone(found));
                }
                if let Some(refusal) = refusal(found) {
                    self.withdraw(name, uid, until).await?;
                    return Err(refusal);
                }
            }
            if tokio::time::timeout_at(deadline, changes.changed()).await.is_err() {
                let why =
                    seen.map_or_else(|| "the operator has not seen it".to_owned(), |found| waits_for(&found));
                return Err(RpcError::Waiting { what: format!("volume {}", asked.name), why });
            }
        }
    }

    /// Deletes a reservation, and returns only when it is known to be gone.
    async fn withdraw(&self, name: &str, uid: &Uid, until: Instant) -> Result<(), RpcError> {
        let api = self.reservations();
        let only_this = Preconditions { uid: Some(uid.to_string()), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
        match api.delete(name, &parameters).await {
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {}
            Err(error) => return Err(self.api_error("delete", name)(error)),
            Ok(_) => {}
        }
        let mut changes = self.node.watches.changes();
        loop {
            let found = api.get_opt(name).await.map_err(self.api_error("read", name))?;
            let gone = found.as_ref().is_none_or(|found| found.metadata.uid.as_deref() != Some(uid.as_str()));
            if gone {
                return Ok(());
            }
            if Instant::now() >= until {
                let what = format!("reservation {}", self.full_name(name));
                let why = found.map_or_else(String::new, |found| waits_for(&found));
                return Err(RpcError::Waiting { what, why: format!("it is being released: {why}") });
            }
            // What is seen here decides nothing: it only says when to ask again.
            let pause = until.min(Instant::now() + Duration::from_millis(500));
            drop(tokio::time::timeout_at(pause, changes.changed()).await);
        }
    }

    async fn delete(
        &self,
        request: &DeleteVolumeRequest,
        until: Instant,
    ) -> Result<DeleteVolumeResponse, RpcError> {
        let id = volume_id(&request.volume_id)?;
        let Ok(uid) = reservation_of_volume(id) else { return Ok(DeleteVolumeResponse {}) };
        if !self.node.watches.synced() {
            return Err(RpcError::NotSynced);
        }
        let _running = self.node.in_flight.begin(id, "DeleteVolume")?;
        let seen = self.node.watches.made.find(|found| found.metadata.uid.as_deref() == Some(uid.as_str()));
        if let Some(found) = &seen {
            self.must_be_open(id, &uid, found)?;
        }
        if self.is_attached(&uid)? {
            return Err(RpcError::InUse(id.to_owned()));
        }
        if let Some(found) = seen {
            self.withdraw(&found.name_any(), &uid, until).await?;
        }
        Ok(DeleteVolumeResponse {})
    }

    /// Refuses while nothing is known of the pool that the volume was placed in: it may be staged.
    fn must_be_open(&self, id: &str, uid: &Uid, found: &StagingReservation) -> Result<(), RpcError> {
        let placed = found.status.as_ref().and_then(|status| status.assignment.as_ref()?.pool.clone());
        let Some(placed) = placed.map(PoolName::from) else { return Ok(()) };
        let pools = &self.node.pools;
        if attach::recorded(pools, uid)?.is_none()
            && pools.unopened(wanted_pools(&self.node).into_keys())?.contains(&placed)
        {
            return Err(attach::not_open(pools, placed, id));
        }
        Ok(())
    }

    /// True while a volume is staged for a workload on this node.
    fn is_attached(&self, uid: &Uid) -> Result<bool, RpcError> {
        for pool in self.node.pools.all() {
            let found = pool.record.record().get(tables::ATTACHMENTS, uid);
            if found.map_err(|source| RpcError::Record { pool: pool.name.clone(), source })?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn validate(
        &self,
        request: ValidateVolumeCapabilitiesRequest,
    ) -> Result<ValidateVolumeCapabilitiesResponse, RpcError> {
        let id = volume_id(&request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(RpcError::invalid("volume_capabilities", "at least one is needed"));
        }
        self.find_volume(id)?;
        if let Err(error) = uses(&request.volume_capabilities) {
            return Ok(ValidateVolumeCapabilitiesResponse { confirmed: None, message: error.to_string() });
        }
        let confirmed = Confirmed {
            volume_context: request.volume_context,
            volume_capabilities: request.volume_capabilities,
            parameters: request.parameters,
            ..Confirmed::default()
        };
        Ok(ValidateVolumeCapabilitiesResponse { confirmed: Some(confirmed), message: String::new() })
    }
}

fn spec(asked: &VolumeRequest, node: &str) -> StagingReservationSpec {
    let image = asked.template.as_ref().map(|template| ImageReference {
        template: ObjectRef { namespace: template.namespace.clone(), name: template.name.clone() },
    });
    StagingReservationSpec {
        pool_name: Some(asked.pool.to_string()),
        max_size: Quantity(asked.size.0.to_string()),
        image,
        access: Access::Block,
        node_name: Some(node.to_owned()),
        when_full: Some(WhenFull::Reject),
        ..StagingReservationSpec::default()
    }
}

/// In what an existing reservation differs from what is asked for now.
fn difference(found: &StagingReservationSpec, wanted: &StagingReservationSpec) -> Option<&'static str> {
    let size = |spec: &StagingReservationSpec| parse::bytes("spec.maxSize", &spec.max_size).ok();
    if found.pool_name != wanted.pool_name {
        Some("pool")
    } else if found.image != wanted.image {
        Some("template")
    } else if size(found) != size(wanted) {
        Some("size")
    } else if found.node_name != wanted.node_name {
        Some("node")
    } else {
        None
    }
}

/// True if the volume is there, made for the assignment that holds.
fn is_ready(found: &StagingReservation, node: &str) -> bool {
    let Some(status) = &found.status else { return false };
    let assigned = status.assignment.as_ref().filter(|assignment| assignment.node == node);
    found.metadata.deletion_timestamp.is_none()
        && assigned.is_some_and(|assignment| status.prepared_generation == Some(assignment.generation))
        && conditions::is_true(&status.conditions, ConditionType::Ready)
}

/// The size of the image, as soon as that is known; 0 without one.
fn image_size(found: &StagingReservation) -> Bytes {
    let image = found.status.as_ref().and_then(|status| status.image.as_ref());
    image.map(|image| Bytes::from_i64(image.virtual_size)).unwrap_or_default()
}

fn refusal(found: &StagingReservation) -> Option<RpcError> {
    let status = found.status.as_ref().filter(|status| status.state == Some(ReservationState::Refused))?;
    let told = [ConditionType::Promised, ConditionType::Ready]
        .into_iter()
        .find_map(|kind| conditions::find(&status.conditions, kind));
    let reason =
        told.and_then(|condition| Reason::from_name(&condition.reason)).unwrap_or(Reason::CapacityRefused);
    let message = told.map(|condition| condition.message.clone()).unwrap_or_default();
    Some(RpcError::Refused { reason, message })
}

/// What a reservation waits for, as its conditions tell.
fn waits_for(found: &StagingReservation) -> String {
    let status = found.status.clone().unwrap_or_default();
    let untrue = [ConditionType::Promised, ConditionType::Ready]
        .into_iter()
        .filter_map(|kind| conditions::find(&status.conditions, kind))
        .find(|condition| condition.status != "True");
    match (untrue, status.state) {
        (Some(condition), _) if condition.message.is_empty() => condition.reason.clone(),
        (Some(condition), _) => format!("{}: {}", condition.reason, condition.message),
        (None, Some(state)) => format!("{state:?}"),
        (None, None) => "the operator".to_owned(),
    }
}
