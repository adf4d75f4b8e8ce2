//! The record of a node's agent.

use std::path::Path;

use berth_core::ids::{NodeName, Uid};

use crate::entry::JobEntry;
use crate::error::{ChangeError, CreateError, OpenError, ReadError};
use crate::schema::{Owner, tables};
use crate::store::Record;

/// The jobs of one node. What another node needs is in the image store's sessions: who is at work, at which generation.
pub struct NodeRecord {
    record: Record,
}

impl NodeRecord {
    /// Makes the record of `node` at `path`.
    pub fn create(path: &Path, node: &NodeName) -> Result<Self, CreateError> {
        Ok(Self { record: Record::create(path, &Owner::Node { node: node.clone() }, &[])? })
    }

    /// Opens the record of `node` at `path`.
    pub fn open(path: &Path, node: &NodeName) -> Result<Self, OpenError> {
        Ok(Self { record: Record::open(path, Some(&Owner::Node { node: node.clone() }))? })
    }

    /// Reading and transactions of several entries.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Every job.
    pub fn jobs(&self) -> Result<Vec<(Uid, JobEntry)>, ReadError> {
        self.record.entries(tables::JOBS)
    }

    /// The job of this object.
    pub fn job(&self, uid: &Uid) -> Result<Option<JobEntry>, ReadError> {
        self.record.get(tables::JOBS, uid)
    }

    /// Writes the job as it now is. Refused with [`ChangeError::StaleGeneration`] if a later generation is recorded.
    pub fn checkpoint(&self, uid: &Uid, job: &JobEntry) -> Result<(), ChangeError> {
        self.record.commit(|change| {
            if let Some(old) = change.get(tables::JOBS, uid)?
                && old.generation > job.generation
            {
                return Err(ChangeError::StaleGeneration {
                    table: tables::JOBS.name(),
                    key: uid.to_string(),
                    recorded: old.generation,
                    given: job.generation,
                });
            }
            change.put(tables::JOBS, uid, job)
        })
    }

    /// Forgets the job, and tells whether there was one.
    pub fn forget_job(&self, uid: &Uid) -> Result<bool, ChangeError> {
        self.record.commit(|change| change.remove(tables::JOBS, uid))
    }
}
