//! What is to be done next for a template, from what is seen of it.
//!
//! Every step is one effect, and may be repeated. Whoever is killed between any two of them looks again and goes on:
//! - The metadata is recorded as used before the first chunk is written, and cleared only while it is not recorded so: what
//!   it says of another template's regions is never believed.
//! - That all is local is recorded before the table becomes `linear`, after everything was flushed. A restart then needs
//!   neither source nor metadata, which go only after that, and only while no device is made of them.
//! - Metadata that is lost is no loss: nothing counts as local then, and everything is read from the source again.

use super::state::HydrationState;

/// What is to become of the template's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// It is shown, and becomes local.
    Hydrated,
    /// It is shown. What is not local stays where it is.
    Paused,
    /// It goes. Its thin device is not concerned.
    Gone,
}

/// What the node has recorded of the template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// Its metadata was never used, whatever lies on that device.
    New,
    /// Its metadata says what is local.
    Begun,
    /// All of it is local and durable.
    Local,
}

/// The thin device that the content comes to lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// It is not there.
    Missing,
    /// It has another size than the template.
    OtherSize,
    /// It is active.
    Ready,
}

/// The device with the metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metadata {
    /// It is not there.
    Missing,
    /// Nothing is on it: the kernel formats it when it is first used.
    Blank,
    /// What is on it is of a template with this size and region size.
    OfThis,
    /// What is on it is something else.
    OfOther,
}

/// The device that everything is read from which is not local.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// It is not attached.
    Missing,
    /// It has another size than the template.
    OtherSize,
    /// It is attached.
    Attached,
}

/// How many regions are local.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Local.
    pub hydrated: u64,
    /// In all. Never zero.
    pub total: u64,
}

impl Progress {
    /// True if every region is local.
    pub const fn is_complete(self) -> bool {
        self.hydrated == self.total
    }
}

/// What a clone can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloneMode {
    /// Everything.
    ReadWrite,
    /// Its metadata could not be written. It reads; nothing more becomes local.
    ReadOnly,
    /// Its metadata could not be read either. Every read and write of it fails.
    Failed,
}

/// The template's device, which volumes lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// It is not there.
    Absent,
    /// It has no table: its making was interrupted.
    Unfinished,
    /// It is a clone over the destination.
    Clone {
        /// What it can do.
        mode: CloneMode,
        /// How much of it is local; `None` if it has failed.
        progress: Option<Progress>,
    },
    /// It is the destination.
    Linear,
    /// It is something else.
    Different,
}

/// All that a decision looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What is to become of it.
    pub wanted: Wanted,
    /// What is recorded.
    pub recorded: Recorded,
    /// Where the content comes to lie.
    pub destination: Destination,
    /// What says which regions are local.
    pub metadata: Metadata,
    /// Where the content comes from.
    pub source: Source,
    /// The device itself.
    pub shown: Shown,
}

/// Why nothing can be done without somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The thin device is lost that held what was local.
    DestinationLost,
    /// The thin device has another size.
    DestinationSize,
    /// The source has another size, so it is of another image.
    SourceSize,
    /// The metadata is not this template's, although it was used.
    ForeignMetadata,
    /// The kernel could not write the metadata. Volumes go on reading.
    MetadataReadOnly,
    /// The kernel cannot read the metadata. **Volumes get errors where they read the template.**
    MetadataFailed,
    /// The device is something else than this template.
    DifferentDevice,
}

/// What is to be done next: one effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make the thin device, blank and of the template's size.
    MakeDestination,
    /// Make the device for the metadata.
    MakeMetadata,
    /// Attach the source.
    AttachSource,
    /// Remove a device without a table.
    RemoveUnfinished,
    /// Make the device, as a clone.
    ShowClone {
        /// Clear the metadata first.
        clear: bool,
    },
    /// Record that the metadata was never used.
    RecordNew,
    /// Record that the metadata says what is local.
    RecordBegun,
    /// Write a chunk that is not local, or discard a hole.
    Hydrate,
    /// Flush the device and, if it still says that all is local, record that.
    RecordLocal,
    /// Replace the table by one that is the destination.
    Swap,
    /// Make the device, as the destination.
    ShowLocal,
    /// Let the source go.
    ReleaseSource,
    /// Remove the device for the metadata.
    RemoveMetadata,
    /// Remove the device. Refused while somebody uses it.
    Hide,
    /// Nothing.
    Rest,
    /// Nothing, until somebody has changed what is wrong.
    Stop(Stop),
}

