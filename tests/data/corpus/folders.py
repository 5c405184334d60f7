"""Folders of images with captions in metadata files."""

from tests.data.corpus import Expected, case
from tests.data.corpus.files import pixels, save, write_jsonl


@case
def a_file_is_called_train(folder):
    names = ["a.png", "eval.png", "test tube.png", "train.png", "validation.png"]
    images = [save(folder / name, pixels(number)) for number, name in enumerate(names)]
    write_jsonl(folder, [{"file_name": name, "text": f"caption of {name}"} for name in names])
    samples = [(image, f"caption of {name}") for image, name in zip(images, names)]
    return Expected(["--train_data_dir", folder], samples)


@case
def two_rows_for_one_image(folder):
    image = save(folder / "a.png", pixels(0))
    write_jsonl(folder, [{"file_name": "a.png", "text": text} for text in ("one", "two")])
    return Expected(["--train_data_dir", folder], [(image, ["one", "two"])])


@case
def the_image_of_a_row_is_missing(folder):
    image = save(folder / "a.png", pixels(0))
    write_jsonl(folder, [{"file_name": name, "text": "x"} for name in ("a.png", "lost.png")])
    printed = ("metadata.jsonl line 2: there is no file", "lost.png")
    return Expected(["--train_data_dir", folder], [(image, "x")], printed=printed, check=1)
