//! What may be asked of a node's pools, on a pool of files: XFS where this machine can make it.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use berth_core::ids::{Digest, PoolName, Sha256Sum, Uid};
use berth_core::reason::Reason;
use berth_core::units::{Bytes, Timestamp};
use berth_node::agent::pools::Pools;
use berth_node::area::Backend;
use berth_node::operation::{
    FindingKind, MapFrom, MapLine, Operation, OriginName, Outcome, PoolLine, PoolLineState, Refusal,
    VolumeKind, VolumeLine, carry_out,
};
use berth_record::{ChangeError, TemplateEntry, TemplateState, VolumeState, tables};

mod pools;

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

#[test]
fn copies_are_what_their_source_was_and_outlive_it() {
    let Some(node) = Node::new("copies_are_what_their_source_was_and_outlive_it") else { return };
    node.done(&blank(1, Bytes::mib(8)));
    let device = node.device(1, false);
    write(&device, 0, 1);
    let open = OpenOptions::new().write(true).open(&device).unwrap();
    open.write_all_at(&[2; 4096], MIB).unwrap(); // not written out, nor by being closed
    for _ in 0..2 {
        node.done(&snapshot(2, 1));
        node.done(&clone(3, 1, Some(Bytes::mib(16))));
    }
    drop(open);
    write(&device, 0, 9);
    let kept = node.device(2, true);
    assert_eq!((byte(&kept, 0), byte(&kept, MIB)), (1, 2), "as it was, with what was under way");
    let copy = node.device(3, false);
    assert_eq!((byte(&copy, 0), byte(&copy, MIB), byte(&copy, 15 * MIB)), (1, 2, 0));
    write(&copy, 0, 3);
    assert_eq!((byte(&device, 0), byte(&kept, 0)), (9, 1));
    let kinds: Vec<_> = node.volumes().into_values().map(|line| (line.kind, line.size)).collect();
    let (small, large) = (Bytes::mib(8), Bytes::mib(16));
    assert_eq!(
        kinds,
        [(VolumeKind::Volume, small), (VolumeKind::Snapshot, small), (VolumeKind::Volume, large)]
    );

    node.refused(&attach(2, false), Reason::IsSnapshot, "attached for writing");
    node.refused(&resize(2, large), Reason::IsSnapshot, "made larger");
    node.refused(&clone(4, 1, Some(Bytes::mib(4))), Reason::InvalidSpec, "has 8 MiB");
    node.refused(&clone(4, 7, None), Reason::VolumeNotFound, &volume(7).to_string());
    node.refused(&snapshot(3, 1), Reason::AlreadyDifferent, "as a volume of 16 MiB made from");
    node.done(&detach(1));
    node.done(&destroy(1));
    node.done(&clone(3, 1, Some(large)));
    node.done(&clone(5, 2, None));
    assert_eq!(byte(&node.device(5, false), MIB), 2, "a snapshot has a copy too, without its source");
    for n in [2, 3, 5] {
        node.done(&detach(n));
        node.done(&destroy(n));
    }
    assert_eq!((node.promised(), node.findings()), (Bytes::ZERO, vec![]));
    node.end();
}

#[test]
fn a_source_stays_while_it_is_copied_and_what_was_cut_off_is_repeated() {
    let test = "a_source_stays_while_it_is_copied_and_what_was_cut_off_is_repeated";
    let Some(node) = Node::new(test) else { return };
    node.done(&blank(1, Bytes::mib(8)));
    node.done(&snapshot(2, 1));
    // As if it had been cut off before its end.
    let pool = node.pools.get(&name()).unwrap();
    let begun = |n: u32| {
        pool.record.record().commit(|change| -> Result<(), ChangeError> {
            let mut entry = change.require(tables::VOLUMES, &volume(n))?;
            entry.state = VolumeState::Creating;
            change.put(tables::VOLUMES, &volume(n), &entry)
        })
    };
    begun(2).unwrap();
    node.refused(&destroy(1), Reason::InUse, "being copied");
    node.refused(&attach(2, true), Reason::InUse, "half made");
    node.done(&snapshot(2, 1));
    node.done(&destroy(1));
    assert_eq!(node.volumes().len(), 1);
    node.done(&blank(3, Bytes::mib(8)));
    begun(3).unwrap();
    node.done(&destroy(3));
    drop(pool);
    node.end();
}

