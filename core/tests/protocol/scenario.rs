//! What the checker looks at: a handful of small clusters, each with the watches that matter there behind, and the defects
//! that it must find in them.

use crate::state::{Kind, RESERVATIONS, State, World};

/// A defect put in on purpose, to show that the checker finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    None,
    /// Ledgers are overwritten whatever version was seen.
    LedgerWithoutVersion,
    /// What is promised is added to what the ledger holds by then.
    LedgerMerged,
    /// Placements are overwritten whatever version was seen.
    AssignWithoutVersion,
    /// Operators believe that every node has given everything back.
    EarlyRelease,
    /// Nodes obey whatever their ledger promises.
    ObeyWithoutAssignment,
    /// Nodes forget what they have given back while its object is there.
    ForgetEarly,
    /// Promises are revoked without asking whether their holders are gone.
    SweepWithoutAsking,
    /// Promises are taken away at once instead of being revoked.
    SweepWithoutRevoking,
    /// Promises without a holder stay.
    NeverSweep,
    /// Images are deleted without a word in their ledger.
    DeleteWithoutRetiring,
}

/// What a user asks for.
pub struct Asked {
    pub bytes: u8,
    pub template: bool,
}

/// What one run of the checker looks at.
#[allow(clippy::struct_excessive_bools)] // what may happen in it, each on its own
pub struct Scenario {
    pub name: &'static str,
    /// How many of the nodes are there.
    pub nodes: usize,
    pub asked: Vec<Asked>,
    /// True if that is asked for at any later time, and not at the start.
    pub later: bool,
    /// True if reservations may be deleted at any time.
    pub deletes: bool,
    /// True if an image lies on the first node that nothing uses.
    pub staged: bool,
    /// Watches of each operator that may lag. The first operator leads.
    pub operators: [Vec<Kind>; 2],
    /// Watches of nodes that may lag.
    pub lagging: Vec<Kind>,
    /// True if a deletion may be carried out in spite of a finalizer.
    pub slips: bool,
    /// True if nodes report what they do in the same moment.
    pub prompt: bool,
    /// What it is there for: some order must lead to such a moment.
    pub reached: fn(&World) -> bool,
}

impl Scenario {
    /// All that must hold.
    pub fn all() -> [Self; 9] {
        [
            two_places(),
            old_ledgers(),
            room_for_one(),
            two_of_both(),
            idle_image(),
            late_giver(),
            late_node(),
            new_image(),
            slips(),
        ]
    }
}

fn plain() -> Asked {
    Asked { bytes: 60, template: false }
}

fn from_template() -> Asked {
    Asked { bytes: 30, template: true }
}

/// Operators that choose between two ledgers.
pub fn two_places() -> Scenario {
    Scenario {
        name: "two places",
        nodes: 2,
        asked: vec![plain()],
        later: false,
        deletes: true,
        staged: false,
        operators: [vec![Kind::Reservations], vec![Kind::Reports]],
        lagging: vec![],
        slips: false,
        prompt: false,
        reached: |world| world.objects.ledgers.iter().all(|ledger| ledger.entries[0].is_some()),
    }
}

/// The same, where one of them sees ledgers late, too.
fn old_ledgers() -> Scenario {
    Scenario {
        name: "old ledgers",
        operators: [vec![Kind::Ledgers], vec![Kind::Reports]],
        prompt: true,
        ..two_places()
    }
}

/// Two reservations of which one fits.
pub fn room_for_one() -> Scenario {
    Scenario {
        name: "room for one",
        nodes: 1,
        asked: vec![plain(), plain()],
        operators: [vec![], vec![Kind::Reports]],
        prompt: true,
        reached: |world| [State::Ready, State::Queued].into_iter().all(|state| is_any(world, state)),
        ..two_places()
    }
}

/// Two reservations and two ledgers, of which each has room for one of them: whoever is promised both keeps the other waiting.
pub fn two_of_both() -> Scenario {
    Scenario {
        name: "two of both",
        nodes: 2,
        deletes: false,
        operators: [vec![Kind::Reservations], vec![Kind::Ledgers]],
        reached: |world| {
            let places = world.objects.reservations.map(|one| one.filter(|one| one.prepared)?.assigned);
            matches!(places, [Some((first, _)), Some((second, _))] if first != second)
        },
        ..room_for_one()
    }
}

/// A reservation starts from an image that the leader, whose watches lag, takes for unused.
pub fn idle_image() -> Scenario {
    Scenario {
        name: "an idle image",
        nodes: 1,
        asked: vec![from_template()],
        later: true,
        deletes: true,
        staged: true,
        operators: [vec![Kind::Reservations], vec![]],
        lagging: vec![],
        slips: false,
        prompt: true,
        reached: is_made_twice,
    }
}

/// The same, where it is the operator that gives the image away whose watches lag.
fn late_giver() -> Scenario {
    Scenario {
        name: "a late giver",
        deletes: false,
        operators: [vec![], vec![Kind::Images, Kind::Ledgers]],
        ..idle_image()
    }
}

/// The same, where it is the node that sees everything late.
fn late_node() -> Scenario {
    Scenario {
        name: "a late node",
        deletes: false,
        operators: [vec![], vec![]],
        lagging: vec![Kind::Ledgers, Kind::Reservations, Kind::Images],
        ..idle_image()
    }
}

/// An image that is made while the leader does not see it.
pub fn new_image() -> Scenario {
    Scenario {
        name: "a new image",
        later: false,
        staged: false,
        operators: [vec![Kind::Images], vec![]],
        slips: true,
        ..idle_image()
    }
}

/// Deletions in spite of a finalizer, seen late by the node.
pub fn slips() -> Scenario {
    Scenario {
        name: "slips",
        nodes: 1,
        operators: [vec![], vec![]],
        lagging: vec![Kind::Reservations, Kind::Ledgers],
        slips: true,
        reached: |world| {
            let entry = world.objects.ledgers[0].entries[0];
            world.nodes[0].record.obeyed[0] && entry.is_some_and(|entry| entry.revoked.is_some())
        },
        ..two_places()
    }
}

fn is_any(world: &World, state: State) -> bool {
    world.objects.reservations.iter().flatten().any(|reservation| reservation.state == state)
}

/// A reservation is served from an image that was made anew after the one before it was retired.
fn is_made_twice(world: &World) -> bool {
    world.images_made == 2
        && is_any(world, State::Ready)
        && world.objects.ledgers[0].entries.iter().skip(RESERVATIONS).flatten().count() == 1
}
