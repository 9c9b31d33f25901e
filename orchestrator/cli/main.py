"""The `weft` command. Exit codes: 0 done, 1 failed, 2 unusable arguments or input; then one line on standard error says why."""

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from orchestrator.cli.cache import CacheFailed, add_cache
from orchestrator.cli.cases import SimulationFailed
from orchestrator.cli.cluster_file import LOCAL_CLUSTER, UnusableInput, check_served, located, read_cluster, with_model
from orchestrator.cli.demo import run_demo
from orchestrator.cli.journal import add_journal, with_journal
from orchestrator.cli.operate import add_operations, add_place, attached, place_of
from orchestrator.cli.plan import add_plan
from orchestrator.cli.recording import with_record
from orchestrator.cli.serve import serve
from orchestrator.cli.simulate import add_simulate
from orchestrator.cli.status import StatusUnreachable, fetch_status, show_fleet, show_status
from orchestrator.core.config import ClusterConfig, ConfigError
from orchestrator.fleet.fleet import FleetFailed
from orchestrator.fleet.head import heads
from orchestrator.live.tracing import traces_opener
from orchestrator.traces import TraceError
from workers.engines.checkpoint import FAMILIES, create_checkpoint

DONE, FAILED, UNUSABLE = 0, 1, 2
STATUS_COLUMNS = 160
#: Where the default cluster's first gateway is.
LOCAL_GATEWAY = "http://127.0.0.1:8000"
#: What a disk says that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
#: Settings of `weft model create` that are counts, with what they mean.
MODEL_COUNTS = {
    "layers": "transformer layers (4)",
    "hidden": "width of the residual stream (128)",
    "heads": "attention heads (4)",
    "kv_heads": "heads of keys and values, not deepseek_v3 (2)",
    "head_dim": "width of a head, not deepseek_v3 (hidden divided by heads)",
    "intermediate": "width of the feed-forward layer (256)",
    "experts": "experts of a layer, qwen3_moe and deepseek_v3 only (8)",
    "experts_per_token": "experts a token goes through, qwen3_moe and deepseek_v3 only (2)",
    "moe_intermediate": "width of an expert, qwen3_moe and deepseek_v3 only (64)",
    "query_rank": "width of compressed queries, 0: not compressed; this and the following: deepseek_v3 only (48)",
    "kv_rank": "width of latents (32)",
    "nope_dim": "width of a head's keys that does not turn with the position (32)",
    "rope_dim": "width of keys that turns, and that all heads share (16)",
    "value_dim": "width of a head's values (32)",
    "groups": "groups of experts (4)",
    "groups_per_token": "groups that a token's experts are in (2)",
    "shared_experts": "experts that every token goes through (1)",
    "dense_layers": "first layers, without experts (1)",
    "vocabulary": "tokens in the vocabulary (512)",
    "context_tokens_max": "longest prompt plus output (262144)",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except (UnusableInput, ConfigError, TraceError) as problem:
        return _fail(str(problem), UNUSABLE)
    except (CacheFailed, FleetFailed, SimulationFailed, StatusUnreachable) as problem:
        return _fail(str(problem), FAILED)
    except BrokenPipeError:  # whoever read the output has read enough
        return _without_output()
    except KeyboardInterrupt:
        return _fail("interrupted", FAILED)
    except OSError as problem:  # files are dealt with where they are written; what is left is what is printed
        if problem.errno not in FULL:
            raise
        return _fail(f"standard output: {problem.strerror}", _without_output())


def _without_output() -> int:
    """Have nothing said at the interpreter's end about what could not be printed; return the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _fail(problem: str, code: int) -> int:
    # What was given may hold line ends, and is quoted as it was given.
    print(f"weft: {' '.join(problem.splitlines())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, as everything else does."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message} (see {self.prog} --help)", UNUSABLE))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="weft", description="Agent-aware, disaggregated LLM serving on Ray.")
    parser.add_argument("--version", action="version", version=f"weft {version('weft')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="start a cluster and serve until interrupted"))
    add_operations(commands, _config)
    _add_status(commands.add_parser("status", help="show a running cluster"))
    add_cache(commands.add_parser("cache", help="program a running cluster's KV cache: pin, evict, look up, watch"))
    _add_demo(commands.add_parser("demo", help="run an agent session through a small cluster on this machine"))
    add_simulate(commands.add_parser("simulate", help="run a trace through a cluster in virtual time, under every policy"))
    add_plan(commands.add_parser("plan", help="find the cheapest cluster that serves a trace fast enough"))
    _add_model(commands.add_parser("model", help="make model checkpoints"))
    add_journal(commands.add_parser("journal", help="check journals of a live cluster"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", type=Path, default=LOCAL_CLUSTER, metavar="FILE", help="cluster file (%(default)s)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint directory of the cluster's only model")
    parser.add_argument("--http-port", type=int, metavar="N", help="the first gateway's; 0: any free port")
    parser.add_argument("--grpc-port", type=int, metavar="N", help="the first gateway's; 0: any free port")
    parser.add_argument("--address", help="a running Ray cluster, ray://HOST:PORT or HOST:PORT; without it one is started here")
    parser.add_argument(
        "--attach", action="store_true", help="use the cluster of that name there, and leave it running at the end"
    )
    parser.add_argument("--journal", type=Path, metavar="DIR", help="write down every event and decision here, on each host")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what is served here, as a trace without texts")
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    if options.attach and options.address is None:
        raise UnusableInput("--attach: needs --address")
    return DONE if serve(_config(options), options.address, options.attach) else FAILED


def _config(options: argparse.Namespace) -> ClusterConfig:
    """Return the configuration in the cluster file, as the other options change it."""
    config = read_cluster(options.cluster)
    if options.model is not None:
        config = with_model(config, options.model, str(options.cluster))
    check_served(config, options.cluster)
    if options.journal is not None:
        config = with_journal(config, options.journal)
    if options.record is not None:
        config = with_record(config, options.record)
    if options.address is None:  # the gateways will be on this host
        try:
            traces_opener(config.trace)
        except ConfigError as error:
            raise located(options.cluster, error) from None
    return _with_ports(config, options)


def _with_ports(config: ClusterConfig, options: argparse.Namespace) -> ClusterConfig:
    for flag in ("http_port", "grpc_port"):
        port = getattr(options, flag)
        if port is not None:
            try:
                config = replace(config, gateway=replace(config.gateway, **{flag: port}))
            except ConfigError as error:
                raise UnusableInput(f"--{flag.replace('_', '-')}: {error.problem}") from None
    return config


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="base URL of a gateway to ask (http://127.0.0.1:8000 if weft up started nothing here)")
    parser.add_argument("--key", default="", metavar="env:NAME", help="with --url: a tenant's key, env:NAME, file:PATH or itself")
    parser.add_argument("--ca", default="", metavar="FILE", help="with --url: PEM file of the certificates to believe")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    add_place(parser)
    parser.set_defaults(run=_status)


def _status(options: argparse.Namespace) -> int:
    # In a pipe or a file nothing is cut to the width of a terminal.
    out = Console(file=sys.stdout, width=None if sys.stdout.isatty() else STATUS_COLUMNS)
    if options.url is None and (options.key or options.ca):
        raise UnusableInput(f"{'--key' if options.key else '--ca'}: needs --url, the gateway that it is for")
    if options.url is None and (options.name or options.address or heads()):
        with attached(place_of(options)) as fleet:
            status = fleet.status()
        show = show_fleet
    else:
        status, show = fetch_status(options.url or LOCAL_GATEWAY, options.key, options.ca), show_status
    if options.json:
        print(json.dumps(status, indent=2))
    else:
        show(status, out)
    return DONE


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the table's figures as JSON")
    parser.set_defaults(run=lambda options: DONE if run_demo(options.json) else FAILED)


def _add_model(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    create = commands.add_parser("create", help="write a small random checkpoint in Hugging Face's format")
    create.add_argument("directory", type=Path, metavar="DIR", help="made if missing, must be empty")
    create.add_argument("--family", choices=FAMILIES, required=True)
    create.add_argument("--seed", type=int, required=True, help="of the weights")
    for name, text in MODEL_COUNTS.items():
        create.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    create.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (float32)")
    create.add_argument("--tied", action="store_true", help="embeddings and output layer share weights")
    create.set_defaults(run=_create_model)


def _create_model(options: argparse.Namespace) -> int:
    directory: Path = options.directory
    _check_free(directory)
    given = {name: getattr(options, name) for name in (*MODEL_COUNTS, "dtype")}
    overrides = {name: value for name, value in given.items() if value is not None} | ({"tied": True} if options.tied else {})
    try:
        create_checkpoint(directory, options.family, options.seed, **overrides)
    except ValueError as error:
        raise UnusableInput(f"weft model create: {error}") from None
    except OSError as error:
        return _fail(f"{directory}: {error.strerror}", FAILED)
    print(f"weft: wrote a {options.family} checkpoint to {directory}")
    return DONE


def _check_free(directory: Path) -> None:
    try:
        is_taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    except OSError as error:
        raise UnusableInput(f"{directory}: {error.strerror}") from None
    if is_taken:
        raise UnusableInput(f"{directory}: is there already and not an empty directory")


if __name__ == "__main__":
    sys.exit(main())
