//! Outcomes as text for people.

use berth_core::table::Table;
use berth_core::units::Bytes;

use crate::area::{Backend, ThinGroup};
use crate::operation::{
    Finding, MapFrom, MapLine, OriginName, Outcome, PoolLine, PoolLineState, VolumeKind, VolumeLine,
};

/// An outcome, each line with its end; nothing if there is nothing to say.
pub fn show(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Done => String::new(),
        Outcome::Device(path) => format!("{}\n", path.display()),
        Outcome::Pools(pools) => table_of_pools(pools),
        Outcome::Findings(findings) => list_of_findings(findings),
        Outcome::Volumes(volumes) => table_of_volumes(volumes),
        Outcome::Map(parts) => table_of_parts(parts),
    }
}

fn or_nothing(text: Option<impl ToString>) -> String {
    text.map(|text| text.to_string()).unwrap_or_default()
}

fn table_of_pools(pools: &[PoolLine]) -> String {
    let mut table = Table::new(["NAME", "STATE", "AREA", "WHERE", "TOTAL", "PROMISED", "USED", "MESSAGE"]);
    for pool in pools {
        let state = match pool.state {
            PoolLineState::Open => "Open",
            PoolLineState::Failed => "Failed",
            PoolLineState::Found => "Found",
        };
        table.push([
            or_nothing(pool.pool.as_ref()),
            state.to_owned(),
            pool.area.to_string(),
            or_nothing(pool.backend.as_ref().map(place)),
            or_nothing(pool.space.map(|space| space.total)),
            or_nothing(pool.space.map(|space| space.promised)),
            or_nothing(pool.space.map(|space| space.used)),
            or_nothing(pool.message.as_ref()),
        ]);
    }
    table.to_string()
}

fn place(backend: &Backend) -> String {
    match backend {
        Backend::Filesystem { path, .. } => path.display().to_string(),
        Backend::Thin(spec) => match &spec.group {
            ThinGroup::Exclusive { devices, .. } => {
                let devices: Vec<_> = devices.iter().map(|device| device.display().to_string()).collect();
                devices.join(",")
            }
            ThinGroup::Shared { name, .. } => format!("volume group {name}"),
        },
    }
}

fn list_of_findings(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return "Nothing was found: record and kernel agree.\n".to_owned();
    }
    let mut table = Table::new(["FINDING", "ABOUT", "MESSAGE"]);
    for finding in findings {
        table.push([format!("{:?}", finding.kind), finding.about.clone(), finding.message.clone()]);
    }
    table.to_string()
}

fn table_of_volumes(volumes: &[VolumeLine]) -> String {
    let mut table = Table::new(["UID", "KIND", "SIZE", "MAPPED", "ORIGIN", "DEVICE", "LABELS"]);
    for volume in volumes {
        let kind = match volume.kind {
            VolumeKind::Volume => "volume",
            VolumeKind::Snapshot => "snapshot",
            VolumeKind::Template => "template",
        };
        let labels: Vec<_> = volume.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        table.push([
            volume.uid.to_string(),
            kind.to_owned(),
            volume.size.to_string(),
            or_nothing(volume.mapped),
            or_nothing(volume.origin.as_ref().map(origin)),
            or_nothing(volume.device.as_ref().map(|path| path.display())),
            labels.join(","),
        ]);
    }
    table.to_string()
}

fn origin(origin: &OriginName) -> String {
    match origin {
        OriginName::Image(digest) => format!("image {}", digest.short()),
        OriginName::Template(uid) => format!("template {uid}"),
    }
}

/// In exact bytes: people who look at a map compare it with what another tool says.
fn table_of_parts(parts: &[MapLine]) -> String {
    let mut table = Table::new(["OFFSET", "LENGTH", "FROM"]);
    let mut sums = [Bytes::ZERO; 4];
    for part in parts {
        let (from, sum) = match part.from {
            MapFrom::Own => ("own", &mut sums[0]),
            MapFrom::Origin => ("origin", &mut sums[1]),
            MapFrom::Zero => ("zero", &mut sums[2]),
            MapFrom::Same => ("same", &mut sums[3]),
        };
        *sum = sum.saturating_add(part.length);
        table.push([part.offset.0.to_string(), part.length.0.to_string(), from.to_owned()]);
    }
    let [own, origin, zero, same] = sums;
    let same = if same == Bytes::ZERO { String::new() } else { format!(", same {same}") };
    format!("{table}own {own}, origin {origin}, zero {zero}{same}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::area::ThinSpec;
    use crate::operation::{FindingKind, PoolSpace};

    #[test]
    fn pools_with_and_without_an_owner_line_up() {
        let open = PoolLine {
            pool: Some("fast".into()),
            area: "u-1".into(),
            backend: Some(Backend::Filesystem { path: "/srv/pool".into(), size: Bytes::gib(1) }),
            state: PoolLineState::Open,
            message: None,
            space: Some(PoolSpace { total: Bytes::gib(1), promised: Bytes::mib(5), used: Bytes::ZERO }),
        };
        let devices = vec!["/dev/sdb".into(), "/dev/sdc".into()];
        let group = ThinGroup::Exclusive { devices, wipe: false };
        let found = PoolLine {
            pool: None,
            area: "u-2".into(),
            backend: Some(Backend::Thin(ThinSpec { group, block: Bytes::kib(64) })),
            state: PoolLineState::Found,
            message: None,
            space: None,
        };
        assert_eq!(
            show(&Outcome::Pools(vec![open, found])),
            "NAME   STATE   AREA   WHERE               TOTAL   PROMISED   USED      MESSAGE\n\
             fast   Open    u-1    /srv/pool           1 GiB   5 MiB      0 bytes   -\n\
             -      Found   u-2    /dev/sdb,/dev/sdc   -       -          -         -\n"
        );
    }

    #[test]
    fn maps_are_exact_and_summed_up() {
        let part = |offset, length, from| MapLine { offset: Bytes(offset), length: Bytes(length), from };
        let map = vec![part(0, 65536, MapFrom::Own), part(65536, 1000, MapFrom::Zero)];
        assert_eq!(
            show(&Outcome::Map(map)),
            "OFFSET   LENGTH   FROM\n\
             0        65536    own\n\
             65536    1000     zero\n\
             own 64 KiB, origin 0 bytes, zero 1000 bytes\n"
        );
    }

    #[test]
    fn a_comparison_also_sums_up_what_is_the_same() {
        let part = |offset, length, from| MapLine { offset: Bytes(offset), length: Bytes(length), from };
        let text = show(&Outcome::Map(vec![part(0, 512, MapFrom::Same), part(512, 512, MapFrom::Origin)]));
        assert!(text.ends_with("own 0 bytes, origin 512 bytes, zero 0 bytes, same 512 bytes\n"), "{text}");
    }

    #[test]
    fn findings_devices_and_silence() {
        assert_eq!(show(&Outcome::Done), "");
        assert_eq!(show(&Outcome::Device("/dev/loop3".into())), "/dev/loop3\n");
        let finding =
            Finding { kind: FindingKind::Missing, about: "v".to_owned(), message: "gone".to_owned() };
        assert_eq!(
            show(&Outcome::Findings(vec![finding])),
            "FINDING   ABOUT   MESSAGE\nMissing   v       gone\n"
        );
    }
}
