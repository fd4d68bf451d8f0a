"""The recipe: one typed, frozen configuration for a whole run.

A recipe is a YAML file; `KEY=VALUE` words on the command line override it by dotted path, list
items by number:

    accelerate launch distill/run.py recipes/smoke.yaml run.seed=3 stages.0.length.steps=20

Here are its models, each field with its description, unit and bounds; `distill/contradictions.py` says what several
fields cannot be together; `distill/recipe.py` reads files and overrides into them and checks both. The descriptions are
the documentation: `docs/recipe.md` and `recipes/schema.json` are made from them (`make docs`).
"""

from __future__ import annotations

import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator


class UserError(Exception):
    """Something the user can mend: bad recipe, missing file, full disk. Shown without a traceback, exit code 2.

    Of several processes only the main one prints it, unless it concerns one process alone (`every_process`).
    """

    def __init__(self, message: str, *, every_process: bool = False) -> None:
        super().__init__(message)
        self.every_process = every_process


class Section(BaseModel):
    """Base of every part of the recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
DTypeName = Literal["auto", "fp32", "bf16", "fp16"]


class Length(Section):
    """A duration: exactly one of `steps`, `tokens`, `minutes`."""

    steps: Positive | None = None
    """Optimizer steps."""
    tokens: Positive | None = None
    """Target tokens over all processes."""
    minutes: PositiveFloat | None = None
    """Minutes of training time: teacher, student and data; validation and saving are not counted."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens, minutes; found {', '.join(given) or 'none'}")
        return self


class Ramp(Section):
    """A number that changes over a stage, as a function of the share of the stage that is over: `{from: 4, to: 1}`."""

    start: Annotated[float, Field(alias="from", ge=0, allow_inf_nan=False)]
    """Value when the stage begins."""
    end: Annotated[float, Field(alias="to", ge=0, allow_inf_nan=False)]
    """Value when it ends."""
    shape: Literal["linear", "cosine"] = "linear"
    """`linear`: in a straight line. `cosine`: along half a cosine, level at both ends."""

    @model_validator(mode="after")
    def _not_always_zero(self) -> Self:
        if self.start == self.end == 0:
            raise ValueError("expected from or to above 0, found 0 for both")
        return self


def _number_or_ramp(value: Any) -> str:
    return RAMP_TAG if isinstance(value, dict | Ramp) else NUMBER_TAG


# With tags, so that a wrong value is reported as the one or the other, not as both; `distill/recipe.py` hides them.
NUMBER_TAG, RAMP_TAG = "(number)", "(ramp)"
MaybeRamp = Annotated[
    Annotated[PositiveFloat, Tag(NUMBER_TAG)] | Annotated[Ramp, Tag(RAMP_TAG)], Discriminator(_number_or_ramp)
]


class RunConfig(Section):
    """The run itself: name, seed, place, precision and the shape of a batch."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run: its folder, its title in the tracker. Letters, digits, dot, dash, underscore."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation, data order and dropout."""
    output_dir: Path = Path("runs")
    """Parent of the run folder; the run lives in `output_dir/name`. Relative to the working directory."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the student's matrix products (weights stay fp32). `auto`: bf16 where the hardware has it."""
    batch_size: Positive = 16
    """Lanes: sequences trained side by side over all processes and accumulation, each with its own state."""
    micro_batch_size: Positive | None = None
    """Lanes per process and forward pass; the rest is accumulated. Default: the whole share of a process."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this Euclidean norm; null for no clipping."""
    checkpoint_every: Length = Length(minutes=5)
    """Interval between checkpoints. A stage's end, SIGTERM and Ctrl-C save too."""
    keep_checkpoints: Positive = 2
    """Latest checkpoints kept; the best of the stage by validation loss is kept besides."""
    threads: Positive | None = None
    """CPU threads per process. Default: the cores that this job may use, shared by its processes on the machine."""


