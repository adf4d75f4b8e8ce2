//! `berth-node`: stages disk images on a node, and gives volumes made of them to kubelet.

use std::process::ExitCode;

use berth_node::args::{Cli, Command};
use berth_node::{commands, run, telemetry};
use clap::Parser as _;

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    telemetry::init(cli.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = match cli.command {
        Command::Agent(args) => runtime.block_on(run::agent(*args)).map(|()| ExitCode::SUCCESS),
        Command::Template(args) => runtime.block_on(run::until_interrupted(|stop| async move {
            commands::template::run(args, &stop).await.map(|()| ExitCode::SUCCESS).map_err(Into::into)
        })),
        Command::Preflight(args) => {
            let passed = commands::preflight::run(&args)?;
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::HostConfig(args) => {
            commands::host_config::run(&args)?;
            Ok(ExitCode::SUCCESS)
        }
    };
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    outcome
}
