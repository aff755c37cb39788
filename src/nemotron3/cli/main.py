"""The `nemotron3` command: parse, call, print.

Every verb imports what it needs when it runs, so that `nemotron3 --help` answers at once and works
where PyTorch is not installed yet.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from nemotron3.cli.engine_options import (
    add_adapter_option,
    add_adapters_option,
    add_engine_options,
)
from nemotron3.cli.environment_options import add_environment_verb
from nemotron3.cli.evaluation_options import add_compare_verb, add_eval_verb
from nemotron3.cli.export_options import add_export_verb
from nemotron3.cli.memory_options import add_memory_options
from nemotron3.cli.option_types import seconds
from nemotron3.cli.quantize_options import add_quantize_verb
from nemotron3.cli.study_options import add_study_verb
from nemotron3.errors import InvalidValueError, Nemotron3Error
from nemotron3.runtime.malloc import retain_freed_memory

_EPILOG = """\
start here:
  nemotron3 info nano                 look at a model before paying for it
  nemotron3 pretrain tiny             train a small one on real text, in minutes on a CPU
  nemotron3 generate runs/tiny/model "To be, or not to"
  nemotron3 serve runs/tiny/model     chat in the browser, and OpenAI's API for programs
"""

_SERVE_EPILOG = """\
then:
  open http://127.0.0.1:8000/         chat in the browser
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello"}], "reasoning_budget": 64}'
  OPENAI_BASE_URL=http://127.0.0.1:8000/v1 for any client of OpenAI's

