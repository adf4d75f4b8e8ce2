//! Volumes of an area, with their record, through repeats, half-done work and restarts.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

#[allow(dead_code)] // no test program uses all of it
mod pools;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use berth_core::ids::{Digest, PoolName, Sha256Sum, Uid};
use berth_core::node::Origin;
use berth_core::reason::Reason;
use berth_core::units::{Bytes, Generation, Timestamp};
use berth_device::mounts::FsType;
use berth_node::agent::pools::{OpenPool, PoolError};
use berth_node::agent::volumes::{self, VolumeError};
use berth_node::area::AreaError;
use berth_node::rpc::attach;
use berth_node::rpc::request::Use;
use berth_node::rpc::status::RpcError;
use berth_record::{
    Attachment, AttachmentMode, ChangeError, VolumeEntry, VolumeKind, VolumeOrigin, VolumeState, tables,
};
use pools::{close, free, open, pools, spec, wait_free};
use tonic::{Code, Status};

const FIRST: Generation = Generation(1);

fn make(pool: &OpenPool, uid: &Uid, origin: &Origin) -> Result<(), VolumeError> {
    volumes::make(pool, uid, FIRST, Bytes::mib(8), origin, &BTreeMap::new())
}

fn volume(pool: &OpenPool, uid: &Uid) -> Option<VolumeEntry> {
    pool.record.record().get(tables::VOLUMES, uid).unwrap()
}

#[test]
fn a_blank_volume_is_sparse_made_once_and_removed_without_trace() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    let uid = Uid::from("r1");
    make(&pool, &uid, &Origin::Blank).unwrap();
    let file = pool.area.volume(&uid);
    let metadata = fs::metadata(&file).unwrap();
    assert_eq!((metadata.len(), metadata.blocks()), (8 << 20, 0));
    fs::write(&file, b"a guest's data").unwrap();
    make(&pool, &uid, &Origin::Blank).unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"a guest's data", "made once");

    let attachment = Attachment {
        loop_device: None,
        backing_file: file.clone(),
        staged_path: "/staged".into(),
        mode: AttachmentMode::Block,
    };
    pool.record.attach(&uid, &attachment).unwrap();
    let refused = volumes::remove(&pool, &uid).unwrap_err();
    assert!(matches!(refused, VolumeError::Record(ChangeError::State { .. })), "{refused}");
    assert!(file.exists(), "one in use stays");
    pool.record.detached(&uid, Timestamp(9)).unwrap();
    fs::write(pool.area.format_mark(&uid), b"").unwrap();
    volumes::remove(&pool, &uid).unwrap();
    volumes::remove(&pool, &uid).unwrap();
    assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 0);
    assert_eq!(volume(&pool, &uid), None);
    close(pool, pools);
}

#[test]
fn a_volume_whose_file_is_gone_is_never_made_again_nor_shown() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    let uid = Uid::from("r4");
    make(&pool, &uid, &Origin::Blank).unwrap();
    assert!(attach::find(&pools, [], "v1-r4", &uid).is_ok());
    fs::remove_file(pool.area.volume(&uid)).unwrap();
    for generation in [FIRST, Generation(2)] {
        let again = volumes::make(&pool, &uid, generation, Bytes::mib(8), &Origin::Blank, &BTreeMap::new());
        assert!(matches!(again, Err(VolumeError::Lost { .. })), "{again:?}");
        assert!(!pool.area.volume(&uid).exists());
    }
    let status = Status::from(&attach::find(&pools, [], "v1-r4", &uid).err().expect("refused"));
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("VolumeLost"), "{status}");
    volumes::remove(&pool, &uid).unwrap();
    assert_eq!(volume(&pool, &uid), None);
    close(pool, pools);
}

#[test]
fn nothing_is_said_to_be_unstaged_while_the_pool_that_may_hold_it_is_not_open() {
    let dir = tempfile::tempdir().unwrap();
    let (first, pool) = open(dir.path());
    let (uid, nothing) = (Uid::from("r5"), dir.path().join("staged"));
    make(&pool, &uid, &Origin::Blank).unwrap();
    let attachment = Attachment {
        loop_device: None,
        backing_file: pool.area.volume(&uid),
        staged_path: nothing.clone(),
        mode: AttachmentMode::Block,
    };
    pool.record.attach(&uid, &attachment).unwrap();
    close(pool, first);

    let pools = pools(dir.path());
    let unstage = |wanted: &[&str], uid: &Uid| {
        attach::unstage(&pools, wanted.iter().map(|name| PoolName::from(*name)), uid, &nothing)
    };
    let refused = |outcome: Result<(), RpcError>, pool: &str| {
        let status = Status::from(&outcome.expect_err("refused"));
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().contains(&format!("pool {pool},")), "{status}");
    };
    refused(unstage(&[], &uid), "fast"); // known from before
    pools.reopen_known().unwrap();
    unstage(&["other"], &uid).unwrap();
    let pool = pools.get(&"fast".into()).unwrap();
    assert_eq!(pool.record.record().get(tables::ATTACHMENTS, &uid).unwrap(), None);
    refused(unstage(&["other"], &"elsewhere".into()), "other"); // wanted, never opened
    unstage(&["fast"], &"elsewhere".into()).unwrap();
    close(pool, pools);
}

