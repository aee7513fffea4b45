"""The tables of the store, and the statements that more than one module uses.

`items` holds what waits (`reason` NULL) and the dead letters (`reason` says why). `head` is 1 for each waiting item that no earlier waiting item of its
key holds back; `rank` is the constant that orders (core/reach/deferral, rule 1). `tries` is apart so that a retry does not rewrite a large row.
`boot` numbers the boots that the store has seen; `expires_s` is in that boot's CLOCK_BOOTTIME. `state` is one row of JSON: counters, and where
`seq` and queue time go on; it changes in the same transaction as what it counts.
"""

from functools import cache

FORMAT = 1
"""PRAGMA user_version of a store that this code can read."""

TABLES = """
CREATE TABLE state(one INTEGER PRIMARY KEY CHECK(one = 1), json TEXT NOT NULL) STRICT;
CREATE TABLE items(
  seq INTEGER PRIMARY KEY, idem TEXT NOT NULL UNIQUE, okey TEXT NOT NULL, kind TEXT NOT NULL, prio INTEGER NOT NULL, head INTEGER NOT NULL,
  droppable INTEGER NOT NULL, rank REAL NOT NULL, queued_s REAL NOT NULL, ttl_s REAL, expires_s REAL, boot INTEGER NOT NULL, boot_s REAL NOT NULL,
  wall_s REAL NOT NULL, trusted INTEGER NOT NULL, size INTEGER NOT NULL, codec INTEGER NOT NULL, raw_len INTEGER NOT NULL,
  checksum INTEGER NOT NULL, reason TEXT, data BLOB NOT NULL) STRICT;
CREATE INDEX due ON items(kind, rank, seq) WHERE head = 1;
CREATE INDEX keyed ON items(okey, seq) WHERE okey <> '' AND reason IS NULL;
CREATE INDEX perishable ON items(boot, expires_s) WHERE expires_s IS NOT NULL AND reason IS NULL;
CREATE INDEX droppable ON items(prio DESC, seq) WHERE droppable = 1 AND reason IS NULL;
CREATE INDEX dead ON items(seq) WHERE reason IS NOT NULL;
CREATE INDEX filed ON items(seq) WHERE codec >= 2;
CREATE TABLE tries(seq INTEGER PRIMARY KEY, attempts INTEGER NOT NULL, not_before_s REAL NOT NULL) STRICT;
CREATE TABLE done(
  n INTEGER PRIMARY KEY, idem TEXT NOT NULL UNIQUE, at_s REAL NOT NULL, outcome TEXT NOT NULL, reason TEXT NOT NULL,
  size INTEGER NOT NULL, codec INTEGER NOT NULL, raw_len INTEGER NOT NULL, checksum INTEGER NOT NULL, data BLOB) STRICT;
CREATE INDEX kept ON done(n) WHERE data IS NOT NULL;
CREATE TABLE accepted(
  n INTEGER PRIMARY KEY AUTOINCREMENT, sender TEXT NOT NULL, idem TEXT NOT NULL, incarnation TEXT NOT NULL, seq INTEGER NOT NULL, at_s REAL NOT NULL,
  kind TEXT NOT NULL, codec INTEGER NOT NULL, raw_len INTEGER NOT NULL, checksum INTEGER NOT NULL, data BLOB, UNIQUE(sender, idem)) STRICT;
CREATE INDEX sent ON accepted(sender, incarnation, seq);
CREATE INDEX pending ON accepted(n) WHERE data IS NOT NULL;
"""

COLUMNS = (
    "seq", "idem", "okey", "kind", "prio", "head", "droppable", "rank", "queued_s", "ttl_s", "expires_s", "boot", "boot_s", "wall_s", "trusted",
    "size", "codec", "raw_len", "checksum", "data",
)  # fmt: skip
"""The columns of a waiting item, in the order of a row to insert."""
ROWS_AT_ONCE = 64
"""Rows in one statement: each step gives up the interpreter's lock and must win it back, from a loop that may be busy."""


@cache
def insert(rows: int) -> str:
    """The statement that inserts so many rows; a known `idem` is left out silently."""
    values = ", ".join([_marks(len(COLUMNS))] * rows)
    return " ".join(("INSERT INTO items(", ", ".join(COLUMNS), ") VALUES", values, "ON CONFLICT(idem) DO NOTHING"))


def _alone(head: str) -> str:
    values = [f"?{number}" if name != "head" else head for number, name in enumerate(COLUMNS, 1)]
    unless = "WHERE NOT EXISTS (SELECT 1 FROM done WHERE idem = ?2 AND outcome = 'delivered') ON CONFLICT(idem) DO NOTHING"
    return " ".join(("INSERT INTO items(", ", ".join(COLUMNS), ") SELECT", ", ".join(values), unless))


INSERT_ALONE = _alone("1")
"""One row; what was delivered, or is held, is left out silently."""
INSERT_KEYED = _alone("NOT EXISTS (SELECT 1 FROM items WHERE okey = ?3 AND okey <> '' AND reason IS NULL)")
"""The same for an item with a key: it is the head if no earlier one waits."""


@cache
def insert_done(rows: int) -> str:
    """The statement that notes the fate of so many keys, without answers."""
    values = ", ".join(["(NULL, ?, ?, ?, ?, 0, 0, 0, 0, NULL)"] * rows)
    return "INSERT OR REPLACE INTO done VALUES (#)".replace("(#)", values)


@cache
def listed(sql: str, number: int) -> str:
    """The statement with so many placeholders where it has `(#)`."""
    return sql.replace("(#)", _marks(number))


def _marks(number: int) -> str:
    return f"({', '.join('?' * number)})"


ITEM = (
    "i.seq, i.okey, i.kind, i.prio, i.idem, i.size, i.boot, i.boot_s, i.wall_s, i.trusted, i.queued_s, i.ttl_s, "
    "coalesce(t.attempts, 0), coalesce(t.not_before_s, 0.0)"
)
"""The columns of `contract.deferral.Item`, in its order; `FROM_ITEMS` goes with it."""
FROM_ITEMS = "FROM items i {hint} LEFT JOIN tries t ON t.seq = i.seq"
