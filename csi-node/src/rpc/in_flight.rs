//! One call at a time for each volume; a second one is told what runs, and since when.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::status::RpcError;

type Calls = BTreeMap<String, (&'static str, Instant)>;

/// The calls that run.
#[derive(Clone, Default)]
pub struct InFlight(Arc<Mutex<Calls>>);

/// Held while a call runs.
pub struct Guard {
    calls: Arc<Mutex<Calls>>,
    key: String,
}

fn lock(calls: &Mutex<Calls>) -> MutexGuard<'_, Calls> {
    calls.lock().unwrap_or_else(PoisonError::into_inner)
}

impl InFlight {
    /// Begins a call for a volume.
    ///
    /// # Errors
    /// [`RpcError::Busy`] while another one runs.
    pub fn begin(&self, key: &str, method: &'static str) -> Result<Guard, RpcError> {
        let mut calls = lock(&self.0);
        if let Some((running, since)) = calls.get(key) {
            return Err(RpcError::Busy { key: key.to_owned(), method: running, age: since.elapsed() });
        }
        calls.insert(key.to_owned(), (method, Instant::now()));
        Ok(Guard { calls: Arc::clone(&self.0), key: key.to_owned() })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        lock(&self.calls).remove(&self.key);
    }
}
