//! Keeps the file of the snapshot up to date while changes are received.

use std::{future::pending, io, pin::pin, sync::Arc};

use tokio::time::{Instant, sleep_until};
use tracing::{debug, error, warn};

use super::{Own, Pending, SnapshotStore, contents::Contents, schedule::Schedule, taken_at};
use crate::control_path::central::{Central, CentralError};

/// Why a snapshot was not written.
#[derive(Debug, thiserror::Error)]
enum NotWritten {
    #[error(transparent)]
    Central(#[from] CentralError),
    #[error("{0}")]
    File(#[from] io::Error),
}

impl SnapshotStore {
    /// Writes snapshots, and what changes after each of them. `taken_by`: the name of this node. Returns only if it
    /// is dropped.
    pub async fn keep(self: Arc<Self>, central: Central, taken_by: &str) {
        if !self.is_on() {
            return pending().await;
        }
        let mut schedule = Schedule::new(self.max_age, Instant::now());
        let mut failed_before = false;
        loop {
            if self.mark_pending().await.is_due {
                schedule.changed(Instant::now());
            }
            let is_due = tokio::select! {
                () = self.wake.notified() => false,
                () = sleep_until(schedule.next()), if self.state().in_contact => true,
            };
            if !is_due {
                continue;
            }
            let begun = Instant::now();
            match self.write(&central, taken_by).await {
                Ok(changed_later) => {
                    schedule.written(begun, Instant::now(), changed_later);
                    debug!(took_ms = begun.elapsed().as_millis(), "snapshot of the directory written");
                    failed_before = false;
                }
                Err(error) => {
                    schedule.failed(Instant::now());
                    // Once for each trouble, not for each attempt.
                    if !std::mem::replace(&mut failed_before, true) {
                        warn!(%error, "cannot write the snapshot of the directory; retrying");
                    }
                }
            }
        }
    }

    /// Reads the directory and replaces the file. Returns whether something has changed meanwhile.
    async fn write(self: &Arc<Self>, central: &Central, taken_by: &str) -> Result<bool, NotWritten> {
        // What is counted from now on may be missing in it.
        let since = self.changes.count();
        let mut changed_later = Pending::default();
        let contents = {
            let mut reading = pin!(Contents::read(central, taken_by));
            loop {
                tokio::select! {
                    read = &mut reading => break read?,
                    // The old file is the one that counts until the new one is there.
                    () = self.wake.notified() => changed_later.add(self.mark_pending().await),
                }
            }
        };
        let (id, taken) = (contents.about.id.clone(), taken_at(&contents.about));
        let store = self.clone();
        let written = tokio::task::spawn_blocking(move || {
            let place = store.place().ok_or(io::ErrorKind::NotFound)?;
            let file = place.write(&contents, &changed_later.changes)?;
            Ok::<_, io::Error>((file, changed_later))
        });
        let (file, changed_later) = written.await.map_err(io::Error::other)??;
        let mut state = self.state();
        state.own = Some(Own { id, since, file: Some(file) });
        (state.loaded, state.refused, state.taken_at) = (None, None, taken);
        drop(state);
        if changed_later.has_more {
            self.remove();
        }
        Ok(changed_later.is_due)
    }

    /// Writes what has changed into the file, at once. Where that is not possible, the file is removed, because it would
    /// admit what may have been revoked.
    async fn mark_pending(self: &Arc<Self>) -> Pending {
        let (found, own) = {
            let mut state = self.state();
            let found = std::mem::take(&mut state.pending);
            let own = if found.changes.is_empty() {
                None
            } else {
                state.own.as_mut().and_then(|own| own.file.take())
            };
            (found, own)
        };
        if found.changes.is_empty() {
            return found;
        }
        let Some(mut file) = own.filter(|_| !found.has_more) else {
            self.remove();
            return found;
        };
        let (store, changes) = (self.clone(), found.changes.clone());
        let appended = tokio::task::spawn_blocking(move || {
            let place = store.place().ok_or(io::ErrorKind::NotFound)?;
            place.append(&mut file, &changes)?;
            Ok::<_, io::Error>(file)
        });
        match appended.await.map_err(io::Error::other).flatten() {
            Ok(file) => {
                if let Some(own) = &mut self.state().own {
                    own.file = Some(file);
                }
            }
            Err(error) => {
                warn!(%error, "cannot write into the snapshot of the directory, which is made anew");
                self.remove();
            }
        }
        found
    }

    fn remove(&self) {
        let Some(path) = &self.path else { return };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                error!(path = %path.display(), %error, "cannot remove an outdated snapshot of the directory; remove it by hand");
            }
            _ => self.state().taken_at = None,
        }
    }
}

