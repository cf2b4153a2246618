"""What others have reported of poolers, each tried directly and through the proxy, while other sessions stir.

Usage: field_reports.py DIRECT_URL PROXY_URL. Prints each case whose outcome differs and ends with 1 if there is one.
Each case is a function of a URL that returns what a client has seen; its report stands above it.
"""

import asyncio, base64, hashlib, hmac, os, random, re, socket, struct, subprocess, sys, threading, time
from urllib.parse import urlparse
import psycopg

CASES = {}


def report(where):
    def add(case):
        CASES[case.__name__] = (where, case)
        return case

    return add


def message(tag, body=b""):
    return tag + struct.pack(">I", len(body) + 4) + body


def query(sql):
    return message(b"Q", sql.encode() + b"\0")


def parse(name, sql):
    return message(b"P", name.encode() + b"\0" + sql.encode() + b"\0\0\0")


def bind(name, values=(), portal=""):
    body = portal.encode() + b"\0" + name.encode() + b"\0\0\0" + struct.pack(">H", len(values))
    for value in values:
        body += struct.pack(">I", len(value)) + value.encode()
    return message(b"B", body + b"\0\0")


def describe(kind, name=""):
    return message(b"D", kind.encode() + name.encode() + b"\0")


def execute(portal="", rows_max=0):
    return message(b"E", portal.encode() + b"\0" + struct.pack(">I", rows_max))


def close(kind, name):
    return message(b"C", kind.encode() + name.encode() + b"\0")


SYNC = message(b"S")
FLUSH = message(b"H")


class Wire:
    """A session that speaks the protocol itself. Its replies are told in short."""

    def __init__(self, url, **parameters):
        self.url = urlparse(url)
        self.socket = socket.create_connection((self.url.hostname, self.url.port))
        self.socket.settimeout(20)
        self.buffer = b""
        self.params = {}
        body = struct.pack(">I", 196608)
        for name, value in {"user": self.url.username, "database": self.url.path[1:], **parameters}.items():
            body += name.encode() + b"\0" + value.encode() + b"\0"
        body += b"\0"
        self.socket.sendall(struct.pack(">I", len(body) + 4) + body)
        while True:
            tag, body = self.msg()
            if tag == b"R":
                self.authenticate(struct.unpack(">I", body[:4])[0], body[4:])
            elif tag == b"S":
                self.status(body)
            elif tag == b"K":
                self.key = body
            elif tag == b"E":
                raise Exception(error(body))
            elif tag == b"Z":
                break

    def authenticate(self, kind, data):
        if kind == 10:
            self.bare = "n=,r=" + base64.b64encode(os.urandom(18)).decode()
            first = ("n,," + self.bare).encode()
            self.socket.sendall(message(b"p", b"SCRAM-SHA-256\0" + struct.pack(">I", len(first)) + first))
        elif kind == 11:
            fields = dict(field.split("=", 1) for field in data.decode().split(","))
            salted = hashlib.pbkdf2_hmac(
                "sha256", self.url.password.encode(), base64.b64decode(fields["s"]), int(fields["i"])
            )
            key = hmac.digest(salted, b"Client Key", "sha256")
            without_proof = "c=biws,r=" + fields["r"]
            signed = (self.bare + "," + data.decode() + "," + without_proof).encode()
            signature = hmac.digest(hashlib.sha256(key).digest(), signed, "sha256")
            proof = base64.b64encode(bytes(a ^ b for a, b in zip(key, signature))).decode()
            self.socket.sendall(message(b"p", (without_proof + ",p=" + proof).encode()))

    def take(self, length):
        while len(self.buffer) < length:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self.buffer += data
        taken, self.buffer = self.buffer[:length], self.buffer[length:]
        return taken

    def msg(self):
        header = self.take(5)
        return header[:1], self.take(struct.unpack(">I", header[1:])[0] - 4)

    def status(self, body):
        name, value = body.split(b"\0")[:2]
        self.params[name.decode()] = value.decode()
        return f"S {name.decode()}={value.decode()}"

    def send(self, *messages):
        self.socket.sendall(b"".join(messages))
        return self

    def ready(self, count=1):
        """The replies up to the last of so many ReadyForQuery."""
        seen = []
        while count:
            try:
                tag, body = self.msg()
            except EOFError:
                return seen + ["end of connection"]
            except socket.timeout:
                return seen + ["no reply"]
            seen.append(self.status(body) if tag == b"S" else show(tag, body))
            count -= tag == b"Z"
        return seen

    def go(self, *messages, n=1):
        return self.send(*messages).ready(n)

    def sql(self, text):
        return self.go(query(text))


def error(body):
    fields = {field[:1]: field[1:] for field in body.split(b"\0") if field}
    return fields.get(b"C", b"").decode() + " " + fields.get(b"M", b"").decode()


def show(tag, body):
    if tag in b"EN":
        return tag.decode() + " " + error(body)
    if tag == b"Z":
        return "Z" + body.decode()
    if tag == b"C":
        return "C " + body[:-1].decode()
    if tag == b"D":
        return ("D", *values(body))
    if tag == b"T":
        return "T" + str(struct.unpack(">H", body[:2])[0])
    if tag == b"A":
        return ("A", *(text.decode() for text in body[4:-1].split(b"\0")))
    return tag.decode()


def values(body):
    at = 2
    found = []
    for _ in range(struct.unpack(">H", body[:2])[0]):
        length = struct.unpack(">i", body[at : at + 4])[0]
        at += 4
        found.append(None if length < 0 else body[at : at + length].decode("latin1"))
        at += max(length, 0)
    return found


def rows(seen):
    return [reply[1:] for reply in seen if isinstance(reply, tuple) and reply[0] == "D"]


@report("yugabyte#33915")
def query_behind_failed_batch(url):
    session = Wire(url)
    return session.go(
        parse("", "SELECT 1/0"), bind(""), execute(), query("SELECT 7"), SYNC, query("SELECT 8"), n=2
    )


