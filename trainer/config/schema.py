"""The recipe: every key a user may write, its type, its default and what it does.

Owns: the pydantic models. Loading YAML, overrides and error messages are `load.py`. A recipe is checked whole before
any process is spawned; what depends on the machine (world size) is checked by `trainer.run.prepare`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.tasks.spec import TaskSpec

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The pretrained (or random) backbone."""

    path: str | None = None
    """Local directory, hub name, or `package:NAME` for an installed Python package that carries a model folder."""
    config: dict[str, Any] | None = None
    """Instead of `path`: a transformers config with `model_type`, for a model with random weights."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer; defaults to `path`. Needed with `config`."""
    max_length: Annotated[int, Field(ge=8)] = 256
    """Longest sequence in tokens. Longer text is truncated (counted and reported); span contexts are windowed."""
    max_target_length: Annotated[int, Field(ge=2)] = 64
    """Longest target of a seq2seq row in tokens; also the most tokens generated in evaluation."""
    span_stride: Annotated[int, Field(ge=0)] = 64
    """Overlap in tokens between the windows of a long span context."""
    span_windows: Positive = 4
    """Most windows of one context in training (those around the answer); evaluation always sees the whole context."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation of transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    dropout: Share | None = None
    """Overrides every dropout rate of the backbone; None keeps the model's own."""


class HeadsConfig(Section):
    """The packed head: all small task heads live in one parameter."""

    share_multiple_choice: bool = True
    """One scoring head for all multiple-choice tasks (MUPPET: a head each overfits)."""
    share_span: bool = True
    """One start/end head for all span tasks (MUPPET)."""
    dropout: Share | None = None
    """Dropout before the heads; None takes the backbone's classifier dropout."""
    spectral: bool = False
    """Divide each head by its largest singular value (R4F, with `loss.r3f`). Not of language modelling."""


class SamplingRule(StrEnum):
    """How a task's rate follows from its size."""

    PROPORTIONAL = "proportional"
    TEMPERATURE = "temperature"
    CAPPED = "capped"
    EQUAL = "equal"
    FIXED = "fixed"


class SamplingConfig(Section):
    """How often each task is drawn. Rates are shares of *examples*, as in MUPPET, T5 and SeqIO."""

    rule: SamplingRule = SamplingRule.PROPORTIONAL
    """proportional: n. temperature: n^(1/T). capped: min(n, cap). equal: 1. fixed: `rates`."""
    temperature: Annotated[float, Field(ge=1.0)] = 2.0
    """T of rule `temperature`."""
    cap: Positive | None = None
    """Most examples a task counts for: needed by rule `capped`, applied before the power by `temperature`."""
    rates: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    """Task -> rate for rule `fixed`; they are normalised to sum to 1 and every task needs one."""
    rows: dict[str, Annotated[float, Field(gt=0.0, le=1.0)]] = Field(default_factory=dict)
    """Task -> share of its training rows that is used, drawn by the seed; a smaller share is a part of a larger one."""


class Heterogeneity(StrEnum):
    """How tasks are spread over the micro-batches of a window."""

    RANK = "rank"
    STEP = "step"
    ROW = "row"


class WindowConfig(Section):
    """One optimizer step: `micro_batches` micro-batches over all ranks and micro-steps."""

    micro_batches: Positive = 8
    """Micro-batches per optimizer step over all ranks; each rank runs micro_batches / world size of them."""
    tokens: Annotated[int, Field(ge=16)] = 2048
    """Token budget (padding included) of one micro-batch."""
    heterogeneity: Heterogeneity = Heterogeneity.RANK
    """rank: each micro-batch draws its own task. step: ranks share a task within a micro-step. row: tasks mixed
    inside a micro-batch."""
    group: Positive | None = None
    """Micro-batches that share a task under `step`; None is the world size of the run's first start."""


