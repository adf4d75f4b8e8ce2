//! Quiet: everything works again, everybody does all that there is to do, and people decide what only they can.

use berth_core::ids::NodeName;
use berth_core::units::Timestamp;
use berth_core::view::Service;

use super::history::History;
use super::node::Reach;
use super::observer::Wrong;
use super::operator::Operator;
use super::world::{Kind, NODES};

/// After so many rounds everything must have come to its end.
const ROUNDS: usize = 80;

impl History {
    /// Goes on until nothing changes any more.
    pub fn settle(&mut self) -> Result<(), (Wrong, String)> {
        self.world.tell(|| "quiet".to_owned());
        self.mend();
        let mut quiet = 0;
        for _ in 0..ROUNDS {
            let mut moved = self.world.strike_recovered() | self.world.delete_lost();
            for which in 0..2 {
                moved |= operate(&mut self.operators[which], &mut self.world);
            }
            for node in &mut self.nodes {
                node.look_at_all(&self.world);
                node.end_workloads();
                for _ in 0..8 {
                    let acted = node.act(&mut self.world, usize::MAX) > 0;
                    let jobs = node.jobs();
                    jobs.iter().for_each(|job| node.finish(&mut self.world, job));
                    moved |= acted || !jobs.is_empty();
                    if !acted && jobs.is_empty() {
                        break;
                    }
                }
                moved |= node.report(&mut self.world, true);
            }
            self.observe()?;
            self.world.now = Timestamp(self.world.now.0 + 1000);
            moved |= quiet == 1 && self.world.delete_placed_twice();
            quiet = if moved { 0 } else { quiet + 1 };
            if quiet == 2 {
                return Ok(());
            }
        }
        Err((Wrong::Stuck, "it does not settle".to_owned()))
    }

    /// Every machine is back, and every pool is open.
    fn mend(&mut self) {
        for pool in self.world.edit(Kind::Pools).pools.values_mut() {
            (pool.service, pool.limit) = (Service::Open, None);
            pool.drain_nodes.clear();
        }
        let objects = self.world.edit(Kind::Nodes);
        objects.nodes.values_mut().for_each(|node| node.live = true);
        objects.kube_nodes = Some(NODES.into_iter().map(NodeName::from).collect());
        for node in &mut self.nodes {
            if std::mem::replace(&mut node.reach, Reach::Connected) == Reach::Down {
                node.restart(&self.world);
            }
            node.report(&mut self.world, true);
        }
    }
}

/// One pass over everything that an operator sees; true if it wrote anything.
fn operate(operator: &mut Operator, world: &mut super::world::World) -> bool {
    operator.look_at_all(world);
    let mut wrote = false;
    for object in operator.objects() {
        operator.take_up(&object, world, None);
        let mut moved = false;
        while !operator.left.is_empty() {
            moved |= operator.step(world, None);
        }
        if moved {
            operator.look_at_all(world);
        }
        wrote |= moved;
    }
    wrote
}
