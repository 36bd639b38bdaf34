"""`panguq generate`: let a compiled model continue a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from panguq.cli.command import Commands, add_command, quiet_transformers, tokens
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
    command.add_argument("--max-new-tokens", type=tokens, default=32, help="default: 32")
    command.add_argument("--chat", action="store_true", help="put it as a question in a chat")
    command.add_argument("--system", metavar="TEXT", help="with --chat: the system's message")
    command.add_argument(
        "--thinking",
        choices=("slow", "auto", "none"),
        default="slow",
        help="with --chat, for openPangu: think before the answer, let the model decide, or do not "
        "think (default: slow; whether the 1B obeys is not known)",
    )


def run(options: argparse.Namespace) -> int:
    """Generate and print the new text."""
    if not options.chat and (options.system is not None or options.thinking != "slow"):
        raise InputError("--system and --thinking belong to a chat", "add --chat")
    quiet_transformers()
    from panguq.compiled_model import load

    model: Any = load(options.compiled)
    if model.interface.kind != "causal_lm":
        raise InputError(
            f"{options.compiled}: the model has no cache and does not generate",
            "call it from Python: panguq.load(folder)",
        )
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
    _print_text(tokenizer, output[0, prompt_tokens:], options)
    return 0


def _inputs(options: argparse.Namespace, tokenizer: Any) -> Any:
    from panguq.models.openpangu.chat import chat_inputs

    if not options.chat:
        return tokenizer(options.prompt, return_tensors="pt")
    messages = [{"role": "user", "content": options.prompt}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return chat_inputs(tokenizer, messages, options.thinking)


def _print_text(tokenizer: Any, tokens: Any, options: argparse.Namespace) -> None:
    from panguq.models.openpangu.chat import is_openpangu, split_thinking

    if not options.chat or not is_openpangu(tokenizer):
        print(tokenizer.decode(tokens, skip_special_tokens=True))
        return
    thinking, answer = split_thinking(tokenizer.decode(tokens))
    if thinking:
        print(f"(thinking)\n{thinking}\n(answer)")
    print(answer)
    if thinking and not answer:
        print(
            f"the thinking did not end within {options.max_new_tokens} tokens: "
            "raise --max-new-tokens, or pass --thinking none",
            file=sys.stderr,
        )
