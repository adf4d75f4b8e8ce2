//! The process that makes a template local is killed, again and again.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use berth_device::thin::{InProcess, TemplateDevice};

use super::{Bed, Bench, Dice, POOL, TEMPLATE, assert_is, chunks, holder, hydrate, image, progress, uid};

const MIB: usize = 1 << 20;
const SIZE: usize = 12 * MIB + 20 * 1024;
/// Tells the process that is killed to do what it does.
const PLAY: &str = "BERTH_TEST_PLAY_HYDRATOR";

/// What is killed: makes chunks of the template local in an order of its own. By itself it does nothing.
#[test]
fn play() {
    let Some(seed) = std::env::var(PLAY).ok().and_then(|seed| seed.parse().ok()) else { return };
    let template = TemplateDevice::find(&uid(POOL), &holder(TEMPLATE)).unwrap().expect("it is shown");
    let (writer, image) = (template.writer().unwrap(), image(SIZE));
    let mut order = chunks(&image);
    Dice(seed).shuffle(&mut order);
    for chunk in order {
        hydrate(&writer, &image, chunk).unwrap();
        thread::sleep(Duration::from_millis(5)); // as long as a chunk takes to come
    }
}

#[test]
fn whoever_is_killed_leaves_a_template_that_reads_and_goes_on() {
    let test = "whoever_is_killed_leaves_a_template_that_reads_and_goes_on";
    let Some(bench) = Bench::new(test) else { return };
    let Some(bed) = Bed::new(&bench, test, SIZE) else { return };
    let template = bed.show(true);
    let mut kills = 0;
    for (round, milliseconds) in [120, 180, 250].into_iter().enumerate() {
        let program = std::env::current_exe().unwrap();
        let mut child = Command::new(program)
            .args(["--exact", "templates::killed::play", "--nocapture"])
            .env(PLAY, (round + 1).to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let before = progress(&template).hydrated;
        let started = std::time::Instant::now();
        while progress(&template).hydrated == before && started.elapsed() < Duration::from_secs(60) {
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(milliseconds));
        kills += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        let reached = progress(&template);
        assert!(reached.hydrated > before || reached.is_complete(), "round {round}: {reached:?}");
        assert_is(&template.path(), &bed.image, "after a kill");
        // Every other time its device goes as well.
        if round == 1 {
            template.clone().hide().unwrap();
            assert_eq!(bed.show(false), template);
            assert_eq!(progress(&template), reached, "what was there is kept");
            assert_is(&template.path(), &bed.image, "shown again");
        }
    }
    assert!(kills > 0, "nobody was killed");
    let writer = template.writer().unwrap();
    for chunk in chunks(&bed.image) {
        hydrate(&writer, &bed.image, chunk).unwrap();
    }
    drop(writer);
    template.confirm_local().unwrap();
    template.make_local(&InProcess).unwrap();
    assert_is(&template.path(), &bed.image, "it is local");
    bed.end();
}
