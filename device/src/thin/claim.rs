//! Who works with a device at this moment, so that nobody resumes what somebody else has suspended for a reason.
//!
//! A claim lasts as long as its value, in this process only: another one is kept out by whoever starts it.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::names::DeviceName;

static CLAIMED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static GIVEN_BACK: Condvar = Condvar::new();

/// Nobody else in this process suspends or resumes the kernel pool that is claimed, or anything that lies in it.
#[derive(Debug)]
#[must_use = "dropped, it is given back"]
pub(super) struct Claim {
    key: String,
}

impl Claim {
    /// Claims what a device lies in; waits for others, until `limit`.
    pub(super) fn take(device: &DeviceName, limit: Duration) -> Option<Self> {
        Self::take_key(key(device), limit)
    }

    /// The same by dm UUID, of a kind of device that may be unknown, at once or not at all.
    pub(super) fn take_now(uuid: &str) -> Option<Self> {
        let key = DeviceName::from_uuid(uuid).map_or_else(|| uuid.to_owned(), |device| key(&device));
        Self::take_key(key, Duration::ZERO)
    }

    /// Claims the metadata snapshot of a kernel pool, beside all else: reading one takes long, and suspensions do not wait.
    pub(super) fn take_metadata(pool: &DeviceName, limit: Duration) -> Option<Self> {
        Self::take_key(format!("{} metadata", key(pool)), limit)
    }

    fn take_key(key: String, limit: Duration) -> Option<Self> {
        let deadline = Instant::now() + limit;
        let mut claimed = claimed();
        while claimed.contains(&key) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            claimed = GIVEN_BACK.wait_timeout(claimed, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        claimed.insert(key.clone());
        Some(Self { key })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        claimed().remove(&self.key);
        GIVEN_BACK.notify_all();
    }
}

fn claimed() -> MutexGuard<'static, BTreeSet<String>> {
    CLAIMED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn key(device: &DeviceName) -> String {
    device.in_kernel_pool().uuid()
}

#[cfg(test)]
mod tests {
    use berth_core::ids::Uid;
    use berth_core::ledger::Class;

    use super::*;

    #[test]
    fn a_device_and_its_pool_are_one_and_others_are_free() {
        let uid = |n: u32| Uid::from(format!("{n:08x}-1111-4222-8333-444455556666"));
        let pool = DeviceName::kernel_pool(&uid(1), Class::Volumes).unwrap();
        let inside = DeviceName::thin(&uid(1), Class::Volumes, &uid(2)).unwrap();
        let beside = DeviceName::thin(&uid(1), Class::Images, &uid(2)).unwrap();
        let claim = Claim::take(&inside, Duration::ZERO).unwrap();
        assert!(Claim::take(&pool, Duration::ZERO).is_none() && Claim::take_now(&pool.uuid()).is_none());
        let template = DeviceName::template(&uid(1), &uid(2)).unwrap();
        assert!(Claim::take_now(&template.uuid()).is_some(), "it lies in the other pool");
        assert!(Claim::take_now(&beside.uuid()).is_some() && Claim::take_now("BERTH-other").is_some());
        let reading = Claim::take_metadata(&pool, Duration::ZERO).unwrap();
        assert!(Claim::take_metadata(&pool, Duration::ZERO).is_none());
        drop(reading);
        let started = Instant::now();
        let waiting = std::thread::spawn(move || Claim::take(&pool, Duration::from_secs(10)).is_some());
        std::thread::sleep(Duration::from_millis(50));
        drop(claim);
        assert!(waiting.join().unwrap());
        assert!(started.elapsed() < Duration::from_secs(5), "it was told");
        assert!(Claim::take_now(&inside.uuid()).is_some());
    }
}
