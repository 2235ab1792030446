//! The machine's serial port: what came out of it, searched once; and what is typed into it.

use std::{
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::{Found, Regex, pty::Pty};

/// Output kept, in bytes.
const LOG_BYTES: usize = 32 << 20;

/// Longest match that is found when it comes in pieces, in bytes.
const LONGEST_MATCH: usize = 64 * 1024;

/// How often to look whether the machine has ended, while waiting for output.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Called with output as it comes, on the thread that reads it.
pub type Watch = Box<dyn FnMut(&[u8]) + Send>;

/// Types on a serial port, from any thread, without blocking.
#[derive(Clone)]
pub struct Keyboard(mpsc::Sender<Vec<u8>>);

impl Keyboard {
    /// Types these bytes. Those that a machine which has ended did not read are dropped.
    pub fn send(&self, bytes: impl Into<Vec<u8>>) {
        // The receiver is gone when the machine is.
        let _ = self.0.send(bytes.into());
    }
}

#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    /// Bytes cut off at the beginning.
    cut: usize,
    /// Nothing more will come.
    closed: bool,
}

#[derive(Default)]
struct Shared {
    output: Mutex<Output>,
    more: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the output, from which a search goes on.
#[derive(Debug, Default)]
pub struct Cursor(usize);

/// Our end of a serial port.
pub struct Serial {
    shared: Arc<Shared>,
    keyboard: Keyboard,
    device: PathBuf,
    /// Keeps the line up until the emulator has ended.
    line: Option<File>,
}

impl Serial {
    /// A line whose other end is [`Serial::device`].
    ///
    /// # Errors
    /// No pseudo-terminal could be made.
    pub fn open(mut watch: Option<Watch>) -> anyhow::Result<Self> {
        let Pty {
            master,
            slave,
            path,
        } = Pty::open()?;
        let mut writer = File::from(std::os::fd::AsFd::as_fd(&master).try_clone_to_owned()?);
        let mut reader = master;
        let shared = Arc::new(Shared::default());
        let filled = Arc::clone(&shared);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Reading fails once the other end is closed by all.
            while let Ok(read @ 1..) = reader.read(&mut buffer) {
                let new = &buffer[..read];
                if let Some(watch) = &mut watch {
                    watch(new);
                }
                let mut output = filled.lock();
                output.bytes.extend_from_slice(new);
                if output.bytes.len() > LOG_BYTES {
                    let surplus = output.bytes.len() - LOG_BYTES / 2;
                    output.bytes.drain(..surplus);
                    output.cut += surplus;
                }
                filled.more.notify_all();
            }
            filled.lock().closed = true;
            filled.more.notify_all();
        });
        let (sender, typed) = mpsc::channel::<Vec<u8>>();
        thread::spawn(move || {
            for bytes in typed {
                if writer.write_all(&bytes).is_err() {
                    break;
                }
            }
        });
        Ok(Serial {
            shared,
            keyboard: Keyboard(sender),
            device: path,
            line: Some(slave),
        })
    }

    /// The device that the emulator opens.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Something to type with.
    pub fn keyboard(&self) -> Keyboard {
        self.keyboard.clone()
    }

    /// Looks for a match from the cursor on, and sets the cursor behind it.
    pub fn search(&self, pattern: &Regex, cursor: &mut Cursor) -> Option<Found> {
        let output = self.shared.lock();
        let start = cursor.0.saturating_sub(output.cut);
        let Some(captures) = pattern.captures_at(&output.bytes, start) else {
            // What was looked at need not be again, but for what may be the beginning of a match.
            let looked_at = (output.cut + output.bytes.len()).saturating_sub(LONGEST_MATCH);
            cursor.0 = cursor.0.max(looked_at);
            return None;
        };
        cursor.0 = output.cut + captures.get_match().end();
        let groups = captures
            .iter()
            .map(|group| {
                group.map_or_else(String::new, |g| {
                    String::from_utf8_lossy(g.as_bytes()).into()
                })
            })
            .collect();
        Some(Found { groups })
    }

    /// Waits for more output, or a moment, whichever is first, not beyond `deadline`.
    pub fn wait_for_more(&self, deadline: Instant) {
        let output = self.shared.lock();
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = left.min(LOOK_EVERY);
        if output.closed {
            drop(output);
            thread::sleep(wait);
        } else {
            // Waking early costs one more look.
            let _ = self.shared.more.wait_timeout(output, wait);
        }
    }

    /// The emulator has ended: takes in what is left, for a second at most.
    pub fn finish(&mut self) {
        self.line = None;
        let mut output = self.shared.lock();
        let deadline = Instant::now() + Duration::from_secs(1);
        while !output.closed && Instant::now() < deadline {
            output = self
                .shared
                .more
                .wait_timeout(output, LOOK_EVERY)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// All output so far, `\r` removed.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().bytes).replace('\r', "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn a_search_goes_on_behind_the_last_match() {
        let mut serial = Serial::open(None).unwrap();
        let mut device = File::options().write(true).open(serial.device()).unwrap();
        device.write_all(b"ok 1\r\nok 2\r\n").unwrap();
        drop(device);
        serial.finish();
        let pattern = Regex::new(r"ok (\d)\r\n").unwrap();
        let mut cursor = Cursor::default();
        assert_eq!(serial.search(&pattern, &mut cursor).unwrap().groups[1], "1");
        assert_eq!(serial.search(&pattern, &mut cursor).unwrap().groups[1], "2");
        assert!(serial.search(&pattern, &mut cursor).is_none());
        assert!(serial.search(&pattern, &mut Cursor::default()).is_some());
        assert_eq!(serial.text(), "ok 1\nok 2\n");
    }

    #[test]
    fn typed_bytes_arrive_unchanged() {
        let serial = Serial::open(None).unwrap();
        let mut device = File::open(serial.device()).unwrap();
        serial.keyboard().send(*b"\x03\r\x04\xff");
        let mut read = [0; 4];
        device.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"\x03\r\x04\xff");
    }

    #[test]
    fn output_reaches_the_watcher() {
        let (sender, seen) = mpsc::channel();
        let watch: Watch = Box::new(move |bytes| sender.send(bytes.to_vec()).unwrap());
        let serial = Serial::open(Some(watch)).unwrap();
        let mut device = File::options().write(true).open(serial.device()).unwrap();
        device.write_all(b"hello").unwrap();
        let mut all = Vec::new();
        while all.len() < 5 && Instant::now() < soon() {
            all.extend(seen.recv_timeout(Duration::from_secs(5)).unwrap());
        }
        assert_eq!(all, b"hello");
    }
}
