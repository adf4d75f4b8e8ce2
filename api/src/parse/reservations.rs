//! `StagingReservation` to its view.

use berth_core::ids::{NodeName, ObjectName, PoolName};
use berth_core::reason::Reason;
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
    ANNOTATION_RENEWED, LABEL_CLAIM_NAME, LABEL_CLAIM_NAMESPACE, RELEASE_FINALIZER, RESERVATION_TTL_SECONDS,
    SYSTEM_NAMESPACE,
};
use crate::staging_reservation::{
    Access as ApiAccess, FileSpec, ReservationState as ApiState, StagingReservationSpec,
};

/// The least that a file for pods may be promised: the file system that bounds it takes some 30 MiB.
const FILE_MIN: Bytes = Bytes::mib(64);

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
        pools: pools(spec),
        node: spec.node_name.clone().map(NodeName),
        zone: spec.topology.as_ref().map(|topology| topology.zone.clone()),
        priority: spec.priority.unwrap_or_default(),
        ttl_millis: ttl(meta, spec),
        renewed: renewed(meta),
        last_used: status.last_used.as_ref().map(timestamp),
        expires: status.expires_at.as_ref().map(timestamp),
        dry_run: spec.dry_run,
        max_size,
        template: spec
            .image
            .as_ref()
            .map(|image| ObjectName::new(&image.template.namespace, &image.template.name)),
        claim_namespace: claim_namespace(meta),
        claim_name: claim_name(reservation, &name),
        claim: super::claims::claim(meta, &claim_namespace(meta)),
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
        ready_since: ready_since(&status.conditions),
        only_copy: only_copy(&status.conditions),
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

fn pools(spec: &StagingReservationSpec) -> PoolChoice {
    match &spec.pool_name {
        Some(pool) => PoolChoice::Named(PoolName(pool.clone())),
        None => labelled(spec.pool_selector.as_ref()),
    }
}

/// A time that cannot be read renews nothing.
fn renewed(meta: &ObjectMeta) -> Option<Timestamp> {
    let time: jiff::Timestamp = meta.annotations.as_ref()?.get(ANNOTATION_RENEWED)?.parse().ok()?;
    u64::try_from(time.as_millisecond()).ok().map(Timestamp)
}

/// The claim behind a CSI volume; only for messages.
fn claim_name(reservation: &StagingReservation, name: &ObjectName) -> Option<String> {
    let labels = reservation.metadata.labels.as_ref().filter(|_| name.namespace == SYSTEM_NAMESPACE)?;
    labels.get(LABEL_CLAIM_NAME).cloned()
}

/// Only an object of Berth's own namespace speaks for another: whoever may write there is trusted.
pub(super) fn claim_namespace(meta: &ObjectMeta) -> String {
    let namespace = meta.namespace.clone().unwrap_or_default();
    let claimed = meta.labels.as_ref().and_then(|labels| labels.get(LABEL_CLAIM_NAMESPACE));
    claimed.filter(|_| namespace == SYSTEM_NAMESPACE).cloned().unwrap_or(namespace)
}

/// `Promised` is false from the first report on, and keeps the time of that.
fn since(conditions: &[Condition]) -> Option<Timestamp> {
    find(conditions, ConditionType::Promised).map(|promised| timestamp(&promised.last_transition_time))
}

fn ready_since(conditions: &[Condition]) -> Option<Timestamp> {
    let ready = find(conditions, ConditionType::Ready).filter(|ready| ready.status == "True")?;
    Some(timestamp(&ready.last_transition_time))
}

/// What its node says of a file that is in no object store yet, or that was lost before it was.
fn only_copy(conditions: &[Condition]) -> Option<String> {
    let durable = find(conditions, ConditionType::Durable)?;
    let only = [Reason::OnlyCopy, Reason::FileLost].map(Reason::as_str).contains(&&*durable.reason);
    only.then(|| durable.message.clone())
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
    if let Some(file) = &spec.file {
        check_file(spec, file)?;
    }
    if let Some(ttl) = &spec.ttl {
        seconds("spec.ttl", ttl)?;
    }
    let size = bytes("spec.maxSize", &spec.max_size)?;
    if spec.file.is_some() && size < FILE_MIN {
        let (field, value) = ("spec.maxSize", spec.max_size.0.clone());
        let allowed = "at least 64Mi where `spec.file` is set: its file system is a part of it".to_owned();
        return Err(InvalidField::Range { field, value, allowed });
    }
    Ok(size)
}

