//! What nodes tell of their pools.

use crate::ids::{Lineage, Uid};
use crate::ledger::LedgerRecord;
use crate::units::{Bytes, Generation};

use super::{NodePoolState, Placement, View};

impl NodePoolState {
    /// True if the area is open. A node tells of an area that is not open only why: that nothing is in use there, or obeyed, is
    /// no news then.
    pub fn is_open(&self) -> bool {
        self.total > Bytes::ZERO
    }
}

impl View {
    /// What the node of a placement tells of the pool; `None` while the node is not heard, or has not opened it.
    pub fn told_of(&self, place: &Placement) -> Option<&NodePoolState> {
        let node = self.nodes.get(&place.node).filter(|node| node.live && node.reported)?;
        node.pools.get(&place.pool).filter(|pool| pool.is_open())
    }
}

impl LedgerRecord for NodePoolState {
    fn lineage(&self) -> Option<&Lineage> {
        self.lineage.as_ref()
    }

    fn revision(&self) -> u64 {
        self.obeyed_revision
    }

    fn held(&self) -> impl Iterator<Item = (&Uid, Generation)> {
        let given_back =
            |uid: &Uid, generation| self.released.get(uid).is_some_and(|gone| *gone >= generation);
        let obeyed = self.obeyed.iter().map(|(uid, generation)| (uid, *generation));
        obeyed.filter(move |(uid, generation)| !given_back(uid, *generation))
    }
}
