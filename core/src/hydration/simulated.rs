//! Every combination of what can be seen, and a template that is carried through, with a crash after any step.

use super::*;

const TOTAL: u64 = 3;

fn all_shown() -> Vec<Shown> {
    let mut all = vec![Shown::Absent, Shown::Unfinished, Shown::Linear, Shown::Different];
    for mode in [CloneMode::ReadWrite, CloneMode::ReadOnly] {
        all.extend((0..=TOTAL).map(|hydrated| clone(mode, hydrated)));
    }
    all.push(Shown::Clone { mode: CloneMode::Failed, progress: None });
    all
}

fn clone(mode: CloneMode, hydrated: u64) -> Shown {
    Shown::Clone { mode, progress: Some(Progress { hydrated, total: TOTAL }) }
}

fn everything() -> Vec<Seen> {
    let mut all = Vec::new();
    for wanted in [Wanted::Hydrated, Wanted::Paused, Wanted::Gone] {
        for recorded in [Recorded::New, Recorded::Begun, Recorded::Local] {
            for destination in [Destination::Missing, Destination::OtherSize, Destination::Ready] {
                for metadata in [Metadata::Missing, Metadata::Blank, Metadata::OfThis, Metadata::OfOther] {
                    for source in [Source::Missing, Source::OtherSize, Source::Attached] {
                        all.extend(all_shown().into_iter().map(|shown| Seen {
                            wanted,
                            recorded,
                            destination,
                            metadata,
                            source,
                            shown,
                        }));
                    }
                }
            }
        }
    }
    all
}

#[test]
fn no_combination_allows_what_would_lose_or_invent_data() {
    for seen in everything() {
        let step = next(&seen);
        let complete =
            matches!(seen.shown, Shown::Clone { progress: Some(progress), .. } if progress.is_complete());
        let is_clone = matches!(seen.shown, Shown::Clone { .. });
        let allowed = match step {
            Step::Swap => complete && seen.recorded == Recorded::Local,
            Step::RecordLocal => complete || seen.shown == Shown::Linear,
            Step::ShowLocal => seen.recorded == Recorded::Local && seen.destination == Destination::Ready,
            // Metadata that may be this template's is never cleared, and none is used while a device is made of it.
            Step::ShowClone { clear } => {
                clear == (seen.recorded == Recorded::New)
                    && seen.shown == Shown::Absent
                    && seen.source == Source::Attached
                    && seen.destination == Destination::Ready
                    && seen.metadata != Metadata::Missing
                    && (clear || seen.metadata != Metadata::OfOther)
            }
            Step::Hydrate => {
                seen.wanted == Wanted::Hydrated
                    && seen.recorded == Recorded::Begun
                    && matches!(seen.shown, Shown::Clone { mode: CloneMode::ReadWrite, .. })
                    && !complete
            }
            Step::ReleaseSource | Step::RemoveMetadata => !is_clone && seen.shown != Shown::Different,
            Step::RecordNew => seen.metadata == Metadata::Missing && seen.shown == Shown::Absent,
            Step::RecordBegun => is_clone && !complete,
            Step::MakeDestination => {
                seen.recorded == Recorded::New && seen.destination == Destination::Missing
            }
            Step::MakeMetadata => seen.recorded == Recorded::New && seen.metadata == Metadata::Missing,
            Step::AttachSource => seen.source == Source::Missing && !complete,
            Step::RemoveUnfinished => seen.shown == Shown::Unfinished,
            Step::Hide => seen.wanted == Wanted::Gone && seen.shown != Shown::Absent,
            Step::Rest => seen.wanted != Wanted::Hydrated || seen.shown == Shown::Linear,
            Step::Stop(_) => true,
        };
        assert!(allowed, "{step:?} for {seen:?}");
        if seen.wanted == Wanted::Gone {
            let goes = matches!(
                step,
                Step::Hide | Step::RemoveUnfinished | Step::ReleaseSource | Step::RemoveMetadata | Step::Rest
            );
            assert!(goes || seen.shown == Shown::Different, "{step:?} for {seen:?}");
        }
    }
}

