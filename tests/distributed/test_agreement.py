"""Two ranks that were started with different things: each is named, and nothing is trained."""

import ppdiffusers_train  # noqa: F401

import shutil
from pathlib import Path

import pytest

from tests.distributed.copies import one_bit, remove_a_picture, replace
from tests.distributed.launching import TWO, launch_all, script
from tests.distributed.worker import BEGINS

pytestmark = pytest.mark.once
NOT_A_NUMBER = Path(__file__).with_name("not_a_number_on_rank_one.py")
BOTH = "; expected the same on all ranks"


@pytest.fixture(scope="module")
def told(base_flags, kandinsky, kandinsky_jobs, photos, tmp_path_factory):
    """`told(name)`: what all ranks said in the run of that name, in which `{rank}` stands for a rank's number."""
    root = tmp_path_factory.mktemp("agreement")

    def copies(folder, name, change=lambda folder: None):
        for rank in (0, 1):
            shutil.copytree(folder, root / f"{name}-{rank}")
        change(root / f"{name}-1")
        return root / f"{name}-{{rank}}"

    def data(name, *change):
        return f"--train_data_dir={copies(photos, name, *change)}"

    def prior(name, *change):
        return f"--pretrained_prior_model_name_or_path={copies(kandinsky[0], name, *change)}"

    short = [*base_flags, *TWO, "--max_train_steps=1", "--checkpointing_steps=1"]
    kandinsky_jobs["prior"].main([*short, f"--output_dir={root / 'begun'}"])
    copies(root / "begun", "begun")
    shared, own = f"--output_dir={root / 'shared'}", f"--output_dir={root / 'own-{rank}'}"
    begun = f"--output_dir={root / 'begun-{rank}'}"
    latest = ["--resume_from_checkpoint=latest", "--max_train_steps=2"]
    weights, mean = "prior/diffusion_paddle_model.safetensors", "image_processor/preprocessor_config.json"
    runs = {
        "seed": [shared, "--seed={rank}"],
        "missing picture": [shared, data("missing", remove_a_picture)],
        "caption": [shared, data("caption", replace("metadata.jsonl", "tabby cat", "tabby dog"))],
        "picture": [shared, data("picture", one_bit("chelsea.jpg"))],
        "base": [shared, prior("base", one_bit(weights))],
        "frozen": [shared, prior("frozen", one_bit("text_encoder/model.safetensors"))],
        "cached frozen": [
            shared,
            f"--encoded_cache_dir={root / 'cache'}",
            prior("cached", one_bit("text_encoder/model.safetensors")),
        ],
        "settings": [shared, prior("settings", replace(mean, "0.48145466", "0.48145467"))],
        "sharded": [own, "--sharding_degree=2"],
        "cache": [shared, f"--encoded_cache_dir={root / 'cache-{rank}'}"],
        "copies": [own, data("data"), prior("prior")],
        "resumed": [own, *latest],
        "resumed copies": [begun, *latest],
        "not a number": [shared, "--max_train_steps=9"],
    }
    files = {name: NOT_A_NUMBER if name == "not a number" else script("prior") for name in runs}
    launch_all(root, [(files[name], [*short, f"--tracker_project_name={name}", *runs[name]]) for name in runs])
    parts = [(root / "log" / f"workerlog.{rank}").read_text().split(BEGINS)[1:] for rank in (0, 1)]
    assert [len(part) for part in parts] == [len(runs)] * 2
    assert not list(root.glob("shared/checkpoint*-9")) and not list(root.glob("*/.same*"))
    return {name: texts for name, *texts in zip(runs, *parts)}


@pytest.mark.parametrize(
    "name, message",
    [
        ("seed", f"--seed: rank 1 has 1, rank 0 has 0{BOTH}"),
        ("missing picture", f"number of samples: rank 1 has 6, rank 0 has 7{BOTH}"),
        ("caption", "caption of chelsea.jpg (row 2): rank 1 has "),
        ("picture", "content of chelsea.jpg (row 2): rank 1 has "),
        ("base", "weights of prior: rank 1 has "),
        ("frozen", "weights of text_encoder: rank 1 has "),
        ("cached frozen", "weights of text_encoder: rank 1 has "),
        ("settings", "settings of image_processor: rank 1 has "),
        ("sharded", "--output_dir: rank 1 has "),
        ("cache", "--encoded_cache_dir: rank 1 has "),
        ("resumed", '--resume_from_checkpoint latest: rank 1 has "checkpoint-1, which is not a complete checkpoint: '),
        ("resumed copies", "--output_dir: rank 1 has "),
    ],
)
def test_what_differs_is_named_on_all_ranks_and_nothing_is_trained(told, name, message):
    for text in told[name]:
        assert f"error: {message}" in text and "ended with status 2" in text, text
        assert "Traceback" not in text and "steps of" not in text, text


def test_copies_are_alike_and_a_fresh_run_may_have_folders_of_its_own(told):
    assert "wrote the result" in told["copies"][0] and "ended with" not in "".join(told["copies"])
    assert "; rank 0 alone writes" in told["copies"][0] and "; rank 0 alone writes" not in told["copies"][1]


def test_the_rank_is_named_whose_gradient_was_not_a_number_first(told):
    for text in told["not a number"]:
        assert "step 2, rank 1: the norm of the gradients is nan on " in text and "ended with status 1" in text, text
