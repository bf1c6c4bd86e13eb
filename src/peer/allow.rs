//! Who may be the peer: addresses and prefixes from the command line.

use std::net::{IpAddr, SocketAddr};

/// What one `--allow-peer` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Everybody.
    Any,
    /// Those whose address begins with so many bits of this one.
    Prefix(IpAddr, u8),
}

impl std::str::FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "any" {
            return Ok(Self::Any);
        }
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let wrong = || format!("'{text}' is not ADDRESS, ADDRESS/PREFIX or any");
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), |bits| bits.parse().map_err(|_| wrong()))?;
        if bits > most {
            return Err(wrong());
        }
        Ok(Self::Prefix(address, bits))
    }
}

impl Allowed {
    /// Whether it lets this peer in. An IPv4 address mapped into IPv6 counts as the IPv4 address.
    pub fn admits(self, peer: SocketAddr) -> bool {
        match self {
            Self::Any => true,
            Self::Prefix(net, bits) => match (net, peer.ip().to_canonical()) {
                (IpAddr::V4(net), IpAddr::V4(ip)) => {
                    same_head(net.to_bits().into(), ip.to_bits().into(), 32, bits)
                }
                (IpAddr::V6(net), IpAddr::V6(ip)) => same_head(net.to_bits(), ip.to_bits(), 128, bits),
                _ => false,
            },
        }
    }
}

fn same_head(a: u128, b: u128, width: u8, bits: u8) -> bool {
    bits == 0 || (a ^ b) >> (width - bits) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes() {
        let admits = |rule: &str, peer: &str| {
            rule.parse::<Allowed>().unwrap().admits(SocketAddr::new(peer.parse().unwrap(), 1))
        };
        assert!(admits("10.0.0.0/8", "10.200.3.4") && !admits("10.0.0.0/8", "11.0.0.1"));
        assert!(admits("10.1.2.3", "10.1.2.3") && !admits("10.1.2.3", "10.1.2.4"));
        assert!(admits("0.0.0.0/0", "9.9.9.9") && !admits("0.0.0.0/0", "::1"));
        assert!(admits("10.0.0.0/9", "::ffff:10.1.1.1"));
        assert!(admits("fd00::/8", "fdff::1") && !admits("fd00::/8", "fe80::1"));
        assert!(admits("any", "::1") && admits("::/0", "fe80::1"));
        assert!(!admits("::/0", "::ffff:9.9.9.9") && !admits("::/0", "9.9.9.9"));
        for wrong in ["", "10.0.0.0/33", "::1/129", "host", "10.0.0.0/", "10.0.0.0/-1"] {
            assert!(wrong.parse::<Allowed>().is_err(), "{wrong}");
        }
    }
}
