//! Making a template local: what was fetched is written through its device, what nobody reads is fetched behind the reads of
//! guests, and holes are discarded.
//!
//! Only when there is an order for it, because whoever gives it has recorded before that the template is written to. Nothing
//! here is remembered: a server that begins anew writes the same once more, which changes nothing.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use berth_core::hydration::{Progress, Span};
use berth_core::units::Bytes;
use berth_device::thin::{DirectBuffer, TemplateDevice, TemplateError, TemplateWriter};
use berth_objectstore::ObjectStore;
use berth_objectstore::chunks::remote::{RemoteError, RemoteImage, Sink};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::supervisor::stores::{HydrationOrder, order_in};
use crate::telemetry::chain;

/// How often is looked for an order.
const LOOK: Duration = Duration::from_millis(200);
/// How long it rests when all was fetched that could be, or nothing could.
const REST: Duration = Duration::from_secs(10);
/// How many parts of the index are asked for at once.
const EXTENTS: usize = 1024;

/// Why not all of a template was made local.
#[derive(Debug, Error)]
pub enum HydrateError {
    /// The image.
    #[error("the image cannot be read")]
    Read(#[from] RemoteError),
    /// The template.
    #[error("the template cannot be written")]
    Template(#[from] TemplateError),
    /// A worker is gone.
    #[error("a worker is gone")]
    Worker(#[from] tokio::task::JoinError),
}

/// Writes chunks through the device of a template, while there is one.
#[derive(Debug, Default)]
pub struct TemplateSink(RwLock<Option<Arc<TemplateWriter>>>);

impl TemplateSink {
    fn set(&self, writer: Option<Arc<TemplateWriter>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = writer;
    }

    fn writer(&self) -> io::Result<Arc<TemplateWriter>> {
        let writer = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        writer.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "there is no template"))
    }
}

impl Sink for TemplateSink {
    fn arrived(&self, offset: u64, data: bytes::Bytes) -> BoxFuture<'_, io::Result<()>> {
        async move {
            let writer = self.writer()?;
            let span = Span { offset: Bytes(offset), length: Bytes(data.len() as u64) };
            // The shorter region at the end would be read from here, by whom it is written: not by this process.
            let Some(whole) = writer.geometry().without_short(span) else { return Ok(()) };
            let write = move || {
                let mut buffer = DirectBuffer::new(data.len());
                buffer.copy_from_slice(&data);
                let length = usize::try_from(whole.length.0).unwrap_or(usize::MAX).min(data.len());
                writer.write(whole.offset, &buffer, length)
            };
            tokio::task::spawn_blocking(write).await.map_err(io::Error::other)?.map_err(io::Error::other)
        }
        .boxed()
    }
}

/// Obeys the orders in a server's folder until `stop`.
pub async fn hydrate<S: ObjectStore>(
    image: RemoteImage<S>,
    sink: Arc<TemplateSink>,
    folder: PathBuf,
    stop: CancellationToken,
) {
    let obeying = async {
        loop {
            match order(&folder).await {
                Some(order) => {
                    tokio::select! {
                        () = obey(&image, &sink, &order) => {}
                        () = withdrawn(&folder, &order) => {}
                    }
                    sink.set(None);
                }
                None => tokio::time::sleep(LOOK).await,
            }
        }
    };
    stop.run_until_cancelled(obeying).await;
    sink.set(None);
}

/// Nothing where there is none, or none that can be read, which is told.
async fn order(folder: &Path) -> Option<HydrationOrder> {
    let folder = folder.to_owned();
    let read = tokio::task::spawn_blocking(move || order_in(&folder)).await.ok()?;
    read.inspect_err(|error| tracing::warn!(error = chain(error), "an order is not obeyed")).ok()?
}

/// Returns once the order is another one, or none.
async fn withdrawn(folder: &Path, obeyed: &HydrationOrder) {
    while order(folder).await.as_ref() == Some(obeyed) {
        tokio::time::sleep(LOOK).await;
    }
}

/// Goes through the image again and again, until the template is local or not there any more. Rests in between.
async fn obey<S: ObjectStore>(image: &RemoteImage<S>, sink: &TemplateSink, order: &HydrationOrder) {
    image.set_background_rate(order.rate);
    let Some((device, writer)) = writer(order).await else { return tokio::time::sleep(LOOK).await };
    let writer = Arc::new(writer);
    sink.set(Some(Arc::clone(&writer)));
    loop {
        let went = once(image, &writer).await;
        tokio::time::sleep(REST).await;
        match (went, progress(&device).await) {
            (_, None) => return, // it is another device by now
            (Ok(_), Some(progress))
                if progress.is_complete() || writer.geometry().lacks_only_short(progress) => {}
            // The kernel has lost what it was told of: it begins anew.
            (Ok(0), Some(_)) => image.tell_again(),
            (Ok(bad), Some(_)) => tracing::warn!(bad, "chunks of a template are missing or damaged"),
            (Err(error), Some(_)) => {
                tracing::warn!(error = chain(&error), "a template does not become local");
            }
        }
    }
}

/// Discards all holes, and fetches all that was not fetched. How many places of the image are missing or damaged.
async fn once<S: ObjectStore>(
    image: &RemoteImage<S>,
    writer: &Arc<TemplateWriter>,
) -> Result<u64, HydrateError> {
    discard_holes(image, writer).await?;
    let fetched = image.prefetch(0..image.virtual_size().0).await?;
    let flushed = Arc::clone(writer);
    tokio::task::spawn_blocking(move || flushed.flush()).await??;
    Ok(fetched.bad)
}

async fn discard_holes<S: ObjectStore>(
    image: &RemoteImage<S>,
    writer: &Arc<TemplateWriter>,
) -> Result<(), HydrateError> {
    let (mut at, end) = (Bytes::ZERO, image.virtual_size());
    while at < end {
        for extent in image.extents(at.0, end.saturating_sub(at), EXTENTS).await? {
            let span = Span { offset: at, length: extent.len };
            if let Some(span) = writer.geometry().without_short(span).filter(|_| extent.zero) {
                let writer = Arc::clone(writer);
                tokio::task::spawn_blocking(move || writer.discard(span)).await??;
            }
            at = at.saturating_add(extent.len);
        }
    }
    Ok(())
}

/// The template's device and what writes to it, if it is there and not all of it is local.
async fn writer(order: &HydrationOrder) -> Option<(TemplateDevice, TemplateWriter)> {
    let order = order.clone();
    let find = move || {
        let Some(device) = TemplateDevice::find(&order.pool, &order.holder)? else { return Ok(None) };
        match device.writer() {
            Ok(writer) => Ok(Some((device, writer))),
            Err(TemplateError::NotActive { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    };
    let found = tokio::task::spawn_blocking(find).await.ok()?;
    found.inspect_err(|error| tracing::warn!(error = chain(error), "a template cannot be written")).ok()?
}

/// How far the template is; nothing if it is not there, or no clone any more.
async fn progress(device: &TemplateDevice) -> Option<Progress> {
    let device = device.clone();
    let status = tokio::task::spawn_blocking(move || device.status()).await.ok()?;
    status.ok()?.progress()
}
