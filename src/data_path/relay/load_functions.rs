//! Loads the functions of a database, and the objects that use them, from its system catalogs.
//!
//! Runs after a transaction, on the server that ran it, when its client has the reply. Only a session that
//! keeps the server, or that must know the functions to settle its own transaction, waits for it.

use std::sync::Arc;

use crate::{
    data_path::{
        functions::{
            dependencies::{
                CASTS, Dependency, DependencyGraph, EVENT_TRIGGERS, FUNCTIONS, Node, OPERATOR_CLASSES,
                OPERATORS, SUPPORT_FUNCTIONS,
            },
            effects_by_name::{CallEffects, EffectsByName},
            function_effects::{self, Function},
        },
        memory_limit::{Account, Charge},
        pool::{Pool, PooledServer},
        server::connection::{AskError, Row, Server},
        session_state::side_effects::SideEffects,
        sql::SESSION_FUNCTIONS,
    },
    wire::server_error::ServerError,
};

/// Loads them with a server that a session has returned, in a task of its own: the session goes on.
#[cold]
pub(super) fn load_then_give_back(mut server: Box<PooledServer>, pool: &Arc<Pool>) {
    let pool = pool.clone();
    let home = pool.placement.home();
    home.spawn(async move {
        match load_functions(&mut server, &pool).await {
            Ok(()) => pool.give_back(server),
            Err(error) => {
                let (tenant, host, server_pid) =
                    (&pool.tenant.name, &pool.tenant.host.name, server.process_id);
                tracing::warn!(tenant, host, server_pid, side = "server", %error, "server lost while it loads functions");
            }
        }
    });
}

