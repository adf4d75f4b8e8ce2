//! Pools: their ledgers, what they hold, and promises whose holders are gone.

mod health;

use std::collections::BTreeSet;

use self::health::{health, overcommitted};
use crate::budget::{Area, Sums};
use crate::change::{Change, PoolReport};
use crate::ids::{NodeName, PoolName, Uid};
use crate::ledger::{Class, Holder, Promise};
use crate::overcommit::{Overcommit, Percent};
use crate::reason::Reason;
use crate::reservation::is_waiting;
use crate::thin::{self, StopReason, Stopped, ThinState};
use crate::units::{Bytes, Timestamp};
use crate::view::{LedgerCapacity, LedgerView, NodePoolState, PoolView, View};
use crate::{drain, lost, rebuild, reclaim, retire};

/// What is said of a node whose report is about another kind of area than the pool's.
pub(crate) const OTHER_AREA: &str = "its report is not about an area of this pool's backend";
/// How many promises of holders that are gone are taken away in one write.
const SWEPT_AT_ONCE: usize = 32;

/// The next steps for the pool with this name.
pub fn decide(view: &View, name: &PoolName, now: Timestamp) -> Vec<Change> {
    let Some(pool) = view.pools.get(name) else { return Vec::new() };
    let mut changes = vec![Change::ReportPool { name: name.clone(), report: report(view, pool) }];
    if pool.deleting {
        changes.extend(drain::end(view, pool));
    }
    if pool.invalid.is_some() && !pool.deleting {
        return changes;
    }
    if !pool.deleting && !pool.has_finalizer {
        changes.push(Change::GuardPool { name: name.clone(), uid: pool.uid.clone() });
        return changes;
    }
    changes.extend(missing_ledgers(view, pool));
    let one = |change| vec![change];
    let write = rebuild::first(view, pool).or_else(|| resized(view, pool)).map(one);
    let write = write.or_else(|| swept(view, pool));
    changes.extend(write.unwrap_or_else(|| reclaim::decide(view, pool, now)));
    changes
}

impl PoolView {
    /// What may be promised on a node that reports this. In a directory images and volumes share the bytes, and there is no
    /// other metadata; of kernel pools see [`thin::capacity`]. `None` if it reports another kind of area.
    pub fn capacity(&self, report: &NodePoolState) -> Option<LedgerCapacity> {
        let whole = match (self.block, &report.thin) {
            (None, None) => LedgerCapacity::shared(report.total),
            (Some(block), Some(state)) => thin::capacity(report.total, block, state),
            (None, Some(_)) | (Some(_), None) => return None,
        };
        let percent = self.block.map_or(Percent::WHOLE, |_| self.overcommit);
        let policy = Overcommit { percent, attain: Bytes::ZERO };
        let whole = LedgerCapacity { overcommit: policy, ..whole };
        Some(self.limit.map_or(whole, |limit| whole.at_most(limit)))
    }
}

/// True if its numbers may be a ledger's capacity. Of a kernel pool that has failed the kernel tells none.
fn is_measured(report: &NodePoolState) -> bool {
    let failed = |state: &ThinState| stopped(state).any(|stopped| stopped.why == StopReason::Failed);
    report.usable && !report.thin.as_ref().is_some_and(failed)
}

/// What the ledger's capacity has to become by this report. A class may get more only by a report that is made after the
/// node has seen the present ledger: an older one does not know what the other class's kernel pool has grown to since.
fn wanted(pool: &PoolView, ledger: &LedgerView, report: &NodePoolState) -> Option<LedgerCapacity> {
    let reported = pool.capacity(report)?;
    let present =
        report.lineage.as_ref() == Some(&ledger.lineage) && report.obeyed_revision >= ledger.revision;
    let mut trusted =
        if report.thin.is_none() || present { reported } else { ledger.capacity.lowered_to(&reported) };
    if let Some(state) = report.thin.as_ref().filter(|_| trusted.overcommit.is_over()) {
        trusted.overcommit.attain = thin::demanded(&state.volumes.data, trusted.volumes.data);
    }
    Some(trusted.covering(ledger.capacity.overcommit, ledger.promises.values()))
}

