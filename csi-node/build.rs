//! Compiles the protocols that kubelet and the CSI sidecars speak.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["csi.proto", "pluginregistration.proto"], ["proto"])?;
    tonic_prost_build::configure().generate_default_stubs(true).compile_fds(files)?;
    Ok(())
}
