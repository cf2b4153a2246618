"""A day's ordinary work with SQLAlchemy: tables made and changed, six threads with sessions on a pool, then the same
pool's asynchronous sister over asyncpg. Usage: sqlalchemy_day.py URL"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

URL = sa.make_url(sys.argv[1])
WORKERS = 6


class Base(orm.DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "sqla_customers"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(unique=True)
    details: orm.Mapped[dict] = orm.mapped_column(postgresql.JSONB, default=dict)
    orders: orm.Mapped[list["Order"]] = orm.relationship(back_populates="customer", cascade="all, delete-orphan")


class Order(Base):
    __tablename__ = "sqla_orders"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    customer_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey(Customer.id), index=True)
    state: orm.Mapped[str] = orm.mapped_column(sa.Enum("open", "paid", name="sqla_state"), default="open")
    amount: orm.Mapped[int]
    customer: orm.Mapped[Customer] = orm.relationship(back_populates="orders")


def migrations(engine):
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE sqla_orders ADD COLUMN note text DEFAULT 'none'"))
    with engine.connect() as connection:  # what is said after an error is not done either
        transaction = connection.begin()
        connection.execute(sa.text("ALTER TABLE sqla_orders DROP COLUMN note"))
        transaction.rollback()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("CREATE INDEX CONCURRENTLY sqla_notes ON sqla_orders (note)"))
    found = sa.inspect(engine)
    assert {"note", "amount", "state"} <= {column["name"] for column in found.get_columns("sqla_orders")}
    assert "sqla_notes" in {index["name"] for index in found.get_indexes("sqla_orders")}
    assert found.get_foreign_keys("sqla_orders")[0]["referred_table"] == "sqla_customers"
    assert sa.Table("sqla_orders", sa.MetaData(), autoload_with=engine).c.note.server_default is not None


def ordinary_work(engine, worker):
    name = f"customer {worker}"
    with orm.Session(engine) as session:
        session.add(Customer(name=name, details={"worker": worker}, orders=[Order(amount=i) for i in range(20)]))
        session.commit()
    for number in range(20):
        with orm.Session(engine) as session, session.begin():
            customer = session.scalars(sa.select(Customer).where(Customer.name == name).with_for_update()).one()
            assert customer.details == {"worker": worker}
            customer.orders.append(Order(amount=number, state="paid"))
            try:
                with session.begin_nested():
                    session.add(Customer(name=name))
                    session.flush()
                raise AssertionError("two of one name")
            except sa.exc.IntegrityError:
                pass
    with orm.Session(engine) as session:
        customer = session.scalars(sa.select(Customer).where(Customer.name == name)).one()
        total = sa.select(sa.func.sum(Order.amount)).where(Order.customer_id == customer.id)
        assert session.scalar(total) == 2 * sum(range(20))
        assert len(customer.orders) == 40
    isolated(engine)
    streamed(engine)
    left_behind(engine, worker)


def isolated(engine):
    for level in ("SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED"):
        with engine.connect().execution_options(isolation_level=level) as connection:
            assert connection.scalar(sa.text("SHOW transaction_isolation")) == level.lower()
            assert connection.get_isolation_level() == level
    with engine.connect() as connection:  # the pool has put it back
        assert connection.scalar(sa.text("SHOW transaction_isolation")) == "read committed"


def streamed(engine):
    with engine.connect().execution_options(yield_per=100) as connection:
        rows = connection.execute(sa.text("SELECT generate_series(1, 2000)")).scalars()
        assert sum(rows) == sum(range(2001))


def left_behind(engine, worker):
    """Gone with the transaction that the pool rolls back."""
    with engine.connect() as connection:
        connection.execute(sa.text(f"SET LOCAL application_name = 'left by {worker}'"))
        connection.execute(sa.text("CREATE TEMP TABLE sqla_left (i int)"))
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT to_regclass('pg_temp.sqla_left')")) is None
        assert connection.scalar(sa.text("SHOW application_name")) == "sqlalchemy day"


async def asynchronous(engine):
    async def work(worker):
        for number in range(20):
            async with AsyncSession(engine) as session, session.begin():
                name = f"customer {worker}"
                customer = (await session.scalars(sa.select(Customer).where(Customer.name == name))).one()
                session.add(Order(amount=number, customer=customer))
        async with engine.connect() as connection:
            await connection.execute(sa.text("SET statement_timeout = '7s'"))  # rolled back by the pool
        async with engine.connect() as connection:
            assert await connection.scalar(sa.text("SHOW statement_timeout")) == "0"

    await asyncio.gather(*(work(worker) for worker in range(WORKERS)))
    async with AsyncSession(engine) as session:
        assert await session.scalar(sa.select(sa.func.count()).select_from(Order)) == WORKERS * 60
    await engine.dispose()


def main():
    engine = sa.create_engine(
        URL.set(drivername="postgresql+psycopg"),
        pool_size=WORKERS,
        pool_pre_ping=True,
        connect_args={"application_name": "sqlalchemy day"},
    )
    migrations(engine)
    with ThreadPoolExecutor(WORKERS) as workers:
        list(workers.map(lambda worker: ordinary_work(engine, worker), range(WORKERS)))
    asyncio.run(asynchronous(create_async_engine(URL.set(drivername="postgresql+asyncpg"), pool_size=WORKERS)))
    Base.metadata.drop_all(engine)
    engine.dispose()
    print("SQLAlchemy: a good day")


main()
