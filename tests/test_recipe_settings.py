"""Shipped baselines and the classes they name: every setting is one the class takes, on every task it is defined on."""

from __future__ import annotations

import pytest

from clbench.errors import UserError
from clbench.recipes import load_baseline, load_task, names, resolve
from clbench.strategies.build import check

UNDEFINED = {("independent", "class"), ("multimodal", "class"), ("gpm", "class")}
UNDEFINED |= {("icarl", "task"), ("icarl", "domain")}
UNDEFINED |= {("gdumb", "domain"), ("gdumb_small", "domain"), ("der_500", "class"), ("derpp_500", "class")}
"""An own net per task cannot choose among all classes; GPM says nothing of outputs that are born later; iCaRL and GDumb
need new classes; some are for few tasks."""
FAMILIES = ("expansion", "sharing", "hypernetwork")
INFERS = {"hypernet", "hypernet_sampled", "hypernet_small", "hypernet_structured", "hypernet_lowrank"}
TASK_ONLY = {name for name in names("baseline") if load_baseline(name).family in FAMILIES} - INFERS
"""What grows for a task, or has weights of its own for it, must be told the task, or infer it."""
UNDEFINED |= {(name, scenario) for name in TASK_ONLY for scenario in ("domain", "class")}
CHAINED = {name for name in TASK_ONLY if load_baseline(name).family == "expansion"}
CHAINED |= {"gpm", "hat", "hat_hard", "layer_reuse", "multimodal", "weights_as_features", "xdg"}
"""They take apart a net that is a chain of layers: no ResNet."""


@pytest.mark.parametrize("baseline", names("baseline"))
def test_every_setting_is_one_the_strategy_takes(baseline: str) -> None:
    for name in names("task"):
        experiment = resolve(load_task(name), load_baseline(baseline))
        if (baseline, experiment.task.stream.scenario) in UNDEFINED:
            with pytest.raises(UserError, match="is not defined in the"):
                check(experiment)
            assert name not in experiment.baseline.on, "settings for a task it cannot run on"
        elif baseline in CHAINED and experiment.model.kind.startswith("resnet"):
            with pytest.raises(UserError, match="a chain of layers; the resnet"):
                check(experiment)
        else:
            check(experiment)
