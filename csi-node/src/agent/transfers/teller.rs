//! What a running transfer tells on its way, and asks.

use std::sync::Arc;

use berth_api::fields::{PlannedStaging, Progress, Stage};
use berth_core::reason::Reason;
use berth_core::stages::Shape;
use berth_core::units::{Bytes, Generation};
use futures::FutureExt as _;
use futures::future::BoxFuture;

use super::super::news::TransferNews;
use super::Subject;
use crate::node::{Node, now};
use crate::transfer::{Claim, Reporter, Snapshot};

/// What a running transfer is told of by.
pub(super) struct Teller {
    pub node: Arc<Node>,
    pub subject: Subject,
}

impl Teller {
    pub fn new(node: &Arc<Node>, subject: &Subject) -> Self {
        Self { node: Arc::clone(node), subject: subject.clone() }
    }

    pub fn edit(&self, edit: impl FnOnce(&mut TransferNews)) {
        self.node.news.edit_transfer(&self.subject.uid(), &self.subject, edit);
        self.node.wake.notify_one();
    }

    /// An attempt begins. One that waited for its store shows that until it is known to be there: trying takes time too.
    pub fn attempt(&self) {
        self.edit(|news| {
            news.attempts = Some(news.attempts.unwrap_or_default().saturating_add(1));
            news.waiting = news.waiting.filter(|reason| *reason == Reason::ObjectStoreUnavailable);
        });
    }

    /// Whether its source is to be staged.
    pub fn planned(&self) -> Option<PlannedStaging> {
        self.known().plan?.staging
    }

    /// What an attempt, here or elsewhere, has told of its upload.
    pub fn resume(&self) -> Option<String> {
        self.known().resume
    }

    fn known(&self) -> TransferNews {
        self.node.news.transfer(&self.subject.uid(), &self.subject)
    }
}

impl Reporter for Teller {
    fn progress(&self, shape: &Shape, at: Snapshot) {
        let percent = shape.percent(at.stage, at.done, at.total);
        let mut told = false;
        self.node.news.edit_transfer(&self.subject.uid(), &self.subject, |news| {
            // No attempt gets so far before its store has answered.
            told = news.waiting.take().is_some();
            let Some(said) = news.said.next(percent, at.stage, now()) else { return };
            told = true;
            news.said = said;
            let (index, total) = shape.position(at.stage);
            news.stage = Some(Stage { index: index.into(), total: total.into(), name: at.stage.to_string() });
            let rate = rate(news, at.on_wire);
            news.progress = Some(Progress {
                percent: Some(said.percent.into()),
                bytes_done: at.done.as_i64(),
                bytes_total: Some(at.total.as_i64()),
                bytes_skipped: at.skipped.as_i64(),
                bytes_on_wire: at.on_wire.as_i64(),
                rate,
            });
        });
        if told {
            self.node.wake.notify_one();
        }
    }

    fn resume(&self, text: String) {
        let mut told = false;
        self.node.news.edit_transfer(&self.subject.uid(), &self.subject, |news| {
            told = news.note_resume(text, now());
        });
        if told {
            self.node.wake.notify_one();
        }
    }
}

/// Bytes per second since the last report.
fn rate(news: &mut TransferNews, on_wire: Bytes) -> i64 {
    let now = now();
    let before = news.wire.replace((now, on_wire));
    let Some((then, bytes)) = before else { return 0 };
    let millis = now.millis_since(then).max(1);
    Bytes(on_wire.saturating_sub(bytes).0.saturating_mul(1000) / millis).as_i64()
}

/// Whether a generation of an object is this node's to do, by the API server's own word.
pub(super) struct Ours<'a> {
    pub node: &'a Node,
    pub subject: &'a Subject,
    pub generation: Generation,
}

impl Claim for Ours<'_> {
    fn holds(&self) -> BoxFuture<'_, bool> {
        self.subject.is_ours(self.node, self.generation).boxed()
    }
}
