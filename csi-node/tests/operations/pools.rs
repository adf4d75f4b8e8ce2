//! Pools as a whole: what they may give, how they come, change hands and go.

use std::fs::{self, OpenOptions};
use std::sync::Arc;

use berth_core::ids::{Lineage, Uid};
use berth_core::ledger::Class;
use berth_core::reason::Reason;
use berth_core::units::{Bytes, Generation};
use berth_node::agent::pools::{OpenPool, PoolSpec, Pools};
use berth_node::area::Backend;
use berth_node::operation::{FindingKind, Operation, Outcome, PoolLineState, carry_out};
use berth_record::{Holder, LedgerPosition, PromiseClass, PromiseEntry, tables};

use super::{
    MIB, Node, attach, blank, byte, clone, destroy, detach, name, pools, resize, snapshot, volume, write,
};

fn promise(uid: &Uid, data: Bytes) -> PromiseEntry {
    PromiseEntry {
        generation: Generation(3),
        class: PromiseClass::Volumes,
        data,
        metadata: Bytes::ZERO,
        holder: Holder { kind: "StagingReservation".into(), namespace: "vms".into(), name: uid.to_string() },
        obeyed: true,
        released: false,
    }
}

#[test]
fn a_pool_of_a_cluster_gives_only_what_its_ledger_promised() {
    let test = "a_pool_of_a_cluster_gives_only_what_its_ledger_promised";
    let Some(node) = Node::new(test) else { return };
    node.refused(&blank(1, Bytes::gib(1)), Reason::CapacityRefused, "lacks");
    node.done(&blank(9, Bytes::mib(4)));
    let pool = node.pools.get(&name()).unwrap();
    let position =
        LedgerPosition { lineage: Some(Lineage::from("l")), obeyed_revision: 1, ..LedgerPosition::default() };
    pool.obey(&position, &[(volume(1), promise(&volume(1), Bytes::mib(8)))]).unwrap();
    node.refused(&blank(2, Bytes::mib(4)), Reason::NotPromised, "promised it nothing");
    node.refused(&snapshot(2, 9), Reason::NotPromised, "needs 4 MiB");
    node.refused(&clone(2, 9, None), Reason::NotPromised, "needs 4 MiB");
    node.refused(&blank(1, Bytes::mib(12)), Reason::NotPromised, "needs 12 MiB");
    assert_eq!(node.volumes().len(), 1, "nothing was begun");
    node.done(&blank(1, Bytes::mib(4)));
    node.done(&resize(1, Bytes::mib(8)));
    node.refused(&resize(1, Bytes::mib(9)), Reason::NotPromised, "promised it 8 MiB");
    node.refused(&destroy(1), Reason::InUse, "StagingReservation vms/");
    assert_eq!(node.volumes()[&volume(1)].size, Bytes::mib(8));
    node.refused(
        &Operation::PoolGrow { pool: name(), class: Class::Volumes, size: Bytes::mib(64) },
        Reason::InvalidSpec,
        "no kernel pools",
    );
    drop(pool);
    node.end();
}

#[test]
fn a_check_finds_what_is_lost_and_what_is_left_over() {
    let Some(node) = Node::new("a_check_finds_what_is_lost_and_what_is_left_over") else { return };
    for n in 1..=2 {
        node.done(&blank(n, Bytes::mib(8)));
    }
    assert_eq!(node.findings(), []);
    let pool = node.pools.get(&name()).unwrap();
    let stray = pool.area.volume(&volume(3));
    fs::write(&stray, "x").unwrap();
    fs::remove_file(pool.area.volume(&volume(1))).unwrap();
    OpenOptions::new().write(true).open(pool.area.volume(&volume(2))).unwrap().set_len(MIB).unwrap();
    drop(pool);
    assert_eq!(
        node.findings(),
        [
            (FindingKind::Leaked, stray.display().to_string()),
            (FindingKind::Missing, format!("volume {}", volume(1))),
            (FindingKind::Different, format!("volume {}", volume(2))),
        ]
    );
    node.refused(&attach(1, false), Reason::VolumeLost, "is gone");
    node.end();
}

