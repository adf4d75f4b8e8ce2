//! The keys of an image store, and what each of them names.
//!
//! Final from the first release. Every part that comes from outside is checked, so that no key can leave the prefix.

use berth_core::ids::{ChunkId, Digest, ObjectName, Sha256Sum, Uid, is_uid};
use berth_core::units::Generation;
use thiserror::Error;

/// Why something cannot be a part of a key.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// The prefix of an image store.
    #[error(
        "prefix `{0}` is not made of non-empty parts of letters, digits, `.`, `_` and `-` with single slashes between"
    )]
    Prefix(String),
    /// The name of a manifest.
    #[error("`{0}` is not a namespace and a name of Kubernetes objects")]
    Name(ObjectName),
    /// The UID of a holder.
    #[error("`{0}` is not the uid of an object")]
    Uid(Uid),
}

/// Where an image store's objects lie in its bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreLayout {
    /// Empty, or ends with a slash.
    prefix: String,
}

/// What a key names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// The store's description.
    Store,
    /// A compressed chunk.
    Chunk(ChunkId),
    /// An index.
    Image(Digest),
    /// A published name.
    Manifest(ObjectName),
    /// A reference from a template or a writer.
    Pin(Uid),
    /// A writer's session.
    Session(Uid),
    /// A piece of a session's unfinished index: who wrote it, and its first item.
    Segment(Uid, Generation, u64),
    /// A chunk that is a candidate for removal.
    Tombstone(ChunkId),
}

impl StoreLayout {
    /// Below `prefix`, which may be empty; slashes at its ends are ignored.
    ///
    /// # Errors
    /// [`LayoutError::Prefix`] for `..`, empty parts, or characters that stores treat specially.
    pub fn new(prefix: &str) -> Result<Self, LayoutError> {
        let trimmed = prefix.trim_matches('/');
        if trimmed.is_empty() {
            return Ok(Self { prefix: String::new() });
        }
        if trimmed.len() > 512 || !trimmed.split('/').all(is_part) {
            return Err(LayoutError::Prefix(prefix.to_owned()));
        }
        Ok(Self { prefix: format!("{trimmed}/") })
    }

    /// The prefix, empty or with a slash at its end.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The description of the store.
    pub fn store(&self) -> String {
        format!("{}berth.json", self.prefix)
    }

    /// A chunk.
    pub fn chunk(&self, id: &ChunkId) -> String {
        let id = id.to_string();
        format!("{}chunks/{}/{id}.cacnk", self.prefix, &id[..4])
    }

    /// All chunks.
    pub fn chunks(&self) -> String {
        format!("{}chunks/", self.prefix)
    }

    /// The index of an image.
    pub fn image(&self, digest: &Digest) -> String {
        format!("{}images/{}.caibx", self.prefix, digest.hex())
    }

    /// All indexes.
    pub fn images(&self) -> String {
        format!("{}images/", self.prefix)
    }

    /// The manifest of a name.
    ///
    /// # Errors
    /// [`LayoutError::Name`] unless both parts are what Kubernetes accepts as names.
    pub fn manifest(&self, name: &ObjectName) -> Result<String, LayoutError> {
        if !is_name(&name.namespace) || !is_name(&name.name) {
            return Err(LayoutError::Name(name.clone()));
        }
        Ok(format!("{}manifests/{}/{}.json", self.prefix, name.namespace, name.name))
    }

    /// All manifests.
    pub fn manifests(&self) -> String {
        format!("{}manifests/", self.prefix)
    }

    /// The pin of a holder.
    ///
    /// # Errors
    /// [`LayoutError::Uid`]
    pub fn pin(&self, uid: &Uid) -> Result<String, LayoutError> {
        Ok(format!("{}pins/{}", self.prefix, checked(uid)?))
    }

    /// The session of a writer.
    ///
    /// # Errors
    /// [`LayoutError::Uid`]
    pub fn session(&self, uid: &Uid) -> Result<String, LayoutError> {
        Ok(format!("{}sessions/{}", self.prefix, checked(uid)?))
    }

    /// All sessions.
    pub fn sessions(&self) -> String {
        format!("{}sessions/", self.prefix)
    }

    /// The piece of a session's unfinished index that begins with item `first`, as the writer of `generation` left it.
    ///
    /// # Errors
    /// [`LayoutError::Uid`]
    pub fn segment(&self, uid: &Uid, generation: Generation, first: u64) -> Result<String, LayoutError> {
        Ok(format!("{}sessions/{}/{:016x}-{first:016x}", self.prefix, checked(uid)?, generation.0))
    }

    /// All pieces of a session's unfinished index.
    ///
    /// # Errors
    /// [`LayoutError::Uid`]
    pub fn segments(&self, uid: &Uid) -> Result<String, LayoutError> {
        Ok(format!("{}sessions/{}/", self.prefix, checked(uid)?))
    }

    /// The tombstone of a chunk.
    pub fn tombstone(&self, id: &ChunkId) -> String {
        format!("{}tombstones/{id}", self.prefix)
    }

    /// All tombstones.
    pub fn tombstones(&self) -> String {
        format!("{}tombstones/", self.prefix)
    }

    /// A key for a probe of what the store can do; no session.
    pub fn probe(&self, id: uuid::Uuid) -> String {
        format!("{}{id}", self.probes())
    }

    /// What the keys of all probes begin with.
    pub fn probes(&self) -> String {
        format!("{}sessions/probe-", self.prefix)
    }

