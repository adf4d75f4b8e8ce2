//! What the checker tells apart: the API server's objects, what each actor has seen of them, and what it is about to write.
//! Small and of fixed size, so that millions fit; versions and revisions are kept as ranks, so that there is an end to them.

use std::hash::{Hash, Hasher};

use berth_core::view::ReservationState;

/// Nodes, each with one ledger and a place for one image.
pub const NODES: usize = 2;
/// Reservations.
pub const RESERVATIONS: usize = 2;
/// How often the object of an image may be made anew.
pub const IMAGES: usize = 2;
/// What a ledger has a place for: reservations, then images by UID.
pub const HOLDERS: usize = RESERVATIONS + IMAGES;

/// The name of what is at this index.
pub fn tag(index: usize) -> u8 {
    u8::try_from(index).expect("everything here is small")
}

/// An entry of a ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    pub bytes: u8,
    pub revoked: Option<u8>,
}

pub type Entries = [Option<Entry>; HOLDERS];

/// A ledger: its revision is its version, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ledger {
    pub revision: u8,
    pub entries: Entries,
}

/// In one piece, and no two the same: most of the checker's time goes into hashes.
impl Hash for Ledger {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        const { assert!(8 + 24 * HOLDERS <= 128) };
        let bits = self.entries.iter().fold(u128::from(self.revision), |bits, entry| {
            let (bytes, revoked) = match entry {
                None => (0, 0),
                Some(Entry { bytes, revoked: None }) => (*bytes, 1),
                Some(Entry { bytes, revoked: Some(revision) }) => (*bytes, 2 + u16::from(*revision)),
            };
            bits << 24 | u128::from(bytes) << 16 | u128::from(revoked)
        });
        hasher.write_u128(bits);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reservation {
    pub version: u8,
    pub deleting: bool,
    pub guarded: bool,
    pub state: State,
    /// The node, and whether it names the image there.
    pub assigned: Option<(u8, bool)>,
    pub prepared: bool,
}

impl Reservation {
    pub const NEW: Self = Self {
        version: 1,
        deleting: false,
        guarded: false,
        state: State::Pending,
        assigned: None,
        prepared: false,
    };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Pending,
    Queued,
    Promised,
    Ready,
    Releasing,
    Refused,
}

impl State {
    pub const fn of(state: ReservationState) -> Self {
        match state {
            ReservationState::Pending => Self::Pending,
            ReservationState::Queued => Self::Queued,
            ReservationState::Promised => Self::Promised,
            ReservationState::Ready => Self::Ready,
            ReservationState::Releasing => Self::Releasing,
            ReservationState::Refused => Self::Refused,
        }
    }

    pub const fn shown(self) -> ReservationState {
        match self {
            Self::Pending => ReservationState::Pending,
            Self::Queued => ReservationState::Queued,
            Self::Promised => ReservationState::Promised,
            Self::Ready => ReservationState::Ready,
            Self::Releasing => ReservationState::Releasing,
            Self::Refused => ReservationState::Refused,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Image {
    pub uid: u8,
    pub deleting: bool,
}

/// What a node has recorded, and reports of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    pub revision: u8,
    pub obeyed: [bool; HOLDERS],
    pub made: [bool; HOLDERS],
    pub released: [bool; HOLDERS],
}

/// As that of ledgers.
impl Hash for Record {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        const { assert!(8 + 3 * HOLDERS <= 64) };
        let flags = self.obeyed.iter().chain(&self.made).chain(&self.released);
        hasher.write_u64(flags.fold(self.revision.into(), |bits, flag| bits << 1 | u64::from(*flag)));
    }
}

/// The objects, or what somebody has seen of them. Each field is a kind with a watch of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Objects {
    pub ledgers: [Ledger; NODES],
    pub reservations: [Option<Reservation>; RESERVATIONS],
    /// By node: the name says where.
    pub images: [Option<Image>; NODES],
    pub reports: [Record; NODES],
}

/// A kind with a watch of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Ledgers,
    Reservations,
    Images,
    Reports,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Ledgers, Self::Reservations, Self::Images, Self::Reports];
}

