"""Names of files with characters that messages, tables and trackers have to bear."""

from tests.data.corpus import Expected, case
from tests.data.corpus.files import pixels, save, write_jsonl


@case
def names_with_odd_characters(folder):
    names = [
        "100%.png",
        "a\tb.png",
        "a\nb.png",
        "\x1b[31mred.png",
        "\u202egnp.exe.png",
        "猫 👍\u200d.png",
        "'\"; $(x).png",
    ]
    images = [save(folder / name, pixels(number)) for number, name in enumerate(sorted(names))]
    write_jsonl(folder, [{"file_name": name, "text": f"caption of {name}"} for name in sorted(names)])
    return Expected(
        ["--train_data_dir", folder], [(image, f"caption of {name}") for image, name in zip(images, sorted(names))]
    )


@case
def an_image_with_an_end_of_line_in_its_name_is_damaged(folder):
    image = save(folder / "a.png", pixels(0))
    (folder / "b\nc%.png").write_bytes(b"no image")
    write_jsonl(folder, [{"file_name": name, "text": "x"} for name in ("a.png", "b\nc%.png")])
    return Expected(["--train_data_dir", folder], [(image, "x"), "the image cannot be read"])
