//! Hosts with a kernel of their own: what the scenarios of the node's storage stand on.

use std::env;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use berth_e2e::kernel::{
    BootError, CommandError, Disk, GIB, KernelHost, KernelNetwork, MIB, Point, WriteLog,
};
use berth_e2e::leaks::Snapshot;
use nix::sys::signal::Signal;

use crate::scenario::{Need, Scenario};

/// Set for a copy of this program that is to run a host and wait to be killed; its value is a folder.
const OWNER: &str = "BERTH_E2E_PLAY_KERNEL_OWNER";

/// How long something that takes a moment may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// Serves each connection a line, in a guest.
const SERVER: &str = r#"use IO::Socket;
my $s = IO::Socket::INET->new(LocalPort => 7000, Listen => 5, ReuseAddr => 1) or die;
$| = 1; print "up\n";
while (my $c = $s->accept) { print $c "from the guest\n"; close $c }"#;

pub fn scenarios() -> Vec<Scenario> {
    let thin = ["dmsetup", "thin_check", "blockdev"].map(Need::Command);
    vec![
        blocking("kernel::commands_come_through", &[], commands_come_through),
        blocking("kernel::what_a_guest_writes_stays_in_it", &[], what_a_guest_writes_stays_in_it),
        blocking("kernel::what_was_synced_survives_a_power_cut", &[], what_was_synced_survives_a_power_cut),
        blocking("kernel::a_hung_guest_answers_again", &[], a_hung_guest_answers_again),
        blocking("kernel::hosts_reach_one_another", &[], hosts_reach_one_another),
        blocking("kernel::a_thin_device_reads_its_origin", &thin, a_thin_device_reads_its_origin),
        blocking("kernel::a_pool_is_sound_at_every_flush", &thin, a_pool_is_sound_at_every_flush),
        blocking("kernel::a_killed_owner_leaves_nothing", &[], a_killed_owner_leaves_nothing),
    ]
}

/// A scenario on hosts, whose calls block.
fn blocking(name: &'static str, more: &[Need], body: fn() -> anyhow::Result<()>) -> Scenario {
    let needs = [&[Need::Kernel], more].concat();
    Scenario::new(name, &needs, move || async move { tokio::task::spawn_blocking(body).await? })
}

/// Says what a scenario runs on.
fn tell(host: &KernelHost) {
    eprintln!("runs on {}", host.description());
}

