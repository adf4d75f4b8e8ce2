//! What must hold after a transfer, and after all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use berth_api::image_transfer::ImageTransferStatus;
use berth_api::{ImageTransfer, StagingLedger, StagingReservation};
use berth_testkit::s3::log::RequestLog;
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use tokio::time::sleep;

use super::routes::{Route, object_key};
use super::strike::Ended;
use super::{ARCHIVE, KillError, NAMESPACE, POOL, Run, STORE, WINDOW};
use crate::image;
use crate::kill::checks::sum_of;
use crate::kill::store_files::StoreFiles;
use crate::site::{BUCKET, SiteError};

/// How long releases may take.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

impl Run<'_> {
    /// The transfer came to the same image, told what it read, and nothing of it was sent again that was recorded.
    pub(super) async fn check_transfer(
        &mut self,
        name: &str,
        route: Route,
        kills: u64,
        ended: &Ended,
        line: String,
    ) -> Result<(), KillError> {
        let before = self.report.violations.len();
        match ended {
            Ended::Succeeded(status) => self.check_result(name, route, status).await?,
            Ended::Deleted => self.check_nothing_made(name).await?,
        }
        let again = self.sent_again(name, route)?;
        let windows = again.div_ceil(WINDOW.saturating_mul(kills.max(1)));
        self.report.repeated_windows_max = self.report.repeated_windows_max.max(windows);
        if windows > 1 || (kills == 0 && again > 0) {
            self.violated(format!("{name}: {again} bytes were sent again in {kills} kills"));
        }
        if self.report.violations.len() == before {
            self.report.identical += kills;
        }
        let end = if matches!(ended, Ended::Deleted) { ", deleted" } else { "" };
        let line = format!("{line}, {} MiB sent again{end}", again >> 20);
        eprintln!("{line}");
        self.report.transfers.push(line);
        Ok(())
    }

    async fn check_result(
        &mut self,
        name: &str,
        route: Route,
        status: &ImageTransferStatus,
    ) -> Result<(), KillError> {
        let Some(result) = &status.result else {
            self.violated(format!("{name} has succeeded and tells no result"));
            return Ok(());
        };
        let expected = match route.file() {
            Some(file) => {
                let path = self.site.files().join(file);
                sum_of(&path).map_err(|source| KillError::File { path, source })?
            }
            None => self.digest.clone(),
        };
        let expected = route.is_summed().then_some(expected);
        if result.source_digest != expected {
            self.violated(format!("{name} has read {:?}, not {expected:?}", result.source_digest));
        }
        let Some(driver) = route.driver() else {
            if result.digest.as_ref() != Some(&self.digest) {
                self.violated(format!("{name} came to {:?}, not to {}", result.digest, self.digest));
            }
            let files = StoreFiles::read(&self.site.dir().join("s3"), BUCKET, ARCHIVE)?;
            let lacking = files.lacks(&self.digest, NAMESPACE, name);
            if !lacking.is_empty() {
                let first: Vec<_> = lacking.iter().take(3).collect();
                self.violated(format!("{name}: its store lacks {first:?}"));
            }
            return Ok(());
        };
        let file = self.options.dir.join(format!("{name}.object"));
        if let Err(error) = self.site.s3().fetch(&object_key(name), &file).await {
            self.violated(format!("{name} has succeeded, and its object cannot be read: {error}"));
            return Ok(());
        }
        let raw = self.images.raw.clone();
        let compared = tokio::task::spawn_blocking(move || compare(driver, &file, &raw));
        if let Err(error) = compared.await.expect("comparing does not panic") {
            self.violated(format!("{name}: the object differs: {error}"));
        }
        Ok(())
    }

    /// What was deleted under way leaves no upload. (The log of a server that was killed may lack its last lines.)
    async fn check_nothing_made(&mut self, name: &str) -> Result<(), KillError> {
        let open = self.site.s3().open_uploads().await.map_err(SiteError::from)?;
        if open.contains(&object_key(name)) {
            self.report.orphans += 1;
            self.violated(format!("{name} was deleted, and its upload is open"));
        }
        Ok(())
    }

    fn log(&self) -> Result<RequestLog, KillError> {
        Ok(RequestLog::read(&self.site.dir().join("s3/requests.jsonl"))?)
    }

    /// Bytes of this transfer that the object store received again, though nothing but a kill was to blame.
    fn sent_again(&mut self, name: &str, route: Route) -> Result<u64, KillError> {
        let log = self.log()?;
        if route.driver().is_some() {
            let key = object_key(name);
            // An upload that was begun anew sends everything again.
            let begun = log.succeeded("CreateMultipartUpload").filter(|entry| entry.key == key);
            let uploads: BTreeSet<_> = begun.filter_map(|entry| entry.upload_id.as_ref()).collect();
            let with_parts = |id: &&&String| {
                log.succeeded("UploadPart").any(|entry| entry.upload_id.as_ref() == Some(**id))
            };
            let anew =
                (uploads.iter().filter(with_parts).count() as u64).saturating_sub(1) * self.images.data;
            return Ok(parts_again(&log, &key) + anew);
        }
        // Chunks are of all transfers into the store alike: what is there already is not sent.
        let prefix = format!("{ARCHIVE}/chunks/");
        let repeats = log.repeated_puts();
        let all: u64 =
            repeats.iter().filter(|(key, _)| key.starts_with(&prefix)).map(|(_, one)| one.bytes).sum();
        Ok(all.saturating_sub(std::mem::replace(&mut self.chunks_again, all)))
    }

    pub(super) fn count_faults(&mut self) -> Result<(), KillError> {
        self.report.faults = self.log()?.faults();
        Ok(())
    }

    /// Deletes every transfer; then nothing of any is left but what it made.
    pub(super) async fn check_nothing_left(&mut self) -> Result<(), KillError> {
        let transfers: Api<ImageTransfer> = Api::namespaced(self.site.client(), NAMESPACE);
        let failed = |source| KillError::Request { action: "delete the transfers", source };
        transfers
            .delete_collection(&DeleteParams::default(), &ListParams::default())
            .await
            .map_err(failed)?;
        let deadline = Instant::now() + SETTLE_LIMIT;
        loop {
            let left = self.left_behind(&transfers).await?;
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                self.report.orphans += left.len() as u64;
                self.violated(format!("left behind: {}", left.join(", ")));
                return Ok(());
            }
            sleep(Duration::from_millis(300)).await;
        }
    }

    async fn left_behind(&self, transfers: &Api<ImageTransfer>) -> Result<Vec<String>, KillError> {
        let client = self.site.client();
        let reservations: Api<StagingReservation> = Api::all(client.clone());
        let ledgers: Api<StagingLedger> = Api::all(client);
        let failed = |source| KillError::Request { action: "list what is left", source };
        let all = ListParams::default();
        let mut left = Vec::new();
        for one in transfers.list(&all).await.map_err(failed)? {
            left.push(format!("transfer {}", one.metadata.name.unwrap_or_default()));
        }
        for one in reservations.list(&all).await.map_err(failed)? {
            left.push(format!("reservation {}", one.metadata.name.unwrap_or_default()));
        }
        for ledger in ledgers.list(&all).await.map_err(failed)? {
            left.extend(ledger.spec.promises.keys().map(|uid| format!("promise to {uid}")));
        }
        let open = self.site.s3().open_uploads().await.map_err(SiteError::from)?;
        left.extend(open.iter().map(|key| format!("upload of {key}")));
        for store in [STORE, ARCHIVE] {
            let files = StoreFiles::read(&self.site.dir().join("s3"), BUCKET, store)?;
            for folder in ["sessions/", "pins/"] {
                left.extend(files.left_in(folder).map(|key| format!("{store}/{key}")));
            }
        }
        let node = &self.site.nodes()[0];
        let names = node.names(&node.pool_root(POOL).join("staging"))?;
        left.extend(names.into_iter().map(|name| format!("staging/{name}")));
        Ok(left)
    }
}

