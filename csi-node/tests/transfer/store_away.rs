//! Imports whose image store is down for longer than any number of retries would last.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::bed::{Bed, Told, Work, raw_image, same_disk};
use berth_core::reason::Reason;
use berth_core::stages::Stage;
use berth_node::transfer::TransferError;
use berth_testkit::s3::fault::{FaultAction, FaultRule, write_rules};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(20);

/// Returns when so many failures have been told of.
async fn failures(told: Arc<Told>, count: usize) {
    while told.reasons.lock().unwrap().len() < count {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Answers every request with 503, from the begin of this stage on.
fn goes_down_at(bed: &Bed, work: &Work, stage: Stage) {
    let data = bed.dir.path().join("s3");
    let down = move || write_rules(&data, &[FaultRule::new(FaultAction::SlowDown)]).unwrap();
    *work.told.happens_at.lock().unwrap() = Some((stage, Box::new(down)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_waits_for_its_store_longer_than_its_retries_and_can_be_stopped_meanwhile() {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 40, &[0..40]);
    let origin = bed.origin("plain", "disk", PATIENCE);
    let mut work = Work::new(&bed, "waits");
    work.job.limits.retries = 2;
    goes_down_at(&bed, &work, Stage::Upload);

    let cancel = CancellationToken::new();
    let stopper = async {
        failures(Arc::clone(&work.told), 3).await;
        cancel.cancel();
        Instant::now()
    };
    let (outcome, stopped) = tokio::join!(work.run_until(&bed, &origin, &cancel), stopper);
    assert!(matches!(outcome, Err(TransferError::Cancelled)), "{outcome:?}");
    assert!(stopped.elapsed() < Duration::from_secs(2), "the pause of 4 s was waited for");
    work.told.reasons.lock().unwrap().clear();

    let healer = async {
        failures(Arc::clone(&work.told), 4).await;
        bed.s3.set_faults(&[]).unwrap();
        // It pauses now.
        bed.check_nothing_published().await;
    };
    let (outcome, ()) = tokio::join!(work.run(&bed, &origin), healer);
    let durable = outcome.unwrap_or_else(|error| panic!("{}", error.chain()));
    let reasons = work.told.reasons.lock().unwrap().clone();
    assert_eq!(reasons, [Reason::ObjectStoreUnavailable; 4]);
    assert!(work.told.attempts.load(Ordering::Relaxed) >= 8, "3 stopped, 4 failed, 1 went well");
    let errors = work.told.errors.lock().unwrap().clone();
    assert!(errors.iter().all(|said| said.contains("status 503")), "{errors:?}");
    assert!(same_disk(&bed.restore(&durable).await, &disk));
    bed.check_nothing_left(&work).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_away_uses_the_retries_up_also_if_the_store_was_away_in_between() {
    let bed = Bed::new().await;
    raw_image(&bed.file("disk"), 4, &[0..4]);
    let mut work = Work::new(&bed, "source");
    work.job.limits.retries = 1;
    // The store first, then a web server that is not there.
    write_rules(&bed.dir.path().join("s3"), &[FaultRule::new(FaultAction::SlowDown)]).unwrap();
    let origin = bed.origin("plain", "disk", PATIENCE);
    let Bed { dir, s3, web, chunks } = bed;
    drop(web);
    std::fs::create_dir(dir.path().join("other")).unwrap();
    let web = berth_testkit::http_source::HttpSource::start(
        &dir.path().join("other"),
        &dir.path().join("other.log"),
    )
    .await
    .unwrap();
    let bed = Bed { dir, s3, web, chunks };
    let healer = async {
        failures(Arc::clone(&work.told), 3).await;
        bed.s3.set_faults(&[]).unwrap();
    };
    let (outcome, ()) = tokio::join!(work.run(&bed, &origin), healer);
    let error = outcome.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), (Reason::RetriesExhausted, false));
    let chain = error.chain();
    assert!(chain.contains("given up after 5 attempts") && chain.contains("read the source"), "{chain}");
    let mut told = vec![Reason::ObjectStoreUnavailable; 3];
    told.push(Reason::SourceUnavailable);
    assert_eq!(*work.told.reasons.lock().unwrap(), told);
    work.abandon(&bed, false).await;
    bed.check_nothing_left(&work).await;
}
