//! `berth-node pool`: the pools of this node.

use std::path::PathBuf;

use berth_core::ids::{PoolName, Uid};
use berth_core::ledger::Class;
use berth_core::units::Bytes;
use clap::{ArgGroup, Args, Subcommand, ValueEnum};

use super::asking::{Asking, named};
use crate::area::{Backend, ThinGroup, ThinSpec};
use crate::args::NodeArgs;
use crate::operation::Operation;
use crate::values;

/// Flags of `berth-node pool`.
#[derive(Clone, Debug, Args)]
pub struct PoolArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: PoolCommand,
    /// Where.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// What can be done with pools.
#[derive(Clone, Debug, Subcommand)]
pub enum PoolCommand {
    /// Makes a pool on block devices, in a volume group, or in a directory.
    ///
    /// Devices that hold anything are refused without `--wipe`, with what they hold. Repeated with the same UID, the command
    /// goes on where it was.
    Create(CreateArgs),
    /// Takes over a pool that is on a disk of this node already, with all that it holds.
    ///
    /// `berth-node pool list` shows such areas as `Found`: of a pool that was forgotten, of a disk that comes from another
    /// machine, or of a cluster whose API server was lost. Nothing on the disk is made anew.
    Introduce(IntroduceArgs),
    /// Lets a pool go that nobody uses. What lies on its disk stays, and can be introduced again.
    Forget(NamedArgs),
    /// Deletes a pool that nobody uses, with its area.
    ///
    /// A pool that holds images or volumes is refused without `--with-contents`, with a list of what would be lost.
    Destroy(DestroyArgs),
    /// Makes one of the two kernel pools of a thin pool larger, ahead of what is promised in it.
    Grow(GrowArgs),
    /// Compares what is recorded of a pool with what the kernel has. Ends with 1 if there are findings.
    Check(NamedArgs),
    /// Lists the pools of this node, and the areas on its disks that belong to none of them.
    List,
}

/// The name of a pool.
#[derive(Clone, Debug, Args)]
pub struct NamedArgs {
    /// The pool.
    #[arg(value_name = "NAME", value_parser = values::pool_name)]
    pub pool: PoolName,
}

/// Where a pool lies.
#[derive(Clone, Debug, Args)]
#[command(group(ArgGroup::new("place").required(true).args(["devices", "volume_group", "path"])))]
pub struct WhereArgs {
    /// A thin pool with block devices of its own, made a volume group. May be repeated.
    #[arg(long = "device", value_name = "DEV", value_delimiter = ',', value_parser = values::absolute)]
    pub devices: Vec<PathBuf>,
    /// A thin pool in a volume group that is there already. Nothing else in the group is touched.
    #[arg(long, value_name = "VG", requires = "size", value_parser = values::volume_group)]
    pub volume_group: Option<String>,
    /// A pool in a directory: one preallocated XFS image, no device mapper.
    #[arg(long, value_name = "DIR", requires = "size", value_parser = values::absolute)]
    pub path: Option<PathBuf>,
    /// How much the pool takes, as a quantity such as `100Gi`. Devices of its own are taken whole.
    #[arg(long, value_name = "SIZE", conflicts_with = "devices", value_parser = values::size)]
    pub size: Option<Bytes>,
    /// The unit in which a thin pool hands out space: a power of two from 64Ki to 1Mi.
    #[arg(long, value_name = "SIZE", default_value = "64Ki", conflicts_with = "path", value_parser = values::block_size)]
    pub block_size: Bytes,
}

impl WhereArgs {
    /// As the library takes it. The parser has seen to it that exactly one place is given, and a size where one is needed.
    fn backend(self, wipe: bool) -> Backend {
        let (block, size) = (self.block_size, self.size.unwrap_or_default());
        match (self.volume_group, self.path) {
            (Some(name), _) => Backend::Thin(ThinSpec { group: ThinGroup::Shared { name, size }, block }),
            (None, Some(path)) => Backend::Filesystem { path, size },
            (None, None) => {
                let mut devices = self.devices;
                devices.sort();
                devices.dedup();
                Backend::Thin(ThinSpec { group: ThinGroup::Exclusive { devices, wipe }, block })
            }
        }
    }
}