#[test]
fn a_clone_that_has_stopped_is_told_and_left_alone() {
    let seen = |shown| Seen {
        wanted: Wanted::Hydrated,
        recorded: Recorded::Begun,
        destination: Destination::Ready,
        metadata: Metadata::OfThis,
        source: Source::Attached,
        shown,
    };
    let failed = seen(Shown::Clone { mode: CloneMode::Failed, progress: None });
    assert_eq!(next(&failed), Step::Stop(Stop::MetadataFailed));
    assert_eq!(state_of(&failed), Some(HydrationState::Stalled));
    let read_only = seen(clone(CloneMode::ReadOnly, 1));
    assert_eq!(next(&read_only), Step::Stop(Stop::MetadataReadOnly));
    assert_eq!(state_of(&read_only), Some(HydrationState::Stalled));
    // What its metadata says is durable: all of it is there.
    assert_eq!(next(&seen(clone(CloneMode::ReadOnly, TOTAL))), Step::RecordLocal);
    assert_eq!(state_of(&seen(clone(CloneMode::ReadWrite, 0))), Some(HydrationState::Remote));
    assert_eq!(state_of(&seen(clone(CloneMode::ReadWrite, 2))), Some(HydrationState::Hydrating));
    assert_eq!(
        state_of(&seen(clone(CloneMode::ReadWrite, TOTAL))),
        Some(HydrationState::Hydrating),
        "not recorded"
    );
}

/// A node: what is seen of it, and what is true.
#[derive(Clone, Debug)]
struct Node {
    seen: Seen,
    /// Regions that are on the destination's disk.
    durable: u64,
    /// Regions that the metadata's disk says are local; `None` if it says nothing.
    committed: Option<u64>,
    /// Metadata of somebody else lies where new metadata is made.
    dirty: bool,
}

impl Node {
    fn new(wanted: Wanted, dirty: bool) -> Self {
        let seen = Seen {
            wanted,
            recorded: Recorded::New,
            destination: Destination::Missing,
            metadata: Metadata::Missing,
            source: Source::Missing,
            shown: Shown::Absent,
        };
        Self { seen, durable: 0, committed: None, dirty }
    }

    /// What the kernel and the record do for a step.
    fn carry_out(&mut self, step: Step) {
        let seen = &mut self.seen;
        match step {
            Step::MakeDestination => seen.destination = Destination::Ready,
            Step::MakeMetadata => {
                seen.metadata = if self.dirty { Metadata::OfOther } else { Metadata::Blank };
            }
            Step::AttachSource => seen.source = Source::Attached,
            Step::RemoveUnfinished | Step::Hide => seen.shown = Shown::Absent,
            Step::ShowClone { clear } => {
                assert!(clear || seen.metadata != Metadata::OfOther, "somebody else's regions are believed");
                let local = if clear { 0 } else { self.committed.unwrap_or(0) };
                self.committed = Some(local);
                seen.metadata = Metadata::OfThis;
                seen.shown = clone(CloneMode::ReadWrite, local);
            }
            Step::RecordNew => seen.recorded = Recorded::New,
            Step::RecordBegun => seen.recorded = Recorded::Begun,
            Step::Hydrate => self.hydrate(),
            Step::RecordLocal => {
                self.flush();
                self.seen.recorded = Recorded::Local;
            }
            Step::Swap | Step::ShowLocal => {
                assert_eq!(self.durable, TOTAL, "volumes would read what is not there");
                seen.shown = Shown::Linear;
            }
            Step::ReleaseSource => seen.source = Source::Missing,
            Step::RemoveMetadata => (seen.metadata, self.committed) = (Metadata::Missing, None),
            Step::Rest | Step::Stop(_) => {}
        }
    }

