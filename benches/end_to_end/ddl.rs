//! Migrations: one client defines objects in a database that has many, and a dump of that database is restored.

use std::{io, process::Command, time::Instant};

use crate::{
    accounting::Window,
    client::Client,
    sample::{Metric, Outcome, of_requests},
    stand::{Pooler, Stand, Target},
    streams::in_words,
};

/// What is measured, and where.
#[derive(Debug, Clone, Copy)]
pub struct Ddl {
    pub what: What,
    /// One of the database's functions runs a text that it gets as an argument: it may leave anything in its session.
    pub dynamic: bool,
}

#[derive(Debug, Clone, Copy)]
pub enum What {
    CreateTable,
    AlterTable,
    CreateView,
    CreateTableAs,
    CreateFunction,
    CreateDomain,
    /// psql restores what pg_dump has written.
    Restore,
}

/// Tables, and views, of each database.
const TABLES: usize = 150;
const FUNCTIONS: usize = 50;

/// Empty before each restore.
const RESTORED: &str = "ddl_restored";

impl Ddl {
    pub async fn run(self, stand: &mut Stand, pooler: Pooler) -> Outcome {
        let database = if self.dynamic { "ddl_dynamic" } else { "ddl_plain" };
        for name in [database, RESTORED] {
            if stand.need_tenant(name).await && name == database {
                let direct = stand.target(Pooler::Direct).at(database);
                run_all(&direct, &objects(self.dynamic)).await.map_err(in_words)?;
            }
        }
        match self.what {
            What::Restore => restore(stand, database, pooler).await,
            _ => self.define(stand, database, pooler).await.map_err(in_words)?,
        }
    }

    async fn define(self, stand: &Stand, database: &str, pooler: Pooler) -> io::Result<Outcome> {
        let prepare =
            ["DROP SCHEMA IF EXISTS made CASCADE", "CREATE SCHEMA made", "CREATE TABLE made.altered ()"];
        run_all(&stand.target(Pooler::Direct).at(database), &prepare.map(str::to_owned)).await?;
        let mut client = Client::connect(&stand.target(pooler).at(database), None).await?;
        // A first statement opens a server.
        client.query("SELECT count(*) FROM t1").await?;
        let (mut latencies, window) = (Vec::new(), Window::open(None));
        for number in 0..200 {
            let start = Instant::now();
            query(&mut client, &self.what.statement(number)).await?;
            latencies.push(start.elapsed().as_secs_f64() * 1e6);
        }
        let measured = window.close();
        client.leave().await?;
        Ok(of_requests(latencies, measured))
    }
}

impl What {
    fn statement(self, number: usize) -> String {
        match self {
            Self::CreateTable => format!(
                "CREATE TABLE made.t{number} (id serial PRIMARY KEY, name text DEFAULT 'x', n int CHECK (n > 0))"
            ),
            Self::AlterTable => format!("ALTER TABLE made.altered ADD COLUMN c{number} int DEFAULT 5"),
            Self::CreateView => format!("CREATE VIEW made.v{number} AS SELECT id, name FROM t1"),
            Self::CreateTableAs => format!("CREATE TABLE made.a{number} AS SELECT id, name FROM t1"),
            Self::CreateFunction => format!(
                "CREATE FUNCTION made.f{number}() RETURNS bigint LANGUAGE plpgsql AS 'BEGIN RETURN (SELECT count(*) FROM t1); END'"
            ),
            Self::CreateDomain => format!("CREATE DOMAIN made.d{number} AS int CHECK (value > 0)"),
            Self::Restore => String::new(),
        }
    }
}

fn objects(dynamic: bool) -> Vec<String> {
    let mut all = Vec::new();
    for number in 1..=TABLES {
        all.push(format!(
            "CREATE TABLE t{number} (id serial PRIMARY KEY, name text NOT NULL DEFAULT 'x', at timestamptz DEFAULT now(), \
             n int CHECK (n > 0), price numeric(10, 2) DEFAULT 0)"
        ));
        all.push(format!("INSERT INTO t{number} (n) SELECT generate_series(1, 10)"));
    }
    for number in 1..=TABLES {
        let other = number % TABLES + 1;
        all.push(format!(
            "CREATE VIEW v{number} AS SELECT a.id, upper(a.name) AS big, count(*) OVER (PARTITION BY a.n) AS c, \
             coalesce(b.price, 0) AS p FROM t{number} a LEFT JOIN t{other} b ON a.id = b.id WHERE a.at > now() - interval '1 day'"
        ));
    }
    for number in 1..=FUNCTIONS {
        let body = "r := r + 1; ".repeat(100);
        all.push(format!(
            "CREATE FUNCTION f{number}(x int) RETURNS int LANGUAGE plpgsql AS $$DECLARE r int; BEGIN \
             SELECT count(*) INTO r FROM t{number} WHERE n > x; {body} RETURN r; END$$"
        ));
    }
    if dynamic {
        all.push(
            "CREATE FUNCTION run(t text) RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE t; END'".to_owned(),
        );
    }
    all
}

async fn run_all(target: &Target, statements: &[String]) -> io::Result<()> {
    let mut client = Client::connect(target, None).await?;
    for sql in statements {
        query(&mut client, sql).await?;
    }
    client.leave().await
}

async fn query(client: &mut Client, sql: &str) -> io::Result<()> {
    match client.query(sql).await?.error {
        true => Err(io::Error::other(format!("fails: {sql}"))),
        false => Ok(()),
    }
}

/// The time of the whole restore.
async fn restore(stand: &Stand, database: &str, pooler: Pooler) -> Outcome {
    let direct = stand.target(Pooler::Direct);
    let folder = tempfile::tempdir().map_err(in_words)?;
    let dump = folder.path().join("dump.sql");
    let program = |name: &str, target: &Target| {
        let mut command = Command::new(stand.program(name));
        command.args(["--host", &target.host, "--port", &target.port.to_string()]);
        command.args(["--username", &target.user, "--dbname", &target.database]);
        command.env("PGPASSWORD", &target.password);
        command.env("PGSSLMODE", "disable");
        command
    };
    let finish = |mut command: Command| {
        let output = command.output().map_err(in_words)?;
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success().then_some(()).ok_or(words)
    };
    let mut dumping = program("pg_dump", &direct.at(database));
    dumping.args(["--no-owner", "--no-privileges", "--exclude-schema", "made", "--file"]).arg(&dump);
    finish(dumping)?;
    let empty = ["DROP SCHEMA public CASCADE", "CREATE SCHEMA public"].map(str::to_owned);
    run_all(&direct.at(RESTORED), &empty).await.map_err(in_words)?;
    let mut restoring = program("psql", &stand.target(pooler).at(RESTORED));
    restoring.args(["--quiet", "--no-psqlrc", "--set", "ON_ERROR_STOP=1", "--output", "/dev/null", "--file"]);
    restoring.arg(&dump);
    let window = Window::open(None);
    finish(restoring)?;
    let measured = window.close();
    Ok(vec![(Metric::Others, measured.others_percent), (Metric::P50, measured.seconds * 1e6)])
}
