"""A day's ordinary work with asyncpg: binary, prepared, six at once. Usage: asyncpg_day.py URL"""

import asyncio
import datetime
import decimal
import io
import json
import sys
import uuid

import asyncpg

URL = sys.argv[1]
WORKERS = 6
UNICODE = "naïve – 漢字 – 🦀 – 'quoted' \"twice\" \\ back"
NOW = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.timezone.utc)


async def fails_with(sqlstate, work):
    try:
        await work
    except asyncpg.PostgresError as error:
        assert error.sqlstate == sqlstate, (sqlstate, error.sqlstate, str(error))
        return error
    raise AssertionError(f"{sqlstate} expected")


async def typed_values(conn, table):
    await conn.execute(f"CREATE TABLE {table} (id serial PRIMARY KEY, name text UNIQUE, amount numeric, tags text[],"
                       " doc jsonb, raw bytea, at timestamptz, flag boolean, big bigint, u uuid, grid int[][], nothing int)")
    await conn.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    row = (UNICODE, decimal.Decimal("1234567890.000000001"), ["a", None, "{}"], {"k": [1, None, "ü"]},
           bytes(range(256)) * 40, NOW, True, 2**62, uuid.UUID(int=7), [[1, 2], [3, 4]], None)
    id = await conn.fetchval(f"INSERT INTO {table} (name, amount, tags, doc, raw, at, flag, big, u, grid, nothing)"
                             " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) RETURNING id", *row)
    got = await conn.fetchrow(f"SELECT name, amount, tags, doc, raw, at, flag, big, u, grid, nothing FROM {table}"
                              " WHERE id = $1", id)
    assert tuple(got) == row, (tuple(got), row)


async def big_results(conn):
    rows = await conn.fetch("SELECT i, repeat('x', 100) FROM generate_series(1, $1::int) i", 50000)
    assert sum(row[0] for row in rows) == 50000 * 50001 // 2
    assert len(await conn.fetchval("SELECT repeat('y', 5000000)")) == 5_000_000
    assert await conn.fetchval("SELECT length($1::text)", "z" * 3_000_000) == 3_000_000


async def transactions(conn, table):
    count = lambda: conn.fetchval(f"SELECT count(*) FROM {table}")
    insert = lambda name: conn.execute(f"INSERT INTO {table} (name) VALUES ($1)", name)
    before = await count()
    try:
        async with conn.transaction():
            await insert("rolled back")
            raise KeyError
    except KeyError:
        pass
    assert await count() == before
    async with conn.transaction(isolation="repeatable_read"):
        await insert("kept")
        async def duplicate():
            async with conn.transaction():
                await insert("kept")
        await fails_with("23505", duplicate())
        await insert("kept as well")
    assert await count() == before + 2
    transaction = conn.transaction()
    await transaction.start()
    await fails_with("22012", conn.execute("SELECT 1/0"))
    await fails_with("25P02", conn.execute("SELECT 1"))
    await transaction.rollback()
    assert not conn.is_in_transaction()


async def copies(conn, table):
    await conn.execute(f"CREATE TABLE {table} (i int, t text)")
    records = [(i, None if i % 7 == 0 else f"line\t{i}\n{UNICODE}") for i in range(20000)]
    assert await conn.copy_records_to_table(table, records=records) == "COPY 20000"
    out = io.BytesIO()
    assert await conn.copy_from_query(f"SELECT * FROM {table} ORDER BY i", output=out, format="csv") == "COPY 20000"
    assert out.getvalue().startswith(b"0,\n1,")
    broken = io.BytesIO(b"not a number\tx\n")
    await fails_with("22P02", conn.copy_to_table(table, source=broken))
    assert await conn.fetchval(f"SELECT count(*) FROM {table}") == 20000


async def prepared_statements(conn):
    adding = await conn.prepare("SELECT $1::int + 1")
    for i in range(60):
        assert await adding.fetchval(i) == i + 1
    others = [await conn.prepare(f"SELECT $1::int * {i}") for i in range(30)]
    for i, other in enumerate(others):
        assert await other.fetchval(2) == 2 * i
        assert await adding.fetchval(i) == i + 1
    del others, other
    for i in range(150):  # asyncpg's own cache holds 100
        assert await conn.fetchval(f"SELECT $1::text || '{i}'", UNICODE) == f"{UNICODE}{i}"
    # A statement whose result changes under it.
    await conn.execute("CREATE TEMP TABLE changing (a int); INSERT INTO changing VALUES (1)")
    assert tuple(await conn.fetchrow("SELECT * FROM changing")) == (1,)
    await conn.execute("ALTER TABLE changing ADD b int DEFAULT 2")
    assert tuple(await conn.fetchrow("SELECT * FROM changing")) == (1, 2)
    await conn.execute("DROP TABLE changing")


