//! Counts the bytes that the proxy allocates for clients, against limits of the session, its tenant and the
//! process.
//!
//! ```text
//! process ◀─ tenant ◀─ session              unsent bytes, settings, names of statements
//!                   ◀─ its statements       prepared texts, which its sessions share
//! ```
//!
//! An account may use at most as much as it leaves free in its parent: one tenant gets half of the process,
//! two get a third each, and there is always room for one more. So accounts with large use are refused before
//! those with little.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use crate::{config::Limits, data_path::lock::locked, error::Limit};

/// The allocator's overhead for each allocation, in bytes.
pub const PIECE_BYTES: usize = 16;

/// The bytes of a session, a tenant, or the process.
#[derive(Debug)]
pub struct Account {
    limit: Limit,
    max: AtomicUsize,
    used: AtomicUsize,
    /// The accounts that count the same bytes too.
    parents: Box<[Arc<Account>]>,
}

impl Default for Account {
    /// An account without a limit.
    fn default() -> Self {
        Self {
            limit: Limit::Process,
            max: usize::MAX.into(),
            used: AtomicUsize::new(0),
            parents: Box::default(),
        }
    }
}

impl Account {
    /// An account of at most `max` bytes.
    pub fn new(limit: Limit, max: usize, parents: &[&Arc<Self>]) -> Arc<Self> {
        let parents = parents.iter().map(|parent| (*parent).clone()).collect();
        Arc::new(Self { limit, max: max.into(), used: AtomicUsize::new(0), parents })
    }

    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    pub fn max(&self) -> usize {
        self.max.load(Relaxed)
    }

    /// Changes the limit. Bytes in use are not affected.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Relaxed);
    }

    /// The value of a limit of this account or its parents; `None` if it is another account's.
    pub fn max_of(&self, limit: Limit) -> Option<usize> {
        let own = (self.limit == limit).then(|| self.max());
        own.or_else(|| self.parents.iter().find_map(|parent| parent.max_of(limit)))
    }

    /// Checks whether this many more bytes may be used.
    pub fn admits(&self, bytes: usize) -> Result<(), Limit> {
        let grown = self.used().saturating_add(bytes);
        if grown > self.max() {
            return Err(self.limit);
        }
        self.parents.iter().try_for_each(|parent| {
            parent.admits(bytes)?;
            let free = parent.max().saturating_sub(parent.used().saturating_add(bytes));
            if grown > free { Err(parent.limit) } else { Ok(()) }
        })
    }

    fn change(&self, from: usize, to: usize) {
        match to.checked_sub(from) {
            Some(more) => self.used.fetch_add(more, Relaxed),
            None => self.used.fetch_sub(from - to, Relaxed),
        };
        self.parents.iter().for_each(|parent| parent.change(from, to));
    }
}

/// Charged bytes. Drop returns them.
#[derive(Debug, Default)]
pub struct Charge {
    /// `None`: nothing was charged yet.
    account: Option<Arc<Account>>,
    bytes: usize,
}

impl Charge {
    /// Charges bytes without a check of the limits.
    pub fn new(account: &Arc<Account>, bytes: usize) -> Self {
        let mut charge = Self::default();
        charge.set(account, bytes);
        charge
    }

    #[inline]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sets the charged bytes, in this account.
    pub fn set(&mut self, account: &Arc<Account>, bytes: usize) {
        match &self.account {
            Some(before) if Arc::ptr_eq(before, account) => account.change(self.bytes, bytes),
            before => {
                before.iter().for_each(|before| before.change(self.bytes, 0));
                account.change(0, bytes);
                self.account = Some(account.clone());
            }
        }
        self.bytes = bytes;
    }

    /// The same with a check of the limits. The charge does not change on an error.
    pub fn try_set(&mut self, account: &Arc<Account>, bytes: usize) -> Result<(), Limit> {
        let same = self.account.as_ref().is_some_and(|before| Arc::ptr_eq(before, account));
        let more = bytes.saturating_sub(if same { self.bytes } else { 0 });
        if more > 0 {
            account.admits(more)?;
        }
        self.set(account, bytes);
        Ok(())
    }

    /// Returns all charged bytes.
    #[inline]
    pub fn clear(&mut self) {
        if self.bytes > 0 {
            *self = Self::default();
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            account.change(self.bytes, 0);
        }
    }
}

/// The accounts of a process.
#[derive(Debug)]
pub struct Accounts {
    /// All tenants.
    pub process: Arc<Account>,
    /// The prepared statements of all tenants; they count in the process too.
    pub statements: Arc<Account>,
    /// Sessions without a tenant.
    pub no_tenant: Arc<Account>,
    by_tenant: Mutex<HashMap<i64, Weak<Account>>>,
}