    /// What `key` names, if it is one of ours.
    pub fn parse(&self, key: &str) -> Option<Key> {
        let rest = key.strip_prefix(&self.prefix)?;
        if rest == "berth.json" {
            return Some(Key::Store);
        }
        let (kind, rest) = rest.split_once('/')?;
        match kind {
            "chunks" => {
                let (fan, name) = rest.split_once('/')?;
                let id = chunk_id(name.strip_suffix(".cacnk")?)?;
                (fan == &name[..4]).then_some(Key::Chunk(id))
            }
            "images" => Some(Key::Image(Digest(Sha256Sum::from_hex(rest.strip_suffix(".caibx")?).ok()?))),
            "manifests" => {
                let (namespace, name) = rest.strip_suffix(".json")?.split_once('/')?;
                (is_name(namespace) && is_name(name)).then(|| Key::Manifest(ObjectName::new(namespace, name)))
            }
            "pins" => is_uid(rest).then(|| Key::Pin(Uid::from(rest))),
            "sessions" => parse_session(rest),
            "tombstones" => chunk_id(rest).map(Key::Tombstone),
            _ => None,
        }
    }
}

fn parse_session(rest: &str) -> Option<Key> {
    let (uid, segment) = match rest.split_once('/') {
        Some((uid, segment)) => (uid, Some(segment)),
        None => (rest, None),
    };
    if !is_uid(uid) || uid.starts_with("probe-") {
        return None;
    }
    let uid = Uid::from(uid);
    let Some(segment) = segment else { return Some(Key::Session(uid)) };
    let (generation, first) = segment.split_once('-')?;
    Some(Key::Segment(uid, Generation(hex16(generation)?), hex16(first)?))
}

fn hex16(digits: &str) -> Option<u64> {
    let exact =
        digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    exact.then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}

fn chunk_id(hex: &str) -> Option<ChunkId> {
    Sha256Sum::from_hex(hex).ok().map(ChunkId)
}

fn checked(uid: &Uid) -> Result<&str, LayoutError> {
    let text = uid.as_str();
    if is_uid(text) && !text.starts_with("probe-") { Ok(text) } else { Err(LayoutError::Uid(uid.clone())) }
}

/// A part of a prefix.
fn is_part(part: &str) -> bool {
    !part.is_empty()
        && part != "."
        && part != ".."
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// An RFC 1123 subdomain, as Kubernetes names are.
fn is_name(name: &str) -> bool {
    (1..=253).contains(&name.len())
        && name.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> StoreLayout {
        StoreLayout::new("/team/images/").expect("a valid prefix")
    }

    #[test]
    fn keys_are_the_documented_ones() {
        let l = layout();
        let id = ChunkId::of(b"x");
        let hex = id.to_string();
        assert_eq!(l.store(), "team/images/berth.json");
        assert_eq!(l.chunk(&id), format!("team/images/chunks/{}/{hex}.cacnk", &hex[..4]));
        assert_eq!(l.image(&Digest(id.0)), format!("team/images/images/{hex}.caibx"));
        assert_eq!(
            l.manifest(&ObjectName::new("ns", "a.b")).as_deref(),
            Ok("team/images/manifests/ns/a.b.json")
        );
        assert_eq!(l.session(&Uid::from("u-1")).as_deref(), Ok("team/images/sessions/u-1"));
        assert_eq!(
            l.segment(&Uid::from("u-1"), Generation(2), 255).as_deref(),
            Ok("team/images/sessions/u-1/0000000000000002-00000000000000ff")
        );
        assert_eq!(StoreLayout::new("").expect("empty is fine").store(), "berth.json");
    }

    #[test]
    fn every_key_reads_back() {
        let l = layout();
        let id = ChunkId::of(b"x");
        let uid = Uid::from("u-1");
        let name = ObjectName::new("ns", "a");
        let pairs = [
            (l.store(), Key::Store),
            (l.chunk(&id), Key::Chunk(id)),
            (l.image(&Digest(id.0)), Key::Image(Digest(id.0))),
            (l.manifest(&name).expect("valid"), Key::Manifest(name)),
            (l.pin(&uid).expect("valid"), Key::Pin(uid.clone())),
            (l.session(&uid).expect("valid"), Key::Session(uid.clone())),
            (l.segment(&uid, Generation(3), 7).expect("valid"), Key::Segment(uid, Generation(3), 7)),
            (l.tombstone(&id), Key::Tombstone(id)),
        ];
        for (key, what) in pairs {
            assert_eq!(l.parse(&key), Some(what), "{key}");
        }
        assert_eq!(l.parse(&l.probe(uuid::Uuid::nil())), None);
        assert_eq!(l.parse("other/berth.json"), None);
        assert_eq!(l.parse("team/images/chunks/0000/zz.cacnk"), None);
    }

    #[test]
    fn nothing_leaves_the_prefix() {
        for bad in ["a//b", "../x", "a/../b", "a b", "ä", "a/./b"] {
            assert!(StoreLayout::new(bad).is_err(), "{bad}");
        }
        let l = layout();
        for bad in ["", "..", "a/b", "A", "-a", "a-", "a..b", "a\u{0}"] {
            assert!(l.manifest(&ObjectName::new(bad, "x")).is_err(), "{bad}");
            assert!(l.manifest(&ObjectName::new("x", bad)).is_err(), "{bad}");
        }
        for bad in ["", "..", "a/b", "probe-1"] {
            assert!(l.session(&Uid::from(bad)).is_err() && l.pin(&Uid::from(bad)).is_err(), "{bad}");
        }
    }
}
