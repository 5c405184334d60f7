"""`ppdiffusers-train pack`: shards that hold what was packed, made anew or gone on with to the same bytes."""

import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ppdiffusers_train.data.rows import decode_row
from ppdiffusers_train.data.shards import local_shards, open_shards
from tests.conftest import PHOTOS, ROOT, copy_photos
from tests.tools.test_check import make_folder, png, refused, row

pytestmark = pytest.mark.once  # no Paddle in it

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "png", "GIF": "png", "TIFF": "png"}  # in a shard


def pack(source, output, *flags):
    """Run the command; returns its exit status."""
    try:
        cli.main(["pack", str(source), str(output), "--processes=1", *map(str, flags)])
    except SystemExit as stopped:
        return stopped.code
    return 0


def result(capsys, *argv):
    """(exit status, what `pack --json` printed)."""
    status = pack(*argv, "--json")
    return status, json.loads(capsys.readouterr().out)


def read(output):
    """The rows of the shards in a folder, as training reads them."""
    return open_shards(local_shards([output]), "text", Path(output) / "cache")


def contents(folder):
    """{name: bytes} of the shards and the plan in a folder."""
    files = [*Path(folder).glob("*.tar"), Path(folder) / "pack.json"]
    return {file.name: file.read_bytes() for file in files}


def members(folder):
    """{name: bytes} of the files in all shards of a folder, in their order."""
    found = {}
    for shard in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(shard) as archive:
            found.update({member.name: archive.extractfile(member).read() for member in archive})
    return found


def test_the_photographs_come_out_as_they_went_in(tmp_path, capsys):
    status, document = result(capsys, PHOTOS, tmp_path / "shards", "--shard_size=200kB", "--name=album")
    described = {row["file_name"]: row["text"] for row in map(json.loads, (PHOTOS / "metadata.jsonl").open())}
    assert status == 0 and (document["samples"], document["left_out"]) == (15, [])
    assert document["shards"] == [f"album-{number:05d}.tar" for number in range(len(document["shards"]))]
    names = sorted(described)  # as `datasets` has them
    expected = {}
    for index, name in enumerate(names):
        expected |= {f"{index:06d}.jpg": (PHOTOS / name).read_bytes(), f"{index:06d}.txt": described[name].encode()}
    assert members(tmp_path / "shards") == expected
    sizes = [(tmp_path / "shards" / name).stat().st_size for name in document["shards"]]
    assert len(sizes) > 3 and max(sizes) <= 200_000 and sum(sizes) == document["bytes"]
    rows = read(tmp_path / "shards")
    assert [rows[index]["caption"] for index in range(15)] == [described[name] for name in names]


def encoded(number, format, mode, turned):
    """An image's bytes; `number` makes it differ from others, also in lossy formats."""
    pixels = np.full([6, 9, 3], 20 * number, np.uint8)
    pixels[:3, :4] = 255 - 20 * number
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6 if turned else 1
    Image.fromarray(pixels).convert(mode).save(file, format, **({} if format in ("BMP", "GIF") else {"exif": exif}))
    return file.getvalue()


