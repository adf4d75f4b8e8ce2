//! `berth-node`: stages disk images on a node, and gives volumes made of them to kubelet.

use std::process::ExitCode;

use berth_node::args::{Cli, Command};
use berth_node::commands::template::{TemplateArgs, TemplateCommand};
use berth_node::commands::{
    asking, batch, file, host_config, pages, preflight, serve_store, template, transfer,
};
use berth_node::{run, telemetry};
use clap::Parser as _;

fn main() -> anyhow::Result<ExitCode> {
    // Before there is a second thread.
    berth_device::memory::give_large_buffers_back();
    let cli = Cli::parse();
    let agent = matches!(cli.command, Command::Agent(_));
    telemetry::init(cli.log_format, if agent { "info,kube=warn" } else { "warn" });
    let done = |()| ExitCode::SUCCESS;
    match cli.command {
        Command::Agent(args) => on_runtime(run::agent(*args)).map(done),
        Command::Supervise(args) => {
            on_runtime(run::until_interrupted(|stop| run::supervise(args, stop))).map(done)
        }
        Command::ServeStore(args) => on_runtime(run::until_interrupted(|stop| async move {
            Ok(serve_store::run(&args, &stop).await.map(done)?)
        })),
        Command::Pool(args) => Ok(asking::run(&args.node, &args.command.asking())?),
        Command::Volume(args) => Ok(asking::run(&args.node, &args.command.asking())?),
        Command::Template(TemplateArgs { command }) => match command {
            TemplateCommand::Import(args) => on_runtime(run::until_interrupted(|stop| async move {
                Ok(template::import::run(&args, &stop).await.map(done)?)
            })),
            TemplateCommand::Serve(args) => on_runtime(run::until_interrupted(|stop| async move {
                Ok(template::serve::run(&args, &stop).await.map(done)?)
            })),
            TemplateCommand::Attach(args) => Ok(asking::run(&args.node.clone(), &args.asking())?),
            TemplateCommand::Detach(args) => Ok(asking::run(&args.node.clone(), &args.asking())?),
        },
        Command::File(args) => {
            on_runtime(run::until_interrupted(
                |stop| async move { Ok(file::run(&args, &stop).await.map(done)?) },
            ))
        }
        Command::Transfer(args) => on_runtime(run::until_interrupted(|stop| async move {
            Ok(transfer::run(&args, &stop).await.map(done)?)
        })),
        Command::Batch(args) => Ok(batch::run(&args)?),
        Command::Preflight(args) => {
            let passed = preflight::run(&args)?;
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::HostConfig(args) => Ok(host_config::run(&args).map(done)?),
        Command::Man(args) => Ok(pages::man(&args.dir).map(done)?),
        Command::Completions(args) => Ok(pages::completions(args.shell).map(done)?),
    }
}

/// Runs to the end; what still runs beside it then has two seconds.
fn on_runtime<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    outcome
}
