//! Files for pods: the intent before a pod sees one, what is known of its bytes, and how far they have come.

use berth_core::ids::Uid;
use berth_core::units::{Generation, Timestamp};

use crate::entry::{FileContent, FileEntry, FileFetch, FilePublication, Sending, SentFile, StagingEntry};
use crate::error::{ChangeError, ReadError};
use crate::pool::{PoolRecord, not_older, not_released, wrong_state};
use crate::schema::tables;
use crate::store::Change;

impl PoolRecord {
    /// The file of this reservation.
    pub fn file(&self, uid: &Uid) -> Result<Option<FileEntry>, ReadError> {
        self.record().get(tables::FILES, uid)
    }

    /// Records that the directory of a reservation is for a file, before either is made. One that is there already keeps
    /// all but its generation. Refused once its promise is released, and while it is being removed.
    pub fn begin_file(
        &self,
        uid: &Uid,
        staging: &StagingEntry,
        file: &FileEntry,
    ) -> Result<FileEntry, ChangeError> {
        self.record().commit(|change| {
            not_released(change, uid)?;
            let entry = match change.get(tables::FILES, uid)? {
                Some(old) => {
                    not_older(tables::FILES.name(), uid, old.generation, file.generation)?;
                    if old.content == FileContent::Removing {
                        return Err(state(uid, "being removed", "begun"));
                    }
                    FileEntry { generation: file.generation, ..old }
                }
                None => file.clone(),
            };
            change.put(tables::STAGING, uid, staging)?;
            change.put(tables::FILES, uid, &entry)?;
            Ok(entry)
        })
    }

    /// Records that its directory is there, after it is.
    pub fn file_made(&self, uid: &Uid) -> Result<(), ChangeError> {
        self.change_file(uid, "made", |file| {
            file.made = true;
            Ok(())
        })
    }

    /// Records how much of its object is there. Refused for a late writer, and once pods may see it.
    pub fn file_fetched(
        &self,
        uid: &Uid,
        generation: Generation,
        fetch: FileFetch,
    ) -> Result<(), ChangeError> {
        self.change_file(uid, "fetched", |file| {
            not_older(tables::FILES.name(), uid, file.generation, generation)?;
            if file.content != FileContent::Unchanged || file.fetch == FileFetch::Complete {
                return Err(state(uid, "complete", "fetched"));
            }
            file.fetch = fetch;
            Ok(())
        })
    }

    /// Records that a pod is to see the file, before it does: by the handle of its volume. The same again changes nothing.
    /// A writer makes it the only copy, if changes are to go anywhere and `discard` does not say that nobody wants them. What
    /// was shown in an earlier boot of the machine is forgotten.
    ///
    /// # Errors
    /// Refused while it is not all there, is being removed, is shown to a writer, or, to a writer, while anybody sees it or
    /// it is being sent; with `discard` also while it is the only copy.
    pub fn publish_file(
        &self,
        uid: &Uid,
        volume: &str,
        publication: &FilePublication,
        discard: bool,
    ) -> Result<(), ChangeError> {
        self.change_file(uid, "published", |file| {
            file.published.retain(|_, old| old.boot == publication.boot);
            if file.published.get(volume) == Some(publication) {
                return Ok(());
            }
            if let Some(problem) = obstacle(file, volume, publication) {
                return Err(state(uid, problem, "published"));
            }
            if publication.writer && discard && file.is_only_copy() {
                // What it writes would be sent in place of what somebody waits for.
                return Err(state(uid, "the only copy", "published to a writer whose changes nobody wants"));
            }
            if publication.writer && file.target.is_some() && !discard {
                file.content = FileContent::OnlyCopy;
            }
            file.published.insert(volume.to_owned(), publication.clone());
            Ok(())
        })
    }

    /// Records that a pod sees a file no more, after it does not, and when that was. False if it was recorded nowhere.
    pub fn unpublish_file(&self, volume: &str, now: Timestamp) -> Result<bool, ChangeError> {
        self.record().commit(|change| {
            for (uid, mut file) in change.entries(tables::FILES)? {
                if file.published.remove(volume).is_some() {
                    change.put(tables::FILES, &uid, &file)?;
                    change.put(tables::LAST_USED, &uid, &now)?;
                    return Ok(true);
                }
            }
            Ok(false)
        })
    }

