"""relay watch: the page of a run that trains, and who may see it."""

import json
import os
import threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from wsgiref.simple_server import make_server

import pytest

from pipeline.cli.main import main
from pipeline.cli.watch_command import QuietHandler, watch_page, watch_pages
from pipeline.stages.directory import RunDirectory

RUN = RunDirectory(Path("runs/demo"))


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch) -> RunDirectory:
    """A run whose SFT is finished, whose PPO has logged three steps and is cut in the fourth, with a control."""
    monkeypatch.chdir(tmp_path)
    for stage in ("sft", "ppo", "control"):
        RUN.stage(stage).mkdir(parents=True)
    (RUN.path / "recipe.yaml").write_text("")
    (RUN.sft / "stage.json").write_text("{}")
    for stage in (RUN.ppo, RUN.control):
        (stage / "started.json").write_text("{}")
        events = [{"step": step, "objective/scores": step / 10, "objective/kl": 0.1} for step in (1, 2, 3)]
        (stage / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + '{"step": 4, "obj')
    samples = [
        {"step": n, "score": n / 8, "prompt": f"say {n}", "completion": f"<script>{n}</script>"} for n in range(10)
    ]
    (RUN.ppo / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples) + '{"step": 10')
    return RUN


def test_the_page_shows_stages_curves_and_the_newest_samples(run):
    page = watch_page(run)
    assert page.count("<svg") == 2 and 'http-equiv="refresh"' in page and "script-src" in page
    rows = [row.split("</tr>")[0] for row in page.split("<tr>")]
    (ppo,) = [row for row in rows if ">ppo</th>" in row]
    assert ">begun<" in ppo and ">3<" in ppo
    assert any(">sft</th>" in row and ">finished<" in row for row in rows)
    assert "say 9" in page and page.index("say 9") < page.index("say 8") and "say 1" not in page
    assert "&lt;script&gt;9" in page and "<script>" not in page and "/report" not in page
    with (run.ppo / "metrics.jsonl").open("a") as file:
        file.write('ective/scores": 0.4}\n{"step": 5, "objective/scores": 0.5}\n')
    os.utime(run.ppo / "metrics.jsonl", (0, 0))
    later = watch_page(run)
    assert ">5<" in later and later != page


def test_a_run_that_has_only_begun_has_a_page():
    begun = RunDirectory(Path("runs/begun"))
    begun.path.mkdir()
    assert "<svg" not in watch_page(begun) and "runs/begun" in watch_page(begun)


def test_pages_are_served_to_this_machine_alone(run):
    run.eval.mkdir()
    (run.eval / "report.html").write_text("the report")
    with make_server("127.0.0.1", 0, watch_pages(run), handler_class=QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert b'href="/report"' in urlopen(f"{url}/").read() and urlopen(f"{url}/report").read() == b"the report"
            with pytest.raises(HTTPError, match="404"):
                urlopen(f"{url}/recipe.yaml")
            with pytest.raises(HTTPError, match="403"):
                urlopen(Request(f"{url}/", headers={"Host": f"other.example:{server.server_port}"}))
        finally:
            server.shutdown()
            thread.join()


def test_no_run_and_a_port_in_use_are_named(run, capsys):
    assert main(["watch", "runs"]) == 2 and "'runs' is no run directory" in capsys.readouterr().err
    with make_server("127.0.0.1", 0, watch_pages(run)) as server:
        assert main(["watch", "runs/demo", "--port", str(server.server_port)]) == 2
    assert f"port {server.server_port} cannot be used" in capsys.readouterr().err
    assert main(["watch", "runs/demo", "--port", "700000"]) == 2
