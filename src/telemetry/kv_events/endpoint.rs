//! A ZeroMQ address of the command line: to listen on, or to connect to.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// As vLLM decides: an address without a host is listened on, one with a host is connected to. What vLLM has no way to
/// say, to listen on one interface, is `bind:` before its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    Listen(SocketAddr),
    Connect(String),
}

/// Neither.
#[derive(Debug, thiserror::Error)]
#[error(
    "\"{0}\" is no endpoint; use tcp://*:PORT to listen, bind:tcp://ADDRESS:PORT to listen on one interface, or tcp://HOST:PORT to connect"
)]
pub struct InvalidEndpoint(String);

impl Endpoint {
    /// Where to listen, unless it is to be connected to.
    pub fn listens_on(&self) -> Option<SocketAddr> {
        match self {
            Endpoint::Listen(address) => Some(*address),
            Endpoint::Connect(_) => None,
        }
    }
}

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidEndpoint(text.into());
        if let Some(address) = text.strip_prefix("bind:tcp://") {
            return address.parse().map(Endpoint::Listen).map_err(|_| invalid());
        }
        let listen = |ip: IpAddr, port| Ok(Endpoint::Listen(SocketAddr::new(ip, port)));
        let (host, port) =
            text.strip_prefix("tcp://").and_then(|rest| rest.rsplit_once(':')).ok_or_else(invalid)?;
        let port: u16 = port.parse().map_err(|_| invalid())?;
        match host {
            "*" | "0.0.0.0" => listen(Ipv4Addr::UNSPECIFIED.into(), port),
            "[::]" => listen(Ipv6Addr::UNSPECIFIED.into(), port),
            "" => Err(invalid()),
            host if port > 0 && !host.contains('/') => Ok(Endpoint::Connect(format!("tcp://{host}:{port}"))),
            _ => Err(invalid()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_host_is_listened_on() {
        let listen = |address: &str| Endpoint::Listen(address.parse().unwrap());
        assert_eq!("tcp://*:5557".parse::<Endpoint>().unwrap(), listen("0.0.0.0:5557"));
        assert_eq!("tcp://0.0.0.0:0".parse::<Endpoint>().unwrap(), listen("0.0.0.0:0"));
        assert_eq!("tcp://[::]:1".parse::<Endpoint>().unwrap(), listen("[::]:1"));
        assert_eq!("bind:tcp://127.0.0.1:1".parse::<Endpoint>().unwrap(), listen("127.0.0.1:1"));
        let router = Endpoint::Connect("tcp://router:5557".into());
        assert_eq!("tcp://router:5557".parse::<Endpoint>().unwrap(), router);
    }

    #[test]
    fn other_text_is_refused_with_what_to_write() {
        for text in [
            "",
            "5557",
            "tcp://router",
            "ipc:///tmp/x",
            "tcp://:5557",
            "tcp://router:0",
            "tcp://*:99999",
            "bind:tcp://host:1",
        ] {
            assert!(text.parse::<Endpoint>().unwrap_err().to_string().contains("tcp://*:PORT"), "{text}");
        }
    }
}