/// The one thing that is to be done next.
pub const fn next(seen: &Seen) -> Step {
    match (seen.wanted, seen.shown) {
        (_, Shown::Different) => Step::Stop(Stop::DifferentDevice),
        (_, Shown::Unfinished) => Step::RemoveUnfinished,
        (Wanted::Gone, Shown::Clone { .. } | Shown::Linear) => Step::Hide,
        (Wanted::Gone, Shown::Absent) | (_, Shown::Linear) => left_over(seen),
        (_, Shown::Absent) => show(seen),
        (_, Shown::Clone { mode, progress }) => hydrate(seen, mode, progress),
    }
}

/// Source and metadata of a template that is a clone no more.
const fn left_over(seen: &Seen) -> Step {
    match (seen.wanted, seen.recorded, seen.source, seen.metadata) {
        (Wanted::Hydrated | Wanted::Paused, Recorded::New | Recorded::Begun, ..) => Step::RecordLocal,
        (_, _, Source::Attached | Source::OtherSize, _) => Step::ReleaseSource,
        (_, _, _, Metadata::Blank | Metadata::OfThis | Metadata::OfOther) => Step::RemoveMetadata,
        (_, _, Source::Missing, Metadata::Missing) => Step::Rest,
    }
}

/// The device is not there. Of what it is made has to be there first.
const fn show(seen: &Seen) -> Step {
    match (seen.recorded, seen.destination, seen.metadata, seen.source) {
        (Recorded::New, Destination::Missing, ..) => Step::MakeDestination,
        (_, Destination::Missing, ..) => Step::Stop(Stop::DestinationLost),
        (_, Destination::OtherSize, ..) => Step::Stop(Stop::DestinationSize),
        (Recorded::Local, ..) => Step::ShowLocal,
        (Recorded::New, _, Metadata::Missing, _) => Step::MakeMetadata,
        (Recorded::Begun, _, Metadata::Missing, _) => Step::RecordNew,
        (Recorded::Begun, _, Metadata::OfOther, _) => Step::Stop(Stop::ForeignMetadata),
        (_, _, _, Source::Missing) => Step::AttachSource,
        (_, _, _, Source::OtherSize) => Step::Stop(Stop::SourceSize),
        (Recorded::New, ..) => Step::ShowClone { clear: true },
        (Recorded::Begun, ..) => Step::ShowClone { clear: false },
    }
}

/// The device is a clone, which volumes may read.
const fn hydrate(seen: &Seen, mode: CloneMode, progress: Option<Progress>) -> Step {
    let complete = match progress {
        Some(progress) => progress.is_complete(),
        None => return Step::Stop(Stop::MetadataFailed),
    };
    match (mode, complete, seen.recorded, seen.source) {
        (CloneMode::Failed, ..) => Step::Stop(Stop::MetadataFailed),
        (_, true, Recorded::Local, _) => Step::Swap,
        (_, true, ..) => Step::RecordLocal,
        (CloneMode::ReadOnly, ..) => Step::Stop(Stop::MetadataReadOnly),
        // If all was recorded as local, the kernel knows better.
        (_, _, Recorded::New | Recorded::Local, _) => Step::RecordBegun,
        (_, _, _, Source::Missing) => Step::AttachSource,
        (_, _, _, Source::OtherSize) => Step::Stop(Stop::SourceSize),
        (_, _, _, Source::Attached) => match seen.wanted {
            Wanted::Hydrated => Step::Hydrate,
            Wanted::Paused | Wanted::Gone => Step::Rest,
        },
    }
}

/// How far the template has become local; `None` where nothing shows it.
pub const fn state_of(seen: &Seen) -> Option<HydrationState> {
    match (seen.shown, seen.recorded) {
        (Shown::Linear, _) | (Shown::Absent | Shown::Unfinished, Recorded::Local) => {
            Some(HydrationState::Local)
        }
        (Shown::Clone { mode: CloneMode::ReadWrite, progress: Some(progress) }, recorded) => {
            match (progress.is_complete(), progress.hydrated, recorded) {
                (true, _, Recorded::Local) => Some(HydrationState::Local),
                (false, 0, _) => Some(HydrationState::Remote),
                _ => Some(HydrationState::Hydrating),
            }
        }
        (Shown::Clone { mode: CloneMode::ReadOnly, progress: Some(progress) }, Recorded::Local)
            if progress.is_complete() =>
        {
            Some(HydrationState::Local)
        }
        (Shown::Clone { .. }, _) => Some(HydrationState::Stalled),
        (Shown::Absent | Shown::Unfinished, Recorded::New) => Some(HydrationState::Remote),
        (Shown::Absent | Shown::Unfinished, Recorded::Begun) | (Shown::Different, _) => None,
    }
}
