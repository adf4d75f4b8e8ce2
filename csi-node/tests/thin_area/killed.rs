//! Killed after any change to the machine, the program goes on where it was.
//!
//! Each program that changes devices is run through a script that counts, and that kills the program which it serves after
//! one of the changes. The program is this one again, as [`play`].

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use berth_core::ids::{Digest, Sha256Sum};
use berth_core::node::Origin;
use berth_core::thin::{BlockSize, directory_charge};
use berth_core::units::{Bytes, Timestamp};
use berth_device::thin;
use berth_node::agent::pools::OpenPool;
use berth_node::agent::volumes;
use berth_record::{ImageState, PromiseClass, tables};
use nix::libc::SIGKILL;

use super::{Bench, FIRST, MIB, destroy, holder, name, pools, promise, remove_image, reopen, used};

/// Set for a copy of this program that is to be killed; its value is a folder.
const PLAY: &str = "BERTH_TEST_PLAY_KILLED";
/// After which changes it is killed: `all`, or numbers with commas between them.
const KILLS: &str = "BERTH_TEST_KILLS";
/// Unless told otherwise. The first while the area is made, the others in one that is there.
const MAKING: &[usize] = &[12];
const WORKING: &[usize] = &[4, 17, 30];
/// More than there are.
const MOST: usize = 200;

const SCRIPT: &str = r#"#!/bin/sh
"$REAL" "$@"
status=$?
case "$1" in
create | remove | message | load | suspend | resume | clear | vgcreate | lvcreate | lvchange | lvextend | lvremove | -*)
  read -r count <"$DIR/count"
  count=$((count + 1))
  echo "$count" >"$DIR/count"
  echo "$count ${REAL##*/} $*" >>"$DIR/changes"
  read -r last <"$DIR/last"
  [ "$count" != "$last" ] || kill -9 "$PPID" ;;
esac
exit "$status"
"#;

/// One place for everything that is not on the disk.
struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        for program in ["dmsetup", "lvm", "mkfs.ext4"] {
            let real = berth_device::find_program(program).unwrap();
            let script = SCRIPT.replace("$REAL", real.to_str().unwrap());
            let script = script.replace("${REAL##*/}", program).replace("$DIR", dir.path().to_str().unwrap());
            let path = dir.path().join("bin").join(program);
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self { dir }
    }

    /// Runs the program until it ends, or is killed after so many changes.
    fn run(&self, last: Option<usize>) -> ExitStatus {
        let path = |name: &str| self.dir.path().join(name);
        fs::write(path("count"), "0\n").unwrap();
        fs::write(path("changes"), "").unwrap();
        fs::write(path("last"), format!("{}\n", last.unwrap_or_default())).unwrap();
        let search = format!("{}:/usr/sbin:/sbin:/usr/bin:/bin", path("bin").display());
        let mut program = Command::new(std::env::current_exe().unwrap());
        program
            .args(["--exact", "killed::play", "--nocapture"])
            .env(PLAY, self.dir.path())
            .env("PATH", search);
        let output = program.output().unwrap();
        if !output.status.success() && output.status.signal().is_none() {
            println!("{}", String::from_utf8_lossy(&output.stdout));
            println!("{}", String::from_utf8_lossy(&output.stderr));
        }
        output.status
    }

    fn changes(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.path().join("changes")).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

/// The points to kill at.
fn points(usual: &[usize]) -> Vec<usize> {
    match std::env::var(KILLS) {
        Ok(all) if all == "all" => (1..MOST).collect(),
        Ok(numbers) => numbers.split(',').map(|number| number.parse().unwrap()).collect(),
        Err(_) => usual.to_vec(),
    }
}

#[test]
fn killed_while_it_makes_the_area_it_goes_on() {
    let Some(bench) = Bench::new("killed_while_it_makes_the_area_it_goes_on") else { return };
    for last in points(MAKING) {
        let stage = Stage::new();
        let killed = killed_once(&stage, last);
        end(&stage, &bench);
        if !killed {
            break;
        }
    }
}

#[test]
fn killed_while_it_works_in_the_area_it_goes_on() {
    let Some(bench) = Bench::new("killed_while_it_works_in_the_area_it_goes_on") else { return };
    let stage = Stage::new();
    let first = pools(stage.dir.path());
    first.prepare(&name(), &super::spec_on(&bench.disk)).unwrap();
    let pool = first.get(&name()).unwrap();
    super::switch_off(pool, first);
    for last in points(WORKING) {
        let killed = killed_once(&stage, last);
        fs::remove_file(stage.dir.path().join("made")).unwrap();
        if !killed {
            break;
        }
    }
    end(&stage, &bench);
}

