"""Relay: one recipe runs SFT, PPO and an evaluation that says whether RL beat SFT."""

import os
import sys

# TRL's trainers report to the Hugging Face Hub what kind of model and machine they run on. Relay turns this off, but
# not where the user has set one of these variables. huggingface_hub reads them once, when it is imported.
TELEMETRY_VARIABLES = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")

if not any(name in os.environ for name in TELEMETRY_VARIABLES):
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if constants := sys.modules.get("huggingface_hub.constants"):
        constants.HF_HUB_DISABLE_TELEMETRY = True
