//! Side effects of one function, from its language and body. Pure.

use super::effects_by_name::CallEffects;
use crate::data_path::{
    session_state::side_effects::SideEffects,
    sql::{self, Effects},
};

/// A row of `pg_proc`.
pub struct Function<'a> {
    pub language: &'a [u8],
    /// Empty for C functions.
    pub body: &'a [u8],
    /// The library of a C function.
    pub library: &'a [u8],
}

/// Returns the side effects of a call, and whether the function uses tables or views with unknown names.
pub fn read(function: &Function<'_>) -> (CallEffects, bool) {
    let traces = match function.language {
        b"sql" | b"plpgsql" => {
            let effects = sql::effects_of_body(function.body);
            let traces = SideEffects::of_body(effects, function.body).into();
            return (traces, effects.contains(Effects::ANY_RELATION));
        }
        b"internal" => CallEffects::default(),
        b"c" if is_known(function.library) => CallEffects::default(),
        b"c" => SideEffects::anything().into(),
        // Python, Perl and others build their SQL at run time.
        _ => SideEffects::of_foreign_body(function.body).into(),
    };
    (traces, false)
}

/// Libraries whose functions have no side effects except those listed in `sql/effects.rs`: PostgreSQL's own
/// modules and widespread extensions.
const KNOWN_LIBRARIES: [&str; 61] = [
    "adminpack",
    "amcheck",
    "autoinc",
    "bloom",
    "btree_gin",
    "btree_gist",
    "citext",
    "cube",
    "dblink",
    "dict_int",
    "dict_xsyn",
    "earthdistance",
    "file_fdw",
    "fuzzystrmatch",
    "h3",
    "h3_postgis",
    "hll",
    "hstore",
    "hstore_plperl",
    "hstore_plpython3",
    "hypopg",
    "insert_username",
    "intagg",
    "_int",
    "intarray",
    "isn",
    "lo",
    "ltree",
    "moddatetime",
    "pageinspect",
    "pg_buffercache",
    "pg_cron",
    "pg_freespacemap",
    "pg_hint_plan",
    "pg_prewarm",
    "pg_repack",
    "pg_stat_statements",
    "pg_surgery",
    "pg_trgm",
    "pg_visibility",
    "pg_walinspect",
    "pgcrypto",
    "pgrouting",
    "pgrowlocks",
    "pgstattuple",
    "plperl",
    "plpgsql",
    "plpython3",
    "pltcl",
    "postgis-3",
    "postgis_raster-3",
    "postgis_topology-3",
    "postgres_fdw",
    "refint",
    "seg",
    "sslinfo",
    "tablefunc",
    "tcn",
    "unaccent",
    "uuid-ossp",
    "vector",
];

fn is_known(library: &[u8]) -> bool {
    let name = library.rsplit(|byte| *byte == b'/').next().unwrap_or(library);
    let name = name.strip_suffix(b".so").unwrap_or(name);
    KNOWN_LIBRARIES.iter().any(|known| known.as_bytes() == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data_path::session_state::{pins::Pins, state_query::StateChecks};

    fn traces(function: &Function<'_>) -> CallEffects {
        read(function).0
    }

    fn of(body: &str) -> CallEffects {
        traces(&Function { language: b"plpgsql", body: body.as_bytes(), library: b"" })
    }

    #[test]
    fn an_ordinary_function_leaves_nothing_behind() {
        for body in [
            "BEGIN RETURN NEW; END",
            "begin new.changed = now(); return new; end",
            "begin raise notice 'set a temp table; reset all'; update t set x = 1; end",
            "select pg_advisory_xact_lock(1)",
            "begin perform pg_notify('a', 'b'); insert into audit values (nextval('s')); end",
        ] {
            assert!(of(body).is_empty(), "{body}: {:?}", of(body));
        }
    }

    #[test]
    fn what_a_function_sets_for_its_transaction_counts_for_what_is_parsed_in_it() {
        for body in [
            "begin perform set_config('app.user', who, true); return 1; end",
            "begin set local search_path = a; new.changed = now(); return new; end",
        ] {
            assert_eq!(of(body).checks, StateChecks::LOCAL_SETTINGS, "{body}");
        }
    }

    #[test]
    fn what_a_body_shows_is_found() {
        assert_eq!(of("begin perform pg_advisory_lock(1); end").checks, StateChecks::LOCKS);
        assert_eq!(of("begin create temp table x (i int); end").checks, StateChecks::TEMPORARY);
        let set = of("begin perform set_config('app.user', who, false); end");
        assert!(set.names.contains("app.user") && set.pins.is_empty());
        assert_eq!(of("begin perform set_config(a || b, who, false); end").pins, Pins::SETTINGS);
        let dynamic = of("begin execute 'set app.' || 'user = 1'; execute 'set my.note = 1'; end");
        assert!(
            dynamic.checks.contains(StateChecks::EVERYTHING) && dynamic.checks.contains(StateChecks::UNNAMED)
        );
        assert!(dynamic.names.contains("my.note"));
        let built = of("begin execute 'set my.note = 1'; end");
        assert!(built.checks.contains(StateChecks::ANY_SETTING) && built.names.contains("my.note"));
        let set = of("begin set my.note = 'x'; reset work_mem; end");
        assert!(set.checks.contains(StateChecks::ANY_SETTING) && set.names.contains("my.note"));
    }

    #[test]
    fn of_other_languages_and_unknown_libraries_everything_is_asked() {
        let foreign =
            Function { language: b"plpython3u", body: b"plpy.execute('set my.note = 1')", library: b"" };
        assert!(
            traces(&foreign).checks.contains(StateChecks::EVERYTHING)
                && traces(&foreign).names.contains("my.note")
        );
        let c = |library: &'static [u8]| traces(&Function { language: b"c", body: b"", library });
        assert!(c(b"$libdir/postgis-3").is_empty());
        assert!(c(b"$libdir/our_own").checks.contains(StateChecks::EVERYTHING));
    }
}
