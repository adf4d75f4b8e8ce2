//! `berth-node volume`: volumes and snapshots of a pool.

use berth_core::ids::{Digest, PoolName, Uid};
use berth_core::units::Bytes;
use clap::{Args, Subcommand};

use super::asking::{Asking, named};
use crate::args::NodeArgs;
use crate::operation::{Operation, OriginName};
use crate::values;

/// Flags of `berth-node volume`.
#[derive(Clone, Debug, Args)]
pub struct VolumeArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: VolumeCommand,
    /// Where.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// What can be done with volumes.
#[derive(Clone, Debug, Subcommand)]
pub enum VolumeCommand {
    /// Makes a volume: of zeros, from a staged image, or from a template that is attached.
    Create(CreateArgs),
    /// Makes a volume that starts as another volume or a snapshot is now. The two are independent afterwards.
    Clone(CloneArgs),
    /// Keeps a volume as it is now, read-only. A volume can be made of it with `clone`.
    Snapshot(SnapshotArgs),
    /// Makes the block device of a volume or snapshot appear, and prints its path.
    Attach(AttachArgs),
    /// Takes the block device of a volume or snapshot away. Refused while somebody has it open or mounted.
    Detach(WhichArgs),
    /// Makes a volume larger, attached or not. None ever shrinks.
    Resize(ResizeArgs),
    /// Deletes a volume or snapshot that is not attached, and gives its space back.
    ///
    /// When it is refused, what would have been deleted is printed.
    Destroy(WhichArgs),
    /// Shows which parts of a volume are its own, and which it reads from what it started from.
    ///
    /// Of a volume that is in use this is one moment. A map of very many parts is told piece by piece, with `--output json` in
    /// one answer a line, and is of one moment only if it is a snapshot's.
    Map(WhichArgs),
    /// Shows where a volume or snapshot differs from an older one, and what it reads there: blocks of its own, what it started
    /// from (also where it was discarded), or zeros.
    ///
    /// In a pool of files the older one must be a snapshot, or not attached.
    Delta(DeltaArgs),
    /// Lists the volumes, snapshots and templates of a pool.
    List(ListArgs),
}

/// A volume or snapshot.
#[derive(Clone, Debug, Args)]
pub struct WhichArgs {
    /// The pool.
    #[arg(value_parser = values::pool_name)]
    pub pool: PoolName,
    /// The volume or snapshot.
    #[arg(value_name = "UID", value_parser = values::uid)]
    pub volume: Uid,
}

/// Flags of `berth-node volume create`.
#[derive(Clone, Debug, Args)]
pub struct CreateArgs {
    /// The pool.
    #[arg(value_parser = values::pool_name)]
    pub pool: PoolName,
    /// How large it is, as a quantity such as `10Gi`; at least as large as what it starts from.
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub size: Bytes,
    /// The staged image that it starts from: `sha256:…`.
    #[arg(long, value_name = "DIGEST", conflicts_with = "from_template")]
    pub from_image: Option<Digest>,
    /// The attached template that it starts from.
    #[arg(long, value_name = "UID", value_parser = values::uid)]
    pub from_template: Option<Uid>,
    /// What people know it by, as `KEY=VALUE`. May be repeated; the last value of a key counts.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = values::label)]
    pub labels: Vec<(String, String)>,
    /// What the volume is called. A UUID. Default: a new one, which is printed.
    #[arg(long, value_name = "UID", value_parser = values::new_uid)]
    pub uid: Option<Uid>,
}

/// Flags of `berth-node volume clone`.
#[derive(Clone, Debug, Args)]
pub struct CloneArgs {
    /// The pool.
    #[arg(value_parser = values::pool_name)]
    pub pool: PoolName,
    /// The volume or snapshot to start from.
    #[arg(value_parser = values::uid)]
    pub source: Uid,
    /// How large the new volume is. Default: as large as the source.
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub size: Option<Bytes>,
    /// What the new volume is called. A UUID. Default: a new one, which is printed.
    #[arg(long, value_name = "UID", value_parser = values::new_uid)]
    pub uid: Option<Uid>,
}