/// Flags of `berth-node pool create`.
#[derive(Clone, Debug, Args)]
pub struct CreateArgs {
    /// The pool's name on this node.
    #[arg(value_name = "NAME", value_parser = values::pool_name)]
    pub pool: PoolName,
    /// Where it is made.
    #[command(flatten)]
    pub place: WhereArgs,
    /// Destroys whatever the devices hold.
    #[arg(long, conflicts_with_all = ["volume_group", "path"])]
    pub wipe: bool,
    /// The pool's UID, which names its volume group and devices for ever: a UUID. Default: a new one, which is printed.
    #[arg(long, value_name = "UID", value_parser = values::new_uid)]
    pub uid: Option<Uid>,
}

/// Flags of `berth-node pool introduce`.
#[derive(Clone, Debug, Args)]
pub struct IntroduceArgs {
    /// What the pool is called on this node from now on.
    #[arg(value_name = "NAME", value_parser = values::pool_name)]
    pub pool: PoolName,
    /// Which area: the UID of the pool that it was made for, as `berth-node pool list` shows it.
    #[arg(long, value_name = "UID", value_parser = values::uid)]
    pub area: Uid,
    /// The UID of the pool that it is from now on, such as that of a new `StagingPool`. Default: the one that it has.
    #[arg(long, value_name = "UID", value_parser = values::new_uid)]
    pub uid: Option<Uid>,
    /// Where it lies.
    #[command(flatten)]
    pub place: WhereArgs,
}

/// Flags of `berth-node pool destroy`.
#[derive(Clone, Debug, Args)]
pub struct DestroyArgs {
    /// The pool.
    #[arg(value_name = "NAME", value_parser = values::pool_name)]
    pub pool: PoolName,
    /// Deletes the images and volumes in it too.
    #[arg(long)]
    pub with_contents: bool,
}

/// Flags of `berth-node pool grow`.
#[derive(Clone, Debug, Args)]
pub struct GrowArgs {
    /// The pool.
    #[arg(value_name = "NAME", value_parser = values::pool_name)]
    pub pool: PoolName,
    /// Which of its kernel pools.
    #[arg(long, value_enum, value_name = "CLASS")]
    pub class: ClassArg,
    /// How large it is to be at least. None ever shrinks.
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub size: Bytes,
}

/// The two kernel pools of a thin pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ClassArg {
    /// Of staged images and work space.
    Images,
    /// Of volumes and snapshots.
    Volumes,
}

impl PoolCommand {
    /// What it asks for.
    pub fn asking(self) -> Asking {
        match self {
            Self::Create(args) => {
                let (uid, made) = named(args.uid);
                let backend = args.place.backend(args.wipe);
                Asking { operation: Operation::PoolCreate { pool: args.pool, uid, backend }, made }
            }
            Self::Introduce(args) => {
                let backend = args.place.backend(false);
                Operation::PoolIntroduce { pool: args.pool, area: args.area, uid: args.uid, backend }.into()
            }
            Self::Forget(args) => Operation::PoolForget { pool: args.pool }.into(),
            Self::Destroy(args) => {
                Operation::PoolDestroy { pool: args.pool, with_contents: args.with_contents }.into()
            }
            Self::Grow(args) => {
                let class = match args.class {
                    ClassArg::Images => Class::Images,
                    ClassArg::Volumes => Class::Volumes,
                };
                Operation::PoolGrow { pool: args.pool, class, size: args.size }.into()
            }
            Self::Check(args) => Operation::PoolCheck { pool: args.pool }.into(),
            Self::List => Operation::PoolList {}.into(),
        }
    }
}
