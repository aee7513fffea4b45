"""What the addresses of the local API mean (Open Inference Protocol v2, KServe) and of its model repository (Triton)."""

from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote


class Place(NamedTuple):
    """One address: what is asked, by which method, and of which model or promise (empty where none is meant)."""

    what: str
    method: str
    model: str = ""
    version: str = ""


FIXED = {
    "/v2": Place("server", "GET"),
    "/v2/health/live": Place("live", "GET"),
    "/v2/health/ready": Place("ready", "GET"),
    "/v2/repository/index": Place("index", "POST"),
    "/metrics": Place("metrics", "GET"),
    "/status": Place("status", "GET"),
}
CHANGES = ("load", "unload")
BELOW_A_MODEL = {"": ("model", "GET"), "ready": ("model_ready", "GET"), "infer": ("infer", "POST")}


@lru_cache(maxsize=256)
def resolve(target: str) -> Place | None:
    """Return what a request target means, its query apart; None if nothing is there."""
    path = target.partition("?")[0]
    if not path.isascii():
        return None
    path = path.rstrip("/") or "/"
    return FIXED.get(path) or _below(path.split("/"))


def _below(parts: list[str]) -> Place | None:
    """Return what an address means that names something: a model, a promise, or memory."""
    match parts:
        case ["", "v2", "repository", "models", model, change] if model and change in CHANGES:
            return Place(change, "POST", unquote(model))
        case ["", "v2", "systemsharedmemory" | "cudasharedmemory", *_, last]:
            return Place("foreign_memory", "GET" if last == "status" else "POST")
        case ["", "v2", "deferred", promise] if promise:
            return Place("deferred", "GET", unquote(promise))
        case ["", "v2", "deferred", promise, "retry" | "drop" as what] if promise:
            return Place(f"deferred_{what}", "POST", unquote(promise))
        case ["", "v2", "models", model, "versions", version, *rest] if model and version and len(rest) <= 1:
            pass
        case ["", "v2", "models", model, *rest] if model and len(rest) <= 1:
            version = ""
        case _:
            return None
    found = BELOW_A_MODEL.get(rest[0] if rest else "")
    return Place(*found, unquote(model), unquote(version)) if found else None
