//! What was done and found, and whether it was enough.

use std::collections::BTreeMap;

use super::bed::Cut;
use super::judge::{Failure, Total};
use super::step::Kind;

/// At least so many in 100 cuts must have come while the operation was not answered yet.
const LEAST_INSIDE: u64 = 50;
/// At least so many in 100 cuts must have lost writes that were not safe yet.
const LEAST_LOSSES: u64 = 15;
/// At least so many in 100 cuts must have left something half done on the disk.
const LEAST_RECOVERIES: u64 = 2;
/// Operations acknowledged for each cut.
const LEAST_ACKNOWLEDGED: u64 = 3;
/// With fewer cuts than these nothing is said about shares of them.
const LEAST_CUTS: u64 = 20;

/// What was done, in numbers, and what did not hold.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// What was to be cut.
    pub wanted: Vec<Kind>,
    /// Power cuts after which the machine was looked at.
    pub cuts: u64,
    /// By what was cut.
    pub kinds: BTreeMap<Kind, u64>,
    /// Those of them that came before the answer.
    pub inside: BTreeMap<Kind, u64>,
    /// By what became of the disk.
    pub ways: BTreeMap<Cut, u64>,
    /// Cuts that lost writes, and how many writes.
    pub losses: (u64, u64),
    /// Starts that found something half done in the record.
    pub recoveries: u64,
    /// Runs of `thin_check`.
    pub checked: u64,
    /// Operations acknowledged.
    pub acknowledged: u64,
    /// Blocks read and compared.
    pub compared: u64,
    /// What the machines were.
    pub machine: String,
    /// What did not hold.
    pub failures: Vec<Failure>,
}

impl Report {
    /// Nothing yet, where these were to be cut.
    pub fn of(kinds: &[Kind]) -> Self {
        Self { wanted: kinds.to_vec(), ..Self::default() }
    }

    /// Takes in what was done at the same time.
    pub fn add(&mut self, other: Self) {
        self.cuts += other.cuts;
        add(&mut self.kinds, other.kinds);
        add(&mut self.inside, other.inside);
        add(&mut self.ways, other.ways);
        self.losses = (self.losses.0 + other.losses.0, self.losses.1 + other.losses.1);
        self.recoveries += other.recoveries;
        self.checked += other.checked;
        self.acknowledged += other.acknowledged;
        self.compared += other.compared;
        self.machine = other.machine;
        self.failures.extend(other.failures);
    }

    /// The coverage, a line each.
    pub fn coverage(&self) -> Vec<String> {
        let kinds = self.wanted.iter().map(|kind| {
            let (all, inside) = (count(&self.kinds, kind), count(&self.inside, kind));
            format!("  {kind}: {all} cuts, {inside} before the answer")
        });
        let ways = Cut::ALL.map(|cut| format!("{cut:?} {}", count(&self.ways, &cut))).join(", ");
        let mut lines = vec![format!("runs on {}; cuts by operation:", self.machine)];
        lines.extend(kinds);
        lines.push(format!("disks after a cut: {ways}"));
        lines.push(format!("cuts that lost writes: {}, writes lost: {}", self.losses.0, self.losses.1));
        lines.push(format!("starts that found something half done: {}", self.recoveries));
        lines.push(format!(
            "operations acknowledged: {}; blocks compared: {}; metadata checked: {} times",
            self.acknowledged, self.compared, self.checked
        ));
        lines
    }

    /// What did not hold.
    pub fn damage(&self) -> Vec<String> {
        self.failures.iter().map(Failure::to_string).collect()
    }

    /// What did not hold, or what was not covered; empty if all is well. With `cuts` asked for.
    pub fn failures(&self, cuts: u64) -> Vec<String> {
        if !self.failures.is_empty() {
            return self.damage();
        }
        let mut below = Vec::new();
        let mut floor = |what: String, found: u64, least: u64| {
            if found < least {
                below.push(format!("{what}: {found}, and at least {least} are needed"));
            }
        };
        floor("cuts".to_owned(), self.cuts, cuts);
        let each = cuts / self.wanted.len().max(1) as u64;
        for kind in &self.wanted {
            floor(format!("cuts in {kind}"), count(&self.kinds, kind), each);
        }
        if cuts >= LEAST_CUTS {
            let share = |percent: u64| cuts * percent / 100;
            let inside = self.inside.values().sum();
            floor("cuts before the answer".to_owned(), inside, share(LEAST_INSIDE));
            floor("cuts that lost writes".to_owned(), self.losses.0, share(LEAST_LOSSES));
            let recoveries = "starts that found something half done".to_owned();
            floor(recoveries, self.recoveries, (cuts * LEAST_RECOVERIES).div_ceil(100));
            floor("operations acknowledged".to_owned(), self.acknowledged, LEAST_ACKNOWLEDGED * cuts);
        }
        below
    }

    /// The last line.
    pub fn totals(&self) -> String {
        let count = |total| self.failures.iter().filter(|failure| failure.total == total).count();
        format!(
            "cuts={} thin_check_bad={} lost_acknowledged={} leaked={} record_mismatch={}",
            self.cuts,
            count(Total::ThinCheckBad),
            count(Total::LostAcknowledged),
            count(Total::Leaked),
            count(Total::RecordMismatch)
        )
    }
}

fn count<K: Ord>(counts: &BTreeMap<K, u64>, key: &K) -> u64 {
    counts.get(key).copied().unwrap_or_default()
}

fn add<K: Ord>(counts: &mut BTreeMap<K, u64>, more: BTreeMap<K, u64>) {
    for (key, number) in more {
        *counts.entry(key).or_default() += number;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enough() -> Report {
        Report {
            wanted: Kind::ALL.to_vec(),
            cuts: 32,
            kinds: Kind::ALL.map(|kind| (kind, 2)).into(),
            inside: BTreeMap::from([(Kind::Write, 20)]),
            losses: (10, 100),
            recoveries: 5,
            acknowledged: 200,
            ..Report::default()
        }
    }

    #[test]
    fn every_floor_counts_and_the_last_line_has_the_totals() {
        let mut report = enough();
        assert_eq!(report.failures(32), [""; 0]);
        assert_eq!(report.failures(64).len(), 1 + 16 + 1, "cuts, each kind, those before the answer");
        report.kinds.remove(&Kind::VolumeClone);
        assert_eq!(report.failures(32), ["cuts in volumeClone: 0, and at least 2 are needed"]);
        let spoilt: [fn(&mut Report); 4] = [
            |report| report.inside.clear(),
            |report| report.losses = (0, 0),
            |report| report.recoveries = 0,
            |report| report.acknowledged = 0,
        ];
        for spoil in spoilt {
            let mut report = enough();
            spoil(&mut report);
            assert_eq!(report.failures(32).len(), 1);
        }
        report.failures.push(Failure { total: Total::Leaked, what: "x".into() });
        assert_eq!(report.failures(32), ["Leaked: x"]);
        let line = "cuts=32 thin_check_bad=0 lost_acknowledged=0 leaked=1 record_mismatch=0";
        assert_eq!(report.totals(), line);
    }
}