#[test]
fn a_volume_grows_while_it_is_attached_and_after_a_kill_in_between() {
    let test = "a_volume_grows_while_it_is_attached_and_after_a_kill_in_between";
    let Some(mut node) = Node::new(test) else { return };
    node.done(&blank(1, Bytes::mib(8)));
    let device = node.device(1, false);
    let size = || File::open(&device).unwrap().seek(SeekFrom::End(0)).unwrap();
    for _ in 0..2 {
        node.done(&resize(1, Bytes::mib(16)));
        assert_eq!((size(), node.promised()), (16 * MIB, Bytes::mib(16)));
    }
    node.refused(&resize(1, Bytes::mib(8)), Reason::InvalidSpec, "no volume is made smaller");
    node.refused(&resize(1, Bytes::gib(1)), Reason::CapacityRefused, "bytes");
    assert_eq!((size(), node.promised()), (16 * MIB, Bytes::mib(16)), "nothing is half done");

    let pool = node.pools.get(&name()).unwrap();
    pool.record.volume_resized(&volume(1), Bytes::mib(24)).unwrap();
    assert_eq!(node.findings(), [(FindingKind::Different, format!("volume {}", volume(1)))]);
    drop(pool);
    node.pools = pools("n1", node.dir.path());
    node.pools.reopen_known().unwrap();
    assert_eq!((size(), node.findings()), (24 * MIB, vec![]), "what was recorded is completed at the start");
    node.done(&detach(1));
    node.end();
}

#[test]
fn a_map_tells_every_byte_and_a_volume_starts_as_its_image() {
    let test = "a_map_tells_every_byte_and_a_volume_starts_as_its_image";
    let Some(node) = Node::new(test) else { return };
    let digest = Digest(Sha256Sum::of(b"index"));
    let from_image = |n: u32, size| Operation::VolumeCreate {
        pool: name(),
        volume: volume(n),
        size,
        origin: Some(OriginName::Image(digest)),
        labels: BTreeMap::new(),
    };
    node.refused(&from_image(1, Bytes::mib(4)), Reason::VolumeNotFound, "is not staged");
    let pool = node.pools.get(&name()).unwrap();
    let file = File::create(pool.area.image(&digest)).unwrap();
    file.write_all_at(&vec![5; 1 << 16], MIB).unwrap();
    file.set_len(2 * MIB).unwrap();
    let image = Uid::from("img");
    pool.record.begin_fill(&digest, &image, Bytes::mib(2), Bytes::mib(1), Timestamp(1)).unwrap();
    pool.record.fill_complete(&digest, &image).unwrap();
    drop(pool);
    let destroy = Operation::PoolDestroy { pool: name(), with_contents: true };
    node.refused(&destroy, Reason::InUse, "is in use");
    node.refused(&Operation::PoolForget { pool: name() }, Reason::InUse, "is in use");
    assert!(fs::read_to_string(node.dir.path().join("pools.json")).unwrap().contains("fast"));
    assert_eq!(node.lines()[0].state, PoolLineState::Open, "somebody has the image open: it is served on");
    drop(file);
    node.refused(&from_image(1, Bytes::mib(1)), Reason::InvalidSpec, "has 2 MiB");
    node.done(&from_image(1, Bytes::mib(4)));
    node.done(&snapshot(2, 1));
    assert_eq!(node.volumes()[&volume(2)].origin, Some(OriginName::Image(digest)));
    write(&node.device(1, false), 3 * MIB, 6);
    let line = |offset, length, from| MapLine { offset: Bytes(offset), length: Bytes(length), from };
    let map =
        |n: u32| node.run(&Operation::VolumeMap { pool: name(), volume: volume(n), offset: Bytes::ZERO });
    let (own, zero) = (MapFrom::Own, MapFrom::Zero);
    let wanted = vec![
        line(0, MIB, zero),
        line(MIB, 1 << 16, own),
        line(MIB + (1 << 16), 2 * MIB - (1 << 16), zero),
        line(3 * MIB, 4096, own),
        line(3 * MIB + 4096, MIB - 4096, zero),
    ];
    assert_eq!(map(1), Ok(Outcome::Map(wanted)));
    compares(&node);
    node.end();
}

