//! `StagingReservation` to its view.

use berth_core::ids::{NodeName, ObjectName, PoolName};
use berth_core::units::{Bytes, Timestamp};
use berth_core::view::{Access, AssignedImage, PoolChoice, ReservationState, ReservationView};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use k8s_openapi::jiff;

use super::{
    InvalidField, bytes, created_of, generation, has_finalizer, labelled, name_of, placement, seconds,
    uid_of, version_of, when_full,
};
use crate::StagingReservation;
use crate::conditions::{ConditionType, find, timestamp};
use crate::defaults::{
    ANNOTATION_RENEWED, LABEL_CLAIM_NAMESPACE, RELEASE_FINALIZER, RESERVATION_TTL_SECONDS, SYSTEM_NAMESPACE,
};
use crate::staging_reservation::{Access as ApiAccess, ReservationState as ApiState, StagingReservationSpec};

/// What decisions look at.
pub fn reservation_view(reservation: &StagingReservation) -> ReservationView {
    let (meta, spec) = (&reservation.metadata, &reservation.spec);
    let status = reservation.status.clone().unwrap_or_default();
    let name = name_of(meta);
    let state = status.state.map_or(ReservationState::Pending, state);
    let (max_size, invalid) = match check(spec) {
        Ok(size) => (size, None),
        Err(error) => (Bytes::ZERO, Some(error.to_string())),
    };
    ReservationView {
        uid: uid_of(meta),
        version: version_of(meta),
        created: created_of(meta),
        deleting: meta.deletion_timestamp.is_some(),
        has_finalizer: has_finalizer(meta, RELEASE_FINALIZER),
        pools: match &spec.pool_name {
            Some(pool) => PoolChoice::Named(PoolName(pool.clone())),
            None => labelled(spec.pool_selector.as_ref()),
        },
        node: spec.node_name.clone().map(NodeName),
        zone: spec.topology.as_ref().map(|topology| topology.zone.clone()),
        priority: spec.priority.unwrap_or_default(),
        ttl_millis: ttl(meta, spec),
        renewed: meta
            .annotations
            .as_ref()
            .and_then(|all| all.get(ANNOTATION_RENEWED))
            .and_then(|time| renewed(time)),
        expires: status.expires_at.as_ref().map(timestamp),
        dry_run: spec.dry_run,
        max_size,
        template: spec
            .image
            .as_ref()
            .map(|image| ObjectName::new(&image.template.namespace, &image.template.name)),
        claim_namespace: claim_namespace(reservation, &name),
        access: access(spec.access),
        when_full: spec.when_full.map(when_full),
        state,
        assignment: placement(status.assignment.as_ref()),
        assigned_image: status.image.as_ref().and_then(|image| {
            Some(AssignedImage {
                digest: image.digest.parse().ok()?,
                staged_image: image.staged_image.clone(),
                virtual_size: Bytes::from_i64(image.virtual_size),
            })
        }),
        prepared: status.prepared_generation.map(generation),
        queued_since: (state == ReservationState::Queued)
            .then(|| since(&status.conditions).unwrap_or_else(|| created_of(meta))),
        ready_since: find(&status.conditions, ConditionType::Ready)
            .filter(|ready| ready.status == "True")
            .map(|ready| timestamp(&ready.last_transition_time)),
        invalid,
        name,
    }
}

/// How long it stays unused, in milliseconds. What Berth keeps in its own namespace is ended by `DeleteVolume`, and what
/// belongs to a piece of work by that.
fn ttl(meta: &ObjectMeta, spec: &StagingReservationSpec) -> Option<u64> {
    let owned = meta.owner_references.iter().flatten().any(|owner| owner.controller == Some(true));
    if owned || meta.namespace.as_deref() == Some(SYSTEM_NAMESPACE) {
        return None;
    }
    let asked = spec.ttl.as_ref().and_then(|span| seconds("spec.ttl", span).ok());
    Some(asked.unwrap_or(RESERVATION_TTL_SECONDS).saturating_mul(1000))
}

/// A time that cannot be read renews nothing.
fn renewed(time: &str) -> Option<Timestamp> {
    let time: jiff::Timestamp = time.parse().ok()?;
    u64::try_from(time.as_millisecond()).ok().map(Timestamp)
}

/// Only an object of Berth's own namespace speaks for another: whoever may write there is trusted.
fn claim_namespace(reservation: &StagingReservation, name: &ObjectName) -> String {
    let claimed = reservation.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_CLAIM_NAMESPACE));
    match claimed {
        Some(claimed) if name.namespace == SYSTEM_NAMESPACE => claimed.clone(),
        _ => name.namespace.clone(),
    }
}

/// `Promised` is false from the first report on, and keeps the time of that.
fn since(conditions: &[Condition]) -> Option<Timestamp> {
    find(conditions, ConditionType::Promised).map(|promised| timestamp(&promised.last_transition_time))
}

