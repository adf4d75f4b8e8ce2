use proptest::prelude::*;

use super::*;
use crate::budget::{Bound, Shortfall, fits, fits_empty, free, largest};
use crate::fixture::{ledger, promise};
use crate::ids::Uid;
use crate::ledger::{Charge, Class};
use crate::view::LedgerView;

const G: u64 = 1 << 30;

fn over(percent: u32) -> Overcommit {
    Overcommit { percent: Percent::new(percent).expect("in range"), attain: Bytes::ZERO }
}

/// A ledger of ten GiB in all, each class, overcommitted, with so many GiB of images and of volumes.
fn book(percent: u32, images: u64, volumes: &[u64]) -> LedgerView {
    let mut ledger = ledger("p", "n", 10 * G);
    ledger.capacity.overcommit = over(percent);
    ledger.promises.insert(Uid::from("i"), promise("i", Class::Images, images * G));
    for (index, size) in volumes.iter().enumerate() {
        let uid = Uid::from(format!("v{index}"));
        ledger.promises.insert(uid, promise("v", Class::Volumes, size * G));
    }
    ledger
}

fn volume(gib: u64) -> [(Uid, Promise); 1] {
    [(Uid::from("new"), promise("new", Class::Volumes, gib * G))]
}

/// What the policy makes of the ledger where the area is as large as it was.
fn follow(ledger: &mut LedgerView, percent: u32) -> LedgerCapacity {
    let wanted = LedgerCapacity { overcommit: over(percent), ..LedgerCapacity::shared(Bytes(10 * G)) };
    ledger.capacity = wanted.covering(ledger.capacity.overcommit, ledger.promises.values());
    ledger.capacity
}

#[test]
fn d46_volumes_count_for_their_part_and_images_in_full() {
    let ledger = book(300, 4, &[9, 8]); // 17 / 3 is more than 5 and less than 6
    assert_eq!(fits(&ledger, &volume(1)), Ok(()), "18 count for 6");
    let short = fits(&ledger, &volume(4)).expect_err("21 count for 7");
    assert_eq!(short, Shortfall { bytes: Bytes(G), bound: Bound::Data(Area::Total) });
    let image = [(Uid::from("new"), promise("new", Class::Images, 6 * G))];
    assert!(fits(&ledger, &image).is_err(), "staging is never overcommitted");
    assert_eq!(free(&ledger, Class::Volumes), Bytes(G));
    assert_eq!(free(&ledger, Class::Images), Bytes(10 * G - 4 * G - (17 * G).div_ceil(3)));
    let plain = book(100, 4, &[6]);
    assert_eq!(free(&plain, Class::Volumes), Bytes::ZERO);
}

#[test]
fn d46_no_volume_is_larger_than_what_volumes_can_attain() {
    let mut ledger = book(300, 0, &[]);
    ledger.capacity.volumes.data = Bytes(7 * G);
    assert_eq!(fits(&ledger, &volume(7)), Ok(()));
    let large = fits(&ledger, &volume(8)).expect_err("nobody could write it whole");
    assert_eq!(large, Shortfall { bytes: Bytes(G), bound: Bound::OneVolume });
    assert_eq!(large.to_string(), "lacks 1 GiB for one volume");
    assert_eq!(fits_empty(&ledger.capacity, &volume(8)), Err(large));
    let charge = |data| Charge { data, metadata: Bytes::ZERO };
    assert_eq!(largest(&ledger, Class::Volumes, Bytes(G), charge), Bytes(7 * G));
    assert_eq!(free(&ledger, Class::Volumes), Bytes(21 * G), "in all");
    // Images have taken more since: what is promised stays, and may be promised again, but grows no more.
    ledger.promises.insert(Uid::from("new"), promise("new", Class::Volumes, 7 * G));
    ledger.capacity.volumes.data = Bytes(5 * G);
    assert_eq!((fits(&ledger, &volume(7)), fits(&ledger, &volume(8)).is_err()), (Ok(()), true));
}