#[test]
fn a_half_made_volume_is_made_anew_and_a_clone_is_its_image_then_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    let digest = Digest(Sha256Sum::of(b"index"));
    let mut content = vec![0; 3 << 20];
    content[1 << 20..][..5].copy_from_slice(b"image");
    fs::write(pool.area.image(&digest), &content).unwrap();
    let image = Uid::from("img");
    pool.record.begin_fill(&digest, &image, Bytes::mib(3), Bytes::mib(1), Timestamp(1)).unwrap();
    pool.record.fill_complete(&digest, &image).unwrap();

    let uid = Uid::from("r2");
    let entry = VolumeEntry {
        generation: FIRST,
        path: pool.area.recorded_path(&uid),
        size: Bytes::mib(8),
        origin: Some(VolumeOrigin::Image(digest)),
        kind: VolumeKind::Volume,
        source: None,
        state: VolumeState::Creating,
        labels: BTreeMap::new(),
    };
    pool.record.begin_volume(&uid, &entry).unwrap();
    fs::write(pool.area.volume(&uid), b"cut off").unwrap();
    make(&pool, &uid, &Origin::Image(digest)).unwrap();
    let clone = fs::read(pool.area.volume(&uid)).unwrap();
    assert_eq!(clone.len(), 8 << 20);
    assert!(clone.starts_with(&content) && clone[content.len()..].iter().all(|byte| *byte == 0));
    assert_eq!(volume(&pool, &uid).map(|volume| volume.state), Some(VolumeState::Ready));
    let used = pool.record.record().get(tables::IMAGES, &digest).unwrap().unwrap().last_used;
    assert!(used > Timestamp(1), "the image was used");

    let small = Uid::from("r6");
    let refused =
        volumes::make(&pool, &small, FIRST, Bytes::mib(2), &Origin::Image(digest), &BTreeMap::new());
    assert!(matches!(refused, Err(VolumeError::Area(AreaError::ImageTooLarge { .. }))), "{refused:?}");
    assert!(!pool.area.volume(&small).exists(), "the promise is not exceeded");
    volumes::remove(&pool, &small).unwrap();
    let used = || pool.record.record().get(tables::IMAGES, &digest).unwrap().unwrap().last_used;
    let before = used();
    std::thread::sleep(std::time::Duration::from_millis(20));
    volumes::remove(&pool, &uid).unwrap();
    assert!(used() > before, "it was needed until its last volume went");
    pool.record.begin_evict(&digest).unwrap();
    pool.record.forget_image(&digest).unwrap();
    close(pool, pools);
}

#[test]
fn a_pool_is_reopened_without_the_api_and_never_taken_from_another() {
    let dir = tempfile::tempdir().unwrap();
    let (first, pool) = open(dir.path());
    make(&pool, &Uid::from("r1"), &Origin::Blank).unwrap();
    close(pool, first);

    let again = pools(dir.path());
    again.reopen_known().unwrap();
    let pool = again.get(&"fast".into()).expect("known from before");
    assert!(volume(&pool, &Uid::from("r1")).is_some() && pool.area.volume(&Uid::from("r1")).exists());
    close(pool, again);

    let other = pools(dir.path());
    let error = other.prepare(&"other".into(), &spec(dir.path(), "other-uid")).unwrap_err();
    assert_eq!(error.reason(), Reason::InUseByPool, "{error}");
    assert_eq!(other.failure(&"other".into()).map(|(reason, _)| reason), Some(Reason::InUseByPool));
}