class R3FConfig(Section):
    """R3F (arXiv 2008.03156): a second pass with noise on the embeddings should predict the same as the first. It takes
    the time and memory of another pass."""

    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Factor on the symmetric KL divergence of a prediction, beside its cross-entropy and scaled like it."""
    noise: Literal["uniform", "normal"] = "uniform"
    """uniform: between -size and size. normal: of standard deviation size."""
    size: Annotated[float, Field(gt=0.0)] = 1e-5
    """See `noise`. Below the digits of bf16 embeddings, which only dropout then tells apart."""
    every: Positive = 1
    """Windows between two that have it."""
    warmup: Annotated[float, Field(ge=0.0)] = 0.0
    """Over how many first windows the weight grows from 0: a share of all steps when below 1, else a number."""
    dropout: Literal["independent", "shared"] = "independent"
    """Whether the second pass draws its own dropout or repeats the first one's."""
    gradient: Literal["both", "clean", "noisy"] = "both"
    """Which pass the divergence is differentiated by. `clean` runs the other without a graph, which is cheaper."""


class LossConfig(Section):
    """What the loss of a window is."""

    scale: Literal["log_n", "none"] = "log_n"
    """log_n: each example's loss is divided by log of its number of possible outputs (MUPPET section 3)."""
    weights: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    """Task -> loss weight; 1 where absent."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Label smoothing of the seq2seq tasks (MUPPET smooths generation)."""
    regression_scale: Annotated[float, Field(gt=0.0)] = 10.0
    """Factor on the squared error of scores scaled to [0, 1]: log 1 = 0 gives no scale of its own."""
    mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of tokens masked for masked LM (80/10/10)."""
    r3f: R3FConfig | None = None
    """Regularise predictions against noise on the embeddings (`{}` for the defaults); null does not."""


class OptimizerConfig(Section):
    """AdamW and its schedule. A DeepSpeed JSON that sets the same value differently is an error naming both."""

    lr: Annotated[float, Field(gt=0.0)] = 5e-5
    """Peak learning rate of the backbone."""
    head_lr: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate of the heads; None is `lr`."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay of backbone matrices (never of biases and norms)."""
    head_weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decay of the packed head. 0 keeps heads of tasks not yet drawn exactly where they are (docs/sampling.md)."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    """AdamW's betas."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-6
    """AdamW's epsilon."""
    clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest gradient norm; 0 does not clip."""
    schedule: Literal["linear", "cosine", "constant", "polynomial"] = "linear"
    """Decay after the warm-up, to 0 at the last step (`constant` stays)."""
    warmup: Annotated[float, Field(ge=0.0)] = 0.06
    """Warm-up: a share of all steps when below 1, else a number of steps."""
    power: Annotated[float, Field(gt=0.0)] = 1.0
    """Power of the polynomial schedule."""


class TrainingConfig(Section):
    """Length, precision and housekeeping."""

    steps: Positive = 1000
    """Optimizer steps (windows)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, fp32 elsewhere, unless the DeepSpeed JSON says otherwise."""
    log_every: Positive = 10
    """Windows between two lines of metrics.jsonl and TensorBoard."""


class EvaluationConfig(Section):
    """Evaluation on dev rows, sharded over the ranks."""

    every: Annotated[int, Field(ge=0)] = 0
    """Windows between evaluations; 0 evaluates only before and after training."""
    before: bool = True
    """Evaluate before the first step, so that the final table can say what training changed."""
    max_rows: Annotated[int, Field(ge=0)] = 0
    """Most rows of a task per evaluation (the first by content hash); 0 is all."""
    tokens: Annotated[int, Field(ge=16)] | None = None
    """Token budget of an evaluation batch; None is twice the window's."""
    dev_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of train cut as dev for tasks without a dev split (by content hash; never trained on)."""
    dev_rows: Positive = 500
    """Most rows of that cut."""
    generate: bool = True
    """Decode seq2seq tasks for their text metrics; false reports their perplexity only."""


class EarlyStoppingConfig(Section):
    """Which number says how good a checkpoint is."""

    watch: str = "mean"
    """A task name, or `mean` over all tasks' primary metrics (perplexities excluded)."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Evaluations without improvement before stopping; 0 never stops early."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """Smallest change that counts as an improvement."""


