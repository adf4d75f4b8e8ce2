//! Where a reservation may go, and why not elsewhere. Deterministic: two operators with the same view choose alike.

use std::fmt::{self, Write as _};

use crate::budget::{Shortfall, fits, fits_empty, free};
use crate::ids::{NodeName, PoolName, Uid};
use crate::ledger::{Behind, Promise};
use crate::pool::OTHER_AREA;
use crate::reason::Reason;
use crate::thin::{BlockSize, Stopped};
use crate::units::Bytes;
use crate::view::{ImageView, LedgerView, NodePoolState, PoolView, ReservationView, View};

use super::need::{ImageNeed, Need, image_promise};

/// A pool on a node, and whether the reservation can go there now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The pool.
    pub pool: PoolName,
    /// The node.
    pub node: NodeName,
    /// Whether, or why not.
    pub verdict: Verdict,
}

/// Whether a reservation can go to a place now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It can.
    Fits {
        /// What its class has left there now.
        free: Bytes,
        /// True if the image that it starts from is promised there.
        present: bool,
    },
    /// Too much is promised to others.
    Short(Shortfall),
    /// It would not fit if nothing were promised.
    TooLarge(Shortfall),
    /// The node says that the pool cannot be used.
    Unusable {
        /// Why.
        reason: Reason,
        /// For people.
        message: String,
    },
    /// A kernel pool that it needs takes nothing more.
    Stopped(Stopped),
    /// The node's Lease has run out.
    NodeLost,
    /// The node has not reported since this operator began to watch.
    NotReported,
    /// The ledger is older than what the node has obeyed.
    Behind(Behind),
    /// The ledger has not been made yet.
    NoLedger,
    /// The staged image is being removed there.
    ImageLeaving,
}

impl Verdict {
    /// True if waiting for other promises to go is all that can help, or nothing can.
    pub const fn is_about_space(&self) -> bool {
        match self {
            Self::Short(_) | Self::TooLarge(_) => true,
            Self::Stopped(stopped) => stopped.is_about_space(),
            _ => false,
        }
    }

    /// The documented reason for a place that cannot be used.
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Fits { .. } => Reason::Queued,
            Self::Short(Shortfall { bound: crate::budget::Bound::Promises, .. }) => Reason::LedgerFull,
            Self::Short(_) => Reason::InsufficientCapacity,
            Self::TooLarge(_) => Reason::LargerThanPool,
            Self::Unusable { reason, .. } => *reason,
            Self::Stopped(stopped) => stopped.reason(),
            Self::NodeLost => Reason::NodeLost,
            Self::NotReported | Self::NoLedger => Reason::NoMatchingNode,
            Self::Behind(_) => Reason::LedgerBehind,
            Self::ImageLeaving => Reason::Releasing,
        }
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool {} on node {} ", self.pool, self.node)?;
        match &self.verdict {
            Verdict::Fits { free, .. } => write!(f, "has {free} left, for requests that came earlier"),
            Verdict::Short(shortfall) => write!(f, "{shortfall}"),
            Verdict::TooLarge(shortfall) => write!(f, "{shortfall} even when empty"),
            Verdict::Unusable { reason, message } if message.is_empty() => {
                write!(f, "cannot be used: {reason}")
            }
            Verdict::Unusable { reason, message } => write!(f, "cannot be used: {reason}: {message}"),
            Verdict::Stopped(stopped) => write!(f, "{stopped}"),
            Verdict::NodeLost => f.write_str("is lost: the node no longer renews its Lease"),
            Verdict::NotReported => f.write_str("has not reported yet"),
            Verdict::Behind(behind) => write!(f, "is behind: {behind}"),
            Verdict::NoLedger => f.write_str("has no ledger yet"),
            Verdict::ImageLeaving => f.write_str("is removing its copy of the image"),
        }
    }
}

/// True if the reservation's fields allow this pool on this node.
pub(super) fn may_use(reservation: &ReservationView, pool: &PoolView, node: &NodeName) -> bool {
    !pool.deleting
        && pool.invalid.is_none()
        && reservation.pools.allows(pool)
        && reservation.node.as_ref().is_none_or(|only| only == node)
}

