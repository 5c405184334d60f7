"""What the reader of pages does not accept."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import pytest

from tests.docs.reader import Reader

pytestmark = pytest.mark.once

LAUNCH = "python -u -m paddle.distributed.launch --gpus 0-3 train_text_to_image_sdxl.py"
SAVES_NOTHING = """class Image:
    def save(self, name):
        pass
Image().save("x.png")"""


def block(language, code):
    return f"# Page\n\nThe file `flags.txt`:\n\n```{language}\n{code}\n```\n"


@pytest.mark.parametrize(
    "language, code, complaint",
    [
        ("bash", "curl example.com", "not a command that this test knows"),
        ("bash", "cd ../..", "cd"),
        ("bash", "make nonsense", "nonsense"),
        ("bash", "cd examples/sdxl\nmake test", "in the root of the repository"),
        ("bash", "pip install -r requirements/none.txt", "none.txt"),
        ("bash", "pip install paddlepaddle==1.0", "paddlepaddle==1.0"),
        ("bash", "python train_text_to_image_sdxl.py", "not a command that this test knows"),
        ("bash", "cd examples/sdxl\npython -u train_text_to_image_sd3.py", "no train_text_to_image_sd3.py in"),
        ("bash", f"cd examples/sdxl\n{LAUNCH}", "not a launch that a test tries"),
        ("console", "ls", "a block in console"),
        ("", "ls", "a block in no language"),
        ("json", '{"file_name": "x.jpg", "text": "no photograph"}', "no photograph"),
        ("yaml", "resolution: 64", "is no file name"),
        ("python", "    shown = 'in no script'", "code that no script has"),
        ("python", SAVES_NOTHING, "promises files that are not there"),
    ],
)
def test_a_page_that_says_something_wrong_is_an_error(language, code, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(block(language, code))
    with pytest.raises(AssertionError, match=complaint):
        Reader(page, tmp_path / "copy", models={}).read()


def test_a_variable_must_have_been_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(block("bash", "export HERE=examples\ncd $HERE\ncd ${THERE:-sdxl}\ncd $NOWHERE"))
    reader = Reader(page, tmp_path / "copy", models={})
    with pytest.raises(KeyError, match="NOWHERE"):
        reader.read()
    assert reader.root.joinpath("examples", "sdxl").samefile(".")


def test_snippets_for_diffusers_wait_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(block("python", "from diffusers import NoSuchThing\nNoSuchThing().save('x.png')"))
    Reader(page, tmp_path / "copy", models={}).read()
    with pytest.raises(ImportError):
        Reader(page, tmp_path / "other", models={}, torch_models={}).read()
