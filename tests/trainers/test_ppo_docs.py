"""docs/ppo.md says what the code does: the names that are logged, and a loop that runs."""

import re
from pathlib import Path

from ppo_toys import training_steps

PAGE = (Path(__file__).parent.parent.parent / "docs" / "ppo.md").read_text()


def test_logged_names_are_those_of_the_page(make_trainer):
    trainer = make_trainer(total_episodes=8, ptx_coef=0.1)  # which logs its loss
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