impl Pending {
    fn add(&mut self, more: Self) {
        self.changes.extend(more.changes);
        self.has_more |= more.has_more || self.changes.len() > super::PENDING_MAX;
        self.is_due |= more.is_due;
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use tempfile::TempDir;

    use super::*;
    use crate::{
        config::Config,
        control_path::{
            directory::invalidation::{ChangeCounts, Validity},
            secrets::{keyring::Keyring, keyring_reload::ReloadableKeyring},
        },
        data_path::tenant::{DirectoryChange, Login, LoginKind},
    };

    /// A node whose files are in this folder, as it is after a start.
    fn node(folder: &TempDir) -> Arc<SnapshotStore> {
        let ring = folder.path().join("keyring.toml");
        if !ring.exists() {
            Keyring::generate().create_file(&ring).unwrap();
        }
        let text = "directory_snapshot = \"snapshot\"\n[central]\nurl = \"postgres://m@h/c\"\n[keys]\nfile = \"keyring.toml\"\n";
        let config = Config::read(text, Some(&folder.path().join("proxy.toml")), &|_| None).unwrap();
        let keyring = Arc::new(ReloadableKeyring::load(&config).unwrap());
        Arc::new(SnapshotStore::new(&config, "c", keyring, Arc::new(ChangeCounts::new(100))))
    }

    /// As after a first write.
    fn write(store: &SnapshotStore) {
        let since = store.changes.count();
        let mut contents = Contents::empty("one");
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        contents.about.taken_at_ms = u64::try_from(now.as_millis()).unwrap();
        let file = store.place().unwrap().write(&contents, &[]).unwrap();
        store.state().own = Some(Own { id: "one".to_owned(), since, file: Some(file) });
    }

    fn hear(store: &SnapshotStore, change: &DirectoryChange) {
        store.changes.note(change);
        store.note(change);
    }

    /// Which of the logins 1 to 3 the node does not admit by its snapshot.
    async fn revoked(store: &Arc<SnapshotStore>) -> Option<Vec<i64>> {
        let snapshot = store.usable().await?;
        let is_revoked = |id: &i64| {
            let kind = LoginKind::Admin { read_only: true };
            let login = Login { id: *id, ..Login::for_tests("alice", kind) };
            store.changes.validity(snapshot.since, &login) == Validity::Changed
        };
        Some((1..=3).filter(is_revoked).collect())
    }

    #[tokio::test]
    async fn what_was_heard_counts_at_once_and_in_the_process_after() {
        let folder = tempfile::tempdir().unwrap();
        let first = node(&folder);
        hear(&first, &DirectoryChange::Login(3));
        first.mark_pending().await;
        write(&first);
        assert_eq!(revoked(&first).await, Some(vec![]), "it was read after that");
        hear(&first, &DirectoryChange::Login(1));
        assert_eq!(revoked(&first).await, Some(vec![1]), "before it is written");
        first.mark_pending().await;
        hear(&first, &DirectoryChange::Login(2));
        first.mark_pending().await;
        assert_eq!(revoked(&first).await, Some(vec![1, 2]));

        let second = node(&folder);
        assert_eq!(revoked(&second).await, Some(vec![1, 2]));

        hear(&second, &DirectoryChange::Login(3));
        second.mark_pending().await;
        assert!(
            !folder.path().join("snapshot").exists(),
            "it did not write the file, and cannot append to it"
        );
        assert_eq!(revoked(&node(&folder)).await, None);
    }

    #[test]
    fn more_changes_than_are_kept_are_remembered_as_such() {
        let many = |count| Pending {
            changes: vec![DirectoryChange::Login(1); count],
            has_more: false,
            is_due: true,
        };
        let mut all = Pending::default();
        all.add(many(super::super::PENDING_MAX));
        assert!(all.is_due && !all.has_more);
        all.add(many(1));
        assert!(all.has_more);
    }
}
