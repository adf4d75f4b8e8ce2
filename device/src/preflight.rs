//! What this node has and lacks, everything at once, so that an administrator fixes it once.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::host_config;
use crate::program::{self, find_program};

/// The oldest `qemu-img` that knows `--target-is-zero`.
const MIN_QEMU: (u32, u32) = (5, 0);
/// `CAP_SYS_ADMIN`, by its number.
const CAP_SYS_ADMIN: u32 = 21;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Its name: short, stable, for machines.
    pub name: &'static str,
    /// True if it is as it should be.
    pub ok: bool,
    /// What was found, or what to do.
    pub detail: String,
    /// False if Berth works without it, with less.
    pub required: bool,
}

/// All checks of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preflight {
    /// In the order they were made.
    pub checks: Vec<Check>,
}

impl Preflight {
    /// Looks at everything, at the configuration of a host whose root is `/`. Takes well under a second; changes nothing.
    pub fn run() -> Self {
        Self::run_at(Path::new("/"))
    }

    /// The same where the host's root is somewhere else, as in a container.
    pub fn run_at(host_root: &Path) -> Self {
        let mut checks = pool_image_checks();
        checks.extend([
            qemu_img(),
            program_check("mkfs.ext4", "install e2fsprogs", false),
            cgroups(),
            clock(),
            parts("dm-thin", "for pools of thin devices", &crate::thin::missing()),
            parts(
                "dm-clone",
                "to show images before all of them is here",
                &crate::thin::missing_for_templates(),
            ),
            parts("nbd", "for image files as templates", &crate::nbd::missing()),
        ]);
        checks.extend(host_config::checks(host_root));
        Self { checks }
    }

    /// True if nothing that is required is missing.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.ok || !check.required)
    }

    /// Why the host would look into the disks of guests, one phrase for each program that would.
    pub fn scans_guest_disks(&self) -> Vec<&str> {
        let scans = self.failures().filter(|check| host_config::CHECKS.contains(&check.name));
        scans.map(|check| check.detail.as_str()).collect()
    }

    /// What is not as it should be.
    pub fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| !check.ok)
    }
}

/// What a pool image needs and this node lacks, as one phrase each.
pub(crate) fn missing_for_pool_image() -> Vec<String> {
    pool_image_checks().into_iter().filter(|check| !check.ok).map(|check| check.detail).collect()
}

fn pool_image_checks() -> Vec<Check> {
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    vec![
        privileges(&status),
        loop_control(),
        xfs(&filesystems),
        program_check("mkfs.xfs", "install xfsprogs", true),
    ]
}

pub(crate) fn check(
    name: &'static str,
    required: bool,
    result: Result<impl Into<String>, impl Into<String>>,
) -> Check {
    let ok = result.is_ok();
    Check { name, ok, required, detail: result.map_or_else(Into::into, Into::into) }
}

/// What some nodes need only.
fn parts(name: &'static str, purpose: &str, missing: &[String]) -> Check {
    let result = if missing.is_empty() {
        Ok(format!("everything {purpose} is there"))
    } else {
        Err(format!("needed {purpose}: {}", missing.join("; ")))
    };
    check(name, false, result)
}

fn privileges(status: &str) -> Check {
    let result = if has_capability(status, CAP_SYS_ADMIN) {
        Ok("the process may mount")
    } else {
        Err("the process may not mount: run it as root with CAP_SYS_ADMIN")
    };
    check("privileges", true, result)
}

fn has_capability(status: &str, capability: u32) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << capability) != 0)
}

fn loop_control() -> Check {
    let path = "/dev/loop-control";
    let opened = fs::OpenOptions::new().read(true).write(true).open(path);
    let result = opened.map(|_| path).map_err(|error| format!("{path} cannot be opened: {error}"));
    check("loop-devices", true, result)
}

fn xfs(filesystems: &str) -> Check {
    let loaded = filesystems.lines().any(|line| line.trim() == "xfs");
    let result = if loaded || module_exists("xfs") {
        Ok("the kernel has XFS")
    } else {
        Err("the kernel has no XFS: load or install the module xfs")
    };
    check("xfs", true, result)
}