impl Objects {
    /// One watch catches up.
    pub fn look(&mut self, now: &Self, kind: Kind) {
        match kind {
            Kind::Ledgers => self.ledgers = now.ledgers,
            Kind::Reservations => self.reservations = now.reservations,
            Kind::Images => self.images = now.images,
            Kind::Reports => self.reports = now.reports,
        }
    }
}

/// A write that an operator is about to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Write {
    Ledger { node: u8, base: u8, entries: NewEntries },
    Guard(u8),
    Unguard(u8),
    Assign { reservation: u8, version: u8, node: u8, image: bool },
    Report { reservation: u8, version: u8, state: State },
    CreateImage(u8),
    DeleteImage { node: u8, uid: u8 },
    UnguardImage { node: u8, uid: u8 },
    Confirm(u8),
}

/// Entries of a ledger that is to be written: those that it revokes get the revision that it will have.
pub type NewEntries = [Option<NewEntry>; HOLDERS];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NewEntry {
    pub bytes: u8,
    pub revoked: Revoked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Revoked {
    No,
    Before(u8),
    Now,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Operator {
    pub seen: Objects,
    pub left: Vec<Write>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    pub seen: Objects,
    pub record: Record,
}

/// Everything at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub objects: Objects,
    pub operators: [Operator; 2],
    pub nodes: [Node; NODES],
    /// How many objects of images were made so far.
    pub images_made: u8,
    /// Reservations that users have yet to ask for.
    pub unasked: [bool; RESERVATIONS],
    /// Something that must never happen has happened.
    pub violated: Option<&'static str>,
}

impl World {
    /// Replaces revisions and versions by their ranks. Nothing but their order is ever looked at.
    pub fn rank(&mut self) {
        for node in 0..NODES {
            let mut used = Ranks::default();
            self.each_revision(node, &mut |value| used.add(*value));
            self.each_revision(node, &mut |value| *value = used.rank(*value));
        }
        for reservation in 0..RESERVATIONS {
            let mut used = Ranks::default();
            self.each_version(reservation, &mut |value| used.add(*value));
            self.each_version(reservation, &mut |value| *value = used.rank(*value));
        }
    }

    fn all_objects(&mut self) -> impl Iterator<Item = &mut Objects> {
        let operators = self.operators.iter_mut().map(|operator| &mut operator.seen);
        let nodes = self.nodes.iter_mut().map(|node| &mut node.seen);
        std::iter::once(&mut self.objects).chain(operators).chain(nodes)
    }

    fn each_revision(&mut self, node: usize, each: &mut impl FnMut(&mut u8)) {
        for objects in self.all_objects() {
            let ledger = &mut objects.ledgers[node];
            each(&mut ledger.revision);
            ledger.entries.iter_mut().flatten().filter_map(|e| e.revoked.as_mut()).for_each(&mut *each);
            each(&mut objects.reports[node].revision);
        }
        each(&mut self.nodes[node].record.revision);
        for write in self.operators.iter_mut().flat_map(|operator| &mut operator.left) {
            if let Write::Ledger { node: of, base, entries } = write
                && usize::from(*of) == node
            {
                each(base);
                for entry in entries.iter_mut().flatten() {
                    if let Revoked::Before(revision) = &mut entry.revoked {
                        each(revision);
                    }
                }
            }
        }
    }

    fn each_version(&mut self, reservation: usize, each: &mut impl FnMut(&mut u8)) {
        for objects in self.all_objects() {
            if let Some(object) = &mut objects.reservations[reservation] {
                each(&mut object.version);
            }
        }
        for write in self.operators.iter_mut().flat_map(|operator| &mut operator.left) {
            match write {
                Write::Assign { reservation: of, version, .. }
                | Write::Report { reservation: of, version, .. }
                    if usize::from(*of) == reservation =>
                {
                    each(version);
                }
                _ => {}
            }
        }
    }
}

/// The values of a counter that are in use, as bits. Zero stays zero: the revision of a node that has recorded none.
#[derive(Default)]
struct Ranks(u64);

impl Ranks {
    fn add(&mut self, value: u8) {
        self.0 |= 1 << value;
    }

    fn rank(&self, value: u8) -> u8 {
        let upto = u64::MAX >> (63 - value);
        u8::try_from((self.0 & upto & !1).count_ones()).expect("everything here is small")
    }
}
