// A day's ordinary work with pgjdbc, statements prepared on the server from the first use on: six connections at once.
// Usage: java -cp postgresql.jar JdbcDay.java HOST:PORT/DATABASE USER PASSWORD

import java.io.StringReader;
import java.io.StringWriter;
import java.math.BigDecimal;
import java.sql.Array;
import java.sql.BatchUpdateException;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Savepoint;
import java.sql.Statement;
import java.sql.Types;
import java.time.OffsetDateTime;
import java.util.Arrays;
import java.util.List;
import java.util.Properties;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.stream.IntStream;
import org.postgresql.PGConnection;
import org.postgresql.copy.CopyManager;
import org.postgresql.util.PGobject;

public class JdbcDay {
    static final int WORKERS = 6;
    static final String UNICODE = "naïve – 漢字 – 🦀 – 'quoted' \"twice\" \\ back";
    static String url;
    static Properties properties = new Properties();

    interface Work { void run() throws Exception; }

    static void check(boolean holds, Object... told) {
        if (!holds) throw new AssertionError(Arrays.deepToString(told));
    }

    static void failsWith(String state, Work work) throws Exception {
        try {
            work.run();
        } catch (SQLException error) {
            check(state.equals(error.getSQLState()), state, error.getSQLState(), error.getMessage());
            return;
        }
        throw new AssertionError(state + " expected");
    }

    static Object value(Connection db, String sql, Object... parameters) throws SQLException {
        try (PreparedStatement statement = db.prepareStatement(sql)) {
            for (int i = 0; i < parameters.length; i++) statement.setObject(i + 1, parameters[i]);
            try (ResultSet rows = statement.executeQuery()) {
                rows.next();
                return rows.getObject(1);
            }
        }
    }

    static void run(Connection db, String sql) throws SQLException {
        try (Statement statement = db.createStatement()) {
            statement.execute(sql);
        }
    }

    static void typedValues(Connection db, String table) throws Exception {
        run(db, "CREATE TABLE " + table + " (id serial PRIMARY KEY, name text UNIQUE, amount numeric, tags text[],"
            + " doc jsonb, raw bytea, at timestamptz, flag boolean, big bigint, nothing int)");
        byte[] raw = new byte[10240];
        for (int i = 0; i < raw.length; i++) raw[i] = (byte) i;
        PGobject doc = new PGobject();
        doc.setType("jsonb");
        doc.setValue("{\"k\": [1, null, {\"deep\": \"ü\"}]}");
        OffsetDateTime at = OffsetDateTime.parse("2024-02-29T12:30:00Z");
        String insert = "INSERT INTO " + table + " (name, amount, tags, doc, raw, at, flag, big, nothing)"
            + " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)";
        try (PreparedStatement statement = db.prepareStatement(insert, Statement.RETURN_GENERATED_KEYS)) {
            statement.setString(1, UNICODE);
            statement.setBigDecimal(2, new BigDecimal("12345678901234567890.123456789"));
            statement.setArray(3, db.createArrayOf("text", new String[] {"a", null, "c,d", "{}"}));
            statement.setObject(4, doc);
            statement.setBytes(5, raw);
            statement.setObject(6, at);
            statement.setBoolean(7, true);
            statement.setLong(8, 1L << 62);
            statement.setNull(9, Types.INTEGER);
            check(statement.executeUpdate() == 1);
            try (ResultSet keys = statement.getGeneratedKeys()) {
                check(keys.next() && keys.getInt(1) > 0);
            }
        }
        for (int round = 0; round < 3; round++) { // text, then binary transfer
            try (PreparedStatement statement = db.prepareStatement("SELECT * FROM " + table + " WHERE name = ?")) {
                statement.setString(1, UNICODE);
                try (ResultSet row = statement.executeQuery()) {
                    check(row.next());
                    check(row.getString("name").equals(UNICODE), row.getString("name"));
                    check(row.getBigDecimal("amount").equals(new BigDecimal("12345678901234567890.123456789")));
                    Array tags = row.getArray("tags");
                    check(Arrays.equals((Object[]) tags.getArray(), new Object[] {"a", null, "c,d", "{}"}));
                    check(row.getString("doc").equals(doc.getValue()), row.getString("doc"));
                    check(Arrays.equals(row.getBytes("raw"), raw));
                    check(row.getObject("at", OffsetDateTime.class).isEqual(at));
                    check(row.getBoolean("flag") && row.getLong("big") == 1L << 62);
                    check(row.getObject("nothing") == null && row.wasNull());
                    check(!row.next());
                }
            }
        }
    }