#[test]
fn a_pool_whose_disk_is_missing_is_not_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (first, pool) = open(dir.path());
    make(&pool, &Uid::from("r1"), &Origin::Blank).unwrap();
    close(pool, first);
    let (there, elsewhere) = (dir.path().join("area"), dir.path().join("unplugged"));
    fs::rename(&there, &elsewhere).unwrap();
    let again = pools(dir.path());
    let spec = spec(dir.path(), "pool-uid");
    let error = again.prepare(&"fast".into(), &spec).unwrap_err();
    assert!(
        matches!(&error, PoolError::Area { source, .. } if matches!(**source, AreaError::Gone { .. })),
        "{error}"
    );
    assert!(!there.join("berth-pool.json").exists());
    fs::remove_dir_all(&there).ok();
    fs::rename(&elsewhere, &there).unwrap();
    again.prepare(&"fast".into(), &spec).unwrap();
    let pool = again.get(&"fast".into()).unwrap();
    assert!(pool.area.volume(&Uid::from("r1")).exists(), "it is as it was");
    close(pool, again);
}

#[test]
fn data_without_its_record_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (first, pool) = open(dir.path());
    make(&pool, &Uid::from("r1"), &Origin::Blank).unwrap();
    fs::remove_file(pool.area.root().join("record.redb")).unwrap();
    close(pool, first);
    let again = pools(dir.path());
    let error = again.prepare(&"fast".into(), &spec(dir.path(), "pool-uid")).unwrap_err();
    assert!(matches!(error, PoolError::RecordGone { .. }), "{error}");
}

#[test]
fn a_staging_that_is_refused_leaves_nothing_attached() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    let uid = Uid::from("r1");
    make(&pool, &uid, &Origin::Blank).unwrap();
    let mut sector = [0; 512];
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    fs::write(pool.area.volume(&uid), [&sector[..], &[0; 4096]].concat()).unwrap();
    let staged = dir.path().join("staged");
    fs::create_dir(&staged).unwrap();
    let content = attach::ImportedContent { host_mount: false, partition: None };
    let found = attach::find(&pools, [], "v1-r1", &uid).unwrap();
    found.stage(&staged, Use::Filesystem(FsType::Ext4), content).unwrap_err();
    let left: Option<Attachment> = pool.record.record().get(tables::ATTACHMENTS, &uid).unwrap();
    assert_eq!(left, None);
    drop(found);
    volumes::remove(&pool, &uid).unwrap();
    close(pool, pools);
}

#[test]
fn a_block_volume_that_could_not_be_attached_can_be_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    let uid = Uid::from("r1");
    make(&pool, &uid, &Origin::Blank).unwrap();
    let found = attach::find(&pools, [], "v1-r1", &uid).unwrap();
    // A loop device is made of a file and of nothing else.
    let (file, aside) = (pool.area.volume(&uid), dir.path().join("aside"));
    fs::copy(&file, &aside).unwrap();
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    let staged = dir.path().join("staged");
    let content = attach::ImportedContent::default();
    found.stage(&staged, Use::Block, content).unwrap_err();
    let left: Option<Attachment> = pool.record.record().get(tables::ATTACHMENTS, &uid).unwrap();
    assert_eq!(left, None);
    // One that was staged before is somebody's, until that one unstages it.
    let before = Attachment {
        loop_device: Some("/dev/loop-of-before".into()),
        backing_file: file.clone(),
        staged_path: staged.clone(),
        mode: AttachmentMode::Block,
    };
    pool.record.attach(&uid, &before).unwrap();
    found.stage(&staged, Use::Block, content).unwrap_err();
    assert!(pool.record.record().get(tables::ATTACHMENTS, &uid).unwrap().is_some());
    attach::unstage(&pools, [], &uid, &staged).unwrap();
    fs::remove_dir(&file).unwrap();
    fs::copy(&aside, &file).unwrap();
    drop(found);
    volumes::remove(&pool, &uid).unwrap();
    close(pool, pools);
}

#[test]
fn a_formatting_that_was_cut_off_is_not_taken_up_again_over_what_a_workload_wrote_since() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    let uid = Uid::from("r1");
    make(&pool, &uid, &Origin::Blank).unwrap();
    fs::write(pool.area.format_mark(&uid), b"").unwrap();
    let staged = dir.path().join("staged");
    fs::create_dir(&staged).unwrap();
    let content = attach::ImportedContent::default();
    let stage = |wanted| attach::find(&pools, [], "v1-r1", &uid).unwrap().stage(&staged, wanted, content);
    if let Err(error) = stage(Use::Block) {
        println!("SKIPPED: no loop device here: {error}");
        return close(pool, pools);
    }
    fs::write(pool.area.volume(&uid), vec![7; 8 << 20]).unwrap();
    attach::unstage(&pools, [], &uid, &staged).unwrap();
    let refused = stage(Use::Filesystem(FsType::Ext4)).unwrap_err();
    assert!(matches!(refused, RpcError::NotMountable { .. } | RpcError::Filesystem(_)), "{refused}");
    assert!(fs::read(pool.area.volume(&uid)).unwrap().iter().all(|byte| *byte == 7), "it was not formatted");
    close(pool, pools);
}

