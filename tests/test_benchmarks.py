"""The benchmarks run, measure what they say, and import no more than they need."""

import dataclasses
import json
import subprocess
import sys

import jax
import matplotlib
import numpy as np
import pytest
import torch
from conftest import command_environment, prefixmem
from matplotlib.figure import Figure

from prefixmem_jax.benchmarks import fixtures, load, step, torch_peer
from prefixmem_jax.benchmarks.fixtures import (
    one_device_model,
    random_batches,
    table_training,
)
from prefixmem_jax.benchmarks.timing import bar_plot
from prefixmem_jax.config_groups import DecoderConfig
from prefixmem_jax.sid_encoders.prefix_memory import PrefixMemoryConfig


def test_bench_memory_writes_numbers_and_a_plot(tmp_path):
    done = prefixmem(
        "bench", "memory", "--rows", 512, 1024, "--compared-rows", 1024, "--repeats", 1,
        "--batch-size", 8,
        "--json", tmp_path / "m.json", "--plot", tmp_path / "m.png",
    )  # fmt: skip
    found = json.loads((tmp_path / "m.json").read_text())
    assert set(found["step_seconds"]) == {"512", "1024"}
    assert min(found["row_wise_seconds"], found["dense_seconds"]) > 0
    sent = {name: one["bytes_sent"] for name, one in found["fetch"].items()}
    # Every device's rows for the global batch, against each device's own distinct rows.
    assert (
        0 < 10 * sent["exchange"] < min(sent["xla_partitioned_gather"], sent["masked_all_gather"])
    )
    assert found["machine"]["devices"] == 8
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert "dense AdamW" in done.stdout


def test_plots_show_numbers_in_the_unit_that_they_name(tmp_path, monkeypatch):
    """And leave matplotlib to whoever else uses it."""
    shown, before = [], dict(matplotlib.rcParams)
    save = Figure.savefig

    def savefig(figure, *arguments, **options):
        for axis in figure.axes:
            shown.append((axis.get_title(), [bar.get_width() for bar in axis.patches]))
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    sizes = dict.fromkeys(("checkpoint", "largest_shard", "arrays", "peak", "state"), 10**9)
    bar_plot(tmp_path / "load.png", load.panels({**sizes, "state_peak": 2 * 10**9}))
    about = {"decoder": "small", "step_seconds": {"without": 0.25, "with": 0.5}}
    bar_plot(tmp_path / "step.png", step.panels(about))
    assert shown == [
        ("host memory, GB", [1, 1, 1, 1, 1, 2]),
        ("train step, small, ms", [250, 500]),
    ]
    assert dict(matplotlib.rcParams) == before


def test_bench_step_writes_the_overhead(tmp_path):
    prefixmem(
        "bench", "step", "--rows", 512, "--repeats", 1, "--items", 3000, "--negatives", 64,
        "--batch-size", 4,
        "--json", tmp_path / "s.json", "--plot", tmp_path / "s.png",
    )  # fmt: skip
    found = json.loads((tmp_path / "s.json").read_text())
    seconds = found["step_seconds"]
    assert found["tokens"] == 4 * 128
    assert found["sid_encoder_overhead"] == pytest.approx(seconds["with"] / seconds["without"] - 1)
    assert found["item_head_overhead"] == pytest.approx(seconds["item_head"] / seconds["with"] - 1)
    decoder = one_device_model("quickstart", None, 4, 128, 256)
    weights = sum(leaf.size for leaf in jax.tree.leaves(decoder.params) if leaf.ndim > 1)
    # Forward and twice backward; and attention's scores, which are less than a third of it.
    used = 6 * (weights - decoder.vocabulary.size * 96 * (not decoder.config.model.tied_embeddings))
    assert 1 < found["flops"]["without"] / (used * found["tokens"]) < 1.4
    assert found["flops"]["with"] > found["flops"]["without"]