#[test]
fn a_pool_is_forgotten_found_and_introduced_again() {
    let test = "a_pool_is_forgotten_found_and_introduced_again";
    let Some(node) = Node::new(test) else { return };
    node.done(&blank(1, Bytes::mib(8)));
    write(&node.device(1, false), 0, 7);
    node.done(&detach(1));
    let forget = Operation::PoolForget { pool: name() };
    let held = node.pools.get(&name()).unwrap();
    node.refused(&forget, Reason::InUse, "a call or a job");
    drop(held);
    assert_eq!(node.lines()[0].state, PoolLineState::Open, "a busy one stays");
    assert!(fs::read_to_string(node.dir.path().join("pools.json")).unwrap().contains("fast"));
    for _ in 0..2 {
        node.done(&forget);
    }
    let found = node.lines().remove(0);
    assert_eq!((found.state, &found.pool, &found.area), (PoolLineState::Found, &None, &node.uid));
    assert_eq!(found.message.as_deref(), Some("was pool fast of node n1"));
    node.refused(&Operation::VolumeList { pool: name() }, Reason::PoolNotFound, "fast");

    let introduce = |area: &Uid| Operation::PoolIntroduce {
        pool: "other".into(),
        area: area.clone(),
        uid: None,
        backend: found.backend.clone().unwrap(),
    };
    node.refused(&introduce(&volume(1)), Reason::InUseByPool, "belongs to pool");
    for _ in 0..2 {
        node.done(&introduce(&node.uid));
    }
    let taken =
        Operation::PoolIntroduce { pool: name(), area: node.uid.clone(), uid: None, backend: node.backend() };
    node.refused(&taken, Reason::InUseByPool, "other");
    let attach = Operation::VolumeAttach { pool: "other".into(), volume: volume(1), read_only: true };
    let Ok(Outcome::Device(device)) = node.run(&attach) else { panic!("attached") };
    assert_eq!(byte(&device, 0), 7);
    node.done(&Operation::VolumeDetach { pool: "other".into(), volume: volume(1) });
    let destroy = |with_contents| Operation::PoolDestroy { pool: "other".into(), with_contents };
    node.refused(&destroy(false), Reason::InUse, "1 volumes and snapshots, 0 images");
    node.done(&destroy(true));
    node.end();
}

#[test]
fn an_area_is_served_on_another_machine_and_for_a_pool_made_anew() {
    let test = "an_area_is_served_on_another_machine_and_for_a_pool_made_anew";
    let Some(node) = Node::new(test) else { return };
    node.done(&blank(1, Bytes::mib(8)));
    let device = node.device(1, false);
    write(&device, 0, 7);
    let pool = node.pools.get(&name()).unwrap();
    let (lineage, uid) = (
        LedgerPosition { lineage: Some("l".into()), obeyed_revision: 4, ..LedgerPosition::default() },
        volume(2),
    );
    pool.obey(&lineage, &[(uid.clone(), promise(&uid, Bytes::mib(8)))]).unwrap();
    pool.area.detach(&volume(1)).unwrap(); // the machine is gone; its record says that it is attached
    drop(pool);
    let Node { dir, pools: first, uid: area } = node;
    let backend = Backend::Filesystem { path: dir.path().join("area"), size: Bytes::mib(512) };
    let open = first.get(&name()).unwrap();
    drop(first);
    let OpenPool { area: opened, record, .. } = Arc::into_inner(open).unwrap();
    drop(record);
    opened.close().unwrap();

    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let second = pools("n2", &elsewhere);
    let new = Uid::from(uuid::Uuid::new_v4().to_string());
    let introduce = |uid: Option<&Uid>| {
        let (area, backend) = (area.clone(), backend.clone());
        carry_out(&second, &Operation::PoolIntroduce { pool: name(), area, uid: uid.cloned(), backend })
    };
    let as_new = PoolSpec::new(new.clone(), backend.clone());
    second.prepare(&name(), &as_new).expect_err("it is not the new pool's yet");
    for _ in 0..2 {
        assert_eq!(introduce(None), Ok(Outcome::Done), "on another machine");
    }
    assert_eq!(introduce(Some(&new)), Ok(Outcome::Done), "under another UID, while it is open");
    drop(second);
    let old = Pools::new("n2".into(), elsewhere.join("mnt"), dir.path());
    let refused = old.prepare(&"fast".into(), &PoolSpec::new(area.clone(), backend)).unwrap_err();
    assert_eq!(refused.reason(), Reason::InUseByPool, "nor its old owner's any more: {refused}");
    let third = pools("n2", &elsewhere);
    third.prepare(&name(), &as_new).unwrap(); // as the agent does for the new StagingPool
    let pool = third.get(&name()).unwrap();
    assert_eq!((pool.spec.uid.clone(), pool.spec.area()), (new, &area));
    let (position, promises) = pool.promises().unwrap();
    assert_eq!((position, promises.len()), (lineage, 2), "what was promised is known");
    assert_eq!(pool.record.record().entries(tables::ATTACHMENTS).unwrap(), [], "nothing is attached here");
    drop(pool);
    let attached = carry_out(&third, &attach(1, true));
    let Ok(Outcome::Device(device)) = attached else { panic!("{attached:?}") };
    assert_eq!(byte(&device, 0), 7);
    assert_eq!(carry_out(&third, &detach(1)), Ok(Outcome::Done));
    let destroy = Operation::PoolDestroy { pool: name(), with_contents: true };
    assert_eq!(carry_out(&third, &destroy), Ok(Outcome::Done));
    assert_eq!(fs::read_dir(dir.path().join("area")).unwrap().count(), 0);
}

