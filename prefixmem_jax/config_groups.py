"""The groups of keys that a config is made of, with their defaults; `config.Config` joins them.

Groups that come in kinds (objectives, SID encoders) stand beside their code instead. A key's type
says what values it may have; this is checked where configs are loaded, not where they are made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from prefixmem_jax.errors import UserError

DType = Literal["float32", "bfloat16"]
Trainable = Literal["everything", "new_tokens", "sid_encoder"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Codes = Annotated[int, Field(gt=0, le=2**24)]
Sizes = Annotated[tuple[Codes, ...], Field(min_length=1, max_length=64)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def _mesh_size(size: int) -> int:
    if size < 1 and size != -1:
        raise ValueError("expected 1 or more, or -1 for the devices that are left")
    return size


MeshSize = Annotated[int, AfterValidator(_mesh_size)]


@dataclass(frozen=True)
class SyntheticConfig:
    """Size and shape of the synthetic dataset; `data.synthetic` says what each means."""

    items: Annotated[PositiveInt, Field(le=10_000_000)] = 20_000
    users: Annotated[PositiveInt, Field(le=10_000_000)] = 20_000
    codebook_sizes: Sizes = (32, 64, 64, 64)
    children: Sizes = (32, 10, 10, 10)
    zipf_exponent: Annotated[float, Field(ge=0, le=10)] = 0.8
    groups: Annotated[PositiveInt, Field(le=1000)] = 12
    liked_codes: PositiveInt = 3
    liking: Annotated[PositiveFloat, Field(le=1e6)] = 30.0
    loyalty: Annotated[float, Field(ge=0, le=1)] = 0.5
    mean_length: Annotated[float, Field(ge=3, le=10_000)] = 10.0
    max_length: Annotated[PositiveInt, Field(le=10_000)] = 40
    seed: Seed = 0

    def check(self) -> None:
        """Raises UserError where keys contradict each other."""
        if len(self.children) != len(self.codebook_sizes):
            raise UserError(
                f"data.synthetic.children={self.children}: expected a number for each of the "
                f"{len(self.codebook_sizes)} levels of data.synthetic.codebook_sizes"
            )
        if max(map(min, self.children, self.codebook_sizes)) == 1:
            raise UserError(
                f"data.synthetic.children={self.children}: all items would have the same SID; "
                "expected 2 or more on some level (and codes for them)"
            )
        if self.liked_codes > self.codebook_sizes[0]:
            raise UserError(
                f"data.synthetic.liked_codes={self.liked_codes}: level 1 has "
                f"{self.codebook_sizes[0]} codes"
            )


@dataclass(frozen=True)
class DataConfig:
    """Where histories come from and how they become batches.

    Attributes:
      path: dataset folder (docs/data.md); none means the synthetic dataset.
      format: how it is stored: a file of `data/formats`, or a module of your own.
      sid_column: column of items.parquet with the SIDs; `item_id` gives every item one code of its
        own, which makes the decoder a recommender over whole items.
      shared_sids: what becomes of items that share a SID: they keep it, and no list can tell them
        apart; or all but the first move to the next code of the last level that is free.
      codebook_sizes: codes per level; none means largest code + 1 of each level.
      items: of the catalogue, for `plan` where there is no data yet; none means those of the data.
      split: see `data.splits.split_dataset`.
      holdout: share held out for validation, and again for test (all splits but leave_two_out).
      text_tokens: size of the text vocabulary that stands before the SID tokens.
      packed: folder that `prefixmem data pack` wrote; none means that training packs in memory.
      tokenizer: folder of the tokenizer of texts (tokenizer.json), for documents that have titles.
      text_length: tokens of a title, at most.
      vocabulary_multiple: the vocabulary is filled up to a multiple of this with tokens that never
        occur, so that tensor-parallel devices can divide it.
      max_items: items of history that a sequence may hold.
      sequence_length: tokens in one packed row.
      batch_size: rows in one global batch.
    """

    path: str | None = None
    format: str = "parquet"
    sid_column: str = "sid"
    shared_sids: Literal["keep", "move"] = "keep"
    codebook_sizes: Sizes | None = None
    items: PositiveInt | None = None
    split: Literal["leave_two_out", "time", "users", "users_random", "users_and_time"] = (
        "leave_two_out"
    )
    holdout: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    text_tokens: Annotated[NonNegativeInt, Field(le=2**22)] = 0
    packed: str | None = None
    tokenizer: str | None = None
    text_length: PositiveInt = 32
    vocabulary_multiple: Annotated[PositiveInt, Field(le=2**20)] = 1
    max_items: Annotated[PositiveInt, Field(le=100_000)] = 20
    sequence_length: Annotated[PositiveInt, Field(le=2**20)] = 128
    batch_size: Annotated[PositiveInt, Field(le=2**20)] = 40
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass(frozen=True)
class RopeScalingConfig:
    """How rotary frequencies are stretched for long contexts.

    Attributes:
      kind: `linear` divides all by `factor`; `llama3` divides those with wavelengths over
        original_length / low_frequency_factor, keeps those under
        original_length / high_frequency_factor, and blends between.
    """

    kind: Literal["linear", "llama3"]
    factor: PositiveFloat
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0
    original_length: PositiveInt = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder. Qwen3, Llama 3 and Gemma 3 differ by these values alone.

    Attributes:
      qk_norm: normalise queries and keys per head.
      norm_plus_one: norms multiply by 1 + scale.
      post_norms: normalise the outputs of attention and feed-forward too.
      query_scale: of queries before the softmax; none means head_dim ** -0.5.
      scale_embedding: multiply token embeddings by the root of d_model.
      logit_softcap: bound c on logits, c * tanh(logits / c).
      sliding_layers: 0-based layers that attend to the last `sliding_window` positions only, with
        rotary base `sliding_rope_base` and without `rope_scaling`.
      attention: of whole sequences, by the platform's `kernel` or `plain`, as XLA compiles it.
      compute_dtype: of activations and matrix products; parameters, norms, softmax and logits
        are float32.
      dropout: share of numbers zeroed in training: of the embeddings, and of every attention's and
        feed-forward's output.
      remat: what the backward pass computes again: `none` of a layer, which keeps all activations;
        `full`, all of it; `mlp`, all but feed-forward's first products; `dots`, all but weights'
        matrix products, what attention is given and what TPUs' attention gives; `offload`, as
        `dots`, with what is kept in the host's memory.
      scan_layers: run more than four layers in a loop. False, in training, compiles each by itself:
        that takes longer, and what `mlp` and `dots` keep need not be copied (docs/pods.md).
    """

    layers: Annotated[PositiveInt, Field(le=1000)] = 2
    d_model: PositiveInt = 96
    d_ff: PositiveInt = 256
    query_heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    head_dim: PositiveInt = 24
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qk_norm: bool = True
    norm_plus_one: bool = False
    post_norms: bool = False
    query_scale: PositiveFloat | None = None
    scale_embedding: bool = False
    logit_softcap: PositiveFloat | None = None
    tied_embeddings: bool = False
    rope_base: PositiveFloat = 10_000.0
    rope_scaling: RopeScalingConfig | None = None
    sliding_layers: tuple[NonNegativeInt, ...] = ()
    sliding_window: NonNegativeInt = 0
    sliding_rope_base: PositiveFloat = 10_000.0
    norm_epsilon: PositiveFloat = 1e-6
    init_std: PositiveFloat = 0.02
    attention: Literal["kernel", "plain"] = "kernel"
    compute_dtype: DType = "float32"
    dropout: Rate = 0.0
    remat: Literal["none", "mlp", "dots", "offload", "full"] = "none"
    scan_layers: bool = True

    def check(self) -> None:
        """Raises UserError where keys contradict each other."""
        if self.query_heads % self.kv_heads:
            raise UserError(
                f"model.query_heads={self.query_heads} is not a multiple of "
                f"model.kv_heads={self.kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd; rotary embeddings need pairs")
        if self.sliding_layers and self.sliding_window < 1:
            raise UserError(
                f"model.sliding_window={self.sliding_window}: layers {self.sliding_layers} slide; "
                "expected 1 or more"
            )
        if any(layer >= self.layers for layer in self.sliding_layers):
            raise UserError(
                f"model.sliding_layers={self.sliding_layers}: layers are 0..{self.layers - 1}"
            )
        scaling = self.rope_scaling
        if scaling and scaling.low_frequency_factor >= scaling.high_frequency_factor:
            raise UserError(
                f"model.rope_scaling.low_frequency_factor={scaling.low_frequency_factor}: expected "
                "less than model.rope_scaling.high_frequency_factor="
                f"{scaling.high_frequency_factor}"
            )