@report("pgcat#396 asyncpg flush")
def flush(url):
    session = Wire(url)
    session.send(parse("a", "SELECT $1::int"), describe("S", "a"), FLUSH)
    a = [session.msg()[0] for _ in range(3)]
    return a, session.go(bind("a", ["5"]), execute(), SYNC)


@report("pgdog#57")
def jit_introspection(url):
    session = Wire(url)
    return session.go(
        parse("", "SELECT current_setting($1) AS cur, set_config($1,$2,false) AS new"),
        bind("", ["jit", "off"]),
        execute(),
        SYNC,
    ), session.sql("SHOW jit")


@report("odyssey#1516")
def reset_restores_startup_application_name(url):
    session = Wire(url, application_name="probe")
    session.sql("SET application_name='x'")
    session.sql("RESET application_name")
    a = session.sql("SHOW application_name"), dict(session.params)["application_name"]
    session.sql("SET application_name='y'")
    session.sql("DISCARD ALL")
    return a, session.sql("SHOW application_name"), dict(session.params)["application_name"]


@report("pgpool2#175")
def extended_discard_all(url):
    session = Wire(url)
    return session.go(parse("", "DISCARD ALL"), bind(""), describe("P"), execute(), SYNC), session.sql(
        "SELECT 1"
    )


@report("odyssey#554")
def copy_in_pieces(url):
    session = Wire(url)
    session.sql("CREATE TEMP TABLE c (a int, b text)")
    session.send(query("COPY c FROM STDIN CSV"))
    session.msg()
    data = b"".join(message(b"d", f'{i},"{i}, text"\n'.encode()) for i in range(3000)) + message(b"c")
    for i in range(0, len(data), 777):
        session.send(data[i : i + 777])
    return session.ready(), session.sql("SELECT count(*),sum(a) FROM c")


@report("odyssey#564")
def jdbc_begin_prepared(url):
    session = Wire(url)
    return session.go(
        parse("", "BEGIN"),
        bind(""),
        execute(rows_max=0),
        parse("", "select version() IS NOT NULL"),
        bind(""),
        describe("P"),
        execute(),
        SYNC,
    ), session.go(parse("S_1", "COMMIT"), bind("S_1"), execute(rows_max=1), SYNC)


@report("odyssey#1361")
def close_after_failed_parse(url):
    session = Wire(url)
    return (
        session.go(parse("S_4", "SELECT nope"), describe("S", "S_4"), SYNC),
        session.go(close("S", "S_4"), SYNC),
        session.go(parse("S_4", "SELECT 4"), bind("S_4"), execute(), SYNC),
    )


@report("prisma#21635")
def deallocate_all_by_query(url):
    session = Wire(url)
    return (
        session.go(parse("s0", "SELECT 10"), bind("s0"), execute(), SYNC),
        session.sql("DEALLOCATE ALL"),
        session.go(parse("s0", "SELECT 11"), bind("s0"), execute(), SYNC),
        session.go(bind("s0"), execute(), SYNC),
    )


@report("pgbouncer#1129")
def pdo_deallocate(url):
    session = Wire(url)
    return (
        session.go(parse("pdo_stmt_00000001", "SELECT $1::text"), SYNC),
        session.go(bind("pdo_stmt_00000001", ["x"]), execute(), SYNC),
        session.sql("DEALLOCATE pdo_stmt_00000001"),
        session.go(bind("pdo_stmt_00000001", ["x"]), execute(), SYNC),
    )


@report("npgsql#2221")
def discard_all_prepended(url):
    session = Wire(url)
    session.sql("SET timezone='Asia/Tokyo'")
    return session.go(
        query("DISCARD ALL"),
        parse("", "SELECT current_setting($1)"),
        bind("", ["timezone"]),
        execute(),
        SYNC,
        n=2,
    )


@report("pgbouncer#759")
def pipelined_errors(url):
    session = Wire(url)
    return session.go(
        parse("", "SELECT 1/$1::int"),
        bind("", ["0"]),
        execute(),
        SYNC,
        parse("", "SELECT 2"),
        bind(""),
        execute(),
        SYNC,
        query("SELECT 3"),
        parse("", "bad"),
        SYNC,
        query("SELECT 4"),
        n=5,
    )


@report("lib/pq#889")
def unnamed_in_two_batches(url):
    session = Wire(url)
    return session.go(parse("", "SELECT $1::int+1"), describe("S"), SYNC), session.go(
        bind("", ["41"]), execute(), SYNC
    )


@report("pgx describe cache")
def describe_then_bind_in_next(url):
    session = Wire(url)
    a = session.go(parse("stmtcache_1", "SELECT $1::text"), describe("S", "stmtcache_1"), SYNC)
    return a, [session.go(bind("stmtcache_1", [str(i)]), describe("P"), execute(), SYNC) for i in range(3)]


@report("pgjdbc fetchSize")
def portals_suspended(url):
    session = Wire(url)
    session.sql("BEGIN")
    a = session.go(
        parse("S1", "SELECT * FROM generate_series(1,5)"),
        bind("S1", [], "C1"),
        describe("P", "C1"),
        execute("C1", 2),
        SYNC,
    )
    return (
        a,
        session.go(execute("C1", 2), SYNC),
        session.go(execute("C1", 2), SYNC),
        session.go(close("P", "C1"), SYNC),
        session.sql("COMMIT"),
    )


@report("portal after transaction end")
def portal_gone_after_commit(url):
    session = Wire(url)
    session.go(parse("S1", "SELECT 1"), bind("S1", [], "C1"), SYNC)
    return session.go(execute("C1"), SYNC)


@report("holdable cursor")
def with_hold(url):
    session = Wire(url)
    session.sql("BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT generate_series(1,4)")
    return (
        session.sql("COMMIT"),
        session.sql("FETCH 2 FROM c"),
        session.sql("SELECT 1"),
        session.sql("FETCH 5 FROM c"),
        session.sql("CLOSE c"),
    )


@report("listen rollback")
def listen_rollback(url):
    session = Wire(url)
    session.sql("BEGIN; LISTEN f_a; ROLLBACK")
    session.sql("LISTEN f_b")
    other = Wire(url)
    other.sql("NOTIFY f_a,'1'")
    other.sql("NOTIFY f_b,'2'")
    time.sleep(0.3)
    return session.sql("SELECT pg_listening_channels()")