/// Looks until `look` says yes.
fn soon(what: &str, mut look: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    while !look()? {
        ensure!(Instant::now() < deadline, "waited {SOON:?} for {what}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn commands_come_through() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let host = KernelHost::at(dir.path()).name("one").modules([]).env("COLOUR", "blue").boot()?;
    tell(&host);
    let output = host.output(["sh", "-c", "echo out; echo err >&2; uname -r; hostname; exit 7"])?;
    ensure!(output.status == 7, "{output:?}");
    ensure!(output.text() == format!("out\n{}\none", host.release()), "{output:?}");
    ensure!(output.stderr == b"err\n", "{output:?}");
    let machine = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(host.release() != machine.trim(), "the guest has a kernel of its own");

    let command = host.command(["sh", "-c", "echo $COLOUR $SIZE; pwd; cat"]);
    let output = command.env("SIZE", "it's \"big\"").folder(Path::new("/usr")).input("a\nb").run()?;
    ensure!(output.text() == "blue it's \"big\"\n/usr\na\nb", "{output:?}");
    // Every byte, and more of them than any pipe or line holds.
    let output = host.run(["perl", "-e", "print pack('C*', 0..255) x 16384"])?;
    let wanted: Vec<u8> = (0..4 << 20_u32).map(|number: u32| number.to_le_bytes()[0]).collect();
    ensure!(output.stdout == wanted, "{} bytes came through, or other ones", output.stdout.len());

    let error = host.run(["sh", "-c", "echo because >&2; exit 3"]).expect_err("it fails").to_string();
    ensure!(error.contains("status 3") && error.contains("because"), "{error}");
    ensure!(host.output(["no-such-program"])?.status == 127, "a program that is not there");

    two_at_once(&host)?;
    let waits = host.start(["sleep", "60"])?;
    host.shut_down();
    ensure!(matches!(waits.wait(), Err(CommandError::ShutDown { .. })), "told apart");
    ensure!(matches!(host.run(["true"]), Err(CommandError::Off { .. })), "a host that is off");
    host.boot_again()?;
    ensure!(matches!(host.boot_again(), Err(BootError::Running { .. })), "it runs already");
    // A kernel that dies is told with its last words.
    let error = host.run(["sh", "-c", "echo c >/proc/sysrq-trigger"]).expect_err("the kernel panics");
    ensure!(matches!(&error, CommandError::Died { console, .. } if console.contains("panic")), "{error}");
    ensure!(!host.is_running(), "it is off");
    Ok(())
}

/// Each of two commands knows its own end.
fn two_at_once(host: &KernelHost) -> anyhow::Result<()> {
    let slow = host.start(["sh", "-c", "echo begun; sleep 60 & wait"])?;
    ensure!(host.run(["echo", "quick"])?.text() == "quick", "beside another one");
    soon("the slow one to begin", || Ok(slow.stdout()? == b"begun\n"))?;
    slow.signal(Signal::SIGTERM)?;
    ensure!(slow.wait()?.status == 128 + 15, "ended by a signal");
    let limited = host.command(["sh", "-c", "echo begun; sleep 60"]).limit(Duration::from_secs(1)).start()?;
    soon("the limited one to begin", || Ok(limited.stdout()? == b"begun\n"))?;
    let error = limited.wait().expect_err("it is longer than its limit");
    ensure!(matches!(&error, CommandError::TimedOut { said, .. } if said.contains("begun")), "{error}");
    let sleepers = "for p in /proc/[0-9]*/comm; do read -r c <$p && [ $c != sleep ] || echo $p; done";
    soon("no sleep to be left", || Ok(host.run(["sh", "-c", sleepers])?.stdout.is_empty()))?;
    Ok(())
}

fn what_a_guest_writes_stays_in_it() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let (share, plain) = (dir.path().join("share"), dir.path().join("plain"));
    fs::create_dir(&plain)?;
    fs::write(plain.join("old"), "machine")?;
    let host = KernelHost::at(&dir.path().join("host")).modules([]).share(&share);
    let host = host.tmpfs(Path::new("/mnt")).disk("a", MIB).boot()?;
    tell(&host);
    let here = plain.display();
    host.shell(&format!("echo guest >{here}/old; echo guest >{here}/new; echo guest >/etc/berth-guest"))?;
    host.shell(&format!("echo guest >{}/new; echo guest >/mnt/new", share.display()))?;
    ensure!(host.run(["cat".into(), plain.join("old")])?.text() == "guest", "it sees what it wrote");
    ensure!(fs::read_to_string(plain.join("old"))? == "machine", "the machine's file is as it was");
    ensure!(!plain.join("new").exists() && !Path::new("/etc/berth-guest").exists(), "and has no new ones");
    ensure!(!Path::new("/mnt/new").exists(), "a tmpfs is the guest's");
    ensure!(fs::read_to_string(share.join("new"))? == "guest\n", "but for what is shared");
    // What the machine writes later is seen too.
    fs::write(share.join("later"), "machine")?;
    ensure!(host.run(["cat".into(), share.join("later")])?.text() == "machine", "both ways");
    host.reboot()?;
    ensure!(host.run(["cat".into(), plain.join("old")])?.text() == "machine", "gone with the guest");

    let other = KernelHost::at(&dir.path().join("other")).modules([]);
    let other = other.disk_with(Disk::new("a", MIB).file(&host.disk_file("a"))).boot();
    ensure!(matches!(other, Err(BootError::DiskInUse { .. })), "one disk is in one host");
    drop(host);

    let host = KernelHost::at(&dir.path().join("writing")).modules([]).writing_to_machine().boot()?;
    host.shell(&format!("echo guest >{here}/old; echo guest >/run/berth-guest"))?;
    ensure!(fs::read_to_string(plain.join("old"))? == "guest\n", "written to the machine when asked for");
    ensure!(!Path::new("/run/berth-guest").exists(), "but for what is always the guest's");
    Ok(())
}

fn what_was_synced_survives_a_power_cut() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let host = KernelHost::at(dir.path()).modules([]).disk("other", MIB).disk("data", 64 * MIB).boot()?;
    tell(&host);
    ensure!(host.device("data") == Path::new("/dev/ubdb"), "{}", host.device("data").display());
    host.run(["mkfs.ext4", "-q", "/dev/ubdb"])?;
    host.shell("mount /dev/ubdb /mnt; echo in memory >/dev/shm/file")?;
    let writes = "for i in {1..100000}; do echo $i >>/mnt/list; sync /mnt/list; echo $i; done";
    let mut acknowledged = 0;
    for _ in 0..2 {
        let writer = host.start(["bash", "-euc", writes])?;
        let lines = || Ok::<_, CommandError>(writer.stdout()?.split(|byte| *byte == b'\n').count() - 1);
        soon("five records", || Ok(lines()? >= 5))?;
        host.cut();
        ensure!(matches!(writer.wait(), Err(CommandError::Cut { .. })), "a power cut is told as one");
        acknowledged += lines()?;
        host.boot_again()?;
        host.run(["mount", "/dev/ubdb", "/mnt"])?;
        let kept = host.run(["cat", "/mnt/list"])?.text().lines().count();
        ensure!(kept >= acknowledged, "{acknowledged} records were acknowledged, {kept} are there");
        // The one that was on its way may have arrived.
        acknowledged = kept;
    }
    ensure!(host.output(["cat", "/dev/shm/file"])?.status != 0, "memory does not survive");
    host.run(["umount", "/mnt"])?;
    host.run(["fsck.ext4", "-fn", "/dev/ubdb"])?;
    Ok(())
}

