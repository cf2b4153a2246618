//! What simulated clients send: random batches of messages, with texts that both the proxy and the model of a
//! server understand.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

use crate::wire::message::{append, append_cstr, bind, bind_portal, parse};

/// Messages that are sent at once, and how many ReadyForQuery answer them.
#[derive(Debug, Default)]
pub struct Batch {
    pub bytes: Vec<u8>,
    pub replies: usize,
}

impl Batch {
    pub fn query(&mut self, sql: &str) {
        append(&mut self.bytes, b'Q', |out| append_cstr(out, sql.as_bytes()));
        self.replies += 1;
    }

    pub fn sync(&mut self) {
        append(&mut self.bytes, b'S', |_| {});
        self.replies += 1;
    }

    /// Binds a named portal and executes it, for one row if `limited`.
    pub fn portal(&mut self, portal: &str, statement: &str, parameters: &[&str], limited: bool) {
        bind_portal(portal.as_bytes(), statement.as_bytes(), parameters, &mut self.bytes);
        self.execute(portal, limited);
    }

    pub fn execute(&mut self, portal: &str, limited: bool) {
        append(&mut self.bytes, b'E', |out| {
            append_cstr(out, portal.as_bytes());
            out.extend_from_slice(&u32::from(limited).to_be_bytes());
        });
    }

    pub fn parse(&mut self, name: &str, sql: &str) {
        parse(name.as_bytes(), sql.as_bytes(), &mut self.bytes);
    }

    pub fn bind(&mut self, statement: &str, parameters: &[&str]) {
        bind(statement.as_bytes(), parameters, &mut self.bytes);
    }

    pub fn flush(&mut self) {
        append(&mut self.bytes, b'H', |_| {});
    }

    /// Closes a statement (`S`) or a portal (`P`).
    pub fn close(&mut self, kind: u8, name: &str) {
        self.named(b'C', kind, name);
    }

    pub fn describe(&mut self, kind: u8, name: &str) {
        self.named(b'D', kind, name);
    }

    fn named(&mut self, tag: u8, kind: u8, name: &str) {
        append(&mut self.bytes, tag, |out| {
            out.push(kind);
            append_cstr(out, name.as_bytes());
        });
    }
}

/// Makes up what one client sends.
pub struct Requests {
    pub random: StdRng,
    client: usize,
    count: usize,
}

impl Requests {
    pub fn new(client: usize, seed: u64) -> Self {
        Self { random: StdRng::seed_from_u64(seed), client, count: 0 }
    }

    /// A text that stands in one request only.
    pub fn tag(&mut self) -> String {
        self.count += 1;
        format!("{}-{}", self.client, self.count)
    }

    /// A text that shows what the session has set.
    fn probe(&mut self) -> String {
        let tag = self.tag();
        format!(
            "SELECT '{tag}', current_setting('work_mem'), current_setting('app.user', true), \
             current_setting('application_name'), current_setting('pglobby.tenant')"
        )
    }

    pub fn statement(&mut self) -> String {
        let (tag, number) = (self.tag(), self.random.random_range(0..3));
        let mut texts = vec![
            format!("SELECT '{tag}'"),
            format!("SELECT 1/0, '{tag}'"),
            format!("SELECT pg_sleep(1), '{tag}'"),
            format!("SET work_mem = '{}MB'", 5 + number),
            format!("SET LOCAL work_mem = '{}MB'", 50 + number),
            format!("SET app.user = '{tag}'"),
            format!("SET LOCAL app.user = 'local {tag}'"),
            format!("SET application_name = 'name {tag}'"),
            format!("SELECT set_config('app.user', '{tag}', false)"),
            "RESET work_mem".to_owned(),
            "RESET ALL".to_owned(),
            "BEGIN".to_owned(),
            "COMMIT".to_owned(),
            "ROLLBACK".to_owned(),
            format!("CREATE TEMP TABLE t{number} (a int)"),
            format!("DROP TABLE t{number}"),
            format!("SELECT '{tag}' FROM t{number}"),
            format!("NOTIFY c{number}, '{tag}'"),
            format!("SELECT pg_notify('c{number}', '{tag}')"),
        ];
        let probe = self.probe();
        texts.extend([probe.clone(), probe.clone(), probe]);
        texts.choose(&mut self.random).cloned().unwrap_or_default()
    }

