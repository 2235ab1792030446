//! Where things are: the workspace, and what xtask makes under `target/`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

/// The workspace's top folder.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask/ lies in the workspace")
        .to_owned()
}

/// `target/`: everything built.
pub fn target() -> PathBuf {
    workspace().join("target")
}

/// `target/cache/`: what takes long to make or fetch and outlives `cargo xtask clean`.
pub fn cache() -> PathBuf {
    target().join("cache")
}

/// A path as a person would type it from here: relative to the current folder when below it.
pub fn shown(path: &Path) -> String {
    std::env::current_dir()
        .ok()
        .and_then(|here| path.strip_prefix(here).ok().map(Path::to_owned))
        .unwrap_or_else(|| path.to_owned())
        .display()
        .to_string()
}

/// Keeps other xtasks of this workspace away from a thing while it is made; until dropped.
///
/// # Errors
/// The lock file could not be made.
pub fn lock(what: &str) -> anyhow::Result<Flock<File>> {
    fs::create_dir_all(cache())?;
    let file = File::create(cache().join(format!("{what}.lock")))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, e)| anyhow::anyhow!("locking {what}: {e}"))
}