@dataclass(frozen=True)
class ItemHeadConfig:
    """Scores whole items where an item's first code is to come (`models.item_head`).

    Attributes:
      vectors: what an item's score is the hidden state's product with. `memory`: what the SID
        encoder adds to the embedding where the item ends, so that what is learnt of an item that
        was seen counts where it is predicted; `sid_encoder.target_levels` must have level 1.
        `own`: a vector for every item, as a dense parameter.
      weight: of an item's cross-entropy in the loss, beside that of its codes.
      negatives: items drawn in each step, which stand for all others in the softmax (with `memory`
        only; see `models.negatives`). None, or no fewer than there are: a softmax over all items.
    """

    vectors: Literal["memory", "own"] = "own"
    weight: PositiveFloat = 1.0
    negatives: PositiveInt | None = None

    def check(self, encoder_reads_items: bool) -> None:
        """Raises UserError where it does not go with itself or with the SID encoder."""
        if self.vectors == "memory" and not encoder_reads_items:
            raise UserError(
                "item_head.vectors=memory: there is no SID encoder that reads whole items; add "
                "level 1 to sid_encoder.target_levels, or set item_head.vectors=own"
            )
        if self.vectors == "own" and self.negatives is not None:
            raise UserError(
                f"item_head.negatives={self.negatives} is for item_head.vectors=memory; expected "
                "none"
            )


