//! `TemplateImport` and `ImageTransfer` to the view that decisions have of both.

use berth_core::ids::ObjectName;
use berth_core::reason::Reason;
use berth_core::transfer::TransferKind;
use berth_core::units::{Bytes, Timestamp};
use berth_core::view::{DurableImage, TransferState, TransferView, WorkError};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};

use super::{
    Asked, InvalidField, asked_import, asked_transfer, created_of, generation, has_finalizer, labelled,
    name_of, placement, reason, transfer_deadline, uid_of, version_of,
};
use crate::conditions::{ConditionType, Truth, find, timestamp};
use crate::defaults::{ANNOTATION_RETRY, IMPORT_FINALIZER, TRANSFER_FINALIZER};
use crate::fields::{Assignment, LastError, PoolSelector, TransferPlan};
use crate::image_transfer::{ImageTransferStatus, TransferState as ApiTransferState};
use crate::template_import::{
    DurableImage as ApiDurable, ImportState as ApiImportState, TemplateImportStatus,
};
use crate::{ImageTransfer, TemplateImport};

/// What decisions look at of an import.
pub fn import_view(import: &TemplateImport) -> TransferView {
    let spec = &import.spec;
    let nothing = TemplateImportStatus::default();
    let status = import.status.as_ref().unwrap_or(&nothing);
    let told = Told {
        assignment: status.assignment.as_ref(),
        plan: status.plan.as_ref(),
        error: status.last_error.as_ref(),
        failed_generation: status.failed_generation,
        retried: status.retried.as_deref(),
        released_generation: status.released_generation,
        conditions: &status.conditions,
    };
    let view = view(TransferKind::Import, &import.metadata, spec.pool_selector.as_ref(), &told);
    TransferView {
        allowed_namespaces: spec.allowed_namespaces.clone(),
        state: status.state.map_or(TransferState::Pending, import_state),
        durable: status.durable.as_ref().and_then(durable),
        stores: vec![ObjectName::new(&view.name.namespace, &spec.store.name)],
        invalid: problem(asked_import(import)),
        ..view
    }
}

/// What decisions look at of a transfer.
pub fn transfer_view(transfer: &ImageTransfer) -> TransferView {
    let spec = &transfer.spec;
    let nothing = ImageTransferStatus::default();
    let status = transfer.status.as_ref().unwrap_or(&nothing);
    let told = Told {
        assignment: status.assignment.as_ref(),
        plan: status.plan.as_ref(),
        error: status.last_error.as_ref(),
        failed_generation: status.failed_generation,
        retried: status.retried.as_deref(),
        released_generation: status.released_generation,
        conditions: &status.conditions,
    };
    let view = view(TransferKind::Transfer, &transfer.metadata, spec.pool_selector.as_ref(), &told);
    let (asked, deadline) = (asked_transfer(transfer), transfer_deadline(spec));
    TransferView {
        stores: asked.as_ref().map(Asked::stores).unwrap_or_default(),
        suspended: spec.suspend,
        deadline: deadline.as_ref().ok().copied().flatten(),
        ttl_after_finished: spec.ttl_seconds_after_finished.map(|ttl| u64::try_from(ttl).unwrap_or_default()),
        finished: finished(&status.conditions),
        state: status.state.map_or(TransferState::Pending, transfer_state),
        done: status.result.is_some(),
        invalid: problem(asked).or(problem(deadline)),
        ..view
    }
}

/// What both kinds say of themselves by the same fields.
struct Told<'s> {
    assignment: Option<&'s Assignment>,
    plan: Option<&'s TransferPlan>,
    error: Option<&'s LastError>,
    failed_generation: Option<i64>,
    retried: Option<&'s str>,
    released_generation: Option<i64>,
    conditions: &'s [Condition],
}

impl Told<'_> {
    /// True if what its node says is of an assignment that has failed, and another one was made since: it is to be tried again.
    fn is_past(&self) -> bool {
        let assigned = self.assignment.map(|assignment| assignment.generation);
        self.failed_generation.is_some_and(|failed| assigned.is_some_and(|assigned| assigned > failed))
    }

    /// A value of the annotation that nobody has acted on.
    fn retry(&self, meta: &ObjectMeta) -> Option<String> {
        let asked = meta.annotations.as_ref()?.get(ANNOTATION_RETRY)?;
        (!asked.is_empty() && self.retried != Some(asked.as_str())).then(|| asked.clone())
    }

    /// The error that ended the work or interrupts it. One that was retried stays in status, and is over once the node says
    /// that it goes on.
    fn standing_error(&self) -> Option<WorkError> {
        let error = self.error?;
        let goes_on = find(self.conditions, ConditionType::Progressing)
            .is_some_and(|told| told.reason == Reason::Progressing.as_str());
        (!error.retryable || !goes_on).then(|| WorkError {
            reason: reason(&error.reason, Reason::Retrying),
            message: error.message.clone(),
            retryable: error.retryable,
        })
    }
}

