//! What may be asked of a node's pools, on a pool of files: XFS where this machine can make it.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use berth_core::ids::{Digest, Lineage, PoolName, Sha256Sum, Uid};
use berth_core::reason::Reason;
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_node::agent::pools::{PoolSpec, Pools};
use berth_node::area::Backend;
use berth_node::operation::{
    FindingKind, MapFrom, MapLine, Operation, OriginName, Outcome, PoolLine, PoolLineState, Refusal,
    VolumeKind, VolumeLine, carry_out,
};
use berth_record::{Attachment, AttachmentMode, Holder, LedgerPosition, PromiseClass, PromiseEntry, tables};

const MIB: u64 = 1 << 20;

/// A node with one pool of files, and nothing else.
struct Node {
    dir: tempfile::TempDir,
    pools: Pools,
    uid: Uid,
}

fn name() -> PoolName {
    "fast".into()
}

/// The UID of the n-th volume.
fn volume(n: u32) -> Uid {
    Uid::from(format!("{n:08x}-1111-4222-8333-444455556666"))
}

fn pools(node: &str, dir: &Path) -> Pools {
    Pools::new(node.into(), dir.join("mnt"), dir)
}

impl Node {
    /// `None`, with the reason printed, where this machine cannot make an XFS image.
    fn new(test: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let uid = Uid::from(uuid::Uuid::new_v4().to_string());
        let node = Self { pools: pools("n1", dir.path()), dir, uid };
        for _ in 0..2 {
            node.done(&node.create());
        }
        if let Some(advisory) = &node.lines()[0].message {
            println!("SKIPPED {test}: {advisory}");
            return None;
        }
        Some(node)
    }

    fn backend(&self) -> Backend {
        Backend::Filesystem { path: self.dir.path().join("area"), size: Bytes::mib(512) }
    }

    fn create(&self) -> Operation {
        Operation::PoolCreate { pool: name(), uid: self.uid.clone(), backend: self.backend() }
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

    fn volumes(&self) -> BTreeMap<Uid, VolumeLine> {
        match self.run(&Operation::VolumeList { pool: name() }) {
            Ok(Outcome::Volumes(lines)) => lines.into_iter().map(|line| (line.uid.clone(), line)).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn lines(&self) -> Vec<PoolLine> {
        match self.run(&Operation::PoolList {}) {
            Ok(Outcome::Pools(lines)) => lines,
            other => panic!("{other:?}"),
        }
    }

    fn findings(&self) -> Vec<(FindingKind, String)> {
        match self.run(&Operation::PoolCheck { pool: name() }) {
            Ok(Outcome::Findings(found)) => {
                let mut found: Vec<_> = found.into_iter().map(|found| (found.kind, found.about)).collect();
                found.sort();
                found
            }
            other => panic!("{other:?}"),
        }
    }

    /// What was promised in the pool.
    fn promised(&self) -> Bytes {
        self.lines()[0].space.expect("it is open").promised
    }

    fn end(self) {
        self.done(&Operation::PoolDestroy { pool: name(), with_contents: true });
        assert_eq!(fs::read_dir(self.dir.path().join("area")).unwrap().count(), 0);
        assert_eq!(self.lines(), []);
        self.done(&Operation::PoolDestroy { pool: name(), with_contents: false });
    }
}

fn blank(n: u32, size: Bytes) -> Operation {
    let labels = BTreeMap::from([("claim".to_owned(), format!("vms/{n}"))]);
    Operation::VolumeCreate { pool: name(), volume: volume(n), size, origin: None, labels }
}

fn clone(n: u32, of: u32, size: Option<Bytes>) -> Operation {
    Operation::VolumeClone { pool: name(), volume: volume(n), source: volume(of), size }
}

fn snapshot(n: u32, of: u32) -> Operation {
    Operation::VolumeSnapshot { pool: name(), snapshot: volume(n), source: volume(of) }
}

fn attach(n: u32, read_only: bool) -> Operation {
    Operation::VolumeAttach { pool: name(), volume: volume(n), read_only }
}

fn detach(n: u32) -> Operation {
    Operation::VolumeDetach { pool: name(), volume: volume(n) }
}

fn resize(n: u32, size: Bytes) -> Operation {
    Operation::VolumeResize { pool: name(), volume: volume(n), size }
}

fn destroy(n: u32) -> Operation {
    Operation::VolumeDestroy { pool: name(), volume: volume(n) }
}

fn write(device: &Path, at: u64, byte: u8) {
    let file = OpenOptions::new().write(true).open(device).unwrap();
    file.write_all_at(&[byte; 4096], at).unwrap();
    file.sync_all().unwrap();
}

fn byte(device: &Path, at: u64) -> u8 {
    let mut byte = [0];
    File::open(device).unwrap().read_exact_at(&mut byte, at).unwrap();
    byte[0]
}

#[test]
fn a_volume_is_made_attached_listed_and_destroyed() {
    let Some(node) = Node::new("a_volume_is_made_attached_listed_and_destroyed") else { return };
    for _ in 0..2 {
        node.done(&blank(1, Bytes::mib(16)));
    }
    node.refused(&blank(1, Bytes::mib(17)), Reason::AlreadyDifferent, "as a volume of 16 MiB");
    node.refused(&blank(2, Bytes(513)), Reason::InvalidSpec, "multiple of 512");
    node.refused(&attach(9, false), Reason::VolumeNotFound, &volume(9).to_string());
    let device = node.device(1, false);
    assert_eq!(node.device(1, false), device, "asked again");
    write(&device, MIB, 7);
    let line = &node.volumes()[&volume(1)];
    assert_eq!((line.kind, line.size), (VolumeKind::Volume, Bytes::mib(16)));
    assert_eq!((line.device.as_ref(), line.labels["claim"].as_str()), (Some(&device), "vms/1"));
    assert!(line.mapped.is_some_and(|mapped| mapped >= Bytes::kib(4) && mapped < Bytes::mib(1)));

    node.refused(&attach(1, true), Reason::InUse, "for writing");
    node.refused(&destroy(1), Reason::InUse, device.to_str().unwrap());
    let open = File::open(&device).unwrap();
    node.refused(&detach(1), Reason::InUse, "process");
    node.refused(&Operation::PoolForget { pool: name() }, Reason::InUse, &volume(1).to_string());
    drop(open);
    for _ in 0..2 {
        node.done(&detach(1));
    }
    let read_only = node.device(1, true);
    assert_eq!(byte(&read_only, MIB), 7);
    OpenOptions::new().write(true).open(&read_only).and_then(|file| file.write_all_at(&[1], 0)).unwrap_err();
    node.done(&detach(1));
    assert_eq!(node.promised(), Bytes::mib(16));
    for _ in 0..2 {
        node.done(&destroy(1));
    }
    assert_eq!((node.volumes().len(), node.promised()), (0, Bytes::ZERO));
    assert_eq!(node.findings(), []);
    node.end();
}
