//! What must hold after every step, counted from the objects and from what lies on the nodes, without the code under test.

use std::collections::BTreeSet;

use berth_core::check::{Finding, check};
use berth_core::ids::{NodeName, PoolName, Uid};
use berth_core::node::view::AreaView;
use berth_core::view::{LedgerView, ReservationState, ReservationView, View};

use super::node::Node;
use super::sums::{fitting, held_too_much, overgrown, promised_too_much};
use super::world::World;

/// What must never happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wrong {
    /// More is promised than there is, or lies there than is promised.
    Overcommit,
    /// Bytes go that somebody uses.
    EvictedInUse,
    /// Bytes go that are nowhere else.
    LostOnlyCopy,
    /// Something does not go on although nothing keeps it.
    Stuck,
}

/// Ledgers that may lack what their node holds: of a state that was restored, deleted by hand, or given up with a node.
pub type Excused = BTreeSet<(PoolName, NodeName)>;

/// The first thing that does not hold now.
pub fn overcommitted(world: &World, nodes: &[Node], excused: &Excused) -> Option<String> {
    let pools = &world.objects().pools;
    let mut ledgers = world.objects().ledgers.values();
    let thin = |ledger: &LedgerView| pools.get(&ledger.pool).is_some_and(|pool| pool.block.is_some());
    if let Some(found) = ledgers.find_map(|ledger| promised_too_much(ledger, thin(ledger), world.percent)) {
        return Some(found);
    }
    for node in nodes {
        for (pool, disk) in &node.disks {
            let Some(area) = node.view.pools.get(pool).and_then(|pool| pool.area.as_ref()) else { continue };
            let place = (pool.clone(), node.view.node.clone());
            if let Some(found) = held_too_much(area, disk, world.percent) {
                return Some(format!("node {}, pool {pool}: {found}", place.1));
            }
            let Some(ledger) = world.objects().ledgers.get(&place).filter(|_| !excused.contains(&place))
            else {
                continue;
            };
            if let Some(found) = unpromised(area, ledger).or_else(|| overgrown(disk, ledger, world.percent)) {
                return Some(format!("node {}, pool {pool}: {found}", place.1));
            }
        }
    }
    let twice = world.placements.iter().find(|(_, places)| places.len() > 1);
    if let Some((uid, places)) = twice {
        return Some(format!("{uid} was given {places:?}"));
    }
    let lost = |finding: &Finding| match finding {
        Finding::Unpromised { reservation, place } => {
            let found = world.objects().reservation_named(reservation);
            found.is_some_and(|found| world.has_lost(&found.uid, place))
        }
        _ => false,
    };
    let grave = check(world.objects()).into_iter().find(|finding| !finding.may_pass() && !lost(finding));
    grave.map(|finding| finding.to_string())
}

/// A promise that the node obeys and its ledger does not have.
fn unpromised(area: &AreaView, ledger: &LedgerView) -> Option<String> {
    let kept = area.promises.iter().filter(|(_, promise)| !promise.released);
    let mut lacking = kept.filter(|(uid, obeyed)| {
        let promise = ledger.promises.get(*uid);
        promise.is_none_or(|promise| {
            promise.generation != obeyed.generation || promise.charge.data < obeyed.data
        })
    });
    lacking.next().map(|(uid, obeyed)| {
        format!("it obeys {uid} with {}, its ledger says {:?}", obeyed.data, ledger.promises.get(uid))
    })
}

/// What must hold when nothing moves any more.
pub fn unsettled(world: &World, nodes: &[Node]) -> Option<String> {
    let objects = world.objects();
    // An image whose object is lost stays for as long as a volume reads from it.
    let is_read = |uid: &Uid| {
        nodes.iter().any(|node| {
            node.view.pools.iter().any(|(name, pool)| {
                let image =
                    pool.area.iter().flat_map(|area| &area.images).find(|(_, held)| held.holder == *uid);
                image.is_some_and(|(digest, _)| node.disks[name].origins.values().any(|o| o == digest))
            })
        })
    };
    let waits = |finding: &&Finding| matches!(finding, Finding::Orphan { uid, .. } if is_read(uid));
    let findings = check(objects);
    if let Some(finding) = findings.iter().find(|finding| !waits(finding)) {
        return Some(format!("left over: {finding}"));
    }
    let mut waiting: Vec<&ReservationView> = Vec::new();
    for reservation in objects.reservations.values() {
        let name = &reservation.name;
        if reservation.deleting {
            return Some(format!("{name} was deleted and is still there"));
        }
        match reservation.state {
            ReservationState::Ready if reservation.prepared.is_none() => {
                return Some(format!("{name} is Ready, and not there"));
            }
            ReservationState::Ready | ReservationState::Refused => {}
            ReservationState::Queued => waiting.push(reservation),
            state => return Some(format!("{name} stays {state:?}")),
        }
    }
    waiting.sort_by_key(|waiting| (waiting.created, &waiting.uid));
    waits_for_nothing(objects, &waiting, world.percent)
}

/// A request that fits, and that nobody is ahead of: the only one, or the oldest where all are alike.
fn waits_for_nothing(objects: &View, waiting: &[&ReservationView], percent: u64) -> Option<String> {
    let first = waiting.first()?;
    let alike = waiting
        .iter()
        .all(|other| (other.priority, &other.claim_namespace) == (first.priority, &first.claim_namespace));
    let fits = if alike { fitting(objects, first, percent) } else { None };
    fits.map(|place| format!("{} waits although it fits {place}", first.name))
}

/// What is left although everything was deleted long ago.
pub fn left_over(world: &World, nodes: &[Node]) -> Option<String> {
    let objects = world.objects();
    let promised: Vec<_> = objects.ledgers.values().flat_map(|ledger| ledger.promises.keys()).collect();
    let held: Vec<_> =
        nodes.iter().flat_map(|node| node.disks.values()).flat_map(|d| d.bytes.keys()).collect();
    let clean = promised.is_empty()
        && held.is_empty()
        && objects.reservations.is_empty()
        && objects.images.is_empty();
    let what = || {
        format!(
            "left: promises {promised:?}, images {:?}, reservations {:?}, bytes {held:?}",
            objects.images.keys(),
            objects.reservations.keys()
        )
    };
    (!clean).then(what)
}
