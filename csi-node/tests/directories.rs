//! Directories of an area, with their record: what bounds them, through repeats, half-done work and restarts.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

#[allow(dead_code)] // no test program uses all of it
mod pools;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use berth_core::ids::Uid;
use berth_core::node::Origin;
use berth_core::units::{Bytes, Generation};
use berth_device::files::FileError;
use berth_device::{files, mounts};
use berth_node::agent::files::{FileDir, FilesError, directory, make_directory};
use berth_node::agent::pools::OpenPool;
use berth_node::agent::volumes::{self, VolumeError};
use berth_node::area::AreaError;
use berth_record::{FileContent, FileEntry, FileFetch, StagingEntry, tables};
use pools::{close, free, open, pools, wait_free};

const FIRST: Generation = Generation(1);

/// True if nothing can be bounded here, which is said.
fn is_unbounded(pool: &OpenPool) -> bool {
    let advisory = pool.area.advisory();
    advisory.inspect(|why| println!("SKIPPED: {why}")).is_some()
}

fn make(pool: &OpenPool, uid: &Uid, bytes: Bytes) -> PathBuf {
    volumes::make_work_dir(pool, uid, FIRST, bytes, true).unwrap();
    pool.area.work_dir(uid)
}

fn is_mounted(path: &Path) -> bool {
    mounts::is_mounted(path).unwrap().is_some()
}

/// Writes until there is no space. How much that was.
fn fill(path: &Path) -> Bytes {
    let mut file = File::create(path).unwrap();
    let (block, mut written) = (vec![7; 64 << 10], Bytes::ZERO);
    loop {
        match file.write(&block) {
            Ok(count) => written = Bytes(written.0 + count as u64),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
                file.sync_all().unwrap();
                return written;
            }
        }
    }
}

/// What lies beside directories of the pool.
fn names(pool: &OpenPool) -> Vec<String> {
    let dir = pool.area.root().join("staging");
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a44_whoever_writes_past_the_promise_meets_its_end_and_takes_nothing_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    if is_unbounded(&pool) {
        return close(pool, pools);
    }
    let (uid, volume, promised) = (Uid::from("d1"), Uid::from("v1"), Bytes::mib(128));
    let empty = free(&pool);
    let place = make(&pool, &uid, promised);
    let taken = empty - free(&pool);
    assert!(
        (promised.0..promised.0 + (2 << 20)).contains(&taken),
        "{taken} bytes are taken before any is written"
    );
    volumes::make(&pool, &volume, FIRST, Bytes::mib(64), &Origin::Blank, &BTreeMap::new()).unwrap();

    let before = free(&pool);
    let written = fill(&place.join("endless"));
    let least = Bytes(promised.0 - promised.0 / 100 - (32 << 20));
    assert!((least..promised).contains(&written), "{written} of {promised}");
    let more = fill(&place.join("more"));
    assert!(Bytes(written.0 + more.0) < promised && more < Bytes::mib(1), "{more} more than {written}");
    let after = free(&pool);
    assert!(after + (1 << 20) > before, "{before} bytes were free, then {after}");
    fs::write(pool.area.volume(&volume), vec![7; 64 << 20]).unwrap();
    File::open(pool.area.volume(&volume)).unwrap().sync_all().unwrap();
    assert_eq!(pool.area.check(&pool.record).unwrap(), [], "the file that it lies in is known");

    volumes::remove_work_dir(&pool, &uid).unwrap();
    volumes::remove(&pool, &volume).unwrap();
    assert_eq!(names(&pool), [""; 0]);
    close(pool, pools);
}

#[test]
fn after_a_restart_a_directory_is_shown_again_and_bounds_as_before() {
    let dir = tempfile::tempdir().unwrap();
    let (first, pool) = open(dir.path());
    if is_unbounded(&pool) {
        return close(pool, first);
    }
    let (uid, promised) = (Uid::from("d1"), Bytes::mib(64));
    let place = make(&pool, &uid, promised);
    fs::write(place.join("kept"), "as it was").unwrap();
    close(pool, first);
    assert!(!place.exists(), "the pool is not here");

    let again = pools(dir.path());
    again.reopen_known().unwrap();
    let pool = again.get(&"fast".into()).unwrap();
    assert!(pool.area.has_work_dir(&uid) && is_mounted(&place), "nobody has to make it");
    assert_eq!(fs::read_to_string(place.join("kept")).unwrap(), "as it was");
    assert!(fill(&place.join("endless")) < promised);
    volumes::remove_work_dir(&pool, &uid).unwrap();
    close(pool, again);
}