class OtherTeacherConfig(Section):
    """One more teacher, of the same vocabulary. The target distribution is then the weighted arithmetic mean of all
    teachers' softmaxes at the stage's temperature. The first, `teacher`, remains what gives tokenizer, transplant and
    hidden states, and what validation compares to. Live with `targets.signal` hidden, top_k or sampled; in a cache with
    the last two."""

    model: str
    """Hub id, local folder, path of a `.gguf` file, or `package:DISTRIBUTION/PATH` for a packaged file."""
    revision: str | None = None
    """Revision of a hub id: branch, tag or commit."""
    dtype: DTypeName = "auto"
    """Data type of weights and arithmetic. `auto`: bf16 where the hardware has it, else fp32."""
    device_map: str | None = None
    """As in transformers, for example `auto` to spread a large teacher over devices. Default: the process's device."""
    attn_implementation: str | None = None
    """As in transformers: `sdpa`, `eager`, `flash_attention_2`, ... Default: transformers' choice."""
    trust_remote_code: bool = False
    """Run code that the teacher's repository brings along. Pin `revision` if you do."""
    weight: PositiveFloat = 1.0
    """Weight among several teachers; they are divided by their sum."""


class TeacherConfig(OtherTeacherConfig):
    """The pretrained Transformer that is imitated. It is frozen."""

    context: Annotated[int, Field(ge=0)] = 64
    """Minimum left context in tokens: the teacher reads this many tokens before each block, so that every target
    has at least this much history (or all of its document). Costs `context / block_length` of extra work."""


class EndpointConfig(Section):
    """A server that gives the soft targets in place of `teacher.model`: for a teacher too large for this machine.
    `teacher.model` is then a smaller model of the same vocabulary, which gives tokenizer and transplant, and to which
    validation compares. Needs `targets.cache` and `targets.signal: top_k`, and `pip install 'potstill[served]'`."""

    url: Annotated[str, Field(pattern=r"^https?://[^/@\s]+(/[^@\s]*)?$")]
    """Address of the server, without `/v1`."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the teacher on the server."""
    server: Literal["vllm", "sglang", "llama_cpp"] = "vllm"
    """What it is: vLLM and SGLang are sent token ids; `python -m llama_cpp.server --logits_all true` is sent text."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
    """Name of the environment variable that holds the API key, if one is needed; never the key itself."""
    window: Annotated[int, Field(ge=2)] = 1024
    """Longest stretch in tokens that a request holds. Documents are read from their start; later stretches of a longer
    one have `teacher.context` tokens of left context at least."""
    concurrency: Positive = 16
    """Requests under way at one time, over all processes, but at least one in each."""
    requests_per_second: PositiveFloat | None = None
    """At most so many requests a second over all processes; null for no limit."""
    retries: Annotated[int, Field(ge=0)] = 12
    """How often a request is made again after a broken connection, a timeout or a temporary error, with waiting times
    that double up to a minute, at random between 0 and that; the server's `Retry-After` is kept."""
    timeout: PositiveFloat = 300.0
    """Seconds after which a request counts as lost."""


