"""`pass_at_k`: share of prompts that one of k sampled responses answers, by a verifier."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tjx_core import CommandParser, whole_number
from tjx_eval.commands.arguments import add_generator, load, positive
from tjx_eval.errors import EvalError
from tjx_rl.config import VerifierName

if TYPE_CHECKING:
    from tjx_data import ChatTemplate
    from tjx_eval.generation.batch import BatchRequest
    from tjx_eval.load_model import TrainedModel
    from tjx_trainer.run_reader import Example


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `pass_at_k`."""
    add = parser.add_argument
    add_generator(parser)
    add(
        "--prompts", required=True, metavar="FILE",
        help="JSON lines with the strings prompt and answer, as of the trainer's task grpo",
    )  # fmt: skip
    add("--limit", type=positive, help="only the first prompts")
    add("--samples", type=positive, default=16, help="responses to each prompt; default 16")
    add("--k", type=_numbers, default=(1,), metavar="K,...", help="values of k; default 1")
    names = get_args(VerifierName)
    add("--verifier", choices=names, default="numeric", help="judge of responses; default numeric")
    add("--chat", action="store_true", help="prompts are messages in the model's chat template")
    add("--max_new_tokens", type=positive, default=256, help="tokens of a response; default 256")
    add("--temperature", type=float, default=1.0, help="default 1, as in training; 0 is greedy")
    add("--top_k", type=positive, help="sample from the k likeliest (default: all)")
    add("--top_p", type=float, help="sample from the likeliest with this total probability")
    add("--seed", type=whole_number(0), default=0, help="of samples and intervals; default 0")
    add("--batch_size", type=positive, default=16, help="responses at once; default 16")
    add("--json", metavar="FILE", help="also write results and responses to this file")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive(part) for part in text.split(",")}))


def run(arguments: argparse.Namespace) -> int:
    """Sample and verify responses, and print pass@k."""
    ks, samples = arguments.k, arguments.samples
    if ks[-1] > samples:
        raise EvalError(
            f"--k: got {ks[-1]} with --samples {samples}; expected at most the samples; give "
            f"--samples {ks[-1]}"
        )
    import numpy as np

    import tjx_rl
    from tjx_eval.commands.tables import print_metrics
    from tjx_eval.generation.batch import complete_all
    from tjx_eval.scoring.pass_at_k import estimate_pass_at_k
    from tjx_trainer.run_reader import read_prompts

    try:
        examples = read_prompts(Path(arguments.prompts))[: arguments.limit]
    except ValueError as error:
        raise EvalError(f"--prompts: {error}") from error
    model = load(arguments)
    template = model.chat_template() if arguments.chat else None
    requests = [
        request
        for number, example in enumerate(examples)
        for request in _make_requests(model, template, number, example, arguments)
    ]
    try:
        responses = complete_all(model, requests, slots=min(arguments.batch_size, len(requests)))
    except ValueError as error:
        raise EvalError(str(error)) from error
    answers = [example.texts[0] for example in examples for _ in range(samples)]
    verdicts = tjx_rl.verify(arguments.verifier, responses, answers)
    scores = np.array([verdict.score == 1 for verdict in verdicts]).reshape(-1, samples)
    passed = scores.sum(1)
    results: dict[str, Any] = {"model": model.name, "prompts": len(examples), "samples": samples}
    results |= {"verifier": arguments.verifier}
    for k in ks:
        mean, interval = estimate_pass_at_k(passed, samples, k, seed=arguments.seed)
        results[f"pass_at_{k}"] = mean
        if interval is not None:
            results |= {f"pass_at_{k}_low_95": interval.low, f"pass_at_{k}_high_95": interval.high}
    failures = [verdict.failure for verdict in verdicts if verdict.failure is not None]
    results["verifier_failures"] = len(failures)
    print_metrics(results)
    if arguments.json:
        options = ("temperature", "top_k", "top_p", "max_new_tokens", "chat", "seed")
        results["options"] = {name: getattr(arguments, name) for name in options}
        results["table"] = [
            {
                "prompt": example.prompt,
                "answer": example.texts[0],
                "passed": int(count),
                "responses": responses[number * samples : (number + 1) * samples],
            }
            for number, (example, count) in enumerate(zip(examples, passed, strict=True))
        ]
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _make_requests(
    model: "TrainedModel",
    template: "ChatTemplate | None",
    number: int,
    example: "Example",
    arguments: argparse.Namespace,
) -> list["BatchRequest"]:
    """Return the requests of the samples of a prompt, each with a seed of its own.

    The seed is a function of ``--seed``, the number of the prompt and that of the sample: more
    samples or prompts do not change the first ones.
    """
    import numpy as np

    from tjx_data import encode_chat_prompt
    from tjx_eval.generation.batch import BatchRequest

    try:
        if template is None:
            prompt = model.tokenizer.encode_prompt(example.prompt)
        else:
            messages = [{"role": "user", "content": example.prompt}]
            prompt = encode_chat_prompt(template, model.tokenizer, messages)
    except ValueError as error:
        raise EvalError(f"--prompts: prompt {number + 1}: {error}") from error
    room = model.gpt.max_seq_len - len(prompt)
    if room < arguments.max_new_tokens:
        raise EvalError(
            f"--max_new_tokens: got {arguments.max_new_tokens} after the {len(prompt)} tokens of "
            f"prompt {number + 1}; expected at most {max(room, 0)}, as the model's max_seq_len is "
            f"{model.gpt.max_seq_len}; give fewer or shorter prompts"
        )
    stops = [*model.tokenizer.special_tokens] if template is not None else []
    options: Any = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    seeds = [
        int(np.random.SeedSequence((arguments.seed, number, sample)).generate_state(1)[0])
        for sample in range(arguments.samples)
    ]
    return [
        BatchRequest(prompt, arguments.max_new_tokens, options | {"seed": seed}, stops)
        for seed in seeds
    ]
