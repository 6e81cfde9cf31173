"""Names of runs for wandb."""

import pytest
from wandb import Settings

from utils.logging import wandb_name


@pytest.mark.parametrize("name", [
    "ffhq_256", "a/b", "a: b", "a;b", "a,b", "a#b", "a?b", "it's", "50 %", "ä", "x" * 300
])
def test_any_name_becomes_one_that_wandb_accepts(name):
    made = wandb_name(name)
    Settings(run_id=made, project=made)
    assert made.isascii() and (made == name) == (name == "ffhq_256")
    assert wandb_name("a/b") == "a-b" and wandb_name(name + "!") != wandb_name(name + "?")