    static void bigResultsAndFetchSize(Connection db) throws Exception {
        try (Statement statement = db.createStatement()) {
            long sum = 0;
            try (ResultSet rows = statement.executeQuery("SELECT i, repeat('x', 100) FROM generate_series(1, 50000) i")) {
                while (rows.next()) sum += rows.getInt(1);
            }
            check(sum == 50000L * 50001 / 2, sum);
        }
        check(((String) value(db, "SELECT repeat('y', 5000000)")).length() == 5_000_000);
        check(value(db, "SELECT length(?)", "z".repeat(3_000_000)).equals(3_000_000));
        db.setAutoCommit(false);
        try (Statement statement = db.createStatement()) {
            statement.setFetchSize(300); // a portal, executed a part at a time
            long sum = 0;
            try (ResultSet rows = statement.executeQuery("SELECT i FROM generate_series(1, 5000) i")) {
                while (rows.next()) {
                    sum += rows.getInt(1);
                    if (rows.getInt(1) % 1000 == 0) value(db, "SELECT 1"); // between two parts
                }
            }
            check(sum == 5000L * 5001 / 2, sum);
        }
        db.commit();
        db.setAutoCommit(true);
    }

    static void transactions(Connection db, String table) throws Exception {
        String count = "SELECT count(*) FROM " + table;
        String insert = "INSERT INTO " + table + " (name) VALUES ('%s')";
        long before = (Long) value(db, count);
        db.setAutoCommit(false);
        run(db, String.format(insert, "rolled back"));
        db.rollback();
        check(value(db, count).equals(before));
        db.commit();
        run(db, String.format(insert, "kept"));
        Savepoint savepoint = db.setSavepoint("here");
        failsWith("23505", () -> run(db, String.format(insert, "kept")));
        failsWith("25P02", () -> value(db, "SELECT 1"));
        db.rollback(savepoint);
        run(db, String.format(insert, "kept as well"));
        db.commit();
        check(value(db, count).equals(before + 2));
        db.commit();
        db.setTransactionIsolation(Connection.TRANSACTION_SERIALIZABLE);
        check(value(db, "SHOW transaction_isolation").equals("serializable"));
        db.commit();
        db.setTransactionIsolation(Connection.TRANSACTION_READ_COMMITTED);
        db.setReadOnly(true);
        failsWith("25006", () -> run(db, String.format(insert, "read only")));
        db.rollback();
        db.setReadOnly(false);
        db.setAutoCommit(true);
    }

    static void copies(Connection db, String table) throws Exception {
        run(db, "CREATE TABLE " + table + " (i int, t text)");
        CopyManager copies = db.unwrap(PGConnection.class).getCopyAPI();
        StringBuilder lines = new StringBuilder();
        for (int i = 0; i < 20000; i++) lines.append(i).append('\t').append(i % 7 == 0 ? "\\N" : "漢 " + i).append('\n');
        check(copies.copyIn("COPY " + table + " FROM STDIN", new StringReader(lines.toString())) == 20000);
        StringWriter out = new StringWriter();
        check(copies.copyOut("COPY (SELECT * FROM " + table + " ORDER BY i) TO STDOUT", out) == 20000);
        check(out.toString().equals(lines.toString()), "COPY out differs");
        failsWith("22P02", () -> copies.copyIn("COPY " + table + " FROM STDIN", new StringReader("no number\tx\n")));
        check(value(db, "SELECT count(*) FROM " + table).equals(20000L));
    }

    static void preparedStatements(Connection db) throws Exception {
        check(db.unwrap(PGConnection.class).getPrepareThreshold() == 1);
        try (PreparedStatement adding = db.prepareStatement("SELECT ?::int + 1")) {
            for (int i = 0; i < 60; i++) {
                adding.setInt(1, i);
                try (ResultSet row = adding.executeQuery()) {
                    check(row.next() && row.getInt(1) == i + 1);
                }
            }
        }
        for (int i = 0; i < 300; i++) { // pgjdbc keeps 256 and closes the oldest
            check(value(db, "SELECT ?::int * " + i, 2).equals(2 * i));
        }
        // A statement whose result changes under it.
        run(db, "CREATE TEMP TABLE changing (a int); INSERT INTO changing VALUES (1)");
        for (int i = 0; i < 3; i++) check(value(db, "SELECT * FROM changing").equals(1));
        run(db, "DROP TABLE changing");
    }

