"""The rows of the paper's tables: what each system is, and what the paper reports of it.

A row is a change of its scale's baseline, so that decoder, data, steps and optimizer are those of
the baseline where the row does not say otherwise. The paper's numbers are in percent; of Qwen3-1.7B
and of 2M rows a table where the row's title names no others. Its splits by reachability and
popularity and its first codes are of a PrefixMem that our notes of it do not name: by their mean
not of one from random tables. They stand with `prefixmem`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prefixmem_jax.config import Config
from prefixmem_jax.config_groups import InitConfig, OptimizerConfig
from prefixmem_jax.data.documents.catalogue import Catalogue
from prefixmem_jax.data.documents.items import Items
from prefixmem_jax.data.documents.next_item import NextItem
from prefixmem_jax.objectives.classification import Classification
from prefixmem_jax.objectives.tiger import Tiger
from prefixmem_jax.paper.scales import Decoder, Scale
from prefixmem_jax.sid_encoders.gated_prefix_memory import GatedPrefixMemoryConfig
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig
from prefixmem_jax.sid_encoders.sid_transformer import SidTransformerConfig

# Of the paper's SIDs.
LEVELS = 5
# How the deepest level's accuracy is split.
SPLITS = ("reachable", "unreachable", "rare", "medium", "popular")
CUTOFFS = (10, 20, 30, 50, 100)

# Of the run that a row's memory comes from, by row: where that is trained.
Folders = Mapping[str, Path]


@dataclass(frozen=True)
class Row:
    """One system.

    Attributes:
      make: its config from the baseline's, the scale's memory, and the folders of the runs in
        `after`.
      after: rows that are trained before it, which it takes its memory from.
      paper: what the paper reports, in percent, by our names of metrics.
      equal_cost: a row of about its costs that it is compared with too, where a table has both.
      rate_of: the row whose learning rate it takes, in place of a choice of its own: it differs
        from that one in its memory, or where that comes from.
      decoder: whose shape it has, in place of the baseline's.
    """

    title: str
    make: Callable[[Config, PrefixMemoryConfig, Folders], Config]
    after: tuple[str, ...] = ()
    paper: Mapping[str, float] = field(default_factory=dict)
    equal_cost: str | None = None
    rate_of: str | None = None
    decoder: Decoder | None = None


def _metrics(**numbers: float) -> dict[str, float]:
    """The paper's numbers by our names of metrics."""
    names = {f"l{level}": f"tf_accuracy/level_{level}" for level in range(1, LEVELS + 1)}
    names |= {split: f"tf_accuracy/level_{LEVELS}/{split}" for split in SPLITS}
    names |= {f"r{cutoff}": f"sid_recall@{cutoff}/unconstrained" for cutoff in CUTOFFS}
    names |= {"hits": "sid_hit_rate", "first_codes": "unique_level_1"}
    return {names[name]: number for name, number in numbers.items()}


def _flat(base: Config, memory: PrefixMemoryConfig, folders: Folders) -> Config:
    del memory, folders
    return base


def _with(change: Callable[[PrefixMemoryConfig], PrefixMemoryConfig] = lambda memory: memory):
    """The baseline with a memory, changed."""

    def make(base: Config, memory: PrefixMemoryConfig, folders: Folders) -> Config:
        del folders
        return replace(base, sid_encoder=change(memory))

    return make


def _resized(factor: float):
    return lambda memory: replace(memory, rows=int(memory.rows * factor))


def _pretrained(by: str, factor: float = 1.0):
    """The baseline with a memory of an earlier run, and a fresh projection."""

    def make(base: Config, memory: PrefixMemoryConfig, folders: Folders) -> Config:
        init = InitConfig(run=str(folders[by]), take=("memory",), fresh=("llm", "sid_encoder"))
        return replace(base, sid_encoder=_resized(factor)(memory), init=init)

    return make


def _classifier(factor: float = 1.0):
    def make(base: Config, memory: PrefixMemoryConfig, folders: Folders) -> Config:
        del folders
        return replace(base, objective=Classification(), sid_encoder=_resized(factor)(memory))

    return make


def _catalogue_classifier(base: Config, memory: PrefixMemoryConfig, folders: Folders) -> Config:
    del folders
    # At the tiny scale there are three items to a history: so each of either is there once.
    objective = Classification(documents=(Items(), Catalogue(weight=3.0)))
    return replace(base, objective=objective, sid_encoder=memory)


def _tiger(with_memory: bool):
    def make(base: Config, memory: PrefixMemoryConfig, folders: Folders) -> Config:
        del folders
        documents = (NextItem(draws=1),)  # at the tiny scale the steps are one turn of every user
        objective = Tiger(documents=documents, encoder_layers=base.model.layers, answers=8)
        return replace(base, objective=objective, sid_encoder=memory if with_memory else None)

    return make