/// True if the kernel would find the module when something needs it.
fn module_exists(name: &str) -> bool {
    let Ok(release) = fs::read_to_string("/proc/sys/kernel/osrelease") else { return false };
    let index = Path::new("/lib/modules").join(release.trim()).join("modules.dep");
    let file = format!("/{name}.ko");
    fs::read_to_string(index).is_ok_and(|text| text.lines().any(|line| line.contains(&file)))
}

fn program_check(program: &'static str, advice: &str, required: bool) -> Check {
    let result = find_program(program)
        .map(|path| path.display().to_string())
        .ok_or_else(|| format!("{program} is not installed: {advice}"));
    check(program, required, result)
}

fn qemu_img() -> Check {
    let result = match program::run("qemu-img", ["--version"], Duration::from_secs(10)) {
        Ok(text) => judge_qemu(&text),
        Err(error) => Err(format!("{error}: install qemu-utils")),
    };
    check("qemu-img", true, result)
}

fn judge_qemu(text: &str) -> Result<String, String> {
    let line = text.lines().next().unwrap_or_default();
    match version_in(line) {
        Some(version) if version >= MIN_QEMU => Ok(line.to_owned()),
        Some((major, minor)) => {
            Err(format!("qemu-img {major}.{minor} is too old: {}.{} is needed", MIN_QEMU.0, MIN_QEMU.1))
        }
        None => Err(format!("the version of qemu-img is not understood: {line}")),
    }
}

/// The first `number.number` in a line.
fn version_in(line: &str) -> Option<(u32, u32)> {
    line.split_whitespace().find_map(|word| {
        let (major, rest) = word.split_once('.')?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        Some((major.parse().ok()?, rest[..digits].parse().ok()?))
    })
}

fn cgroups() -> Check {
    let result = crate::cgroup::probe()
        .map(|version| format!("tools get control groups of their own ({version})"))
        .map_err(|error| format!("tools run without memory limits: {error}"));
    check("cgroups", false, result)
}

fn clock() -> Check {
    let result = match crate::sys::clock_is_synchronised() {
        Ok(true) => Ok("synchronised".to_owned()),
        Ok(false) => Err("the clock is not synchronised: run an NTP client".to_owned()),
        Err(errno) => Err(format!("it is not known whether the clock is synchronised: {errno}")),
    };
    check("clock", false, result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_effective_set() {
        assert!(has_capability("CapPrm:\t0\nCapEff:\t000001ffffffffff\n", CAP_SYS_ADMIN));
        assert!(!has_capability("CapPrm:\t000001ffffffffff\nCapEff:\t00000000a80425fb\n", CAP_SYS_ADMIN));
        assert!(!has_capability("", CAP_SYS_ADMIN));
    }

    #[test]
    fn versions_of_distributions_are_understood() {
        assert_eq!(version_in("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"), Some((7, 2)));
        assert_eq!(version_in("qemu-img version 10.1.50 (v10.1.0-rc1)"), Some((10, 1)));
        assert!(judge_qemu("qemu-img version 4.2.1").unwrap_err().contains("too old"));
        assert!(judge_qemu("something else").unwrap_err().contains("not understood"));
    }

    #[test]
    fn every_check_is_made_and_failures_say_what_to_do() {
        let preflight = Preflight::run();
        let names: Vec<_> = preflight.checks.iter().map(|check| check.name).collect();
        for name in [
            "privileges",
            "loop-devices",
            "xfs",
            "mkfs.xfs",
            "qemu-img",
            "cgroups",
            "clock",
            "dm-thin",
            "dm-clone",
            "nbd",
        ] {
            assert!(names.contains(&name), "{name}");
        }
        assert!(preflight.failures().all(|check| !check.detail.is_empty()));
        assert_eq!(preflight.passed(), preflight.failures().all(|check| !check.required));
        assert!(!check("x", true, Err::<&str, _>("y")).ok);
        let missing = ["program lvm is not installed: install lvm2".to_owned(), "no nbd".to_owned()];
        let lacking = parts("x", "for pools", &missing);
        assert_eq!((lacking.ok, lacking.required), (false, false));
        assert_eq!(lacking.detail, "needed for pools: program lvm is not installed: install lvm2; no nbd");
        assert_eq!(
            program_check("no-such-program", "install it", true).detail,
            "no-such-program is not installed: install it"
        );
    }
}
