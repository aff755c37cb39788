"""Fine-tuning runs of adapters beside quantized weights (QLoRA): trained, resumed, served."""

import json

import pytest
import torch

from nemotron3 import LLM, SamplingParams
from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.cli.main import main
from nemotron3.cli.tuning import ending
from nemotron3.data import FilesConfig
from nemotron3.errors import ConfigError
from nemotron3.models.huggingface import stored_weight_format
from nemotron3.models.lora import LoRAConfig, read_adapter, shared_model
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig
from nemotron3.recipes.adapters import merge_adapter_directory
from nemotron3.recipes.quantize import QuantizePlan, quantize_directory
from nemotron3.recipes.run_sft import sft
from tests.recipes.test_sft import check_that_a_killed_run_goes_on, rows, small
from tests.rl.playground import save_policy
from tests.small_run import Listener
from tests.tiny import WHOLE_BLOCKS

LORA = LoRAConfig(rank=4, alpha=8.0)
PROMPT = [3, 5, 8, 40, 2]
PARAMS = SamplingParams(max_tokens=8, temperature=0.0, logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("base") / "model", **WHOLE_BLOCKS)


@pytest.fixture(scope="module", params=["nvfp4", "fp8", "int8", "mixed"])
def base(request, plain, tmp_path_factory):
    """A directory that `nemotron3 quantize` writes, with scales of activations."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text("say up or down, clock road " * 200, encoding="utf-8")
    texts = (FilesConfig(path=str(folder / "text.txt")),)
    plan = QuantizePlan(
        format=request.param, out=folder / "model", texts=texts, num_tokens=512, device="cpu"
    )
    return quantize_directory(plain, plan)[0]


@pytest.fixture
def chats(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(40)), encoding="utf-8")
    return file


def tuned(base, chats, runs, *, lora=LORA, callback=None, **training):
    run = small(base, chats, lora=lora, training={"bias_update_rate": 0.0, **training})
    return sft(run, runs=runs, callback=callback)


def answers(llm):
    output = llm.generate([PROMPT], PARAMS)[0].outputs[0]
    return output.token_ids, torch.tensor([entry.logprob for entry in output.logprobs])


def test_a_run_leaves_an_adapter_that_is_served_beside_the_codes(base, chats, tmp_path):
    listener, held = Listener(), stored_weight_format(base)
    summary = tuned(base, chats, tmp_path / "runs", callback=listener)
    folder = tmp_path / "runs/small"
    assert summary.loss["all"] < summary.loss_before["all"]
    said = next(stage for stage in listener.said if stage.startswith("Trained are"))
    assert ("kept in nvfp4" if held == "mixed" else f"kept in {held}") in said
    assert not (folder / "model").exists()
    store = CheckpointStore(folder / "checkpoints")
    assert all(name.endswith((".A", ".B")) for name in store.load().tensors)

    assert ending(folder)[-1] == f"try: nemotron3 chat {base} --lora {folder / 'adapter'}"

    # The engine's log-probabilities are those of training's forward pass.
    llm = LLM(base, lora=folder / "adapter", device="cpu")
    ids, logprobs = answers(llm)
    assert stored_weight_format(base) == held
    model = LanguageModel.from_pretrained(base)
    model = shared_model(model, read_adapter(folder / "adapter", model))
    with torch.no_grad():
        expected = model(torch.tensor([[*PROMPT, *ids]]))[0].log_softmax(-1)
    chosen = torch.tensor(ids).unsqueeze(1)
    theirs = expected[len(PROMPT) - 1 : -1].gather(1, chosen).squeeze(1)
    assert (theirs - logprobs).abs().max() < 1e-5

    # A merged model is plain and answers the same.
    merged = merge_adapter_directory(base, folder / "adapter", tmp_path / "merged")
    assert merged.dequantized == held
    assert stored_weight_format(tmp_path / "merged") is None
    theirs = answers(LLM(tmp_path / "merged", device="cpu"))
    assert theirs[0] == ids
    assert (theirs[1] - logprobs).abs().max() < 1e-4
    assert not torch.equal(answers(LLM(base, device="cpu"))[1], logprobs)
    assert tuned(base, chats, tmp_path / "runs") == summary


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_adapter(base, chats, tmp_path):
    every_step = {"checkpoint_every_steps": 1, "evaluate_every_steps": 1}
    check_that_a_killed_run_goes_on(
        lambda runs: tuned(base, chats, runs, **every_step),
        tmp_path,
        files=("adapter/adapter_model.safetensors",),
    )


def test_info_counts_the_codes(base, capsys):
    options = ["info", str(base), "--training", "sft", "--batch", "1", "--seq-len", "64"]
    assert main([*options, "--json", "--lora-rank", "4"]) == 0
    parts = {part["name"]: part["bytes"] for part in json.loads(capsys.readouterr().out)["parts"]}
    model = LanguageModel.from_pretrained(base, dtype=torch.float32, cast_dtype=torch.bfloat16)
    assert parts["weights"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert main(options) == 2
    assert "holds quantized weights, which have no gradients" in capsys.readouterr().err


def test_what_quantized_weights_cannot_do_is_refused_before_work(base, chats, tmp_path):
    held = stored_weight_format(base)
    with pytest.raises(ConfigError, match=f"holds {held} weights.*--lora.rank 16.*dequantize"):
        tuned(base, chats, tmp_path / "runs", lora=None)
    few_bits = PrecisionConfig(recipe="nvfp4")
    with pytest.raises(ConfigError, match=f"recipe is 'nvfp4'.*{held}"):
        tuned(base, chats, tmp_path / "runs", precision=few_bits)
    assert not (tmp_path / "runs/small/checkpoints").exists()
