//! Staged images: how far each is.

use berth_api::StagedImage;
use berth_api::conditions::{ConditionType, Truth, condition, time};
use berth_api::fields::Progress;
use berth_api::parse::staged_state;
use berth_api::staged_image::{StagedImageHealth, StagedImageState};
use berth_core::ids::Uid;
use berth_core::image::{Event, StagedState};
use berth_core::node::NodeView;
use berth_core::reason::Reason;
use berth_core::states::Machine as _;
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::{ReportError, Wanted, apply, shown};
use crate::node::{Node, now};

/// Reports an image of this node.
pub(super) async fn report(node: &Node, view: &NodeView, object: &StagedImage) -> Result<(), ReportError> {
    let uid = Uid::from(object.uid().unwrap_or_default());
    let Some(image) = view.images.get(&uid) else { return Ok(()) };
    if image.deleting {
        return Ok(());
    }
    let Some(area) = view.pools.get(&image.pool).and_then(|pool| pool.area.as_ref()) else {
        return Ok(()); // nothing is known of it while its pool is not open
    };
    let held = area.images.get(&image.digest).filter(|held| held.holder == uid);
    let complete = held.is_some_and(|held| held.complete);
    let fill = node.news.fill(&uid).unwrap_or_default();
    let there = match held {
        Some(held) if held.complete => There::Whole,
        Some(held) if held.usable => There::Shown,
        _ => There::Nothing,
    };
    let state = image_state(staged_state(object), there, fill.error.is_some());
    let (truth, reason, message) = match (state, fill.error) {
        (StagedImageState::Ready, _) => (Truth::True, Reason::Ready, String::new()),
        (StagedImageState::Usable, None) => (Truth::True, Reason::Hydrating, String::new()),
        (StagedImageState::Usable | StagedImageState::Failed, Some((reason, message))) => {
            (Truth::False, reason, message)
        }
        _ => (Truth::False, Reason::Progressing, String::new()),
    };
    let percent = if complete { 100 } else { fill.percent };
    let size = image.virtual_size.as_i64();
    let progress = Progress {
        percent: Some(percent.into()),
        bytes_done: if complete { size } else { fill.done.as_i64() },
        bytes_total: Some(size),
        ..Progress::default()
    };
    let previous = object.status.as_ref().map(|status| status.conditions.clone()).unwrap_or_default();
    let ready =
        condition(&previous, ConditionType::Ready, truth, reason, message, object.metadata.generation, now());
    let mut status = json!({
        "state": state,
        "progress": progress,
        "conditions": [ready],
    });
    // Left out and not null, which is none of the words that the API knows.
    if let Some(health) = health(state) {
        status["health"] = json!(health);
    }
    if let Some(held) = held {
        status["lastUsed"] = json!(time(held.last_used));
    }
    let owned = &["state", "health", "progress", "lastUsed"];
    let wanted = Wanted { status, owned, conditions: &[ConditionType::Ready] };
    apply(node, Api::all(node.client.clone()), object, shown(object.status.as_ref())?, wanted).await
}

/// How much of an image is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum There {
    /// Nothing that anything could start from.
    Nothing,
    /// Enough to start from.
    Shown,
    /// All of it.
    Whole,
}

/// How good an image in this state is; nothing while that is not known.
fn health(state: StagedImageState) -> Option<StagedImageHealth> {
    match state {
        StagedImageState::Filling => None,
        StagedImageState::Usable => Some(StagedImageHealth::Usable),
        StagedImageState::Ready => Some(StagedImageHealth::Optimal),
        StagedImageState::Failed => Some(StagedImageHealth::Unusable),
    }
}

/// What is told of an image that was told to be `before`: one that could be used is filled anew before it can fail.
fn image_state(before: StagedState, there: There, failed: bool) -> StagedImageState {
    let event = match (there, failed) {
        (There::Whole, _) => Event::Complete,
        (There::Shown, _) => Event::Show,
        (There::Nothing, true) => Event::Fail,
        (There::Nothing, false) => Event::Fill,
    };
    match before.after(event) {
        Ok(StagedState::Usable) => StagedImageState::Usable,
        Ok(StagedState::Ready) => StagedImageState::Ready,
        Ok(StagedState::Failed) => StagedImageState::Failed,
        Ok(StagedState::New | StagedState::Filling) | Err(_) => StagedImageState::Filling,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_was_all_there_is_filled_anew_before_it_can_fail() {
        use StagedImageState::{Failed, Filling, Ready, Usable};
        let told = |before| {
            let all = [There::Whole, There::Shown, There::Nothing];
            all.map(|there| [false, true].map(|failed| image_state(before, there, failed))).concat()
        };
        let fails = [Ready, Ready, Usable, Usable, Filling, Failed];
        assert_eq!(told(StagedState::New), fails);
        assert_eq!(told(StagedState::Failed), fails);
        for could_be_used in [StagedState::Usable, StagedState::Ready] {
            assert_eq!(told(could_be_used), [Ready, Ready, Usable, Usable, Filling, Filling]);
        }
    }

    #[test]
    fn health_follows_the_state() {
        assert_eq!(health(StagedImageState::Usable), Some(StagedImageHealth::Usable));
        assert_eq!(health(StagedImageState::Ready), Some(StagedImageHealth::Optimal));
        assert_eq!(health(StagedImageState::Failed), Some(StagedImageHealth::Unusable));
        assert_eq!(health(StagedImageState::Filling), None);
    }
}
