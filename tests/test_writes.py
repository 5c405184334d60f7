"""Every file that is written goes through `errors.writing`: what the sources say, and what a full disk does."""

import ppdiffusers_train  # noqa: F401

import ast
import re
import shutil

import pytest

from tests.conftest import ROOT, last_error, no_file_above, weights

pytestmark = pytest.mark.once

SOURCES = sorted([*(ROOT / "ppdiffusers_train").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])
# What writes, or changes a folder, whatever it is called on: of Python and the libraries, and of this project. A
# function of the project that is named here leaves its errors to its callers, which are in the wrapper or named, too.
WRITES = set(
    """write_text write_bytes mkdir makedirs touch unlink rmdir rename link symlink copyfile copy2 copytree savefig
    save save_pretrained save_config TemporaryFile TemporaryDirectory OSFile LogWriter SummaryWriter

    atomic_folder atomic_file replace_children write_checkpoint atomic_table write_tensors write_parts write_index
    cast_files
    correct_size save_model export_pipeline export link_tree link_file link_plainly remove_weights write_lora save_lora
    save_lora_weights save_weights save_optimizer write_plan write_shards Shard build_tokenizer
    build_t5_tokenizer export_combined export_prior sample_files require_room VisualDLTracker
    TensorBoardTracker build_kandinsky build_prior_pipeline build_sdxl write_weights replace_result delete_inside
    set_aside_other_branches keep_others link_or_copy
    set_aside_unlisted_result remove_earlier_checkpoints remove_folder make_once link_files UnfinishedPack write_merged
    export_converted export_single_file write_converted
    write_first write_pretrained write_kandinsky write_sd write_sdxl write_sd3""".split()
)
# These write where nobody loses a run: the launcher's logs are masked if possible, and toys are trained by developers.
ELSEWHERE = re.compile("ppdiffusers_train/(launcher|toy/recipes)/")


def is_write(call: ast.Call) -> bool:
    name = called_name(call)
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    texts = [value.value for value in (*call.args, *(word.value for word in call.keywords)) if is_text(value)]
    if name == "open":
        return any(re.fullmatch(r"[rbt]*[wax+][wabxt+]*", text) for text in texts)
    if name == "rmtree":
        return not any(word.arg == "ignore_errors" for word in call.keywords)
    return name in WRITES or (name in ("replace", "remove") and owner == "os")


def is_text(node) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def called_name(call: ast.Call) -> str:
    return getattr(call.func, "attr", None) or getattr(call.func, "id", "")


def is_guard(node) -> bool:
    """Whether errors of writes within a statement are told by the wrapper, or dealt with where they occur."""
    if isinstance(node, ast.With):
        return re.match(r"(\w+\.)?(writing\(|suppress\((OSError|Exception)\))", ast.unparse(node.items[0])) is not None
    caught = [ast.unparse(handler.type) for handler in getattr(node, "handlers", []) if handler.type]
    return any(re.search(r"\bOSError\b", classes) for classes in caught)


def others(guard) -> list:
    """The parts of such a statement whose errors it does not catch."""
    return guard.items[:1] if isinstance(guard, ast.With) else [*guard.handlers, *guard.orelse, *guard.finalbody]


def unguarded_writes(source: str) -> list:
    """(line, name) of the writes in a source whose errors nobody turns into a line."""
    found = []

    def look(node, leaves, guarded=False):
        """`leaves`: whether the function or class around a node leaves its errors to its callers."""
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            leaves, guarded = leaves or node.name in WRITES, False
        if isinstance(node, ast.Call) and is_write(node) and not (leaves or guarded):
            found.append((node.lineno, called_name(node)))
        for child in ast.iter_child_nodes(node):
            look(child, leaves, guarded or (is_guard(node) and child not in others(node)))

    look(ast.parse(source), leaves=False)
    return found


@pytest.mark.parametrize(
    "line, count",
    [
        ("path.write_text('')", 1),
        ("with open(path, 'w') as file: pass", 1),
        ("with path.open(mode='ab') as file: pass", 1),
        ("os.replace(path, other)", 1),
        ("write_tensors(path, {}, {})", 1),
        ("with writing('it', path): path.mkdir()", 0),
        ("with writing('it', path), open(path, 'x') as file: pass", 0),
        ("with suppress(OSError): path.unlink()", 0),
        ("try: path.mkdir()\n    except OSError: path.mkdir()", 1),
        ("try: path.mkdir()\n    except ValueError: pass", 1),
        ("open(path).read() + open(path, 'rb').read() + 'a'.replace('w', 'x')", 0),
    ],
)
def test_a_write_outside_the_wrapper_is_found(line, count):
    assert len(unguarded_writes(f"def work(path):\n    {line}")) == count
    assert not unguarded_writes(f"def save_model(path):\n    {line}"), "its callers are looked at"


def test_every_write_is_in_the_wrapper():
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in SOURCES}
    found = {path: unguarded_writes(text) for path, text in sources.items() if not ELSEWHERE.match(path)}
    assert not {path: calls for path, calls in found.items() if calls}


def test_a_disk_that_is_full_before_the_first_step_gets_one_line(train, tmp_path, capsys):
    arguments = "--output_dir: training_args.json cannot be written to .*/out': {}; the last checkpoint is untouched$"
    weights = "weights that are not needed while samples are encoded cannot be written to .*/cache': {}$"
    cache = f"--encoded_cache_dir={tmp_path / 'cache'}"
    for flag, expected in {"--no_encoded_cache": arguments, cache: weights}.items():
        expected = expected.format("File too large (.*)")
        with no_file_above(500), pytest.raises(SystemExit) as stopped:
            train("prior", flag, "--report_to=none")
        assert stopped.value.code == 1 and re.search(expected, last_error(capsys))
    assert not list((tmp_path / "cache").rglob("*.pack")) and not list((tmp_path / "cache").rglob(".*"))


def test_images_and_figures_that_cannot_be_written_do_not_end_a_run(
    train, kandinsky_jobs, monkeypatch, tmp_path, capsys
):
    """The folders of both become files, which root cannot write into either."""

    def replace_folders(module):
        for name in ("logs", "validation"):
            shutil.rmtree(tmp_path / "out" / name, ignore_errors=True)
            (tmp_path / "out" / name).write_text("")

    monkeypatch.setattr(kandinsky_jobs["prior"].KandinskyPriorTrainingModule, "after_step", replace_folders)
    flags = ["--validation_prompts=a", "--validation_steps=1", "--validation_inference_steps=2", "--report_to=all"]
    with pytest.raises(SystemExit) as ended:
        train("prior", *flags)
    said = capsys.readouterr().out
    assert ended.value.code == 3 and weights(tmp_path / "out", "prior") and "Traceback" not in said
    images = "no validation images, WriteError: --output_dir: validation images cannot be written to '[^']*/validation'"
    assert len(re.findall(images, said)) == 2
    for name in ("visualdl", "tensorboard"):
        figures = f"--report_to {name}: figures cannot be written to '[^']*/out/logs': Not a directory .*; continuing"
        assert len(re.findall(figures, said)) == 1, said
