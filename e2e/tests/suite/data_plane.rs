//! The node's data plane on a kernel of its own: the device crate's tests of thin pools and kernel NBD, and the node's of a
//! pool of the device mapper and of the supervisor, none skipped.
//!
//! They are built outside and run as root in user-mode Linux on disks that may be wiped.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use berth_e2e::kernel::{GIB, KernelHost, KernelHostBuilder, MIB};
use berth_e2e::ours::OurTest;

use crate::safety::long;
use crate::scenario::{Need, Scenario};

/// How long the tests of one program may run in a guest on a busy machine: ten times what they take on an idle one.
const TESTS_LIMIT: Duration = Duration::from_secs(600);

/// The same with the time to build them, which may be nothing or minutes.
const LIMIT: Duration = Duration::from_secs(1200);

const DEVICE: &str = "berth-device";
const NODE: &str = "berth-node";

pub fn scenarios() -> Vec<Scenario> {
    let thin = ["dmsetup", "lvm", "thin_check", "thin_dump", "thin_delta"].map(Need::Command);
    let nbd = ["qemu-nbd", "qemu-img"].map(Need::Command);
    let scanners = ["udevadm", "mdadm", "sfdisk"].map(Need::Command);
    vec![
        // LVM takes half a second for each command in a guest.
        scenario("data_plane::thin_pools", &[&[Need::Long], &thin[..]].concat(), || {
            let which = &["--skip=full::", "--skip=others::", "--skip=growth::", "--skip=templates::"];
            in_guest(DEVICE, "thin", which, 14, two_disks)
        }),
        scenario("data_plane::pools_grow_under_writes", &[&[Need::Long], &thin[..]].concat(), || {
            let growth = |host: KernelHostBuilder| {
                host.env("BERTH_TEST_GROWTHS", "100").disk("small", 64 * MIB).disk("large", 2 * GIB)
            };
            in_guest(DEVICE, "thin", &["growth::"], 1, growth)
        }),
        scenario(
            "data_plane::full_pools_and_what_belongs_to_others",
            &[&[Need::Long], &thin[..]].concat(),
            || in_guest(DEVICE, "thin", &["full::", "others::"], 6, two_disks),
        ),
        scenario("data_plane::templates_become_local", &thin, || {
            // Two of them are programs whose process or power is cut, which do nothing by themselves.
            let short = [
                "templates::swap::volumes_",
                "templates::killed::whoever_",
                "templates::failures::a_source_",
            ];
            let (which, least) = if long() { (&["templates::"][..], 13) } else { (&short[..], 3) };
            in_guest(DEVICE, "thin", which, least, two_disks)
        }),
        scenario("data_plane::kernel_nbd", &[&thin[..], &nbd].concat(), || {
            in_guest(DEVICE, "nbd", &[], 14, |host| host.disk("large", GIB))
        }),
        scenario("data_plane::a_pool_of_thin_devices", &[&thin[..], &nbd[1..]].concat(), || {
            // One of them is the program that others kill, which does nothing by itself.
            let short = ["a_template_is_", "lazy::volumes_", "lazy::nothing_"];
            let (which, least) = if long() { (&[][..], 13) } else { (&short[..], 3) };
            in_guest(NODE, "thin_area", which, least, |host| host.disk("large", GIB))
        }),
        // One of them is the plugin that others kill, which does nothing by itself.
        scenario("data_plane::what_outlives_the_plugin", &[&thin[..], &nbd].concat(), || {
            in_guest(NODE, "supervisor", &[], 14, |host| host.disk("large", GIB))
        }),
        scenario("data_plane::guest_disks_are_left_alone", &[&thin[..], &nbd, &scanners].concat(), || {
            // The counter-test takes as long again.
            let (which, least) = if long() { (&[][..], 2) } else { (&["nothing_on_"][..], 1) };
            in_guest(DEVICE, "guest_disks", which, least, |host| {
                host.disk("small", 128 * MIB).disk("large", GIB)
            })
        }),
        scenario("data_plane::a_pool_goes_on_after_power_cuts", &[&[Need::Long], &thin[..]].concat(), || {
            goes_on_after_power_cuts(&POOL)
        }),
        scenario(
            "data_plane::a_template_goes_on_after_power_cuts",
            &[&[Need::Long], &thin[..]].concat(),
            || goes_on_after_power_cuts(&TEMPLATE),
        ),
    ]
}

