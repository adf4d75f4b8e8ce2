//! `lvm`, with settings of our own and answers in JSON.
//!
//! What lies on a guest's disk is none of the host's business, and a hostile guest may write a physical volume with the
//! identity of ours. So each command sees only the devices that it is about ([`Scope`]), whatever the node's `lvm.conf`
//! says. Locks lie where every LVM looks for them: in a container, `/run/lock/lvm` has to be the host's.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::dmsetup::ENVIRONMENT;
use super::group_error::VolumeGroupError;
use super::guests;
use crate::program::{self, RunError};

/// A command may wait for another one's lock on the volume group.
const LIMIT: Duration = Duration::from_secs(120);
const MOST_OUTPUT: usize = 16 << 20;
/// Drivers that LVM treats in ways of its own and that are not to be declared to it.
const SPECIAL: &[&str] = &["device-mapper", "md", "mdp"];

/// For named devices: what hides the disks of guests from the node's own LVM must not hide a device of ours from us.
const SEE_ALL: &str = "filter=[\"a|.*|\"] global_filter=[\"a|.*|\"]";

/// Which block devices LVM may look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// These alone.
    Only(Vec<PathBuf>),
    /// All but these and the disks of guests (NBD devices, Berth's own dm devices, loop devices over volumes): to find a
    /// group whose devices are not known. What the node's `global_filter` hides stays hidden.
    AllBut(Vec<PathBuf>),
}

impl Scope {
    fn arguments(&self) -> Result<Vec<String>, VolumeGroupError> {
        let (devices, filter) = match self {
            Self::Only(devices) => (&devices[..], SEE_ALL.to_owned()),
            Self::AllBut(devices) => {
                let loops = guests::loop_devices();
                let rejected: Result<Vec<_>, _> =
                    devices.iter().chain(&loops).map(|path| plain(path)).collect();
                let rejected: String = rejected?.iter().map(|path| format!("\"r|^{path}$|\",")).collect();
                (&[][..], format!("filter=[{rejected}\"r|^/dev/nbd|\",\"r|^/dev/mapper/berth-|\"]"))
            }
        };
        let mut arguments = vec!["--config".to_owned(), config(&filter)];
        for device in devices {
            arguments.extend(["--devices".to_owned(), plain(device)?.to_owned()]);
        }
        Ok(arguments)
    }
}

/// A path below `/dev` of characters that mean nothing to LVM's lists and patterns.
fn plain(path: &Path) -> Result<&str, VolumeGroupError> {
    path.to_str()
        .filter(|text| {
            text.starts_with("/dev/")
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_.:+-@".contains(&b))
        })
        .ok_or_else(|| VolumeGroupError::BadName { name: path.display().to_string() })
}

fn config(filter: &str) -> String {
    let types = types(&fs::read_to_string("/proc/devices").unwrap_or_default());
    format!(
        "devices{{use_devicesfile=0 obtain_device_list_from_udev=0 external_device_info_source=\"none\" scan_lvs=0 \
         scan=[\"/dev\"] types=[{types}] {filter}}} \
         activation{{udev_sync=0 udev_rules=0 monitoring=0 verify_udev_operations=0}} \
         backup{{backup=0 archive=0}} \
         global{{use_lvmpolld=0 use_lvmlockd=0 event_activation=0}}"
    )
}