SIGTERM: no more requests are taken (503), the running ones are finished, then the server ends.
Everything else is in the guide, docs/serving.md.
"""

_POSITIONAL = {"verb", "model", "adapter", "recipe", "path", "prompt", "run", "out"}
_OTHER_OPTIONS = {"reasoning_budget": "--budget", "weights_folder": "--enable-weight-updates"}
"""Options that are not called as the value is in the package."""

_FUNCTIONS = {
    "info": "info.info",
    "pretrain": "pretrain.pretrain_command",
    "sft": "sft.sft_command",
    "rl": "rl.rl_command",
    "show": "recipes.show",
    "generate": "generate.generate_command",
    "serve": "serve.serve_command",
    "chat": "chat.chat_command",
    "merge": "merge.merge_command",
    "merge-adapter": "merge.merge_adapter_command",
    "quantize": "quantize.quantize_command",
    "export": "export.export_command",
    "env": "environments.env_command",
    "eval": "evaluate.eval_command",
    "compare": "compare.compare_command",
    "study": "study.study_command",
}
"""What runs a verb, by module and name; the module is imported when its verb runs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    takes_values = known.verb in ("pretrain", "sft", "rl") or (
        known.verb == "quantize" and known.distill is not None
    )
    if rest and not takes_values:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if known.verb is None:
        parser.print_help()
        return 0
    retain_freed_memory()  # before any thread has a heap of its own
    try:
        return _run(known, rest)
    except Nemotron3Error as error:
        print(f"nemotron3: {_by_option(error, known)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        place = f": {error.filename}" if error.filename else ""
        print(
            f"nemotron3: {error.strerror}{place}; free some space or choose another folder, and "
            "repeat the command",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint"
        resumes = takes_values or known.verb == "study"
        print(f"\nnemotron3: interrupted{goes_on if resumes else ''}", file=sys.stderr)
        return 130


def _by_option(error: Nemotron3Error, known: argparse.Namespace) -> Nemotron3Error:
    """The error with the name of the option, `--top-p`, where a value came from one."""
    if not isinstance(error, InvalidValueError):
        return error
    options = {name: f"--{name.replace('_', '-')}" for name in vars(known).keys() - _POSITIONAL}
    return error.renamed(options | _OTHER_OPTIONS)


def _run(known: argparse.Namespace, rest: list[str]) -> int:
    module, _, name = _FUNCTIONS[known.verb].partition(".")
    function = getattr(import_module(f"nemotron3.cli.{module}"), name)
    match known.verb:
        case "show":
            return function(known.recipe)
        case "pretrain" | "sft" | "rl" | "quantize":
            return function(known, rest)
    return function(known)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemotron3",
        description="Nemotron 3: train, look at and run hybrid Mamba-2 / attention / "
        "mixture-of-experts language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("nemotron3"))
    verbs = parser.add_subparsers(dest="verb", metavar="verb")
    _add_info(verbs)
    _add_pretrain(verbs)
    _add_sft(verbs)
    _add_rl(verbs)
    _add_show(verbs)
    _add_generate(verbs)
    _add_serve(verbs)
    _add_chat(verbs)
    _add_merge(verbs)
    _add_merge_adapter(verbs)
    add_quantize_verb(verbs)
    add_export_verb(verbs)
    add_environment_verb(verbs)
    add_eval_verb(verbs)
    add_compare_verb(verbs)
    add_study_verb(verbs)
    return parser


def _add_info(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    info = verbs.add_parser(
        "info",
        help="a model's parameters, state and arithmetic, without allocating it",
        description="Parameters by part, bytes that a sequence keeps, and FLOPs per token.",
    )
    info.add_argument("model", help="nano, super, ultra, small, tiny, qwen3-moe, or a directory")
    info.add_argument(
        "--context", type=int, default=8192, help="sequence length to count for (default 8192)"
    )
    info.add_argument(
        "--precision",
        nargs="?",
        const="nvfp4",
        choices=("plain", "nvfp4"),
        metavar="RECIPE",
        help="print which products run in which number format in training instead (nvfp4, plain; "
        "default nvfp4)",
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    add_memory_options(info)


def _add_run(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
    verb: str,
    *,
    usage: str,
    help: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    """A verb that runs a recipe: every value of it is an option, which tyro reads."""
    parser = verbs.add_parser(
        verb,
        add_help=False,
        allow_abbrev=False,
        usage=usage,
        help=help,
        description=description,
        epilog=epilog,
    )
    parser.set_defaults(page=parser.format_help)
    parser.add_argument(
        "--from", dest="replay", type=Path, metavar="RUN.JSON", help="repeat a recorded run"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of all runs (default runs)"
    )
    parser.add_argument("-h", "--help", action="store_true", help="show the options")
    return parser


def _add_pretrain(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    # The recipe is no argument of this parser: it would take the value of an option for one.
    pretrain = _add_run(
        verbs,
        "pretrain",
        usage="nemotron3 pretrain RECIPE [--data PATH] [--init-from MODEL] [--option value ...]\n"
        "       nemotron3 pretrain --from RUN.JSON [--runs PATH] [--option value ...]",
        help="train a model from text",
        description="Train a model by a named recipe, or by your own: a Python file whose function "
        "`recipe` returns a PretrainRun. An interrupted run goes on when the command is repeated.",
        epilog="Every value of the recipe is an option, such as --training.optimizer.lr 1e-3; "
        "`nemotron3 pretrain RECIPE --help` lists them.",
    )
    pretrain.add_argument(
        "--data",
        action="append",
        metavar="PATH",
        help="train on your own text instead: a file, folder or glob of plain text, JSON lines or "
        "Parquet (may be repeated)",
    )
    pretrain.add_argument(
        "--init-from",
        metavar="MODEL",
        help="continue a model directory, such as runs/tiny/model, with its own architecture and "
        "tokenizer",
    )


def _add_sft(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    sft = _add_run(
        verbs,
        "sft",
        usage="nemotron3 sft MODEL --data CHATS.JSONL [--epochs N] [--option value ...]\n"
        "       nemotron3 sft RECIPE [--option value ...]\n"
        "       nemotron3 sft --from RUN.JSON [--runs PATH] [--option value ...]",
        help="fine-tune a model on conversations",
        description="Fine-tune a model on conversations: JSON lines with OpenAI's `messages` (and "
        "`tools`), or with `prompt` and `completion`. MODEL is a model directory, such as "
        "runs/tiny/model; RECIPE a Python file whose function `recipe` returns an SFTRun. An "
        "interrupted run goes on when the command is repeated.",
        epilog="Every value of the run is an option, such as --training.optimizer.lr 1e-3; "
        "--lora.rank 16 trains an adapter of a MODEL (also --lora.alpha, --lora.targets), whose "
        "weights may be in NVFP4, FP8 or int8 and stay so; "
        "`nemotron3 sft MODEL --data CHATS.JSONL --help` lists them.",
    )
    sft.add_argument(
        "--data",
        action="append",
        metavar="PATH[=WEIGHT]",
        help="conversations; with a weight, how often an epoch has each (may be repeated)",
    )
    sft.add_argument(
        "--epochs",
        type=float,
        metavar="N",
        help="passes over the conversations, where a MODEL is named (default 3)",
    )
    sft.add_argument(
        "--max-bad-fraction",
        type=float,
        metavar="F",
        help="largest share of a file's rows that may be unusable; they are left out (default 0)",
    )
    sft.add_argument(
        "--preview",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="print N conversations of each source with what is trained in colour, and end",
    )


def _add_rl(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    rl = _add_run(
        verbs,
        "rl",
        usage="nemotron3 rl MODEL --environment NAME [--environment NAME] [--option value ...]\n"
        "       nemotron3 rl MY_ENV.PY [--model MODEL] [--option value ...]\n"
        "       nemotron3 rl RECIPE [--option value ...]\n"
        "       nemotron3 rl --from RUN.JSON [--runs PATH] [--option value ...]",
        help="train a model by the rewards of environments",
        description="Reinforcement learning (GRPO) in one or many environments at once. MODEL is a "
        "directory of a model that answers, such as the result of `sft`; NAME a built-in "
        "environment, your own (a Python file with a class that extends Environment), or "
        "ROWS@URL, rows and the resources server of NeMo Gym that verifies them. MY_ENV.PY alone "
        "is such a file of your own, trained from runs/tiny-sft/model or from --model. RECIPE is a "
        "Python file whose function `recipe` returns an RLRun. An interrupted run goes on when the "
        "command is repeated.",
        epilog="Every value of the run is an option, such as --training.optimizer.lr 1e-4; "
        "--lora.rank 16 trains an adapter of a MODEL (also --lora.alpha, --lora.targets), whose "
        "weights may be in NVFP4, FP8 or int8 and stay so; "
        "`nemotron3 rl MODEL --environment NAME --help` lists them.",
    )
    rl.add_argument(
        "--environment",
        action="append",
        metavar="NAME[=WEIGHT]",
        help="an environment, and its share of every batch (may be repeated)",
    )
    rl.add_argument(
        "--difficulty",
        type=float,
        metavar="D",
        help="of all environments, 0 to 1, unless a RECIPE is named (default: their own)",
    )
    rl.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="updates, unless a RECIPE is named (default 100)",
    )


def _add_show(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    show = verbs.add_parser("show", help="a recipe, resolved, as JSON")
    show.add_argument("recipe", help="such as tiny or tiny-sft, or a Python file")


def _add_generate(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    generate = verbs.add_parser("generate", help="continue a text with a model")
    generate.add_argument("path", type=Path, help="a model directory, such as runs/tiny/model")
    generate.add_argument("prompt", help="the beginning of the text")
    generate.add_argument("--max-tokens", type=int, default=200, help="default 200")
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)"
    )
    generate.add_argument("--top-p", type=float, default=0.95, help="default 0.95")
    generate.add_argument("--top-k", type=int, default=0, help="default 0: all tokens")
    generate.add_argument("--seed", type=int, default=0, help="default 0")
    generate.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add_adapter_option(generate)


def _add_serve(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = verbs.add_parser(
        "serve",
        help="serve a model over HTTP, with a page to chat",
        description="Serve a model over HTTP: OpenAI's chat completions, completions and "
        "responses, a page to chat at /, metrics at /metrics.",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_options(serve)
    add_adapters_option(serve)
    serve.add_argument(
        "--max-num-waiting",
        type=int,
        metavar="N",
        help="answers that may wait for their turn; beyond that, 429 (default 256)",
    )
    serve.add_argument(
        "--reasoning-grace",
        type=int,
        default=0,
        metavar="N",
        help="tokens beyond a request's reasoning budget in which a line end is waited for, where "
        "the request does not say; 500 is the model card's rule (default 0: budgets are exact)",
    )
    serve.add_argument(
        "--enable-return-routed-experts",
        action="store_true",
        help="record the experts of every token, for requests with return_routed_experts; prompts "
        "then do not use the prefix cache",
    )
    http = serve.add_argument_group("http")
    http.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for everyone (default 127.0.0.1)"
    )
    http.add_argument("--port", type=int, default=8000, help="default 8000")
    http.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients must send as Authorization: Bearer KEY; better in the variable "
        "NEMOTRON3_API_KEY, where no list of processes shows it",
    )
    http.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="the name in `model` (default: that of the run, or of the directory)",
    )
    http.add_argument(
        "--max-body-mib", type=int, default=32, metavar="MIB", help="largest request (default 32)"
    )
    http.add_argument(
        "--allowed-origins",
        default="",
        metavar="ORIGINS",
        help="pages elsewhere that may use the server from a browser, such as "
        "https://a.example,http://localhost:3000; * for all (default: none)",
    )
    http.add_argument(
        "--enable-weight-updates",
        type=Path,
        metavar="FOLDER",
        help="let clients with the key replace the model's weights by those of a directory below "
        "FOLDER, and pause answers (default: off)",
    )
    http.add_argument(
        "--drain-timeout",
        type=seconds,
        default=60.0,
        metavar="S",
        help="seconds that SIGTERM leaves to the answers being written (default 60)",
    )
    http.add_argument("--log-format", choices=("text", "json"), default="text", help="default text")


def _add_chat(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    chat = verbs.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model in the terminal. Its thinking is dimmed; /budget and /think "
        "change it while you talk, /help lists the commands.",
    )
    add_engine_options(chat)
    add_adapter_option(chat)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")
    chat.add_argument(
        "--budget", type=int, metavar="N", help="most tokens of thinking (default: no limit)"
    )
    chat.add_argument("--no-think", action="store_true", help="answer without thinking")
    chat.add_argument("--no-tools", action="store_true", help="offer no calculator to the model")
    chat.add_argument(
        "--temperature", type=float, help="default: what the model's directory says, else 1.0"
    )
    chat.add_argument(
        "--top-p", type=float, help="default: what the model's directory says, else 0.95"
    )
    chat.add_argument(
        "--max-tokens", type=int, metavar="N", help="most tokens of an answer, thinking included"
    )


def _add_merge(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    merge = verbs.add_parser(
        "merge",
        help="average a run's checkpoints instead of decaying the learning rate",
        description="Weighted average of the checkpoints in a window of steps, with weights that "
        "emulate a decay of the learning rate (Super report, checkpoint merging).",
    )
    merge.add_argument("run", type=Path, help="a run's folder, such as runs/tiny")
    merge.add_argument("out", type=Path, help="model directory to write")
    merge.add_argument(
        "--window-steps", type=int, help="steps before the last checkpoint (default: all kept)"
    )
    merge.add_argument("--kind", choices=("minus_sqrt", "linear", "uniform"), default="minus_sqrt")


def _add_merge_adapter(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    merge = verbs.add_parser(
        "merge-adapter",
        help="write a model with a LoRA adapter merged into its weights",
        description="Merge a LoRA adapter, by `nemotron3 sft` or in PEFT's layout from elsewhere, "
        "into the model that it was trained on. Weights in NVFP4, FP8 or int8 are dequantized. "
        "Template, generation defaults and all other files of the model are kept, or are the "
        "adapter's where it has its own.",
    )
    merge.add_argument("model", type=Path, help="the model directory that the adapter is for")
    merge.add_argument("adapter", type=Path, help="its directory, such as runs/tiny-sft/adapter")
    merge.add_argument("out", type=Path, help="model directory to write; it must not exist")


if __name__ == "__main__":
    sys.exit(main())