#[test]
fn a_power_cut_while_a_directory_is_made_or_removed_leaves_nothing_half_done() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    if is_unbounded(&pool) {
        return close(pool, pools);
    }
    let (uid, bytes) = (Uid::from("d1"), Bytes::mib(64));
    let (empty, staging) = (free(&pool), pool.area.root().join("staging"));
    // While the file system is made.
    let entry = StagingEntry { generation: FIRST, dir: "staging/d1".into(), bytes };
    pool.record.begin_staging(&uid, &entry).unwrap();
    let half = files::create_sparse(&staging.join("d1.ext4.new"), bytes).unwrap();
    files::preallocate(&half, &staging.join("d1.ext4.new"), bytes).unwrap();
    drop(half);
    assert_eq!(pool.area.check(&pool.record).unwrap(), []);
    assert!(!pool.area.has_work_dir(&uid));
    let place = make(&pool, &uid, bytes);
    assert_eq!(names(&pool), ["d1", "d1.ext4"]);
    fs::write(place.join("kept"), "as it was").unwrap();
    // Before it is mounted: its place may be there, or not.
    for remove in [fs::create_dir, fs::remove_dir] {
        mounts::unmount(&place).unwrap();
        remove(&place).ok();
        assert!(!pool.area.has_work_dir(&uid));
        make(&pool, &uid, bytes);
        assert!(is_mounted(&place));
        assert_eq!(fs::read_to_string(place.join("kept")).unwrap(), "as it was");
    }
    // While it is removed: the place has gone, the file has not.
    mounts::unmount(&place).unwrap();
    fs::remove_dir(&place).unwrap();
    volumes::remove_work_dir(&pool, &uid).unwrap();
    assert_eq!(names(&pool), [""; 0]);
    wait_free(&pool, empty - (2 << 20));
    close(pool, pools);
}

#[test]
fn the_directory_of_an_import_and_one_that_an_earlier_version_made_have_all_of_the_promise_and_stay() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    let (uid, bytes) = (Uid::from("d1"), Bytes::mib(64));
    volumes::make_work_dir(&pool, &uid, FIRST, bytes, false).unwrap();
    let place = pool.area.work_dir(&uid);
    fs::write(place.join("source"), vec![7; 64 << 20]).unwrap();
    volumes::make_work_dir(&pool, &uid, Generation(2), bytes, true).unwrap();
    assert!(!is_mounted(&place));
    assert_eq!(place.join("source").metadata().unwrap().len(), bytes.0);
    volumes::remove_work_dir(&pool, &uid).unwrap();
    close(pool, pools);
}

#[test]
fn a_directory_of_any_size_is_made_and_takes_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    if is_unbounded(&pool) {
        return close(pool, pools);
    }
    for bytes in [1, 1 << 20, (5 << 20) + 1, 16 << 20, (33 << 20) + 1, (64 << 20) - 1, 65 << 20].map(Bytes) {
        let uid = Uid::from(format!("d{}", bytes.0));
        let place = make(&pool, &uid, bytes);
        for file in 0..4 {
            fs::write(place.join(format!("{file}")), [7; 512]).unwrap();
        }
        let file = pool.area.root().join(format!("staging/{uid}.ext4"));
        let metadata = file.metadata().unwrap();
        let most = bytes.max(Bytes::kib(256));
        assert_eq!(metadata.len(), most.0);
        let taken = metadata.blocks() * 512;
        assert!((most.0..most.0 + 4096).contains(&taken), "{taken} for {bytes}");
        volumes::remove_work_dir(&pool, &uid).unwrap();
    }
    close(pool, pools);
}

