"""Answer many prompts at once, and look at what the engine did.

    python examples/answer_many.py runs/tiny/model

Four texts are continued twice each, together; drafts by multi-token prediction are made and judged
on the way. The second call finds the beginnings of its prompts among what the first has read.
"""

import argparse

from nemotron3 import LLM, EngineConfig, SamplingParams

PROMPTS = ["To be, or not to be", "ROMEO", "def ", "Once upon a time"]


def main(path: str, max_tokens: int = 64) -> None:
    """Continue the prompts, then go on from what was written."""
    llm = LLM(path, config=EngineConfig(max_num_seqs=8, max_model_len=1024))
    params = SamplingParams(n=2, max_tokens=max_tokens, temperature=0.8, top_p=0.95, seed=1)
    outputs = llm.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        print(f"── {prompt}")
        for answer in output.outputs:
            drafts = answer.acceptance
            print(f"{answer.text}\n   [{drafts.accepted} of {drafts.drafted} drafts stood]")

    more = llm.tokenizer.encode("\n")
    longer = [[*output.prompt.ids, *output.outputs[0].token_ids, *more] for output in outputs]
    again = llm.generate(longer, SamplingParams(max_tokens=8, temperature=0.0))
    found = sum(output.num_cached_tokens for output in again)
    read = sum(len(output.prompt.ids) for output in again)
    print(f"second call: {found} of {read} prompt tokens were read already")
    print(f"in all: {llm.stats()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of a model, as in runs/tiny/model")
    main(parser.parse_args().model)
