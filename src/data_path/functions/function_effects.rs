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
    let effects = match function.language {
        b"sql" | b"plpgsql" => {
            let of_sql = sql::effects_of_body(function.body);
            let effects = SideEffects::of_body(of_sql, function.body).into();
            return (effects, of_sql.contains(Effects::ANY_RELATION));
        }
        b"internal" => CallEffects::default(),
        b"c" if is_known_library(function.library) => CallEffects::default(),
        b"c" => SideEffects::anything().into(),
        // Python, Perl and others build their SQL at run time.
        _ => SideEffects::of_foreign_body(function.body).into(),
    };
    (effects, false)
}

/// Libraries whose functions have no side effects except those listed in `sql/effects.rs`: PostgreSQL's own
/// modules and widespread extensions.
#[rustfmt::skip]
const KNOWN_LIBRARIES: [&str; 61] = [
    "adminpack", "amcheck", "autoinc", "bloom", "btree_gin", "btree_gist", "citext", "cube", "dblink",
    "dict_int", "dict_xsyn", "earthdistance", "file_fdw", "fuzzystrmatch", "h3", "h3_postgis", "hll",
    "hstore", "hstore_plperl", "hstore_plpython3", "hypopg", "insert_username", "intagg", "_int",
    "intarray", "isn", "lo", "ltree", "moddatetime", "pageinspect", "pg_buffercache", "pg_cron",
    "pg_freespacemap", "pg_hint_plan", "pg_prewarm", "pg_repack", "pg_stat_statements", "pg_surgery",
    "pg_trgm", "pg_visibility", "pg_walinspect", "pgcrypto", "pgrouting", "pgrowlocks", "pgstattuple",
    "plperl", "plpgsql", "plpython3", "pltcl", "postgis-3", "postgis_raster-3", "postgis_topology-3",
    "postgres_fdw", "refint", "seg", "sslinfo", "tablefunc", "tcn", "unaccent", "uuid-ossp", "vector",
];

fn is_known_library(library: &[u8]) -> bool {
    let name = library.rsplit(|byte| *byte == b'/').next().unwrap_or(library);
    let name = name.strip_suffix(b".so").unwrap_or(name);
    KNOWN_LIBRARIES.iter().any(|listed| listed.as_bytes() == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data_path::session_state::{pins::Pins, state_query::StateChecks};

    fn effects_of(function: &Function<'_>) -> CallEffects {
        read(function).0
    }

    fn of(body: &str) -> CallEffects {
        effects_of(&Function { language: b"plpgsql", body: body.as_bytes(), library: b"" })
    }

    #[test]
    fn an_ordinary_function_has_no_side_effects() {
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
    fn local_settings_of_a_function_are_found() {
        for body in [
            "begin perform set_config('app.user', who, true); return 1; end",
            "begin set local search_path = a; new.changed = now(); return new; end",
        ] {
            assert!(of(body).checks.contains(StateChecks::LOCAL_SETTINGS), "{body}");
        }
    }

    #[test]
    fn effects_visible_in_a_body_are_found() {
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
    fn other_languages_and_unknown_libraries_may_have_any_effect() {
        let foreign =
            Function { language: b"plpython3u", body: b"plpy.execute('set my.note = 1')", library: b"" };
        assert!(
            effects_of(&foreign).checks.contains(StateChecks::EVERYTHING)
                && effects_of(&foreign).names.contains("my.note")
        );
        let c = |library: &'static [u8]| effects_of(&Function { language: b"c", body: b"", library });
        assert!(c(b"$libdir/postgis-3").is_empty());
        assert!(c(b"$libdir/our_own").checks.contains(StateChecks::EVERYTHING));
    }
}