/// Volume 1, which is attached and was written at 3 MiB since its snapshot 2.
fn compares(node: &Node) {
    let line = |offset, length, from| MapLine { offset: Bytes(offset), length: Bytes(length), from };
    let delta = |old: u32, new: u32, offset: u64| Operation::VolumeDelta {
        pool: name(),
        old: volume(old),
        volume: volume(new),
        offset: Bytes(offset),
    };
    let (own, zero, same) = (MapFrom::Own, MapFrom::Zero, MapFrom::Same);
    let written = line(3 * MIB, 4096, own);
    let after = line(3 * MIB + 4096, MIB - 4096, same);
    let wanted = vec![line(0, 3 * MIB, same), written, after];
    assert_eq!(node.run(&delta(2, 1, 0)), Ok(Outcome::Map(wanted)));
    assert_eq!(node.run(&delta(2, 1, 3 * MIB)), Ok(Outcome::Map(vec![written, after])), "from there on");
    assert_eq!(node.run(&delta(2, 1, 4 * MIB)), Ok(Outcome::Map(Vec::new())));
    node.refused(&delta(1, 2, 0), Reason::InUse, "compare with a snapshot");
    node.refused(&delta(2, 9, 0), Reason::VolumeNotFound, "has no volume");
    node.done(&detach(1));
    assert_eq!(
        node.run(&delta(1, 2, 0)),
        Ok(Outcome::Map(vec![line(0, 3 * MIB, same), line(3 * MIB, 4096, zero), after])),
        "what the older one has and this one has not reads as zeros"
    );
    let pool = node.pools.get(&name()).unwrap();
    let path = pool.area.volume(&volume(1));
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    berth_device::files::punch_hole(&file, &path, Bytes(MIB), Bytes(1 << 16)).unwrap();
    drop(file);
    node.done(&Operation::VolumeResize { pool: name(), volume: volume(1), size: Bytes::mib(5) });
    let wanted = vec![
        line(0, MIB, same),
        line(MIB, 1 << 16, zero),
        line(MIB + (1 << 16), 2 * MIB - (1 << 16), same),
        written,
        after,
        line(4 * MIB, MIB, zero),
    ];
    assert_eq!(node.run(&delta(2, 1, 0)), Ok(Outcome::Map(wanted)), "given back, and made larger");
}

#[test]
fn a_template_is_only_read() {
    let Some(node) = Node::new("a_template_is_only_read") else { return };
    let pool = node.pools.get(&name()).unwrap();
    let entry = TemplateEntry {
        file: "/images/debian.qcow2".into(),
        format: "qcow2".to_owned(),
        virtual_size: Bytes::mib(4),
        state: TemplateState::Attached,
    };
    let record = pool.record.record();
    record.commit(|change| change.put(tables::TEMPLATES, &volume(1), &entry)).unwrap();
    for operation in [
        attach(1, false),
        detach(1),
        destroy(1),
        resize(1, Bytes::mib(8)),
        clone(2, 1, None),
        snapshot(2, 1),
        blank(1, Bytes::mib(8)),
    ] {
        node.refused(&operation, Reason::IsTemplate, "is a template");
    }
    assert_eq!(node.volumes()[&volume(1)].kind, VolumeKind::Template);
    node.refused(&Operation::PoolForget { pool: name() }, Reason::InUse, "template");
    record.commit(|change| change.remove(tables::TEMPLATES, &volume(1)).map(drop)).unwrap();
    drop(pool);
    node.end();
}
