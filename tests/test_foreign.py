"""Strategies of Avalanche's under the suite's budget: same net, same steps, same answers, and every lambda works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training import Naive
from avalanche.training import SynapticIntelligence as StockSI
from avalanche.training.plugins import EvaluationPlugin, RWalkPlugin

from clbench.errors import UserError
from clbench.loading import fast_loading
from clbench.preflight import preflight
from clbench.recipes import load_baseline, load_task, resolve
from clbench.runner import run
from clbench.specs import BaselineSpec, Scenario
from clbench.strategies.base import mean_loss, no_metrics
from clbench.strategies.build import check, foreign_parameters, resolved_settings
from clbench.strategies.foreign import Foreign
from strategy_factory import AVALANCHES, made, recipe, synthetic, weights


class RWalk(Naive):
    """Random walk, which Avalanche has as a plugin alone."""

    def __init__(self, *, ewc_lambda: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plugins.insert(0, RWalkPlugin(ewc_lambda=ewc_lambda))


def learned(baseline: str | BaselineSpec, scenario: Scenario = "domain", n_tasks: int = 2, **settings: Any) -> Any:
    strategy, stream = made(synthetic(scenario, n_tasks=n_tasks), baseline, **settings)
    for experience in stream.benchmark.train_stream:
        strategy.train_task(experience)
    return strategy


# --------------------------------------------------------------------------------------------------------- regularisers

REGULARISERS: dict[str, tuple[str, str, dict[str, Any], tuple[float, float]]] = {
    "own ewc": ("clbench.strategies.ewc:EWC", "lam", {"fisher": "exact", "mode": "separate"}, (1.0, 1000.0)),
    "lwf": ("avalanche.training:LwF", "alpha", {"temperature": 2.0}, (0.1, 10.0)),
    "ewc": ("avalanche.training:EWC", "ewc_lambda", {"mode": "separate"}, (1e3, 1e5)),
    "online ewc": ("avalanche.training:EWC", "ewc_lambda", {"mode": "online", "decay_factor": 0.9}, (1e3, 1e5)),
    "mas": ("avalanche.training:MAS", "lambda_reg", {"alpha": 0.5, "verbose": False}, (0.1, 10.0)),
}


@pytest.mark.parametrize("scenario", ["task", "domain"])
@pytest.mark.parametrize("method", REGULARISERS)
def test_the_strength_of_every_regulariser_changes_the_weights(method: str, scenario: Scenario) -> None:
    """Off, weak and strong give three different nets; before the second task the penalty has nothing to hold."""
    cls, key, settings, (weak, strong) = REGULARISERS[method]
    found = []
    for value in (0.0, weak, strong):
        every: dict[str, Any] = {key: value, **settings}
        found.append(weights(learned(recipe(cls, **every), scenario)))
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert float((found[left] - found[right]).abs().max()) > 1e-5


def test_the_strength_of_random_walk_changes_the_weights() -> None:
    """A plugin inside a class of one's own."""
    found = [weights(learned(recipe(f"{__name__}:RWalk", ewc_lambda=value))) for value in (0.0, 1.0, 100.0)]
    assert all(float((a - b).abs().max()) > 1e-5 for a, b in ((found[0], found[1]), (found[1], found[2])))


@pytest.mark.filterwarnings("ignore:__array_wrap__")
def test_stock_si_does_nothing_on_the_cpu() -> None:
    """Why `si` is our own: its copy of the weights is an alias of the live ones, so theta - theta* is always 0.

    avalanche/training/plugins/synaptic_intelligence.py, `extract_weights`: `.detach().cpu().flatten()` copies nothing
    on the CPU. The day this test fails, Avalanche has mended it.
    """
    found = [
        weights(learned(recipe("avalanche.training:SynapticIntelligence", si_lambda=value, eps=0.1)))
        for value in (0.0, 1e6)
    ]
    assert torch.equal(*found)


def test_lwf_without_distillation_is_naive() -> None:
    """Bit for bit: alpha * KL adds exact zeros to every gradient."""
    lwf = learned(recipe("avalanche.training:LwF", alpha=0.0, temperature=2.0), n_tasks=3)
    assert torch.equal(weights(lwf), weights(learned(recipe("avalanche.training:Naive"), n_tasks=3)))


def test_all_heads_are_answered_by_one_pass_through_the_trunk() -> None:
    """LwF asks for them at every step: the same logits as head by head."""
    strategy = learned(AVALANCHES, "task", n_tasks=3)
    x = torch.rand(5, 1, 8, 8)
    net = strategy.strategy.model
    calls = []
    strategy.model.trunk.register_forward_hook(lambda *_: calls.append(1))
    every = net(x, None)
    assert len(calls) == 1
    assert sorted(every) == [0, 1, 2]
    for task, logits in every.items():
        torch.testing.assert_close(logits, net(x, task))