fn carriers<'v>(
    view: &'v View,
    pool: &'v PoolView,
) -> impl Iterator<Item = (&'v NodeName, &'v NodePoolState)> {
    view.nodes.iter().filter_map(|(name, node)| Some((name, node.pools.get(&pool.name)?)))
}

fn ledgers<'v>(view: &'v View, pool: &'v PoolView) -> impl Iterator<Item = &'v LedgerView> {
    view.ledgers_in(&pool.name)
}

/// A ledger for each node that can use its area. Not while the pool is being deleted.
fn missing_ledgers(view: &View, pool: &PoolView) -> Vec<Change> {
    let usable = carriers(view, pool).filter(|(node, report)| {
        is_measured(report)
            && !pool.deleting
            && !view.ledgers.contains_key(&(pool.name.clone(), (*node).clone()))
    });
    usable
        .filter_map(|(node, report)| {
            let capacity = pool.capacity(report)?;
            Some(Change::CreateLedger { pool: pool.name.clone(), node: node.clone(), capacity })
        })
        .collect()
}

/// The first ledger whose capacity is not what its node reports; never below what is promised.
fn resized(view: &View, pool: &PoolView) -> Option<Change> {
    ledgers(view, pool).find_map(|ledger| {
        let report = view.report_of(&pool.name, &ledger.node).filter(|report| is_measured(report))?;
        let wanted = wanted(pool, ledger, report)?;
        let differs = wanted != ledger.capacity && view.behind(ledger).is_none();
        differs.then(|| ledger.resized(wanted))
    })
}

/// Promises whose holders the leader does not see. They come from an operator that wrote a promise for what was being
/// deleted, or from a deletion that the API server carried out in spite of a finalizer, because it had begun before that
/// was added. Each is asked for at the API server, and revoked; once its node can neither obey it any more nor has bytes
/// under it, it goes. On a node that is given up, or written off, it goes at once.
fn swept(view: &View, pool: &PoolView) -> Option<Vec<Change>> {
    ledgers(view, pool).filter(|_| view.sweeps()).find_map(|ledger| swept_from(view, ledger))
}

fn swept_from(view: &View, ledger: &LedgerView) -> Option<Vec<Change>> {
    let without_node = given_up(view, ledger);
    if !without_node.is_empty() {
        return Some(confirmed(&without_node, view.without(ledger, &uids(&without_node))));
    }
    let report = view.report_of(&ledger.pool, &ledger.node)?;
    let (revoked, left): (Vec<_>, Vec<_>) =
        orphans(view, ledger).into_iter().partition(|(_, promise)| promise.revoked.is_some());
    let over: Vec<_> =
        revoked.into_iter().filter(|(uid, promise)| retire::is_over(report, uid, promise)).collect();
    if !over.is_empty() {
        // Of a reservation that was asked for before it was revoked; an image is retired while it is there.
        let images: Vec<_> =
            over.iter().copied().filter(|(_, promise)| matches!(promise.holder, Holder::Image(_))).collect();
        return Some(confirmed(&images, view.without(ledger, &uids(&over))));
    }
    (!left.is_empty()).then(|| confirmed(&left, ledger.revoking(&uids(&left))))
}

fn uids<'p>(promises: &[(&'p Uid, &'p Promise)]) -> Vec<&'p Uid> {
    promises.iter().map(|(uid, _)| *uid).collect()
}

/// The write, once the API server itself has said that these holders are gone.
fn confirmed(holders: &[(&Uid, &Promise)], write: Change) -> Vec<Change> {
    let ask = holders
        .iter()
        .map(|(uid, promise)| Change::ConfirmGone { holder: promise.holder.clone(), uid: (*uid).clone() });
    ask.chain([write]).collect()
}

/// The next steps for a ledger whose pool is gone, which somebody took the finalizer from: what nobody holds is swept, and the
/// ledger goes when nothing is promised in it any more.
pub fn decide_ledger(view: &View, pool: &PoolName, node: &NodeName) -> Vec<Change> {
    let ledger = view.ledgers.get(&(pool.clone(), node.clone()));
    let Some(ledger) = ledger.filter(|_| view.sweeps() && !view.pools.contains_key(pool)) else {
        return Vec::new();
    };
    swept_from(view, ledger).unwrap_or_else(|| drain::end_ledger(view, ledger).into_iter().collect())
}

