//! Which addresses a source may be read from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use thiserror::Error;

/// A text is not a network.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{0}` is not a network such as 10.96.0.0/12 or fd00::/8")]
pub struct NetworkError(pub String);

/// A network: an address, and how many of its leading bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u32,
}

impl Network {
    /// True if the address belongs to it. An IPv4 address written as an IPv6 one is the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, canonical(address)) {
            (IpAddr::V4(net), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(32 - self.bits).unwrap_or(0);
                (net.to_bits() ^ address.to_bits()) & mask == 0
            }
            (IpAddr::V6(net), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(128 - self.bits).unwrap_or(0);
                (net.to_bits() ^ address.to_bits()) & mask == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = NetworkError;
    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let bad = || NetworkError(text.to_owned());
        let (address, bits) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let bits: u32 = bits.parse().map_err(|_| bad())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        if bits > most { Err(bad()) } else { Ok(Self { address, bits }) }
    }
}

/// What is refused: what the policy names, and 169.254.0.0/16, `fe80::/10` and `fd00:ec2::254`, where clouds serve the
/// credentials of the node. What is allowed wins. Where the environment names a proxy, it resolves names, and has to refuse addresses itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressPolicy {
    /// Refused besides: the node's and the cluster's own networks.
    pub refused: Vec<Network>,
    /// Allowed though they are refused above.
    pub allowed: Vec<Network>,
}

/// The IPv4 address that an IPv6 one stands for: mapped, or behind a NAT64 with the well-known prefix `64:ff9b::/96`.
fn canonical(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if v6.to_bits() >> 32 == 0x0064_ff9b << 64 => {
            let [.., a, b, c, d] = v6.octets();
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        other => other,
    }
}

/// Where the metadata service of one cloud answers on IPv6, though it is not link-local.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

impl AddressPolicy {
    /// True if a source may be read from there.
    pub fn allows(&self, address: IpAddr) -> bool {
        let address = canonical(address);
        let link_local = match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4 == Ipv4Addr::UNSPECIFIED,
            IpAddr::V6(v6) => v6.is_unicast_link_local() || v6 == METADATA_V6 || v6.is_unspecified(),
        };
        let within = |networks: &[Network]| networks.iter().any(|network| network.contains(address));
        within(&self.allowed) || !(link_local || within(&self.refused))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(policy: &AddressPolicy, address: &str) -> bool {
        policy.allows(address.parse().unwrap())
    }

    #[test]
    fn metadata_services_are_refused_in_every_spelling() {
        let policy = AddressPolicy::default();
        for bad in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::169.254.169.254",
            "fe80::1",
            "febf::1",
            "fd00:ec2::254",
            "0.0.0.0",
            "::",
        ] {
            assert!(!allows(&policy, bad), "{bad}");
        }
        for good in ["127.0.0.1", "10.0.0.1", "192.0.2.7", "2001:db8::1", "fec0::1"] {
            assert!(allows(&policy, good), "{good}");
        }
    }

    #[test]
    fn an_allowed_network_wins_however_narrow_it_is() {
        let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let policy = AddressPolicy {
            refused: networks(&["127.0.0.0/8", "::1/128"]),
            allowed: networks(&["127.0.0.7/32", "169.254.169.254/32"]),
        };
        for good in ["127.0.0.7", "::ffff:127.0.0.7", "169.254.169.254", "10.0.0.1"] {
            assert!(allows(&policy, good), "{good}");
        }
        for bad in ["127.0.0.1", "127.0.0.0", "127.0.0.8", "::1", "169.254.169.253", "fe80::1"] {
            assert!(!allows(&policy, bad), "{bad}");
        }
    }

    #[test]
    fn networks_are_refused() {
        let refused =
            ["10.96.0.0/12", "fd12::/16", "192.0.2.0/32"].map(|text| text.parse().unwrap()).to_vec();
        let policy = AddressPolicy { refused, ..AddressPolicy::default() };
        for bad in
            ["10.96.0.1", "10.111.255.255", "::ffff:10.96.0.1", "64:ff9b::a60:1", "fd12:1::", "192.0.2.0"]
        {
            assert!(!allows(&policy, bad), "{bad}");
        }
        for good in ["10.95.0.1", "10.112.0.0", "fd13::", "192.0.2.1"] {
            assert!(allows(&policy, good), "{good}");
        }
        let all: Network = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains("1.2.3.4".parse().unwrap()) && !all.contains("::1".parse().unwrap()));
        for bad in ["10.0.0.0", "10.0.0.0/33", "x/8", "fd00::/129", ""] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }
}
