"""The examples run as a user runs them, and do what they claim."""

import re
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_moe_in_your_transformer_learns_and_balances(capsys):
    runpy.run_path(str(EXAMPLES / "moe_in_your_transformer.py"), run_name="__main__")
    lines = re.findall(r"step +(\d+)  loss ([\d.]+)  tokens per expert \[([\d, ]+)\]", capsys.readouterr().out)
    assert [int(step) for step, _, _ in lines] == [0, 10, 20, 30, 40]
    losses = [float(loss) for _, loss, _ in lines]
    loads = [[int(count) for count in load.split(", ")] for _, _, load in lines]
    assert losses[-1] < 0.5 * losses[0]
    assert all(len(load) == 8 and sum(load) == 2 * 16 * 24 for load in loads)
    assert max(loads[-1]) < max(loads[0])
