//! Counters and gauges of the agent, and the endpoint that shows them.

use std::future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use berth_core::metric::Metric;
use berth_core::node::Step;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric as RegisteredMetric, Registry};
use tokio_util::sync::CancellationToken;

use crate::node::{Node, now};

/// Which step, and whether it went well.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StepLabels {
    step: &'static str,
    result: &'static str,
}

/// Which RPC, and how it was answered.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RpcLabels {
    method: &'static str,
    code: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PoolLabels {
    pool: String,
}

/// All metrics of the agent.
pub struct Metrics {
    registry: Registry,
    steps: Family<StepLabels, Counter>,
    rpcs: Family<RpcLabels, Counter>,
    total: Family<PoolLabels, Gauge>,
    used: Family<PoolLabels, Gauge>,
    obeyed: Family<PoolLabels, Gauge>,
    space_defects: Family<PoolLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let started: Gauge = register(&mut registry, Metric::ProcessStartTimeSeconds);
        started.set(i64::try_from(now().0 / 1000).unwrap_or(i64::MAX));
        Self {
            steps: register(&mut registry, Metric::NodeStepsTotal),
            rpcs: register(&mut registry, Metric::NodeRpcsTotal),
            total: register(&mut registry, Metric::NodePoolTotalBytes),
            used: register(&mut registry, Metric::NodePoolUsedBytes),
            obeyed: register(&mut registry, Metric::NodePoolObeyedBytes),
            space_defects: register(&mut registry, Metric::NodeSpaceDefectsTotal),
            registry,
        }
    }
}

/// A metric under its name, with what it says. The encoder appends the suffix of counters itself.
fn register<M: RegisteredMetric + Default + Clone>(registry: &mut Registry, metric: Metric) -> M {
    let family = M::default();
    let (name, help) = (metric.name().trim_end_matches("_total"), metric.help().trim_end_matches('.'));
    registry.register(name, help, family.clone());
    family
}

impl Metrics {
    /// Counts a step.
    pub fn step(&self, step: &Step, ok: bool) {
        let result = if ok { "ok" } else { "error" };
        self.steps.get_or_create(&StepLabels { step: step_name(step), result }).inc();
    }

    /// Counts an answered call.
    pub fn rpc(&self, method: &'static str, code: tonic::Code) {
        self.rpcs.get_or_create(&RpcLabels { method, code: format!("{code:?}") }).inc();
    }

    /// Shows a pool: what may be promised, what is written, what is promised and obeyed, in bytes.
    pub fn pool(&self, name: &str, total: i64, used: i64, obeyed: i64) {
        let labels = PoolLabels { pool: name.to_owned() };
        self.total.get_or_create(&labels).set(total);
        self.used.get_or_create(&labels).set(used);
        self.obeyed.get_or_create(&labels).set(obeyed);
    }

    /// Counts a promise of space that did not hold.
    pub fn space_defect(&self, pool: &str) {
        self.space_defects.get_or_create(&PoolLabels { pool: pool.to_owned() }).inc();
    }

    /// All of it, in the `OpenMetrics` text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

fn step_name(step: &Step) -> &'static str {
    match step {
        Step::PreparePool { .. } => "PreparePool",
        Step::ClosePool { .. } => "ClosePool",
        Step::Obey { .. } => "Obey",
        Step::GrowVolumes { .. } => "GrowVolumes",
        Step::MakeWorkDir { .. } => "MakeWorkDir",
        Step::BeginFile { .. } => "BeginFile",
        Step::FetchFile { .. } => "FetchFile",
        Step::PushFile { .. } => "PushFile",
        Step::RemoveFile { .. } => "RemoveFile",
        Step::MakeVolume { .. } => "MakeVolume",
        Step::GrowVolume { .. } => "GrowVolume",
        Step::FillImage { .. } => "FillImage",
        Step::RemoveWorkDir { .. } => "RemoveWorkDir",
        Step::RemoveVolume { .. } => "RemoveVolume",
        Step::RemoveImage { .. } => "RemoveImage",
        Step::Released { .. } => "Released",
        Step::Forget { .. } => "Forget",
        Step::StartProbe { .. } => "StartProbe",
        Step::StartTransfer { .. } => "StartTransfer",
        Step::AbandonTransfer { .. } => "AbandonTransfer",
        Step::StopJob { .. } => "StopJob",
        Step::ProbeStore { .. } => "ProbeStore",
    }
}

/// Serves `/metrics`, `/healthz` and `/readyz` until `stop`.
///
/// # Errors
/// If the address cannot be listened on.
pub async fn serve(node: Arc<Node>, address: SocketAddr, stop: CancellationToken) -> io::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    tracing::info!(address = %listener.local_addr()?, "metrics listening");
    let metrics = Arc::clone(&node.metrics);
    let router = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(move || future::ready(ready(&node))))
        .route("/metrics", get(move || future::ready(show(&metrics))));
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

fn ready(node: &Node) -> impl IntoResponse + use<> {
    if node.watches.synced() {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "watches are not synced")
    }
}

fn show(metrics: &Metrics) -> impl IntoResponse + use<> {
    ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], metrics.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_shown() {
        let metrics = Metrics::default();
        metrics.step(&Step::PreparePool { pool: "p".into() }, false);
        metrics.rpc("CreateVolume", tonic::Code::Aborted);
        metrics.pool("fast", 10, 5, 7);
        metrics.space_defect("fast");
        let text = metrics.text();
        for line in [
            r#"berth_node_steps_total{step="PreparePool",result="error"} 1"#,
            r#"berth_node_rpcs_total{method="CreateVolume",code="Aborted"} 1"#,
            r#"berth_node_space_defects_total{pool="fast"} 1"#,
            r#"berth_node_pool_obeyed_bytes{pool="fast"} 7"#,
        ] {
            assert!(text.contains(line), "{text}");
        }
        let started = text.lines().find_map(|line| line.strip_prefix("berth_process_start_time_seconds "));
        assert!(started.unwrap().parse::<u64>().unwrap() > 1_700_000_000, "{text}");
    }
}
