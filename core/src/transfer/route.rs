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

/// Chooses the way.
///
/// # Errors
/// [`NoRoute`] if there is none as it is asked for.
pub fn choose(wanted: Staging, found: Found) -> Result<Chosen, NoRoute> {
    let needs = match found {
        Found::Stored if wanted == Staging::Required => return Err(NoRoute::NothingToStage),
        Found::Stored => return Ok(Chosen { route: Route::Direct, why: STORED }),
        Found::File { converted: true, .. } => {
            Some("a tool converts this format to raw beside the fetched source")
        }
        Found::File { raw: false, .. } => Some("this format is read from a file"),
        Found::File { rereadable: false, .. } => Some(
            "the source names no version or cannot be read from the middle, so nothing could go on where it was",
        ),
        Found::File { whole_sectors: false, .. } => Some("the source ends within a sector of 512 bytes"),
        Found::File { .. } => None,
    };
    match (wanted, needs) {
        (Staging::Never, Some(why)) => Err(NoRoute::MustStage(why)),
        (Staging::Auto, Some(why)) => Ok(Chosen { route: Route::Staged, why }),
        (Staging::Required, why) => {
            let asked = "`spec.staging` is `Required`";
            Ok(Chosen { route: Route::Staged, why: why.unwrap_or(asked) })
        }
        (Staging::Auto | Staging::Never, None) => {
            Ok(Chosen { route: Route::Direct, why: "the source is read by range, front to back" })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAW: Found = Found::File { raw: true, converted: false, rereadable: true, whole_sectors: true };

    #[test]
    fn a18_only_what_has_to_be_staged_is_unless_it_is_asked_for() {
        let route = |wanted, found| choose(wanted, found).map(|chosen| chosen.route);
        let to_stage = [
            Found::File { raw: false, converted: true, rereadable: true, whole_sectors: true },
            Found::File { raw: false, converted: false, rereadable: true, whole_sectors: true },
            Found::File { raw: true, converted: false, rereadable: false, whole_sectors: true },
            Found::File { raw: true, converted: false, rereadable: true, whole_sectors: false },
        ];
        for found in to_stage {
            assert_eq!(route(Staging::Auto, found), Ok(Route::Staged), "{found:?}");
            assert_eq!(route(Staging::Required, found), Ok(Route::Staged), "{found:?}");
            let refused = choose(Staging::Never, found).expect_err("it has to be staged");
            assert_eq!(refused.reason(), Reason::StagingNotAllowed);
            let why = choose(Staging::Auto, found).expect("there is a way").why;
            assert!(refused.to_string().ends_with(why), "{refused}");
        }
        assert_eq!(route(Staging::Auto, RAW), Ok(Route::Direct));
        assert_eq!(route(Staging::Never, RAW), Ok(Route::Direct));
        assert_eq!(route(Staging::Required, RAW), Ok(Route::Staged));
        assert_eq!(route(Staging::Auto, Found::Stored), Ok(Route::Direct));
        assert_eq!(route(Staging::Never, Found::Stored), Ok(Route::Direct));
        assert_eq!(route(Staging::Required, Found::Stored), Err(NoRoute::NothingToStage));
    }
}
