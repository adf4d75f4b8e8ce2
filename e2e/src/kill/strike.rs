//! The kills: who, when, and what happens until the process is back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use berth_api::TemplateImport;
use berth_api::template_import::ImportState;
use kube::Api;
use kube::api::DeleteParams;
use tokio::time::sleep;

use super::images;
use super::stage::Stage;
use super::{IMPORT_LIMIT, KillError, NAMESPACE, Plan, Run};
use crate::site::{Site, SiteError};

/// How often the log is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Data of the import that is given up.
const GIVEN_UP_MIB: u64 = 256;

/// A process that is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    /// The operator.
    Operator,
    /// The node's agent with its children.
    Node,
    /// The S3 server.
    Store,
}

impl Victim {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Operator, Self::Node, Self::Store];

    /// In turn, the agent first: it has most to lose.
    pub(crate) fn turn(number: u64) -> Self {
        match number % 5 {
            0 | 2 => Self::Node,
            1 | 4 => Self::Store,
            _ => Self::Operator,
        }
    }
}

/// When the next kill is due.
struct Armed {
    stage: Stage,
    at: Instant,
}

impl Run<'_> {
    /// Kills as planned until the import has ended; returns the kills that did not happen.
    pub(super) async fn strike_until_ended(
        &mut self,
        plan: &Plan<'_>,
        deadline: Instant,
    ) -> Result<BTreeMap<Stage, u64>, KillError> {
        let mut left = plan.kills.clone();
        let mut armed: Option<Armed> = None;
        loop {
            let known = self.ready.known(&plan.name).unwrap_or_default();
            if matches!(known.status.state, Some(ImportState::Ready | ImportState::Failed)) {
                return Ok(left);
            }
            if Instant::now() >= deadline {
                let status = serde_json::to_string(&known.status).unwrap_or_default();
                self.violated(format!("import {} has not ended in time: {status}", plan.name));
                return Ok(left);
            }
            let (current, _) = self.stages.look().map_err(|source| self.log_failed(source))?;
            let wanted = current.filter(|stage| left.contains_key(stage));
            match (&armed, wanted) {
                (_, None) => armed = None,
                (Some(one), Some(stage)) if one.stage == stage => {
                    if Instant::now() >= one.at {
                        let victim = Victim::turn(self.strikes);
                        self.strikes += 1;
                        self.strike(stage, victim).await?;
                        count_down(&mut left, stage);
                        armed = None;
                    }
                }
                (_, Some(stage)) => {
                    let (low, high) = stage.moments();
                    armed = Some(Armed { stage, at: Instant::now() + self.seeded.millis(low, high) });
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Kills, pauses, starts again.
    async fn strike(&mut self, stage: Stage, victim: Victim) -> Result<(), KillError> {
        *self.report.kills.entry((stage, victim)).or_default() += 1;
        let pause = self.seeded.millis(20, 400);
        kill(&mut self.site, victim, pause).await?;
        if victim == Victim::Node {
            self.stages.reset().map_err(|source| self.log_failed(source))?;
        }
        Ok(())
    }

    /// Deletes an import of another content in the middle of its upload: its chunks stay, and nothing else.
    pub(super) async fn give_up_in_the_middle(&mut self) -> Result<(), KillError> {
        let mib = GIVEN_UP_MIB.min(self.options.data_mib);
        let made = tokio::task::spawn_blocking(move || images::obtain(mib, 2)).await;
        let other = made.expect("making an image does not panic")?;
        let plan = Self::plan("given-up", "killed", &other.qcow2);
        let url = self.serve(&plan)?;
        let before = self.stages.checkpoints();
        self.request(&plan, &url).await?;
        let deadline = Instant::now() + IMPORT_LIMIT;
        let imports: Api<TemplateImport> = Api::namespaced(self.site.client(), NAMESPACE);
        let mut deleted = false;
        while !self.ready.known("given-up").is_some_and(|known| known.gone) {
            if Instant::now() >= deadline {
                self.violated("the import that was given up does not go".to_owned());
                return Ok(());
            }
            self.stages.look().map_err(|source| self.log_failed(source))?;
            let known = self.ready.known("given-up").unwrap_or_default();
            // With a defect that has no checkpoints it may end first.
            let ended = known.status.durable.is_some();
            if !deleted && (ended || self.stages.checkpoints() > before + 1) {
                let answer = imports.delete("given-up", &DeleteParams::default()).await;
                answer
                    .map_err(|source| KillError::Request { action: "delete the import given-up", source })?;
                deleted = true;
            }
            sleep(LOOK).await;
        }
        self.stages.reset().map_err(|source| self.log_failed(source))
    }
}

/// Kills, pauses, starts again.
pub(crate) async fn kill(site: &mut Site, victim: Victim, pause: Duration) -> Result<(), SiteError> {
    match victim {
        Victim::Node => {
            site.node_mut(0).kill9();
            sleep(pause).await;
            site.node_mut(0).start_agent()
        }
        Victim::Operator => {
            site.kill9_operator(0);
            sleep(pause).await;
            site.start_operator(0)
        }
        Victim::Store => {
            site.s3_mut().kill9();
            sleep(pause).await;
            Ok(site.s3_mut().restart().await?)
        }
    }
}

/// One kill less is left in this stage.
pub(crate) fn count_down(left: &mut BTreeMap<Stage, u64>, stage: Stage) {
    if let Some(count) = left.get_mut(&stage) {
        *count -= 1;
        if *count == 0 {
            left.remove(&stage);
        }
    }
}
