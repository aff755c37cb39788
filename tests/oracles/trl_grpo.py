"""TRL's GRPO as an oracle: the advantages, losses and gradients that its trainer gives.

TRL is not among the dependencies, so this program runs in an environment that has it, and writes
`trl_grpo.json`, with which `test_trl_grpo.py` compares our loss:

    python -m venv trl && trl/bin/pip install -c constraints.txt torch transformers trl==1.16.0
    trl/bin/python -m tests.oracles.trl_grpo

The policy has no layers: an embedding, a norm and an output layer. Prompts, answers, rewards and
the log-probabilities of sampling are given. All that follows is TRL's own code, from
`_generate_and_score_completions` (advantages, importance weights, log-probabilities of the
reference) through `_compute_loss` to the gradient.

TRL corrects for the engine only where that is vLLM, which answers nothing here, so `use_vllm` is
set on the trainer after it has been made.
"""

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.readable_json import readable_json

FILE = Path(__file__).with_suffix(".json")
VOCABULARY, WIDTH = 13, 4
GROUP = 4
PROMPTS = ([3, 4], [5, 6, 7], [8])
LENGTHS = ((3, 1, 5, 2), (4, 4, 1, 6), (2, 3, 1, 1))
REWARDS = ((1.0, 0.0, 0.25, 0.0), (0.0, 1.0, 1.0, 1.0), (0.5, 0.5, 0.5, 0.5))
"""The last group teaches nothing, and its tokens count in the normaliser all the same."""
NOISE = 0.6
"""Deviation of the log-probabilities of sampling from the policy's: some weights are clipped."""

_TRUNCATE = {"vllm_importance_sampling_clip_min": 0.6, "vllm_importance_sampling_clip_max": 1.5}
CASES: Mapping[str, Mapping[str, Any]] = {
    "on policy": {},
    "rewards as they are": {"scale_rewards": "none"},
    "mean over the batch": {"loss_type": "bnpo"},
    "two microbatches": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
    "clipped": {"vllm_importance_sampling_mode": "token_truncate", **_TRUNCATE},
    "masked": {"vllm_importance_sampling_mode": "token_mask", **_TRUNCATE},
    "kl": {"beta": 0.2, "use_bias_correction_kl": False},
    "kl, masked": {
        "beta": 0.2,
        "use_bias_correction_kl": False,
        "vllm_importance_sampling_mode": "token_mask",
        **_TRUNCATE,
    },
}
"""TRL's settings of each case, of those that both have."""


def random_numbers(generator: torch.Generator, count: int, *, scale: float = 1.0) -> list[float]:
    """Normal numbers of few digits, which a file holds exactly."""
    return [round(scale * x, 3) for x in torch.randn(count, generator=generator).tolist()]


def given() -> dict[str, Any]:
    """What is put into both implementations."""
    generator = torch.Generator().manual_seed(0)
    answers = [
        torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        for lengths in LENGTHS
        for length in lengths
    ]
    return {
        "prompts": [list(prompt) for prompt in PROMPTS for _ in range(GROUP)],
        "answers": answers,
        "rewards": [reward for group in REWARDS for reward in group],
        "noise": [random_numbers(generator, len(ids), scale=NOISE) for ids in answers],
        "policy": _weights(generator),
        "reference": _weights(generator),
    }


def _weights(generator: torch.Generator) -> dict[str, list[float]]:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return {name: random_numbers(generator, VOCABULARY * WIDTH) for name in names}


def main() -> None:
    """Run every case and write the file."""
    inputs = given()
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: _run(inputs, dict(case), Path(folder)) for name, case in CASES.items()}
    made = {"by": f"TRL {version('trl')}, transformers {version('transformers')}"}
    FILE.write_text(readable_json(made | {"given": inputs, "cases": cases}), encoding="utf-8")
    print(FILE)  # noqa: T201 - a program


def _run(inputs: dict[str, Any], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One case: what the trainer makes of the answers."""
    from trl.trainer.utils import split_tensor_dict  # noqa: PLC0415 - absent in the test

    trainer = _trainer(inputs, settings, folder)
    model = trainer.model.train()
    rows = zip(inputs["prompts"], inputs["rewards"], strict=True)
    batch = trainer._generate_and_score_completions(
        [{"prompt": " ".join(map(str, ids)), "reward": reward} for ids, reward in rows]
    )
    steps = settings.get("gradient_accumulation_steps", 1)
    trainer.current_gradient_accumulation_steps = steps
    loss = 0.0
    for part in split_tensor_dict(batch, steps):
        share = trainer._compute_loss(model, part)
        share.backward()
        loss += share.item()
    gradients = {name: p.grad.flatten().tolist() for name, p in model.named_parameters()}
    return {
        "settings": settings,
        "advantages": batch["advantages"].tolist(),
        "loss": loss,
        "gradients": {name: gradients[name] for name in inputs["policy"]},
    }


def _trainer(inputs: dict[str, Any], settings: dict[str, Any], folder: Path) -> Any:
    from datasets import Dataset  # noqa: PLC0415
    from trl import GRPOConfig, GRPOTrainer  # noqa: PLC0415

    _model(inputs["reference"]).save_pretrained(folder)  # where the trainer finds its reference
    model = _model(inputs["policy"])
    model.config._name_or_path = str(folder)
    logprobs = [
        (_logprobs(model, prompt, answer) + torch.tensor(noise)).tolist()
        for prompt, answer, noise in zip(
            inputs["prompts"], inputs["answers"], inputs["noise"], strict=True
        )
    ]
    config = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "num_generations": GROUP,
        "per_device_train_batch_size": len(inputs["answers"]),
        "gradient_checkpointing": False,
    }
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda reward, **_: reward,
        args=GRPOConfig(**{**config, **settings}),
        train_dataset=Dataset.from_list([{"prompt": "3", "reward": 0.0}] * len(PROMPTS)),
        processing_class=_tokenizer(),
        rollout_func=lambda *_: {
            "prompt_ids": inputs["prompts"],
            "completion_ids": inputs["answers"],
            "logprobs": logprobs,
        },
    )
    trainer.use_vllm = "vllm_importance_sampling_mode" in settings
    trainer._last_loaded_step = trainer.state.global_step  # there is nothing to load weights into
    return trainer


def _model(weights: Mapping[str, list[float]]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=0,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, values in weights.items():
            model.get_parameter(name).copy_(torch.tensor(values).view(VOCABULARY, WIDTH))
    return model


@torch.no_grad()
def _logprobs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer  # noqa: PLC0415
    from tokenizers.models import WordLevel  # noqa: PLC0415
    from tokenizers.pre_tokenizers import Whitespace  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    words = Tokenizer(WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="1"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")


if __name__ == "__main__":
    main()