@report("notify self pid")
def notify_self_pid(url):
    session = Wire(url)
    session.sql("LISTEN f_self")
    out = session.sql("NOTIFY f_self,'x'")
    pid = rows(session.sql("SELECT pg_backend_pid()"))[0][0]
    key = struct.unpack(">i", session.key[:4])[0]
    return ([x for x in out if x[0] != "S"],)


@report("pg_backend_pid terminate")
def terminate_self(url):
    session = Wire(url)
    return session.sql("SELECT pg_terminate_backend(pg_backend_pid())")


@report("snapshot export")
def export_snapshot(url):
    a = Wire(url)
    a.sql("BEGIN ISOLATION LEVEL REPEATABLE READ")
    s = rows(a.sql("SELECT pg_export_snapshot()"))[0][0]
    b = Wire(url)
    b.sql("BEGIN ISOLATION LEVEL REPEATABLE READ")
    r = b.sql(f"SET TRANSACTION SNAPSHOT '{s}'")
    return r, b.sql("COMMIT"), a.sql("COMMIT")


@report("savepoint rolls back SET")
def savepoint_set(url):
    session = Wire(url)
    session.sql("SET my.v='0'")
    session.sql("BEGIN; SET my.v='1'; SAVEPOINT s; SET my.v='2'; ROLLBACK TO s")
    a = session.sql("SHOW my.v")
    session.sql("COMMIT")
    return a, session.sql("SHOW my.v")


@report("failed tx SET rolled back")
def failed_set(url):
    session = Wire(url)
    session.sql("SET my.v='0'")
    session.sql("BEGIN")
    session.sql("SET my.v='1'")
    session.sql("SELECT 1/0")
    return session.sql("COMMIT"), session.sql("SHOW my.v")


@report("function call protocol")
def fastpath(url):
    session = Wire(url)
    oid = rows(session.sql("SELECT 'pg_catalog.int4pl'::regproc::oid::int"))[0][0]
    b = (
        struct.pack(">IHHH", int(oid), 1, 1, 2)
        + struct.pack(">II", 4, 2)
        + struct.pack(">II", 4, 3)
        + struct.pack(">H", 1)
    )
    return session.go(message(b"F", b)), session.sql("SELECT 1")


@report("large objects")
def large_objects(url):
    session = Wire(url)
    session.sql("BEGIN")
    o = rows(session.sql("SELECT lo_create(0)"))[0][0]
    fd = session.sql(f"SELECT lo_open({o},131072)")
    x = session.sql("SELECT lowrite(0,'abc')")
    session.sql("COMMIT")
    return fd, x, session.sql(f"SELECT lo_get({o})"), session.sql(f"SELECT lo_unlink({o})")


@report("temp on commit drop")
def temp_on_commit(url):
    session = Wire(url)
    return session.sql(
        "BEGIN; CREATE TEMP TABLE td (a int) ON COMMIT DROP; INSERT INTO td VALUES (1); COMMIT"
    ), session.sql("SELECT * FROM td")


@report("temp table follows")
def temp_table(url):
    session = Wire(url)
    session.sql("CREATE TEMP TABLE tt AS SELECT 1 a")
    time.sleep(0.02)
    return session.sql("SELECT * FROM tt"), session.sql("DROP TABLE tt")


@report("rails advisory lock")
def advisory(url):
    session = Wire(url)
    a = session.sql("SELECT pg_try_advisory_lock(77)")
    other = Wire(url)
    b = other.sql("SELECT pg_try_advisory_lock(77)")
    c = session.sql("SELECT pg_advisory_unlock(77)")
    return a, b, c, other.sql("SELECT pg_try_advisory_lock(77)"), other.sql("SELECT pg_advisory_unlock(77)")


@report("advisory in DO")
def advisory_do(url):
    session = Wire(url)
    session.sql("DO $$ BEGIN PERFORM pg_advisory_lock(78); END $$")
    time.sleep(0.01)
    return session.sql("SELECT pg_advisory_unlock(78)")


@report("currval")
def currval(url):
    session = Wire(url)
    session.sql("CREATE TEMP SEQUENCE sq")
    session.sql("SELECT nextval('sq')")
    time.sleep(0.02)
    return (
        session.sql("SELECT currval('sq')"),
        session.sql("SELECT lastval()"),
        session.sql("DISCARD SEQUENCES"),
        session.sql("SELECT lastval()"),
    )


@report("timezone output")
def timezone(url):
    session = Wire(url)
    return session.sql("SET timezone='America/New_York'"), [
        session.sql("SELECT '2024-01-01 00:00Z'::timestamptz") for _ in range(5)
    ]


@report("pgbouncer#1074 startup options")
def startup_options(url):
    session = Wire(
        url,
        options="-c default_transaction_isolation=serializable -c search_path=pg_catalog,public --geqo=off",
    )
    return (
        session.sql("SHOW default_transaction_isolation"),
        session.sql("SHOW search_path"),
        session.sql("SHOW geqo"),
        session.sql("RESET ALL"),
        session.sql("SHOW geqo"),
    )


@report("search path cached plan")
def search_path_plan(url):
    session = Wire(url)
    session.sql(
        "CREATE SCHEMA IF NOT EXISTS fs1; CREATE SCHEMA IF NOT EXISTS fs2; DROP TABLE IF EXISTS fs1.t,fs2.t; CREATE TABLE fs1.t AS SELECT 1 a; CREATE TABLE fs2.t AS SELECT 2 a"
    )
    session.sql("SET search_path=fs1")
    a = session.go(parse("p", "SELECT a FROM t"), bind("p"), execute(), SYNC)
    session.sql("SET search_path=fs2")
    return a, session.go(bind("p"), execute(), SYNC)


@report("cached plan changed")
def cached_plan(url):
    session = Wire(url)
    session.sql("DROP TABLE IF EXISTS cp; CREATE TABLE cp (a int)")
    a = session.go(parse("p", "SELECT * FROM cp"), describe("S", "p"), SYNC)
    session.sql("ALTER TABLE cp ADD b int")
    return (
        a,
        session.go(bind("p"), execute(), SYNC),
        session.go(close("S", "p"), parse("p", "SELECT * FROM cp"), describe("S", "p"), SYNC),
        session.sql("DROP TABLE cp"),
    )


