"""What a recipe may say: the typed form of `tasks/*.toml` and `baselines/*.toml`.

Pure data, without torch: `recipes` reads files into these, `streams`, `nets` and the strategies build from them, the
report prints them. Unknown keys, wrong types and values out of range are refused here.

Letters: T tasks, C classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from clbench.published_row import PublishedRow
from clbench.spec import Spec, content_hash

Scenario = Literal["task", "domain", "class"]


# ------------------------------------------------------------------------------------------------------------ streams


class Pixels(Spec):
    """Mean and standard deviation per channel, on pixels in [0, 1]."""

    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]


class _Stream(Spec):
    scenario: Scenario
    """task: the task is named at test time. domain: same labels in every task, no name. class: all classes so far."""
    pad: int = Field(0, ge=0)
    """Zero pixels added on every side before anything else; 2 makes 28x28 into 32x32."""
    normalise: Literal["unit", "dataset"] | Pixels = "unit"
    """unit: pixels / 255. dataset: then minus the data set's usual mean, by its deviation. Or own mean and std."""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """crop_flip: random crop after padding by 4, random horizontal flip; training only. crop: without the flip, and
    padded with black, where crop_flip pads what is normalised already with zeros."""
    train_samples_per_task: int | None = Field(None, gt=0)
    """Training samples kept per task, drawn from the run's order seed; None keeps all."""
    test_samples_per_task: int | None = Field(None, gt=0)
    """Test samples kept per task; None keeps all. Only for demos and quick tests."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of each task's training samples set aside for validation."""
    validation_from: Literal["random", "first"] = "random"
    """random: drawn from the order seed. first: the first share in the data set's own order (GPM, WSN)."""


class PermutedStream(_Stream):
    """Permuted pixels: task i sees every image through its own fixed permutation (Goodfellow et al. 2013)."""

    kind: Literal["permuted"]
    dataset: str
    n_tasks: int = Field(gt=0)
    identity_first: bool = False
    """Task 1 keeps its pixels in place."""
    permutations: Literal["seeded", "sequential", "gpm"] = "seeded"
    """seeded: one generator a task. sequential: T calls of one legacy NumPy generator, as DEN's and HNET's code does.
    gpm: sklearn.utils.shuffle with seeds r * 100 + i over shuffled task numbers r, as GPM's, WSN's and HAT's code."""
    permutation_seed: int | None = Field(None, ge=0)
    """Pins the permutations for every run seed; None draws them from the run's seed."""


class RotatedStream(_Stream):
    """Rotated images: task i sees every image turned by its own angle (nearest pixel, zeros outside)."""

    kind: Literal["rotated"]
    dataset: str
    n_tasks: int = Field(gt=0)
    angles: Literal["independent", "bins", "increasing"]
    """independent: uniform in [0, max_degrees] (mammoth). bins: uniform inside each of T equal bins (GEM).
    increasing: i * max_degrees / T, no randomness."""
    max_degrees: float = Field(180.0, gt=0, le=360)
    angle_seed: int | None = Field(None, ge=0)
    """Pins the angles for every run seed."""


class SplitPart(Spec):
    """A run of tasks cut from one data set."""

    dataset: str
    n_tasks: int = Field(gt=0)
    classes_per_task: int | list[Annotated[int, Field(gt=0)]]
    """One number for every task, or one per task."""
    by: Literal["class", "superclass"] = "class"
    """superclass: task i holds the fine classes of the i-th superclass in the order (CIFAR-100 only)."""
    order: Literal["fixed", "shuffled"] | list[int] = "fixed"
    """Order of classes (or superclasses): as numbered, shuffled per run seed, or as listed."""
    order_seed: int | None = Field(None, ge=0)
    """Pins a shuffled order for every run seed."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> SplitPart:
        if isinstance(self.classes_per_task, list) and len(self.classes_per_task) != self.n_tasks:
            raise ValueError(f"classes_per_task lists {len(self.classes_per_task)} tasks, n_tasks is {self.n_tasks}")
        return self


class SplitStream(_Stream):
    """Disjoint classes per task, from one data set or several in a row."""

    kind: Literal["split"]
    parts: Annotated[list[SplitPart], Field(min_length=1)]

    @property
    def n_tasks(self) -> int:
        """T."""
        return sum(part.n_tasks for part in self.parts)


StreamSpec = Annotated[PermutedStream | RotatedStream | SplitStream, Field(discriminator="kind")]


class Selection(Spec):
    """A stream to choose settings on: the first tasks of another one, held-out training samples in place of its test.

    No recipe says this: `clbench.tuning` makes it. What it says is all that a run gets to see, so that no run made from
    it can read a test sample.
    """

    of: PermutedStream | RotatedStream | SplitStream
    n_tasks: int = Field(gt=0)
    """The first so many of its tasks."""
    share: float = Field(gt=0, lt=1)
    """Share of each task's training samples that is held out, where the stream itself sets none aside."""

    @property
    def scenario(self) -> Scenario:
        """That of the stream."""
        return self.of.scenario


