//! What a node checks of an image before it takes it into a pool.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

#[allow(dead_code)] // no test program uses all of it
mod bed;

use std::fs::OpenOptions;
use std::time::Duration;

use bed::{Bed, MIB, Work, raw_image};
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_node::agent::fill::{FillError, check_data};
use berth_objectstore::chunks::read::ImageReader;

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_takes_more_than_was_promised_is_refused_with_numbers() {
    let bed = Bed::new().await;
    raw_image(&bed.file("disk"), 40, &[0..3, 20..21]);
    let odd = 4096 + 512;
    OpenOptions::new().write(true).open(bed.file("disk")).unwrap().set_len(40 * MIB + odd).unwrap();
    let origin = bed.origin("plain", "disk", Duration::from_secs(20));
    let durable = Work::new(&bed, "disk").run(&bed, &origin).await.unwrap();
    let reader = ImageReader::open(bed.chunks.clone(), durable.digest).await.unwrap();
    let takes = Bytes(4 * MIB + odd);
    assert_eq!(durable.real_size, takes, "what is charged is what it takes");
    assert_eq!(check_data(&reader, durable.real_size).await.unwrap(), takes);
    let error = check_data(&reader, Bytes(takes.0 - 1)).await.unwrap_err();
    assert!(matches!(error, FillError::Data { found, .. } if found == takes), "{error}");
    assert_eq!(error.reason(), Reason::VerificationFailed);
}
