"""The net of generated weights: equal to the plain one, nothing left over, weights kept just as long as they hold."""

from __future__ import annotations

import copy
import io
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clbench.nets import HeadedNet, MultiHead, build_trunk
from clbench.nets.hypernet import Chunked, Full, Generator, HyperNet, LowRank, Structured, Target
from clbench.nets.hypernet.generators import Joint
from clbench.tensors import unique_elements

NETS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [9, 7]},
    "lenet": {"channels": (3, 4), "hidden": (6, 5)},
    "resnet18": {"width": 2},
}
IMAGES = (3, 8, 8)


def plain(kind: str = "mlp") -> HeadedNet:
    """Return the net that is taken apart, or compared with."""
    torch.manual_seed(0)
    trunk = build_trunk(kind, IMAGES, **NETS[kind])
    return HeadedNet(trunk, MultiHead(trunk.out_features, 0))


def hyper(kind: str = "mlp", norms: bool = True, tasks: int = 2, **settings: Any) -> HyperNet:
    """Return a chunked hypernet that has observed tasks of two classes."""
    net = plain(kind)
    generator = Chunked(Target(net.trunk, norms), 4, 50, 3, (5,))
    made = HyperNet(net, 0, generator, **settings)
    for task in range(tasks):
        made.observe(task, [0, 1])
    return made


def images(n: int = 6) -> Tensor:
    return torch.rand(n, *IMAGES, generator=torch.Generator().manual_seed(5))


def constant(generator: Generator, weights: Tensor) -> None:
    """Make a Full generator put out `weights`, whatever the embedding: no weights, all bias."""
    head = generator.head
    assert isinstance(head, Joint)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(weights)


# -------------------------------------------------------------------------------------------------------- the plain net


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("kind", NETS)
def test_a_hypernet_that_puts_out_a_constant_is_the_plain_net(kind: str, norms: bool) -> None:
    """Logits bit for bit, in training and in evaluation, running statistics, and the gradient of what is generated.

    The generator's last layer has weights 0, so that the gradient of its biases is that of the plain net's weights.
    """
    net, twin, x = plain(kind), plain(kind), images()
    target = Target(net.trunk, norms)
    generator = Full(target, 3)
    constant(generator, target.flat(dict(net.trunk.named_parameters())))
    made = HyperNet(net, 0, generator)
    for each in (made, twin):
        each.observe(4, [0, 1, 2])
    state = torch.get_rng_state()
    answered, expected = made(x, 4), twin(x, 4)
    assert answered.equal(expected)
    for logits in (answered, expected):
        logits.square().sum().backward()
    gradient = target.flat({name: cast(Tensor, p.grad) for name, p in twin.trunk.named_parameters()})
    torch.testing.assert_close(cast(Tensor, generator.head.bias.grad), gradient, rtol=1e-5, atol=1e-6)
    assert torch.get_rng_state().equal(state)
    with torch.no_grad():
        assert made.eval()(x, 4).equal(twin.eval()(x, 4))
    own = dict(made.part(4).own.named())
    assert all(own[name].equal(value) for name, value in twin.trunk.named_buffers())


@pytest.mark.parametrize("kind", NETS)
def test_answers_are_those_of_a_functional_call_with_what_is_generated(kind: str) -> None:
    made, twin, x = hyper(kind).eval(), plain(kind).trunk.eval(), images()
    for task in (0, 1, 7):
        tensors = {**made.generate(task), **made.part(task).own.named()}
        expected = made.head(functional_call(twin, tensors, (x,)), task)
        assert made(x, task).equal(expected)
        assert made.generator.target.flat(made.generate(task)).equal(made.flat(task))


def test_a_batch_of_several_tasks_is_answered_by_each_tasks_weights() -> None:
    made, x = hyper().eval(), images()
    mixed = made(x, torch.tensor([1, 0, 0, 1, 0, 1]))
    torch.testing.assert_close(mixed[[0, 3, 5]], made(x[[0, 3, 5]], 1))
    torch.testing.assert_close(mixed[[1, 2, 4]], made(x[[1, 2, 4]], 0))