def tasks_in_all(stream: PermutedStream | RotatedStream | SplitStream | Selection) -> int:
    """Return how many tasks a stream has, or the one that a selection is of.

    What a method sizes for all tasks is then of one size where its settings are chosen and where they are used.
    """
    return stream.of.n_tasks if isinstance(stream, Selection) else stream.n_tasks


def datasets_of(stream: PermutedStream | RotatedStream | SplitStream | Selection) -> list[str]:
    """Return the names of the data sets a stream reads, in order, each once."""
    if isinstance(stream, Selection):
        return datasets_of(stream.of)
    if isinstance(stream, SplitStream):
        return list(dict.fromkeys(part.dataset for part in stream.parts))
    return [stream.dataset]


# --------------------------------------------------------------------------------------------------------------- nets


class _Model(Spec):
    class_head: Literal["growing", "fixed"] = "growing"
    """Class-incremental only. growing: logits for the classes seen so far. fixed: for all classes from the start."""


class MLPModel(_Model):
    """Fully connected ReLU net."""

    kind: Literal["mlp"]
    hidden: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]
    bias: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    init: Literal["torch", "xavier"] = "torch"
    """xavier: uniform by Glorot & Bengio 2010, biases zero; for nets with one head that is there from the start."""

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the key out where it changes nothing: recipes that never named it keep their hash."""
        return {key: value for key, value in dump(self).items() if key != "init" or value != "torch"}


class NormedMLPModel(_Model):
    """Fully connected ReLU net with batch normalisation in the place of biases."""

    kind: Literal["normed_mlp"]
    hidden: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]


class ZenkeModel(_Model):
    """The small conv net of SI and HNET: 2 x (conv, conv, pool, dropout), one hidden layer."""

    kind: Literal["zenke"]
    channels: tuple[int, int] = (32, 64)
    hidden: int = Field(512, gt=0)
    dropout: tuple[float, float] = (0.25, 0.5)


class LeNetModel(_Model):
    """LeNet-like: 2 x (5x5 conv, pool), two hidden layers (APD: 20-50-800-500)."""

    kind: Literal["lenet"]
    channels: tuple[int, int] = (20, 50)
    hidden: tuple[int, int] = (800, 500)
    response_norm: bool = True
    """Off for methods that cut units out of a net: the normalisation lets neighbouring channels change each other."""

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the key out where it changes nothing: recipes that never named it keep their hash."""
        return {key: value for key, value in dump(self).items() if key != "response_norm" or not value}


class ResNet18Model(_Model):
    """ResNet-18 for small images; width 64 is the usual one, 20 the slim one of GEM."""

    kind: Literal["resnet18"]
    width: int = Field(64, gt=0)


class ResNet32Model(_Model):
    """The CIFAR ResNet of He et al. 2016 with 32 layers."""

    kind: Literal["resnet32"]


class OwnModel(_Model):
    """A user's own trunk: `factory` names a callable `f(input_shape, **settings) -> nn.Module` with `out_features`."""

    kind: Literal["own"]
    factory: str
    settings: dict[str, Any] = Field(default_factory=dict)


ModelSpec = Annotated[
    MLPModel | NormedMLPModel | ZenkeModel | LeNetModel | ResNet18Model | ResNet32Model | OwnModel,
    Field(discriminator="kind"),
]

# ----------------------------------------------------------------------------------------------------------- training


class StepSchedule(Spec):
    """Learning rate times `gamma` at each of the listed epochs of a task."""

    kind: Literal["step"]
    milestones: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]
    gamma: float = Field(gt=0, lt=1)


class PlateauSchedule(Spec):
    """Learning rate times `factor` after `patience` epochs without a better validation loss; stop below `min_lr`."""

    kind: Literal["plateau"]
    factor: float = Field(gt=0, lt=1)
    patience: int = Field(gt=0)
    min_lr: float = Field(gt=0)


class RestartSchedule(Spec):
    """Cosine cycles with warm restarts (Loshchilov & Hutter 2017, SGDR), each twice as long as the one before.

    After `warmup` epochs at a tenth of the learning rate, cycles of 1, 2, 4, ... epochs; epoch e of a cycle of n has
    min_lr + (lr - min_lr) (1 + cos(pi e / n)) / 2.
    """

    kind: Literal["restarts"]
    min_lr: float = Field(ge=0)
    warmup: int = Field(0, ge=0)