class StudentConfig(Section):
    """The student, by default a fresh LSTM, and what it takes over from the teacher."""

    model: str | None = None
    """Train this causal model on, from its weights, in place of a fresh LSTM: hub id, local folder (of a student too),
    `.gguf` file, `package:DISTRIBUTION/PATH`. Its tokenizer must be the teacher's, or `tokenizer` must name it. A
    Transformer carries no state: it reads the teacher's windows, `teacher.context` included."""
    config: str | None = None
    """Train a causal model of this architecture from fresh weights: hub id, or local folder with a `config.json`."""
    overrides: dict[str, bool | int | float | str] = {}
    """Fields of that `config.json` to replace, for example `{num_hidden_layers: 4}`. Size of the vocabulary and special
    tokens follow the tokenizer."""
    revision: str | None = None
    """Revision of `model` or `config` on the hub: branch, tag or commit."""
    tokenizer: str | None = None
    """Tokenizer of the student, where it is not the teacher's: hub id, or local folder. The teacher's next tokens are
    then turned into the student's by aligning both on bytes: see docs/tokenizers.md. Needs `targets.signal: top_k`."""
    vocabulary_size: Annotated[int, Field(ge=257)] | None = None
    """Train a tokenizer of so many tokens for the student on the training text, byte-level BPE, and align it likewise.
    Fewer tokens make a smaller head and a longer text."""
    cell: Literal["lstm", "gru", "ln_lstm"] = "lstm"
    """What is recurrent. `gru`: three quarters of an LSTM's weights, half of its state (arXiv 1406.1078, in cuDNN's
    form). `ln_lstm`: an LSTM with layer normalisation inside the recurrence (arXiv 1607.06450), for which there are no
    fast kernels, and no ONNX files."""
    hidden_size: Positive = 512
    """Width of the recurrent layers."""
    num_layers: Positive = 2
    """Number of residual recurrent blocks."""
    attention_window: Annotated[int, Field(ge=2)] | None = None
    """Attention of one head to so many positions, the own one among them, after the last block but one (SHA-RNN, arXiv
    1911.11423); it sees nothing before a document's start. The state grows by `hidden_size` numbers a position. At most
    `corpus.block_length`; null for none."""
    feed_forward_size: Positive | None = None
    """Units of a gated feed-forward block (SwiGLU, arXiv 2002.05202) after each recurrent one; null for none. It wants
    a learning rate of 2e-3 or less."""
    feed_forward_from: Literal["random", "teacher"] = "random"
    """With `transplant`: start the feed-forward block of block i of N as that of the teacher's layer i L / N, seen
    through the input projection; of a larger one, the `feed_forward_size` units with the largest weights are taken. For
    teachers of Llama's kind, and an embedding of the teacher's width."""
    embedding_size: Positive | None = None
    """Width of embedding and head. Default: the teacher's. A smaller one makes both of low rank: with `transplant`,
    the teacher's head is projected to the directions in which its hidden states move its logits most, and its
    embedding to its principal axes. `python -m distill.ranks RECIPE` shows what each rank loses."""
    vocabulary_min_count: Positive | None = None
    """Cut the vocabulary to tokens that occur at least so often in the training text, the pieces they are merged from,
    all bytes and the special tokens. At 1 the training text keeps its tokens; other text may need more of them. Null
    for the teacher's whole vocabulary. Needs a byte-level BPE tokenizer."""
    transplant: bool = True
    """Start from the teacher's embedding and output head instead of random ones. With another tokenizer, a token starts
    from the mean of those that the teacher would spell it with (arXiv 2402.09977); a `model` keeps its own."""
    fit_tokens: Annotated[int, Field(ge=0)] = 8192
    """With `transplant`: fit the output projection to the teacher's hidden states on this many training tokens before
    the first step, by ridge regression on the still random LSTM's outputs. Its time counts as training; 0 for none."""
    align_input: bool = True
    """Start the input projection as the embedding's principal axes over the text's tokens, centred and scaled; of the
    control too."""
    tie_embeddings: bool | None = None
    """One matrix for embedding and head. Default: as in the teacher."""
    embedding_dropout: Fraction = 0.0
    """Dropout on the rows of the embedding, drawn once a block: a word is missing wherever it stands (arXiv 1708.02182,
    as are the next)."""
    input_dropout: Fraction = 0.0
    """Dropout on the projected embedding."""
    output_dropout: Fraction = 0.0
    """Dropout on what recurrent, feed-forward and attention blocks add."""
    variational_dropout: bool = False
    """Draw the masks of `input_dropout` and `output_dropout` once a block, the same for all of its positions."""
    recurrent_dropout: Fraction = 0.0
    """Dropout on the recurrent weights, drawn once a block (weight drop)."""
    activation_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight in every stage's loss of the mean square of the last recurrent layer's outputs, after dropout; 2 in the
    paper."""
    temporal_activation_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight in every stage's loss of the mean square of their change from a position to the next in its document,
    before dropout; 1 in the paper."""

    @property
    def penalties(self) -> dict[str, float]:
        """Those in use with their weights."""
        names = ("activation_penalty", "temporal_activation_penalty")
        return {name: weight for name in names if (weight := getattr(self, name))}

    @model_validator(mode="after")
    def _feed_forward(self) -> Self:
        if self.feed_forward_from == "teacher" and not (self.feed_forward_size and self.transplant):
            raise ValueError("feed_forward_from: teacher needs feed_forward_size and transplant: true")
        return self

    @property
    def is_fresh_lstm(self) -> bool:
        """Whether it is the LSTM that these fields describe, and not a model or architecture from elsewhere."""
        return self.model is None and self.config is None

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether its tokens are not the teacher's."""
        return self.tokenizer is not None or self.vocabulary_size is not None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        problems = []
        for names in (("model", "config"), ("tokenizer", "vocabulary_size", "vocabulary_min_count")):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                problems.append(f"{', '.join(given)}: give one of them")
        elsewhere = "model" if self.model else "config"
        if not self.is_fresh_lstm and (given := self._changed(LSTM_FIELDS)):
            problems.append(f"{', '.join(given)}: only for a fresh LSTM, found beside {elsewhere}; remove them")
        if self.model and (given := self._changed(("vocabulary_size", "vocabulary_min_count"))):
            problems.append(f"{', '.join(given)}: {self.model} has its own vocabulary; remove it")
        if self.config is None and self.overrides:
            problems.append("overrides: only beside config; name the architecture that they change")
        if self.is_fresh_lstm and self.revision:
            problems.append("revision: only beside model or config")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _changed(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]


