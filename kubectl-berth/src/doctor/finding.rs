//! One thing that was looked at, and what is to be done about it.

use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// In order.
    Ok,
    /// Works, but not as it should.
    Warn,
    /// Something does not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What was looked at: short, stable, for machines.
    pub check: &'static str,
    /// Which object, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// What was found, with numbers.
    pub found: String,
    /// What that means for those who use Berth; empty if it is in order.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub means: String,
    /// What to do about it; empty if there is nothing to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fix: String,
}

impl Finding {
    /// Something that is in order.
    pub fn ok(check: &'static str, object: Option<String>, found: impl Into<String>) -> Self {
        Self {
            level: Level::Ok,
            check,
            object,
            found: found.into(),
            means: String::new(),
            fix: String::new(),
        }
    }

    /// Something that works, but not as it should.
    pub fn warn(
        check: &'static str,
        object: Option<String>,
        found: impl Into<String>,
        means: &str,
        fix: &str,
    ) -> Self {
        Self {
            level: Level::Warn,
            check,
            object,
            found: found.into(),
            means: means.to_owned(),
            fix: fix.to_owned(),
        }
    }

    /// Something that does not work.
    pub fn fail(
        check: &'static str,
        object: Option<String>,
        found: impl Into<String>,
        means: &str,
        fix: &str,
    ) -> Self {
        Self { level: Level::Fail, ..Self::warn(check, object, found, means, fix) }
    }
}