/// Kills it once and lets it go on to its end. False if it had come to its end before.
fn killed_once(stage: &Stage, last: usize) -> bool {
    let status = stage.run(Some(last));
    let change = stage.changes().last().cloned().unwrap_or_default();
    if status.success() {
        println!("not killed: it ends after `{change}`");
        return false;
    }
    assert_eq!(status.signal(), Some(SIGKILL), "killed after `{change}`");
    let again = stage.run(None);
    assert!(again.success(), "after it was killed after `{change}`");
    assert_eq!(thin::list_ours().unwrap(), [], "after it was killed after `{change}`");
    println!("goes on after it was killed after `{change}`");
    true
}

/// Nothing is left but the empty pool; then that goes too.
fn end(stage: &Stage, bench: &Bench) {
    assert_eq!(thin::list_ours().unwrap(), []);
    let (pools, pool) = reopen(stage.dir.path());
    assert_eq!(used(&pool), (Bytes::ZERO, Bytes::ZERO), "every block was given back");
    assert_eq!(pool.record.record().entries(tables::THIN).unwrap(), []);
    destroy(pool, pools);
    bench.assert_nothing_is_left();
}

/// Makes a directory, an image and two volumes in the pool, and removes them. Does nothing unless it is told to.
#[test]
fn play() {
    let Some(dir) = std::env::var_os(PLAY).map(PathBuf::from) else { return };
    let disk = std::env::var_os("BERTH_TEST_DISK").map_or_else(|| "/dev/ubda".into(), PathBuf::from);
    let pools = pools(&dir);
    pools.reopen_known().unwrap();
    pools.prepare(&name(), &super::spec_on(&disk)).unwrap();
    let pool = pools.get(&name()).unwrap();
    let made = dir.join("made");
    if !made.exists() {
        make(&pool);
        fs::write(made, "").unwrap();
    }
    remove(&pool);
    drop(pools);
    let OpenPool { area, record, .. } = std::sync::Arc::into_inner(pool).unwrap();
    drop(record);
    area.close().unwrap();
}

fn digest() -> Digest {
    Digest(Sha256Sum::of(b"index"))
}

pub fn write(device: &Path, at: u64, byte: u8) {
    let file = OpenOptions::new().write(true).open(device).unwrap();
    file.write_all_at(&[byte; 4096], at).unwrap();
    file.sync_all().unwrap();
}

fn make(pool: &OpenPool) {
    let (directory, image, clone, blank) = (holder(1), holder(2), holder(3), holder(4));
    let bytes = directory_charge(Bytes::mib(16), BlockSize::DEFAULT).data;
    promise(pool, &directory, PromiseClass::Images, bytes);
    volumes::make_work_dir(pool, &directory, FIRST, bytes, true).unwrap();
    fs::write(pool.area.work_dir(&directory).join("file"), "x").unwrap();

    promise(pool, &image, PromiseClass::Images, Bytes::mib(2));
    let (size, digest) = (Bytes::mib(8), digest());
    let entry = pool.record.begin_fill(&digest, &image, size, Bytes::mib(2), Timestamp(1)).unwrap();
    if entry.state != ImageState::Complete || !pool.area.has_image(&digest) {
        pool.record.begin_evict(&digest).unwrap();
        let file = pool.area.new_image(&pool.record, &digest, size).unwrap();
        file.write_all_at(&vec![3; 1 << 20], MIB).unwrap();
        pool.area.seal_image(&pool.record, &digest, file.into()).unwrap();
        pool.record.fill_complete(&digest, &image).unwrap();
    }
    for (uid, origin) in [(&clone, Origin::Image(digest)), (&blank, Origin::Blank)] {
        promise(pool, uid, PromiseClass::Volumes, Bytes::mib(16));
        volumes::make(pool, uid, FIRST, Bytes::mib(16), &origin, &BTreeMap::new()).unwrap();
    }
    write(&pool.area.volume(&clone), 5 * MIB, 5);
    write(&pool.area.volume(&blank), 0, 6);
    let content = fs::read(pool.area.volume(&clone)).unwrap();
    assert_eq!(content.len() as u64, 16 * MIB);
    let wanted = |at: u64| match at / 4096 {
        256..512 => 3,
        1280 => 5,
        _ => 0,
    };
    assert!((0..).zip(&content).all(|(at, byte)| *byte == wanted(at)));
    let content = fs::read(pool.area.volume(&blank)).unwrap();
    assert!((0..).zip(&content).all(|(at, byte)| *byte == if at < 4096 { 6 } else { 0 }));
}

fn remove(pool: &OpenPool) {
    let [directory, image, clone, blank] = [1, 2, 3, 4].map(holder);
    for volume in [&clone, &blank] {
        volumes::remove(pool, volume).unwrap();
    }
    if pool.record.record().get(tables::IMAGES, &digest()).unwrap().is_some() {
        remove_image(pool, &digest());
    }
    volumes::remove_work_dir(pool, &directory).unwrap();
    for holder in [&directory, &image, &clone, &blank] {
        if pool.promises().unwrap().1.contains_key(holder) {
            pool.released(holder, FIRST).unwrap();
            pool.forget(holder).unwrap();
        }
    }
}
