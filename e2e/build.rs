//! Compiles the client side of the Container Storage Interface, from the same file as the node plugin.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=../csi-node/proto/csi.proto");
    let files = protox::compile(["csi.proto"], ["../csi-node/proto"])?;
    tonic_prost_build::configure().build_server(false).compile_fds(files)?;
    Ok(())
}
