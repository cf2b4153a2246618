//! The user that PostgreSQL's processes run as, and whether that user can reach the data folder.
//!
//! PostgreSQL refuses root. For root, an unprivileged user takes over: `postgres`, which packages create,
//! or else `nobody`.

use std::{
    fs, io,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The user that owns a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the system's user")]
pub enum ClusterOwner {
    /// The user of this process.
    Ourselves,
    /// This process runs as root, and PostgreSQL's programs run as this user.
    Other { name: String, uid: u32, gid: u32 },
}

/// No user to run PostgreSQL as, or a folder that user cannot reach.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum OwnerError {
    /// Neither `postgres` nor `nobody` exists.
    #[error(
        "PostgreSQL does not run as root, and there is no user postgres to run it as; create one (useradd --system postgres)"
    )]
    NoUser,
    /// The user may not pass through a parent folder.
    #[error(
        "user {user} may not pass through {closed:?} on the way to {folder:?}; choose a --data-dir outside it"
    )]
    ClosedParent { user: String, closed: PathBuf, folder: PathBuf },
    /// Another error of the system.
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
}

impl ClusterOwner {
    /// The user of this process, or an unprivileged user for root.
    pub fn current() -> Result<Self, OwnerError> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Self::Ourselves);
        }
        ["postgres", "nobody"]
            .into_iter()
            .find_map(|name| {
                Some(Self::Other { name: name.into(), uid: ask_id("-u", name)?, gid: ask_id("-g", name)? })
            })
            .ok_or(OwnerError::NoUser)
    }

    /// Makes `command` run as this user.
    pub fn run_as<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        match self {
            Self::Ourselves => command,
            Self::Other { uid, gid, .. } => command.uid(*uid).gid(*gid),
        }
    }

    /// Creates `folder` for this user only.
    pub fn make_folder(&self, folder: &Path) -> Result<(), OwnerError> {
        fs::create_dir_all(folder).map_err(|source| io_error("making", folder, source))?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
            .map_err(|source| io_error("closing to others", folder, source))?;
        self.give(folder)
    }

    /// Gives one file or folder to this user.
    pub fn give(&self, path: &Path) -> Result<(), OwnerError> {
        match self {
            Self::Ourselves => Ok(()),
            Self::Other { uid, gid, .. } => chown(path, Some(*uid), Some(*gid))
                .map_err(|source| io_error("giving to postgres", path, source)),
        }
    }

    /// Checks that this user may pass through `folder` and its parents. The system is asked as this user,
    /// because access lists and mounts count beside the mode.
    pub fn may_enter(&self, folder: &Path) -> Result<(), OwnerError> {
        let Self::Other { name, .. } = self else { return Ok(()) };
        let mut way: Vec<&Path> = folder.ancestors().collect();
        way.reverse();
        match way.into_iter().find(|step| !self.passes(step)) {
            None => Ok(()),
            Some(closed) => Err(OwnerError::ClosedParent {
                user: name.clone(),
                closed: closed.to_path_buf(),
                folder: folder.to_path_buf(),
            }),
        }
    }

    fn passes(&self, folder: &Path) -> bool {
        let mut command = Command::new("test");
        command.arg("-x").arg(folder).current_dir("/").stdin(Stdio::null());
        self.run_as(&mut command).status().is_ok_and(|status| status.success())
    }
}

/// The system knows users that are in no file.
fn ask_id(flag: &str, user: &str) -> Option<u32> {
    let output = Command::new("id").args([flag, user]).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().parse().ok()).flatten()
}

fn io_error(what: &str, path: &Path, source: io::Error) -> OwnerError {
    OwnerError::Io { what: format!("{what} {}", path.display()), source }
}