#[test]
fn a_directory_for_which_there_is_no_space_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    if is_unbounded(&pool) {
        return close(pool, pools);
    }
    let eaten = pool.area.root().join("eaten");
    let file = File::create(&eaten).unwrap();
    files::preallocate(&file, &eaten, Bytes(free(&pool) - (32 << 20))).unwrap();
    let (uid, before) = (Uid::from("d1"), free(&pool));
    let refused = volumes::make_work_dir(&pool, &uid, FIRST, Bytes::mib(64), true).unwrap_err();
    let no_space = |error: &AreaError| matches!(error, AreaError::File(FileError::NoSpace { .. }));
    assert!(matches!(&refused, VolumeError::Area(error) if no_space(error)), "{refused:?}");
    assert_eq!(names(&pool), [""; 0]);
    wait_free(&pool, before - (1 << 20));
    fs::remove_file(&eaten).unwrap();
    drop(file);
    make(&pool, &uid, Bytes::mib(64));
    volumes::remove_work_dir(&pool, &uid).unwrap();
    close(pool, pools);
}

fn file_entry(generation: Generation) -> FileEntry {
    FileEntry {
        generation,
        name: "data".to_owned(),
        made: false,
        fetch: FileFetch::Complete,
        content: FileContent::Unchanged,
        target: None,
        published: BTreeMap::new(),
        sent: None,
    }
}

#[test]
fn a_file_whose_directory_is_gone_is_never_made_blank() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    let uid = Uid::from("f1");
    let (size, entry) = (Bytes::mib(64), |pool: &OpenPool| pool.record.file(&uid).unwrap().unwrap());
    make_directory(&pool, &uid, size, &file_entry(FIRST)).unwrap();
    assert_eq!(directory(&pool, &uid, &entry(&pool)).unwrap(), FileDir::Shown);
    fs::write(pool.area.work_dir(&uid).join("data"), b"what a pod wrote").unwrap();
    make_directory(&pool, &uid, size, &file_entry(Generation(2))).unwrap();
    assert_eq!(fs::read(pool.area.work_dir(&uid).join("data")).unwrap(), b"what a pod wrote");

    // Its place stays, as after a boot; what was shown there is removed behind our back.
    pool.area.remove_work_dir(&pool.record, &uid).unwrap();
    if pool.area.advisory().is_none() {
        fs::create_dir(pool.area.work_dir(&uid)).unwrap();
    }
    assert_eq!(directory(&pool, &uid, &entry(&pool)).unwrap(), FileDir::Lost);
    for generation in [Generation(2), Generation(3)] {
        let again = make_directory(&pool, &uid, size, &file_entry(generation));
        assert!(matches!(again, Err(FilesError::Lost(_))), "{again:?}");
        assert_eq!(directory(&pool, &uid, &entry(&pool)).unwrap(), FileDir::Lost);
    }
    pool.area.remove_work_dir(&pool.record, &uid).unwrap();
    close(pool, pools);
}

#[test]
fn a_directory_whose_making_was_cut_off_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    let uid = Uid::from("f2");
    let wanted = file_entry(FIRST);
    let staging = StagingEntry { generation: FIRST, dir: "staging/f2".into(), bytes: Bytes::mib(64) };
    pool.record.begin_file(&uid, &staging, &wanted).unwrap();
    assert_eq!(directory(&pool, &uid, &wanted).unwrap(), FileDir::Hidden);
    make_directory(&pool, &uid, Bytes::mib(64), &wanted).unwrap();
    let entry = pool.record.file(&uid).unwrap().unwrap();
    assert_eq!(directory(&pool, &uid, &entry).unwrap(), FileDir::Shown);
    pool.area.remove_work_dir(&pool.record, &uid).unwrap();
    close(pool, pools);
}

#[test]
fn work_directories_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    let uid = Uid::from("r3");
    for _ in 0..2 {
        volumes::make_work_dir(&pool, &uid, FIRST, Bytes::mib(1), true).unwrap();
    }
    fs::write(pool.area.work_dir(&uid).join("source"), b"x").unwrap();
    for _ in 0..2 {
        volumes::remove_work_dir(&pool, &uid).unwrap();
    }
    assert_eq!(names(&pool), [""; 0]);
    assert_eq!(pool.record.record().entries(tables::STAGING).unwrap(), []);
    close(pool, pools);
}
