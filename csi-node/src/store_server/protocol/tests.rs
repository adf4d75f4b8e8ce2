//! The protocol as a client sees it, and what a hostile one may send.
#![allow(clippy::cast_possible_truncation)] // lengths of a few bytes

use berth_core::units::Bytes as Size;
use berth_objectstore::chunks::remote::{Extent, Piece};
use bytes::Bytes;
use proptest::prelude::*;

use super::answer::{self, Part};
use super::negotiation::{Negotiation, Step, greeting};
use super::request::{Command, REQUEST, decode};
use super::{Agreed, Broken, Errno, ExportInfo, MOST_OPTION, MOST_OPTIONS};

const ALL: Agreed = Agreed { structured: true, allocation: true };

fn export() -> ExportInfo {
    ExportInfo {
        name: "sha256:00".to_owned(),
        description: "an image".to_owned(),
        size: Size::mib(100),
        preferred: Size::kib(256),
        longest: Size::mib(32),
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = data.len() as u32;
    [&b"IHAVEOPT"[..], &number.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

fn text(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text].concat()
}

fn info(number: u32, name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let wanted: Vec<u8> = wanted.iter().flat_map(|kind| kind.to_be_bytes()).collect();
    option(number, &[&text(name)[..], &((wanted.len() / 2) as u16).to_be_bytes(), &wanted].concat())
}

fn meta(number: u32, name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let all: Vec<u8> = queries.iter().flat_map(|query| text(query)).collect();
    option(number, &[&text(name)[..], &(queries.len() as u32).to_be_bytes(), &all].concat())
}

/// How a negotiation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    /// Requests follow, after so many bytes.
    Begun(Agreed, usize),
    /// As the client wished.
    Ended,
    /// It waits for more.
    Waits,
    Broken(Broken),
}

/// Feeds a client's bytes in pieces of these lengths, over and over.
fn negotiate(export: &ExportInfo, client: &[u8], pieces: &[usize]) -> (Vec<u8>, End) {
    let (mut negotiation, mut sent) = (Negotiation::new(export), Vec::new());
    let (mut from, mut until, mut piece) = (0, 0, pieces.iter().cycle());
    loop {
        match negotiation.advance(&client[from..until]) {
            Ok(Step::Need(len)) => {
                assert!(len > until - from, "it needs what it has");
                if until == client.len() {
                    return (sent, End::Waits);
                }
                until = client.len().min(until + piece.next().unwrap());
            }
            Ok(Step::Answer { used, send }) => {
                assert!(used > 0 && used <= until - from);
                from += used;
                sent.extend(send);
            }
            Ok(Step::Begin { used, send, agreed }) => {
                sent.extend(send);
                return (sent, End::Begun(agreed, from + used));
            }
            Ok(Step::End { send }) => {
                sent.extend(send);
                return (sent, End::Ended);
            }
            Err(broken) => return (sent, End::Broken(broken)),
        }
    }
}

/// The answers: of which option, of which kind, with what data.
fn answers(mut sent: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut answers = Vec::new();
    while !sent.is_empty() {
        assert_eq!(sent[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        let word = |at: usize| u32::from_be_bytes(sent[at..at + 4].try_into().unwrap());
        let (number, kind, length) = (word(8), word(12), word(16) as usize);
        answers.push((number, kind, sent[20..20 + length].to_vec()));
        sent = &sent[20 + length..];
    }
    answers
}

fn with_flags(flags: u32, options: &[Vec<u8>]) -> Vec<u8> {
    [&flags.to_be_bytes()[..], &options.concat()].concat()
}

#[test]
fn a_client_of_today_gets_everything() {
    let client = with_flags(
        3,
        &[
            option(8, b""),
            meta(9, b"", &[]),
            meta(9, b"", &[b"base:"]),
            meta(9, b"", &[b"qemu:"]),
            meta(10, b"sha256:00", &[b"base:allocation", b"qemu:x"]),
            option(3, b""),
            info(6, b"absent", &[]),
            info(7, b"sha256:00", &[1, 2, 3]),
        ],
    );
    let (sent, end) = negotiate(&export(), &client, &[client.len()]);
    assert_eq!(end, End::Begun(ALL, client.len()));
    let (size, ack) = ((100_u64 << 20).to_be_bytes(), 1);
    let context = |id: u32| [&id.to_be_bytes()[..], b"base:allocation"].concat();
    let told = |kind: u16, data: &[u8]| (7, 3, [&kind.to_be_bytes()[..], data].concat());
    let sizes = [1_u32.to_be_bytes(), (256_u32 << 10).to_be_bytes(), (32_u32 << 20).to_be_bytes()].concat();
    let wanted = [
        (8, ack, vec![]),
        (9, 4, context(0)),
        (9, ack, vec![]),
        (9, 4, context(0)),
        (9, ack, vec![]),
        (9, ack, vec![]),
        (10, 4, context(1)),
        (10, ack, vec![]),
        (3, 2, text(b"sha256:00")),
        (3, ack, vec![]),
        (6, 1 << 31 | 6, b"no such export".to_vec()),
        // has flags, read-only, flush, DF, several connections
        told(0, &[&size[..], &0x187_u16.to_be_bytes()].concat()),
        told(1, b"sha256:00"),
        told(2, b"an image"),
        told(3, &sizes),
        (7, ack, vec![]),
    ];
    assert_eq!(answers(&sent), wanted);
    assert_eq!(&greeting(), b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn a_client_of_long_ago_gets_size_and_flags() {
    for (flags, padding) in [(1, 124), (3, 0)] {
        let client = with_flags(flags, &[option(1, b"")]);
        let (sent, end) = negotiate(&export(), &client, &[3]);
        assert_eq!(end, End::Begun(Agreed::default(), client.len()));
        let head = [&(100_u64 << 20).to_be_bytes()[..], &0x107_u16.to_be_bytes()].concat();
        assert!(sent.starts_with(&head) && sent.len() == 10 + padding);
        assert!(sent[10..].iter().all(|byte| *byte == 0));
    }
    let (_, end) = negotiate(&export(), &with_flags(1, &[option(1, b"other")]), &[9]);
    assert_eq!(end, End::Broken(Broken::Export));
}

#[test]
fn what_a_client_may_not_do_is_refused_or_ends_it() {
    let refused = |options: &[Vec<u8>]| {
        let (sent, end) = negotiate(&export(), &with_flags(3, options), &[7]);
        assert_eq!(end, End::Waits);
        answers(&sent).last().unwrap().1
    };
    let (unsupported, invalid) = (1 << 31 | 1, 1 << 31 | 3);
    assert_eq!(refused(&[option(5, b"")]), unsupported, "no TLS");
    assert_eq!(refused(&[option(11, b"")]), unsupported, "no extended headers");
    assert_eq!(refused(&[option(8, b"x")]), invalid);
    assert_eq!(refused(&[option(8, b""), option(8, b"")]), invalid);
    assert_eq!(refused(&[option(3, b"x")]), invalid);
    assert_eq!(refused(&[meta(10, b"", &[b"base:allocation"])]), invalid, "before structured replies");
    for short in [&b""[..], b"\0\0\0\x09sha", b"\0\0\0\0\0", b"\0\0\0\0\0\x01"] {
        assert_eq!(refused(&[option(7, short)]), invalid, "{short:?}");
    }
    let many = [&text(b"")[..], &u32::MAX.to_be_bytes()].concat();
    assert_eq!(refused(&[option(9, &many)]), invalid);

    let ends = |client: &[u8]| negotiate(&export(), client, &[5]).1;
    assert_eq!(ends(&with_flags(0, &[])), End::Broken(Broken::ClientFlags(0)));
    assert_eq!(ends(&with_flags(7, &[])), End::Broken(Broken::ClientFlags(7)));
    assert!(matches!(
        ends(&with_flags(3, &[b"GET / HTTP/1.1\r\n\r\n".to_vec()])),
        End::Broken(Broken::OptionMagic(_))
    ));
    let long = [&b"IHAVEOPT"[..], &7_u32.to_be_bytes(), &(MOST_OPTION + 1).to_be_bytes()].concat();
    assert!(matches!(ends(&with_flags(3, &[long])), End::Broken(Broken::OptionLength { option: 7, .. })));
    let many = vec![option(99, b""); MOST_OPTIONS as usize + 1];
    assert_eq!(ends(&with_flags(3, &many)), End::Broken(Broken::Options));
    assert_eq!(ends(&with_flags(3, &[option(2, b"why not")])), End::Ended);
}

#[test]
fn a_context_holds_for_the_export_that_it_was_selected_for() {
    let agreed = |options: &[Vec<u8>]| match negotiate(&export(), &with_flags(3, options), &[1000]).1 {
        End::Begun(agreed, _) => agreed.allocation,
        other => panic!("{other:?}"),
    };
    let set = |name: &[u8], queries: &[&[u8]]| meta(10, name, queries);
    let (structured, go) = (option(8, b""), info(7, b"", &[]));
    assert!(agreed(&[structured.clone(), set(b"", &[b"base:allocation"]), go.clone()]));
    assert!(!agreed(&[structured.clone(), set(b"sha256:00", &[b"base:allocation"]), go.clone()]));
    assert!(!agreed(&[structured.clone(), set(b"", &[b"base:"]), go.clone()]), "a selection names one");
    let again = [structured, set(b"", &[b"base:allocation"]), set(b"", &[]), go];
    assert!(!agreed(&again), "the last selection counts");
}

fn request(flags: u16, kind: u16, offset: u64, length: u32) -> [u8; REQUEST] {
    let mut bytes = [0; REQUEST];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&7_u64.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

#[test]
fn requests_are_what_was_agreed_and_within_the_export() {
    let asked = |bytes: [u8; REQUEST], agreed| {
        let request = decode(&bytes, &export(), agreed).unwrap();
        assert_eq!(request.cookie, 7);
        request.command
    };
    let (end, plain) = (100 << 20, Agreed::default());
    let refused = |errno, follows, chunked| Command::Refused { errno, follows: Size(follows), chunked };
    let invalid = refused(Errno::Invalid, 0, true);
    let read = |offset, len, whole| Command::Read { offset, len: Size(len), whole };
    assert_eq!(asked(request(0, 0, 5, 6), plain), read(5, 6, false));
    assert_eq!(asked(request(4, 0, end - 1, 1), ALL), read(end - 1, 1, true));
    assert_eq!(asked(request(0, 0, 0, 32 << 20), ALL), read(0, 32 << 20, false));
    for (flags, offset, length, agreed) in [
        (4, 0, 1, plain),
        (1, 0, 1, ALL),
        (0, 0, 0, ALL),
        (0, end, 1, ALL),
        (0, end - 1, 2, ALL),
        (0, u64::MAX, 1, ALL),
        (0, 0, (32 << 20) + 1, ALL),
    ] {
        assert_eq!(asked(request(flags, 0, offset, length), agreed), invalid, "{flags} {offset} {length}");
    }
    let status = |len, one| Command::Status { offset: 0, len: Size(len), one };
    assert_eq!(asked(request(0, 7, 0, 100 << 20), ALL), status(100 << 20, false));
    assert_eq!(asked(request(8, 7, 0, 1), ALL), status(1, true));
    assert_eq!(asked(request(0, 7, 0, 1), plain), invalid);
    assert_eq!(asked(request(0, 7, 0, (100 << 20) + 1), ALL), invalid);
    assert_eq!(asked(request(0, 1, 0, 4096), ALL), refused(Errno::Perm, 4096, false));
    assert_eq!(asked(request(0, 4, 0, 4096), ALL), refused(Errno::Perm, 0, false));
    assert_eq!(asked(request(2, 6, 0, 4096), ALL), refused(Errno::Perm, 0, false));
    assert_eq!(asked(request(0, 3, 0, 0), ALL), Command::Flush);
    assert_eq!(asked(request(0, 2, 0, 0), ALL), Command::Disconnect);
    assert_eq!(asked(request(0, 99, 0, 0), ALL), refused(Errno::Invalid, 0, false));
    let long = decode(&request(0, 1, 0, (32 << 20) + 1), &export(), ALL);
    assert!(matches!(long, Err(Broken::WriteLength(_))), "{long:?}");
    let other = decode(&[0x25; REQUEST], &export(), ALL);
    assert_eq!(other, Err(Broken::RequestMagic(0x2525_2525)));
}

/// All of an answer as bytes.
fn wire(parts: Vec<Part>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            Part::Bytes(more) => bytes.extend(more),
            Part::Zeros(len) => bytes.resize(bytes.len() + usize::try_from(len.0).unwrap(), 0),
        }
    }
    bytes
}

/// The chunks of an answer: flags, type, payload.
fn chunks(mut bytes: &[u8]) -> Vec<(u16, u16, Vec<u8>)> {
    let mut chunks = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(bytes[..4], 0x668e_33ef_u32.to_be_bytes());
        assert_eq!(bytes[8..16], 7_u64.to_be_bytes(), "the cookie");
        let short = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let length = u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize;
        chunks.push((short(4), short(6), bytes[20..20 + length].to_vec()));
        bytes = &bytes[20 + length..];
    }
    chunks
}

#[test]
fn data_is_sent_in_the_form_that_was_agreed_on() {
    let pieces =
        || vec![Piece::Data(Bytes::from_static(b"abc")), Piece::Zero(Size(5)), Piece::Data("d".into())];
    let simple = wire(answer::data(7, 100, pieces(), false, Agreed::default()));
    assert_eq!(simple[..16], [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &7_u64.to_be_bytes()].concat());
    assert_eq!(&simple[16..], b"abc\0\0\0\0\0d");
    let at = |offset: u64, data: &[u8]| [&offset.to_be_bytes()[..], data].concat();
    let parts = chunks(&wire(answer::data(7, 100, pieces(), false, ALL)));
    let hole = at(103, &5_u32.to_be_bytes());
    assert_eq!(parts, [(0, 1, at(100, b"abc")), (0, 2, hole), (1, 1, at(108, b"d"))]);
    let whole = chunks(&wire(answer::data(7, 100, pieces(), true, ALL)));
    assert_eq!(whole, [(1, 1, at(100, b"abc\0\0\0\0\0d"))]);
    let zeros = chunks(&wire(answer::data(7, 0, vec![Piece::Zero(Size(9))], true, ALL)));
    assert_eq!(zeros, [(1, 2, at(0, &9_u32.to_be_bytes()))]);
    let extents = [Extent { len: Size(5), zero: true }, Extent { len: Size(6), zero: false }];
    let words: Vec<u8> = [1_u32, 5, 3, 6, 0].into_iter().flat_map(u32::to_be_bytes).collect();
    assert_eq!(chunks(&wire(answer::status(7, &extents))), [(1, 5, words)]);
    let failed = chunks(&wire(answer::failure(7, Errno::Io, ALL)));
    assert_eq!(failed, [(1, 0x8001, vec![0, 0, 0, 5, 0, 0])]);
    assert_eq!(wire(answer::failure(7, Errno::Io, Agreed::default()))[4..8], 5_u32.to_be_bytes());
}

/// Bytes that are mostly the protocol, so that a hostile client gets far.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let data = prop::collection::vec(any::<u8>(), 0..40);
    let name =
        prop_oneof![Just(Vec::new()), Just(b"sha256:00".to_vec()), prop::collection::vec(any::<u8>(), 0..9)];
    let query = prop_oneof![
        Just(b"base:allocation".to_vec()),
        Just(b"base:".to_vec()),
        prop::collection::vec(any::<u8>(), 0..9)
    ];
    let part = prop_oneof![
        (0_u32..14, data.clone()).prop_map(|(number, data)| option(number, &data)),
        (6_u32..8, name.clone(), prop::collection::vec(0_u16..5, 0..4))
            .prop_map(|(number, name, wanted)| info(number, &name, &wanted)),
        (9_u32..11, name, prop::collection::vec(query, 0..3)).prop_map(|(number, name, queries)| {
            let queries: Vec<&[u8]> = queries.iter().map(Vec::as_slice).collect();
            meta(number, &name, &queries)
        }),
        Just(option(8, b"")),
        data,
    ];
    (prop_oneof![9 => Just(3_u32), 1 => any::<u32>()], prop::collection::vec(part, 0..12))
        .prop_map(|(flags, parts)| with_flags(flags, &parts))
}

proptest! {
    #[test]
    fn no_client_disturbs_a_negotiation_and_it_does_not_matter_how_its_bytes_arrive(
        client in hostile(),
        pieces in prop::collection::vec(1_usize..50, 1..6),
    ) {
        let whole = negotiate(&export(), &client, &[client.len().max(1)]);
        prop_assert_eq!(negotiate(&export(), &client, &pieces), whole.clone());
        prop_assert!(whole.0.len() < 64 << 10, "an answer is bounded");
    }

    #[test]
    fn any_bytes_are_a_negotiation_that_waits_or_ends(client in prop::collection::vec(any::<u8>(), 0..300)) {
        negotiate(&export(), &client, &[1, 17]);
    }

    #[test]
    fn whatever_is_read_lies_within_the_export(
        rest in prop::array::uniform24(any::<u8>()),
        kind in 0_u16..10,
        (offset, length) in (0_u64..120 << 20, 0_u32..40 << 20),
        near in any::<bool>(),
        structured in any::<bool>(),
        allocation in any::<bool>(),
    ) {
        let mut bytes = request(0, kind, offset, length);
        if !near {
            bytes[4..].copy_from_slice(&rest);
        }
        let export = export();
        match decode(&bytes, &export, Agreed { structured, allocation }).map(|request| request.command) {
            Ok(Command::Read { offset, len, whole }) => {
                prop_assert!(len.0 > 0 && len <= export.longest && offset + len.0 <= export.size.0);
                prop_assert!(structured || !whole);
            }
            Ok(Command::Status { offset, len, .. }) => {
                prop_assert!(allocation && len.0 > 0 && offset + len.0 <= export.size.0);
            }
            Ok(Command::Refused { follows, .. }) => prop_assert!(follows <= Size::mib(32)),
            Ok(Command::Flush | Command::Disconnect) | Err(_) => {}
        }
    }

    #[test]
    fn an_answer_says_exactly_what_was_read(
        pieces in prop::collection::vec((any::<bool>(), 1_usize..100), 1..20),
        whole in any::<bool>(),
    ) {
        let pieces: Vec<Piece> = pieces
            .into_iter()
            .map(|(zero, len)| if zero { Piece::Zero(Size(len as u64)) } else { Piece::Data(vec![7; len].into()) })
            .collect();
        let wanted = wire(pieces.iter().cloned().map(Part::from).collect());
        let chunks = chunks(&wire(answer::data(7, 50, pieces, whole, ALL)));
        prop_assert!(!whole || chunks.len() == 1);
        let mut found = Vec::new();
        for (at, (flags, kind, payload)) in chunks.iter().enumerate() {
            prop_assert_eq!(*flags == 1, at + 1 == chunks.len(), "the last one, and no other, is the last");
            let (offset, data) = payload.split_first_chunk::<8>().unwrap();
            prop_assert_eq!(u64::from_be_bytes(*offset), 50 + found.len() as u64);
            match kind {
                1 => found.extend_from_slice(data),
                _ => found.resize(found.len() + u32::from_be_bytes(data.try_into().unwrap()) as usize, 0),
            }
        }
        prop_assert_eq!(found, wanted);
    }
}
