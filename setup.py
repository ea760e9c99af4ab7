"""Packaging; the versions that are tested together are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: the version is there before anything is installed.
version = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_vico/__init__.py").read_text())
assert version is not None, "megatron_vico/__init__.py states __version__"

setup(
    name="megatron_vico",
    version=version[1],
    description="ViCO (Visual Consistency Learning) training for InternVL3.5 on megatron-core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.12",
    package_data={"megatron_vico": ["py.typed"], "megatron_vico.evaluation": ["*.html"]},
    packages=find_packages(include=["megatron_vico", "megatron_vico.*"]),
    install_requires=[
        "megatron-core>=0.19.2,<0.20",
        "torch>=2.10",  # adds a product of bf16 matrices to a float32 one
        "transformers>=5.4,<6",
        "safetensors>=0.8",
        "sentencepiece>=0.2",
        "webdataset>=1.0,<2",
        "numpy>=2.0",
        "pillow>=11",
        "pyyaml>=6.0",
        "tyro>=1.0.17,<1.1",
        "typeguard>=4.4",
        "tqdm>=4.66",
        "fsspec>=2025.3",
        "filelock>=3.16",
        "tenacity>=9",
        "tensorboard>=2.16",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "psutil>=5.9",  # megatron-core's checkpoint writer imports it without declaring it
    ],
    extras_require={
        # apex is found at run time: the package of that name on the index is another project.
        # From 2.14 on, megatron-core clips gradients with its kernels.
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.14"],
        "video": ["av>=14"],
        "wandb": ["wandb>=0.20"],
        "serve": ["fastapi>=0.120", "uvicorn>=0.40", "prometheus_client>=0.22"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1"],
        # In an environment of its own (make test-eval): it wants av, protobuf and wandb of earlier
        # years than constraints.txt, which setup.py's ranges allow.
        "eval": ["lmms-eval==0.7.3"],
        "demo": ["scikit-image>=0.25", "scikit-learn>=1.6"],
        "test": [
            "triton>=3.4; platform_system == 'Linux'",  # torch's wheels bring it
            "pytest>=8",
            "pytest-xdist>=3.7",
            "hypothesis>=6.100",
            "ruff>=0.17",
            "mypy>=2.4",
            "types-PyYAML",
            "types-tqdm",
            "tiktoken>=0.9",
            "av>=14",
            "wandb>=0.20",
            "fastapi>=0.120",
            "uvicorn>=0.40",
            "prometheus_client>=0.22",
            "httpx>=0.28",
            "httpx2>=2",  # of starlette's TestClient
            "openai>=3",
        ],
    },
    entry_points={
        "console_scripts": ["vico = megatron_vico.cli.main:main"],
        "lmms_eval.models": ["vico = megatron_vico.lmms_plugin:MANIFEST"],
    },
)
