//! `kubectl berth transfer`: a transfer or an import is followed; a transfer pauses and goes on.

mod moment;

use std::fmt::Debug;
use std::io::{IsTerminal as _, stderr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use berth_api::{ImageTransfer, TemplateImport};
use berth_core::transfer::TransferKind;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kube::api::{Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::args::{Output, TransferArgs, TransferCommand, WaitArgs, WorkName};
use moment::{End, Moment};

/// Between two looks; a node tells its progress every two seconds at most.
const PAUSE: Duration = Duration::from_secs(1);

/// Carries out one of the commands.
///
/// # Errors
/// If it is not there, or cannot be read or written.
pub async fn run(client: &Client, command: &TransferCommand) -> anyhow::Result<ExitCode> {
    match command {
        TransferCommand::Wait(args) => wait(client, args).await,
        TransferCommand::Suspend(args) => suspend(client, args, true).await,
        TransferCommand::Resume(args) => suspend(client, args, false).await,
    }
}

fn namespace(client: &Client, asked: Option<&String>) -> String {
    asked.cloned().unwrap_or_else(|| client.default_namespace().to_owned())
}

async fn wait(client: &Client, args: &WaitArgs) -> anyhow::Result<ExitCode> {
    let namespace = namespace(client, args.namespace.as_ref());
    let at_most = args.at_most.map(Duration::from_secs);
    let bar = Bar::new(args.output);
    let last = match args.what.kind {
        TransferKind::Import => {
            follow::<TemplateImport>(client, &namespace, &args.what, at_most, &bar, Moment::of_import).await
        }
        TransferKind::Transfer => {
            follow::<ImageTransfer>(client, &namespace, &args.what, at_most, &bar, Moment::of_transfer).await
        }
    };
    bar.clear();
    let last = last?;
    let (noun, name) = (args.what.kind.noun(), format!("{namespace}/{}", args.what.name));
    match args.output {
        Output::Table => println!("{noun} {name} is {last}"),
        Output::Json => println!("{:#}", json!({"kind": args.what.kind.as_str(), "name": name, "now": last})),
    }
    Ok(match last.end {
        Some(End::Succeeded) => ExitCode::SUCCESS,
        Some(End::Failed) => ExitCode::from(2),
        None => ExitCode::from(1),
    })
}

/// Looks until it has ended or the time has, and tells each change.
async fn follow<K>(
    client: &Client,
    namespace: &str,
    what: &WorkName,
    at_most: Option<Duration>,
    bar: &Bar,
    moment: impl Fn(&K) -> Moment,
) -> anyhow::Result<Moment>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let api = Api::<K>::namespaced(client.clone(), namespace);
    let (kind, name, begun) = (what.kind, &what.name, Instant::now());
    let mut uid = None;
    loop {
        let found =
            api.get_opt(name).await.with_context(|| format!("could not read {kind} {namespace}/{name}"))?;
        let found = found.with_context(|| format!("there is no {kind} {name} in namespace {namespace}"))?;
        if *uid.get_or_insert_with(|| found.uid()) != found.uid() {
            anyhow::bail!("{kind} {namespace}/{name} was deleted, and another one has its name");
        }
        let now = moment(&found);
        if now.end.is_some() || at_most.is_some_and(|most| begun.elapsed() >= most) {
            return Ok(now);
        }
        bar.tell(&now);
        tokio::time::sleep(PAUSE).await;
    }
}

/// The progress on standard error: a bar on a terminal, elsewhere a line for each state and stage.
struct Bar {
    bar: Option<ProgressBar>,
    told: std::cell::RefCell<String>,
}

impl Bar {
    fn new(output: Output) -> Self {
        let bar = (stderr().is_terminal() && output == Output::Table).then(|| {
            let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr());
            match ProgressStyle::with_template("{wide_bar} {pos:>3} %  {msg}") {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        Self { bar, told: std::cell::RefCell::default() }
    }

    fn tell(&self, now: &Moment) {
        if let Some(bar) = &self.bar {
            bar.set_position(now.percent.unwrap_or_default().unsigned_abs().into());
            bar.set_message(now.to_string());
            return;
        }
        let heading = now.heading();
        if *self.told.borrow() != heading {
            eprintln!("{now}");
            *self.told.borrow_mut() = heading;
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Writes `spec.suspend`, which the operator and the node act on.
async fn suspend(client: &Client, args: &TransferArgs, suspend: bool) -> anyhow::Result<ExitCode> {
    let namespace = namespace(client, args.namespace.as_ref());
    let (api, name) = (Api::<ImageTransfer>::namespaced(client.clone(), &namespace), &args.name);
    let found = api
        .get_opt(name)
        .await
        .with_context(|| format!("could not read ImageTransfer {namespace}/{name}"))?
        .with_context(|| format!("there is no ImageTransfer {name} in namespace {namespace}"))?;
    let now = Moment::of_transfer(&found);
    if now.end.is_some() {
        anyhow::bail!("transfer {namespace}/{name} has ended: it is {now}");
    }
    // With the UID, so that another transfer that got its name meanwhile is left alone.
    let body = json!({"metadata": {"uid": found.uid()}, "spec": {"suspend": suspend}});
    let params = PatchParams { field_manager: Some("kubectl-berth".to_owned()), ..PatchParams::default() };
    let written = api.patch(name, &params, &Patch::Merge(body)).await;
    written.with_context(|| format!("could not change ImageTransfer {namespace}/{name}"))?;
    let done = match (suspend, found.spec.suspend) {
        (true, true) => "pauses already",
        (true, false) => "pauses as soon as its node has written down how far it is",
        (false, true) => "goes on where it was",
        (false, false) => "does not pause",
    };
    match args.output {
        Output::Table => println!("transfer {namespace}/{name} {done}"),
        Output::Json => println!("{:#}", json!({"name": format!("{namespace}/{name}"), "suspend": suspend})),
    }
    Ok(ExitCode::SUCCESS)
}
