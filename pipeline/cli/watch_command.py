"""relay watch: show the curves and samples of a run in the browser while it trains."""

import argparse
import sys
import time
import webbrowser
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

from markupsafe import Markup

from pipeline.cli.parsers import make_parser
from pipeline.evaluation.config import BASELINES, CONTROL
from pipeline.evaluation.curves import PANELS, read_events, read_panels
from pipeline.evaluation.pages.page import environment, page_parts, visible
from pipeline.evaluation.pages.plots import curve_plot
from pipeline.evaluation.pages.tables import Table, duration
from pipeline.models.text import plain_text
from pipeline.stages.directory import FINISHED, STAGES, RunDirectory

EXAMPLE = """\
examples:
  relay watch runs/quickstart
  relay watch runs/quickstart --open
  relay watch runs/quickstart --port 8001
"""
SECONDS = 5  # between two looks of the page
ALL_PANELS = {**PANELS, CONTROL: PANELS["ppo"], **dict.fromkeys(BASELINES, PANELS["sft"])}
SHOWN_SAMPLES = 8
HOSTS = ("127.0.0.1", "localhost")  # a page of another host that leads here by a name of its own gets nothing


class QuietHandler(WSGIRequestHandler):
    """Answers without a line in the terminal for each look of the page."""

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def watch_command(argv: Sequence[str]) -> int:
    """Serve the page until Ctrl-C; return 2 where there is no run, or the port is taken."""
    arguments = watch_parser().parse_args(argv)
    run = RunDirectory(arguments.run)
    if not (run.path / "recipe.yaml").is_file():
        print(f"error: watch: {str(run.path)!r} is no run directory (it has no recipe.yaml)", file=sys.stderr)
        return 2
    try:
        server = make_server(HOSTS[0], arguments.port, watch_pages(run), handler_class=QuietHandler)
    except (OSError, OverflowError) as error:
        print(f"error: watch: port {arguments.port} cannot be used ({error}); give another --port", file=sys.stderr)
        return 2
    with server:
        url = f"http://{HOSTS[0]}:{server.server_port}/"
        print(f"{url} shows {run.path}; Ctrl-C ends it", flush=True)
        if arguments.open:
            webbrowser.open(url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def watch_pages(run: RunDirectory) -> Callable[[dict, Callable], Iterable[bytes]]:
    """Make the application of a run: `/` is the page of curves, `/report` that of the evaluation."""

    def application(request: dict, start: Callable) -> Iterable[bytes]:
        path, report = request["PATH_INFO"], run.eval / "report.html"
        status, body = "404 Not Found", b"There is no such page."
        if request.get("HTTP_HOST", "").rpartition(":")[0] not in HOSTS:
            status, body = "403 Forbidden", b"This page is for this machine alone."
        elif path == "/":
            status, body = "200 OK", visible(watch_page(run)).encode()
        elif path == "/report" and report.is_file():
            status, body = "200 OK", report.read_bytes()
        kind = "text/html" if status.startswith("200") else "text/plain"
        start(status, [("Content-Type", f"{kind}; charset=utf-8"), ("Cache-Control", "no-store")])
        return [body]

    return application


def watch_page(run: RunDirectory) -> str:
    """Render what the stages have logged so far."""
    panels = read_panels(run.path, ALL_PANELS)
    figures = {
        stage: Markup(curve_plot(of_stage))
        for stage in ALL_PANELS
        if (of_stage := [panel for panel in panels if panel.stage == stage])
    }
    page = environment().get_template("watch.html")
    return page.render(
        stages=stage_table(run),
        figures=figures,
        samples={stage: newest_samples(run, stage) for stage in ("ppo", CONTROL)},
        has_report=(run.eval / "report.html").is_file(),
        seconds=SECONDS,
        **page_parts(str(run.path)),
    )


def stage_table(run: RunDirectory) -> Table:
    """Say of each stage that has begun whether it is finished, its last step, and when it last wrote."""
    rows = []
    for stage in STAGES:
        file = run.record_file(stage)
        if file is None:
            continue
        log = run.stage(stage) / "metrics.jsonl"
        events = read_events(log)
        seconds = time.time() - (log if log.is_file() else file).stat().st_mtime
        state = "finished" if file.name == FINISHED else "begun"
        rows.append([stage, state, str(events[-1]["step"]) if events else "", f"{duration(seconds)} ago"])
    return Table("Stages", ["stage", "state", "last logged step", "last written"], rows)


def newest_samples(run: RunDirectory, stage: str) -> list[dict[str, object]]:
    """Return step, score, prompt and completion of the newest samples of a stage, the last one first."""
    samples = read_events(run.stage(stage) / "samples.jsonl")[-SHOWN_SAMPLES:]
    return [
        {**sample, "prompt": plain_text(sample["prompt"])}
        for sample in reversed(samples)
        if sample.get("score") is not None
    ]


def watch_parser() -> argparse.ArgumentParser:
    """Make the parser of the words after `relay watch`."""
    parser = make_parser("watch", __doc__, EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, such as runs/quickstart")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 takes one that is free")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return parser
