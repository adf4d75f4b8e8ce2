//! Metrics of the operator, and the endpoints that serve them: `/metrics`, `/healthz`, `/readyz`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use berth_core::budget::{Area, Sums};
use berth_core::ledger::Class;
use berth_core::metric::{Metric, MetricKind, Program};
use berth_core::overcommit::Percent;
use berth_core::states::Machine as _;
use berth_core::thin::ThinState;
use berth_core::transfer::TransferKind;
use berth_core::units::Bytes;
use berth_core::view::{LedgerView, ReservationState, TransferState, View};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::context::now;
use crate::observe::Observer;

type Labels = Vec<(String, String)>;

/// What the operator counts: every metric of the table that an operator can know.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    counters: BTreeMap<Metric, Family<Labels, Counter>>,
    gauges: BTreeMap<Metric, Family<Labels, Gauge>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics =
            Self { registry: Registry::default(), counters: BTreeMap::new(), gauges: BTreeMap::new() };
        for metric in Metric::ALL.iter().filter(|metric| metric.program() != Program::Node) {
            metrics.register(*metric);
        }
        metrics.set(Metric::ProcessStartTimeSeconds, &[], seconds(now().0));
        metrics
    }
}

impl Metrics {
    fn register(&mut self, metric: Metric) {
        let help = metric.help().trim_end_matches('.');
        match metric.kind() {
            MetricKind::Counter => {
                let family = Family::default();
                // The encoder appends the suffix itself.
                self.registry.register(metric.name().trim_end_matches("_total"), help, family.clone());
                self.counters.insert(metric, family);
                if metric.labels().is_empty() {
                    self.add(metric, &[], 0);
                }
            }
            MetricKind::Gauge => {
                let family = Family::default();
                self.registry.register(metric.name(), help, family.clone());
                self.gauges.insert(metric, family);
            }
        }
    }

    /// Adds to a counter.
    pub fn add(&self, metric: Metric, labels: &[(&str, &str)], by: u64) {
        debug_assert!(metric.labels().iter().eq(labels.iter().map(|(name, _)| name)), "labels of {metric:?}");
        if let Some(family) = self.counters.get(&metric) {
            family.get_or_create(&owned(labels)).inc_by(by);
        }
    }

    fn set(&self, metric: Metric, labels: &[(&str, &str)], value: i64) {
        debug_assert!(metric.labels().iter().eq(labels.iter().map(|(name, _)| name)), "labels of {metric:?}");
        if let Some(family) = self.gauges.get(&metric) {
            family.get_or_create(&owned(labels)).set(value);
        }
    }

    fn clear(&self, metric: Metric) {
        if let Some(family) = self.gauges.get(&metric) {
            family.clear();
        }
    }

    /// Brings the gauges in line with what is seen.
    fn look(&self, view: &View) {
        self.look_at_pools(view);
        for state in RESERVATION_STATES {
            let count = view.reservations.values().filter(|reservation| reservation.state == *state).count();
            self.set(Metric::Reservations, &[("state", &format!("{state:?}"))], size(count));
        }
        for state in TransferState::STATES {
            let kinds = [
                (TransferKind::Import, Metric::Imports, &view.imports),
                (TransferKind::Transfer, Metric::Transfers, &view.transfers),
            ];
            for (kind, metric, transfers) in kinds {
                let Some(name) = kind.name_of(*state) else { continue };
                let count = transfers.values().filter(|transfer| transfer.state == *state).count();
                self.set(metric, &[("state", name)], size(count));
            }
        }
        self.clear(Metric::UnreadableObjects);
        for one in &view.unreadable {
            let alike = view.unreadable.iter().filter(|other| other.kind == one.kind).count();
            self.set(Metric::UnreadableObjects, &[("kind", &one.kind)], size(alike));
        }
        self.clear(Metric::NodeReady);
        for node in view.nodes.values() {
            self.set(
                Metric::NodeReady,
                &[("node", node.name.as_str())],
                i64::from(node.live && node.reported),
            );
        }
        let queued = view.reservations.values().filter(|r| r.state == ReservationState::Queued).count();
        self.set(Metric::QueueLength, &[], size(queued));
        self.clear(Metric::PoolQueueLength);
        for pool in view.pools.values() {
            let open = view.open_to(Some(&pool.name)).filter(|r| r.pools.allows(pool));
            let here = open.filter(|r| r.state == ReservationState::Queued).count();
            self.set(Metric::PoolQueueLength, &[("pool", pool.name.as_str())], size(here));
        }
    }

