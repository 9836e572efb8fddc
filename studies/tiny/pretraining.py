"""The recipes of small Llamas, pretrained for real on a processor or two: the built-in models,
and those that only the measured tables are made with (``studies.tables``).

    python -m studies.tiny.pretraining --output weights --steps 3000 --seed 0
    python -m studies.tiny.pretraining --model tiny-narrow --output weights-narrow

A part of the tokens is the Python standard library's sources and docstrings (except the modules
reserved for the fine-tuning tasks), the rest are the exercises of ``mixture``; ``RECIPES`` has
each model's size and shares. All models have one tokenizer. A run that was stopped
goes on from its last checkpoint; each logged step is one line of ``pretraining.jsonl``; the
finished folder is an ordinary Hugging Face model with a model card that states its losses.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import Literal

import torch

from optuna_lora_rl.tiny import standard_library
from studies.tiny import mixture
from studies.tiny.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHECKPOINT, _LOG = "checkpoint.pt", "pretraining.jsonl"
_HELD_OUT_EVERY = 25  # every 25th document is kept for validation
_SOURCES = ("standard library", "exercises")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numbers that decide what comes out.

    Args:
        steps: Optimizer steps.
        seed: Seed of the weights, the exercises and the order of the text.
        batch_size: Sequences per step.
        sequence_length: Tokens per sequence.
        learning_rate: Highest learning rate; linear warm-up, then cosine decay to a hundredth.
        warmup: Steps of warm-up.
        exercises: Procedural documents to compose.
        files: Standard-library files to read; None reads all that are not reserved.
        layers: Transformer layers.
        width: Hidden size.
        head: Width of one attention head.
        inner: Width of the feed-forward layers.
        share: Share of the sequences that are exercises, from 0 to 1.
        stored: Type of the saved weights; the model's own is float32 in any case.
        autocast: Whether products are taken in bfloat16, which some processors do faster.
    """

    steps: int = 3000
    seed: int = 0
    batch_size: int = 16
    sequence_length: int = 256
    learning_rate: float = 3e-3
    warmup: int = 100
    exercises: int = 120_000
    files: int | None = None
    layers: int = 4
    width: int = 128
    inner: int = 352
    head: int = 32
    share: float = 0.5
    stored: Literal["float32", "float16"] = "float32"
    autocast: bool = False

    def source(self, sequence: int) -> str:
        """Return the source of one sequence, counted from the start of training."""
        return _SOURCES[int((sequence + 1) * self.share) - int(sequence * self.share)]

    def rate(self, step: int) -> float:
        """Return the learning rate of one step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


_BRIEF = Recipe(sequence_length=128, stored="float16")
RECIPES = {
    "tiny": Recipe(),
    "tiny-narrow": Recipe(steps=3400, layers=3, width=64, inner=176, share=0.8),
    "tiny-wide": Recipe(
        steps=1600, sequence_length=128, width=192, inner=512, share=0.2, stored="float16"
    ),
    # Depth and width apart: deep and narrow, shallow and wide.
    "48x2": replace(_BRIEF, steps=3000, layers=2, width=48, inner=128, head=16),
    "96x8": replace(_BRIEF, steps=1000, layers=8, width=96, inner=256),
    "256x2": replace(_BRIEF, steps=1400, layers=2, width=256, inner=704, autocast=True),
    "384x4": replace(
        _BRIEF, steps=400, learning_rate=1.5e-3, layers=4, width=384, inner=1024, autocast=True
    ),
    "512x3": replace(
        _BRIEF, steps=400, learning_rate=1.5e-3, layers=3, width=512, inner=1408, autocast=True
    ),
}


@dataclass(frozen=True)
class Corpus:
    """Token streams by source: shape (tokens,), documents separated by begin and end tokens."""

    train: dict[str, torch.Tensor]
    validation: dict[str, torch.Tensor]

    def batch(self, recipe: Recipe, step: int) -> torch.Tensor:
        """Return the tokens of one step, shape (batch_size, sequence_length).

        A pure function of the recipe and the step, so that a resumed run reads on where the
        stopped one was.
        """
        generator = random.Random(f"{recipe.seed}-batch-{step}")
        rows = []
        for row in range(recipe.batch_size):
            stream = self.train[recipe.source(step * recipe.batch_size + row)]
            start = generator.randrange(len(stream) - recipe.sequence_length)
            rows.append(stream[start : start + recipe.sequence_length])
        return torch.stack(rows)


def collect_documents(recipe: Recipe) -> dict[str, list[str]]:
    """Return the pretraining documents by source, in an order that the seed decides."""
    generator = random.Random(f"{recipe.seed}-documents")
    sources = []
    for relative in standard_library.pretraining_files()[: recipe.files]:
        lines = standard_library.read(relative).splitlines(keepends=True)
        # Short pieces, so that validation holds a part of many files rather than a few whole ones.
        sources += ["".join(lines[start : start + 40]) for start in range(0, len(lines), 40)]
    generator.shuffle(sources)
    return {
        "standard library": sources,
        "exercises": mixture.documents(recipe.exercises, generator),
    }


def build_corpus(recipe: Recipe, documents: dict[str, list[str]], tokenizer: Any) -> Corpus:
    """Tokenise the documents and set every 25th aside for validation."""
    train, validation = {}, {}
    for source, texts in documents.items():
        if source == "exercises":
            generator = random.Random(f"{recipe.seed}-chats")
            pairs = mixture.exercises(len(texts) // 20, generator)
            chats = [mixture.conversation(*pair) for pair in pairs]
            rendered = tokenizer.apply_chat_template(chats, tokenize=False) if chats else []
            chat_tokens = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        else:
            chat_tokens = []
        closed = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
        every = closed + chat_tokens
        random.Random(f"{recipe.seed}-{source}").shuffle(every)
        validation[source] = _stream(every[::_HELD_OUT_EVERY])
        train[source] = _stream(
            [ids for place, ids in enumerate(every) if place % _HELD_OUT_EVERY]
        )
    return Corpus(train, validation)


def _stream(documents: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([token for ids in documents for token in ids], dtype=torch.long)


def build_model(tokenizer: Any, recipe: Recipe) -> Any:
    """Return the untrained model, a Llama of the recipe's size."""
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // recipe.head,
        num_key_value_heads=recipe.width // recipe.head,
        max_position_embeddings=2 * recipe.sequence_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def validation_losses(
    model: Any, corpus: Corpus, *, length: int, windows: int
) -> dict[str, float]:
    """Return the mean loss, in nats a token, on the held-out text of each source.

    Args:
        model: A causal language model.
        corpus: Where the held-out text is.
        length: Tokens per window.
        windows: How many windows of each source to read, from the beginning.
    """
    model.eval()
    losses = {}
    with torch.no_grad():
        for source, stream in corpus.validation.items():
            rows = stream[: len(stream) // length * length].view(-1, length)[:windows]
            parts = [
                model(input_ids=part, labels=part).loss * len(part) for part in rows.split(16)
            ]
            losses[source] = float(sum(parts)) / len(rows)
    model.train()
    return losses


def unigram_losses(corpus: Corpus, vocabulary_size: int) -> dict[str, float]:
    """Return what a model that knows only each token's frequency would lose, nats a token."""
    losses = {}
    for source, stream in corpus.validation.items():
        counts = torch.bincount(corpus.train[source], minlength=vocabulary_size) + 1
        log_frequency = (counts / counts.sum()).log()
        losses[source] = float(-log_frequency[stream].mean())
    return losses


def pretrain(
    output: Path, recipe: Recipe, *, name: str = "tiny", checkpoint_every: int = 200
) -> dict[str, float]:
    """Pretrain into ``output`` and return the final validation losses by source.

    Args:
        output: The folder of the finished model; also of the checkpoint while it is not.
        recipe: What to do.
        name: The model's name, for its card.
        checkpoint_every: Steps between checkpoints and between validations.
    """
    output.mkdir(parents=True, exist_ok=True)
    documents = collect_documents(recipe)
    tokenizer = _tokenizer(documents)
    corpus = build_corpus(recipe, documents, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_model(tokenizer, recipe)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    first = _resume(output, recipe, model, optimizer)
    started = time.monotonic()
    for step in range(first, recipe.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
            loss = _train_step(model, optimizer, corpus.batch(recipe, step), recipe.rate(step))
        done = step + 1
        if done % 20 == 0:
            _log(output, {"step": done, "loss": round(loss, 4)})
        if done % checkpoint_every == 0 or done == recipe.steps:
            losses = validation_losses(model, corpus, length=recipe.sequence_length, windows=64)
            seconds = round((time.monotonic() - started) / (done - first), 4)
            shown = {source: round(value, 4) for source, value in losses.items()}
            _log(output, {"step": done, "validation": shown, "seconds_per_step": seconds})
            _save_checkpoint(output, recipe, model, optimizer, done)
    losses = validation_losses(model, corpus, length=recipe.sequence_length, windows=10**6)
    _save(model, output, recipe.stored)
    tokenizer.save_pretrained(output)
    card = _model_card(name, recipe, model, corpus, losses)
    (output / "README.md").write_text(card, encoding="utf-8")
    return losses


def _tokenizer(documents: dict[str, list[str]]) -> Any:
    half = documents["standard library"][::2]
    return train_tokenizer(half + documents["exercises"][: 4 * len(half)])


def _train_step(model: Any, optimizer: Any, tokens: torch.Tensor, rate: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _log(output: Path, entry: dict[str, Any]) -> None:
    line = json.dumps(entry)
    print(line, flush=True)
    with (output / _LOG).open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def _save_checkpoint(output: Path, recipe: Recipe, model: Any, optimizer: Any, step: int) -> None:
    state = {
        "recipe": asdict(recipe),
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    partial = output / f"{_CHECKPOINT}.partial"
    torch.save(state, partial)
    partial.replace(output / _CHECKPOINT)


def _resume(output: Path, recipe: Recipe, model: Any, optimizer: Any) -> int:
    """Load the checkpoint of the same recipe, if there is one, and return the steps done."""
    path = output / _CHECKPOINT
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise SystemExit(
            f"{path} is of another recipe ({state['recipe']}); remove it to start anew."
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _save(model: Any, output: Path, stored: str) -> None:
    """Save the model; weights stored in half precision still load as float32."""
    model.to(getattr(torch, stored))
    model.save_pretrained(output)
    settings = output / "config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    content["dtype"] = "float32"
    settings.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _model_card(
    name: str, recipe: Recipe, model: Any, corpus: Corpus, losses: dict[str, float]
) -> str:
    import platform

    import transformers

    unigram = unigram_losses(corpus, model.config.vocab_size)
    rows = "\n".join(
        f"| {source} | {losses[source]:.3f} | {math.exp(losses[source]):.2f} "
        f"| {unigram[source]:.3f} | {math.exp(unigram[source]):.1f} |"
        for source in losses
    )
    seen = recipe.steps * recipe.batch_size * recipe.sequence_length
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    command = "python -m studies.tiny.pretraining --output DIR "
    if name != "tiny":
        command += f"--model {name} "
    command += f"--steps {recipe.steps} --seed {recipe.seed}"
    return f"""# The model `{name}`

A Llama of {parameters:,} parameters ({config.num_hidden_layers} layers, width \
{config.hidden_size}, {config.num_attention_heads} heads, {config.vocab_size:,} byte-level BPE
tokens; stored as {recipe.stored}), pretrained on {seen / 1e6:.1f} M tokens: \
{1 - recipe.share:.0%} of them the Python standard
library's sources and docstrings, {recipe.share:.0%} procedural exercises. It is there so that
studies, tests and measurements run with no network; it knows nothing else. The text of the
fine-tuning tasks was not part of its training.

    {command}

Losses in nats a token on held-out documents, beside those of token frequencies alone (Python
{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}):

| text | loss | perplexity | unigram loss | unigram perplexity |
| --- | --- | --- | --- | --- |
{rows}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and pretrain."""
    parser = argparse.ArgumentParser(description="Pretrain a built-in model.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--model", choices=list(RECIPES), default="tiny", help="its recipe")
    parser.add_argument("--steps", type=int, help="optimizer steps, where not the recipe's")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = replace(RECIPES[options.model], seed=options.seed)
    if options.steps:
        recipe = replace(recipe, steps=options.steps)
    losses = pretrain(options.output, recipe, name=options.model)
    print(json.dumps({source: round(loss, 4) for source, loss in losses.items()}))


if __name__ == "__main__":
    main()
