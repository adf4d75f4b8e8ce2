//! Areas whose pools are gone.

use super::*;

#[test]
fn an_area_is_closed_only_when_its_pool_and_everything_in_it_are_gone() {
    let close = Step::ClosePool { pool: "p".into() };
    let mut node = asked();
    node.settle().unwrap();
    let name = PoolName::from("p");
    node.view.pools.get_mut(&name).unwrap().wanted = None;
    assert!(!plan(&node.view, Timestamp(5)).contains(&close), "volumes are there");
    delete_all(&mut node);
    node.settle().unwrap();
    assert!(!plan(&node.view, Timestamp(5)).contains(&close), "the ledger has not let go");
    node.view.pools.get_mut(&name).unwrap().ledger = None;
    assert_eq!(plan(&node.view, Timestamp(5)), [close]);
    node.view.pools.get_mut(&name).unwrap().wanted = Some("pu".into());
    assert_eq!(plan(&node.view, Timestamp(5)), []);
}
