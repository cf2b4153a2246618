-- The tenant's role existed before us (`tenant adopt --username`): it stays when the tenant goes, and its settings are its own.
ALTER TABLE pglobby.tenants ADD COLUMN role_given boolean NOT NULL DEFAULT false;
