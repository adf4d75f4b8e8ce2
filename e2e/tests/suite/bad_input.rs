//! Bad input: each ends with its own reason and a message that helps, and leaves nothing in the store or on the node.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use berth_api::staging_reservation::ReservationState;
use berth_api::template_import::{ImportState, TemplateImportStatus};
use berth_api::{StagingLedger, StagingReservation, TemplateImport};
use berth_e2e::kill::store_files::StoreFiles;
use berth_e2e::leaks::Snapshot;
use berth_e2e::site::{BUCKET, Site, SiteOptions};
use berth_e2e::wait::{self, Look};
use berth_e2e::{drive, image};
use berth_testkit::s3::log::RequestLog;
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::scenario::{Need, Scenario};

/// How long an import may take to end, well or not.
const END_LIMIT: Duration = Duration::from_secs(60);
/// What the stalling server sends, from the file's begin. Unit: bytes.
const SENT: usize = 64 << 10;
/// How long releases may take.
const RELEASE_LIMIT: Duration = Duration::from_secs(60);

pub fn scenarios() -> Vec<Scenario> {
    let needs = [Need::SITE, &[Need::Command("qemu-img"), Need::Command("mkfs.xfs")]].concat();
    vec![
        Scenario::new("bad_input::each_ends_with_its_reason", &needs, each_ends_with_its_reason)
            .limited(Duration::from_mins(8)),
        Scenario::new("bad_input::a_full_pool_queues_with_numbers", &needs, a_full_pool_queues_with_numbers),
    ]
}

/// One bad source or setting, and what is to be said of it.
struct Case {
    name: &'static str,
    /// What follows the file server's address.
    path: String,
    /// Added to the spec.
    spec: Value,
    /// The image store.
    store: &'static str,
    reason: &'static str,
    /// What the message names.
    message: &'static [&'static str],
}

impl Case {
    fn of_file(name: &'static str, reason: &'static str, message: &'static [&'static str]) -> Self {
        let path = format!("plain/{name}");
        Self { name, path, spec: json!({}), store: "images", reason, message }
    }

    fn of_server(
        name: &'static str,
        mood: &str,
        reason: &'static str,
        message: &'static [&'static str],
    ) -> Self {
        let path = format!("{mood}/good");
        Self { name, path, spec: json!({}), store: "images", reason, message }
    }

    fn with(mut self, spec: Value) -> Self {
        self.spec = spec;
        self
    }
}

fn cases() -> Vec<Case> {
    let zeros = format!("sha256:{}", "0".repeat(64));
    let mut lost_bucket = Case::of_server("no-bucket", "plain", "BucketNotFound", &["no-such-bucket"]);
    lost_bucket.store = "nowhere";
    vec![
        Case::of_file("truncated", "ImageTruncated", &[]),
        Case::of_file("backing", "ImageHasBackingFile", &["backing"]),
        Case::of_file("data-file", "ImageHasDataFile", &["data"]),
        Case::of_file("encrypted", "ImageEncrypted", &["encrypt"]),
        Case::of_file("huge", "VirtualSizeTooLarge", &["1 TiB", "256 GiB"]),
        Case::of_server("checksum", "plain", "ChecksumMismatch", &["0000"])
            .with(json!({ "checksum": zeros })),
        Case::of_server("too-large", "plain", "SourceTooLarge", &["1 MiB"])
            .with(json!({ "limits": { "bytes": "1Mi" } })),
        Case::of_server("missing", "missing", "SourceNotFound", &["does not exist"]),
        Case::of_server("forbidden", "forbidden", "SourceForbidden", &["403"]),
        lost_bucket,
    ]
}

/// A server that sends the first 64 KiB of `file` to whoever asks for them, and nothing ever after. Ends when dropped.
async fn stalling(file: Vec<u8>) -> anyhow::Result<(String, JoinSet<()>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/stalled", listener.local_addr()?);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut open = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            open.spawn(stall(stream, file.clone()));
        }
    });
    Ok((url, tasks))
}

async fn stall(stream: TcpStream, file: Vec<u8>) {
    let mut stream = BufReader::new(stream);
    let (mut head, mut line) = (String::new(), String::new());
    while stream.read_line(&mut line).await.is_ok_and(|len| len > 2) {
        head.push_str(&line.to_ascii_lowercase());
        line.clear();
    }
    let range = head.lines().find_map(|line| line.strip_prefix("range: bytes=")?.split_once('-'));
    let (from, to) = range.map_or((0, file.len()), |(from, to)| {
        let end = to.trim().parse().map_or(file.len(), |last: usize| last + 1);
        (from.parse().unwrap_or_default(), end.min(file.len()))
    });
    let answer = format!(
        "HTTP/1.1 {}\r\ncontent-length: {}\r\naccept-ranges: bytes\r\netag: \"stalled\"\r\ncontent-range: bytes {from}-{}/{}\r\n\r\n",
        if range.is_some() { "206 Partial Content" } else { "200 OK" },
        to - from,
        to - 1,
        file.len(),
    );
    let body = if from < SENT && !head.starts_with("head") { &file[from..to.min(SENT)] } else { &[] };
    if stream.write_all(&[answer.as_bytes(), body].concat()).await.is_ok() {
        std::future::pending::<()>().await;
    }
}

