//! A large request among a stream of small ones.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_api::StagingReservation;
use berth_api::staging_reservation::ReservationState;
use kube::api::DeleteParams;
use serde_json::json;

use super::bed::{Bed, GIB};
use super::state_of;

/// A quarter of it passes until a request is overtaken no more. Unit: seconds.
const MAX_QUEUE_TIME: i64 = 60;
/// Times are told by whole seconds.
const UNIT: i64 = 1;
/// How many small ones there is room for.
const HOLDERS: i64 = 10;
/// What the large one needs of that.
const LARGE: i64 = 8;

/// What is going on.
struct Stream {
    bed: Bed,
    /// Small ones that hold space or wait for it, the oldest first.
    small: VecDeque<String>,
    made: u32,
}

impl Stream {
    /// One more of high priority is asked for.
    async fn asked(&mut self) -> anyhow::Result<()> {
        self.made += 1;
        let name = format!("small-{}", self.made);
        self.bed.ask("default", &name, json!({"maxSize": GIB, "priority": 100})).await?;
        self.bed
            .wait_for("default", &name, "to be decided", |seen| {
                let state = seen.and_then(state_of);
                matches!(state, Some(ReservationState::Ready | ReservationState::Queued))
            })
            .await?;
        self.small.push_back(name);
        Ok(())
    }

    /// The oldest one, which has its space, is done.
    async fn done(&mut self) -> anyhow::Result<()> {
        let name = self.small.pop_front().context("no small one is left")?;
        let state = self.bed.state(&name).await?;
        ensure!(state == Some(ReservationState::Ready), "{name}, the oldest, is {state:?}");
        self.bed.reservations().delete(&name, &DeleteParams::default()).await?;
        self.bed.wait_gone(&name).await
    }

    async fn large(&self) -> anyhow::Result<StagingReservation> {
        Ok(self.bed.reservations().get("large").await?)
    }
}

/// All space is taken by small ones, and for each that ends another one of higher priority is there already. They overtake the
/// large one until it has waited for a quarter of the longest time; from then on it is served as soon as as many of them as it
/// needs room for have ended, and that is all that it waits for.
pub(super) async fn served_within_bounds() -> anyhow::Result<()> {
    let mut bed = Bed::start().await?;
    bed.change_pool(json!({"admission": {"maxQueueTime": format!("{MAX_QUEUE_TIME}s")}})).await?;
    bed.start_operator("one")?;
    let _node = bed.node("n1", HOLDERS * GIB).await?;
    let mut stream = Stream { bed, small: VecDeque::new(), made: 0 };
    for _ in 0..HOLDERS {
        stream.asked().await?;
    }
    stream.bed.ask("default", "large", json!({"maxSize": LARGE * GIB})).await?;
    let large = stream.bed.wait_state("large", ReservationState::Queued).await?;
    let asked = large.metadata.creation_timestamp.context("no time")?.0;
    let overdue = jiff::SignedDuration::from_secs(MAX_QUEUE_TIME / 4 + UNIT);

    let (mut overtaken, mut rounds) = (0, 0);
    while stream.large().await?.status.unwrap_or_default().assignment.is_none() {
        let late = jiff::Timestamp::now().duration_since(asked) > overdue;
        stream.asked().await?;
        stream.done().await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        if late {
            rounds += 1;
            ensure!(rounds <= HOLDERS, "not served in {rounds} rounds: {:?}", stream.large().await?.status);
        } else {
            overtaken += 1;
        }
    }
    stream.bed.wait_state("large", ReservationState::Ready).await?;
    println!("overtaken by {overtaken} small ones, then served in {rounds} rounds");
    ensure!(overtaken > HOLDERS, "overtaken by {overtaken} only: that shows nothing");
    ensure!(stream.bed.check_sum("n1").await? <= HOLDERS * GIB, "more than there is");
    stream.bed.no_denials()
}