/// Every place that the reservation's fields allow, in order of pool and node, with what speaks against it.
pub fn candidates(view: &View, reservation: &ReservationView, need: &Need) -> Vec<Candidate> {
    let mut all = Vec::new();
    for pool in view.pools.values() {
        for (name, node) in &view.nodes {
            if !node.pools.contains_key(&pool.name) || !may_use(reservation, pool, name) {
                continue;
            }
            let verdict = judge(view, reservation, need, pool, name);
            all.push(Candidate { pool: pool.name.clone(), node: name.clone(), verdict });
        }
    }
    all
}

fn judge(
    view: &View,
    reservation: &ReservationView,
    need: &Need,
    pool: &PoolView,
    node: &NodeName,
) -> Verdict {
    let (Some(state), Some(report)) = (view.nodes.get(node), view.report_of(&pool.name, node)) else {
        return Verdict::NotReported;
    };
    if !report.usable {
        return Verdict::Unusable { reason: report.reason, message: report.message.clone() };
    }
    if pool.capacity(report).is_none() {
        return Verdict::Unusable { reason: Reason::PoolAreaFailed, message: OTHER_AREA.to_owned() };
    }
    let Some(ledger) = view.ledgers.get(&(pool.name.clone(), node.clone())) else { return Verdict::NoLedger };
    let all = promises_at(view, ledger, &reservation.uid, need);
    let image = staged(view, ledger, need);
    let stopped = stopped(report, &all);
    if let Some(stopped) = stopped.filter(|stopped| !stopped.is_about_space()) {
        return Verdict::Stopped(stopped);
    }
    if let Err(shortfall) = fits_empty(&ledger.capacity, &everything(need, &reservation.uid, pool.block)) {
        return Verdict::TooLarge(shortfall);
    }
    if state.is_lost() {
        return Verdict::NodeLost;
    }
    if !state.live || !state.reported {
        return Verdict::NotReported;
    }
    if let Some(behind) = view.behind(ledger) {
        return Verdict::Behind(behind);
    }
    if image.is_some_and(|image| image.deleting) {
        return Verdict::ImageLeaving;
    }
    if let Some(stopped) = stopped {
        return Verdict::Stopped(stopped);
    }
    match fits(ledger, &all) {
        Ok(()) => Verdict::Fits {
            free: free(ledger, need.class()),
            present: image.is_some_and(|image| ledger.promises.contains_key(&image.uid)),
        },
        Err(shortfall) => Verdict::Short(shortfall),
    }
}

/// The first kernel pool that takes nothing more of all those that have to take some of this.
fn stopped(report: &NodePoolState, all: &[(Uid, Promise)]) -> Option<Stopped> {
    let state = report.thin.as_ref()?;
    let mut needed = all.iter().filter(|(_, promise)| promise.charge.data > Bytes::ZERO);
    needed.find_map(|(_, promise)| state.stopped(promise.class))
}

/// The staged image at this ledger's place, if the need has one and the object is there.
pub(super) fn staged<'v>(view: &'v View, ledger: &LedgerView, need: &Need) -> Option<&'v ImageView> {
    let name = need.image.as_ref()?.name_at(&ledger.pool, &ledger.node);
    view.images.get(&name)
}

/// What has to be entered at this place: the image only if it is not promised there yet. An image that has no object
/// yet counts under an empty UID, which is never written.
pub(super) fn promises_at(
    view: &View,
    ledger: &LedgerView,
    holder: &Uid,
    need: &Need,
) -> Vec<(Uid, Promise)> {
    let block = view.block_of(&ledger.pool);
    let Some(image) = &need.image else { return need.promises(holder, block, None) };
    let name = image.name_at(&ledger.pool, &ledger.node);
    let entry = match view.images.get(&name) {
        Some(staged) if ledger.promises.contains_key(&staged.uid) => None,
        Some(staged) => Some((staged.uid.clone(), staged.promise(block))),
        None => Some((Uid::default(), promise_of(image, &name, block))),
    };
    need.promises(holder, block, entry)
}

fn promise_of(need: &ImageNeed, name: &str, block: Option<BlockSize>) -> Promise {
    image_promise(name, need.image.real_size, need.image.virtual_size, block)
}

/// Everything that has to be promised in a pool with such blocks where nothing is.
pub(super) fn everything(need: &Need, holder: &Uid, block: Option<BlockSize>) -> Vec<(Uid, Promise)> {
    let image = need.image.as_ref().map(|image| (Uid::default(), promise_of(image, "", block)));
    need.promises(holder, block, image)
}

