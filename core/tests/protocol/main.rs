//! Every order of events, within bounds: two operators whose views lag kind by kind, two ledgers, nodes that obey and release,
//! users who delete, writes that are compared and swapped, operators that end between any two writes or lose an answer. The
//! decisions are the real ones.

#![allow(clippy::disallowed_types)] // nobody asks for the order of what is only looked up

mod operator;
mod scenario;
mod state;
mod world;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Mutex, MutexGuard, PoisonError};

use stateright::{Checker, HasDiscoveries, Model, Property};

use operator::{IMAGE, Object, decide};
use scenario::{Sabotage, Scenario};
use state::{
    Entry, HOLDERS, Image, Kind, Ledger, NODES, Node, Objects, Operator, RESERVATIONS, Record, Reservation,
    State, World, Write, tag,
};
use world::{Step, image_holder};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// A user asks for what the scenario says.
    Ask(u8),
    Decide(usize, Object),
    /// An operator's next write reaches the API server.
    Write(usize),
    /// An operator ends, or what it wrote last was never answered.
    Crash(usize),
    Look(usize, Kind),
    NodeLooks(usize, Kind),
    NodeActs(usize, Step),
    Delete(u8),
    Slip(u8),
}

/// A decision: about which scenario, by what was seen, by the leader or not, about what.
type Question = (&'static str, Objects, bool, Object);

thread_local! {
    static KNOWN: RefCell<HashMap<Question, Vec<Write>>> = RefCell::default();
}

struct Protocol {
    scenario: Scenario,
    sabotage: Sabotage,
    /// Moments from which everything is known to come to rest.
    ending: Mutex<HashSet<u64>>,
}

impl Protocol {
    fn new(scenario: Scenario, sabotage: Sabotage) -> Self {
        Self { scenario, sabotage, ending: Mutex::default() }
    }

    fn about(&self, world: &World, which: usize, object: Object) -> Vec<Write> {
        let mut seen = world.operators[which].seen;
        if self.sabotage == Sabotage::EarlyRelease {
            for (ledger, report) in seen.ledgers.iter().zip(&mut seen.reports) {
                report.released = ledger.entries.map(|entry| entry.is_some());
            }
        }
        if self.sabotage == Sabotage::NeverSweep && object == Object::Pool {
            return Vec::new();
        }
        let mut writes = self.decided(seen, which == 0, object);
        if writes.last().is_some_and(|write| says_nothing_new(&seen, *write)) {
            writes.pop();
        }
        if self.sabotage == Sabotage::DeleteWithoutRetiring {
            writes = writes.into_iter().map(|write| deleting(&seen, write)).collect();
        }
        writes
    }

    /// The decision, which depends on nothing else: each is taken once.
    fn decided(&self, seen: Objects, leader: bool, object: Object) -> Vec<Write> {
        KNOWN.with_borrow_mut(|known| {
            let decided = known.entry((self.scenario.name, seen, leader, object));
            decided.or_insert_with(|| decide(&self.scenario, &seen, leader, object)).clone()
        })
    }

    fn objects(&self) -> Vec<Object> {
        let reservations = (0..self.scenario.asked.len()).map(|at| Object::Reservation(tag(at)));
        let images = (0..self.scenario.nodes).map(|node| Object::Image(tag(node)));
        let images = images.filter(|_| self.scenario.asked.iter().any(|asked| asked.template));
        std::iter::once(Object::Pool).chain(reservations).chain(images).collect()
    }

    /// True if everything comes to rest from here once nothing fails any more and all watches catch up.
    fn ends(&self, world: &World) -> bool {
        let mut world = world.clone();
        let mut passed = Vec::new();
        for _ in 0..ENOUGH {
            if world.violation(&self.scenario).is_some() {
                return true; // which the other property tells
            }
            Self::catch_up(&mut world);
            let mut hasher = DefaultHasher::new();
            world.hash(&mut hasher);
            passed.push(hasher.finish());
            let known = self.ending().contains(&hasher.finish());
            if known || !self.advance(&mut world) {
                let ends = known || world.is_at_rest(&self.scenario) || self.is_bounded(&world);
                self.ending().extend(passed.into_iter().filter(|_| ends));
                return ends;
            }
        }
        false
    }

    /// True if what is missing is an image that the bounds of the model forbid.
    fn is_bounded(&self, world: &World) -> bool {
        let missing = |write| match write {
            Write::CreateImage(node) => world.objects.images[usize::from(node)].is_none(),
            _ => false,
        };
        let mut writes = self.objects().into_iter().flat_map(|object| self.about(world, 0, object));
        usize::from(world.images_made) == state::IMAGES && writes.any(missing)
    }

    fn ending(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn catch_up(world: &mut World) {
        let now = world.objects;
        world.operators.iter_mut().for_each(|operator| operator.seen = now);
        world.nodes.iter_mut().for_each(|node| node.seen = now);
        world.rank();
    }

    /// Up to the first write that is refused.
    fn write_all(&self, world: &mut World, writes: Vec<Write>) {
        for write in writes {
            if world.take(write, self.sabotage).is_err() {
                return;
            }
        }
    }

    /// Everybody does something, with fresh views; false if nothing is left to do.
    fn advance(&self, world: &mut World) -> bool {
        for which in 0..2 {
            let left = std::mem::take(&mut world.operators[which].left);
            if !left.is_empty() {
                self.write_all(world, left);
                return true;
            }
        }
        for at in 0..self.scenario.nodes {
            if let Some(step) = world.steps(at, self.sabotage).first() {
                world.act(at, *step, self.sabotage);
                return true;
            }
        }
        for object in self.objects() {
            let (before, made) = (world.objects, world.images_made);
            let writes = self.about(world, 0, object);
            self.write_all(world, writes);
            if (world.objects, world.images_made) != (before, made) {
                return true;
            }
        }
        false
    }
}

/// True if a write is of what is there already.
fn says_nothing_new(seen: &Objects, write: Write) -> bool {
    let Write::Report { reservation, state, .. } = write else { return false };
    seen.reservations[usize::from(reservation)].is_some_and(|seen| seen.state == state)
}

/// The defect: what would retire an image deletes it.
fn deleting(seen: &Objects, write: Write) -> Write {
    let Write::Ledger { node, entries, .. } = write else { return write };
    let image = seen.images[usize::from(node)].filter(|image| !image.deleting);
    match image.filter(|image| {
        entries[image_holder(image.uid)].is_some_and(|entry| entry.revoked == state::Revoked::Now)
    }) {
        Some(image) => Write::DeleteImage { node, uid: image.uid },
        None => write,
    }
}

impl Model for Protocol {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let mut ledger = Ledger { revision: 1, entries: [None; HOLDERS] };
        let ledgers = [ledger; NODES];
        let mut reports = [Record::default(); NODES];
        reports.iter_mut().take(self.scenario.nodes).for_each(|report| report.revision = 1);
        let asked = self.scenario.asked.len();
        let now = if self.scenario.later { 0 } else { asked };
        let mut objects = Objects {
            ledgers,
            reservations: std::array::from_fn(|at| (at < now).then_some(Reservation::NEW)),
            images: [None; NODES],
            reports,
        };
        if self.scenario.staged {
            ledger.entries[image_holder(0)] = Some(Entry { bytes: IMAGE, revoked: None });
            objects.ledgers[0] = ledger;
            objects.images[0] = Some(Image { uid: 0, deleting: false });
            objects.reports[0] = Record::holding(1, &[image_holder(0)]);
        }
        // What lags has not seen what was asked for last, nor that the first node can be used.
        let mut reports = objects.reports;
        reports[0] = Record::default();
        let before = Objects { reservations: [None; RESERVATIONS], reports, ..objects };
        let operator = |at: usize| {
            let mut seen = objects;
            self.scenario.operators[at].iter().for_each(|kind| seen.look(&before, *kind));
            Operator { seen, left: Vec::new() }
        };
        vec![World {
            objects,
            operators: [operator(0), operator(1)],
            nodes: std::array::from_fn(|at| Node { seen: objects, record: objects.reports[at] }),
            images_made: u8::from(self.scenario.staged),
            unasked: std::array::from_fn(|at| (now..asked).contains(&at)),
            violated: None,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for which in 0..2 {
            if world.operators[which].left.is_empty() {
                actions.extend(self.objects().into_iter().map(|object| Action::Decide(which, object)));
            } else {
                actions.extend([Action::Write(which), Action::Crash(which)]);
            }
            actions.extend(self.scenario.operators[which].iter().map(|kind| Action::Look(which, *kind)));
        }
        for at in 0..self.scenario.nodes {
            actions.extend(self.scenario.lagging.iter().map(|kind| Action::NodeLooks(at, *kind)));
            let steps = world.steps(at, self.sabotage);
            actions.extend(steps.into_iter().map(|step| Action::NodeActs(at, step)));
        }
        for (at, reservation) in world.objects.reservations.iter().enumerate() {
            actions.extend(world.unasked[at].then_some(Action::Ask(tag(at))));
            if reservation.is_some_and(|reservation| !reservation.deleting) {
                actions.extend(self.scenario.deletes.then_some(Action::Delete(tag(at))));
                actions.extend(self.scenario.slips.then_some(Action::Slip(tag(at))));
            }
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Decide(which, object) => {
                world.operators[which].left = self.about(&world, which, object);
            }
            Action::Write(which) => {
                let write = world.operators[which].left.remove(0);
                if world.take(write, self.sabotage).is_err() {
                    world.operators[which].left.clear();
                }
            }
            Action::Crash(which) => world.operators[which].left.clear(),
            Action::Look(which, kind) => {
                let now = world.objects;
                world.operators[which].seen.look(&now, kind);
            }
            Action::NodeLooks(at, kind) => {
                let now = world.objects;
                world.nodes[at].seen.look(&now, kind);
            }
            Action::NodeActs(at, step) => {
                world.act(at, step, self.sabotage);
                if self.scenario.prompt {
                    world.act(at, Step::Report, self.sabotage);
                }
            }
            Action::Ask(at) => world.ask(at.into()),
            Action::Delete(at) => world.delete(at.into()),
            Action::Slip(at) => world.objects.reservations[usize::from(at)] = None,
        }
        world.follow(&self.scenario);
        world.rank();
        (world != *last).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(SAFE, |model: &Self, world: &World| world.violation(&model.scenario).is_none()),
            Property::always(ENDS, |model: &Self, world: &World| model.ends(world)),
            Property::sometimes("what the scenario is there for", |model: &Self, world: &World| {
                (model.scenario.reached)(world)
            }),
            Property::sometimes("a reservation is served", |_, world: &World| {
                world
                    .objects
                    .reservations
                    .iter()
                    .flatten()
                    .any(|reservation| reservation.state == State::Ready)
            }),
        ];
        properties.extend(self.scenario.deletes.then_some(Property::sometimes(
            "all reservations are gone",
            |_, world: &World| {
                world.unasked == [false; RESERVATIONS]
                    && world.objects.reservations.iter().all(Option::is_none)
                    && world.objects.ledgers[0].entries.iter().take(RESERVATIONS).all(Option::is_none)
            },
        )));
        properties
    }
}

const SAFE: &str = "promises hold";
const ENDS: &str = "everything comes to rest";
/// Steps after which what has not come to rest never does.
const ENOUGH: usize = 200;

/// What is wrong in some order, and the steps that lead there; `None` if every order was looked at and nothing is.
fn check(
    model: Protocol,
    properties: &[&'static str],
    threads: usize,
) -> Option<(&'static str, Vec<Action>)> {
    let (name, sabotage) = (model.scenario.name, model.sabotage);
    let checker = model
        .checker()
        .threads(threads)
        .finish_when(HasDiscoveries::AnyOf(properties.iter().copied().collect()))
        .spawn_bfs()
        .join();
    println!("{name}, {sabotage:?}: {} states, depth {}", checker.unique_state_count(), checker.max_depth());
    let found = properties.iter().find_map(|property| Some((property, checker.discovery(property)?)));
    let Some((property, path)) = found else {
        checker.assert_properties();
        return None;
    };
    let why = path.last_state().violation(&checker.model().scenario).unwrap_or(property);
    Some((why, path.into_actions()))
}

#[test]
fn promises_hold_in_every_order() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    for scenario in Scenario::all() {
        let found = check(Protocol::new(scenario, Sabotage::None), &[SAFE, ENDS], threads);
        assert!(found.is_none(), "{found:#?}");
    }
}

/// With one thread, which finds the same each time.
#[test]
fn every_sabotage_is_found() {
    for (sabotage, scenario, wrong) in [
        (Sabotage::LedgerWithoutVersion, scenario::room_for_one(), world::NOT_PROMISED),
        (Sabotage::LedgerWithoutVersion, scenario::two_of_both(), world::NOT_PROMISED),
        (Sabotage::LedgerMerged, scenario::room_for_one(), world::OVERCOMMITTED),
        (Sabotage::AssignWithoutVersion, scenario::two_places(), world::TWO_PLACES),
        (Sabotage::AssignWithoutVersion, scenario::two_of_both(), world::TWO_PLACES),
        (Sabotage::EarlyRelease, scenario::room_for_one(), world::NOT_PROMISED),
        (Sabotage::ObeyWithoutAssignment, scenario::two_places(), world::NOT_PROMISED),
        (Sabotage::ForgetEarly, scenario::two_places(), world::NOT_PROMISED),
        (Sabotage::SweepWithoutAsking, scenario::new_image(), world::IMAGE_DELETED),
        (Sabotage::SweepWithoutRevoking, scenario::slips(), world::NOT_PROMISED),
        (Sabotage::NeverSweep, scenario::slips(), ENDS),
        (Sabotage::DeleteWithoutRetiring, scenario::idle_image(), world::IMAGE_DELETED),
    ] {
        let property = if wrong == ENDS { ENDS } else { SAFE };
        let found = check(Protocol::new(scenario, sabotage), &[property], 1);
        println!("{found:?}");
        assert_eq!(found.map(|(found, _)| found), Some(wrong), "{sabotage:?}");
    }
}