class CheckpointConfig(Section):
    """Checkpoints under RUN/checkpoints."""

    every: Annotated[int, Field(ge=0)] = 0
    """Windows between checkpoints; 0 saves only at the end and when stopped."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Also keep the checkpoint of the best evaluation (`early_stopping.watch`)."""
    export: list[str] = Field(default_factory=lambda: ["backbone"])
    """Hugging Face models written to RUN/export at the end: `backbone`, or names of tasks for the model with that
    task's head. `sett export` writes any of them later."""


class HeldOutConfig(Section):
    """Rows of the end task that are kept out of training to see what helps it (docs/end-task-aware.md)."""

    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the end task's training rows that is cut off, by content hash, after any dev cut."""
    rows: Annotated[int, Field(ge=8)] = 256
    """Most rows of that cut."""
    batch: Annotated[int, Field(ge=0)] = 0
    """Rows of the cut that a refresh takes, a new draw each time; 0 takes all."""


class DevHeadConfig(Section):
    """The head through which the held-out loss is seen. It is made anew for every refresh and never trained with."""

    fit: Literal["converged", "steps", "training"] = "converged"
    """converged: the best head on frozen features (convex, L2). steps: a fresh head after `steps` steps of AdamW, as in
    TARTAN's code. training: the end task's own head as it stands. Language models always use their own."""
    rows: Literal["held_out", "train"] = "held_out"
    """What the head is fitted on: the held-out rows themselves, or as many training rows."""
    l2: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the squared norm of the head's weight, halved, beside the mean loss of a row (`converged`)."""
    steps: Positive = 10
    """Steps of AdamW (`steps`)."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Their learning rate (`steps`)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Their weight decay (`steps`)."""


class MetaConfig(Section):
    """Training for one end task: how much each task counts, learned online from held-out rows (META-TARTAN)."""

    end_task: str
    """The task that matters."""
    weights: Literal["alignment", "famo", "equal", "fixed"] = "alignment"
    """alignment: by the inner product of each task's gradient with the held-out gradient. famo: by changes of the
    tasks' own losses (FAMO). equal: one for all (MT-TARTAN). fixed: `initial`."""
    initial: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    """Task -> weight at the start, 1 where absent; they are scaled to sum to 1."""
    signal: Literal["cosine", "dot", "adam"] = "adam"
    """cosine: with both gradients' lengths taken out, as in TARTAN's code. dot: with one length for all tasks, so that
    steep tasks count more. adam: dot with a held-out gradient scaled as Adam would scale a step along it."""
    action: Literal["loss", "sampling"] = "loss"
    """What a weight does: multiply its task's loss, or draw the task as often; the expected loss is the same."""
    importance: bool = False
    """With action `sampling`: divide losses by how much oftener than by `sampling` their task is drawn, so that the
    weights change the variance of the gradient and not its mean."""
    every: Positive = 30
    """Windows between two refreshes of the held-out gradient; each ends with an update of the weights."""
    read: Literal["every", "refresh"] = "every"
    """Windows whose gradients are compared with it: every one, or those of a refresh only."""
    rate: Annotated[float, Field(gt=0.0)] | Literal["auto"] = "auto"
    """Change of a log-weight by a window and unit of signal (TARTAN: 0.01). auto: what lies beyond noise, relative to
    the spread of the tasks, times `strength` over the run."""
    strength: Annotated[float, Field(gt=0.0)] = 3.0
    """With rate `auto`: how far a log-weight moves over a whole run in which its task leads by one spread."""
    memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """What is left of older readings at an update; they are averaged with these weights."""
    floor: Share = 0.1
    """Least weight of the end task."""
    layers: Positive | None = 2
    """Compare gradients of that many last layers (of encoder and decoder each); null is all. Never of embeddings."""
    held_out: HeldOutConfig = HeldOutConfig()
    head: DevHeadConfig = DevHeadConfig()


