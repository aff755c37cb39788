"""A recipe of your own: a Python file whose function `recipe` returns the whole run.

This one trains on the documentation of this repository, with a constant learning rate and its
checkpoints kept at equal distances, which is what a merge needs. Run both from the repository's
root; change `path` to train on text of yours.

    nemotron3 pretrain examples/own_recipe.py
    nemotron3 merge runs/own runs/own/merged --window-steps 150

Everything is an ordinary value, so go-to-definition leads to its explanation. The command line can
still change any number: `nemotron3 pretrain examples/own_recipe.py --training.optimizer.lr 1e-3`.
"""

from dataclasses import replace

from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.data import CorpusConfig, FilesConfig, TrainTokenizerConfig
from nemotron3.models.config import ModelConfig
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.training.optimizers import AdamWConfig
from nemotron3.training.schedules import Constant
from nemotron3.training.trainer import TrainingConfig


def recipe() -> PretrainRun:
    """The tiny model with fewer words, on Markdown, for a few minutes."""
    vocab_size = 1024
    return PretrainRun(
        name="own",
        model=replace(ModelConfig.preset("tiny"), vocab_size=vocab_size),
        corpus=CorpusConfig(
            sources=(FilesConfig(path="docs/**/*.md", name="docs", licence="Apache-2.0"),),
            tokenizer=TrainTokenizerConfig(vocab_size=vocab_size),
            held_out_fraction=0.1,
        ),
        training=TrainingConfig(
            steps=300,
            batch_size=8,
            microbatch_size=4,
            seq_len=128,
            optimizer=AdamWConfig(lr=2e-3),
            schedule=Constant(warmup_steps=20),
            checkpoint_every_steps=50,
        ),
        retention=RetentionConfig(keep_every_steps=50),
        prompts=("## ", "A checkpoint is "),
    )