# --------------------------------------------------------------------------------------------------------------- budget


def test_the_optimiser_starts_afresh_exactly_when_the_budget_says_so() -> None:
    for reset in (True, False):
        strategy, stream = made(synthetic("domain", n_tasks=1, reset_optimizer=reset), AVALANCHES)
        strategy.train_task(stream.benchmark.train_stream[0])
        assert bool(strategy.strategy.optimizer.state) is not reset


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_its_own_evaluation_gives_the_accuracy_of_the_net(scenario: Scenario) -> None:
    """Share of right answers, counted here sample by sample from the net itself; unseen tasks included."""
    strategy = learned(AVALANCHES, scenario)
    _, stream = made(synthetic(scenario, n_tasks=4), "finetune")
    for test, experience in zip(stream.test, stream.benchmark.test_stream, strict=True):
        strategy.model.eval()
        logits = strategy.model(test.inputs(torch.arange(len(test))), test.task)
        assert strategy.accuracy(experience) == float((logits.argmax(dim=1) == test.labels).double().mean())


@pytest.mark.parametrize("baseline", ["finetune", "independent", "er"])
def test_own_strategies_evaluate_in_avalanches_loop_too(baseline: str) -> None:
    """Its stream accuracy is the suite's own, for the same weights; a class without a logit yet is no error."""
    scenarios: tuple[Scenario, ...] = ("task", "class") if baseline != "independent" else ("task", "domain")
    for scenario in scenarios:
        strategy, stream = made(synthetic(scenario, n_tasks=3), baseline)
        strategy.train(stream.benchmark.train_stream[0])
        strategy.evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=no_metrics().loggers)
        strategy.plugins.append(strategy.evaluator)
        for experience in stream.benchmark.test_stream:
            with fast_loading():
                found = strategy.eval(experience)
            assert list(found.values())[-1] == pytest.approx(strategy.accuracy(experience))


def test_a_net_is_evaluated_without_leaving_a_trace() -> None:
    """Evaluating does not train: weights, heads and the next task's training are the same with and without."""
    found = []
    for often in (False, True):
        strategy, stream = made(synthetic("task", n_tasks=2), AVALANCHES)
        for experience in stream.benchmark.train_stream:
            if often:
                for test in stream.benchmark.test_stream:
                    strategy.accuracy(test)
            strategy.train_task(experience)
        found.append(weights(strategy))
    assert torch.equal(*found)


def test_mean_loss_leaves_every_module_in_its_own_mode() -> None:
    strategy, stream = made(synthetic(n_tasks=1), "finetune")
    strategy.model.train()
    strategy.model.trunk.eval()
    mean_loss(strategy.model, [stream.test[0]], 64)
    assert strategy.model.training
    assert not strategy.model.trunk.training


# ------------------------------------------------------------------------------------------------------------- settings


def refusal(strategy: str, scenario: Scenario = "task", **settings: Any) -> str:
    """Return the one line that refuses a recipe."""
    with pytest.raises(UserError) as caught:
        check(resolve(synthetic(scenario), recipe(strategy, **settings)))
    assert len(caught.value.lines) == 1
    return caught.value.lines[0]


def test_a_wrong_setting_is_named_with_the_nearest_right_one() -> None:
    er: dict[str, Any] = {"buffer": 10, "policy": "ring", "replay_batch_size": 4}
    assert "no setting 'bufer'. Did you mean 'buffer'?" in refusal("clbench.strategies.er:ER", **er, bufer=3)
    lwf: dict[str, Any] = {"alpha": 1, "temperature": 2}
    assert "no setting 'alfa'. Did you mean 'alpha'?" in refusal("avalanche.training:LwF", **lwf, alfa=3)


def test_a_missing_setting_is_named() -> None:
    assert "needs the setting 'policy'" in refusal("clbench.strategies.er:ER", buffer=10, replay_batch_size=4)
    assert "needs the setting 'si_lambda'" in refusal("avalanche.training:SynapticIntelligence")


@pytest.mark.parametrize("wrong", ["much", "1000", True, float("inf"), float("nan"), [1.0]])
def test_a_setting_of_the_wrong_type_is_refused(wrong: Any) -> None:
    """Text that looks like a number is text; a strength that is not finite is none."""
    line = refusal("clbench.strategies.ewc:EWC", lam=wrong, fisher="exact", mode="online")
    assert "setting 'lam'" in line
    assert repr(wrong) in line
    assert "setting 'patterns_per_exp'" in refusal("avalanche.training:AGEM", patterns_per_exp="ten", sample_size=8)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        check(resolve(synthetic(), recipe("clbench.strategies.ewc:EWC", lambda_=1.0, fisher="exact", modes="online")))
    assert len(caught.value.lines) == 4


