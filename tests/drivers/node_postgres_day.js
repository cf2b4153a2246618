// A day's ordinary work with node-postgres: six connections at once, then its pool. Usage: node node_postgres_day.js URL
'use strict';
const assert = require('node:assert/strict');
const { Client, Pool } = require('pg');
const Cursor = require('pg-cursor');

const URL = process.argv[2];
const WORKERS = 6;
const UNICODE = 'naïve – 漢字 – 🦀 – \'quoted\' "twice" \\ back';

const failsWith = (code, work) =>
  assert.rejects(work, (error) => (assert.equal(error.code, code, error.message), true), `${code} expected`);
const value = async (client, ...query) => Object.values((await client.query(...query)).rows[0])[0];

async function typedValues(client, table) {
  await client.query(`CREATE TABLE ${table} (id serial PRIMARY KEY, name text UNIQUE, amount numeric, tags text[],
    doc jsonb, raw bytea, at timestamptz, flag boolean, big bigint, nothing int)`);
  const raw = Buffer.from(Array.from({ length: 10240 }, (_, i) => i % 256));
  const at = new Date('2024-02-29T12:30:00Z');
  const doc = { k: [1, null, { deep: 'ü' }] };
  const inserted = await client.query(
    `INSERT INTO ${table} (name, amount, tags, doc, raw, at, flag, big, nothing)
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) RETURNING id`,
    [UNICODE, '12345678901234567890.123456789', ['a', null, 'c,d', '{}'], doc, raw, at, true, '4611686018427387904', null]);
  assert.equal(inserted.rowCount, 1);
  const { rows: [row] } = await client.query(`SELECT * FROM ${table} WHERE id = $1`, [inserted.rows[0].id]);
  assert.equal(row.name, UNICODE);
  assert.equal(row.amount, '12345678901234567890.123456789');
  assert.deepEqual(row.tags, ['a', null, 'c,d', '{}']);
  assert.deepEqual(row.doc, doc);
  assert.ok(row.raw.equals(raw));
  assert.equal(row.at.getTime(), at.getTime());
  assert.equal(row.flag, true);
  assert.equal(row.big, '4611686018427387904');
  assert.equal(row.nothing, null);
}

async function bigResults(client) {
  const { rows } = await client.query("SELECT i, repeat('x', 100) FROM generate_series(1, 50000) i");
  assert.equal(rows.reduce((sum, row) => sum + row.i, 0), 50000 * 50001 / 2);
  assert.equal((await value(client, "SELECT repeat('y', 5000000)")).length, 5000000);
  assert.equal(await value(client, 'SELECT length($1)', ['z'.repeat(3000000)]), 3000000);
}

async function transactions(client, table) {
  const count = () => value(client, `SELECT count(*) FROM ${table}`).then(Number);
  const insert = (name) => client.query(`INSERT INTO ${table} (name) VALUES ($1)`, [name]);
  const before = await count();
  await client.query('BEGIN');
  await insert('rolled back');
  await client.query('ROLLBACK');
  assert.equal(await count(), before);
  await client.query('BEGIN');
  await insert('kept');
  await client.query('SAVEPOINT s');
  await failsWith('23505', insert('kept'));
  await failsWith('25P02', client.query('SELECT 1'));
  await client.query('ROLLBACK TO s');
  await insert('kept as well');
  await client.query('COMMIT');
  assert.equal(await count(), before + 2);
  await client.query('BEGIN');
  await failsWith('22012', client.query('SELECT 1/0'));
  assert.equal((await client.query('COMMIT')).command, 'ROLLBACK');
}

async function preparedStatements(client) {
  for (let i = 0; i < 60; i += 1) {
    const { rows } = await client.query({ name: 'adding', text: 'SELECT $1::int + 1 AS n', values: [i] });
    assert.equal(rows[0].n, i + 1);
  }
  for (let i = 0; i < 150; i += 1) {
    const { rows } = await client.query({ name: `times ${i}`, text: `SELECT $1::int * ${i} AS n`, values: [2] });
    assert.equal(rows[0].n, 2 * i);
  }
  await failsWith('42601', client.query({ name: 'broken', text: 'SELEC 1' }));
  await failsWith('22012', client.query({ name: 'dividing', text: 'SELECT 1 / $1::int', values: [0] }));
  assert.equal(await value(client, { name: 'dividing', text: 'SELECT 1 / $1::int', values: [1] }), 1);
}