/// Flags of `berth-node volume snapshot`.
#[derive(Clone, Debug, Args)]
pub struct SnapshotArgs {
    /// The pool.
    #[arg(value_parser = values::pool_name)]
    pub pool: PoolName,
    /// The volume.
    #[arg(value_parser = values::uid)]
    pub source: Uid,
    /// What the snapshot is called. A UUID. Default: a new one, which is printed.
    #[arg(long, value_name = "UID", value_parser = values::new_uid)]
    pub uid: Option<Uid>,
}

/// Flags of `berth-node volume attach`.
#[derive(Clone, Debug, Args)]
pub struct AttachArgs {
    /// Which.
    #[command(flatten)]
    pub which: WhichArgs,
    /// Makes a device that refuses writes. That of a snapshot always does.
    #[arg(long)]
    pub read_only: bool,
}

/// Flags of `berth-node volume resize`.
#[derive(Clone, Debug, Args)]
pub struct ResizeArgs {
    /// Which.
    #[command(flatten)]
    pub which: WhichArgs,
    /// Its new size.
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub size: Bytes,
}

/// Flags of `berth-node volume delta`.
#[derive(Clone, Debug, Args)]
pub struct DeltaArgs {
    /// The pool.
    #[arg(value_parser = values::pool_name)]
    pub pool: PoolName,
    /// What it is compared with: mostly an earlier snapshot.
    #[arg(value_parser = values::uid)]
    pub old: Uid,
    /// The volume or snapshot that is told.
    #[arg(value_parser = values::uid)]
    pub new: Uid,
}

/// Flags of `berth-node volume list`.
#[derive(Clone, Debug, Args)]
pub struct ListArgs {
    /// The pool.
    #[arg(value_parser = values::pool_name)]
    pub pool: PoolName,
}

impl VolumeCommand {
    /// What it asks for.
    pub fn asking(self) -> Asking {
        match self {
            Self::Create(args) => args.asking(),
            Self::Clone(CloneArgs { pool, source, size, uid }) => {
                let (volume, made) = named(uid);
                Asking { operation: Operation::VolumeClone { pool, volume, source, size }, made }
            }
            Self::Snapshot(SnapshotArgs { pool, source, uid }) => {
                let (snapshot, made) = named(uid);
                Asking { operation: Operation::VolumeSnapshot { pool, snapshot, source }, made }
            }
            Self::Attach(AttachArgs { which: WhichArgs { pool, volume }, read_only }) => {
                Operation::VolumeAttach { pool, volume, read_only }.into()
            }
            Self::Detach(WhichArgs { pool, volume }) => Operation::VolumeDetach { pool, volume }.into(),
            Self::Resize(ResizeArgs { which: WhichArgs { pool, volume }, size }) => {
                Operation::VolumeResize { pool, volume, size }.into()
            }
            Self::Destroy(WhichArgs { pool, volume }) => Operation::VolumeDestroy { pool, volume }.into(),
            Self::Map(WhichArgs { pool, volume }) => {
                Operation::VolumeMap { pool, volume, offset: Bytes::ZERO }.into()
            }
            Self::Delta(DeltaArgs { pool, old, new }) => {
                Operation::VolumeDelta { pool, old, volume: new, offset: Bytes::ZERO }.into()
            }
            Self::List(ListArgs { pool }) => Operation::VolumeList { pool }.into(),
        }
    }
}

impl CreateArgs {
    fn asking(self) -> Asking {
        let (volume, made) = named(self.uid);
        let image = self.from_image.map(OriginName::Image);
        let operation = Operation::VolumeCreate {
            pool: self.pool,
            volume,
            size: self.size,
            origin: image.or(self.from_template.map(OriginName::Template)),
            labels: self.labels.into_iter().collect(),
        };
        Asking { operation, made }
    }
}
