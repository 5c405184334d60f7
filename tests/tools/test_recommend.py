"""`ppdiffusers-train recommend`, its counts and the presets made of them."""

import ppdiffusers_train  # noqa: F401

import sys
from functools import cache

import pytest

from ppdiffusers_train.cli import main
from ppdiffusers_train.loop.dry_run import options_of
from ppdiffusers_train.loop.memory_estimate import take_inventory
from ppdiffusers_train.tools.recommend import (
    CHOICES,
    GPU_SIZES,
    USABLE,
    WEIGHTS,
    as_counts,
    inventory_from,
    peak_of,
    preset,
    read_counts,
    recommend,
)
from ppdiffusers_train.toy.demo.jobs import JOBS
from tests.conftest import ROOT, last_error, load_script

PRESETS = ROOT / "examples" / "presets"


@cache
def parser_of(job):
    return load_script(ROOT / "examples" / JOBS[job].script).build_parser()


@pytest.mark.once
@pytest.mark.parametrize("job", ["sd-lora", "prior"])
def test_counts_of_weights_are_those_of_the_models(job, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import memory

    module, _ = memory.build(job, tmp_path)
    counts, found = read_counts()[job], as_counts(JOBS[job].script, take_inventory(module, {}, 0, 0), {}, {})
    for name in ("script", "trained", *WEIGHTS):
        assert found[name] == counts[name], name
    if counts["quantized"]:
        assert memory.frozen_in("nf4", job, tmp_path) == counts["quantized"]["nf4"]


@pytest.mark.once
def test_every_job_is_counted_and_every_preset_is_made_of_the_counts():
    counts = read_counts()
    assert list(counts) == [job for job in JOBS if job in counts]
    made = {f"{job}-{size}gb.yaml": preset(counts[job], size) for job in counts for size in GPU_SIZES}
    made = {file: text for file, text in made.items() if text}
    assert {path.name: path.read_text() for path in PRESETS.iterdir()} == made
    assert {file.rpartition("-")[0] for file in made} == {*counts}, "each job fits one of the GPUs"


@pytest.mark.once
@pytest.mark.parametrize("job", read_counts())
def test_a_preset_fits_as_its_script_understands_it(job):
    counts, files = read_counts()[job], sorted(PRESETS.glob(f"{job}-[0-9]*gb.yaml"))
    for file in files:
        models = [f"--{flag}=any" for flag in JOBS[job].model_flags]
        args = parser_of(job).parse_args([f"--config={file}", *models])
        gigabytes = int(file.stem.rpartition("-")[2].removesuffix("gb"))
        inventory = inventory_from(counts, args.resolution, getattr(args, "quantize_base", "no"))
        args.encoded_cache_dir = "x" if args.encoded_cache else None
        assert inventory.peak(options_of(args)) <= USABLE * gigabytes * 1e9, file.name


@pytest.mark.once
def test_the_first_choice_that_fits_is_recommended_with_the_largest_batch(capsys):
    counts = read_counts()["sd-lora"]
    for gigabytes in range(2, 25):
        found = recommend(counts, 768, gigabytes)
        fits = [flags for flags in CHOICES if peak_of(counts, 768, flags) <= USABLE * gigabytes * 1e9]
        assert (found.flags if found else None) == (fits[0] if fits else None)
        if found:
            peaks = [peak_of(counts, 768, found.flags, batch) for batch in (found.batch, 2 * found.batch)]
            assert peaks[0] <= USABLE * gigabytes * 1e9 < peaks[1] or found.batch == 64
    with pytest.raises(SystemExit) as ended:
        main(["recommend", "sd-lora", "--memory", "1"])
    assert ended.value.code == 1 and "does not fit a GPU with 1 GB; it needs 8 GB" in capsys.readouterr().out
    main(["recommend", "sd-lora", "--memory", "24", "--resolution", "512"])
    said = capsys.readouterr().out
    assert said.startswith("stable_diffusion/train_text_to_image_lora.py --resolution 512 --train_batch_size 1 --enc")
    assert " GB of 24 GB; the largest --train_batch_size is " in said
    with pytest.raises(SystemExit) as ended:
        main(["recommend", "sd-lora", "--memory", "24", "--resolution", "640"])
    assert ended.value.code == 2 and "no counts of sd-lora at 640; expected 512 or 768" in last_error(capsys)
