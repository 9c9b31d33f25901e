"""Compares what load testers of others measure of a served model with what its own metrics say of the same requests.

    python -m bench.testers [--aiperf PROGRAM] [--guidellm PROGRAM] [--requests 60] [--clients 4]
                           [--url URL --model FOLDER] [--json FILE]

`weft serve` runs one profiled node, slow enough that a busy machine's delays are small beside its own. AIPerf loads chat,
completions, messages and responses, GuideLLM chat, completions and responses; each in an environment of its own:

    python3 -m venv /tmp/aiperf && /tmp/aiperf/bin/pip install aiperf==0.13.0
    python3 -m venv /tmp/guidellm && /tmp/guidellm/bin/pip install guidellm==0.8.1

Printed are requests, tokens, mean time to the first token and between two tokens, as the tester has them and as the gateway has.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from bench.model import make_tiny_model
from bench.servers import weft_server

PROMPT_TOKENS, OUTPUT_TOKENS = 200, 40
CLUSTER = """
[models.tiny]
[[pools]]
name = "both"
model = "tiny"
kind = "aggregated"
engine = { name = "profiled", block_tokens = 16, blocks = 8192 }
scheduler = { sequences_max = 64, step_tokens_max = 2048 }
profile = { step_s = 0.04, prefill_token_s = 0.001 }
"""
#: Seconds that one tester may take for one endpoint.
RUN_S_MAX = 300.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one tester's requests to one endpoint."""

    requests: float
    output_tokens: float
    #: Means.
    ttft_s: float
    itl_s: float

    def over(self, other: "Figures") -> tuple[float, ...]:
        """Return each figure as a multiple of another one's."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return tuple(one / two if two else 0.0 for one, two in pairs)


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters of the gateway at one time."""

    requests: float
    output_tokens: float
    ttft_s: float
    ttfts: float
    itl_s: float
    itls: float

    def since(self, before: "Totals") -> Figures:
        """Return the figures of what came between."""
        ttfts, itls = self.ttfts - before.ttfts, self.itls - before.itls
        return Figures(
            self.requests - before.requests,
            self.output_tokens - before.output_tokens,
            (self.ttft_s - before.ttft_s) / ttfts if ttfts else 0.0,
            (self.itl_s - before.itl_s) / itls if itls else 0.0,
        )


