"""A sweep as a user runs it: every combination once, mistakes before anything is trained."""

import json

import pytest
from conftest import prefixmem

from prefixmem_jax.errors import UserError
from prefixmem_jax.sweep import combinations, split_values

SMALL = [
    "steps=4", "data.batch_size=8", "evaluation.every_steps=2", "evaluation.validation_examples=20",
    "data.synthetic.items=300", "data.synthetic.users=200", "sid_encoder=none", "model.layers=1", "model.d_model=32",
]  # fmt: skip


def test_every_combination_is_trained_once_and_the_best_is_first(tmp_path):
    command = [
        "sweep", "quickstart/baseline", "--out", tmp_path, *SMALL,
        "optimizer.learning_rate=1e-5,1e-2", "seed=0,1",
    ]  # fmt: skip
    done = prefixmem(*command)
    results = json.loads((tmp_path / "sweep.json").read_text())
    names = {f"learning_rate={rate},seed={seed}" for rate in ("1e-5", "1e-2") for seed in (0, 1)}
    assert {result["run"] for result in results} == names
    losses = [result["validation/loss"] for result in results]
    assert losses == sorted(losses)
    assert [result["optimizer.learning_rate"] for result in results] == ["1e-2"] * 2 + ["1e-5"] * 2
    for result in results:
        assert (tmp_path / result["run"] / "config.json").exists()
        assert f"{result['validation/loss']:.4f}" in done.stdout
        config = json.loads((tmp_path / result["run"] / "config.json").read_text())
        assert str(config["seed"]) == result["seed"] and config["steps"] == 4
    again = prefixmem(*command)  # nothing is left to train
    assert again.stdout.splitlines()[-6:] == done.stdout.splitlines()[-6:]
    assert json.loads((tmp_path / "sweep.json").read_text()) == results
    other = prefixmem(*command, "evaluation.select_by=item_ndcg@10", expect=2)
    assert "seed=0: has no validation/item_ndcg@10; expected" in other.stderr


def test_values_with_commas_stand_in_brackets():
    assert split_values("1e-3,3e-3") == ["1e-3", "3e-3"]
    assert split_values("(1,3,4),(3,4)") == ["(1,3,4)", "(3,4)"]
    assert split_values("a") == ["a"] and split_values("") == [""]
    runs = combinations(
        "recommend/small", ["sid_encoder.target_levels=(1,3,4),(1,4)", "seed=0,1", "steps=7"]
    )
    found = [(one.sid_encoder.target_levels, one.seed, one.steps) for _, _, one in runs]
    assert found == [((1, 3, 4), 0, 7), ((1, 3, 4), 1, 7), ((1, 4), 0, 7), ((1, 4), 1, 7)]
    assert len({name for name, _, _ in runs}) == 4
    assert all(not set(name) & set("/() ") for name, _, _ in runs)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=3"], "nothing varies"),
        (["stepz=1,2"], "stepz: no such key"),
        (["steps=1,x"], "steps: expected"),
        (["seed=" + ",".join(map(str, range(1001)))], "more than 1,000 combinations"),
        (["name=a/b,a?b"], "no folder name of their own"),
        (["evaluation.select_by=loss,item_recall@10"], "select_by says which run is best"),
    ],
)
def test_mistakes_are_found_first(overrides, message):
    with pytest.raises(UserError, match=message):
        combinations("quickstart/baseline", overrides)