/// The best of the places that fit and that `open` allows: where the image is promised already, then where most is left,
/// then the first by name.
pub fn choose(all: &[Candidate], open: impl Fn(&Candidate) -> bool) -> Option<&Candidate> {
    let mut best: Option<(&Candidate, (bool, Bytes))> = None;
    for candidate in all {
        let Verdict::Fits { free, present } = candidate.verdict else { continue };
        if open(candidate) && best.is_none_or(|(_, rank)| (present, free) > rank) {
            best = Some((candidate, (present, free)));
        }
    }
    best.map(|(candidate, _)| candidate)
}

/// The least that is missing anywhere, if space is missing somewhere.
pub(super) fn least_shortfall(all: &[Candidate]) -> Option<Bytes> {
    let short = all.iter().filter_map(|candidate| match &candidate.verdict {
        Verdict::Short(shortfall) | Verdict::TooLarge(shortfall) => Some(shortfall.bytes),
        _ => None,
    });
    short.min()
}

/// What speaks against each place; at most five are named.
pub(super) fn explain(all: &[Candidate]) -> String {
    const NAMED: usize = 5;
    let mut text = all.iter().take(NAMED).map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if all.len() > NAMED {
        let _ = write!(text, "; and {} more", all.len() - NAMED); // writing to a String cannot fail
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{at, hold, image, promise, reservation, template, thin_view, view};
    use crate::ids::ObjectName;
    use crate::ledger::Class;
    use crate::units::Timestamp;
    use crate::view::{Access, PoolChoice};

    fn look(view: &View, request: &ReservationView) -> Vec<Candidate> {
        candidates(view, request, &Need::of(view, request, Timestamp(0)).expect("plain"))
    }

    #[test]
    fn the_place_with_most_left_wins_and_ties_go_to_the_first() {
        let mut view = view(&[("a", 100), ("b", 100), ("c", 100)]);
        let request = reservation("r", 40, 0);
        assert_eq!(choose(&look(&view, &request), |_| true).expect("fits").node, NodeName::from("a"));
        hold(&mut view, "a", "x", Class::Images, 10);
        assert_eq!(choose(&look(&view, &request), |_| true).expect("fits").node, NodeName::from("b"));
        assert!(choose(&look(&view, &request), |candidate| candidate.node.as_str() == "a").is_some());
    }

    #[test]
    fn a_place_that_has_the_image_is_preferred_and_charged_for_the_volume_only() {
        let mut view = view(&[("a", 100), ("b", 100)]);
        let import = template(30, 60);
        view.imports.insert(import.name.clone(), import);
        let staged = image("b", 60, 0);
        hold(&mut view, "b", staged.uid.as_str(), Class::Images, 60);
        view.images.insert(staged.name.clone(), staged);
        let mut request = reservation("r", 30, 0);
        request.access = Access::Block;
        request.template = Some(ObjectName::new("ns", "template"));
        let all = look(&view, &request);
        assert!(all.iter().all(|candidate| matches!(candidate.verdict, Verdict::Fits { .. })), "{all:?}");
        assert_eq!(choose(&all, |_| true).expect("fits").node, NodeName::from("b"));
        view.images.values_mut().for_each(|image| image.deleting = true);
        assert_eq!(look(&view, &request)[1].verdict, Verdict::ImageLeaving);
    }

    #[test]
    fn every_obstacle_is_explained() {
        let mut view =
            view(&[("a", 100), ("b", 30), ("c", 100), ("d", 100), ("e", 100), ("f", 100), ("g", 100)]);
        hold(&mut view, "a", "x", Class::Volumes, 70);
        view.nodes.get_mut(&NodeName::from("c")).expect("there").live = false;
        view.nodes.get_mut(&NodeName::from("d")).expect("there").reported = false;
        view.ledgers.remove(&at("p", "e"));
        let report = |view: &mut View, node: &str, change: fn(&mut NodePoolState)| {
            let node = view.nodes.get_mut(&NodeName::from(node)).expect("there");
            change(node.pools.values_mut().next().expect("one"));
        };
        report(&mut view, "f", |pool| pool.obeyed_revision = 9);
        report(&mut view, "g", |pool| {
            pool.usable = false;
            pool.reason = Reason::PoolAreaFailed;
            pool.message = "no such directory".to_owned();
        });
        view.nodes.get_mut(&NodeName::from("d")).expect("there").live = false;
        let all = look(&view, &reservation("r", 40, 0));
        let texts: Vec<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "pool p on node a lacks 10 bytes in all",
                "pool p on node b lacks 10 bytes for images even when empty",
                "pool p on node c is lost: the node no longer renews its Lease",
                "pool p on node d has not reported yet",
                "pool p on node e has no ledger yet",
                "pool p on node f is behind: the ledger is at revision 1, the node at 9",
                "pool p on node g cannot be used: PoolAreaFailed: no such directory",
            ]
        );
        assert!(explain(&all).ends_with("; and 2 more"));
        assert_eq!(least_shortfall(&all), Some(Bytes(10)));
        assert_eq!(choose(&all, |_| true), None);
    }

    #[test]
    fn a_kernel_pool_that_takes_nothing_more_is_explained_with_numbers_and_stops_its_class_only() {
        let mut view = thin_view(&["a", "b"], Bytes::gib(10));
        let pool = view.nodes.get_mut(&NodeName::from("a")).expect("there").pools.values_mut().next();
        let images = &mut pool.expect("one").thin.as_mut().expect("thin").images;
        images.metadata.used = Bytes::mib(46);
        let mut request = reservation("r", 1 << 30, 0);
        let all = look(&view, &request);
        assert_eq!(
            all[0].to_string(),
            "pool p on node a promises nothing more for images: the kernel pool uses 46 MiB of 64 MiB of metadata, 72 %, more \
             than 70 %"
        );
        assert_eq!(
            (all[0].verdict.reason(), all[0].verdict.is_about_space()),
            (Reason::MetadataAlmostFull, true)
        );
        assert_eq!(choose(&all, |_| true).expect("elsewhere").node, NodeName::from("b"));
        request.access = Access::Block;
        assert!(matches!(look(&view, &request)[0].verdict, Verdict::Fits { .. }), "volumes are well");
        request.access = Access::Stream;
        assert!(matches!(look(&view, &request)[0].verdict, Verdict::Fits { .. }), "nothing is written");
        let pool = view.nodes.get_mut(&NodeName::from("a")).expect("there").pools.values_mut().next();
        let volumes = &mut pool.expect("one").thin.as_mut().expect("thin").volumes;
        (volumes.needs_check, volumes.metadata.total) = (true, Bytes::ZERO);
        request.access = Access::Block;
        let all = look(&view, &request);
        assert_eq!((all[0].verdict.reason(), all[0].verdict.is_about_space()), (Reason::NeedsCheck, false));
    }

    #[test]
    fn metadata_is_promised_and_runs_out_like_data() {
        let mut view = thin_view(&["a"], Bytes::gib(1024));
        let mut request = reservation("r", 1 << 30, 0);
        request.access = Access::Block;
        assert!(matches!(look(&view, &request)[0].verdict, Verdict::Fits { .. }));
        let left = view.ledgers[&at("p", "a")].capacity.volumes.metadata;
        let ledger = view.ledgers.get_mut(&at("p", "a")).expect("there");
        let mut other = promise("other", Class::Volumes, 1 << 30);
        other.charge.metadata = left;
        ledger.promises.insert(Uid::from("other"), other);
        let short = look(&view, &request)[0].to_string();
        assert!(short.ends_with("of metadata for volumes"), "{short}");
        request.max_size = Bytes::gib(512);
        let large = look(&view, &request)[0].to_string();
        assert!(large.ends_with("of metadata for volumes even when empty"), "{large}");
    }

    #[test]
    fn selectors_and_pinned_nodes_narrow_the_choice() {
        let mut view = view(&[("a", 100), ("b", 100)]);
        let mut request = reservation("r", 1, 0);
        request.node = Some(NodeName::from("b"));
        assert_eq!(look(&view, &request).len(), 1);
        request.pools = PoolChoice::Labelled([("tier".to_owned(), "fast".to_owned())].into());
        assert!(look(&view, &request).is_empty());
        let pool = view.pools.values_mut().next().expect("one");
        pool.labels.insert("tier".to_owned(), "fast".to_owned());
        assert_eq!(look(&view, &request).len(), 1);
        view.pools.values_mut().next().expect("one").deleting = true;
        assert!(look(&view, &request).is_empty(), "a pool that is being deleted takes nothing new");
    }
}
