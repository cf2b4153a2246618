-- Several nodes serve the same tenants: which ones there are, and how many servers each may have on a host.

-- The tenant's part of its host's budget, relative to the other tenants of the host.
ALTER TABLE pglobby.tenants ADD COLUMN weight integer NOT NULL DEFAULT 1
    CONSTRAINT tenants_weight_limit CHECK (weight BETWEEN 1 AND 1000);

-- One row for each running process. `beat` counts up while it runs: another node that has seen it unchanged for some seconds, by
-- its own clock, knows that the process is gone. No clock of two machines is ever compared; `seen_at` is for people.
CREATE TABLE pglobby.nodes (
    id                     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name                   text NOT NULL CHECK (name <> ''),
    address                text NOT NULL,
    -- Machine, PID namespace, PID and start time. A node that starts on the same machine removes rows of processes that have ended.
    process                text NOT NULL DEFAULT '',
    version                text NOT NULL,
    schema_version         integer NOT NULL,
    -- Names of the keys in its key ring, the one that seals first. Not the keys.
    key_ids                text[] NOT NULL,
    started_at             timestamptz NOT NULL DEFAULT now(),
    beat                   bigint NOT NULL DEFAULT 0,
    seen_at                timestamptz NOT NULL DEFAULT now()
);

-- `version` counts the changes of a host's leases. A node changes leases in one statement, which does nothing if they have changed
-- since it read them. So no node ever holds a lock while it thinks, and the sum of the leases stays within the budget.
CREATE TABLE pglobby.host_leases (
    host                   text PRIMARY KEY REFERENCES pglobby.hosts (name) ON UPDATE CASCADE ON DELETE CASCADE,
    version                bigint NOT NULL DEFAULT 0
);

CREATE TABLE pglobby.node_leases (
    node_id                bigint NOT NULL REFERENCES pglobby.nodes (id) ON DELETE CASCADE,
    host                   text NOT NULL REFERENCES pglobby.host_leases (host) ON UPDATE CASCADE ON DELETE CASCADE,
    -- Servers that the node may have.
    granted                integer NOT NULL CHECK (granted >= 0),
    -- Servers that its sessions could use now, and the sum of the weights of their tenants.
    wanted                 integer NOT NULL CHECK (wanted >= 0),
    weight                 integer NOT NULL CHECK (weight >= 0),
    PRIMARY KEY (node_id, host)
);
