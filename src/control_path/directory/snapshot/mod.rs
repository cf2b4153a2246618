//! The snapshot of the directory: a sealed file with what a node needs to admit logins while the central database is away.
//!
//! A node that runs and one that has just started follow the same rule: a look-up that the central database does not answer,
//! and for which there is no usable row in the cache, is answered from the file, until that is older than
//! `directory_snapshot_max_age`. A row that is known to have changed since is not used.
//!
//! While changes are received, the node writes the file anew soon after a change (`schedule.rs`), and at once it appends what
//! has changed (`keeper.rs`): a node that starts again does not go back to what another one has revoked.

mod contents;
mod file;
mod keeper;
mod schedule;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::Notify;
use tracing::{info, warn};

pub use self::contents::{About, Contents, KnownNode, KnownPause, Snapshot};
use self::file::{FileRefused, OpenFile, Place};
use super::invalidation::ChangeCounts;
use crate::{
    config::Config,
    control_path::{
        central::{Central, CentralError},
        secrets::keyring_reload::ReloadableKeyring,
    },
    data_path::tenant::DirectoryChange,
};

/// How long a file that was refused is not read again.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// Changes that are not in the file yet. Beyond that the file is removed.
const PENDING_MAX: usize = 10_000;

/// Why there is no snapshot to use.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum SnapshotRefused {
    /// `directory_snapshot` is off.
    #[error("no directory_snapshot is configured")]
    Off,
    /// The file.
    #[error(transparent)]
    File(#[from] FileRefused),
    /// Too old.
    #[error("the snapshot is {age:?} old; directory_snapshot_max_age is {max_age:?}")]
    TooOld { age: Duration, max_age: Duration },
    /// The clock of this machine, or of the one that has taken it, is wrong.
    #[error("the snapshot was taken in the future; set the clock of this machine")]
    FromTheFuture,
    /// The secret of the central database is another one.
    #[error("the snapshot was taken from another central database ({url})")]
    OtherCentral { url: String },
    /// A row cannot be read.
    #[error("the snapshot cannot be read: {0}")]
    Unreadable(String),
}

impl SnapshotRefused {
    /// There is no file yet.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::File(FileRefused::Missing { .. }))
    }
}

/// The snapshot of a node.
pub struct SnapshotStore {
    /// `None`: off.
    path: Option<PathBuf>,
    max_age: Duration,
    /// The name of the central database.
    database: String,
    keyring: Arc<ReloadableKeyring>,
    changes: Arc<ChangeCounts>,
    /// `pglobby.secrets` as the central database itself has it.
    central_salt: OnceLock<Vec<u8>>,
    state: Mutex<State>,
    /// Wakes the keeper.
    wake: Notify,
    /// One task at a time reads the file.
    loading: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// In memory only while it is used.
    loaded: Option<Arc<Snapshot>>,
    /// Why the file could not be used, and when that was found.
    refused: Option<(Instant, String)>,
    /// The file that this process has written last.
    own: Option<Own>,
    pending: Pending,
    /// Changes are received.
    in_contact: bool,
    /// When the newest snapshot that this process knows was taken.
    taken_at: Option<SystemTime>,
}

struct Own {
    id: String,
    /// The count of changes when its reading began.
    since: u64,
    /// `None`: it is gone, or being written to.
    file: Option<OpenFile>,
}

/// What the keeper has to do.
#[derive(Default)]
struct Pending {
    changes: Vec<DirectoryChange>,
    /// There were more of them than are kept.
    has_more: bool,
    /// Something has changed.
    is_due: bool,
}

impl SnapshotStore {
    /// Nothing is read yet.
    pub(super) fn new(
        config: &Config,
        database: &str,
        keyring: Arc<ReloadableKeyring>,
        changes: Arc<ChangeCounts>,
    ) -> Self {
        Self {
            path: config.directory_snapshot.clone(),
            max_age: config.timeouts.directory_snapshot_max_age,
            database: database.to_owned(),
            keyring,
            changes,
            central_salt: OnceLock::new(),
            state: Mutex::default(),
            wake: Notify::new(),
            loading: tokio::sync::Mutex::default(),
        }
    }

    /// Whether a file is configured.
    pub fn is_on(&self) -> bool {
        self.path.is_some()
    }

    /// The snapshot, if it may be used now. The first call reads the file; a refusal is logged once.
    pub async fn usable(self: &Arc<Self>) -> Option<Arc<Snapshot>> {
        match self.load().await {
            Ok(snapshot) => Some(snapshot),
            Err(None) => None,
            Err(Some(refused)) => {
                let why = refused.to_string();
                let is_news =
                    self.state().refused.replace((Instant::now(), why.clone())).is_none_or(|(_, old)| {
                        // An age differs each time.
                        old != why && !matches!(refused, SnapshotRefused::TooOld { .. })
                    });
                self.state().loaded = None;
                if is_news && !matches!(refused, SnapshotRefused::Off) {
                    warn!(why, "the snapshot of the directory is not used");
                }
                None
            }
        }
    }