impl Accounts {
    /// Accounts with these limits and no bytes in use.
    pub fn new(limits: &Limits) -> Self {
        let process = Account::new(Limit::Process, limits.memory_max, &[]);
        Self {
            statements: Account::new(Limit::StatementsInAll, limits.prepared_bytes_max, &[]),
            no_tenant: Account::new(Limit::Tenant, limits.tenant_memory_max, &[&process]),
            process,
            by_tenant: Mutex::default(),
        }
    }

    /// Applies a changed configuration.
    pub fn limit(&self, limits: &Limits) {
        self.process.set_max(limits.memory_max);
        self.statements.set_max(limits.prepared_bytes_max);
        for (_, tenant) in self.tenants() {
            tenant.set_max(limits.tenant_memory_max);
        }
        self.no_tenant.set_max(limits.tenant_memory_max);
    }

    /// The account of a tenant; shared while it is in use.
    pub fn of_tenant(&self, id: i64, limits: &Limits) -> Arc<Account> {
        let mut all = locked(&self.by_tenant);
        // Unused entries are removed when the map would have to grow.
        if all.len() == all.capacity() {
            all.retain(|_, account| account.strong_count() > 0);
        }
        if let Some(account) = all.get(&id).and_then(Weak::upgrade) {
            return account;
        }
        let account = Account::new(Limit::Tenant, limits.tenant_memory_max, &[&self.process]);
        all.insert(id, Arc::downgrade(&account));
        account
    }

    /// The accounts of tenants that are in use.
    pub fn tenants(&self) -> Vec<(i64, Arc<Account>)> {
        let all = locked(&self.by_tenant);
        all.iter().filter_map(|(id, account)| Some((*id, account.upgrade()?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tenants(process: &Arc<Account>) -> [Arc<Account>; 2] {
        [(); 2].map(|()| Account::new(Limit::Tenant, 800, &[process]))
    }

    #[test]
    fn one_tenant_leaves_as_much_as_it_takes() {
        let process = Account::new(Limit::Process, 1000, &[]);
        let [greedy, modest] = tenants(&process);
        let mut kept = Charge::default();
        assert_eq!(kept.try_set(&greedy, 501), Err(Limit::Process));
        assert_eq!(kept.try_set(&greedy, 500), Ok(()));
        assert_eq!(Charge::default().try_set(&modest, 251), Err(Limit::Process));
        assert_eq!(Charge::default().try_set(&modest, 250), Ok(()));
        assert_eq!((process.used(), greedy.used(), modest.used()), (500, 500, 0));
    }

    #[test]
    fn an_account_with_two_parents_counts_in_both() {
        let process = Account::new(Limit::Process, 1000, &[]);
        let all = Account::new(Limit::StatementsInAll, 100, &[]);
        let [tenant, _] = tenants(&process);
        let statements = Account::new(Limit::Tenant, usize::MAX, &[&tenant, &all]);
        let mut kept = Charge::default();
        assert_eq!(kept.try_set(&statements, 60), Err(Limit::StatementsInAll));
        assert_eq!(kept.try_set(&statements, 40), Ok(()));
        assert_eq!([&process, &tenant, &all].map(|account| account.used()), [40; 3]);
        assert_eq!(statements.max_of(Limit::StatementsInAll), Some(100));
        kept.clear();
        assert_eq!([&process, &tenant, &all].map(|account| account.used()), [0; 3]);
    }

    #[test]
    fn a_charge_goes_along_to_another_tenant() {
        let process = Account::new(Limit::Process, 1000, &[]);
        let [old, new] = tenants(&process);
        let mut kept = Charge::new(&old, 70);
        kept.set(&new, 80);
        assert_eq!((process.used(), old.used(), new.used()), (80, 0, 80));
    }

    proptest! {
        /// Charges and returns in any order leave the right sum and never exceed a limit.
        #[test]
        fn what_is_kept_is_what_counts(steps in prop::collection::vec((0..6_usize, 0..400_usize), 1..200)) {
            let process = Account::new(Limit::Process, 1000, &[]);
            let [one, other] = tenants(&process);
            let accounts = [&one, &other].map(|tenant| Account::new(Limit::Client, 300, &[tenant]));
            let mut charges: [Charge; 6] = Default::default();
            for (place, bytes) in steps {
                let before = charges[place].bytes();
                let outcome = charges[place].try_set(&accounts[place % 2], bytes);
                prop_assert!(outcome.is_ok() || bytes > before);
                prop_assert_eq!(charges[place].bytes(), if outcome.is_ok() { bytes } else { before });
                let sum = |side: usize| -> usize { charges.iter().skip(side).step_by(2).map(Charge::bytes).sum() };
                prop_assert_eq!([accounts[0].used(), accounts[1].used()], [sum(0), sum(1)]);
                prop_assert_eq!(process.used(), sum(0) + sum(1));
                prop_assert!(process.used() <= 1000 && one.used() <= 800 && accounts[0].used() <= 300);
            }
            drop(charges);
            prop_assert_eq!((process.used(), one.used(), other.used()), (0, 0, 0));
        }
    }
}
