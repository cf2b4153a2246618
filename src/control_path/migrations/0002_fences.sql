-- How a tenant is closed, or held still, while its clients stay.

-- Of a suspended tenant: sessions may finish the transaction they are in.
ALTER TABLE pglobby.tenants ADD COLUMN drain boolean NOT NULL DEFAULT false;
-- Being moved: no node lends a server, sessions wait.
ALTER TABLE pglobby.tenants ADD COLUMN fenced boolean NOT NULL DEFAULT false;
CREATE INDEX tenants_fenced ON pglobby.tenants (id) WHERE fenced;
