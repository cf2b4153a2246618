-- What strangers may ask for, what a row may hold, and who may make logins.

-- A name that was asked for before it existed is remembered as long as any other: its coming has to be told by name.
CREATE OR REPLACE FUNCTION pglobby.tell_changed() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    changed record;
    appears boolean;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_catalog.pg_notify('pglobby_changed', 'everything');
        RETURN NULL;
    END IF;
    IF TG_OP = 'DELETE' THEN changed := OLD; ELSE changed := NEW; END IF;
    IF TG_TABLE_NAME IN ('tenants', 'logins') THEN
        appears := TG_OP = 'INSERT';
        IF TG_OP = 'UPDATE' THEN
            appears := OLD.name <> NEW.name;
        END IF;
    END IF;
    IF TG_TABLE_NAME = 'tenants' THEN
        PERFORM pg_catalog.pg_notify('pglobby_changed', 'tenant ' || changed.id);
        IF appears THEN
            PERFORM pg_catalog.pg_notify('pglobby_changed', 'tenant_name ' || changed.name);
        END IF;
    ELSIF TG_TABLE_NAME = 'logins' THEN
        PERFORM pg_catalog.pg_notify('pglobby_changed', 'login ' || changed.id);
        IF appears THEN
            PERFORM pg_catalog.pg_notify('pglobby_changed', 'login_name ' || changed.name);
        END IF;
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

-- An unknown login is asked with a salt that is made of its name and this, the same by every node and after every start.
CREATE TABLE pglobby.secrets (
    name                   text PRIMARY KEY,
    value                  bytea NOT NULL
);
INSERT INTO pglobby.secrets VALUES
    ('mock_salt', sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())));

-- An employee who may make logins of the tenant, through an application that asks for it.
ALTER TABLE pglobby.logins ADD COLUMN may_add_logins boolean NOT NULL DEFAULT false
    CHECK (kind = 'employee' OR NOT may_add_logins);

-- Values that no command would write, and plain SQL might. Numbers that are there already are cut down (PostgreSQL has no more
-- than 262143 connections); a text that is there already is refused when its row is changed next.
UPDATE pglobby.hosts SET max_connections = 262143 WHERE max_connections > 262143;
UPDATE pglobby.tenants SET pool_size = 262143 WHERE pool_size > 262143;
UPDATE pglobby.tenants SET min_pool_size = 262143 WHERE min_pool_size > 262143;
UPDATE pglobby.tenants SET max_clients = 1000000 WHERE max_clients > 1000000;
ALTER TABLE pglobby.hosts
    ADD CONSTRAINT hosts_max_connections_limit CHECK (max_connections <= 262143) NOT VALID,
    ADD CONSTRAINT hosts_address_given CHECK (address <> '' AND octet_length(address) <= 255) NOT VALID,
    ADD CONSTRAINT hosts_tls_root_ca_given CHECK (tls_root_ca <> '') NOT VALID,
    ADD CONSTRAINT hosts_admin_given CHECK (admin_user <> '' AND admin_database <> '') NOT VALID;
ALTER TABLE pglobby.tenants
    ADD CONSTRAINT tenants_pool_size_limit CHECK (pool_size <= 262143) NOT VALID,
    ADD CONSTRAINT tenants_min_pool_size_limit CHECK (min_pool_size <= 262143) NOT VALID,
    ADD CONSTRAINT tenants_max_clients_limit CHECK (max_clients <= 1000000) NOT VALID,
    ADD CONSTRAINT tenants_names_given CHECK (database <> '' AND username <> '' AND ro_username <> '') NOT VALID,
    ADD CONSTRAINT tenants_allow_from_whole CHECK (array_position(allow_from, NULL) IS NULL) NOT VALID;
ALTER TABLE pglobby.logins
    ADD CONSTRAINT logins_allow_from_whole CHECK (array_position(allow_from, NULL) IS NULL) NOT VALID;
