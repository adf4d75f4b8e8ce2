//! `kubectl berth`: what Berth promises, what waits, and whether anything is not as it must be.

mod args;
mod check;
mod connect;
#[cfg(test)]
mod fixture;
mod observe;
mod status;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Args, Command};

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = connect::client(args.kubeconfig.as_deref(), args.context.as_deref()).await?;
        match &args.command {
            Command::Check(check) => check::run(&client, &args.limits(), check).await,
            Command::Status(status) => status::run(&client, &args.limits(), status).await,
        }
    })
}
