//! The S3 test server as a program.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use berth_testkit::s3::{AWS_MIN_PART_SIZE, S3Options, TestS3};
use clap::Parser;

/// S3 server for tests. Prints `listening http://ADDRESS` when it is ready and runs until it is killed.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Address to listen on; port 0 lets the system choose.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Directory of objects, request log and fault rules.
    #[arg(long)]
    data: PathBuf,
    /// Access key id.
    #[arg(long, default_value = "AKIATEST")]
    access_key: String,
    /// Secret key.
    #[arg(long, default_value = "SECRETTEST")]
    secret_key: String,
    /// Bucket to create if it does not exist; may be repeated.
    #[arg(long = "bucket")]
    buckets: Vec<String>,
    /// Smallest size in bytes of a part that is not the last.
    #[arg(long, default_value_t = AWS_MIN_PART_SIZE)]
    min_part_size: u64,
    /// Do not sync files: only for measuring clients.
    #[arg(long)]
    no_fsync: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "off".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let args = Args::parse();
    let options = S3Options {
        listen: args.listen,
        access_key: args.access_key,
        secret_key: args.secret_key,
        buckets: args.buckets,
        fsync: !args.no_fsync,
        min_part_size: args.min_part_size,
    };
    let server = TestS3::start_with(&args.data, options).await.context("the S3 server did not start")?;
    println!("listening {}", server.endpoint());
    std::future::pending::<()>().await;
    Ok(())
}
