//! A serial port as a socket, for an emulator that has none: Bochs' server waits for its client at start.
//!
//! The port is a pseudo-terminal. Programs connect one after the other; while none is connected, what the machine
//! sends is dropped, as on a line with nobody at its end.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::Context;

use super::pty::Pty;

#[derive(Default)]
struct Shared {
    /// The program that is connected.
    client: Mutex<Option<UnixStream>>,
    ended: AtomicBool,
}

impl Shared {
    fn client(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Both ends. Ends with its value.
pub struct Bridge {
    shared: Arc<Shared>,
    socket: PathBuf,
    device: PathBuf,
    /// Keeps the line up while the emulator starts.
    _line: File,
}

impl Bridge {
    /// Makes a socket here, and a device for the emulator.
    ///
    /// # Errors
    /// There is something at the path, or no pseudo-terminal to be had.
    pub fn open(socket: &Path) -> anyhow::Result<Self> {
        let Pty {
            master,
            slave,
            path,
        } = Pty::open()?;
        let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
        let to_machine = File::from(master.as_fd().try_clone_to_owned()?);
        let mut from_machine = master;
        let shared = Arc::new(Shared::default());
        let sending = Arc::clone(&shared);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = from_machine.read(&mut buffer) {
                let client = sending.client().as_ref().map(UnixStream::try_clone);
                if let Some(Ok(mut client)) = client {
                    // One that is gone is noticed by who reads from it.
                    let _ = client.write_all(&buffer[..read]);
                }
            }
        });
        let taking = Arc::clone(&shared);
        thread::spawn(move || accept(&listener, to_machine, &taking));
        Ok(Bridge {
            shared,
            socket: socket.to_owned(),
            device: path,
            _line: slave,
        })
    }

    /// The device that the emulator opens.
    pub fn device(&self) -> &Path {
        &self.device
    }
}

/// Lets programs in, one at a time.
fn accept(listener: &UnixListener, mut to_machine: File, shared: &Shared) {
    for client in listener.incoming() {
        let Ok(mut client) = client else { return };
        if shared.ended.load(Ordering::Relaxed) {
            return;
        }
        *shared.client() = client.try_clone().ok();
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = client.read(&mut buffer) {
            if to_machine.write_all(&buffer[..read]).is_err() {
                return;
            }
        }
        *shared.client() = None;
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(client) = self.shared.client().take() {
            // It may be gone.
            let _ = client.shutdown(Shutdown::Both);
        }
        // Whoever waits for a program looks up, unless it has ended.
        let _ = UnixStream::connect(&self.socket);
        // Nobody else comes.
        let _ = fs::remove_file(&self.socket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_come_and_go() {
        let name = format!("plinth-bridge-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = fs::remove_file(&path);
        let bridge = Bridge::open(&path).unwrap();
        let mut device = File::options()
            .read(true)
            .write(true)
            .open(bridge.device())
            .unwrap();
        for round in [b"1", b"2"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(round).unwrap();
            let mut byte = [0];
            device.read_exact(&mut byte).unwrap();
            assert_eq!(&byte, round);
            device.write_all(b"x").unwrap();
            client.read_exact(&mut byte).unwrap();
            assert_eq!(&byte, b"x");
        }
        let mut last = UnixStream::connect(&path).unwrap();
        last.write_all(b"3").unwrap();
        device.read_exact(&mut [0]).unwrap();
        drop(bridge);
        assert_eq!(last.read(&mut [0]).unwrap(), 0);
        assert!(!path.exists());
    }
}