    /// The error is `None` if it was logged a moment ago.
    async fn load(self: &Arc<Self>) -> Result<Arc<Snapshot>, Option<SnapshotRefused>> {
        if !self.is_on() {
            return Err(None);
        }
        if let Some(loaded) = self.loaded() {
            return self.check_age(&loaded.about).map(|_| loaded).map_err(Some);
        }
        let _turn = self.loading.lock().await;
        if let Some(loaded) = self.loaded() {
            return Ok(loaded);
        }
        if self.state().refused.as_ref().is_some_and(|(at, _)| at.elapsed() < REFUSED_PAUSE) {
            return Err(None);
        }
        let store = self.clone();
        let read = tokio::task::spawn_blocking(move || store.read());
        let unreadable = |error: tokio::task::JoinError| SnapshotRefused::Unreadable(error.to_string());
        let snapshot = Arc::new(read.await.map_err(|error| Some(unreadable(error)))?.map_err(Some)?);
        let age = self.check_age(&snapshot.about).map_err(Some)?;
        let (logins, tenants) = snapshot.counts();
        warn!(
            age_s = age.as_secs(),
            logins,
            tenants,
            taken_by = snapshot.about.origin(),
            "logins are admitted from the snapshot of the directory"
        );
        let mut state = self.state();
        state.loaded = Some(snapshot.clone());
        state.taken_at = taken_at(&snapshot.about);
        state.refused = None;
        Ok(snapshot)
    }

    /// Reads and checks the file, but for its age.
    fn read(&self) -> Result<Snapshot, SnapshotRefused> {
        let place = self.place().ok_or(SnapshotRefused::Off)?;
        let (contents, changed) = place.read()?;
        let about = &contents.about;
        if let (Some(central), Some(own)) = (self.central_salt.get(), about.mock_salt())
            && *central != own
        {
            return Err(SnapshotRefused::OtherCentral { url: about.url.clone() });
        }
        let own = self.state().own.as_ref().filter(|own| own.id == about.id).map(|own| own.since);
        // A file of another process: whatever this one has seen change may be newer.
        let since = own.unwrap_or(0);
        if own.is_none() {
            changed.iter().for_each(|change| self.changes.note(change));
        }
        contents.index(since).map_err(SnapshotRefused::Unreadable)
    }

    fn check_age(&self, about: &About) -> Result<Duration, SnapshotRefused> {
        let age = about.age(SystemTime::now()).ok_or(SnapshotRefused::FromTheFuture)?;
        let max_age = self.max_age;
        if age > max_age {
            return Err(SnapshotRefused::TooOld { age: Duration::from_secs(age.as_secs()), max_age });
        }
        Ok(age)
    }

    /// The central database itself has said its secret.
    pub(super) fn set_central_salt(&self, salt: &[u8]) {
        let _ = self.central_salt.set(salt.to_vec());
    }

    /// Whether changes are received now. Then the central database is asked, and the snapshot is not kept in memory.
    pub(super) fn set_in_contact(&self, in_contact: bool) {
        let mut state = self.state();
        state.in_contact = in_contact;
        if in_contact && state.loaded.take().is_some() {
            info!("the snapshot of the directory is not used any more");
        }
        drop(state);
        self.wake.notify_one();
    }

    /// A change was received: the keeper writes it into the file.
    pub(super) fn note(&self, change: &DirectoryChange) {
        if !self.is_on() {
            return;
        }
        let mut state = self.state();
        let pending = &mut state.pending;
        pending.is_due = true;
        match change {
            // Not a change that is known, but a doubt, which the next snapshot ends.
            DirectoryChange::Everything => {}
            _ if pending.changes.len() >= PENDING_MAX => pending.has_more = true,
            _ => pending.changes.push(change.clone()),
        }
        drop(state);
        self.wake.notify_one();
    }

    /// Something that it contains beside logins and tenants has changed: pauses, or which nodes there are.
    pub fn outdated(&self) {
        self.state().pending.is_due = true;
        self.wake.notify_one();
    }

    /// How old the newest snapshot is.
    pub fn age(&self) -> Option<Duration> {
        let taken_at = self.state().taken_at?;
        Some(SystemTime::now().duration_since(taken_at).unwrap_or_default())
    }

    /// The snapshot that is in use.
    pub fn loaded(&self) -> Option<Arc<Snapshot>> {
        self.state().loaded.clone()
    }

    fn place(&self) -> Option<Place<'_>> {
        let path = self.path.as_deref()?;
        Some(Place { path, database: &self.database, keyring: &self.keyring })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn taken_at(about: &About) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(about.taken_at_ms))
}

/// Why a command could not write a snapshot.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum SnapshotFailed {
    /// It could not be read.
    #[error(transparent)]
    Central(#[from] CentralError),
    /// It could not be written.
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: io::Error },
}

/// Reads the directory and writes a file that a new node can be given. Returns the numbers of logins and of tenants.
pub async fn write_file(
    central: &Central,
    keyring: &ReloadableKeyring,
    taken_by: &str,
    path: &Path,
) -> Result<(usize, usize), SnapshotFailed> {
    let contents = Contents::read(central, taken_by).await?;
    let place = Place { path, database: central.database(), keyring };
    place.write(&contents, &[]).map_err(|cause| SnapshotFailed::Io { path: path.to_owned(), cause })?;
    Ok(contents.counts())
}

/// Reads the file of `config` as a node without its central database would.
pub fn examine(
    config: &Config,
    database: &str,
    keyring: ReloadableKeyring,
) -> Result<Examined, SnapshotRefused> {
    let store = SnapshotStore::new(config, database, Arc::new(keyring), Arc::new(ChangeCounts::new(1)));
    let place = store.place().ok_or(SnapshotRefused::Off)?;
    let (contents, changed) = place.read()?;
    let age = store.check_age(&contents.about)?;
    let (logins, tenants) = contents.counts();
    Ok(Examined { age, logins, tenants, changed: changed.len(), origin: contents.about.origin() })
}

/// What a file contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Examined {
    /// Since it was taken.
    pub age: Duration,
    /// The number of logins.
    pub logins: usize,
    /// The number of tenants, dropped ones included.
    pub tenants: usize,
    /// Rows that have changed since, and are not admitted.
    pub changed: usize,
    /// By what it was taken, and from where.
    pub origin: String,
}