    fn hydrate(&mut self) {
        if let Shown::Clone { progress: Some(progress), .. } = &mut self.seen.shown {
            progress.hydrated += 1;
        }
    }

    fn flush(&mut self) {
        if let Shown::Clone { progress: Some(progress), .. } = self.seen.shown {
            self.durable = progress.hydrated.max(self.durable);
            self.committed = Some(progress.hydrated);
        }
    }

    /// Power goes: devices vanish, and what was not flushed.
    fn crash(&mut self, committed: bool) {
        if committed {
            self.flush();
        }
        self.seen.shown = Shown::Absent;
        self.seen.source = Source::Missing;
    }

    /// Goes on until there is nothing to do. How many steps that took.
    fn run(&mut self) -> usize {
        for count in 0..40 {
            match next(&self.seen) {
                Step::Rest => return count,
                Step::Stop(why) => panic!("{why:?} for {self:?}"),
                step => self.carry_out(step),
            }
        }
        panic!("it never ends: {self:?}");
    }
}

fn assert_local(node: &Node) {
    let seen = node.seen;
    assert_eq!((seen.shown, seen.recorded, node.durable), (Shown::Linear, Recorded::Local, TOTAL));
    assert_eq!((seen.source, seen.metadata), (Source::Missing, Metadata::Missing), "nothing is left behind");
    assert_eq!(state_of(&seen), Some(HydrationState::Local));
}

#[test]
fn a_template_becomes_local_whatever_crashes_and_wherever() {
    let steps = Node::new(Wanted::Hydrated, false).run();
    assert_eq!(
        steps, 12,
        "three parts, a step for each device, each record, the swap, and what is left over"
    );
    for dirty in [false, true] {
        for first in 0..=steps {
            for second in 0..=steps {
                for committed in [false, true] {
                    let mut node = Node::new(Wanted::Hydrated, dirty);
                    for crash_after in [first, second] {
                        for _ in 0..crash_after {
                            node.carry_out(next(&node.seen));
                        }
                        node.crash(committed);
                    }
                    node.run();
                    assert_local(&node);
                }
            }
        }
    }
}

#[test]
fn a_process_that_dies_leaves_a_device_that_works() {
    let steps = Node::new(Wanted::Hydrated, false).run();
    for killed_after in 0..=steps {
        let mut node = Node::new(Wanted::Hydrated, false);
        for _ in 0..killed_after {
            node.carry_out(next(&node.seen));
        }
        if node.seen.shown == Shown::Absent {
            node.seen.shown = Shown::Unfinished;
        }
        node.run();
        assert_local(&node);
    }
}

#[test]
fn a_template_that_is_not_wanted_any_more_goes_from_wherever_it_is() {
    let steps = Node::new(Wanted::Hydrated, false).run();
    for reached in 0..=steps {
        let mut node = Node::new(Wanted::Hydrated, false);
        for _ in 0..reached {
            node.carry_out(next(&node.seen));
        }
        node.seen.wanted = Wanted::Gone;
        node.run();
        let seen = node.seen;
        assert_eq!((seen.shown, seen.source), (Shown::Absent, Source::Missing));
        assert_eq!(seen.metadata, Metadata::Missing);
    }
}

#[test]
fn metadata_that_is_lost_means_that_everything_is_fetched_again() {
    let mut node = Node::new(Wanted::Hydrated, true);
    while node.durable == 0 {
        node.carry_out(next(&node.seen));
        node.flush();
    }
    node.crash(true);
    (node.seen.metadata, node.committed) = (Metadata::Missing, None);
    node.run();
    assert_local(&node);
}

#[test]
fn while_it_is_paused_nothing_becomes_local_and_what_is_complete_is_finished() {
    let mut node = Node::new(Wanted::Paused, false);
    node.run();
    assert_eq!(node.seen.shown, clone(CloneMode::ReadWrite, 0));
    for _ in 0..TOTAL {
        node.hydrate();
    }
    node.run();
    assert_local(&node);
}
