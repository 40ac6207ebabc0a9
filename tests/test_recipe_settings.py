"""Shipped baselines and the classes they name: every setting is one the class takes, on every task it is defined on."""

from __future__ import annotations

import pytest

from clbench.errors import UserError
from clbench.recipes import load_baseline, load_task, names, resolve
from clbench.strategies.build import check

UNDEFINED = {("independent", "class"), ("derpp", "task"), ("derpp_500", "task"), ("derpp_500", "class")}
"""An own net per task cannot choose among all classes; Avalanche's DER gives no task to the net."""
TASK_ONLY = {"apd", "den", "den_finetune", "den_no_expansion", "den_no_split", "den_reference_code", "progressive"}
"""What grows for a task must be told the task, and a net that can be taken apart: no ResNet."""
UNDEFINED |= {(name, scenario) for name in TASK_ONLY for scenario in ("domain", "class")}


@pytest.mark.parametrize("baseline", names("baseline"))
def test_every_setting_is_one_the_strategy_takes(baseline: str) -> None:
    for name in names("task"):
        experiment = resolve(load_task(name), load_baseline(baseline))
        if (baseline, experiment.task.stream.scenario) in UNDEFINED:
            with pytest.raises(UserError, match="is not defined in the"):
                check(experiment)
            assert name not in experiment.baseline.on, "settings for a task it cannot run on"
        elif baseline in TASK_ONLY and experiment.model.kind.startswith("resnet"):
            with pytest.raises(UserError, match="a chain of layers; the resnet"):
                check(experiment)
        else:
            check(experiment)