def test_every_parameter_learns() -> None:
    """All tasks' embeddings, heads and the generator have a gradient after a loss over all tasks."""
    made = hyper("resnet18", norms=False)
    torch.autograd.backward([made(images(), task).square().sum() for task in (0, 1)])
    assert all(parameter.grad is not None for parameter in made.parameters())


# ---------------------------------------------------------------------------------------------------- nothing left over


def test_nothing_of_the_trunk_is_left_to_count_decay_or_save() -> None:
    """P = 192 * 9 + 9 + 9 * 7 + 7 = 1,807 of the MLP are gone; there are generator, embeddings and heads.

    Generator: 37 chunks of 50; 5 * (4 + 3 + 1) + 50 * 6 + 37 * 3 = 451. Two tasks: 2 * (4 + 7 * 2 + 2) = 40.
    """
    made = hyper()
    assert made.generator.target.size == 1_807
    assert unique_elements(made.parameters()) == 451 + 40
    assert not list(made.trunk.parameters())
    assert not [key for key in made.state_dict() if key.startswith("trunk.")]
    assert made.generator.parameters_with(2) == 451 + 8
    assert made.compression() == 459 / 1_807
    own = {task: unique_elements(parameters) for task, parameters in made.task_parameters().items()}
    assert own == {0: 20, 1: 20}


def test_the_trunk_is_empty_again_after_an_answer_and_after_an_error() -> None:
    made = hyper("resnet18")
    made(images(), 0)
    with pytest.raises(RuntimeError):
        made(torch.rand(2, 5, 8, 8), 0)
    assert not list(made.trunk.parameters())
    assert not list(made.trunk.buffers())


def test_running_statistics_are_a_tasks_own_or_those_of_the_batch() -> None:
    """By task: training on one moves its statistics alone. By batch: there are none, in evaluation neither."""
    by_task, by_batch, x = hyper("resnet18"), hyper("resnet18", statistics="batch"), images()
    before = {task: copy.deepcopy(by_task.part(task).own.state_dict()) for task in (0, 1)}
    by_task(x, 0)
    after = {task: by_task.part(task).own.state_dict() for task in (0, 1)}
    assert all(after[1][key].equal(before[1][key]) for key in before[1])
    assert not any(after[0][key].equal(before[0][key]) for key in before[0])
    assert int(after[0]["norm/num_batches_tracked"]) == 1

    assert not unique_elements(by_batch.buffers())
    trained = by_batch(x, 0)
    with torch.no_grad():
        torch.testing.assert_close(by_batch.eval()(x, 0), trained)


def test_a_net_moves_copies_and_is_restored() -> None:
    """float64 by `to`; a copy answers the same and is apart; a fresh net with the state answers the same."""
    for kind, norms in (("mlp", True), ("resnet18", False)):
        made, x = hyper(kind, norms, tasks=3), images()
        made(x, 2)
        twin, fresh = copy.deepcopy(made), hyper(kind, norms, tasks=0)
        fresh.load_state_dict(dict(made.state_dict()))  # without the metadata that a state dict of its own has
        assert [name for name, _ in fresh.named_parameters()] == [name for name, _ in made.named_parameters()]
        with torch.no_grad():
            answers = [net.eval()(x, 2) for net in (made, twin, fresh)]
            assert answers[0].equal(answers[1])
            assert answers[0].equal(answers[2])
            for parameter in twin.generator.parameters():
                parameter.zero_()
            assert made(x, 2).equal(answers[0])
        double = made.double()
        assert double(x.double(), 2).dtype == torch.float64
        torch.testing.assert_close(double(x.double(), 2).float(), answers[0], rtol=1e-4, atol=1e-5)
        double.observe(9, [0, 1])
        assert double.embedding(9).dtype == torch.float64


def test_a_pickled_net_comes_back_without_what_it_kept() -> None:
    made, x = hyper().eval(), images()
    with torch.no_grad():
        answer = made(x, 0)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert not back._kept
    assert back(x, 0).equal(answer)