fn a_hung_guest_answers_again() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let host = KernelHost::at(dir.path()).modules([]).boot()?;
    tell(&host);
    ensure!(host.hang(), "it was on");
    let asked = host.start(["echo", "again"])?;
    ensure!(!asked.ends_within(Duration::from_secs(2)), "a hung guest answers nothing");
    ensure!(host.is_running(), "it is on all the same");
    ensure!(host.resume(), "it was on");
    ensure!(asked.wait_success()?.text() == "again", "it goes on where it was");
    // Power can be cut while it hangs.
    let asked = host.start(["sleep", "60"])?;
    host.hang();
    host.cut();
    ensure!(matches!(asked.wait(), Err(CommandError::Cut { .. })), "cut");
    ensure!(!host.resume() && !host.is_running(), "and off");
    Ok(())
}

fn hosts_reach_one_another() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let interfaces = || -> anyhow::Result<usize> { Ok(fs::read_dir("/sys/class/net")?.count()) };
    let before = interfaces()?;
    let network = KernelNetwork::new()?;
    let build = |name: &str| KernelHost::at(dir.path()).name(name).modules([]).network(&network);
    let (client, server) = (build("client"), build("server"));
    let booting = thread::spawn(move || server.boot());
    let client = client.boot()?;
    let server = booting.join().expect("it does not panic")?;
    tell(&server);
    ensure!(interfaces()? == before, "the machine's own network is not touched");
    let address = server.address().context("it has a link")?;
    let serving = server.start(["perl", "-e", SERVER])?;
    soon("the server to listen", || Ok(serving.stdout()? == b"up\n"))?;
    let ask = |to: SocketAddrV4| {
        let script = format!("exec 3<>/dev/tcp/{}/{}; cat <&3", to.ip(), to.port());
        client.output(["timeout", "2", "bash", "-c", &script])
    };
    let served = SocketAddrV4::new(address, 7000);
    let answers = || Ok(ask(served)?.text() == "from the guest");
    ensure!(answers()?, "two hosts reach one another");
    server.partition()?;
    ensure!(!answers()?, "not when one of them is cut off");
    ensure!(server.run(["echo", "alive"])?.text() == "alive", "which knows nothing of it");
    server.heal()?;
    soon("the hosts to reach one another again", answers)?;
    client.reboot()?;
    soon("the host to reach the other one after its reboot", answers)?;

    // The machine's servers from the guests, and the guests' from the machine.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let exposed = network.expose(listener.local_addr()?.port())?;
    let serve = thread::spawn(move || -> std::io::Result<()> {
        listener.accept()?.0.write_all(b"from the machine\n")
    });
    ensure!(ask(exposed)?.text() == "from the machine", "through the gateway");
    serve.join().expect("it does not panic")?;
    let mut answer = String::new();
    let reached = network.reach(served)?;
    TcpStream::connect(reached)?.read_to_string(&mut answer)?;
    ensure!(answer == "from the guest\n", "{answer}");
    Ok(())
}

