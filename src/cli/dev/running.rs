//! How a command typed in another terminal finds the `pglobby dev` that runs there.
//!
//! A running dev keeps a note in the user's own state folder and a lock on it. The lock says that it runs: it goes
//! with the process, however that ends, and a process id cannot be mistaken for another's.
//!
//! A command looks for its configuration in this order: `--config`; `PGLOBBY_CONFIG`; a dev that was started in this
//! very folder; `./proxy.toml`; any dev of this user. So a folder's own `proxy.toml` is never set aside for a dev
//! that was started elsewhere, and inside the source tree, whose `proxy.toml` is there to be read, `scripts/dev` and
//! the commands typed beside it belong together.

use std::{
    env,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// What a running dev says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevNote {
    /// Its `proxy.toml`.
    pub config: PathBuf,
    /// The folder it was started in.
    pub started_in: PathBuf,
}

/// Keeps the note while it lives.
#[derive(Debug)]
pub struct Announcement {
    path: PathBuf,
    _lock: File,
}

impl Drop for Announcement {
    fn drop(&mut self) {
        // A note that stays behind is not locked, and the next reader removes it.
        let _ = fs::remove_file(&self.path);
    }
}

/// `$XDG_STATE_HOME/pglobby/dev`, by default `~/.local/state/pglobby/dev`; `None` where there is no home.
pub fn notes_folder() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")))?;
    Some(state.join("pglobby/dev"))
}

/// Tells this user's commands about a dev, for as long as the result is kept.
///
/// # Errors
/// The folder cannot be written.
pub fn announce(notes: &Path, note: &DevNote) -> io::Result<Announcement> {
    fs::create_dir_all(notes)?;
    let path = notes.join(format!("{}.json", std::process::id()));
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&path)?;
    file.try_lock().map_err(io::Error::from)?;
    file.write_all(&serde_json::to_vec(note)?)?;
    Ok(Announcement { path, _lock: file })
}

/// The configuration a command uses when neither `--config` nor `PGLOBBY_CONFIG` names one; `None` where there is
/// none. `folder` is the current folder.
pub fn find_config(folder: &Path, notes: Option<&Path>) -> Option<PathBuf> {
    let devs = notes.map(running).unwrap_or_default();
    let here = devs.iter().find(|dev| same_folder(&dev.started_in, folder)).map(|dev| dev.config.clone());
    let own = folder.join("proxy.toml");
    here.or_else(|| own.is_file().then_some(own)).or_else(|| devs.first().map(|dev| dev.config.clone()))
}

/// Every dev of this user that runs now, the latest first.
fn running(notes: &Path) -> Vec<DevNote> {
    let mut found: Vec<_> = fs::read_dir(notes)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            let file = File::open(&path).ok()?;
            if file.try_lock_shared().is_ok() {
                // Nobody holds it: what a killed dev left behind.
                let _ = fs::remove_file(&path);
                return None;
            }
            let note: DevNote = serde_json::from_reader(&file).ok()?;
            Some((entry.metadata().and_then(|it| it.modified()).ok()?, note))
        })
        .collect();
    found.sort_by_key(|(begun, _)| std::cmp::Reverse(*begun));
    found.into_iter().map(|(_, note)| note).collect()
}

fn same_folder(one: &Path, other: &Path) -> bool {
    matches!((fs::canonicalize(one), fs::canonicalize(other)), (Ok(one), Ok(other)) if one == other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(config: &str, started_in: &Path) -> DevNote {
        DevNote { config: config.into(), started_in: started_in.into() }
    }

    #[test]
    fn a_dev_started_here_comes_before_this_folders_file_and_any_other_dev_after_it() {
        let (notes, here, elsewhere) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let find = || find_config(here.path(), Some(notes.path()));
        assert_eq!(find(), None);

        let dev = announce(notes.path(), &note("/dev-elsewhere/proxy.toml", elsewhere.path())).unwrap();
        assert_eq!(find(), Some("/dev-elsewhere/proxy.toml".into()));

        let own = here.path().join("proxy.toml");
        fs::write(&own, "").unwrap();
        assert_eq!(find(), Some(own.clone()));

        drop(dev);
        let dev = announce(notes.path(), &note("/dev-here/proxy.toml", here.path())).unwrap();
        assert_eq!(find(), Some("/dev-here/proxy.toml".into()));

        drop(dev);
        assert_eq!(find(), Some(own));
    }

    #[test]
    fn what_a_killed_dev_left_behind_is_not_believed() {
        let (notes, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let left = notes.path().join("1.json");
        fs::write(&left, serde_json::to_vec(&note("/gone/proxy.toml", here.path())).unwrap()).unwrap();
        fs::write(notes.path().join("2.json"), "no note").unwrap();
        assert_eq!(find_config(here.path(), Some(notes.path())), None);
        assert!(!left.exists());
    }
}