    static void batches(Connection db, String table) throws Exception {
        try (PreparedStatement insert = db.prepareStatement("INSERT INTO " + table + " (name) VALUES (?)")) {
            for (int i = 0; i < 500; i++) {
                insert.setString(1, "batched " + i);
                insert.addBatch();
            }
            check(IntStream.of(insert.executeBatch()).sum() == 500);
            insert.setString(1, "new in a batch");
            insert.addBatch();
            insert.setString(1, "batched 1");
            insert.addBatch();
            try {
                insert.executeBatch();
                throw new AssertionError("23505 expected");
            } catch (BatchUpdateException error) {
                check(error.getSQLState().equals("23505"), error.getSQLState());
            }
        }
        check(value(db, "SELECT count(*) FROM " + table + " WHERE name LIKE 'batched%'").equals(500L));
    }

    static void noticesAndErrors(Connection db) throws Exception {
        try (Statement statement = db.createStatement()) {
            statement.execute("DO $$ BEGIN RAISE WARNING 'hear this: %', 42; END $$");
            check(statement.getWarnings().getMessage().equals("hear this: 42"));
        }
        failsWith("42P01", () -> value(db, "SELECT * FROM no_such_table"));
        failsWith("42601", () -> value(db, "SELEC 1"));
        failsWith("22012", () -> value(db, "SELECT 1 / ?::int", 0));
        check(value(db, "SELECT 1 / ?::int", 1).equals(1));
    }

    static void cancels(Connection db) throws Exception {
        try (Statement statement = db.createStatement()) {
            statement.setQueryTimeout(1); // pgjdbc cancels from a thread of its own
            failsWith("57014", () -> statement.execute("SELECT pg_sleep(60)"));
        }
        check(value(db, "SELECT 'alive'").equals("alive"));
    }

    static void sessionState(Connection db, int worker) throws Exception {
        db.setClientInfo("ApplicationName", "worker " + worker);
        run(db, "SET work_mem = '" + (worker + 11) + "MB'");
        run(db, "CREATE SCHEMA IF NOT EXISTS jdbc_" + worker);
        db.setSchema("jdbc_" + worker);
        for (int i = 0; i < 30; i++) {
            check(value(db, "SHOW application_name").equals("worker " + worker));
            check(value(db, "SHOW work_mem").equals((worker + 11) + "MB"));
            check(db.getSchema().equals("jdbc_" + worker), db.getSchema());
        }
        run(db, "LISTEN channel_" + worker);
        value(db, "SELECT pg_notify(?, ?)", "channel_" + worker, UNICODE);
        check(db.unwrap(PGConnection.class).getNotifications(20000)[0].getParameter().equals(UNICODE));
        run(db, "UNLISTEN *");
        db.setSchema("public");
        check(db.isValid(5));
    }

    static int day(int worker) throws Exception {
        String table = "jdbc_day_" + worker;
        String copied = "jdbc_copied_" + worker;
        try (Connection db = DriverManager.getConnection(url, properties)) {
            check(db.getMetaData().getDatabaseProductName().equals("PostgreSQL"));
            run(db, "DROP TABLE IF EXISTS " + table + ", " + copied);
            typedValues(db, table);
            try (ResultSet columns = db.getMetaData().getColumns(null, "public", table, null)) {
                check(columns.next() && columns.getString("COLUMN_NAME").equals("id"));
            }
            bigResultsAndFetchSize(db);
            transactions(db, table);
            copies(db, copied);
            preparedStatements(db);
            batches(db, table);
            noticesAndErrors(db);
            sessionState(db, worker);
            cancels(db);
            run(db, "DROP TABLE " + table + ", " + copied);
        }
        return worker;
    }

    public static void main(String[] arguments) throws Exception {
        url = "jdbc:postgresql://" + arguments[0];
        properties.setProperty("user", arguments[1]);
        properties.setProperty("password", arguments[2]);
        properties.setProperty("prepareThreshold", "1");
        ExecutorService workers = Executors.newFixedThreadPool(WORKERS);
        List<Future<Integer>> days = workers.invokeAll(
            IntStream.range(0, WORKERS).mapToObj(worker -> (Callable<Integer>) () -> day(worker)).toList());
        for (Future<Integer> day : days) day.get();
        workers.shutdown();
        System.out.println("pgjdbc: a good day");
    }
}