/// A thin pool of 64 KiB blocks on two disks, and a thin device over a third one.
const THIN: &str = r#"size() { blockdev --getsz "$1"; }
dmsetup create pool --table "0 $(size /dev/ubdc) thin-pool /dev/ubdb /dev/ubdc 128 0 1 skip_block_zeroing"
[ "$1" = again ] || dmsetup message pool 0 "create_thin 0"
dmsetup create volume --table "0 $(size /dev/ubda) thin /dev/mapper/pool 0 /dev/ubda""#;

fn a_thin_device_reads_its_origin() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("image.raw");
    let original: Vec<u8> = (0..4 * MIB).map(|at| (at / 512 % 251).to_le_bytes()[0]).collect();
    fs::write(&image, &original)?;
    let mut content = original.clone();
    let host = KernelHost::at(dir.path()).disk_with(Disk::new("origin", 4 * MIB).file(&image).read_only());
    let host = host.disk("metadata", 16 * MIB).disk("data", GIB).boot()?;
    tell(&host);
    let targets = host.run(["dmsetup", "targets"])?.text();
    for target in ["thin", "thin-pool", "flakey", "dust", "delay", "log-writes"] {
        let there = targets.lines().any(|line| line.split(' ').next() == Some(target));
        ensure!(there, "no {target} in\n{targets}");
    }
    host.shell("dd if=/dev/zero of=/dev/ubdb bs=4096 count=1 conv=fsync status=none")?;
    host.run(["bash", "-euo", "pipefail", "-c", THIN, "bash", "first"])?;
    let volume = || -> anyhow::Result<Vec<u8>> { Ok(host.run(["cat", "/dev/mapper/volume"])?.stdout) };
    ensure!(volume()? == content, "an unwritten volume reads its origin");
    let write =
        host.command(["dd", "of=/dev/mapper/volume", "bs=4096", "seek=300", "conv=fsync", "status=none"]);
    write.input(vec![0xbe; 4096]).run()?;
    content[300 * 4096..301 * 4096].fill(0xbe);
    host.cut();
    host.boot_again()?;
    host.run(["thin_check", "-q", "/dev/ubdb"])?;
    host.run(["bash", "-euo", "pipefail", "-c", THIN, "bash", "again"])?;
    ensure!(volume()? == content, "what was written and flushed is there, and around it the origin");
    let status = host.run(["dmsetup", "status", "volume"])?.text();
    ensure!(status.contains(" thin 128 "), "one block of 64 KiB is its own: {status}");
    ensure!(fs::read(&image)? == original, "the origin is as it was");
    host.run(["dmsetup", "remove", "volume", "pool"])?;
    Ok(())
}

/// Work in a thin pool whose metadata lies above a log of its writes. `$1` gets the metadata as it was before.
const LOGGED: &str = r#"size() { blockdev --getsz "$1"; }
dd if=/dev/zero of=/dev/ubda bs=4096 count=1 conv=fsync status=none
pool() { echo "0 $(size /dev/ubdb) thin-pool $1 /dev/ubdb 128 0 1 skip_block_zeroing"; }
dmsetup create pool --table "$(pool /dev/ubda)"
dmsetup remove pool
cat /dev/ubda >"$1"
dmsetup create metadata --table "0 $(size /dev/ubda) log-writes /dev/ubda /dev/ubdc"
dmsetup create pool --table "$(pool /dev/mapper/metadata)"
for id in 0 1 2; do
  dmsetup message pool 0 "create_thin $id"
  dmsetup create volume --table "0 65536 thin /dev/mapper/pool $id"
  dd if=/dev/zero of=/dev/mapper/volume bs=64k count=$((id * 8 + 4)) conv=fsync status=none
  dmsetup suspend volume
  dmsetup message pool 0 "create_snap 1$id $id"
  dmsetup resume volume
  dd if=/dev/zero of=/dev/mapper/volume bs=64k count=2 conv=fsync status=none
  dmsetup remove volume
  dmsetup message pool 0 "delete 1$id"
