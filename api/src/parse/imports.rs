//! `TemplateImport` to its view.

use berth_core::ids::ObjectName;
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_core::view::{DurableImage, ImportView, TransferState, WorkError};

use super::{
    asked_import, created_of, generation, has_finalizer, labelled, name_of, placement, reason, uid_of,
    version_of,
};
use crate::TemplateImport;
use crate::conditions::{ConditionType, find};
use crate::defaults::{ANNOTATION_RETRY, IMPORT_FINALIZER};
use crate::template_import::{DurableImage as ApiDurable, ImportState as ApiState, TemplateImportStatus};

/// What decisions look at.
pub fn import_view(import: &TemplateImport) -> ImportView {
    let (meta, spec) = (&import.metadata, &import.spec);
    let status = import.status.clone().unwrap_or_default();
    let name = name_of(meta);
    let nothing = TemplateImportStatus::default();
    let known = if is_past(&status) { &nothing } else { &status };
    ImportView {
        uid: uid_of(meta),
        version: version_of(meta),
        created: created_of(meta),
        deleting: meta.deletion_timestamp.is_some(),
        has_finalizer: has_finalizer(meta, IMPORT_FINALIZER),
        pools: labelled(spec.pool_selector.as_ref()),
        store: ObjectName::new(&name.namespace, &spec.store.name),
        allowed_namespaces: spec.allowed_namespaces.clone(),
        state: status.state.map_or(TransferState::Pending, state),
        assignment: placement(status.assignment.as_ref()),
        peak: known.plan.as_ref().map(|plan| Bytes::from_i64(plan.peak_bytes)),
        durable: status.durable.as_ref().and_then(durable),
        error: standing_error(known),
        retry: retry(meta.annotations.as_ref().and_then(|all| all.get(ANNOTATION_RETRY)), &status),
        released: status.released_generation.map(generation),
        invalid: asked_import(import).err().map(|error| error.to_string()),
        name,
    }
}

/// True if what its node says is of an assignment that has failed, and another one was made since: it is to be tried again.
pub fn is_past(status: &TemplateImportStatus) -> bool {
    let assigned = status.assignment.as_ref().map(|assignment| assignment.generation);
    status.failed_generation.is_some_and(|failed| assigned.is_some_and(|assigned| assigned > failed))
}

/// A value of the annotation that nobody has acted on.
fn retry(asked: Option<&String>, status: &TemplateImportStatus) -> Option<String> {
    asked.filter(|value| !value.is_empty() && status.retried.as_ref() != Some(*value)).cloned()
}

/// The error that ended the work or interrupts it. One that was retried stays in status, and is over once the node says
/// that it goes on.
fn standing_error(status: &TemplateImportStatus) -> Option<WorkError> {
    let error = status.last_error.as_ref()?;
    let goes_on = find(&status.conditions, ConditionType::Progressing)
        .is_some_and(|told| told.reason == Reason::Progressing.as_str());
    (!error.retryable || !goes_on).then(|| WorkError {
        reason: reason(&error.reason, Reason::Retrying),
        message: error.message.clone(),
        retryable: error.retryable,
    })
}

/// A digest that is none cannot name an image: it counts as not durable.
fn durable(durable: &ApiDurable) -> Option<DurableImage> {
    Some(DurableImage {
        digest: durable.digest.parse().ok()?,
        virtual_size: Bytes::from_i64(durable.virtual_size),
        real_size: Bytes::from_i64(durable.real_size),
    })
}

const fn state(state: ApiState) -> TransferState {
    match state {
        ApiState::Pending => TransferState::Pending,
        ApiState::Probing => TransferState::Probing,
        ApiState::Queued => TransferState::Queued,
        ApiState::Importing => TransferState::Working,
        ApiState::Ready => TransferState::Done,
        ApiState::Failed => TransferState::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::view::PoolChoice;

    fn read(rest: &str) -> ImportView {
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
        assert_eq!((view.store.to_string().as_str(), view.pools), ("ns/s", PoolChoice::Labelled([].into())));
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
        let asked = |value: &str, retried: Option<&str>| {
            let status = TemplateImportStatus {
                retried: retried.map(str::to_owned),
                ..TemplateImportStatus::default()
            };
            retry(Some(&value.to_owned()), &status)
        };
        assert_eq!(asked("1", None).as_deref(), Some("1"));
        assert_eq!(asked("2", Some("1")).as_deref(), Some("2"));
        assert_eq!((asked("1", Some("1")), asked("", None)), (None, None));
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
}