fn check(spec: &StagingReservationSpec) -> Result<Bytes, InvalidField> {
    if spec.pool_name.is_some() && spec.pool_selector.is_some() {
        let problem = "at most one of `poolName` and `poolSelector` may be set".to_owned();
        return Err(InvalidField::Shape { field: "spec", problem });
    }
    if spec.image.is_some() && spec.access != ApiAccess::Block {
        let problem = "must be `Block` where `spec.image` is set".to_owned();
        return Err(InvalidField::Shape { field: "spec.access", problem });
    }
    if let Some(ttl) = &spec.ttl {
        seconds("spec.ttl", ttl)?;
    }
    bytes("spec.maxSize", &spec.max_size)
}

const fn access(access: ApiAccess) -> Access {
    match access {
        ApiAccess::Stream => Access::Stream,
        ApiAccess::File => Access::File,
        ApiAccess::Block => Access::Block,
    }
}

const fn state(state: ApiState) -> ReservationState {
    match state {
        ApiState::Pending => ReservationState::Pending,
        ApiState::Queued => ReservationState::Queued,
        ApiState::Promised => ReservationState::Promised,
        ApiState::Ready => ReservationState::Ready,
        ApiState::Releasing => ReservationState::Releasing,
        ApiState::Refused => ReservationState::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::view::WhenFull;

    fn read(metadata: &str, rest: &str) -> ReservationView {
        let head = "apiVersion: staging.berth.dev/v1alpha1\nkind: StagingReservation\n";
        let object: StagingReservation =
            serde_saphyr::from_str(&format!("{head}metadata: {metadata}\n{rest}")).expect("readable");
        reservation_view(&object)
    }

    #[test]
    fn a_new_request() {
        let view =
            read("{name: r, namespace: team, uid: u, resourceVersion: '7'}", "spec: {maxSize: 10Gi}\n");
        assert_eq!(
            (view.max_size, view.access, view.state),
            (Bytes::gib(10), Access::File, ReservationState::Pending)
        );
        assert_eq!(view.pools, PoolChoice::Labelled([].into()), "any pool");
        assert_eq!(
            (view.name.to_string().as_str(), view.version.0.as_str(), view.uid.as_str()),
            ("team/r", "7", "u")
        );
        assert_eq!(
            (view.claim_namespace.as_str(), view.has_finalizer, view.deleting),
            ("team", false, false)
        );
        assert_eq!(view.invalid, None);
    }

    #[test]
    fn everything_that_status_and_spec_say() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let rest = format!(
            "spec: {{poolName: fast, maxSize: 1Gi, access: Block, nodeName: n, whenFull: Reject, image: {{template: {{namespace: t, \
             name: i}}}}}}\nstatus:\n  state: Ready\n  assignment: {{pool: fast, node: n, generation: 1}}\n  preparedGeneration: 1\n  \
             image: {{digest: '{digest}', stagedImage: s, virtualSize: 5}}\n"
        );
        let view = read("{name: r, namespace: team, finalizers: [staging.berth.dev/release]}", &rest);
        assert_eq!(view.pools, PoolChoice::Named(PoolName::from("fast")));
        assert_eq!((view.when_full, view.has_finalizer), (Some(WhenFull::Reject), true));
        assert_eq!(view.assignment.map(|place| place.node), Some(NodeName::from("n")));
        assert_eq!(view.assigned_image.map(|image| image.virtual_size), Some(Bytes(5)));
        assert_eq!(view.template, Some(ObjectName::new("t", "i")));
        assert_eq!((view.state, view.prepared.map(|g| g.0)), (ReservationState::Ready, Some(1)));
    }

    #[test]
    fn only_our_own_namespace_speaks_for_another() {
        let labels = "labels: {staging.berth.dev/claim-namespace: victim}";
        let foreign = read(&format!("{{name: r, namespace: team, {labels}}}"), "spec: {maxSize: 1}\n");
        assert_eq!(foreign.claim_namespace, "team");
        let ours = read(&format!("{{name: r, namespace: berth-system, {labels}}}"), "spec: {maxSize: 1}\n");
        assert_eq!(ours.claim_namespace, "victim");
    }

    #[test]
    fn waiting_counts_from_the_first_report() {
        let condition = "conditions: [{type: Promised, status: 'False', reason: Queued, message: '', lastTransitionTime: \
                         '1970-01-01T00:01:00Z'}]";
        let queued = read(
            "{name: r, namespace: t}",
            &format!("spec: {{maxSize: 1}}\nstatus: {{state: Queued, {condition}}}\n"),
        );
        assert_eq!(queued.queued_since, Some(Timestamp(60_000)));
        let refused = read(
            "{name: r, namespace: t}",
            &format!("spec: {{maxSize: 1}}\nstatus: {{state: Refused, {condition}}}\n"),
        );
        assert_eq!(refused.queued_since, None);
    }

    #[test]
    fn messages_name_field_and_value() {
        for (spec, message) in [
            ("{maxSize: 10Q}", "spec.maxSize: `10Q` is not a quantity of bytes such as `10Gi`"),
            (
                "{maxSize: 1, poolName: p, poolSelector: {}}",
                "spec: at most one of `poolName` and `poolSelector` may be set",
            ),
            (
                "{maxSize: 1, image: {template: {namespace: n, name: t}}}",
                "spec.access: must be `Block` where `spec.image` is set",
            ),
        ] {
            let view = read("{name: r, namespace: t}", &format!("spec: {spec}\n"));
            assert_eq!(view.invalid.as_deref(), Some(message));
        }
    }
}
