"""docs/ppo.md says what the code does: every key with its default, and code that runs."""

import dataclasses
import re
from pathlib import Path

from ppo_toys import training_steps

from pipeline.rewards import RewardConfig
from pipeline.trainers.ppo.config import PPOConfig

PAGE = (Path(__file__).parent.parent.parent / "docs" / "ppo.md").read_text()


def documented() -> dict[str, str]:
    """Key -> default as printed in the table of settings."""
    table = PAGE.split("## Settings")[1].split("\n## ")[0]
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            names, defaults = re.findall(r"`(\w+)`", cells[0]), cells[1].split(", ")
            found |= dict(zip(names, defaults, strict=True))
    return found


def printed(value: object) -> str:
    """A default as the table prints it."""
    if value is None or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else f"{value:g}"


def test_every_setting_is_documented_with_its_default():
    table, defaults = documented(), PPOConfig((RewardConfig("bleu"),))
    assert table.keys() == {field.name for field in dataclasses.fields(PPOConfig)}
    for name, text in table.items():
        value = getattr(defaults, name)
        if name != "rewards":
            same = float(text) == value if isinstance(value, float) else text == printed(value)
            assert same, f"{name}: {text} in the page, {value} in the code"


def test_logged_names_are_those_of_the_page(make_trainer):
    trainer = make_trainer(total_episodes=8)
    trainer.train()
    logged = training_steps(trainer.output_dir)[0].keys() - {"step", "episode", "lr", "reward/colours"}
    table = PAGE.split("## Logged")[1].split("\n## ")[0]
    assert logged == set(re.findall(r"`([a-z]+/[a-z_]+)`", table)) - {"reward/NAME"}


def test_the_hand_written_loop_is_the_trainers_own(make_trainer):
    code = PAGE.split("```python\n")[1].split("```")[0]
    loop = code[code.index("for step") :]
    trainer, own = make_trainer("hand", total_episodes=16), make_trainer("own", total_episodes=16)
    exec(loop, {"trainer": trainer})  # the page's own words
    own.train()
    first, second = trainer.shared.trainable_state(), own.shared.trainable_state()
    assert all(bool((first[name] == second[name]).all()) for name in first)