/// What both kinds have; the rest is as of one that asks for nothing.
fn view(
    kind: TransferKind,
    meta: &ObjectMeta,
    pools: Option<&PoolSelector>,
    told: &Told<'_>,
) -> TransferView {
    let finalizer = match kind {
        TransferKind::Import => IMPORT_FINALIZER,
        TransferKind::Transfer => TRANSFER_FINALIZER,
    };
    let stands = !told.is_past();
    TransferView {
        kind,
        uid: uid_of(meta),
        name: name_of(meta),
        version: version_of(meta),
        created: created_of(meta),
        deleting: meta.deletion_timestamp.is_some(),
        has_finalizer: has_finalizer(meta, finalizer),
        pools: labelled(pools),
        stores: Vec::new(),
        allowed_namespaces: Vec::new(),
        suspended: false,
        deadline: None,
        ttl_after_finished: None,
        finished: None,
        state: TransferState::Pending,
        assignment: placement(told.assignment),
        peak: told.plan.filter(|_| stands).map(|plan| Bytes::from_i64(plan.peak_bytes)),
        durable: None,
        done: false,
        error: told.standing_error().filter(|_| stands),
        retry: told.retry(meta),
        released: told.released_generation.map(generation),
        invalid: None,
    }
}

fn problem<T>(parsed: Result<T, InvalidField>) -> Option<String> {
    parsed.err().map(|error| error.to_string())
}

/// When it was told that it has ended: while it goes on, that is not known, and so neither true nor false.
fn finished(conditions: &[Condition]) -> Option<Timestamp> {
    let succeeded = find(conditions, ConditionType::Succeeded)?;
    (succeeded.status != Truth::Unknown.as_str()).then(|| timestamp(&succeeded.last_transition_time))
}

/// A digest that is none cannot name an image: it counts as not durable.
fn durable(durable: &ApiDurable) -> Option<DurableImage> {
    Some(DurableImage {
        digest: durable.digest.parse().ok()?,
        virtual_size: Bytes::from_i64(durable.virtual_size),
        real_size: Bytes::from_i64(durable.real_size),
    })
}

const fn import_state(state: ApiImportState) -> TransferState {
    match state {
        ApiImportState::Pending => TransferState::Pending,
        ApiImportState::Probing => TransferState::Probing,
        ApiImportState::Queued => TransferState::Queued,
        ApiImportState::Importing => TransferState::Working,
        ApiImportState::Ready => TransferState::Done,
        ApiImportState::Failed => TransferState::Failed,
    }
}

const fn transfer_state(state: ApiTransferState) -> TransferState {
    match state {
        ApiTransferState::Pending => TransferState::Pending,
        ApiTransferState::Probing => TransferState::Probing,
        ApiTransferState::Queued => TransferState::Queued,
        ApiTransferState::Transferring => TransferState::Working,
        ApiTransferState::Suspended => TransferState::Suspended,
        ApiTransferState::Succeeded => TransferState::Done,
        ApiTransferState::Failed => TransferState::Failed,
    }
}

/// An import's state as the API names it; `None` for one that no import is ever in.
pub const fn to_import_state(state: TransferState) -> Option<ApiImportState> {
    Some(match state {
        TransferState::Pending => ApiImportState::Pending,
        TransferState::Probing => ApiImportState::Probing,
        TransferState::Queued => ApiImportState::Queued,
        TransferState::Working => ApiImportState::Importing,
        TransferState::Suspended => return None,
        TransferState::Done => ApiImportState::Ready,
        TransferState::Failed => ApiImportState::Failed,
    })
}

