//! Images whose writing is given up and resumed, at random, are the same as those that are not.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

mod common;

use berth_core::units::Bytes;
use berth_image::{BLOCK, Compression, OnePassWriter, Output, OutputFormat, PartWriter, WriteError};
use common::Numbers;
use common::disk::{Disk, FILLS, Fill, feed, step_parts, write, write_parts};
use proptest::prelude::*;

fn formats() -> impl Strategy<Value = OutputFormat> {
    prop_oneof![
        Just(OutputFormat::Raw),
        Just(OutputFormat::Qcow2 { compression: Compression::None }),
        Just(OutputFormat::Qcow2 { compression: Compression::Zlib }),
        Just(OutputFormat::Qcow2 { compression: Compression::Zstd }),
        Just(OutputFormat::Vmdk),
        Just(OutputFormat::Vhd),
    ]
}

/// Disks of up to `blocks` blocks, of which some are filled; the last one is seldom whole.
fn disks(blocks: u64) -> impl Strategy<Value = Disk> {
    let filled = prop::collection::vec((0..blocks, 0..FILLS.len(), any::<u64>()), 0..16);
    (1..=blocks * 4096, filled).prop_map(|(sectors, filled)| {
        let mut disk = Disk::new(Bytes(sectors * 512));
        for (block, fill, seed) in filled {
            if Bytes(block * BLOCK.0) < disk.size {
                disk.fill(block, FILLS[fill], &mut Numbers(seed));
            }
        }
        disk
    })
}

fn output(format: OutputFormat, disk: &Disk) -> Output {
    Output { format, virtual_size: disk.size, level: None, id: [7; 16] }
}