def test_a_whole_number_is_a_number() -> None:
    baseline = recipe("clbench.strategies.ewc:EWC", lam=1000, fisher="exact", mode="online")
    assert resolved_settings(resolve(synthetic(), baseline))["lam"] == 1000.0


def test_defaults_are_part_of_the_record_foreign_ones_too() -> None:
    settings = resolved_settings(resolve(synthetic("domain"), recipe("avalanche.training:DER", alpha=0.3)))
    assert settings == {"alpha": 0.3, "beta": 0.5, "mem_size": 200}
    own = recipe("clbench.strategies.ewc:EWC", lam=1.0, fisher="exact", mode="online")
    assert resolved_settings(resolve(synthetic(), own))["fisher_batch_size"] == 128


def test_settings_are_the_constructors_own_arguments() -> None:
    assert set(foreign_parameters(StockSI)) == {"si_lambda", "eps"}


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ("avalanche.training:LWF", "Did you mean"),
        ("avalanche.trainin:LwF", "no module"),
        ("avalanche.training", "module:Name"),
        ("avalanche.training:EWC.update", "EWC.update"),
        ("collections:OrderedDict", "is no strategy"),
        ("math:sqrt", "is no class"),
        ("nowhere.py:Own", "no file"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(strategy: str, says: str) -> None:
    assert says in refusal(strategy)


def test_a_class_is_refused_where_its_recipe_says_that_it_does_not_work() -> None:
    """Avalanche's DER gives no task to the net."""
    theirs = recipe("avalanche.training:DER", "theirs").model_copy(update={"scenarios": ["class", "domain"]})
    with pytest.raises(UserError) as caught:
        run("synthetic_split", theirs)
    assert caught.value.lines == (
        "baseline 'theirs' is not defined in the task-incremental scenario of task 'synthetic_split'; it is in: class, "
        "domain",
    )


OWN = '''
from avalanche.training import Naive

class Mine(Naive):
    """Multiplies its loss."""

    def __init__(self, *, scale: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def criterion(self):
        return self.scale * super().criterion()
'''


def test_a_class_in_a_file_beside_the_recipe_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "mine.toml").write_text(
        'schema = 1\ntitle = "Mine"\nstrategy = "mine.py:Mine"\nfamily = "own"\npaper = "none"\nsettings.scale = 0.5\n'
    )
    baseline = load_baseline(str(tmp_path / "mine.toml"))
    found = []
    for scale in (0.5, 2.0):
        experiment = resolve(load_task("synthetic_split"), baseline, {"scale": scale})
        assert resolved_settings(experiment) == {"scale": scale}
        strategy, stream = made(synthetic("domain", n_tasks=1, optimizer="sgd", lr=0.1), baseline, scale=scale)
        assert isinstance(strategy, Foreign)
        strategy.train_task(stream.benchmark.train_stream[0])
        found.append(weights(strategy))
    assert not torch.equal(*found)


def test_who_overrides_accuracy_which_nothing_asks_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from clbench.strategies.base import Strategy\n\n"
        "class Mine(Strategy):\n    def accuracy(self, experience):\n        return 1.0\n"
    )
    (tmp_path / "mine.toml").write_text(
        'schema = 1\ntitle = "Mine"\nstrategy = "mine.py:Mine"\nfamily = "own"\npaper = "none"\n'
    )
    with pytest.raises(UserError, match="overrides accuracy, which nothing asks: override evaluate"):
        check(resolve(synthetic(), load_baseline(str(tmp_path / "mine.toml"))))


def test_what_a_strategy_of_avalanches_says_of_its_arguments_is_told_before_a_run() -> None:
    """A class of the user's own, whose constructor has a bug, is left to the run: its record keeps the traceback."""
    wrong = recipe("avalanche.training.supervised:EWC", ewc_lambda=1.0, mode="neither")
    (line,) = preflight([resolve(load_task("synthetic_split"), wrong)])
    assert line.startswith("task 'synthetic_split': baseline 'own': Mode must be separate or online")
    own = recipe(f"{__name__}:_Broken")
    assert preflight([resolve(load_task("synthetic_split"), own)]) == []


class _Broken(Naive):
    """Cannot be made."""

    def __init__(self, **kwargs: Any) -> None:
        raise ValueError("a bug")
