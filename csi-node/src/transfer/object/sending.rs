//! How far the upload of an object is: as this node records it, and as another one is told.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use berth_core::ids::Digest;
use berth_core::units::Bytes;
use berth_objectstore::ETag;
use berth_objectstore::s3::{ListedPart, Part};
use serde::{Deserialize, Serialize};

use super::super::direct::SavedSum;
use super::assemble::Moment;

/// An upload that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sending {
    /// What the store calls it.
    pub upload: String,
    /// What it is of, to the byte, and in which format.
    pub identity: String,
    /// The parts that are there, in order, without the head.
    pub parts: Vec<SentPart>,
    /// Where it goes on, in base64: the writer's state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state: Option<String>,
    /// The sum of the source's bytes before that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sum: Option<SavedSum>,
}

/// A part that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SentPart {
    /// Its number in the upload.
    pub number: u32,
    /// Its size.
    pub size: Bytes,
    /// What the store calls it.
    pub etag: String,
    /// SHA-256 of its bytes.
    pub sha256: Digest,
}

impl SentPart {
    /// As the store takes it.
    pub fn part(&self) -> Part {
        Part { etag: ETag(self.etag.clone()), sha256: self.sha256.0 }
    }

    /// As the store lists it; `None` if it does not tell the sum, or the part cannot be one of ours.
    fn listed(listed: ListedPart) -> Option<Self> {
        Some(Self {
            number: u32::try_from(listed.number).ok()?,
            size: listed.size,
            etag: listed.etag.0,
            sha256: Digest(listed.sha256?),
        })
    }
}

impl Sending {
    /// Nothing of it is there yet.
    pub fn new(upload: String, identity: String) -> Self {
        Self { upload, identity, parts: Vec::new(), state: None, sum: None }
    }

    /// True if parts of it are there.
    pub(super) fn is_begun(&self) -> bool {
        self.state.is_some()
    }

    /// Where it goes on; `None` at the start, and where that is not understood.
    pub(super) fn moment(&self) -> Option<Moment> {
        let state = BASE64_STANDARD.decode(self.state.as_ref()?).ok()?;
        Some(Moment { state, sum: self.sum.clone() })
    }

    /// Takes note of a part that is there, and of where it goes on.
    pub(super) fn landed(&mut self, part: SentPart, moment: &Moment) {
        self.parts.push(part);
        self.state = Some(BASE64_STANDARD.encode(&moment.state));
        self.sum.clone_from(&moment.sum);
    }

    /// What another node needs to go on: all but the parts, which the store lists. Less than 200 KiB, whatever the size.
    pub fn told(&self) -> String {
        let told = Self { parts: Vec::new(), ..self.clone() };
        serde_json::to_string(&told).unwrap_or_default()
    }

    /// What another node has told; `None` if it is not understood.
    pub fn parse(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    /// The same with the parts that the store lists, up to where it goes on: `None` if one of them is missing or untold.
    pub(super) fn with_parts(self, listed: Vec<ListedPart>, first: u32, count: u64) -> Option<Self> {
        let known: std::collections::BTreeMap<u32, SentPart> =
            listed.into_iter().filter_map(SentPart::listed).map(|part| (part.number, part)).collect();
        let numbers = (first..).take(usize::try_from(count).ok()?);
        let parts = numbers.map(|number| known.get(&number).cloned()).collect::<Option<Vec<_>>>()?;
        Some(Self { parts, ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::direct::{Counting, SourceSum};
    use super::*;
    use berth_core::ids::Sha256Sum;

    fn listed(number: usize, told: bool) -> ListedPart {
        let sha256 = told.then(|| Sha256Sum::of(&[7]));
        ListedPart { number, size: Bytes::mib(16), etag: ETag(format!("\"{number}\"")), sha256 }
    }

    #[test]
    fn another_node_goes_on_with_what_it_is_told_and_the_store_lists() {
        let mut sending = Sending::new("upload".to_owned(), "identity".to_owned());
        assert_eq!(sending.moment(), None);
        let mut counting = Counting::new(SourceSum::Counted(None));
        counting.add(0, &[4]);
        let moment = Moment { state: vec![1, 2, 3], sum: counting.saved() };
        for number in [2, 3] {
            sending.landed(SentPart::listed(listed(number, true)).unwrap(), &moment);
        }
        let told = Sending::parse(&sending.told()).unwrap();
        assert_eq!((told.parts.len(), told.moment()), (0, Some(moment)));
        // One that landed after the last word is sent again.
        let all = vec![listed(2, true), listed(3, true), listed(4, true)];
        assert_eq!(told.clone().with_parts(all, 2, 2), Some(sending));
        assert_eq!(told.clone().with_parts(vec![listed(3, true)], 2, 2), None, "one is missing");
        assert_eq!(told.with_parts(vec![listed(2, true), listed(3, false)], 2, 2), None, "a sum is not told");
        assert_eq!(Sending::parse("{}"), None);
    }
}
