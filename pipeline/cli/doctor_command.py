"""relay doctor: say what Relay finds on this machine, what would run where, and test it in a minute."""

import argparse
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file
from huggingface_hub import constants, get_token, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from transformers.integrations.integration_utils import get_available_reporting_integrations

from pipeline.cli.main import installed_version
from pipeline.cli.parsers import make_parser
from pipeline.cli.push_command import bytes_text
from pipeline.cli.recipe_files import recipe_files
from pipeline.evaluation.pages.page import print_table
from pipeline.evaluation.pages.tables import Table
from pipeline.runtime.devices import has_accelerator
from pipeline.runtime.versions import PACKAGE
from pipeline.stages.chain import Selection, run_chain
from pipeline.stages.directory import PACKAGES
from pipeline.stages.engines import engine_problem
from pipeline.stages.launch import default_launch_options, process_count, sharding_engine
from pipeline.stages.plan import count, device_name
from pipeline.trainers.precision import native_bf16

EXAMPLE = """\
examples:
  relay doctor
  relay doctor --tests
"""
IN_CLONE = (Path(__file__).resolve().parents[2] / "pyproject.toml").is_file()  # and not installed from a wheel
CONSTRAINTS = Path(__file__).with_name("constraints.txt")  # in a clone a link to the file at its top
TABLE_WIDTH = 120  # columns: a narrower terminal wraps lines, where it would cut paths
STAGES = ("sft", "reward", "ppo", "eval")
# The quickstart as a test of a minute: every stage, and figures that mean nothing.
SHORT = [
    "task.max_train_examples=64",
    "task.max_validation_examples=8",
    "task.max_test_examples=12",
    "sft.num_train_epochs=1",
    "sft.per_device_train_batch_size=8",
    "ppo.total_episodes=32",
    "ppo.per_device_train_batch_size=8",
    "ppo.gradient_accumulation_steps=1",
    "eval.n_bootstrap=10",
    "eval.samples_per_prompt=0",
    "eval.num_inspected=0",
]


def doctor_command(argv: Sequence[str]) -> int:
    """Print the tables; return 0, or with --tests the exit code of the short run."""
    arguments = doctor_parser().parse_args(argv)
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    for table in (library_table(), extra_table(), machine_table(), launch_table()):
        print_table(table, console)
    return run_short_tests() if arguments.tests else 0


def library_table() -> Table:
    """List the libraries that results depend on: what is installed, what was tested, and what is allowed."""
    tested = tested_versions()
    allowed = {canonicalize_name(r.name): str(r.specifier) for r in requirements()}
    rows = [["python", platform.python_version(), "", metadata_of("Requires-Python")]]
    for name in PACKAGES:
        if name != PACKAGE:
            rows.append([name, package_version(name), tested.get(name, ""), allowed.get(name, "")])
    where = "a clone" if IN_CLONE else "a wheel"
    return Table(f"Relay {installed_version()}, {where}", ["library", "installed", "tested", "allowed"], rows)


def extra_table() -> Table:
    """List the optional packages, and which of them are there."""
    rows = []
    for extra in metadata_of("Provides-Extra").split():
        missing = [name for name in packages_of(PACKAGE, extra) if not package_version(name)]
        rows.append([extra, "there" if not missing else f"missing: {', '.join(missing)}"])
    trackers = ", ".join(map(str, get_available_reporting_integrations())) or "none"
    return Table("Extras", ["extra", ""], [*rows, ["trackers for report_to", trackers]])


def machine_table() -> Table:
    """Describe processor, memory, accelerators, precision, disk and the cache of the Hub."""
    memory, threads = psutil.virtual_memory(), torch.get_num_threads()
    cache = Path(constants.HF_HUB_CACHE)
    rows = [
        ["system", platform.platform()],
        ["cores", f"{os.cpu_count()}; torch uses {count(threads, 'thread', 'threads')} (OMP_NUM_THREADS sets it)"],
        ["memory", f"{bytes_text(memory.available)} free of {bytes_text(memory.total)}"],
        *[["accelerator", line] for line in accelerators() or ["none that Relay uses"]],
        ["bf16", "yes, and used by default" if native_bf16() else "no instructions for it; float32 is used"],
        ["disk", f"{bytes_text(shutil.disk_usage('.').free)} free in {Path.cwd()}"],
        ["models of the Hub", cache_text(cache)],
        ["Hub", "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "online when a recipe needs it"],
        ["token of the Hub", "there" if get_token() else "none; relay push and private models need one"],
    ]
    return Table("Machine", ["", ""], rows)


def launch_table() -> Table:
    """Say with which processes on which device each stage would start, and which file of accelerate says so."""
    options = default_launch_options()
    processes, engine = process_count(options), sharding_engine(options)
    there = Path(default_config_file).is_file()
    used = "used" if there and has_accelerator() else "not used without an accelerator" if there else "not there"
    hardware = f"{count(processes, 'process', 'processes')} on {device_name(options)}"
    rows = [["accelerate's configuration", f"{used}: {default_config_file}"]]
    rows += [[stage, engine_problem(stage, engine) or hardware] for stage in STAGES]
    rows.append(["options of accelerate launch", " ".join(options) or "none"])
    return Table("What runs where", ["", ""], rows)


def accelerators() -> list[str]:
    """Describe each GPU."""
    if not torch.cuda.is_available():
        return [torch.accelerator.current_accelerator().type] if has_accelerator() else []
    lines = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        lines.append(f"{torch.cuda.get_device_name(number)}, {bytes_text(free)} free of {bytes_text(total)}")
    return lines


def cache_text(cache: Path) -> str:
    """Say where the cache of the Hub is, and what it holds."""
    try:
        content = scan_cache_dir(cache)
    except CacheNotFound:
        return f"{cache}: empty"
    free = bytes_text(shutil.disk_usage(cache).free)
    return f"{cache}: {len(content.repos)} repositories, {bytes_text(content.size_on_disk)}; {free} free"


def run_short_tests() -> int:
    """Run every stage of the quickstart on a few rows, in a folder that goes away; return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*SHORT, f"output_dir={folder}"]
        code = run_chain(recipe_files()["quickstart"], overrides, Selection(), [], is_kept=False)
    print("tests: every stage runs here" if code == 0 else f"tests: the run ended with exit code {code}")
    return code


def tested_versions() -> dict[str, str]:
    """Read the versions that the tests and the recorded runs used."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def requirements() -> list[Requirement]:
    """Return what the installed package needs; nothing where Relay runs from a folder."""
    try:
        return [Requirement(line) for line in requires(PACKAGE) or []]
    except PackageNotFoundError:
        return []


def packages_of(package: str, extra: str) -> list[str]:
    """Return the packages that an extra of a package names, and those of their extras."""
    names = []
    for requirement in map(Requirement, requires(package) or []):
        if requirement.marker is not None and f'"{extra}"' in str(requirement.marker):
            names.append(requirement.name)
            if package_version(requirement.name):
                names += [name for inner in requirement.extras for name in packages_of(requirement.name, inner)]
    return names


def metadata_of(field: str) -> str:
    """Return a field of the installed package, its values with spaces between them."""
    try:
        return " ".join(metadata(PACKAGE).get_all(field) or [])
    except PackageNotFoundError:
        return ""


def package_version(name: str) -> str:
    """Return the version of a package; an empty text without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def doctor_parser() -> argparse.ArgumentParser:
    """Make the parser of the words after `relay doctor`."""
    parser = make_parser("doctor", __doc__, EXAMPLE)
    parser.add_argument("--tests", action="store_true", help="run every stage on a few rows; about a minute")
    return parser
