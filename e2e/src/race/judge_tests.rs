use super::*;

fn ledger(version: u64, revision: i64, holders: &[&str]) -> Change {
    let entry = || Entry {
        class: "Images".into(),
        bytes: 60,
        generation: 1,
        writer: Some("a".into()),
        revoked: None,
    };
    let promises = holders.iter().map(|uid| ((*uid).to_owned(), entry())).collect();
    let capacity = [100, 100, 100];
    let (pool, node, lineage) = ("p".to_owned(), "n".to_owned(), "l".to_owned());
    Change { version, fact: Fact::Ledger { pool, node, lineage, revision, capacity, promises, gone: false } }
}

fn reservation(version: u64, uid: &str, placed: bool, deleting: bool, gone: bool) -> Change {
    let place = placed.then(|| Place { pool: "p".into(), node: "n".into(), generation: 1 });
    Change {
        version,
        fact: Fact::Reservation {
            uid: uid.into(),
            place,
            deleting,
            gone,
            finalizers: Vec::new(),
            writer: None,
        },
    }
}

fn released(version: u64, uid: &str) -> Change {
    report(version, 0, &[], &[uid])
}

fn report(version: u64, revision: i64, obeyed: &[&str], released: &[&str]) -> Change {
    let fact = Fact::Report {
        node: "n".into(),
        released: released.iter().map(|uid| ((*uid).to_owned(), 1)).collect(),
        obeyed: obeyed.iter().map(|uid| (*uid).to_owned()).collect(),
        revisions: [("p".to_owned(), revision)].into(),
    };
    Change { version, fact }
}

/// One reservation through its whole life, then another.
fn good() -> Vec<Change> {
    vec![
        ledger(1, 1, &[]),
        reservation(2, "r", false, false, false),
        ledger(3, 2, &["r"]),
        reservation(4, "r", true, false, false),
        reservation(5, "r", true, true, false),
        released(6, "r"),
        ledger(7, 3, &[]),
        ledger(8, 4, &["s"]),
        reservation(9, "s", true, false, false),
        reservation(10, "r", true, true, true),
        reservation(11, "s", true, true, false),
        released(12, "s"),
        ledger(13, 5, &[]),
        reservation(14, "s", true, true, true),
    ]
}

fn properties(changes: Vec<Change>) -> BTreeSet<Property> {
    judge(changes).violations.into_iter().map(|violation| violation.property).collect()
}

#[test]
fn a_right_history_is_counted_and_found_right() {
    let mut shuffled = good();
    shuffled.reverse();
    let tally = judge(shuffled);
    assert!(tally.violations.is_empty(), "{:?}", tally.violations);
    assert_eq!((tally.admissions, tally.releases), (2, 2));
    assert_eq!(tally.by_writer, [("a".to_owned(), 2)].into());
}

#[test]
fn each_property_is_missed_when_it_is_broken() {
    let mut both = good();
    both[6] = ledger(7, 3, &["r", "s"]);
    let found = properties(both);
    assert!(found.contains(&Property::Bounded) && found.contains(&Property::OneAtATime), "{found:?}");

    let mut early = good();
    early[5] = released(8, "r");
    assert!(properties(early).contains(&Property::AssignedIsPromised));

    let mut unreleased = good();
    unreleased.remove(5);
    assert!(properties(unreleased).contains(&Property::GivenBackBeforeGone));

    let mut late = good();
    late[3] = reservation(4, "r", false, true, false);
    assert!(properties(late).contains(&Property::PlacementIsFinal));

    let mut overwritten = good();
    overwritten[7] = ledger(8, 3, &["s"]);
    assert!(properties(overwritten).contains(&Property::RevisionRises));

    let mut kept = good();
    kept.truncate(5);
    assert!(properties(kept).contains(&Property::NothingLeft));
}

/// One reservation that goes in spite of its finalizer, and is revoked at revision 3.
fn slipped(node: Change, end: Change) -> BTreeSet<Property> {
    let mut revoked = ledger(5, 3, &["r"]);
    if let Fact::Ledger { promises, .. } = &mut revoked.fact {
        promises.get_mut("r").expect("promised").revoked = Some(3);
    }
    let changes = vec![
        ledger(1, 1, &[]),
        ledger(2, 2, &["r"]),
        reservation(3, "r", true, false, false),
        reservation(4, "r", true, false, true),
        revoked,
        node,
        end,
    ];
    properties(changes)
}

#[test]
fn the_promise_of_what_slipped_away_stays_until_its_node_cannot_use_it() {
    assert_eq!(slipped(report(6, 3, &[], &[]), ledger(7, 4, &[])), BTreeSet::new());
    assert_eq!(slipped(report(6, 3, &["r"], &["r"]), ledger(7, 4, &[])), BTreeSet::new());
    let early = BTreeSet::from([Property::AssignedIsPromised, Property::NothingLeft]);
    assert_eq!(slipped(report(6, 2, &[], &[]), ledger(7, 4, &[])), early, "the node does not know yet");
    assert_eq!(slipped(report(6, 3, &["r"], &[]), ledger(7, 4, &[])), early, "the node has bytes of it");
}