    /// Some batches, sent at once. `discards`: DISCARD ALL may be among them.
    pub fn batches(&mut self, discards: bool) -> Batch {
        let mut batch = Batch::default();
        for _ in 0..self.random.random_range(1..=3) {
            self.add(&mut batch, discards);
        }
        batch
    }

    /// Adds requests that end in a ReadyForQuery.
    pub fn add(&mut self, batch: &mut Batch, discards: bool) {
        let number = self.random.random_range(0..3);
        match self.random.random_range(0..13) {
            0..4 => batch.query(&self.statement()),
            4 => {
                // Between the statements of one text, no startup parameter can be set again.
                let mut texts = vec![self.statement(), self.statement(), self.probe()];
                // The COMMIT of a failed transaction is a ROLLBACK.
                let resets =
                    |sql: &String| ["RESET", "ROLLBACK", "COMMIT"].iter().any(|verb| sql.starts_with(verb));
                texts.retain(|sql| !resets(sql));
                batch.query(&texts.join("; "));
            }
            5 => batch.query(&self.sql_prepare_or_lock(number)),
            6 if discards && self.random.random_ratio(1, 3) => batch.query("DISCARD ALL"),
            kind => {
                match kind {
                    7 => batch.close(b'S', &format!("s{number}")),
                    8 => self.prepare(batch, number),
                    9 => {
                        batch.bind(&format!("s{number}"), &[&self.tag()]);
                        batch.describe(b'P', "");
                        batch.execute("", false);
                    }
                    10 => self.named_portal(batch, number),
                    _ => (0..self.random.random_range(1..=3)).for_each(|_| self.unnamed(batch)),
                }
                batch.sync();
            }
        }
    }

    fn sql_prepare_or_lock(&mut self, number: u32) -> String {
        let tag = self.tag();
        let sqls = [
            format!("PREPARE p{number} AS SELECT '{tag}'"),
            format!("EXECUTE p{number}"),
            format!("DEALLOCATE p{number}"),
            format!("SELECT pg_advisory_lock({number})"),
            format!("SELECT pg_advisory_unlock({number})"),
        ];
        sqls.choose(&mut self.random).cloned().unwrap_or_default()
    }

    /// A named statement, used later as well.
    fn prepare(&mut self, batch: &mut Batch, number: u32) {
        let name = format!("s{number}");
        batch.parse(&name, &format!("SELECT $1, '{}', current_setting('work_mem')", self.tag()));
        if self.random.random() {
            batch.describe(b'S', &name);
        }
    }

    /// A portal of a transaction, or of one batch.
    fn named_portal(&mut self, batch: &mut Batch, number: u32) {
        let (tag, portal, limited) = (self.tag(), format!("c{number}"), self.random.random());
        match self.random.random_range(0..3) {
            0 => batch.portal(&portal, &format!("s{number}"), &[&tag], limited),
            1 => batch.execute(&portal, limited),
            _ => {
                batch.parse("", &self.statement());
                batch.portal(&portal, "", &[], limited);
                batch.execute(&portal, limited);
            }
        }
        if self.random.random_ratio(1, 3) {
            batch.close(b'P', &portal);
        }
    }

    fn unnamed(&mut self, batch: &mut Batch) {
        let sql = match self.random.random_range(0..8) {
            0 => format!("SELEC '{}'", self.tag()),
            _ => self.statement(),
        };
        batch.parse("", &sql);
        batch.bind("", &[]);
        if self.random.random() {
            batch.describe(b'P', "");
        }
        batch.execute("", false);
    }

    /// A COPY with some data; it ends with CopyDone or CopyFail.
    pub fn copy(&mut self) -> Batch {
        let mut batch = Batch::default();
        batch.query("COPY t FROM STDIN");
        for _ in 0..self.random.random_range(0..5) {
            append(&mut batch.bytes, b'd', |out| out.extend_from_slice(b"1\n"));
        }
        match self.random.random_ratio(4, 5) {
            true => append(&mut batch.bytes, b'c', |_| {}),
            false => append(&mut batch.bytes, b'f', |out| append_cstr(out, b"no more")),
        }
        batch
    }

    /// Where to cut so many bytes.
    pub fn cuts(&mut self, bytes: usize) -> Vec<usize> {
        let mut cuts: Vec<_> =
            (0..self.random.random_range(0..4)).map(|_| self.random.random_range(0..=bytes)).collect();
        cuts.push(bytes);
        cuts.sort_unstable();
        cuts
    }
}
