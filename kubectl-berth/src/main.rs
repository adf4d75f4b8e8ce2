//! `kubectl berth`: what Berth promises, what waits, and whether anything is not as it must be.

mod args;
mod check;
mod connect;
mod doctor;
mod drain;
mod explain;
mod fit;
#[cfg(test)]
mod fixture;
mod observe;
mod pages;
mod pods;
mod release;
mod renew;
mod reserve;
mod retry;
mod server;
mod status;
mod text;
mod transfer;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Args, ClusterCommand, Command, PagesCommand};

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
    match &args.command {
        Command::Pages(PagesCommand::Man(man)) => {
            pages::man(&man.dir)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Pages(PagesCommand::Completions(of)) => print(&pages::completions(of.shell)),
        Command::Pages(PagesCommand::Complete(asked)) => print(&pages::complete(&asked.words)),
        Command::Cluster(command) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(ask(args, command))
        }
    }
}

fn print(text: &str) -> anyhow::Result<ExitCode> {
    std::io::Write::write_all(&mut std::io::stdout().lock(), text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

async fn ask(args: &Args, command: &ClusterCommand) -> anyhow::Result<ExitCode> {
    let client = connect::client(args.kubeconfig.as_deref(), args.context.as_deref()).await?;
    let scope = args.limits();
    match command {
        ClusterCommand::Check(check) => check::run(&client, &scope, check).await,
        ClusterCommand::Status(status) => status::run(&client, &scope, status).await,
        ClusterCommand::Explain(explain) => explain::run(&client, &scope, explain).await,
        ClusterCommand::Fit(fit) => fit::run(&client, &scope, fit).await,
        ClusterCommand::Reserve(reserve) => reserve::run(&client, reserve).await,
        ClusterCommand::Release(release) => release::run(&client, release).await,
        ClusterCommand::Renew(renew) => renew::run(&client, &scope, renew).await,
        ClusterCommand::Retry(retry) => retry::run(&client, &scope, retry).await,
        ClusterCommand::Transfer(transfer) => transfer::run(&client, transfer).await,
        ClusterCommand::Drain(drain) => drain::drain(&client, &scope, drain).await,
        ClusterCommand::Cordon(cordon) => drain::cordon(&client, cordon).await,
        ClusterCommand::Uncordon(uncordon) => drain::uncordon(&client, uncordon).await,
        ClusterCommand::Doctor(doctor) => doctor::run(&client, &scope, doctor).await,
    }
}