@report("client_encoding")
def client_encoding(url):
    session = Wire(url)
    return (
        session.sql("SET client_encoding='LATIN1'"),
        session.sql("SELECT chr(233)"),
        session.params.get("client_encoding"),
        session.sql("RESET client_encoding"),
    )


@report("standard_conforming_strings")
def scs(url):
    session = Wire(url)
    return (
        session.sql("SET standard_conforming_strings=off"),
        session.sql(r"SELECT 'a\'b; SET my.x=1 --'"),
        session.sql("RESET standard_conforming_strings"),
    )


@report("commit of failed")
def commit_failed(url):
    session = Wire(url)
    return (
        session.sql("BEGIN"),
        session.sql("bad"),
        session.sql("SELECT 1"),
        session.sql("COMMIT"),
        session.sql("COMMIT"),
    )


@report("chain")
def chain(url):
    session = Wire(url)
    return (
        session.sql("BEGIN ISOLATION LEVEL SERIALIZABLE"),
        session.sql("COMMIT AND CHAIN"),
        session.sql("SHOW transaction_isolation"),
        session.sql("ROLLBACK"),
    )


@report("implicit tx")
def implicit(url):
    session = Wire(url)
    session.sql("CREATE TEMP TABLE im (a int)")
    return session.sql("INSERT INTO im VALUES (1); SELECT 1/0; INSERT INTO im VALUES (2)"), session.sql(
        "SELECT count(*) FROM im"
    )


@report("implicit tx set")
def implicit_set(url):
    session = Wire(url)
    return session.sql("SET my.i='1'; SELECT 1/0"), session.sql("SELECT current_setting('my.i',true)")


@report("prepare in rolled back tx")
def prepare_rollback(url):
    session = Wire(url)
    session.sql("BEGIN")
    session.sql("PREPARE rb AS SELECT 5")
    session.sql("ROLLBACK")
    return session.sql("EXECUTE rb"), session.sql("DEALLOCATE rb"), session.sql("EXECUTE rb")


@report("parse in failed tx")
def parse_rollback(url):
    session = Wire(url)
    session.sql("BEGIN")
    a = session.go(parse("k", "SELECT 6"), SYNC)
    session.sql("ROLLBACK")
    return a, session.go(bind("k"), execute(), SYNC)


@report("explain execute")
def explain_execute(url):
    session = Wire(url)
    session.sql("PREPARE ee AS SELECT 1")
    return session.sql("EXPLAIN (COSTS OFF) EXECUTE ee"), session.sql(
        "SELECT name,statement,from_sql FROM pg_prepared_statements ORDER BY 1"
    )


@report("application_name in activity")
def activity(url):
    session = Wire(url, application_name="act1")
    a = session.sql("SELECT application_name,state FROM pg_stat_activity WHERE pid=pg_backend_pid()")
    session.sql("SET application_name='act2'")
    return a, session.sql("SELECT application_name FROM pg_stat_activity WHERE pid=pg_backend_pid()")


@report("session characteristics")
def characteristics(url):
    session = Wire(url)
    session.sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
    return (
        session.sql("CREATE TABLE never (a int)"),
        session.sql("SHOW transaction_read_only"),
        session.sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE"),
        session.sql("SHOW default_transaction_read_only"),
    )


@report("statement_timeout")
def statement_timeout(url):
    session = Wire(url)
    session.sql("SET statement_timeout='50ms'")
    return session.sql("SELECT pg_sleep(2)"), session.sql("SHOW statement_timeout"), session.sql("SELECT 1")


@report("idle in transaction timeout")
def idle_tx(url):
    session = Wire(url)
    session.sql("SET idle_in_transaction_session_timeout='100ms'")
    session.sql("BEGIN")
    time.sleep(0.4)
    return session.ready() if True else 0


@report("where current of")
def current_of(url):
    session = Wire(url)
    session.sql("CREATE TEMP TABLE co AS SELECT generate_series(1,3) a")
    session.sql("BEGIN; DECLARE c CURSOR FOR SELECT * FROM co FOR UPDATE")
    session.sql("FETCH 2 FROM c")
    return (
        session.sql("UPDATE co SET a=20 WHERE CURRENT OF c"),
        session.sql("COMMIT"),
        session.sql("SELECT a FROM co ORDER BY 1"),
    )


@report("set role none")
def set_role_none(url):
    session = Wire(url)
    me = rows(session.sql("SELECT session_user"))[0][0]
    return (
        session.sql(f'SET ROLE "{me}"')[0],
        session.sql("SET ROLE NONE"),
        session.sql("SELECT current_user=session_user"),
    )


@report("reset session authorization")
def session_auth(url):
    session = Wire(url)
    return (
        session.sql("SET SESSION AUTHORIZATION DEFAULT"),
        session.sql("RESET SESSION AUTHORIZATION"),
        session.sql("SELECT current_user=session_user"),
    )


@report("copy fail")
def copy_fail(url):
    session = Wire(url)
    session.sql("CREATE TEMP TABLE cf (a int)")
    session.send(query("COPY cf FROM STDIN"))
    t = session.msg()[0]
    return (
        t,
        session.go(message(b"d", b"1\n"), message(b"f", b"enough\0")),
        session.sql("SELECT count(*) FROM cf"),
    )


@report("copy extended + sync inside")
def copy_extended(url):
    session = Wire(url)
    session.sql("CREATE TEMP TABLE cx (a int)")
    return session.go(
        parse("", "COPY cx FROM STDIN"),
        bind(""),
        execute(),
        SYNC,
        message(b"d", b"1\n"),
        message(b"c"),
        SYNC,
        n=1,
    ), session.sql("SELECT count(*) FROM cx")


@report("many statements one query")
def many(url):
    session = Wire(url)
    return session.sql(";".join(f"SELECT {i}" for i in range(200)))[-3:]


