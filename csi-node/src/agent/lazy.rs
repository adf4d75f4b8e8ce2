//! Staged images that are shown at once and become local afterwards, where the pool's backend, the kernel and a supervisor
//! allow that. What is decided and done is the area's; here it is asked for again and again, and told.

use std::sync::Arc;
use std::time::Duration;

use berth_api::StagedImage;
use berth_core::hydration::Progress;
use berth_core::ids::{Digest, Uid};
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_record::{ChangeError, ImageState, VolumeOrigin, VolumeState, tables};
use tokio_util::task::TaskTracker;

use super::fill::{FillError, store_of};
use super::pools::OpenPool;
use super::stores::{self, AccessError};
use crate::area::AreaError;
use crate::area::lazy::{Advanced, Lazy, Source};
use crate::node::{Node, now};
use crate::supervisor::stores::{StoreServerSpec, StoreStatus};
use crate::telemetry::chain;

/// How often an image that becomes local is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// An image that is to be staged in a pool, under a promise.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    pub(super) node: &'a Arc<Node>,
    pub(super) pool: &'a Arc<OpenPool>,
    pub(super) uid: &'a Uid,
    pub(super) digest: Digest,
    pub(super) size: Bytes,
    /// How many bytes are promised to it.
    pub(super) promised: Bytes,
    /// All threads of the work.
    pub(super) workers: &'a TaskTracker,
}

/// How an image that is not all here is to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// It is filled before it is used: it was begun so, or cannot be shown earlier.
    Fill,
    /// It is to be shown.
    Begin,
    /// It is shown already, or was.
    GoOn,
}

