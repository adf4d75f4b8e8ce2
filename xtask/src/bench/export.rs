//! B5: a disk becomes a compressed image in an object store: what it costs beside doing one thing after the other, compressing
//! alone, and the upload of the result alone.
//!
//! The disk is a sparse raw file; the definition speaks of a volume, which `berth-node transfer` does not read yet.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use super::inputs::Inputs;
use super::measure::{Sample, Series, in_turn, succeed, timed};
use super::programs::Ours;
use super::report;
use super::server::{Arrived, BUCKET, KEYS, Server};

/// At most so many times what the slower of compressing and uploading takes.
pub const TARGET: f64 = 1.15;

/// What is run in every round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    /// `berth-node transfer` of the raw file into a qcow2 object.
    Berth,
    /// `qemu-img convert` into a file, then the upload of that.
    ConvertThenPut,
    /// `zstd` of the raw file to nothing: compressing alone.
    Compress,
    /// `curl` puts what `qemu-img` made: upload alone.
    Put,
}

impl Case {
    const ALL: [Self; 4] = [Self::Berth, Self::ConvertThenPut, Self::Compress, Self::Put];

    const fn name(self) -> &'static str {
        match self {
            Self::Berth => "`berth-node transfer --format qcow2-zstd`",
            Self::ConvertThenPut => "`qemu-img convert -c`, zstd, then PUT (`curl`)",
            Self::Compress => "`zstd -1 -T0` to null",
            Self::Put => "PUT of the result (`curl`)",
        }
    }
}

struct Bench<'b> {
    ours: &'b Ours,
    inputs: &'b Inputs,
    server: Server,
    scratch: &'b Path,
}

/// Runs every case in every round.
pub fn run(ours: &Ours, inputs: &Inputs, dir: &Path, rounds: u32) -> anyhow::Result<Series> {
    let title = "a sparse raw file → zstd qcow2".to_owned();
    let mut series = Series { title, cases: Case::ALL.map(Case::name).to_vec(), rounds: Vec::new() };
    for round in 1..=rounds {
        let scratch = tempfile::Builder::new().prefix("work-").tempdir_in(dir)?;
        let server = Server::start(&ours.s3, &scratch.path().join("s3"))?;
        let bench = Bench { ours, inputs, server, scratch: scratch.path() };
        // What is uploaded alone; made again where it is measured.
        succeed(&mut bench.convert(&bench.scratch.join("put.qcow2")))?;
        series.rounds.push(in_turn(round, &Case::ALL, |case| bench.case(case))?);
    }
    Ok(series)
}

/// Our time as a multiple of the slower one of compressing and uploading.
pub fn ratio(series: &Series) -> f64 {
    report::ratio(&series.rounds, |round| report::wall(&round[2]).max(report::wall(&round[3])))
}

impl Bench<'_> {
    /// Runs one case, and compares what it made with what it was made from; the comparison is not in its time.
    fn case(&self, case: Case) -> anyhow::Result<Sample> {
        let (position, cpu) = (self.server.position()?, self.server.cpu()?);
        let command = match case {
            Case::Berth => self.berth(),
            Case::ConvertThenPut => self.convert_then_put()?,
            Case::Compress => {
                let mut command = Command::new("zstd");
                command.args(["-1", "-T0", "--quiet", "--force", "-o", "/dev/null"]).arg(&self.inputs.raw);
                command
            }
            Case::Put => self.put(&self.scratch.join("put.qcow2"), "put.qcow2"),
        };
        let (cost, _) = timed(&command, self.scratch)?;
        let server_cpu = self.server.cpu()?.saturating_sub(cpu);
        let stored = match case {
            Case::Compress => Arrived::default(),
            _ => self.server.arrived(position)?,
        };
        match case {
            Case::Berth => self.compare("berth.qcow2")?,
            Case::ConvertThenPut => self.compare("peer.qcow2")?,
            Case::Put => self.compare("put.qcow2")?,
            Case::Compress => {}
        }
        Ok(Sample { cost, server_cpu, stored })
    }

    fn berth(&self) -> Command {
        let mut command = Command::new(&self.ours.node);
        command
            .args(["transfer", "--key", "berth.qcow2", "--format", "qcow2-zstd"])
            .args(["--store-endpoint", &self.server.endpoint, "--bucket", BUCKET, "--work-dir"])
            .arg(self.scratch.join("work"))
            .arg(&self.inputs.raw)
            .env("AWS_ACCESS_KEY_ID", KEYS.0)
            .env("AWS_SECRET_ACCESS_KEY", KEYS.1)
            .env("AWS_EC2_METADATA_DISABLED", "true");
        command
    }

    fn convert(&self, to: &Path) -> Command {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"]);
        command.arg(&self.inputs.raw).arg(to);
        command
    }

    fn put(&self, file: &Path, key: &str) -> Command {
        let mut command = Server::curl();
        command.arg("--upload-file").arg(file).arg(self.server.url(key));
        command
    }

    /// Both in one shell, so that they are measured together.
    fn convert_then_put(&self) -> anyhow::Result<Command> {
        let file = self.scratch.join("peer.qcow2");
        let words = |command: &Command| -> anyhow::Result<String> {
            let words = std::iter::once(command.get_program()).chain(command.get_args());
            let quoted = words.map(|word| {
                let word = word.to_str().context("a path that is no text")?;
                Ok(format!("'{}'", word.replace('\'', "'\\''")))
            });
            Ok(quoted.collect::<anyhow::Result<Vec<_>>>()?.join(" "))
        };
        let script =
            format!("{} && {}", words(&self.convert(&file))?, words(&self.put(&file, "peer.qcow2"))?);
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]);
        Ok(shell)
    }

    /// What was stored is fetched with curl, checked by the tool that owns the format, and compared with the disk.
    fn compare(&self, key: &str) -> anyhow::Result<()> {
        let got = self.scratch.join("got.qcow2");
        succeed(Server::curl().arg("--output").arg(&got).arg(self.server.url(key)))?;
        succeed(Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&got))?;
        let mut compare = Command::new("qemu-img");
        succeed(compare.args(["compare", "-f", "qcow2", "-F", "raw"]).arg(&got).arg(&self.inputs.raw))?;
        fs::remove_file(&got).context("removing the fetched file")
    }
}
