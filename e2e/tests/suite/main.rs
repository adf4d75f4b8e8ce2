//! The end-to-end suite: one program, so that its trials share a runtime and the programs they run.
//!
//! A file here is a list of [`scenario::Scenario`]s; adding one means a `mod` line and a line in [`scenarios`].
//! What the machine cannot run is reported as ignored, with the reason.

mod bad_input;
mod books;
mod chart;
mod cluster;
mod data_plane;
mod files;
mod full_area;
mod growth;
mod kernel;
mod kubectl;
mod manifests;
mod memory;
mod minio;
mod operator;
mod outage;
mod process;
mod references;
mod remains;
mod rights;
mod round_trip;
mod safety;
mod sanity;
mod scale;
mod scenario;
mod scene;
mod thin_cluster;
mod thin_lazy;
mod transfers;
mod volume;
mod zone;

use std::process::ExitCode;

use libtest_mimic::Arguments;

use crate::scenario::Scenario;

/// How many scenarios run at once that run beside each other.
const AT_ONCE: usize = 4;

/// Every scenario of the suite. Those that run beside each other stand together, so that no other one waits between them.
fn scenarios() -> Vec<Scenario> {
    let beside = [
        scale::scenarios(),
        operator::scenarios(),
        kubectl::scenarios(),
        manifests::scenarios(),
        rights::scenarios(),
        cluster::scenarios(),
    ];
    let alone = [
        process::scenarios(),
        chart::scenarios(),
        minio::scenarios(),
        volume::scenarios(),
        thin_cluster::scenarios(),
        thin_lazy::scenarios(),
        sanity::scenarios(),
        files::scenarios(),
        transfers::scenarios(),
        references::scenarios(),
        bad_input::scenarios(),
        full_area::scenarios(),
        growth::scenarios(),
        outage::scenarios(),
        memory::scenarios(),
        kernel::scenarios(),
        data_plane::scenarios(),
        zone::scenarios(),
        safety::scenarios(),
    ];
    let beside = beside.into_iter().flatten().map(Scenario::beside);
    beside.chain(alone.into_iter().flatten()).collect()
}

fn main() -> ExitCode {
    if let Some(code) = process::play_parent().or_else(kernel::play_owner) {
        return code;
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_ONCE);
    libtest_mimic::run(&arguments, scenarios().into_iter().map(Scenario::into_trial).collect()).exit_code()
}