/// Makes the files that the cases name: `good` is a qcow2 of 8 MiB of data.
fn make_files(dir: &Path) -> anyhow::Result<()> {
    let qemu = |args: &[&str]| image::run(Command::new("qemu-img").current_dir(dir).args(args));
    let data: Vec<u8> =
        (0..8_u32 << 18).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    fs::write(dir.join("good.raw"), data)?;
    qemu(&["convert", "-q", "-f", "raw", "-O", "qcow2", "good.raw", "good"])?;
    let good = fs::read(dir.join("good"))?;
    fs::write(dir.join("truncated"), &good[..good.len() / 2])?;
    qemu(&["create", "-q", "-f", "qcow2", "-b", "good.raw", "-F", "raw", "backing"])?;
    qemu(&["create", "-q", "-f", "qcow2", "-o", "data_file=elsewhere,data_file_raw=on", "data-file", "8M"])?;
    // Not LUKS: `qemu-img` times its key derivation, and now and then fails on a busy machine.
    let aes = "encrypt.format=aes,encrypt.key-secret=s";
    qemu(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=abcdef",
        "-o",
        aes,
        "encrypted",
        "8M",
    ])?;
    qemu(&["create", "-q", "-f", "qcow2", "huge", "1T"])?;
    Ok(())
}

async fn begin(site: &Site, case: &Case) -> anyhow::Result<()> {
    let mut spec = json!({
        "source": { "http": { "url": format!("{}/{}", site.http(), case.path) } }, "store": { "name": case.store },
    });
    let fields = case.spec.as_object().context("the spec of a case is an object")?;
    spec.as_object_mut().context("an object")?.extend(fields.clone());
    let import = json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "TemplateImport",
        "metadata": { "name": case.name, "namespace": "default" }, "spec": spec,
    });
    site.apply(&import.to_string()).await?;
    Ok(())
}