@report("empty queries")
def empty(url):
    session = Wire(url)
    return (
        session.sql(""),
        session.sql(";"),
        session.sql("-- c"),
        session.go(parse("", ""), bind(""), describe("P"), execute(), SYNC),
    )


@report("wrong bind count")
def wrong_bind(url):
    session = Wire(url)
    return session.go(parse("w", "SELECT $1::int,$2::int"), bind("w", ["1"]), execute(), SYNC), session.go(
        bind("w", ["1", "2"]), execute(), SYNC
    )


@report("duplicate prepare")
def duplicate(url):
    session = Wire(url)
    return (
        session.go(parse("dd", "SELECT 1"), SYNC),
        session.go(parse("dd", "SELECT 2"), SYNC),
        session.go(bind("dd"), execute(), SYNC),
        session.sql("PREPARE dd AS SELECT 3"),
    )


@report("execute protocol statement by SQL")
def execute_sql(url):
    session = Wire(url)
    session.go(parse("es", "SELECT 9"), SYNC)
    return session.sql("EXECUTE es"), session.sql("DEALLOCATE es"), session.go(bind("es"), execute(), SYNC)


@report("big row")
def big(url):
    session = Wire(url)
    return len(rows(session.sql("SELECT repeat('x',20000000)"))[0][0])


@report("set local warning")
def set_local_outside(url):
    session = Wire(url)
    return session.sql("SET LOCAL work_mem='2MB'"), session.sql("SHOW work_mem")


@report("lock_timeout follows")
def lock_timeout(url):
    session = Wire(url)
    session.sql("SET lock_timeout='77ms'")
    return [session.sql("SHOW lock_timeout") for _ in range(6)]


@report("set_config in select list")
def set_config_list(url):
    session = Wire(url)
    return session.sql("SELECT set_config('a.b','1',false), set_config('a.c','2',true)"), session.sql(
        "SELECT current_setting('a.b'), current_setting('a.c',true)"
    )


@report("rls session var null")
def custom_null(url):
    session = Wire(url)
    return session.sql("SELECT current_setting('never.set',true)")


@report("discard plans/temp")
def discards(url):
    session = Wire(url)
    session.sql("CREATE TEMP TABLE x1 (a int)")
    return session.sql("DISCARD PLANS"), session.sql("DISCARD TEMP"), session.sql("SELECT * FROM x1")


@report("security definer set")
def definer(url):
    session = Wire(url)
    session.sql(
        "CREATE OR REPLACE FUNCTION f_def() RETURNS text LANGUAGE plpgsql SET timezone='UTC' AS $$ BEGIN PERFORM set_config('my.def','in',false); RETURN current_setting('timezone'); END $$"
    )
    return session.sql("SELECT f_def()"), session.sql("SELECT current_setting('my.def')")


@report("notice flood")
def notices(url):
    session = Wire(url)
    return len(session.sql("DO $$ BEGIN FOR i IN 1..500 LOOP RAISE NOTICE 'n %',i; END LOOP; END $$"))


@report("binary results")
def binary(url):
    session = Wire(url)
    b = b"\0w\0\0\0\0\0\0\x01\0\x01"
    return session.go(parse("w", "SELECT 258::int"), message(b"B", b), execute(), SYNC)


@report("pg_cancel own")
def cancel_self(url):
    session = Wire(url)
    return session.sql("SELECT pg_cancel_backend(pg_backend_pid())"), session.sql("SELECT 1")


@report("cancel key")
def cancel(url):
    session = Wire(url)
    session.send(query("SELECT pg_sleep(10)"))
    time.sleep(0.3)
    c = socket.create_connection((session.u.hostname, session.u.port))
    c.sendall(struct.pack(">II", 16, 80877102) + session.key)
    c.recv(1)
    return session.ready(), session.sql("SELECT 1")


def psql(url, script, args=()):
    r = subprocess.run(
        ["psql", url, "-X", "-A", "-v", "VERBOSITY=terse", *args],
        input=script.encode(),
        capture_output=True,
        timeout=60,
    )
    return (
        r.stdout.decode(errors="replace"),
        re.sub(r"(server at|port|host).*", "", r.stderr.decode(errors="replace")),
        r.returncode,
    )


@report("good_job CTE advisory lock")
def good_job(url):
    session = Wire(url)
    a = session.go(
        parse(
            "g",
            "WITH rows AS MATERIALIZED (SELECT 501 AS id) SELECT id FROM rows WHERE pg_try_advisory_lock($1::bigint) LIMIT 1",
        ),
        bind("g", ["501"]),
        execute(),
        SYNC,
    )
    time.sleep(0.02)
    other = Wire(url)
    b = other.sql("SELECT pg_try_advisory_lock(501)")
    return a, b, session.sql("SELECT pg_advisory_unlock(501)")


@report("rails connect")
def rails(url):
    session = Wire(url)
    out = []
    for s in [
        "SET client_min_messages TO 'warning'",
        "SET standard_conforming_strings = on",
        "SET intervalstyle = iso_8601",
        "SET SESSION timezone TO 'UTC'",
        "SHOW max_identifier_length",
        "SELECT current_schema",
        "SET search_path TO public",
        "SELECT INTERVAL '1 day 2 hours'",
        "DISCARD ALL",
        "SHOW intervalstyle",
    ]:
        out.append(session.sql(s))
    return out


@report("rails query cache rollback of prepared")
def rails_prepared_in_tx(url):
    session = Wire(url)
    session.sql("BEGIN")
    a = session.go(parse("a1", "SELECT $1::int"), describe("S", "a1"), SYNC)
    b = session.go(bind("a1", ["x"]), execute(), SYNC)
    c = session.sql("ROLLBACK")
    return a, b, c, session.go(bind("a1", ["1"]), execute(), SYNC)


@report("pgadmin bytea")
def pgadmin(url):
    session = Wire(url)
    return (
        session.sql(
            "SET DateStyle=ISO; SET client_min_messages=notice; SELECT set_config('bytea_output','hex',false) FROM pg_show_all_settings() WHERE name = 'bytea_output'; SET client_encoding='UTF8'"
        ),
        session.sql("SHOW client_min_messages"),
        session.sql("SHOW bytea_output"),
    )