/// True if this process has `CAP_SYS_RESOURCE`, number 24 in `include/uapi/linux/capability.h`.
fn has_sys_resource() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() >> 24 & 1 == 1
}

/// Bytes of the file system at a path.
fn room(path: &Path) -> u64 {
    let stat = nix::sys::statvfs::statvfs(path).unwrap();
    stat.blocks() * stat.fragment_size()
}

#[test]
fn a_volume_and_its_file_system_grow_in_use_and_what_was_cut_off_is_ended() {
    for fs_type in [FsType::Ext4, FsType::Xfs] {
        if fs_type == FsType::Ext4 && !has_sys_resource() {
            println!(
                "SKIPPED ext4: the kernel enlarges it for CAP_SYS_RESOURCE only, which this process lacks"
            );
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let (pools, pool) = open(dir.path());
        let uid = Uid::from("r1");
        let (first, second, third) = (Bytes::mib(320), Bytes::mib(384), Bytes::mib(448));
        volumes::make(&pool, &uid, FIRST, first, &Origin::Blank, &BTreeMap::new()).unwrap();
        let staged = dir.path().join("staged");
        fs::create_dir(&staged).unwrap();
        let volume = || attach::find(&pools, [], "v1-r1", &uid).unwrap();
        let content = attach::ImportedContent::default();
        if let Err(error) = volume().stage(&staged, Use::Filesystem(fs_type), content) {
            println!("SKIPPED {fs_type}: cannot be mounted here: {error}");
            close(pool, pools);
            continue;
        }
        fs::write(staged.join("kept"), "as it was").unwrap();
        let open = fs::File::open(staged.join("kept")).unwrap();
        let before = room(&staged);
        assert_eq!(volume().fill().unwrap(), first);
        assert_eq!(room(&staged), before, "nothing to do");

        // Cut off after the record, and after the device.
        pool.record.volume_resized(&uid, second).unwrap();
        assert_eq!(room(&staged), before);
        assert_eq!(volume().fill().unwrap(), second);
        let between = room(&staged);
        assert!(between > before + (48 << 20), "{fs_type}: {before}, then {between}");
        volumes::grow(&pool, &uid, third).unwrap();
        assert_eq!(room(&staged), between, "the device alone");
        for _ in 0..2 {
            assert_eq!(volume().fill().unwrap(), third);
        }
        assert!(room(&staged) > between + (48 << 20), "{fs_type}");
        let smaller = pool.record.volume_resized(&uid, first).unwrap_err();
        assert!(matches!(smaller, ChangeError::State { .. }), "{smaller}");

        // Cut off between the file and its devices.
        let fourth = Bytes::mib(460);
        pool.record.volume_resized(&uid, fourth).unwrap();
        fs::File::options().write(true).open(pool.area.volume(&uid)).unwrap().set_len(fourth.0).unwrap();
        let grown = room(&staged);
        volume().fill().unwrap();
        assert!(room(&staged) > grown, "{fs_type}");
        assert_eq!(fs::read_to_string(staged.join("kept")).unwrap(), "as it was");
        drop(open);
        attach::unstage(&pools, [], &uid, &staged).unwrap();
        volumes::remove(&pool, &uid).unwrap();
        close(pool, pools);
    }
}

#[test]
fn what_a_deleted_volume_occupied_is_free_when_its_deletion_returns() {
    let dir = tempfile::tempdir().unwrap();
    let (pools, pool) = open(dir.path());
    if pool.area.advisory().is_some() {
        println!("SKIPPED: the free space of a directory is not this pool's alone");
        return close(pool, pools);
    }
    let uid = Uid::from("r1");
    make(&pool, &uid, &Origin::Blank).unwrap();
    let empty = free(&pool);
    fs::write(pool.area.volume(&uid), vec![7; 8 << 20]).unwrap();
    nix::unistd::sync();
    assert!(free(&pool) + (8 << 20) <= empty, "it took space");
    volumes::remove(&pool, &uid).unwrap();
    wait_free(&pool, empty - (1 << 20)); // the directory's own blocks stay
    close(pool, pools);
}
