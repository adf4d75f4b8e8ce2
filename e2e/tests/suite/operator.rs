//! The operator against a real API server, with its own service account, and nodes made of API objects.

mod abandoned;
mod admission;
pub mod bed;
mod fake_node;
mod metrics;
mod owned;
mod reclaim;
mod restored;
mod stream;
pub mod transfers;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::conditions::{ConditionType, find};
use berth_api::staging_reservation::ReservationState;
use berth_api::{StagingLedger, StagingPool, StagingReservation};
use berth_e2e::ours::{OPERATOR, OPERATOR_SABOTAGE};
use berth_e2e::wait::{self, Look};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, ResourceExt as _};

use self::bed::{Bed, GIB, MOMENT};
use crate::scenario::{CONTROL_PLANE, Need, Scenario};

pub fn scenarios() -> Vec<Scenario> {
    let operator = [CONTROL_PLANE, &[Need::Program(OPERATOR)]].concat();
    let sabotaged = [CONTROL_PLANE, &[Need::Program(OPERATOR_SABOTAGE)]].concat();
    let own = vec![
        Scenario::new("operator::promises_queues_and_releases", &operator, promises_queues_and_releases),
        Scenario::new("operator::refuses_with_the_shortfall", &operator, refuses_with_the_shortfall),
        Scenario::new("operator::a7_orders_by_priority_and_turns", &operator, admission::orders),
        Scenario::new(
            "operator::a_large_request_is_served_in_a_stream_of_small_ones",
            &operator,
            stream::served_within_bounds,
        ),
        Scenario::new("operator::limits_what_a_namespace_holds", &operator, admission::limits),
        Scenario::new("operator::a9_ends_what_nothing_uses", &operator, admission::ends),
        Scenario::new("operator::a29_answers_a_dry_run", &operator, admission::dry_run),
        Scenario::new(
            "operator::metrics_say_what_is_promised_refused_and_waited_for",
            &operator,
            metrics::counted,
        ),
        Scenario::new(
            "operator::a8_what_belongs_to_something_is_released_with_it",
            &operator,
            owned::released,
        ),
        Scenario::new("operator::continues_after_a_kill", &operator, continues_after_a_kill),
        Scenario::new("operator::a61_two_never_promise_too_much", &operator, a61_two_never_promise_too_much),
        Scenario::new("operator::checks_notice_lost_promises", &sabotaged, checks_notice_lost_promises),
        Scenario::new("operator::checks_notice_an_early_release", &sabotaged, checks_notice_an_early_release),
        Scenario::new("operator::sees_health_and_ends_in_order", &operator, sees_health_and_ends_in_order),
    ];
    own.into_iter()
        .chain(abandoned::scenarios(&operator))
        .chain(reclaim::scenarios(&operator))
        .chain(restored::scenarios(&operator))
        .chain(transfers::scenarios(&operator))
        .collect()
}

/// The life of a reservation, with one that waits behind it.
async fn promises_queues_and_releases() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 10 * GIB).await?;

    bed.reserve("first", 6 * GIB, "Queue").await?;
    let first = bed.wait_state("first", ReservationState::Ready).await?;
    let uid = first.uid().context("uid")?;
    let status = first.status.clone().unwrap_or_default();
    let assignment = status.assignment.context("no assignment")?;
    ensure!(assignment.node == "n1" && assignment.pool.as_deref() == Some("p"), "{assignment:?}");
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    let promise = ledger.spec.promises.get(&uid).context("no promise in the ledger")?;
    ensure!(promise.data_bytes == 6 * GIB && promise.generation == assignment.generation, "{promise:?}");
    let writers: BTreeSet<_> =
        ledger.managed_fields().iter().filter_map(|entry| entry.manager.clone()).collect();
    ensure!(writers.contains("berth-operator/one"), "the ledger does not tell who admitted: {writers:?}");

    bed.reserve("second", 6 * GIB, "Queue").await?;
    let second = bed.wait_state("second", ReservationState::Queued).await?;
    let status = second.status.clone().unwrap_or_default();
    let place = status.queue.context("no place in the queue")?;
    ensure!(place.position == 1 && place.reason == "InsufficientCapacity", "{place:?}");
    let promised = find(&status.conditions, ConditionType::Promised).context("no condition Promised")?;
    ensure!(promised.status == "False" && promised.reason == "InsufficientCapacity", "{promised:?}");
    ensure!(promised.message.chars().any(|c| c.is_ascii_digit()), "no numbers in {:?}", promised.message);

    node.set_releases(false);
    bed.reservations().delete("first", &DeleteParams::default()).await?;
    bed.wait_state("first", ReservationState::Releasing).await?;
    promise_stays(&bed, &uid).await?;
    ensure!(
        bed.state("second").await? == Some(ReservationState::Queued),
        "admitted into space that is not free"
    );
    node.set_releases(true);
    bed.wait_gone("first").await?;
    bed.wait_state("second", ReservationState::Ready).await?;
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(!ledger.spec.promises.contains_key(&uid), "the promise outlived its reservation");

    expect_events(&bed).await?;
    if let Some(fault) = node.fault().await {
        return Err(fault);
    }
    bed.no_denials()
}