impl Work<'_> {
    /// Shows it, and returns once all of it is here. False if it is to be filled instead.
    pub(super) async fn show(self, image: &StagedImage) -> Result<bool, FillError> {
        let data = Bytes::from_i64(image.spec.data_bytes);
        let way = self.blocking(move |work, lazy| work.way(lazy, data)).await?;
        let source = match way {
            Way::Fill => return Ok(false),
            Way::Begin | Way::GoOn => self.source(image).await,
        };
        if way == Way::Begin && !self.begin(image, source.as_ref()).await? {
            tracing::info!(image = %self.digest, "the devices do not let it be shown early");
            return Ok(false);
        }
        self.follow(source).await?;
        Ok(true)
    }

    fn way(&self, lazy: Option<&dyn Lazy>, data: Bytes) -> Result<Way, FillError> {
        let Some(lazy) = lazy else { return Ok(Way::Fill) };
        let held = self.pool.record.record().get(tables::IMAGES, &self.digest).map_err(ChangeError::from)?;
        match held.map(|held| held.state) {
            Some(ImageState::Shown { .. }) => return Ok(Way::GoOn),
            Some(ImageState::Complete) => return Ok(Way::Fill),
            Some(ImageState::Filling { offset }) if offset > Bytes::ZERO => return Ok(Way::Fill),
            Some(ImageState::Filling { .. }) | None => {}
        }
        let charge = lazy.charge(data, self.size);
        if self.promised < charge {
            tracing::info!(image = %self.digest, promised = %self.promised, %charge, "promised too little to show it early");
            return Ok(Way::Fill);
        }
        let missing = lazy.missing();
        if !missing.is_empty() {
            tracing::info!(image = %self.digest, missing = missing.join("; "), "cannot be shown early");
            return Ok(Way::Fill);
        }
        Ok(Way::Begin)
    }

    async fn source(&self, image: &StagedImage) -> Result<Source, AccessError> {
        let access = stores::access(self.node, &store_of(image)).await?;
        let id = self.pool.area.lazy().map(|lazy| lazy.source_id(&self.digest)).unwrap_or_default();
        let (digest, size, data) = (self.digest, self.size, self.promised);
        let server = StoreServerSpec { id, digest, size, data, access };
        Ok(Source { server, rate: Some(self.node.config.hydration_rate) })
    }

    /// The pin, the intent, and what it takes to show it.
    async fn begin(
        &self,
        image: &StagedImage,
        source: Result<&Source, &AccessError>,
    ) -> Result<bool, FillError> {
        let chunks = stores::open(self.node, &store_of(image)).await?;
        chunks.pin(self.uid, &self.digest).await.map_err(FillError::Pin)?;
        let chunk = chunks.chunk_size().size();
        // The same was asked of the same object a moment ago.
        let Ok(source) = source.cloned() else { return Ok(false) };
        let begun = self.blocking(move |work, lazy| {
            let Some(lazy) = lazy else { return Ok(false) };
            let (record, promised) = (&work.pool.record, work.promised);
            record.begin_fill(&work.digest, work.uid, work.size, promised, now())?;
            Ok(lazy.begin(record, &work.digest, &source, chunk)?)
        });
        self.explained(begun.await).await
    }

    /// Looks at it until all of it is here.
    async fn follow(&self, source: Result<Source, AccessError>) -> Result<(), FillError> {
        let (source, unreachable) = match source {
            Ok(source) => (Some(source), None),
            Err(error) => (None, Some(error)),
        };
        let mut first = true;
        loop {
            let asked = source.clone();
            let advanced = self.blocking(move |work, lazy| {
                let Some(lazy) = lazy else { return Ok(Advanced::SourceNeeded) };
                Ok(lazy.advance(&work.pool.record, &work.digest, asked.as_ref())?)
            });
            match self.explained(advanced.await).await? {
                Advanced::Local => {
                    tracing::info!(image = %self.digest, "image is local");
                    return Ok(());
                }
                Advanced::Stopped(stop) => {
                    return Err(AreaError::Stopped { digest: self.digest, stop }.into());
                }
                Advanced::SourceNeeded => {
                    let needed = AreaError::SourceNeeded { digest: self.digest };
                    return Err(unreachable.map_or_else(|| needed.into(), FillError::Access));
                }
                Advanced::Hydrating(progress) => {
                    if first {
                        self.show_volumes().await?;
                    }
                    let trouble = match &unreachable {
                        Some(error) => Some((error.reason(), chain(error))),
                        None => self.trouble().await,
                    };
                    self.tell(progress, trouble, first);
                    first = false;
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Volumes that could not be shown before their image was.
    async fn show_volumes(&self) -> Result<(), FillError> {
        self.blocking(|work, _| {
            let _turn = work.pool.turn();
            let volumes = work.pool.record.record().entries(tables::VOLUMES).map_err(ChangeError::from)?;
            let hidden = volumes.into_iter().any(|(uid, volume)| {
                volume.origin == Some(VolumeOrigin::Image(work.digest))
                    && volume.state == VolumeState::Ready
                    && !work.pool.area.has_volume(&uid)
            });
            if hidden { Ok(work.pool.area.start(&work.pool.record)?) } else { Ok(()) }
        })
        .await
    }

    /// What its server says is wrong.
    async fn trouble(&self) -> Option<(Reason, String)> {
        let (node, id) = (Arc::clone(self.node), self.pool.area.lazy()?.source_id(&self.digest));
        let ask = move || node.pools.data_plane().servers().list();
        match self.workers.spawn_blocking(ask).await {
            Ok(Ok(lines)) => {
                let line = lines.into_iter().find(|line| line.id == id)?;
                let said = line.store.as_ref().and_then(StoreStatus::trouble);
                said.or_else(|| line.message.map(|why| (Reason::OriginSilent, why)))
            }
            Ok(Err(error)) => Some((Reason::SupervisorUnavailable, chain(&error))),
            Err(_) => None,
        }
    }

    /// An image that is not served, with what its server says of it.
    async fn explained<T>(&self, outcome: Result<T, FillError>) -> Result<T, FillError> {
        match outcome {
            Err(FillError::Area(error @ (AreaError::Serve(_) | AreaError::Nbd(_)))) => {
                let (reason, said) = match self.trouble().await {
                    Some((reason, said)) if reason != Reason::OriginSilent => (reason, said),
                    _ => (error.reason(), chain(&error)),
                };
                Err(FillError::Served { digest: self.digest, reason, said })
            }
            outcome => outcome,
        }
    }

    /// Tells how far it is: at once what is new, and progress once per percent.
    fn tell(&self, progress: Progress, trouble: Option<(Reason, String)>, now: bool) {
        let share =
            |of: u64| u128::from(of) * u128::from(progress.hydrated) / u128::from(progress.total.max(1));
        let percent = u8::try_from(share(100).min(99)).unwrap_or(99);
        let done = Bytes(u64::try_from(share(self.size.0)).unwrap_or(u64::MAX));
        let mut news = now;
        self.node.news.edit_fill(self.uid, |fill| {
            news |= percent != fill.percent || trouble.is_some() != fill.error.is_some();
            (fill.percent, fill.done, fill.error) = (percent, done, trouble);
        });
        if news {
            self.node.wake.notify_one();
        }
    }

    /// On a thread of the work.
    async fn blocking<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Work<'_>, Option<&dyn Lazy>) -> Result<T, FillError> + Send + 'static,
    ) -> Result<T, FillError> {
        let (node, pool, uid) = (Arc::clone(self.node), Arc::clone(self.pool), self.uid.clone());
        let (digest, size, promised, workers) = (self.digest, self.size, self.promised, self.workers.clone());
        let on_thread = move || {
            let work =
                Work { node: &node, pool: &pool, uid: &uid, digest, size, promised, workers: &workers };
            act(&work, pool.area.lazy())
        };
        self.workers.spawn_blocking(on_thread).await?
    }
}