def totals(url: str, path: str) -> Totals:
    """Read a gateway's counters; requests are those of one path."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    named: dict[str, float] = {}
    for sample in samples:
        if sample.name != "weft_requests_total" or sample.labels["endpoint"] == path:
            named[sample.name] = named.get(sample.name, 0.0) + sample.value
    names = ("weft_requests_total", "weft_output_tokens_total", "weft_ttft_seconds_sum", "weft_ttft_seconds_count")
    names += ("weft_itl_seconds_sum", "weft_itl_seconds_count")
    return Totals(*(named.get(name, 0.0) for name in names))


def run(command: list[str], folder: Path) -> None:
    """Run a tester. Raises `RuntimeError` with what it said if it fails."""
    environment = {**os.environ, "HOME": str(folder), "NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": "any"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=RUN_S_MAX, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def _seed(endpoint: str) -> int:
    """Return what each endpoint's prompts are drawn by: its own, none of which is cached by another's."""
    return sum(endpoint.encode())


def aiperf(program: str, url: str, endpoint: str, model: Path, options: argparse.Namespace, folder: Path) -> Figures:
    """Load one endpoint by AIPerf. Raises `RuntimeError` if a request failed."""
    run(
        [
            *(program, "profile", "--model", model.name, "--tokenizer", str(model), "--url", url, "--endpoint-type", endpoint),
            *("--streaming", "--concurrency", str(options.clients), "--request-count", str(options.requests)),
            *("--isl", str(PROMPT_TOKENS), "--osl", str(OUTPUT_TOKENS), "--extra-inputs", "ignore_eos:true"),
            *(
                "--output-artifact-dir",
                str(folder / "aiperf"),
                "--ui",
                "none",
                "--random-seed",
                str(_seed(endpoint)),
                "--use-server-token-count",
            ),
        ],
        folder,
    )
    [file] = (folder / "aiperf").rglob("profile_export_aiperf.json")
    found: dict[str, Any] = json.loads(file.read_text())
    errors = (found.get("error_request_count") or {"avg": 0})["avg"]
    if errors:
        raise RuntimeError(f"{errors} requests of AIPerf to {endpoint} failed")
    names = ("request_count", "output_sequence_length", "time_to_first_token", "inter_token_latency")
    # What it does not measure of an endpoint is not in its report.
    requests, tokens, ttft_ms, itl_ms = (found.get(name, {"avg": 0.0})["avg"] for name in names)
    return Figures(requests, tokens * requests, ttft_ms / 1e3, itl_ms / 1e3)


def guidellm(program: str, url: str, endpoint: str, model: Path, options: argparse.Namespace, folder: Path) -> Figures:
    """Load one endpoint by GuideLLM. Raises `RuntimeError` if a request failed."""
    output = folder / "guidellm.json"
    run(
        [
            *(program, "run", "--disable-console", "--seed", f"kind=static,value={_seed(endpoint)}"),
            *("--backend", f"kind=openai_http,target={url},model={model.name},request_format={endpoint}"),
            *("--profile", f"kind=concurrent,streams={options.clients}"),
            *("--constraint", f"kind=max_requests,count={options.requests}"),
            *("--tokenizer", f"kind=huggingface_auto,model={model}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
            *("--output", f"kind=json,path={output}"),
        ],
        folder,
    )
    [found] = json.loads(output.read_text())["benchmarks"]
    totals_of, metrics = found["metrics"]["request_totals"], found["metrics"]
    if totals_of["errored"]:
        raise RuntimeError(f"{totals_of['errored']} requests of GuideLLM to {endpoint} failed")

    def mean(name: str) -> float:
        return metrics[name]["successful"]["mean"]

    tokens = metrics["output_token_count"]["successful"]["total_sum"]
    itl_s = mean("inter_token_latency_ms") / 1e3
    return Figures(totals_of["successful"], tokens, mean("time_to_first_token_ms") / 1e3, itl_s)


Tester = Callable[[str, str, str, Path, argparse.Namespace, Path], Figures]
#: By tester: what it calls the endpoints, and their paths.
ENDPOINTS: dict[str, tuple[Tester, dict[str, str]]] = {
    "aiperf": (
        aiperf,
        {
            "chat": "/v1/chat/completions",
            "completions": "/v1/completions",
            "messages": "/v1/messages",
            "responses": "/v1/responses",
        },
    ),
    "guidellm": (
        guidellm,
        {"/v1/chat/completions": "/v1/chat/completions", "/v1/completions": "/v1/completions", "/v1/responses": "/v1/responses"},
    ),
}


def table(rows: dict[str, tuple[Figures, Figures]]) -> Table:
    """Return figures side by side, with how far the tester's are from the gateway's."""
    shown = Table("tester, endpoint", "requests", "output tokens", "TTFT ms", "between tokens ms", title="tester / gateway")
    for name, (theirs, ours) in rows.items():
        ratios = theirs.over(ours)
        pairs = zip(asdict(theirs).values(), asdict(ours).values(), (1, 1, 1e3, 1e3), ratios, strict=True)
        shown.add_row(name, *(f"{one * unit:.1f} / {two * unit:.1f} ({ratio - 1:+.1%})" for one, two, unit, ratio in pairs))
    return shown


def measure(url: str, model: Path, options: argparse.Namespace, place: Path) -> dict[str, tuple[Figures, Figures]]:
    """Let each tester load each endpoint; return its figures and the gateway's."""
    rows: dict[str, tuple[Figures, Figures]] = {}
    for name, (tester, endpoints) in ENDPOINTS.items():
        program = getattr(options, name)
        for endpoint, path in endpoints.items() if program else ():
            folder = Path(tempfile.mkdtemp(dir=place))
            before = totals(url, path)
            theirs = tester(program, url, endpoint, model, options, folder)
            ours = totals(url, path).since(before)
            rows[f"{name} {path}"] = theirs, ours
            print(f"{name} {path}: {theirs} beside {ours}", flush=True)
    return rows


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table, write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.testers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--aiperf", help="AIPerf's program (default: it is left out)")
    parser.add_argument("--guidellm", help="GuideLLM's program (default: it is left out)")
    parser.add_argument("--url", help="of a gateway that serves already, and nobody else (default: one is started)")
    parser.add_argument("--model", type=Path, help="the folder of its model, which it serves under the folder's name")
    parser.add_argument("--requests", type=int, default=60, help="to each endpoint (default 60)")
    parser.add_argument("--clients", type=int, default=4, help="at once (default 4)")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        if options.url:
            rows = measure(options.url, options.model, options, Path(place))
        else:
            model, _ = make_tiny_model(Path(place) / "tiny")
            with weft_server(CLUSTER, model) as server:
                rows = measure(server.url, model, options, Path(place))
    Console(width=160).print(table(rows))
    if options.json:
        figures = {name: {"tester": asdict(theirs), "gateway": asdict(ours)} for name, (theirs, ours) in rows.items()}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
