//! Pseudo-terminals: a serial line for an emulator, and a screen that nobody looks at.

use std::{
    fs::{File, OpenOptions},
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::Context;
use nix::{
    fcntl::OFlag,
    pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt},
    sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
};

/// Both ends of a pseudo-terminal in raw mode.
pub struct Pty {
    /// Our end.
    pub master: PtyMaster,
    /// The other end. While this is open, reading ours waits instead of failing.
    pub slave: File,
    /// The other end's name.
    pub path: PathBuf,
}

impl Pty {
    /// Makes one. Neither end is passed to children.
    ///
    /// # Errors
    /// The system has none left.
    pub fn open() -> anyhow::Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let master = posix_openpt(flags).context("no pseudo-terminal to be had")?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = PathBuf::from(ptsname_r(&master)?);
        let slave = open_slave(&path)?;
        let mut raw = tcgetattr(&slave)?;
        cfmakeraw(&mut raw);
        tcsetattr(&slave, SetArg::TCSANOW, &raw)?;
        Ok(Pty {
            master,
            slave,
            path,
        })
    }
}

/// Opens a terminal, which does not become ours.
///
/// # Errors
/// It is not there.
pub fn open_slave(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NOCTTY.bits())
        .open(path)
        .with_context(|| path.display().to_string())
}

/// Bytes of a screen's output that are kept.
const SCREEN_BYTES: usize = 16 * 1024;

/// What a program wrote on a terminal that is drained, so that it never waits for a reader.
pub struct Screen(Arc<Mutex<Vec<u8>>>);

impl Screen {
    /// Drains this end until the other is closed by all.
    pub fn drain(mut master: PtyMaster) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&kept);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = master.read(&mut buffer) {
                let mut kept = keep.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&buffer[..read]);
                let surplus = kept.len().saturating_sub(SCREEN_BYTES);
                kept.drain(..surplus);
            }
        });
        Screen(kept)
    }

    /// The last that was written, control characters included.
    pub fn text(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).into_owned()
    }
}