fn check_file(spec: &StagingReservationSpec, file: &FileSpec) -> Result<(), InvalidField> {
    if spec.access != ApiAccess::File {
        let problem = "must be `File` where `spec.file` is set".to_owned();
        return Err(InvalidField::Shape { field: "spec.access", problem });
    }
    if file.source.is_none() && file.result.is_none() {
        let problem = "at least one of `source` and `result` must be set".to_owned();
        return Err(InvalidField::Shape { field: "spec.file", problem });
    }
    file_name(file).map(drop)
}

/// The name of a reservation's file in its directory: the given one, or the last part of the source's key.
///
/// # Errors
/// If that is no name of one file.
pub fn file_name(file: &FileSpec) -> Result<&str, InvalidField> {
    let of_key = || file.source.as_ref().map(|source| source.key.rsplit('/').next().unwrap_or_default());
    let name = file.name.as_deref().or_else(of_key).unwrap_or_default();
    let plain = !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']) && name.len() <= 255;
    plain.then_some(name).ok_or_else(|| InvalidField::Shape {
        field: "spec.file.name",
        problem: format!("`{name}` is not the name of a file: 1 to 255 bytes without `/`, not `.` or `..`"),
    })
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
    fn a46_every_reservation_is_bounded_by_size_and_time_whether_it_says_so_or_not() {
        let head = "apiVersion: staging.berth.dev/v1alpha1\nkind: StagingReservation\n";
        let endless = format!("{head}metadata: {{name: r, namespace: team}}\nspec: {{poolName: p}}\n");
        assert!(serde_saphyr::from_str::<StagingReservation>(&endless).is_err(), "no size");
        let plain = read("{name: r, namespace: team}", "spec: {maxSize: 1Gi}\n");
        assert_eq!((plain.max_size, plain.ttl_millis), (Bytes::gib(1), Some(3_600_000)));
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
    fn a_file_is_named_after_its_key_and_told_of_while_it_is_the_only_copy() {
        let source = "source: {endpoint: 'http://s', bucket: bkt, key: dir/disk.qcow2}";
        let named = |file: &str| {
            let file: FileSpec = serde_saphyr::from_str(file).expect("readable");
            file_name(&file).map(str::to_owned).ok()
        };
        assert_eq!(named(&format!("{{{source}}}")).as_deref(), Some("disk.qcow2"));
        assert_eq!(named(&format!("{{{source}, name: other}}")).as_deref(), Some("other"));
        assert_eq!(named(&format!("{{{source}, name: a/b}}")), None);
        let view = |reason: &str| {
            let condition = format!(
                "{{type: Durable, status: 'False', reason: {reason}, message: m, lastTransitionTime: '1970-01-01T00:01:00Z'}}"
            );
            let rest = format!(
                "spec: {{maxSize: 1Gi, file: {{{source}}}}}\nstatus: {{conditions: [{condition}]}}\n"
            );
            read("{name: r, namespace: t}", &rest)
        };
        assert_eq!(view("OnlyCopy").only_copy.as_deref(), Some("m"));
        assert_eq!(view("FileLost").only_copy.as_deref(), Some("m"));
        assert_eq!((view("Durable").only_copy, view("OnlyCopy").invalid), (None, None));
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
            (
                "{maxSize: 1Gi, access: Block, file: {name: a, result: {endpoint: 'http://s', bucket: bkt, key: k}}}",
                "spec.access: must be `File` where `spec.file` is set",
            ),
            (
                "{maxSize: 1Gi, file: {name: a}}",
                "spec.file: at least one of `source` and `result` must be set",
            ),
            (
                "{maxSize: 1Gi, file: {source: {endpoint: 'http://s', bucket: bkt, key: 'a/..'}}}",
                "spec.file.name: `..` is not the name of a file: 1 to 255 bytes without `/`, not `.` or `..`",
            ),
            (
                "{maxSize: 1Mi, file: {source: {endpoint: 'http://s', bucket: bkt, key: a}}}",
                "spec.maxSize: `1Mi` must be at least 64Mi where `spec.file` is set: its file system is a part of it",
            ),
        ] {
            let view = read("{name: r, namespace: t}", &format!("spec: {spec}\n"));
            assert_eq!(view.invalid.as_deref(), Some(message));
        }
    }
}
