//! The HTTP file server for import sources as a program.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use berth_testkit::http_source::HttpSource;
use clap::Parser;

/// HTTP file server for tests. Prints `listening http://ADDRESS` when it is ready and runs until it is killed.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Address to listen on; port 0 lets the system choose.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Directory of the files.
    #[arg(long)]
    dir: PathBuf,
    /// File for the request log.
    #[arg(long)]
    log: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let started = HttpSource::start_on(args.listen, &args.dir, &args.log).await;
    let server = started.context("the HTTP file server did not start")?;
    println!("listening {}", server.endpoint());
    std::future::pending::<()>().await;
    Ok(())
}