class TrainSpec(Spec):
    """The training budget of one task: either `epochs` or `iterations`."""

    epochs: int | None = Field(None, gt=0)
    iterations: int | None = Field(None, gt=0)
    """Optimiser steps per task, over as many reshuffled passes as that takes."""
    batch_size: int = Field(gt=0)
    optimizer: Literal["sgd", "adam", "adamw"]
    lr: float = Field(gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    """SGD only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam and AdamW only."""
    weight_decay: float = Field(0.0, ge=0)
    reset_optimizer: bool = True
    """Start every task with a fresh optimiser."""
    grad_clip: float | None = Field(None, gt=0)
    """Clip the gradient's global L2 norm."""
    eval_batch_size: int = Field(500, gt=0)
    schedule: Annotated[StepSchedule | PlateauSchedule | RestartSchedule, Field(discriminator="kind")] | None = None

    @model_validator(mode="after")
    def _one_budget(self) -> TrainSpec:
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError("give exactly one of epochs and iterations")
        if self.schedule is not None and self.epochs is None:
            raise ValueError("a schedule counts epochs: give epochs, not iterations")
        return self


class TaskSpec(Spec):
    """One published protocol: stream + model + training budget."""

    schema_number: Literal[1] = Field(1, alias="schema")
    version: int = Field(gt=0)
    """Raised when older numbers stop being comparable."""
    title: str
    source: str
    """Where the protocol is published or coded."""
    note: str = ""
    """What differs from the source, what to expect, what it costs."""
    auroc: bool = False
    """Record the area under the ROC curve beside accuracy. Not in the hash: it changes no other number."""
    entropy: bool = False
    """Record the accuracy with the task inferred, by the lowest entropy, too. Task-incremental; not in the hash."""
    stream: StreamSpec
    model: ModelSpec
    train: TrainSpec

    name: str = ""
    """From the file's name."""

    @model_validator(mode="after")
    def _tasks_are_named(self) -> TaskSpec:
        if self.entropy and self.stream.scenario != "task":
            raise ValueError("entropy infers a task that has a name: only where stream.scenario is 'task'")
        return self

    @property
    def hash(self) -> str:
        """Covers everything that changes numbers, and nothing else."""
        return content_hash(
            {
                "version": self.version,
                "stream": self.stream.model_dump(mode="json"),
                "model": self.model.model_dump(mode="json"),
                "train": self.train.model_dump(mode="json"),
            }
        )


# ---------------------------------------------------------------------------------------------------------- baselines


def values_to_try(value: Any) -> Any:
    """Return a list of values to try as it is, or a table of such lists.

    Raises:
        ValueError: anything else, an empty list, or one that says a value twice.
    """
    for name, values in value.items() if isinstance(value, dict) else [("", value)]:
        where = f"'{name}' " if name else ""
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}should be a list of values to try, such as [1.0, 10.0]")
        if len({content_hash(one) for one in values}) < len(values):
            raise ValueError(f"{where}says a value twice")
    return value


Grid = dict[str, Annotated[Any, BeforeValidator(values_to_try)]]
"""Setting to the values that `clbench tune` tries; `train` and `model` to tables of such lists."""


class OnTask(BaseModel):
    """What a baseline does on one task; every key that is not listed here is a setting of the strategy."""

    model_config = ConfigDict(extra="allow", frozen=True)

    origin: str
    """Where the settings come from: "paper: ...", "authors' code: ..." or "ours: ..."."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Changes to the task's training budget."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Changes to the task's model."""
    published: list[PublishedRow] = Field(default_factory=list)
    tune: Grid = Field(default_factory=dict)
    """What `clbench tune` tries on this task, in place of the baseline's `tune`."""

    @property
    def settings(self) -> dict[str, Any]:
        """The strategy's settings on this task."""
        return dict(self.model_extra or {})


class BaselineSpec(Spec):
    """One method with its settings per protocol."""

    schema_number: Literal[1] = Field(1, alias="schema")
    title: str
    strategy: str
    """`module:Class`, or `file.py:Class` beside the recipe; built-in, a user's own or Avalanche's."""
    family: str
    """Groups the tables: bounds, regularisation, replay, expansion, sharing, hypernetwork, ..."""
    paper: str
    note: str = ""
    scenarios: list[Scenario] = Field(default_factory=lambda: list(get_args(Scenario)))
    """Where the method works; for classes that cannot say so themselves."""
    extends: str | None = None
    """A baseline whose every key this one takes over unless it sets it."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings on every task."""
    tune: Grid = Field(default_factory=dict)
    """What `clbench tune` tries."""
    on: dict[str, OnTask] = Field(default_factory=dict)

    name: str = ""
    folder: str = ""
    """Of the recipe: where `file.py:Class` is looked up."""
