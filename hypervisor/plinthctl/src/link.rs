//! Bytes to the host and back, each with a deadline.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, ErrorKind, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::termios::{
        BaudRate, ControlFlags, FlushArg, SetArg, cfmakeraw, cfsetspeed, tcflush, tcgetattr,
        tcsetattr,
    },
};

use crate::{Error, Exit, address::Address};

/// Speeds that a serial port can have, in bits per second.
const SPEEDS: [(u32, BaudRate); 10] = [
    (1200, BaudRate::B1200),
    (2400, BaudRate::B2400),
    (4800, BaudRate::B4800),
    (9600, BaudRate::B9600),
    (19_200, BaudRate::B19200),
    (38_400, BaudRate::B38400),
    (57_600, BaudRate::B57600),
    (115_200, BaudRate::B115200),
    (230_400, BaudRate::B230400),
    (460_800, BaudRate::B460800),
];

/// An open connection.
pub struct Link {
    file: File,
}

impl Link {
    /// Connects, within `timeout` where that takes long.
    ///
    /// # Errors
    /// [`Exit::NoConnection`], or [`Exit::Usage`] for a speed that does not exist.
    pub fn open(address: &Address, timeout: Duration) -> Result<Self, Error> {
        let failed = |error: io::Error| {
            let hint = match (address, error.kind()) {
                (Address::Unix(_), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                    "; does the machine run, and with a control channel?"
                }
                _ => "",
            };
            Error::new(Exit::NoConnection, format!("{address}: {error}{hint}"))
        };
        let fd: OwnedFd = match address {
            Address::Unix(path) => UnixStream::connect(path).map_err(failed)?.into(),
            Address::Tcp(to) => connect(to, timeout).map_err(failed)?.into(),
            Address::Tty(path, speed) => {
                let rate = SPEEDS.iter().find(|(known, _)| known == speed);
                let Some((_, rate)) = rate else {
                    let known: Vec<_> = SPEEDS.iter().map(|(s, _)| s.to_string()).collect();
                    let text = format!("{address}: the speeds are {}", known.join(", "));
                    return Err(Error::new(Exit::Usage, text));
                };
                open_tty(path, *rate).map_err(failed)?.into()
            }
        };
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(|e| failed(e.into()))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&fd, FcntlArg::F_SETFL(flags)).map_err(|e| failed(e.into()))?;
        Ok(Link { file: fd.into() })
    }

    /// Sends all of this.
    ///
    /// # Errors
    /// [`Exit::Timeout`], [`Exit::NoConnection`].
    pub fn send(&mut self, mut bytes: &[u8], deadline: Instant) -> Result<(), Error> {
        while !bytes.is_empty() {
            self.wait(PollFlags::POLLOUT, deadline)?;
            match self.file.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if is_no_end(&error) => {}
                Err(error) => return Err(ended(&error)),
            }
        }
        Ok(())
    }

    /// Appends what has come, something at least.
    ///
    /// # Errors
    /// [`Exit::Timeout`], [`Exit::NoConnection`].
    pub fn receive(&mut self, to: &mut Vec<u8>, deadline: Instant) -> Result<(), Error> {
        let mut buffer = [0; 4096];
        loop {
            self.wait(PollFlags::POLLIN, deadline)?;
            match self.file.read(&mut buffer) {
                Ok(0) => {
                    let text = "the connection was closed at its other end";
                    return Err(Error::new(Exit::NoConnection, text));
                }
                Ok(count) => {
                    to.extend_from_slice(&buffer[..count]);
                    return Ok(());
                }
                Err(error) if is_no_end(&error) => {}
                Err(error) => return Err(ended(&error)),
            }
        }
    }

    /// Waits until the connection can be read from or written to.
    fn wait(&self, what: PollFlags, deadline: Instant) -> Result<(), Error> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that it does not turn in the last millisecond.
            let ms = u16::try_from(left.as_millis().saturating_add(1)).unwrap_or(u16::MAX);
            let mut fds = [PollFd::new(self.file.as_fd(), what)];
            match poll(&mut fds, PollTimeout::from(ms)) {
                Ok(0) if Instant::now() >= deadline => {
                    return Err(Error::new(
                        Exit::Timeout,
                        "the host does not answer in time",
                    ));
                }
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(ended(&error.into())),
            }
        }
    }
}

fn is_no_end(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn ended(error: &io::Error) -> Error {
    Error::new(Exit::NoConnection, format!("the connection: {error}"))
}

fn connect(to: &str, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = ErrorKind::NotFound.into();
    for address in to.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout.max(Duration::from_millis(1))) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Opens a serial port that no other program of this kind has: raw, 8 data bits, no parity, without waiting for a carrier.
fn open_tty(path: &Path, rate: BaudRate) -> io::Result<File> {
    let flags = OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.bits())
        .open(path)?;
    // Two programs on one line would take each other's answers.
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let text = "another program uses this port";
            return Err(io::Error::new(ErrorKind::ResourceBusy, text));
        }
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let mut settings = tcgetattr(&file)?;
    cfmakeraw(&mut settings);
    settings.control_flags |= ControlFlags::CLOCAL | ControlFlags::CREAD;
    settings.control_flags &= !(ControlFlags::CRTSCTS | ControlFlags::CSTOPB);
    cfsetspeed(&mut settings, rate)?;
    tcsetattr(&file, SetArg::TCSANOW, &settings)?;
    // What was said to whoever had the port before.
    tcflush(&file, FlushArg::TCIOFLUSH)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{pty::openpty, unistd::ttyname};

    #[test]
    fn one_program_has_a_serial_port_at_a_time() {
        let pair = openpty(None, None).unwrap();
        let address = Address::Tty(ttyname(&pair.slave).unwrap(), 115_200);
        let open = || Link::open(&address, Duration::from_secs(1));
        let first = open().unwrap_or_else(|error| panic!("{error}"));
        let error = open().map(drop).unwrap_err();
        assert_eq!(error.exit, Exit::NoConnection);
        assert!(error.message.contains("another program"), "{error}");
        drop(first);
        open().unwrap_or_else(|error| panic!("{error}"));
    }
}
