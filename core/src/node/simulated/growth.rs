//! The kernel pool of volumes, where it has to become larger for what is promised already; volumes that are promised more.

use super::*;

#[test]
fn the_kernel_pool_of_volumes_grows_by_what_is_recorded_and_not_under_a_ledger_that_is_behind() {
    let lacks = |change: fn(&mut Node)| {
        let mut node = asked();
        node.settle().unwrap();
        let area = node.view.pools.get_mut(&PoolName::from("p")).and_then(|pool| pool.area.as_mut());
        area.expect("area").volumes_lack = Some(Bytes::mib(96));
        change(&mut node);
        let steps = plan(&node.view, Timestamp(0));
        steps.into_iter().filter(|step| !matches!(step, Step::Obey { .. })).collect::<Vec<_>>()
    };
    assert_eq!(lacks(|_| ()), [Step::GrowVolumes { pool: "p".into(), size: Bytes::mib(96) }]);
    assert_eq!(lacks(|node| revise(node, 3)), [], "behind");
    assert_eq!(lacks(|node| revise(node, 5)), [], "what is obeyed next may say less");
}

/// Sets the revision of the ledger.
fn revise(node: &mut Node, revision: u64) {
    let pool = node.view.pools.get_mut(&PoolName::from("p")).expect("there");
    pool.ledger.as_mut().expect("there").revision = revision;
}

#[test]
fn a_volume_becomes_larger_only_after_its_larger_promise_was_recorded_and_reported() {
    let mut node = asked();
    node.settle().unwrap();
    let (uid, before) = one_volume(&node);
    let larger = before.saturating_add(Bytes::mib(64));
    promise_more(&mut node, &uid, larger);
    let steps = plan(&node.view, Timestamp(0));
    let [Step::Obey { promises, .. }] = &steps[..] else { panic!("{steps:?}") };
    assert_eq!(promises.iter().map(|(uid, p)| (uid, p.charge.data)).collect::<Vec<_>>(), [(&uid, larger)]);
    node.run(&steps[0]).unwrap();
    assert_eq!(plan(&node.view, Timestamp(0)), [], "the API server does not know yet that it is obeyed");
    assert!(node.report());
    node.settle().unwrap();
    assert_eq!(one_volume(&node), (uid.clone(), larger));
    revise(&mut node, 6);
    let ledger = node.view.pools.get_mut(&PoolName::from("p")).and_then(|pool| pool.ledger.as_mut());
    ledger.expect("there").promises.get_mut(&uid).expect("there").charge.data = before;
    node.settle().unwrap();
    assert_eq!(one_volume(&node), (uid, larger), "what is promised less is not obeyed");
}

fn one_volume(node: &Node) -> (Uid, Bytes) {
    let area = node.view.pools[&PoolName::from("p")].area.as_ref().expect("open");
    let (uid, held) = area.volumes.iter().next().expect("one");
    (uid.clone(), held.size)
}

fn promise_more(node: &mut Node, uid: &Uid, data: Bytes) {
    let pool = node.view.pools.get_mut(&PoolName::from("p")).expect("there");
    let ledger = pool.ledger.as_mut().expect("there");
    ledger.revision += 1;
    ledger.promises.get_mut(uid).expect("promised").charge.data = data;
}
