//! Hydration: how the content of a template becomes local while volumes read it.
//!
//! A template is shown as one device, over which volumes lie from the first moment. At first it is a `dm-clone`: what is
//! local is read from its *destination*, a thin device, everything else from its *source*, which is far away. Verified
//! chunks are written through it, holes discarded on it; its *metadata* says of each region whether it is local. When all
//! are, its table becomes `linear` over the destination, and source and metadata go.
//!
//! Source: `Documentation/admin-guide/device-mapper/dm-clone.rst` of the kernel.

mod decide;
mod geometry;
#[cfg(test)]
mod simulated;
mod state;

pub use self::decide::{
    CloneMode, Destination, Metadata, Progress, Recorded, Seen, Shown, Source, Step, Stop, Wanted, next,
    state_of,
};
pub use self::geometry::{Geometry, GeometryError, Hole, LARGEST_WRITE, RegionSize, Span, SpanError};
pub use self::state::{Event, HydrationState};
