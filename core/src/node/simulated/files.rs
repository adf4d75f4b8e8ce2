//! Files for pods on the simulated node: fetched, shown, changed, sent, and removed.

use super::*;
use crate::node::view::{HeldFile, NodeFile, Shown};

impl Node {
    pub(super) fn run_file(&mut self, step: &Step) -> Result<(), PowerCut> {
        match step {
            Step::BeginFile { reservation, generation, .. } => {
                self.must_be_obeyed(reservation);
                let dir = |made| HeldWorkDir { generation: *generation, made };
                self.effect(|area, _| {
                    area.work_dirs.insert(reservation.clone(), dir(false));
                    let fetched = area.files.get(reservation).is_some_and(|held| held.fetched);
                    area.files.insert(reservation.clone(), held(*generation, fetched));
                })?;
                self.effect(|area, disk| {
                    disk.insert(format!("dir {reservation}"));
                    area.work_dirs.insert(reservation.clone(), dir(true));
                })
            }
            Step::FetchFile { reservation, .. } => {
                self.must_be_obeyed(reservation);
                self.effect(|_, disk| {
                    disk.insert(format!("object in {reservation}"));
                })?;
                self.effect(|area, _| area.files.get_mut(reservation).expect("begun").fetched = true)
            }
            Step::PushFile { reservation, .. } => {
                let shown = self.file(reservation).shown;
                assert_ne!(shown, Shown::ToWriter, "it is sent while it changes");
                self.sent.insert(reservation.clone());
                self.effect(|area, _| area.files.get_mut(reservation).expect("begun").only_copy = false)
            }
            Step::RemoveFile { reservation, only_copy, .. } => {
                let held = self.file(reservation);
                assert_eq!(held.shown, Shown::ToNone, "it is in use");
                assert!(!held.only_copy || *only_copy, "the only copy goes");
                self.effect(|_, disk| disk.retain(|name| !name.ends_with(reservation.as_str())))?;
                self.effect(|area, _| {
                    area.files.remove(reservation);
                    area.work_dirs.remove(reservation);
                })
            }
            other => unreachable!("{other:?} is about no file"),
        }
    }

    fn file(&mut self, uid: &Uid) -> &mut HeldFile {
        let area = self.view.pools.get_mut(&PoolName::from("p")).and_then(|pool| pool.area.as_mut());
        area.and_then(|area| area.files.get_mut(uid)).expect("begun")
    }

    fn asked_file(&mut self) -> &mut NodeFile {
        let reservation = self.view.reservations.get_mut(&file_uid()).expect("asked for");
        reservation.file.as_mut().expect("for a file")
    }
}

const fn held(generation: Generation, fetched: bool) -> HeldFile {
    HeldFile { generation, fetched, lost: false, shown: Shown::ToNone, only_copy: false }
}

fn file_uid() -> Uid {
    Uid::from("work")
}

/// A reservation of an object as a file.
fn asked_for_file() -> Node {
    let mut node = asked();
    node.view.reservations.retain(|uid, _| *uid == file_uid());
    node.view.images.clear();
    ledger(&mut node).promises.retain(|uid, _| *uid == file_uid());
    let file = NodeFile { fetches: true, ..NodeFile::default() };
    node.view.reservations.get_mut(&file_uid()).unwrap().file = Some(file);
    node
}

/// The same after a pod has written to it and is gone.
fn changed() -> Node {
    let mut node = asked_for_file();
    node.settle().unwrap();
    node.file(&file_uid()).only_copy = true;
    node
}

#[test]
fn a_file_is_ready_once_all_of_it_is_there_after_any_cut() {
    let start = asked_for_file();
    let mut made = start.clone();
    let effects = made.settle().unwrap();
    assert_eq!(made.disk, BTreeSet::from(["dir work".to_owned(), "object in work".to_owned()]));
    for cut in 0..effects {
        let mut node = start.clone();
        node.left = cut;
        assert!(node.settle().is_err(), "cut {cut} is before the end");
        let reservation = &node.view.reservations[&file_uid()];
        let early = node.view.pools[&PoolName::from("p")].area.as_ref();
        assert!(!early.is_some_and(|area| reservation.is_prepared(&file_uid(), area)), "cut {cut}");
        node.left = 1000;
        node.settle().unwrap();
        assert_eq!((&node.disk, area(&node)), (&made.disk, area(&made)), "cut after {cut} effects");
        assert!(node.view.reservations[&file_uid()].is_prepared(&file_uid(), area(&node)));
    }
}