    fn look_at_pools(&self, view: &View) {
        let gauges = [
            Metric::PoolTotalBytes,
            Metric::PoolPromisedBytes,
            Metric::PoolUsedBytes,
            Metric::PoolVolumesPromisedBytes,
            Metric::PoolVolumesAttainableBytes,
            Metric::PoolVolumesUsedBytes,
            Metric::PoolMetadataTotalBytes,
            Metric::PoolMetadataPromisedBytes,
            Metric::PoolMetadataUsedBytes,
            Metric::PoolUnreferencedBytes,
            Metric::PoolLedgerBehind,
        ];
        for metric in gauges {
            self.clear(metric);
        }
        for ledger in view.ledgers.values() {
            let labels = [("pool", ledger.pool.as_str()), ("node", ledger.node.as_str())];
            let (sums, percent) = (Sums::of(ledger.promises.values()), ledger.capacity.overcommit.percent);
            let promised = sums.data(Area::Total, percent);
            let report = view.report_of(&ledger.pool, &ledger.node);
            let used = report.map(|report| report.used);
            self.set(Metric::PoolTotalBytes, &labels, ledger.capacity.total.data.as_i64());
            self.set(Metric::PoolPromisedBytes, &labels, promised.as_i64());
            self.set(Metric::PoolUsedBytes, &labels, used.unwrap_or_default().as_i64());
            self.set(Metric::PoolLedgerBehind, &labels, i64::from(view.behind(ledger).is_some()));
            if let Some(state) = report.and_then(|report| report.thin.as_ref()) {
                self.look_at_volumes(ledger, &sums, state);
                self.look_at_metadata(ledger, state);
            }
        }
    }

    /// What volumes are promised beside what there is for them: more where they are overcommitted.
    fn look_at_volumes(&self, ledger: &LedgerView, sums: &Sums, state: &ThinState) {
        let labels = [("pool", ledger.pool.as_str()), ("node", ledger.node.as_str())];
        let attainable = ledger.attainable_by_volumes().max(state.volumes.data.total);
        let promised = sums.data(Area::Volumes, Percent::WHOLE);
        self.set(Metric::PoolVolumesPromisedBytes, &labels, promised.as_i64());
        self.set(Metric::PoolVolumesAttainableBytes, &labels, attainable.as_i64());
        self.set(Metric::PoolVolumesUsedBytes, &labels, state.volumes.data.used.as_i64());
    }

    fn look_at_metadata(&self, ledger: &LedgerView, state: &ThinState) {
        let capacity = &ledger.capacity;
        for (class, bound) in [(Class::Images, capacity.images), (Class::Volumes, capacity.volumes)] {
            let class_name = format!("{class:?}");
            let labels =
                [("pool", ledger.pool.as_str()), ("node", ledger.node.as_str()), ("class", &class_name)];
            let promises = ledger.promises.values().filter(|promise| promise.class == class);
            let promised: Bytes = promises.map(|promise| promise.charge.metadata).sum();
            let used = state.of(class).metadata.used;
            self.set(Metric::PoolMetadataTotalBytes, &labels, bound.metadata.as_i64());
            self.set(Metric::PoolMetadataPromisedBytes, &labels, promised.as_i64());
            self.set(Metric::PoolMetadataUsedBytes, &labels, used.as_i64());
        }
    }

    fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

const RESERVATION_STATES: &[ReservationState] = &[
    ReservationState::Pending,
    ReservationState::Queued,
    ReservationState::Promised,
    ReservationState::Ready,
    ReservationState::Releasing,
    ReservationState::Refused,
];

fn owned(labels: &[(&str, &str)]) -> Labels {
    labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn size(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn seconds(millis: u64) -> i64 {
    i64::try_from(millis / 1000).unwrap_or(i64::MAX)
}

/// Why the endpoints could not be served.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The address is taken, or not one of this machine.
    #[error("could not listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

#[derive(Clone)]
struct Served {
    metrics: Arc<Metrics>,
    observer: Arc<Observer>,
}

/// Serves the endpoints until `stop`, in a task of its own.
///
/// # Errors
/// [`ServeError::Listen`] if the address cannot be bound.
pub async fn serve(
    address: SocketAddr,
    metrics: Arc<Metrics>,
    observer: Arc<Observer>,
    tasks: &tokio_util::task::TaskTracker,
    stop: &CancellationToken,
) -> Result<(), ServeError> {
    let failed = |source| ServeError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    tracing::info!(address = %bound, "metrics listening");
    let routes = Router::new()
        .route("/metrics", get(show))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(Served { metrics, observer });
    let stop = stop.clone().cancelled_owned();
    tasks.spawn(async move {
        if let Err(error) = axum::serve(listener, routes).with_graceful_shutdown(stop).await {
            tracing::error!(%error, "the metrics endpoint ended");
        }
    });
    Ok(())
}

async fn show(State(served): State<Served>) -> Response {
    served.observer.view(|view| served.metrics.look(view));
    for pool in served.observer.pools.all() {
        let name = pool.metadata.name.as_deref().unwrap_or_default();
        let unreferenced = pool.status.as_ref().map_or(0, |status| status.capacity.unreferenced);
        served.metrics.set(Metric::PoolUnreferencedBytes, &[("pool", name)], unreferenced);
    }
    served.metrics.set(Metric::LastEventTimestampSeconds, &[], seconds(served.observer.last_event_millis()));
    match served.metrics.encode() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn ready(State(served): State<Served>) -> Response {
    if served.observer.synced() {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not every list has been seen yet\n").into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use berth_core::ids::{Lineage, NodeName, ObjectName, PoolName, Uid};
    use berth_core::ledger::{Charge, Holder, Promise};
    use berth_core::reason::Reason;
    use berth_core::thin::{PoolMode, PoolState, Usage};
    use berth_core::units::Generation;
    use berth_core::view::{LedgerCapacity, NodePoolState, NodeState, ObjectVersion, Unreadable};

    #[test]
    fn the_metadata_of_kernel_pools_is_told_by_class() {
        let usage = |used, total| Usage { used: Bytes(used), total: Bytes(total) };
        let kernel_pool = |used| PoolState {
            mode: PoolMode::ReadWrite,
            needs_check: false,
            data: usage(0, 100),
            metadata: usage(used, 10),
        };
        let (pool, name) = (PoolName::from("p"), NodeName::from("n"));
        let report = NodePoolState {
            usable: true,
            reason: Reason::Ready,
            message: String::new(),
            total: Bytes(100),
            used: Bytes(1),
            advisory: false,
            thin: Some(ThinState { images: kernel_pool(3), volumes: kernel_pool(4) }),
            lineage: None,
            obeyed_revision: 0,
            released: BTreeMap::new(),
            obeyed: BTreeMap::new(),
            recorded: BTreeMap::new(),
            in_use: std::collections::BTreeSet::new(),
        };
        let pools = BTreeMap::from([(pool.clone(), report)]);
        let node = NodeState {
            name: name.clone(),
            version: ObjectVersion::default(),
            live: true,
            reported: true,
            silent: false,
            zone: None,
            pools,
        };
        let charge = Charge { data: Bytes(50), metadata: Bytes(5) };
        let holder = Holder::Image("i".to_owned());
        let promise =
            Promise { holder, class: Class::Volumes, charge, generation: Generation::FIRST, revoked: None };
        let bound = Charge { data: Bytes(100), metadata: Bytes(7) };
        let ledger = LedgerView {
            name: "l".to_owned(),
            version: ObjectVersion::default(),
            pool: pool.clone(),
            node: name.clone(),
            lineage: Lineage::from("lineage"),
            revision: 1,
            rebuilt: None,
            capacity: LedgerCapacity {
                images: bound,
                volumes: bound,
                total: bound,
                ..LedgerCapacity::default()
            },
            promises: BTreeMap::from([(Uid::from("u"), promise)]),
        };
        let mut view = View::default();
        view.nodes.insert(name.clone(), node);
        view.ledgers.insert((pool, name), ledger);
        let metrics = Metrics::default();
        metrics.look(&view);
        let text = metrics.encode().expect("writes to a string");
        for line in [
            "berth_pool_metadata_total_bytes{pool=\"p\",node=\"n\",class=\"Images\"} 7",
            "berth_pool_metadata_promised_bytes{pool=\"p\",node=\"n\",class=\"Images\"} 0",
            "berth_pool_metadata_promised_bytes{pool=\"p\",node=\"n\",class=\"Volumes\"} 5",
            "berth_pool_metadata_used_bytes{pool=\"p\",node=\"n\",class=\"Volumes\"} 4",
            "berth_pool_ledger_behind{pool=\"p\",node=\"n\"} 0",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        view.ledgers.values_mut().for_each(|ledger| ledger.revision = 0);
        view.nodes.values_mut().for_each(|node| {
            let report = node.pools.values_mut().next().expect("one");
            (report.lineage, report.obeyed_revision) = (Some(Lineage::from("lineage")), 1);
        });
        metrics.look(&view);
        let text = metrics.encode().expect("writes to a string");
        assert!(text.contains("berth_pool_ledger_behind{pool=\"p\",node=\"n\"} 1"), "{text}");
        metrics.look(&View::default());
        let text = metrics.encode().expect("writes to a string");
        assert!(!text.contains("class=\"Volumes\""), "{text}");
    }

    #[test]
    fn objects_that_cannot_be_read_are_counted_by_kind() {
        let unreadable = |name: &str| Unreadable {
            kind: "StagingPool".to_owned(),
            name: ObjectName::new("", name),
            uid: Uid::from(name),
            claim_namespace: String::new(),
            problem: "spec: missing".to_owned(),
        };
        let view = View { unreadable: vec![unreadable("a"), unreadable("b")], ..View::default() };
        let (metrics, series) = (Metrics::default(), "berth_unreadable_objects{kind=\"StagingPool\"}");
        metrics.look(&view);
        let text = metrics.encode().expect("writes to a string");
        assert!(text.contains(&format!("{series} 2")), "{text}");
        metrics.look(&View::default());
        assert!(!metrics.encode().expect("writes to a string").contains(series));
    }

    #[test]
    fn metrics_are_served_under_their_names_in_the_table() {
        let metrics = Metrics::default();
        metrics.add(Metric::LedgerConflictsTotal, &[], 3);
        metrics.look(&View::default());
        let text = metrics.encode().expect("writes to a string");
        assert!(text.contains("berth_ledger_conflicts_total{} 3"), "{text}");
        assert!(text.contains("berth_reservations{state=\"Queued\"} 0"), "{text}");
        for metric in Metric::ALL.iter().filter(|m| m.program() != Program::Node && m.labels().is_empty()) {
            assert!(
                text.contains(&format!("\n{}{{}} ", metric.name()))
                    || *metric == Metric::LastEventTimestampSeconds
            );
        }
    }
}