#[test]
fn a_lower_percentage_admits_nothing_until_what_is_promised_fits() {
    let mut ledger = book(300, 2, &[6, 6, 6]);
    let lowered = follow(&mut ledger, 150);
    assert_eq!(lowered.overcommit.percent.get(), 225, "18 count for the 8 that images leave");
    assert_eq!((lowered.volumes.data, lowered.total.data), (Bytes(8 * G), Bytes(10 * G)));
    assert_eq!(free(&ledger, Class::Volumes), Bytes::ZERO);
    assert_eq!(free(&ledger, Class::Images), Bytes::ZERO);
    ledger.promises.remove(&Uid::from("v0"));
    assert_eq!(follow(&mut ledger, 150).overcommit.percent.get(), 150, "12 count for 8 now");
    assert_eq!(free(&ledger, Class::Volumes), Bytes::ZERO);
    ledger.promises.remove(&Uid::from("v1"));
    let fits_again = follow(&mut ledger, 150);
    assert_eq!((fits_again.total.data, free(&ledger, Class::Volumes)), (Bytes(10 * G), Bytes(6 * G)));
    assert_eq!(follow(&mut ledger, 150), fits_again, "and so it stays");
}

#[test]
fn a_lower_limit_does_not_overcommit_what_was_not() {
    let ledger = book(100, 4, &[6]);
    let lower = LedgerCapacity { overcommit: Overcommit::NONE, ..LedgerCapacity::shared(Bytes(5 * G)) };
    let covered = lower.covering(ledger.capacity.overcommit, ledger.promises.values());
    assert_eq!((covered.overcommit, covered.total.data), (Overcommit::NONE, Bytes(10 * G)));
}

#[test]
fn what_a_node_may_have_grown_to_by_what_it_knew_is_not_left_to_images() {
    let mut ledger = book(100, 1, &[8]);
    let raised = follow(&mut ledger, 400);
    assert_eq!((raised.images.data, raised.overcommit.attain), (Bytes(2 * G), Bytes(8 * G)));
    assert_eq!(free(&ledger, Class::Images), Bytes(G), "although volumes count for 2 only");
    let lowered = follow(&mut ledger, 100);
    assert_eq!((lowered.images.data, lowered.overcommit), (Bytes(2 * G), Overcommit::NONE));
    let seen = follow(&mut ledger, 100);
    assert_eq!(seen.images.data, Bytes(10 * G), "once the node knows that it may not");
}

#[test]
fn what_volumes_write_is_theirs_as_far_as_images_were_not_promised_it() {
    let mut ledger = book(300, 4, &[3]);
    let wanted = |attain| LedgerCapacity {
        overcommit: Overcommit { attain: Bytes(attain * G), ..over(300) },
        ..LedgerCapacity::shared(Bytes(10 * G))
    };
    let grown = wanted(3).covering(ledger.capacity.overcommit, ledger.promises.values());
    assert_eq!((grown.images.data, grown.overcommit.attain), (Bytes(7 * G), Bytes(3 * G)));
    assert_eq!(grown.overcommit.target(Bytes(3 * G)), Bytes(3 * G));
    ledger.capacity = wanted(9).covering(grown.overcommit, ledger.promises.values());
    assert_eq!(
        (ledger.capacity.images.data, ledger.capacity.overcommit.attain),
        (Bytes(4 * G), Bytes(6 * G))
    );
    assert_eq!(ledger.attainable_by_volumes(), Bytes(6 * G), "although their kernel pool could have more");
    let kept = wanted(0).covering(ledger.capacity.overcommit, ledger.promises.values());
    assert_eq!(kept, ledger.capacity, "none ever shrinks");
}

#[test]
fn a_percentage_is_one_from_100_to_1000() {
    assert_eq!([99, 1001].map(Percent::new), [None, None]);
    assert_eq!([0, 99, 300, 1001].map(|percent| Percent::from(percent).get()), [100, 100, 300, 1000]);
    assert_eq!(Percent::new(300).expect("in range").to_string(), "300 %");
    assert_eq!(u32::from(Percent::from(300)), 300);
}

