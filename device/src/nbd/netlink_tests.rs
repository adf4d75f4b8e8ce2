//! Messages to and from the kernel, byte by byte.

use super::*;

fn message(attributes: Attributes) -> Message {
    GenlmsghdrBuilder::default().cmd(1).version(1).attrs(attributes).build().unwrap()
}

fn nested(kind: u16, inner: &[Nlattr<u16, Buffer>]) -> Nlattr<u16, Buffer> {
    let start = attribute_of(kind, Vec::new());
    inner.iter().fold(start, |outer, one| outer.nest(one).unwrap())
}

#[test]
fn a_request_has_the_bytes_that_the_kernel_expects() {
    let mut attributes = Attributes::new();
    attributes.push(u32_attribute(attribute::INDEX, 3));
    attributes.push(text_attribute(attribute::BACKEND_IDENTIFIER, "BERTH-x"));
    attributes.push(sockets(io::stdin()));
    let bytes = encode(0x21, FAMILY_VERSION, command::RECONFIGURE, attributes, 9);
    let expected: Vec<u8> = [
        &56_u32.to_ne_bytes()[..],
        &0x21_u16.to_ne_bytes(),
        &5_u16.to_ne_bytes(), // NLM_F_REQUEST | NLM_F_ACK
        &9_u32.to_ne_bytes(),
        &[0; 4],
        &[3, 1, 0, 0],
        &[8, 0, 1, 0, 3, 0, 0, 0],
        &[12, 0, 10, 0],
        b"BERTH-x\0",
        &[16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 0, 0, 0, 0],
    ]
    .concat();
    assert_eq!(bytes, expected);
}

#[test]
fn answers_are_understood_and_broken_ones_refused() {
    let device = |index, connected| {
        let parts = [
            u32_attribute(attribute::DEVICE_INDEX, index),
            attribute_of(attribute::DEVICE_CONNECTED, vec![connected]),
        ];
        nested(1, &parts)
    };
    let mut attributes = Attributes::new();
    attributes.push(nested(attribute::DEVICE_LIST, &[device(0, 0), device(17, 1)]));
    assert_eq!(parse_status(&message(attributes)).unwrap(), [(0, false), (17, true)]);
    assert!(parse_status(&message(Attributes::new())).is_err());
    let mut attributes = Attributes::new();
    attributes.push(nested(attribute::DEVICE_LIST, &[attribute_of(1, vec![1, 2, 3])]));
    assert!(parse_status(&message(attributes)).is_err());
}

#[test]
fn the_family_and_its_group_are_found() {
    let group = |name, id| {
        let parts = [text_attribute(controller::GROUP_NAME, name), u32_attribute(controller::GROUP_ID, id)];
        nested(1, &parts)
    };
    let mut attributes = Attributes::new();
    attributes.push(attribute_of(controller::FAMILY_ID, 0x1f_u16.to_ne_bytes().to_vec()));
    attributes.push(nested(controller::GROUPS, &[group("other", 3), group(EVENTS, 5)]));
    assert_eq!(parse_family(&message(attributes)).unwrap(), Family { id: 0x1f, events: Some(5) });
    assert!(parse_family(&message(Attributes::new())).is_err());
}

#[test]
fn a_kernel_without_nbd_says_so() {
    // The same code path with and without the module: either it is there, or it is named as missing.
    match Nbd::open() {
        Ok(mut nbd) => drop(nbd.status().unwrap()),
        Err(error) => {
            assert!(matches!(error, NetlinkError::NoFamily | NetlinkError::Socket { .. }), "{error}");
        }
    }
}
