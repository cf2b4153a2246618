"""A day's ordinary work with Django: migrations made, run and taken back, six threads with requests, on lasting connections
and on Django's own pool. Usage: django_day.py URL"""

import pathlib
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote, urlsplit

import django
from django.conf import settings
from django.core.management import call_command

URL = urlsplit(sys.argv[1])
WORKERS = 6
MODELS = """
from django.contrib.postgres.fields import ArrayField
from django.db import models

class Customer(models.Model):
    name = models.CharField(max_length=80, unique=True)
    tags = ArrayField(models.CharField(max_length=20), default=list)
    details = models.JSONField(default=dict)

class Order(models.Model):
    customer = models.ForeignKey(Customer, models.CASCADE, related_name="orders")
    amount = models.DecimalField(max_digits=12, decimal_places=2)
    at = models.DateTimeField(auto_now_add=True, db_index=True)

    class Meta:
        constraints = [models.CheckConstraint(condition=models.Q(amount__gte=0), name="shop_not_negative")]
"""
MORE_MODELS = """
class Note(models.Model):
    order = models.ForeignKey(Order, models.CASCADE)
    text = models.TextField(default="")
"""


def database(**options):
    return {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": URL.hostname,
        "PORT": URL.port,
        "USER": unquote(URL.username),
        "PASSWORD": unquote(URL.password),
        "NAME": URL.path[1:],
        "CONN_HEALTH_CHECKS": True,
        **options,
    }


def set_up(folder):
    shop = pathlib.Path(folder) / "shop"
    shop.mkdir()
    (shop / "__init__.py").touch()
    (shop / "models.py").write_text(MODELS)
    sys.path.insert(0, folder)
    settings.configure(
        DATABASES={
            "default": database(CONN_MAX_AGE=None),
            "pooled": database(OPTIONS={"pool": {"min_size": 2, "max_size": 4}}),
            "bound": database(CONN_MAX_AGE=None, OPTIONS={"server_side_binding": True}),
        },
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions", "shop"],
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        USE_TZ=True,
    )
    django.setup()
    return shop


def migrations(shop):
    call_command("makemigrations", "shop", verbosity=0)
    call_command("migrate", verbosity=0)
    # A second step, by another process, as it is at the next release.
    import subprocess

    (shop / "models.py").write_text(MODELS + MORE_MODELS)
    subprocess.run([sys.executable, __file__, sys.argv[1], str(shop.parent)], check=True)
    from django.db import connection

    tables = connection.introspection.table_names()
    assert {"shop_customer", "shop_order", "shop_note", "auth_user", "django_session"} <= set(tables), tables


def next_release(folder):
    sys.path.insert(0, folder)
    settings.configure(
        DATABASES={"default": database()},
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions", "shop"],
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        USE_TZ=True,
    )
    django.setup()
    call_command("makemigrations", "shop", verbosity=0)
    call_command("migrate", verbosity=0)
    call_command("migrate", "shop", "0001", verbosity=0)
    call_command("migrate", "shop", verbosity=0)


def requests(worker, alias):
    from django.db import IntegrityError, connections, models, transaction
    from shop.models import Customer, Order

    name = f"{alias} {worker}"
    customers, orders = Customer.objects.using(alias), Order.objects.using(alias)
    customer = customers.create(name=name, tags=["a", "b c"], details={"worker": worker})
    orders.bulk_create(Order(customer=customer, amount=i) for i in range(50))
    for number in range(15):
        with transaction.atomic(using=alias):
            locked = customers.select_for_update().get(name=name)
            assert locked.tags == ["a", "b c"] and locked.details == {"worker": worker}
            locked.orders.create(amount=number)
            try:
                with transaction.atomic(using=alias):
                    customers.create(name=name)
                raise AssertionError("two of one name")
            except IntegrityError:
                pass
        assert customers.filter(tags__contains=["a"], details__worker=worker, name=name).exists()
        customers.filter(name=name).update(details=models.F("details"))
        connections[alias].close_if_unusable_or_obsolete()
    total = orders.filter(customer=customer).aggregate(models.Sum("amount"))["amount__sum"]
    assert total == sum(range(50)) + sum(range(15)), total
    # A cursor on the server; outside a transaction Django declares it WITH HOLD.
    assert sum(1 for _ in orders.filter(customer=customer).iterator(chunk_size=10)) == 65
    assert customers.get_or_create(name=name)[1] is False
    connections[alias].close()


def main():
    if len(sys.argv) == 3:
        return next_release(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        migrations(set_up(folder))
        for alias in ("default", "pooled", "bound"):
            with ThreadPoolExecutor(WORKERS) as workers:
                list(workers.map(lambda worker: requests(worker, alias), range(WORKERS)))
        call_command("migrate", "shop", "zero", verbosity=0)
        from django.db import connections

        connections["pooled"].close_pool()
        connections.close_all()
    print("Django: a good day")


main()