def test_unseen_tasks_are_answered_with_what_they_will_be_born_with() -> None:
    made, x = hyper().eval(), images()
    made.head.expected = {5: 2}  # type: ignore[assignment]  # a MultiHead's
    before = made(x, 5)
    assert 5 not in made.tasks()
    assert made(x, 5).equal(before)
    made.observe(5, [0, 1])
    assert made(x, 5).equal(before)
    assert made.embedding(5).equal(hyper(tasks=0).embedding(5))
    assert not made.embedding(5).equal(made.embedding(0))


# ------------------------------------------------------------------------------------------------ weights that are kept


class Counted(Full):
    """Counts how often it generates."""

    calls = 0

    def forward(self, embedding: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(embedding)


def counted(kept_tasks: int = 1) -> tuple[HyperNet, Counted]:
    net = plain()
    generator = Counted(Target(net.trunk), 3, (2,), "tanh")
    made = HyperNet(net, 0, generator, kept_tasks=kept_tasks)
    for task in (0, 1):
        made.observe(task, [0, 1])
    return made.eval(), generator


def as_if_nothing_was_kept(made: HyperNet, x: Tensor, task: int) -> Tensor:
    """Answer with weights made now."""
    features = functional_call(plain().trunk, made.generate(task), (x,))
    logits: Tensor = made.head(features, task)
    return logits


@torch.no_grad()
def test_evaluation_generates_once_and_training_at_every_call() -> None:
    made, generator = counted()
    for _ in range(3):
        made(images(), 0)
    assert generator.calls == 1
    made.train()
    for _ in range(3):
        made(images(), 0)
    assert generator.calls == 4


@pytest.mark.parametrize(("kept_tasks", "calls"), [(0, 6), (1, 6), (2, 2)])
@torch.no_grad()
def test_weights_of_so_many_tasks_are_kept(kept_tasks: int, calls: int) -> None:
    """Two tasks in turn, three times: with room for one, each drives out the other."""
    made, generator = counted(kept_tasks)
    for task in (0, 1) * 3:
        made(images(), task)
    assert generator.calls == calls
    assert len(made._kept) == kept_tasks


def test_evaluation_with_gradients_has_a_graph() -> None:
    made, _ = counted()
    with torch.no_grad():
        made(images(), 0)
    torch.autograd.backward(made(images(), 0).sum())
    assert made.embedding(0).grad is not None
    assert all(parameter.grad is not None for parameter in made.generator.parameters())


def stepped(made: HyperNet, optimizer: torch.optim.Optimizer) -> None:
    with torch.enable_grad():
        torch.autograd.backward(F.cross_entropy(made(images(), 0), torch.tensor([0, 1, 0, 1, 0, 1])))
    optimizer.step()


def changed_by_step(made: HyperNet) -> None:
    stepped(made, torch.optim.SGD(made.parameters(), 0.5))


def changed_by_fused_adam(made: HyperNet) -> None:
    stepped(made, torch.optim.Adam(made.parameters(), 0.5, fused=True))


def changed_by_foreach_adamw(made: HyperNet) -> None:
    stepped(made, torch.optim.AdamW(made.generator.parameters(), 0.5, foreach=True))


def changed_embedding_only(made: HyperNet) -> None:
    stepped(made, torch.optim.SGD([made.embedding(0)], 0.5))


def changed_by_loading(made: HyperNet) -> None:
    made.load_state_dict({key: value + 1 for key, value in made.state_dict().items()})


def changed_by_assigning(made: HyperNet) -> None:
    made.load_state_dict({key: value + 1 for key, value in made.state_dict().items()}, assign=True)


def changed_object(made: HyperNet) -> None:
    head = cast(Joint, made.generator.head)
    head.bias = nn.Parameter(head.bias.detach() + 1)


def changed_data(made: HyperNet) -> None:
    head = cast(Joint, made.generator.head)
    head.bias.data = head.bias.detach() + 1


@pytest.mark.parametrize(
    "change",
    [
        changed_by_step, changed_by_fused_adam, changed_by_foreach_adamw, changed_embedding_only, changed_by_loading,
        changed_by_assigning, changed_object, changed_data,
    ],
)  # fmt: skip
@torch.no_grad()
def test_weights_kept_are_dropped_when_what_they_were_made_of_changes(change: Any) -> None:
    """Two tasks' weights are kept; whatever changed, what is answered next is what is generated next."""
    made, _ = counted(2)
    before = [made(images(), task) for task in (0, 1)]
    change(made)
    made.eval()
    for task in (0, 1):
        torch.testing.assert_close(made(images(), task), as_if_nothing_was_kept(made, images(), task))
    assert not made(images(), 0).equal(before[0])


@torch.no_grad()
def test_a_write_through_data_is_seen_after_invalidate_alone() -> None:
    """`.data` has a version of its own, and the address stays: nothing tells of the write."""
    made, _ = counted()
    before = made(images(), 0)
    cast(Joint, made.generator.head).bias.data.add_(1)
    assert made(images(), 0).equal(before)
    made.invalidate()
    torch.testing.assert_close(made(images(), 0), as_if_nothing_was_kept(made, images(), 0))
    assert not made(images(), 0).equal(before)


@torch.no_grad()
def test_a_write_into_weights_that_are_kept_does_not_stay() -> None:
    """`weights` hands out what is kept; who writes into it writes into a draft."""
    made, generator = counted()
    before = made(images(), 0)
    next(iter(made.weights(made.part(0)).values())).add_(1)
    assert made(images(), 0).equal(before)
    assert generator.calls == 2


def test_weights_made_in_inference_mode_are_kept_too() -> None:
    """They have no version to look at."""
    made, generator = counted()
    with torch.inference_mode():
        assert made(images(), 0).equal(made(images(), 0))
    assert generator.calls == 1


@torch.no_grad()
def test_other_tasks_and_copies_do_not_meet_what_was_kept() -> None:
    made, _ = counted()
    made(images(), 0)
    torch.testing.assert_close(made(images(), 1), as_if_nothing_was_kept(made, images(), 1))
    cast(Joint, made.generator.head).bias.add_(1)  # what is kept does not hold any more
    twin = copy.deepcopy(made)
    assert not twin._kept
    torch.testing.assert_close(twin(images(), 1), as_if_nothing_was_kept(made, images(), 1))


def test_inference_mode_may_keep_weights_and_training_goes_on_after_it() -> None:
    made, generator = counted()
    with torch.inference_mode():
        made(images(), 0)
        made(images(), 0)
    assert generator.calls == 1
    with torch.no_grad():
        made(images(), 0)
    made.train()
    torch.autograd.backward(made(images(), 0).sum())
    assert made.embedding(0).grad is not None


# ----------------------------------------------------------------------------------------------------- other generators


@pytest.mark.parametrize(
    "make",
    [
        lambda target: Full(target, 3, (8,), "tanh"),
        lambda target: Chunked(target, 3, 40, 2, (8,), "tanh", task_conditioned=True),
        lambda target: Structured(target, 3, (8,), piece=60, activation="tanh"),
        lambda target: LowRank(target, 3, 2),
    ],
    ids=["full", "a task's own chunks", "structured", "low-rank"],
)
def test_any_generator_learns_two_tasks_at_once(make: Any) -> None:
    """Opposite labels for the same images: each task's loss falls by half with its own embedding and head."""
    net = plain()
    made, x = HyperNet(net, 0, make(Target(net.trunk))), images(16)
    for task in (0, 1):
        made.observe(task, [0, 1])
    y = torch.arange(16) % 2
    x[y == 1, :, :4] += 1
    optimizer, losses = torch.optim.Adam(made.parameters(), 0.005), []
    for _ in range(60):
        loss = F.cross_entropy(made(x, 0), y) + F.cross_entropy(made(x, 1), 1 - y)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda net: HyperNet(net, 0, Full(Target(plain("lenet").trunk), 3)), "not the trunk of this target"),
        (lambda net: HyperNet(net, 0, Full(Target(net.trunk), 3), statistics="none"), "by task or by batch"),  # type: ignore[arg-type]  # the mistake
        (lambda net: HyperNet(net, 0, Full(Target(net.trunk), 3), kept_tasks=-1), "kept_tasks is -1"),
    ],
)
def test_mistakes_are_told_in_one_line(make: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line) as refused:
        make(plain())
    assert "\n" not in str(refused.value)


def test_a_trunk_taken_apart_is_no_target() -> None:
    with pytest.raises(ValueError, match="nothing to generate"):
        Target(hyper().trunk)
