"""Package metadata; exact versions for a repeatable set-up are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="thinkclearly",
    version="0.1.0",
    description="Image editing with instruction tokens: what nobody asked to change stays the source, byte for byte",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The ThinkClearly authors",
    license_expression="Apache-2.0 AND CC-BY-2.0",  # the second for thinkclearly/photographs alone
    license_files=["LICENSE", "thinkclearly/photographs/CREDITS.txt"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["thinkclearly", "thinkclearly.*"]),
    package_data={"thinkclearly": ["py.typed", "photographs/*", "tiny_janus/*", "tiny_clear/*", "tiny_chameleon/*"]},
    python_requires=">=3.11",
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4.4",
        "evaluate>=0.4.5",
        "huggingface_hub>=1.0",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "peft>=0.18",
        "pillow>=11.3",
        "pyarrow>=21",
        "pyyaml>=6.0",
        "regex>=2024.11",
        "safetensors>=0.6",
        "scikit-image>=0.24",
        "scipy>=1.13",
        "torch>=2.9",
        "torchmetrics>=1.7",
        "tqdm>=4.66",
        "transformers>=5.23",
    ],
    extras_require={
        # What the tests, the linter and scripts/make_tiny_* need.
        "test": [
            "bitsandbytes>=0.48; sys_platform == 'linux'",
            "hypothesis>=6.100",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "scikit-learn>=1.5",
            "setuptools>=77.0.3",
        ],
        "quantized": ["bitsandbytes>=0.48; sys_platform == 'linux'"],
        # What report_to can name.
        "tensorboard": ["tensorboard>=2.17"],
        "trackio": ["trackio>=0.7"],
        "wandb": ["wandb>=0.20"],
    },
    entry_points={"console_scripts": ["thinkclearly = thinkclearly.cli:main"]},
)