LSTM_FIELDS = (
    *("hidden_size", "num_layers", "embedding_size", "fit_tokens", "align_input", "tie_embeddings"),
    *("cell", "attention_window", "feed_forward_size", "feed_forward_from"),
    *("embedding_dropout", "input_dropout", "output_dropout", "variational_dropout", "recurrent_dropout"),
    *("activation_penalty", "temporal_activation_penalty"),
)


class CorpusConfig(Section):
    """The text, its division and its packing."""

    source: str = ""
    """Hub id of a data set, path of a file or folder (`.txt`, `.jsonl`, `.json`, `.parquet`, or one that
    `python -m distill.write` has written), or `package:DISTRIBUTION/PATH` for a file in an installed package. Left out:
    the text is what the teacher writes (`writing`), validation included."""
    name: str | None = None
    """Configuration of a hub data set, for example `wikitext-103-raw-v1`."""
    revision: str | None = None
    """Revision of a hub data set."""
    split: str = "train"
    """Split of a hub data set that documents are taken from; they are divided anew by content."""
    text_field: str = "text"
    """Field or column that holds a document's text."""
    documents: Literal["line", "paragraph", "file"] = "paragraph"
    """What one document is in a `.txt` file; paragraphs are separated by empty lines."""
    streaming: bool = False
    """Train on documents as they are read, each epoch anew: nothing is downloaded or tokenised beforehand but the
    first `sample_documents`. For hub data sets and local `.parquet`, `.jsonl` and `.txt` files of any size. Every
    process reads the stream and tokenises its share; checkpoints hold the position. Local files count as the same
    text while sizes and first and last 64 KiB are the same."""
    sample_documents: Positive = 20_000
    """With `streaming`: documents from the start that are tokenised before training, once. Validation, test, token
    counts (`candidates`, `vocabulary_min_count`, `align_input`), the teacher's first states and cached targets are
    of these alone; those on the training side are streamed as well."""
    shuffle_buffer: Annotated[int, Field(ge=0)] = 10_000
    """With `streaming`: so many documents that follow each other are shuffled, anew in each epoch; their tokens are
    held in memory. 0 for the order of the source."""
    max_documents: Positive | None = None
    """Take at most this many documents, from the start."""
    validation_fraction: Fraction = 0.02
    """Share of documents for validation, chosen by a hash of their content: a document never changes sides."""
    test_fraction: Fraction = 0.02
    """Share of documents for testing, chosen likewise."""
    separator: str | None = None
    """Token that starts every document and ends the last. Default: the tokenizer's end-of-text token."""
    block_length: Annotated[int, Field(ge=2)] = 128
    """Tokens per lane and step: the window of truncated backpropagation through time."""
    reset_at_documents: bool = True
    """Zero the LSTM's state, and cut the teacher's attention, at each document's start."""
    cache_dir: Path | None = None
    """Where tokenised text is kept. Default: `potstill/` in the user's cache folder."""

    @field_validator("source", mode="before")
    @classmethod
    def _left_out(cls, value: Any) -> Any:
        return "" if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must be below 1, or nothing is left to train on")
        fields = ("sample_documents", "shuffle_buffer")
        given = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
        if given and not self.streaming:
            raise ValueError(f"{', '.join(given)}: only for a stream; set streaming: true")
        return self