class InitFromConfig(Section):
    """Start from the weights of a finished run of the same model instead of the pretrained ones."""

    run: Path | None = None
    """Its run directory."""
    checkpoint: Annotated[str, Field(pattern=r"^(best|last|\d+)$")] = "best"
    """`best`, `last` or a step number; `best` falls back on `last`."""
    heads: bool = False
    """Also take the heads of tasks that both runs have, by the same name, of the same kind and size."""


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")] = "run"
    """Name of the run."""
    output: Path = Path("runs")
    """Runs are written to `output/name`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Everything random is a pure function of this, the step and the row."""
    model: ModelConfig = ModelConfig()
    init_from: InitFromConfig = InitFromConfig()
    tasks: list[str | TaskSpec] = Field(default_factory=list)
    """Task folders with a task.json, globs of such folders, text to model (`masked_lm:PATH`, `causal_lm:PATH`), or
    declarations written out. At least one, unless every stage names its own."""
    exclude: list[str] = Field(default_factory=list)
    """Tasks to leave out: names, globs of names, or `family:NAME`."""
    take: Positive | None = None
    """Train on only so many of the tasks that are left, drawn by the seed; a smaller number takes a part of what a
    larger one takes. Null takes all."""
    sampling: SamplingConfig = SamplingConfig()
    window: WindowConfig = WindowConfig()
    heads: HeadsConfig = HeadsConfig()
    loss: LossConfig = LossConfig()
    meta: MetaConfig | None = None
    """One task matters most: how the weights of all follow from that. Without it `loss.weights` stay as they are."""
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deepspeed: str | dict[str, Any] = "zero3"
    """Name of a file in ds_configs/, path of a DeepSpeed JSON, or the JSON itself. `auto` values are filled in."""
    kernels: Literal["auto", "fused", "reference"] = "auto"
    """Who computes the losses: `fused` kernels, compiled on first use; plain PyTorch (`reference`); or fused wherever
    they can be compiled (`auto`)."""
    cache: Path | None = None
    """Token cache; None is $SETT_CACHE, else ~/.cache/sett."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that tokenise; 0 is one a core."""

    stages: list[dict[str, Any]] = Field(default_factory=list)
    """Runs one after the other, each from the best checkpoint of the one before: a `name`, and what it changes of this
    recipe ([stages](stages.md))."""
    carry_heads: bool = False
    """Stages also take over the heads of tasks that the stage before has too; a stage may say otherwise."""

    @property
    def run_dir(self) -> Path:
        return self.output / self.name

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.stages:  # each is checked as the recipe that it is (`stages.py`); this one alone need not make sense
            return self
        if self.carry_heads:
            raise ValueError("carry_heads: only used by stages; a single run says init_from.heads")
        if not self.tasks:
            raise ValueError("tasks: list should have at least 1 item: task folders, declarations, or masked_lm:PATH")
        if self.init_from.run is None and self.init_from != InitFromConfig():
            raise ValueError("init_from.run: missing: the run directory whose weights are wanted")
        if (self.model.path is None) == (self.model.config is None):
            raise ValueError("model: give exactly one of model.path and model.config")
        if self.model.config is not None and self.model.tokenizer is None:
            raise ValueError("model.tokenizer: a model from model.config needs a tokenizer (`sett tokenizer train`)")
        if self.model.config is not None and "model_type" not in self.model.config:
            raise ValueError("model.config.model_type: missing (for example 'bert', 't5' or 'llama')")
        if self.sampling.rule is SamplingRule.FIXED and not self.sampling.rates:
            raise ValueError("sampling.rates: rule 'fixed' needs a rate for every task")
        if self.sampling.rule is SamplingRule.CAPPED and self.sampling.cap is None:
            raise ValueError("sampling.cap: rule 'capped' needs it")
        if self.sampling.rates and self.sampling.rule is not SamplingRule.FIXED:
            raise ValueError(f"sampling.rates: only used by rule 'fixed', but sampling.rule is '{self.sampling.rule}'")
        if self.window.group is not None and self.window.heterogeneity is not Heterogeneity.STEP:
            raise ValueError("window.group: only used by window.heterogeneity 'step'")
        if self.early_stopping.patience and not self.evaluation.every:
            raise ValueError("early_stopping.patience: needs evaluation.every > 0")
        if self.meta is not None and self.window.heterogeneity is Heterogeneity.ROW:
            raise ValueError(
                "window.heterogeneity: 'row' mixes tasks in a micro-batch, so that no gradient is a task's "
                "own; meta needs 'rank' or 'step'"
            )
        if self.model.span_stride * 2 > self.model.max_length:
            raise ValueError("model.span_stride: must be at most half of model.max_length")
        return self
