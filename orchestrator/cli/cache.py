"""`weft cache`: asks the cache API, for people and scripts: pin, retain, evict, prefetch, demote, lookup, quote, watch."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.cli.cluster_file import UnusableInput
from orchestrator.core.config import ConfigError
from orchestrator.harness import words
from orchestrator.harness.channels import CacheError
from orchestrator.harness.client import CacheClient
from orchestrator.harness.words import Action, Residency, Result, Target, Tier, WatchEvent
from orchestrator.live.secret import reveal

#: Where the default cluster's first gateway serves gRPC.
LOCAL_GATEWAY = "127.0.0.1:8001"
_VERBS = {
    "pin": "keep blocks at or above a tier for a while",
    "unpin": "end a lease, or those placed with a target",
    "retain": "lean towards keeping blocks, or towards forgetting them first; no promise",
    "evict": "let go of what only the target needs",
    "prefetch": "bring blocks up to a tier",
    "demote": "let blocks sink to a tier",
    "lookup": "show who holds what",
    "quote": "show what a pin would cost and bring",
    "watch": "show what happens to a target, until interrupted",
}


class CacheFailed(Exception):
    """What was asked for was not done; the message is one line."""


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add the command's verbs and options."""
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb, what in _VERBS.items():
        one = verbs.add_parser(verb, help=what)
        _add_gateway(one)
        _add_target(one)
        if verb in ("pin", "prefetch", "quote"):
            one.add_argument("--tier", choices=tuple(Tier), default=Tier.HBM, help="the lowest it may be on (%(default)s)")
        if verb == "evict":
            one.add_argument("--tier", choices=tuple(Tier), help="the tier to leave (all)")
        if verb == "demote":
            one.add_argument("--tier", choices=tuple(Tier), required=True, help="the tier to sink to")
        if verb == "retain":
            one.add_argument(
                "--priority", type=int, required=True, metavar="0-100", help="over 50 is kept longer, under 50 goes first"
            )
        if verb in ("pin", "retain", "quote"):
            one.add_argument("--ttl", type=float, default=0.0, metavar="SECONDS", help="how long (300)")
        if verb == "prefetch":
            text = "when the blocks are wanted: in hbm they are kept for so long (60)"
            one.add_argument("--deadline", type=float, default=0.0, metavar="SECONDS", help=text)
        if verb == "pin":
            one.add_argument("--renew", default="", metavar="LEASE", help="move this lease here instead of having another")
            one.add_argument("--message-id", default="", metavar="ID", help="the same again has no second effect")
        one.set_defaults(run=lambda options, verb=verb: _run(verb, options))


def _add_gateway(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default=LOCAL_GATEWAY, metavar="HOST:PORT", help="a gateway's gRPC port (%(default)s)")
    parser.add_argument("--key", default="", help="a tenant's key, or env:NAME or file:PATH")
    parser.add_argument("--ca", default="", metavar="FILE", help="PEM file of the certificates to believe; without it plain gRPC")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_target(parser: argparse.ArgumentParser) -> None:
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--session", metavar="ID", help="a session's last prompt")
    target.add_argument("--chat", type=Path, metavar="FILE", help="body of a chat request, as JSON: what its prompt begins with")
    target.add_argument("--text", type=Path, metavar="FILE", help="a prompt as text; needs --model")
    target.add_argument("--lease", metavar="ID", help="what a lease is on")
    target.add_argument("--blocks", metavar="HEX,...", help="consecutive blocks by their hashes, from a prompt's first one on")
    parser.add_argument("--model", default="", help="of a session that has asked several, of a text, of blocks")
    parser.add_argument("--tokens", type=_range, metavar="FROM:TO", help="some tokens of a session or prompt")


def _run(verb: str, options: argparse.Namespace) -> int:
    """Ask, show the answer, and say whether it was done."""
    target = _target(options)
    with _client(options) as client:
        try:
            return _ANSWERS[verb](client, target, options)
        except CacheError as error:
            raise CacheFailed(str(error)) from None


def _client(options: argparse.Namespace) -> CacheClient:
    key = reveal(options.key, "--key")
    if not (key.isascii() and key.isprintable()):
        raise UnusableInput("--key: must be printable ASCII")
    return CacheClient(options.address, key, _read(Path(options.ca), "--ca") if options.ca else None)


def _target(options: argparse.Namespace) -> Target:
    if options.tokens is not None and (options.lease or options.blocks):
        raise UnusableInput("--tokens: only of a session or a prompt")
    if options.session:
        return words.session(options.session, options.model, options.tokens)
    if options.chat:
        return words.conversation(_text(options.chat, "--chat"), options.tokens)
    if options.text:
        if not options.model:
            raise UnusableInput("--text: needs --model")
        return words.text(_text(options.text, "--text"), options.model, tokens=options.tokens)
    if options.blocks:
        return words.blocks(_hashes(options.blocks), options.model)
    return words.lease(options.lease)


def _hashes(given: str) -> list[bytes]:
    try:
        return [bytes.fromhex(one) for one in given.split(",")]
    except ValueError:
        raise UnusableInput("--blocks: must be hashes in hexadecimal, with commas between them") from None


def _range(given: str) -> tuple[int, int]:
    start, colon, end = given.partition(":")
    if not colon or not all(part.isascii() and part.isdigit() for part in (start or "0", end or "0")):
        raise argparse.ArgumentTypeError(f"must be FROM:TO, tokens counted from 0, is {given!r}")
    return int(start or "0"), int(end or "0")


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(flag, f"{path}: {error.strerror}") from None