class WritingConfig(Section):
    """Text that the teacher writes, to train on: sequence-level distillation (arXiv 1606.07947). Beside
    `corpus.source` it is on the training side only, of which the hash of a document's text takes away what would be
    validation or test, and the control does not read it; where `corpus.source` is left out it is all the text there is,
    divided as any other. Written before training unless it is there, or by `accelerate launch -m distill.write RECIPE`;
    the time it took counts as training time. What is written follows from these settings, the teacher's weights and,
    for rounding, the machine and its threads; not from processes or from stops in between."""

    documents: Positive
    """Documents to write."""
    max_tokens: Annotated[int, Field(ge=2)] = 256
    """Longest document in tokens, its prompt included; it is cut there. Others end where the teacher ends them: with
    the corpus's separator or an end token of its own."""
    prompt_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens that a document is begun with: those of the documents on the training side of `corpus.source`, one after
    the other, and again from the first. 0 for nothing but the separator, which needs no text at all."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Softmax temperature of sampling; 0 takes the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from so many of the likeliest tokens only; 0 for all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest tokens whose probabilities reach this sum; 1 for all."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of sampling; each document draws from it and its number."""
    batch_size: Positive = 64
    """Documents that are written side by side in each process. Larger is faster up to a point; it changes rounding."""
    folder: Path | None = None
    """Where the text is kept. Default: a folder named by these settings under `potstill/written/` in the user's cache
    folder."""

    @model_validator(mode="after")
    def _room_to_write(self) -> Self:
        if self.prompt_tokens >= self.max_tokens:
            raise ValueError(f"prompt_tokens ({self.prompt_tokens}) must be below max_tokens ({self.max_tokens})")
        return self


class TargetsConfig(Section):
    """The form in which the teacher's knowledge reaches the loss, and whether it is kept on disk."""

    signal: Literal["auto", "dense", "hidden", "top_k", "sampled"] = "auto"
    """`dense`: the teacher's logits. `hidden`: its final hidden states, from which the same logits follow in chunks
    through its head. `top_k`: its `k` most probable tokens and the mass of all others. `sampled`: `samples` random
    tokens with importance weights, unbiased for forward KL. `auto`: hidden."""
    k: Positive = 64
    """Tokens kept by `top_k`."""
    samples: Positive = 9
    """Tokens kept by `sampled`."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature at which `top_k` and `sampled` are taken; stages that use them must have the same."""
    cache: bool = False
    """Store the targets on disk before training and read them from there in every epoch. Time to build them counts as
    training time, also when they were found built. A shard's checksum is taken once, then stands while size and time of
    last change of its file are the same; `python -m distill.cache RECIPE --verify` takes all anew."""
    hidden_dtype: Literal["int8", "fp16", "fp32"] = "int8"
    """How the cache stores hidden states; `int8` has a scale for each token and one for each dimension."""
    max_tokens: Positive | None = None
    """Cache the targets of the first training tokens only, whole blocks; stages that need the teacher then train on
    these, others on all of the text."""
    cache_dir: str | None = None
    """Folder of the cached targets. Default: a folder named by all they depend on, under `potstill/targets/` in the
    user's cache folder. Or a URL such as `s3://bucket/folder`, to read a finished cache from there as it is needed:
    whatever `fsspec` reads, with keys and endpoint from the environment (for S3 install `potstill[s3]`)."""
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """Hub data set that holds the cached targets, to be downloaded instead of built."""

    @property
    def kind(self) -> str:
        """The signal's kind, with `auto` resolved."""
        return "hidden" if self.signal == "auto" else self.signal

    @property
    def is_remote(self) -> bool:
        """Whether the cache is read from behind a URL."""
        return self.cache_dir is not None and "://" in self.cache_dir

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _cache_fields(self) -> Self:
        if not self.cache:
            given = [name for name in ("max_tokens", "cache_dir", "repo") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{', '.join(given)}: only for cached targets; set cache: true")
        if self.is_remote and self.repo:
            raise ValueError(f"repo: found beside cache_dir {self.cache_dir}; give one place to read from")
        return self


Term = Literal[
    "cross_entropy",
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
    "hidden_mse",
    "layer_mse",
    "logit_mse",
]
HIDDEN_TERMS = {"hidden_mse", "layer_mse"}
TokenWeights = Literal["none", "teacher_entropy", "teacher_confidence", "student_entropy"]


class StageConfig(Section):
    """One stage of training. Stages run in order; each has a fresh optimizer and its own schedule. Weights, data
    position and carried LSTM state go on from the end of the stage before. The student is the last stage's best by
    validation loss."""

    name: str | None = None
    """Name in logs and curves. Default: the objective's terms."""
    objective: dict[Term, MaybeRamp]
    """Terms and weights, for example `{forward_kl: 0.9, cross_entropy: 0.1}`; a single name means weight 1, and a
    weight may be a ramp. `forward_kl` is KL(teacher || student), `reverse_kl` KL(student || teacher), `jsd` the
    generalised Jensen-Shannon divergence, `skewed_forward_kl` and `skewed_reverse_kl` those KL with a share of the
    first in the second (`skew`), `total_variation` half the sum of absolute differences; formulas are in
    docs/objectives.md. `hidden_mse` is the squared distance of the student's output to the teacher's final hidden
    state, in the stage's `metric`; `layer_mse` that of block i of the student's N, through a learned projection, to the
    normalised state of the teacher's layer i L / N of L, asked of the live teacher. `logit_mse`, of classifiers alone,
    is the mean squared error of the logits; their `cross_entropy` is of texts that have a label."""
    length: Length
    """How long the stage lasts."""
    metric: Literal["identity", "gram", "fisher"] = "identity"
    """Metric of `hidden_mse`. `identity`: mean over dimensions. `gram`: mean squared error of all logits. `fisher`:
    KL(teacher || student) to second order, with the mean Fisher information over training tokens."""
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Multiple of the identity added to `gram` and `fisher`, in units of their mean diagonal: it keeps directions
    that the logits hardly depend on from drifting away."""
    candidates: Positive | None = None
    """Take the terms of the logits over a part of the vocabulary, drawn anew for each step: so many tokens that are
    the most frequent in the text, the step's labels, and half as many others that stand for the rest. Cheaper,
    and an estimate; null for the whole vocabulary. For hidden and dense targets at temperature 1."""
    temperature: MaybeRamp = 1.0
    """Softmax temperature of both sides, or a ramp; divergences are multiplied by its square."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of `jsd`."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share a in the mixtures of the skewed divergences: KL(teacher || a teacher + (1 - a) student), and
    KL(student || (1 - a) teacher + a student) (DistiLLM, arXiv 2402.03898)."""
    token_weights: TokenWeights = "none"
    """Weight of each token in the terms of the logits, divided by its mean over the step's tokens; no gradient flows
    through it. All distributions are at the stage's temperature. `teacher_entropy`: the entropy of the teacher's, so
    that open continuations count more (arXiv 2311.13621). `teacher_confidence`: its largest probability, so that what
    it is sure of counts more (after arXiv 2201.00007). `student_entropy`: the entropy of the student's (arXiv
    2109.11295)."""
    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Course of the learning rate after warm-up; `wsd` stays at the peak and falls linearly in the last fifth."""
    warmup: Fraction = 0.05
    """Share of the stage in which the learning rate rises linearly from 0."""
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Learning rate at the end, as a fraction of the peak."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` is plain, without momentum."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay rates of AdamW's moments."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""
    freeze: frozenset[Literal["embedding", "head", "body"]] = frozenset()
    """Parts that are not trained in this stage. With tied embeddings, name both or neither of embedding and head."""
    student_written: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the lanes, rounded to whole ones, whose text the student itself writes in each step, for the live
    teacher to judge: on-policy distillation (lambda of GKD, arXiv 2306.13649). Such a block begins at a reset with the
    first tokens of the lane's block of text; the student goes on. Divergences and hidden terms are taken at all its
    positions, cross-entropy at none. The other lanes read on as ever, their targets from the cache where there is one.
    Each sum is divided by all tokens of the step."""
    written_prompt: Positive = 16
    """With `student_written`: tokens of text that such a block begins with."""
    written_temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """With `student_written`: temperature at which the student samples, in the run's precision, from its whole
    vocabulary; 0 takes the likeliest token."""

    @field_validator("objective", mode="before")
    @classmethod
    def _single_name(cls, value: Any) -> Any:
        return {value: 1.0} if isinstance(value, str) else value

    @field_validator("objective")
    @classmethod
    def _not_empty(cls, value: dict[str, float | Ramp]) -> dict[str, float | Ramp]:
        if not value:
            raise ValueError(f"name at least one of {', '.join(typing.get_args(Term))}")
        return value

    @field_validator("temperature")
    @classmethod
    def _above_zero(cls, value: float | Ramp) -> float | Ramp:
        if isinstance(value, Ramp) and min(value.start, value.end) == 0:
            raise ValueError("expected from and to above 0")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.freeze >= {"embedding", "head", "body"}:
            raise ValueError("freeze leaves nothing to train")
        if self.student_written and not self.needs_teacher:
            raise ValueError("student_written: what the student writes is for the teacher to judge; add a divergence")
        if self.student_written == 1 and "cross_entropy" in self.objective:
            raise ValueError(
                "student_written: at 1 no text is left for cross_entropy, which is not taken of what the student "
                "writes; remove it or lower student_written"
            )
        fields = ("written_prompt", "written_temperature")
        given = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
        if given and not self.student_written:
            raise ValueError(f"{', '.join(given)}: only with student_written")
        if self.token_weights != "none" and self.hidden_terms:
            raise ValueError(
                f"token_weights: for the terms of the logits, found {', '.join(self.hidden_terms)} beside them, which "
                "would not be weighted; give these a stage of their own"
            )
        if self.token_weights != "none" and self.candidates is not None:
            raise ValueError(
                f"token_weights: {self.token_weights} is of the whole vocabulary, found candidates {self.candidates}; "
                "remove one"
            )
        return self

    @property
    def label(self) -> str:
        return self.name or "+".join(self.objective)

    @property
    def needs_teacher(self) -> bool:
        return set(self.objective) != {"cross_entropy"} or self.token_weights.startswith("teacher")

    @property
    def hidden_terms(self) -> list[str]:
        """Terms that compare hidden states."""
        return sorted(HIDDEN_TERMS & set(self.objective))


class ClassificationConfig(Section):
    """Classify texts in place of writing them: the teacher is a classifier, and the student learns its logits (Tang et
    al. 2019, arXiv 1903.12136). Each document is one text; a document without one of the labels counts as text that
    only the teacher labels, for the student to learn from."""

    label_field: str = "label"
    """Field or column that holds a document's label: a text or a whole number."""
    labels: tuple[str, ...] | None = None
    """Classes in the order of the logits. Default: those of a hub data set's label column, else all labels found,
    sorted. A teacher that is a classifier already has these labels in any order, or else none but numbers and these in
    the same order."""
    test_split: str | None = None
    """Split of a hub data set to test on, in place of `corpus.test_fraction`."""
    max_texts: Positive | None = None
    """Use at most this many texts, chosen by a hash of their content: `corpus.max_documents` takes them from the start,
    and labelled sources are often sorted by label. Those of `test_split` are all used."""
    max_length: Positive = 128
    """Tokens of a text that are read, special tokens included; the rest is cut off."""
    pooling: Literal["last", "mean", "max"] = "last"
    """What the student's classifier reads: its output after the last token, or the mean or maximum over all tokens."""
    start_from: str | None = None
    """Run folder, folder or hub id of a distilled LSTM language model whose body and tokenizer the student starts with.
    `student` then gives its sizes, and `transplant` and `align_input` have nothing to do."""