async def batches(conn, table):
    await conn.executemany(f"INSERT INTO {table} (name) VALUES ($1)", [(f"batched {i}",) for i in range(500)])
    assert await conn.fetchval(f"SELECT count(*) FROM {table} WHERE name LIKE 'batched%'") == 500
    names = [("unique",), ("unique",)]
    await fails_with("23505", conn.executemany(f"INSERT INTO {table} (name) VALUES ($1)", names))
    assert await conn.fetchval(f"SELECT count(*) FROM {table} WHERE name = 'unique'") == 0, "a batch is one transaction"


async def notices_and_errors(conn):
    heard = []
    conn.add_log_listener(lambda _, message: heard.append(message.message))
    await conn.execute("DO $$ BEGIN RAISE NOTICE 'hear this: %', 42; END $$")
    await conn.fetchval("SELECT 1")
    assert heard == ["hear this: 42"], heard
    error = await fails_with("42P01", conn.fetch("SELECT * FROM no_such_table"))
    assert error.message == 'relation "no_such_table" does not exist'
    await fails_with("42601", conn.execute("SELEC 1"))
    assert await conn.fetchval("SELECT 1") == 1


async def cursors(conn):
    async with conn.transaction():
        seen = 0
        async for row in conn.cursor("SELECT i FROM generate_series(1, 5000) i", prefetch=300):
            seen += row[0]
        assert seen == 5000 * 5001 // 2
        cursor = await conn.cursor("SELECT i FROM generate_series(1, 100) i")
        await cursor.forward(10)
        assert [row[0] for row in await cursor.fetch(3)] == [11, 12, 13]


async def cancels(conn):
    # A timeout on our side cancels on the server's.
    try:
        await conn.fetchval("SELECT pg_sleep(60)", timeout=0.3)
        raise AssertionError("not cancelled")
    except asyncio.TimeoutError:
        pass
    assert await conn.fetchval("SELECT 'alive'") == "alive"
    task = asyncio.ensure_future(conn.fetchval("SELECT pg_sleep(60)"))
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.wait([task])
    assert await conn.fetchval("SELECT 'still'") == "still"


async def session_state(conn, worker):
    await conn.execute(f"SET application_name = 'worker {worker}'; SET work_mem = '{worker + 11}MB'")
    for _ in range(30):
        assert await conn.fetchval("SHOW application_name") == f"worker {worker}"
        assert await conn.fetchval("SHOW work_mem") == f"{worker + 11}MB"
    heard = asyncio.Queue()
    await conn.add_listener(f"channel_{worker}", lambda *event: heard.put_nowait(event[3]))
    await conn.execute(f"NOTIFY channel_{worker}, 'to {worker}'")
    assert await asyncio.wait_for(heard.get(), 20) == f"to {worker}"
    await conn.reset()  # asyncpg's pool sends this between users
    assert await conn.fetchval("SHOW work_mem") != f"{worker + 11}MB"


async def day(worker):
    conn = await asyncpg.connect(URL)
    table, copied = f"apg_day_{worker}", f"apg_copied_{worker}"
    await conn.execute(f"DROP TABLE IF EXISTS {table}, {copied}")
    await typed_values(conn, table)
    await big_results(conn)
    await transactions(conn, table)
    await copies(conn, copied)
    await prepared_statements(conn)
    await batches(conn, table)
    await notices_and_errors(conn)
    await cursors(conn)
    await session_state(conn, worker)
    await cancels(conn)
    await conn.execute(f"DROP TABLE {table}, {copied}")
    await conn.close()


async def pooled():
    async with asyncpg.create_pool(URL, min_size=2, max_size=4) as pool:
        answers = await asyncio.gather(*(pool.fetchval("SELECT $1::int", i) for i in range(200)))
        assert answers == list(range(200))


async def main():
    await asyncio.gather(*(day(worker) for worker in range(WORKERS)))
    await pooled()
    print("asyncpg: a good day")


asyncio.run(main())