/// Promises of holders that the view lacks, on a node from which nothing is to be waited for.
fn given_up<'v>(view: &'v View, ledger: &'v LedgerView) -> Vec<(&'v Uid, &'v Promise)> {
    let LedgerView { pool, node, .. } = ledger;
    let written_off = lost::is_written_off(view, node);
    let may_go = |uid: &Uid, promise: &Promise| {
        let by_policy = promise.class == Class::Images && lost::is_given_up(view, pool, node);
        written_off || by_policy && !rebuild::is_kept(view, ledger, uid, promise)
    };
    let gone = ledger
        .promises
        .iter()
        .filter(|(uid, promise)| !is_there(view, uid, &promise.holder) && may_go(uid, promise));
    gone.take(SWEPT_AT_ONCE).collect()
}

/// Promises of holders that the view lacks.
fn orphans<'v>(view: &'v View, ledger: &'v LedgerView) -> Vec<(&'v Uid, &'v Promise)> {
    let trusted = view.nodes.get(&ledger.node).is_some_and(|node| node.reported);
    if !trusted || view.behind(ledger).is_some() {
        return Vec::new();
    }
    let gone = ledger.promises.iter().filter(|(uid, promise)| {
        !is_there(view, uid, &promise.holder) && !rebuild::is_kept(view, ledger, uid, promise)
    });
    gone.take(SWEPT_AT_ONCE).collect()
}

/// True if the view has the holder of a promise.
pub(crate) fn is_there(view: &View, uid: &Uid, holder: &Holder) -> bool {
    match holder {
        Holder::Reservation(_) => view.reservations.contains_key(uid),
        Holder::Image(name) => view.images.get(name).is_some_and(|image| image.uid == *uid),
    }
}

/// What the pool holds, over all nodes.
pub fn report(view: &View, pool: &PoolView) -> PoolReport {
    let (mut total, mut promised, mut volumes) = (Bytes::ZERO, Bytes::ZERO, Bytes::ZERO);
    for ledger in ledgers(view, pool) {
        total = total.saturating_add(ledger.capacity.total.data);
        let sums = Sums::of(ledger.promises.values());
        promised = promised.saturating_add(sums.data(Area::Total, ledger.capacity.overcommit.percent));
        volumes = volumes.saturating_add(sums.data(Area::Volumes, Percent::WHOLE));
    }
    let waiting = view
        .open_to(Some(&pool.name))
        .filter(|request| request.pools.allows(pool) && is_waiting(view, request));
    let (ready, reason, message) = health(view, pool);
    PoolReport {
        ready,
        reason,
        message,
        nodes: count(carriers(view, pool).count()),
        total,
        promised,
        volumes,
        used: carriers(view, pool).map(|(_, report)| report.used).sum(),
        unreferenced: ledgers(view, pool).map(|ledger| unreferenced(view, ledger)).sum(),
        queued: count(waiting.count()),
        constraints: constraints(view, pool).into_iter().collect(),
    }
}

/// What is not as strong as usual on some node.
fn constraints(view: &View, pool: &PoolView) -> BTreeSet<Reason> {
    let mut found = BTreeSet::new();
    found.extend(overcommitted(view, pool).map(|_| Reason::VolumesOvercommitted));
    for (_, report) in carriers(view, pool) {
        found.extend(report.advisory.then_some(Reason::Advisory));
        let scanned = report.usable && report.reason == Reason::HostScansGuestDisks;
        found.extend(scanned.then_some(Reason::HostScansGuestDisks));
        let Some(state) = &report.thin else { continue };
        found.extend(state.data_runs_low(report.total).then_some(Reason::DataAlmostFull));
        found.extend(stopped(state).map(|stopped| stopped.reason()));
    }
    found
}

/// The kernel pools in which nothing more is promised.
fn stopped(state: &ThinState) -> impl Iterator<Item = Stopped> {
    [Class::Images, Class::Volumes].into_iter().filter_map(|class| state.stopped(class))
}