/// A transfer's state as the API names it.
pub const fn to_transfer_state(state: TransferState) -> ApiTransferState {
    match state {
        TransferState::Pending => ApiTransferState::Pending,
        TransferState::Probing => ApiTransferState::Probing,
        TransferState::Queued => ApiTransferState::Queued,
        TransferState::Working => ApiTransferState::Transferring,
        TransferState::Suspended => ApiTransferState::Suspended,
        TransferState::Done => ApiTransferState::Succeeded,
        TransferState::Failed => ApiTransferState::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::view::PoolChoice;

    fn read(rest: &str) -> TransferView {
        let head = "apiVersion: staging.berth.dev/v1alpha1\nkind: TemplateImport\nmetadata: {name: t, namespace: ns, uid: u, \
                    finalizers: [staging.berth.dev/import]}\n";
        let object: TemplateImport = serde_saphyr::from_str(&format!("{head}{rest}")).expect("readable");
        import_view(&object)
    }

    const SOURCE: &str = "source: {http: {url: 'https://example.org/a.qcow2'}}, store: {name: s}";

    #[test]
    fn a_new_import() {
        let view = read(&format!("spec: {{{SOURCE}, allowedNamespaces: ['*']}}\n"));
        assert_eq!((view.state, view.invalid, view.has_finalizer), (TransferState::Pending, None, true));
        assert_eq!(
            (view.stores[0].to_string().as_str(), view.pools),
            ("ns/s", PoolChoice::Labelled([].into()))
        );
    }

    #[test]
    fn what_the_node_wrote() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let view = read(&format!(
            "spec: {{{SOURCE}}}\nstatus:\n  state: Importing\n  assignment: {{pool: p, node: n, generation: 2}}\n  plan: {{format: \
             Qcow2, sourceBytes: 1, virtualSize: 2, peakBytes: 3, steps: [], why: ''}}\n  lastError: {{reason: SourceStalled, message: \
             m, time: '2026-01-01T00:00:00Z', retryable: true}}\n  durable: {{digest: '{digest}', sourceDigest: '{digest}', size: 1, \
             virtualSize: 20, realSize: 10, chunks: 1}}\n  releasedGeneration: 1\n"
        ));
        assert_eq!((view.peak, view.released.map(|g| g.0)), (Some(Bytes(3)), Some(1)));
        let error = view.error.expect("there");
        assert_eq!((error.reason, error.retryable), (Reason::SourceStalled, true));
        assert_eq!(
            view.durable.map(|image| (image.virtual_size, image.real_size)),
            Some((Bytes(20), Bytes(10)))
        );
        assert_eq!(view.assignment.map(|place| place.generation.0), Some(2));
    }

    #[test]
    fn an_error_that_is_over_does_not_count_and_one_that_ended_it_does() {
        let read = |retryable: bool, progressing: &str| {
            read(&format!(
                "spec: {{{SOURCE}}}\nstatus:\n  lastError: {{reason: ObjectStoreUnavailable, message: m, time: \
                 '2026-01-01T00:00:00Z', retryable: {retryable}}}\n  conditions:\n  - {{type: Progressing, status: 'True', \
                 reason: {progressing}, message: '', lastTransitionTime: '2026-01-01T00:00:00Z'}}\n"
            ))
        };
        for waiting in [Reason::ObjectStoreUnavailable, Reason::Retrying] {
            assert_eq!(
                read(true, waiting.as_str()).error.map(|e| e.reason),
                Some(Reason::ObjectStoreUnavailable)
            );
        }
        assert_eq!(read(true, "Progressing").error, None);
        assert!(read(false, "Progressing").error.is_some(), "what ended it is not over");
    }

    #[test]
    fn a54_what_ended_an_earlier_assignment_is_over_and_a_value_counts_once() {
        let read = |assigned: u64, more: &str| {
            read(&format!(
                "spec: {{{SOURCE}}}\nstatus:\n  state: Failed\n  assignment: {{pool: p, node: n, generation: {assigned}}}\n  plan: \
                 {{format: Raw, sourceBytes: 1, virtualSize: 2, peakBytes: 3, steps: [], why: ''}}\n  failedGeneration: 2\n  \
                 lastError: {{reason: SourceNotFound, message: m, time: '2026-01-01T00:00:00Z', retryable: false}}\n{more}"
            ))
        };
        let failed = read(2, "");
        assert_eq!((failed.error.map(|error| error.retryable), failed.peak), (Some(false), Some(Bytes(3))));
        let again = read(3, "");
        assert_eq!((again.error, again.peak), (None, None), "what was known of the source is looked at anew");
        let asked = |value: &str, retried: &str| {
            let head = "apiVersion: staging.berth.dev/v1alpha1\nkind: TemplateImport\nmetadata: {name: t, namespace: ns, annotations: ";
            let object: TemplateImport = serde_saphyr::from_str(&format!(
                "{head}{{staging.berth.dev/retry: '{value}'}}}}\nspec: {{{SOURCE}}}\nstatus: {{{retried}}}\n"
            ))
            .expect("readable");
            import_view(&object).retry
        };
        assert_eq!(asked("1", "").as_deref(), Some("1"));
        assert_eq!(asked("2", "retried: '1'").as_deref(), Some("2"));
        assert_eq!((asked("1", "retried: '1'"), asked("", "")), (None, None));
    }

    #[test]
    fn messages_name_field_and_value() {
        for (spec, message) in [
            (
                "source: {}, store: {name: s}".to_owned(),
                "spec.source: exactly one of `http` and `s3` must be set",
            ),
            (
                format!("{SOURCE}, limits: {{virtualSize: big}}"),
                "spec.limits.virtualSize: `big` is not a quantity of bytes such as `10Gi`",
            ),
            (format!("{SOURCE}, limits: {{bytes: 0}}"), "spec.limits.bytes: `0` must be more than 0"),
            (
                format!("{SOURCE}, limits: {{stallTimeout: 0s}}"),
                "spec.limits.stallTimeout: `0s` must be more than 0",
            ),
            (format!("{SOURCE}, limits: {{retries: -1}}"), "spec.limits.retries: `-1` must be 0 or more"),
        ] {
            assert_eq!(read(&format!("spec: {{{spec}}}\n")).invalid.as_deref(), Some(message));
        }
    }

    fn moving(rest: &str) -> TransferView {
        let head = "apiVersion: staging.berth.dev/v1alpha1\nkind: ImageTransfer\nmetadata: {name: t, namespace: ns, uid: u, \
                    creationTimestamp: '2026-01-01T00:00:00Z', finalizers: [staging.berth.dev/transfer]}\n";
        let object: ImageTransfer = serde_saphyr::from_str(&format!("{head}{rest}")).expect("readable");
        transfer_view(&object)
    }

    const MOVE: &str =
        "source: {storeImage: {store: s, image: i}}, destination: {storeImage: {store: d, image: i}}";

    #[test]
    fn a_transfer_and_what_its_node_wrote() {
        let view = moving(&format!(
            "spec: {{{MOVE}, suspend: true, ttlSecondsAfterFinished: 60, limits: {{deadline: 1h}}}}\nstatus:\n  state: \
             Suspended\n  assignment: {{pool: p, node: n, generation: 2}}\n  plan: {{format: Chunked, sourceBytes: 1, virtualSize: 2, \
             peakBytes: 0, steps: [], why: '', staging: Direct}}\n  releasedGeneration: 1\n"
        ));
        assert_eq!(
            (view.kind, view.state, view.has_finalizer),
            (TransferKind::Transfer, TransferState::Suspended, true)
        );
        let stores: Vec<String> = view.stores.iter().map(ToString::to_string).collect();
        assert_eq!(stores, ["ns/s", "ns/d"]);
        assert_eq!((view.suspended, view.deadline, view.ttl_after_finished), (true, Some(3600), Some(60)));
        assert_eq!((view.peak, view.released.map(|g| g.0)), (Some(Bytes::ZERO), Some(1)));
        assert_eq!((view.is_done(), view.has_ended(), view.invalid), (false, false, None));
        let done = moving(&format!("spec: {{{MOVE}}}\nstatus: {{result: {{size: 1, virtualSize: 2}}}}\n"));
        assert!(done.is_done() && done.durable.is_none(), "it is no template");
    }

    #[test]
    fn when_a_transfer_ended_is_known_only_once_that_was_told() {
        let at = |status: &str| {
            moving(&format!(
                "spec: {{{MOVE}}}\nstatus:\n  conditions:\n  - {{type: Succeeded, status: '{status}', reason: R, message: '', \
                 lastTransitionTime: '1970-01-01T00:00:05Z'}}\n"
            ))
            .finished
        };
        assert_eq!(at("Unknown"), None, "it goes on");
        assert_eq!((at("True"), at("False")), (Some(Timestamp(5_000)), Some(Timestamp(5_000))));
    }

    #[test]
    fn what_a_transfer_cannot_be_asked_for_is_said() {
        let invalid = |more: &str| moving(&format!("spec: {{{MOVE}, {more}}}\n")).invalid;
        assert_eq!(
            invalid("limits: {deadline: 0s}").as_deref(),
            Some("spec.limits.deadline: `0s` must be more than 0")
        );
        assert_eq!(
            invalid("format: {source: Raw}").as_deref(),
            Some("spec.format.source: must be absent where `spec.source.storeImage` is set")
        );
    }
}