/// Every block driver of this kernel, because LVM ignores the ones it has not heard of.
fn types(proc_devices: &str) -> String {
    let block = proc_devices.lines().skip_while(|line| !line.starts_with("Block devices")).skip(1);
    let names: BTreeSet<_> = block
        .filter_map(|line| line.split_whitespace().nth(1))
        .filter(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'))
        .filter(|name| !SPECIAL.contains(name))
        .collect();
    names.iter().map(|name| format!("\"{name}\",16")).collect::<Vec<_>>().join(",")
}

/// Runs one LVM command. `group` is what its errors are about.
pub(super) fn run(
    group: &str,
    scope: &Scope,
    command: &'static str,
    arguments: &[&str],
) -> Result<String, VolumeGroupError> {
    let scope = scope.arguments()?;
    let words =
        std::iter::once(command).chain(scope.iter().map(String::as_str)).chain(arguments.iter().copied());
    let words: Vec<_> = words.map(OsStr::new).collect();
    program::run_whole("lvm", &words, ENVIRONMENT, MOST_OUTPUT, LIMIT)
        .map_err(|source| VolumeGroupError::Run { command, group: group.to_owned(), source })
}

/// The rows of a report, all of whose fields are texts; sizes are in bytes.
pub(super) fn report<Row: DeserializeOwned>(
    group: &str,
    scope: &Scope,
    command: &'static str,
    fields: &str,
    arguments: &[&str],
) -> Result<Vec<Row>, VolumeGroupError> {
    let all = [&["--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields], arguments].concat();
    let text = run(group, scope, command, &all)?;
    parse_report(&text).map_err(|source| VolumeGroupError::Answer {
        command,
        group: group.to_owned(),
        source,
    })
}

/// LVM writes notes into the middle of a report, whatever `log/silent` says: `Retrying metadata scan.` where a power cut has
/// torn a group's metadata. No line of the report begins like one.
fn parse_report<Row: DeserializeOwned>(text: &str) -> Result<Vec<Row>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Answer<Row> {
        report: Vec<std::collections::BTreeMap<String, Vec<Row>>>,
    }
    let of_report = |line: &&str| line.trim_start().starts_with(['{', '}', '[', ']', '"']);
    let text: String = text.lines().filter(of_report).collect();
    let answer: Answer<Row> = serde_json::from_str(&text)?;
    Ok(answer.report.into_iter().flat_map(std::collections::BTreeMap::into_values).flatten().collect())
}

/// True if the group or volume that the command was about is not there.
pub(super) fn is_missing(error: &VolumeGroupError) -> bool {
    let VolumeGroupError::Run { source: RunError::Failed { output, .. }, .. } = error else { return false };
    output.contains("not found") || output.contains("Failed to find")
}

/// A number of bytes in a report.
pub(super) fn bytes<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| serde::de::Error::custom(format!("`{text}` is not a number of bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Row {
        lv_name: String,
        #[serde(deserialize_with = "bytes")]
        lv_size: u64,
    }

    #[test]
    fn reports_are_understood() {
        let text = r#"{ "report": [ { "lv": [
            {"lv_name":"d", "lv_uuid":"BCwmN1", "lv_size":"209715200", "lv_tags":"berth", "lv_active":"active"},
            {"lv_name":"m", "lv_size":"4194304"} ] } ] }"#;
        let rows: Vec<Row> = parse_report(text).unwrap();
        assert_eq!((rows.len(), rows[0].lv_name.as_str(), rows[1].lv_size), (2, "d", 4_194_304));
        assert!(parse_report::<Row>(r#"{"report":[{"lv":[]}]}"#).unwrap().is_empty());
        let noted = text.replace(r#""report": ["#, "\"report\": [\n  Retrying metadata scan.\n");
        assert_eq!(parse_report::<Row>(&noted).unwrap().len(), 2);
        for bad in ["", "{}", r#"{"report":[{"lv":[{"lv_name":"d","lv_size":"4m"}]}]}"#] {
            assert!(parse_report::<Row>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn each_command_sees_only_what_it_may() {
        let only = Scope::Only(vec![PathBuf::from("/dev/sdb"), PathBuf::from("/dev/disk/by-id/x-1")]);
        let arguments = only.arguments().unwrap();
        assert!(arguments[1].contains(SEE_ALL));
        assert_eq!(arguments[2..], ["--devices", "/dev/sdb", "--devices", "/dev/disk/by-id/x-1"]);
        let all_but = Scope::AllBut(vec![PathBuf::from("/dev/loop3")]).arguments().unwrap();
        assert!(all_but[1].contains(r#"filter=["r|^/dev/loop3$|","r|^/dev/nbd|","r|^/dev/mapper/berth-|"]"#));
        for bad in ["/dev/x\"y", "/dev/x,y", "/dev/a b", "/etc/passwd", "sdb", "/dev/x|y"] {
            assert!(Scope::Only(vec![PathBuf::from(bad)]).arguments().is_err(), "{bad}");
        }
    }

    #[test]
    fn drivers_come_from_the_kernel() {
        let text = "Character devices:\n  1 mem\n\nBlock devices:\n  7 loop\n 98 ubd\n254 device-mapper\n  9 md\n 99 we\"ird\n";
        assert_eq!(types(text), "\"loop\",16,\"ubd\",16");
    }
}
