//! Tables of results.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use berth_core::units::Bytes;

use super::measure::{Sample, Series};
use super::{BenchArgs, Profile};

/// What a new page begins with.
const PAGE: &str = "# Benchmarks\n\n\
    Made by `cargo xtask bench`. Everything in one table ran in the same rounds, in an order that turned with every\n\
    round, and every result was compared byte for byte with what it was made from (the input of a peer that only\n\
    decodes was compared when it was made). Seconds depend on the machine and on what else it does; the\n\
    ratios are what to look at.\n";

/// A table for each series, below what was done.
pub fn tables(args: &BenchArgs, what: &str, results: &[Series]) -> String {
    let mut text = format!(
        "{what} with {} of data in a disk of {}. {} rounds; medians. {} cores; {}.\n",
        Bytes::mib(args.data),
        Bytes::mib(args.data * 2),
        args.rounds,
        std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        match args.profile {
            Profile::Release => "release build",
            Profile::Dev =>
                "**development build**: most of Berth is not optimised in it, so only bytes, requests and memory mean anything",
        },
    );
    for series in results {
        table(&mut text, series);
    }
    text
}

fn table(text: &mut String, series: &Series) {
    let Series { title, cases, rounds } = series;
    // Writing to a text cannot fail.
    let _ = write!(text, "\n### {title}\n\n");
    text.push_str(
        "| | wall | CPU | CPU of the S3 server | peak memory | stored | requests | Berth's wall time is |\n",
    );
    text.push_str("|---|---:|---:|---:|---:|---:|---:|---:|\n");
    for (place, case) in cases.iter().enumerate() {
        let samples: Vec<Sample> = rounds.iter().map(|round| round[place]).collect();
        let of = |time: fn(&Sample) -> Duration| median(samples.iter().map(time).collect()).as_secs_f64();
        let ratio = if place == 0 {
            String::new()
        } else {
            format!("{:.2} ×", ratio(rounds, |round| wall(&round[place])))
        };
        let _ = writeln!(
            text,
            "| {case} | {:.2} s | {:.2} s | {:.2} s | {} | {} | {} | {ratio} |",
            of(|sample| sample.cost.wall),
            of(|sample| sample.cost.cpu),
            of(|sample| sample.server_cpu),
            median(samples.iter().map(|sample| sample.cost.memory).collect()),
            median(samples.iter().map(|sample| sample.stored.bytes).collect()),
            median(samples.iter().map(|sample| sample.stored.requests).collect()),
        );
    }
}

/// Our wall time as a multiple of another time: the median of the rounds.
pub fn ratio(rounds: &[Vec<Sample>], other: impl Fn(&[Sample]) -> f64) -> f64 {
    median_ratio(rounds.iter().map(|round| wall(&round[0]) / other(round)).collect())
}

/// Seconds.
pub fn wall(sample: &Sample) -> f64 {
    sample.cost.wall.as_secs_f64()
}

/// The middle one; of an even number, the lower of the two.
fn median<T: Ord + Default + Copy>(mut values: Vec<T>) -> T {
    values.sort_unstable();
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or_default()
}

fn median_ratio(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or_default()
}

/// Puts `text` between the marks of `subject` in the page, which is made if it is not there.
pub fn write(path: &Path, subject: &str, text: &str) -> anyhow::Result<()> {
    let page = if path.exists() {
        fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?
    } else {
        PAGE.to_owned()
    };
    let page = replaced(&page, subject, text).with_context(|| path.display().to_string())?;
    fs::write(path, page).with_context(|| format!("writing {}", path.display()))
}

fn replaced(page: &str, subject: &str, text: &str) -> anyhow::Result<String> {
    let (begin, end) = (format!("<!-- begin {subject} -->"), format!("<!-- end {subject} -->"));
    let block = format!("{begin}\n{}\n{end}\n", text.trim());
    match (page.split_once(&begin), page.split_once(&end)) {
        (Some((before, _)), Some((_, after))) => {
            Ok(format!("{before}{block}{}", after.trim_start_matches('\n')))
        }
        (None, None) => Ok(format!("{}\n\n{block}", page.trim_end())),
        _ => bail!("one of the marks of `{subject}` is missing"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::Cost;

    #[test]
    fn the_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_medians() {
        let sample = |seconds| Sample {
            cost: Cost { wall: Duration::from_secs(seconds), ..Cost::default() },
            ..Sample::default()
        };
        let round = |ours, other| vec![sample(ours), sample(other)];
        let rounds = vec![round(10, 5), round(12, 4), round(30, 30)];
        let mut text = String::new();
        let cases = vec!["`berth-node`", "`casync`"];
        table(&mut text, &Series { title: "zlib".to_owned(), cases, rounds });
        let casync = text.lines().find(|line| line.contains("casync")).expect("a line");
        assert!(casync.contains("| 5.00 s |") && casync.ends_with("| 2.00 × |"), "{casync}");
        let ours = text.lines().find(|line| line.contains("berth-node")).expect("a line");
        assert!(ours.contains("| 12.00 s |") && ours.ends_with("|  |"), "{ours}");
    }

    #[test]
    fn a_page_keeps_what_is_not_between_the_marks() {
        let page = replaced("# Page\n", "import", "one\n").expect("no marks");
        assert_eq!(page, "# Page\n\n<!-- begin import -->\none\n<!-- end import -->\n");
        let page = replaced(&format!("{page}\nmore\n"), "import", "two").expect("both marks");
        assert_eq!(page, "# Page\n\n<!-- begin import -->\ntwo\n<!-- end import -->\nmore\n");
        assert!(replaced("<!-- begin import -->", "import", "x").is_err());
    }
}
