//! Image stores: which node looks after each.

use crate::change::Change;
use crate::ids::{NodeName, ObjectName, Sha256Sum};
use crate::units::{Generation, Timestamp};
use crate::view::View;

/// The next steps for the image store with this name. Time plays no part in them yet.
pub fn decide(view: &View, name: &ObjectName, _now: Timestamp) -> Vec<Change> {
    let Some(store) = view.stores.get(name).filter(|store| !store.deleting) else { return Vec::new() };
    if store.assignment.as_ref().is_some_and(|(node, _)| !view.is_lost(node)) {
        return Vec::new();
    }
    // Spread evenly, and alike in every operator: each store has its own order of nodes.
    let order = |node: &NodeName| Sha256Sum::of(format!("{name} {node}").as_bytes());
    let live = view.nodes.values().filter(|state| state.live).map(|state| &state.name);
    let Some(node) = live.min_by_key(|node| order(node)) else {
        return Vec::new();
    };
    let generation = store.assignment.as_ref().map_or(Generation::FIRST, |(_, generation)| generation.next());
    vec![Change::AssignStore {
        name: name.clone(),
        version: store.version.clone(),
        node: node.clone(),
        generation,
    }]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::view;
    use crate::view::{ObjectVersion, StoreView};

    fn add(view: &mut View, name: &str) -> ObjectName {
        let name = ObjectName::new("ns", name);
        let version = ObjectVersion("1".to_owned());
        let store = StoreView { name: name.clone(), version, assignment: None, deleting: false };
        view.stores.insert(name.clone(), store);
        name
    }

    fn chosen(view: &View, name: &ObjectName) -> Option<(NodeName, Generation)> {
        match decide(view, name, Timestamp(0)).pop()? {
            Change::AssignStore { node, generation, .. } => Some((node, generation)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn stores_are_spread_over_live_nodes_and_move_away_from_lost_ones() {
        let mut view = view(&[("a", 1), ("b", 1), ("c", 1)]);
        let names: Vec<ObjectName> = (0..30).map(|index| add(&mut view, &format!("s{index}"))).collect();
        for node in ["a", "b", "c"] {
            let count = names
                .iter()
                .filter(|name| chosen(&view, name).expect("three live").0.as_str() == node)
                .count();
            assert!(count >= 4, "{node}: {count}");
        }
        let (node, generation) = chosen(&view, &names[0]).expect("three live");
        assert_eq!(generation, Generation::FIRST);
        view.stores.get_mut(&names[0]).expect("there").assignment = Some((node.clone(), generation));
        assert_eq!(chosen(&view, &names[0]), None, "it stays");
        let state = view.nodes.get_mut(&node).expect("there");
        (state.live, state.reported) = (false, false);
        assert_eq!(chosen(&view, &names[0]), None, "nothing is known of it yet");
        view.nodes.get_mut(&node).expect("there").silent = true;
        assert!(chosen(&view, &names[0]).is_some(), "it was listened to for long enough");
        view.nodes.get_mut(&node).expect("there").reported = true;
        view.nodes.get_mut(&node).expect("there").live = false;
        let (other, generation) = chosen(&view, &names[0]).expect("two live");
        assert!(other != node && generation == Generation(2));
        view.nodes.values_mut().for_each(|node| node.live = false);
        assert_eq!(chosen(&view, &names[0]), None);
    }
}
