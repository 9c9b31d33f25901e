"""The `weft` command: exit codes and the one line that says what was wrong."""

import json
import os
import ssl
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import trustme
from rich.console import Console

from orchestrator.cli.cluster_file import LOCAL_CLUSTER
from orchestrator.cli.demo import WAYS, Gaps, Outcome, show_outcomes
from orchestrator.cli.main import main
from orchestrator.cli.status import show_status
from workers.engines.checkpoint import FAMILIES

NODE: dict[str, Any] = {
    "node": "decode-0", "pool": "decode", "up": True, "restarts": 1, "running": 3, "waiting": 2, "queued_tokens": 40,
    "blocks": {"used": 25, "cached": 50, "free": 25, "total": 100},
}  # fmt: skip
STATUS: dict[str, Any] = {
    "cluster": "weft", "gateway": 0, "gateways": 2, "ready": True, "requests": {"default": {"running": 5, "waiting": 1}},
    "nodes": [NODE, {"node": "decode-1", "pool": "decode", "up": False}],
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_cluster_file_that_cannot_be_used_ends_with_2_and_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[gateway]\nhttp_port = 70000\n[[pools]]\nname = 'a'\nkind = 'decode'\n")
    problem = f"weft: {path}:2: gateway.http_port: must be a port (0 to 65535), is 70000\n"
    assert run(capsys, "serve", "--cluster", str(path)) == (2, "", problem)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve", "--http-port", "70000"), "--http-port: must be a port"),
        (("serve", "--model", "/nonexistent"), "has no config.json"),
        (("serve", "--attach"), "--attach: needs --address"),
        (("status", "--key", "k"), "weft: --key: needs --url"),
        (("status", "--url", "http://127.0.0.1:1", "--key", "env:WEFT_NOT_SET"), "weft: --key: env:WEFT_NOT_SET is not set"),
        (("status", "--url", "http://127.0.0.1:1", "--key", "a\nb"), "weft: --key: must be printable ASCII"),
        (("status", "--url", "https://127.0.0.1:1", "--ca", "/nonexistent"), "weft: --ca: /nonexistent: no file of certificates"),
        (("status", "--url", "https://127.0.0.1:1", "--ca", __file__), f"weft: --ca: {__file__}: no file of certificates"),
        (("serve", "--no-such-flag"), "weft: unrecognized arguments: --no-such-flag (see weft --help)"),
        (("serve", "--http-port", "x"), "weft: argument --http-port: invalid int value: 'x' (see weft serve --help)"),
        (("model", "create", "x" * 300, "--family", "llama", "--seed", "1"), "x: File name too long"),
        (("model", "create", "/proc", "--family", "llama", "--seed", "1"), "not an empty directory"),
        (("model", "create", "/nonexistent/x", "--family", "llama", "--seed", "1", "--heads", "3"), "heads must be a multiple"),
        (("model", "create", "/nonexistent/x", "--family", "gpt", "--seed", "1"), "invalid choice"),
        ((), "required"),
    ],
)
def test_unusable_arguments_end_with_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_nobody_at_an_address_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    # Port 1 on loopback: nothing listens there.
    for arguments in (("status", "--url", "http://127.0.0.1:1"), ("serve", "--address", "127.0.0.1:1")):
        code, out, err = run(capsys, *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "127.0.0.1:1" in err


@pytest.mark.slow
def test_a_reader_that_has_read_enough_is_not_complained_about() -> None:
    command = [
        sys.executable,
        "-c",
        "from orchestrator.cli.main import main; raise SystemExit(main())",
        "simulate",
        "--assumptions",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.slow
def test_a_full_disk_behind_standard_output_ends_with_1_and_one_line() -> None:
    command = [
        sys.executable,
        "-c",
        "from orchestrator.cli.main import main; raise SystemExit(main())",
        "simulate",
        "--assumptions",
    ]
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*command, "--json", "-"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "weft: standard output: No space left on device\n")


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, "weft 0.1.0\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path, family: str) -> None:
    heads = ("--kv-rank", "16", "--query-rank", "0") if family == "deepseek_v3" else ("--kv-heads", "1")
    sizes = ("--layers", "1", "--hidden", "32", "--heads", "2", *heads, "--intermediate", "32")
    code, out, err = run(capsys, "model", "create", str(tmp_path / "m"), "--family", family, "--seed", "3", *sizes)
    assert (code, err) == (0, "")
    assert str(tmp_path / "m") in out
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == (family, 1)


class _Status(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(STATUS if self.path == "/status" else {}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def test_status_shows_what_the_gateway_says(capsys: pytest.CaptureFixture[str]) -> None:
    with HTTPServer(("127.0.0.1", 0), _Status) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        code, out, _ = run(capsys, "status", "--url", url, "--json")
        foreign, _, said = run(capsys, "status", "--url", f"{url}/other")
        server.shutdown()
        thread.join()
    assert (code, json.loads(out)) == (0, STATUS)
    assert (foreign, said) == (1, f"weft: {url}/other: what answers there is no gateway\n")


class _Locked(_Status):
    def do_GET(self) -> None:
        if self.headers["authorization"] == "Bearer k-1":
            super().do_GET()
        else:
            self.send_error(401)


def test_status_is_told_to_who_has_the_key_and_believes_the_certificate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, ca = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    monkeypatch.setenv("WEFT_TEST_KEY", "k-1")
    with HTTPServer(("127.0.0.1", 0), _Locked) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        asked = ("status", "--json", "--url", f"https://127.0.0.1:{server.server_port}")
        code, out, _ = run(capsys, *asked, "--ca", str(ca), "--key", "env:WEFT_TEST_KEY")
        wrong, _, keyless = run(capsys, *asked, "--ca", str(ca))
        unknown, _, unbelieved = run(capsys, *asked, "--key", "k-1")
        server.shutdown()
        thread.join()
    assert (code, json.loads(out)) == (0, STATUS)
    assert (wrong, unknown) == (1, 1)
    assert "the API key is missing or wrong" in keyless
    assert "CERTIFICATE_VERIFY_FAILED" in unbelieved


def test_a_shape_is_not_served_without_its_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    path = LOCAL_CLUSTER.parent / "sim" / "vr-nvl72.toml"
    for command in ("serve", "up"):
        code, _, err = run(capsys, command, "--cluster", str(path))
        assert (code, err.count("\n")) == (2, 1)
        assert "models.default.path: is empty, and a shape (kimi-k2) cannot be served" in err


def test_status_as_a_table_names_every_node() -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(width=160, record=True, file=nowhere)
        show_status(STATUS, console)
    text = console.export_text()
    assert "cluster weft: ready (gateway 1 of 2)" in text
    assert [word in text for word in ("decode-0", "decode-1", "25 %", "50 %", "down")] == [True] * 5


def test_the_demos_table_has_a_column_a_way_and_says_what_the_others_cost() -> None:
    steady, bursty, none = Gaps(0.03, 0.033), Gaps(0.004, 0.03), {"workers": 10}
    ours = Outcome(10, 0, 1000, 900, 300, 100, 50, 2.0, 0.02, 0.04, bursty, bursty, none, 0, 0)
    theirs = Outcome(10, 1, 1000, 800, 0, 0, 50, 3.0, 0.05, 0.09, bursty, bursty, none, 0, 0)
    beating = replace(ours, main=steady, parts={"prefill": 8, "decode": 6, "cadence": 4}, beats=1200, beats_missed=3)
    with open(os.devnull, "w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        show_outcomes(dict(zip((way.name for way in WAYS), (ours, theirs, ours, beating), strict=True)), console)
    text = console.export_text()
    assert [way.name in text for way in WAYS] == [True] * 4
    # 320 blocks of 16 tokens on each of two nodes
    assert "2 aggregated nodes, whose memory holds 10,240 tokens" in text
    assert "1 decode (attention | FFN), 1 lpx" in text
    assert "300, 100" in text
    assert "prefill 8, decode 6, cadence 4" in text
    assert "1,200 (3)" in text
    assert "without: 2.0 times the prompt tokens computed, 2.2 times the TTFT p90, 1.5 times as long" in text
    assert "p99 is 1.1 times their p50 on a beat, 7.5 times without" in text
