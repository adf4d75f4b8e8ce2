//! What may be asked of a node's pools, on a pool of thin devices.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_device::thin;
use berth_node::agent::pools::Pools;
use berth_node::area::Backend;
use berth_node::operation::{
    FindingKind, MapFrom, MapLine, Operation, OriginName, Outcome, PoolLine, PoolLineState, Refusal,
    VolumeKind, VolumeLine, carry_out,
};

use super::killed::write;
use super::{Bench, MIB, POOL, holder, name, pools, spec_on, switch_off};

/// A node with the pool, and nothing else.
struct Asked {
    pools: Pools,
    backend: Backend,
}

impl Asked {
    fn new(dir: &Path, bench: &Bench) -> Self {
        let asked = Self { pools: pools(dir), backend: spec_on(&bench.disk).backend };
        asked.done(&asked.create());
        asked
    }

    fn create(&self) -> Operation {
        Operation::PoolCreate { pool: name(), uid: POOL.into(), backend: self.backend.clone() }
    }

    fn run(&self, operation: &Operation) -> Result<Outcome, Refusal> {
        carry_out(&self.pools, operation)
    }

    fn done(&self, operation: &Operation) {
        assert_eq!(self.run(operation), Ok(Outcome::Done), "{operation:?}");
    }

    fn refused(&self, operation: &Operation, reason: Reason, words: &str) {
        let refusal = self.run(operation).expect_err("refused");
        assert_eq!(refusal.reason, reason, "{refusal}");
        assert!(refusal.message.contains(words), "`{refusal}` names `{words}`");
    }

    fn device(&self, n: u32, read_only: bool) -> PathBuf {
        match self.run(&attach(n, read_only)) {
            Ok(Outcome::Device(device)) => device,
            other => panic!("{other:?}"),
        }
    }

    fn volume(&self, n: u32) -> VolumeLine {
        match self.run(&Operation::VolumeList { pool: name() }) {
            Ok(Outcome::Volumes(lines)) => lines.into_iter().find(|line| line.uid == holder(n)).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

fn blank(n: u32, size: Bytes) -> Operation {
    let labels = BTreeMap::new();
    Operation::VolumeCreate { pool: name(), volume: holder(n), size, origin: None, labels }
}

fn attach(n: u32, read_only: bool) -> Operation {
    Operation::VolumeAttach { pool: name(), volume: holder(n), read_only }
}

fn detach(n: u32) -> Operation {
    Operation::VolumeDetach { pool: name(), volume: holder(n) }
}

fn destroy(n: u32) -> Operation {
    Operation::VolumeDestroy { pool: name(), volume: holder(n) }
}

#[test]
fn a_volume_is_made_attached_listed_and_destroyed() {
    let Some(bench) = Bench::new("a_volume_is_made_attached_listed_and_destroyed") else { return };
    let dir = tempfile::tempdir().unwrap();
    let asked = Asked::new(dir.path(), &bench);
    for _ in 0..2 {
        asked.done(&blank(1, Bytes::mib(16)));
    }
    let device = asked.device(1, false);
    write(&device, MIB, 7);
    let line = asked.volume(1);
    assert_eq!(
        (line.kind, line.size, line.device.as_ref()),
        (VolumeKind::Volume, Bytes::mib(16), Some(&device))
    );
    assert_eq!(line.mapped, Some(Bytes::kib(64)));
    let open = File::open(&device).unwrap();
    asked.refused(&detach(1), Reason::InUse, "process");
    asked.refused(&destroy(1), Reason::InUse, "detach it first");
    drop(open);
    asked.done(&detach(1));
    for _ in 0..2 {
        asked.done(&destroy(1));
    }
    asked.done(&Operation::PoolDestroy { pool: name(), with_contents: false });
    bench.assert_nothing_is_left();
}
