"""Relay: one recipe runs SFT, PPO and an evaluation that says whether RL beat SFT."""

import logging
import os
import sys
from pathlib import Path

# TRL's trainers report to the Hugging Face Hub what kind of model and machine they run on. Relay turns this off, but
# not where the user has set one of these variables. huggingface_hub reads them once, when it is imported.
TELEMETRY_VARIABLES = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")

# Between two products a thread of GNU's OpenMP waits for up to 300,000 rounds of a loop, in which another process on
# its core cannot run, and holds up the threads of its own process that have to. 1,000 rounds are as fast where nothing
# else runs. The library reads the variables when torch is imported, and GOMP_SPINCOUNT goes before the other.
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

# `accelerate launch pipeline/x.py` puts this folder first on the path of modules, where Relay's `rewards`, `metrics`
# and `tasks` would hide those of the user. Relay imports itself as `pipeline.rewards`.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _HERE]

# Where it is imported, bitsandbytes warns that it lacks a kernel for CPUs, also where nothing is held in 4 bits.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if not any(name in os.environ for name in WAITING_VARIABLES):
    os.environ["GOMP_SPINCOUNT"] = "1000"

if not any(name in os.environ for name in TELEMETRY_VARIABLES):
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if constants := sys.modules.get("huggingface_hub.constants"):
        constants.HF_HUB_DISABLE_TELEMETRY = True