/// Bytes of parts that arrived more than once. One whose answer the store was to lose, or to refuse, has to come again.
fn parts_again(log: &RequestLog, key: &str) -> u64 {
    let mut arrived: BTreeMap<(&str, u32), (u64, u64, u64)> = BTreeMap::new();
    for entry in log.entries().iter().filter(|entry| entry.op == "UploadPart" && entry.key == key) {
        let (Some(upload), Some(part), Some(bytes)) = (&entry.upload_id, entry.part, entry.payload) else {
            continue;
        };
        let (times, faults, most) = arrived.entry((upload.as_str(), part)).or_default();
        *times += 1;
        // A delay is no reason to send anything again.
        *faults += u64::from(!entry.succeeded() || !entry.complete);
        *most = bytes.max(*most);
    }
    arrived.values().map(|(times, faults, bytes)| times.saturating_sub(1 + faults) * bytes).sum()
}

/// The object, as the tool that owns its format reads it, against the disk.
fn compare(driver: &str, object: &Path, raw: &Path) -> Result<(), image::ImageError> {
    if driver == "qcow2" || driver == "vmdk" {
        image::run(Command::new("qemu-img").args(["check", "-q", "-f", driver]).arg(object))?;
    }
    let mut compared = Command::new("qemu-img");
    compared.args(["compare", "-q", "-f", driver, "-F", "raw"]).args([object, raw]);
    image::run(&mut compared)?;
    let removed = std::fs::remove_file(object);
    removed.map_err(|source| image::ImageError::File { path: object.to_owned(), source })
}