/// Bytes promised in a ledger to images that no live reservation names.
pub fn unreferenced(view: &View, ledger: &LedgerView) -> Bytes {
    let idle = ledger.promises.values().filter(|promise| match &promise.holder {
        Holder::Image(name) => !view.is_referenced(name),
        Holder::Reservation(_) => false,
    });
    idle.map(|promise| promise.charge.data).sum()
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add, at, hold, image, reservation, thin_view, view};
    use crate::units::Generation;

    fn ask(view: &View) -> Vec<Change> {
        decide(view, &PoolName::from("p"), Timestamp(0)).into_iter().skip(1).collect()
    }

    fn told(view: &View) -> PoolReport {
        report(view, view.pools.values().next().expect("one"))
    }

    fn node_pool<'v>(view: &'v mut View, node: &str) -> &'v mut NodePoolState {
        let node = view.nodes.get_mut(&NodeName::from(node)).expect("there");
        node.pools.values_mut().next().expect("one")
    }

    #[test]
    fn ledgers_are_made_for_usable_nodes_and_follow_what_these_report() {
        let mut view = view(&[("a", 100), ("b", 100)]);
        assert_eq!(ask(&view), []);
        view.ledgers.remove(&at("p", "b"));
        view.pools.values_mut().for_each(|pool| pool.limit = Some(Bytes(80)));
        hold(&mut view, "a", "x", Class::Images, 90);
        let changes = ask(&view);
        let [Change::CreateLedger { capacity, .. }, Change::WriteLedger { capacity: resized, .. }] =
            &changes[..]
        else {
            panic!("{changes:?}");
        };
        assert_eq!(*capacity, LedgerCapacity::shared(Bytes(80)));
        assert_eq!(resized.total.data, Bytes(90), "never below what is promised");
        node_pool(&mut view, "b").usable = false;
        view.pools.values_mut().for_each(|pool| pool.limit = None);
        add(&mut view, reservation("x", 90, 0));
        assert_eq!(ask(&view), []);
    }

    #[test]
    fn promises_without_a_holder_are_asked_for_and_revoked() {
        let mut view = view(&[("a", 100)]);
        add(&mut view, reservation("there", 10, 0));
        hold(&mut view, "a", "there", Class::Images, 10);
        hold(&mut view, "a", "gone", Class::Images, 10);
        let changes = ask(&view);
        let [Change::ConfirmGone { uid, .. }, Change::WriteLedger { revision, promises, .. }] = &changes[..]
        else {
            panic!("{changes:?}");
        };
        assert_eq!(uid.as_str(), "gone");
        assert_eq!(promises[&Uid::from("gone")].revoked, Some(*revision));
        assert_eq!(promises[&Uid::from("there")].revoked, None);
        view.leader = false;
        assert_eq!(ask(&view), []);
        view.leader = true;
        view.nodes.values_mut().for_each(|node| node.reported = false);
        assert_eq!(ask(&view), []);
    }

    #[test]
    fn what_is_revoked_goes_once_its_node_cannot_use_it_any_more() {
        let mut view = view(&[("a", 100)]);
        hold(&mut view, "a", "gone", Class::Images, 10);
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        ledger.revision = 5;
        ledger.promises.get_mut(&Uid::from("gone")).expect("held").revoked = Some(5);
        let lineage = ledger.lineage.clone();
        let report = node_pool(&mut view, "a");
        report.lineage = Some(lineage);
        report.obeyed_revision = 4;
        assert_eq!(ask(&view), [], "the node may still obey it");
        node_pool(&mut view, "a").obeyed_revision = 5;
        let taken = ask(&view);
        assert!(
            matches!(&taken[..], [Change::WriteLedger { promises, .. }] if promises.is_empty()),
            "{taken:?}"
        );
        node_pool(&mut view, "a").obeyed.insert(Uid::from("gone"), Generation::FIRST);
        assert_eq!(ask(&view), [], "the node has bytes of it");
        node_pool(&mut view, "a").released.insert(Uid::from("gone"), Generation::FIRST);
        assert_eq!(ask(&view), taken);
    }

    #[test]
    fn the_report_adds_up() {
        let mut view = view(&[("a", 100), ("b", 50)]);
        hold(&mut view, "a", "x", Class::Volumes, 30);
        let idle = image("a", 20, 0);
        view.ledgers
            .get_mut(&at("p", "a"))
            .expect("there")
            .promises
            .insert(idle.uid.clone(), idle.promise(None));
        view.images.insert(idle.name.clone(), idle);
        add(&mut view, reservation("waits", 500, 0));
        node_pool(&mut view, "b").used = Bytes(7);
        node_pool(&mut view, "b").advisory = true;
        node_pool(&mut view, "b").reason = Reason::HostScansGuestDisks;
        let report = told(&view);
        assert_eq!(
            (report.ready, report.nodes, report.message.as_str()),
            (true, 2, "2 nodes carry the pool")
        );
        assert_eq!((report.total, report.promised, report.unreferenced), (Bytes(150), Bytes(50), Bytes(20)));
        let constraints = vec![Reason::Advisory, Reason::HostScansGuestDisks];
        assert_eq!((report.used, report.queued, report.constraints), (Bytes(7), 1, constraints));
    }

    #[test]
    fn kernel_pools_bound_each_other_by_what_they_have_grown_to() {
        let mut view = thin_view(&["a"], Bytes::gib(10));
        assert_eq!(ask(&view), []);
        let before = view.ledgers[&at("p", "a")].capacity;
        assert_eq!((before.images.data, before.volumes.data), (Bytes::gib(10), Bytes::gib(10)));
        node_pool(&mut view, "a").thin.as_mut().expect("thin").images.data.total = Bytes::gib(4);
        let changes = ask(&view);
        let [Change::WriteLedger { capacity, .. }] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!((capacity.images.data, capacity.volumes.data), (Bytes::gib(10), Bytes::gib(6)));
        assert_eq!(capacity.total, before.total);
        view.pools.values_mut().for_each(|pool| pool.limit = Some(Bytes::gib(5)));
        let changes = ask(&view);
        let [Change::WriteLedger { capacity, .. }] = &changes[..] else { panic!("{changes:?}") };
        assert!([capacity.images, capacity.volumes, capacity.total].iter().all(|c| c.data == Bytes::gib(5)));
        node_pool(&mut view, "a").thin.as_mut().expect("thin").images.mode = thin::PoolMode::Failed;
        assert_eq!(ask(&view), [], "nothing is known of it");
    }

    #[test]
    fn a_class_gets_more_only_by_a_report_that_follows_the_ledger() {
        let mut view = thin_view(&["a"], Bytes::gib(10));
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        ledger.capacity.volumes.data = Bytes::gib(6);
        ledger.revision = 7;
        let lineage = ledger.lineage.clone();
        node_pool(&mut view, "a").lineage = Some(lineage);
        node_pool(&mut view, "a").obeyed_revision = 6;
        assert_eq!(ask(&view), [], "it may be older than what the other class has grown to");
        node_pool(&mut view, "a").obeyed_revision = 7;
        let changes = ask(&view);
        let [Change::WriteLedger { capacity, .. }] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!(capacity.volumes.data, Bytes::gib(10));
    }

    #[test]
    fn what_was_grown_for_a_promise_is_taken_from_the_other_class_as_it_goes() {
        let mut view = thin_view(&["a"], Bytes::gib(10));
        hold(&mut view, "a", "gone", Class::Images, 4 << 30);
        node_pool(&mut view, "a").thin.as_mut().expect("thin").images.data.total = Bytes::gib(4);
        let change = view.without(&view.ledgers[&at("p", "a")], &[&Uid::from("gone")]);
        let Change::WriteLedger { capacity, promises, .. } = change else { panic!("{change:?}") };
        assert_eq!((promises.len(), capacity.volumes.data), (0, Bytes::gib(6)));
        assert_eq!(capacity.images.data, Bytes::gib(10));
    }

    #[test]
    fn d46_what_overcommitted_volumes_write_is_made_room_for_and_told() {
        let mut view = thin_view(&["a"], Bytes::gib(10));
        view.pools.values_mut().for_each(|pool| pool.overcommit = Percent::from(300));
        let write = |view: &mut View| {
            let Some(Change::WriteLedger { capacity, revision, .. }) = ask(view).pop() else { return None };
            let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
            (ledger.capacity, ledger.revision) = (capacity, revision);
            Some(capacity)
        };
        assert_eq!(
            write(&mut view).expect("the policy").overcommit,
            Overcommit { percent: Percent::from(300), attain: Bytes::ZERO }
        );
        assert_eq!(write(&mut view), None, "and that is all");
        add(&mut view, reservation("v", 0, 0));
        hold(&mut view, "a", "v", Class::Volumes, 9 << 30);
        let volumes = |view: &mut View, used, total| {
            let thin = node_pool(view, "a").thin.as_mut().expect("thin");
            thin.volumes.data = thin::Usage { used: Bytes::gib(used), total: Bytes::gib(total) };
        };
        volumes(&mut view, 2, 3);
        let grown = write(&mut view).expect("three GiB are there now");
        assert_eq!((grown.overcommit.attain, grown.images.data), (Bytes::ZERO, Bytes::gib(7)));
        volumes(&mut view, 3, 3);
        let grown = write(&mut view).expect("they are written");
        assert_eq!((grown.overcommit.attain, grown.images.data), (Bytes::gib(4), Bytes::gib(6)));
        assert_eq!(grown.total.data, Bytes::gib(10));
        let report = told(&view);
        assert_eq!((report.promised, report.volumes), (Bytes::gib(3), Bytes::gib(9)));
        assert_eq!((report.ready, report.constraints), (true, vec![Reason::VolumesOvercommitted]));
        let said = "1 node carries the pool; promise 1 is not made for volumes: overcommitted to 300 %";
        assert_eq!(report.message, said);
        view.pools.values_mut().for_each(|pool| pool.overcommit = Percent::WHOLE);
        hold(&mut view, "a", "i", Class::Images, 5 << 30);
        write(&mut view);
        let still = "promise 1 is not made for volumes: overcommitted to 180 % on node a, where nothing more is promised until \
                     what is fits at 100 %";
        assert!(told(&view).message.ends_with(still), "{}", told(&view).message);
    }

    #[test]
    fn kernel_pools_that_take_nothing_more_are_told_of() {
        let mut view = thin_view(&["a"], Bytes::gib(10));
        assert!(told(&view).ready && told(&view).constraints.is_empty());
        let volumes = |view: &mut View, change: fn(&mut thin::PoolState)| {
            change(&mut node_pool(view, "a").thin.as_mut().expect("thin").volumes);
        };
        volumes(&mut view, |pool| pool.data.used = Bytes::gib(8));
        assert_eq!((told(&view).ready, told(&view).constraints), (true, vec![Reason::DataAlmostFull]));
        volumes(&mut view, |pool| pool.needs_check = true);
        let report = told(&view);
        assert_eq!((report.ready, report.reason), (false, Reason::NeedsCheck));
        assert_eq!(
            report.message,
            "node a promises nothing more for volumes: the kernel pool has metadata that must be checked offline"
        );
        assert_eq!(report.constraints, [Reason::DataAlmostFull, Reason::NeedsCheck]);
        node_pool(&mut view, "a").thin = None;
        assert_eq!((told(&view).ready, told(&view).reason), (false, Reason::PoolAreaFailed));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let mut view = view(&[("a", 100)]);
        view.nodes.values_mut().for_each(|node| node.live = false);
        assert_eq!(told(&view).reason, Reason::NodeLost);
        node_pool(&mut view, "a").usable = false;
        node_pool(&mut view, "a").reason = Reason::InUseByPool;
        assert_eq!(told(&view).reason, Reason::InUseByPool);
        view.nodes.clear();
        assert_eq!(told(&view).reason, Reason::NoMatchingNode);
        view.pools.values_mut().for_each(|pool| pool.invalid = Some("spec.backend: x".to_owned()));
        assert_eq!(
            (told(&view).reason, told(&view).message.as_str()),
            (Reason::InvalidSpec, "spec.backend: x")
        );
    }
}