    /// Records how far the sending of a file is: that it begins before anything is sent, its upload before the first part.
    /// `None` begins anew. Refused while a pod may write to it in this `boot`; from the first on, none may until it is sent.
    pub fn file_sending(&self, uid: &Uid, boot: &str, sending: Option<Sending>) -> Result<(), ChangeError> {
        self.change_file(uid, "sent", |file| {
            if file.shown(boot).any(|(_, publication)| publication.writer) {
                return Err(state(uid, "published to a writer", "sent"));
            }
            if !file.is_only_copy() {
                return Err(state(uid, "no only copy", "sent"));
            }
            file.content = sending.map_or(FileContent::OnlyCopy, FileContent::Sending);
            Ok(())
        })
    }

    /// Records that a file is in its object store, verified: it is no only copy any more, and was used until now. Refused while
    /// a pod may write to it in this `boot`.
    pub fn file_sent(
        &self,
        uid: &Uid,
        boot: &str,
        sent: &SentFile,
        now: Timestamp,
    ) -> Result<(), ChangeError> {
        self.record().commit(|change| {
            edit_file(change, uid, "durable", |file| {
                if file.shown(boot).any(|(_, publication)| publication.writer) {
                    return Err(state(uid, "written", "durable"));
                }
                file.sent = Some(sent.clone());
                file.content = FileContent::Unchanged;
                Ok(())
            })?;
            change.put(tables::LAST_USED, uid, &now)
        })
    }

    /// Records the intent to remove a file: no pod can see it from now on. Returns what was known of it; `None` if there is
    /// none. Refused while a pod sees it in this `boot`, and for an only copy without consent.
    pub fn begin_remove_file(
        &self,
        uid: &Uid,
        boot: &str,
        only_copy: bool,
    ) -> Result<Option<FileEntry>, ChangeError> {
        self.record().commit(|change| {
            let Some(file) = change.get(tables::FILES, uid)? else { return Ok(None) };
            if file.shown(boot).next().is_some() {
                return Err(state(uid, "published", "removed"));
            }
            if file.is_only_copy() && !only_copy {
                return Err(state(uid, "the only copy", "removed"));
            }
            let removing = FileEntry { content: FileContent::Removing, ..file.clone() };
            change.put(tables::FILES, uid, &removing)?;
            Ok(Some(file))
        })
    }

    fn change_file(
        &self,
        uid: &Uid,
        wanted: &'static str,
        edit: impl FnOnce(&mut FileEntry) -> Result<(), ChangeError>,
    ) -> Result<(), ChangeError> {
        self.record().commit(|change| edit_file(change, uid, wanted, edit))
    }
}

fn edit_file(
    change: &Change<'_>,
    uid: &Uid,
    wanted: &'static str,
    edit: impl FnOnce(&mut FileEntry) -> Result<(), ChangeError>,
) -> Result<(), ChangeError> {
    let mut file = change.require(tables::FILES, uid)?;
    if file.content == FileContent::Removing {
        return Err(state(uid, "being removed", wanted));
    }
    edit(&mut file)?;
    change.put(tables::FILES, uid, &file)
}

/// Why a pod cannot see a file now, if so.
fn obstacle(file: &FileEntry, volume: &str, wanted: &FilePublication) -> Option<&'static str> {
    let others = || file.published.iter().filter(|(other, _)| *other != volume);
    if file.fetch != FileFetch::Complete {
        return Some("not all there");
    }
    if file.published.contains_key(volume) {
        return Some("published for this volume in another way");
    }
    if others().any(|(_, other)| other.writer) {
        return Some("published to a writer");
    }
    match (wanted.writer, &file.content) {
        (true, _) if others().next().is_some() => Some("published to readers"),
        (true, FileContent::Sending(_)) => Some("being sent"),
        _ => None,
    }
}

/// Forgets a file with its directory, after both are gone.
pub(crate) fn forget(change: &Change<'_>, uid: &Uid) -> Result<(), ChangeError> {
    if let Some(file) = change.get(tables::FILES, uid)? {
        if file.content != FileContent::Removing {
            return Err(state(uid, "not being removed", "forgotten"));
        }
        change.remove(tables::LAST_USED, uid)?;
        change.remove(tables::FILES, uid)?;
    }
    Ok(())
}

fn state(uid: &Uid, state: &str, wanted: &'static str) -> ChangeError {
    wrong_state(tables::FILES.name(), uid, state, wanted)
}
