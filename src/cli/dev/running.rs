//! Lets a command in another terminal find the `pglobby dev` that is running.
//!
//! A running dev keeps a file in the user's state folder, and a lock on it. The lock tells that the process
//! is alive: it ends with the process, and unlike a process id it is never reused.
//!
//! A command looks for its configuration in this order: `--config`; `PGLOBBY_CONFIG`; a dev that was started
//! in the current folder; `./proxy.toml`; any dev of this user. So the `proxy.toml` of a folder comes before
//! a dev that was started elsewhere; and in the source tree, which has a `proxy.toml`, commands find the dev
//! that `scripts/dev` started there.

use std::{
    env,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// A running dev.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningDev {
    /// Its `proxy.toml`.
    pub config: PathBuf,
    /// The folder it was started in.
    pub started_in: PathBuf,
}

/// Other commands find the dev while this value lives.
#[derive(Debug)]
pub struct Announcement {
    path: PathBuf,
    _lock: File,
}

impl Drop for Announcement {
    fn drop(&mut self) {
        // A killed process leaves its file behind, without a lock; the next reader removes it.
        let _ = fs::remove_file(&self.path);
    }
}

/// `$XDG_STATE_HOME/pglobby/dev`, by default `~/.local/state/pglobby/dev`; `None` without a home folder.
pub fn state_folder() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")))?;
    Some(state.join("pglobby/dev"))
}

/// Lets this user's commands find `dev` while the result lives.
pub fn announce(state: &Path, dev: &RunningDev) -> io::Result<Announcement> {
    fs::create_dir_all(state)?;
    let path = state.join(format!("{}.json", std::process::id()));
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&path)?;
    file.try_lock().map_err(io::Error::from)?;
    file.write_all(&serde_json::to_vec(dev)?)?;
    Ok(Announcement { path, _lock: file })
}

/// Returns the configuration of a command for which neither `--config` nor `PGLOBBY_CONFIG` names one, if
/// there is one. `folder` is the current folder.
pub fn find_config(folder: &Path, state: Option<&Path>) -> Option<PathBuf> {
    let devs = state.map(running).unwrap_or_default();
    let here = devs.iter().find(|dev| same_folder(&dev.started_in, folder)).map(|dev| dev.config.clone());
    let own = folder.join("proxy.toml");
    here.or_else(|| own.is_file().then_some(own)).or_else(|| devs.first().map(|dev| dev.config.clone()))
}

/// Returns every running dev of this user, the one started last first.
fn running(state: &Path) -> Vec<RunningDev> {
    let mut found: Vec<_> = fs::read_dir(state)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            let file = File::open(&path).ok()?;
            if file.try_lock_shared().is_ok() {
                // Without a lock: a killed dev left it behind.
                let _ = fs::remove_file(&path);
                return None;
            }
            let dev: RunningDev = serde_json::from_reader(&file).ok()?;
            Some((entry.metadata().and_then(|it| it.modified()).ok()?, dev))
        })
        .collect();
    found.sort_by_key(|(started, _)| std::cmp::Reverse(*started));
    found.into_iter().map(|(_, dev)| dev).collect()
}

fn same_folder(one: &Path, other: &Path) -> bool {
    matches!((fs::canonicalize(one), fs::canonicalize(other)), (Ok(one), Ok(other)) if one == other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running_dev(config: &str, started_in: &Path) -> RunningDev {
        RunningDev { config: config.into(), started_in: started_in.into() }
    }

    #[test]
    fn a_dev_started_here_comes_before_this_folders_file_and_any_other_dev_after_it() {
        let (state, here, elsewhere) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let find = || find_config(here.path(), Some(state.path()));
        assert_eq!(find(), None);

        let dev =
            announce(state.path(), &running_dev("/dev-elsewhere/proxy.toml", elsewhere.path())).unwrap();
        assert_eq!(find(), Some("/dev-elsewhere/proxy.toml".into()));

        let own = here.path().join("proxy.toml");
        fs::write(&own, "").unwrap();
        assert_eq!(find(), Some(own.clone()));

        drop(dev);
        let dev = announce(state.path(), &running_dev("/dev-here/proxy.toml", here.path())).unwrap();
        assert_eq!(find(), Some("/dev-here/proxy.toml".into()));

        drop(dev);
        assert_eq!(find(), Some(own));
    }

    #[test]
    fn the_file_of_a_killed_dev_is_ignored_and_removed() {
        let (state, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let left = state.path().join("1.json");
        fs::write(&left, serde_json::to_vec(&running_dev("/elsewhere/proxy.toml", here.path())).unwrap())
            .unwrap();
        fs::write(state.path().join("2.json"), "not JSON").unwrap();
        assert_eq!(find_config(here.path(), Some(state.path())), None);
        assert!(!left.exists());
    }
}
