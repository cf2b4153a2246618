//! One way to lock: a panic in another task does not end those that use the same state.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also after a panic under the lock.
#[inline]
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