/// Loads them, unless another session does so or they are current. If the server refuses, every text stays
/// unknown. The result counts as the tenant's memory. After
/// any error but [`AskError::Refused`] the server must be closed.
pub async fn load_functions(server: &mut Server, pool: &Pool) -> Result<(), AskError> {
    let (bytes_max, memory, tenant) = (pool.rules.functions_bytes_max, &pool.memory, &*pool.tenant.name);
    let Some(loading) = pool.functions.begin_load() else { return Ok(()) };
    let answer = async {
        let counts = server.ask(COUNTS, &[]).await?;
        let counts = counts.first().map(|row| text(row, 0)).unwrap_or_default();
        if !counts.is_empty() && counts == loading.counts {
            loading.trust_counts();
            return Ok(());
        }
        let stamp = server.ask(STAMP, &[]).await?;
        let stamp = stamp.first().map(|row| (text(row, 0), number(row, 1), bytes(row, 2) == b"t"));
        let (fingerprint, bytes, no_event_triggers) = stamp.unwrap_or_default();
        if fingerprint == loading.fingerprint {
            loading.unchanged(counts, no_event_triggers);
        } else if bytes > bytes_max {
            tracing::warn!(
                tenant,
                bytes,
                "functions exceed functions_inspect_max; state is checked after every transaction"
            );
            loading.loaded(EffectsByName::unknown(), fingerprint, counts, no_event_triggers);
        } else {
            // Twice: names, numbers and the protocol's own bytes come on top.
            let mut reader =
                Reader { server, memory, bytes_max: bytes_max.saturating_mul(2), charge: Charge::default() };
            match reader.read().await {
                Ok(known) => {
                    let known = known.charged(reader.charge, memory);
                    loading.loaded(known, fingerprint, counts, no_event_triggers);
                }
                Err(AskError::Refused(error)) if error.is_too_long() => {
                    tracing::warn!(
                        tenant,
                        "functions exceed the memory limit; state is checked after every transaction"
                    );
                    // Tried again at the next check for changes.
                    loading.loaded(EffectsByName::unknown(), String::new(), String::new(), no_event_triggers);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    };
    match answer.await {
        Err(AskError::Refused(error)) => {
            tracing::debug!(tenant, %error, "cannot load functions");
            Ok(())
        }
        other => other,
    }
}

/// Reads functions and their users.
struct Reader<'r> {
    server: &'r mut Server,
    memory: &'r Arc<Account>,
    /// Bytes of one answer, and of the dependency graph.
    bytes_max: usize,
    /// The memory of the dependency graph so far.
    charge: Charge,
}

impl Reader<'_> {
    async fn read(&mut self) -> Result<EffectsByName, AskError> {
        let mut graph = DependencyGraph::default();
        let (functions, charge) = self.ask(FUNCTION_TEXTS, &[]).await?;
        for row in functions {
            let node = (FUNCTIONS, oid(&row, 0));
            let body = bytes(&row, 3);
            graph.name(node, bytes(&row, 1).to_vec());
            graph.body(node, body);
            let function = Function { language: bytes(&row, 2), body, library: bytes(&row, 4) };
            let (effects, uses_any_relation) = function_effects::read(&function);
            if uses_any_relation {
                graph.uses_any_relation(node);
            }
            if !effects.is_empty() {
                graph.add_root(node, &effects);
            }
            self.count(&graph)?;
        }
        drop(charge);
        let functions: Vec<String> = SESSION_FUNCTIONS.iter().map(|name| (*name).to_owned()).collect();
        let (calls, _) = self.ask(DIRECT_CALLS, &[&format!("{{{}}}", functions.join(","))]).await?;
        for row in calls {
            let effects: CallEffects = SideEffects::of_call(bytes(&row, 2)).into();
            if !effects.is_empty() {
                graph.add_root((oid(&row, 0), oid(&row, 1)), &effects);
            }
        }
        if graph.is_empty() {
            return self.close(graph);
        }
        let (names, charge) = self.ask(NAMES, &[]).await?;
        for row in names {
            graph.name((oid(&row, 0), oid(&row, 1)), bytes(&row, 2).to_vec());
            self.count(&graph)?;
        }
        drop(charge);
        let (uses, _charge) = self.ask(&uses(), &[]).await?;
        for row in uses {
            let node = |at: usize| -> Node { (oid(&row, at), oid(&row, at + 1)) };
            graph.uses(Dependency { used: node(0), user: node(2), on_write: bytes(&row, 4) == b"t" });
            self.count(&graph)?;
        }
        self.close(graph)
    }

    async fn ask(&mut self, sql: &str, parameters: &[&str]) -> Result<(Vec<Row>, Charge), AskError> {
        self.server.ask_for(sql, parameters, self.bytes_max, self.memory).await
    }

    fn close(&mut self, graph: DependencyGraph) -> Result<EffectsByName, AskError> {
        // While it is computed, it counts with its limit.
        let target = graph.bytes().saturating_mul(2).max(CLOSURE_BYTES_MIN).min(2 * self.bytes_max);
        self.charge.try_set(self.memory, target).map_err(|_| too_long())?;
        graph.propagate(target).ok_or_else(too_long)
    }

    /// Counts the graph, in steps.
    fn count(&mut self, graph: &DependencyGraph) -> Result<(), AskError> {
        if graph.bytes() <= self.charge.bytes() {
            return Ok(());
        }
        let bytes = graph.bytes().next_multiple_of(COUNTED_BYTES);
        if bytes > 2 * self.bytes_max {
            return Err(too_long());
        }
        self.charge.try_set(self.memory, bytes).map_err(|_| too_long())
    }
}

/// The graph is counted in steps of so many bytes.
const COUNTED_BYTES: usize = 256 * 1024;

/// The least limit of the names that functions pass on to their callers.
const CLOSURE_BYTES_MIN: usize = 1 << 20;

fn too_long() -> AskError {
    AskError::Refused(ServerError::too_long())
}

fn bytes(row: &Row, at: usize) -> &[u8] {
    row.get(at).and_then(Option::as_deref).unwrap_or_default()
}

fn text(row: &Row, at: usize) -> String {
    String::from_utf8_lossy(bytes(row, at)).into_owned()
}

fn number(row: &Row, at: usize) -> usize {
    text(row, at).parse().unwrap_or(usize::MAX)
}

fn oid(row: &Row, at: usize) -> u32 {
    text(row, at).parse().unwrap_or(0)
}

/// The number of row changes in the catalogs that [`STAMP`] reads, from statistics. Empty where they are not
/// counted, or are expensive to read (before PostgreSQL 15).
const COUNTS: &str = "SELECT CASE WHEN pg_catalog.current_setting('server_version_num')::int >= 150000 \
   AND pg_catalog.current_setting('track_counts')::bool THEN \
  (SELECT pg_catalog.sum(pg_catalog.pg_stat_get_tuples_inserted(c) + pg_catalog.pg_stat_get_tuples_updated(c) \
    + pg_catalog.pg_stat_get_tuples_deleted(c)) \
   FROM pg_catalog.unnest('{1255,2620,2618,2604,2606,3256,2617,2605,3466,1259}'::oid[]) AS c) END";

/// A fingerprint that changes with every function and every object that may call one; the bytes of all
/// function texts; and whether there is no event trigger. Built-in objects have numbers below 16384.
const STAMP: &str = "SELECT pg_catalog.concat_ws(' ', pg_catalog.count(*), pg_catalog.sum(pg_catalog.hashtext(pg_catalog.concat_ws(' ', c, o, x))::bigint)), \
    (SELECT coalesce(pg_catalog.sum(pg_catalog.octet_length(prosrc)), 0) FROM pg_catalog.pg_proc WHERE oid >= 16384 AND prolang >= 14), \
    NOT EXISTS (SELECT FROM pg_catalog.pg_event_trigger) \
 FROM (SELECT 1 AS c, oid AS o, xmin AS x FROM pg_catalog.pg_proc WHERE oid >= 16384 \
  UNION ALL SELECT 2, oid, xmin FROM pg_catalog.pg_trigger WHERE oid >= 16384 AND NOT tgisinternal \
  UNION ALL SELECT 3, oid, xmin FROM pg_catalog.pg_rewrite WHERE oid >= 16384 \
  UNION ALL SELECT 4, oid, xmin FROM pg_catalog.pg_attrdef WHERE oid >= 16384 \
  UNION ALL SELECT 5, oid, xmin FROM pg_catalog.pg_constraint WHERE oid >= 16384 \
  UNION ALL SELECT 6, oid, xmin FROM pg_catalog.pg_policy WHERE oid >= 16384 \
  UNION ALL SELECT 7, oid, xmin FROM pg_catalog.pg_operator WHERE oid >= 16384 \
  UNION ALL SELECT 8, oid, xmin FROM pg_catalog.pg_cast WHERE oid >= 16384 \
  UNION ALL SELECT 9, oid, xmin FROM pg_catalog.pg_event_trigger WHERE oid >= 16384 \
  UNION ALL SELECT 10, oid, xmin FROM pg_catalog.pg_class WHERE oid >= 16384 AND relkind IN ('r','p','v','m','f')) AS t";

/// The texts of functions. A body in `BEGIN ATOMIC` is not in `prosrc`.
const FUNCTION_TEXTS: &str = "SELECT p.oid, p.proname, l.lanname, \
    CASE WHEN l.lanname IN ('c', 'internal') THEN '' \
    WHEN p.prosrc = '' AND p.prokind IN ('f', 'p') THEN pg_catalog.pg_get_functiondef(p.oid) ELSE p.prosrc END, p.probin::text \
 FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_language AS l ON l.oid = p.prolang WHERE p.oid >= 16384";

/// Views, policies, defaults and checks that call PostgreSQL's own functions with effects on the session. No
/// dependency records that, only the expressions themselves. Each is split once, at its calls: a search for
/// every function took ten times as long.
const DIRECT_CALLS: &str = "WITH f AS (SELECT oid, proname FROM pg_catalog.pg_proc WHERE oid < 16384 AND proname = ANY ($1::text[])), \
  e AS (SELECT 2618 AS c, oid AS o, ev_action::text AS t FROM pg_catalog.pg_rewrite WHERE oid >= 16384 \
  UNION ALL SELECT 2604, oid, adbin::text FROM pg_catalog.pg_attrdef WHERE oid >= 16384 \
  UNION ALL SELECT 2606, oid, conbin::text FROM pg_catalog.pg_constraint WHERE oid >= 16384 AND conbin IS NOT NULL \
  UNION ALL SELECT 3256, oid, pg_catalog.concat(polqual::text, polwithcheck::text) FROM pg_catalog.pg_policy WHERE oid >= 16384) \
 SELECT e.c, e.o, f.proname FROM e, pg_catalog.unnest(pg_catalog.string_to_array(e.t, ':funcid ')) AS call \
  JOIN f ON f.oid::text = pg_catalog.split_part(call, ' ', 1) \
 UNION SELECT 1255, p.oid, f.proname FROM pg_catalog.pg_proc AS p \
  JOIN f ON p.prosrc = f.proname WHERE p.oid >= 16384 AND p.prolang = 12";

/// The names of tables, views and types, without arrays and row types.
const NAMES: &str = "SELECT 1259, oid, relname FROM pg_catalog.pg_class WHERE oid >= 16384 AND relkind IN ('r','p','v','m','f','c') \
 UNION ALL SELECT 1247, oid, typname FROM pg_catalog.pg_type WHERE oid >= 16384 AND typtype <> 'c' AND typcategory <> 'A'";

/// Rows `(used, user, only on writes)`. A write to a table uses its triggers, rules, defaults, checks and
/// indexes, and the tables that foreign keys change with it. Only dependencies that mean a call count: a
/// trigger depends on its table, but does not call the table's other triggers.
fn uses() -> String {
    format!(
        "SELECT refclassid, refobjid, classid, objid, false FROM pg_catalog.pg_depend \
  WHERE objid >= 16384 AND refobjid >= 16384 AND classid <> refclassid AND ( \
   refclassid IN ({FUNCTIONS}, {OPERATORS}, 1247) AND classid IN ({FUNCTIONS}, 1259, 1247, 2618, 2604, 2606, 2620, 3256, \
    {OPERATORS}, {CASTS}, {OPERATOR_CLASSES}, {SUPPORT_FUNCTIONS}, {EVENT_TRIGGERS}) \
   OR refclassid = 1259 AND classid IN ({FUNCTIONS}, 2618, 3256)) \
 UNION ALL SELECT refclassid, refobjid, classid, objid, false FROM pg_catalog.pg_depend \
  WHERE objid >= 16384 AND refobjid >= 16384 AND classid = refclassid AND classid IN ({FUNCTIONS}, 1247) \
 UNION ALL SELECT 2618, oid, 1259, ev_class, ev_type <> '1' FROM pg_catalog.pg_rewrite WHERE oid >= 16384 \
 UNION ALL SELECT 2620, oid, 1259, tgrelid, true FROM pg_catalog.pg_trigger WHERE oid >= 16384 AND NOT tgisinternal \
 UNION ALL SELECT 2604, d.oid, 1259, d.adrelid, a.attgenerated = '' FROM pg_catalog.pg_attrdef AS d \
  JOIN pg_catalog.pg_attribute AS a ON a.attrelid = d.adrelid AND a.attnum = d.adnum WHERE d.oid >= 16384 \
 UNION ALL SELECT 2606, oid, 1259, conrelid, true FROM pg_catalog.pg_constraint WHERE oid >= 16384 AND conrelid <> 0 \
 UNION ALL SELECT 2606, oid, 1247, contypid, false FROM pg_catalog.pg_constraint WHERE oid >= 16384 AND contypid <> 0 \
 UNION ALL SELECT 1259, conrelid, 1259, confrelid, true FROM pg_catalog.pg_constraint \
  WHERE oid >= 16384 AND (confdeltype IN ('c', 'n', 'd') OR confupdtype IN ('c', 'n', 'd')) \
 UNION ALL SELECT 3256, oid, 1259, polrelid, false FROM pg_catalog.pg_policy WHERE oid >= 16384 \
 UNION ALL SELECT 1259, indexrelid, 1259, indrelid, true FROM pg_catalog.pg_index WHERE indexrelid >= 16384 \
 UNION ALL SELECT 1259, inhrelid, 1259, inhparent, false FROM pg_catalog.pg_inherits \
 UNION ALL SELECT 1259, oid, 1247, reltype, false FROM pg_catalog.pg_class WHERE oid >= 16384 AND relkind = 'c'"
    )
}
