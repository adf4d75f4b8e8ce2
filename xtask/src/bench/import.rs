//! A qcow2 file becomes chunks in an image store: what it costs beside chunking alone, decoding alone and a plain upload.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use berth_core::units::Bytes;
use serde_json::Value;

use super::inputs::{Input, Inputs};
use super::measure::{Sample, Series, in_turn, succeed, timed};
use super::programs::Ours;
use super::server::{Arrived, BUCKET, KEYS, Server};

/// What is run in every round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// `berth-node template import` of the qcow2 file into the S3 server.
    Berth,
    /// `casync make` of the raw disk into a local store: neither decoding nor upload.
    Casync,
    /// `qemu-img convert` of the qcow2 file to nothing: decoding alone.
    Decode,
    /// `curl` puts the qcow2 file into the S3 server: upload alone.
    Put,
}

impl Case {
    /// All of them; ours first.
    pub const ALL: [Self; 4] = [Self::Berth, Self::Casync, Self::Decode, Self::Put];

    /// Its name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Berth => "`berth-node template import`",
            Self::Casync => "`casync make` of the raw disk, local store",
            Self::Decode => "`qemu-img convert` to null",
            Self::Put => "PUT of the file (`curl`)",
        }
    }
}

/// A place to work in.
struct Bench<'b> {
    ours: &'b Ours,
    inputs: &'b Inputs,
    server: Server,
    scratch: &'b Path,
}

/// Runs every case of every input in every round.
pub fn run(ours: &Ours, inputs: &Inputs, dir: &Path, rounds: u32) -> anyhow::Result<Vec<Series>> {
    let mut series = Vec::new();
    for input in &inputs.files {
        let size = fs::metadata(&input.file).with_context(|| input.file.display().to_string())?.len();
        let title = format!("{} qcow2, a file of {}", input.name, Bytes(size));
        series.push(Series { title, cases: Case::ALL.map(Case::name).to_vec(), rounds: Vec::new() });
    }
    for round in 1..=rounds {
        for (input, series) in inputs.files.iter().zip(&mut series) {
            let scratch = tempfile::Builder::new().prefix("work-").tempdir_in(dir)?;
            let server = Server::start(&ours.s3, &scratch.path().join("s3"))?;
            let bench = Bench { ours, inputs, server, scratch: scratch.path() };
            let samples = in_turn(round, &Case::ALL, |case| bench.case(case, input));
            series.rounds.push(samples.with_context(|| input.name)?);
        }
    }
    Ok(series)
}

