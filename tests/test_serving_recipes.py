"""recipes/serve: what is read from a server's /metrics, and that its files name what the plugin takes."""

import runpy
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from threading import Thread

import pytest
import yaml


SERVE = Path(__file__).parents[1] / "recipes/serve"
METRICS = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="a"}} {0}.0
vllm:spec_decode_num_drafts_created{{engine="0",model_name="a"}} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="a"}} {1}.0
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="a"}} {2}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="a",position="0"}} {3}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="a",position="1"}} {4}.0
"""


@pytest.fixture
def said(monkeypatch, capsys):
    """What acceptance.py says of servers that answer with some pages, in turn, the last one for ever."""
    servers = []

    def said_(*pages, flags=()):
        answers = chain(pages, repeat(pages[-1]))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if self.path == "/metrics" else 404)
                self.end_headers()
                self.wfile.write(next(answers).encode())

            def log_message(self, *args):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}/"
        monkeypatch.setattr(sys, "argv", ["acceptance.py", "--url", url, *flags])
        runpy.run_path(str(SERVE / "acceptance.py"), run_name="__main__")
        return capsys.readouterr().out

    yield said_
    for server in servers:
        server.shutdown()
        server.server_close()


def test_acceptance_since_the_start(said):
    expected = "100 steps, 2.30 tokens per step; drafts accepted at positions 1 2: 80 / 50 %\n"
    assert said(METRICS.format(100, 200, 130, 80, 50)) == expected
    second = METRICS.format(40, 80, 60, 30, 30).replace('engine="0"', 'engine="1"')
    two_engines = METRICS.format(60, 120, 70, 50, 20) + second
    assert said(two_engines) == expected


def test_acceptance_of_some_time(said):
    pages = METRICS.format(100, 200, 130, 80, 50), METRICS.format(110, 220, 135, 84, 51)
    expected = "10 steps, 1.50 tokens per step; drafts accepted at positions 1 2: 40 / 10 %\n"
    assert said(*pages, flags=("--seconds", "0.01")) == expected


def test_servers_that_have_none(said):
    with pytest.raises(SystemExit, match="has drafted nothing in that time"):
        said(METRICS.format(0, 0, 0, 0, 0))
    with pytest.raises(SystemExit, match="it is no vLLM server with a speculator"):
        said("vllm:num_requests_running 0.0\n")


@pytest.mark.parametrize("path", sorted(SERVE.glob("*.yaml")), ids=lambda path: path.stem)
def test_files_of_a_server(path):
    assert f"vllm serve --config recipes/serve/{path.name}" in path.read_text()
    config = yaml.safe_load(path.read_text())
    assert config.keys() <= {"model", "dtype", "max-model-len", "tensor-parallel-size", "speculative-config"}
    assert config["speculative-config"].keys() == {"method", "model", "num_speculative_tokens"}
    assert config["speculative-config"]["method"] == "mtp"
