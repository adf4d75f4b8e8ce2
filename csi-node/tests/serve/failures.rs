//! Stores and clients that fail.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use berth_core::ids::ChunkId;
use berth_objectstore::{Body, ObjectStore as _, PutCondition};
use berth_testkit::s3::fault::{FaultAction, FaultRule};

use super::bed::{Bed, MIB, raw_image};
use super::client::Client;
use super::served::{Served, import};

const CHUNK: usize = 256 << 10;
const SHORT: u32 = 256 << 10;
const EIO: u32 = 5;

/// An image of 8 MiB of noise, its content, and its server.
async fn bed(more: &[&str]) -> (Bed, Vec<u8>, Served) {
    let bed = Bed::new().await;
    let disk = bed.file("disk");
    raw_image(&disk, 8, &[0..8]);
    let digest = import(&bed, "disk").await;
    let served = Served::start(&bed, &digest, more).await;
    (bed, std::fs::read(disk).unwrap(), served)
}

fn key(bed: &Bed, content: &[u8], chunk: usize) -> String {
    bed.chunks.layout().chunk(&ChunkId::of(&content[chunk * CHUNK..(chunk + 1) * CHUNK]))
}

async fn put(bed: &Bed, key: &str, bytes: Vec<u8>) {
    bed.chunks.store().put(key, Body::Bytes(bytes.into()), PutCondition::Always, None).await.unwrap();
}

async fn get(bed: &Bed, key: &str) -> Vec<u8> {
    let object = bed.chunks.store().get(key, None, None).await.unwrap();
    object.collect(berth_core::units::Bytes::mib(1)).await.unwrap().to_vec()
}