impl Bench<'_> {
    /// Runs one case, and compares what it made with what it was made from; the comparison is not in its time.
    fn case(&self, case: Case, input: &Input) -> anyhow::Result<Sample> {
        let (position, cpu) = (self.server.position()?, self.server.cpu()?);
        let command = match case {
            Case::Berth => self.berth(input),
            Case::Casync => self.casync(),
            Case::Decode => self.decode(input),
            Case::Put => self.put(input),
        };
        let (cost, printed) = timed(&command, self.scratch)?;
        let server_cpu = self.server.cpu()?.saturating_sub(cpu);
        let stored = match case {
            Case::Casync => Arrived { bytes: folder_size(&self.scratch.join("local.castr"))?, requests: 0 },
            _ => self.server.arrived(position)?,
        };
        match case {
            Case::Berth => self.compare_berth(position, &printed)?,
            Case::Casync => self.compare_casync("local.castr", "local.caibx")?,
            Case::Put => self.compare_put(input)?,
            // Nothing is left to compare; the input was compared when it was made.
            Case::Decode => {}
        }
        Ok(Sample { cost, server_cpu, stored })
    }

    fn berth(&self, input: &Input) -> Command {
        let mut command = Command::new(&self.ours.node);
        command
            .args(["template", "import", "--output", "json", "--name", "bench/disk"])
            .args([
                "--store-endpoint",
                &self.server.endpoint,
                "--bucket",
                BUCKET,
                "--prefix",
                "store",
                "--work-dir",
            ])
            .arg(self.scratch.join("work"))
            .arg(&input.file)
            .env("AWS_ACCESS_KEY_ID", KEYS.0)
            .env("AWS_SECRET_ACCESS_KEY", KEYS.1)
            .env("AWS_EC2_METADATA_DISABLED", "true");
        command
    }

    /// The same chunk size, digest and compression as an image store's, as far as casync lets them be chosen.
    fn casync(&self) -> Command {
        let mut command = Command::new("casync");
        command
            .args(["make", "--digest=sha256", "--compression=zstd", "--chunk-size=65536:262144:1048576"])
            .arg(format!("--store={}", self.scratch.join("local.castr").display()))
            .arg(self.scratch.join("local.caibx"))
            .arg(&self.inputs.raw);
        command
    }

    fn decode(&self, input: &Input) -> Command {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-n", "-f", "qcow2", "--target-image-opts"]).arg(&input.file);
        command.arg(format!("driver=null-co,size={}", self.inputs.virtual_size.0));
        command
    }

    fn put(&self, input: &Input) -> Command {
        let mut command = Server::curl();
        command.arg("--upload-file").arg(&input.file).arg(self.server.url("file.qcow2"));
        command
    }

    /// Fetches what was stored with curl, and lets casync make the disk of it: no code of ours is in the comparison.
    fn compare_berth(&self, position: usize, printed: &[u8]) -> anyhow::Result<()> {
        let durable: Value = serde_json::from_slice(printed).context("reading what the import printed")?;
        let digest = durable["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:"));
        let digest = digest.context("the import printed no digest")?;
        let store = self.scratch.join("fetched.castr");
        let mut list = String::new();
        for key in self.server.written(position, "store/chunks/")? {
            let chunk = key.trim_start_matches("store/chunks/");
            list.push_str(&fetched(&self.server.url(&key), &store.join(chunk)));
        }
        let index = self.server.url(&format!("store/images/{digest}.caibx"));
        let local = self.scratch.join("fetched.caibx");
        list.push_str(&fetched(&index, &local));
        let names = self.scratch.join("fetch.txt");
        fs::write(&names, list).context("writing curl's list")?;
        succeed(Server::curl().args(["--create-dirs", "--config"]).arg(&names))?;
        self.compare_casync("fetched.castr", "fetched.caibx")
    }

    fn compare_casync(&self, store: &str, index: &str) -> anyhow::Result<()> {
        let out = self.scratch.join("extracted.raw");
        let store = self.scratch.join(store);
        let mut extract = Command::new("casync");
        extract.args(["extract", "--digest=sha256"]).arg(format!("--store={}", store.display()));
        succeed(extract.arg(self.scratch.join(index)).arg(&out))?;
        succeed(Command::new("cmp").arg(&self.inputs.raw).arg(&out))?;
        fs::remove_file(&out).context("removing the extracted disk")?;
        fs::remove_dir_all(&store).context("removing the local store")
    }

    fn compare_put(&self, input: &Input) -> anyhow::Result<()> {
        let got = self.scratch.join("got.qcow2");
        succeed(Server::curl().arg("--output").arg(&got).arg(self.server.url("file.qcow2")))?;
        succeed(Command::new("cmp").arg(&input.file).arg(&got))?;
        fs::remove_file(&got).context("removing the fetched file")
    }
}

/// Two lines of a curl configuration.
fn fetched(url: &str, file: &Path) -> String {
    format!("url = \"{url}\"\noutput = \"{}\"\n", file.display())
}

/// Bytes of the files in a folder and its folders.
fn folder_size(dir: &Path) -> anyhow::Result<Bytes> {
    let mut sum = Bytes::ZERO;
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        let meta = entry.metadata()?;
        let size = if meta.is_dir() { folder_size(&entry.path())? } else { Bytes(meta.len()) };
        sum = sum.saturating_add(size);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_as_large_as_the_files_in_it() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("a")).expect("made");
        fs::write(dir.path().join("a/b"), [0; 5]).expect("written");
        fs::write(dir.path().join("c"), [0; 7]).expect("written");
        assert_eq!(folder_size(dir.path()).expect("read"), Bytes(12));
    }
}