#[test]
fn a_fetch_that_cannot_succeed_is_not_begun_again_and_leaves_nothing() {
    let mut node = asked_for_file();
    node.fails = |step| matches!(step, Step::FetchFile { .. });
    node.asked_file().failed = true;
    node.settle().unwrap();
    assert!(!node.view.reservations[&file_uid()].is_prepared(&file_uid(), area(&node)));
    delete_all(&mut node);
    node.settle().unwrap();
    assert!(node.disk.is_empty());
}

#[test]
fn what_a_pod_sees_stays_and_what_it_wrote_is_sent_after_it_has_gone() {
    let mut node = changed();
    node.file(&file_uid()).shown = Shown::ToWriter;
    delete_all(&mut node);
    assert_eq!(plan(&node.view, Timestamp(5)), [], "it waits for the pod");
    node.file(&file_uid()).shown = Shown::ToReaders;
    let push = Step::PushFile { pool: "p".into(), reservation: file_uid(), generation: Generation(1) };
    assert_eq!(plan(&node.view, Timestamp(5)), [push], "readers do not change it");
    node.file(&file_uid()).only_copy = false;
    assert_eq!(plan(&node.view, Timestamp(5)), [], "but it stays while they see it");
}

#[test]
fn the_only_copy_is_sent_before_it_goes_after_any_cut() {
    for revoked in [false, true] {
        let mut start = changed();
        if revoked {
            start.view.reservations.clear();
            let entry = ledger(&mut start);
            entry.promises.get_mut(&file_uid()).unwrap().revoked = Some(1);
        }
        delete_all(&mut start);
        let effects = start.clone().settle().unwrap();
        for cut in 0..=effects {
            let mut node = start.clone();
            node.left = cut;
            let _ = node.settle();
            node.left = 1000;
            node.settle().unwrap();
            assert!(node.disk.is_empty() && node.sent.contains(&file_uid()), "cut {cut}");
            assert!(area(&node).promises.values().all(|promise| promise.released));
        }
    }
}

#[test]
fn while_it_cannot_be_sent_it_stays_unless_somebody_consents_to_losing_it() {
    let mut node = changed();
    delete_all(&mut node);
    let job = JobKey { kind: JobKind::Push, uid: file_uid(), generation: Generation(1) };
    node.view.jobs.insert(job.clone());
    assert_eq!(plan(&node.view, Timestamp(5)), [], "it is being sent");
    assert!(area(&node).in_use().any(|uid| *uid == file_uid()), "its reference does not expire");
    node.asked_file().discards = true;
    assert_eq!(plan(&node.view, Timestamp(5)), [Step::StopJob { job: job.clone() }]);
    node.view.jobs.clear();
    node.settle().unwrap();
    assert!(node.disk.is_empty() && node.sent.is_empty(), "{:?}", node.disk);
}

#[test]
fn a_file_whose_directory_is_gone_is_not_begun_again_and_an_only_copy_goes_with_consent() {
    for only_copy in [false, true] {
        let mut node = changed();
        node.disk.clear();
        let file = node.file(&file_uid());
        (file.lost, file.only_copy) = (true, only_copy);
        let pool = node.view.pools.get_mut(&PoolName::from("p")).unwrap();
        pool.area.as_mut().unwrap().work_dirs.get_mut(&file_uid()).unwrap().made = false;
        for generation in [1, 2] {
            node.view.reservations.get_mut(&file_uid()).unwrap().generation = Generation(generation);
            assert_eq!(plan(&node.view, Timestamp(5)), [], "a blank one would pass for it");
            assert!(!node.view.reservations[&file_uid()].is_prepared(&file_uid(), area(&node)));
        }
        delete_all(&mut node);
        if only_copy {
            assert_eq!(plan(&node.view, Timestamp(5)), [], "somebody has to know of it");
            node.asked_file().discards = true;
        }
        node.settle().unwrap();
        assert!(area(&node).files.is_empty() && node.sent.is_empty());
    }
}