fn rule(action: FaultAction) -> FaultRule {
    FaultRule::new(action).op("GetObject").key_prefix("p/chunks/")
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_chunks_are_errors_at_once_and_told_by_name() {
    let (bed, content, served) = bed(&[]).await;
    let mut client = Client::connect(&served.socket);
    let (damaged, missing) = (key(&bed, &content, 5), key(&bed, &content, 20));
    let (good, other) = (get(&bed, &damaged).await, get(&bed, &missing).await);
    bed.chunks.store().delete(&missing).await.unwrap();
    let begun = Instant::now();
    assert_eq!(client.read(20 * CHUNK as u64 + 7, 9).err(), Some(EIO));
    let told = served.state("Missing").await;
    assert!(missing.contains(told["health"]["chunk"].as_str().unwrap()), "{told}");
    put(&bed, &damaged, other.clone()).await;
    assert_eq!(client.read(4 * CHUNK as u64, 3 * SHORT).err(), Some(EIO), "the whole read fails");
    assert!(begun.elapsed() < Duration::from_secs(5), "it was waited for");
    let told = served.state("Damaged").await;
    assert!(damaged.contains(told["health"]["chunk"].as_str().unwrap()), "{told}");
    // All else is read, on the same connection.
    assert!(client.read(6 * CHUNK as u64, SHORT).unwrap() == content[6 * CHUNK..7 * CHUNK]);
    put(&bed, &damaged, good).await;
    put(&bed, &missing, other).await;
    assert!(client.read(0, 8 << 20).unwrap() == content);
    served.state("Ok").await;
    let ended = served.end().await;
    assert_eq!(ended["clients"]["failed"], 2, "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_changed_gives_errors_and_never_another_chunk() {
    let (bed, content, served) = bed(&[]).await;
    let mut client = Client::connect(&served.socket);
    let digest = served.line("listening").await["export"].as_str().unwrap().parse().unwrap();
    let index = bed.chunks.layout().image(&digest);
    let good = get(&bed, &index).await;
    let mut wrong = good.clone();
    // The ids of the first two items.
    let (first, second) = wrong[72..144].split_at_mut(40);
    first[..32].swap_with_slice(&mut second[..32]);
    put(&bed, &index, wrong).await;
    assert_eq!(client.read(0, 4096).err(), Some(EIO));
    served.state("IndexDamaged").await;
    put(&bed, &index, good).await;
    assert!(client.read(0, 4096).unwrap() == content[..4096]);
    served.state("Ok").await;
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_cut_late_or_refused_are_asked_for_again() {
    let (bed, content, served) = bed(&[]).await;
    let mut client = Client::connect(&served.socket);
    // A byte that is flipped on the way is an error, and never given to anyone.
    bed.s3.set_faults(&[rule(FaultAction::Corrupt { at: 99 }).times(1)]).unwrap();
    assert_eq!(client.read(7 << 20, 4096).err(), Some(EIO));
    assert!(client.read(7 << 20, 4096).unwrap() == content[7 << 20..(7 << 20) + 4096]);
    let mut at = 0;
    for action in [
        FaultAction::SlowDown,
        FaultAction::Deny,
        FaultAction::Truncate { after_bytes: 1000 },
        FaultAction::Reset { after_bytes: 1000 },
        FaultAction::LostResponse,
        FaultAction::Delay { ms: 300 },
    ] {
        let said = format!("{action:?}");
        bed.s3.set_faults(&[rule(action).times(2)]).unwrap();
        assert!(client.read(at as u64, 1 << 20).unwrap() == content[at..at + (1 << 20)], "{said}");
        at += 1 << 20;
    }
    let ended = served.end().await;
    assert!(ended["retries"].as_u64().unwrap() > 0, "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_stalls_or_is_down_is_told_and_waited_for() {
    let (bed, content, served) = bed(&["--patience", "4"]).await;
    let mut client = Client::connect(&served.socket);
    let mut at = 0;
    for action in [FaultAction::SlowDown, FaultAction::Stall { after_bytes: 100 }] {
        bed.s3.set_faults(&[rule(action.clone())]).unwrap();
        let begun = Instant::now();
        assert_eq!(client.read(at as u64, 4096).err(), Some(EIO), "{action:?}");
        let took = begun.elapsed();
        assert!((Duration::from_secs(2)..Duration::from_secs(8)).contains(&took), "{action:?}: {took:?}");
        let told = served.state("Stalled").await;
        assert!(told["health"]["since"].as_u64().unwrap() > 1_700_000_000_000, "{told}");
        // It comes back while a read waits.
        client.ask(0, (at + CHUNK) as u64, 4096).unwrap();
        tokio::time::sleep(Duration::from_millis(700)).await;
        bed.s3.set_faults(&[]).unwrap();
        assert_eq!(client.answer().unwrap(), 0, "{action:?}");
        let mut data = vec![0; 4096];
        client.stream.read_exact(&mut data).unwrap();
        assert!(data == content[at + CHUNK..at + CHUNK + 4096]);
        assert!(client.read(at as u64, 4096).unwrap() == content[at..at + 4096]);
        served.state("Ok").await;
        at += 4 * CHUNK;
    }
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ends_leaves_what_waits_to_the_next_one() {
    let (bed, content, served) = bed(&[]).await;
    let mut client = Client::connect(&served.socket);
    bed.s3.set_faults(&[rule(FaultAction::SlowDown)]).unwrap();
    client.ask(0, 0, 4096).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    served.end().await;
    let closed = client.stream.read(&mut [0; 1]);
    assert!(matches!(closed, Ok(0) | Err(_)), "it was answered with an error");
    bed.s3.set_faults(&[]).unwrap();
    let next = Served::start(&bed, "images/disk", &[]).await;
    assert!(Client::connect(&next.socket).read(0, 4096).unwrap() == content[..4096]);
    next.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_break_off_or_talk_nonsense_disturb_nobody() {
    let (_bed, content, served) = bed(&[]).await;
    let mut good = Client::connect(&served.socket);
    for round in 0..30_usize {
        // In the middle of an answer.
        let mut cut = Client::connect(&served.socket);
        (0..4).for_each(|_| cut.ask(0, 0, 8 << 20).unwrap());
        cut.stream.read_exact(&mut vec![0; 100_000 + round]).unwrap();
        drop(cut);
        // In the middle of a negotiation, and of a request.
        let mut raw = UnixStream::connect(&served.socket).unwrap();
        raw.write_all(&[0, 0, 0, 3, b'I', b'H'][..=round % 6]).unwrap();
        drop(raw);
        let mut half = Client::connect(&served.socket);
        half.stream.write_all(&0x2560_9513_u32.to_be_bytes()).unwrap();
        drop(half);
        // What is not NBD.
        let mut other = UnixStream::connect(&served.socket).unwrap();
        other.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut wrong = Client::connect(&served.socket);
        wrong.stream.write_all(&[0x25; 28]).unwrap();
        assert_eq!(wrong.stream.read(&mut [0; 16]).unwrap_or(0), 0, "it is closed");
        let at = round % 8 * (1 << 20);
        assert!(good.read(at as u64, 4096).unwrap() == content[at..at + 4096], "round {round}");
    }
    // A write is refused, its data dropped, and the connection goes on.
    good.ask(1, 0, 1 << 20).unwrap();
    good.stream.write_all(&vec![0; 1 << 20]).unwrap();
    assert_eq!(good.answer().unwrap(), 1, "EPERM");
    assert_eq!((good.read(8 * MIB, 1).err(), good.read(0, 0).err()), (Some(22), Some(22)));
    good.ask(3, 0, 0).unwrap();
    assert_eq!(good.answer().unwrap(), 0, "a flush");
    assert!(good.read(0, 8 << 20).unwrap() == content);
    drop(good);
    let ended = served.end().await;
    assert_eq!(
        (ended["clients"]["open"].as_u64(), ended["failures"].as_u64()),
        (Some(0), Some(0)),
        "{ended}"
    );
    assert!(ended["clients"]["broken"].as_u64().unwrap() >= 90, "{ended}");
}