async fn each_ends_with_its_reason() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let site = Site::start(SiteOptions::new(&dir.path().join("site"))).await?;
    make_files(&site.files())?;
    drive::make_pool(&site, "work", "1Gi").await?;
    drive::make_store(&site, "default", "images").await?;
    let store = json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "ImageStore",
        "metadata": { "name": "nowhere", "namespace": "default" },
        "spec": {
            "endpoint": site.s3_endpoint(), "bucket": "no-such-bucket", "secretRef": { "name": "images-s3" },
        },
    });
    site.apply(&store.to_string()).await?;
    let before = Snapshot::below(site.dir());
    let mut cases = cases();
    let (url, _server) = stalling(fs::read(site.files().join("good"))?).await?;
    let stalled = Case::of_server("stalled", "", "RetriesExhausted", &["sent nothing for 2 s"]).with(
        json!({ "limits": { "stallTimeout": "2s", "retries": 2 }, "source": { "http": { "url": url } } }),
    );
    cases.push(stalled);
    for case in &cases {
        begin(&site, case).await?;
    }
    let mut wrong = Vec::new();
    for case in &cases {
        match ended_as_expected(&site, case).await {
            Ok(message) => println!("{}: {}: {message}", case.name, case.reason),
            Err(error) => wrong.push(format!("{}: {error:#}", case.name)),
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    nothing_is_left(&site, &before).await?;
    // What failed can be deleted.
    let imports: Api<TemplateImport> = Api::namespaced(site.client(), "default");
    imports.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    wait::until("the failed imports to go", RELEASE_LIMIT, || async {
        match imports.list(&ListParams::default()).await {
            Ok(list) if list.items.is_empty() => Look::Done(()),
            Ok(list) => Look::NotYet(format!("{} left", list.items.len())),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    nothing_is_left(&site, &before).await?;
    let left = site.stop();
    ensure!(left.is_empty(), "loop devices: {left:?}");
    Ok(())
}

/// Waits until the import has failed; returns its message.
async fn ended_as_expected(site: &Site, case: &Case) -> anyhow::Result<String> {
    let seen = |_: &TemplateImportStatus| {};
    let (reason, message) =
        match drive::wait_import(&site.client(), "default", case.name, END_LIMIT, seen).await {
            Err(drive::DriveError::Failed { reason, message, .. }) => (reason, message),
            Err(error) => return Err(error.into()),
            Ok(made) => bail!("it is ready: {made:?}"),
        };
    ensure!(reason == case.reason, "reason {reason}, not {}: {message}", case.reason);
    for part in case.message {
        ensure!(message.contains(part), "the message says nothing of {part:?}: {message}");
    }
    ensure!(!message.is_empty(), "no message");
    Ok(message)
}

async fn nothing_is_left(site: &Site, before: &Snapshot) -> anyhow::Result<()> {
    wait::until("every reservation and promise to be gone", RELEASE_LIMIT, || async {
        match promised(site).await {
            Ok(0) => Look::Done(()),
            Ok(count) => Look::NotYet(format!("{count} left")),
            Err(error) => Look::Failed(error),
        }
    })
    .await?;
    let files = StoreFiles::read(&site.dir().join("s3"), BUCKET, "images")?;
    for folder in ["sessions/", "images/", "manifests/", "tombstones/"] {
        let left: Vec<_> = files.keys(folder).collect();
        ensure!(left.is_empty(), "left in {folder}: {left:?}");
    }
    let open = RequestLog::read(&site.dir().join("s3/requests.jsonl"))?.open_uploads();
    ensure!(open.is_empty(), "open uploads: {open:?}");
    let node = &site.nodes()[0];
    for folder in ["staging", "images", "volumes"] {
        let left = node.names(&node.pool_root("work").join(folder))?;
        ensure!(left.is_empty(), "left in {folder}: {left:?}");
    }
    let added = before.settle(Duration::from_secs(10), || Snapshot::below(site.dir()));
    ensure!(added.is_empty(), "left on the machine: {added:?}");
    Ok(())
}

async fn promised(site: &Site) -> kube::Result<usize> {
    let reservations: Api<StagingReservation> = Api::all(site.client());
    let ledgers: Api<StagingLedger> = Api::all(site.client());
    let promises = ledgers.list(&ListParams::default()).await?;
    let promises: usize = promises.items.iter().map(|ledger| ledger.spec.promises.len()).sum();
    Ok(promises + reservations.list(&ListParams::default()).await?.items.len())
}

/// An import that does not fit waits, says how much is missing and behind what, and goes on when there is room.
async fn a_full_pool_queues_with_numbers() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let site = Site::start(SiteOptions::new(&dir.path().join("site"))).await?;
    make_files(&site.files())?;
    drive::make_pool(&site, "work", "1Gi").await?;
    drive::make_store(&site, "default", "images").await?;
    let reservations: Api<StagingReservation> = Api::namespaced(site.client(), "default");
    let ledgers: Api<StagingLedger> = Api::all(site.client());
    let ledger = ledgers.list(&ListParams::default()).await?.items.pop().context("no ledger")?;
    let total = ledger.spec.capacity.total.data_bytes;
    let blocker = json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "StagingReservation",
        "metadata": { "name": "blocker", "namespace": "default" },
        "spec": { "poolName": "work", "maxSize": (total - (4 << 20)).to_string() },
    });
    site.apply(&blocker.to_string()).await?;
    wait_reservation(
        &reservations,
        |one| Some(one.status.as_ref()?.state == Some(ReservationState::Ready)),
        "blocker",
    )
    .await?;
    begin(&site, &Case::of_server("waits", "plain", "", &[])).await?;
    let waiting = |one: &StagingReservation| {
        let status = one.status.as_ref()?;
        Some(status.state == Some(ReservationState::Queued) && status.queue.is_some())
    };
    let queued = wait_reservation(&reservations, waiting, "import-").await?;
    let status = queued.status.context("no status")?;
    let place = status.queue.context("no place in the queue")?;
    ensure!(place.position == 1 && place.reason == "InsufficientCapacity", "{place:?}");
    let asked: i64 = queued.spec.max_size.0.parse()?;
    let missing = status.shortfall_bytes.context("no shortfall")?;
    ensure!(missing == asked - (4 << 20), "{missing} of {asked} bytes are missing");
    let imports: Api<TemplateImport> = Api::namespaced(site.client(), "default");
    let import = imports.get("waits").await?.status.unwrap_or_default();
    ensure!(import.state == Some(ImportState::Queued), "state {:?}", import.state);
    let told = import.conditions.iter().any(|one| one.message.chars().any(|c| c.is_ascii_digit()));
    ensure!(told, "no numbers in {:?}", import.conditions);
    reservations.delete("blocker", &DeleteParams::default()).await?;
    drive::wait_import(&site.client(), "default", "waits", END_LIMIT, |_| {}).await?;
    let left = site.stop();
    ensure!(left.is_empty(), "loop devices: {left:?}");
    Ok(())
}

/// Waits until a reservation whose name begins with `prefix` is as wanted.
async fn wait_reservation(
    api: &Api<StagingReservation>,
    wanted: impl Fn(&StagingReservation) -> Option<bool> + Copy,
    prefix: &str,
) -> anyhow::Result<StagingReservation> {
    let what = format!("reservation {prefix}");
    let found = wait::until(&what, END_LIMIT, || async {
        let list = match api.list(&ListParams::default()).await {
            Ok(list) => list.items,
            Err(error) => return Look::Failed(error),
        };
        let named = |one: &StagingReservation| {
            one.metadata.name.as_ref().is_some_and(|name| name.starts_with(prefix))
        };
        match list.into_iter().find(named) {
            Some(one) if wanted(&one) == Some(true) => Look::Done(one),
            Some(one) => Look::NotYet(format!("{:?}", one.status)),
            None => Look::NotYet("it does not exist".to_owned()),
        }
    });
    Ok(found.await?)
}