def test_bench_step_beside_torch_trains_the_same_number_of_parameters(monkeypatch):
    """With one layer, as torch takes half a minute to compile each."""
    small = dataclasses.replace(DecoderConfig(), layers=1)
    monkeypatch.setitem(fixtures.DECODERS, "quickstart", (small, 0))
    found = step.bench_step("quickstart", 512, 64, 3, batch_size=4, peer=True)
    peer, ours = found["peer"], one_device_model("quickstart", None, 4, 128, 256).params
    assert peer["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(ours))
    ratio = peer["seconds"] / found["step_seconds"]["without"]
    assert found["peer_ratio"] == pytest.approx(ratio) and ratio > 0
    assert f"ours has {ratio:.2f} times its tokens/s" in step.describe(found)


def test_loading_takes_the_parameters_and_little_more(tmp_path):
    """1.3 of the largest file beside the arrays, a bound that holds at any size; of a state of a run's
    own, with optimizer and the table's moments, 1.3 in all.

    On a busy machine a thread may let go late of what it has copied: what loading needs is the least
    of three peaks.
    """
    for _ in range(3):
        prefixmem("bench", "load", "--size", "800MB", "--json", tmp_path / "l.json")
        found = json.loads((tmp_path / "l.json").read_text())
        if max(found["over_shard"], found["over_state"]) < 1.3:
            break
    assert found["checkpoint"] == pytest.approx(8e8, rel=0.1)
    assert found["largest_shard"] < 0.4 * found["checkpoint"]
    assert found["peak"] >= found["arrays"] > found["checkpoint"]
    assert found["over_shard"] < 1.3
    assert found["state"] == pytest.approx(8e8, rel=0.15)
    assert found["state"] <= found["state_peak"] < 1.3 * found["state"]
    assert 0 < found["state_held_up"] <= found["state_saved"] and found["state_read"] > 0


def test_bench_decode_measures_whole_decodes_and_the_constraint(tmp_path):
    done = prefixmem(
        "bench", "decode", "--decoder", "quickstart", "--catalogues", 300, 3000, "--beams", 4, 9,
        "--levels", 3, "--codes", 32, "--repeats", 1, "--peer", "--json", tmp_path / "d.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "d.json").read_text())
    assert set(found["by_beam"]) == {"4", "9"}
    for width, one in found["by_beam"].items():
        assert set(one["constrained_seconds"]) == {"300", "3000"}
        for size, whole in one["constrained_seconds"].items():
            assert 0 < one["constraint_seconds"][size] < whole
            assert one["users_per_second"][size] == pytest.approx(2 / whole)
        ratio = found["peer"]["seconds"][width] / one["unconstrained_seconds"]
        assert found["peer_ratio"][width] == pytest.approx(ratio) and ratio > 0
        assert f"ours has {ratio:.2f} times its users/s" in done.stdout
    assert found["tries"]["300"]["sids"] <= 300 and found["tries"]["300"]["widest"][0] == 32
    assert "MB per million" in done.stdout


def test_the_peers_beam_search_answers_what_ours_is_asked():
    """All codes of a level, and nothing else, by their probabilities among each other."""
    levels, beams = [(3, 7), (7, 11)], 4  # every first code is kept, so the search is exact
    model = torch_peer.build(dataclasses.asdict(DecoderConfig()), 12, 8).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=4.0)  # codes that differ
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.2)
    prompts = torch.tensor([[0, 1, 2, 5], [2, 9, 4, 1]])
    found, scores = torch_peer.best_sids(model, prompts, beams, levels)
    every = torch.cartesian_prod(*(torch.arange(*level) for level in levels))
    for user, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = model(torch.cat([prompt.expand(16, -1), every], dim=1)).logits[:, 3:5]
        by_level = [logits[:, i, slice(*level)].log_softmax(-1) for i, level in enumerate(levels)]
        of_all = sum(
            by_level[i].gather(1, every[:, i, None] - first)[:, 0]
            for i, (first, _) in enumerate(levels)
        )
        best = of_all.argsort(descending=True)[:beams]
        torch.testing.assert_close(scores[user], of_all[best], rtol=1e-4, atol=1e-4)
        assert found[user].tolist() == every[best].tolist()


def test_bench_input_packs_reads_and_trains(tmp_path):
    done = prefixmem(
        "bench", "input", "--interactions", 20_000, "--shards", 3, "--workers", 2, "--repeats", 1,
        "--json", tmp_path / "i.json", "--plot", tmp_path / "i.png",
    )  # fmt: skip
    found = json.loads((tmp_path / "i.json").read_text())
    # 9.9 items of a history on average, as none is longer than 40, and two of them held out.
    assert found["users"] == 2000 and found["interactions"] == pytest.approx(20_000, rel=0.1)
    tokens = 4 * (found["interactions"] - 2 * found["users"]) + found["users"]
    assert tokens / 128 < found["rows"] < 1.03 * tokens / 128 + 3
    assert found["packing"]["interactions_per_second"] == pytest.approx(
        found["interactions"] / found["packing"]["seconds"]
    )
    assert min(found[name]["peak"] for name in ("packing", "training")) > 5e7
    speeds = [found[name]["tokens_per_second"] for name in ("reading", "step")]
    assert found["ratio"] == pytest.approx(speeds[0] / speeds[1])
    assert found["ratio"] > 1  # however busy the machine is: training does not wait for its input
    assert "interactions/s" in done.stdout


def test_mistakes_are_one_line_before_anything_runs(tmp_path):
    done = prefixmem("bench", "load", "--size", "much", expect=2)
    assert done.stderr == "prefixmem: --size much: expected a size such as 4GB or 500MB\n"
    done = prefixmem("bench", "memory", "--json", tmp_path / "no" / "m.json", expect=2)
    assert "--json: no such folder" in done.stderr.splitlines()[-1]


def test_row_wise_and_dense_tables_take_the_same_steps():
    """What the benchmark compares is the same work: rows of the batch end up alike."""
    memory = PrefixMemoryConfig(target_levels=(4, 5), rows=300, d_mem=64)
    spec = one_device_model("quickstart", memory, 4, 32, 16)
    batches = random_batches(spec, 1)
    calls = [table_training(spec, batches, dense=dense) for dense in (False, True)]
    for number in range(2):  # the warm-up starts at rate zero: the second step moves the rows
        row_wise, dense = (np.asarray(call()[0]) for call in calls)
        if number == 0:
            start = row_wise.copy()
    assert not np.array_equal(row_wise, start)
    np.testing.assert_allclose(row_wise, dense, rtol=1e-5, atol=1e-7)


def test_benchmarks_import_no_data_pipeline_or_checkpoints():
    """So that they run where only JAX, Flax and optax are installed."""
    code = (
        "import sys, prefixmem_jax.benchmarks.memory, prefixmem_jax.benchmarks.step\n"
        "import prefixmem_jax.benchmarks.decode\n"
        "print(sorted({'grain', 'orbax', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=command_environment()
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_bench_sids_measures_every_quantizer(tmp_path):
    done = prefixmem(
        "bench", "sids", "--vectors", 3000, "--width", 16, "--levels", 2, "--codes", 16,
        "--iterations", 3, "--steps", 30, "--json", tmp_path / "q.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "q.json").read_text())
    assert set(found["systems"]) >= {"residual_kmeans", "rq_vae"}
    for one in found["systems"].values():
        assert one["fit_seconds"] > 0 and one["encode_seconds"] > 0 and 0 < one["error"] < 0.8
        assert 1e8 < one["peak"] < 1e11
    assert "rq_vae" in done.stdout
