//! What a node tells the API server.

use berth_core::ids::Uid;
use berth_core::ledger::is_behind;
use berth_core::node::view::{AreaView, PoolOnNode};
use berth_core::units::Bytes;
use berth_core::view::NodePoolState;

use super::{Disk, Node, Reach};
use crate::histories::sabotage::Sabotage;
use crate::histories::world::{Kind, World, grown};

impl Node {
    /// Writes its report and what it knows of each object, then renews its Lease; true if anything differs from before.
    /// Where the answer is lost, the node does not know that it has reported.
    pub fn report(&mut self, world: &mut World, answered: bool) -> bool {
        if self.reach != Reach::Connected {
            return false;
        }
        if self.stale {
            self.begin_anew(world);
            return true;
        }
        let changed = self.report_pools(world) | self.report_reservations(world) | self.report_images(world);
        world.heard(&self.view.node);
        if answered {
            for area in self.view.pools.values_mut().filter_map(|pool| pool.area.as_mut()) {
                area.promises.values_mut().for_each(|promise| promise.reported = true);
            }
        }
        if world.objects().nodes[&self.view.node].live {
            *world.beats.get_mut(&self.view.node).expect("a node of this world") += 1;
        }
        changed
    }

    fn report_pools(&self, world: &mut World) -> bool {
        let known = &world.objects().nodes[&self.view.node];
        let mut pools = known.pools.clone();
        for (name, state) in &mut pools {
            let pool = &self.view.pools[name];
            if let Some(area) = &pool.area {
                tell(state, pool, area, &self.disks[name], world);
            }
        }
        let differs = pools != known.pools;
        if differs {
            let version = world.version();
            let node = world.edit(Kind::Nodes).nodes.get_mut(&self.view.node).expect("a node of this world");
            (node.pools, node.version) = (pools, version);
        }
        differs
    }

    fn report_reservations(&self, world: &mut World) -> bool {
        let mut changed = false;
        for (uid, reservation) in self.view.reservations.iter().filter(|(_, found)| !found.deleting) {
            let area = self.view.pools.get(&reservation.pool).and_then(|pool| pool.area.as_ref());
            let prepared = area.is_some_and(|area| reservation.is_prepared(uid, area));
            let prepared = prepared.then_some(reservation.generation);
            let file = area.and_then(|area| area.files.get(uid)).filter(|file| file.only_copy);
            let only_copy = file.map(|_| "it was changed".to_owned());
            changed |= self.put(world, uid, |found| {
                let differs = (found.prepared, &found.only_copy) != (prepared, &only_copy);
                (found.prepared, found.only_copy) = (prepared, only_copy.clone());
                differs
            });
        }
        changed
    }

    fn put(
        &self,
        world: &mut World,
        uid: &Uid,
        act: impl Fn(&mut berth_core::view::ReservationView) -> bool,
    ) -> bool {
        let here = |found: &&berth_core::view::ReservationView| {
            found.assignment.as_ref().is_some_and(|place| place.node == self.view.node)
        };
        let Some(mut found) = world.objects().reservations.get(uid).filter(here).cloned() else {
            return false;
        };
        let differs = act(&mut found);
        if differs {
            found.version = world.version();
            world.edit(Kind::Reservations).reservations.insert(uid.clone(), found);
        }
        differs
    }

    fn report_images(&self, world: &mut World) -> bool {
        let mut changed = false;
        for (uid, image) in self.view.images.iter().filter(|(_, image)| !image.deleting) {
            let area = self.view.pools.get(&image.pool).and_then(|pool| pool.area.as_ref());
            let held =
                area.and_then(|area| area.images.get(&image.digest)).filter(|held| held.holder == *uid);
            let Some(held) = held.filter(|held| held.complete) else { continue };
            let last_used = (held.last_used.0 > 0).then_some(held.last_used);
            let found = world.objects().images.get(&image.name).filter(|found| found.uid == *uid);
            if found.is_none_or(|found| found.ready && found.last_used == last_used) {
                continue;
            }
            let found = world.edit(Kind::Images).images.get_mut(&image.name).expect("just seen");
            (found.ready, found.last_used) = (true, last_used);
            changed = true;
        }
        changed
    }
}

fn tell(state: &mut NodePoolState, pool: &PoolOnNode, area: &AreaView, disk: &Disk, world: &World) {
    state.lineage.clone_from(&area.lineage);
    state.obeyed_revision = area.revision;
    if disk.thin && world.sabotage != Sabotage::GrowthUntold {
        state.thin = Some(grown(disk.grown, world.percent));
    }
    let of = |released: bool| {
        let those = area.promises.iter().filter(move |(_, promise)| promise.released == released);
        those.map(|(uid, promise)| (uid.clone(), promise.generation)).collect()
    };
    (state.obeyed, state.released) = (of(false), of(true));
    let lost = pool.ledger.as_ref().is_none_or(|ledger| is_behind(ledger, area).is_some());
    state.recorded.clear();
    if lost {
        let told = disk.promises.iter().filter(|(uid, _)| state.obeyed.contains_key(*uid));
        state.recorded = told.map(|(uid, promise)| (uid.clone(), promise.clone())).collect();
    }
    state.in_use = area.in_use().cloned().collect();
    state.used = disk.bytes.values().copied().sum::<Bytes>();
}
