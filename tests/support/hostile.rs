//! A tenant that means harm: everything that a role can define in its own database is a trap, which says in the server's
//! log as whom it runs, and tries to become more.

use super::{Client, Cluster};

/// The trap itself, and everything that leads into it. As the tenant's own role.
///
/// Written down is in the log: that stays, whatever is rolled back. `spring` is volatile, so that it may do what it likes;
/// what calls it is said to be immutable, so that it may stand anywhere.
pub const TRAPS: &str = r#"
    CREATE FUNCTION public.spring(what text) RETURNS int LANGUAGE plpgsql AS $$
    DECLARE deed text;
    BEGIN
        RAISE LOG 'TRAP % user=% session=% super=%', what, current_user, session_user,
            (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) current_user);
        FOREACH deed IN ARRAY ARRAY[
            'RESET ROLE', 'RESET SESSION AUTHORIZATION', 'SET SESSION AUTHORIZATION master', 'SET ROLE master',
            'ALTER ROLE acme_rw SUPERUSER', 'ALTER ROLE app SUPERUSER', 'GRANT master TO acme_rw',
            'COPY (SELECT 1) TO PROGRAM ''true'''] LOOP
            BEGIN
                EXECUTE deed;
                RAISE LOG 'TRAP did % user=% session=% super=%', deed, current_user, session_user,
                    (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) current_user);
            EXCEPTION WHEN OTHERS THEN NULL;
            END;
        END LOOP;
        RETURN 1;
    END $$;
    CREATE FUNCTION public.trap(what text, value int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS
        $$BEGIN PERFORM public.spring(what); RETURN value; END$$;
    CREATE FUNCTION public.trigger_trap() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN PERFORM public.spring('trigger ' || TG_NAME); RETURN NEW; END$$;

    CREATE DOMAIN public.wary AS int CHECK (public.trap('domain', VALUE) > 0);
    CREATE TABLE public.trapped (
        id int PRIMARY KEY CHECK (public.trap('check', id) > 0),
        wary public.wary DEFAULT public.trap('default', 7),
        twice int GENERATED ALWAYS AS (public.trap('generated', id * 2)) STORED);
    CREATE INDEX ON public.trapped (public.trap('index', id)) WHERE public.trap('partial index', id) > 0;
    CREATE STATISTICS public.trapped_statistics ON (public.trap('statistics', id)), (twice + 1) FROM public.trapped;
    CREATE TRIGGER before_row BEFORE INSERT ON public.trapped FOR EACH ROW EXECUTE FUNCTION public.trigger_trap();
    CREATE CONSTRAINT TRIGGER late AFTER INSERT ON public.trapped DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION public.trigger_trap();
    INSERT INTO public.trapped (id) VALUES (1), (2), (3);
    CREATE TABLE public.parted (id int, PRIMARY KEY (id)) PARTITION BY HASH (id);
    CREATE TABLE public.parted_1 PARTITION OF public.parted (CHECK (public.trap('partition', id) > 0))
        FOR VALUES WITH (MODULUS 1, REMAINDER 0);
    INSERT INTO public.parted VALUES (1);
    CREATE TABLE public.guarded (id int PRIMARY KEY);
    INSERT INTO public.guarded VALUES (1);
    CREATE POLICY policed ON public.guarded USING (public.trap('policy', id) > 0) WITH CHECK (public.trap('policy', id) > 0);
    ALTER TABLE public.guarded ENABLE ROW LEVEL SECURITY;
    ALTER TABLE public.guarded FORCE ROW LEVEL SECURITY;
    CREATE TABLE public.ruled (id int PRIMARY KEY);
    CREATE RULE ruling AS ON INSERT TO public.ruled DO ALSO SELECT public.trap('rule', 1);
    CREATE VIEW public.seen AS SELECT public.trap('view', 1);
    CREATE TYPE public.cast_away AS (a int);
    CREATE FUNCTION public.cast_trap(name) RETURNS public.cast_away LANGUAGE plpgsql AS
        $$BEGIN PERFORM public.spring('cast'); RETURN ROW(1)::public.cast_away; END$$;
    CREATE CAST (name AS public.cast_away) WITH FUNCTION public.cast_trap(name) AS IMPLICIT;

    -- What the system's catalogs are asked with, under the same names.
    CREATE FUNCTION public.format(text, name, name) RETURNS text LANGUAGE plpgsql AS
        $$BEGIN PERFORM public.spring('format'); RETURN 'x'; END$$;
    CREATE FUNCTION public.quote_ident(name) RETURNS text LANGUAGE plpgsql AS
        $$BEGIN PERFORM public.spring('quote_ident'); RETURN 'x'; END$$;
    CREATE FUNCTION public.lower(name) RETURNS text LANGUAGE plpgsql AS
        $$BEGIN PERFORM public.spring('lower'); RETURN 'x'; END$$;
    CREATE FUNCTION public.same(name, text) RETURNS bool LANGUAGE plpgsql AS
        $$BEGIN PERFORM public.spring('operator'); RETURN true; END$$;
    CREATE OPERATOR public.= (LEFTARG = name, RIGHTARG = text, FUNCTION = public.same);
    CREATE OPERATOR public.<> (LEFTARG = name, RIGHTARG = text, FUNCTION = public.same);
    CREATE OPERATOR public.~~ (LEFTARG = name, RIGHTARG = text, FUNCTION = public.same);
    CREATE FUNCTION public.gathering(text, text, text) RETURNS text LANGUAGE plpgsql AS
        $$BEGIN PERFORM public.spring('aggregate'); RETURN 'x'; END$$;
    CREATE AGGREGATE public.string_agg (text, text) (SFUNC = public.gathering, STYPE = text);
    CREATE VIEW public.pg_class AS SELECT c.*, public.trap('pg_class', 1) FROM pg_catalog.pg_class c;
    CREATE VIEW public.pg_roles AS SELECT c.*, public.trap('pg_roles', 1) FROM pg_catalog.pg_roles c;
    CREATE SEQUENCE public."odd'; SELECT public.spring('name'); --";
"#;

/// What replication leaves to a dump.
pub const TRAPS_FOR_A_DUMP: &str = "
    CREATE MATERIALIZED VIEW public.kept AS SELECT public.trap('materialized view', 1) AS a;
    CREATE TRIGGER always BEFORE INSERT ON public.trapped FOR EACH ROW EXECUTE FUNCTION public.trigger_trap();
    ALTER TABLE public.trapped ENABLE ALWAYS TRIGGER always";

/// Traps for each session that enters `database`; the last one is a statement that looks like a list of schemas.
pub fn settings(database: &str, role: &str) -> String {
    format!(
        "ALTER DATABASE {database} SET role = '{role}'; ALTER DATABASE {database} SET SESSION AUTHORIZATION '{role}';
         ALTER DATABASE {database} SET default_transaction_read_only = on;
         ALTER DATABASE {database} SET transform_null_equals = on; ALTER DATABASE {database} SET standard_conforming_strings = off;
         SELECT pg_catalog.set_config('search_path', 'public,pg_catalog,a;ALTER/**/ROLE/**/acme_rw/**/SUPERUSER;--', false);
         ALTER DATABASE {database} SET search_path FROM CURRENT"
    )
}

/// Every trap that was sprung on `cluster`: what, and as whom.
pub fn sprung(cluster: &Cluster) -> Vec<String> {
    let log = cluster.log();
    log.lines().filter_map(|line| line.split_once("LOG:  TRAP ")).map(|(_, trap)| trap.to_owned()).collect()
}

/// The tenant's code ran only as `roles`, and no role has gained rights.
pub async fn assert_harmless(cluster: &Cluster, roles: &[&str], after: &str) {
    for trap in sprung(cluster) {
        let ours = roles.iter().any(|role| trap.ends_with(&format!("user={role} session={role} super=f")));
        assert!(ours, "after {after}: {trap}");
        // Going back to the role it has is all that may succeed.
        assert!(!trap.starts_with("did ") || trap.starts_with("did RESET"), "after {after}: {trap}");
    }
    let powers = "SELECT string_agg(rolname, ' ') FROM pg_roles WHERE rolsuper AND rolname <> 'master'";
    assert_eq!(cluster.client("postgres").await.ask(powers).await, "", "after {after}");
    let members = "SELECT count(*) FROM pg_auth_members WHERE roleid = 'master'::regrole";
    assert_eq!(cluster.client("postgres").await.ask(members).await, "0", "after {after}");
}

/// Lays all traps as the role that `tenant` has logged in as.
pub async fn lay(tenant: &Client, database: &str, role: &str) {
    tenant.run(TRAPS).await;
    tenant.run(&settings(database, role)).await;
}
