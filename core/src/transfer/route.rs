//! Whether an image is staged on its way, and why.

use thiserror::Error;

use crate::reason::Reason;
use crate::stages::Route;

use super::Staging;

/// What is known of a source when its head was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is an image of an image store.
    Stored,
    /// It is a file behind an address.
    File {
        /// Its bytes are the disk's.
        raw: bool,
        /// A tool must convert it.
        converted: bool,
        /// It can be read from the middle, and says which version it is.
        rereadable: bool,
        /// It ends with a whole sector of 512 bytes.
        whole_sectors: bool,
        /// The sum of its bytes is asked for.
        summed: bool,
    },
}

/// Which way an image takes, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Which.
    pub route: Route,
    /// Why, for people.
    pub why: &'static str,
}

/// The way that is asked for is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NoRoute {
    /// It has to be staged, and must not be.
    #[error("`spec.staging` is `Never`, and the source has to be staged: {0}")]
    MustStage(&'static str),
    /// It cannot be staged, and must be.
    #[error("`spec.staging` is `Required`, and nothing is staged: {STORED}")]
    NothingToStage,
}

impl NoRoute {
    /// The machine-readable reason.
    pub const fn reason(self) -> Reason {
        Reason::StagingNotAllowed
    }
}

const STORED: &str = "an image of an image store is read where it lies";
const FRONT_TO_BACK: &str = "the source is read by range, front to back";
const BY_RANGES: &str = "the source is read by ranges, in the order of the disk";

/// Chooses the way.
///
/// # Errors
/// [`NoRoute`] if there is none as it is asked for.
pub fn choose(wanted: Staging, found: Found) -> Result<Chosen, NoRoute> {
    let (needs, direct) = match found {
        Found::Stored if wanted == Staging::Required => return Err(NoRoute::NothingToStage),
        Found::Stored => (None, STORED),
        Found::File { raw, .. } => (to_stage(found), if raw { FRONT_TO_BACK } else { BY_RANGES }),
    };
    match (wanted, needs) {
        (Staging::Never, Some(why)) => Err(NoRoute::MustStage(why)),
        (Staging::Auto | Staging::Required, Some(why)) => Ok(Chosen { route: Route::Staged, why }),
        (Staging::Required, None) => Ok(Chosen { route: Route::Staged, why: "`spec.staging` is `Required`" }),
        (Staging::Auto | Staging::Never, None) => Ok(Chosen { route: Route::Direct, why: direct }),
    }
}

/// Why a file cannot be read where it lies; nothing if it can.
const fn to_stage(found: Found) -> Option<&'static str> {
    match found {
        Found::File { converted: true, .. } => {
            Some("a tool converts this format to raw beside the fetched source")
        }
        Found::File { rereadable: false, .. } => Some(
            "the source names no version or cannot be read from the middle, so nothing could go on where it was",
        ),
        Found::File { raw: false, summed: true, .. } => {
            Some("the sum of its bytes is asked for, and where this format lies not all of them are read")
        }
        Found::File { raw: true, whole_sectors: false, .. } => {
            Some("the source ends within a sector of 512 bytes")
        }
        Found::Stored | Found::File { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAW: Found =
        Found::File { raw: true, converted: false, rereadable: true, whole_sectors: true, summed: false };

    #[test]
    fn a18_only_what_has_to_be_staged_is_unless_it_is_asked_for() {
        let route = |wanted, found| choose(wanted, found).map(|chosen| chosen.route);
        let file = |raw, converted, rereadable, whole_sectors, summed| Found::File {
            raw,
            converted,
            rereadable,
            whole_sectors,
            summed,
        };
        let to_stage = [
            file(false, true, true, true, false),
            file(false, false, false, true, false),
            file(false, false, true, true, true),
            file(true, false, false, true, false),
            file(true, false, true, false, false),
        ];
        for found in to_stage {
            assert_eq!(route(Staging::Auto, found), Ok(Route::Staged), "{found:?}");
            assert_eq!(route(Staging::Required, found), Ok(Route::Staged), "{found:?}");
            let refused = choose(Staging::Never, found).expect_err("it has to be staged");
            assert_eq!(refused.reason(), Reason::StagingNotAllowed);
            let why = choose(Staging::Auto, found).expect("there is a way").why;
            assert!(refused.to_string().ends_with(why), "{refused}");
        }
        let by_ranges = file(false, false, true, true, false);
        assert_eq!(route(Staging::Auto, by_ranges), Ok(Route::Direct));
        assert_eq!(route(Staging::Never, by_ranges), Ok(Route::Direct));
        assert_eq!(route(Staging::Required, by_ranges), Ok(Route::Staged));
        let summed = file(true, false, true, true, true);
        assert_eq!(route(Staging::Never, summed), Ok(Route::Direct), "all of it is read anyway");
        assert_eq!(route(Staging::Auto, RAW), Ok(Route::Direct));
        assert_eq!(route(Staging::Never, RAW), Ok(Route::Direct));
        assert_eq!(route(Staging::Required, RAW), Ok(Route::Staged));
        assert_eq!(route(Staging::Auto, Found::Stored), Ok(Route::Direct));
        assert_eq!(route(Staging::Never, Found::Stored), Ok(Route::Direct));
        assert_eq!(route(Staging::Required, Found::Stored), Err(NoRoute::NothingToStage));
    }
}