@report("dbeaver")
def dbeaver(url):
    session = Wire(url, extra_float_digits="2", application_name="DBeaver")
    return (
        session.sql("SET extra_float_digits = 3"),
        session.sql("SET application_name = 'DBeaver 24'"),
        session.sql("SELECT 0.1::float8"),
        session.sql("SHOW search_path"),
        session.sql("SELECT current_schema(),session_user=current_user"),
        session.sql("RESET extra_float_digits"),
        session.sql("SHOW extra_float_digits"),
    )


@report("flyway")
def flyway(url):
    session = Wire(url)
    out = [
        session.sql("SELECT pg_try_advisory_lock(77431708279161)"),
        session.sql("SELECT set_config('search_path','public',false)"),
        session.sql("BEGIN"),
        session.sql("SAVEPOINT a"),
        session.sql("bad"),
        session.sql("ROLLBACK TO SAVEPOINT a"),
        session.sql("RELEASE SAVEPOINT a"),
        session.sql("COMMIT"),
        session.sql("SELECT pg_advisory_unlock(77431708279161)"),
        session.sql("RESET ROLE"),
    ]
    return out


@report("laravel")
def laravel(url):
    session = Wire(url)
    return (
        session.go(parse("pdo_stmt_1", "set names 'utf8'"), SYNC),
        session.go(bind("pdo_stmt_1"), execute(), SYNC),
        session.sql("DEALLOCATE pdo_stmt_1"),
        session.go(parse("pdo_stmt_2", 'set search_path to "public"'), SYNC),
        session.go(bind("pdo_stmt_2"), execute(), SYNC),
        session.go(
            parse("pdo_stmt_3", "set synchronous_commit to 'off'"), bind("pdo_stmt_3"), execute(), SYNC
        ),
        session.sql("SHOW synchronous_commit"),
        session.sql("SHOW client_encoding"),
    )


@report("oban notifier")
def oban(url):
    session = Wire(url)
    session.sql('LISTEN "public.oban_insert"')
    other = Wire(url)
    other.go(parse("", "SELECT pg_notify($1,$2)"), bind("", ["public.oban_insert", "{}"]), execute(), SYNC)
    session.s.settimeout(5)
    t, b = session.msg()
    return show(t, b)[1:] if t == b"A" else show(t, b)


@report("notify in transaction order")
def notify_tx(url):
    session = Wire(url)
    session.sql("LISTEN no_x")
    other = Wire(url)
    other.sql("BEGIN; NOTIFY no_x,'1'; NOTIFY no_x,'2'; NOTIFY no_x,'1'; COMMIT")
    session.s.settimeout(5)
    r = []
    for _ in range(2):
        t, b = session.msg()
        r.append(show(t, b)[1:])
    return r, session.sql("UNLISTEN *")


@report("graphile skip locked")
def skip_locked(url):
    session = Wire(url)
    session.sql("DROP TABLE IF EXISTS jobs; CREATE TABLE jobs AS SELECT generate_series(1,3) id")
    session.sql("BEGIN")
    a = session.sql("SELECT id FROM jobs ORDER BY id FOR UPDATE SKIP LOCKED LIMIT 1")
    other = Wire(url)
    other.sql("BEGIN")
    b = other.sql("SELECT id FROM jobs ORDER BY id FOR UPDATE SKIP LOCKED LIMIT 1")
    other.sql("COMMIT")
    session.sql("COMMIT")
    return a, b, session.sql("DROP TABLE jobs")


@report("psql features")
def psql_features(url):
    return psql(
        url,
        r"""\set FETCH_COUNT 3
SELECT generate_series(1,8);
\gdesc
SELECT 1 AS a, 'x'::text AS b \gdesc
SELECT 1,2,3 \crosstabview
SELECT 'SELECT 42' \gexec
\set ON_ERROR_ROLLBACK on
BEGIN; SELECT 1/0; SELECT 'still'; COMMIT;
\copy (SELECT 1,2) TO STDOUT CSV
\errverbose
\encoding LATIN1
SELECT 1;
\echo :SERVER_VERSION_NAME
SELECT 5 \; SELECT 6;
\if true
SELECT 'if';
\endif
\timing off
SELECT 1 AS x \gset
\echo :x
""",
    )


@report("psql single transaction")
def psql_single(url):
    return psql(
        url,
        "CREATE TABLE pst (a int);\nINSERT INTO pst VALUES (1);\nSELECT 1/0;\n",
        ("-1", "-v", "ON_ERROR_STOP=1"),
    ), psql(url, "SELECT to_regclass('pst');")


@report("pgbench pipeline")
def pgbench_pipeline(url):
    import tempfile

    f = tempfile.NamedTemporaryFile("w", suffix=".sql", delete=False)
    f.write("\\startpipeline\nSELECT 1;\nSELECT 2;\nBEGIN;\nSELECT 3;\nCOMMIT;\n\\endpipeline\n")
    f.close()
    out = []
    for mode in ("extended", "prepared"):
        r = subprocess.run(
            ["pgbench", "-n", "-M", mode, "-c", "4", "-t", "20", "-f", f.name, url],
            capture_output=True,
            timeout=60,
        )
        out.append(
            (
                r.returncode,
                re.findall(r"number of transactions actually processed: (\S+)", r.stdout.decode()),
                r.stderr.decode()[-200:] if r.returncode else "",
            )
        )
    return out


@report("psycopg pipeline errors")
def psycopg_pipeline(url):
    out = []
    with psycopg.connect(url, autocommit=True) as c:
        try:
            with c.pipeline() as p:
                a = c.execute("SELECT 1")
                b = c.execute("SELECT 1/0")
                d = c.execute("SELECT 3")
                p.sync()
                e = c.execute("SELECT 4")
                p.sync()
                out.append(a.fetchone())
                try:
                    b.fetchone()
                except psycopg.Error as x:
                    out.append(type(x).__name__)
                try:
                    d.fetchone()
                except psycopg.Error as x:
                    out.append(type(x).__name__)
                out.append(e.fetchone())
        except psycopg.Error as x:
            out.append(("outer", type(x).__name__))
        out.append(c.execute("SELECT 5").fetchone())
    return out


