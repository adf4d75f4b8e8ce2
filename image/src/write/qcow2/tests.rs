use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::write::state;

const ZSTD: OutputFormat = OutputFormat::Qcow2 { compression: Compression::Zstd };

/// A number below `limit` that looks random and is the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    /// What a cluster is stored as: mostly compressed, to a length below this.
    fn stored(&mut self, longest: u64) -> u16 {
        match self.below(20) {
            0 => 0,
            1 if longest > 1000 => PLAIN,
            _ => u16::try_from(9 + self.below(longest - 9)).unwrap(),
        }
    }
}

fn writer(size: Bytes) -> (Output, PartPlan, Qcow2Writer) {
    let output = Output { format: ZSTD, virtual_size: size, level: None, id: [7; 16] };
    let plan = output.plan().unwrap();
    (output, plan, Qcow2Writer::new(&output, &plan))
}

/// The state of a writer that has come this far, in clusters, and the writer that goes on from it.
fn resumed(output: &Output, plan: &PartPlan, writer: &Qcow2Writer, clusters: u64) -> (usize, Qcow2Writer) {
    let mut save = Save::new();
    writer.save(&mut save);
    let sealed = save.seal();
    let content = state::open(&sealed).unwrap();
    let mut load = Load::new(&content);
    let position = Bytes(clusters * CLUSTER).min(output.virtual_size);
    let resumed = Qcow2Writer::load(output, plan, position, &mut load).unwrap();
    load.end().unwrap();
    (sealed.len(), resumed)
}

/// Appends to a file what is not zero.
fn write_sparse(file: &File, at: u64, bytes: &[u8]) {
    for (page, content) in bytes.chunks(4096).enumerate() {
        if content.iter().fold(0, |all, byte| all | byte) != 0 {
            file.write_all_at(content, at + page as u64 * 4096).unwrap();
        }
    }
}

fn check(path: &Path) {
    let Ok(run) = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output() else {
        assert!(std::env::var_os("CI").is_none(), "qemu-img is not installed");
        println!("SKIPPED qemu-img is not installed");
        return;
    };
    assert!(
        run.status.success(),
        "{}{}",
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr)
    );
}

/// More than 4 GiB of file, so two refcount blocks in the midst of it. The clusters' content is zeros here: nobody looks.
#[test]
fn refcounts_of_a_large_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let file = File::create(&path).unwrap();
    for (seed, longest) in [(1, 66_000), (2, 65_000), (3, 40_000)] {
        let (output, plan, mut writer) = writer(Bytes::gib(20));
        let mut numbers = Numbers(seed);
        let zeros = vec![0; 1 << 16];
        let mut out = Vec::new();
        file.set_len(0).unwrap();
        for cluster in 0..writer.geometry.clusters {
            let at = writer.end();
            // The longest ones are as they are.
            let stored = match numbers.stored(longest.min(LONGEST_PACKED as u64)) {
                _ if longest > 1 << 16 => PLAIN,
                stored => stored,
            };
            let len = if stored == PLAIN { 1 << 16 } else { usize::from(stored) };
            writer.push(stored, &zeros[..len], &mut out);
            write_sparse(&file, at, &out);
            out.clear();
            if writer.end() > 9 << 29 {
                writer.zeros(output.virtual_size, &mut out);
                break;
            }
            if cluster % 32 == 31 && numbers.below(50) == 0 {
                let (_, again) = resumed(&output, &plan, &writer, cluster + 1);
                assert_eq!(again, writer, "at cluster {cluster}");
            }
        }
        let at = writer.end() - out.len() as u64;
        assert!(writer.refcounts.blocks.len() >= 2);
        let head = writer.finish(&mut out);
        assert_eq!(head.len() as u64, plan.head_len.0);
        file.set_len(at + out.len() as u64).unwrap();
        write_sparse(&file, at, &out);
        write_sparse(&file, 0, &head);
        assert!(Bytes(at + out.len() as u64) <= plan.worst_case);
        check(&path);
    }
}

/// The largest states: lengths and counts that cannot be told shorter, and many tables.
#[test]
fn a_state_is_small() {
    for (longest, dense) in [(65_000, 16), (800, 128)] {
        let (output, plan, mut writer) = writer(Bytes::gib(256));
        let (mut numbers, mut out, mut largest) = (Numbers(longest), Vec::new(), 0);
        let last = writer.geometry.clusters - 32;
        for cluster in 0..last {
            // At first there are only tables, for the sake of time.
            let is_dense = writer.geometry.clusters - cluster < dense << 14 || cluster % ENTRIES == 0;
            let stored = if is_dense { numbers.stored(longest) } else { 0 };
            // Bytes of clusters are not needed for their places.
            writer.push(stored, &[], &mut out);
            out.clear();
            if cluster % 200_000 == 199_999 || cluster + 1 == last {
                let at = (cluster + 1) / 32 * 32;
                if at == cluster + 1 {
                    let (len, again) = resumed(&output, &plan, &writer, at);
                    assert_eq!(again, writer);
                    largest = largest.max(len);
                }
            }
        }
        println!("up to {longest} bytes a cluster: {largest} bytes of state");
        assert!((10 << 10..40 << 10).contains(&largest), "{longest}: {largest}");
    }
}

#[test]
fn the_refcount_table_holds_what_it_counts() {
    for size in [512, 1 << 30, 1 << 41, (1 << 44) - (1 << 20), 1 << 44, 1 << 45, 50_000 << 30] {
        let geometry = Geometry::new(Bytes(size));
        assert!(geometry.refcount_blocks() * 8 <= geometry.refcount_table * CLUSTER, "{size}");
        let (head, body) = bounds(Bytes(size));
        assert!((head.0.max(5 << 20) + body.0) / CLUSTER <= geometry.refcount_blocks() * COUNTS, "{size}");
    }
}
