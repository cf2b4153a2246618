"""A day's ordinary work with psycopg 3: six connections at once, then a psycopg_pool. Usage: psycopg_day.py URL"""

import datetime
import decimal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool

URL = sys.argv[1]
WORKERS = 6
UNICODE = "naïve – 漢字 – 🦀 – 'quoted' \"twice\" \\ back"
TODAY = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.timezone.utc)


def fails_with(sqlstate, work):
    try:
        work()
    except psycopg.Error as error:
        assert error.sqlstate == sqlstate, (sqlstate, error.sqlstate, str(error))
        return error
    raise AssertionError(f"{sqlstate} expected")


def typed_values(conn, table):
    conn.execute(sql.SQL(
        "CREATE TABLE {} (id serial PRIMARY KEY, name text UNIQUE, amount numeric, tags text[], doc jsonb, raw bytea,"
        " at timestamptz, flag boolean, big bigint, ratio float8, nothing int)").format(table))
    raw = bytes(range(256)) * 40
    row = (UNICODE, decimal.Decimal("12345678901234567890.123456789"), ["a", None, "c,d", "{}"],
           Jsonb({"k": [1, None, {"deep": "ü"}]}), raw, TODAY, True, 2**62, 0.1, None)
    for binary in (False, True):
        with conn.cursor(binary=binary) as cur:
            cur.execute(sql.SQL("DELETE FROM {}").format(table))
            cur.execute(sql.SQL("INSERT INTO {} (name, amount, tags, doc, raw, at, flag, big, ratio, nothing)"
                                " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING id").format(table), row)
            assert cur.fetchone()[0] > 0
            got = cur.execute(sql.SQL("SELECT name, amount, tags, doc, raw, at, flag, big, ratio, nothing FROM {}")
                              .format(table)).fetchone()
            want = row[:3] + ({"k": [1, None, {"deep": "ü"}]},) + row[4:]
            assert got == want, (got, want)


def big_results(conn):
    rows = conn.execute("SELECT i, repeat('x', 100) FROM generate_series(1, 50000) i").fetchall()
    assert len(rows) == 50000 and sum(row[0] for row in rows) == 50000 * 50001 // 2
    assert len(conn.execute("SELECT repeat('y', 5000000)").fetchone()[0]) == 5_000_000
    assert conn.execute("SELECT length(%s)", ["z" * 3_000_000]).fetchone() == (3_000_000,)


def transactions(conn, table):
    count = lambda: conn.execute(sql.SQL("SELECT count(*) FROM {}").format(table)).fetchone()[0]
    insert = lambda name: conn.execute(sql.SQL("INSERT INTO {} (name) VALUES (%s)").format(table), [name])
    before = count()
    try:
        with conn.transaction():
            insert("rolled back")
            raise KeyError
    except KeyError:
        pass
    assert count() == before
    with conn.transaction():
        insert("kept")
        fails_with("23505", lambda: nested_duplicate(conn, insert))
        insert("kept as well")
    assert count() == before + 2
    with conn.transaction(force_rollback=True):
        fails_with("22012", lambda: conn.execute("SELECT 1/0"))
        fails_with("25P02", lambda: conn.execute("SELECT 1"))
    assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
    with conn.transaction():
        assert conn.execute("SHOW transaction_isolation").fetchone() == ("serializable",)
    conn.set_isolation_level(None)


def nested_duplicate(conn, insert):
    with conn.transaction():  # a savepoint
        insert("kept")


def copies(conn, table):
    with conn.transaction(), conn.cursor() as cur:
        cur.execute(sql.SQL("CREATE TABLE {} (i int, t text)").format(table))
        with cur.copy(sql.SQL("COPY {} FROM STDIN").format(table)) as copy:
            for i in range(20000):
                copy.write_row((i, None if i % 7 == 0 else f"line\t{i}\n{UNICODE}"))
        with cur.copy(sql.SQL("COPY {} TO STDOUT").format(table)) as copy:
            rows = list(copy.rows())
    assert len(rows) == 20000 and rows[0] == ("0", None) and rows[1] == ("1", f"line\t1\n{UNICODE}")
    with conn.cursor() as cur:
        def broken():
            with cur.copy(sql.SQL("COPY {} FROM STDIN").format(table)) as copy:
                copy.write("not a number\tx\n")
        fails_with("22P02", broken)
    def given_up():
        with conn.cursor() as cur, cur.copy(sql.SQL("COPY {} FROM STDIN").format(table)) as copy:
            copy.write_row((1, "x"))
            raise ValueError("the application gave up")
    try:
        given_up()
    except ValueError:
        pass
    assert conn.execute(sql.SQL("SELECT count(*) FROM {}").format(table)).fetchone() == (20000,)


def prepared_statements(conn):
    for i in range(60):  # psycopg prepares on the fifth use, and each use is a transaction of its own
        assert conn.execute("SELECT %s::int + 1, %s::text", [i, UNICODE]).fetchone() == (i + 1, UNICODE)
    for i in range(150):  # more statements than psycopg keeps: it deallocates the oldest
        assert conn.execute(f"SELECT %s::int * {i}", [2], prepare=True).fetchone() == (2 * i,)
    conn.execute("PREPARE by_hand AS SELECT $1::int * 3")
    for i in range(5):
        assert conn.execute(f"EXECUTE by_hand({i})").fetchone() == (3 * i,)
    conn.execute("DEALLOCATE by_hand")
    fails_with("26000", lambda: conn.execute("EXECUTE by_hand(1)"))


