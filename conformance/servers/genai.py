"""What `panguq export-onnx --for onnxruntime-genai` writes, generated from by the real package.

In the environment that is made for it, which has no panguq:

    genai.py FOLDER MAX_LENGTH ID ...      prints the ids of the greedy continuation
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGE = "onnxruntime-genai==0.18.0"
PROMPT, LENGTH = 9, 25
RECIPES = ("w8a8-dynamic", "w4a16")


def make_environment(folder: Path) -> Path:
    """The Python that has the package, made once. Raises Unavailable without it."""
    from conformance.environment import Unavailable

    python, stamp = folder.absolute() / "bin" / "python", folder / ".ready"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == PACKAGE:
        return python
    print(f"making {folder} with {PACKAGE}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    install = (str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", PACKAGE)
    for command in ((sys.executable, "-m", "venv", str(folder)), install):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unavailable(f"{' '.join(command[-2:])}: {done.stderr.strip()[-800:]}")
    stamp.write_text(PACKAGE, encoding="utf-8")
    return python


def run(python: Path, recipe: str, model: str, folder: Path) -> dict[str, Any]:
    """The tokens of genai and of panguq for one prompt."""
    import panguq
    from conformance.servers.folders import model_and_tokens
    from panguq.formats.onnx.genai import export_genai

    source, calibration, ids = model_and_tokens(model)
    compiled = panguq.compile(source, recipe, calibration=calibration)
    export_genai(compiled.artifact, folder)
    prompt = ids[:1, :PROMPT]
    wanted = compiled.generate(prompt, max_new_tokens=LENGTH - PROMPT, do_sample=False)[0].tolist()
    command = [str(python), __file__, str(folder), str(LENGTH), *map(str, prompt[0].tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": done.stderr.strip()[-500:]}
    return {"tokens": json.loads(done.stdout.splitlines()[-1]), "tokens_panguq": wanted}


def problems(said: dict[str, Any]) -> list[str]:
    """What is wrong; nothing if the tokens are equal. genai leaves the last token out where that
    ends the text."""
    if "error" in said:
        return [said["error"]]
    found, wanted = said["tokens"], said["tokens_panguq"]
    if found == wanted or (found == wanted[:-1] and len(wanted) < LENGTH):
        return []
    return [f"genai says {found}, panguq {wanted}"]


def main() -> None:
    """Generate and print."""
    import onnxruntime_genai as genai

    folder, length, *ids = sys.argv[1:]
    model = genai.Model(folder)
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=int(length), do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens([int(one) for one in ids])
    while not generator.is_done():
        generator.generate_next_token()
    print(json.dumps([int(one) for one in generator.get_sequence(0)]))


if __name__ == "__main__":
    main()