@report("asyncpg session")
def asyncpg_session(url):
    import asyncpg

    async def go():
        c = await asyncpg.connect(url)
        out = [await c.fetchval("SELECT $1::int+1", 41)]
        async with c.transaction():
            async with c.transaction():
                out.append(await c.fetchval("SELECT 2"))
            out.append([r[0] async for r in c.cursor("SELECT generate_series(1,5)", prefetch=2)])
        await c.execute("SET my.asy='1'")
        await c.reset()
        out.append(await c.fetchval("SELECT current_setting('my.asy',true)"))
        got = asyncio.Queue()
        await c.add_listener("asy", lambda con, pid, ch, pl: got.put_nowait((ch, pl)))
        await c.execute("NOTIFY asy,'p'")
        out.append(await asyncio.wait_for(got.get(), 5))
        (
            await c.copy_records_to_table("asy_t", records=[(1,), (2,)])
            if await c.execute("CREATE TEMP TABLE asy_t (a int)")
            else 0
        )
        out.append(await c.fetchval("SELECT sum(a) FROM asy_t"))
        t = asyncio.create_task(c.fetch("SELECT pg_sleep(5)"))
        await asyncio.sleep(0.2)
        t.cancel()
        try:
            await t
        except asyncio.CancelledError:
            out.append("cancelled")
        out.append(await c.fetchval("SELECT 9"))
        await c.close()
        return out

    return asyncio.run(go())


@report("sqlalchemy reflection, isolation, ping")
def sqlalchemy_case(url):
    import sqlalchemy as sa

    e = sa.create_engine(url.replace("postgres://", "postgresql+psycopg://"), pool_pre_ping=True, pool_size=2)
    with e.connect().execution_options(isolation_level="AUTOCOMMIT") as c:
        c.execute(sa.text("DROP TABLE IF EXISTS sa_t"))
        c.execute(sa.text("CREATE TABLE sa_t (id serial primary key, b text)"))
    t = sa.Table("sa_t", sa.MetaData(), autoload_with=e)
    out = [[str(x.type) for x in t.columns]]
    with e.begin() as c:
        out.append(c.execute(t.insert().returning(t.c.id), [{"b": "1"}, {"b": "2"}]).fetchall())
    with e.connect().execution_options(isolation_level="SERIALIZABLE") as c:
        out.append(c.execute(sa.text("SHOW transaction_isolation")).scalar())
    with e.connect() as c:
        out.append(c.execute(sa.text("SHOW transaction_isolation")).scalar())
    with e.connect().execution_options(stream_results=True, yield_per=2) as c:
        out.append(c.execute(sa.text("SELECT generate_series(1,5)")).fetchall())
    with e.begin() as c:
        c.execute(sa.text("DROP TABLE sa_t"))
    e.dispose()
    return repr(out)


@report("unprivileged: replication refused")
def replication(url):
    try:
        Wire(url, replication="false")
        return "ok"
    except Exception as x:
        return str(x)


@report("set names / quotes in guc")
def guc_quotes(url):
    session = Wire(url)
    return session.sql("SET my.q = 'it''s \"x\" \\ ; --'"), [session.sql("SHOW my.q") for _ in range(4)]


@report("search_path with $user and quotes")
def sp_quotes(url):
    session = Wire(url)
    return session.sql('SET search_path = "$user", \'public\', "we""ird"'), [
        session.sql("SHOW search_path") for _ in range(4)
    ]


@report("SET TIME ZONE INTERVAL")
def tz_interval(url):
    session = Wire(url)
    return (
        session.sql("SET TIME ZONE INTERVAL '-08:00' HOUR TO MINUTE"),
        [session.sql("SHOW timezone") for _ in range(3)],
        session.sql("SELECT '2024-01-01 00:00Z'::timestamptz"),
        session.sql("SET TIME ZONE LOCAL"),
        session.sql("SET TIME ZONE -3"),
        [session.sql("SHOW timezone") for _ in range(3)],
    )


@report("SET LIST gucs and units")
def guc_units(url):
    session = Wire(url)
    return (
        session.sql(
            "SET work_mem = '12345kB'; SET statement_timeout=61000; SET DateStyle='German'; SET seq_page_cost=1.25; SET enable_seqscan=off"
        ),
        [
            session.sql("SHOW work_mem")
            + session.sql("SHOW statement_timeout")
            + session.sql("SHOW DateStyle")
            + session.sql("SHOW seq_page_cost")
            + session.sql("SHOW enable_seqscan")
            for _ in range(3)
        ],
        session.sql("SET datestyle TO DEFAULT"),
        session.sql("SHOW datestyle"),
    )


@report("UPDATE pg_settings")
def update_pg_settings(url):
    session = Wire(url)
    return session.sql("UPDATE pg_settings SET setting='3MB' WHERE name='work_mem'"), [
        session.sql("SHOW work_mem") for _ in range(3)
    ]


@report("function with SET changes caller")
def func_set(url):
    session = Wire(url)
    session.sql(
        "CREATE OR REPLACE FUNCTION f_set() RETURNS void LANGUAGE sql AS $$ SELECT set_config('my.fs', 'set', false) $$"
    )
    session.sql("SELECT f_set()")
    return [session.sql("SELECT current_setting('my.fs')") for _ in range(4)]


@report("trigger that sets")
def trigger_set(url):
    session = Wire(url)
    session.sql(
        "DROP TABLE IF EXISTS trg_t; CREATE TABLE trg_t (a int); CREATE OR REPLACE FUNCTION trg_f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config('my.tr', NEW.a::text, false); RETURN NEW; END $$; CREATE TRIGGER x BEFORE INSERT ON trg_t FOR EACH ROW EXECUTE FUNCTION trg_f()"
    )
    session.go(parse("i", "INSERT INTO trg_t VALUES ($1::int)"), bind("i", ["7"]), execute(), SYNC)
    r = [session.sql("SELECT current_setting('my.tr')") for _ in range(4)]
    session.sql("DROP TABLE trg_t")
    return r


