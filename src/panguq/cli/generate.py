"""`panguq generate`: let a compiled model continue a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from panguq.cli.command import Commands, add_command, positive, quiet_transformers
from panguq.errors import InputError


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "generate",
        run,
        "Continue a text with a compiled model. The most likely token is taken each time, unless "
        "the model's generation_config says otherwise.",
        'panguq generate smollm2-w8a8 --chat --prompt "What is a prime number?"',
    )
    command.add_argument("compiled", metavar="COMPILED_DIR", type=Path, help="a compiled model")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    command.add_argument("--max-new-tokens", type=positive, default=32, help="default: 32")
    command.add_argument("--chat", action="store_true", help="put it as a question in a chat")


def run(options: argparse.Namespace) -> int:
    """Generate and print the new text."""
    quiet_transformers()
    from panguq.model_folder import load

    model: Any = load(options.compiled)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError(
            f"{options.compiled}: the model was saved without a tokenizer",
            "compile a model folder that has one, or call generate from Python on token ids",
        )
    inputs = _inputs(options, tokenizer)
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise InputError("the prompt is empty", "give at least one word")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=options.max_new_tokens,
    )
    print(tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True))
    return 0


def _inputs(options: argparse.Namespace, tokenizer: Any) -> Any:
    if not options.chat:
        return tokenizer(options.prompt, return_tensors="pt")
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template", "leave out --chat")
    messages = [{"role": "user", "content": options.prompt}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