def _text(path: Path, flag: str) -> str:
    try:
        return _read(path, flag).decode()
    except UnicodeDecodeError:
        raise ConfigError(flag, f"{path}: is not UTF-8") from None


# --- verbs ----------------------------------------------------------------------------------------------------------------


def _applied(action: Callable[[Target, argparse.Namespace], Action]) -> Callable[[CacheClient, Target, argparse.Namespace], int]:
    """Return what has an action done and shows what became of it."""

    def answer(client: CacheClient, target: Target, options: argparse.Namespace) -> int:
        (result,) = client.apply(action(target, options), message_id=getattr(options, "message_id", ""))
        _show(options, asdict(result), _result_line(result))
        if not result.done:
            raise CacheFailed(f"{result.outcome.value}: {result.message or result.reason}")
        return 0

    return answer


def _lookup(client: CacheClient, target: Target, options: argparse.Namespace) -> int:
    (residency,) = client.lookup(target, hashes=options.json)
    if options.json:
        _print(asdict(residency) | {"hashes": [block.hex() for block in residency.hashes]})
    else:
        _show_residency(residency)
    if residency.outcome is not words.Outcome.APPLIED:
        raise CacheFailed(f"{residency.outcome.value}: {residency.message or residency.reason}")
    return 0


def _quote(client: CacheClient, target: Target, options: argparse.Namespace) -> int:
    (price,) = client.quote(words.pin(target, Tier(options.tier), options.ttl))
    left = "any number of" if price.byte_s_left is None else f"{price.byte_s_left:.0f}"
    _show(
        options,
        asdict(price),
        f"{_result_line(price.result)}\n{price.byte_s:.0f} byte-seconds of {left}; {price.bytes_left:.0f} bytes left\n"
        f"first token in {price.ttft_cached_s:.3f} s, computed anew in {price.ttft_computed_s:.3f} s",
    )
    return 0


def _watch(client: CacheClient, target: Target, options: argparse.Namespace) -> int:
    for event in client.watch(target):
        shown = asdict(event)
        if event.residency is not None:
            shown["residency"]["hashes"] = []
        _show(options, shown, _event_line(event))
        sys.stdout.flush()
    return 0


_ANSWERS: dict[str, Callable[[CacheClient, Target, argparse.Namespace], int]] = {
    "pin": _applied(lambda target, options: words.pin(target, Tier(options.tier), options.ttl, options.renew)),
    "unpin": _applied(lambda target, _: words.unpin(target)),
    "retain": _applied(lambda target, options: words.retain(target, options.priority, options.ttl)),
    "evict": _applied(lambda target, options: words.evict(target, Tier(options.tier) if options.tier else None)),
    "prefetch": _applied(lambda target, options: words.prefetch(target, Tier(options.tier), options.deadline)),
    "demote": _applied(lambda target, options: words.demote(target, Tier(options.tier))),
    "lookup": _lookup,
    "quote": _quote,
    "watch": _watch,
}


# --- what is shown --------------------------------------------------------------------------------------------------------


def _show(options: argparse.Namespace, value: dict[str, Any], line: str) -> None:
    if options.json:
        _print(value)
    else:
        print(line)


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def _result_line(result: Result) -> str:
    parts = [result.outcome.value, f"({result.reason})" if result.reason else "", f"lease {result.lease}" if result.lease else ""]
    parts.append(f"{result.blocks} blocks, {result.tokens} tokens, {result.size_bytes} bytes" if result.blocks else "")
    parts.append(f"on {result.tier.value}" if result.tier is not None and result.blocks else "")
    parts.append(f"for {result.ttl_s:.0f} s" if result.ttl_s else "")
    return " ".join(part for part in parts if part)


def _show_residency(residency: Residency) -> None:
    if residency.outcome is not words.Outcome.APPLIED:
        return
    print(f"model {residency.model}: {residency.blocks} blocks, {residency.tokens} tokens, {residency.size_bytes} bytes")
    console = Console()
    if residency.holdings:
        table = Table("tier", "holder", "blocks", "tokens")
        for one in residency.holdings:
            table.add_row(one.tier.value, one.holder, str(one.blocks), str(one.tokens))
        console.print(table)
    if residency.leases:
        table = Table("lease", "tier", "blocks", "bytes", "seconds left", "session")
        for one in residency.leases:
            table.add_row(one.id, one.tier.value, str(one.blocks), str(one.size_bytes), f"{one.ttl_s:.0f}", one.session)
        console.print(table)
    if residency.effects:
        table = Table("action", "bytes", "tokens found", "tokens earned", "seconds saved", "ended", "message")
        for one in residency.effects:
            counts = (str(one.size_bytes), str(one.found_tokens), str(one.earned_tokens), f"{one.saved_s:.3f}")
            table.add_row(one.verb, *counts, one.ended, f"{one.message_id} {one.action_id}")
        console.print(table)


def _event_line(event: WatchEvent) -> str:
    if event.lease is not None:
        lease = event.lease.lease
        return f"lease {lease.id} {event.lease.change} ({event.lease.reason}): {lease.blocks} blocks on {lease.tier.value}"
    assert event.residency is not None, "an event is about a lease or about where something is"
    held = ", ".join(f"{one.blocks} on {one.tier.value} {one.holder}".rstrip() for one in event.residency.holdings)
    return f"{event.residency.outcome.value}: of {event.residency.blocks} blocks {held or 'none is held'}"