def _more_steps(base: Config, memory: PrefixMemoryConfig, folders: Folders) -> Config:
    del memory, folders
    return replace(base, steps=base.steps * 3 // 2)


def _sid_transformer(base: Config, memory: PrefixMemoryConfig, folders: Folders) -> Config:
    del folders
    width = base.model.d_model
    encoder = SidTransformerConfig(
        target_levels=memory.target_levels, width=width, d_ff=4 * width, heads=2
    )
    return replace(base, sid_encoder=encoder)


def _swept(
    title: str,
    change: Callable[[PrefixMemoryConfig], PrefixMemoryConfig] = lambda memory: memory,
    rate: float = 5.0,
) -> Row:
    """PrefixMem with another memory, or one that learns `rate` times as fast as the decoder."""

    def make(base: Config, memory: PrefixMemoryConfig, folders: Folders) -> Config:
        tables = replace(base.optimizer.memory, rate=rate)
        base = replace(base, optimizer=replace(base.optimizer, memory=tables))
        return _with(change)(base, memory, folders)

    return Row(f"PrefixMem, {title}", make, equal_cost="prefixmem", rate_of="prefixmem")


ROWS = {
    "baseline": Row(
        "flat tokens",
        _flat,
        paper=_metrics(
            l1=42, l2=29, l3=29.2, l4=33.3, l5=37.6,
            r20=6.0, r30=6.9, r50=8.0, r100=9.5, hits=50.7, first_codes=5.5,
            reachable=43.3, unreachable=36.4, rare=26.8, medium=34.8, popular=52.5,
        ),
    ),
    # About what stage 1 and PrefixMem cost together, in FLOPs and in seconds; PrefixMem alone less.
    "baseline_longer": Row("flat tokens, 50% more steps", _more_steps),
    "prefixmem_quarter": Row(
        "PrefixMem, a quarter of the rows (500K)",
        _with(_resized(0.25)),
        paper=_metrics(l4=40.1, l5=49.7),
        rate_of="prefixmem",
    ),
    "prefixmem": Row(
        "PrefixMem",
        _with(),
        paper=_metrics(
            l4=42.6, l5=54.8, r100=11.3, first_codes=6.2,
            reachable=44.6, unreachable=64.5, rare=57.6, medium=75.6, popular=70.4,
        ),
        equal_cost="baseline_longer",
    ),
    "prefixmem_large": Row(
        "PrefixMem, 2.5 times the rows (5M)",
        _with(_resized(2.5)),
        paper=_metrics(l4=43.4, l5=57.2, r20=6.7, r30=7.8, r50=9.4, r100=11.6, hits=58.9),
        rate_of="prefixmem",
    ),
    "classification": Row("stage 1: classification", _classifier()),
    "classification_large": Row(
        "stage 1: classification, 2.5 times the rows", _classifier(2.5), rate_of="classification"
    ),
    "prefixmem_classification": Row(
        "PrefixMem from classification",
        _pretrained("classification"),
        ("classification",),
        _metrics(l5=58.5, r100=11.2),
        equal_cost="baseline_longer",
    ),
    "prefixmem_classification_large": Row(
        "PrefixMem from classification, 2.5 times the rows (5M)",
        _pretrained("classification_large", 2.5),
        ("classification_large",),
        _metrics(l5=64.0, r100=11.8, hits=65.1),
        equal_cost="prefixmem_classification",
        rate_of="prefixmem_classification",
    ),
    "classification_catalogue": Row(
        "stage 1: classification, the catalogue's SIDs too",
        _catalogue_classifier,
        rate_of="classification",
    ),
    "prefixmem_classification_catalogue": Row(
        "PrefixMem from classification with the catalogue's SIDs",
        _pretrained("classification_catalogue"),
        ("classification_catalogue",),
        equal_cost="prefixmem_classification",
        rate_of="prefixmem_classification",
    ),
    "tiger": Row(
        "TIGER", _tiger(False), paper=_metrics(l4=27.6, l5=27.4, r10=1.01), decoder="tiger"
    ),
    "tiger_prefixmem": Row(
        "TIGER with PrefixMem",
        _tiger(True),
        paper=_metrics(l4=46.3, l5=60.6, r10=1.35),
        decoder="tiger",
    ),
    "prefixmem_tiger": Row(
        "PrefixMem from TIGER",
        _pretrained("tiger_prefixmem"),
        ("tiger_prefixmem",),
        _metrics(l5=61.2, r100=12.3),
        equal_cost="prefixmem_classification",
        rate_of="prefixmem_classification",
    ),
    "small": Row("half as wide, flat tokens (Qwen3-0.6B)", _flat,
                 paper=_metrics(l5=32.1, r100=8.4), decoder="small"),
    "prefixmem_small": Row("half as wide, PrefixMem (Qwen3-0.6B)", _with(),
                           paper=_metrics(l5=54.1, r100=10.5), decoder="small"),
    "prefixmem_small_llm": Row(
        "PrefixMem from a decoder half as wide",
        _pretrained("prefixmem_small"),
        ("prefixmem_small",),
        _metrics(l5=56.8, r100=11.8),
        equal_cost="prefixmem_classification",
        rate_of="prefixmem_classification",
    ),
    "large": Row("twice as wide, flat tokens (Qwen3-4B)", _flat,
                 paper=_metrics(l5=45.0, r100=10.9), decoder="large"),
    "prefixmem_on_large": Row("twice as wide, PrefixMem (Qwen3-4B)", _with(),
                              paper=_metrics(l5=55.8, r100=12.0), decoder="large"),
    "sid_transformer": Row("SID-Transformer", _sid_transformer, paper=_metrics(l5=39.6)),
    "prefixmem_gated": Row(
        "PrefixMem, gated by the token",
        _with(lambda memory: GatedPrefixMemoryConfig(**vars(memory))),
        equal_cost="prefixmem",
        rate_of="prefixmem",
    ),
    "suffix": Row(
        "suffix n-grams",
        _with(lambda memory: replace(memory, address="suffix")),
        paper=_metrics(l5=54.6),
        rate_of="prefixmem",
    ),
    "full_prefix": Row(
        "the whole prefix alone",
        _with(lambda memory: replace(memory, address="full_prefix")),
        paper=_metrics(l5=54.0),
        rate_of="prefixmem",
    ),
    "prefixmem_three_levels": Row(
        "PrefixMem, one level earlier too",
        _with(lambda memory: replace(
            memory, target_levels=(min(memory.target_levels) - 1, *memory.target_levels)
        )),
        paper=_metrics(l3=30.9),
        equal_cost="prefixmem",
        rate_of="prefixmem",
    ),
    "prefixmem_orders_1": _swept("n-grams of 1 code", lambda memory: replace(memory, orders=1)),
    "prefixmem_orders_2": _swept("n-grams of 1, 2", lambda memory: replace(memory, orders=2)),
    "prefixmem_orders_3": _swept("n-grams of 1 to 3", lambda memory: replace(memory, orders=3)),
    "prefixmem_heads_1": _swept("1 hash head", lambda memory: replace(memory, heads=1)),
    "prefixmem_heads_8": _swept("8 hash heads", lambda memory: replace(memory, heads=8)),
    "prefixmem_rate_1": _swept("learning as fast as the decoder", rate=1.0),
    "prefixmem_rate_20": _swept("learning 20 times as fast", rate=20.0),
}  # fmt: skip

# The first row is what the others are compared with.
TABLES = {
    "main": ("baseline", "baseline_longer", "prefixmem", "prefixmem_classification"),
    "rows": ("baseline", "prefixmem_quarter", "prefixmem", "prefixmem_large"),
    "initialisation": (
        "baseline", "prefixmem", "prefixmem_classification", "prefixmem_classification_large",
        "prefixmem_classification_catalogue", "prefixmem_tiger", "prefixmem_small_llm",
    ),
    "tiger": ("tiger", "tiger_prefixmem"),
    "decoders": (
        "baseline", "prefixmem", "small", "prefixmem_small", "large", "prefixmem_on_large",
    ),
    "encoders": ("baseline", "prefixmem", "prefixmem_gated", "sid_transformer"),
    "addresses": ("baseline", "prefixmem", "suffix", "full_prefix"),
    "levels": ("baseline", "prefixmem", "prefixmem_three_levels"),
    "sweep": (
        "baseline", "prefixmem", "prefixmem_orders_1", "prefixmem_orders_2", "prefixmem_orders_3",
        "prefixmem_heads_1", "prefixmem_heads_8", "prefixmem_rate_1", "prefixmem_rate_20",
    ),
}  # fmt: skip
# The sweep is ours.
OF_THE_PAPER = tuple(name for name in TABLES if name != "sweep")


def config_of(
    row: str,
    scale: Scale,
    base: Config,
    memory: PrefixMemoryConfig,
    rate: float,
    seed: int,
    folders: Folders,
) -> Config:
    """A row's config at a learning rate and a seed."""
    made = ROWS[row].make(scale.with_decoder(base, ROWS[row].decoder), memory, folders)
    optimizer: OptimizerConfig = replace(made.optimizer, learning_rate=rate)
    return replace(made, name=row, seed=seed, optimizer=optimizer)


def count_runs(rows: Iterable[str], rates: int, seeds: int) -> int:
    """How many runs these rows are, with those that they take a memory or a learning rate from."""
    found: dict[str, int] = {}

    def want(row: str, seeds: int) -> None:
        found[row] = max(seeds, found.get(row, 0))
        for other in ROWS[row].after:
            want(other, seeds)
        if (other := ROWS[row].rate_of) is not None:
            want(other, 1)

    for row in rows:
        want(row, seeds)
    chosen_by_others = sum(ROWS[row].rate_of is not None for row in found)
    return sum(found.values()) + (rates - 1) * (len(found) - chosen_by_others)