#[test]
fn a_deletion_that_was_cut_off_is_ended_and_nothing_is_made_anew() {
    let test = "a_deletion_that_was_cut_off_is_ended_and_nothing_is_made_anew";
    let Some(mut node) = Node::new(test) else { return };
    node.done(&blank(1, Bytes::mib(8)));
    let known = node.dir.path().join("pools.json");
    let mut text: serde_json::Value = serde_json::from_slice(&fs::read(&known).unwrap()).unwrap();
    text["fast"]["destroying"] = true.into();
    fs::write(&known, text.to_string()).unwrap();
    node.pools = pools("n1", node.dir.path());
    node.pools.reopen_known().unwrap();
    assert_eq!(node.lines()[0].state, PoolLineState::Failed, "it is not opened");
    node.refused(&node.create(), Reason::InUse, "being destroyed");
    fs::remove_file(node.dir.path().join("area/berth-pool.xfs")).unwrap();
    node.end();
}

#[test]
fn what_is_there_under_another_uid_is_introduced_and_never_made_anew() {
    let test = "what_is_there_under_another_uid_is_introduced_and_never_made_anew";
    let Some(node) = Node::new(test) else { return };
    node.done(&blank(1, Bytes::mib(8)));
    let new = Uid::from(uuid::Uuid::new_v4().to_string());
    let Node { dir, pools: first, uid: area } = node;
    let backend = Backend::Filesystem { path: dir.path().join("area"), size: Bytes::mib(512) };
    // A takeover that was cut off: the record has the new owner, the list of pools the old one.
    let open = first.get(&name()).unwrap();
    drop(first);
    let OpenPool { area: opened, mut record, .. } = Arc::into_inner(open).unwrap();
    record.give_to(&new, &name(), &"n1".into(), None).unwrap();
    drop(record);
    opened.close().unwrap();

    let second = pools("n1", dir.path());
    second.reopen_known().unwrap();
    assert!(second.get(&name()).is_none(), "it is not its old owner's any more");
    let as_new = PoolSpec::new(new.clone(), backend.clone());
    let refused = second.prepare(&name(), &as_new).unwrap_err();
    assert_eq!(refused.reason(), Reason::AlreadyDifferent, "{refused}");
    let introduce = Operation::PoolIntroduce { pool: name(), area: area.clone(), uid: Some(new), backend };
    for _ in 0..2 {
        assert_eq!(carry_out(&second, &introduce), Ok(Outcome::Done), "the takeover, repeated");
    }
    drop(second);
    let third = pools("n1", dir.path());
    third.prepare(&name(), &as_new).unwrap();
    let pool = third.get(&name()).unwrap();
    assert!(pool.area.has_volume(&volume(1)), "with what it held");
    drop(pool);
    let destroy = Operation::PoolDestroy { pool: name(), with_contents: true };
    assert_eq!(carry_out(&third, &destroy), Ok(Outcome::Done));
}
