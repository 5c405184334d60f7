import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
INIT = (HERE / "ppdiffusers_train" / "__init__.py").read_text("utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]
EXAMPLES = HERE / "examples"
EXAMPLE_FILES = runpy.run_path(str(HERE / "ppdiffusers_train/tools/example_files.py"))["example_files"](EXAMPLES)

# paddlepaddle and paddlepaddle-gpu install the same package, `paddle`, over each other, so neither is required here:
# take the extra `cpu` or `gpu`, or install Paddle beforehand. Which safetensors works depends on Paddle's version.
REQUIRED = [
    "paddlenlp==2.8.1",
    "ppdiffusers==0.29.0",
    "huggingface_hub==0.25.2",
    "aistudio_sdk==0.2.6",
    "numpy==1.26.4",
    "datasets==2.21.0",
    "pyarrow==17.0.0",
    "pillow==10.4.0",
    "safetensors>=0.4.5,<0.9",
    "tokenizers>=0.20,<0.24",
    "visualdl==2.5.3",
    "webdataset==1.0.2",
    "PyYAML",
    "tqdm",
    "ml_dtypes==0.4.1",
]
CPU = ["paddlepaddle==3.3.1", "safetensors==0.8.0"]
GPU = ["paddlepaddle-gpu==2.6.2", "safetensors<0.5", "scipy<1.14"]
TESTS = ["pytest", "pytest-xdist", "hypothesis"]


class BuildWithExamples(build_py):
    """Puts the examples into the package, from where `ppdiffusers-train examples` copies them.

    An editable installation reads them where they are.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            for file in EXAMPLE_FILES:
                packed = Path(self.build_lib, "ppdiffusers_train", "examples", file)
                self.mkpath(str(packed.parent))
                self.copy_file(str(EXAMPLES / file), str(packed))

    def get_source_files(self):
        """What an archive of the sources holds besides what MANIFEST.in names."""
        return [*super().get_source_files(), *(str(Path("examples", file)) for file in EXAMPLE_FILES)]


setup(
    name="ppdiffusers_train",
    version=VERSION,
    description="Fine-tuning and distillation of text-to-image diffusion models on PaddlePaddle",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["ppdiffusers_train", "ppdiffusers_train.*"]),
    package_data={"ppdiffusers_train.toy": ["weights/*.safetensors"], "ppdiffusers_train.tools": ["*.json"]},
    cmdclass={"build_py": BuildWithExamples},
    install_requires=REQUIRED,
    entry_points={"console_scripts": ["ppdiffusers-train = ppdiffusers_train.cli:main"]},
    extras_require={
        "cpu": CPU,
        "gpu": GPU,
        "heif": ["pillow-heif<1", "pillow-avif-plugin"],  # HEIC and AVIF images
        "dev": [*CPU, *TESTS, "ruff", "tensorboardX"],
        "parity": [
            *CPU,
            *TESTS,
            "torch==2.13.0",
            "diffusers==0.29.2",
            "transformers==4.44.2",
            "peft==0.12.0",
            "accelerate==0.34.2",
        ],
    },
)
