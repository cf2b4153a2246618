"""libpq 18 through pglobby: direct TLS with protocol 3.2, a cancel with its long key inside TLS, and what it refuses."""
import sys
import threading

import psycopg

assert psycopg.pq.version() >= 180000, psycopg.pq.version()
direct = sys.argv[1] + " sslmode=verify-full sslnegotiation=direct channel_binding=require"

with psycopg.connect(direct + " min_protocol_version=3.2", autocommit=True) as connection:
    assert connection.execute("SELECT 'in'").fetchone() == ("in",)
    canceller = threading.Timer(0.2, connection.cancel_safe)
    canceller.start()
    try:
        connection.execute("SELECT pg_sleep(60)")
        raise SystemExit("nobody cancelled it")
    except psycopg.errors.QueryCanceled:
        pass
    canceller.join()
    assert connection.execute("SELECT 'still in'").fetchone() == ("still in",)

for newest in ("3.0", "3.2", "latest"):
    with psycopg.connect(f"{direct} max_protocol_version={newest}") as connection:
        assert connection.execute("SELECT $$in$$").fetchone() == ("in",)