@report("procedure with commits")
def procedure(url):
    session = Wire(url)
    session.sql(
        "DROP TABLE IF EXISTS pr_t; CREATE TABLE pr_t (a int); CREATE OR REPLACE PROCEDURE pr() LANGUAGE plpgsql AS $$ BEGIN FOR i IN 1..3 LOOP INSERT INTO pr_t VALUES (i); COMMIT; END LOOP; END $$"
    )
    r = (
        session.sql("CALL pr()"),
        session.sql("SELECT count(*) FROM pr_t"),
        session.sql("BEGIN"),
        session.sql("CALL pr()"),
        session.sql("ROLLBACK"),
    )
    session.sql("DROP TABLE pr_t")
    return r


@report("temp table in function")
def temp_in_function(url):
    session = Wire(url)
    session.sql(
        "CREATE OR REPLACE FUNCTION mk_tmp() RETURNS void LANGUAGE plpgsql AS $$ BEGIN CREATE TEMP TABLE mk_t AS SELECT 3 a; END $$"
    )
    session.sql("SELECT mk_tmp()")
    return [session.sql("SELECT a FROM mk_t") for _ in range(3)], session.sql("DROP TABLE mk_t")


@report("deferred constraint at commit")
def deferred(url):
    session = Wire(url)
    session.sql("DROP TABLE IF EXISTS df; CREATE TABLE df (a int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)")
    session.sql("BEGIN; INSERT INTO df VALUES (1),(1)")
    r = (
        session.sql("COMMIT"),
        session.sql("SELECT count(*) FROM df"),
        session.sql("SET CONSTRAINTS ALL IMMEDIATE"),
    )
    session.sql("DROP TABLE df")
    return r


@report("vacuum and concurrently by extended")
def vacuum_extended(url):
    session = Wire(url)
    session.sql("DROP TABLE IF EXISTS vx; CREATE TABLE vx (a int)")
    r = (
        session.go(parse("", "VACUUM vx"), bind(""), execute(), SYNC),
        session.go(parse("", "CREATE INDEX CONCURRENTLY vx_i ON vx (a)"), bind(""), execute(), SYNC),
        session.sql("VACUUM vx; SELECT 1"),
    )
    session.sql("DROP TABLE vx")
    return r


@report("very long query text")
def long_text(url):
    session = Wire(url)
    s = "SELECT length('" + "x" * 3000000 + "')"
    return (
        session.sql(s),
        session.go(parse("L", s), bind("L"), execute(), SYNC),
        session.go(bind("L"), execute(), SYNC),
    )


@report("many parameters")
def many_parameters(url):
    session = Wire(url)
    n = 30000
    s = "SELECT " + "+".join(f"${i+1}::int" for i in range(2000))
    return session.go(parse("mp", s), bind("mp", ["1"] * 2000), execute(), SYNC)


@report("interleaved portals")
def portals(url):
    session = Wire(url)
    session.sql("BEGIN")
    return session.go(
        parse("A", "SELECT generate_series(1,4)"),
        bind("A", [], "p1"),
        bind("A", [], "p2"),
        execute("p1", 2),
        execute("p2", 3),
        execute("p1", 2),
        SYNC,
    ), session.sql("COMMIT")


@report("error in Bind then sync")
def bind_error(url):
    session = Wire(url)
    return (
        session.go(parse("be", "SELECT $1::int"), SYNC),
        session.go(bind("be", ["zz"]), describe("P"), execute(), SYNC),
        session.go(bind("be", ["5"]), execute(), SYNC),
    )


@report("transaction abort by server then pipelined")
def begin_in_pipeline(url):
    session = Wire(url)
    return session.go(
        parse("", "BEGIN"),
        bind(""),
        execute(),
        parse("", "SELECT 1/0"),
        bind(""),
        execute(),
        SYNC,
        parse("", "SELECT 1"),
        bind(""),
        execute(),
        SYNC,
        parse("", "ROLLBACK"),
        bind(""),
        execute(),
        SYNC,
        n=3,
    ), session.sql("SELECT 1")


@report("is_superuser/session_authorization status")
def statuses(url):
    session = Wire(url)
    return sorted((k, v) for k, v in session.params.items() if k not in ("session_authorization",))


def stir(url, seed, over):
    """Another session of the tenant, which leaves what it can in its servers."""
    choose = random.Random(seed)
    while not over.is_set():
        try:
            with psycopg.connect(url, autocommit=True) as session:
                for _ in range(30):
                    if over.is_set():
                        return
                    turn = choose.randrange(6)
                    if turn == 0:
                        session.execute("SET timezone='Asia/Tokyo'")
                        session.execute("SET search_path=pg_catalog")
                    elif turn == 1:
                        session.execute(
                            "SELECT count(*) FROM pg_class WHERE relname <> %s", ("x",), prepare=True
                        )
                    elif turn == 2:
                        with session.transaction():
                            session.execute("SELECT pg_sleep(0.002)")
                            session.execute("SET LOCAL work_mem='1MB'")
                    elif turn == 3:
                        session.execute("SET application_name='stir'; SET statement_timeout='33s'")
                    elif turn == 4:
                        session.execute("PREPARE z AS SELECT 1; EXECUTE z; DEALLOCATE z")
                    else:
                        session.execute("RESET ALL")
        except psycopg.Error:
            time.sleep(0.05)


def outcome(case, url):
    try:
        return repr(case(url))
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"


def main():
    direct, proxy, over = sys.argv[1], sys.argv[2], threading.Event()
    for seed in range(3):
        threading.Thread(target=stir, args=(proxy, seed, over), daemon=True).start()
    differing = 0
    for name, (where, case) in CASES.items():
        expected = outcome(case, direct)
        for _ in range(2):
            seen = outcome(case, proxy)
            if seen != expected:
                differing += 1
                print(f"{name} ({where})\n  direct: {expected}\n  proxy:  {seen}")
                break
    over.set()
    print(f"{len(CASES)} cases, {differing} differ")
    sys.exit(1 if differing else 0)


main()
