-- The central database's schema. Applied by `pglobby init`, once, in a transaction; the schema itself exists by then.
-- The session's search_path is pg_catalog: every name of ours is qualified.

REVOKE ALL ON SCHEMA pglobby FROM PUBLIC;

-- Clusters that tenant databases live on.
CREATE TABLE pglobby.hosts (
    name                   text PRIMARY KEY CHECK (name <> '' AND octet_length(name) <= 63),
    address                text NOT NULL,                 -- DNS name, address, or the folder of a Unix socket
    port                   integer NOT NULL DEFAULT 5432 CHECK (port BETWEEN 1 AND 65535),
    tls_mode               text NOT NULL DEFAULT 'prefer'
                           CHECK (tls_mode IN ('disable', 'allow', 'prefer', 'require', 'verify-ca', 'verify-full')),
    tls_root_ca            text,                          -- path of a PEM file on every node
    admin_user             text NOT NULL,                 -- may create databases and roles there
    admin_database         text NOT NULL DEFAULT 'postgres',
    sealed_admin_password  bytea,                         -- null: none needed (peer, trust, certificate)
    max_connections        integer CHECK (max_connections > 0),  -- the budget; null: no limit of ours
    accepts_tenants        boolean NOT NULL DEFAULT true,
    created_at             timestamptz NOT NULL DEFAULT now(),
    updated_at             timestamptz NOT NULL DEFAULT now()
);

-- Customers, each with a database of its own. A dropped tenant stays as a tombstone.
CREATE TABLE pglobby.tenants (
    id                     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name                   text NOT NULL CHECK (name <> '' AND octet_length(name) <= 63),
    host                   text NOT NULL REFERENCES pglobby.hosts (name),
    database               text NOT NULL,
    username               text NOT NULL,
    sealed_password        bytea,                         -- null only before active, and after
    ro_username            text,
    sealed_ro_password     bytea,
    status                 text NOT NULL DEFAULT 'provisioning'
                           CHECK (status IN ('provisioning', 'active', 'suspended', 'dropping', 'dropped')),
    status_reason          text,
    pool_mode              text CHECK (pool_mode IN ('transaction', 'session')),
    pool_size              integer CHECK (pool_size > 0),
    min_pool_size          integer CHECK (min_pool_size >= 0),
    max_clients            integer CHECK (max_clients > 0),
    statement_timeout      interval                       -- PostgreSQL counts it in milliseconds, in 31 bits
                           CHECK (statement_timeout BETWEEN interval '0' AND interval '24 days'),
    allow_from             cidr[] NOT NULL DEFAULT '{}',
    adopted                boolean NOT NULL DEFAULT false, -- existed before us
    grants_pending         boolean NOT NULL DEFAULT false, -- grant access to its tables when its first pool is made
    generation             bigint NOT NULL DEFAULT 1,      -- bumped when host, database or credentials change
    created_at             timestamptz NOT NULL DEFAULT now(),
    updated_at             timestamptz NOT NULL DEFAULT now(),
    CHECK (sealed_password IS NOT NULL OR status IN ('provisioning', 'dropping', 'dropped')),
    CHECK (sealed_ro_password IS NULL OR ro_username IS NOT NULL),
    CHECK (ro_username IS DISTINCT FROM username)
);
-- A name is unique among the living; tombstones keep theirs until it is taken again.
CREATE UNIQUE INDEX tenants_name ON pglobby.tenants (name) WHERE status <> 'dropped';
-- No two living tenants share a database or a role, whatever they were renamed to.
CREATE UNIQUE INDEX tenants_database ON pglobby.tenants (host, database) WHERE status <> 'dropped';
CREATE UNIQUE INDEX tenants_username ON pglobby.tenants (host, username) WHERE status <> 'dropped';
CREATE INDEX tenants_by_name ON pglobby.tenants (name, id);
CREATE INDEX tenants_by_host ON pglobby.tenants (host);

-- A name and a SCRAM verifier. Never a password.
CREATE TABLE pglobby.logins (
    id                     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name                   text NOT NULL UNIQUE CHECK (name <> '' AND octet_length(name) <= 255),
    kind                   text NOT NULL CHECK (kind IN ('employee', 'service', 'admin')),
    tenant_id              bigint REFERENCES pglobby.tenants (id) ON DELETE CASCADE,  -- null for a service login
    access                 text NOT NULL DEFAULT 'read_write' CHECK (access IN ('read_write', 'read_only')),
    all_tenants            boolean NOT NULL DEFAULT false,
    verifier               text NOT NULL CHECK (verifier LIKE 'SCRAM-SHA-256$%'),
    valid_until            timestamptz,
    disabled_at            timestamptz,
    allow_from             cidr[] NOT NULL DEFAULT '{}',
    created_at             timestamptz NOT NULL DEFAULT now(),
    updated_at             timestamptz NOT NULL DEFAULT now(),
    CHECK ((kind = 'employee') = (tenant_id IS NOT NULL)),
    CHECK (NOT all_tenants OR kind = 'service')
);
CREATE INDEX logins_by_tenant ON pglobby.logins (tenant_id);

-- Where a service login may go.
CREATE TABLE pglobby.login_tenants (
    login_id               bigint NOT NULL REFERENCES pglobby.logins (id) ON DELETE CASCADE,
    tenant_id              bigint NOT NULL REFERENCES pglobby.tenants (id) ON DELETE CASCADE,
    access                 text NOT NULL DEFAULT 'read_write' CHECK (access IN ('read_write', 'read_only')),
    PRIMARY KEY (login_id, tenant_id)
);
CREATE INDEX login_tenants_by_tenant ON pglobby.login_tenants (tenant_id);