done
dmsetup remove pool
dmsetup message metadata 0 mark done
dmsetup remove metadata"#;

fn a_pool_is_sound_at_every_flush() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let share = dir.path().join("share");
    let host = KernelHost::at(dir.path()).share(&share).disk("metadata", 4 * MIB).disk("data", 64 * MIB);
    let host = host.disk("log", 256 * MIB).boot()?;
    tell(&host);
    let copy = share.join("metadata");
    host.command(
        ["bash", "-euo", "pipefail", "-c", LOGGED, "bash"].map(Path::new).into_iter().chain([&*copy]),
    )
    .run()?;
    host.shut_down();
    let mut log = WriteLog::open(&host.disk_file("log"), &copy)?;
    let (mut points, mut marks) = (0, Vec::new());
    while let Some(point) = log.next_point()? {
        let checked = Command::new("thin_check").arg("-q").arg(&copy).output()?;
        ensure!(checked.status.success(), "{point:?}: {}", String::from_utf8_lossy(&checked.stderr));
        match point {
            Point::Safe(_) => points += 1,
            Point::Mark(text) => marks.push(text),
        }
    }
    ensure!(
        points >= 9 && marks.first().is_some_and(|mark| mark == "done"),
        "{points} points, marks {marks:?}"
    );
    // And the last one is what the disk holds.
    ensure!(fs::read(&copy)? == fs::read(host.disk_file("metadata"))?, "replayed to the end it is the disk");
    // What is damaged is seen.
    let mut bytes = fs::read(&copy)?;
    bytes[4096 + 100] ^= 1;
    bytes[100] ^= 1;
    fs::write(&copy, bytes)?;
    let checked = Command::new("thin_check").arg("-q").arg(&copy).output()?;
    ensure!(!checked.status.success(), "the check finds damage");
    Ok(())
}

/// Runs a host if this program was started to do that.
pub fn play_owner() -> Option<ExitCode> {
    let dir = env::var_os(OWNER)?;
    Some(match own(Path::new(&dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

fn own(dir: &Path) -> anyhow::Result<()> {
    let share = dir.join("share");
    let network = KernelNetwork::new()?;
    let host = KernelHost::at(dir).modules([]).share(&share).disk("data", MIB).network(&network).boot()?;
    host.shell(&format!("while :; do date +%N >{}/ticks; sleep 0.1; done", share.display()))?;
    bail!("the loop ended")
}

fn a_killed_owner_leaves_nothing() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = fs::canonicalize(dir.path())?;
    let before = Snapshot::below(&dir);
    for signal in [Signal::SIGKILL, Signal::SIGINT] {
        let mut owner = Command::new(env::current_exe()?);
        let mut owner = owner.env(OWNER, &dir).stdin(Stdio::null()).spawn()?;
        let ticks = dir.join("share/ticks");
        let up = soon("the guest to write", || {
            ensure!(owner.try_wait()?.is_none(), "the owner ended");
            Ok(ticks.exists())
        });
        let during = Snapshot::below(&dir);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(owner.id().cast_signed()), signal)?;
        owner.wait()?;
        up?;
        let seen = before.added(&during).len();
        ensure!(seen >= 2, "the guest is seen while it runs: {seen}");
        let left = before.settle(SOON, || Snapshot::below(&dir));
        ensure!(left.is_empty(), "left after {signal}: {left:?}");
        // No process of the guest goes on by itself.
        fs::remove_file(&ticks)?;
        thread::sleep(Duration::from_millis(500));
        ensure!(!ticks.exists(), "somebody still writes");
    }
    Ok(())
}
