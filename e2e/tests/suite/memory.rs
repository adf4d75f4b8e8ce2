//! Imports in little memory: what a huge disk needs is no more than what a large one needs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_e2e::kill::images;
use berth_e2e::site::{Site, SiteOptions};
use berth_e2e::{drive, image};
use serde_json::json;

use crate::safety::long;
use crate::scenario::{Need, Scenario};

/// What the agent and its children may use. Unit: bytes.
const LIMIT: u64 = 192 << 20;
/// How much more the peak of the larger disk may be, which is 16 times as large: what is in flight differs from run to run. Unit:
/// bytes.
const DIFFERENCE: u64 = 32 << 20;
/// How often the peak is sampled.
const SAMPLE: Duration = Duration::from_millis(100);
/// How long one import may take.
const IMPORT_LIMIT: Duration = Duration::from_mins(15);
/// Version 1 of the memory controller, where it is in use.
const V1: &str = "/sys/fs/cgroup/memory";
/// Version 2.
const V2: &str = "/sys/fs/cgroup";

pub fn scenarios() -> Vec<Scenario> {
    let needs =
        [Need::SITE, &[Need::Command("qemu-img"), Need::Command("mkfs.xfs"), Need::MemoryCgroup]].concat();
    let limit = IMPORT_LIMIT * 3;
    vec![
        Scenario::new("memory::does_not_grow_with_the_disk", &needs, does_not_grow_with_the_disk)
            .limited(limit),
    ]
}

/// Why this machine cannot limit the memory of a process, if it cannot.
pub fn obstacle() -> Option<String> {
    let name = format!("berth-e2e-probe-{}", std::process::id());
    Group::create(&name, LIMIT).err().map(|error| format!("no memory cgroup can be made: {error:#}"))
}

/// A cgroup with a limit and without swap; removed when dropped, as far as it is empty then.
struct Group {
    path: PathBuf,
    v1: bool,
}

impl Group {
    fn create(name: &str, limit: u64) -> anyhow::Result<Self> {
        let v1 = Path::new(V1).join("memory.limit_in_bytes").exists();
        let path = Path::new(if v1 { V1 } else { V2 }).join(name);
        if !v1 {
            let controllers = fs::read_to_string(Path::new(V2).join("cgroup.subtree_control"))?;
            ensure!(
                controllers.split_whitespace().any(|one| one == "memory"),
                "the memory controller is not delegated"
            );
        }
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        let group = Self { path, v1 };
        let (file, swap) = if v1 {
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        } else {
            ("memory.max", "memory.swap.max")
        };
        group.set(file, limit)?;
        let without_swap = if v1 { limit } else { 0 };
        // Absent where the kernel does not account for swap; a machine without any needs none of it.
        if group.path.join(swap).exists() {
            group.set(swap, without_swap)?;
        } else {
            let swaps = fs::read_to_string("/proc/swaps")?.lines().count();
            ensure!(swaps <= 1, "swap is in use and cannot be limited");
        }
        Ok(group)
    }

    fn set(&self, file: &str, value: u64) -> anyhow::Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value.to_string()).with_context(|| format!("writing {}", path.display()))
    }

    fn take(&self, pid: u32) -> anyhow::Result<()> {
        self.set("cgroup.procs", pid.into())
    }

    /// How many processes were killed for want of memory.
    fn kills(&self) -> anyhow::Result<u64> {
        let text =
            fs::read_to_string(self.path.join(if self.v1 { "memory.oom_control" } else { "memory.events" }))?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
        count.context("the kernel does not count kills")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A process that is just ending holds it a moment longer.
        for _ in 0..50 {
            // The agent makes groups of its own below it.
            for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
                fs::remove_dir(entry.path()).ok();
            }
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Samples the anonymous memory of a process and all below it, in a thread, until it is dropped.
struct Sampler {
    peak: Arc<AtomicU64>,
    samples: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Sampler {
    fn start(pid: u32) -> Self {
        let sampler = Self { peak: Arc::default(), samples: Arc::default(), stop: Arc::default() };
        let (peak, samples, stop) = (sampler.peak.clone(), sampler.samples.clone(), sampler.stop.clone());
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let now = family(pid).into_iter().map(anonymous).sum();
                peak.fetch_max(now, Ordering::Relaxed);
                samples.fetch_add(1, Ordering::Relaxed);
                thread::sleep(SAMPLE);
            }
        });
        sampler
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A process and its descendants.
fn family(pid: u32) -> BTreeSet<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|child: u32| Some((child, status(child, "PPid:")?.try_into().ok()?)))
        .collect();
    let mut found = BTreeSet::from([pid]);
    while let Some((child, _)) =
        parents.iter().find(|(child, parent)| found.contains(parent) && !found.contains(child))
    {
        found.insert(*child);
    }
    found
}

