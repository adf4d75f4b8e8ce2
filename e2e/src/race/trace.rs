//! What was seen of one reservation: each version of it, of its ledger, and of what its node said.

use super::judge::{Change, Fact, Place};

/// The changes that concern the reservation with this UID, in their order, a line each.
pub fn trace(changes: &[Change], uid: &str) -> Vec<String> {
    let place = changes.iter().find_map(|change| match &change.fact {
        Fact::Reservation { uid: other, place: Some(place), .. } if other == uid => Some(place),
        _ => None,
    });
    let mut concerning: Vec<_> =
        changes.iter().filter_map(|change| Some((change.version, line(&change.fact, uid, place)?))).collect();
    concerning.sort_by_key(|(version, _)| *version);
    // Reports and ledgers that say the same of it again say nothing.
    concerning.dedup_by(|later, earlier| later.1 == earlier.1);
    concerning.into_iter().map(|(version, line)| format!("{version}: {line}")).collect()
}

fn line(fact: &Fact, uid: &str, place: Option<&Place>) -> Option<String> {
    match fact {
        Fact::Reservation { uid: other, place, deleting, gone, finalizers, writer } => (other == uid).then(|| {
            format!("reservation {uid}, by {writer:?}: place {place:?}, finalizers {finalizers:?}, deleted {deleting}, gone {gone}")
        }),
        Fact::Ledger { pool, node, promises, gone, .. } => {
            place.filter(|place| place.pool == *pool && place.node == *node)?;
            Some(format!("ledger of pool {pool} on {node}: promise {:?}, gone {gone}", promises.get(uid)))
        }
        Fact::Report { node, released, obeyed, .. } => {
            place.filter(|place| place.node == *node)?;
            let (obeyed, released) = (obeyed.contains(uid), released.get(uid));
            Some(format!("{node}: obeyed {obeyed}, released {released:?}"))
        }
    }
}
