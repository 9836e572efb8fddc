from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

from studies.tiny import pretraining
from studies.tiny.pretraining import Recipe

BRIEF = Recipe(steps=4, batch_size=2, sequence_length=64, warmup=1, exercises=400, files=6, seed=1)


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    pretraining.pretrain(folder, BRIEF, checkpoint_every=2)
    return folder


def test_the_outcome_is_an_ordinary_model_folder(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert model.config.model_type == "llama"
    assert tokenizer.decode(tokenizer("date 12")["input_ids"], skip_special_tokens=True)
    assert "unigram" in (finished / "README.md").read_text()


def test_losses_are_logged(finished: Path) -> None:
    lines = (finished / "pretraining.jsonl").read_text().splitlines()
    validations = [line for line in map(json.loads, lines) if "validation" in line]
    assert [line["step"] for line in validations] == [2, 4]
    assert set(validations[0]["validation"]) == {"standard library", "exercises"}


def test_a_stopped_run_goes_on_to_the_same_weights(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = pretraining._train_step
    rates = []

    def stop_at_the_fourth(model, optimizer, tokens, rate):
        if len(rates) == 3:
            raise Interrupted
        rates.append(rate)
        return train_step(model, optimizer, tokens, rate)

    monkeypatch.setattr(pretraining, "_train_step", stop_at_the_fourth)
    with pytest.raises(Interrupted):
        pretraining.pretrain(tmp_path, BRIEF, checkpoint_every=2)
    monkeypatch.setattr(pretraining, "_train_step", train_step)
    pretraining.pretrain(tmp_path, BRIEF, checkpoint_every=2)

    straight = AutoModelForCausalLM.from_pretrained(finished).state_dict()
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in straight.items():
        torch.testing.assert_close(resumed[name], weight, msg=name)


def test_a_checkpoint_of_another_recipe_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())
    with pytest.raises(SystemExit, match="another recipe"):
        pretraining.pretrain(tmp_path, replace(BRIEF, steps=9))


def test_learning_rate_warms_up_and_decays() -> None:
    recipe = Recipe(steps=1000, warmup=100)
    rates = [recipe.rate(step) for step in range(1000)]
    assert rates.index(max(rates)) in (99, 100)
    assert rates[0] == pytest.approx(recipe.learning_rate / 100)
    assert rates[-1] == pytest.approx(recipe.learning_rate / 100, rel=0.01)


def test_batches_depend_on_recipe_and_step_alone() -> None:
    streams = {source: torch.arange(1000) for source in ("standard library", "exercises")}
    corpus = pretraining.Corpus(streams, streams)
    assert torch.equal(corpus.batch(BRIEF, 7), corpus.batch(BRIEF, 7))
    assert not torch.equal(corpus.batch(BRIEF, 7), corpus.batch(BRIEF, 8))
    assert corpus.batch(BRIEF, 7).shape == (2, 64)


def test_shares_of_the_sources_are_kept_over_the_batches() -> None:
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        read = [Recipe(share=share).source(place) for place in range(1000)]
        assert abs(read.count("exercises") - 1000 * share) <= 1
    assert [Recipe().source(place) for place in range(2)] == ["standard library", "exercises"]


def test_half_precision_is_a_matter_of_storage(tmp_path: Path) -> None:
    stored = replace(BRIEF, steps=1, exercises=100, files=2, layers=1, width=32, stored="float16")
    pretraining.pretrain(tmp_path, stored, name="another")
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (1, 32)
    assert "`another`" in (tmp_path / "README.md").read_text()


def test_unigram_loss_is_the_entropy_of_known_frequencies() -> None:
    stream = torch.tensor([0, 1] * 5000)
    corpus = pretraining.Corpus({"text": stream}, {"text": stream})
    assert pretraining.unigram_losses(corpus, 2)["text"] == pytest.approx(math.log(2), abs=1e-3)
