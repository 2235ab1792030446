//! Where the host's control channel is.

use std::{fmt, os::unix::fs::FileTypeExt, path::PathBuf, str::FromStr};

use crate::{Error, Exit};

/// Speed of a serial line, in bits per second, unless it says: Plinth's own.
const DEFAULT_SPEED: u32 = 115_200;

/// The other end of the channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket: an emulator's second serial port.
    Unix(PathBuf),
    /// A serial port, with its speed in bits per second.
    Tty(PathBuf, u32),
    /// A serial port that some server offers by TCP: `host:port`.
    Tcp(String),
}

impl FromStr for Address {
    type Err = Error;

    /// `unix:PATH`, `tty:PATH[,SPEED]`, `tcp:HOST:PORT`; without its kind a path that exists, or
    /// `HOST:PORT`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let usage = |why: &str| Error::new(Exit::Usage, format!("--connect {text}: {why}"));
        let tcp = |address: &str| {
            let (host, port) = address.rsplit_once(':')?;
            let fits = !host.is_empty() && port.parse::<u16>().is_ok();
            fits.then(|| Address::Tcp(address.to_owned()))
        };
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Address::Unix(path.into()));
        }
        if let Some(port) = text.strip_prefix("tty:") {
            let (path, speed) = match port.rsplit_once(',') {
                None => (port, DEFAULT_SPEED),
                Some((path, speed)) => {
                    let speed = speed.parse().map_err(|_| {
                        usage("write tty:PATH,SPEED, where SPEED is a number, as 115200")
                    })?;
                    (path, speed)
                }
            };
            return Ok(Address::Tty(path.into(), speed));
        }
        if let Some(address) = text.strip_prefix("tcp:") {
            return tcp(address).ok_or_else(|| usage("write tcp:HOST:PORT"));
        }
        match std::fs::metadata(text) {
            Ok(file) if file.file_type().is_char_device() => {
                Ok(Address::Tty(text.into(), DEFAULT_SPEED))
            }
            Ok(_) => Ok(Address::Unix(text.into())),
            Err(_) => Ok(tcp(text).unwrap_or_else(|| Address::Unix(text.into()))),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tty(path, speed) => write!(f, "tty:{},{speed}", path.display()),
            Address::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_what_they_say_or_look_like() {
        for (text, address) in [
            ("unix:a:1", Address::Unix("a:1".into())),
            ("tty:/dev/x", Address::Tty("/dev/x".into(), 115_200)),
            ("tty:/dev/x,9600", Address::Tty("/dev/x".into(), 9600)),
            ("tcp:host:7", Address::Tcp("host:7".into())),
            ("[::1]:7", Address::Tcp("[::1]:7".into())),
            ("no/such/file", Address::Unix("no/such/file".into())),
            ("/dev/null", Address::Tty("/dev/null".into(), 115_200)),
        ] {
            let parsed: Address = text.parse().unwrap();
            assert_eq!(parsed, address);
            assert_eq!(parsed.to_string().parse::<Address>().unwrap(), address);
        }
        for wrong in ["tcp:host", "tcp::1", "tcp:host:99999", "tty:/dev/x,fast"] {
            let error = wrong.parse::<Address>().unwrap_err();
            assert_eq!(error.exit, Exit::Usage);
        }
    }
}