@dataclass(frozen=True)
class MemoryOptimizerConfig:
    """How the memory's rows are updated: only those in the batch (docs/memory.md).

    Attributes:
      kind: `adam`, `row_adam` (one second moment a row), `adagrad` (row-wise: one number of state
        a row) or `sgd`. Adam's betas and epsilon are the dense optimizer's.
      rate: peak learning rate as a multiple of the dense one, 5 in the paper.
      warmup_steps, final_rate: of its own schedule; none means the dense one's.
      weight_decay: decoupled, on the rows in the batch; steps that miss a row do not decay it.
    """

    kind: Literal["adam", "row_adam", "adagrad", "sgd"] = "adam"
    rate: PositiveFloat = 5.0
    warmup_steps: NonNegativeInt | None = None
    final_rate: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
      trainable: which parameters learn. `new_tokens` freezes the LLM but for the embeddings (and
        head) of its SID tokens; `sid_encoder` freezes the whole LLM. The SID encoder always learns.
      clip_norm: bound on the global gradient norm; the memory's row gradients count in it.
      weight_decay: on matrices and embeddings of the dense model; norms are not decayed, and memory
        rows by `memory.weight_decay`.
      embedding_weight_decay: on its vectors of tokens and items instead; none means the same.
      final_rate: the learning rate at the end as a share of its peak.
      first_moment_dtype: of the dense parameters' running means of gradients.
      average_decay: keep an exponential moving average of the dense parameters with this decay a
        step (in the first steps less), and use it for everything but training; none keeps none.
        Memory rows, which most steps leave alone, are used as they are.
      accumulation_steps: pieces that a batch is cut into; their gradients are computed one after
        the other and applied once, which needs less memory and gives the same step.
    """

    learning_rate: PositiveFloat = 3e-3
    warmup_steps: NonNegativeInt = 50
    final_rate: NonNegativeFloat = 0.1
    beta1: Rate = 0.9
    beta2: Rate = 0.99
    epsilon: PositiveFloat = 1e-8
    first_moment_dtype: DType = "float32"
    weight_decay: NonNegativeFloat = 0.1
    embedding_weight_decay: NonNegativeFloat | None = None
    clip_norm: PositiveFloat = 1.0
    average_decay: Rate | None = None
    accumulation_steps: PositiveInt = 1
    trainable: Trainable = "everything"
    memory: MemoryOptimizerConfig = field(default_factory=MemoryOptimizerConfig)


@dataclass(frozen=True)
class InitConfig:
    """Where parameters come from when the run has no checkpoint of its own.

    Attributes:
      from_huggingface: model folder, or what `prefixmem import` made of one. Parts come from there
        that neither `take` nor `fresh` names: `llm`, and if `prefixmem export` wrote it with one,
        `sid_encoder` and `memory`. `hf.families.read_folder` gives the `model` and
        `data.text_tokens` that it needs. SID tokens that it lacks start around the mean of its
        vocabulary.
      codebooks: .npz of code centroids by level that those SID tokens start from; none means noise.
      run: run directory whose checkpoint to read (the best by its `evaluation.select_by`, if it
        has one, else the newest); none means start from scratch.
      take: parts to read from it.
      fresh: parts to initialise anew. With `run` or `from_huggingface`, every part of the model
        must come from exactly one place.
    """

    from_huggingface: str | None = None
    codebooks: str | None = None
    run: str | None = None
    take: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; one may be -1, which takes the devices that are left.

    Attributes:
      data: replicas of the dense model (the memory table is never replicated).
      fsdp: devices that share the dense parameters and their optimizer state, each with its own
        share of the batch.
      tensor: devices that divide heads, feed-forward and vocabulary of one share of the batch.
      memory_kind: where each device's share of the memory table, and its optimizer's state, lies;
        `pinned_host` is the memory of the machine that has the device.
    """

    data: MeshSize = -1
    fsdp: MeshSize = 1
    tensor: MeshSize = 1
    memory_kind: Literal["device", "pinned_host"] = "device"


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how many checkpoints to keep (the newest)."""

    every_steps: PositiveInt = 200
    keep: PositiveInt = 2


@dataclass(frozen=True)
class EvaluationConfig:
    """How runs are evaluated.

    Attributes:
      every_steps: steps between validations during training.
      validation_examples: examples in each of those (a fixed sample).
      select_by: validation metric whose best checkpoint is kept, and is the one that everything
        reads; `item_...` recommends to the validation examples at each validation. None: the
        newest.
      patience: end training after so many validations without a better one; 0: never.
      exclude_seen: leave out what a user's history holds, in retrieval that is constrained to the
        catalogue.
      users: test users for retrieval metrics (a fixed sample; 0 means all).
      beam: width of the beam search.
      batch_size: users per beam-search batch.
      item_share: where there is an item head: in a search over the catalogue a SID scores
        (1 - item_share) * log p(codes) + item_share * log p(its items).
      transition_share: of what stood next to the history's last items in training
        (`data.transitions`) in the probability of a SID, in a search over the catalogue. Beyond the
        paper. 0: they are not counted.
    """

    every_steps: PositiveInt = 100
    validation_examples: PositiveInt = 1000
    select_by: Literal["loss", "item_recall@10", "item_ndcg@10"] | None = None
    patience: NonNegativeInt = 0
    exclude_seen: bool = True
    users: NonNegativeInt = 0
    beam: Annotated[PositiveInt, Field(le=100_000)] = 20
    batch_size: PositiveInt = 64
    item_share: Share = 0.7
    transition_share: Rate = 0.0

    @property
    def retrieves(self) -> bool:
        """Whether validation recommends."""
        return (self.select_by or "").startswith("item_")