class FineTuningConfig(Section):
    """Fine-tune the teacher on the labels first, where it is a pretrained model but no classifier yet. What comes out
    is kept in `RUN/teacher`. Its time counts as the student's."""

    length: Length
    """How long; the best weights by validation loss are kept."""
    layers: Annotated[int, Field(ge=0)] | None = None
    """Layers that are trained, counted from the top, with what stands above them; 0 for the classifier and final norm
    alone. What the frozen ones below make of each text is then computed once and kept in memory: `max_length` x width x
    2 bytes a text, or 4 in fp32. Null for the whole model."""
    batch_size: Positive = 32
    """Texts of an optimizer step."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "linear"
    """Course of the learning rate."""
    warmup: Fraction = 0.1
    """Share of the fine-tuning in which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """As in the stages."""


class AugmentationConfig(Section):
    """More text for the teacher to judge, made from the training texts word by word (Tang et al. 2019, arXiv
    1903.12136, section 3.3). Words stand between white space. A language model's copies are whole documents beside
    those of `corpus.source`, on the training side only, with targets like any text (which a cache holds as well); the
    control does not read them. Their words are not what `cross_entropy` should learn: the teacher's divergences are
    what they are for, with few `copies`, `mask: 0` and `ngram: 0`."""

    copies: Positive = 20
    """Changed copies of each text."""
    mask: Probability = 0.1
    """Probability that a word is replaced by the tokenizer's mask token, or left out where it has none."""
    replace: Probability = 0.1
    """Probability that a word is replaced by another of its kind, drawn by frequency. Tang et al. take one of the same
    part of speech; here, without a tagger, of the same two last letters, capitalisation and power of 2 of frequency."""
    ngram: Probability = 0.25
    """Probability that only a stretch of a copy is kept, 1 to `longest_ngram` words."""
    longest_ngram: Positive = 5
    """Longest such stretch in words."""

    @model_validator(mode="after")
    def _one_fate_a_word(self) -> Self:
        if self.mask + self.replace > 1:
            raise ValueError(f"mask + replace must be at most 1, found {self.mask + self.replace}")
        return self


