//! Builds every program that the end-to-end tests run and that the machine does not have; prints their paths.

use berth_e2e::tools::Tool;

fn main() -> anyhow::Result<()> {
    for tool in Tool::ALL {
        println!("{tool}: {}", tool.obtain()?.display());
    }
    Ok(())
}
