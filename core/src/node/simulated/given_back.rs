//! What was given back, while the object that it was for is still there.

use super::*;

#[test]
fn what_was_given_back_is_not_obeyed_again_while_its_object_is_there() {
    let mut node = asked();
    let promised = ledger(&mut node).promises.clone();
    node.settle().unwrap();
    delete_all(&mut node);
    node.settle().unwrap();
    // An operator that has seen that takes the promises away; one that has not seen the deletions promises them once more.
    for promises in [BTreeMap::new(), promised] {
        let ledger = ledger(&mut node);
        (ledger.promises, ledger.revision) = (promises, ledger.revision + 1);
        node.settle().unwrap();
        assert_eq!(area(&node).promises.len(), 4);
        assert!(area(&node).promises.values().all(|promise| promise.released));
    }
}