class ControlConfig(Section):
    """The control: the same architecture from random weights, trained by cross-entropy without a teacher. What it
    reaches is what distillation has to beat. `control: true` takes the defaults, `control: false` leaves it out."""

    enabled: bool = True
    """Train the control."""
    match: Literal["wall_time", "tokens"] = "wall_time"
    """Train for the same wall time as the student, teacher included, or for the same number of tokens."""
    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Course of the learning rate."""
    candidates: Positive | None = None
    """As in the stages."""
    warmup: Fraction = 0.05
    """Share of the training in which the learning rate rises."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """As in the stages."""


class EvaluationConfig(Section):
    """Validation during training and at the end."""

    every: Length = Length(minutes=5)
    """Interval between validations. Each stage also ends with one."""
    max_tokens: Positive | None = 100_000
    """Validate on the first whole documents that fit into this many tokens; null for all. At least one document."""
    window: Annotated[int, Field(ge=2)] = 512
    """Longest stretch in tokens that the teacher reads at once; longer documents are read in overlapping windows."""
    context: Annotated[int, Field(ge=0)] = 128
    """Minimum left context of a scored token in a window that does not begin at a document's start."""
    batch_tokens: Positive = 4096
    """Tokens per forward pass of validation, padding included."""
    patience: Positive | None = None
    """End a stage after this many validations in a row without a lower validation loss; null for never."""
    prompts: tuple[str, ...] = ("The city is known for", "In 1969,", "She was a")
    """Prompts that the student continues at the end, greedily and sampled."""
    new_tokens: Positive = 32
    """Length of a continuation in tokens."""
    decode_seconds: PositiveFloat = 5.0
    """Time to measure the decoding speed of each model, in seconds."""

    @model_validator(mode="after")
    def _context_below_window(self) -> Self:
        if self.context >= self.window:
            raise ValueError(f"context ({self.context}) must be below window ({self.window})")
        return self