/// Writes the disk with a state and a new writer at each of these blocks.
fn write_resumed(output: Output, disk: &Disk, stops: &[u64]) -> Vec<u8> {
    let mut writer = OnePassWriter::new(output).unwrap();
    let mut body = Vec::new();
    for stop in stops {
        let until = Bytes(stop * BLOCK.0).min(disk.size).max(writer.position());
        feed(&mut writer, disk, until, &mut body);
        let state = writer.state();
        let resumed = OnePassWriter::resume(&state).unwrap();
        assert_eq!((resumed.position(), resumed.body_len()), (writer.position(), writer.body_len()));
        assert_eq!((resumed.output(), resumed.state()), (&output, state));
        writer = resumed;
    }
    feed(&mut writer, disk, disk.size, &mut body);
    let head = writer.finish(&mut body).unwrap();
    [head, body].concat()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn resumed_at_any_block(
        format in formats(),
        disk in disks(24),
        mut stops in prop::collection::vec(0..25_u64, 1..6),
    ) {
        stops.sort_unstable();
        let output = output(format, &disk);
        prop_assert!(write_resumed(output, &disk, &stops) == write(output, &disk));
    }

    /// Tables of 512 MiB and of 32 MiB, sparse.
    #[test]
    fn resumed_beside_tables(
        format in formats().prop_filter("raw has no tables", |format| *format != OutputFormat::Raw),
        disk in disks(1100),
        mut stops in prop::collection::vec(0..1100_u64, 1..6),
    ) {
        stops.extend([15, 16, 17, 255, 256, 257]);
        stops.sort_unstable();
        let output = output(format, &disk);
        prop_assert!(write_resumed(output, &disk, &stops) == write(output, &disk));
    }

    /// A hostile state is an error or a writer, never a panic, and memory stays small.
    #[test]
    fn garbled_states(
        format in formats(),
        size in 1..4096_u64 * 4096,
        at in 0..600_u64,
        sealed in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut disk = Disk::new(Bytes(size * 512));
        disk.fill(0, Fill::Mixed, &mut Numbers(at));
        let mut writer = OnePassWriter::new(output(format, &disk)).unwrap();
        if format != OutputFormat::Raw {
            feed(&mut writer, &disk, Bytes(at * BLOCK.0).min(disk.size), &mut Vec::new());
        }
        let state = writer.state();
        let mut garbled = if sealed { state.clone() } else { zstd::bulk::decompress(&state[1..], 4 << 20).unwrap() };
        for (index, value) in changes {
            let index = index.index(garbled.len());
            garbled[index] = value;
        }
        garbled.truncate(cut.map_or(garbled.len(), |cut| cut.index(garbled.len())));
        if !sealed {
            garbled = [&state[..1], &zstd::bulk::compress(&garbled, 1).unwrap()].concat();
        }
        match OnePassWriter::resume(&garbled) {
            Err(WriteError::State { .. } | WriteError::StateVersion { .. }) => {}
            Err(other) => prop_assert!(!sealed, "{other}"),
            Ok(_) if sealed => prop_assert!(garbled == state, "damage went unnoticed"),
            Ok(mut resumed) => {
                let size = resumed.output().virtual_size;
                let mut body = Vec::new();
                if resumed.output().format != OutputFormat::Raw {
                    resumed.zeros(size, &mut body).unwrap();
                    prop_assert!(resumed.finish(&mut body).is_ok());
                }
            }
        }
        let _ = PartWriter::resume(&garbled);
        let _ = PartWriter::resume(&[&[0; 32], garbled.as_slice()].concat());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn parts_make_up_the_object(format in formats(), seed in any::<u64>(), blocks in 1..48_u64) {
        let mut numbers = Numbers(seed);
        let mut disk = Disk::new(Bytes(blocks * BLOCK.0 - 512 * (seed % 4096)));
        (0..blocks).for_each(|block| {
            let fill = [Fill::Random, Fill::Random, Fill::Mixed, Fill::Text, Fill::Zeros][numbers.below(5)];
            disk.fill(block, fill, &mut numbers);
        });
        let output = output(format, &disk);
        let plan = output.plan().unwrap();
        let parts = write_parts(output, &disk, &mut numbers, 4);
        prop_assert!(parts.values().flatten().copied().collect::<Vec<_>>() == write(output, &disk));
        prop_assert!(parts.keys().copied().eq(1..=u32::try_from(parts.len()).unwrap()));
        let body: Vec<_> = parts.values().skip(usize::from(plan.head_len > Bytes::ZERO && !plan.whole)).collect();
        for part in &body[..body.len() - 1] {
            prop_assert_eq!(Bytes(part.len() as u64), plan.part_size);
        }
        prop_assert!(plan.whole || parts.len() == 1 || parts[&1].len() >= 5 << 20);
    }
}

/// Every damage to a single byte is noticed, or does not matter.
#[test]
fn damaged_states() {
    let mut disk = Disk::new(Bytes::mib(600));
    for block in 0..20 {
        disk.fill(block * 7, Fill::Mixed, &mut Numbers(block));
    }
    for format in
        [OutputFormat::Qcow2 { compression: Compression::Zstd }, OutputFormat::Vmdk, OutputFormat::Vhd]
    {
        let mut writer = OnePassWriter::new(output(format, &disk)).unwrap();
        feed(&mut writer, &disk, Bytes::mib(280), &mut Vec::new());
        let state = writer.state();
        for index in 0..state.len() {
            for change in [1, 4, 0x10, 0x80] {
                let mut damaged = state.clone();
                damaged[index] ^= change;
                match OnePassWriter::resume(&damaged) {
                    Err(WriteError::State { what: "it is damaged" } | WriteError::StateVersion { .. }) => {}
                    Err(error) => panic!("{format:?}: byte {index}: {error}"),
                    Ok(resumed) => assert!(resumed.state() == state, "{format:?}: byte {index}"),
                }
            }
            assert!(OnePassWriter::resume(&state[..index]).is_err());
        }
    }
}

/// Content that changed between two lives would leave an object of two halves.
#[test]
fn changed_content_is_noticed() {
    let mut disk = Disk::new(Bytes::mib(64));
    (0..32).for_each(|block| disk.fill(block, Fill::Random, &mut Numbers(block)));
    // So that no part ends with a block.
    disk.fill(0, Fill::Mixed, &mut Numbers(0));
    let output = output(OutputFormat::Qcow2 { compression: Compression::Zstd }, &disk);
    let mut writer = PartWriter::new(output).unwrap();
    let part = loop {
        if let Some(part) = step_parts(&mut writer, &disk).unwrap() {
            break part;
        }
    };
    let mut writer = PartWriter::resume(&part.resume.unwrap()).unwrap();
    disk.fill(writer.position().0 / BLOCK.0, Fill::Random, &mut Numbers(99));
    let error = loop {
        match step_parts(&mut writer, &disk) {
            Ok(None) => {}
            Ok(Some(_)) => panic!("a part of both"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, WriteError::Diverged), "{error}");
}

#[test]
fn what_is_not_in_order_is_refused() {
    let disk = Disk::new(Bytes(5 << 20));
    let output = output(OutputFormat::Raw, &disk);
    let mut writer = OnePassWriter::new(output).unwrap();
    let encoder = writer.encoder();
    let (mut body, block) = (Vec::new(), vec![1; 2 << 20]);
    let wrong = encoder.encode(BLOCK, &block[1..]).unwrap_err();
    assert!(
        matches!(wrong, WriteError::BlockLength { expected: 2_097_152, found: 2_097_151, .. }),
        "{wrong}"
    );
    let wrong = encoder.encode(Bytes(512), &block).unwrap_err();
    assert!(matches!(wrong, WriteError::BlockLength { expected: 0, .. }), "{wrong}");
    assert!(encoder.encode(Bytes(4 << 20), &block[..1 << 20]).is_ok());
    assert!(encoder.encode(Bytes(6 << 20), &[]).is_err());
    let second = encoder.encode(BLOCK, &block).unwrap();
    let wrong = writer.append(&second, &mut body).unwrap_err();
    assert!(matches!(wrong, WriteError::OutOfOrder { expected: Bytes(0), found: BLOCK }), "{wrong}");
    for until in [Bytes(512), Bytes(6 << 20), Bytes(8 << 20)] {
        assert!(matches!(writer.zeros(until, &mut body), Err(WriteError::OutOfOrder { .. })));
    }
    let other = Output { virtual_size: Bytes(7 << 20), ..output };
    let mut other = OnePassWriter::new(other).unwrap();
    assert!(matches!(other.append(&second, &mut body), Err(WriteError::OtherOutput)));
    assert_eq!(writer.body_len(), Bytes::ZERO);
    assert!(matches!(writer.finish(&mut body), Err(WriteError::Incomplete { .. })));
    assert!(body.is_empty());
}

#[test]
fn limits_are_named() {
    let plan = |format, size| Output { format, virtual_size: Bytes(size), level: None, id: [7; 16] }.plan();
    let zstd = OutputFormat::Qcow2 { compression: Compression::Zstd };
    assert!(matches!(plan(zstd, 0), Err(WriteError::Empty)));
    assert!(matches!(plan(zstd, 1000), Err(WriteError::Unaligned { size: Bytes(1000) })));
    assert!(plan(zstd, 48_000 << 30).is_ok());
    for format in [zstd, OutputFormat::Raw] {
        for size in [50_001 << 30, u64::MAX - 511] {
            let error = plan(format, size).unwrap_err().to_string();
            assert!(error.ends_with("an object has at most 10000 parts of 5 GiB"), "{error}");
        }
    }
    for (format, limit) in [(OutputFormat::Vmdk, 2000 << 30), (OutputFormat::Vhd, 2040_u64 << 30)] {
        assert!(plan(format, limit).unwrap().worst_case < Bytes::gib(2048));
        let error = plan(format, limit + 512).unwrap_err();
        assert!(matches!(error, WriteError::TooLarge { .. }), "{error}");
        assert!(error.to_string().contains(&format!("{} GiB", limit >> 30)), "{error}");
    }
    let level =
        |format, level| Output { format, virtual_size: Bytes(512), level: Some(level), id: [7; 16] }.plan();
    assert!(level(zstd, 19).is_ok());
    assert!(matches!(level(zstd, 20), Err(WriteError::Level { level: 20, .. })));
    assert!(matches!(level(OutputFormat::Raw, 1), Err(WriteError::Level { .. })));

    let plan = plan(zstd, 256 << 30).unwrap();
    assert_eq!((plan.head_len, plan.part_size, plan.whole), (Bytes::mib(5), Bytes::mib(27), false));
    assert!(plan.worst_case < Bytes::mib((257 << 10) + 5));
}