fn two_disks(host: KernelHostBuilder) -> KernelHostBuilder {
    host.disk("small", 64 * MIB).disk("large", GIB)
}

fn scenario(name: &'static str, more: &[Need], body: fn() -> anyhow::Result<()>) -> Scenario {
    let needs = [&[Need::Kernel], more].concat();
    let body = move || async move { tokio::task::spawn_blocking(body).await? };
    Scenario::new(name, &needs, body).limited(if long() { 4 * LIMIT } else { LIMIT })
}

/// After how long the power is cut, each time from where the one before has left it. Making the area takes 5 s and all of
/// it 20 s on an idle machine; at which moment it is does not matter.
const POWER_CUTS: [Duration; 4] =
    [Duration::from_secs(4), Duration::from_secs(9), Duration::from_secs(14), Duration::from_secs(19)];

/// A test that plays what goes on after power cuts. It is given a folder that survives them.
struct Play {
    program: OurTest,
    name: &'static str,
    variable: &'static str,
    disks: fn(KernelHostBuilder) -> KernelHostBuilder,
}

/// A pool on a disk, a directory, an image and volumes in it; all but the pool is removed at last.
const POOL: Play = Play {
    program: OurTest { package: NODE, test: "thin_area" },
    name: "killed::play",
    variable: "BERTH_TEST_PLAY_KILLED",
    disks: |host| host.disk("large", GIB),
};

/// A template that becomes local, with a count of what was flushed.
const TEMPLATE: Play = Play {
    program: OurTest { package: DEVICE, test: "thin" },
    name: "templates::power::play",
    variable: "BERTH_TEST_PLAY_TEMPLATE",
    disks: two_disks,
};

/// After each power cut the program is run again, and at last to its end.
fn goes_on_after_power_cuts(play: &Play) -> anyhow::Result<()> {
    let program = play.program.obtain()?;
    let dir = tempfile::tempdir()?;
    let share = dir.path().join("share");
    let host = (play.disks)(KernelHost::at(dir.path()).memory(768 * MIB).share(&share)).boot()?;
    eprintln!("runs on {}", host.description());
    let program = program.to_str().context("the path of the test program is text")?;
    let run = || {
        let command = host.command([program, "--exact", play.name, "--nocapture"]);
        command.env(play.variable, &share).limit(TESTS_LIMIT)
    };
    let mut cuts = 0;
    for moment in POWER_CUTS {
        let playing = run().start()?;
        if playing.ends_within(moment) {
            playing.wait_success()?;
            break;
        }
        host.cut();
        cuts += 1;
        host.boot_again()?;
    }
    run().run()?;
    let left = host.run(["dmsetup", "ls"])?.text();
    ensure!(left == "No devices found", "{left}");
    ensure!(cuts > 0, "the power was never cut");
    eprintln!("goes on after {cuts} power cuts");
    Ok(())
}

/// Runs a test program in a guest, all of it or what some words select; `least` of its tests must pass,
/// and none may be skipped.
fn in_guest(
    package: &'static str,
    test: &'static str,
    which: &[&str],
    least: u32,
    disks: fn(KernelHostBuilder) -> KernelHostBuilder,
) -> anyhow::Result<()> {
    let program = OurTest { package, test }.obtain()?;
    let dir = tempfile::tempdir()?;
    let host = disks(KernelHost::at(dir.path())).memory(768 * MIB).boot()?;
    eprintln!("runs on {}", host.description());
    let program = program.to_str().context("the path of the test program is text")?;
    let words = [program, "--nocapture", "--test-threads=1"].into_iter().chain(which.iter().copied());
    // Nothing that a test writes to the files of this host stays.
    let command = host.command(words).env("BERTH_TEST_THROWAWAY_HOST", "1");
    let output = command.limit(if long() { 4 * TESTS_LIMIT } else { TESTS_LIMIT }).run()?;
    let text = output.text();
    let passed = text
        .lines()
        .find_map(|line| line.strip_prefix("test result: ok. ")?.split(' ').next()?.parse::<u32>().ok())
        .with_context(|| format!("no result in:\n{text}"))?;
    ensure!(!text.contains("SKIPPED"), "the guest lacks something:\n{text}");
    ensure!(passed >= least, "{passed} tests passed and not {least}:\n{text}");
    eprintln!("{passed} tests of {package} passed in the guest");
    Ok(())
}
