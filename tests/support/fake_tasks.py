"""What worker processes are given in tests in the place of pipelines; light, since each process imports it."""

import os
import time

from tests.families.cell import Cell


def green(connection, number):
    for name in ("stock", "policy")[:number]:
        connection.send((name, None))
        connection.send((name, Cell("yes")))


def stuck(connection):
    green(connection, 1)
    connection.send(("rollout", None))
    time.sleep(600)


def crashed(connection):
    green(connection, 1)
    connection.send(("rollout", None))
    os._exit(7)


def broken(connection):
    green(connection, 1)
    raise RuntimeError("out of order")
