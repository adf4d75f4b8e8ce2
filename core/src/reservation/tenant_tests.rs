use super::*;
use crate::change::Change;
use crate::fixture::{add, ask, hold, pool, reservation, told, unreadable, view};
use crate::ids::{NodeName, ObjectName, PoolName, ledger_name};
use crate::ledger::Class;
use crate::reason::Reason;
use crate::view::ReservationState;

fn decided(name: &str, view: &View) -> (Reason, Option<Bytes>) {
    let report = told(view, name);
    (report.reason, report.shortfall)
}

/// A pool that limits every namespace to 50 bytes.
fn limited() -> View {
    let mut view = view(&[("a", 100)]);
    let limit = TenantLimit { namespaces: BTreeMap::new(), bytes: Some(Bytes(50)), reservations: None };
    view.pools.values_mut().for_each(|pool| pool.tenant_limits = vec![limit.clone()]);
    view
}

#[test]
fn an_object_that_cannot_be_read_stops_no_namespace_whose_limit_can_be_judged() {
    let mut view = limited();
    hold(&mut view, "a", "hidden", Class::Images, 30);
    view.unreadable.push(unreadable("StagingReservation", ObjectName::new("ns", "hidden"), "hidden"));
    add(&mut view, reservation("r", 20, 0));
    assert!(matches!(&ask(&view, "r")[..], [Change::WriteLedger { .. }, _]), "20 of 50 are left");
    add(&mut view, reservation("r", 21, 0));
    assert_eq!(decided("r", &view), (Reason::TenantLimit, Some(Bytes(1))), "what it holds counts");
    view.unreadable[0].claim_namespace = "other".to_owned();
    assert!(
        matches!(&ask(&view, "r")[..], [Change::WriteLedger { .. }, _]),
        "for the namespace of its claim"
    );
    view.unreadable[0] = unreadable("ImageTransfer", ObjectName::new("ns", "t"), "t");
    add(&mut view, reservation("r", 20, 0));
    assert!(matches!(&ask(&view, "r")[..], [Change::WriteLedger { .. }, _]));
}

#[test]
fn while_a_ledger_cannot_be_read_its_limited_namespaces_wait_and_say_so_and_hold_nobody_back() {
    let mut view = limited();
    view.pools.values_mut().for_each(|pool| {
        pool.tenant_limits[0].namespaces.insert("team".to_owned(), "a".to_owned());
    });
    view.namespaces.insert("ns".to_owned(), [("team".to_owned(), "a".to_owned())].into());
    let ledger = ledger_name(&PoolName::from("p"), &NodeName::from("a"));
    view.unreadable.push(unreadable("StagingLedger", ObjectName::new("", ledger), "l"));
    let mut waits = reservation("r", 20, 0);
    waits.state = ReservationState::Queued;
    add(&mut view, waits);
    let said = told(&view, "r");
    assert_eq!((said.state, said.reason), (ReservationState::Queued, Reason::ObjectUnreadable));
    assert!(said.message.contains("StagingLedger p-"), "{}", said.message);
    assert!(
        said.message.contains("cannot be read: spec.access: unknown variant `Sideways`"),
        "{}",
        said.message
    );
    let mut free = reservation("free", 90, 1);
    free.claim_namespace = "other".to_owned();
    add(&mut view, free);
    assert!(
        matches!(&ask(&view, "free")[..], [Change::WriteLedger { .. }, _]),
        "it has no limit, and waits for nobody"
    );
    view.unreadable[0].name.name = "of-another-pool".to_owned();
    assert_eq!(told(&view, "r").reason, Reason::ObjectUnreadable, "it may be this pool's");
    let mut other = pool("q");
    other.tenant_limits.clear();
    view.pools.insert(other.name.clone(), other);
    view.unreadable[0].name.name = ledger_name(&PoolName::from("q"), &NodeName::from("a"));
    assert!(matches!(&ask(&view, "r")[..], [Change::WriteLedger { .. }, _]), "it is another pool's");
}

#[test]
fn nothing_is_decided_of_a_request_that_cannot_be_read_and_nobody_waits_for_it() {
    let mut view = view(&[("a", 100)]);
    let mut hidden = reservation("hidden", 90, 0);
    hidden.state = ReservationState::Queued;
    add(&mut view, hidden);
    add(&mut view, reservation("r", 20, 1));
    assert_eq!(told(&view, "r").reason, Reason::Queued, "it waits for the earlier one");
    view.unreadable.push(unreadable("StagingReservation", ObjectName::new("ns", "hidden"), "hidden"));
    assert_eq!(ask(&view, "hidden"), []);
    assert!(matches!(&ask(&view, "r")[..], [Change::WriteLedger { .. }, _]));
}
