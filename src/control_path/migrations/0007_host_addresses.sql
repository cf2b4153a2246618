-- A host may have several addresses: those of its primary and of its standbys.

-- Beside `address` and `port`: each `name:port`, `[IPv6 address]:port` or `/folder:port`. An older pglobby uses only the first.
ALTER TABLE pglobby.hosts ADD COLUMN more_addresses text[] NOT NULL DEFAULT '{}'
    CONSTRAINT hosts_more_addresses_given CHECK (
        cardinality(more_addresses) <= 15
        AND array_position(more_addresses, NULL) IS NULL
        AND array_position(more_addresses, '') IS NULL);
