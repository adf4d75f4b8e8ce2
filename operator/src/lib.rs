//! The operator: observes the API, asks `berth-core`, writes the answer.
//!
//! [`observe`] feeds every decision and [`apply`] makes every write; `apply` asks the API server itself only to confirm what
//! a view may lag behind. What is decided is decided in `berth-core`.

pub mod admission;
pub mod apply;
pub mod args;
pub mod context;
pub mod controllers;
pub mod events;
pub mod lease;
pub mod metrics;
pub mod observe;
pub mod sabotage;
pub mod telemetry;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use kube::{Client, config};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::apply::Applier;
use crate::args::Args;
use crate::context::Context;
use crate::events::Events;
use crate::lease::Candidate;
use crate::metrics::{Metrics, ServeError};
use crate::observe::Observer;

/// How long everything may take to end after a signal.
const GRACE: Duration = Duration::from_secs(8);

/// Why the operator could not start.
#[derive(Debug, Error)]
pub enum RunError {
    /// The kubeconfig file cannot be used.
    #[error("could not use the kubeconfig {}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: config::KubeconfigError,
    },
    /// Neither a service account nor a kubeconfig was found.
    #[error("found no way to reach the API server")]
    NoConfig(#[source] config::InferConfigError),
    /// The client could not be made from the configuration.
    #[error("could not make a client of the API server")]
    Client(#[source] kube::Error),
    /// The endpoints could not be served.
    #[error("could not serve metrics")]
    Serve(#[source] ServeError),
    /// The process may not listen for signals.
    #[error("could not listen for signals")]
    Signal(#[source] std::io::Error),
}

/// Runs until SIGTERM or SIGINT, then ends within ten seconds.
///
/// # Errors
/// If it cannot start; after that it goes on whatever happens.
pub async fn run(args: Args) -> Result<(), RunError> {
    let client = connect(&args).await?;
    let mut term = signal(SignalKind::terminate()).map_err(RunError::Signal)?;
    let mut int = signal(SignalKind::interrupt()).map_err(RunError::Signal)?;
    let stop = CancellationToken::new();
    let (controllers, services) = (TaskTracker::new(), TaskTracker::new());
    // What the controllers still need while they finish.
    let stop_services = CancellationToken::new();

    let metrics = Arc::new(Metrics::default());
    let (observer, confirmations) =
        Observer::new(client.clone(), args.namespace.clone(), Duration::from_secs(args.claim_grace_seconds));
    let observer = Arc::new(observer);
    metrics::serve(args.metrics_addr, metrics.clone(), observer.clone(), &services, &stop_services)
        .await
        .map_err(RunError::Serve)?;
    let events = Events::start(client.clone(), &args.identity, metrics.clone(), &services, &stop_services);
    let applier =
        Applier::new(client.clone(), observer.clone(), events.clone(), metrics.clone(), &args.identity);
    let context = Arc::new(Context::new(observer.clone(), applier, metrics));
    controllers::start(&context, &controllers, &stop);
    observer.start(events, confirmations, &services, &stop_services);
    let (candidate, mut leads) = Candidate::new(client, &args.namespace, &args.identity);
    let restored = observer.clone();
    controllers.spawn(candidate.run(stop.clone(), move || restored.went_back()));
    services.spawn(async move {
        while leads.changed().await.is_ok() {
            observer.set_leader(*leads.borrow_and_update());
        }
    });

    tracing::info!(identity = args.identity, version = env!("CARGO_PKG_VERSION"), "started");
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    tracing::info!("stopping");
    stop.cancel();
    finish(&controllers).await;
    stop_services.cancel();
    finish(&services).await;
    tracing::info!("stopped");
    Ok(())
}

async fn finish(tasks: &TaskTracker) {
    tasks.close();
    if tokio::time::timeout(GRACE / 2, tasks.wait()).await.is_err() {
        tracing::warn!(
            left = tasks.len(),
            "stopped with work under way; it is taken up again at the next start"
        );
    }
}

async fn connect(args: &Args) -> Result<Client, RunError> {
    let config = match &args.kubeconfig {
        Some(path) => {
            let bad = |source| RunError::Kubeconfig { path: path.clone(), source };
            let file = Kubeconfig::read_from(path).map_err(bad)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(bad)?
        }
        None => Config::infer().await.map_err(RunError::NoConfig)?,
    };
    Client::try_from(config).map_err(RunError::Client)
}