captions = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ["", " padded ", "\n", "图 像", "\ufeffa"]
)
samples = st.tuples(
    st.sampled_from(sorted(FORMATS)), st.sampled_from(["RGB", "L"]), st.booleans(),
    captions | st.lists(captions, min_size=1, max_size=3),
)  # fmt: skip


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(samples=st.lists(samples, min_size=1, max_size=6), shard_size=st.sampled_from([1, 12_000, 10**6]))
def test_any_rows_come_out_of_the_shards_as_they_went_in(samples, shard_size):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows, images = [], []
        for number, (format, mode, turned, caption) in enumerate(samples):
            images.append(encoded(number, format, mode, turned))
            (folder / f"{number}.any").write_bytes(images[-1])
            rows.append(row(f"{number}.any", caption))
        (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert pack(folder / "list.jsonl", folder / "shards", f"--shard_size={shard_size}") == 0
        packed, files = read(folder / "shards"), members(folder / "shards")
        assert len(packed) == len(rows)
        for number, (image, (format, _, _, caption)) in enumerate(zip(images, samples)):
            expected = decode_row(image, caption if isinstance(caption, list) else [caption], "")
            assert packed[number]["caption"] == expected["caption"]
            assert np.array_equal(packed[number]["image"], expected["image"])
            stored = files[f"{number:06d}.{FORMATS[format]}"]
            assert stored == image or format not in ("JPEG", "PNG", "WEBP")
            assert Image.open(io.BytesIO(stored)).format == {"jpg": "JPEG"}.get(
                FORMATS[format], FORMATS[format].upper()
            )
        assert len(list((folder / "shards").glob("*.tar"))) == len(rows) or shard_size > 1


def test_captions_stand_where_other_readers_look_for_them(tmp_path):
    texts = ["one", ["one", "two"], " one ", [""]]
    files = {f"{number}.png": png(color=number) for number in range(4)}
    make_folder(tmp_path, files, [])
    lines = [json.dumps({"file_name": name, "words": text}) for name, text in zip(files, texts)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    assert pack(tmp_path / "list.jsonl", tmp_path / "shards", "--caption_column=words") == 0
    texts = {name: text for name, text in members(tmp_path / "shards").items() if not name.endswith("png")}
    assert texts == {
        "000000.txt": b"one",
        "000001.json": b'{"words": ["one", "two"]}',
        "000002.json": b'{"words": [" one "]}',
        "000003.txt": b"",
    }


def test_extensions_are_those_of_the_content_and_other_formats_are_said_once(tmp_path, capsys):
    files = {"a.jpg": png(), "b.bmp": encoded(1, "BMP", "RGB", False), "c.bmp": encoded(2, "BMP", "RGB", False)}
    make_folder(tmp_path / "photos", files, map(row, files))
    assert pack(tmp_path / "photos", tmp_path / "shards") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "PNG" in line]
    assert len(said) == 1 and said[0].startswith("BMP images become PNG, without loss; the first: ")
    assert list(members(tmp_path / "shards"))[::2] == ["000000.png", "000001.png", "000002.png"]


def test_what_a_conversion_changes_is_said(tmp_path, capsys):
    frames = [Image.new("L", (4, 4), colour) for colour in (0, 255)]
    deep = Image.fromarray(np.full((4, 4), 1000, np.uint16))
    files = {
        "a.tif": deep,
        "b.tif": deep,
        "c.tif": Image.new("CMYK", (4, 4)),
        "d.gif": frames[0],
        "e.bmp": frames[1],
        "f.tif": frames[1],
    }
    options = {"d.gif": {"save_all": True, "append_images": frames[1:]}, "f.tif": {"icc_profile": b"broken"}}
    (tmp_path / "photos").mkdir()
    for name, image in files.items():
        image.save(tmp_path / "photos" / name, **options.get(name, {}))
    make_folder(tmp_path / "photos", {}, map(row, files))
    assert pack(tmp_path / "photos", tmp_path / "shards") == 0
    said = [line.split("; ")[0] for line in capsys.readouterr().out.splitlines() if "PNG" in line]
    assert said == [
        "TIFF images become PNG, scaled to 8 bits", "TIFF images become PNG, converted from CMYK to RGB",
        "GIF images become PNG, only the first of several", "BMP images become PNG, without loss",
        "TIFF images become PNG, without their colour profile",
    ]  # fmt: skip
    stored = [
        Image.open(io.BytesIO(content)) for name, content in members(tmp_path / "shards").items() if "png" in name
    ]
    assert len(stored) == 6 and not any("icc_profile" in image.info for image in stored)


def test_a_dataset_of_the_hub_and_shards_can_be_packed(tmp_path, capsys):
    images = [Image.new("RGB", (20, 16), color) for color in ("red", "blue")]
    table = datasets.Dataset.from_dict({"picture": [*images, None], "words": [["one"], ["two", "three"], ["four"]]})
    table.cast_column("picture", datasets.Image()).to_parquet(str(tmp_path / "data" / "train.parquet"))
    columns = ["--image_column=picture", "--caption_column=words"]
    status, document = result(capsys, tmp_path / "data", tmp_path / "shards", *columns)
    assert (status, document["samples"]) == (1, 2)
    assert document["left_out"] == ["row 2: column 'picture' holds no image"]
    assert pack(tmp_path / "shards", tmp_path / "again", "--caption_column=words", "--shard_size=1") == 0
    assert members(tmp_path / "again") == members(tmp_path / "shards")
    assert len(list((tmp_path / "again").glob("*.tar"))) == 2


def test_what_cannot_be_used_is_named_and_left_out_and_keys_are_the_rows(tmp_path, capsys):
    files = {"a.png": png(), "b.png": b"broken", "c.png": png(color=1), "d.png": png(color=2), "e.png": png(color=3)}
    rows = [row("a.png"), row("b.png"), row("c.png", None), row("e.png"), row("f.png")]
    folder = make_folder(tmp_path / "photos", files, rows)
    status, document = result(capsys, folder, tmp_path / "shards")
    assert status == 1 and document["samples"] == 2
    reasons = [
        "line 5: there is no file .*f.png",
        "b.png .*: the image cannot be read",
        "c.png .* holds None; expected a text or several",
        "d.png .*: it has no caption: no row of metadata",
    ]
    assert len(document["left_out"]) == 4
    assert all(re.search(reason, text) for reason, text in zip(reasons, document["left_out"]))
    assert list(members(tmp_path / "shards")) == ["000000.png", "000000.txt", "000004.png", "000004.txt"]
    again = result(capsys, folder, tmp_path / "shards")[1]
    assert {**again, "seconds": 0} == {**document, "seconds": 0}, "also where there is nothing left to do"
    assert pack(folder, tmp_path / "reported") == 1
    out = capsys.readouterr().out
    assert all(f"left out: {text}" in out for text in document["left_out"]) and "2 samples in 1 shards" in out


def test_names_that_are_no_utf_8_are_shown_as_far_as_they_can_be(tmp_path, capsys):
    folder = make_folder(tmp_path / "photos", {"a.png": png()}, [row("a.png")])
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(png())
    for argv in (["check", folder], ["pack", folder, tmp_path / "shards"], ["pack", folder, tmp_path / "shards"]):
        for flags in ([], ["--json"]):
            with pytest.raises(SystemExit) as stopped:
                cli.main([*map(str, argv), "--processes=1", *flags])
            said = capsys.readouterr().out.replace(r"\\", "\\")  # in JSON, a backslash is two
            assert stopped.value.code == 1 and ("caf\\udce9.png (row 1): it has no" in said or "1 left out" in said)


def test_of_nothing_but_bad_samples_no_shard_is_made(tmp_path, capsys):
    folder = make_folder(tmp_path / "photos", {"a.png": b"", "b.png": b"x"}, [row("a.png"), row("b.png")])
    status, document = result(capsys, folder, tmp_path / "shards")
    assert status == 1 and document["shards"] == [] and len(document["left_out"]) == 2
    assert not list((tmp_path / "shards").glob("*.tar"))


# Going on.


def test_the_same_data_gives_the_same_bytes_with_any_number_of_processes(tmp_path):
    pack(PHOTOS, tmp_path / "one", "--shard_size=200kB")
    time.sleep(1.1)  # tar files know seconds
    pack(PHOTOS, tmp_path / "two", "--shard_size=200kB", "--processes=2")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_pack_that_is_killed_goes_on_with_the_next_shard_to_the_same_bytes(tmp_path, capsys):
    folder = copy_photos(tmp_path / "photos", 15)
    (folder / "china.jpg").write_bytes(b"broken")
    pack(folder, tmp_path / "whole", "--shard_size=100kB")
    command = [sys.executable, "-m", "ppdiffusers_train.cli", "pack", folder, tmp_path / "parts", "--shard_size=100kB"]
    process = subprocess.Popen([*map(str, command), "--processes=1"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "parts" / "photos-00002.tar").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    plan = json.loads((tmp_path / "parts" / "pack.json").read_text())
    there = {shard["name"]: (tmp_path / "parts" / shard["name"]).stat().st_mtime_ns for shard in plan["shards"]}
    assert there
    capsys.readouterr()
    assert pack(folder, tmp_path / "parts", "--shard_size=100kB") == 1
    assert f"{len(there)} shards are complete, up to row" in capsys.readouterr().out
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in there} == there, "not written again"
    assert not list((tmp_path / "parts").glob(".*")), "and nothing else is left behind"


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"short")])
def test_shards_that_are_gone_or_cut_short_are_written_again(tmp_path, damage):
    pack(PHOTOS, tmp_path / "shards", "--shard_size=200kB")
    before = contents(tmp_path / "shards")
    damage(tmp_path / "shards" / "photos-00001.tar")
    pack(PHOTOS, tmp_path / "shards", "--shard_size=200kB")
    assert contents(tmp_path / "shards") == before