/// Each change of state is an event of its object.
async fn expect_events(bed: &Bed) -> anyhow::Result<()> {
    let events: Api<Event> = Api::namespaced(bed.cluster.admin(), "default");
    wait::until("the events", MOMENT, || async {
        let events = match events.list(&ListParams::default()).await {
            Ok(events) => events,
            Err(error) => return Look::Failed(error),
        };
        let of = |name: &str, reason: &str| {
            events.iter().any(|event| {
                event.reason.as_deref() == Some(reason)
                    && event.regarding.as_ref().is_some_and(|object| object.name.as_deref() == Some(name))
            })
        };
        if of("first", "Promised") && of("second", "InsufficientCapacity") && of("first", "Releasing") {
            return Look::Done(());
        }
        let seen: Vec<_> = events
            .iter()
            .map(|e| format!("{:?}/{:?}", e.regarding.as_ref().and_then(|r| r.name.clone()), e.reason))
            .collect();
        Look::NotYet(seen.join(" "))
    })
    .await?;
    Ok(())
}

/// Requests that are not to wait, that can never fit, and kinds that are not carried out.
async fn refuses_with_the_shortfall() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", 10 * GIB).await?;
    bed.reserve("first", 6 * GIB, "Reject").await?;
    bed.wait_state("first", ReservationState::Ready).await?;

    bed.reserve("second", 6 * GIB, "Reject").await?;
    let second = bed.wait_state("second", ReservationState::Refused).await?;
    let status = second.status.clone().unwrap_or_default();
    ensure!(status.shortfall_bytes == Some(2 * GIB), "shortfall {:?}", status.shortfall_bytes);
    let ready = find(&status.conditions, ConditionType::Ready).context("no condition Ready")?;
    ensure!(ready.reason == "CapacityRefused", "{ready:?}");

    bed.reserve("giant", 11 * GIB, "Queue").await?;
    let giant = bed.wait_state("giant", ReservationState::Refused).await?;
    let status = giant.status.clone().unwrap_or_default();
    let ready = find(&status.conditions, ConditionType::Ready).context("no condition Ready")?;
    ensure!(ready.reason == "LargerThanPool", "{ready:?}");

    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(ledger.spec.promises.len() == 1, "refused ones hold promises: {:?}", ledger.spec.promises);
    for refused in ["second", "giant"] {
        bed.reservations().delete(refused, &DeleteParams::default()).await?;
        bed.wait_gone(refused).await?;
    }
    bed.no_denials()
}

/// Killed again and again while reservations come and go, the operator leaves nothing half done.
async fn continues_after_a_kill() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    let _node = bed.node("n1", 20 * GIB).await?;
    let names: Vec<String> = (0..12).map(|index| format!("r{index}")).collect();
    for round in 0..4_u64 {
        bed.start_operator("one")?;
        for name in &names[usize::try_from(round)? * 3..][..3] {
            bed.reserve(name, GIB, "Queue").await?;
        }
        tokio::time::sleep(Duration::from_millis(300 + 900 * round)).await;
        bed.kill_operator("one")?;
    }
    bed.start_operator("one")?;
    for name in &names {
        bed.wait_state(name, ReservationState::Ready).await?;
    }
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(ledger.spec.promises.len() == names.len(), "{} promises", ledger.spec.promises.len());
    for name in &names {
        bed.reservations().delete(name, &DeleteParams::default()).await?;
    }
    bed.kill_operator("one")?;
    bed.start_operator("one")?;
    for name in &names {
        bed.wait_gone(name).await?;
    }
    let ledger = bed.ledger("n1").await?.context("no ledger")?;
    ensure!(ledger.spec.promises.is_empty(), "promises without a holder: {:?}", ledger.spec.promises);
    bed.no_denials()
}

/// Two operators admit at once: never more than there is, and in the end all that fits.
async fn a61_two_never_promise_too_much() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    bed.start_operator("two")?;
    let _nodes = [bed.node("n1", 10 * GIB).await?, bed.node("n2", 10 * GIB).await?];
    for index in 0..30 {
        bed.reserve(&format!("r{index}"), GIB, "Queue").await?;
        for node in ["n1", "n2"] {
            bed.check_sum(node).await?;
        }
        bed.check_promises().await?;
    }
    let waited = wait::until("20 ready and 10 queued", MOMENT * 3, || async {
        let list = match bed.reservations().list(&ListParams::default()).await {
            Ok(list) => list,
            Err(error) => return Look::Failed(error),
        };
        let count = |state| list.iter().filter(|r| state_of(r) == Some(state)).count();
        let (ready, queued) = (count(ReservationState::Ready), count(ReservationState::Queued));
        if ready == 20 && queued == 10 {
            Look::Done(())
        } else {
            Look::NotYet(format!("{ready} and {queued}"))
        }
    });
    waited.await?;
    for node in ["n1", "n2"] {
        let sum = bed.check_sum(node).await?;
        ensure!(sum == 10 * GIB, "{node} holds {sum} bytes");
    }
    bed.check_promises().await?;
    let conflicts = bed.metric("one", "berth_ledger_conflicts_total").await?
        + bed.metric("two", "berth_ledger_conflicts_total").await?;
    let admissions = [
        bed.metric("one", "berth_admissions_total").await?,
        bed.metric("two", "berth_admissions_total").await?,
    ];
    println!("two operators: admissions {admissions:?}, ledger conflicts {conflicts}");
    bed.no_denials()
}