proptest! {
    /// Told from naive sums in whole units: what counts, whether it fits, and how much is left.
    #[test]
    fn promises_fit_exactly_when_naive_sums_of_parts_do(
        percent in 100..=1000_u32,
        bounds in (0..100_u64, 0..100_u64, 0..150_u64),
        held in proptest::collection::vec((any::<bool>(), 0..200_u64), 0..6),
        size in 1..200_u64, is_volume in any::<bool>(),
    ) {
        let class = |is_volume: bool| if is_volume { Class::Volumes } else { Class::Images };
        let mut ledger = ledger("p", "n", 0);
        let data = |bytes| Charge { data: Bytes(bytes), metadata: Bytes::ZERO };
        ledger.capacity = LedgerCapacity {
            images: data(bounds.0), volumes: data(bounds.1), total: data(bounds.2), overcommit: over(percent),
        };
        for (index, (is_volume, size)) in held.iter().enumerate() {
            ledger.promises.insert(Uid::from(format!("u{index}")), promise("u", class(*is_volume), *size));
        }
        let (mut images, mut volumes) = (0, 0);
        for (is_volume, size) in held.iter().copied().chain([(is_volume, size)]) {
            if is_volume { volumes += size } else { images += size }
        }
        // The smallest whole number that is no less than the part.
        let parts = (0..=volumes).find(|part| part * u64::from(percent) >= volumes * 100).expect("at most all");
        let alone = !is_volume || size <= bounds.1;
        let yes = images <= bounds.0 && parts <= bounds.1 && images + parts <= bounds.2;
        let new = [(Uid::from("new"), promise("new", class(is_volume), size))];
        prop_assert_eq!(fits(&ledger, &new).is_ok(), yes && alone);
        let before = fits(&ledger, &[]).is_ok();
        prop_assert_eq!(before && size <= free(&ledger, class(is_volume)).0, before && yes);
    }

    /// Whatever the policy does, and however late the reports are: what the node may make of any ledger that it may still obey
    /// fits beside what images are promised, and beside all that they may be promised by the newest.
    #[test]
    fn no_change_of_the_policy_takes_from_images_what_they_are_promised(
        images in 0..11_u64,
        steps in proptest::collection::vec((100..=1000_u32, 0..12_u64, 0..30_u64, any::<bool>()), 1..12),
    ) {
        let mut ledger = book(100, images, &[]);
        // What the kernel pool of volumes may have become, and what of that is reported. It becomes all that it may at once.
        let (mut may_be, mut reported) = (Bytes::ZERO, Bytes::ZERO);
        for (percent, demand, volume, present) in steps {
            let uid = Uid::from("v");
            if ledger.promises.remove(&uid).is_some() {
                reported = may_be; // by the report that it is gone
            }
            let new = [(uid, promise("v", Class::Volumes, volume * G))];
            if fits(&ledger, &new).is_ok() {
                ledger.promises.extend(new);
            }
            let promised = Sums::of(ledger.promises.values()).data(Area::Volumes, Percent::WHOLE);
            may_be = may_be.max(ledger.capacity.overcommit.target(promised));
            reported = if present { may_be } else { reported };
            let mut wanted = LedgerCapacity { overcommit: over(percent), ..LedgerCapacity::shared(Bytes(10 * G)) };
            wanted.images.data = wanted.images.data.saturating_sub(reported);
            wanted = if present { wanted } else { ledger.capacity.lowered_to(&wanted) };
            wanted.overcommit.attain = Bytes(demand * G);
            ledger.capacity = wanted.covering(ledger.capacity.overcommit, ledger.promises.values());
            let next = ledger.capacity.overcommit.target(promised).max(may_be);
            prop_assert!(ledger.capacity.total.data <= Bytes(10 * G));
            prop_assert!(Sums::of(ledger.promises.values()).excess(&ledger.capacity).is_none());
            let all = next.saturating_add(Bytes(images * G)).saturating_add(free(&ledger, Class::Images));
            prop_assert!(all <= Bytes(10 * G), "{:?} beside {}", ledger.capacity, next);
        }
    }
}
