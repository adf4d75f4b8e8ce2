//! `berth-node template`: images that volumes start from.

pub mod import;
pub mod serve;

use std::path::PathBuf;

use berth_core::ids::{PoolName, Uid};
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};

use self::import::ImportArgs;
use self::serve::ServeArgs;
use super::asking::{Asking, named};
use crate::args::NodeArgs;
use crate::operation::Operation;
use crate::values;

/// Flags of `berth-node template`.
#[derive(Clone, Debug, Args)]
pub struct TemplateArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: TemplateCommand,
}

/// What can be done with templates.
#[derive(Clone, Debug, Subcommand)]
pub enum TemplateCommand {
    /// Imports an image file into an image store. Stopped at any moment, the same command goes on where it was.
    ///
    /// Credentials come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, …).
    Import(Box<ImportArgs>),
    /// Serves an image of an image store over NBD on a Unix socket, read-only, without fetching more than what is read.
    ///
    /// Credentials come from the environment. Ends at SIGTERM or SIGINT; the kernel's requests then wait for the next server.
    Serve(Box<ServeArgs>),
    /// Gives an image file a read-only block device in a pool, and prints its path. Volumes can start from it at once.
    ///
    /// The file is never written, and must stay where it is and as it is while it is attached.
    Attach(Box<AttachArgs>),
    /// Takes the device of a template away. Refused while a volume reads from it.
    Detach(Box<DetachArgs>),
}

/// Flags of `berth-node template attach`.
#[derive(Clone, Debug, Args)]
pub struct AttachArgs {
    /// The pool.
    #[arg(value_parser = values::pool_name)]
    pub pool: PoolName,
    /// The image, where the process that has the pools open can read it.
    #[arg(value_parser = values::absolute)]
    pub file: PathBuf,
    /// The image's format, as `qemu-img` names it. Default: what its head says.
    #[arg(long, value_name = "FORMAT", value_parser = PossibleValuesParser::new(["raw", "qcow2", "vmdk", "vpc", "vhdx"]))]
    pub format: Option<String>,
    /// What the template is called. A UUID. Default: a new one, which is printed before the device.
    #[arg(long, value_name = "UID", value_parser = values::new_uid)]
    pub uid: Option<Uid>,
    /// Where.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// Flags of `berth-node template detach`.
#[derive(Clone, Debug, Args)]
pub struct DetachArgs {
    /// The pool.
    #[arg(value_parser = values::pool_name)]
    pub pool: PoolName,
    /// The template.
    #[arg(value_name = "UID", value_parser = values::uid)]
    pub template: Uid,
    /// Where.
    #[command(flatten)]
    pub node: NodeArgs,
}

impl AttachArgs {
    /// What it asks for.
    pub fn asking(self) -> Asking {
        let (template, made) = named(self.uid);
        let Self { pool, file, format, .. } = self;
        Asking { operation: Operation::TemplateAttach { pool, template, file, format }, made }
    }
}

impl DetachArgs {
    /// What it asks for.
    pub fn asking(self) -> Asking {
        Operation::TemplateDetach { pool: self.pool, template: self.template }.into()
    }
}