/// Bytes of anonymous memory of a process; 0 once it is gone.
fn anonymous(pid: u32) -> u64 {
    status(pid, "RssAnon:").unwrap_or_default() << 10
}

fn status(pid: u32, field: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix(field)?.split_whitespace().next()?.parse().ok())
}

async fn does_not_grow_with_the_disk() -> anyhow::Result<()> {
    let data_mib: u64 = if long() { 2048 } else { 512 };
    let dir = tempfile::tempdir()?;
    let group = Group::create(&format!("berth-e2e-{}", std::process::id()), LIMIT)?;
    let images = tokio::task::spawn_blocking(move || images::obtain(data_mib, 1)).await??;
    let mut site = Site::start(SiteOptions::new(&dir.path().join("site"))).await?;
    drive::make_pool(&site, "work", &format!("{}Mi", 2 * data_mib + 512)).await?;
    let mut peaks = Vec::new();
    for (name, size) in [("small", "64G"), ("huge", "1T")] {
        // A store of its own, so that each import uploads all of it; an agent of its own, so that each begins alike.
        drive::make_store(&site, "default", name).await?;
        let file = site.files().join(name);
        fs::copy(&images.qcow2, &file)?;
        image::run(Command::new("qemu-img").args(["resize", "-q", "-f", "qcow2"]).arg(&file).arg(size))?;
        site.node_mut(0).kill9();
        site.node_mut(0).start_agent()?;
        let pid = site.nodes()[0].pid().context("the agent does not run")?;
        group.take(pid)?;
        site.nodes()[0].wait_ready().await?;
        let sampler = Sampler::start(pid);
        let made = import(&site, name).await?;
        let (peak, samples) = (sampler.peak.load(Ordering::Relaxed), sampler.samples.load(Ordering::Relaxed));
        drop(sampler);
        ensure!(site.nodes()[0].pid() == Some(pid), "the agent has not survived the import of {size}");
        ensure!(samples >= 10, "only {samples} samples");
        let data = u64::try_from(made.real_size)?;
        ensure!(data >= images.data && data < images.data + (1 << 30), "{data} bytes of data in {size}");
        println!(
            "{size}: {data_mib} MiB of data, peak {} KiB of anonymous memory, {samples} samples",
            peak >> 10
        );
        peaks.push(peak);
    }
    ensure!(group.kills()? == 0, "{} processes were killed for want of memory", group.kills()?);
    let more = peaks[1].saturating_sub(peaks[0]);
    ensure!(more < DIFFERENCE, "the larger disk takes {more} bytes more: {peaks:?}");
    let left = site.stop();
    ensure!(left.is_empty(), "loop devices: {left:?}");
    Ok(())
}

async fn import(site: &Site, name: &str) -> anyhow::Result<berth_api::template_import::DurableImage> {
    let import = json!({
        "apiVersion": "staging.berth.dev/v1alpha1", "kind": "TemplateImport",
        "metadata": { "name": name, "namespace": "default" },
        "spec": {
            "source": { "http": { "url": format!("{}/plain/{name}", site.http()) } },
            "store": { "name": name }, "limits": { "virtualSize": "2Ti" },
        },
    });
    site.apply(&import.to_string()).await?;
    Ok(drive::wait_import(&site.client(), "default", name, IMPORT_LIMIT, |_| {}).await?)
}
