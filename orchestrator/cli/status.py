"""`weft status`: asks a cluster's controller, or one of its gateways, how the cluster is, and shows it as tables."""

import ssl
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from orchestrator.core.config import ConfigError, require
from orchestrator.live.secret import reveal

TIMEOUT_S = 5.0


class StatusUnreachable(Exception):
    """No gateway answered as one; the message is one line."""


def fetch_status(url: str, key: str = "", ca: str = "") -> dict[str, Any]:
    """Return a gateway's `/status`.

    Args:
        url: base URL of the gateway.
        key: a tenant's key, or where it is (`env:NAME`, `file:PATH`); empty if the gateway asks for none.
        ca: PEM file of the certificates that are believed instead of the system's; empty for the system's.

    Raises:
        ConfigError: the key is not where it is said to be, or cannot stand in a header, or the file holds no certificate.
        StatusUnreachable: no gateway answers there, or it refuses the key.
    """
    secret = reveal(key, "--key")
    require(secret.isascii() and secret.isprintable(), "--key", "must be printable ASCII")
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    believed = _believing(ca) if ca else True
    try:
        answer = httpx.get(f"{url.rstrip('/')}/status", headers=headers, verify=believed, timeout=TIMEOUT_S, trust_env=False)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise StatusUnreachable(f"{url}: the API key is missing or wrong: give one with --key env:NAME")
        status = answer.raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise StatusUnreachable(f"{url}: no gateway answers there: {error}") from None
    if not isinstance(status, dict) or "nodes" not in status:
        raise StatusUnreachable(f"{url}: what answers there is no gateway")
    return status


def _believing(ca: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("--ca", f"{ca}: no file of certificates in PEM: {error.strerror or error}") from None


def show_status(status: dict[str, Any], console: Console) -> None:
    """Print the cluster, its models and its nodes."""
    state = "ready" if status["ready"] else "not ready"
    gateways = f"gateway {status['gateway'] + 1} of {status['gateways']}"
    console.print(f"cluster {status['cluster']}: {state} ({gateways})", highlight=False)
    for model, counts in status["requests"].items():
        console.print(f"model {model}: {counts['running']} running, {counts['waiting']} waiting", highlight=False)
    table = Table("node", "pool", "state", "restarts", "running", "waiting", "queued tokens", "KV used", "cached", "blocks")
    for node in status["nodes"]:
        table.add_row(*_row(node))
    console.print(table)
    if status.get("stores"):
        show_stores(status["stores"], console)


def show_stores(stores: list[dict[str, Any]], console: Console) -> None:
    """Print what hosts' stores hold."""
    table = Table("store", "model", "cpu used", "cached", "blocks", "segments in cmx", "reads that wait")
    for one in stores:
        total = sum(one["slots"].values())
        shares = [f"{100 * one['slots'][state] / max(total, 1):.0f} %" for state in ("used", "cached")]
        table.add_row(one["store"], one["model"], *shares, str(total), str(one["segments"]), str(one["waiting_reads"]))
    console.print(table)


def show_fleet(status: dict[str, Any], console: Console) -> None:
    """Print a whole cluster: its processes, then its nodes as the first gateway that answers sees them."""
    busy = f"; {status['busy_with']}" if status["busy_with"] else ""
    console.print(f"cluster {status['cluster']}: weft {status['version']}{busy}", highlight=False)
    table = Table("process", "of", "state", "restarts", "address", "version")
    for one in status["processes"]:
        table.add_row(one["process"], one["group"], one["state"], str(one["restarts"]), one["address"], one["version"])
    console.print(table)
    for gateway in status["gateways"][:1]:
        show_status(gateway, console)


def _row(node: dict[str, Any]) -> list[str]:
    head = [node["node"], node["pool"], "up" if node["up"] else "down"]
    if "blocks" not in node:
        return [*head, *[""] * 7]
    blocks = node["blocks"]
    counts = [node["restarts"], node["running"], node["waiting"], node["queued_tokens"]]
    shares = [f"{100 * blocks[state] / blocks['total']:.0f} %" for state in ("used", "cached")]
    return [*head, *(str(count) for count in counts), *shares, str(blocks["total"])]