async function batches(client) {
  const results = await client.query('SELECT 1 AS a; SELECT 2 AS b; SELECT 3 AS c');
  assert.deepEqual(results.map((result) => Object.values(result.rows[0])[0]), [1, 2, 3]);
  // All at once: node-postgres sends each when the one before is answered.
  const answers = await Promise.all(Array.from({ length: 100 }, (_, i) => value(client, 'SELECT $1::int', [i])));
  assert.deepEqual(answers, Array.from({ length: 100 }, (_, i) => i));
  await failsWith('22012', client.query('SELECT 1; SELECT 1/0; SELECT 2'));
  assert.equal(await value(client, 'SELECT 3'), 3);
}

async function noticesAndErrors(client) {
  const heard = [];
  client.on('notice', (notice) => heard.push(notice.message));
  await client.query("DO $$ BEGIN RAISE NOTICE 'hear this: %', 42; END $$");
  assert.deepEqual(heard, ['hear this: 42']);
  await assert.rejects(client.query('SELECT * FROM no_such_table'), (error) => {
    assert.equal(error.code, '42P01');
    assert.equal(error.message, 'relation "no_such_table" does not exist');
    assert.equal(error.position, '15');
    return true;
  });
  await failsWith('22P02', client.query('SELECT $1::int', ['no number']));
}

async function cursors(client) {
  const cursor = client.query(new Cursor('SELECT i FROM generate_series(1, $1::int) i', [5000]));
  let sum = 0;
  for (let rows = await cursor.read(300); rows.length > 0; rows = await cursor.read(300)) {
    sum += rows.reduce((all, row) => all + row.i, 0);
  }
  assert.equal(sum, 5000 * 5001 / 2);
  const left = client.query(new Cursor('SELECT i FROM generate_series(1, 100000) i'));
  assert.equal((await left.read(10)).length, 10);
  await left.close(); // with most of it unread
  assert.equal(await value(client, "SELECT 'alive'"), 'alive');
}

async function cancels(client) {
  const sleeping = client.query('SELECT pg_sleep(60)');
  const canceller = new Client(URL);
  setTimeout(() => canceller.cancel(client, client.activeQuery), 300);
  await failsWith('57014', sleeping);
  assert.equal(await value(client, "SELECT 'alive'"), 'alive');
}

async function sessionState(client, worker) {
  await client.query(`SET application_name = 'worker ${worker}'; SET work_mem = '${worker + 11}MB'`);
  for (let i = 0; i < 30; i += 1) {
    assert.equal(await value(client, 'SHOW application_name'), `worker ${worker}`);
    assert.equal(await value(client, 'SHOW work_mem'), `${worker + 11}MB`);
  }
  await client.query('CREATE TEMP TABLE mine (n int)');
  await client.query('INSERT INTO mine VALUES ($1)', [worker]);
  assert.equal(await value(client, 'SELECT n FROM mine'), worker);
  await client.query('DROP TABLE mine');
  const heard = new Promise((resolve) => client.once('notification', (event) => resolve(event.payload)));
  await client.query(`LISTEN channel_${worker}`);
  await client.query('SELECT pg_notify($1, $2)', [`channel_${worker}`, UNICODE]);
  assert.equal(await heard, UNICODE);
  await client.query('UNLISTEN *');
}

async function day(worker) {
  const client = new Client({ connectionString: URL });
  const table = `node_day_${worker}`;
  await client.connect();
  await client.query(`DROP TABLE IF EXISTS ${table}`);
  await typedValues(client, table);
  await bigResults(client);
  await transactions(client, table);
  await preparedStatements(client);
  await batches(client);
  await noticesAndErrors(client);
  await cursors(client);
  await sessionState(client, worker);
  await cancels(client);
  await client.query(`DROP TABLE ${table}`);
  await client.end();
}

async function pooled() {
  const pool = new Pool({ connectionString: URL, max: 4 });
  const answers = await Promise.all(Array.from({ length: 200 }, (_, i) => value(pool, 'SELECT $1::int', [i])));
  assert.deepEqual(answers, Array.from({ length: 200 }, (_, i) => i));
  await pool.end();
}

async function main() {
  await Promise.all(Array.from({ length: WORKERS }, (_, worker) => day(worker)));
  await pooled();
  console.log('node-postgres: a good day');
}

main().catch((error) => { console.error(error); process.exit(1); });
