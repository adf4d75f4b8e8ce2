//! One transfer, and the kills while it is under way.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use berth_api::ImageTransfer;
use berth_api::image_transfer::{ImageTransferStatus, TransferState};
use kube::Api;
use kube::api::DeleteParams;
use serde_json::json;
use tokio::time::sleep;

use super::routes::Route;
use super::{KillError, NAMESPACE, Run};
use crate::kill::Victim;
use crate::kill::stage::Stage;
use crate::kill::strike;

/// How often the log is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// How often the object is.
const ASK: Duration = Duration::from_millis(300);
/// How long a transfer may take beside what its kills cost.
const LIMIT: Duration = Duration::from_secs(180);
/// What a kill may cost in time: restart, recovery, pauses before retries.
const KILL_LIMIT: Duration = Duration::from_secs(40);

/// How a transfer ended.
pub(super) enum Ended {
    /// As it was asked for.
    Succeeded(Box<ImageTransferStatus>),
    /// It was deleted under way, and is gone.
    Deleted,
}

impl Run<'_> {
    /// Transfers with kills in these stages, and compares what it comes to.
    pub(super) async fn transfer(
        &mut self,
        number: u64,
        route: Route,
        planned: BTreeMap<Stage, u64>,
        deleted: bool,
    ) -> Result<(), KillError> {
        let name = format!("t{number}");
        let object = json!({
            "apiVersion": "staging.berth.dev/v1alpha1", "kind": "ImageTransfer",
            "metadata": { "name": name, "namespace": NAMESPACE }, "spec": route.spec(&self.site, &name),
        });
        self.site.apply(&object.to_string()).await?;
        let began = Instant::now();
        let before = self.report.all_kills();
        let ended = self.strike_until_ended(&name, planned, deleted).await?;
        let kills = self.report.all_kills() - before;
        *self.report.routes.entry(route.name()).or_default() += 1;
        self.stages.reset().map_err(|source| self.log_failed(source))?;
        let Some(ended) = ended else { return Ok(()) };
        let line = format!("{name}: {}, {} s, {kills} kills", route.name(), began.elapsed().as_secs());
        self.check_transfer(&name, route, kills, &ended, line).await
    }

    /// Kills until the transfer has ended. `None` if it ended otherwise than it may; that is noted.
    async fn strike_until_ended(
        &mut self,
        name: &str,
        mut left: BTreeMap<Stage, u64>,
        deleted: bool,
    ) -> Result<Option<Ended>, KillError> {
        let transfers: Api<ImageTransfer> = Api::namespaced(self.site.client(), NAMESPACE);
        let kills = left.values().sum::<u64>();
        let deadline = Instant::now() + LIMIT + KILL_LIMIT * u32::try_from(kills).unwrap_or(1);
        let (mut armed, mut asked) = (None::<(Stage, Instant)>, Instant::now());
        let mut gives_up = deleted;
        loop {
            if asked.elapsed() >= ASK {
                asked = Instant::now();
                match self.look(&transfers, name).await? {
                    None if deleted => return Ok(Some(Ended::Deleted)),
                    None => {
                        self.violated(format!("{name} is gone though nobody deleted it"));
                        return Ok(None);
                    }
                    Some(status) if !deleted || !gives_up => match status.state {
                        Some(TransferState::Succeeded) if !deleted => {
                            return Ok(Some(Ended::Succeeded(Box::new(status))));
                        }
                        Some(TransferState::Failed) if !deleted => {
                            self.violated(format!("{name} has failed: {:?}", status.last_error));
                            return Ok(None);
                        }
                        _ => {}
                    },
                    Some(_) => {}
                }
            }
            if Instant::now() >= deadline {
                let status = self.look(&transfers, name).await?;
                self.violated(format!("{name} has not ended in time: {status:?}"));
                return Ok(None);
            }
            let (current, _) = self.stages.look().map_err(|source| self.log_failed(source))?;
            armed = match (armed, current) {
                (_, None) => None,
                (Some((stage, at)), Some(now)) if stage == now => {
                    if Instant::now() < at {
                        Some((stage, at))
                    } else if left.contains_key(&stage) {
                        strike::count_down(&mut left, stage);
                        self.strike(stage).await?;
                        None
                    } else if gives_up && stage == Stage::Upload {
                        gives_up = false;
                        self.delete(&transfers, name).await?;
                        None
                    } else {
                        Some((stage, at))
                    }
                }
                (_, Some(stage)) => {
                    let (low, high) = stage.moments();
                    Some((stage, Instant::now() + self.seeded.millis(low, high)))
                }
            };
            sleep(LOOK).await;
        }
    }

    async fn look(
        &self,
        transfers: &Api<ImageTransfer>,
        name: &str,
    ) -> Result<Option<ImageTransferStatus>, KillError> {
        let found = transfers.get_opt(name).await;
        let found = found.map_err(|source| KillError::Request { action: "read a transfer", source })?;
        Ok(found.map(|found| found.status.unwrap_or_default()))
    }

    async fn delete(&self, transfers: &Api<ImageTransfer>, name: &str) -> Result<(), KillError> {
        let deleted = transfers.delete(name, &DeleteParams::default()).await;
        deleted.map(drop).map_err(|source| KillError::Request { action: "delete a transfer", source })
    }

    async fn strike(&mut self, stage: Stage) -> Result<(), KillError> {
        let victim = Victim::turn(self.strikes);
        self.strikes += 1;
        *self.report.kills.entry((stage, victim)).or_default() += 1;
        let pause = self.seeded.millis(20, 400);
        strike::kill(&mut self.site, victim, pause).await?;
        if victim == Victim::Node {
            self.stages.reset().map_err(|source| self.log_failed(source))?;
        }
        Ok(())
    }
}