def test_a_disk_that_is_full_costs_no_shard_and_the_same_command_goes_on(tmp_path):
    command = ["pack", PHOTOS, tmp_path / "shards", "--processes=1", "--name=a"]
    code = (
        "import resource, sys; from ppdiffusers_train import cli; resource.setrlimit(resource.RLIMIT_FSIZE, "
        "(200_000, 200_000)); sys.argv[0] = 'ppdiffusers-train'; cli.main()"
    )
    pack(PHOTOS, tmp_path / "warm", "--shard_size=300kB", "--name=a")  # the table's cache is a large file, too
    environment = {**os.environ, "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE)}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command), "--shard_size=300kB"], cwd=ROOT, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(
        "OUTPUT_DIR: shards cannot be written to .*: File too large .*; the same command resumes$",
        done.stderr.splitlines()[-1],
    )
    assert [file.name for file in (tmp_path / "shards").iterdir()] == ["pack.json"], "the plan comes first"
    assert pack(PHOTOS, tmp_path / "shards", "--shard_size=300kB", "--name=a") == 0
    assert contents(tmp_path / "shards") == contents(tmp_path / "warm")


def test_a_plan_of_something_else_is_refused_with_one_line(tmp_path, capsys):
    folder = copy_photos(tmp_path / "photos", 3)
    command, size = ["pack", folder, tmp_path / "shards"], "--shard_size=1MB"
    pack(folder, tmp_path / "shards", size)
    before = contents(tmp_path / "shards")
    capsys.readouterr()
    assert "(other: --shard_size); expected an empty folder" in refused(capsys, *command, "--shard_size=2MB")
    assert "(other: --name)" in refused(capsys, *command, size, "--name=x")
    os.utime(folder / "coffee.jpg")
    assert "(other: data)" in refused(capsys, *command, size)
    (tmp_path / "shards" / "pack.json").write_text("{")
    assert "pack.json cannot be read" in refused(capsys, *command, size)
    (tmp_path / "shards" / "pack.json").unlink()
    assert "photos-00000.tar is there, but no pack.json" in refused(capsys, *command, size)
    before.pop("pack.json")
    assert {name: (tmp_path / "shards" / name).read_bytes() for name in before} == before


def test_other_mistakes_are_one_line_too(tmp_path, capsys):
    folder = copy_photos(tmp_path / "photos", 1)
    assert "OUTPUT_DIR: " in refused(capsys, "pack", folder, folder / "shards") and not (folder / "shards").exists()
    assert "OUTPUT_DIR: files cannot be written to" in refused(
        capsys, "pack", PHOTOS, folder / "metadata.jsonl" / "shards"
    )
    for name, problem in {"a/b": "not", ".a": "not", "": "empty"}.items():
        line = refused(capsys, "pack", folder, tmp_path / "shards", f"--name={name}")
        assert f"--name: {name!r} is {problem}" in line
    for size in ("much", "0", "-5MB", "5 apples"):
        line = refused(capsys, "pack", folder, tmp_path / "shards", f"--shard_size={size}")
        assert f"--shard_size: '{size}' is not a size such as 500MB or 2GiB" in line


@pytest.mark.parametrize("text, size", [("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("4096", 4096), ("2k", 2000)])
def test_sizes_are_read(text, size):
    assert cli.byte_size(text) == size
