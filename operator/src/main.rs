//! `berth-operator`: promises space, places work, and says why something waits.

use berth_operator::args::Args;
use clap::Parser as _;

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    #[cfg(feature = "sabotage")]
    if args.list_sabotages {
        return berth_operator::sabotage::print_all();
    }
    berth_operator::telemetry::init(args.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(berth_operator::run(args));
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    Ok(result?)
}
