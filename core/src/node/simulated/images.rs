//! Staged images whose objects went without leave.

use super::*;

/// The image's object is gone, and the ledger knows.
fn remove_by_force(node: &mut Node) -> NodeImage {
    let image = node.view.images.remove(&Uid::from("img")).unwrap();
    let ledger = ledger(node);
    ledger.revision += 1;
    ledger.promises.get_mut(&Uid::from("img")).unwrap().revoked = Some(ledger.revision);
    image
}

fn promise_successor(node: &mut Node, image: NodeImage) {
    node.view.images.insert("next".into(), image);
    let (uid, mut promised) = promise("next", Class::Images);
    promised.holder = Holder::Image("img".to_owned());
    let ledger = ledger(node);
    ledger.revision += 1;
    ledger.promises.insert(uid, promised);
}

fn asked_as_image() -> Node {
    let mut node = asked();
    ledger(&mut node).promises.get_mut(&Uid::from("img")).unwrap().holder = Holder::Image("img".to_owned());
    node
}

#[test]
fn an_image_removed_by_force_gives_its_space_back_after_any_cut() {
    for cut in 0..8 {
        let mut node = asked_as_image();
        node.settle().unwrap();
        let whole = node.disk.clone();
        let image = node.view.images.remove(&Uid::from("img")).unwrap();
        node.settle().unwrap();
        assert_eq!(node.disk, whole, "a watch that lags deletes nothing");
        node.view.images.insert("img".into(), image);
        remove_by_force(&mut node);
        node.left = cut;
        let _ = node.settle();
        node.left = 1000;
        node.settle().unwrap();
        assert!(!node.disk.iter().any(|bytes| bytes.starts_with("image ")), "cut {cut}: {:?}", node.disk);
        assert!(area(&node).promises[&Uid::from("img")].released && node.pins.is_empty(), "cut {cut}");
    }
}

#[test]
fn an_image_removed_by_force_while_a_volume_awaits_it_is_not_waited_for_if_it_is_not_whole() {
    let mut node = asked_as_image();
    node.left = 9;
    while !area_has_begun(&node) {
        node.left += 1;
        let _ = node.settle();
    }
    node.left = 1000;
    remove_by_force(&mut node);
    node.settle().unwrap();
    assert!(area(&node).promises[&Uid::from("img")].released);
}

fn area_has_begun(node: &Node) -> bool {
    node.view.pools[&PoolName::from("p")].area.as_ref().is_some_and(|area| !area.images.is_empty())
}

#[test]
fn the_next_image_of_the_same_content_takes_over_what_is_there() {
    for cut in 0..8 {
        let mut node = asked_as_image();
        node.settle().unwrap();
        let whole = node.disk.clone();
        let image = remove_by_force(&mut node);
        promise_successor(&mut node, image);
        // Its promise is obeyed in the same run of the plan in which the other's would be given back.
        let obey = plan(&node.view, Timestamp(5)).swap_remove(0);
        node.run(&obey).unwrap();
        node.left = cut;
        let _ = node.settle();
        node.left = 1000;
        node.settle().unwrap();
        assert_eq!((&node.disk, node.fetched), (&whole, 1), "cut {cut}");
        let held = &area(&node).images[&digest()];
        assert!(held.complete && held.holder == Uid::from("next"), "cut {cut}: {held:?}");
        assert!(area(&node).promises[&Uid::from("img")].released, "cut {cut}");
    }
}

#[test]
fn a_pin_that_was_set_before_anything_was_recorded_is_taken_back() {
    let mut node = asked_as_image();
    node.settle().unwrap();
    let pool = node.view.pools.get_mut(&PoolName::from("p")).unwrap();
    pool.area.as_mut().unwrap().images.clear();
    node.disk.retain(|bytes| !bytes.starts_with("image "));
    node.view.images.values_mut().for_each(|image| image.deleting = true);
    assert!(!node.pins.is_empty());
    node.settle().unwrap();
    assert!(node.pins.is_empty() && area(&node).promises[&Uid::from("img")].released);
}

/// Held by its own object, and not all there.
fn held(usable: bool, in_use: bool) -> HeldImage {
    let holder = Uid::from("img");
    HeldImage { holder, usable, complete: false, in_use, last_used: Timestamp(1) }
}

fn steps(node: &Node) -> Vec<Step> {
    plan(&node.view, Timestamp(5))
}

#[test]
fn a_volume_is_made_from_an_image_as_soon_as_that_is_usable_which_goes_on_becoming_local() {
    let mut node = asked_as_image();
    node.settle().unwrap();
    let image = digest();
    let pool = node.view.pools.get_mut(&PoolName::from("p")).unwrap();
    let area = pool.area.as_mut().unwrap();
    area.volumes.remove(&Uid::from("clone"));
    for (usable, made) in [(false, false), (true, true)] {
        let pool = node.view.pools.get_mut(&PoolName::from("p")).unwrap();
        pool.area.as_mut().unwrap().images.insert(image, held(usable, false));
        let steps = steps(&node);
        let makes = |step: &Step| matches!(step, Step::MakeVolume { origin: Origin::Image(from), .. } if *from == image);
        assert_eq!(steps.iter().any(makes), made, "{steps:?}");
        assert!(steps.iter().any(|step| matches!(step, Step::FillImage { .. })), "{steps:?}");
    }
}

#[test]
fn what_volumes_read_from_stays_and_becomes_local_though_its_object_is_being_deleted() {
    let mut node = asked_as_image();
    node.settle().unwrap();
    node.view.images.values_mut().for_each(|image| image.deleting = true);
    for (in_use, removed) in [(true, false), (false, true)] {
        let pool = node.view.pools.get_mut(&PoolName::from("p")).unwrap();
        pool.area.as_mut().unwrap().images.insert(digest(), held(true, in_use));
        let steps = steps(&node);
        let fills = steps.iter().any(|step| matches!(step, Step::FillImage { .. }));
        let removes = steps.iter().any(|step| matches!(step, Step::RemoveImage { .. }));
        assert_eq!((fills, removes), (!removed, removed), "{steps:?}");
    }
    remove_by_force(&mut node);
    let pool = node.view.pools.get_mut(&PoolName::from("p")).unwrap();
    pool.area.as_mut().unwrap().images.insert(digest(), held(true, true));
    assert!(
        !steps(&node).iter().any(|step| matches!(step, Step::RemoveImage { .. })),
        "volumes read from it"
    );
}