/// Promises can be lost: without compare-and-swap they are overwritten. They are made again soon, so every version of the
/// ledger is looked at.
async fn checks_notice_lost_promises() -> anyhow::Result<()> {
    let mut bed = Bed::sabotaged("no-compare-and-swap").await?;
    bed.start_operator("one")?;
    bed.start_operator("two")?;
    let _node = bed.node("n1", 2000 * GIB).await?;
    let ledgers: Api<StagingLedger> = Api::all(bed.cluster.admin());
    let lost = tokio::spawn(lost_promise(ledgers));
    // Two writers must meet for a promise to be lost: more requests come until they have.
    for round in 0..10 {
        for index in 0..60 {
            bed.reserve(&format!("r{round}-{index}"), GIB, "Queue").await?;
        }
        let until = std::time::Instant::now() + MOMENT;
        while !lost.is_finished() && std::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        if lost.is_finished() {
            break;
        }
    }
    ensure!(lost.is_finished(), "no promise was lost");
    println!("without compare-and-swap: {}", lost.await??);
    Ok(())
}

/// Waits until a version of a ledger lacks a promise that an earlier one had. Nothing is given back meanwhile.
async fn lost_promise(ledgers: Api<StagingLedger>) -> anyhow::Result<String> {
    let mut seen = BTreeSet::new();
    let mut events = watcher(ledgers, watcher::Config::default()).applied_objects().boxed();
    while let Some(ledger) = events.try_next().await? {
        if let Some(uid) = seen.iter().find(|uid| !ledger.spec.promises.contains_key(*uid)) {
            return Ok(format!("revision {} lacks the promise of {uid}", ledger.spec.revision));
        }
        seen.extend(ledger.spec.promises.into_keys());
    }
    anyhow::bail!("the watch of ledgers ended")
}

/// The check for releases can fail: the defect takes promises back before the node has given the bytes back.
async fn checks_notice_an_early_release() -> anyhow::Result<()> {
    let mut bed = Bed::sabotaged("early-release").await?;
    bed.start_operator("one")?;
    let node = bed.node("n1", 10 * GIB).await?;
    bed.reserve("first", 6 * GIB, "Queue").await?;
    let first = bed.wait_state("first", ReservationState::Ready).await?;
    node.set_releases(false);
    bed.reservations().delete("first", &DeleteParams::default()).await?;
    let kept = promise_stays(&bed, &first.uid().context("uid")?).await;
    ensure!(kept.is_err(), "the promise was kept in spite of the defect");
    Ok(())
}

/// Watches for two seconds that a promise, whose node does not release, stays.
async fn promise_stays(bed: &Bed, uid: &str) -> anyhow::Result<()> {
    let until = std::time::Instant::now() + Duration::from_secs(2);
    while std::time::Instant::now() < until {
        let ledger = bed.ledger("n1").await?.context("no ledger")?;
        ensure!(ledger.spec.promises.contains_key(uid), "the promise left before the node had released it");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// Probes, metrics, the Lease, no right to read Secrets, and an end in order.
async fn sees_health_and_ends_in_order() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.start_operator("one")?;
    bed.wait_ready("one").await?;
    let _node = bed.node("n1", 10 * GIB).await?;
    let pools: Api<StagingPool> = Api::all(bed.cluster.admin());
    wait::until("the pool to be ready", MOMENT, || async {
        match pools.get("p").await {
            Ok(pool) => {
                let status = pool.status.unwrap_or_default();
                match find(&status.conditions, ConditionType::Ready) {
                    Some(c) if c.status == "True" && status.capacity.total == 10 * GIB => Look::Done(()),
                    other => Look::NotYet(format!("{other:?} {:?}", status.capacity)),
                }
            }
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    for name in ["berth_pool_total_bytes", "berth_node_ready", "berth_reconcile_total"] {
        ensure!(bed.metric("one", name).await? > 0, "{name} is 0 or missing");
    }
    bed.wait_lease("one").await?;
    let operator = bed.cluster.client_for(&bed.operator_kubeconfig).await?;
    let secrets = Api::<Secret>::all(operator).list(&ListParams::default()).await;
    ensure!(
        matches!(&secrets, Err(kube::Error::Api(s)) if s.is_forbidden()),
        "the operator reads Secrets: {secrets:?}"
    );

    let begun = std::time::Instant::now();
    let code = bed.stop_operator("one")?;
    ensure!(code == Some(0), "SIGTERM: ended with {code:?}");
    ensure!(begun.elapsed() < Duration::from_secs(10), "SIGTERM: took {:?}", begun.elapsed());
    bed.wait_lease("").await?;
    bed.no_denials()
}

fn state_of(reservation: &StagingReservation) -> Option<ReservationState> {
    reservation.status.as_ref().and_then(|status| status.state)
}