def pipelines(conn, table):
    with conn.pipeline() as pipeline, conn.cursor() as cur:
        for i in range(300):
            conn.execute(sql.SQL("INSERT INTO {} (name) VALUES (%s)").format(table), [f"pipelined {i}"])
        pipeline.sync()
        last = conn.execute(sql.SQL("SELECT count(*) FROM {} WHERE name LIKE 'pipelined%%'").format(table))
        cur.executemany("SELECT %s::int", [(i,) for i in range(10)], returning=True)
        assert last.fetchone() == (300,)
    def in_pipeline():
        with conn.pipeline():
            conn.execute("SELECT 1")
            conn.execute("SELECT 1/0")
            conn.execute("SELECT 2")
    fails_with("22012", in_pipeline)
    assert conn.execute("SELECT 3").fetchone() == (3,)


def notices_and_errors(conn):
    heard = []
    conn.add_notice_handler(lambda notice: heard.append((notice.severity, notice.message_primary)))
    conn.execute("DO $$ BEGIN RAISE NOTICE 'hear this: %', 42; RAISE WARNING 'and this'; END $$")
    assert heard == [("NOTICE", "hear this: 42"), ("WARNING", "and this")], heard
    error = fails_with("42P01", lambda: conn.execute("SELECT * FROM no_such_table"))
    assert error.diag.message_primary == 'relation "no_such_table" does not exist'
    assert error.diag.statement_position == "15"
    fails_with("42601", lambda: conn.execute("SELEC 1"))
    fails_with("22P02", lambda: conn.execute("SELECT %s::int", ["no number"]))
    fails_with("P0001", lambda: conn.execute("DO $$ BEGIN RAISE EXCEPTION 'own error'; END $$"))


def cursors(conn):
    with conn.transaction():
        with conn.cursor(name="big one") as cur:
            cur.itersize = 500
            cur.execute("SELECT i FROM generate_series(1, 5000) i")
            assert cur.fetchmany(10) == [(i,) for i in range(1, 11)]
            assert sum(row[0] for row in cur) == sum(range(11, 5001))
    with conn.cursor(name="held", withhold=True) as cur:
        cur.execute("SELECT i FROM generate_series(1, 1000) i")
        assert cur.fetchone() == (1,)
        conn.execute("SELECT 1")  # another transaction, the cursor stays
        assert len(cur.fetchall()) == 999


def cancels(conn):
    timer = threading.Timer(0.3, conn.cancel_safe)
    timer.start()
    fails_with("57014", lambda: conn.execute("SELECT pg_sleep(60)"))
    timer.join()
    assert conn.execute("SELECT 'alive'").fetchone() == ("alive",)


def session_state(conn, worker):
    conn.execute("SELECT set_config('application_name', %s, false)", [f"worker {worker}"])
    conn.execute("SET statement_timeout = '7654ms'")
    conn.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(f"psy_{worker}")))
    conn.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(f"psy_{worker}")))
    for _ in range(30):  # whichever server answers
        assert conn.execute("SHOW application_name").fetchone() == (f"worker {worker}",)
        assert conn.execute("SHOW statement_timeout").fetchone() == ("7654ms",)
        assert conn.execute("SELECT current_schema()").fetchone() == (f"psy_{worker}",)
    conn.execute("RESET statement_timeout; RESET search_path; RESET application_name")
    conn.execute("CREATE TEMP TABLE mine AS SELECT %s::int AS n" % worker)
    assert conn.execute("SELECT n FROM mine").fetchone() == (worker,)
    conn.execute("DROP TABLE mine")
    assert conn.execute("SELECT pg_try_advisory_lock(%s)", [1000 + worker]).fetchone() == (True,)
    assert conn.execute("SELECT pg_advisory_unlock(%s)", [1000 + worker]).fetchone() == (True,)


def notifications(conn, worker):
    channel = sql.Identifier(f"channel {worker}")
    conn.execute(sql.SQL("LISTEN {}").format(channel))
    conn.execute("SELECT pg_notify(%s, %s)", [f"channel {worker}", UNICODE])
    heard = next(conn.notifies(timeout=20))
    assert heard.payload == UNICODE
    conn.execute("UNLISTEN *")


def day(worker):
    table, copied = sql.Identifier(f"psy_day_{worker}"), sql.Identifier(f"psy_copied_{worker}")
    with psycopg.connect(URL, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP TABLE IF EXISTS {}, {}").format(table, copied))
        typed_values(conn, table)
        big_results(conn)
        transactions(conn, table)
        copies(conn, copied)
        prepared_statements(conn)
        pipelines(conn, table)
        notices_and_errors(conn)
        cursors(conn)
        session_state(conn, worker)
        cancels(conn)
        notifications(conn, worker)
        conn.execute(sql.SQL("DROP TABLE {}, {}").format(table, copied))
    return worker


def pooled():
    """What a web application does: short transactions on a pool, rows as dictionaries, no autocommit."""
    with ConnectionPool(URL, min_size=2, max_size=4, kwargs={"row_factory": dict_row}, open=True) as pool:
        pool.wait(20)
        def request(i):
            with pool.connection() as conn:
                return conn.execute("SELECT %s::int AS n", [i]).fetchone()["n"]
        with ThreadPoolExecutor(WORKERS) as workers:
            assert list(workers.map(request, range(200))) == list(range(200))


if __name__ == "__main__":
    with ThreadPoolExecutor(WORKERS) as workers:
        assert list(workers.map(day, range(WORKERS))) == list(range(WORKERS))
    pooled()
    print("psycopg: a good day")