-- For the management API; the key itself is printed once and stored nowhere.
CREATE TABLE pglobby.api_keys (
    name                   text PRIMARY KEY,
    key_hash               bytea NOT NULL,
    role                   text NOT NULL CHECK (role IN ('admin', 'operator', 'viewer')),
    created_at             timestamptz NOT NULL DEFAULT now(),
    expires_at             timestamptz,
    revoked_at             timestamptz
);

-- The recorded steps of long work: what makes it resumable.
CREATE TABLE pglobby.operations (
    id                     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind                   text NOT NULL,
    tenant_id              bigint REFERENCES pglobby.tenants (id) ON DELETE SET NULL,
    arguments              jsonb NOT NULL DEFAULT '{}',
    step                   text NOT NULL DEFAULT 'begun',
    status                 text NOT NULL DEFAULT 'running' CHECK (status IN ('running', 'done', 'failed', 'undone')),
    error                  text,
    actor                  text NOT NULL DEFAULT session_user,
    started_at             timestamptz NOT NULL DEFAULT now(),
    updated_at             timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX operations_running ON pglobby.operations (tenant_id) WHERE status = 'running';

CREATE TABLE pglobby.audit_log (
    id                     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at                     timestamptz NOT NULL DEFAULT now(),
    actor                  text NOT NULL,
    action                 text NOT NULL,
    tenant                 text,
    detail                 jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_log_by_tenant ON pglobby.audit_log (tenant, at);

-- Whatever changes a row, plain SQL included, every node hears of it. The payload is a kind and a key, nothing more.
-- IF and not CASE: plpgsql looks up a record's fields when it reaches the statement, and not every table has each.
CREATE FUNCTION pglobby.tell_changed() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    changed record;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_catalog.pg_notify('pglobby_changed', 'everything');
        RETURN NULL;
    END IF;
    IF TG_OP = 'DELETE' THEN changed := OLD; ELSE changed := NEW; END IF;
    IF TG_TABLE_NAME = 'tenants' THEN
        PERFORM pg_catalog.pg_notify('pglobby_changed', 'tenant ' || changed.id);
    ELSIF TG_TABLE_NAME = 'logins' THEN
        PERFORM pg_catalog.pg_notify('pglobby_changed', 'login ' || changed.id);
    ELSIF TG_TABLE_NAME = 'login_tenants' THEN
        PERFORM pg_catalog.pg_notify('pglobby_changed', 'login ' || changed.login_id);
        IF TG_OP = 'UPDATE' AND OLD.login_id <> NEW.login_id THEN
            PERFORM pg_catalog.pg_notify('pglobby_changed', 'login ' || OLD.login_id);
        END IF;
    ELSIF TG_TABLE_NAME = 'hosts' THEN
        PERFORM pg_catalog.pg_notify('pglobby_changed', 'host ' || changed.name);
        IF TG_OP = 'UPDATE' AND OLD.name <> NEW.name THEN
            PERFORM pg_catalog.pg_notify('pglobby_changed', 'host ' || OLD.name);
        END IF;
    END IF;
    RETURN NULL;
END $$;

-- Server connections depend on host, database and credentials: a change of those starts a new generation.
CREATE FUNCTION pglobby.touch() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    NEW.updated_at := pg_catalog.now();
    IF TG_TABLE_NAME = 'tenants' THEN
        IF (NEW.host, NEW.database, NEW.username, NEW.ro_username)
               IS DISTINCT FROM (OLD.host, OLD.database, OLD.username, OLD.ro_username)
           OR NEW.sealed_password IS DISTINCT FROM OLD.sealed_password
           OR NEW.sealed_ro_password IS DISTINCT FROM OLD.sealed_ro_password THEN
            NEW.generation := OLD.generation + 1;
        END IF;
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER touch BEFORE UPDATE ON pglobby.hosts FOR EACH ROW EXECUTE FUNCTION pglobby.touch();
CREATE TRIGGER touch BEFORE UPDATE ON pglobby.tenants FOR EACH ROW EXECUTE FUNCTION pglobby.touch();
CREATE TRIGGER touch BEFORE UPDATE ON pglobby.logins FOR EACH ROW EXECUTE FUNCTION pglobby.touch();
CREATE TRIGGER tell AFTER INSERT OR UPDATE OR DELETE ON pglobby.hosts
    FOR EACH ROW EXECUTE FUNCTION pglobby.tell_changed();
CREATE TRIGGER tell AFTER INSERT OR UPDATE OR DELETE ON pglobby.tenants
    FOR EACH ROW EXECUTE FUNCTION pglobby.tell_changed();
CREATE TRIGGER tell AFTER INSERT OR UPDATE OR DELETE ON pglobby.logins
    FOR EACH ROW EXECUTE FUNCTION pglobby.tell_changed();
CREATE TRIGGER tell AFTER INSERT OR UPDATE OR DELETE ON pglobby.login_tenants
    FOR EACH ROW EXECUTE FUNCTION pglobby.tell_changed();
CREATE TRIGGER tell_truncated AFTER TRUNCATE ON pglobby.hosts EXECUTE FUNCTION pglobby.tell_changed();
CREATE TRIGGER tell_truncated AFTER TRUNCATE ON pglobby.tenants EXECUTE FUNCTION pglobby.tell_changed();
CREATE TRIGGER tell_truncated AFTER TRUNCATE ON pglobby.logins EXECUTE FUNCTION pglobby.tell_changed();
CREATE TRIGGER tell_truncated AFTER TRUNCATE ON pglobby.login_tenants EXECUTE FUNCTION pglobby.tell_changed();
