-- Commands for all nodes, and which versions of pglobby may use this schema.

-- The oldest pglobby, by the last step that it knows, that works with the schema after this step. Null: only one that knows the step.
ALTER TABLE pglobby.migrations ADD COLUMN compatible_from integer;

-- PAUSE and DISABLE for all nodes, those that start later included, until RESUME and ENABLE.
CREATE TABLE pglobby.pauses (
    id                     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind                   text NOT NULL CHECK (kind IN ('paused', 'disabled')),
    tenant_id              bigint REFERENCES pglobby.tenants (id) ON DELETE CASCADE,  -- null: all tenants
    made_by                text NOT NULL,
    made_at                timestamptz NOT NULL DEFAULT now(),
    CHECK (kind = 'paused' OR tenant_id IS NOT NULL)
);
CREATE UNIQUE INDEX pauses_once ON pglobby.pauses (kind, coalesce(tenant_id, 0));

-- What a node asks of other nodes. The row goes with the node that asks, or when it has its answers.
CREATE TABLE pglobby.node_requests (
    id                     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    asked_by               bigint NOT NULL REFERENCES pglobby.nodes (id) ON DELETE CASCADE,
    target                 bigint REFERENCES pglobby.nodes (id) ON DELETE CASCADE,    -- null: every other node
    actor                  text NOT NULL,
    command                jsonb NOT NULL,
    asked_at               timestamptz NOT NULL DEFAULT now()
);

-- A node writes its row when it begins, so that a command that takes long can be told from a node that does not answer.
CREATE TABLE pglobby.node_answers (
    request_id             bigint NOT NULL REFERENCES pglobby.node_requests (id) ON DELETE CASCADE,
    node_id                bigint NOT NULL REFERENCES pglobby.nodes (id) ON DELETE CASCADE,
    status                 text NOT NULL DEFAULT 'running' CHECK (status IN ('running', 'done', 'failed')),
    answer                 jsonb,
    PRIMARY KEY (request_id, node_id)
);

-- The payload is a kind and an id, nothing more.
CREATE FUNCTION pglobby.tell_fleet() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    IF TG_TABLE_NAME = 'pauses' THEN
        PERFORM pg_catalog.pg_notify('pglobby_fleet', 'pauses');
    ELSIF TG_TABLE_NAME = 'node_requests' THEN
        PERFORM pg_catalog.pg_notify('pglobby_fleet', 'request ' || NEW.id);
    ELSE
        PERFORM pg_catalog.pg_notify('pglobby_fleet', 'answer ' || NEW.request_id);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER tell AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON pglobby.pauses
    FOR EACH STATEMENT EXECUTE FUNCTION pglobby.tell_fleet();
CREATE TRIGGER tell AFTER INSERT ON pglobby.node_requests FOR EACH ROW EXECUTE FUNCTION pglobby.tell_fleet();
CREATE TRIGGER tell AFTER INSERT OR UPDATE ON pglobby.node_answers
    FOR EACH ROW EXECUTE FUNCTION pglobby.tell_fleet();
