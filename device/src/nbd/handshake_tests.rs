//! Handshakes with servers that behave, and with all kinds that do not.

use std::os::unix::net::UnixListener;

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

fn greeting(flags: u16) -> Vec<u8> {
    [&MAGIC[..], OPTION_MAGIC, &flags.to_be_bytes()].concat()
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [&REPLY_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length.to_be_bytes(), data]
        .concat()
}

fn export_info(size: u64, flags: u16) -> Vec<u8> {
    let data = [&INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    reply(OPTION_GO, REPLY_INFO, &data)
}

fn block_info(sizes: [u32; 3]) -> Vec<u8> {
    let data = [INFO_BLOCK_SIZE.to_be_bytes().to_vec(), sizes.map(u32::to_be_bytes).concat()].concat();
    reply(OPTION_GO, REPLY_INFO, &data)
}

fn ack() -> Vec<u8> {
    reply(OPTION_GO, REPLY_ACK, &[])
}

/// What comes of a server that says this, whatever it hears, and then closes the connection or stays silent.
fn meet(says: Vec<u8>, then_silent: bool, limit: Duration) -> (Result<Export, HandshakeError>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(&says); // the client may have left
        if !then_silent {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        let mut heard = Vec::new();
        let _ = stream.read_to_end(&mut heard);
        heard
    });
    let outcome = handshake(&path, "disk", limit).map(|(_, export)| export);
    (outcome, server.join().unwrap())
}

fn refused(says: Vec<u8>) -> String {
    meet(says, false, LIMIT).0.unwrap_err().to_string()
}

#[test]
fn an_export_is_opened() {
    let sizes = block_info([512, 4096, 32 << 20]);
    let unknown = reply(OPTION_GO, REPLY_INFO, &[0, 9, 1, 2, 3]);
    let says = [greeting(3), export_info(1 << 40, 0x0103), unknown, sizes, ack()].concat();
    let (export, heard) = meet(says, true, LIMIT);
    let blocks = BlockSizes { minimum: Bytes(512), preferred: Bytes(4096), maximum: Bytes::mib(32) };
    let export = export.unwrap();
    assert_eq!(export, Export { size: Bytes::gib(1024), flags: ExportFlags(0x0103), blocks: Some(blocks) });
    assert!(export.flags.has(ExportFlags::READ_ONLY) && !export.flags.has(ExportFlags::FLUSH));
    let expected: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0c\0\0\0\x04disk\0\x01\0\x03";
    assert_eq!(heard, expected);
}

#[test]
fn a_server_that_breaks_off_anywhere_is_an_error() {
    let whole = [greeting(3), export_info(4096, 3), block_info([1, 4096, 4096]), ack()].concat();
    for length in 0..whole.len() {
        let (outcome, _) = meet(whole[..length].to_vec(), false, LIMIT);
        assert!(matches!(outcome, Err(HandshakeError::BrokenOff { .. })), "cut at {length}: {outcome:?}");
    }
    meet(whole, false, LIMIT).0.unwrap();
}

#[test]
fn what_is_not_the_protocol_is_refused() {
    assert!(refused(b"HTTP/1.1 400 Bad Request\r\n".to_vec()).contains("NBDMAGIC"));
    assert!(refused([&MAGIC[..], b"\0\0\x42\x02\x81\x86\x12\x53", &[0; 8]].concat()).contains("oldest"));
    assert!(refused(greeting(NO_ZEROES)).contains("fixed newstyle"));
    let after = |more: Vec<u8>| refused([greeting(3), more].concat());
    assert!(after(vec![0xff; 20]).contains("magic"));
    assert!(after(reply(1, REPLY_ACK, &[])).contains("not asked"));
    assert!(after(reply(OPTION_GO, 77, &[])).contains("unknown type"));
    assert!(after(ack()).contains("what the export is"));
    assert!(after(reply(OPTION_GO, REPLY_INFO, &[0])).contains("no type"));
    assert!(after(reply(OPTION_GO, REPLY_INFO, &[0, 0, 1])).contains("12 bytes"));
    assert!(after(reply(OPTION_GO, REPLY_INFO, &[0, 3, 1])).contains("14 bytes"));
    assert!(after(export_info(1 << 63, 1)).contains("2^63"));
    for sizes in
        [[0, 4096, 4096], [3, 4096, 4096], [1 << 17, 1 << 17, 1 << 20], [512, 1, 4096], [512, 512, 1]]
    {
        assert!(after(block_info(sizes)).contains("block sizes"), "{sizes:?}");
    }
}

#[test]
fn lengths_and_repetitions_are_bounded() {
    let mut huge = reply(OPTION_GO, REPLY_INFO, &[]);
    huge[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(refused([greeting(3), huge].concat()).contains("longer than"));
    let endless = export_info(4096, 3).repeat(1000);
    assert!(refused([greeting(3), endless].concat()).contains("without end"));
    let error = handshake(Path::new("/nowhere"), &"x".repeat(5000), LIMIT).unwrap_err();
    assert!(matches!(error, HandshakeError::Name { length: 5000 }), "{error}");
}

#[test]
fn refusals_carry_their_reason() {
    let error =
        |code, text: &[u8]| refused([greeting(3), reply(OPTION_GO, REPLY_ERROR | code, text)].concat());
    assert!(error(6, b"").ends_with("it has no such export"));
    assert!(error(2, b"not for you").ends_with("not for you"));
}

#[test]
fn a_silent_server_is_given_up() {
    let started = Instant::now();
    for says in [Vec::new(), greeting(3), [greeting(3), export_info(4096, 3)].concat()] {
        let (outcome, _) = meet(says, true, Duration::from_millis(200));
        assert!(matches!(outcome, Err(HandshakeError::TimedOut { .. })), "{outcome:?}");
    }
    assert!(started.elapsed() < LIMIT);
    let error = handshake(Path::new("/nowhere/socket"), "", LIMIT).unwrap_err();
    assert!(matches!(error, HandshakeError::Connect { .. }), "{error}");
}