class TrackingConfig(Section):
    """Where curves go. `tracking: none` for nowhere."""

    tracker: Literal["wandb", "none"] = "wandb"
    """Without an account wandb records offline and the log says how to sync. A failing tracker never stops a run."""
    project: str = "potstill"
    """Project in wandb."""
    entity: str | None = None
    """Team or user in wandb; default: your own."""
    group: str | None = None
    """Group in wandb; default: the run's name, so that all runs of a recipe lie together."""
    tags: tuple[str, ...] = ()
    """Tags in wandb."""
    every: Positive = 10
    """Optimizer steps between log lines."""


class PublishingConfig(Section):
    """Publishing the finished student to the hub."""

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """Repository `user/name`; null for no publishing."""
    private: bool = True
    """Create the repository as a private one."""
    branch: str | None = None
    """Branch to push to; default: the main one."""
    license: str | None = None
    """Identifier of the teacher's licence, such as `apache-2.0`, which the student carries; needed where it is not
    found (a served teacher, several with different ones, a folder without a card)."""


class Recipe(Section):
    """A whole run."""

    run: RunConfig
    teacher: TeacherConfig
    other_teachers: tuple[OtherTeacherConfig, ...] = ()
    endpoint: EndpointConfig | None = None
    student: StudentConfig = StudentConfig()
    corpus: CorpusConfig
    writing: WritingConfig | None = None
    targets: TargetsConfig = TargetsConfig()
    stages: tuple[StageConfig, ...]
    control: ControlConfig = ControlConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    publishing: PublishingConfig = PublishingConfig()
    classification: ClassificationConfig | None = None
    fine_tuning: FineTuningConfig | None = None
    augmentation: AugmentationConfig | None = None

    @field_validator("control", mode="before")
    @classmethod
    def _control_switch(cls, value: Any) -> Any:
        return {"enabled": value} if isinstance(value, bool) else value

    @field_validator("tracking", mode="before")
    @classmethod
    def _tracking_name(cls, value: Any) -> Any:
        if value is None:
            return {"tracker": "none"}
        return {"tracker": value} if isinstance(value, str) else value

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.output_dir / self.run.name


def section_of(annotation: Any) -> type[Section] | None:
    """The annotation itself where it is a section of the recipe."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
